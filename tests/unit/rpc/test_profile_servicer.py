"""The stream of records: replies in order, so many requests at once and no more, nothing left when it ends early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, cast

import pytest

from server.errors import TsugiError
from server.outcomes.ingest import Accepted, Ingest
from server.outcomes.statements import Statements
from server.profiles.reader import ProfileReader
from server.rpc.methods import Context
from server.rpc.profile_servicer import STREAM_REQUESTS_MAX, ProfileServicer
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import SourceRecord, StreamIngestRecordsRequest, StreamIngestRecordsResponse

Replies = AsyncIterator[StreamIngestRecordsResponse]


class Scripted:
    """In place of Ingest: accepts every record, at once or when the test lets it; a record's id is its LSN."""

    def __init__(self, *, is_held: bool = False) -> None:
        self.n_working = 0
        self.n_working_max = 0
        self.n_cancelled = 0
        self.order: list[int] = []  # in which batches were finished, by their first LSN
        self.held: dict[int, asyncio.Event] = {}
        self._is_held = is_held

    async def ingest(self, records: Iterable[SourceRecord | TsugiError]) -> list[Accepted | TsugiError]:
        """See Ingest."""
        given = list(records)
        first = next(int(each.record_id) for each in given if isinstance(each, SourceRecord))
        self.n_working += 1
        self.n_working_max = max(self.n_working_max, self.n_working)
        try:
            if self._is_held:
                await self.held.setdefault(first, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        finally:
            self.n_working -= 1
        self.order.append(first)
        return [each if isinstance(each, TsugiError) else Accepted(int(each.record_id), False) for each in given]


class Caller:
    """Sends a batch of two records whenever it is asked for one, and counts how often that was."""

    def __init__(self, n_batches: int, failure: Exception | None = None) -> None:
        self.n_read = 0
        self._n_batches = n_batches
        self._failure = failure

    async def __aiter__(self) -> AsyncIterator[StreamIngestRecordsRequest]:
        """Yield the batches; the first LSN of batch i is 2 i + 1."""
        for i in range(self._n_batches):
            self.n_read += 1
            yield StreamIngestRecordsRequest(records=[record(2 * i + 1), record(2 * i + 2)])
        if self._failure is not None:
            raise self._failure


def record(lsn: int) -> SourceRecord:
    return SourceRecord(
        record_id=str(lsn), source="crm", identities=[Identity(namespace="customer_number", value=str(lsn))]
    )


def answering(ingest: Scripted, requests: AsyncIterator[StreamIngestRecordsRequest] | Caller) -> Any:
    nothing: Any = None  # other methods are not called
    servicer = ProfileServicer(
        cast(Ingest, ingest), cast(Statements, nothing), cast(ProfileReader, nothing), clock_us=lambda: 0
    )
    return servicer.stream_ingest_records(aiter(requests), cast(Context, nothing))


async def settle() -> None:
    """Let everything run that can without anybody's help."""
    for _ in range(100):
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


def test_replies_come_in_the_order_of_requests_whichever_is_done_first() -> None:
    async def test() -> None:
        ingest = Scripted(is_held=True)
        async with aclosing(answering(ingest, Caller(3))) as replies:
            first = asyncio.ensure_future(anext(replies))
            await settle()
            for lsn in (5, 3):
                ingest.held[lsn].set()
            await settle()
            assert ingest.order == [5, 3]
            assert not first.done()
            ingest.held[1].set()
            lsns = [(await first).lsn] + [reply.lsn async for reply in replies]
        assert lsns == [2, 4, 6]

    running(test)


def test_caller_who_takes_no_replies_is_read_so_far_and_no_further() -> None:
    async def test() -> None:
        ingest, caller = Scripted(), Caller(1_000)
        async with aclosing(answering(ingest, caller)) as replies:
            for n_taken in range(1, 20):
                await anext(replies)
                await settle()
                # The reply just given is not taken until the next one is asked for, so its place is not free yet.
                assert caller.n_read == n_taken - 1 + STREAM_REQUESTS_MAX

    running(test)


def test_no_more_requests_are_worked_on_at_once_than_is_promised() -> None:
    async def test() -> None:
        ingest, caller = Scripted(is_held=True), Caller(1_000)
        async with aclosing(answering(ingest, caller)) as replies:
            first = asyncio.ensure_future(anext(replies))
            await settle()
            assert (ingest.n_working, caller.n_read) == (STREAM_REQUESTS_MAX, STREAM_REQUESTS_MAX)
            ingest.held[1].set()
            await first
        assert ingest.n_working_max == STREAM_REQUESTS_MAX == 4

    running(test)


def test_stream_that_its_caller_leaves_leaves_nothing_behind() -> None:
    async def test() -> None:
        ingest = Scripted(is_held=True)
        replies = answering(ingest, Caller(1_000))
        first = asyncio.ensure_future(anext(replies))
        await settle()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert ingest.n_working == 0
        assert ingest.n_cancelled == STREAM_REQUESTS_MAX

    running(test)


def test_batch_that_is_too_large_ends_the_stream_after_what_came_before_it() -> None:
    async def requests() -> AsyncIterator[StreamIngestRecordsRequest]:
        yield StreamIngestRecordsRequest(records=[record(1)])
        yield StreamIngestRecordsRequest(records=[record(2)] * 501)
        yield StreamIngestRecordsRequest(records=[record(3)])

    async def test() -> None:
        async with aclosing(answering(Scripted(), requests())) as replies:
            assert (await anext(replies)).lsn == 1
            with pytest.raises(TsugiError) as refusal:
                await anext(replies)
        assert refusal.value.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED

    running(test)


def test_request_that_cannot_be_read_ends_the_stream_after_what_came_before_it() -> None:
    async def test() -> None:
        malformed = TsugiError(ErrorReason.ERROR_REASON_REQUEST_MALFORMED, "the bytes are no message")
        async with aclosing(answering(Scripted(), Caller(2, malformed))) as replies:
            assert [(await anext(replies)).lsn, (await anext(replies)).lsn] == [2, 4]
            with pytest.raises(TsugiError) as refusal:
                await anext(replies)
        assert refusal.value is malformed

    running(test)


def test_stream_of_nothing_is_answered_with_nothing() -> None:
    async def test() -> None:
        assert [reply async for reply in answering(Scripted(), Caller(0))] == []

    running(test)


def test_bad_record_is_refused_in_its_place_and_the_stream_goes_on() -> None:
    async def requests() -> AsyncIterator[StreamIngestRecordsRequest]:
        yield StreamIngestRecordsRequest(records=[record(1), SourceRecord(), record(2)])
        yield StreamIngestRecordsRequest(records=[record(3)])

    async def test() -> None:
        first, second = [reply async for reply in answering(Scripted(), requests())]
        assert [each.WhichOneof("outcome") for each in first.results] == ["accepted", "error", "accepted"]
        assert (first.lsn, second.lsn) == (2, 3)

    running(test)
