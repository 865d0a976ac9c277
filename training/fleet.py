"""All learners of all goals: for each goal and action one of every family, trained side by side on the same rows.

Handed rows in order, it puts them into units of their spread, finds or makes the learners they belong to, and teaches
them. The order of first sight of goals and features is part of its state, because arrays are laid out by it. It never
reads a clock, a log or a disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import metadata
from typing import Final

import numpy as np

from server.catalog.catalog import Goal
from server.catalog.declared import LEARNED_LIMIT_UNSTATED
from server.catalog.validation import LEARNED_COLUMNS_FEW_MAX
from training.learners.base import FEATURE_MAX, PRIOR_LOG_ODDS_MAX, ActionLearner, Doubles, Features, sigmoid
from training.learners.bayesian import BayesianRegression
from training.learners.logistic import LogisticCorrection
from training.rewards import Lesson
from training.scaling import SETTLED_ROWS, Columns, Scaling, is_scaled
from tsugi.log.v1.learner_pb2 import FeatureScales, GoalState, LearnerState

FAMILIES: Final[tuple[type[ActionLearner], ...]] = (LogisticCorrection, BayesianRegression)
# What made the numbers of a state: with any of it changed, going on from them is not what a replay would have done.
ARITHMETIC: Final = "; ".join(
    [
        f"river {metadata.version('river')}",
        f"settled_rows={SETTLED_ROWS}",
        *(f"{family.family} {family.settings}" for family in FAMILIES),
    ]
)
# Five catalogs' worth of columns, or the widest one's. Names beyond it are not learned from, so that a feature space
# renamed with every catalog cannot grow the matrices for ever.
FEATURES_MAX: Final = LEARNED_COLUMNS_FEW_MAX
VALUE_MAX: Final = LEARNED_LIMIT_UNSTATED  # of a recorded number; whatever lies further out came from elsewhere

Key = tuple[str, str]  # goal, action
Row = tuple[Features, float]  # features in units of their spread, prior log-odds


class Fleet:
    """Every learner, by goal and action.

    Attributes:
        base_rates: of each goal, as first seen; in order of first sight.
        columns: of each feature; in order of first sight.
        learners: by goal and action, one of each family.
        changed: what was learned last of each goal and action, since somebody emptied it.
        scaling: the unit of each feature.

    Memory is some 32 (d + 1)² + 6,000 bytes a goal and action: 2.6 MB for 100 actions at 24 features, 140 kB an action
    at the 64 columns a catalog of many actions may have.
    """

    def __init__(self) -> None:
        self.base_rates: dict[str, float] = {}
        self.columns: dict[str, int] = {}
        self.learners: dict[Key, tuple[ActionLearner, ...]] = {}
        self.changed: dict[Key, Row] = {}
        self.scaling = Scaling()
        self._names: tuple[str, ...] = ()  # those last admitted
        self._kept: list[str] = []  # among them
        self._kept_places: Columns = np.empty(0, np.intp)  # where they stand in a row
        self._scaled_places: Columns = np.empty(0, np.intp)  # where those stand among what is kept that have a unit
        self._scaled_columns: Columns = np.empty(0, np.intp)

    def meet(self, goals: Iterable[Goal]) -> None:
        """Take note of goals; the base rate a goal is first seen with scales its learners for good."""
        for goal in goals:
            self.base_rates.setdefault(goal.name, sigmoid(goal.base_log_odds))

    def learn(self, lesson: Lesson) -> None:
        """Teach one row to the learners of its goal and action. Cost: about 65 µs at 24 features."""
        goal = lesson.goal
        key = (goal.name, lesson.action)
        learners = self.learners.get(key)
        if learners is None:
            self.meet([goal])
            learners = tuple(family(self.base_rates[goal.name]) for family in FAMILIES)
            self.learners[key] = learners
        features = self._features(lesson.names, lesson.features)
        prior = lesson.prior_log_odds
        if not -PRIOR_LOG_ODDS_MAX <= prior <= PRIOR_LOG_ODDS_MAX:
            prior = _clipped(prior, PRIOR_LOG_ODDS_MAX)
        for learner in learners:
            learner.learn_one(features, prior, lesson.reward)
        self.changed[key] = (features, prior)

    def save(self) -> tuple[list[GoalState], list[str], list[LearnerState], FeatureScales]:
        """Return the state for a snapshot: goals, features, learners, scales."""
        goals = [GoalState(goal=goal, base_rate=rate) for goal, rate in self.base_rates.items()]
        states = []
        for (goal, action), learners in sorted(self.learners.items()):
            for learner in sorted(learners, key=lambda learner: learner.family):
                state = LearnerState(goal=goal, action=action, family=learner.family, n_rows=learner.n_rows)
                learner.save(state)
                states.append(state)
        return goals, list(self.columns), states, self.scaling.save()

    def load(
        self,
        goals: Iterable[GoalState],
        features: Iterable[str],
        states: Iterable[LearnerState],
        scales: FeatureScales,
    ) -> None:
        """Take over a saved state; this fleet must be new."""
        self.base_rates = {state.goal: state.base_rate for state in goals}
        self.columns = {name: column for column, name in enumerate(features)}
        self.scaling.load(scales)
        for state in states:
            key = (state.goal, state.action)
            if key not in self.learners:
                self.learners[key] = tuple(family(self.base_rates[state.goal]) for family in FAMILIES)
            learner = next(learner for learner in self.learners[key] if learner.family == state.family)
            learner.n_rows = state.n_rows
            learner.load(state)

    def _features(self, names: tuple[str, ...], recorded: bytes) -> Features:
        if names is not self._names:
            self._admit(names)
        values = _tame(np.frombuffer(recorded, "<f4").astype(np.float64))[self._kept_places]
        places = self._scaled_places
        values[places] = self.scaling.take(self._scaled_columns, values[places])
        cut = np.minimum(np.maximum(values, -FEATURE_MAX), FEATURE_MAX)
        return dict(zip(self._kept, cut.tolist(), strict=True))

    def _admit(self, names: tuple[str, ...]) -> None:
        """Give columns to features not seen before, as long as there are some left."""
        for name in names:
            if name not in self.columns and len(self.columns) < FEATURES_MAX:
                self.columns[name] = len(self.columns)
        self.scaling.grow(len(self.columns))
        self._names = names
        self._kept = [name for name in names if name in self.columns]
        self._kept_places = np.array([i for i, name in enumerate(names) if name in self.columns], np.intp)
        self._scaled_places = np.array([i for i, name in enumerate(self._kept) if is_scaled(name)], np.intp)
        self._scaled_columns = np.array([self.columns[name] for name in self._kept if is_scaled(name)], np.intp)


def _tame(values: Doubles) -> Doubles:
    """Cut to ±VALUE_MAX; 0 for what is no number."""
    if not math.isfinite(values @ values):  # one number that proves all of them finite
        np.nan_to_num(values, copy=False, nan=0.0, posinf=VALUE_MAX, neginf=-VALUE_MAX)
    return np.minimum(np.maximum(values, -VALUE_MAX), VALUE_MAX)


def _clipped(value: float, limit: float) -> float:
    """Cut to ±limit; 0 for what is no number."""
    return 0.0 if math.isnan(value) else min(max(value, -limit), limit)
