"""How many silences are still to come? What has been learned of a goal lacks them, and states too high a chance.

A reward is learned as it comes, silence when its window closes. So at any moment there are rewards that were learned
early, and not the silences that go with them: of a goal whose window is a week nothing but rewards for a week. Kept up
by the join, slot by slot, it says by how much log-odds are too high. It never reads a clock, a log or a disk.
"""

from __future__ import annotations

import math
from typing import Final

# Rows that a learner's prior is worth, about: before as many were learned from, early rewards move estimates less.
PRIOR_ROWS: Final = 100.0


class Pending:
    """One goal's slots whose window is open.

    Attributes:
        waiting: those without a reward so far.
        early: the rewards of the others, together, in millionths: whole numbers, so that their sum is the same whatever
            the order they came and went in.
    """

    __slots__ = ("early", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.early = 0

    def open(self, taught: float | None = None) -> None:
        """Take in a slot whose window is open, with the reward that was learned of it already, if any."""
        if taught is None:
            self.waiting += 1
        else:
            self.early += _millionths(taught)

    def settle(self, reward: float, taught: float | None) -> None:
        """Take note that a reward was learned of an open slot, in place of the one before, if any."""
        self.close(taught)
        self.early += _millionths(reward)

    def close(self, taught: float | None) -> None:
        """Let go of a slot, with the reward that was learned of it early, if any."""
        if taught is None:
            self.waiting -= 1
        else:
            self.early -= _millionths(taught)

    def excess(self, base_rate: float, n_failures: float) -> float:
        """Return by how much log-odds are too high, 0 or more.

        With a base rate r, early rewards come with early × (1 - r) / r failures, and of those waiting no more than all
        are failures. Learned odds are of rewards to n_failures, those meant are of rewards to n_failures and the
        missing ones; a prior takes its part of both.

        Args:
            base_rate: of the goal, above 0, below 1.
            n_failures: rows learned from less their rewards.
        """
        missing = min(self.early / 1e6 * (1.0 - base_rate) / base_rate, float(self.waiting))
        return math.log1p(missing / (max(n_failures, 0.0) + PRIOR_ROWS))


def _millionths(reward: float) -> int:
    return round(reward * 1e6)
