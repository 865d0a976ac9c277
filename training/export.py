"""What workers read: the fleet's present state as aligned arrays, proven to equal River's own predictions.

Rows are actions in order of first sight, columns the union of all features likewise. Only what changed since the last
time is taken out of the learners again. Nothing leaves here that is not finite, or that scores otherwise than River
does. It is handed a fleet and touches no disk.

Cost sketch at 100 actions and 24 features, all changed: 100 × 30 µs out of River and checked, 0.5 ms to compare, 0.5 ms
to serialise 0.5 MB. Goals that did not change cost a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

import numpy as np

from training.fleet import Fleet
from training.goal_fleet import GoalFleet, Member
from training.learners.base import MODEL_FIELD, Arrays, Constants, Doubles, Modelled, Row
from training.telling import goal_learners
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays

FORMAT_VERSION: Final = 1
NUMBER_MAX: Final = 1e4  # rows within FEATURE_MAX cannot teach a number near this
DIFFERENCE_MAX: Final = 1e-6
CHECKED_ROWS: Final = 8  # actions compared with River at each renewal


class UnsafeArraysError(Exception):
    """The fleet's state must not be published: it is not finite, or the arrays do not say what River says."""


class Exporter:
    """Keeps each goal's arrays and renews the rows that changed.

    Args:
        fleet: whose goals' ``stale`` is emptied here.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._blocks: dict[str, _Block] = {}

    def renew(self) -> None:
        """Take what changed out of River, and check it.

        Raises:
            UnsafeArraysError: nothing may be published or saved; what changed stays marked and is tried again.
        """
        for name, goal in self._fleet.goals.items():
            block = self._blocks.get(name)
            if block is None or not block.fits(goal):
                block = self._blocks[name] = _Block(self._fleet, goal)
            block.renew()

    def message(self, epoch: int, learned_lsn: int, learned_time_us: int) -> LearnerArrays:
        """Return the arrays as of the last renew()."""
        return LearnerArrays(
            format_version=FORMAT_VERSION,
            epoch=epoch,
            learned_lsn=learned_lsn,
            learned_time_us=learned_time_us,
            features=self._fleet.space.columns,
            centers=self._fleet.scaling.centers.tobytes(),
            spreads=self._fleet.scaling.spreads.tobytes(),
            goals=[block.message() for block in self._blocks.values()],
            learners=[goal_learners(goal) for goal in self._fleet.goals.values()],
        )


class _Block:
    """One goal's arrays: what the one that serves says, and the posterior."""

    def __init__(self, fleet: Fleet, goal: GoalFleet) -> None:
        self._fleet = fleet
        self._goal = goal
        self._width = len(fleet.space.columns)
        self._parts = tuple(_Part(member, goal) for member in self._present_sources())
        self._constants: Constants = {}
        for part in self._parts:
            self._constants |= type(part.member.learner).constants(goal.base_rate)
        self._model = b""
        self._message: GoalArrays | None = None
        self._is_new = True
        self._n_actions = 0  # of the space, when last renewed: what is shared says something about each

    def fits(self, goal: GoalFleet) -> bool:
        """Whether it is still of those who serve, and as wide as the space."""
        return (
            goal is self._goal
            and self._width == len(self._fleet.space.columns)
            and all(part.member is member for part, member in zip(self._parts, self._present_sources(), strict=True))
        )

    def renew(self) -> None:
        """Take the rows of what changed out of the learners again, and check them.

        Raises:
            UnsafeArraysError: they are not fit to be read.
        """
        stale = self._goal.stale
        self._is_new |= self._goal.serving.learner.is_shared and self._n_actions != len(self._fleet.space.rows)
        if not stale and not self._is_new:
            return
        self._n_actions = len(self._fleet.space.rows)
        for part in self._parts:
            learner = part.member.learner
            changed = {*learner.seen, *stale} if self._is_new or learner.is_shared else stale
            part.write(sorted(changed))
        self._model = b"".join(self._models())
        self._compare_with_river(list(islice(stale.values(), CHECKED_ROWS)))
        self._goal.stale = {}
        self._is_new, self._message = False, None

    def message(self) -> GoalArrays:
        if self._message is None:
            names = list(self._fleet.space.rows)
            serving, posterior = ([names[action] for action in part.actions] for part in self._parts)
            self._message = GoalArrays(goal=self._goal.goal, actions=serving, posterior_actions=posterior)
            for part in self._parts:
                for field, data in part.packed().items():
                    setattr(self._message, field, data)
            for field, number in self._constants.items():
                setattr(self._message, field, number)
            slope, intercept = self._goal.calibration.scaling
            if (slope, intercept) != (1.0, 0.0):
                self._message.calibration_slope, self._message.calibration_intercept = slope, intercept
            setattr(self._message, MODEL_FIELD, self._model)
        return self._message

    def _present_sources(self) -> tuple[Member, Member]:
        return self._goal.serving, self._goal.posterior

    def _models(self) -> list[bytes]:
        """Return the graph of the one that serves, if it has one; the posterior has none."""
        learners = [part.member.learner for part in self._parts]
        try:
            return [learner.model() for learner in learners if isinstance(learner, Modelled)]
        except ArithmeticError as error:
            raise UnsafeArraysError(f"the graph of {self._goal.goal}: {error}") from error

    def _compare_with_river(self, rows: Sequence[Row]) -> None:
        for row in rows:
            features = np.zeros(self._width)
            features[: row.x.size - 1] = row.x[1:]
            for part in self._parts:
                arrays = part.of(row.action)
                if self._model:
                    arrays[MODEL_FIELD] = np.frombuffer(self._model, np.uint8).astype(np.float64)
                learner = part.member.learner
                ours = learner.score(arrays, self._constants, features, row.prior_log_odds)
                rivers = learner.predict_one(row)
                if not np.allclose(ours, rivers, rtol=0.0, atol=DIFFERENCE_MAX):
                    raise UnsafeArraysError(
                        f"{learner.family} of {self._goal.goal}: arrays say {ours}, River says {rivers}"
                    )


class _Part:
    """What one learner says of each action that it has said something about, with room to grow."""

    def __init__(self, member: Member, goal: GoalFleet) -> None:
        self.member = member
        self._goal = goal
        self._rows: dict[int, int] = {}  # by the action's row in the space
        self._fields: dict[str, Doubles] = {}

    @property
    def actions(self) -> list[int]:
        """Their rows in the space, ascending."""
        return sorted(self._rows)

    def write(self, actions: Sequence[int]) -> None:
        """Take what the learner says of some actions.

        Raises:
            UnsafeArraysError: it is not finite, or absurd.
        """
        for action in actions:
            self._rows.setdefault(action, len(self._rows))
        rows = [self._rows[action] for action in actions]
        for field, array in self.member.learner.export(actions).items():
            if not np.abs(array).max(initial=0.0) <= NUMBER_MAX:
                raise UnsafeArraysError(f"{field} of {self._goal.goal} is not finite, or absurd")
            self._room(field, array)[rows] = array

    def of(self, action: int) -> Arrays:
        """Return its row of each field."""
        return {field: stacked[self._rows[action]] for field, stacked in self._fields.items()}

    def packed(self) -> dict[str, bytes]:
        """Return each field, in the order of actions."""
        rows = [self._rows[action] for action in self.actions]
        return {field: stacked[rows].tobytes() for field, stacked in self._fields.items()}

    def _room(self, field: str, array: Doubles) -> Doubles:
        """Return a field's array, with a place for every row."""
        stacked = self._fields.get(field)
        if stacked is None or len(self._rows) > stacked.shape[0]:
            grown = np.zeros((max(8, 2 * len(self._rows)), *array.shape[1:]))
            if stacked is not None:
                grown[: stacked.shape[0]] = stacked
            self._fields[field] = stacked = grown
        return stacked
