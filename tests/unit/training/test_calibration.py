"""Calibration: estimates that are off are mended, right ones are left about alone, and a restart forgets nothing."""

from __future__ import annotations

import math
import random

import pytest

from training.calibration import Calibration
from training.learners.base import sigmoid

BASE_RATE = 0.3


def watched(slope: float, intercept: float, n_rows: int, seed: int = 1) -> Calibration:
    """Watch estimates whose truth is sigmoid(slope × log-odds + intercept)."""
    rng, calibration = random.Random(seed), Calibration(BASE_RATE)
    for step in range(n_rows):
        log_odds = rng.gauss(-1.0, 1.5)
        calibration.learn(log_odds, float(rng.random() < sigmoid(slope * log_odds + intercept)))
        if step % 32 == 31:
            calibration.review()
    return calibration


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1.0), (0.5, 0.0), (2.0, 0.5)])
def test_estimates_that_are_off_are_mended(slope: float, intercept: float) -> None:
    soon, late = watched(slope, intercept, 1_000), watched(slope, intercept, 9_000)
    assert late.scaling == pytest.approx((slope, intercept), abs=0.3)
    gaps = [abs(each.scaling[0] - slope) + abs(each.scaling[1] - intercept) for each in (soon, late)]
    assert gaps[1] < gaps[0] < abs(1.0 - slope) + abs(intercept), "the prior gives way with the rows"
    assert late.expected == pytest.approx(late.observed, rel=0.15)


def test_estimates_that_are_right_are_left_about_alone() -> None:
    """The prior's deviation is 0.1 for slope and intercept, and rows of a right learner only take it down."""
    for seed in range(12):
        slope, intercept = watched(1.0, 0.0, 1_500, seed).scaling
        assert abs(slope - 1.0) < 0.3
        assert abs(slope * -1.0 + intercept + 1.0) < 0.2, "of an estimate in the middle"


def test_rare_rewards_that_do_not_come_mend_little() -> None:
    rng, calibration = random.Random(4), Calibration(0.001)
    for step in range(2_000):
        calibration.learn(-6.9, 0.0 if step < 1_000 else float(rng.random() < 0.001))
        if step % 32 == 31:
            calibration.review()
            slope, intercept = calibration.scaling
            assert abs(slope * -6.9 + intercept + 6.9) < 0.1


def test_mending_follows_when_estimates_come_right() -> None:
    calibration, rng = watched(1.0, -1.5, 3_000), random.Random(2)
    before = calibration.scaling
    for step in range(40_000):
        log_odds = rng.gauss(-1.0, 1.5)
        calibration.learn(log_odds, float(rng.random() < sigmoid(log_odds)))
        if step % 32 == 31:
            calibration.review()
    assert before[1] < -1.0
    assert calibration.scaling == pytest.approx((1.0, 0.0), abs=0.15)


def test_somebody_elses_estimates_are_watched_anew() -> None:
    calibration = watched(1.0, -1.0, 3_000)
    calibration.restart()
    assert calibration.scaling == (1.0, 0.0)
    assert math.isclose(calibration.expected, 0.0)


def test_a_restored_calibration_goes_on_to_the_bit() -> None:
    calibration, restored, rng = watched(0.7, -0.5, 500), Calibration(BASE_RATE), random.Random(3)
    restored.load(calibration.save())
    for _ in range(300):
        log_odds, reward = rng.gauss(0.0, 2.0), float(rng.random() < 0.3)
        for each in (calibration, restored):
            each.learn(log_odds, reward)
            each.review()
    assert restored.save() == calibration.save()
