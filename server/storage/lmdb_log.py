"""The log on LMDB: one environment that every worker appends to, each group one synced write transaction.

Records of a group lie together in blocks, one LMDB value each, under the LSN of their first record; keys, subjects and
heads are small tables beside them, changed in the same transaction. LMDB's writer lock, which survives a killed holder,
puts the workers in one order.

Cost sketch of an append of 25 decisions of 2 kB: 25 × 4 µs for digest, chain and checksum, 30 µs for two tables, and
some 300 µs waiting in fdatasync, with the interpreter lock released.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb

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
from tsugi.log.v1.record_pb2 import RecordKind

SCHEMA = 1
FREE_BYTES_MIN = 8 * 1024 * 1024  # below this a failed write is read as a full volume, not as a broken one

_BLOCK_BYTES_MAX = 1024 * 1024
_READERS_MAX = 1024
_TABLES = (b"blocks", b"keys", b"subjects", b"heads")  # and meta
_LSN = struct.Struct(">Q")  # big-endian: keys in LSN order
_KEY = struct.Struct("<Q16s")
_TAIL = struct.Struct("<Qq32s")
_EMPTY_TAIL = Tail(0, 0, CHAIN_START)


class SchemaTooNewError(Exception):
    """The files were written by a later build; nothing was changed."""


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
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._failed = False
        self._env = lmdb.open(
            str(folder),
            map_size=map_bytes,
            max_dbs=8,
            max_readers=_READERS_MAX,
            max_spare_txns=8,
            readonly=not writable,
            sync=True,
            metasync=True,
            writemap=False,
            meminit=False,
        )
        try:
            self._env.reader_check()
            if writable:
                self._create()
            self._meta = self._env.open_db(b"meta", create=False)
            with self._env.begin(db=self._meta) as txn:
                _check_schema(txn.get(b"schema"))
                self._log_id = bytes(txn.get(b"log_id", b""))
            self._blocks, self._keys, self._subjects, self._heads = (
                self._env.open_db(name, create=False) for name in _TABLES
            )
        except BaseException:
            self._env.close()  # or nobody in this process could open the folder again
            raise

    @property
    def log_id(self) -> bytes:
        """See Log."""
        return self._log_id

    def append(self, drafts: Sequence[Draft], wall_us: int) -> list[Receipt]:
        """See Log."""
        assert 1 <= len(drafts) <= GROUP_RECORDS_MAX, "the committer bounds a group"
        if self._failed:
            raise LogUnavailableError("an earlier write failed; the log must be opened anew")
        salts = os.urandom(16 * len(drafts))
        sealed = [body_of(draft, salts[16 * i : 16 * i + 16]) for i, draft in enumerate(drafts)]
        try:
            # Nearly always nothing is a duplicate, and one bulk insertion finds that out. Otherwise draft by draft.
            receipts = self._append_fresh(drafts, sealed, wall_us)
            return receipts if receipts is not None else self._append_checked(drafts, sealed, wall_us)
        except lmdb.MapFullError as error:
            raise LogFullError(is_map=True) from error
        except lmdb.Error as error:
            if self._volume_is_full():
                raise LogFullError(is_map=False) from error
            self._failed = True
            raise LogUnavailableError(str(error)) from error

    def tick(self, wall_us: int, idle_us_min: int) -> bool:
        """See Log."""
        if wall_us - self.tail().time_us < idle_us_min:
            return False
        self.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], wall_us)
        return True

    def read(self, from_lsn: int, records_max: int = READ_RECORDS_MAX) -> list[Record]:
        """See Log."""
        records: list[Record] = []
        next_lsn = max(from_lsn, 1)
        with self._env.begin(db=self._blocks, buffers=True) as txn:
            until_lsn = min(next_lsn + records_max, _tail(txn, self._meta).lsn + 1)
            if next_lsn >= until_lsn:
                return records
            cursor = txn.cursor()
            found = _seek(cursor, next_lsn)
            while found and next_lsn < until_lsn:
                lsn = _LSN.unpack(cursor.key())[0]
                block = cursor.value()
                for offset in offsets(block):
                    if lsn >= next_lsn:
                        records.append(self._checked(unseal(block, offset), next_lsn))
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

    def find(self, key: bytes) -> KeyEntry | None:
        """See Log."""
        with self._env.begin(db=self._keys) as txn:
            value = txn.get(key)
        return KeyEntry(*_KEY.unpack(value)) if value else None

    def about(self, subject: bytes) -> list[int]:
        """See Log."""
        lsns = []
        with self._env.begin(db=self._subjects) as txn:
            cursor = txn.cursor()
            found = cursor.set_range(subject)
            while found and cursor.key().startswith(subject):
                lsns.append(_LSN.unpack(cursor.key()[len(subject) :])[0])
                found = cursor.next()
        return lsns

    def head(self, name: str) -> int:
        """See Log."""
        with self._env.begin(db=self._heads) as txn:
            return _head(txn, name)

    def tail(self) -> Tail:
        """See Log."""
        with self._env.begin(db=self._meta) as txn:
            return _tail(txn)

    def verify(self) -> Tail:
        """See Log."""
        lsn, chain = 1, CHAIN_START
        with self._env.begin(db=self._blocks, buffers=True) as txn:
            for key, block in txn.cursor():
                if key != _LSN.pack(lsn):
                    raise CorruptRecordError(f"the block of record {lsn} stands under another LSN")
                for offset in offsets(block):
                    record = self._checked(unseal(block, offset, chain), lsn)
                    self._check_found(record, txn)
                    lsn, chain = lsn + 1, record.chain
            tail = _tail(txn, self._meta)
        if (tail.lsn, tail.chain) != (lsn - 1, chain):
            raise CorruptRecordError(f"the log ends at {lsn - 1}, its tail says {tail.lsn}")
        return tail

    def used_share(self) -> float:
        """Return how much of the map is in use, 0..1. Cost: two calls into LMDB."""
        info = self._env.info()
        return float((info["last_pgno"] + 1) * self._env.stat()["psize"] / info["map_size"])

    def check_readers(self) -> None:
        """Free the slots of readers that died; every few seconds, or they run out."""
        self._env.reader_check()

    def close(self) -> None:
        """See Log."""
        self._env.close()

    def _create(self) -> None:
        """Make what is missing, in one transaction: nobody ever meets tables without their content."""
        with self._env.begin(write=True) as txn:
            meta = self._env.open_db(b"meta", txn)
            schema = txn.get(b"schema", db=meta)
            if schema is not None:
                _check_schema(schema)
                return
            for name in _TABLES:
                self._env.open_db(name, txn)
            txn.put(b"schema", _LSN.pack(SCHEMA), db=meta)
            txn.put(b"log_id", os.urandom(16), db=meta)

    def _append_fresh(
        self, drafts: Sequence[Draft], sealed: list[tuple[bytes, bytes]], wall_us: int
    ) -> list[Receipt] | None:
        """Append all drafts, or nothing and return None when a key is known or a head must be compared."""
        if any(draft.head for draft in drafts):
            return None
        with self._env.begin(write=True) as txn:
            tail = _tail(txn, self._meta)
            keys = [
                (draft.key, _KEY.pack(lsn, draft.payload_digest))
                for lsn, draft in enumerate(drafts, tail.lsn + 1)
                if draft.key != NO_KEY
            ]
            _, added = txn.cursor(self._keys).putmulti(keys, overwrite=False) if keys else (0, 0)
            if added != len(keys):
                txn.abort()
                return None
            receipts = self._write(txn, list(zip(drafts, sealed, strict=True)), tail, wall_us)
        return receipts

    def _append_checked(
        self, drafts: Sequence[Draft], sealed: list[tuple[bytes, bytes]], wall_us: int
    ) -> list[Receipt]:
        """Append the drafts that may be, one decision each, in order."""
        receipts: list[Receipt | None] = []
        accepted: list[tuple[Draft, tuple[bytes, bytes]]] = []
        moved: dict[str, int] = {}
        with self._env.begin(write=True) as txn:
            tail = _tail(txn, self._meta)
            time_us = max(tail.time_us, wall_us)
            for draft, body in zip(drafts, sealed, strict=True):
                lsn = tail.lsn + len(accepted) + 1
                if draft.key != NO_KEY and (value := txn.get(draft.key, db=self._keys)):
                    entry = KeyEntry(*_KEY.unpack(value))
                    fate = Fate.DUPLICATE if entry.payload_digest == draft.payload_digest else Fate.KEY_REUSED
                    receipts.append(Receipt(fate, entry.lsn, time_us))
                    continue
                if draft.expected_head is not None:
                    head = moved.get(draft.head) or _head(txn, draft.head, self._heads)
                    if head != draft.expected_head:
                        receipts.append(Receipt(Fate.HEAD_MOVED, head, time_us))
                        continue
                if draft.key != NO_KEY:
                    txn.put(draft.key, _KEY.pack(lsn, draft.payload_digest), db=self._keys)
                if draft.head:
                    txn.put(draft.head.encode(), _LSN.pack(lsn), db=self._heads)
                    moved[draft.head] = lsn
                accepted.append((draft, body))
                receipts.append(None)
            written = iter(self._write(txn, accepted, tail, wall_us))
        return [receipt if receipt is not None else next(written) for receipt in receipts]

    def _write(
        self, txn: Any, accepted: list[tuple[Draft, tuple[bytes, bytes]]], tail: Tail, wall_us: int
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
                txn.put(_LSN.pack(block_lsn), b"".join(block), db=self._blocks, append=True)
                block, block_bytes, block_lsn = [], 0, lsn
            block.append(data)
            block_bytes += len(data)
            subjects.extend((subject + _LSN.pack(lsn), b"") for subject in draft.subjects)
            receipts.append(Receipt(Fate.RECORDED, lsn, time_us))
        txn.put(_LSN.pack(block_lsn), b"".join(block), db=self._blocks, append=True)
        if subjects:
            txn.cursor(self._subjects).putmulti(subjects)
        txn.put(b"tail", _TAIL.pack(lsn, time_us, chain), db=self._meta)
        return receipts

    def _checked(self, record: Record, lsn: int) -> Record:
        if record.lsn != lsn:
            raise CorruptRecordError(f"where record {lsn} should stand, record {record.lsn} does")
        return record

    def _check_found(self, record: Record, txn: Any) -> None:
        """Check that a record is found by its key and by its subjects."""
        entry = _KEY.pack(record.lsn, record.payload_digest)
        if record.key != NO_KEY and txn.get(record.key, db=self._keys) != entry:
            raise CorruptRecordError(f"record {record.lsn} is not found by its key")
        for subject in record.subjects:
            if txn.get(subject + _LSN.pack(record.lsn), db=self._subjects) is None:
                raise CorruptRecordError(f"record {record.lsn} is not found by its subject")

    def _volume_is_full(self) -> bool:
        try:
            status = os.statvfs(self._folder)
        except OSError as error:
            return error.errno == errno.ENOSPC
        return status.f_bavail * status.f_frsize < FREE_BYTES_MIN


def _check_schema(value: bytes | None) -> None:
    (schema,) = _LSN.unpack(value or b"")
    if schema > SCHEMA:
        raise SchemaTooNewError(f"the log has schema {schema}, this build reads up to {SCHEMA}")


def _seek(cursor: Any, lsn: int) -> bool:
    """Put the cursor on the block that holds lsn, or on the first after it."""
    if cursor.set_range(_LSN.pack(lsn)):
        if _LSN.unpack(cursor.key())[0] == lsn:
            return True
        if cursor.prev():
            return True
        return bool(cursor.first())
    return bool(cursor.last())


def _tail(txn: Any, table: Any = None) -> Tail:
    value = txn.get(b"tail", db=table) if table is not None else txn.get(b"tail")
    return Tail(*_TAIL.unpack(value)) if value else _EMPTY_TAIL


def _head(txn: Any, name: str, table: Any = None) -> int:
    value = txn.get(name.encode(), db=table) if table is not None else txn.get(name.encode())
    return int(_LSN.unpack(value)[0]) if value else 0
