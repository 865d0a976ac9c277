"""DecisionService: validate, call.

Replies of decisions are bytes that were spliced; a batch and a stream put them into their own without parsing them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from server.decisioning.recorded import DecisionReader
from server.decisioning.service import DecisionService
from server.decisioning.triggers import Triggers
from server.errors import TsugiError
from server.outcomes.ingest import Ingest, require_catalog
from server.rpc import validate
from server.rpc.methods import Context
from server.rpc.status import item_error, told
from server.rpc.streams import in_order
from server.wire import head
from tsugi.v1.decision_service_pb2 import (
    BatchDecideRequest,
    DecideRequest,
    GetDecisionRequest,
    GetDecisionResponse,
    StreamDecideRequest,
    SubscribeTriggersRequest,
    SubscribeTriggersResponse,
)

BATCH_TOGETHER: Final = 16  # of one batch, decided in one flush: some 2 ms, see decisioning.service
STREAM_DECISIONS_MAX: Final = 64  # of one stream, worked on at once

_RESULTS: Final = 1  # field of BatchDecideResponse
_DECISION, _ERROR = 1, 2  # fields of DecideResult and StreamDecideResponse


class DecisionServicer:
    """Answers DecisionService."""

    def __init__(
        self,
        service: DecisionService,
        reader: DecisionReader,
        triggers: Triggers,
        ingest: Ingest,
        clock_us: Callable[[], int],
    ) -> None:
        self._service = service
        self._reader = reader
        self._triggers = triggers
        self._ingest = ingest
        self._clock_us = clock_us

    def decide(self, request: DecideRequest, raw: bytes, context: Context) -> Awaitable[bytes]:
        """See DecisionService.Decide. No coroutine of its own: this is the way that counts microseconds."""
        validate.decide_request(request)
        if request.outcomes:
            return self._report_and_decide(request, raw, context)
        return self._service.decide(request, raw, context.time_remaining())

    async def batch_decide(self, request: BatchDecideRequest, _raw: bytes, context: Context) -> bytes:
        """See DecisionService.BatchDecide."""
        validate.at_most("requests", len(request.requests), validate.BATCH_MAX)
        self._require_catalog()
        self._service.admit(len(request.requests), context.time_remaining())
        answers: list[asyncio.Future[bytes]] = []
        try:
            for i, one in enumerate(validate.distinct_request_ids(request.requests)):
                if i and i % BATCH_TOGETHER == 0:
                    await asyncio.sleep(0)  # those before are decided, and who asked meanwhile has a turn
                answers.append(self._begin(one, context))
            results = await asyncio.gather(*answers, return_exceptions=True)
        finally:
            for answer in answers:
                answer.cancel()  # the caller went away
            await asyncio.gather(*answers, return_exceptions=True)
        bodies = map(_body, results)
        return b"".join([part for body in bodies for part in (head(_RESULTS, len(body)), body)])

    def stream_decide(self, requests: AsyncIterator[StreamDecideRequest], context: Context) -> AsyncIterator[bytes]:
        """See DecisionService.StreamDecide."""

        async def answer(request: StreamDecideRequest) -> bytes:
            self._require_catalog()
            (result,) = await asyncio.gather(self._begin(request.request, context), return_exceptions=True)
            return _body(result)

        return in_order(requests, answer, STREAM_DECISIONS_MAX)

    async def get_decision(self, request: GetDecisionRequest, _raw: bytes, _context: Context) -> GetDecisionResponse:
        """See DecisionService.GetDecision."""
        validate.decision_view(request)
        return await self._reader.get(request)

    async def subscribe_triggers(
        self, request: SubscribeTriggersRequest, _context: Context
    ) -> AsyncGenerator[SubscribeTriggersResponse, None]:
        """See DecisionService.SubscribeTriggers."""
        validate.subscribe_triggers(request)
        async with aclosing(self._triggers.subscribe(request)) as news:
            async for each in news:
                if each.trigger is not None and each.error is not None:
                    each.trigger.error.CopyFrom(item_error(told(each.error)))
                yield SubscribeTriggersResponse(lsn=each.lsn, trigger=each.trigger)

    async def _report_and_decide(self, request: DecideRequest, raw: bytes, context: Context) -> bytes:
        validate.reported_outcomes(request, self._clock_us())
        lsn = await self._ingest.report_all(request.outcomes)
        return await self._service.decide(request, raw, context.time_remaining(), lsn)

    def _begin(self, request: DecideRequest | TsugiError, context: Context) -> asyncio.Future[bytes]:
        """Begin with one of many requests; whatever refuses it comes through the future."""
        try:
            if isinstance(request, TsugiError):
                raise request
            return asyncio.ensure_future(self.decide(request, request.SerializeToString(), context))
        except TsugiError as error:
            refused: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            refused.set_exception(error)
            return refused

    def _require_catalog(self) -> None:
        live = self._service.live
        require_catalog(live.catalog if live is not None else None)


def _body(result: bytes | BaseException) -> bytes:
    """Serialise what became of one of many requests, as DecideResult and StreamDecideResponse alike have it."""
    if isinstance(result, BaseException):
        error = item_error(told(result)).SerializeToString()
        return head(_ERROR, len(error)) + error
    return head(_DECISION, len(result)) + result
