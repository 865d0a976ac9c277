"""Bad requests of every unary method: each is refused with a code, a reason and the field's path, and nothing dies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from server.rpc.status import CODES
from tests.support.protos import stated_maxima
from tests.support.refusing import OTHER_PERSON, PERSON, World, make_world, outcome, request, source
from tests.support.running import Server, serving, told
from tests.support.wire import METHODS, Refusal, Wire, request_class
from tsugi.v1.error_reason_pb2 import ErrorReason

pytestmark = pytest.mark.slow

INVALID, NOT_FOUND, LIMIT = "FIELD_INVALID", "RESOURCE_NOT_FOUND", "LIMIT_EXCEEDED"
TOKEN, TIME = "DECISION_ID_INVALID", "TIME_OUT_OF_RANGE"
CONTROL, BIDI = "a\nb", "a\u202eb"
UNARY: Final = [name for name, method in METHODS.items() if not method.client_streaming]

Changes = Callable[[World], dict[str, Any]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        yield server
        assert server.roles() == roles, "a role died of a bad request"


@pytest.fixture(scope="module")
def world(running: Server) -> World:
    with running.client() as client:
        return make_world(client)


@pytest.fixture
def wire(running: Server) -> Iterator[Wire]:
    for server in told(running):
        with Wire(server.address) as wire:
            yield wire


def number(value: object) -> dict[str, Any]:
    return {"context": {"hour": {"numberValue": value}}}


def identity(**changes: str) -> dict[str, Any]:
    return {"identities": [PERSON | changes]}


def slots(*placements: tuple[str, int]) -> dict[str, Any]:
    return {"placements": [{"placement": name, "count": count} for name, count in placements]}


def later(**span: float) -> str:
    return (datetime.now(UTC) + timedelta(**span)).isoformat()


DECIDE: list[tuple[str, dict[str, Any], str, str]] = [
    ("no placement", {"placements": []}, INVALID, "placements"),
    ("unknown placement", slots(("greedy", 1), ("nowhere", 1)), NOT_FOUND, "placements[1].placement"),
    ("unnamed placement", slots(("", 1)), NOT_FOUND, "placements[0].placement"),
    ("placement twice", slots(("greedy", 1), ("greedy", 1)), INVALID, "placements[1].placement"),
    ("too many slots", slots(("greedy", 5)), LIMIT, "placements[0].count"),
    ("most slots of all", slots(("greedy", 2**32 - 1)), LIMIT, "placements[0].count"),
    ("unknown candidate", {"candidateActions": ["action_0", "nothing"]}, NOT_FOUND, "candidate_actions[1]"),
    ("unknown exclusion", {"excludedActions": ["nothing"]}, NOT_FOUND, "excluded_actions[0]"),
    ("unknown fact", {"context": {"weather": {"textValue": "rain"}}}, NOT_FOUND, "context.weather"),
    ("fact of another type", {"context": {"hour": {"textValue": "noon"}}}, INVALID, "context.hour"),
    ("fact without a value", {"context": {"member": {}}}, INVALID, "context.member"),
    ("not a number", number("NaN"), INVALID, "context.hour"),
    ("infinite number", number("Infinity"), INVALID, "context.hour"),
    ("infinitely small number", number("-Infinity"), INVALID, "context.hour"),
    ("number out of range", number(24), INVALID, "context.hour"),
    ("huge number", number(1e308), INVALID, "context.hour"),
    ("value of no category", {"context": {"device": {"textValue": "fridge"}}}, INVALID, "context.device"),
    ("long text", {"context": {"note": {"textValue": "ä" * 513}}}, LIMIT, "context.note"),
    ("control character in a text", {"context": {"note": {"textValue": CONTROL}}}, INVALID, "context.note"),
    ("unknown namespace", identity(namespace="badge"), NOT_FOUND, "identities[0].namespace"),
    ("no namespace", identity(namespace=""), INVALID, "identities[0].namespace"),
    ("empty identity", identity(value=""), INVALID, "identities[0].value"),
    ("long identity", identity(value="x" * 257), INVALID, "identities[0].value"),
    ("identity with a control character", identity(value=CONTROL), INVALID, "identities[0].value"),
    ("identity that turns the writing", identity(value=BIDI), INVALID, "identities[0].value"),
    ("profile id of another form", {"profileId": "0" * 31 + "G"}, INVALID, "profile_id"),
    ("long request id", {"requestId": "x" * 129}, INVALID, "request_id"),
    ("request id with a control character", {"requestId": CONTROL}, INVALID, "request_id"),
    ("unknown acknowledgement", {"decisionAck": 7}, INVALID, "decision_ack"),
    ("request over its limit", {"candidateActions": ["x" * 300_000]}, LIMIT, "request"),
]
OUTCOME: list[tuple[str, Changes, str, str]] = [
    ("no decision id", lambda w: {"decisionId": ""}, TOKEN, "decision_id"),
    ("forged decision id", lambda w: {"decisionId": "A" * 56}, TOKEN, "decision_id"),
    ("altered decision id", lambda w: {"decisionId": w.decision_id[:-1] + "-"}, TOKEN, "decision_id"),
    ("decision id cut short", lambda w: {"decisionId": w.decision_id[:-4]}, TOKEN, "decision_id"),
    ("decision id that is no text of ours", lambda w: {"decisionId": "ü" * 56}, TOKEN, "decision_id"),
    ("no action", lambda w: {"action": ""}, INVALID, "action"),
    ("no outcome id", lambda w: {"outcomeId": ""}, INVALID, "outcome_id"),
    ("long outcome id", lambda w: {"outcomeId": "x" * 129}, INVALID, "outcome_id"),
    ("outcome id that turns the writing", lambda w: {"outcomeId": BIDI}, INVALID, "outcome_id"),
    ("no type", lambda w: {"type": ""}, INVALID, "type"),
    ("unknown type", lambda w: {"type": "applause"}, NOT_FOUND, "type"),
    ("value out of range", lambda w: {"value": 1000.1}, INVALID, "value"),
    ("value below its range", lambda w: {"value": -1e-9}, INVALID, "value"),
    ("value where none belongs", lambda w: {"type": "click", "value": 1}, INVALID, "value"),
    ("value that is not a number", lambda w: {"value": "NaN"}, INVALID, "value"),
    ("infinite value", lambda w: {"value": "Infinity"}, INVALID, "value"),
    ("time ahead", lambda w: {"occurrenceTime": later(minutes=6)}, TIME, "occurrence_time"),
    ("time before the decision", lambda w: {"occurrenceTime": later(minutes=-6)}, TIME, "occurrence_time"),
]
RECORD: list[tuple[str, dict[str, Any], str, str]] = [
    ("no record id", {"recordId": ""}, INVALID, "record_id"),
    ("long record id", {"recordId": "x" * 129}, INVALID, "record_id"),
    ("no source", {"source": ""}, INVALID, "source"),
    ("source of another form", {"source": "The CRM"}, INVALID, "source"),
    ("nobody", {"identities": []}, INVALID, "identities"),
    ("unknown namespace", identity(namespace="badge"), NOT_FOUND, "identities[0].namespace"),
    ("empty identity", identity(value=""), INVALID, "identities[0].value"),
    ("two known people", {"identities": [PERSON, OTHER_PERSON]}, "IDENTITIES_CONFLICT", "identities"),
    ("unknown attribute", {"attributes": {"mood": {"textValue": "good"}}}, NOT_FOUND, "attributes.mood"),
    ("attribute of another type", {"attributes": {"hour": {"boolValue": True}}}, INVALID, "attributes.hour"),
    ("attribute without a value", {"attributes": {"hour": {}}}, INVALID, "attributes.hour"),
    ("attribute not a number", {"attributes": {"hour": {"numberValue": "NaN"}}}, INVALID, "attributes.hour"),
    ("attribute out of range", {"attributes": {"hour": {"numberValue": -1}}}, INVALID, "attributes.hour"),
    ("value of no category", {"attributes": {"device": {"textValue": "fridge"}}}, INVALID, "attributes.device"),
    ("long text", {"attributes": {"note": {"textValue": "x" * 1025}}}, LIMIT, "attributes.note"),
    ("control character", {"attributes": {"note": {"textValue": CONTROL}}}, INVALID, "attributes.note"),
    ("unknown event", {"event": {"type": "wedding"}}, NOT_FOUND, "event.type"),
    ("event without a type", {"event": {}}, NOT_FOUND, "event.type"),
    (
        "unknown property",
        {"event": {"type": "visit", "properties": {"mood": {"boolValue": True}}}},
        NOT_FOUND,
        "event.properties.mood",
    ),
    (
        "property of another type",
        {"event": {"type": "visit", "properties": {"since": {"textValue": "ever"}}}},
        INVALID,
        "event.properties.since",
    ),
    (
        "event ahead",
        {"event": {"type": "visit", "occurrenceTime": "9999-01-01T00:00:00Z"}},
        TIME,
        "event.occurrence_time",
    ),
]
READS: list[tuple[str, str, Changes, str, str]] = [
    ("nobody", "GetProfile", lambda w: {"identity": None}, INVALID, "profile_id"),
    ("id of another form", "GetProfile", lambda w: {"profileId": "x"}, INVALID, "profile_id"),
    ("unknown id", "GetProfile", lambda w: {"profileId": "0" * 32}, NOT_FOUND, ""),
    ("empty identity", "GetProfile", lambda w: {"identity": PERSON | {"value": ""}}, INVALID, "identity.value"),
    ("no namespace", "GetProfile", lambda w: {"identity": PERSON | {"namespace": ""}}, INVALID, "identity.namespace"),
    ("unknown identity", "GetProfile", lambda w: {"identity": PERSON | {"value": "x"}}, NOT_FOUND, ""),
    ("revision of another form", "GetCatalog", lambda w: {"revision": "newest"}, INVALID, "revision"),
    ("unknown revision", "GetCatalog", lambda w: {"revision": "0" * 64}, NOT_FOUND, "revision"),
    *(
        (f"token {t!r}", method, lambda w, t=t: {"pageToken": t or str(w.record_lsn)}, INVALID, "page_token")
        for method in ("ListCatalogRevisions", "ListModelRevisions")
        for t in ("abc", "0", "-1", "٣", "9" * 19, "9" * 20, "9" * 21, "")
    ),
]  # fmt: skip
WRITES: list[tuple[str, str, Changes, str, str]] = [
    *(
        (name, method, lambda w, changes=changes: changes, reason, path)
        for method in ("RollbackCatalog", "AssignModelRole", "RollbackModel")
        for name, changes, reason, path in (
            ("long request id", {"requestId": "x" * 129}, INVALID, "request_id"),
            ("etag of another form", {"etag": "W/5"}, INVALID, "etag"),
            ("etag too large", {"etag": "9" * 20}, INVALID, "etag"),
        )
    ),
    ("unknown revision", "RollbackCatalog", lambda w: {"revision": "0" * 64}, NOT_FOUND, "revision"),
    ("revision of another form", "RollbackCatalog", lambda w: {"revision": "0" * 63}, INVALID, "revision"),
    ("nothing before", "RollbackCatalog", lambda w: {}, "NO_PREVIOUS_REVISION", ""),
    ("no role", "AssignModelRole", lambda w: {"role": 0}, INVALID, "role"),
    ("role of the learners", "AssignModelRole", lambda w: {"role": 2}, INVALID, "role"),
    ("role of nobody", "AssignModelRole", lambda w: {"role": 99}, INVALID, "role"),
    ("unknown revision", "AssignModelRole", lambda w: {"revision": "0" * 64}, NOT_FOUND, "revision"),
    ("revision of another form", "AssignModelRole", lambda w: {"revision": "x"}, INVALID, "revision"),
    ("old etag", "AssignModelRole", lambda w: {"etag": "1", "validateOnly": True}, "ETAG_MISMATCH", ""),
    ("no role", "RollbackModel", lambda w: {"role": 0}, INVALID, "role"),
    ("nothing before", "RollbackModel", lambda w: {}, "NO_PREVIOUS_REVISION", ""),
]  # fmt: skip


def check(refusal: object, reason: str, path: str) -> None:
    """Hold a refusal to what is promised of every one."""
    assert isinstance(refusal, Refusal), "it was let through"
    assert (refusal.reason, refusal.domain) == (f"ERROR_REASON_{reason}", "tsugi"), refusal.message
    assert refusal.code is CODES[ErrorReason.Value(refusal.reason)]  # type: ignore[index]  # its stub gives an int
    assert path == "" or path in refusal.paths, refusal.fields
    assert refusal.message
    assert len(json.dumps(refusal.metadata)) < 1_000


def cases(table: list[Any]) -> pytest.MarkDecorator:
    names = [" ".join(part for part in case[:2] if isinstance(part, str)) for case in table]
    return pytest.mark.parametrize("case", table, ids=names)


@cases(DECIDE)
def test_bad_decide_is_refused(wire: Wire, world: World, case: tuple[str, dict[str, Any], str, str]) -> None:
    _, changes, reason, path = case
    check(wire.ask("Decide", request("Decide", world, **changes)), reason, path)


@cases(OUTCOME)
def test_bad_outcome_is_refused_alone_and_in_a_batch(
    wire: Wire, world: World, case: tuple[str, Changes, str, str]
) -> None:
    _, changes, reason, path = case
    check(wire.ask("ReportOutcome", request("ReportOutcome", world, **changes(world))), reason, path)
    items = [outcome(world, outcomeId=f"beside {case[0]}"), outcome(world, **changes(world))]
    good, bad = results(wire, request("BatchReportOutcomes", world, outcomes=items))
    assert good.accepted.lsn
    assert ErrorReason.Name(bad.error.reason) == f"ERROR_REASON_{reason}"


def test_outcome_of_an_action_that_was_not_chosen_is_refused(wire: Wire, world: World) -> None:
    other = "action_1" if world.action == "action_0" else "action_0"
    check(wire.ask("ReportOutcome", request("ReportOutcome", world, action=other)), "ACTION_NOT_IN_DECISION", "action")


@cases(RECORD)
def test_bad_record_is_refused_alone(wire: Wire, world: World, case: tuple[str, dict[str, Any], str, str]) -> None:
    name, changes, reason, path = case
    records = [source(recordId=f"beside {name}"), source(recordId=f"bad {name}") | changes]
    good, bad = results(wire, request("IngestRecords", world, records=records))
    assert good.accepted.lsn
    assert ErrorReason.Name(bad.error.reason) == f"ERROR_REASON_{reason}"
    assert path == "" or path == bad.error.metadata["field"]


@cases([*READS, *WRITES])
def test_bad_read_or_write_is_refused(wire: Wire, world: World, case: tuple[str, str, Changes, str, str]) -> None:
    _, method, changes, reason, path = case
    check(wire.ask(method, request(method, world, **changes(world))), reason, path)


NO_MESSAGE: Final = {
    "no tag": b"\xff\xff\xff\xff",
    "cut short": b"\x0a\x05ab",
    "field zero": b"\x00",
    "10,000 groups deep": b"\x0b" * 10_000,
    "text that is none": b"\x0a\x02\xff\xfe",  # in the first field, where that is text
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_bytes_that_are_no_message_are_refused(wire: Wire, method: str) -> None:
    has_text = METHODS[method].input_type.fields_by_number[1].type == FieldDescriptor.TYPE_STRING
    for name, data in NO_MESSAGE.items():
        if has_text or name != "text that is none":
            check(wire.send(method, [data]), "REQUEST_MALFORMED", "")


def repeated_fields() -> list[tuple[str, str, str, int]]:
    """Walk a valid request of every method: method, path in it, path that the refusal names, stated maximum."""
    maxima = stated_maxima()
    found: list[tuple[str, str, str, int]] = []

    def walk(method: str, message: Message, path: str, named: str) -> None:
        for field in message.DESCRIPTOR.fields:
            below = f"{path}.{field.name}".lstrip(".")
            below_named = f"{named}.{field.name}".lstrip(".")
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            if field.is_repeated:
                maximum = maxima[field.full_name]
                assert maximum is not None, f"{field.full_name} states no maximum"
                found.append((method, below, below_named, maximum))
            entries = getattr(message, field.name) if field.is_repeated else None
            if is_map or (field.is_repeated and not entries):
                continue
            if field.message_type is not None and field.message_type.file.package == "tsugi.v1":
                inner = entries[0] if entries is not None else getattr(message, field.name)
                # Items of a batch are refused alone, by their own paths.
                walk(
                    method,
                    inner,
                    f"{below}[0]" if entries is not None else below,
                    "" if entries is not None else below_named,
                )

    for method in UNARY:
        walk(method, request(method, World("x", "x", 0)), "", "")
    return found


@pytest.mark.parametrize("case", repeated_fields(), ids=lambda case: f"{case[0]} {case[1]}")
def test_one_more_than_a_stated_maximum_is_refused(wire: Wire, world: World, case: tuple[str, str, str, int]) -> None:
    method, path, named, maximum = case
    message = request(method, world)
    overfill(message, path, maximum + 1)
    answer = wire.ask(method, message)
    if "[0]" in path:
        assert isinstance(answer, Message)
        error = answer.results[0].error  # type: ignore[attr-defined]  # both batches have results
        assert error.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
        assert error.metadata["field"] == named
        assert error.metadata["limit"] == str(maximum)
    else:
        check(answer, LIMIT, named)


def overfill(message: Any, path: str, n: int) -> None:
    """Make the repeated field at a path hold n entries."""
    *way, last = path.replace("[0]", "").split(".")
    for name in way:
        inner = getattr(message, name)
        message = inner[0] if message.DESCRIPTOR.fields_by_name[name].is_repeated else inner
    entries = getattr(message, last)
    field = message.DESCRIPTOR.fields_by_name[last]
    if field.message_type is None:
        entries.extend([f"x{i}" for i in range(n - len(entries))])
    elif field.message_type.GetOptions().map_entry:
        for i in range(n - len(entries)):
            entries[f"x{i}"].number_value = 1.0
    else:
        entries.extend([entries[0]] * (n - len(entries)))


def results(wire: Wire, batch: Message) -> Any:
    reply = wire.ask(type(batch).__name__.removesuffix("Request"), batch)
    assert isinstance(reply, Message), reply
    return reply.results  # type: ignore[attr-defined]  # both batches have them


def test_everything_needs_a_catalog_first(tmp_path_factory: pytest.TempPathFactory, world: World) -> None:
    with serving(tmp_path_factory.mktemp("empty"), serve_workers=1) as server, Wire(server.address) as wire:
        for method in (
            "Decide",
            "ReportOutcome",
            "BatchReportOutcomes",
            "IngestRecords",
            "GetCatalog",
            "AssignModelRole",
        ):
            check(wire.ask(method, request(method, world)), "CATALOG_MISSING", "")
        for method in ("RollbackCatalog", "RollbackModel"):
            check(wire.ask(method, request(method, world)), "NO_PREVIOUS_REVISION", "")
        check(wire.ask("GetProfile", request("GetProfile", world)), NOT_FOUND, "")
        for method in ("ListCatalogRevisions", "ListModelRevisions"):
            assert isinstance(wire.ask(method, request(method, world)), Message)


def test_what_grpc_itself_refuses_keeps_its_own_codes(wire: Wire, world: World) -> None:
    decide = request("Decide", world).SerializeToString()
    too_large = wire.send("IngestRecords", [bytes(4 * 1024 * 1024 + 1)])
    much_metadata = wire.send("Decide", [decide], metadata=[("x-notes", "x" * 20_000)])
    bomb = wire.send("IngestRecords", [bytes(100_000_000)], compression=grpc.Compression.Gzip)
    unknown: grpc.UnaryUnaryMultiCallable[bytes, bytes] = wire.channel.unary_unary("/tsugi.v1.DecisionService/Guess")
    with pytest.raises(grpc.RpcError) as refusal:
        unknown(decide, timeout=10)
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for answer, codes in (
        (too_large, {"RESOURCE_EXHAUSTED"}),
        (much_metadata, {"RESOURCE_EXHAUSTED"}),
        (bomb, {"RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}),
    ):
        assert isinstance(answer, Refusal)
        assert answer.code.name in codes
        assert answer.domain == ""


def test_every_unary_method_is_walked() -> None:
    assert {case[1] for case in (*READS, *WRITES)} | {
        "Decide",
        "ReportOutcome",
        "BatchReportOutcomes",
        "IngestRecords",
    } == set(UNARY)
    assert all(request_class(method).DESCRIPTOR for method in UNARY)
