"""Has a learner's loss risen for good? River's ADWIN over means of blocks of rows, with a state that can be written.

The detector itself is compiled and cannot be opened, so what it has heard is kept, and a restored one hears it again;
after HEARD_MAX blocks it begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from river import drift

DELTA: Final = 0.002  # the chance of a false alarm, River's default
BLOCKS_MIN: Final = 10  # before it is asked for the first time
HEARD_MAX: Final = 1_024


class Drift:
    """One learner's detector; see Bifet and Gavaldà, SDM 2007.

    Attributes:
        heard: means of blocks since it began, oldest first.
    """

    def __init__(self, heard: Iterable[float] = ()) -> None:
        self.heard: list[float] = []
        self._detector = self._begin()
        for mean in heard:
            self.has_risen(mean)

    def has_risen(self, mean: float) -> bool:
        """Hear the mean loss of the next block, and say whether the loss has risen for good."""
        if len(self.heard) >= HEARD_MAX:
            self.heard, self._detector = [], self._begin()
        self.heard.append(mean)
        before = self._detector.estimation
        self._detector.update(mean)  # type: ignore[no-untyped-call]  # untyped in River
        return bool(self._detector.drift_detected and self._detector.estimation > before)

    def _begin(self) -> drift.ADWIN:
        return drift.ADWIN(delta=DELTA, clock=1, grace_period=BLOCKS_MIN)  # type: ignore[no-untyped-call]  # untyped there
