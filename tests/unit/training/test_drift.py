"""A loss that has risen for good is told from one that has not, and a restored detector from none."""

from __future__ import annotations

import numpy as np
import pytest

from training.drift import BLOCKS_MIN, HEARD_MAX, Drift
from training.standing import usual_loss

BLOCK_ROWS = 32


def block_losses(rng: np.random.Generator, rate: float, n_blocks: int, expected: float | None = None) -> list[float]:
    """Return means over blocks of the log loss of somebody who expects a rate, the true one when not told.

    In units of the usual loss at the rate expected, as fleets hand them over.
    """
    told = rate if expected is None else expected
    rewards = rng.random((n_blocks, BLOCK_ROWS)) < rate
    losses = np.where(rewards, -np.log(told), -np.log(1.0 - told)).mean(1)
    return [float(loss) / usual_loss(told) for loss in losses]


def alarms(drift: Drift, means: list[float]) -> list[int]:
    return [i for i, mean in enumerate(means) if drift.has_risen(mean)]


@pytest.mark.parametrize(
    ("rate", "later", "blocks_at_most"), [(0.05, 0.8, 8), (0.3, 0.8, 16), (0.05, 0.15, 24), (0.005, 0.05, 16)]
)
def test_a_loss_that_has_risen_is_noticed(rate: float, later: float, blocks_at_most: int) -> None:
    rng = np.random.default_rng(1)
    means = block_losses(rng, rate, 100) + block_losses(rng, later, blocks_at_most, expected=rate)
    found = alarms(Drift(), means)
    assert found and found[0] >= 100, "after it has risen, and not before"


def test_a_loss_that_has_fallen_is_not_a_rise() -> None:
    rng = np.random.default_rng(2)
    means = block_losses(rng, 0.8, 100, expected=0.3) + block_losses(rng, 0.3, 100)
    assert alarms(Drift(), means) == []


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01, 0.001])
def test_a_loss_that_stays_hardly_ever_raises_an_alarm(rate: float) -> None:
    """One of 1,000 blocks at most, 32,000 rows, of which 6 in 10,000 were seen; 5 runs of 800."""
    rng = np.random.default_rng(3)
    assert sum(len(alarms(Drift(), block_losses(rng, rate, 800))) for _ in range(5)) <= 4


def test_it_is_not_asked_before_it_has_heard_enough() -> None:
    assert alarms(Drift(), [0.0] * (BLOCKS_MIN // 2) + [9.0] * (BLOCKS_MIN - BLOCKS_MIN // 2)) == []


def test_an_alarm_storm_is_no_more_often_than_a_detector_takes_to_hear() -> None:
    """Whatever comes: a detector that begins anew at each alarm is silent for BLOCKS_MIN blocks."""
    rng = np.random.default_rng(4)
    storms = [
        np.repeat(np.arange(40.0), BLOCKS_MIN + 1),
        1.05 ** np.arange(400),
        rng.exponential(1.0, 400) ** 6,
        np.tile(np.r_[np.zeros(BLOCKS_MIN), 9.2], 40),
        np.arange(400.0) * 9.2,
    ]
    for storm in storms:
        drift, silent = Drift(), BLOCKS_MIN
        for mean in storm.tolist():
            silent += 1
            if drift.has_risen(mean):
                assert silent > BLOCKS_MIN
                drift, silent = Drift(), 0


def test_a_restored_detector_is_the_saved_one_at_any_block() -> None:
    """Also across the block at which it begins anew."""
    rng = np.random.default_rng(5)
    means = block_losses(rng, 0.1, HEARD_MAX - 30) + block_losses(rng, 0.6, 200, expected=0.1)
    drift, places = Drift(), {3, 500, *range(HEARD_MAX - 3, HEARD_MAX + 3), HEARD_MAX + 100}
    copies: list[Drift] = []
    n_alarms = 0
    for place, mean in enumerate(means):
        if place in places:
            copies.append(Drift(list(drift.heard)))
        told = drift.has_risen(mean)
        n_alarms += told
        for copy in copies:
            assert copy.has_risen(mean) == told
            assert copy.heard == drift.heard
    assert n_alarms > 0 and len(copies) == len(places)


def test_what_is_kept_is_limited() -> None:
    drift = Drift()
    for _ in range(HEARD_MAX):
        drift.has_risen(0.1)
    assert len(drift.heard) == HEARD_MAX
    drift.has_risen(0.2)
    assert drift.heard == [0.2]
