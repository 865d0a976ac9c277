"""Does what is stated come true as often as stated? Watches the serving learner's estimates, and mends them as needed.

An estimate's log-odds are stretched and shifted: slope × log-odds + intercept, Platt's scaling (in Smola et al. (eds.),
Advances in Large Margin Classifiers, 2000) learned online. It is a logistic correction once more, whose one feature is
the estimate's distance from the base rate. What is chosen is what was estimated high, so estimates of it are too high
on average, the more so the less is known; this takes that back. Its prior is that estimates are right, and worth some
700 rows at a base rate of 0.15, so that chance mends nothing. The order of a goal's actions never changes by it, as the
slope is above 0.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from training.learners.base import PRIOR_LOG_ODDS_MAX, Row, log_odds_of
from training.learners.logistic import LogisticCorrection
from training.space import Space
from tsugi.log.v1.learner_pb2 import CalibrationState, MemberState

SLOPE_MIN, SLOPE_MAX = 0.2, 5.0
SETTINGS: Final = {"precision": 100.0, "memory_rows": 10_000}
ARITHMETIC: Final = f"calibration={SLOPE_MIN},{SLOPE_MAX},{SETTINGS}"


class Calibration:
    """One goal's.

    Args:
        base_rate: of the goal, above 0, below 1.

    Attributes:
        scaling: slope and intercept as of the last review, as they are to be published.
        expected: sum of the chances stated, mended as they were then, older ones counting less.
        observed: sum of the rewards that came, likewise.
    """

    def __init__(self, base_rate: float) -> None:
        self._base_log_odds = log_odds_of(base_rate)
        self._space = Space()
        self._space.admit_features(["estimate"])
        self._space.admit_action("any")
        self.scaling = 1.0, 0.0
        self.expected, self.observed = 0.0, 0.0
        self._correction = self._begin()

    def learn(self, log_odds: float, reward: float) -> None:
        """Take note of what the serving learner expected before it learned from a row, and of what came.

        Args:
            log_odds: of its estimate.
            reward: 0..1.

        Cost: 5 µs.
        """
        log_odds = min(max(log_odds, -PRIOR_LOG_ODDS_MAX), PRIOR_LOG_ODDS_MAX)
        slope, intercept = self.scaling
        keep = 1.0 - 1.0 / SETTINGS["memory_rows"]
        self.expected = keep * self.expected + _chance(slope * log_odds + intercept)
        self.observed = keep * self.observed + reward
        self._correction.learn_one(Row(0, np.array([1.0, log_odds - self._base_log_odds]), log_odds), reward)

    def correct(self, log_odds: float, before: float, reward: float, age: float) -> None:
        """Take note that the reward of an earlier row is another; see standing.amend.

        Args:
            log_odds: of what the serving learner expects of it now.
            before: the reward it came with, 0..1.
            reward: the one in its place.
            age: how many rows were learned after it.
        """
        if age >= self._correction.n_rows_of(0):
            return  # it was somebody else's
        log_odds = min(max(log_odds, -PRIOR_LOG_ODDS_MAX), PRIOR_LOG_ODDS_MAX)
        self.observed += (reward - before) * (1.0 - 1.0 / SETTINGS["memory_rows"]) ** age
        row = Row(0, np.array([1.0, log_odds - self._base_log_odds]), log_odds)
        self._correction.correct_one(row, reward - before)

    def review(self) -> None:
        """Renew slope and intercept."""
        exported = self._correction.export([0])
        slope = min(max(1.0 + float(exported["correction_weights"][0, 0]), SLOPE_MIN), SLOPE_MAX)
        self.scaling = slope, float(exported["correction_intercepts"][0]) - (slope - 1.0) * self._base_log_odds

    def restart(self) -> None:
        """Begin anew: somebody else serves."""
        self.expected = self.observed = 0.0
        self.scaling = 1.0, 0.0
        self._correction = self._begin()

    def save(self) -> CalibrationState:
        """Return the whole state."""
        correction = MemberState()
        self._correction.save(correction)
        slope, intercept = self.scaling
        return CalibrationState(
            expected=self.expected,
            observed=self.observed,
            correction=correction.logistic,
            slope=slope,
            intercept=intercept,
        )

    def load(self, saved: CalibrationState) -> None:
        """Take over a saved state, to the bit."""
        self.expected, self.observed = saved.expected, saved.observed
        self.scaling = saved.slope, saved.intercept
        self._correction = self._begin()
        self._correction.load(MemberState(logistic=saved.correction))

    def _begin(self) -> LogisticCorrection:
        return LogisticCorrection(self._space, 0.5, SETTINGS)


def _chance(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(log_odds, -50.0), 50.0)))
