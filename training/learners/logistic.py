"""Corrects the prior: how much likelier, or less likely, success is than the champion or the base rate says.

A logistic regression with the prior log-odds as a fixed term, so that what is learned is the difference: log-odds =
prior + w·x + b. It serves all policies but Thompson sampling, as the propensity of its action.

Each row moves a Gaussian posterior of (w, b) to the most likely point once the row is known, and takes the curvature
there for its new precision: sequential Laplace approximation (Bishop, Pattern Recognition and Machine Learning, 2006,
section 4.5; one row at a time as in Spiegelhalter and Lauritzen, Networks 20, 1990). That is River's Bayesian linear
regression of working log-odds, each row weighted by its curvature. It never steps past the mark, however long the row
is, and correlated features do not slow it down, as they do a gradient.

The setting precision is that of the prior: a feature, in units of its spread, is expected to move log-odds by
1 / √precision. The
share of the error of the uncorrected prior (excess log loss) that is left around 100, 300, 1,000 and 5,000 rows of one
action, on simulated actions with 24 features (8 numbers, 12 one-hots of 3 categories, 4 booleans), mean of six seeds,
by base rate and true effect of a feature::

                        SGD, 0.4 / sqrt(t)       1                        10                       100
    rate 0.02, 0.1      1.47 1.31 1.20 0.98      26.4 22.6 7.18 2.26      4.97 5.18 3.31 1.88      1.19 1.22 1.32 1.10
    rate 0.02, 0.4      0.77 0.67 0.54 0.34      1.75 0.83 0.31 0.07      0.74 0.42 0.29 0.07      0.80 0.64 0.48 0.20
    rate 0.15, 0.1      2.57 1.86 0.92 0.39      14.6 5.10 1.64 0.35      3.89 2.49 1.25 0.33      1.17 1.05 0.64 0.27
    rate 0.15, 0.4      0.58 0.41 0.28 0.13      1.02 0.35 0.10 0.02      0.50 0.27 0.10 0.02      0.68 0.46 0.28 0.06
    rate 0.4,  0.4      0.60 0.38 0.23 0.10      0.83 0.30 0.08 0.02      0.46 0.22 0.08 0.02      0.70 0.45 0.24 0.05
    rate 0.4,  1.0      0.60 0.42 0.30 0.17      0.27 0.09 0.03 0.01      0.42 0.20 0.08 0.02      0.74 0.52 0.32 0.12

The first column is the normalised gradient descent this stands in place of. Where effects are weak it still does
better for some thousand rows, but there is little to win there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final, Self

import numpy as np

from server.kernel import kernel
from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.learners.regression import Regression, Regressions, absorb, chance_of, expect, sum_of, surprise
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

CURVATURE_MIN: Final = 1e-6  # of a row that is certain; the working log-odds divide by it


class LogisticCorrection:
    """See Learner. A row costs some 6 µs at 40 features; memory is 16 (d + 1)² bytes an action.

    Settings:
        precision: of the prior of a weight.
        memory_rows: after so many rows of an action half is forgotten, and so on: what keeps learning when the world
            changes.
    """

    family: ClassVar[str] = "logistic"
    choices: ClassVar[tuple[Settings, ...]] = (
        {"precision": 10.0, "memory_rows": 10_000},
        {"precision": 100.0, "memory_rows": 10_000},
        {"precision": 1.0, "memory_rows": 10_000},
        {"precision": 10.0, "memory_rows": 1_000},
        {"precision": 10.0, "memory_rows": 100_000},
        {"precision": 1_000.0, "memory_rows": 100_000},
    )
    arithmetic: ClassVar[str] = f"curvature_min={CURVATURE_MIN}"
    is_posterior: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner; the prior log-odds already hold the base rate."""
        self.settings = settings
        self._base_rate = base_rate
        self._space = space
        self._scale = 1.0 / math.sqrt(settings["precision"])
        self._memory_rows = settings["memory_rows"]
        self._regressions = Regressions(space, 1.0)
        self._n_rows: dict[int, int] = {}

    @property
    def seen(self) -> Sequence[int]:
        """See Learner."""
        return list(self._regressions.by_action)

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner. A reward between 0 and 1 is learned as a success and a failure with those weights."""
        regression = self._regressions.of(row.action)
        expected = learn_logistic(row.x, self._scale, row.prior_log_odds, reward, 1.0, *regression.arrays)
        self._count(row.action, regression)
        return expected

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner: the gradient of a row's log-likelihood is linear in its reward, its curvature free of it."""
        return self._correct(row, change)

    def _correct(self, row: Row, change: float) -> float:
        regression, scaled = self._regressions.of(row.action), row.x * self._scale
        expected = sigmoid(row.prior_log_odds + sum_of(scaled, regression.arrays[3]))
        regression.correct(scaled, change)
        return expected

    def predict_one(self, row: Row) -> Prediction:
        """See Learner."""
        return Prediction(sigmoid(row.prior_log_odds + self.correction_of(row)), 0.0)

    def n_rows_of(self, action: int) -> int:
        """Return how many rows of an action were learned."""
        return self._n_rows.get(action, 0)

    def correction_of(self, row: Row) -> float:
        """Return what River adds to the prior's log-odds."""
        return self._regressions.known(row.action).mean_of(row.x * self._scale)

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner."""
        means = self._regressions.means(actions) * self._scale
        return {"correction_weights": means[:, :-1], "correction_intercepts": means[:, -1]}

    def heir(self, settings: Settings) -> Self:
        """See Learner. A prior that is 1 / r as precise leaves a row's own precision r times as much beside it."""
        successor = type(self)(self._space, self._base_rate, settings)
        ratio = self.settings["precision"] / settings["precision"]
        successor._regressions.load(self._regressions.save())
        successor._n_rows = dict(self._n_rows)
        for regression in successor._regressions.by_action.values():
            if ratio != 1.0:
                regression.renew_prior(ratio, keep=1.0 / math.sqrt(ratio))
        return successor

    def save(self, state: MemberState) -> None:
        """See Learner."""
        regressions = self._regressions.save()
        state.logistic.regressions.extend(regressions)
        state.logistic.n_rows.extend(self._n_rows.get(each.action, 0) for each in regressions)

    def load(self, state: MemberState) -> None:
        """See Learner."""
        self._regressions.load(state.logistic.regressions)
        actions = [each.action for each in state.logistic.regressions]
        self._n_rows = dict(zip(actions, state.logistic.n_rows, strict=True))

    def _count(self, action: int, regression: Regression) -> None:
        """Take note of a row, and forget half when it is time."""
        n_rows = self._n_rows[action] = self._n_rows.get(action, 0) + 1
        if n_rows % self.settings["memory_rows"] == 0:
            regression.renew_prior(0.5)

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        del base_rate
        return {}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner."""
        return n_actions * 16 * (width + 1) ** 2

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner: sigmoid(prior + w·x + b)."""
        del constants
        correction = float(arrays["correction_weights"] @ features + arrays["correction_intercepts"])
        return Prediction(sigmoid(prior_log_odds + correction), 0.0)


@kernel
def learn_logistic(
    x: Doubles,
    scale: float,
    prior_log_odds: float,
    reward: float,
    importance: float,
    precision: Doubles,
    covariance: Doubles,
    natural: Doubles,
    mean: Doubles,
) -> float:
    """Learn one row as if it had come so many times, above 0, and return the chance expected before."""
    row = x * scale
    spread = np.empty_like(row)
    expected, variance = expect(row, covariance, mean, spread)
    before = prior_log_odds + expected
    step = surprise(before, importance * variance, reward - chance_of(before))
    correction = expected + importance * variance * step  # of this row's log-odds, once it is known
    chance = chance_of(prior_log_odds + correction)
    curvature = max(chance * (1.0 - chance), CURVATURE_MIN)
    target = correction + step / curvature
    absorb(row, spread, variance, importance * curvature, target, precision, covariance, natural, mean)
    return chance_of(before)
