"""What every family of learners is to the rest: one protocol, and the few numbers all families share.

A family is one file beside this one: how it learns, its explicit state, and its export to arrays. Each of its objects
learns one goal, all actions of it, under one choice of settings. It is handed rows already joined with their reward; it
never reads a clock, a log or a disk, and draws no random number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

Doubles = NDArray[np.float64]
Arrays = dict[str, Doubles]  # GoalArrays fields by name, one row an action
Constants = dict[str, float]  # the GoalArrays fields that all rows of a goal share
Settings = Mapping[str, float]

FEATURE_MAX: Final = 8.0  # spreads from the center; whoever lies further out teaches as if there
PRIOR_LOG_ODDS_MAX: Final = 15.0  # a chance of 3 in 10 million; a certain prior could never be corrected
MODEL_FIELD: Final = "correction_forest"  # of GoalArrays: what a family says by a graph instead of weights


class Row(NamedTuple):
    """What is known before the reward is."""

    action: int  # its row in the space
    x: Doubles  # float64[d + 1]: 1 for the intercept, then the features in units of their spread, by column
    prior_log_odds: float  # within ±PRIOR_LOG_ODDS_MAX
    weight: float = 1.0  # 1 / the selection probability, clipped; above 0


class Prediction(NamedTuple):
    """What is expected of one action for one row."""

    mean: float  # of the reward
    variance: float  # of that mean, from what is not yet known; 0 where the family states none


class Learner(Protocol):
    """One learner: one family, one goal, one choice of settings.

    Attributes:
        family: the name of its module.
        choices: the settings it may be had with, the default first.
        arithmetic: the other numbers that its own depend on, as text; a snapshot made with others is not gone on from.
        is_posterior: whether it says how much is not yet known, for policies that ask, instead of the propensity.
        is_shared: whether a row of one action changes what is expected of others.
        settings: its own.
        seen: rows of the actions it has learned something about; of a shared learner, of all actions.

    A row's x may be shorter or longer than the one before: features come and, with a catalog that lacks them, stay 0.
    """

    family: ClassVar[str]
    choices: ClassVar[tuple[Settings, ...]]
    arithmetic: ClassVar[str]
    is_posterior: ClassVar[bool]
    is_shared: ClassVar[bool]
    settings: Settings

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """Start from nothing but the goal's base rate, above 0 and below 1."""

    @property
    def seen(self) -> Sequence[int]:
        """See Attributes."""

    def learn_one(self, row: Row, reward: float) -> float:
        """Learn from one row, reward 0..1, and return the chance that was expected before, 0..1."""

    def correct_one(self, row: Row, change: float) -> float:
        """Take note that the reward of an earlier row is another, and return the chance expected before.

        Args:
            row: see Row.
            change: by how much, -1..1.
        """

    def predict_one(self, row: Row) -> Prediction:
        """Return River's own prediction, the truth that the export is held against; changes nothing."""

    def export(self, actions: Sequence[int]) -> Arrays:
        """Return the rows of these actions of each of its GoalArrays fields, of the space's present width."""

    def heir(self, settings: Settings) -> Self:
        """Return a learner with other settings that goes on from what this one has learned, as far as that can be."""

    def save(self, state: MemberState) -> None:
        """Write the family's part of the state: every number, exactly."""

    def load(self, state: MemberState) -> None:
        """Take over a saved state; afterwards nothing tells this learner from the saved one, to the bit."""

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """Return the GoalArrays fields that are one number a goal."""

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """Return about how much memory it takes once it has learned about so many actions, of so many features."""

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """Return what workers compute from one exported row, features being float64[d] in column order."""


@runtime_checkable
class Modelled(Protocol):
    """A learner that also publishes a graph: for all actions of its goal, beside their rows of arrays.

    Its ``score`` finds the graph among the arrays as MODEL_FIELD, a byte a number.
    """

    def model(self) -> bytes:
        """Return an ONNX graph, see GoalArrays.

        Raises:
            ArithmeticError: a number in it is not finite.
        """


def sigmoid(log_odds: float) -> float:
    """Return the chance that has these log-odds, 0..1."""
    if log_odds >= 0.0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1.0 + odds)


def log_odds_of(chance: float) -> float:
    """Return the log-odds of a chance, within ±PRIOR_LOG_ODDS_MAX."""
    if chance <= 0.0 or chance >= 1.0:
        return math.copysign(PRIOR_LOG_ODDS_MAX, chance - 0.5)
    return min(max(math.log(chance / (1.0 - chance)), -PRIOR_LOG_ODDS_MAX), PRIOR_LOG_ODDS_MAX)


def settings_text(settings: Settings) -> str:
    """Return settings as text, the same for the same settings."""
    return " ".join(f"{name}={settings[name]:g}" for name in sorted(settings))
