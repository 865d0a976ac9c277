"""The load generator against a real gRPC server: it speaks its language, and counts waiting as the callers' time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from tests.benchmark.generator import OK, Target, closed_loop, open_loop, poisson_schedule

pytestmark = pytest.mark.slow

SERVICE, METHOD = "benchmark.Service", "Call"
Handler = Callable[[bytes, grpc.ServicerContext], bytes]


@contextmanager
def _serving(answer: Handler, workers: int, options: Sequence[tuple[str, int]] = ()) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(workers), options=options)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {METHOD: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def _target(port: int, connections: int) -> Target:
    return Target(port, f"/{SERVICE}/{METHOD}", connections)


def test_every_message_arrives_once_and_every_reply_is_counted() -> None:
    received: list[bytes] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        received.append(request)
        return request * 2

    messages = [b"%06d" % i for i in range(500)]
    with _serving(answer, workers=4) as port:
        run = closed_loop(_target(port, 4), messages, in_flight=8, seconds=60, is_once=True)
    assert sorted(received) == messages
    assert (run.n_answered, dict(run.statuses), run.reply_bytes) == (500, {OK: 500}, 12.0)


def test_refused_calls_are_seen_by_their_grpc_status() -> None:
    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"bad":
            context.abort(grpc.StatusCode.NOT_FOUND, "nobody")
        return request

    with _serving(answer, workers=4) as port:
        run = closed_loop(_target(port, 2), [b"good", b"bad"] * 50, in_flight=4, seconds=60, is_once=True)
    assert dict(run.statuses) == {OK: 50, "5": 50}
    assert "calls failed: by grpc-status {'5': 50}" in run.faults()


def test_a_server_that_stalls_pays_for_every_call_it_keeps_waiting() -> None:
    """Nothing is answered before the last call has arrived, so the first waits for as long as the schedule is."""
    n = 40
    schedule = poisson_schedule(400, 1, seed=1)[:n]
    everybody = threading.Barrier(n)

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        everybody.wait(timeout=30)
        return request

    with _serving(answer, workers=n) as port:
        run = open_loop(_target(port, 4), [b"call"], schedule)
    assert dict(run.statuses) == {OK: n}
    assert run.latency_ms(100) >= (schedule[-1] - schedule[0]) / 1e6 * 0.999
    assert run.latency_ms(50) >= (schedule[-1] - schedule[n // 2]) / 1e6 * 0.999


def test_a_server_that_takes_few_calls_at_once_answers_all_of_them_in_the_end() -> None:
    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        return request

    with _serving(answer, workers=2, options=[("grpc.max_concurrent_streams", 3)]) as port:
        run = closed_loop(_target(port, 2), [b"call"] * 600, in_flight=50, seconds=60, is_once=True)
    assert dict(run.statuses) == {OK: 600}
