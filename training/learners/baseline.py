"""Learns nothing: what the champion or the base rate says is what is expected.

The one every learner must beat, and what serves when none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState


class Baseline:
    """See Learner."""

    family: ClassVar[str] = "baseline"
    choices: ClassVar[tuple[Settings, ...]] = ({},)
    arithmetic: ClassVar[str] = ""
    is_posterior: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner."""
        self.settings = settings
        self._space = space
        self._base_rate = base_rate

    @property
    def seen(self) -> Sequence[int]:
        """See Learner."""
        return ()

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner."""
        del reward
        return sigmoid(row.prior_log_odds)

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner."""
        del change
        return sigmoid(row.prior_log_odds)

    def predict_one(self, row: Row) -> Prediction:
        """See Learner."""
        return Prediction(sigmoid(row.prior_log_odds), 0.0)

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner."""
        n_actions, d = len(actions), len(self._space.columns)
        return {"correction_weights": np.zeros((n_actions, d)), "correction_intercepts": np.zeros(n_actions)}

    def heir(self, settings: Settings) -> Self:
        """See Learner."""
        return type(self)(self._space, self._base_rate, settings)

    def save(self, state: MemberState) -> None:
        """See Learner."""

    def load(self, state: MemberState) -> None:
        """See Learner."""

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        del base_rate
        return {}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner."""
        del n_actions, width
        return 0

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner."""
        del constants, features
        return Prediction(sigmoid(prior_log_odds + float(arrays["correction_intercepts"])), 0.0)
