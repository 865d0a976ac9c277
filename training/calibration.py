"""Does what is stated come true as often as stated? Watches the serving learner's estimates, and mends them if not.

An estimate's log-odds are stretched and shifted: slope × log-odds + intercept, Platt's scaling (in Smola et al. (eds.),
Advances in Large Margin Classifiers, 2000) learned online. It is a logistic correction once more, whose one feature is
the estimate. It is put into use once an always-valid test says that losses are smaller with it, and out of use once one
says that they are larger. The order of a goal's actions never changes by it, as the slope is above 0.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from training.always_valid import radius
from training.learners.base import PRIOR_LOG_ODDS_MAX, Row
from training.learners.logistic import LogisticCorrection
from training.space import Space
from training.standing import RADIUS_MIN
from tsugi.log.v1.learner_pb2 import CalibrationState, MemberState

ALPHA: Final = 0.05  # the k-th test of a goal is held to ALPHA / (k (k + 1))
SLOPE_MIN, SLOPE_MAX = 0.2, 5.0
CHANCE_MIN: Final = 1e-6
_SETTINGS: Final = LogisticCorrection.choices[0]


class Calibration:
    """One goal's.

    Attributes:
        is_used: whether what is published is mended.
        n_tested: tests begun.
        expected: sum of the chances stated, as they were published, forgotten like the rows of the correction.
        observed: sum of the rewards that came, likewise.
    """

    def __init__(self) -> None:
        self._space = Space()
        self._space.admit_features(["estimate"])
        self._space.admit_action("any")
        self.is_used, self.n_tested = False, 1
        self.expected, self.observed = 0.0, 0.0
        self._n_rows, self._gains, self._squares, self._spread = 0.0, 0.0, 0.0, 0.0
        self._slope, self._intercept = 1.0, 0.0  # as of the last review
        self._correction = self._begin()

    @property
    def scaling(self) -> tuple[float, float]:
        """Return slope and intercept as they are to be published; 1 and 0 while not used."""
        return (self._slope, self._intercept) if self.is_used else (1.0, 0.0)

    def learn(self, log_odds: float, reward: float) -> None:
        """Take note of what the serving learner expected before it learned from a row, and of what came.

        Args:
            log_odds: of its estimate.
            reward: 0..1.

        Cost: 6 µs.
        """
        log_odds = min(max(log_odds, -PRIOR_LOG_ODDS_MAX), PRIOR_LOG_ODDS_MAX)
        plain, mended = _chance(log_odds), _chance(self._slope * log_odds + self._intercept)
        gain = _loss(plain, reward) - _loss(mended, reward)
        self._n_rows += 1.0
        self._gains += gain
        self._squares += gain * gain
        # The variance of what takes the two values a gain may have, were neither better: see standing.lead_of.
        self._spread -= math.log(mended / plain) * math.log((1.0 - mended) / (1.0 - plain))
        keep = 1.0 - 1.0 / _SETTINGS["memory_rows"]
        self.expected = keep * self.expected + (mended if self.is_used else plain)
        self.observed = keep * self.observed + reward
        self._correction.learn_one(Row(0, np.array([1.0, log_odds]), log_odds), reward)

    def review(self) -> None:
        """Renew slope and intercept, and put them into use, or out of it, where the losses say so."""
        exported = self._correction.export([0])
        self._slope = min(max(1.0 + float(exported["correction_weights"][0, 0]), SLOPE_MIN), SLOPE_MAX)
        self._intercept = float(exported["correction_intercepts"][0])
        if self._n_rows == 0.0:
            return
        alpha = ALPHA / (self.n_tested * (self.n_tested + 1.0))
        squares = max(self._squares, self._spread + self._gains**2 / self._n_rows)
        mean, wide = self._gains / self._n_rows, radius(self._n_rows, self._gains, squares, alpha)
        wide = max(wide, RADIUS_MIN)
        if (mean < -wide) if self.is_used else (mean > wide):
            self.is_used = not self.is_used
            self._begin_test()

    def restart(self) -> None:
        """Begin anew: somebody else serves."""
        self.is_used = False
        self.expected = self.observed = 0.0
        self._slope, self._intercept = 1.0, 0.0
        self._correction = self._begin()
        self._begin_test()

    def save(self) -> CalibrationState:
        """Return the whole state."""
        correction = MemberState()
        self._correction.save(correction)
        return CalibrationState(
            is_used=self.is_used,
            n_tested=self.n_tested,
            expected=self.expected,
            observed=self.observed,
            sums=[self._n_rows, self._gains, self._squares, self._spread],
            correction=correction.logistic,
            slope=self._slope,
            intercept=self._intercept,
        )

    def load(self, saved: CalibrationState) -> None:
        """Take over a saved state, to the bit."""
        self.is_used, self.n_tested = saved.is_used, saved.n_tested
        self.expected, self.observed = saved.expected, saved.observed
        self._n_rows, self._gains, self._squares, self._spread = saved.sums
        self._slope, self._intercept = saved.slope, saved.intercept
        self._correction = self._begin()
        self._correction.load(MemberState(logistic=saved.correction))

    def _begin_test(self) -> None:
        self.n_tested += 1
        self._n_rows = self._gains = self._squares = self._spread = 0.0

    def _begin(self) -> LogisticCorrection:
        return LogisticCorrection(self._space, 0.5, _SETTINGS)


def _chance(log_odds: float) -> float:
    chance = 1.0 / (1.0 + math.exp(-min(max(log_odds, -50.0), 50.0)))
    return min(max(chance, CHANCE_MIN), 1.0 - CHANCE_MIN)


def _loss(chance: float, reward: float) -> float:
    return -reward * math.log(chance) - (1.0 - reward) * math.log(1.0 - chance)
