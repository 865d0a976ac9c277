"""Puts tombstones in the place of records, a bounded number in a transaction that it is handed.

What a record said and whom it was about go; its place, its proof and its idempotency key stay.
So do the counters of budgets: what was spent was spent, whoever it was spent on, and a counter names nobody.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from server.storage.generations import Generation
from server.storage.log_tables import LSN, erasures_of, seek_block
from server.storage.record import CorruptRecordError, offsets, tombstone, unseal

ERASED_RECORDS_MAX: Final = 64  # in one transaction, which keeps the workers waiting
ERASED_BYTES_MAX: Final = 8 * 1024 * 1024  # rewritten in one transaction; a single block may go past it


def erase_first(txn: Any, now: Generation[bytes], lsns: list[int]) -> tuple[int, int]:
    """Erase the first of some records.

    Args:
        txn: writing, in the environment in force.
        now: that environment.
        lsns: ascending, at least one, none twice, all in the log.

    Returns:
        How many of them are erased by the end of this transaction, at least one, and how many newly.

    Raises:
        CorruptRecordError: a record is missing or cannot be read; the transaction must be aborted.

    Cost: 10 µs a record, and the writing of the blocks they lie in.
    """
    heads = {LSN.unpack(value)[0] for _, value in txn.cursor(now.tables[b"heads"])}
    lsns = lsns[:ERASED_RECORDS_MAX]
    assert heads.isdisjoint(lsns), "a record in force is not erased"
    cursor = txn.cursor(now.tables[b"blocks"])
    n_done = n_new = n_bytes = 0
    while n_done < len(lsns) and n_bytes < ERASED_BYTES_MAX:
        if not seek_block(cursor, lsns[n_done]):
            raise CorruptRecordError(f"record {lsns[n_done]} is missing")
        key, block = cursor.item()
        (first,) = LSN.unpack(key)
        parts = [block[start:end] for start, end in pairwise((*offsets(block), len(block)))]
        due = [lsn for lsn in lsns[n_done:] if lsn < first + len(parts)]
        if not due or due[0] < first:
            raise CorruptRecordError(f"record {lsns[n_done]} is missing")
        for lsn in due:
            n_new += _erase(txn, now, parts, lsn, lsn - first)
        cursor.put(key, b"".join(parts))
        n_done, n_bytes = n_done + len(due), n_bytes + len(block)
    if n_new:
        txn.put(b"erasures", LSN.pack(erasures_of(txn, now.meta) + 1), db=now.meta)
    return n_done, n_new


def _erase(txn: Any, now: Generation[bytes], parts: list[bytes], lsn: int, position: int) -> bool:
    """Put a tombstone in one record's place among those of its block; say whether there was none."""
    record = unseal(parts[position])
    if record.lsn != lsn:
        raise CorruptRecordError(f"where record {lsn} should stand, record {record.lsn} does")
    for subject in record.subjects:
        txn.delete(subject + LSN.pack(lsn), db=now.tables[b"subjects"])
    parts[position] = tombstone(parts[position])
    return not record.is_tombstone
