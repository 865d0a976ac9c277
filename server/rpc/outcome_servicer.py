"""OutcomeService: validate, call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

from server.errors import TsugiError
from server.outcomes.ingest import Accepted, Ingest
from server.rpc import validate
from server.rpc.methods import Context
from server.rpc.status import item_error
from server.rpc.streams import together
from server.storage.log import GROUP_RECORDS_MAX
from tsugi.v1.outcome_service_pb2 import (
    BatchReportOutcomesRequest,
    BatchReportOutcomesResponse,
    ReportOutcomeRequest,
    ReportOutcomeResponse,
    ReportOutcomeResult,
    StreamReportOutcomesRequest,
    StreamReportOutcomesResponse,
)

STREAM_OUTCOMES_MAX: Final = GROUP_RECORDS_MAX  # of one stream, worked on at once: one group commit, at most


class OutcomeServicer:
    """Answers OutcomeService."""

    def __init__(self, ingest: Ingest, clock_us: Callable[[], int]) -> None:
        self._ingest = ingest
        self._clock_us = clock_us

    async def report_outcome(
        self, request: ReportOutcomeRequest, _raw: bytes, _context: Context
    ) -> ReportOutcomeResponse:
        """See OutcomeService.ReportOutcome."""
        validate.report_outcome(request, self._clock_us())
        (result,) = await self._ingest.report([request])
        if isinstance(result, TsugiError):
            raise result
        return _response(result)

    async def batch_report_outcomes(
        self, request: BatchReportOutcomesRequest, _raw: bytes, _context: Context
    ) -> BatchReportOutcomesResponse:
        """See OutcomeService.BatchReportOutcomes."""
        validate.at_most("outcomes", len(request.outcomes), validate.BATCH_MAX)
        check = partial(validate.report_outcome, now_us=self._clock_us())
        results = await self._ingest.report(validate.checked(outcome, check) for outcome in request.outcomes)
        return BatchReportOutcomesResponse(
            results=[
                ReportOutcomeResult(error=item_error(result))
                if isinstance(result, TsugiError)
                else ReportOutcomeResult(accepted=_response(result))
                for result in results
            ]
        )

    def stream_report_outcomes(
        self, requests: AsyncIterator[StreamReportOutcomesRequest], _context: Context
    ) -> AsyncIterator[StreamReportOutcomesResponse]:
        """See OutcomeService.StreamReportOutcomes."""

        async def answer(some: list[StreamReportOutcomesRequest]) -> list[StreamReportOutcomesResponse]:
            check = partial(validate.report_outcome, now_us=self._clock_us())
            results = await self._ingest.report(validate.checked(request.outcome, check) for request in some)
            return [
                StreamReportOutcomesResponse(error=item_error(result))
                if isinstance(result, TsugiError)
                else StreamReportOutcomesResponse(accepted=_response(result))
                for result in results
            ]

        return together(requests, answer, STREAM_OUTCOMES_MAX)


def _response(accepted: Accepted) -> ReportOutcomeResponse:
    return ReportOutcomeResponse(lsn=accepted.lsn, duplicate=accepted.is_duplicate)
