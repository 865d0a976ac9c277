from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.storage import committer as committer_module
from server.storage.committer import BACKLOG_RECORDS, GroupCommitter, Receipts
from server.storage.log import GROUP_RECORDS_MAX, Fate, LogFullError, LogUnavailableError, Receipt
from server.storage.record import Draft
from tests.support.faults import WAIT_S_MAX, FaultyLog, Gate, HastyCommitter, RecordsThenFailsError
from tsugi.log.v1.record_pb2 import RecordKind

NOW_US = 1_760_000_000_000_000
LONG_MS = 60_000.0  # nothing offered is committed for its own sake while a test runs


def drafts(*numbers: int) -> list[Draft]:
    return [Draft(RecordKind.RECORD_KIND_OUTCOME, b"", number.to_bytes(16, "big")) for number in numbers]


def numbers_of(group: list[Draft]) -> list[int]:
    return [int.from_bytes(draft.key, "big") for draft in group]


class Desk:
    """A committer over a scripted log, started and closed by the test's fixture."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.commits: list[int] = []
        self.log = FaultyLog()
        self.is_latched = False
        self._started: list[tuple[GroupCommitter, list[Gate]]] = []

    def start(
        self,
        script: Mapping[int, Exception | Gate] | None = None,
        *,
        wait_ms: float = LONG_MS,
        make: type[GroupCommitter] = GroupCommitter,
        **options: Any,
    ) -> GroupCommitter:
        self.log = FaultyLog(script)
        committer = make(
            self.log,
            wall_us=lambda: NOW_US,
            on_failure=lambda: self.failures.append(threading.current_thread().name),
            is_latched=lambda: self.is_latched,
            on_commit=lambda n_records, _seconds: self.commits.append(n_records),
            wait_ms=wait_ms,
            **options,
        )
        self._started.append((committer, [fault for fault in (script or {}).values() if isinstance(fault, Gate)]))
        committer.start(asyncio.get_running_loop())
        return committer

    def close(self) -> None:
        for committer, gates in self._started:
            for gate in gates:
                gate.open()
            committer.close()

    def groups(self) -> list[list[int]]:
        return [numbers_of(group) for group in self.log.groups]


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def takes(committer: GroupCommitter) -> bool:
    return committer.accepting


async def settled(receipts: Receipts) -> list[Receipt]:
    return await asyncio.wait_for(asyncio.shield(receipts), WAIT_S_MAX)


async def refused(receipts: Receipts) -> Exception:
    with pytest.raises((LogFullError, LogUnavailableError)) as caught:
        await settled(receipts)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S_MAX):
        while not condition():  # noqa: ASYNC110  # it belongs to another thread, and no time passes here
            await asyncio.sleep(0)


async def test_waiting_drafts_are_committed_at_once_and_receipts_come_in_their_order(desk: Desk) -> None:
    committer = desk.start()
    assert [receipt.lsn for receipt in await settled(committer.submit(drafts(1, 2, 3)))] == [1, 2, 3]
    twice = await settled(committer.submit(drafts(4, 2)))
    assert [(receipt.fate, receipt.lsn) for receipt in twice] == [(Fate.RECORDED, 4), (Fate.DUPLICATE, 2)]
    assert desk.groups() == [[1, 2, 3], [4, 2]]
    assert {record.time_us for record in desk.log.read(1)} == {NOW_US}


async def test_nothing_submitted_is_settled_at_once(desk: Desk) -> None:
    assert await settled(desk.start().submit([])) == []
    assert desk.groups() == []


async def test_offered_drafts_are_committed_no_later_than_one_that_waits(desk: Desk) -> None:
    committer = desk.start(wait_ms=1_000 * WAIT_S_MAX)
    await settled(committer.submit(drafts(1)))
    committer.offer(drafts(2, 3))
    (receipt,) = await settled(committer.submit(drafts(4)))
    assert receipt.lsn == 4
    assert [number for group in desk.groups() for number in group] == [1, 2, 3, 4]


async def test_first_draft_offered_after_a_quiet_time_is_committed_at_once(desk: Desk) -> None:
    committer = desk.start(wait_ms=1_000 * WAIT_S_MAX)
    committer.offer(drafts(1))
    await until(lambda: desk.log.tail().lsn == 1)


async def test_offer_gives_a_thread_that_lags_its_turn_but_never_waits_for_long(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate})
    committer.offer(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    many = range(2, 2 * BACKLOG_RECORDS)
    committer.offer(drafts(*many))  # returns although the thread stands still
    assert committer.queue_records == len(many)
    gate.open()
    await until(lambda: desk.log.tail().lsn == 1 + len(many))


async def test_offered_drafts_alone_are_committed_after_their_wait(desk: Desk) -> None:
    committer = desk.start(wait_ms=1.0)
    committer.offer(drafts(1, 2))
    await until(lambda: desk.log.tail().lsn == 2)


async def test_callers_who_come_during_a_commit_share_the_next_one(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate})
    first = committer.submit(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    others = [committer.submit(drafts(number)) for number in (2, 3)]
    committer.offer(drafts(4))
    gate.open()
    receipts = [await settled(receipt) for receipt in (first, *others)]
    assert [receipt.lsn for (receipt,) in receipts] == [1, 2, 3]
    assert desk.groups() == [[1], [2, 3, 4]]


async def test_nothing_is_acknowledged_before_append_has_returned(desk: Desk) -> None:
    assert not await is_acknowledged_before_append(desk, GroupCommitter)


async def test_negative_control_a_hasty_committer_is_caught(desk: Desk) -> None:
    assert await is_acknowledged_before_append(desk, HastyCommitter)


async def is_acknowledged_before_append(desk: Desk, make: type[GroupCommitter]) -> bool:
    gate = Gate()
    committer = desk.start({1: gate}, make=make)
    receipts = committer.submit(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    await asyncio.sleep(0)  # what the thread told the loop before the gate has arrived by now
    await asyncio.sleep(0)
    is_early = receipts.done()
    gate.open()
    await settled(receipts)
    return is_early


async def test_after_a_failed_append_every_waiter_is_refused_and_nothing_is_acknowledged_any_more(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate, 2: LogUnavailableError("Input/output error")})
    first = committer.submit(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    in_the_failing_group = committer.submit(drafts(*range(100, 100 + GROUP_RECORDS_MAX)))
    behind_it = committer.submit(drafts(2))
    committer.offer(drafts(3))
    gate.open()
    assert len(await settled(first)) == 1
    assert str(await refused(in_the_failing_group)) == "Input/output error"
    assert isinstance(await refused(behind_it), LogUnavailableError)
    assert not takes(committer)
    assert isinstance(await refused(committer.submit(drafts(4))), LogUnavailableError)
    assert desk.failures == ["committer"]
    assert len(desk.groups()) == 2
    assert desk.log.tail().lsn == 1
    await until(lambda: committer.queue_records == 0)


async def test_alarm_is_raised_before_anybody_is_told(desk: Desk) -> None:
    committer = desk.start({1: LogUnavailableError()})
    gate = Gate()
    committer._on_failure = gate.pass_through
    receipts = committer.submit(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    await asyncio.sleep(0)
    assert not receipts.done()
    assert not takes(committer)
    gate.open()
    await refused(receipts)


async def test_caller_who_comes_at_the_moment_of_failure_is_refused_too(desk: Desk) -> None:
    committer = desk.start({1: LogUnavailableError()})

    class Queue(deque[Any]):
        """Lets the thread fail, refuse its queue and end between a caller's look at the log and its queueing."""

        def extend(self, items: Iterable[Any]) -> None:
            if committer._thread.is_alive():
                committer._queue = deque()
                committer.offer(drafts(1))
                committer._wake.set()
                committer._thread.join(WAIT_S_MAX)
            super().extend(items)

    committer._queue = Queue()
    assert isinstance(await refused(committer.submit(drafts(2))), LogUnavailableError)
    assert desk.groups() == [[1]]


async def test_group_that_may_be_on_disk_although_the_disk_failed_is_refused(desk: Desk) -> None:
    committer = desk.start({1: RecordsThenFailsError()})
    assert isinstance(await refused(committer.submit(drafts(1))), LogUnavailableError)
    assert desk.failures == ["committer"]


async def test_defect_in_the_engine_refuses_everybody_instead_of_leaving_them_waiting(desk: Desk) -> None:
    committer = desk.start({1: ZeroDivisionError("a defect")})
    waiting = [committer.submit(drafts(number)) for number in (1, 2)]
    for receipts in waiting:
        assert isinstance(await refused(receipts), LogUnavailableError)
    assert desk.failures == ["committer"]
    assert not takes(committer)


async def test_failed_process_elsewhere_refuses_here_although_the_append_succeeded(desk: Desk) -> None:
    committer = desk.start()
    await settled(committer.submit(drafts(1)))
    desk.is_latched = True
    assert isinstance(await refused(committer.submit(drafts(2))), LogUnavailableError)
    assert desk.log.tail().lsn == 2  # it stands; who retries is told that it is a duplicate
    assert desk.failures == ["committer"]
    assert isinstance(await refused(committer.submit(drafts(3))), LogUnavailableError)
    assert desk.log.tail().lsn == 2


@pytest.mark.parametrize("is_map", [True, False])
async def test_full_log_refuses_the_group_and_takes_the_next_when_there_is_space(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, is_map: bool
) -> None:
    monkeypatch.setattr(committer_module, "FULL_PAUSE_S", 3_600.0)
    committer = desk.start({1: LogFullError(is_map=is_map)})
    error = await refused(committer.submit(drafts(1)))
    assert isinstance(error, LogFullError)
    assert error.is_map == is_map
    assert not takes(committer)  # so that decisions are not offered to be lost
    (receipt,) = await settled(committer.submit(drafts(1)))  # but who waits is always tried
    assert receipt == (Fate.RECORDED, 1, NOW_US)
    assert takes(committer)
    assert desk.failures == []


async def test_full_log_is_offered_to_again_after_a_pause(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer_module, "FULL_PAUSE_S", 0.0)
    committer = desk.start({1: LogFullError(is_map=False)})
    await refused(committer.submit(drafts(1)))
    assert takes(committer)


async def test_only_what_was_committed_is_counted(desk: Desk) -> None:
    committer = desk.start({2: LogFullError(is_map=True), 4: LogUnavailableError()})
    await settled(committer.submit(drafts(1, 2)))
    await refused(committer.submit(drafts(3)))
    await settled(committer.submit(drafts(4)))
    await refused(committer.submit(drafts(5)))
    assert desk.commits == [2, 1]


async def test_more_drafts_than_a_group_takes_span_groups_and_come_back_together(desk: Desk) -> None:
    committer = desk.start()
    receipts = await settled(committer.submit(drafts(*range(1, 601))))
    assert [receipt.lsn for receipt in receipts] == list(range(1, 601))
    assert [len(group) for group in desk.groups()] == [256, 256, 88]


async def test_waiter_whose_second_group_fails_is_refused_whole(desk: Desk) -> None:
    committer = desk.start({2: LogFullError(is_map=True)})
    assert isinstance(await refused(committer.submit(drafts(*range(1, 601)))), LogFullError)
    retried = await settled(committer.submit(drafts(*range(1, 601))))
    assert sorted(receipt.lsn for receipt in retried) == list(range(1, 601))
    assert {receipt.fate for receipt in retried} == {Fate.RECORDED, Fate.DUPLICATE}


async def test_caller_who_goes_away_disturbs_nobody_and_the_record_stands(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate})
    gone, stays = committer.submit(drafts(1)), committer.submit(drafts(2, 3))
    gone.cancel()
    gate.open()
    assert [receipt.lsn for receipt in await settled(stays)] == [2, 3]
    assert desk.log.tail().lsn == 3


async def test_caller_who_goes_away_before_a_failure_disturbs_nobody(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate, 2: LogUnavailableError()})
    committer.submit(drafts(1)).cancel()
    await asyncio.to_thread(gate.wait_until_reached)
    gone, stays = committer.submit(drafts(2)), committer.submit(drafts(3))
    gone.cancel()
    gate.open()
    assert isinstance(await refused(stays), LogUnavailableError)


async def test_close_commits_what_is_queued_and_takes_nothing_after(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate})
    first = committer.submit(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    waiting = committer.submit(drafts(2))
    committer.offer(drafts(*range(3, 600)))
    closing = asyncio.create_task(asyncio.to_thread(committer.close))
    await until(lambda: not takes(committer))
    gate.open()
    await asyncio.wait_for(closing, WAIT_S_MAX)
    assert [(await settled(receipts))[0].lsn for receipts in (first, waiting)] == [1, 2]
    assert desk.log.tail().lsn == 599
    assert isinstance(await refused(committer.submit(drafts(600))), LogUnavailableError)
    assert desk.failures == []


async def test_closing_twice_or_without_a_start_does_nothing(desk: Desk) -> None:
    committer = desk.start()
    committer.close()
    committer.close()
    GroupCommitter(FaultyLog(), wall_us=lambda: NOW_US, on_failure=lambda: None).close()


async def test_full_queue_refuses_at_once_who_waits_and_who_offers(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate}, queue_records_max=3)
    first = committer.submit(drafts(1))
    await asyncio.to_thread(gate.wait_until_reached)
    committer.offer(drafts(2, 3))
    assert takes(committer)
    committer.offer(drafts(4))
    assert committer.queue_records == 3
    assert not takes(committer)
    assert isinstance(await refused(committer.submit(drafts(5))), LogUnavailableError)
    gate.open()
    await settled(first)
    await until(lambda: takes(committer) and committer.queue_records == 0)
    await settled(committer.submit(drafts(6)))
    assert desk.groups() == [[1], [2, 3, 4], [6]]


@pytest.fixture
def short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer_module, "TICK_IDLE_US", 1_000)


@pytest.mark.usefixtures("short_idle")
async def test_idle_committer_records_the_passing_of_time(desk: Desk) -> None:
    desk.start()
    await until(lambda: desk.log.tail().lsn == 1)
    (tick,) = desk.log.read(1)
    assert (tick.kind, tick.time_us) == (RecordKind.RECORD_KIND_TICK, NOW_US)


@pytest.mark.usefixtures("short_idle")
async def test_tick_on_a_full_log_waits_for_space(desk: Desk) -> None:
    committer = desk.start({1: LogFullError(is_map=False)})
    await until(lambda: desk.log.tail().lsn == 1)
    assert len(desk.groups()) == 2
    assert desk.failures == []
    assert len(await settled(committer.submit(drafts(1)))) == 1


@pytest.mark.usefixtures("short_idle")
async def test_what_is_queued_during_a_tick_is_committed_before_the_end(desk: Desk) -> None:
    gate = Gate()
    committer = desk.start({1: gate})
    await asyncio.to_thread(gate.wait_until_reached)
    committer.offer(drafts(1))
    waiting = committer.submit(drafts(2))
    closing = asyncio.create_task(asyncio.to_thread(committer.close))
    await until(lambda: not takes(committer))
    gate.open()
    await asyncio.wait_for(closing, WAIT_S_MAX)
    assert [receipt.lsn for receipt in await settled(waiting)] == [3]


@pytest.mark.usefixtures("short_idle")
async def test_failed_tick_fails_the_log_once(desk: Desk) -> None:
    committer = desk.start(dict.fromkeys(range(1, 100), LogUnavailableError()))
    await until(lambda: not committer._thread.is_alive())
    assert desk.failures == ["committer"]
    assert isinstance(await refused(committer.submit(drafts(1))), LogUnavailableError)


async def test_watched_draft_that_is_lost_is_logged_because_its_caller_was_told(desk: Desk) -> None:
    committer = desk.start({1: LogFullError(is_map=True)}, wait_ms=1.0)
    with capture_logs() as logs, pytest.raises(LogFullError):
        await asyncio.wait_for(committer.watch(drafts(1, 2)), WAIT_S_MAX)
    assert [(line["event"], line["n_records"]) for line in logs] == [("records_lost", 2)]
