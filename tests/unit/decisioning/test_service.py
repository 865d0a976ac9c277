"""The shell of a decision on engines in memory: who is answered what, who waits, who is recorded, who fails alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pytest
from google.protobuf import json_format

from server.catalog.allotting import blend_of
from server.catalog.catalog import Catalog, Floats
from server.decisioning import service
from server.decisioning.contributions import Corrections
from server.decisioning.explanation import explain
from server.decisioning.live import make_live
from server.decisioning.models import Champion, align, no_champion
from server.decisioning.recall import differences
from server.decisioning.recorded import DecisionReader
from server.decisioning.service import DecisionService
from server.errors import TsugiError
from server.profiles.identity import identity_key
from server.registry.scorers import ScoringError
from server.storage.applied import Applied, write_applied
from server.storage.log import LogFullError, LogUnavailableError
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Snapshot, Table
from server.tokens import TokenKey
from tests.support import catalogs, populating
from tests.support.committing import ScriptedCommitter
from tests.support.deciding import given_champion
from tests.support.populating import Person
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_pb2 import Degradation, RefusalReason
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse, GetDecisionRequest
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.model_pb2 import ModelRole

NOW_US: Final = 1_760_000_000_000_000
EXPLORED: Final = [{"placement": "epsilon_greedy"}]
DURABLE: Final = "DECISION_ACK_DURABLE"
SECRET: Final = bytes(range(32))
POISON: Final = "poison"


class PoisonedStore(MemoryStore):
    """A store that fails on one person."""

    poisoned = identity_key(Identity(namespace="customer_number", value=POISON))

    @contextmanager
    def read(self) -> Iterator[Any]:
        with super().read() as snapshot:
            yield _PoisonedSnapshot(snapshot)


class _PoisonedSnapshot:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def get(self, table: Table, key: bytes) -> memoryview | bytes | None:
        if key == PoisonedStore.poisoned:
            raise RuntimeError("this person breaks it")
        return self._snapshot.get(table, key)


class PoisonedKey(TokenKey):
    """A key that cannot sign one decision, so that a request fails as late as it can."""

    def mint(self, decision_key: bytes, profile_key: bytes) -> bytes:
        if decision_key == self.decision_key(POISON):
            raise RuntimeError("this decision breaks it")
        return super().mint(decision_key, profile_key)


class Desk:
    """A decision service with everything around it."""

    def __init__(
        self,
        *,
        store: MemoryStore | None = None,
        champion: Callable[[Any], Champion] = no_champion,
        challenger: Callable[[Any], Champion] | None = None,
        token_key: TokenKey | None = None,
        settings: service.Settings = service.Settings(),  # noqa: B008  # immutable
        has_catalog: bool = True,
        catalog: Catalog | None = None,
    ) -> None:
        self.catalog = catalog or catalogs.compiled()
        self.log = MemoryLog()
        self.store = store or MemoryStore()
        self.committer = ScriptedCommitter(self.log, lambda: NOW_US)
        self.committer.is_held = True
        self.service = DecisionService(
            log=self.log,
            store=self.store,
            committer=self.committer,
            token_key=token_key or TokenKey(SECRET),
            clock_us=lambda: NOW_US,
            settings=settings,
        )
        if has_catalog:
            models = align(self.catalog, champion(self.catalog), None)
            rival = challenger(self.catalog) if challenger is not None else None
            self.service.take(make_live(self.catalog, models, 1, 0, "tests", challenger=rival))

    def ask(self, *, timeout_s: float | None = 5.0, **request: Any) -> asyncio.Future[bytes]:
        """Ask without waiting."""
        message = json_format.ParseDict({"placements": EXPLORED} | request, DecideRequest())
        return self.service.decide(message, message.SerializeToString(), timeout_s)

    async def decide(self, **request: Any) -> DecideResponse:
        """Ask and wait for the reply."""
        return DecideResponse.FromString(await self.ask(**request))

    def learn(self, lsn: int, *, time_us: int = NOW_US, new_outcome: tuple[int, int] = (0, 0)) -> None:
        """Take learner arrays into use that include an LSN."""
        arrays = LearnerArrays(
            epoch=1,
            learned_lsn=lsn,
            learned_time_us=time_us,
            new_outcome_lsn=new_outcome[0],
            new_outcome_time_us=new_outcome[1],
        )
        models = align(self.catalog, no_champion(self.catalog), arrays)
        self.service.take(make_live(self.catalog, models, 1, 0, "tests"))

    def know(self, number: str, lsn: int, **attributes: Any) -> None:
        """Put a person into the state and say that it includes an LSN."""
        profile = Person(attributes, {"customer_number": number})
        with self.store.write() as txn:
            populating.put(txn, number.encode().ljust(16, b"\0"), profile, self.catalog, lsn)
            write_applied(txn, Applied(lsn, NOW_US, 0))

    async def records(self) -> list[DecisionRecord]:
        """Return the decisions on record, when those just answered are."""
        await asyncio.sleep(0)
        return [
            DecisionRecord.FromString(record.payload)
            for record in self.log.read(1)
            if record.kind == RecordKind.RECORD_KIND_DECISION
        ]


def person(number: str) -> list[dict[str, str]]:
    return [{"namespace": "customer_number", "value": number}]


async def reason_of(future: asyncio.Future[bytes]) -> str:
    with pytest.raises(TsugiError) as refusal:
        await future
    return ErrorReason.Name(refusal.value.reason).removeprefix("ERROR_REASON_")


async def test_request_is_decided_at_the_end_of_its_own_turn() -> None:
    desk = Desk()
    waiting = desk.ask()
    assert not waiting.done()
    await asyncio.sleep(0)
    assert waiting.done()


async def test_requests_of_one_turn_are_each_answered_with_their_own_person() -> None:
    desk = Desk()
    for i in range(40):
        desk.know(f"p{i}", i + 1, age=i, member=True)
    replies = await asyncio.gather(*(desk.ask(identities=person(f"p{i}")) for i in range(40)))
    age = desk.catalog.space.index["profile.age"]
    by_id = {DecideResponse.FromString(reply).decision_id: i for i, reply in enumerate(replies)}
    assert len(by_id) == 40
    for i, record in enumerate(await desk.records()):
        assert np.frombuffer(record.facts)[age] == i
        assert record.profile_key.rstrip(b"\0") == f"p{i}".encode()


async def test_without_a_catalog_nothing_is_decided() -> None:
    desk = Desk(has_catalog=False)
    assert await reason_of(desk.ask()) == "CATALOG_MISSING"
    assert await reason_of(desk.ask(atLeastLsn=1, timeout_s=0.02)) == "CATALOG_MISSING"


async def test_more_than_the_queue_holds_is_refused_at_once() -> None:
    desk = Desk(settings=service.Settings(queue_requests_max=3))
    taken = [desk.ask(), desk.ask(), desk.ask(atLeastLsn=9)]
    with pytest.raises(TsugiError) as refusal:
        desk.ask()
    assert refusal.value.reason == ErrorReason.ERROR_REASON_OVERLOADED
    assert refusal.value.metadata == {"limit": "3"}
    await asyncio.gather(*taken[:2])
    assert desk.service.queue_requests == 1, "one waits for the state"
    await asyncio.gather(desk.ask(), desk.ask())
    await taken[2]
    assert desk.service.queue_requests == 0


async def test_deadline_that_cannot_be_kept_is_refused_at_once() -> None:
    desk = Desk()
    await desk.decide()
    with pytest.raises(TsugiError) as refusal:
        desk.ask(timeout_s=0.0)
    assert refusal.value.reason == ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT
    assert len(await desk.records()) == 1


async def test_deadline_that_runs_out_before_its_turn_is_refused_and_its_neighbour_is_decided() -> None:
    desk = Desk()
    late, in_time = desk.ask(timeout_s=0.001), desk.ask()
    loop = asyncio.get_running_loop()
    end = loop.time() + 0.002
    while loop.time() < end:  # something else keeps the loop
        pass
    assert await reason_of(late) == "DEADLINE_TOO_SHORT"
    await in_time
    assert len(await desk.records()) == 1


async def test_many_that_cannot_be_decided_in_time_are_refused_before_any_is() -> None:
    desk = Desk()
    await desk.decide()
    assert desk.service.admit(500, None) == 500 * 0.25, "without a deadline each has the server's own"
    with pytest.raises(TsugiError) as refusal:
        desk.service.admit(1_000_000_000, 5.0)
    assert refusal.value.reason == ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT
    desk.service.admit(1, 5.0)


async def test_request_waits_for_what_it_reported_itself() -> None:
    desk = Desk()
    message = json_format.ParseDict({"placements": EXPLORED, "atLeastLsn": 3}, DecideRequest())
    waiting = desk.service.decide(message, message.SerializeToString(), 5.0, reported_lsn=7)
    desk.know("somebody", 6)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    desk.know("somebody", 7)
    reply = DecideResponse.FromString(await waiting)
    assert Degradation.DEGRADATION_PROFILE_STALE not in reply.degradations


async def test_request_waits_for_its_lsn_and_then_sees_it() -> None:
    desk = Desk()
    waiting = desk.ask(identities=person("late"), atLeastLsn=7)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    desk.know("late", 7, age=50)
    reply = DecideResponse.FromString(await waiting)
    assert Degradation.DEGRADATION_PROFILE_STALE not in reply.degradations
    assert Degradation.DEGRADATION_PROFILE_UNKNOWN not in reply.degradations
    assert [record.state_lsn for record in await desk.records()] == [7]


async def test_request_waits_for_its_worker_to_serve_the_configuration_it_has_seen() -> None:
    desk = Desk()
    with desk.store.write() as txn:
        write_applied(txn, Applied(lsn=9, time_us=NOW_US, configuration_lsn=8))
    for at_least, stale in ((3, True), (8, True), (9, True), (1, False), (0, False)):
        reply = await desk.decide(atLeastLsn=at_least, timeout_s=0.02)
        assert (Degradation.DEGRADATION_PROFILE_STALE in reply.degradations) == stale, at_least
    desk.service.take(make_live(desk.catalog, align(desk.catalog, no_champion(desk.catalog), None), 8, 0, "tests"))
    reply = await desk.decide(atLeastLsn=9)
    assert Degradation.DEGRADATION_PROFILE_STALE not in reply.degradations


async def test_lsn_that_does_not_come_is_told_after_half_of_the_deadline() -> None:
    desk = Desk()
    reply = await desk.decide(atLeastLsn=7, timeout_s=0.02)
    assert Degradation.DEGRADATION_PROFILE_STALE in reply.degradations
    assert reply.slots[0].action


async def test_what_cannot_be_recorded_is_decided_without_exploring_and_says_so() -> None:
    desk = Desk()
    desk.committer.takes = False
    replies = [await desk.decide(placements=[{"placement": "epsilon_greedy", "count": 4}]) for _ in range(20)]
    for reply in replies:
        assert {Degradation.DEGRADATION_EXPLORATION_OFF, Degradation.DEGRADATION_DECISION_NOT_RECORDED} <= set(
            reply.degradations
        )
        assert reply.decision_id, "an outcome for it can still be reported"
        assert all(slot.selection_probability == 1.0 / (4 - i) for i, slot in enumerate(reply.slots)), "all are equal"
    assert await desk.records() == []
    assert await reason_of(desk.ask(decisionAck=DURABLE)) == "LOG_UNAVAILABLE"
    preview = await desk.decide(preview=True)
    assert Degradation.DEGRADATION_DECISION_NOT_RECORDED not in preview.degradations


async def test_durable_reply_waits_for_the_commit_and_states_its_lsn() -> None:
    desk = Desk()
    waiting = desk.ask(decisionAck=DURABLE)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert await desk.records() == []
    desk.committer.commit()
    assert DecideResponse.FromString(await waiting).lsn == 1
    assert len(await desk.records()) == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (LogUnavailableError("disk"), "LOG_UNAVAILABLE"),
        (LogFullError(is_map=False), "LOG_VOLUME_FULL"),
        (LogFullError(is_map=True), "LOG_MAP_FULL"),
    ],
)
async def test_durable_decision_that_cannot_be_committed_is_refused(failure: Exception, reason: str) -> None:
    desk = Desk()
    waiting = desk.ask(decisionAck=DURABLE)
    await desk.committer.until_held(1)
    desk.committer.failure = failure
    desk.committer.commit()
    assert await reason_of(waiting) == reason


async def test_durable_twins_get_the_reply_of_the_one_that_was_committed() -> None:
    desk = Desk()
    first, other, second = (
        desk.ask(requestId="twin", decisionAck=DURABLE),
        desk.ask(requestId="twin", decisionAck=DURABLE, excludedActions=["action_0"]),
        desk.ask(requestId="twin", decisionAck=DURABLE),
    )
    await desk.committer.until_held(3)
    desk.committer.commit()
    assert await first == await second
    assert await reason_of(other) == "IDEMPOTENCY_KEY_REUSED"
    assert len(await desk.records()) == 1


async def test_request_id_is_answered_from_its_record_for_ever() -> None:
    desk = Desk()
    first = await desk.decide(requestId="again")
    assert await desk.decide(requestId="again") == first
    assert await reason_of(desk.ask(requestId="again", excludedActions=["action_0"])) == "IDEMPOTENCY_KEY_REUSED"
    assert len(await desk.records()) == 1
    assert not (await desk.decide(requestId="again", preview=True)).decision_id


@pytest.mark.parametrize("kind", ["gathering", "remembering"])
async def test_poisoned_request_fails_alone_and_its_neighbours_are_recorded_once(kind: str) -> None:
    desk = Desk(store=PoisonedStore()) if kind == "gathering" else Desk(token_key=PoisonedKey(SECRET))
    poisoned: dict[str, Any] = {"identities": person(POISON)} if kind == "gathering" else {"requestId": POISON}
    asked = [
        desk.ask(requestId="before"),
        desk.ask(decisionAck=DURABLE, requestId="durable"),
        desk.ask(**poisoned),
        desk.ask(atLeastLsn=5, requestId="waiting"),
        desk.ask(requestId="after"),
    ]
    await desk.committer.until_held(1)
    desk.committer.commit()
    with pytest.raises(RuntimeError):
        await asked[2]
    desk.know("somebody", 5)
    replies = [DecideResponse.FromString(await asked[i]) for i in (0, 1, 3, 4)]
    assert all(reply.slots[0].action for reply in replies)
    assert len(await desk.records()) == 4
    assert len({record.decision_key for record in await desk.records()}) == 4


async def test_what_a_refused_request_said_is_not_known_of_its_neighbour() -> None:
    desk = Desk()
    desk.know("1", 1, age=30)
    refused = [
        desk.ask(identities=person("1"), context={"hour": {"numberValue": 7}}, excludedActions=["nowhere"]),
        desk.ask(identities=[*person("1"), {"namespace": "x", "value": "1"}], context={"hour": {"numberValue": 9}}),
    ]
    stranger = desk.ask(identities=person("99"))
    assert [await reason_of(one) for one in refused] == ["RESOURCE_NOT_FOUND"] * 2
    await stranger
    (record,) = await desk.records()
    assert np.isnan(np.frombuffer(record.facts)[1:]).all()


async def test_caller_that_has_gone_is_neither_decided_nor_recorded() -> None:
    desk = Desk()
    gone, stays = desk.ask(), desk.ask()
    gone.cancel()
    await stays
    assert len(await desk.records()) == 1
    late = desk.ask(atLeastLsn=5)
    await asyncio.sleep(0)
    late.cancel()
    desk.know("somebody", 5)
    await desk.decide(atLeastLsn=5)
    assert len(await desk.records()) == 2


class _Failing:
    def score(self, _inputs: Floats) -> Floats:
        raise ScoringError("as the test wants it")


def failing_champion(catalog: Any) -> Champion:
    champion = given_champion(catalog, {"action_1": 0.9}, "click")
    return Champion(
        sha256=champion.sha256,
        goal_row=champion.goal_row,
        shared=champion.shared,
        shared_positions=champion.shared_positions,
        template=champion.template,
        scorer=_Failing(),
    )


async def test_champion_that_fails_is_replaced_by_base_rates_and_told() -> None:
    reply = await Desk(champion=failing_champion).decide(placements=[{"placement": "greedy", "count": 4}])
    assert Degradation.DEGRADATION_MODEL_UNAVAILABLE in reply.degradations
    assert [slot.propensity for slot in reply.slots] == pytest.approx([0.1] * 4)
    good = await Desk(champion=lambda catalog: given_champion(catalog, {"action_1": 0.9}, "click")).decide(
        placements=[{"placement": "greedy"}]
    )
    assert Degradation.DEGRADATION_MODEL_UNAVAILABLE not in good.degradations
    assert good.slots[0].action == "action_1"


async def test_missing_learner_is_told() -> None:
    assert Degradation.DEGRADATION_LEARNER_STALE in (await Desk().decide()).degradations


async def test_learner_is_stale_when_the_log_has_gone_on_without_it() -> None:
    for age_us, idle_us, is_stale in (
        (service.LEARNER_STALE_US, 0, False),
        (service.LEARNER_STALE_US + 1, service.LEARNER_STALE_US, False),  # a log that takes nothing teaches nothing
        (service.LEARNER_STALE_US + 1, 0, True),
    ):
        desk = Desk()
        desk.log.tick(NOW_US - idle_us, 0)
        desk.learn(1, time_us=NOW_US - age_us)
        reply = await desk.decide()
        assert (Degradation.DEGRADATION_LEARNER_STALE in reply.degradations) == is_stale, (age_us, idle_us)


def with_prize(units_max: int, **more: Any) -> Catalog:
    """Compile a catalog in which the first action comes first, and may be said so often."""
    return catalogs.compiled(
        actions=[
            {"name": name, "valueMicros": value, "treatments": [{"name": "only", "channel": "web"}]}
            for name, value in (("prize", 9_000_000), ("card", 1_000_000))
        ],
        budgets=[{"name": "prizes", "actions": ["prize"], "unitsMax": units_max} | more],
    )


PRIZED: Final = [{"placement": "greedy"}]


def actions_of(replies: Iterable[bytes]) -> list[str]:
    return [DecideResponse.FromString(reply).slots[0].action for reply in replies]


async def test_what_the_log_refuses_to_spend_is_decided_without() -> None:
    desk = Desk(catalog=with_prize(1))
    waiting = [desk.ask(placements=PRIZED, identities=person(str(i))) for i in range(3)]
    await desk.committer.until_held(3)
    assert not any(each.done() for each in waiting), "without slack all wait for the log"
    desk.committer.commit()
    assert actions_of(await asyncio.gather(*waiting)) == ["prize", "card", "card"]
    records = await desk.records()
    assert [record.slots[0].action for record in records] == ["prize", "card", "card"]
    prize, reason = desk.catalog.actions.rows["prize"], RefusalReason.REFUSAL_REASON_BUDGET_SPENT
    assert [record.refusal_reasons[prize] == reason for record in records] == [False, True, True]
    assert await desk.decide(placements=PRIZED), "and nobody waits for what is spent"


async def test_within_the_slack_nobody_waits() -> None:
    desk = Desk(catalog=with_prize(10, slack=2))
    first = [desk.ask(placements=PRIZED) for _ in range(3)]
    await asyncio.wait(first, timeout=0.01)
    assert [each.done() for each in first] == [True, True, False]
    await desk.committer.until_held(2)
    desk.committer.commit()
    assert actions_of(await asyncio.gather(*first)) == ["prize"] * 3
    assert (await desk.decide(placements=PRIZED)).slots[0].action == "prize", "what is on disk is no promise any more"


@pytest.mark.parametrize("slack", [0, 4])
async def test_log_that_fails_gives_back_what_was_not_said(slack: int) -> None:
    desk = Desk(catalog=with_prize(4, slack=slack))
    first = [desk.ask(placements=PRIZED) for _ in range(4)]
    await desk.committer.until_held(1 if slack else 4)
    desk.committer.failure = LogUnavailableError("disk")
    desk.committer.commit()
    if slack:
        assert actions_of(await asyncio.gather(*first)) == ["prize"] * 4
    else:
        assert [await reason_of(each) for each in first] == ["LOG_UNAVAILABLE"] * 4
    assert await desk.records() == []
    desk.committer.failure = None
    again = [desk.ask(placements=PRIZED) for _ in range(5)]
    if not slack:
        await desk.committer.until_held(5)
        desk.committer.commit()
    # What was said within the slack stays promised, though no record of it was taken.
    assert actions_of(await asyncio.gather(*again)) == (["card"] * 5 if slack else [*["prize"] * 4, "card"])


async def test_what_cannot_be_recorded_is_spent_by_nobody() -> None:
    desk = Desk(catalog=with_prize(1, slack=1))
    desk.committer.takes = False
    assert [(await desk.decide(placements=PRIZED)).slots[0].action for _ in range(3)] == ["card"] * 3
    desk.committer.takes = True
    assert (await desk.decide(placements=PRIZED)).slots[0].action == "prize"


async def test_preview_spends_nothing_and_a_repeated_request_spends_once() -> None:
    desk = Desk(catalog=with_prize(2))
    for _ in range(3):
        assert (await desk.decide(placements=PRIZED, preview=True)).slots[0].action == "prize"
    twins = [desk.ask(placements=PRIZED, requestId="twin", decisionAck=DURABLE) for _ in range(2)]
    await desk.committer.until_held(2)
    desk.committer.commit()
    assert len(set(await asyncio.gather(*twins))) == 1
    assert len(await desk.records()) == 1
    last = [desk.ask(placements=PRIZED) for _ in range(2)]
    await desk.committer.until_held(2)
    desk.committer.commit()
    assert actions_of(await asyncio.gather(*last)) == ["prize", "card"]


def challenged() -> tuple[Catalog, list[str], list[str]]:
    """Compile a catalog whose challenger decides for half; return it, with numbers of those people and of others."""
    branch = {"name": "new_model", "share": 0.5, "modelRole": "MODEL_ROLE_CHALLENGER"}
    catalog = catalogs.compiled(experiments=[{"name": "models", "branches": [branch]}])
    numbers = [str(i) for i in range(40)]
    keys = {each: identity_key(Identity(namespace="customer_number", value=each)) for each in numbers}
    theirs = [each for each in numbers if blend_of(catalog.experiments, keys[each])]
    return catalog, theirs, [each for each in numbers if each not in theirs]


def favouring(action: str, name: bytes) -> Callable[[Catalog], Champion]:
    def make(catalog: Catalog) -> Champion:
        return dataclasses.replace(given_champion(catalog, {action: 0.9}, "click"), sha256=name * 32)

    return make


async def test_challenger_decides_for_its_branch_and_the_champion_for_all_others() -> None:
    catalog, theirs, others = challenged()
    desk = Desk(catalog=catalog, champion=favouring("action_1", b"1"), challenger=favouring("action_2", b"2"))
    mixed = [each for pair in zip(theirs, others, strict=False) for each in pair]
    replies = await asyncio.gather(*(desk.ask(placements=PRIZED, identities=person(each)) for each in mixed))
    assert actions_of(replies) == ["action_2", "action_1"] * (len(mixed) // 2)
    roles = [[use.role for use in DecideResponse.FromString(reply).model_revisions] for reply in replies]
    assert roles[:2] == [[ModelRole.MODEL_ROLE_CHALLENGER], [ModelRole.MODEL_ROLE_CHAMPION]]
    named = {(each.provenance.champion_sha256, each.provenance.challenger_sha256) for each in await desk.records()}
    assert named == {(b"1" * 32, b""), (b"", b"2" * 32)}


async def test_without_a_challenger_the_champion_stands_in_and_this_is_told() -> None:
    catalog, theirs, others = challenged()
    desk = Desk(catalog=catalog, champion=favouring("action_1", b"1"))
    for who, is_told in ((theirs[0], True), (others[0], False)):
        reply = await desk.decide(placements=PRIZED, identities=person(who))
        assert reply.slots[0].action == "action_1"
        assert (Degradation.DEGRADATION_MODEL_UNAVAILABLE in reply.degradations) == is_told
        assert bool(reply.assignments) == is_told


@pytest.mark.parametrize("is_theirs", [True, False])
async def test_where_one_part_of_a_batch_fails_the_other_is_not_decided_twice(is_theirs: bool) -> None:
    catalog, theirs, others = challenged()
    desk = Desk(
        catalog=catalog,
        champion=favouring("action_1", b"1"),
        challenger=favouring("action_2", b"2"),
        token_key=PoisonedKey(SECRET),
    )
    poisoned = (theirs if is_theirs else others)[-1]
    asked = {
        each: desk.ask(
            placements=PRIZED, identities=person(each), requestId=POISON if each == poisoned else f"request {each}"
        )
        for each in (*theirs[:4], *others[:4], poisoned)
    }
    with pytest.raises(RuntimeError):
        await asked.pop(poisoned)
    chosen = dict(zip(asked, actions_of(await asyncio.gather(*asked.values())), strict=True))
    assert chosen == {each: "action_2" if each in theirs else "action_1" for each in asked}
    records = await desk.records()
    assert len(records) == len({record.decision_key for record in records}) == len(asked)


def capped(n_caps: int) -> Catalog:
    caps = [
        {
            "name": f"cap_{i}",
            "scope": "CONTACT_SCOPE_EACH_ACTION",
            "cap": {"countMax": 3, "span": "3600s", "strict": True},
        }
        for i in range(n_caps)
    ]
    return catalogs.compiled(
        contactPolicies=caps,
        placements=[{"name": "wide", "channel": "web", "goal": "click", "countMax": 16}],
        actions=[{"name": f"action_{i}", "treatments": [{"name": "only", "channel": "web"}]} for i in range(16)],
    )


async def test_more_strict_contacts_than_a_record_holds_are_refused_and_nothing_is_recorded() -> None:
    desk = Desk(catalog=capped(3))
    desk.committer.is_held = False
    desk.know("1", 1)
    wide = [{"placement": "wide", "count": 16}]
    assert await reason_of(desk.ask(identities=person("1"), placements=wide)) == "LIMIT_EXCEEDED"
    assert await desk.records() == [], "a record about so many would fail the log for everybody"
    assert (await desk.decide(identities=person("1"), placements=[{"placement": "wide", "count": 5}])).slots[4].action


def budgeted(slack: int, units_max: int) -> Catalog:
    return catalogs.compiled(budgets=[{"name": "post", "unitsMax": str(units_max), "slack": str(slack)}])


def spent(desk: Desk) -> int:
    (limit,) = desk.catalog.budgets.limits
    return desk.log.spent([limit.counter(NOW_US)])[0]


async def test_budget_without_slack_is_answered_from_the_disk_and_never_passed() -> None:
    desk = Desk(catalog=budgeted(slack=0, units_max=5))
    asked = [desk.ask() for _ in range(8)]
    async with asyncio.timeout(5):
        while not all(each.done() for each in asked):
            desk.committer.commit()
            await asyncio.sleep(0)
    replies = [DecideResponse.FromString(await each) for each in asked]
    assert sum(bool(reply.slots[0].action) for reply in replies) == spent(desk) == 5


async def test_slack_is_promised_at_once_and_what_goes_beyond_it_waits() -> None:
    desk = Desk(catalog=budgeted(slack=4, units_max=100), settings=service.Settings(n_workers=2))
    asked = [desk.ask() for _ in range(3)]
    await desk.committer.until_held(1)
    assert [each.done() for each in asked] == [True, True, False]
    desk.committer.commit()
    await asked[2]
    assert spent(desk) == 3
    assert (await desk.decide()).slots[0].action, "what is on disk is promised no more"


async def test_what_was_said_and_could_not_be_recorded_stays_promised() -> None:
    desk = Desk(catalog=budgeted(slack=2, units_max=100))
    desk.committer.failure = LogFullError(is_map=True)
    for _ in range(2):
        assert (await desk.decide()).slots[0].action
        await desk.committer.until_held(1)
        desk.committer.commit()
        await asyncio.sleep(0)
    third = desk.ask()
    await desk.committer.until_held(1)
    assert not third.done(), "or a full log would let any number pass, a slack at a time"
    desk.committer.commit()
    assert await reason_of(third) == "LOG_MAP_FULL"


async def test_very_large_context_refuses_its_actions_and_its_neighbours_are_recorded() -> None:
    exploration = {"squareCb": {"gamma": 8.0}, "budget": {"costMicrosMax": "1000000", "period": "86400s"}}
    treatment = {"name": "only", "channel": "web"}
    desk = Desk(
        catalog=catalogs.compiled(
            contextAttributes=[{"name": "basket", "type": "ATTRIBUTE_TYPE_NUMBER"}],
            placements=[{"name": "shop", "channel": "web", "goal": "click", "exploration": exploration}],
            actions=[
                {"name": f"action_{i}", "lever": 1000, "value": "context.basket", "treatments": [treatment]}
                for i in range(4)
            ],
        )
    )
    desk.committer.is_held = False
    baskets = (2.0, 1e308, 9e11, 3.0)
    asked = [
        desk.ask(placements=[{"placement": "shop"}], context={"basket": {"numberValue": basket}}) for basket in baskets
    ]
    slots = [DecideResponse.FromString(await each).slots[0] for each in asked]
    assert [bool(slot.action) for slot in slots] == [True, False, True, True]
    assert all(0.0 < slot.selection_probability <= 1.0 for slot in slots if slot.action)
    assert len(await desk.records()) == 4


async def test_recorded_decision_tells_branches_and_holdouts() -> None:
    desk = Desk(
        catalog=catalogs.compiled(
            experiments=[{"name": "trial", "branches": [{"name": "all", "share": 1.0}]}],
            holdouts=[{"name": "quiet", "share": 0.5}],
        )
    )
    blobs: Any = None  # the catalog is the one in force
    reader = DecisionReader(
        log=desk.log,
        store=desk.store,
        token_key=TokenKey(SECRET),
        blobs=blobs,
        live=lambda: desk.service.live,
        corrections=Corrections(),
    )
    held_out = 0
    for number in range(20):
        reply = await desk.decide(identities=person(str(number)))
        await asyncio.sleep(0)
        told = await reader.get(GetDecisionRequest(decision_id=reply.decision_id))
        assert [(each.experiment, each.branch) for each in told.assignments] == [("trial", "all")]
        assert list(told.holdouts) == ([] if reply.slots[0].action else ["quiet"])
        held_out += bool(told.holdouts)
    assert 0 < held_out < 20


def desk_with_baseline(**parts: Any) -> Desk:
    """A desk whose learners are switched off, and whose champion says that action_1 is best."""
    catalog = catalogs.compiled(**parts)
    desk = Desk(catalog=catalog, champion=lambda catalog: given_champion(catalog, {"action_1": 0.6}, "click"))
    assert desk.service.live is not None
    models = desk.service.live.models
    desk.service.take(make_live(catalog, models, 1, 0, "tests", learner_lsn=2, is_baseline=True))
    return desk


@pytest.mark.parametrize("placement", ["epsilon_greedy", "square_cb", "thompson"])
async def test_while_the_baseline_decides_nothing_is_explored_and_replies_and_records_say_so(placement: str) -> None:
    desk = desk_with_baseline()
    for i in range(20):
        reply = await desk.decide(placements=[{"placement": placement}], requestId=str(i))
        (slot,) = reply.slots
        assert (slot.action, slot.selection_probability) == ("action_1", 1.0)
        assert Degradation.DEGRADATION_LEARNER_STALE not in reply.degradations, "it is not missing, it is not used"
        assert Degradation.DEGRADATION_EXPLORATION_OFF not in reply.degradations
        assert ("MODEL_ROLE_LEARNER", "baseline") in [
            (ModelRole.Name(use.role), use.revision) for use in reply.model_revisions
        ]
    records = await desk.records()
    assert len(records) == 20
    for record in records:
        assert record.provenance.baseline
        assert record.provenance.learner_epoch == 0
        assert differences(record, desk.catalog) == [], "it can be decided again"
        (told,) = explain(record, desk.catalog, lambda _places: {}).placements
        assert told.not_explored_by == "baseline"


async def test_random_control_goes_on_while_the_baseline_decides() -> None:
    desk = desk_with_baseline(randomControl={"share": 0.5, "salt": "s"})
    for number in range(20):
        await desk.decide(identities=[{"namespace": "customer_number", "value": str(number)}])
    records = await desk.records()
    assert {record.random_control for record in records} == {True, False}
    for record in records:
        chance = 0.25 if record.random_control else 1.0  # it is what everything is measured against
        assert record.slots[0].selection_probability == chance
        assert differences(record, desk.catalog) == []
