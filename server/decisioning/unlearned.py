"""Who waits for the learner: requests that are to be decided with arrays that include what their callers have reported.

Handed requests that are too early, it gives each back once: when arrays that include its LSN have come in force, or
when it has waited as long as it may. Nothing looks at them meanwhile, however many they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from server.decisioning.gather import Asked


class Unlearned:
    """The requests that wait, for one worker. All methods are called on the event loop.

    Args:
        n_max: so many may wait at once.
        give_back: called with requests that wait no more; never with none.
    """

    def __init__(self, n_max: int, give_back: Callable[[Sequence[Asked]], None]) -> None:
        self._n_max = n_max
        self._give_back = give_back
        self._timers: dict[Asked, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._timers)

    def __contains__(self, asked: Asked) -> bool:
        return asked in self._timers

    def add(self, asked: Asked) -> bool:
        """Let a request wait until its learning_until; False when that has passed, or when as many wait as may."""
        left_s = asked.learning_until - time.monotonic()
        if left_s <= 0.0 or len(self._timers) >= self._n_max:
            return False
        self._timers[asked] = asyncio.get_running_loop().call_later(left_s, self._expire, asked)
        return True

    def learned(self, lsn: int) -> None:
        """Give back those that wait for nothing after an LSN, and forget whose callers have gone. Cost: O(waiting)."""
        ready = [asked for asked in self._timers if asked.at_least_lsn <= lsn or asked.waiter.done()]
        for asked in ready:
            self._timers.pop(asked).cancel()
        if ready:
            self._give_back(ready)

    def _expire(self, asked: Asked) -> None:
        asked.learning_until = 0.0  # whatever the loop's clock and ours say of the last millisecond
        del self._timers[asked]
        self._give_back([asked])
