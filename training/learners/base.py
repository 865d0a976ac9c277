"""What every family of learners is to the rest: one protocol, and the few numbers all families share.

A family is one file beside this one: how it learns, its explicit state, and its export to arrays. Each of its objects
learns one action for one goal. It is handed rows already joined with their reward; it never reads a clock, a log or a
disk, and draws no random number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tsugi.log.v1.learner_pb2 import LearnerState

Doubles = NDArray[np.float64]
Features = dict[str, float]  # by name, finite, within ±FEATURE_MAX
Arrays = dict[str, Doubles]  # one row of the GoalArrays fields of the same names
Constants = dict[str, float]  # the GoalArrays fields that all rows of a goal share

FEATURE_MAX: Final = 8.0  # spreads from the center; whoever lies further out teaches as if there
PRIOR_LOG_ODDS_MAX: Final = 15.0  # a chance of 3 in 10 million; a certain prior could never be corrected


class Prediction(NamedTuple):
    """What is expected of one action for one row."""

    mean: float  # of the reward
    variance: float  # of that mean, from what is not yet known; 0 where the family states none


class ActionLearner(Protocol):
    """One learner: one family, one goal, one action.

    Attributes:
        family: the name of its module, part of its identity in snapshots.
        settings: what its arithmetic depends on, as text; a snapshot made with others is not gone on from.
        n_rows: rows learned from.
    """

    family: ClassVar[str]
    settings: ClassVar[str]
    n_rows: int

    def __init__(self, base_rate: float) -> None:
        """Start from nothing but the goal's base rate, above 0 and below 1."""

    def learn_one(self, features: Features, prior_log_odds: float, reward: float) -> None:
        """Learn from one row; reward is 0..1, prior_log_odds within ±PRIOR_LOG_ODDS_MAX."""

    def predict_one(self, features: Features, prior_log_odds: float) -> Prediction:
        """Return River's own prediction, the truth that the export is held against."""

    def export(self, columns: Mapping[str, int]) -> Arrays:
        """Return this learner's row of each of its GoalArrays fields.

        Args:
            columns: feature name to column, 0..d-1, holding at least every feature learned from.
        """

    def save(self, state: LearnerState) -> None:
        """Write the family's part of the state: every number, in River's own order, exactly."""

    def load(self, state: LearnerState) -> None:
        """Take over a saved state; afterwards nothing tells this learner from the saved one, to the bit."""

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """Return the GoalArrays fields that are one number a goal."""

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """Return what workers compute from exported arrays, features being float64[d] in column order."""


def sigmoid(log_odds: float) -> float:
    """Return the chance that has these log-odds, 0..1."""
    if log_odds >= 0.0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1.0 + odds)
