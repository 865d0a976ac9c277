"""A goal's fleet as anybody may see it: who takes part, how each does, and what changed lately.

Handed a fleet, it makes the message that is published with the arrays. What is told is of learners alone, never of the
people they learned from.
"""

from __future__ import annotations

import math
from typing import Final

from training import standing
from training.goal_fleet import ALPHA, GoalFleet, Member
from training.learners.base import Doubles, settings_text
from tsugi.log.v1.learner_pb2 import FleetChange
from tsugi.v1.learner_pb2 import GoalLearners, Learner, LearnerChange, LearnerChangeKind
from tsugi.v1.model_pb2 import LearnerRole

_MICROS: Final = 1_000_000


def goal_learners(goal: GoalFleet) -> GoalLearners:
    """Return all of a goal's learners and how they do. Cost: some 10 µs a learner, and 3 a change."""
    return GoalLearners(
        goal=goal.goal,
        rows=goal.n_rows,
        learners=[_learner(goal, member, sums) for member, sums in zip(goal.members, goal.sums, strict=True)],
        serving_since=_change(goal.serving_since) if goal.serving_since is not None else None,
        promotions=goal.promotions,
        demotions=goal.demotions,
        changes=[_change(change) for change in reversed(goal.changes)],
    )


def _learner(goal: GoalFleet, member: Member, sums: Doubles) -> Learner:
    told = Learner(
        number=member.number,
        family=member.learner.family,
        settings=settings_text(member.learner.settings),
        roles=_roles(goal, member),
        rows=int(sums[standing.ROWS]),
        weight=sums[standing.WEIGHT],
        begun_lsn=member.begun_lsn,
    )
    told.begin_time.FromMicroseconds(member.begun_time_us)
    if not told.rows:
        return told
    told.expected_reward = sums[standing.EXPECTED] / sums[standing.ROWS]
    told.observed_reward = sums[standing.OBSERVED] / sums[standing.ROWS]
    loss = standing.loss_of(sums, ALPHA)
    told.mean_loss = loss.mean
    if math.isfinite(loss.radius):
        told.loss_radius = loss.radius
    if member is not goal.serving and sums[standing.LEAD_ROWS]:
        lead = standing.lead_of(sums, ALPHA)
        told.lead = lead.mean
        if math.isfinite(lead.radius):
            told.lead_radius = lead.radius
    return told


def _roles(goal: GoalFleet, member: Member) -> list[LearnerRole]:
    roles = [LearnerRole.LEARNER_ROLE_SERVING] if member is goal.serving else []
    if member.number == 0:
        roles.append(LearnerRole.LEARNER_ROLE_BASELINE)
    elif member.learner.is_posterior:
        roles.append(LearnerRole.LEARNER_ROLE_POSTERIOR)
    elif member is not goal.serving:
        roles.append(LearnerRole.LEARNER_ROLE_CHALLENGER)
    return roles


def _change(change: FleetChange) -> LearnerChange:
    told = LearnerChange(
        kind=LearnerChangeKind.Name(change.kind),  # the two enums number alike
        number=change.number,
        lsn=change.lsn,
        compared_with=change.other,
    )
    told.change_time.FromMicroseconds(change.time_us)
    if change.lead or math.isfinite(change.radius):
        told.lead = change.lead
    if math.isfinite(change.radius):
        told.lead_radius = change.radius
    return told
