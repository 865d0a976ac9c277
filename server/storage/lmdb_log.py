"""The log on LMDB: one environment that every worker appends to, each group one synced write transaction.

Records of a group lie together in blocks, one LMDB value each, under the LSN of their first record; keys, subjects,
heads and counters are small tables beside them, changed in the same transaction. LMDB's writer lock, which survives a
killed holder, puts the workers in one order. Erasing puts tombstones in the place of records; their bytes leave the
files when the environment is compacted, which every open log notices at its next transaction (generations.py).

Cost sketch of an append of 25 decisions of 2 kB: 25 × 4 µs for digest, chain and checksum, 30 µs for two tables, and
some 300 µs waiting in fdatasync, with the interpreter lock released.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import lmdb

from server.storage.generations import Generation, Generations, MarkError, MovedError, stop_if_moved
from server.storage.log import (
    GROUP_RECORDS_MAX,
    READ_RECORDS_MAX,
    Fate,
    KeyEntry,
    LogFullError,
    LogUnavailableError,
    Receipt,
    Tail,
)
from server.storage.log_copy import copy_log
from server.storage.log_counters import (
    COUNTERS,
    COUNTING_SCHEMA,
    Spending,
    counts,
    is_counting,
    open_counters,
    standing,
)
from server.storage.log_erasure import erase_first
from server.storage.log_tables import KEY, LSN, TABLES, TAIL, Taken, head_of, seek_block, tail_of
from server.storage.record import (
    CHAIN_START,
    NO_KEY,
    CorruptRecordError,
    Draft,
    Record,
    body_of,
    offsets,
    seal,
    unseal,
)
from server.storage.successor import META, AtStep
from tsugi.log.v1.record_pb2 import RecordKind

SCHEMA = 1  # that a log begins with
SCHEMA_MAX = COUNTING_SCHEMA
FREE_BYTES_MIN = 8 * 1024 * 1024  # below this a failed write is read as a full volume, not as a broken one

_BLOCK_BYTES_MAX = 1024 * 1024

P = ParamSpec("P")
R = TypeVar("R")


class SchemaTooNewError(Exception):
    """The files were written by a later build; nothing was changed."""


def _in_force(method: Callable[Concatenate[LmdbLog, P], R]) -> Callable[Concatenate[LmdbLog, P], R]:
    """Run a method again in the newest generation when its transaction met the mark. Cost: 0.1 µs."""

    @functools.wraps(method)
    def run(self: LmdbLog, /, *args: P.args, **kwargs: P.kwargs) -> R:
        while True:
            now = self._generations.now
            try:
                return method(self, *args, **kwargs)
            except MovedError:
                self._generations.follow(now)

    return run


class LmdbLog:
    """A log in one folder, for any number of processes, opened at most once in each."""

    def __init__(self, folder: Path, map_bytes: int, *, writable: bool = True) -> None:
        """Open the log, making it when the folder is empty.

        Args:
            folder: where the environment lies; made when absent.
            map_bytes: the most the log may ever hold; sparse, so large costs nothing.
            writable: false for readers of a log that exists.

        Raises:
            SchemaTooNewError: written by a later build.
            lmdb.Error: the files cannot be opened.
        """
        self._folder = folder
        self._failed = False
        self._opening_counters = threading.Lock()
        open_tables = _made_tables if writable else _tables
        self._generations = Generations(folder, map_bytes, 8, open_tables, writable=writable)
        now = self._generations.now
        with now.environment.begin(db=now.meta) as txn:
            self._log_id = bytes(txn.get(b"log_id", b""))

    @property
    def log_id(self) -> bytes:
        """See Log."""
        return self._log_id

    def append(self, drafts: Sequence[Draft], wall_us: int) -> list[Receipt]:
        """See Log."""
        assert 1 <= len(drafts) <= GROUP_RECORDS_MAX, "the committer bounds a group"
        self._stop_if_failed()
        salts = os.urandom(16 * len(drafts))
        sealed = [body_of(draft, salts[16 * i : 16 * i + 16]) for i, draft in enumerate(drafts)]
        try:
            # Nearly always nothing is a duplicate, and one bulk insertion finds that out. Otherwise draft by draft.
            receipts = self._append_fresh(drafts, sealed, wall_us)
            return receipts if receipts is not None else self._append_checked(drafts, sealed, wall_us)
        except lmdb.Error as error:
            raise self._refused(error) from error

    def tick(self, wall_us: int, idle_us_min: int) -> bool:
        """See Log."""
        if wall_us - self.tail().time_us < idle_us_min:
            return False
        self.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], wall_us)
        return True

    @_in_force
    def read(self, from_lsn: int, records_max: int = READ_RECORDS_MAX) -> list[Record]:
        """See Log."""
        records: list[Record] = []
        next_lsn = max(from_lsn, 1)
        now = self._generations.now
        with now.environment.begin(db=now.tables[b"blocks"], buffers=True) as txn:
            stop_if_moved(txn, now.meta)
            until_lsn = min(next_lsn + records_max, tail_of(txn, now.meta).lsn + 1)
            if next_lsn >= until_lsn:
                return records
            cursor = txn.cursor()
            found = seek_block(cursor, next_lsn)
            while found and next_lsn < until_lsn:
                lsn = LSN.unpack(cursor.key())[0]
                block = cursor.value()
                for offset in offsets(block):
                    if lsn >= next_lsn:
                        records.append(_checked(unseal(block, offset), next_lsn))
                        next_lsn += 1
                        if next_lsn == until_lsn:
                            break
                    lsn += 1
                found = cursor.next()
        if next_lsn < until_lsn:
            raise CorruptRecordError(f"record {next_lsn} is missing")
        return records

    def get(self, lsn: int) -> Record | None:
        """See Log."""
        records = self.read(lsn, 1) if lsn >= 1 else []
        return records[0] if records else None

    @_in_force
    def find(self, key: bytes) -> KeyEntry | None:
        """See Log."""
        now = self._generations.now
        with now.environment.begin(db=now.tables[b"keys"]) as txn:
            stop_if_moved(txn, now.meta)
            value = txn.get(key)
        return KeyEntry(*KEY.unpack(value)) if value else None

    @_in_force
    def about(self, subject: bytes) -> list[int]:
        """See Log."""
        lsns = []
        now = self._generations.now
        with now.environment.begin(db=now.tables[b"subjects"]) as txn:
            stop_if_moved(txn, now.meta)
            cursor = txn.cursor()
            found = cursor.set_range(subject)
            while found and cursor.key().startswith(subject):
                lsns.append(LSN.unpack(cursor.key()[len(subject) :])[0])
                found = cursor.next()
        return lsns

    @_in_force
    def head(self, name: str) -> int:
        """See Log."""
        now = self._generations.now
        with now.environment.begin() as txn:
            stop_if_moved(txn, now.meta)
            return head_of(txn, now.tables[b"heads"], name)

    @_in_force
    def spent(self, counters: Sequence[bytes]) -> list[int]:
        """See Log."""
        now = self._generations.now
        table = self._counters(now, create=False)
        if table is None:
            return [0] * len(counters)
        with now.environment.begin() as txn:
            stop_if_moved(txn, now.meta)
            return [standing(txn, table, counter) for counter in counters]

    @_in_force
    def tail(self) -> Tail:
        """See Log."""
        now = self._generations.now
        with now.environment.begin() as txn:
            stop_if_moved(txn, now.meta)
            return tail_of(txn, now.meta)

    @_in_force
    def verify(self) -> Tail:
        """See Log."""
        lsn, chain = 1, CHAIN_START
        now = self._generations.now
        with now.environment.begin(db=now.tables[b"blocks"], buffers=True) as txn:
            stop_if_moved(txn, now.meta)
            for key, block in txn.cursor():
                if key != LSN.pack(lsn):
                    raise CorruptRecordError(f"the block of record {lsn} stands under another LSN")
                for offset in offsets(block):
                    record = _checked(unseal(block, offset, chain), lsn)
                    _check_found(record, txn, now.tables)
                    lsn, chain = lsn + 1, record.chain
            tail = tail_of(txn, now.meta)
        if (tail.lsn, tail.chain) != (lsn - 1, chain):
            raise CorruptRecordError(f"the log ends at {lsn - 1}, its tail says {tail.lsn}")
        return tail

    def erase(self, lsns: Sequence[int]) -> int:
        """See Log. Cost: a commit for each 64 records; it rewrites the blocks they lie in."""
        self._stop_if_failed()
        left = sorted(set(lsns))
        assert not left or (left[0] >= 1 and left[-1] <= self.tail().lsn), "only what was recorded can be erased"
        n_erased = 0
        try:
            while left:
                n_done, n_new = self._erase_first(left)
                left, n_erased = left[n_done:], n_erased + n_new
        except lmdb.Error as error:
            raise self._refused(error) from error
        return n_erased

    def compact(self, at_step: AtStep = lambda _step: None) -> None:
        """Have no file of the folder hold a byte of what was erased, while all others go on reading and appending.

        Others notice at their next call and go on in the new files; until each has made one, its process keeps the old
        file's space. A kill at any step leaves the log whole, and what is left of the work is done by the next who
        opens the log for writing or compacts it.

        Args:
            at_step: called before each step with its name, see generations.STEPS. What it raises ends the work there.

        Raises:
            CompactionRunningError: somebody else compacts; nothing was changed.
            NotCopiedError: no space, or more was erased meanwhile; nothing was changed.
            LogFullError, LogUnavailableError: as for append.
            CorruptRecordError: a record cannot be read; nothing was changed.

        Cost: some 5 s a GB, of which others are kept out for milliseconds; the space of a second log.
        """
        self._stop_if_failed()
        try:
            self._generations.compact((*TABLES, COUNTERS), copy_log, at_step)
        except MarkError as error:
            raise self._refused(error) from error

    def used_share(self) -> float:
        """Return how much of the map is in use, 0..1. Cost: two calls into LMDB."""
        environment = self._generations.now.environment
        info = environment.info()
        return float((info["last_pgno"] + 1) * environment.stat()["psize"] / info["map_size"])

    def check_readers(self) -> None:
        """Free the slots of readers that died, and the file that a compaction left behind; every few seconds."""
        self.tail()
        self._env.reader_check()

    def close(self) -> None:
        """See Log."""
        self._generations.close()

    @property
    def _env(self) -> lmdb.Environment:
        return self._generations.now.environment

    def _counters(self, now: Generation[bytes], *, create: bool) -> Any | None:
        """Return the table of counters, None where nothing was ever spent.

        It may have come, or have to be made, since this process opened the log.
        """
        table = now.tables.get(COUNTERS)
        # Asked before the lock is: who makes the table has it for as long as others write, and readers do not wait.
        if table is None and (create or counts(now)):
            with self._opening_counters:
                table = now.tables[COUNTERS] = open_counters(now, create=create)
        return table

    @_in_force
    def _append_fresh(
        self, drafts: Sequence[Draft], sealed: list[tuple[bytes, bytes]], wall_us: int
    ) -> list[Receipt] | None:
        """Append all drafts, or nothing and return None when a key is known, or a head, claim or limit must be met."""
        spends = [spend for draft in drafts if draft.spends for spend in draft.spends]
        if any(draft.head or draft.claims for draft in drafts) or any(spend.limit is not None for spend in spends):
            return None
        now = self._generations.now
        counters = self._counters(now, create=True) if spends else None
        with now.environment.begin(write=True) as txn:
            stop_if_moved(txn, now.meta)
            tail = tail_of(txn, now.meta)
            keys = [
                (draft.key, KEY.pack(lsn, draft.payload_digest))
                for lsn, draft in enumerate(drafts, tail.lsn + 1)
                if draft.key != NO_KEY
            ]
            _, added = txn.cursor(now.tables[b"keys"]).putmulti(keys, overwrite=False) if keys else (0, 0)
            if added != len(keys):
                txn.abort()
                return None
            if spends:
                spending = Spending(txn, counters)
                spending.spend(spends)
                spending.write()
            receipts = self._write(txn, now, list(zip(drafts, sealed, strict=True)), tail, wall_us)
        return receipts

    @_in_force
    def _append_checked(
        self, drafts: Sequence[Draft], sealed: list[tuple[bytes, bytes]], wall_us: int
    ) -> list[Receipt]:
        """Append the drafts that may be, one decision each, in order."""
        receipts: list[Receipt | None] = []
        accepted: list[tuple[Draft, tuple[bytes, bytes]]] = []
        moved: dict[str, int] = {}
        now = self._generations.now
        keys, heads = now.tables[b"keys"], now.tables[b"heads"]
        counters = self._counters(now, create=True) if any(draft.spends for draft in drafts) else None
        with now.environment.begin(write=True) as txn:
            stop_if_moved(txn, now.meta)
            tail = tail_of(txn, now.meta)
            time_us = max(tail.time_us, wall_us)
            taken, spending = Taken(txn, now.tables), Spending(txn, counters)
            for draft, body in zip(drafts, sealed, strict=True):
                lsn = tail.lsn + len(accepted) + 1
                if draft.key != NO_KEY and (value := txn.get(draft.key, db=keys)):
                    entry = KeyEntry(*KEY.unpack(value))
                    fate = Fate.DUPLICATE if entry.payload_digest == draft.payload_digest else Fate.KEY_REUSED
                    receipts.append(Receipt(fate, entry.lsn, time_us))
                    continue
                if draft.expected_head is not None:
                    head = moved.get(draft.head) or head_of(txn, heads, draft.head)
                    if head != draft.expected_head:
                        receipts.append(Receipt(Fate.HEAD_MOVED, head, time_us))
                        continue
                refused = next((i for i, claim in enumerate(draft.claims) if taken.is_full(claim, time_us)), None)
                if refused is not None:
                    receipts.append(Receipt(Fate.CLAIM_REFUSED, refused, time_us))
                    continue
                if draft.spends and (refused := spending.spend(draft.spends)) is not None:
                    receipts.append(Receipt(Fate.SPEND_REFUSED, refused, time_us))
                    continue
                taken.add(draft.subjects)
                if draft.key != NO_KEY:
                    txn.put(draft.key, KEY.pack(lsn, draft.payload_digest), db=keys)
                if draft.head:
                    txn.put(draft.head.encode(), LSN.pack(lsn), db=heads)
                    moved[draft.head] = lsn
                accepted.append((draft, body))
                receipts.append(None)
            spending.write()
            written = iter(self._write(txn, now, accepted, tail, wall_us))
        return [receipt if receipt is not None else next(written) for receipt in receipts]

    def _write(
        self,
        txn: lmdb.Transaction,
        now: Generation[bytes],
        accepted: list[tuple[Draft, tuple[bytes, bytes]]],
        tail: Tail,
        wall_us: int,
    ) -> list[Receipt]:
        """Write blocks, subjects and tail of drafts whose keys and heads are already written."""
        if not accepted:
            return []
        lsn, chain, time_us = tail.lsn, tail.chain, max(tail.time_us, wall_us)
        receipts: list[Receipt] = []
        subjects: list[tuple[bytes, bytes]] = []
        block: list[bytes] = []
        block_bytes, block_lsn = 0, lsn + 1
        for draft, (body, digest) in accepted:
            lsn += 1
            data, chain = seal(draft, body, digest, log_id=self._log_id, lsn=lsn, time_us=time_us, previous_chain=chain)
            if block and block_bytes + len(data) > _BLOCK_BYTES_MAX:
                txn.put(LSN.pack(block_lsn), b"".join(block), db=now.tables[b"blocks"], append=True)
                block, block_bytes, block_lsn = [], 0, lsn
            block.append(data)
            block_bytes += len(data)
            subjects.extend((subject + LSN.pack(lsn), b"") for subject in draft.subjects)
            receipts.append(Receipt(Fate.RECORDED, lsn, time_us))
        txn.put(LSN.pack(block_lsn), b"".join(block), db=now.tables[b"blocks"], append=True)
        if subjects:
            txn.cursor(now.tables[b"subjects"]).putmulti(subjects)
        txn.put(b"tail", TAIL.pack(lsn, time_us, chain), db=now.meta)
        return receipts

    @_in_force
    def _erase_first(self, lsns: list[int]) -> tuple[int, int]:
        now = self._generations.now
        with now.environment.begin(write=True) as txn:
            stop_if_moved(txn, now.meta)
            return erase_first(txn, now, lsns)

    def _stop_if_failed(self) -> None:
        if self._failed:
            raise LogUnavailableError("an earlier write failed; the log must be opened anew")

    def _refused(self, error: Exception) -> LogFullError | LogUnavailableError:
        """Say what a failed write means, and take no further one unless it was for want of space."""
        if isinstance(error, lmdb.MapFullError):
            return LogFullError(is_map=True)
        if self._volume_is_full():
            return LogFullError(is_map=False)
        self._failed = True
        return LogUnavailableError(str(error))

    def _volume_is_full(self) -> bool:
        try:
            status = os.statvfs(self._folder)
        except OSError as error:
            return error.errno == errno.ENOSPC
        return status.f_bavail * status.f_frsize < FREE_BYTES_MIN


def _made_tables(environment: lmdb.Environment, number: int) -> dict[bytes, Any]:
    """Make what is missing, in one transaction: nobody ever meets tables without their content."""
    with environment.begin(write=True) as txn:
        meta = environment.open_db(META, txn)
        if (schema := txn.get(b"schema", db=meta)) is not None:
            _check_schema(schema)
        elif number:
            raise lmdb.Error(f"generation {number} is empty")  # only the first begins so
        else:
            for name in TABLES:
                environment.open_db(name, txn)
            txn.put(b"schema", LSN.pack(SCHEMA), db=meta)
            txn.put(b"log_id", os.urandom(16), db=meta)
    return _tables(environment, number)


def _tables(environment: lmdb.Environment, _number: int) -> dict[bytes, Any]:
    meta = environment.open_db(META, create=False)
    with environment.begin(db=meta) as txn:
        _check_schema(txn.get(b"schema"))
        names = (*TABLES, COUNTERS) if is_counting(txn, meta) else TABLES
    return {name: environment.open_db(name, create=False) for name in names}


def _check_schema(value: bytes | None) -> None:
    (schema,) = LSN.unpack(value or b"")
    if schema > SCHEMA_MAX:
        raise SchemaTooNewError(f"the log has schema {schema}, this build reads up to {SCHEMA_MAX}")


def _checked(record: Record, lsn: int) -> Record:
    if record.lsn != lsn:
        raise CorruptRecordError(f"where record {lsn} should stand, record {record.lsn} does")
    return record


def _check_found(record: Record, txn: Any, tables: dict[bytes, Any]) -> None:
    """Check that a record is found by its key and by its subjects."""
    found = KEY.pack(record.lsn, record.payload_digest)
    if record.key != NO_KEY and txn.get(record.key, db=tables[b"keys"]) != found:
        raise CorruptRecordError(f"record {record.lsn} is not found by its key")
    for subject in record.subjects:
        if txn.get(subject + LSN.pack(record.lsn), db=tables[b"subjects"]) is None:
            raise CorruptRecordError(f"record {record.lsn} is not found by its subject")
