"""How the log lies in the tables of its environment: names, keys and values, and where a record is found.

blocks    LSN of the first record → records of one group, or a part of it, one after the other
keys      idempotency key → LSN, payload digest; kept for ever, also of what was erased
subjects  subject + LSN → empty
heads     name of a chain of changes → LSN of its newest
meta      schema, log_id, tail, erasures, and the mark of generations.py
counters  see log_counters.py; there once something was spent
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final

from server.storage.log import Tail
from server.storage.record import CHAIN_START, Claim, offsets, unseal

TABLES: Final = (b"blocks", b"keys", b"subjects", b"heads")  # and meta; of every log
LSN: Final = struct.Struct(">Q")  # big-endian: keys in LSN order
KEY: Final = struct.Struct("<Q16s")
TAIL: Final = struct.Struct("<Qq32s")

_EMPTY_TAIL = Tail(0, 0, CHAIN_START)


def tail_of(txn: Any, meta: Any) -> Tail:
    """Return the place of the newest record."""
    value = txn.get(b"tail", db=meta)
    return Tail(*TAIL.unpack(value)) if value else _EMPTY_TAIL


def head_of(txn: Any, heads: Any, name: str) -> int:
    """Return the LSN of the newest record of a chain of changes, 0 before the first."""
    value = txn.get(name.encode(), db=heads)
    return int(LSN.unpack(value)[0]) if value else 0


def erasures_of(txn: Any, meta: Any) -> int:
    """Return how many transactions have erased something, since the log began."""
    value = txn.get(b"erasures", db=meta)
    return int(LSN.unpack(value)[0]) if value else 0


class Taken:
    """What claims count: records about some subjects, those that this transaction is about to write among them.

    Args:
        txn: of the log.
        tables: its tables.
    """

    def __init__(self, txn: Any, tables: dict[bytes, Any]) -> None:
        self._txn = txn
        self._tables = tables
        self._added: Counter[bytes] = Counter()

    def add(self, subjects: Iterable[bytes]) -> None:
        """Count one record more."""
        self._added.update(set(subjects))

    def is_full(self, claim: Claim, time_us: int) -> bool:
        """Say whether no more may be taken at an instant of log time. Cost: some 3 µs a record that counts."""
        n_left = claim.count_max
        for subject, span_us in claim.counted:
            n_left -= self._added[subject]
            if n_left > 0:
                n_left -= self._n_after(subject, time_us - span_us, n_left)
            if n_left <= 0:
                return True
        return False

    def _n_after(self, subject: bytes, after_us: int, n_max: int) -> int:
        """Return how many records about a subject are later than an instant, at most n_max; the newest come first."""
        cursor = self._txn.cursor(self._tables[b"subjects"])
        found = cursor.set_range(subject + b"\xff" * 8)
        found = cursor.prev() if found else cursor.last()
        n_records = 0
        while found and n_records < n_max:
            key = bytes(cursor.key())
            if not key.startswith(subject) or self._time_us(LSN.unpack(key[len(subject) :])[0]) <= after_us:
                break
            n_records += 1
            found = cursor.prev()
        return n_records

    def _time_us(self, lsn: int) -> int:
        """Return the log time of a record."""
        cursor = self._txn.cursor(self._tables[b"blocks"])
        assert seek_block(cursor, lsn), "subjects name records"
        (first,) = LSN.unpack(cursor.key())
        block = cursor.value()
        offset = next(islice(offsets(block), lsn - first, None))
        return unseal(block, offset).time_us


def seek_block(cursor: Any, lsn: int) -> bool:
    """Put the cursor on the block that holds lsn, or on the first after it."""
    if cursor.set_range(LSN.pack(lsn)):
        if LSN.unpack(cursor.key())[0] == lsn:
            return True
        if cursor.prev():
            return True
        return bool(cursor.first())
    return bool(cursor.last())
