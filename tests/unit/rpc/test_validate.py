"""What can be said about a request without the catalog: bounds are exact, paths are right, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from server.errors import TsugiError
from server.rpc import validate
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_service_pb2 import SourceRecord

NOW_US = 1_760_000_000_000_000
AHEAD_US = 5 * 60 * 1_000_000


def refused(call: Callable[[], object], path: str, reason: str = "FIELD_INVALID") -> TsugiError:
    with pytest.raises(TsugiError) as refusal:
        call()
    assert ErrorReason.Name(refusal.value.reason) == f"ERROR_REASON_{reason}"
    assert refusal.value.metadata["field"] == path
    return refusal.value


def usual_decide() -> DecideRequest:
    return json_format.ParseDict(
        {
            "profileId": "0f" * 16,
            "identities": [{"namespace": "customer_number", "value": "1"}],
            "placements": [{"placement": "home_banner", "count": 2}],
            "context": {
                "hour": {"numberValue": 5},
                "note": {"textValue": "ça va 🏃"},
                "since": {"timeValue": "2026-01-01T00:00:00Z"},
            },
            "requestId": "r",
            "decisionAck": "DECISION_ACK_DURABLE",
        },
        DecideRequest(),
    )


def usual_record() -> SourceRecord:
    return SourceRecord(record_id="r", source="crm", identities=[Identity(namespace="n", value="v")])


def test_usual_requests_pass_unchanged() -> None:
    request, before = usual_decide(), usual_decide()
    validate.decide_request(request)
    assert request == before
    validate.source_record(usual_record(), NOW_US)
    validate.report_outcome(ReportOutcomeRequest(action="a", outcome_id="o", type="t"), NOW_US)


@pytest.mark.parametrize(
    ("check", "most"),
    [
        (partial(validate.caller_id, "id"), 128),
        (lambda text: validate.identity("id", Identity(namespace="n", value=text)), 256),
    ],
)
@pytest.mark.parametrize("letter", ["x", "é", "漢"])
def test_length_is_counted_in_bytes(check: Callable[[str], None], most: int, letter: str) -> None:
    n_bytes = len(letter.encode())
    check(letter * (most // n_bytes))
    with pytest.raises(TsugiError):
        check(letter * (most // n_bytes + 1))


@pytest.mark.parametrize("text", ["a\x00b", "\n", "\x7f", "\x9f", "\u202e", "\u200b", "\ufeff", "\ue000", "\U000e0001"])
def test_control_and_format_characters_are_in_no_id(text: str) -> None:
    refused(lambda: validate.plain("id", text), "id")


@pytest.mark.parametrize("text", ["O'Neill", "Zoë", "漢字", "a b", "%s", "../x", "🏃", "<b>"])
def test_readable_text_is_an_id(text: str) -> None:
    validate.plain("id", text)


def test_values_of_records_are_checked_where_they_stand() -> None:
    record = usual_record()
    record.attributes["x" * 1_000].text_value = "\0"
    error = refused(lambda: validate.source_record(record, NOW_US), f"attributes.{'x' * 64}")
    assert len(error.message) < 200, "the path is cut with its name"
    record = usual_record()
    record.event.properties["since"].time_value.nanos = -1
    refused(lambda: validate.source_record(record, NOW_US), "event.properties.since")


def test_instant_may_lie_five_minutes_ahead_and_no_longer() -> None:
    request = ReportOutcomeRequest(action="a", outcome_id="o", type="t")
    request.occurrence_time.FromMicroseconds(NOW_US + AHEAD_US)
    validate.report_outcome(request, NOW_US)
    request.occurrence_time.FromMicroseconds(NOW_US + AHEAD_US + 1)
    refused(lambda: validate.report_outcome(request, NOW_US), "occurrence_time", "TIME_OUT_OF_RANGE")


@given(st.integers(0, (1 << 64) - 1))
def test_etag_and_page_token_of_any_lsn_pass(lsn: int) -> None:
    assert validate.etag(str(lsn)) == lsn
    assert validate.page(0, str(lsn)) == (50, lsn)


@given(st.one_of(st.integers(1 << 64), st.integers(max_value=-1), st.text(min_size=1)).map(str))
def test_nothing_else_is_an_etag_or_a_page_token(text: str) -> None:
    if text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) < 1 << 64:
        return
    refused(lambda: validate.etag(text), "etag")
    refused(lambda: validate.page(0, text), "page_token")


def test_page_holds_50_by_default_and_500_at_most() -> None:
    assert [validate.page(size, "")[0] for size in (0, 1, 500, 501, 1 << 31)] == [50, 1, 500, 500, 500]
    assert validate.page(0, "")[1] is None
    assert validate.etag("") is None


def test_revision_is_a_sha256_in_small_letters() -> None:
    assert validate.revision("ab" * 32) == bytes.fromhex("ab" * 32)
    for text in ("", "AB" * 32, "ab" * 31, "ab" * 33, "zz" * 32, "ab" * 32 + "\n"):
        refused(partial(validate.revision, text), "revision")


def test_item_of_a_batch_is_itself_or_its_error() -> None:
    good, bad = usual_record(), SourceRecord()
    check = partial(validate.source_record, now_us=NOW_US)
    assert validate.checked(good, check) is good
    assert isinstance(validate.checked(bad, check), TsugiError)


def test_unknown_acknowledgement_is_refused() -> None:
    request = usual_decide()
    request.decision_ack = 3  # type: ignore[assignment]  # what a later caller may send
    refused(lambda: validate.decide_request(request), "decision_ack")
