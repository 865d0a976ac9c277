"""The load generator: calls at times fixed beforehand (open loop), or a fixed number in flight (closed loop).

It runs in a process of its own on its own core. Latency in the open loop is counted from the *intended* send time, so a
server that stalls pays for every call it kept from being sent (no coordinated omission). What the generator itself was
late by, and the share of its core it used, are part of every result; the reader of a run decides on them what it is
worth. One loop over blocking sockets and select: its timeout has microseconds, where uvloop's timers have a
millisecond. Every reply's grpc-status is looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import select
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Final, NamedTuple, Self

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from tests.benchmark.http2 import REFUSED, Connection, ProtocolError

Instants = NDArray[np.int64]

LATENCY_US_MAX: Final = 60_000_000
LAG_P99_MS_MAX: Final = 1.0
CPU_SHARE_MAX: Final = 0.8
STRAGGLER_S_MAX: Final = 10.0
CONNECT_S_MAX: Final = 5.0
OK: Final = "0"
UNANSWERED: Final = "unanswered"

_LEAD_NS: Final = 20_000_000  # between connecting and the first call
_READ_BYTES: Final = 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


class Target(NamedTuple):
    """Whom to call."""

    port: int
    path: str  # "/package.Service/Method"
    connections: int = 16


class Run(NamedTuple):
    """What one run of the generator saw."""

    n_answered: int  # within the run's time
    seconds: float
    latencies: bytes  # of all answered calls, microseconds, an encoded HdrHistogram
    lags: bytes  # between the intended and the actual sending, the same; nothing in a closed loop
    cpu_share: float  # of the generator's core
    statuses: Counter[str]  # grpc-status of every call
    reply_bytes: float  # mean, gRPC's prefix not counted

    @property
    def calls_per_s(self) -> float:
        """Return the rate of answers."""
        return self.n_answered / self.seconds

    def latency_ms(self, percentile: float) -> float:
        """Return a percentile of the latencies, within one part in a thousand."""
        return _percentile_us(self.latencies, percentile) / 1000

    def lag_ms(self, percentile: float) -> float:
        """Return a percentile of the lags; 0 for a closed loop."""
        return _percentile_us(self.lags, percentile) / 1000

    def faults(self) -> list[str]:
        """Say why this run is worth nothing; empty when it is worth something."""
        faults = []
        if self.lag_ms(99) > LAG_P99_MS_MAX:
            faults.append(f"the generator lagged: p99 {self.lag_ms(99):.1f} ms")
        if self.cpu_share > CPU_SHARE_MAX:
            faults.append(f"the generator used most of its core: {self.cpu_share:.0%}")
        failed = {status: n for status, n in self.statuses.items() if status != OK}
        if failed:
            faults.append(f"calls failed: by grpc-status {failed}")
        return faults


def poisson_schedule(calls_per_s: float, seconds: float, seed: int) -> Instants:
    """Draw send times of independent callers: int64[n], nanoseconds from the start, ascending, all below seconds."""
    random = np.random.default_rng(seed)
    mean, margin = calls_per_s * seconds, 6.0 * (calls_per_s * seconds) ** 0.5 + 10.0
    instants = random.exponential(1e9 / calls_per_s, int(mean + margin)).cumsum()
    return instants[instants < seconds * 1e9].astype(np.int64)


def open_loop(target: Target, messages: Sequence[bytes], schedule: Instants) -> Run:
    """Send message i (in turn) at the i-th time of the schedule, whatever has become of the earlier ones.

    Raises:
        ProtocolError: the server closed a connection.
    """
    n = len(schedule)
    ended_ns, late_ns = [0] * n, [0] * n
    statuses: Counter[str] = Counter()
    with _lines(target) as lines, _undisturbed() as cpu:
        start = time.perf_counter_ns() + _LEAD_NS
        due = (schedule + start).tolist()
        give_up = (due[-1] if due else start) + int(STRAGGLER_S_MAX * 1e9)
        i = 0
        while statuses.total() < n:
            now = time.perf_counter_ns()
            while i < n and due[i] <= now:
                late_ns[i] = now - due[i]
                lines.send(i % target.connections, i, messages[i % len(messages)])
                i += 1
                now = time.perf_counter_ns()
            if now > give_up:
                break
            for ended in lines.wait((due[i] if i < n else give_up) - now):
                ended_ns[ended.call] = ended.at_ns
                statuses[ended.status] += 1
        stop = time.perf_counter_ns()
        share = cpu() / (stop - start + _LEAD_NS)
        reply_bytes = lines.reply_bytes(statuses.total())
    latencies = [(end - begun) // 1000 for end, begun in zip(ended_ns, due, strict=True) if end]
    statuses[UNANSWERED] += n - statuses.total()
    return Run(
        n_answered=len(latencies),
        seconds=(stop - start) / 1e9,
        latencies=_encoded(latencies),
        lags=_encoded([late // 1000 for late in late_ns]),
        cpu_share=share,
        statuses=+statuses,
        reply_bytes=reply_bytes,
    )


def closed_loop(
    target: Target, messages: Sequence[bytes], in_flight: int, seconds: float, *, is_once: bool = False
) -> Run:
    """Keep calls in flight on every connection, the next one sent when one is answered.

    Args:
        target: whom to call.
        messages: sent in turn.
        in_flight: calls on each connection.
        seconds: for how long.
        is_once: stop when every message was sent; otherwise they begin anew.

    Raises:
        ProtocolError: the server closed a connection.
    """
    sent_ns: list[int] = []
    latencies: list[int] = []
    statuses: Counter[str] = Counter()
    n_max = len(messages) if is_once else int(1e9)
    with _lines(target) as lines, _undisturbed() as cpu:
        start = time.perf_counter_ns()
        end = start + int(seconds * 1e9)

        def send(line: int) -> None:
            if len(sent_ns) < n_max:
                call = len(sent_ns)
                sent_ns.append(time.perf_counter_ns())
                lines.send(line, call, messages[call % len(messages)])

        for i in range(in_flight * target.connections):
            send(i % target.connections)
        now = start
        while now < end and statuses.total() < n_max:
            for ended in lines.wait(end - now):
                latencies.append((ended.at_ns - sent_ns[ended.call]) // 1000)
                statuses[ended.status] += 1
                send(ended.line)
            now = time.perf_counter_ns()
        elapsed_ns = now - start
        share = cpu() / elapsed_ns
        reply_bytes = lines.reply_bytes(statuses.total())
    return Run(
        n_answered=len(latencies),
        seconds=elapsed_ns / 1e9,
        latencies=_encoded(latencies),
        lags=_encoded([]),
        cpu_share=share,
        statuses=statuses,
        reply_bytes=reply_bytes,
    )


class Generator:
    """The process that generates load, on a core of its own; ends with the ``with`` block.

    Args:
        cpu: the core.

    Attributes:
        process_id: of that process.
    """

    def __init__(self, cpu: int) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _settle, (cpu, os.getpid()))
        self.process_id = self._pool.submit(os.getpid).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def open_loop(self, target: Target, messages: Sequence[bytes], schedule: Instants) -> Future[Run]:
        """Start open_loop there."""
        return self._pool.submit(open_loop, target, messages, schedule)

    def closed_loop(
        self, target: Target, messages: Sequence[bytes], in_flight: int, seconds: float, *, is_once: bool = False
    ) -> Future[Run]:
        """Start closed_loop there."""
        return self._pool.submit(closed_loop, target, messages, in_flight, seconds, is_once=is_once)


class _Ended(NamedTuple):
    line: int
    call: int
    status: str
    at_ns: int


class _Lines:
    """Connections, and the calls that wait until the server takes more of them."""

    def __init__(self, target: Target) -> None:
        authority = f"127.0.0.1:{target.port}"
        self._sockets = [
            socket.create_connection(("127.0.0.1", target.port), CONNECT_S_MAX) for _ in range(target.connections)
        ]
        self._connections = [Connection(target.path, authority) for _ in self._sockets]
        self._waiting: list[deque[tuple[int, bytes]]] = [deque() for _ in self._sockets]
        self._messages: dict[int, bytes] = {}  # of the calls under way
        self._numbers = {each.fileno(): number for number, each in enumerate(self._sockets)}
        for each, connection in zip(self._sockets, self._connections, strict=True):
            each.settimeout(None)  # with one, every call into it would be two
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.sendall(connection.opening())
        give_up = time.monotonic() + CONNECT_S_MAX
        while not all(connection.is_ready for connection in self._connections):
            if time.monotonic() > give_up:
                raise ProtocolError("the server accepts connections and says nothing")
            list(self.wait(10_000_000))

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def send(self, line: int, call: int, message: bytes) -> None:
        """Send one call, or later when the server does not take it yet."""
        self._messages[call] = message
        if self._waiting[line] or not self._connections[line].has_room(message):
            self._waiting[line].append((call, message))
        else:
            # Never blocks for long: what is on the way is bounded by the server's window, far below a socket's buffer.
            self._sockets[line].sendall(self._connections[line].request(call, message))

    def wait(self, timeout_ns: int) -> Iterator[_Ended]:
        """Wait for replies at most so long, and yield them."""
        ready, _, _ = select.select(self._sockets, (), (), max(0, timeout_ns) / 1e9)
        for each in ready:
            data = each.recv(_READ_BYTES)
            at = time.perf_counter_ns()
            if not data:
                raise ProtocolError("the server closed a connection")
            line = self._numbers[each.fileno()]
            connection, waiting = self._connections[line], self._waiting[line]
            ended, answer = connection.receive(data)
            if answer:
                each.sendall(answer)
            # The server forgets a call a little after we do, and may for once refuse the next one as one too many.
            waiting.extend((call, self._messages[call]) for call, status in ended if status == REFUSED)
            while waiting and connection.has_room(waiting[0][1]):
                each.sendall(connection.request(*waiting.popleft()))
            for call, status in ended:
                if status != REFUSED:
                    del self._messages[call]
                    yield _Ended(line, call, status, at)

    def reply_bytes(self, n_answered: int) -> float:
        data_bytes = sum(connection.data_bytes for connection in self._connections)
        return data_bytes / n_answered - 5.0 if n_answered else 0.0


@contextlib.contextmanager
def _lines(target: Target) -> Iterator[_Lines]:
    lines = _Lines(target)
    try:
        yield lines
    finally:
        lines.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[Callable[[], int]]:
    """Keep the garbage collector away, and yield a function that says how much CPU was used, in nanoseconds."""
    gc.collect()
    gc.disable()
    begun = time.process_time_ns()
    try:
        yield lambda: time.process_time_ns() - begun
    finally:
        gc.enable()


def _settle(cpu: int, parent: int) -> None:
    """Pin this process, end it with its parent, and let its timers be as punctual as the machine can."""
    os.sched_setaffinity(0, {cpu})
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds; 50,000 otherwise
    if os.getppid() != parent:
        raise ProtocolError("the benchmark ended before its generator began")


def _encoded(values_us: Sequence[int]) -> bytes:
    """Return values as an encoded histogram of three significant digits."""
    histogram = HdrHistogram(1, LATENCY_US_MAX, 3)
    for value in values_us:
        histogram.record_value(min(max(1, value), LATENCY_US_MAX))
    return bytes(histogram.encode())


def _percentile_us(encoded: bytes, percentile: float) -> float:
    histogram = HdrHistogram.decode(encoded)
    return float(histogram.get_value_at_percentile(percentile)) if histogram.get_total_count() else 0.0
