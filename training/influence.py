"""Who may teach how much? Keeps one reporter from moving what is believed of an action by more than a share.

Handed the reporters of outcomes in the order of the log, it says of each whether it still counts. It never reads a
clock, a log or a disk.
"""

from __future__ import annotations

from typing import Final

from tsugi.log.v1.learner_pb2 import InfluenceState

KEPT: Final = 1.0 - 1.0 / 1_000  # of each count with every outcome that counts: the last 1,000 or so are the measure
OUTCOMES_MIN: Final = 20.0  # counted before anybody is held to a share
REPORTERS_MAX: Final = 64  # of one action; of more, whoever has least is forgotten


class Influence:
    """How much of what one action is learned from, for one goal, came of each reporter lately."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}  # by reporter, in order of first sight

    def admit(self, reporter: str, share_max: float) -> bool:
        """Say whether an outcome counts, and count it if so.

        Args:
            reporter: who reported it.
            share_max: above 0, to 1.

        Cost: below 1 µs for a few reporters, 10 µs for 64.
        """
        counts = self._counts
        own, total = counts.get(reporter, 0.0), sum(counts.values())
        if total >= OUTCOMES_MIN and own + 1.0 > share_max * (total + 1.0):
            return False
        for each in counts:
            counts[each] *= KEPT
        counts[reporter] = own * KEPT + 1.0
        if len(counts) > REPORTERS_MAX:
            others = (each for each in counts if each != reporter)
            del counts[min(others, key=lambda each: counts[each])]
        return True

    def save(self, goal: str, action: str) -> InfluenceState:
        """Return the state for a snapshot."""
        return InfluenceState(goal=goal, action=action, reporters=self._counts, shares=self._counts.values())

    def load(self, saved: InfluenceState) -> None:
        """Take over a saved state, to the bit."""
        self._counts = dict(zip(saved.reporters, saved.shares, strict=True))
