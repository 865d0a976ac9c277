"""How does each learner of a goal do? Sums over its rows, from which losses, leads and bounds follow.

A learner is judged by the log loss of what it expected of a row before it learned from it, weighted by the row's
importance: 1 / the chance with which the action was chosen, at most WEIGHT_MAX, so that what is rarely chosen counts
for as much as if all were chosen alike, and no single row for more than WEIGHT_MAX others. Its lead is how much smaller
its loss is than that of the one that serves, row by row. It never reads a clock, a log or a disk.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from server.kernel import kernel
from training.always_valid import radius
from training.learners.base import Doubles

WEIGHT_MAX: Final = 20.0
CHANCE_MIN: Final = 1e-4  # and 1 - it at most: one row may cost no more than 9.2
RATE_MIN: Final = 0.005  # and 1 - it at most, of usual_loss
RADIUS_MIN: Final = 1e-9  # of a lead: what rounding makes of two that expect the same is none

# The columns of sums, float64[learners, COLUMNS].
ROWS, WEIGHT, LOSS, LOSS_SQUARES = 0, 1, 2, 3  # since it began
EXPECTED, OBSERVED = 4, 5  # rewards, unweighted, since it began
LEAD_ROWS, LEAD, LEAD_SQUARES = 6, 7, 8  # since who serves changed, or it began
LATE_ROWS, LATE_LEAD = 9, 10  # of the later half of the round
BLOCK_LOSS = 11  # unweighted, since the last review
TEST = 12  # its number among all tests of the goal, from 1
LEAD_SPREAD = 13  # the variances its lead would have, were neither better, summed up since LEAD
COLUMNS: Final = 14

_OF_LEAD: Final = [LEAD_ROWS, LEAD, LEAD_SQUARES, LEAD_SPREAD]
_OF_ROUND: Final = slice(LATE_ROWS, LATE_LEAD + 1)


class Estimate(NamedTuple):
    """A mean and how far it may be off."""

    mean: float
    radius: float  # infinite while too little is known

    @property
    def is_above_zero(self) -> bool:
        """Whether it is proven to be."""
        return self.mean > self.radius


def weight_of(selection_probability: float) -> float:
    """Return the importance of a row whose action was chosen with this chance; 1 where it is not known."""
    if not 0.0 < selection_probability <= 1.0:
        return 1.0
    return min(1.0 / selection_probability, WEIGHT_MAX)


def usual_loss(base_rate: float) -> float:
    """Return the mean loss, of one row, of somebody who knows the base rate and no more."""
    rate = min(max(base_rate, RATE_MIN), 1.0 - RATE_MIN)
    return -rate * math.log(rate) - (1.0 - rate) * math.log(1.0 - rate)


def loss_of(sums: Doubles, alpha: float) -> Estimate:
    """Return a learner's mean weighted loss, per unit of weight, from its row of sums."""
    if sums[ROWS] == 0.0:
        return Estimate(0.0, math.inf)
    wide = radius(sums[ROWS], sums[LOSS], sums[LOSS_SQUARES], alpha)
    return Estimate(float(sums[LOSS] / sums[WEIGHT]), float(wide * sums[ROWS] / sums[WEIGHT]))


def lead_of(sums: Doubles, alpha: float) -> Estimate:
    """Return a learner's mean weighted lead over the one that serves; above 0 with a chance of alpha when it is not.

    All tests of a goal together err with a chance of alpha: the k-th is held to alpha / (k (k + 1)). Where rewards are
    rare, whoever expects too little of them leads by a little in each row until one comes, and the rows so far do not
    spread at all. So the lead is taken to spread at least as it would if neither were better.
    """
    if sums[LEAD_ROWS] == 0.0:
        return Estimate(0.0, math.inf)
    share = alpha / (sums[TEST] * (sums[TEST] + 1.0))
    squares = max(sums[LEAD_SQUARES], sums[LEAD_SPREAD] + sums[LEAD] ** 2 / sums[LEAD_ROWS])
    wide = radius(sums[LEAD_ROWS], sums[LEAD], squares, share)
    return Estimate(float(sums[LEAD] / sums[LEAD_ROWS]), max(wide, RADIUS_MIN))


def late_lead_of(sums: Doubles) -> float:
    """Return its mean lead in the later half of the round; before that has begun, the worst there is."""
    return float(sums[LATE_LEAD] / sums[LATE_ROWS]) if sums[LATE_ROWS] else -math.inf


def is_calibrated(sums: Doubles) -> bool:
    """Whether what it expected and what came are within a factor of two of each other: a rough guard."""
    ratio = (sums[EXPECTED] + 1.0) / (sums[OBSERVED] + 1.0)
    return bool(0.5 <= ratio <= 2.0)


def begin(sums: Doubles, test: int) -> None:
    """Let a learner's row of sums start from nothing."""
    sums[:] = 0.0
    sums[TEST] = test


def begin_test(sums: Doubles, test: int) -> None:
    """Let its lead start from nothing: somebody else serves."""
    sums[_OF_LEAD] = 0.0
    sums[_OF_ROUND] = 0.0
    sums[TEST] = test


def begin_round(sums: Doubles) -> None:
    """Let all learners' leads of the round start from nothing."""
    sums[:, _OF_ROUND] = 0.0


@kernel
def tally(chances: Doubles, reward: float, weight: float, serving: int, is_late: bool, sums: Doubles) -> None:
    """Add one row to all learners' sums.

    Args:
        chances: float64[learners], what each expected before it learned from the row.
        reward: 0..1; one between is a success and a failure with those weights.
        weight: see weight_of.
        serving: the place of the one that serves.
        is_late: whether the later half of the round has begun.
        sums: float64[learners, COLUMNS], written.
    """
    successes, failures = np.empty(chances.size), np.empty(chances.size)  # the logs of what each expected of them
    for i in range(chances.size):
        chance = min(max(chances[i], CHANCE_MIN), 1.0 - CHANCE_MIN)
        successes[i], failures[i] = math.log(chance), math.log(1.0 - chance)
    losses = -reward * successes - (1.0 - reward) * failures
    for i in range(chances.size):
        loss, lead = weight * losses[i], weight * (losses[serving] - losses[i])
        if_success, if_failure = successes[i] - successes[serving], failures[i] - failures[serving]
        sums[i, ROWS] += 1.0
        sums[i, WEIGHT] += weight
        sums[i, LOSS] += loss
        sums[i, LOSS_SQUARES] += loss * loss
        sums[i, EXPECTED] += chances[i]
        sums[i, OBSERVED] += reward
        sums[i, LEAD_ROWS] += 1.0
        sums[i, LEAD] += lead
        sums[i, LEAD_SQUARES] += lead * lead
        # One is above 0 and one below; the variance of what takes these two values and has mean 0.
        sums[i, LEAD_SPREAD] -= weight * if_success * weight * if_failure
        sums[i, BLOCK_LOSS] += losses[i]
        if is_late:
            sums[i, LATE_ROWS] += 1.0
            sums[i, LATE_LEAD] += lead


@kernel
def amend(
    chances: Doubles, before: float, reward: float, weight: float, serving: int, age: float, sums: Doubles
) -> None:
    """Let an earlier row count with another reward, in all sums of which it is part.

    Losses are linear in the reward; what was expected then is taken to be what is expected now. Squares never fall by
    it, so that bounds err to the safe side. What drift is heard by stays.

    Args:
        chances: float64[learners], what each expects of the row now; NaN of who did not learn from it.
        before: the reward it counted with, 0..1.
        reward: the one in its place.
        weight: see weight_of.
        serving: see tally.
        age: how many rows the goal has learned after it.
        sums: see tally.
    """
    log_odds = np.empty(chances.size)
    successes, failures = np.empty(chances.size), np.empty(chances.size)
    for i in range(chances.size):
        chance = min(max(chances[i], CHANCE_MIN), 1.0 - CHANCE_MIN)
        successes[i], failures[i] = math.log(chance), math.log(1.0 - chance)
        log_odds[i] = successes[i] - failures[i]
    change = reward - before
    for i in range(chances.size):
        if math.isnan(chances[i]) or age >= sums[i, ROWS]:
            continue
        old = weight * (-before * successes[i] - (1.0 - before) * failures[i])
        new = old - weight * change * log_odds[i]
        sums[i, LOSS] += new - old
        sums[i, LOSS_SQUARES] += max(new * new - old * old, 0.0)
        sums[i, OBSERVED] += change
        if math.isnan(chances[serving]) or age >= sums[i, LEAD_ROWS]:
            continue
        if_success, if_failure = successes[i] - successes[serving], failures[i] - failures[serving]
        old = weight * (before * if_success + (1.0 - before) * if_failure)
        new = old + weight * change * (log_odds[i] - log_odds[serving])
        sums[i, LEAD] += new - old
        sums[i, LEAD_SQUARES] += max(new * new - old * old, 0.0)
        if age < sums[i, LATE_ROWS]:
            sums[i, LATE_LEAD] += new - old
