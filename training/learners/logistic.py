"""Corrects the prior: how much likelier, or less likely, success is than the champion or the base rate says.

River's logistic regression with the prior log-odds as a fixed term, so that what is learned is the difference:
log-odds = prior + w·x + b. It serves all policies but Thompson sampling, as the propensity of its action.

Settings, chosen on simulated actions with 24 features (8 numbers, 12 one-hots of 3 categories, 4 booleans; base rates
0.02 to 0.15; weak and strong effects; numbers up to ±5), as the share of the error of the uncorrected prior (excess log
loss) that is left after 100, 300, 1,000 and 5,000 rows of one action::

    normalised SGD, 0.3 to 0.5 / sqrt(t)    0.41-0.97  0.23-0.85  0.11-0.61  0.05-0.35
    plain SGD,      0.2 / sqrt(t)           0.49-0.95  0.30-0.82  0.17-0.56  0.06-0.30
    plain SGD,      0.02, constant          0.54-0.93  0.32-0.80  0.14-0.63  0.11-0.67
    AdaGrad,        0.1, eps 1              0.43-0.99  0.19-0.80  0.12-0.49  0.03-0.26
    AdaGrad,        0.1, eps 1e-8           0.54-4.73  0.26-3.88  0.12-2.06  0.03-0.85

Plain SGD at that rate is 1.7 times *worse* than the prior after 30 rows when numbers are large; normalising each step
by the row's length cures it, whatever the scale of the features. AdaGrad gains a little late, costs two and a half
times the time, and at twice the rate leaves twice the error. No l2: a decaying rate and the start at zero do its work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import numpy as np
from river import linear_model, optim
from river.utils import VectorDict

from training.learners.base import Arrays, Constants, Doubles, Features, Prediction, sigmoid
from tsugi.log.v1.learner_pb2 import LearnerState

RATE: Final = 0.4  # of the first step, then divided by the square root of the number of steps
RATE_MIN: Final = 0.004  # reached after 10,000 steps; what keeps learning when the world changes


class _SettlingRate(optim.schedulers.InverseScaling):
    """RATE / sqrt(t + 1), never below RATE_MIN."""

    def get(self, t: int) -> float:
        return max(super().get(t), RATE_MIN)


class _CorrectingRegression(linear_model.LogisticRegression):
    """River's logistic regression with a fixed term in its log-odds, set before each call."""

    def __init__(self) -> None:
        super().__init__(optimizer=optim.SGD(_SettlingRate(RATE)), intercept_lr=_SettlingRate(RATE))
        self.prior_log_odds = 0.0

    def _raw_dot_one(self, x: Features) -> float:
        return float(super()._raw_dot_one(x)) + self.prior_log_odds

    @property
    def n_steps(self) -> int:
        return int(self.optimizer.n_iterations)

    def restore(self, weights: Features, intercept: float, n_steps: int) -> None:
        self._weights = VectorDict(weights)
        self.intercept = intercept
        self.optimizer.n_iterations = n_steps


class LogisticCorrection:
    """See ActionLearner. A row costs about 7 µs at 24 features."""

    family: ClassVar[str] = "logistic"
    settings: ClassVar[str] = f"rate={RATE} rate_min={RATE_MIN}"

    def __init__(self, base_rate: float) -> None:
        """See ActionLearner; the prior log-odds already hold the base rate."""
        del base_rate
        self.n_rows = 0
        self._model = _CorrectingRegression()

    def learn_one(self, features: Features, prior_log_odds: float, reward: float) -> None:
        """See ActionLearner. A reward between 0 and 1 is learned as a success and a failure with those weights."""
        # A step of the logistic loss moves the row's own log-odds by at most RATE · |x|² / 4 of their error. Divided
        # by this it never goes past the mark, however long the row is (normalised least mean squares; the same bound
        # is the implicit update of Kulis and Bartlett, ICML 2010).
        weight = 1.0 / (1.0 + 0.25 * RATE * sum(value * value for value in features.values()))
        self._model.prior_log_odds = prior_log_odds
        if reward > 0.0:
            self._model.learn_one(features, True, w=weight * reward)
        if reward < 1.0:
            self._model.learn_one(features, False, w=weight * (1.0 - reward))
        self.n_rows += 1

    def predict_one(self, features: Features, prior_log_odds: float) -> Prediction:
        """See ActionLearner."""
        self._model.prior_log_odds = prior_log_odds
        chances = self._model.predict_proba_one(features)  # type: ignore[no-untyped-call]  # River leaves it untyped
        return Prediction(float(chances[True]), 0.0)

    def export(self, columns: Mapping[str, int]) -> Arrays:
        """See ActionLearner."""
        weights = np.zeros(len(columns))
        for name, weight in self._model.weights.items():
            weights[columns[name]] = weight
        return {"correction_weights": weights, "correction_intercepts": np.array(self._model.intercept)}

    def save(self, state: LearnerState) -> None:
        """See ActionLearner."""
        weights = self._model.weights
        state.logistic.features.extend(weights.keys())
        state.logistic.weights.extend(weights.values())
        state.logistic.intercept = self._model.intercept
        state.logistic.n_iterations = self._model.n_steps

    def load(self, state: LearnerState) -> None:
        """See ActionLearner."""
        saved = state.logistic
        self._model.restore(dict(zip(saved.features, saved.weights, strict=True)), saved.intercept, saved.n_iterations)

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See ActionLearner."""
        del base_rate
        return {}

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See ActionLearner: sigmoid(prior + w·x + b)."""
        del constants
        correction = float(arrays["correction_weights"] @ features + arrays["correction_intercepts"])
        return Prediction(sigmoid(prior_log_odds + correction), 0.0)
