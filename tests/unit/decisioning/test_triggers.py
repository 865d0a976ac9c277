"""Subscriptions on engines in memory: what is told of events, in which order, how often, and what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import pytest
from google.protobuf import json_format

from server.catalog.compile import compile_catalog
from server.decisioning import happened, triggers
from server.decisioning.live import make_live
from server.decisioning.models import align, no_champion
from server.decisioning.service import DecisionService
from server.decisioning.triggers import SUBSCRIPTIONS_MAX, Told, Triggers
from server.decisioning.warm import warm
from server.errors import TsugiError
from server.outcomes.projector import Projector
from server.profiles.identity import identity_key
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.record import Draft, Record
from server.storage.store import Table
from server.tokens import TokenKey
from tests.support import catalogs
from tests.support.committing import WAIT_S_MAX, ScriptedCommitter
from tests.support.histories import SECOND_US, History, erase
from tsugi.log.v1.record_pb2 import DecisionRecord, ErasureAccepted, RecordKind
from tsugi.requests import event
from tsugi.v1.catalog_pb2 import Catalog as CatalogMessage
from tsugi.v1.decision_service_pb2 import DecideRequest, SubscribeTriggersRequest
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity

ANNA, BERTA, CARLA, NOBODY = ({"customer_number": name} for name in ("anna", "berta", "carla", "nobody"))
DELAY_S: Final = 1800


def declared(**parts: Any) -> CatalogMessage:
    """Build a catalog with carts and orders; gold people are told something else than others."""
    everything: dict[str, Any] = {
        "eventTypes": [
            {"name": "cart", "properties": [{"name": "total", "type": "ATTRIBUTE_TYPE_NUMBER"}]},
            {"name": "order"},
        ],
        "windows": [
            {"name": "orders_30m", "kind": "WINDOW_KIND_COUNT", "eventType": "order", "span": "1800s"},
            {"name": "since_cart", "kind": "WINDOW_KIND_RECENCY", "eventType": "cart", "span": "86400s"},
        ],
        "actions": [
            {"name": "gold_push", "eligibility": "profile.tier == 'gold'", "valueMicros": 9_000_000,
             "treatments": [{"name": "only", "channel": "web"}]},
            {"name": "push", "eligibility": "profile.tier != 'bronze'",
             "treatments": [{"name": "only", "channel": "web"}]},
        ],
    }  # fmt: skip
    return catalogs.message(**(everything | parts))


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    warm()  # what compiles on a fresh machine takes longer than a test waits


CATALOG: Final = compile_catalog(declared())


class Gateway:
    """A worker's subscriptions over a log that a test writes and projects as it likes."""

    def __init__(self) -> None:
        self.log = MemoryLog(b"log-id-16-bytes.")
        self.store = MemoryStore()
        self.history = History(self.log)
        self.committer = ScriptedCommitter(self.log, lambda: self.history.now_us)
        token_key = TokenKey(bytes(32))
        self.service = DecisionService(
            log=self.log,
            store=self.store,
            committer=self.committer,
            token_key=token_key,
            clock_us=lambda: self.history.now_us,
        )
        self.triggers = Triggers(
            log=self.log,
            store=self.store,
            decisions=self.service,
            token_key=token_key,
            clock_us=lambda: self.history.now_us,
        )
        self.catalogs = {CATALOG.sha256: CATALOG}
        self.projector = Projector(self.log, self.store, self.catalogs.__getitem__)
        self.put_in_force(CATALOG)

    def put_in_force(self, catalog: Any) -> None:
        self.catalogs[catalog.sha256] = catalog
        lsn = self.history.put_in_force(catalog)
        self.service.take(make_live(catalog, align(catalog, no_champion(catalog), None), lsn, 0, "tests"))
        self.project()

    def project(self) -> None:
        while self.projector.step():
            pass

    def happens(self, who: dict[str, str], what: str = "cart", *, tier: str = "silver", **properties: Any) -> int:
        """Record an event of a person, and project it."""
        lsn = self.history.know(who, {"tier": tier}, event(what, properties))
        self.project()
        return lsn

    def passes(self, seconds: float) -> None:
        """Let time pass."""
        self.history.now_us += round(seconds * SECOND_US)

    def subscribe(self, **changes: Any) -> AsyncGenerator[Told, None]:
        valid = {"name": "abandoned", "eventType": "cart", "placements": [{"placement": "greedy"}]}
        return self.triggers.subscribe(json_format.ParseDict(valid | changes, SubscribeTriggersRequest()))

    def decided(self) -> list[DecisionRecord]:
        return [
            DecisionRecord.FromString(record.payload)
            for record in self.log.read(1)
            if record.kind == RecordKind.RECORD_KIND_DECISION
        ]


async def following(subscription: AsyncGenerator[Told, None]) -> Told:
    """Return the next message that tells of an event."""
    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            told = await anext(subscription)
            if told.trigger is not None:
                return told


async def all_told(gateway: Gateway, **changes: Any) -> list[str]:
    """Read the log from its beginning; return who is told what: customer and action."""
    last_lsn = gateway.happens(NOBODY, total=100)
    gateway.passes(2 * DELAY_S)
    found: list[str] = []
    async with aclosing(gateway.subscribe(afterLsn=1, **changes)) as subscription:
        while True:
            told = await following(subscription)
            assert told.trigger is not None
            if told.lsn == last_lsn:
                return found
            who = told.trigger.identities[0].value
            if who != "nobody":
                found.append(f"{who}: {told.trigger.decision.slots[0].action}")


def reason(error: BaseException | None) -> str:
    assert isinstance(error, TsugiError)
    return ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")


async def refused(gateway: Gateway, **changes: Any) -> TsugiError:
    """Return what ends a subscription."""
    async with aclosing(gateway.subscribe(**changes)) as subscription:
        with pytest.raises(TsugiError) as refusal:
            async with asyncio.timeout(WAIT_S_MAX):
                async for _ in subscription:
                    pass
    return refusal.value


async def test_events_of_the_type_are_told_in_order_each_with_its_own_persons_decision() -> None:
    gateway = Gateway()
    gateway.happens(ANNA, tier="gold", total=5)
    gateway.happens(BERTA, "order")
    gateway.happens(BERTA, total=7)
    assert await all_told(gateway) == ["anna: gold_push", "berta: push"]


async def test_message_holds_the_event_its_people_and_a_decision_that_is_on_record() -> None:
    gateway = Gateway()
    async with aclosing(gateway.subscribe()) as subscription:
        begun = await anext(subscription)
        assert (begun.lsn, begun.trigger) == (gateway.log.tail().lsn, None), "at once, how far it is"
        lsn = gateway.happens(ANNA | {"browser_id": "b"}, total=5)
        told = await following(subscription)
    assert told.lsn == lsn
    trigger = told.trigger
    assert trigger is not None
    assert trigger.event.type == "cart"
    assert trigger.event.properties["total"].number_value == 5
    assert trigger.event.occurrence_time.ToMicroseconds() == gateway.history.now_us, "its log time: none was stated"
    assert {each.value for each in trigger.identities} == {"anna", "b"}
    (recorded,) = gateway.decided()
    assert trigger.profile_id == recorded.profile_key.hex()
    assert trigger.decision.lsn == gateway.log.tail().lsn
    request = DecideRequest.FromString(recorded.request)
    assert (request.request_id, request.at_least_lsn) == (f"trigger/abandoned/{lsn}", lsn)


async def test_from_now_on_tells_nothing_that_was_before() -> None:
    gateway = Gateway()
    gateway.happens(ANNA)
    async with aclosing(gateway.subscribe()) as subscription:
        await anext(subscription)
        lsn = gateway.happens(BERTA)
        assert (await following(subscription)).lsn == lsn


async def test_filter_reads_the_event_and_the_person_as_they_are_when_it_is_decided() -> None:
    gateway = Gateway()
    gateway.happens(ANNA, total=60)
    gateway.happens(BERTA, total=40)
    gateway.happens(CARLA, tier="gold", total=60)
    assert await all_told(gateway, filter="event.total > 50.0 && profile.tier == 'silver'") == ["anna: push"]


async def test_event_is_looked_at_when_its_delay_has_passed_and_not_before() -> None:
    gateway = Gateway()
    abandoned = {"delay": f"{DELAY_S}s", "filter": "profile.orders_30m == 0.0"}
    async with aclosing(gateway.subscribe(**abandoned)) as subscription:
        begun = await anext(subscription)
        gateway.happens(ANNA)
        lsn = gateway.happens(BERTA)
        gateway.passes(DELAY_S - 1)
        gateway.happens(ANNA, "order")
        waiting = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(3 * triggers.POLL_S)
        assert not waiting.done()
        assert gateway.decided() == []
        gateway.passes(1)
        told = await waiting
    assert (begun.lsn, told.lsn) == (1, lsn), "anna has ordered meanwhile"
    assert told.trigger is not None
    assert told.trigger.identities[0].value == "berta"


async def test_event_that_comes_again_is_answered_with_its_recorded_decision_whatever_is_asked_by_then() -> None:
    gateway = Gateway()
    lsns = [gateway.happens(who, total=5) for who in (ANNA, BERTA)]
    first, again = [], []
    async with aclosing(gateway.subscribe(afterLsn=1)) as subscription:
        first += [await following(subscription) for _ in lsns]
    gateway.passes(3600)
    changes = {"filter": "event.total > 99.0", "placements": [{"placement": "mail"}], "context": {"hour": number(5)}}
    async with aclosing(gateway.subscribe(afterLsn=1, **changes)) as subscription:
        again += [await following(subscription) for _ in lsns]
    assert again == first
    assert len(gateway.decided()) == 2


def number(value: float) -> dict[str, float]:
    return {"numberValue": value}


async def test_two_subscriptions_of_one_name_ask_nobody_twice() -> None:
    gateway = Gateway()
    lsn = gateway.happens(ANNA)
    gateway.committer.is_held = True
    hours = [{"hour": number(hour)} for hour in (5, 6)]
    both = [gateway.subscribe(afterLsn=1, context=hour) for hour in hours]
    waiting = [asyncio.ensure_future(following(each)) for each in both]
    await gateway.committer.until_held(2)
    gateway.committer.commit()
    gateway.committer.is_held = False
    told = [await each for each in waiting]
    assert told[0] == told[1]
    assert told[0].lsn == lsn
    assert len(gateway.decided()) == 1
    for each in both:
        await each.aclose()


async def test_other_name_decides_anew() -> None:
    gateway = Gateway()
    gateway.happens(ANNA)
    for name in ("abandoned", "another"):
        async with aclosing(gateway.subscribe(afterLsn=1, name=name)) as subscription:
            await following(subscription)
    assert len(gateway.decided()) == 2


async def test_decision_that_fills_nothing_is_not_told() -> None:
    gateway = Gateway()
    gateway.happens(ANNA, tier="bronze")
    assert await all_told(gateway) == []
    assert len(gateway.decided()) == 2, "it was asked for, and is on record"


async def test_state_that_is_behind_is_waited_for() -> None:
    gateway = Gateway()
    async with aclosing(gateway.subscribe()) as subscription:
        await anext(subscription)
        gateway.history.know(ANNA, {"tier": "gold"}, event("cart"))
        waiting = asyncio.ensure_future(following(subscription))
        await asyncio.sleep(3 * triggers.POLL_S)
        assert gateway.decided() == []
        gateway.project()
        told = await waiting
    assert told.trigger is not None
    assert told.trigger.decision.slots[0].action == "gold_push"


async def test_who_is_erased_is_passed_over_from_the_wish_to_the_tombstone_and_as_a_new_person_too() -> None:
    gateway = Gateway()
    lsn = gateway.happens(ANNA)
    wish = ErasureAccepted(erasure_key=bytes(16), identity_keys=[identity_key(identity(ANNA))])
    draft = Draft(RecordKind.RECORD_KIND_ERASURE_ACCEPTED, wish.SerializeToString(), head="erasure")
    gateway.log.append([draft], gateway.history.now_us)
    assert await all_told(gateway, name="wished") == []
    gateway.project()
    assert await all_told(gateway, name="forgotten") == []
    gateway.happens(ANNA, "order")
    assert await all_told(gateway, name="known_anew") == []
    erase(gateway.log, lsn)
    assert await all_told(gateway, name="gone") == []


def identity(who: dict[str, str]) -> Identity:
    ((namespace, value),) = who.items()
    return Identity(namespace=namespace, value=value)


async def test_record_that_had_no_effect_is_passed_over() -> None:
    gateway = Gateway()
    gateway.happens(ANNA, "order")
    gateway.history.know(ANNA, event=event("cart"), source="undeclared")
    gateway.history.record(RecordKind.RECORD_KIND_SOURCE_RECORD, b"\xff")
    gateway.project()
    assert await all_told(gateway) == []


async def test_what_cannot_be_decided_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triggers, "AGAIN_S", 0.001)
    monkeypatch.setattr(triggers, "SILENT_S_MAX", 0.01)
    gateway = Gateway()
    async with aclosing(gateway.subscribe()) as subscription:
        begun = await anext(subscription)
        gateway.committer.takes = False
        lsn = gateway.happens(ANNA)
        for _ in range(3):
            assert (await anext(subscription)) == Told(begun.lsn), "it stands where it was, and says so"
        gateway.committer.takes = True
        assert (await following(subscription)).lsn == lsn


async def test_decision_that_is_refused_is_told_and_the_next_event_follows() -> None:
    gateway = Gateway()
    gateway.happens(ANNA, total=5)
    with gateway.store.write() as txn:
        ((key, profile),) = list(txn.scan(Table.PROFILES))
        txn.put(Table.PROFILES, key, profile[:-1])
    lsn = gateway.happens(BERTA, total=5)
    async with aclosing(gateway.subscribe(afterLsn=1, filter="profile.orders_30m == 0.0")) as subscription:
        damaged = await following(subscription)
        told = await following(subscription)
    assert reason(damaged.error) == "RECORD_CHECKSUM"
    assert damaged.trigger is not None
    assert damaged.trigger.identities[0].value == "anna"
    assert (told.lsn, told.error) == (lsn, None)


async def test_log_that_holds_nothing_of_the_type_moves_the_lsn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triggers, "SILENT_RECORDS_MAX", 2 * happened.BLOCK_RECORDS)
    gateway = Gateway()
    n_records = 5 * happened.BLOCK_RECORDS + 10
    gateway.log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")] * happened.BLOCK_RECORDS, gateway.history.now_us)
    while gateway.log.tail().lsn < n_records:
        gateway.history.tick()
    gateway.project()
    async with aclosing(gateway.subscribe(afterLsn=1)) as subscription:
        lsns = [(await anext(subscription)).lsn for _ in range(3)]
        monkeypatch.setattr(triggers, "SILENT_S_MAX", 0.01)
        lsns.append((await anext(subscription)).lsn)
    assert lsns == [1, 3 * happened.BLOCK_RECORDS, 5 * happened.BLOCK_RECORDS, n_records]


async def test_log_is_read_once_for_all_subscriptions() -> None:
    gateway = Gateway()
    read: list[int] = []

    class Counted(MemoryLog):
        def read(self, from_lsn: int, records_max: int = 1) -> list[Record]:
            records = gateway.log.read(from_lsn, records_max)
            read.extend(record.lsn for record in records)
            return records

    gateway.happens(ANNA)
    events = happened.Happened(Counted())
    tail_lsn = gateway.log.tail().lsn
    found = await asyncio.gather(*(events.after(1, tail_lsn) for _ in range(5)))
    assert found == [found[0]] * 5
    assert [place.event_type for place in found[0][0]] == ["cart"]
    gateway.happens(ANNA)
    assert (await events.after(tail_lsn, tail_lsn + 1))[0][0].lsn == tail_lsn + 1
    assert read == list(range(1, tail_lsn + 2))


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        ({"eventTypes": [{"name": "order"}], "windows": []}, "event_type"),
        ({"eventTypes": [{"name": "cart"}, {"name": "order"}]}, "filter"),
        ({"placements": [{"name": "mail", "channel": "web", "goal": "click"}]}, "placements[0].placement"),
        ({"contextAttributes": []}, "context.hour"),
    ],
)
async def test_catalog_that_the_request_does_not_fit_ends_the_subscription(parts: dict[str, Any], path: str) -> None:
    gateway = Gateway()
    changes = {"filter": "event.total > 1.0", "context": {"hour": number(5)}}
    async with aclosing(gateway.subscribe(**changes)) as subscription:
        await anext(subscription)
        gateway.happens(ANNA, total=5)  # comes to whoever goes on with another request
        gateway.put_in_force(compile_catalog(declared(**parts)))
        with pytest.raises(TsugiError) as refusal:
            await following(subscription)
    assert refusal.value.metadata["field"] == path
    assert gateway.decided() == []


async def test_filter_goes_on_under_another_catalog_that_it_fits() -> None:
    gateway = Gateway()
    async with aclosing(gateway.subscribe(filter="profile.tier == 'gold'")) as subscription:
        await anext(subscription)
        tiers = {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["gold", "silver", "bronze"]}
        gateway.put_in_force(compile_catalog(declared(profileAttributes=[tiers])))
        gateway.happens(ANNA, tier="bronze")
        lsn = gateway.happens(BERTA, tier="gold")
        assert (await following(subscription)).lsn == lsn


@pytest.mark.parametrize(
    ("changes", "reason_name", "path"),
    [
        ({"eventType": "wedding"}, "RESOURCE_NOT_FOUND", "event_type"),
        ({"filter": "event.totl > 1.0"}, "FIELD_INVALID", "filter"),
        ({"placements": [{"placement": "nowhere"}]}, "RESOURCE_NOT_FOUND", "placements[0].placement"),
        ({"placements": [{"placement": "greedy", "count": 9}]}, "LIMIT_EXCEEDED", "placements[0].count"),
        ({"context": {"hour": {"boolValue": True}}}, "FIELD_INVALID", "context.hour"),
        ({"afterLsn": 10_000}, "FIELD_INVALID", "after_lsn"),
    ],
)
async def test_request_that_does_not_fit_is_refused(changes: dict[str, Any], reason_name: str, path: str) -> None:
    error = await refused(Gateway(), **changes)
    assert (reason(error), error.metadata["field"]) == (reason_name, path)


async def test_one_subscription_too_many_is_refused_and_its_place_is_given_back() -> None:
    gateway = Gateway()
    open_ones = [gateway.subscribe() for _ in range(SUBSCRIPTIONS_MAX)]
    for each in open_ones:
        await anext(each)
    error = await refused(gateway)
    assert (reason(error), error.metadata) == ("OVERLOADED", {"limit": str(SUBSCRIPTIONS_MAX)})
    await open_ones.pop().aclose()
    await refused(gateway, eventType="wedding")
    open_ones.append(gateway.subscribe())
    await anext(open_ones[-1])
    for each in open_ones:
        await each.aclose()


async def test_worker_that_shuts_down_ends_every_subscription_and_takes_no_other() -> None:
    gateway = Gateway()
    async with aclosing(gateway.subscribe()) as subscription:
        await anext(subscription)
        gateway.triggers.end()
        with pytest.raises(TsugiError) as refusal:
            await following(subscription)
    assert reason(refusal.value) == "DRAINING"
    assert reason(await refused(gateway)) == "DRAINING"


async def test_nothing_is_decided_before_the_message_before_it_was_taken() -> None:
    gateway = Gateway()
    for who in (ANNA, BERTA, CARLA):
        gateway.happens(who)
    async with aclosing(gateway.subscribe(afterLsn=1)) as subscription:
        for n_taken in range(1, 4):
            await following(subscription)
            await asyncio.sleep(2 * triggers.POLL_S)
            assert len(gateway.decided()) == n_taken
