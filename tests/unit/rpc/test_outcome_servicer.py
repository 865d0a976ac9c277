"""The stream of outcomes: results in order, what came meanwhile goes together, nothing left when it ends early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, cast

import pytest

from server.errors import TsugiError
from server.outcomes.ingest import Accepted, Ingest
from server.rpc.methods import Context
from server.rpc.outcome_servicer import STREAM_OUTCOMES_MAX, OutcomeServicer
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest, StreamReportOutcomesRequest

MALFORMED = TsugiError(ErrorReason.ERROR_REASON_REQUEST_MALFORMED, "the bytes are no message")
FULL = TsugiError(ErrorReason.ERROR_REASON_LOG_MAP_FULL, "the log is full")


class Scripted:
    """In place of Ingest: accepts every outcome, at once or while the test lets it; an outcome's id is its LSN.

    Attributes:
        calls: how many outcomes each call was about.
        let: set while calls may return.
        failure: what calls fail with, from that of a certain number on.
    """

    def __init__(self, *, is_held: bool = False) -> None:
        self.calls: list[int] = []
        self.n_cancelled = 0
        self.let = asyncio.Event()
        self.failure: tuple[int, Exception] | None = None
        if not is_held:
            self.let.set()

    async def report(self, outcomes: Iterable[ReportOutcomeRequest | TsugiError]) -> list[Accepted | TsugiError]:
        """See Ingest."""
        given = list(outcomes)
        self.calls.append(len(given))
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        if self.failure is not None and len(self.calls) >= self.failure[0]:
            raise self.failure[1]
        return [each if isinstance(each, TsugiError) else Accepted(int(each.outcome_id), False) for each in given]


class Caller:
    """Sends outcomes 1 to n as it is asked for them, and counts how often that was."""

    def __init__(self, n_outcomes: int, failure: Exception | None = None) -> None:
        self.n_read = 0
        self._n_outcomes = n_outcomes
        self._failure = failure

    async def __aiter__(self) -> AsyncIterator[StreamReportOutcomesRequest]:
        """Yield them; others have a turn before each."""
        for lsn in range(1, self._n_outcomes + 1):
            await asyncio.sleep(0)
            self.n_read += 1
            yield one(lsn)
        if self._failure is not None:
            raise self._failure


def one(lsn: int) -> StreamReportOutcomesRequest:
    outcome = ReportOutcomeRequest(decision_id="d", action="a", outcome_id=str(lsn), type="click")
    return StreamReportOutcomesRequest(outcome=outcome)


def answering(ingest: Scripted, requests: AsyncIterator[StreamReportOutcomesRequest] | Caller) -> Any:
    nothing: Any = None
    servicer = OutcomeServicer(cast(Ingest, ingest), clock_us=lambda: 0)
    return servicer.stream_report_outcomes(aiter(requests), cast(Context, nothing))


async def settle() -> None:
    """Let everything run that can without anybody's help."""
    for _ in range(3 * STREAM_OUTCOMES_MAX):
        await asyncio.sleep(0)


def running(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on a loop, and see that it leaves no task and no complaint."""
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        await test()
        await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert complaints == []


def test_results_come_in_the_order_of_outcomes_and_each_once() -> None:
    async def test() -> None:
        n = 5 * STREAM_OUTCOMES_MAX + 3
        ingest = Scripted()
        lsns = [reply.accepted.lsn async for reply in answering(ingest, Caller(n))]
        assert lsns == list(range(1, n + 1))
        assert sum(ingest.calls) == n

    running(test)


def test_what_comes_while_others_are_committed_shares_the_next_commit() -> None:
    async def test() -> None:
        ingest, caller = Scripted(is_held=True), Caller(100)
        async with aclosing(answering(ingest, caller)) as replies:
            first = asyncio.ensure_future(anext(replies))
            await settle()
            assert (len(ingest.calls), caller.n_read) == (1, 100), "one call at a time: the next one has company"
            ingest.let.set()
            assert [(await first).accepted.lsn] + [reply.accepted.lsn async for reply in replies] == [*range(1, 101)]
        assert ingest.calls == [1, 99]

    running(test)


def test_outcome_alone_waits_for_no_company() -> None:
    async def requests() -> AsyncIterator[StreamReportOutcomesRequest]:
        for lsn in (1, 2, 3):
            await taken.acquire()
            yield one(lsn)

    taken = asyncio.Semaphore()

    async def test() -> None:
        async with aclosing(answering(Scripted(), requests())) as replies:
            for lsn in (1, 2, 3):
                assert (await anext(replies)).accepted.lsn == lsn
                taken.release()

    running(test)


def test_caller_who_takes_no_results_is_read_so_far_and_no_further() -> None:
    async def test() -> None:
        ingest, caller = Scripted(), Caller(10 * STREAM_OUTCOMES_MAX)
        async with aclosing(answering(ingest, caller)) as replies:
            for n_taken in range(1, 20):
                await anext(replies)
                await settle()
                # The result just given is not taken until the next one is asked for, so its place is not free yet.
                assert caller.n_read == n_taken - 1 + STREAM_OUTCOMES_MAX
        assert max(ingest.calls) <= STREAM_OUTCOMES_MAX == 256

    running(test)


def test_stream_that_its_caller_leaves_leaves_nothing_behind() -> None:
    async def test() -> None:
        ingest, caller = Scripted(is_held=True), Caller(10 * STREAM_OUTCOMES_MAX)
        first = asyncio.ensure_future(anext(answering(ingest, caller)))
        await settle()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (ingest.n_cancelled, caller.n_read) == (1, STREAM_OUTCOMES_MAX)

    running(test)


def test_request_that_cannot_be_read_ends_the_stream_after_what_came_before_it() -> None:
    async def test() -> None:
        async with aclosing(answering(Scripted(), Caller(5, MALFORMED))) as replies:
            assert [(await anext(replies)).accepted.lsn for _ in range(5)] == [1, 2, 3, 4, 5]
            with pytest.raises(TsugiError) as refusal:
                await anext(replies)
        assert refusal.value is MALFORMED

    running(test)


def test_log_that_refuses_ends_the_stream_after_what_it_took() -> None:
    async def test() -> None:
        ingest = Scripted(is_held=True)
        ingest.failure = (2, FULL)
        async with aclosing(answering(ingest, Caller(10))) as replies:
            first = asyncio.ensure_future(anext(replies))
            await settle()
            ingest.let.set()
            assert (await first).accepted.lsn == 1
            with pytest.raises(TsugiError) as refusal:
                await anext(replies)
        assert refusal.value is FULL
        assert ingest.calls == [1, 9]

    running(test)


def test_stream_of_nothing_is_answered_with_nothing() -> None:
    async def test() -> None:
        ingest = Scripted()
        assert [reply async for reply in answering(ingest, Caller(0))] == []
        assert ingest.calls == []

    running(test)


def test_bad_outcome_is_refused_in_its_place_and_the_stream_goes_on() -> None:
    async def requests() -> AsyncIterator[StreamReportOutcomesRequest]:
        yield one(1)
        yield StreamReportOutcomesRequest()
        yield one(2)

    async def test() -> None:
        replies = [reply async for reply in answering(Scripted(), requests())]
        assert [reply.WhichOneof("outcome") for reply in replies] == ["accepted", "error", "accepted"]
        assert replies[1].error.metadata["field"] == "action"

    running(test)
