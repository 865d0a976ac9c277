"""h2load, the independent closed-loop caller, as one function; it comes with Debian's package nghttp2-client.

It sends one body for ever and never looks at grpc-status: whoever calls this compares the bytes of the replies and the
server's own count of successes.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from tests.benchmark.machine import children_s

CPU_SHARE_MAX: Final = 0.8
_SLACK_S: Final = 30.0


class Closed(NamedTuple):
    """What one run of h2load saw."""

    n_answered: int
    calls_per_s: float
    p50_us: float
    p99_us: float
    reply_bytes: float  # mean, gRPC's prefix not counted
    faults: tuple[str, ...]


def is_there() -> bool:
    """Say whether h2load is installed."""
    return shutil.which("h2load") is not None


def write_body(path: Path, message: bytes) -> None:
    """Write the file h2load sends: gRPC's prefix and the message."""
    path.write_bytes(struct.pack(">BL", 0, len(message)) + message)


def run(url: str, body: Path, *, connections: int, in_flight: int, seconds: float) -> Closed:
    """Keep calls in flight on each connection for some seconds; h2load inherits our core.

    Raises:
        RuntimeError: h2load failed or said what we cannot read.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "calls"
        begun, begun_cpu = time.perf_counter(), children_s()
        done = subprocess.run(
            [
                "h2load", "-c", str(connections), "-m", str(in_flight), "-t", "1", "-D", f"{1000 * seconds:.0f}ms",
                "-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers",
                f"--log-file={log}", url,
            ],
            capture_output=True, text=True, check=False, timeout=seconds + _SLACK_S,
        )  # fmt: skip
        share = (children_s() - begun_cpu) / (time.perf_counter() - begun)
        if done.returncode:
            raise RuntimeError(f"h2load ended with {done.returncode}: {done.stderr.strip()}")
        latencies_us = np.loadtxt(log, np.int64, usecols=2, ndmin=1)
    return parse(done.stdout, latencies_us, seconds, share)


def parse(
    output: str, latencies_us: np.ndarray[tuple[int], np.dtype[np.int64]], seconds: float, share: float
) -> Closed:
    """Read what h2load printed.

    Raises:
        RuntimeError: it cannot be read, or nothing was answered.
    """
    requests = re.search(r"requests: .*?(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", output)
    data = re.search(r"traffic: .*\((\d+)\) data", output)
    if requests is None or data is None or not int(requests[1]):
        raise RuntimeError(f"h2load got no answer:\n{output}")
    n_answered, n_failed = int(requests[1]), sum(int(number) for number in requests.groups()[1:])
    faults = []
    if n_failed:
        faults.append(f"calls of h2load failed: {n_failed}")
    if share > CPU_SHARE_MAX:
        faults.append(f"h2load used most of its core: {share:.0%}")
    return Closed(
        n_answered=n_answered,
        calls_per_s=n_answered / seconds,
        p50_us=float(np.percentile(latencies_us, 50)),
        p99_us=float(np.percentile(latencies_us, 99)),
        reply_bytes=int(data[1]) / n_answered - 5.0,
        faults=tuple(faults),
    )
