"""The generator's own arithmetic: when calls are due, and what makes a run worth nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from tests.benchmark.generator import OK, Run, poisson_schedule


def _encoded(*values_us: int) -> bytes:
    histogram = HdrHistogram(1, 60_000_000, 3)
    for value in values_us:
        histogram.record_value(value)
    return bytes(histogram.encode())


def _run(lag_us: int = 10, cpu_share: float = 0.5, **failed: int) -> Run:
    return Run(
        n_answered=3_000,
        seconds=1.5,
        latencies=_encoded(*range(1_000, 101_000, 1_000)),
        lags=_encoded(lag_us),
        cpu_share=cpu_share,
        statuses=Counter({OK: 3_000} | failed),
        reply_bytes=400.0,
    )


def test_send_times_are_fixed_by_the_seed_ascending_and_within_the_run() -> None:
    schedule = poisson_schedule(2_000, 5, seed=3)
    assert np.array_equal(schedule, poisson_schedule(2_000, 5, seed=3))
    assert not np.array_equal(schedule[:100], poisson_schedule(2_000, 5, seed=4)[:100])
    assert (np.diff(schedule) >= 0).all()
    assert schedule[0] >= 0
    assert schedule[-1] < 5e9


def test_send_times_are_those_of_independent_callers() -> None:
    gaps = np.diff(poisson_schedule(2_000, 50, seed=3)) / 1e9
    # 100,000 gaps: mean and deviation of an exponential agree with 1 / rate within four standard errors.
    assert gaps.mean() == pytest.approx(1 / 2_000, rel=4 / 100_000**0.5)
    assert gaps.std() == pytest.approx(1 / 2_000, rel=4 * (2 / 100_000) ** 0.5)


def test_latencies_are_read_by_percentile() -> None:
    run = _run()
    assert run.latency_ms(50) == pytest.approx(50, rel=2e-3)
    assert run.latency_ms(99) == pytest.approx(99, rel=2e-3)
    assert run.calls_per_s == 2_000


def test_a_good_run_has_no_faults() -> None:
    assert _run().faults() == []


def test_a_run_is_void_when_the_generator_was_late_or_busy_or_calls_failed() -> None:
    assert "lagged" in _run(lag_us=1_500).faults()[0]
    assert "83%" in _run(cpu_share=0.83).faults()[0]
    assert "{'5': 2}" in _run(**{"5": 2}).faults()[0]
