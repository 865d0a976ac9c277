"""Has a learner's loss risen for good? River's ADWIN over means of blocks of rows, with a state that can be written.

The detector itself is compiled and cannot be opened, so what it has heard is kept, and a restored one hears it again;
after HEARD_MAX blocks it begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from river import drift

# ADWIN's bound holds for any numbers and is far from tight for these: of 10,000 blocks of a loss that stays, 0 to 6
# raise an alarm. At River's default, 0.002, none does, but a world that turned round is noticed so late that 1,000 rows
# after what serves is off by 0.130 a row instead of 0.012 (3 actions, 6 features, rate 0.3, mean of eight seeds).
DELTA: Final = 0.2
BLOCKS_MIN: Final = 10  # before it is asked for the first time
HEARD_MAX: Final = 1_024


class Drift:
    """One learner's detector; see Bifet and Gavaldà, SDM 2007.

    Attributes:
        arithmetic: what makes its answers.
        heard: means of blocks since it began, oldest first.
    """

    arithmetic: ClassVar[str] = f"drift={DELTA},{BLOCKS_MIN},{HEARD_MAX}"

    def __init__(self, heard: Iterable[float] = ()) -> None:
        self.heard: list[float] = []
        self._detector = self._begin()
        for mean in heard:
            self.has_risen(mean)

    def has_risen(self, mean: float) -> bool:
        """Hear the mean loss of the next block, and say whether the loss has risen for good.

        Args:
            mean: in units of the usual loss, so that it is around 1.
        """
        if len(self.heard) >= HEARD_MAX:
            self.heard, self._detector = [], self._begin()
        self.heard.append(mean)
        before = self._detector.estimation
        self._detector.update(mean)  # type: ignore[no-untyped-call]  # untyped in River
        return bool(self._detector.drift_detected and self._detector.estimation > before)

    def _begin(self) -> drift.ADWIN:
        return drift.ADWIN(delta=DELTA, clock=1, grace_period=BLOCKS_MIN)  # type: ignore[no-untyped-call]  # untyped there
