"""Who asks for it is decided with arrays that include an LSN, or told otherwise; and the learning lag is exact."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import telemetry
from server.decisioning import service
from tests.unit.decisioning.test_service import NOW_US, POISON, Desk, PoisonedStore, person
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse

STALE: Final = Degradation.DEGRADATION_LEARNER_STALE
SHORT: Final = 0.02  # a deadline: half of it may be waited
N_OPEN_TURNS: Final = 5


@pytest.fixture
def desk() -> Desk:
    """A desk whose state includes all that is waited for, and whose learner has come to record 5."""
    desk = Desk()
    desk.committer.is_held = False
    desk.know("somebody", 100)
    desk.learn(5)
    return desk


def wait(desk: Desk, lsn: int, **request: Any) -> asyncio.Future[bytes]:
    return desk.ask(**{"atLeastLsn": lsn, "waitForLearning": True} | request)


async def turns() -> None:
    for _ in range(N_OPEN_TURNS):
        await asyncio.sleep(0)


def learned_lsn(reply: DecideResponse) -> int:
    return max([use.learned_lsn for use in reply.model_revisions], default=0)


async def test_what_is_learned_already_is_not_waited_for(desk: Desk) -> None:
    waiting = wait(desk, 5)
    await asyncio.sleep(0)
    assert waiting.done()
    assert not DecideResponse.FromString(await waiting).degradations[1:], "a stranger, and nothing else"


async def test_request_waits_for_the_arrays_that_include_its_lsn_and_is_decided_with_them(desk: Desk) -> None:
    waiting = wait(desk, 7)
    await turns()
    desk.learn(6)
    await turns()
    assert not waiting.done()
    plain = await desk.decide(atLeastLsn=7)
    assert learned_lsn(plain) == 6
    assert STALE not in plain.degradations, "it did not ask"
    desk.learn(8)
    reply = DecideResponse.FromString(await waiting)
    assert learned_lsn(reply) == 8
    assert STALE not in reply.degradations
    assert [record.provenance.learned_lsn for record in await desk.records()] == [6, 8]
    assert desk.service.queue_requests == 0


async def test_learning_that_does_not_come_is_told_after_half_of_the_deadline(desk: Desk) -> None:
    begun = asyncio.get_running_loop().time()
    reply = DecideResponse.FromString(await wait(desk, 7, timeout_s=SHORT))
    assert asyncio.get_running_loop().time() - begun >= SHORT / 2
    assert list(reply.degradations).count(STALE) == 1
    assert reply.slots[0].action
    assert [list(record.degradations).count(STALE) for record in await desk.records()] == [1]


async def test_what_no_log_will_ever_hold_is_waited_for_as_long_as_anything(desk: Desk) -> None:
    reply = DecideResponse.FromString(await wait(desk, (1 << 64) - 1, timeout_s=SHORT))
    assert {STALE, Degradation.DEGRADATION_PROFILE_STALE} <= set(reply.degradations)
    assert desk.service.queue_requests == 0


async def test_without_any_learner_the_wait_is_as_long_and_told_once() -> None:
    desk = Desk()
    desk.know("somebody", 100)
    begun = asyncio.get_running_loop().time()
    reply = DecideResponse.FromString(await wait(desk, 7, timeout_s=SHORT))
    assert asyncio.get_running_loop().time() - begun >= SHORT / 2
    assert list(reply.degradations).count(STALE) == 1


async def test_the_wait_has_a_bound_of_its_own_however_long_the_deadline(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LEARNING_WAIT_S_MAX", SHORT)
    reply = DecideResponse.FromString(await wait(desk, 7, timeout_s=1e6))
    assert STALE in reply.degradations


async def test_state_is_waited_for_too_and_each_delay_is_told_by_its_own_name(desk: Desk) -> None:
    profile_stale = Degradation.DEGRADATION_PROFILE_STALE
    for lsn, learned, expected in ((200, 5, {STALE, profile_stale}), (200, 200, {profile_stale}), (100, 5, {STALE})):
        desk.learn(learned)
        reply = DecideResponse.FromString(await wait(desk, lsn, timeout_s=SHORT))
        assert set(reply.degradations) & {STALE, profile_stale} == expected, (lsn, learned)
    desk.learn(200)
    waiting = wait(desk, 200)
    await turns()
    desk.know("somebody", 200)
    assert not set(DecideResponse.FromString(await waiting).degradations) & {STALE, profile_stale}


async def test_what_the_request_reported_itself_is_waited_for(desk: Desk) -> None:
    request = DecideRequest(wait_for_learning=True)
    request.placements.add(placement="greedy")
    waiting = desk.service.decide(request, request.SerializeToString(), 5.0, reported_lsn=9)
    await turns()
    assert not waiting.done()
    desk.learn(9)
    assert learned_lsn(DecideResponse.FromString(await waiting)) == 9


async def test_only_a_part_of_the_queue_waits_and_others_are_decided_at_once() -> None:
    desk = Desk(settings=service.Settings(queue_requests_max=8))
    desk.know("somebody", 100)
    desk.learn(5)
    waiting = [wait(desk, 7) for _ in range(3)]
    plain = [desk.ask() for _ in range(4)]
    await turns()
    assert [each.done() for each in waiting] == [False, False, True], "a quarter of eight waits"
    assert STALE in DecideResponse.FromString(await waiting[2]).degradations
    assert all(each.done() for each in plain)
    assert desk.service.queue_requests == 2
    desk.learn(7)
    assert all(learned_lsn(DecideResponse.FromString(each)) == 7 for each in await asyncio.gather(*waiting[:2]))


async def test_caller_that_has_gone_is_forgotten_when_the_next_arrays_come(desk: Desk) -> None:
    waiting = wait(desk, 7)
    await turns()
    waiting.cancel()
    assert desk.service.queue_requests == 1
    desk.learn(6)
    await turns()
    assert desk.service.queue_requests == 0
    assert await desk.records() == []


async def test_who_waits_is_decided_once_though_a_neighbour_fails() -> None:
    desk = Desk(store=PoisonedStore())
    desk.committer.is_held = False
    desk.know("somebody", 100)
    desk.learn(5)
    waiting, poisoned = wait(desk, 7), desk.ask(identities=person(POISON))
    with pytest.raises(RuntimeError):
        await poisoned
    assert desk.service.queue_requests == 1
    desk.learn(7)
    await waiting
    assert len(await desk.records()) == 1


@given(st.lists(st.tuples(st.sampled_from(["ask", "learn", "turn"]), st.integers(1, 12)), max_size=40))
def test_every_request_is_answered_once_and_knows_what_it_asked_for_or_says_so(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        desk = Desk()
        desk.committer.is_held = False
        desk.know("somebody", 100)
        asked: list[tuple[int, asyncio.Future[bytes]]] = []
        newest = 1
        for step, lsn in steps:
            if step == "ask":
                asked.append((lsn, wait(desk, lsn)))
            elif step == "learn":
                newest = max(newest, lsn)
                desk.learn(newest)
            else:
                await turns()
        await turns()
        for lsn, answer in asked:
            assert answer.done() == (desk.service.live is not None and newest_lsn(desk) >= lsn)
        desk.learn(12)
        for lsn, answer in asked:
            reply = DecideResponse.FromString(await answer)
            assert learned_lsn(reply) >= lsn
            assert STALE not in reply.degradations
        assert len(await desk.records()) == len(asked)
        assert desk.service.queue_requests == 0

    asyncio.run(play())


def newest_lsn(desk: Desk) -> int:
    live = desk.service.live
    assert live is not None, "it has a catalog"
    return live.models.learned_lsn


def lags() -> tuple[float, float]:
    """Return how many lags were counted so far, and their sum in seconds."""
    (metric,) = telemetry.LEARNING_LAG_SECONDS.collect()
    values = {sample.name.rpartition("_")[2]: sample.value for sample in metric.samples if not sample.labels}
    return values["count"], values["sum"]


async def test_learning_lag_is_that_of_the_outcome_that_waited_longest_and_counted_once() -> None:
    desk = Desk()
    count, total = lags()
    for lsn, outcome, expected_s in (
        (5, (3, NOW_US - 9_000_000), None),  # learned before this worker was there
        (9, (7, NOW_US - 250_000), 0.25),
        (12, (0, 0), None),  # nothing but decisions and ticks
        (8, (7, NOW_US - 500_000), None),  # a learner that was restarted learns it again
        (20, (13, NOW_US + 40), 0.0),  # a clock that was set back
    ):
        desk.learn(lsn, new_outcome=outcome)
        if expected_s is not None:
            count, total = count + 1, total + expected_s
        counted, summed = lags()
        assert counted == count, lsn
        assert summed == pytest.approx(total)
    desk.service.take(desk.service.live)  # type: ignore[arg-type]  # it has a catalog; as when that changes
    assert lags()[0] == count
