"""The bound on a mean that may be looked at after every row.

Shares of false alarms are counted over RUNS sequences of 20,000 rows, each looked at after every row. Seeds are fixed;
over random seeds a count would exceed what alpha allows, by chance alone, once in ten thousand (FALSE_ALARM).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from training.always_valid import ROWS_MIN, ROWS_TUNED_FOR, radius
from training.standing import WEIGHT_MAX

Doubles = NDArray[np.float64]

ALPHA = 0.05
FALSE_ALARM = 1e-4
RUNS, ROWS = 120, 20_000


def radii(n_rows: Doubles, totals: Doubles, squares: Doubles, alpha: float) -> Doubles:
    """Return radius() of whole arrays."""
    doubled = -2.0 * math.log(alpha)
    scaled = n_rows * (doubled + math.log(doubled + 1.0)) / ROWS_TUNED_FOR
    variances = np.maximum(squares / n_rows - (totals / n_rows) ** 2, 0.0)
    wide = np.asarray(
        np.sqrt(variances * 2.0 * (scaled + 1.0) / (n_rows * scaled) * np.log(np.sqrt(scaled + 1.0) / alpha))
    )
    wide[n_rows < ROWS_MIN] = np.inf
    return wide


def looks(values: Doubles, alpha: float = ALPHA, spreads: Doubles | None = None) -> tuple[Doubles, Doubles]:
    """Return mean and radius after every row; spreads: variances that are known, of each row."""
    n_rows = np.arange(1.0, values.size + 1.0)
    totals, squares = np.cumsum(values), np.cumsum(values * values)
    if spreads is not None:
        squares = np.maximum(squares, np.cumsum(spreads) + totals**2 / n_rows)
    return totals / n_rows, radii(n_rows, totals, squares, alpha)


def most_allowed(runs: int, alpha: float = ALPHA) -> int:
    return int(stats.binom.isf(FALSE_ALARM, runs, alpha))


def normal(rng: np.random.Generator) -> Doubles:
    return rng.normal(0.0, 3.0, ROWS)


def clicks_of_two(rng: np.random.Generator) -> Doubles:
    """Differences of two actions' rewards of equal rate."""
    return (rng.random(ROWS) < 0.02).astype(float) - (rng.random(ROWS) < 0.02)


def weighted(rng: np.random.Generator) -> Doubles:
    """Differences weighted as rows are whose action has a chance of 0.95, 0.04 or 0.01."""
    chances = rng.choice([0.95, 0.04, 0.01], ROWS, p=[0.95, 0.04, 0.01])
    differences = (rng.random(ROWS) < 0.1).astype(float) - (rng.random(ROWS) < 0.1)
    return np.asarray(np.minimum(1.0 / chances, WEIGHT_MAX) * differences)


def test_radius_of_arrays_is_the_radius() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 1.0, 1_000)
    _, wide = looks(values)
    for n in (1, ROWS_MIN - 1, ROWS_MIN, 777, 1_000):
        some = values[:n]
        assert radius(float(n), float(some.sum()), float((some**2).sum()), ALPHA) == pytest.approx(wide[n - 1])


@pytest.mark.slow
@pytest.mark.parametrize("draw", [normal, clicks_of_two, weighted])
def test_a_mean_of_zero_is_hardly_ever_excluded_however_often_one_looks(
    draw: Callable[[np.random.Generator], Doubles],
) -> None:
    rng = np.random.default_rng(1)
    n_excluded = 0
    for _ in range(RUNS):
        means, wide = looks(draw(rng))
        n_excluded += bool((np.abs(means) > wide).any())
    assert n_excluded <= most_allowed(RUNS)


@pytest.mark.slow
def test_the_ordinary_interval_looked_at_as_often_would_be_fooled() -> None:
    rng = np.random.default_rng(1)
    n_rows = np.arange(1.0, ROWS + 1.0)
    n_excluded = sum(
        bool((np.abs(np.cumsum(normal(rng)))[ROWS_MIN:] > 1.96 * 3.0 * np.sqrt(n_rows)[ROWS_MIN:]).any())
        for _ in range(40)
    )
    assert n_excluded > most_allowed(40), "so that the test above can fail"


@pytest.mark.parametrize(("lead", "rows_at_most"), [(0.5, 400), (0.1, 4_000)])
def test_a_true_lead_is_found(lead: float, rows_at_most: int) -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(20):
        means, wide = looks(rng.normal(lead, 1.0, rows_at_most))
        found.append(bool((means > wide).any()))
    assert all(found)


def test_it_says_nothing_before_the_spread_is_known_and_narrows_afterwards() -> None:
    assert radius(ROWS_MIN - 1, 5.0, 50.0, ALPHA) == math.inf
    wide = [radius(n, 0.0, float(n), ALPHA) for n in (ROWS_MIN, 2_000, 20_000, 2_000_000)]
    assert wide == sorted(wide, reverse=True)
    assert 1.96 / math.sqrt(2_000) < wide[1] < 2.0 * 1.96 / math.sqrt(2_000), "not much wider than the ordinary one"


def test_the_surer_one_wants_to_be_the_wider_it_is() -> None:
    wide = [radius(1_000, 0.0, 1_000.0, alpha) for alpha in (0.5, 0.05, 0.005, 1e-9)]
    assert wide == sorted(wide)


def test_rounding_never_makes_a_negative_spread() -> None:
    assert radius(1_000, 1_000 * 0.1, 1_000 * 0.1**2 * (1.0 - 1e-15), ALPHA) == 0.0
