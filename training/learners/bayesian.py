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
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
from river import linear_model

from training.learners.base import Arrays, Constants, Doubles, Features, Prediction, sigmoid
from tsugi.log.v1.learner_pb2 import LearnerState

WIDTH: Final = 0.1
BASE_RATE_MIN: Final = 0.005  # and 1 - it at most: a misstated rate must not make the first rows look decisive

_INTERCEPT: Final = "1"  # features are named "profile.…" and "context.…"


class _RestorableRegression(linear_model.BayesianLinearRegression):
    """River's regression with its numbers laid open."""

    @property
    def index(self) -> dict[str, int]:
        return {str(name): row for name, row in self._idx.items()}

    @property
    def precision(self) -> Doubles:
        return _doubles(self._ss_arr)

    @property
    def covariance(self) -> Doubles:
        return _doubles(self._ss_inv_arr)

    @property
    def natural_mean(self) -> Doubles:
        return _doubles(self._eta_arr)

    @property
    def mean(self) -> Doubles:
        self._ensure_m()
        return _doubles(self._m_arr)

    def restore(self, names: list[str], precision: Doubles, covariance: Doubles, natural_mean: Doubles) -> None:
        self._idx = {name: row for row, name in enumerate(names)}
        self._ss_arr = precision.copy()
        # River keeps it in column order, and a product in another order rounds differently.
        self._ss_inv_arr = np.array(covariance, order="F")
        self._eta_arr = natural_mean.copy()
        self._cap = natural_mean.size
        self._m_dirty = True


class BayesianRegression:
    """See ActionLearner. A row costs about 15 µs at 24 features; memory is 16 (d + 1)² bytes."""

    family: ClassVar[str] = "bayesian"
    settings: ClassVar[str] = f"width={WIDTH} base_rate_min={BASE_RATE_MIN}"

    def __init__(self, base_rate: float) -> None:
        """See ActionLearner."""
        self.n_rows = 0
        self._scale = WIDTH * _noise(base_rate)
        self._noise_variance = _noise(base_rate) ** 2
        self._model = _RestorableRegression(alpha=1, beta=1.0 / self._noise_variance)

    def learn_one(self, features: Features, prior_log_odds: float, reward: float) -> None:
        """See ActionLearner."""
        target = reward - sigmoid(prior_log_odds)
        self._model.learn_one(self._scaled(features), target)  # type: ignore[no-untyped-call]  # untyped in River
        self.n_rows += 1

    def predict_one(self, features: Features, prior_log_odds: float) -> Prediction:
        """See ActionLearner. The variance is that of the mean: River's own less the noise of one reward."""
        scaled = self._scaled(features)
        distribution = self._model.predict_one(scaled, with_dist=True)  # type: ignore[no-untyped-call]  # untyped there
        variance = distribution.sigma**2 - self._noise_variance
        return Prediction(sigmoid(prior_log_odds) + distribution.mu, variance)

    def export(self, columns: Mapping[str, int]) -> Arrays:
        """See ActionLearner. What was never seen keeps its prior: mean 0, variance 1."""
        d = len(columns)
        index = self._model.index
        rows = [d if name == _INTERCEPT else columns[name] for name in index]
        means, covariances = np.zeros(d + 1), np.eye(d + 1)
        means[rows] = self._model.mean[: len(rows)]
        covariances[np.ix_(rows, rows)] = self._model.covariance[: len(rows), : len(rows)]
        return {"posterior_means": means, "posterior_covariances": covariances}

    def save(self, state: LearnerState) -> None:
        """See ActionLearner. Matrices are stored whole, with the capacity River has grown them to."""
        state.bayesian.features.extend(self._model.index)
        state.bayesian.precision = self._model.precision.tobytes()
        state.bayesian.covariance = self._model.covariance.tobytes()
        state.bayesian.natural_mean = self._model.natural_mean.tobytes()

    def load(self, state: LearnerState) -> None:
        """See ActionLearner."""
        saved = state.bayesian
        natural_mean = np.frombuffer(saved.natural_mean)
        shape = (natural_mean.size, natural_mean.size)
        precision = np.frombuffer(saved.precision).reshape(shape)
        covariance = np.frombuffer(saved.covariance).reshape(shape)
        self._model.restore(list(saved.features), precision, covariance, natural_mean)

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See ActionLearner."""
        return {"posterior_scale": WIDTH * _noise(base_rate)}

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See ActionLearner: with z = scale · (x, 1), mean sigmoid(prior) + m·z and variance z'Σz."""
        scaled = constants["posterior_scale"] * np.append(features, 1.0)
        mean = sigmoid(prior_log_odds) + float(arrays["posterior_means"] @ scaled)
        return Prediction(mean, float(scaled @ arrays["posterior_covariances"] @ scaled))

    def _scaled(self, features: Features) -> Features:
        scale = self._scale
        scaled = {name: value * scale for name, value in features.items()}
        scaled[_INTERCEPT] = scale
        return scaled


def _noise(base_rate: float) -> float:
    """Return the standard deviation of a reward that is 1 with this chance and else 0."""
    rate = min(max(base_rate, BASE_RATE_MIN), 1.0 - BASE_RATE_MIN)
    return math.sqrt(rate * (1.0 - rate))


def _doubles(array: Any) -> Doubles:
    """Say of one of River's arrays what it is."""
    return np.asarray(array, np.float64)
