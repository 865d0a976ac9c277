"""All learners of all goals, and what they share: the names of features and actions, and the features' units.

Handed lessons in order, it puts them into rows and has the goal's fleet learn them. It never reads a clock, a log or a
disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Final

import numpy as np

from server.catalog.catalog import Goal
from training import goal_fleet
from training.families import FAMILIES
from training.goal_fleet import GoalFleet
from training.learners.base import PRIOR_LOG_ODDS_MAX, Row, settings_text, sigmoid
from training.personal import SETTINGS as PERSONAL
from training.rewards import Lesson
from training.scaling import SETTLED_ROWS, Reading, Scaling, reading_of
from training.space import ACTIONS_MAX, FEATURES_MAX, Space
from training.standing import weight_of
from tsugi.log.v1.learner_pb2 import ActionTokens, LearnerSnapshot
from tsugi.v1.model_pb2 import LearnerRole

# What made the numbers of a state: with any of it changed, going on from them is not what a replay would have done.
ARITHMETIC: Final = "; ".join(
    [
        f"river {metadata.version('river')}",
        f"settled_rows={SETTLED_ROWS} names={FEATURES_MAX},{ACTIONS_MAX}",
        goal_fleet.ARITHMETIC,
        *(
            f"{name} {family.arithmetic} {' | '.join(map(settings_text, family.choices))}"
            for name, family in FAMILIES.items()
        ),
        PERSONAL,
    ]
)


class Fleet:
    """Every learner.

    Attributes:
        space: names of features and actions.
        scaling: the unit of each feature.
        goals: the fleet of each goal, in order of first sight.
        lsn: of the record being learned from; whoever owns the fleet sets it.
        time_us: its log time.

    Memory: learners of full covariance take 16 (d + 1)² bytes for each action, 2.7 MB for 100 actions at 40 features,
    and of those a goal has up to five. Where all actions together would make them too large they do not begin: at
    10,000 actions and 64 columns a goal has the diagonal posterior, hashed and factorised ones, and the process grows
    by 210 MB, arrays to publish included; its snapshot has 20 MB.
    """

    def __init__(self) -> None:
        self.space = Space()
        self.scaling = Scaling()
        self.goals: dict[str, GoalFleet] = {}
        self.lsn, self.time_us = 0, 0
        self._names: tuple[str, ...] = ()  # those last read
        self._reading: Reading = reading_of((), {})

    def meet(
        self,
        goals: Iterable[Goal],
        names: Iterable[str] = (),
        actions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Take note of what a catalog has; the base rate a goal is first seen with scales its learners for good.

        Args:
            goals: of the catalog.
            names: of its learned features.
            actions: with their tokens, see Space.
        """
        self.space.admit_features(names)
        self.scaling.grow(len(self.space.columns))
        for action, tokens in (actions or {}).items():
            self.space.admit_action(action, tokens)
        for goal in goals:
            if goal.name not in self.goals:
                rate = sigmoid(goal.base_log_odds)
                self.goals[goal.name] = GoalFleet(self.space, goal.name, rate, self.lsn, self.time_us)
            self.goals[goal.name].have(goal.learners, self.lsn, self.time_us)

    def learn(self, lesson: Lesson) -> int:
        """Teach one lesson to the learners of its goal, and return its number among the goal's rows; 0: it has none.

        Cost: some 40 µs at 40 features.
        """
        action = self.space.admit_action(lesson.action)
        if action is None:
            return 0
        goal = self.goals.get(lesson.goal.name)
        if goal is None:
            self.meet([lesson.goal])
            goal = self.goals[lesson.goal.name]
        if lesson.names is not self._names:
            self._admit(lesson.names)
        recorded = np.frombuffer(lesson.features, "<f4")
        x = self.scaling.take(recorded, self._reading, is_new=lesson.taught is None)
        prior = lesson.prior_log_odds
        if not -PRIOR_LOG_ODDS_MAX <= prior <= PRIOR_LOG_ODDS_MAX:
            prior = _clipped(prior, PRIOR_LOG_ODDS_MAX)
        row = Row(action, x, prior, weight_of(lesson.selection_probability))
        if lesson.taught is not None:
            goal.correct(row, lesson.taught, lesson.reward, lesson.row)
            return lesson.row
        goal.learn(row, lesson.reward, self.lsn, self.time_us)
        return goal.n_rows

    def reset(self, goals: Iterable[str] = (), role: int = LearnerRole.LEARNER_ROLE_ALL) -> None:
        """Let the learners of a role, of these goals, begin anew; none named: of all goals. See GoalFleet.reset."""
        for name in list(goals) or list(self.goals):
            if name in self.goals:
                self.goals[name].reset(self.lsn, self.time_us, role)

    def save(self, snapshot: LearnerSnapshot) -> None:
        """Write the state into a snapshot."""
        snapshot.features.extend(self.space.columns)
        snapshot.actions.extend(self.space.rows)
        snapshot.action_tokens.extend(ActionTokens(tokens=tokens) for tokens in self.space.tokens)
        snapshot.scales.CopyFrom(self.scaling.save())
        snapshot.goals.extend(goal.save() for goal in self.goals.values())

    def load(self, snapshot: LearnerSnapshot) -> None:
        """Take over a saved state; this fleet must be new."""
        self.space.admit_features(snapshot.features)
        for action, saved in zip(snapshot.actions, snapshot.action_tokens, strict=True):
            self.space.admit_action(action, tuple(saved.tokens))
        self.scaling.load(snapshot.scales)
        self.goals = goal_fleet.known(self.space, snapshot.goals)

    def _admit(self, names: tuple[str, ...]) -> None:
        self.space.admit_features(names)
        self.scaling.grow(len(self.space.columns))
        self._names = names
        self._reading = reading_of(names, self.space.columns)


def _clipped(value: float, limit: float) -> float:
    """Cut to ±limit; 0 for what is no number."""
    return 0.0 if math.isnan(value) else min(max(value, -limit), limit)
