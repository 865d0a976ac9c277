"""Is the fleet well? Tells metrics of each goal, and warns when the learner that serves is no longer calibrated.

Looked at whenever arrays are published. Nothing here is part of the learners' state or changes it: after a restart it
begins anew. Goals and families are the only labels, and no person is in any of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import structlog

from server import telemetry
from training import standing
from training.families import FAMILIES
from training.fleet import Fleet
from training.goal_fleet import ALPHA, GoalFleet, Member
from training.learners.base import Doubles

HALF_LIFE_ROWS: Final = 2_000.0  # what came so many rows ago counts half: the last 3,000 or so count
REWARDS_MIN: Final = 20.0  # came or expected; below, being off by RATIO_MAX may be chance: four deviations at 20
RATIO_MAX: Final = 2.0  # and 1 / it at least: as far as a learner may be off and still be promoted
RATIO_CALM: Final = 1.6  # and 1 / it at least: from there on the next crossing is one


class Calibration:
    """Do the rewards that came lately add up to what one learner expected of them?

    Args:
        member: the learner; when it begins anew it is another one.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self._heard = (0.0, 0.0, 0.0)  # rows, expected, observed: since the member began
        self._expected, self._observed = 0.0, 0.0  # lately
        self.is_off = False

    @property
    def ratio(self) -> float:
        """What came / what was expected, each and one more, so that little is close to 1."""
        return (self._observed + 1.0) / (self._expected + 1.0)

    def hear(self, rows: float, expected: float, observed: float) -> bool:
        """Take in the sums since the learner began, and say whether it is off now and was not before."""
        kept = 0.5 ** ((rows - self._heard[0]) / HALF_LIFE_ROWS)
        self._expected = kept * self._expected + expected - self._heard[1]
        self._observed = kept * self._observed + observed - self._heard[2]
        self._heard = (rows, expected, observed)
        bound = RATIO_CALM if self.is_off else RATIO_MAX
        before, self.is_off = (
            self.is_off,
            (max(self._expected, self._observed) >= REWARDS_MIN and not 1.0 / bound <= self.ratio <= bound),
        )
        return self.is_off and not before


class Monitor:
    """Tells of all goals."""

    def __init__(self) -> None:
        self._calibrations: dict[str, Calibration] = {}
        self._stopped: frozenset[str] = frozenset()
        self._is_full = False
        self._n_capped = 0

    def look(self, fleet: Fleet, stopped: Iterable[str] = (), n_capped: int = 0) -> None:
        """Tell how every goal's learners do now. Cost: some 20 µs a goal.

        Args:
            fleet: all of them.
            stopped: goals whose outcomes are held to have stopped arriving.
            n_capped: outcomes so far that did not count because their reporter had its share.
        """
        for goal in fleet.goals.values():
            self._tell(goal)
            self._hear(goal)
        if fleet.space.is_full and not self._is_full:
            self._is_full = True
            telemetry.ALARMS.labels("names_exhausted").inc()
            columns, rows = len(fleet.space.columns), len(fleet.space.rows)
            structlog.get_logger().warning("names_exhausted", n_features=columns, n_actions=rows)
        if n_capped > self._n_capped:
            telemetry.ALARMS.labels("influence_capped").inc()
            structlog.get_logger().warning("influence_capped", n_outcomes=n_capped - self._n_capped)
        self._n_capped = n_capped
        before, self._stopped = self._stopped, frozenset(stopped)
        for name in sorted(self._stopped - before):
            telemetry.ALARMS.labels("outcomes_stopped").inc()
            structlog.get_logger().warning("outcomes_stopped", goal=name)

    def _tell(self, goal: GoalFleet) -> None:
        name, serving = goal.goal, goal.serving
        telemetry.LEARNER_SERVING.labels(name).set(serving.number)
        for family in FAMILIES:
            telemetry.LEARNER_FAMILY.labels(name, family).set(family == serving.learner.family)
        telemetry.LEARNER_CHANGES.labels(name, "promotion").set(goal.promotions)
        telemetry.LEARNER_CHANGES.labels(name, "demotion").set(goal.demotions)
        for role, sums in (("serving", _sums_of(goal, serving)), ("baseline", goal.sums[0])):
            telemetry.LEARNER_LOSS.labels(name, role).set(standing.loss_of(sums, ALPHA).mean)

    def _hear(self, goal: GoalFleet) -> None:
        calibration = self._calibrations.get(goal.goal)
        if calibration is None or calibration.member is not goal.serving:
            calibration = self._calibrations[goal.goal] = Calibration(goal.serving)
        sums = _sums_of(goal, goal.serving)
        rows, expected, observed = (float(sums[i]) for i in (standing.ROWS, standing.EXPECTED, standing.OBSERVED))
        is_crossing = calibration.hear(rows, expected, observed)
        telemetry.LEARNER_CALIBRATION.labels(goal.goal).set(calibration.ratio)
        if is_crossing:
            telemetry.ALARMS.labels("calibration").inc()
            structlog.get_logger().warning(
                "learner_miscalibrated", goal=goal.goal, number=goal.serving.number, ratio=round(calibration.ratio, 3)
            )


def _sums_of(goal: GoalFleet, member: Member) -> Doubles:
    sums: Doubles = goal.sums[goal.members.index(member)]
    return sums
