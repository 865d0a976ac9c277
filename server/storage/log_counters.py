"""What the counters of budgets stand at: their table in the log's environment, and what one transaction spends.

Handed an environment or a transaction, it finds the table and adds to it; whose budget a counter is, and what its limit
means, it never knows. The first spend of a log makes the table and raises the log's schema: a build that knows nothing
of counters would compact the log without them, and every budget would begin anew. Until then the log is that of an
older build, which has no such table either.

counters  16 bytes that name it for ever → u64 little-endian: what was spent, at most 2**63 - 1

Cost sketch: 3 µs a counter of a transaction for one get and one put, and 0.5 µs a spend.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

from server.storage.generations import Generation, stop_if_moved
from server.storage.log_tables import LSN
from server.storage.record import COUNTER_MAX, Spend

COUNTERS: Final = b"counters"
COUNTING_SCHEMA: Final = 2  # of a log that something was spent in

_COUNT = struct.Struct("<Q")


def is_counting(txn: Any, meta: Any) -> bool:
    """Say whether the log has the table; only then may it be opened. Cost: one get."""
    value = txn.get(b"schema", db=meta)
    return value is not None and LSN.unpack(value)[0] >= COUNTING_SCHEMA


def counts(now: Generation[bytes]) -> bool:
    """Say of an environment that the caller has no transaction of open whether it has the table. Cost: one get.

    Raises:
        MovedError: the environment was left.
    """
    with now.environment.begin() as txn:
        stop_if_moved(txn, now.meta)
        return is_counting(txn, now.meta)


def open_counters(now: Generation[bytes], *, create: bool) -> Any:
    """Return the table; one thread at a time.

    Args:
        now: what to look in; the caller has no transaction of it open.
        create: make the table where there is none, which costs a commit, once in a log's life; otherwise there is one.

    Raises:
        MovedError: the environment was left.
        lmdb.Error: the table cannot be made.
    """
    if now.environment.flags()["readonly"] and not create:
        return now.environment.open_db(COUNTERS, create=False)
    # A writer names a transaction, or open_db would wait for the writer lock and keep the interpreter lock: for ever,
    # when a thread of this process has the former. And not that of an append: when it is aborted, so is the opening.
    with now.environment.begin(write=True) as txn:
        stop_if_moved(txn, now.meta)
        if not is_counting(txn, now.meta):
            txn.put(b"schema", LSN.pack(COUNTING_SCHEMA), db=now.meta)
        return now.environment.open_db(COUNTERS, txn, create=create)


def standing(txn: Any, counters: Any, counter: bytes) -> int:
    """Return what a counter stands at, 0 where it was never spent from. Cost: one get."""
    value = txn.get(counter, db=counters)
    return int(_COUNT.unpack(value)[0]) if value else 0


class Spending:
    """What one writing transaction spends; nothing is written before write().

    Args:
        txn: of the log, writing.
        counters: the table; None where no draft spends.
    """

    def __init__(self, txn: Any, counters: Any | None) -> None:
        self._txn = txn
        self._counters = counters
        self._totals: dict[bytes, int] = {}

    def spend(self, spends: Iterable[Spend]) -> int | None:
        """Count all of these spends, or none and return the index of the first that would pass its limit."""
        totals: dict[bytes, int] = {}
        for number, (counter, amount, limit) in enumerate(spends):
            total = totals.get(counter)
            if total is None:
                total = self._total(counter)
            total += amount
            if limit is not None and total > limit:
                return number
            totals[counter] = min(total, COUNTER_MAX)
        self._totals.update(totals)
        return None

    def write(self) -> None:
        """Write what was counted."""
        if self._totals:
            rows = [(counter, _COUNT.pack(total)) for counter, total in self._totals.items()]
            self._txn.cursor(self._counters).putmulti(rows)

    def _total(self, counter: bytes) -> int:
        total = self._totals.get(counter)
        return total if total is not None else standing(self._txn, self._counters, counter)
