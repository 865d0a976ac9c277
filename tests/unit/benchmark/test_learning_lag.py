"""What the learning lag's benchmark makes of counters, loads and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.benchmark.generator import Run
from tests.benchmark.learning_lag import HISTOGRAM, _faults, bucket_of
from tests.benchmark.report import merge_json


def counted(*counts: float) -> dict[str, float]:
    """Build cumulative buckets, as the server tells them."""
    return {
        f'{HISTOGRAM}{{le="{bound}"}}': count
        for bound, count in zip(("0.1", "0.2", "1.0", "+Inf"), counts, strict=True)
    } | {HISTOGRAM: sum(counts)}


@pytest.mark.parametrize(
    ("before", "after", "share", "bound"),
    [
        (counted(0, 0, 0, 0), counted(50, 99, 100, 100), 0.5, 0.1),
        (counted(0, 0, 0, 0), counted(50, 99, 100, 100), 0.51, 0.2),
        (counted(0, 0, 0, 0), counted(50, 99, 100, 100), 0.99, 0.2),
        (counted(50, 50, 50, 50), counted(50, 50, 60, 61), 0.5, 1.0),
        (counted(50, 50, 50, 50), counted(50, 50, 60, 61), 0.99, float("inf")),
        (counted(5, 5, 5, 5), counted(5, 5, 5, 5), 0.5, 0.0),
        ({}, counted(1, 1, 1, 1), 0.5, 0.1),
        ({}, {}, 0.5, 0.0),
    ],
)
def test_a_percentile_is_told_by_the_upper_bound_of_its_bucket(
    before: dict[str, float], after: dict[str, float], share: float, bound: float
) -> None:
    assert bucket_of(share, before, after) == bound


@pytest.mark.parametrize(
    ("answered", "statuses", "n_faults"),
    [(1_000, {"0": 1_000}, 0), (949, {"0": 949}, 1), (1_000, {"0": 999, "6": 1}, 1)],
)
def test_a_load_that_was_another_than_asked_for_is_a_fault(
    answered: int, statuses: dict[str, int], n_faults: int
) -> None:
    run = Run(answered, 1.0, b"", b"", 1.0, Counter(statuses), 0.0)
    assert len(_faults(run, 1_000.0)) == n_faults


def test_figures_of_one_kind_leave_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "build" / "learning.json"
    merge_json(path, {"learning_lag_p99_ms": 120.0})
    merge_json(path, {"mean": {"tsugi": 0.3}, "seeds": 5})
    merge_json(path, {"learning_lag_p99_ms": 90.0})
    assert json.loads(path.read_text()) == {"learning_lag_p99_ms": 90.0, "mean": {"tsugi": 0.3}, "seeds": 5}
