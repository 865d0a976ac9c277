"""How h2load's words are read."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmark.h2load import parse

OUTPUT = """
finished in 2.00s, 5707.00 req/s, 2.28MB/s
requests: {done} total, {done} started, {done} done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: {succeeded} 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.28MB (2393943) total, 17.89KB (18321) headers (space savings 96.04%), 1.96MB ({data}) data
"""
LATENCIES = np.arange(1, 101, dtype=np.int64)


def test_rate_latency_and_reply_size_are_read() -> None:
    run = parse(OUTPUT.format(done=1000, succeeded=1000, failed=0, data=360_000), LATENCIES, 2.0, 0.3)
    assert (run.n_answered, run.calls_per_s, run.reply_bytes, run.faults) == (1000, 500.0, 355.0, ())
    assert run.p50_us == 50.5
    assert run.p99_us == pytest.approx(99.01)


def test_failed_calls_and_a_busy_caller_make_a_run_void() -> None:
    run = parse(OUTPUT.format(done=1000, succeeded=997, failed=3, data=360_000), LATENCIES, 2.0, 0.9)
    assert run.faults == ("calls of h2load failed: 3", "h2load used most of its core: 90%")


@pytest.mark.parametrize("output", ["", OUTPUT.format(done=5, succeeded=0, failed=5, data=0)])
def test_no_answer_is_no_measurement(output: str) -> None:
    with pytest.raises(RuntimeError, match="no answer"):
        parse(output, LATENCIES, 2.0, 0.1)
