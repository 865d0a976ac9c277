"""How the log lies in the tables of its environment: names, keys and values, and where a record is found.

blocks    LSN of the first record → records of one group, or a part of it, one after the other
keys      idempotency key → LSN, payload digest; kept for ever, also of what was erased
subjects  subject + LSN → empty
heads     name of a chain of changes → LSN of its newest
meta      schema, log_id, tail, erasures, and the mark of generations.py
"""

from __future__ import annotations

import struct
from typing import Any, Final

from server.storage.log import Tail
from server.storage.record import CHAIN_START

TABLES: Final = (b"blocks", b"keys", b"subjects", b"heads")  # and meta
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


def seek_block(cursor: Any, lsn: int) -> bool:
    """Put the cursor on the block that holds lsn, or on the first after it."""
    if cursor.set_range(LSN.pack(lsn)):
        if LSN.unpack(cursor.key())[0] == lsn:
            return True
        if cursor.prev():
            return True
        return bool(cursor.first())
    return bool(cursor.last())
