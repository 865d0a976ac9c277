"""Says how much is not yet known: mean and variance of the reward beyond the prior, for Thompson sampling only.

River's Bayesian linear regression of reward - sigmoid(prior) on the features and a constant 1. Its prior is only
consistent at alpha = 1 (``_grow`` sets precision *and* covariance to 1 / alpha), so the prior's width is set by scaling
what it reads instead. Scale and noise follow from the goal's base rate, so that goals with rare and with common rewards
explore alike: with sigma² = base rate · (1 - base rate), beta = 1 / sigma², and a weight deviates by WIDTH · sigma,
which is to say that the prior weighs as much as 1 / WIDTH² rows.

WIDTH was chosen by what Thompson sampling (128 draws, floor 0.01, silence 200 rows late, 24 features) wins of the gap
between random and best in the first and the last third of a run, mean of two seeds::

                                          0.05         0.1          0.2          0.4
    100 actions, 30,000 rows, rate 0.05   0.48  0.63   0.53  0.77   0.45  0.80   0.32  0.77
    100 actions, 30,000 rows, rate 0.01   0.29  0.58   0.36  0.63   0.26  0.57   0.17  0.56
    20 actions, 15,000 rows, rate 0.15    0.67  0.90   0.56  0.83   0.44  0.80   0.33  0.78

With sigma² five times too large or too small the first line still wins 0.61 and 0.71 in the last third at width 0.1.
The covariance is kept by rank-one updates; after 600,000 rows it differs from the inverse precision by 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final, Self

import numpy as np

from server.kernel import kernel
from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.learners.regression import Regressions, absorb, expect, sum_of
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

WIDTH: Final = 0.1
BASE_RATE_MIN: Final = 0.005  # and 1 - it at most: a misstated rate must not make the first rows look decisive


class BayesianRegression:
    """See Learner. A row costs some 5 µs at 40 features; memory is 16 (d + 1)² bytes an action.

    Settings:
        width: of the prior of a weight, in spreads of the reward. Workers read one scale a goal.
    """

    family: ClassVar[str] = "bayesian"
    choices: ClassVar[tuple[Settings, ...]] = ({"width": WIDTH},)
    arithmetic: ClassVar[str] = f"base_rate_min={BASE_RATE_MIN}"
    is_posterior: ClassVar[bool] = True
    is_shared: ClassVar[bool] = False

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner."""
        self.settings = settings
        self._base_rate = base_rate
        self._space = space
        self._scale = WIDTH * spread_of_rewards(base_rate)
        self._beta = 1.0 / spread_of_rewards(base_rate) ** 2
        self._regressions = Regressions(space, self._beta)

    @property
    def seen(self) -> Sequence[int]:
        """See Learner."""
        return list(self._regressions.by_action)

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner."""
        regression = self._regressions.of(row.action)
        expected = _learn(row.x, self._scale, row.prior_log_odds, self._beta, reward, *regression.arrays)
        return min(max(expected, 0.0), 1.0)

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner: exactly what would have been learned from the other reward."""
        regression, scaled = self._regressions.of(row.action), row.x * self._scale
        expected = sigmoid(row.prior_log_odds) + sum_of(scaled, regression.arrays[3])
        regression.correct(scaled, self._beta * change)
        return min(max(expected, 0.0), 1.0)

    def predict_one(self, row: Row) -> Prediction:
        """See Learner. The variance is that of the mean: River's own less the noise of one reward."""
        regression, scaled = self._regressions.known(row.action), row.x * self._scale
        mean = sigmoid(row.prior_log_odds) + regression.mean_of(scaled)
        return Prediction(mean, regression.variance_of(scaled))

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner. What was never seen keeps its prior: mean 0, variance 1."""
        return {
            "posterior_means": self._regressions.means(actions),
            "posterior_covariances": self._regressions.covariances(actions),
        }

    def heir(self, settings: Settings) -> Self:
        """See Learner."""
        successor = type(self)(self._space, self._base_rate, settings)
        successor._regressions.load(self._regressions.save())
        return successor

    def save(self, state: MemberState) -> None:
        """See Learner."""
        state.bayesian.regressions.extend(self._regressions.save())

    def load(self, state: MemberState) -> None:
        """See Learner."""
        self._regressions.load(state.bayesian.regressions)

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        return {"posterior_scale": WIDTH * spread_of_rewards(base_rate)}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner."""
        return n_actions * 16 * (width + 1) ** 2

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner: with z = scale · (x, 1), mean sigmoid(prior) + m·z and variance z'Σz."""
        row = constants["posterior_scale"] * np.append(features, 1.0)
        mean = sigmoid(prior_log_odds) + float(arrays["posterior_means"] @ row)
        return Prediction(mean, float(row @ arrays["posterior_covariances"] @ row))


def spread_of_rewards(base_rate: float) -> float:
    """Return the standard deviation of a reward that is 1 with this chance and else 0."""
    rate = min(max(base_rate, BASE_RATE_MIN), 1.0 - BASE_RATE_MIN)
    return math.sqrt(rate * (1.0 - rate))


@kernel
def _learn(
    x: Doubles,
    scale: float,
    prior_log_odds: float,
    beta: float,
    reward: float,
    precision: Doubles,
    covariance: Doubles,
    natural: Doubles,
    mean: Doubles,
) -> float:
    """Learn one row, and return the reward expected before."""
    row = x * scale
    spread = np.empty_like(row)
    expected, variance = expect(row, covariance, mean, spread)
    base = 1.0 / (1.0 + math.exp(-prior_log_odds))  # within ±PRIOR_LOG_ODDS_MAX nothing overflows
    absorb(row, spread, variance, beta, reward - base, precision, covariance, natural, mean)
    return base + expected
