"""Says how much is not yet known, like the Bayesian regression, in memory that grows with the features only.

The same regression of reward - sigmoid(prior) under the same prior, but weights are held to be independent of each
other: mean and variance of each, instead of their covariance. A row moves them as the full posterior would if it were
diagonal just before: Kalman's step, of which the diagonal is kept (the assumed-density form of Opper's on-line Bayes,
in Saad (ed.), On-Line Learning in Neural Networks, 1998). It forgets what features have to do with each other, so it is
surer than it should be where they go together, and slower to tell them apart. For catalogs of so many actions that
covariances would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from server.kernel import kernel
from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.learners.bayesian import WIDTH, spread_of_rewards
from training.learners.regression import sum_of
from training.space import Space
from tsugi.log.v1.learner_pb2 import DiagonalState, MemberState


class DiagonalRegression:
    """See Learner. A row costs some 2 µs; memory is 16 (d + 1) bytes an action.

    Settings:
        width: see BayesianRegression.
    """

    family: ClassVar[str] = "diagonal"
    choices: ClassVar[tuple[Settings, ...]] = ({"width": WIDTH},)
    arithmetic: ClassVar[str] = ""
    is_posterior: ClassVar[bool] = True
    is_shared: ClassVar[bool] = False

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner."""
        self.settings = settings
        self._space = space
        self._base_rate = base_rate
        self._scale = WIDTH * spread_of_rewards(base_rate)
        self._noise_variance = spread_of_rewards(base_rate) ** 2
        self._means: dict[int, Doubles] = {}  # by action: float64[d + 1], the intercept first
        self._variances: dict[int, Doubles] = {}

    @property
    def seen(self) -> Sequence[int]:
        """See Learner."""
        return list(self._means)

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner."""
        means, variances = self._known(row.action)
        self._means[row.action], self._variances[row.action] = means, variances
        expected = _learn(row.x, self._scale, row.prior_log_odds, self._noise_variance, reward, means, variances)
        return min(max(expected, 0.0), 1.0)

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner: the mean moves as the reward does, by what the row would weigh if it were learned now."""
        means, variances = self._known(row.action)
        scaled = row.x * self._scale
        expected = sigmoid(row.prior_log_odds) + sum_of(scaled, means)
        means += variances * scaled * change / (self._noise_variance + float(scaled**2 @ variances))
        self._means[row.action], self._variances[row.action] = means, variances
        return min(max(expected, 0.0), 1.0)

    def predict_one(self, row: Row) -> Prediction:
        """See Learner; River has no such regression, so this is its own definition, sum by sum."""
        means, variances = self._known(row.action)
        mean, variance = sigmoid(row.prior_log_odds), 0.0
        for value, weight, doubt in zip(row.x.tolist(), means.tolist(), variances.tolist(), strict=False):
            mean += self._scale * value * weight
            variance += (self._scale * value) ** 2 * doubt
        return Prediction(mean, variance)

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner. What was never seen keeps its prior: mean 0, variance 1."""
        laid_out = [self._known(action) for action in actions]
        width = 1 + len(self._space.columns)
        means, variances = (
            np.roll(np.array([both[i] for both in laid_out]).reshape(-1, width), -1, axis=1) for i in (0, 1)
        )
        return {"posterior_means": means, "posterior_variances": variances}

    def heir(self, settings: Settings) -> Self:
        """See Learner."""
        successor = type(self)(self._space, self._base_rate, settings)
        successor._means = {action: means.copy() for action, means in self._means.items()}
        successor._variances = {action: variances.copy() for action, variances in self._variances.items()}
        return successor

    def save(self, state: MemberState) -> None:
        """See Learner."""
        state.diagonal.SetInParent()
        for action in sorted(self._means):
            means, variances = self._means[action].tobytes(), self._variances[action].tobytes()
            state.diagonal.actions.add(action=action, means=means, variances=variances)

    def load(self, state: MemberState) -> None:
        """See Learner."""
        saved: DiagonalState = state.diagonal
        self._means = {each.action: np.frombuffer(each.means).copy() for each in saved.actions}
        self._variances = {each.action: np.frombuffer(each.variances).copy() for each in saved.actions}

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        return {"posterior_scale": WIDTH * spread_of_rewards(base_rate)}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner."""
        return n_actions * 16 * (width + 1)

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner: with z = scale · (x, 1), mean sigmoid(prior) + m·z and variance v·z²."""
        row = constants["posterior_scale"] * np.append(features, 1.0)
        mean = sigmoid(prior_log_odds) + float(arrays["posterior_means"] @ row)
        return Prediction(mean, float(arrays["posterior_variances"] @ row**2))

    def _known(self, action: int) -> tuple[Doubles, Doubles]:
        """Return an action's means and variances, as wide as the space; what is not known has its prior."""
        n_new = 1 + len(self._space.columns)
        means, variances = self._means.get(action), self._variances.get(action)
        if means is None or variances is None:
            return np.zeros(n_new), np.ones(n_new)
        n_new -= means.size
        if n_new == 0:
            return means, variances
        return np.append(means, np.zeros(n_new)), np.append(variances, np.ones(n_new))


@kernel
def _learn(
    x: Doubles,
    scale: float,
    prior_log_odds: float,
    noise_variance: float,
    reward: float,
    means: Doubles,
    variances: Doubles,
) -> float:
    """Learn one row, and return the reward expected before."""
    base = 1.0 / (1.0 + math.exp(-prior_log_odds))  # within ±PRIOR_LOG_ODDS_MAX nothing overflows
    expected, variance = base, noise_variance
    for i in range(x.size):
        value = x[i] * scale
        expected += means[i] * value
        variance += variances[i] * value * value
    for i in range(x.size):
        gain = variances[i] * x[i] * scale / variance
        means[i] += gain * (reward - expected)
        variances[i] -= gain * variances[i] * x[i] * scale
    return expected
