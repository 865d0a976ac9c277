"""Callers that decide without pause over plain channels: no retry policy, so that what fails is seen to fail.

Each thread has channels of its own and takes them in turn. A call may wait for a connection, as anybody's does who does
not know which worker is there; a call that was sent is never sent again, except where gRPC itself knows that no server
has seen it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, cycle
from typing import TYPE_CHECKING, Final

import grpc

from tests.support.running import until
from tsugi.requests import decide_request
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse

if TYPE_CHECKING:  # gRPC's own classes take no type arguments at run time
    Decide = grpc.UnaryUnaryMultiCallable[DecideRequest, DecideResponse]

TIMEOUT_S: Final = 60.0
PERSON: Final = {"customer_number": "asked for by everybody"}


class Load:
    """Callers of one server.

    Args:
        address: where it is.
        threads: how many call at once.
        channels: of each thread.
        waits: whether a call waits for a connection; otherwise one that finds none fails.
        is_bare: whether gRPC may not even send again what no server has seen.
        name: begins every request id; empty: calls carry none.
    """

    def __init__(
        self,
        address: str,
        *,
        threads: int = 3,
        channels: int = 4,
        waits: bool = True,
        is_bare: bool = False,
        name: str = "",
    ) -> None:
        self.replies: dict[str, DecideResponse] = {}  # by request id, where there is one
        self.failures: Counter[str] = Counter()
        self.n_answered = 0
        self._address, self._channels, self._waits, self._name = address, channels, waits, name
        self._options = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.enable_retries", 0 if is_bare else 1),
        ]
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(threads)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Call for as long as the block lasts."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join()

    def wait_for(self, n_calls: int) -> None:
        """Wait until so many more calls are answered."""
        wanted = self.n_answered + n_calls
        until(lambda: self.n_answered >= wanted, f"{n_calls} more calls are answered")

    def _run(self, number: int) -> None:
        with ExitStack() as stack:
            first = number * self._channels
            options = [[*self._options, ("tests.connection", first + i)] for i in range(self._channels)]
            channels = [stack.enter_context(grpc.insecure_channel(self._address, options=each)) for each in options]
            methods = cycle([decide_on(channel) for channel in channels])
            for i in count():
                if self._stopping.is_set():
                    return
                self._call(next(methods), f"{self._name}-{number}-{i}" if self._name else "")

    def _call(self, decide: Decide, request_id: str) -> None:
        try:
            reply = decide(request_of(request_id), timeout=TIMEOUT_S, wait_for_ready=self._waits)
        except grpc.RpcError as error:
            with self._guard:
                self.failures[f"{error.code().name}: {error.details()}"] += 1
            return
        with self._guard:
            self.n_answered += 1
            if request_id:
                self.replies[request_id] = reply


def request_of(request_id: str) -> DecideRequest:
    """Build the request that a load sends under an id; always of the same person."""
    return decide_request({"greedy": 1}, identities=PERSON, request_id=request_id)


def decide_on(channel: grpc.Channel) -> Decide:
    """Return the method Decide of a channel."""
    return channel.unary_unary(
        "/tsugi.v1.DecisionService/Decide",
        request_serializer=DecideRequest.SerializeToString,
        response_deserializer=DecideResponse.FromString,
    )
