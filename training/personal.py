"""How much do people differ from what holds for all? Learned online, of each goal, from what decisions recorded.

Handed each lesson with the person's history as it stood at the decision, it holds pairs of strengths, of groups and of
actions, against each other: every pair would have stated a propensity, and pays the log loss of the reward that came.
The pair with the least loss so far is published. An infinite strength, no effect, is one of them, and is believed until
another has done clearly better: where people do not differ nothing changes. It never reads a profile, a clock or a
random number.

Sums of loss fade, so that a pair which was best long ago gives way: with weights that are exponents of these sums it
is the best of a Bayesian mixture whose members are forgotten at a rate (Herbster and Warmuth, "Tracking the best
expert", Machine Learning 32, 1998; forgetting by exponents after West and Harrison, Bayesian Forecasting, 1997).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np

from server.decisioning.personal import PROPENSITY_MAX
from training.learners.base import Doubles
from training.rewards import Lesson
from tsugi.log.v1.learner_pb2 import LearnerArrays, PersonalState

# Of a strength s, people differ from what holds for all by a factor of standard deviation 1 / √s: from 141 % to 9 %.
STRENGTHS: Final = (math.inf, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
DOUBT: Final = 3.0  # nats that a pair has to be better by for each finite strength in it: odds of 20 to 1
KEPT: Final = 1.0 - 2.0**-17  # of the sums at each lesson: half of it is forgotten after 90,000
SETTINGS: Final = f"personal strengths={STRENGTHS} doubt={DOUBT} kept={KEPT}"

_PROPENSITY_MIN: Final = 1e-6
_HISTORY_MAX: Final = 1e12
_SPREADS: Final[Doubles] = 1.0 / np.array(STRENGTHS)
_IS_FINITE: Final = (_SPREADS > 0.0).astype(np.float64)
_DOUBTS: Final = np.add.outer(_IS_FINITE, _IS_FINITE) * DOUBT


class Personal:
    """The strengths of all goals. Memory: 800 bytes a goal."""

    def __init__(self) -> None:
        self._losses: dict[str, Doubles] = {}  # of each goal float64[strengths of groups, strengths of actions]
        self._n_rows: dict[str, int] = {}

    def learn(self, lesson: Lesson) -> None:
        """Take in one lesson. Cost: some 12 µs; nothing where the person had no history."""
        expected, observed, group_expected, group_observed = lesson.history
        if not group_expected or not lesson.general_propensity or lesson.taught is not None:
            return  # every pair says the same, or said it already
        if not 0.0 <= expected + observed + group_expected + group_observed + lesson.general_propensity < _HISTORY_MAX:
            return  # no history is like that, and sums that are no numbers would stay so
        of_groups = (group_observed * _SPREADS + 1.0) / (group_expected * _SPREADS + 1.0)
        factors = (observed * _SPREADS + of_groups[:, np.newaxis]) / (expected * _SPREADS + 1.0)
        p = np.clip(lesson.general_propensity * factors, _PROPENSITY_MIN, PROPENSITY_MAX)
        loss = -(lesson.reward * np.log(p) + (1.0 - lesson.reward) * np.log1p(-p))
        goal = lesson.goal.name
        before = self._losses.get(goal)
        self._losses[goal] = loss if before is None else before * KEPT + loss
        self._n_rows[goal] = self._n_rows.get(goal, 0) + 1

    def strengths(self, goal: str) -> tuple[float, float]:
        """Return the strengths of groups and of actions that foretold best; infinite where nothing is known."""
        losses = self._losses.get(goal)
        if losses is None:
            return math.inf, math.inf
        group, action = divmod(int(np.argmin(losses + _DOUBTS)), len(STRENGTHS))
        return STRENGTHS[group], STRENGTHS[action]

    def export(self, arrays: LearnerArrays) -> None:
        """Write the strengths of each goal where workers read them; what is not stated is infinite."""
        for block in arrays.goals:
            group, action = self.strengths(block.goal)
            if group < math.inf:
                block.group_strength = group
            if action < math.inf:
                block.personal_strength = action

    def save(self) -> list[PersonalState]:
        """Return the state for a snapshot."""
        return [
            PersonalState(goal=goal, losses=losses.astype("<f8").tobytes(), n_rows=self._n_rows[goal])
            for goal, losses in sorted(self._losses.items())
        ]

    def load(self, states: Iterable[PersonalState]) -> None:
        """Take over a saved state; this must be new."""
        for state in states:
            losses = np.frombuffer(state.losses, "<f8").reshape(_DOUBTS.shape)
            self._losses[state.goal] = losses
            self._n_rows[state.goal] = state.n_rows
