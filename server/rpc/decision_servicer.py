"""DecisionService: validate, call."""

from __future__ import annotations

from server.decisioning.service import DecisionService
from server.rpc import validate
from server.rpc.methods import Context
from tsugi.v1.decision_service_pb2 import DecideRequest


class DecisionServicer:
    """Answers DecisionService."""

    def __init__(self, service: DecisionService) -> None:
        self._service = service

    async def decide(self, request: DecideRequest, raw: bytes, context: Context) -> bytes:
        """See DecisionService.Decide."""
        validate.decide_request(request)
        return await self._service.decide(request, raw, context.time_remaining())
