"""Calibration: estimates that are off are mended, those that are right are left alone, a restart forgets nothing."""

from __future__ import annotations

import math
import random

import pytest

from training.calibration import Calibration
from training.learners.base import sigmoid


def watched(slope: float, intercept: float, n_rows: int, seed: int = 1) -> Calibration:
    """Watch estimates whose truth is sigmoid(slope × log-odds + intercept)."""
    rng, calibration = random.Random(seed), Calibration()
    for step in range(n_rows):
        log_odds = rng.gauss(-1.0, 1.5)
        calibration.learn(log_odds, float(rng.random() < sigmoid(slope * log_odds + intercept)))
        if step % 32 == 31:
            calibration.review()
    return calibration


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1.0), (0.5, 0.0), (2.0, 0.5)])
def test_estimates_that_are_off_are_mended(slope: float, intercept: float) -> None:
    calibration = watched(slope, intercept, 6_000)
    assert calibration.is_used
    assert calibration.scaling == pytest.approx((slope, intercept), abs=0.25)
    before, after = watched(slope, intercept, 64), calibration
    assert before.scaling == (1.0, 0.0), "too early to tell"
    assert after.expected == pytest.approx(after.observed, rel=0.15)


def test_estimates_that_are_right_are_left_alone() -> None:
    assert [watched(1.0, 0.0, 1_500, seed).scaling for seed in range(12)] == [(1.0, 0.0)] * 12


@pytest.mark.parametrize("seed", range(8))
def test_rare_rewards_prove_nothing_by_not_coming(seed: int) -> None:
    rng, calibration = random.Random(seed), Calibration()
    for step in range(8_000):
        calibration.learn(-6.9, float(rng.random() < sigmoid(-6.9)))
        if step % 32 == 31:
            calibration.review()
            assert not calibration.is_used


def test_mending_that_has_come_to_hurt_is_put_out_of_use() -> None:
    calibration, rng = watched(1.0, -1.5, 3_000), random.Random(2)
    assert calibration.is_used
    n_rows = 0
    while calibration.is_used and n_rows < 40_000:
        log_odds = rng.gauss(-1.0, 1.5)
        calibration.learn(log_odds, float(rng.random() < sigmoid(log_odds)))
        n_rows += 1
        if n_rows % 32 == 0:
            calibration.review()
    slope, intercept = calibration.scaling
    assert (not calibration.is_used) or abs(intercept) < 0.1, "it has followed instead"
    assert slope == pytest.approx(1.0, abs=0.1)


def test_somebody_elses_estimates_are_watched_anew() -> None:
    calibration = watched(1.0, -1.0, 3_000)
    calibration.restart()
    assert calibration.scaling == (1.0, 0.0)
    assert math.isclose(calibration.expected, 0.0)


def test_a_restored_calibration_goes_on_to_the_bit() -> None:
    calibration, restored, rng = watched(0.7, -0.5, 500), Calibration(), random.Random(3)
    restored.load(calibration.save())
    for _ in range(300):
        log_odds, reward = rng.gauss(0.0, 2.0), float(rng.random() < 0.3)
        for each in (calibration, restored):
            each.learn(log_odds, reward)
            each.review()
    assert restored.save() == calibration.save()
