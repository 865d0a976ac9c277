"""Do the outcomes of a goal still arrive? When they stop, silence says nothing, and must not be learned.

A *flow* is told of each settling outcome of one goal and of each window of it that closes, in the order of the log, and
says whether silence is to be believed. It knows no clock but log time.
"""

from __future__ import annotations

from typing import Final

from tsugi.log.v1.learner_pb2 import GoalFlow

# So many settling outcomes must be missing. For a single quiet stretch chance does that with probability exp(-20).
MISSED_MAX: Final = 20.0
# Windows remembered: older ones fade, so that the rate is that of late. A goal with fewer than MISSED_MAX settled slots
# among its last so many windows is never held to be stopped.
MEMORY_WINDOWS: Final = 100_000


class Flow:
    """How the settling outcomes of one goal arrive.

    Outcomes are held to be stopped when, since the last one, so many windows that began after it have closed in silence
    that MISSED_MAX settled slots were to be expected among them. Only such windows are evidence: each lay wholly within
    the quiet stretch, which therefore lasts at least as long as a window.

    Then nothing is learned of a slot whose window lies in the stretch, not wholly nor in part, neither its silence nor
    an outcome that arrives when the stretch ends: to keep the successes and leave out the silences would teach too high
    a rate, and to learn the silences too low a one; who is left out is chosen by time alone, so that the others are a
    fair sample. Nothing has to be kept meanwhile. The silences of before, up to the point where the evidence was
    enough, were learned: about MISSED_MAX slots' worth of success, and what was open when the outcomes stopped.

    False alarms: of n_settled slots settled among n_closed, k more windows without any have, under the posterior
    Gamma(n_settled, n_closed) of the rate, probability (n_closed / (n_closed + k)) ** n_settled. Its negative logarithm
    is the sum of n_settled / n_closed over those windows, which is n_missed. So one quiet stretch in exp(20) = 5e8 is
    one by chance, however little is known of the rate; where the true rate is at the time a fifth of the usual, as at
    night, one in exp(4) = 55, and what that costs is the end of that stretch.

    Cost: below 1 µs an outcome or window; seven numbers.
    """

    __slots__ = ("arrived_us", "is_stopped", "n_closed", "n_missed", "n_settled", "trusted_us")

    def __init__(self) -> None:
        self.n_closed = 0.0
        self.n_settled = 0.0
        self.n_missed = 0.0
        self.arrived_us = 0
        self.is_stopped = False
        self.trusted_us = 0

    def arrive(self, time_us: int) -> None:
        """Take note of a settling outcome; those that were held to be stopped have returned."""
        if self.is_stopped:
            self.is_stopped = False
            self.trusted_us = time_us
        self.n_missed = 0.0
        self.arrived_us = time_us

    def settle(self) -> None:
        """Take note of a slot's first settling outcome."""
        self.n_settled += 1.0

    def is_trusted(self, began_us: int) -> bool:
        """Say whether a slot that began to count at an instant can be learned from."""
        return not self.is_stopped and began_us >= self.trusted_us

    def close(self, began_us: int, *, is_silent: bool) -> None:
        """Take note of a window that closes, of a slot that could be learned from until then."""
        kept = 1.0 - 1.0 / MEMORY_WINDOWS
        self.n_closed = self.n_closed * kept + 1.0
        self.n_settled *= kept
        if is_silent and began_us >= self.arrived_us:
            self.n_missed += self.n_settled / max(self.n_closed, self.n_settled)
            self.is_stopped = self.n_missed >= MISSED_MAX

    def save(self, goal: str) -> GoalFlow:
        """Return the state for a snapshot."""
        return GoalFlow(goal=goal, **{name: getattr(self, name) for name in self.__slots__})

    def load(self, saved: GoalFlow) -> None:
        """Take over a saved state."""
        for name in self.__slots__:
            setattr(self, name, getattr(saved, name))
