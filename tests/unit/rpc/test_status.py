"""How a refusal leaves: every reason has one code and is raised somewhere; details fit, and nothing else gets out."""

from __future__ import annotations

import ast
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from structlog.testing import capture_logs

from server.errors import TsugiError, Violation, field_invalid, limit_exceeded, not_found
from server.registry.blobs import BlobAbsentError
from server.rpc.status import _BY_CODE, CODES, DETAILS_KEY, item_error, status, told
from server.storage.record import CorruptRecordError
from tsugi.v1.error_reason_pb2 import ErrorReason

SERVER = Path(__file__).parents[3] / "server"
METADATA_BYTES_MAX = 8 * 1024  # what callers' libraries take by default
# Reasons that nothing raises yet, with why they stand in the enum.
UNRAISED: dict[str, str] = {}
REASONS = [reason for reason in ErrorReason.values() if reason != ErrorReason.ERROR_REASON_UNSPECIFIED]


def details(error: TsugiError) -> tuple[grpc.StatusCode, str, ErrorInfo, BadRequest, RetryInfo]:
    """Take the status of an error apart, and hold it to the room it has."""
    code, message, trailing = status(error)
    ((key, data),) = trailing
    assert key == DETAILS_KEY
    on_the_wire = sum(1 if 32 <= byte < 127 else 3 for byte in message.encode()) + 4 * len(data) / 3
    assert on_the_wire < METADATA_BYTES_MAX - 300, "the rest of the trailers needs room too"
    rich = Status.FromString(data)
    assert (rich.code, rich.message) == (code.value[0], message)
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in rich.details:
        assert any(detail.Unpack(known) for known in (info, bad_request, retry))
    return code, message, info, bad_request, retry


def test_every_reason_has_exactly_one_code() -> None:
    assert set(CODES) == set(REASONS)
    assert sum(len(reasons) for reasons in _BY_CODE.values()) == len(REASONS)
    assert grpc.StatusCode.UNKNOWN not in _BY_CODE


def test_every_reason_is_raised_somewhere() -> None:
    named = {
        node.attr
        for path in SERVER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("ERROR_REASON_") and path.name != "status.py"
    }
    named.add("ERROR_REASON_INTERNAL_ERROR")  # which status.py itself makes of whatever is no refusal
    raised = {name for name in map(ErrorReason.Name, REASONS) if name in named}
    assert set(map(ErrorReason.Name, REASONS)) - raised == set(UNRAISED)


@pytest.mark.parametrize("reason", REASONS, ids=ErrorReason.Name)
def test_status_carries_the_reason_and_what_varies(reason: ErrorReason) -> None:
    code, message, info, bad_request, retry = details(TsugiError(reason, "text", number=5))
    assert code is CODES[reason]
    assert message == "text"
    assert (info.reason, info.domain, dict(info.metadata)) == (ErrorReason.Name(reason), "tsugi", {"number": "5"})
    assert not bad_request.field_violations
    is_worth_another_try = code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    assert (retry.retry_delay.seconds > 0) == is_worth_another_try


@pytest.mark.parametrize(
    ("error", "path"),
    [
        (field_invalid("context.hour", "a number is required"), "context.hour"),
        (limit_exceeded("records", 501, 500), "records"),
        (not_found("placement", "nowhere", "placements[0].placement"), "placements[0].placement"),
        (TsugiError(ErrorReason.ERROR_REASON_TIME_OUT_OF_RANGE, "too early", field="occurrence"), "occurrence"),
    ],
)  # fmt: skip
def test_field_at_fault_stands_in_the_details_and_in_the_metadata(error: TsugiError, path: str) -> None:
    _, _, info, bad_request, _ = details(error)
    assert [violation.field for violation in bad_request.field_violations] == [path]
    assert bad_request.field_violations[0].description
    assert info.metadata["field"] == path
    assert item_error(error).metadata["field"] == path


def test_many_faults_are_cut_to_what_a_caller_can_receive() -> None:
    violations = [Violation(f"actions[{i}].treatments[0].channel", "no channel is named 'wob'") for i in range(10_000)]
    error = TsugiError(ErrorReason.ERROR_REASON_CATALOG_INVALID, "faults", violations=violations, faults=10_000)
    _, _, info, bad_request, _ = details(error)
    assert 30 < len(bad_request.field_violations) < 10_000
    assert info.metadata["faults"] == "10000"


@pytest.mark.parametrize("letter", ["x", "é", "漢", "🏃"])
def test_long_texts_are_cut_and_stay_text(letter: str) -> None:
    long = letter * 100_000
    metadata = {f"name_{i}": long for i in range(5)}
    error = TsugiError(
        ErrorReason.ERROR_REASON_FIELD_INVALID, long, violations=[Violation(long, long)] * 10, **metadata
    )
    _, message, info, bad_request, _ = details(error)
    assert set(message) == {letter}
    assert bad_request.field_violations[0].field
    assert all(set(value) == {letter} for value in info.metadata.values())


def test_unknown_exception_leaves_as_an_id_alone() -> None:
    secret = "Anna Schmidt, /var/lib/tsugi"  # what must not get out
    with capture_logs() as logs:
        error = told(ValueError(secret))
    code, message, info, bad_request, _ = details(error)
    assert code is grpc.StatusCode.INTERNAL
    assert info.reason == "ERROR_REASON_INTERNAL_ERROR"
    (entry,) = logs
    assert entry["error_id"] == info.metadata["error_id"]
    assert entry["error_id"] in message
    assert not bad_request.field_violations
    ((_, data),) = status(error)[2]
    for word in ("Anna", "Schmidt", "tsugi/", "ValueError", "Traceback"):
        assert word not in message
        assert word.encode() not in data


@pytest.mark.parametrize("error", [CorruptRecordError("at page 7"), BlobAbsentError(bytes(32), "is not here")])
def test_what_is_stored_and_wrong_is_data_loss(error: Exception) -> None:
    with capture_logs():
        code, message, info, _, _ = details(told(error))
    assert code is grpc.StatusCode.DATA_LOSS
    assert info.reason == "ERROR_REASON_RECORD_CHECKSUM"
    assert str(error) not in message


def test_refusals_of_ours_pass_unchanged() -> None:
    error = field_invalid("a", "b")
    assert told(error) is error
