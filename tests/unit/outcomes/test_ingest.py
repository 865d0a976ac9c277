from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from server.catalog.catalog import Catalog
from server.errors import TsugiError, field_invalid
from server.outcomes import ingest
from server.outcomes.ingest import CLOCK_SKEW_US, Accepted, Ingest
from server.outcomes.projector import Projector
from server.profiles.identity import identity_key
from server.storage.committer import GroupCommitter
from server.storage.log import LogFullError, LogUnavailableError
from server.storage.memory import MemoryStore
from tests.support.catalogs import SOURCES, compiled
from tests.support.deciding import TOKEN_KEY
from tests.support.faults import FaultyLog, Gate
from tests.support.histories import START_US, History, decision_key, erase
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, RecordKind, SlotRecord, SourceRecordAccepted
from tsugi.requests import PyValue, consent, event, outcome, source_record
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_service_pb2 import SourceRecord
from tsugi.v1.value_pb2 import Value

FACTS: list[dict[str, Any]] = [
    {"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0, "maximum": 120},
    {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL"},
    {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["silver", "gold"]},
    {"name": "note", "type": "ATTRIBUTE_TYPE_TEXT"},
    {"name": "since", "type": "ATTRIBUTE_TYPE_TIME"},
]
CATALOG = compiled(profileAttributes=FACTS, eventTypes=[{"name": "visit", "properties": FACTS}])
VALID: dict[str, PyValue] = {
    "age": 41.0, "member": True, "tier": "gold", "note": "naïve\u200d", "since": datetime(2026, 1, 1, tzinfo=UTC),
}  # fmt: skip
PERSON = b"p" * 16
KEY = decision_key(1)
ID = TOKEN_KEY.mint(KEY, PERSON).decode()


class Desk:
    """One worker's ingest over a scripted log, with the state projected on demand."""

    def __init__(self, script: Mapping[int, Exception | Gate] | None = None, catalog: Catalog | None = CATALOG) -> None:
        self.log = FaultyLog(script)
        self.store = MemoryStore()
        self.history = History(self.log)
        self.now_us = START_US
        self.catalog = catalog
        self.committer = GroupCommitter(self.log, wall_us=lambda: START_US, on_failure=lambda: None)
        self.ingest = Ingest(
            log=self.log,
            store=self.store,
            committer=self.committer,
            token_key=TOKEN_KEY,
            catalog=lambda: self.catalog,
            clock_us=lambda: self.now_us,
        )
        self.committer.start(asyncio.get_running_loop())

    def decide(self, key: bytes = KEY, actions: tuple[str, ...] = ("action_1", "action_2")) -> int:
        decision = DecisionRecord(
            decision_key=key, profile_key=PERSON, now_us=START_US, slots=[SlotRecord(action=name) for name in actions]
        )
        return self.history.record(RecordKind.RECORD_KIND_DECISION, decision, key, (PERSON,))

    def project(self) -> None:
        projector = Projector(self.log, self.store, lambda _sha256: CATALOG)
        while projector.step():
            pass

    async def report(self, *outcomes: ReportOutcomeRequest | TsugiError) -> list[Accepted | TsugiError]:
        return await self.ingest.report(outcomes)

    async def ingest_one(self, record: SourceRecord) -> Accepted | TsugiError:
        (result,) = await self.ingest.ingest([record])
        return result


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with opened(Desk()) as desk:
        yield desk


@asynccontextmanager
async def opened(desk: Desk) -> AsyncIterator[Desk]:
    """Give a desk whose catalog is in force, and close it."""
    if desk.catalog is not None:
        desk.history.put_in_force(desk.catalog)
    yield desk
    desk.committer.close()


def click(number: int = 1, decision_id: str = ID, **more: Any) -> ReportOutcomeRequest:
    return outcome(decision_id, more.pop("action", "action_1"), f"o-{number}", more.pop("type", "click"), **more)


def said(number: int = 1, identities: Mapping[str, str] | None = None, **more: Any) -> SourceRecord:
    return source_record(f"r-{number}", more.pop("source", "crm"), identities or {"customer_number": "7"}, **more)


def refusal(result: Accepted | TsugiError) -> tuple[str, str]:
    """Return reason and path of a refusal; every one names its field the same way in violations and metadata."""
    assert isinstance(result, TsugiError), result
    assert result.message
    path = result.metadata.get("field", "")
    if result.violations:
        (violation,) = result.violations
        assert path in {"", violation.path}
        path = violation.path
    return ErrorReason.Name(result.reason).removeprefix("ERROR_REASON_"), path


async def test_accepted_outcome_is_on_disk_as_reported_and_about_the_decisions_person(desk: Desk) -> None:
    desk.decide()
    at = datetime.fromtimestamp(START_US / 1e6 + 3, UTC)
    (accepted,) = await desk.report(click(type="order", value=99.5, occurrence_time=at))
    assert accepted == Accepted(3, is_duplicate=False)
    record = desk.log.get(3)
    assert record is not None
    assert (record.kind, record.subjects) == (RecordKind.RECORD_KIND_OUTCOME, (PERSON,))
    assert OutcomeRecord.FromString(record.payload) == OutcomeRecord(
        decision_key=KEY, action="action_1", type="order", value=99.5, occurrence_time_us=START_US + 3_000_000
    )


async def test_outcome_without_an_instant_happened_now(desk: Desk) -> None:
    desk.decide()
    desk.now_us += 5
    await desk.report(click())
    record = desk.log.get(3)
    assert record is not None
    assert OutcomeRecord.FromString(record.payload).occurrence_time_us == START_US + 5


async def test_outcome_before_its_decision_is_visible_is_accepted_unchecked(desk: Desk) -> None:
    (accepted,) = await desk.report(click(action="whatever"))
    assert isinstance(accepted, Accepted)
    assert desk.log.read(2)[0].subjects == ()


async def test_outcome_for_an_erased_decision_is_accepted_and_about_nobody(desk: Desk) -> None:
    erase(desk.log, desk.decide())
    (accepted,) = await desk.report(click(action="whatever"))
    assert isinstance(accepted, Accepted)
    assert desk.log.read(3)[0].subjects == ()


async def test_repeated_outcome_counts_once_and_says_so(desk: Desk) -> None:
    desk.decide()
    assert await desk.report(click(1), click(2), click(1)) == [
        Accepted(3, is_duplicate=False), Accepted(4, is_duplicate=False), Accepted(3, is_duplicate=True),
    ]  # fmt: skip
    assert await desk.report(click(2)) == [Accepted(4, is_duplicate=True)]
    desk.now_us += 1_000_000  # an instant that the server filled in is no part of what the caller said
    assert await desk.report(click(2)) == [Accepted(4, is_duplicate=True)]


async def test_same_outcome_id_with_another_payload_is_refused_and_the_first_stands(desk: Desk) -> None:
    desk.decide()
    accepted, *others = await desk.report(click(1), click(1, type="order"), click(1, action="action_2"))
    assert accepted == Accepted(3, is_duplicate=False)
    assert [refusal(other) for other in others] == [("IDEMPOTENCY_KEY_REUSED", "")] * 2
    assert desk.log.tail().lsn == 3


def taking_back(number: int, revoked: int, **more: Any) -> ReportOutcomeRequest:
    return click(number, type=more.pop("type", ""), revokes=f"o-{revoked}", **more)


async def test_revocation_names_the_outcome_by_its_key_alone_and_counts_once(desk: Desk) -> None:
    desk.decide()
    assert await desk.report(click(1), taking_back(2, 1), taking_back(2, 1), taking_back(3, 4)) == [
        Accepted(3, is_duplicate=False), Accepted(4, is_duplicate=False), Accepted(4, is_duplicate=True),
        Accepted(5, is_duplicate=False),
    ]  # fmt: skip
    outcome_record, revocation = desk.log.read(3, 2)
    stored = OutcomeRecord.FromString(revocation.payload)
    assert stored.revoked_key == outcome_record.key
    assert (stored.type, stored.action, revocation.subjects) == ("", "action_1", (PERSON,))
    assert b"o-1" not in revocation.payload
    (changed,) = await desk.report(taking_back(2, 4))
    assert refusal(changed) == ("IDEMPOTENCY_KEY_REUSED", "")


async def test_what_cannot_be_taken_back_is_refused_where_that_is_known(desk: Desk) -> None:
    desk.decide()
    await desk.report(click(1), taking_back(2, 1))
    results = await desk.report(
        taking_back(3, 2), taking_back(4, 1, action="action_2"), taking_back(5, 1, type="purchase"),
        taking_back(6, 1, type="order", value=1e9), taking_back(7, 1, action="action_3"),
    )  # fmt: skip
    assert [refusal(result) for result in results] == [
        ("FIELD_INVALID", "revokes"), ("FIELD_INVALID", "action"), ("RESOURCE_NOT_FOUND", "type"),
        ("FIELD_INVALID", "value"), ("FIELD_INVALID", "action"),
    ]  # fmt: skip
    assert desk.log.tail().lsn == 4


async def test_same_outcome_id_of_another_decision_is_another_outcome(desk: Desk) -> None:
    desk.decide()
    desk.decide(decision_key(2))
    other_id = TOKEN_KEY.mint(decision_key(2), PERSON).decode()
    results = await desk.report(click(1), click(1, decision_id=other_id))
    assert results == [Accepted(4, is_duplicate=False), Accepted(5, is_duplicate=False)]


@pytest.mark.parametrize(
    ("request_", "reason", "path"),
    [
        (click(decision_id=ID[:-1] + ("A" if ID[-1] != "A" else "B")), "DECISION_ID_INVALID", "decision_id"),
        (click(decision_id=""), "DECISION_ID_INVALID", "decision_id"),
        (click(type="purchase"), "RESOURCE_NOT_FOUND", "type"),
        (click(type="order", value=1000.01), "FIELD_INVALID", "value"),
        (click(type="order", value=-0.01), "FIELD_INVALID", "value"),
        (click(type="order", value=math.nan), "FIELD_INVALID", "value"),
        (click(type="order", value=math.inf), "FIELD_INVALID", "value"),
        (click(value=0.5), "FIELD_INVALID", "value"),
        (click(action="action_3"), "ACTION_NOT_IN_DECISION", "action"),
        (click(action=""), "ACTION_NOT_IN_DECISION", "action"),
        (
            click(occurrence_time=datetime.fromtimestamp((START_US - CLOCK_SKEW_US - 1_000_000) / 1e6, UTC)),
            "TIME_OUT_OF_RANGE",
            "occurrence_time",
        ),
    ],
)
async def test_bad_outcome_is_refused_with_its_reason_and_path(
    desk: Desk, request_: ReportOutcomeRequest, reason: str, path: str
) -> None:
    desk.decide()
    (result,) = await desk.report(request_)
    assert refusal(result) == (reason, path)
    assert desk.log.tail().lsn == 2


async def test_refused_value_is_told_with_its_bounds(desk: Desk) -> None:
    (result,) = await desk.report(click(type="order", value=math.nan))
    assert isinstance(result, TsugiError)
    assert result.message == "value: must be finite and within [0, 1000], got nan"


async def test_clocks_may_differ_by_five_minutes(desk: Desk) -> None:
    desk.decide()
    at = datetime.fromtimestamp((START_US - CLOCK_SKEW_US) / 1e6, UTC)
    (accepted,) = await desk.report(click(occurrence_time=at))
    assert isinstance(accepted, Accepted)


async def test_one_bad_outcome_of_five_hundred_is_refused_alone(desk: Desk) -> None:
    desk.decide()
    outcomes: list[ReportOutcomeRequest | TsugiError] = [click(i) for i in range(500)]
    outcomes[250] = click(250, type="purchase")
    outcomes[300] = invalid = field_invalid("outcome_id", "found invalid before")
    results = await desk.report(*outcomes)
    assert refusal(results[250]) == ("RESOURCE_NOT_FOUND", "type")
    assert results[300] is invalid
    lsns = [result.lsn for result in results if isinstance(result, Accepted)]
    assert lsns == list(range(3, 501))
    assert desk.log.tail().lsn == 500


async def test_damaged_decision_refuses_its_own_outcomes_alone(desk: Desk) -> None:
    lsn = desk.decide()
    desk.log._records[lsn - 1] = desk.log._records[lsn - 1][:-1] + b"?"
    desk.decide(decision_key(2))
    other_id = TOKEN_KEY.mint(decision_key(2), PERSON).decode()
    broken, fine = await desk.report(click(1), click(1, decision_id=other_id))
    assert refusal(broken) == ("RECORD_CHECKSUM", "")
    assert isinstance(broken, TsugiError)
    assert broken.metadata == {"lsn": "2"}
    assert isinstance(fine, Accepted)


async def test_batch_of_bad_items_touches_no_log(desk: Desk) -> None:
    error = field_invalid("type", "found invalid before")
    assert await desk.report(error, error) == [error, error]
    assert await desk.report() == []
    assert len(desk.log.groups) == 1


@pytest.mark.parametrize("method", ["report", "ingest"])
async def test_nothing_is_taken_in_before_the_first_catalog(method: str) -> None:
    desk = Desk(catalog=None)
    with pytest.raises(TsugiError) as caught:
        await getattr(desk.ingest, method)([])
    assert caught.value.reason == ErrorReason.ERROR_REASON_CATALOG_MISSING
    desk.committer.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (LogFullError(is_map=True), ErrorReason.ERROR_REASON_LOG_MAP_FULL),
        (LogFullError(is_map=False), ErrorReason.ERROR_REASON_LOG_VOLUME_FULL),
        (LogUnavailableError("Input/output error"), ErrorReason.ERROR_REASON_LOG_UNAVAILABLE),
    ],
)
async def test_log_that_does_not_record_refuses_the_whole_call(fault: Exception, reason: ErrorReason) -> None:
    desk = Desk({1: fault})
    with pytest.raises(TsugiError) as caught:
        await desk.report(click(1), field_invalid("type", "found invalid before"))
    assert caught.value.reason == reason
    assert "Input/output" not in caught.value.message
    desk.committer.close()


async def test_answer_comes_after_the_commit() -> None:
    gate = Gate()
    desk = Desk({1: gate})
    answering = asyncio.create_task(desk.report(click()))
    await asyncio.to_thread(gate.wait_until_reached)
    await asyncio.sleep(0)
    assert not answering.done()
    gate.open()
    assert await answering == [Accepted(1, is_duplicate=False)]
    desk.committer.close()


async def test_accepted_source_record_is_on_disk_as_received_and_about_each_identity(desk: Desk) -> None:
    record = said(1, {"customer_number": "7", "browser_id": "b"}, attributes=VALID, event=event("visit", VALID))
    assert await desk.ingest_one(record) == Accepted(2, is_duplicate=False)
    stored = desk.log.get(2)
    assert stored is not None
    assert stored.kind == RecordKind.RECORD_KIND_SOURCE_RECORD
    assert SourceRecordAccepted.FromString(stored.payload).record == record
    assert stored.subjects == tuple(map(identity_key, record.identities))


async def test_repeated_source_record_counts_once_within_its_source(desk: Desk) -> None:
    assert await desk.ingest_one(said(1, attributes=VALID)) == Accepted(2, is_duplicate=False)
    desk.project()
    assert await desk.ingest_one(said(1, attributes=dict(reversed(VALID.items())))) == Accepted(2, is_duplicate=True)
    assert refusal(await desk.ingest_one(said(1, attributes={"age": 42.0}))) == ("IDEMPOTENCY_KEY_REUSED", "")
    assert await desk.ingest_one(said(1, attributes={"age": 42.0}, source="shop")) == Accepted(3, is_duplicate=False)


BAD_VALUES: list[tuple[str, Value, str]] = [
    ("age", Value(text_value="41"), "FIELD_INVALID"),
    ("age", Value(number_value=120.5), "FIELD_INVALID"),
    ("age", Value(number_value=-1), "FIELD_INVALID"),
    ("age", Value(number_value=math.nan), "FIELD_INVALID"),
    ("age", Value(number_value=math.inf), "FIELD_INVALID"),
    ("age", Value(), "FIELD_INVALID"),
    ("member", Value(number_value=1), "FIELD_INVALID"),
    ("tier", Value(text_value="platinum"), "FIELD_INVALID"),
    ("tier", Value(bool_value=True), "FIELD_INVALID"),
    ("note", Value(number_value=1), "FIELD_INVALID"),
    ("since", Value(text_value="2026-01-01"), "FIELD_INVALID"),
    ("height", Value(number_value=1), "RESOURCE_NOT_FOUND"),
    ("", Value(number_value=1), "RESOURCE_NOT_FOUND"),
]


@pytest.mark.parametrize(("name", "value", "reason"), BAD_VALUES)
async def test_bad_value_is_refused_with_its_reason_and_path(desk: Desk, name: str, value: Value, reason: str) -> None:
    in_attributes, in_event = said(1), said(2, event=event("visit"))
    in_attributes.attributes[name].CopyFrom(value)
    in_event.event.properties[name].CopyFrom(value)
    results = await desk.ingest.ingest([in_attributes, in_event])
    assert [refusal(result) for result in results] == [
        (reason, f"attributes.{name}"), (reason, f"event.properties.{name}"),
    ]  # fmt: skip
    assert desk.log.tail().lsn == 1


@pytest.mark.parametrize(
    ("record", "reason", "path"),
    [
        (said(identities={"customer_number": "7", "passport": "x"}), "RESOURCE_NOT_FOUND", "identities[1].namespace"),
        (said(event=event("purchase")), "RESOURCE_NOT_FOUND", "event.type"),
        (said(event=event("")), "RESOURCE_NOT_FOUND", "event.type"),
        (said(attributes={"now": 1.0}), "RESOURCE_NOT_FOUND", "attributes.now"),
        (said(attributes={"hour": 1.0}), "RESOURCE_NOT_FOUND", "attributes.hour"),  # a fact of the context
        (said(attributes={"x" * 500: 1.0}), "RESOURCE_NOT_FOUND", "attributes." + "x" * 64),
    ],
)
async def test_bad_source_record_is_refused_with_its_reason_and_path(
    desk: Desk, record: SourceRecord, reason: str, path: str
) -> None:
    assert refusal(await desk.ingest_one(record)) == (reason, path)


@pytest.mark.parametrize(
    ("record", "path"),
    [
        (said(source="nobody"), "source"),
        (said(source="bought", attributes={"member": True}), "attributes.member"),
        (said(source="bought", event=event("visit")), "event.type"),
        (said(identities={"browser_id": "b"}, source="bought"), "identities[0].namespace"),
    ],
)
async def test_what_a_source_may_not_say_is_refused_with_its_path(record: SourceRecord, path: str) -> None:
    bought = {"name": "bought", "party": "PARTY_THIRD", "delivery": "DELIVERY_BATCH", "attributes": ["age"],
              "eventTypes": ["call"], "identityNamespaces": ["customer_number"]}  # fmt: skip
    catalog = compiled(
        profileAttributes=FACTS, eventTypes=[{"name": "visit"}, {"name": "call"}], sources=[*SOURCES, bought]
    )
    async with opened(Desk(catalog=catalog)) as desk:
        assert refusal(await desk.ingest_one(record)) == ("SOURCE_NOT_ALLOWED", path)
        assert isinstance(await desk.ingest_one(said(9, source="bought", attributes={"age": 3.0})), Accepted)


async def test_consent_for_what_nobody_declared_is_refused_with_its_path() -> None:
    catalog = compiled(profileAttributes=FACTS, consentPurposes=[{"name": "marketing"}])
    async with opened(Desk(catalog=catalog)) as desk:
        for i, (given, path) in enumerate(
            [
                (consent("spying", granted=True), "consents[0].purpose"),
                (consent("marketing", granted=True, channel="smoke"), "consents[0].channel"),
            ]
        ):
            record = source_record(f"c{i}", "crm", {"customer_number": "1"}, consents=[given])
            assert refusal(await desk.ingest_one(record)) == ("RESOURCE_NOT_FOUND", path)


async def test_record_that_joins_two_known_people_goes_in(desk: Desk) -> None:
    await desk.ingest.ingest([said(1, {"customer_number": "1"}), said(2, {"customer_number": "2", "browser_id": "b"})])
    desk.project()
    assert isinstance(await desk.ingest_one(said(3, {"customer_number": "1", "browser_id": "b"})), Accepted)


async def test_record_of_nobody_but_a_value_shared_by_a_town_is_refused(desk: Desk) -> None:
    for i in range(20):
        await desk.ingest_one(said(i, {"customer_number": str(i), "browser_id": "kiosk"}))
    desk.project()
    assert refusal(await desk.ingest_one(said(50, {"browser_id": "kiosk"}))) == ("IDENTITY_TOO_SHARED", "identities")
    assert isinstance(await desk.ingest_one(said(51, {"browser_id": "kiosk", "customer_number": "1"})), Accepted)


async def test_one_bad_source_record_of_five_hundred_is_refused_alone(desk: Desk) -> None:
    records = [said(i, {"customer_number": str(i)}) for i in range(500)]
    records[499] = said(499, {"passport": "x"})
    results = await desk.ingest.ingest(records)
    assert refusal(results[499]) == ("RESOURCE_NOT_FOUND", "identities[0].namespace")
    assert [result.lsn for result in results[:499] if isinstance(result, Accepted)] == list(range(2, 501))


async def test_others_have_their_turn_between_the_steps_of_a_batch(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "STEP_S", 0.0)
    n_turns, turns = 0, []

    async def others() -> None:
        nonlocal n_turns
        while True:
            n_turns += 1
            await asyncio.sleep(0)

    def records() -> Iterator[SourceRecord]:
        for i in range(20):
            turns.append(n_turns)
            yield said(i)

    busy = asyncio.create_task(others())
    await desk.ingest.ingest(records())
    busy.cancel()
    assert turns == sorted(set(turns)), "somebody had a turn before each record but the first"


async def test_batches_are_recorded_in_the_order_in_which_they_came(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "STEP_S", 0.0)
    batches = [[said(i) for i in range(20)], [said(20)], [said(i) for i in range(21, 30)]]
    results = await asyncio.gather(*map(desk.ingest.ingest, batches))
    assert [each.lsn for result in results for each in result if isinstance(each, Accepted)] == list(range(2, 32))


async def test_repeat_is_a_duplicate_whatever_the_catalog_says_by_now(desk: Desk) -> None:
    desk.decide()
    report = outcome(ID, "action_1", "o-1", "click")
    record = source_record("r-1", "shop", {"customer_number": "1"}, attributes={"age": 41.0})
    (first,) = await desk.report(report)
    known = await desk.ingest_one(record)
    assert isinstance(first, Accepted)
    assert isinstance(known, Accepted)
    desk.catalog = compiled(
        profileAttributes=[],
        outcomeTypes=[{"name": "sale"}],
        goals=[{"name": "click", "outcomes": [{"type": "sale"}], "attributionWindow": "2s", "baseRate": 0.1}],
    )
    assert await desk.report(report) == [Accepted(first.lsn, is_duplicate=True)]
    assert await desk.ingest_one(record) == Accepted(known.lsn, is_duplicate=True)
    (new,) = await desk.report(outcome(ID, "action_1", "o-2", "click"))
    assert isinstance(new, TsugiError)
