"""Uploads that go wrong: out of order, incomplete, altered, too large, hostile, or of something that does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import Message

from server.catalog.faults import VIOLATIONS_MAX
from server.catalog.loading import load_catalog
from server.catalog.validation import CATALOG_BYTES_MAX
from server.registry.bundle import BUNDLE_BYTES_MAX
from server.rpc.upload import UPLOADS_MAX
from tests.support import bundles, catalogs
from tests.support.hostile_bundles import HOSTILE
from tests.support.protos import stated_maxima
from tests.support.running import Server, serving, told, until
from tests.support.sports_retail import bundle as sports_bundle
from tests.support.wire import Refusal, Wire, refusal_of
from tsugi.requests import catalog_upload, model_upload
from tsugi.v1 import catalog_pb2
from tsugi.v1.catalog_service_pb2 import CatalogUploadHeader, PushCatalogRequest, PushCatalogResponse
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.model_pb2 import ModelRole
from tsugi.v1.model_service_pb2 import ModelUploadHeader, PushModelRequest

pytestmark = pytest.mark.slow

INVALID, LIMIT, CATALOG = "FIELD_INVALID", "LIMIT_EXCEEDED", "CATALOG_INVALID"
DIGEST, INCOMPLETE, CONTRACT = "UPLOAD_DIGEST_MISMATCH", "UPLOAD_INCOMPLETE", "BUNDLE_CONTRACT_MISMATCH"
DATA: Final = bytes(range(256)) * 800  # four chunks
STRIPES: Final = b"".join(bytes([i]) * 65_536 for i in range(3))  # three chunks, no two alike
# One of each kind, beside the many that the gate's own test sends: those parse() refuses, and those the sandbox does.
HOSTILE_NAMES: Final = (
    "random_bytes", "zip_archive", "weights_in_the_working_folder", "loop_without_end", "one_node_too_many",
    "terabyte_of_zeros_when_loaded",
)  # fmt: skip


def catalog() -> catalog_pb2.Catalog:
    """The catalog that the hostile bundles were made for."""
    return load_catalog(bundles.CATALOG)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        with server.client() as client:
            client.push_catalog(catalog())
        yield server
        assert server.roles() == roles, "a role died of a bad upload"


@pytest.fixture
def wire(running: Server) -> Iterator[Wire]:
    for server in told(running):
        with Wire(server.address) as wire:
            yield wire


def model_parts(data: bytes = DATA, **header: Any) -> list[PushModelRequest]:
    parts = model_upload(data, "label")
    for name, value in header.items():
        setattr(parts[0].header, name, value)
    return parts


def catalog_parts(data: bytes = DATA, **header: Any) -> list[PushCatalogRequest]:
    stated: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)} | header
    chunks = [PushCatalogRequest(chunk=data[i : i + 65_536]) for i in range(0, len(data), 65_536)]
    return [PushCatalogRequest(header=CatalogUploadHeader(**stated)), *chunks]


def refused(wire: Wire, method: str, parts: Sequence[Message], reason: str, path: str = "") -> Refusal:
    answer = wire.ask(method, *parts)
    assert isinstance(answer, Refusal), "it was let through"
    assert (answer.reason, answer.domain) == (f"ERROR_REASON_{reason}", "tsugi"), answer.message
    assert path == "" or path in answer.paths, answer.fields
    return answer


UPLOADS: list[tuple[str, Callable[[Callable[..., Any]], Any], str, str]] = [
    ("nothing", lambda make: [], INVALID, "header"),
    ("no header", lambda make: make()[1:], INVALID, "header"),
    ("empty part first", lambda make: [type(make()[0])(), *make()], INVALID, "header"),
    ("two headers", lambda make: [make()[0], *make()], INVALID, "chunk"),
    ("no digest", lambda make: make(sha256=""), INVALID, "header.sha256"),
    ("digest of another form", lambda make: make(sha256="A" * 64), INVALID, "header.sha256"),
    ("no size", lambda make: make(size_bytes=0), INVALID, "header.size_bytes"),
    ("header alone", lambda make: make()[:1], INCOMPLETE, ""),
    ("last chunk missing", lambda make: make()[:-1], INCOMPLETE, ""),
    ("more than was said", lambda make: make(size_bytes=10), LIMIT, "chunk"),
    ("chunk twice", lambda make: [*make(), make()[-1]], LIMIT, "chunk"),
    ("empty chunk", lambda make: [*make(), type(make()[0])(chunk=b"")], INVALID, "chunk"),
    ("other digest", lambda make: make(sha256="0" * 64), DIGEST, ""),
    ("chunks in another order", lambda make: [make(STRIPES)[0], *reversed(make(STRIPES)[1:])], DIGEST, ""),
]


@pytest.mark.parametrize("method", ["PushCatalog", "PushModel"])
@pytest.mark.parametrize("case", UPLOADS, ids=lambda case: case[0])
def test_broken_upload_is_refused(wire: Wire, method: str, case: tuple[str, Callable[..., Any], str, str]) -> None:
    _, build, reason, path = case
    make = catalog_parts if method == "PushCatalog" else model_parts
    refused(wire, method, build(make), reason, path)


def test_upload_states_no_more_than_its_limit(wire: Wire) -> None:
    refused(wire, "PushCatalog", catalog_parts(size_bytes=CATALOG_BYTES_MAX + 1), LIMIT, "header.size_bytes")
    refused(wire, "PushModel", model_parts(size_bytes=BUNDLE_BYTES_MAX + 1), LIMIT, "header.size_bytes")


def test_chunk_is_no_larger_than_its_limit(wire: Wire) -> None:
    for method, make, part in (
        ("PushCatalog", catalog_parts, PushCatalogRequest),
        ("PushModel", model_parts, PushModelRequest),
    ):
        refused(wire, method, [make()[0], part(chunk=bytes(65_537))], LIMIT, "chunk")
        refused(wire, method, [make()[0], part(chunk=bytes(300_000))], LIMIT, "request")


@pytest.mark.parametrize("label", ["", "../../x", "CON", "x" * 65, "ｌａｂｅｌ", "a b"])
def test_label_of_another_form_is_refused(wire: Wire, label: str) -> None:
    refused(wire, "PushModel", model_parts(label=label), INVALID, "header.label")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_bundle_gets_its_reason(wire: Wire, name: str) -> None:
    hostile = next(each for each in HOSTILE if each.name == name)
    answer = refused(wire, "PushModel", model_parts(hostile.make()), ErrorReason.Name(hostile.reason)[13:])
    assert len(answer.message) < 1_000


def test_bundle_for_another_catalog_is_refused_with_every_fault(wire: Wire) -> None:
    answer = refused(wire, "PushModel", model_parts(sports_bundle()), CONTRACT, "manifest.features[0].fact")
    assert len(answer.paths) > 10


def test_bytes_that_are_no_catalog_are_refused(wire: Wire) -> None:
    refused(wire, "PushCatalog", catalog_parts(DATA), "REQUEST_MALFORMED")
    deep = b"\x62\x7f\x3a\x7d" * 200  # actions in attributes in actions, as far as a parser follows
    refused(wire, "PushCatalog", catalog_parts(deep), "REQUEST_MALFORMED")


def test_every_dangling_reference_is_told_with_its_path(wire: Wire) -> None:
    bad = catalogs.message()
    bad.goals[0].outcomes[0].type = "clack"
    bad.placements[0].channel = "wob"
    bad.placements[1].goal = "klick"
    bad.actions[0].treatments[0].channel = "smoke signals"
    bad.actions[1].eligibility = "profile.height > 1.0"
    bad.actions[2].attributes["colour"] = "red"
    answer = refused(wire, "PushCatalog", catalog_upload(bad), CATALOG)
    assert {
        "goals[0].outcomes[0].type",
        "placements[0].channel",
        "placements[1].goal",
        "actions[0].treatments[0].channel",
        "actions[2].attributes.colour",
    } <= set(answer.paths)
    described = dict(answer.fields)
    assert "did you mean 'web'" in described["placements[0].channel"]
    assert answer.metadata["faults"] == str(len(answer.fields))


def test_catalog_of_nothing_but_faults_still_gets_through_to_its_caller(wire: Wire) -> None:
    bad = catalogs.message(actions=[{"name": f"Action {i}"} for i in range(10_000)])
    answer = refused(wire, "PushCatalog", catalog_upload(bad), CATALOG, "actions[0].name")
    assert int(answer.metadata["faults"]) == VIOLATIONS_MAX
    long = catalogs.message()
    long.actions[0].attributes["x" * 1_000_000] = 1.0
    refused(wire, "PushCatalog", catalog_upload(long), CATALOG)
    wide = catalogs.message()
    wide.actions[0].attributes["é" * 20_000] = 1.0
    refused(wire, "PushCatalog", catalog_upload(wide), CATALOG)


@pytest.mark.parametrize(
    "name", [name.removeprefix("tsugi.v1.") for name in stated_maxima() if name.split(".")[2] in
             {"Catalog", "Attribute", "EventType", "Goal", "Action", "Journey", "Matching"}]
)  # fmt: skip
def test_one_more_than_a_catalog_may_hold_is_refused(wire: Wire, name: str) -> None:
    path = {
        "Attribute.allowed_values": "profile_attributes[2].allowed_values",
        "Journey.stages": "journey.stages",
        "Journey.transitions": "journey.transitions",
        "Matching.fields": "matching.fields",
        "EventType.properties": "event_types[0].properties",
        "Goal.outcomes": "goals[0].outcomes",
        "Goal.learners": "goals[0].learners",
        "Action.treatments": "actions[0].treatments",
        "Attribute.purposes": "profile_attributes[0].purposes",
    }.get(name, name.removeprefix("Catalog."))
    bad = catalogs.message()
    maximum = stated_maxima()[f"tsugi.v1.{name}"]
    assert maximum is not None, "every list of a catalog states how long it may be"
    holder: Any = bad
    *way, last = path.split(".")
    for step in way:
        field, _, index = step.rstrip("]").partition("[")
        holder = getattr(holder, field)[int(index)] if index else getattr(holder, field)
    entries = getattr(holder, last)
    missing = maximum + 1 - len(entries)
    if last in {"allowed_values", "purposes"}:
        entries.extend(f"value {i}" for i in range(missing))
    elif last == "learners":
        entries.extend([catalog_pb2.LEARNER_FAMILY_FOREST] * missing)
    else:
        message_class = type(getattr(holder, last).add())
        del entries[-1]
        entries.extend(
            message_class(**{f.name: f"x{i}" for f in message_class.DESCRIPTOR.fields if f.name == "name"})
            for i in range(missing)
        )
    answer = refused(wire, "PushCatalog", catalog_upload(bad), CATALOG, path)
    assert any(str(maximum) in description for field, description in answer.fields if field == path)


@pytest.mark.parametrize("role", [ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER])
def test_catalog_that_the_holder_of_a_role_cannot_read_is_refused(running: Server, wire: Wire, role: ModelRole) -> None:
    with running.client() as client:
        revision = client.push_model(bundles.good_bundle().SerializeToString(), "good").model_revision.revision
        client.assign_model_role(revision, role=role)
        other = catalog()
        del other.context_attributes[:]
        answer = refused(wire, "PushCatalog", catalog_upload(other), CATALOG)
        name = ModelRole.Name(role).removeprefix("MODEL_ROLE_").lower()
        assert all(path.startswith(f"{name}.manifest.") for path in answer.paths), answer.fields
        assert answer.paths
        client.assign_model_role("", role=role)
        client.push_catalog(other, validate_only=True)


def test_old_etag_is_refused_and_the_present_one_is_not(wire: Wire) -> None:
    upload = catalog_upload(catalog(), etag="999", validate_only=True)
    present = refused(wire, "PushCatalog", upload, "ETAG_MISMATCH").metadata["etag"]
    reply = wire.ask("PushCatalog", *catalog_upload(catalog(), etag=present, validate_only=True))
    assert isinstance(reply, PushCatalogResponse)
    assert (reply.etag, reply.lsn) == (present, 0)


def test_uploads_beyond_what_a_worker_holds_are_told_to_come_again(running: Server) -> None:
    with Wire(running.address) as wire:
        path = "/tsugi.v1.ModelService/PushModel"
        gate: list[bool] = []
        header = PushModelRequest(
            header=ModelUploadHeader(label="slow", sha256="0" * 64, size_bytes=1_000)
        ).SerializeToString()

        def slowly() -> Iterator[bytes]:
            yield header
            until(lambda: gate, "the test lets the uploads end")

        push: grpc.StreamUnaryMultiCallable[bytes, bytes] = wire.channel.stream_unary(path)
        calls = [push.future(slowly(), timeout=60) for _ in range(UPLOADS_MAX + 2)]
        until(lambda: sum(call.done() for call in calls) == 2, "two are refused")
        gate.append(True)
        answers = [call.exception() for call in calls]
        reasons = sorted(refusal_of(answer).reason for answer in answers)  # type: ignore[arg-type]  # gRPC's own
        assert reasons == ["ERROR_REASON_UPLOAD_BUSY"] * 2 + ["ERROR_REASON_UPLOAD_INCOMPLETE"] * UPLOADS_MAX
