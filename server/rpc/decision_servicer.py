"""DecisionService: validate, call."""

from __future__ import annotations

from collections.abc import Awaitable

from server.decisioning.service import DecisionService
from server.rpc import validate
from server.rpc.methods import Context
from tsugi.v1.decision_service_pb2 import DecideRequest


class DecisionServicer:
    """Answers DecisionService."""

    def __init__(self, service: DecisionService) -> None:
        self._service = service

    def decide(self, request: DecideRequest, raw: bytes, context: Context) -> Awaitable[bytes]:
        """See DecisionService.Decide. No coroutine of its own: this is the way that counts microseconds."""
        validate.decide_request(request)
        return self._service.decide(request, raw, context.time_remaining())
