"""The store on LMDB: one environment, written by the projector, read by every worker through the page cache.

What was deleted leaves the files when the environment is compacted, which every reader notices at its next read
(generations.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import lmdb

from server.storage.generations import Generation, Generations, NotCopiedError, is_moved
from server.storage.store import Table
from server.storage.successor import AtStep, Successor

_NAMES = tuple(table.value.encode() for table in Table)


class LmdbStore:
    """A store in one folder, opened at most once in each process."""

    def __init__(self, folder: Path, map_bytes: int) -> None:
        """Open the store, making it when the folder is empty.

        Raises:
            lmdb.Error: the files cannot be opened; the folder may be deleted, it is rebuilt from the log.
        """
        self._generations = Generations(folder, map_bytes, len(Table), _made_tables)

    def read(self) -> LmdbSnapshot:
        """See Store."""
        while True:
            now = self._generations.now
            txn = now.environment.begin(buffers=True)
            if not is_moved(txn, now.meta):
                return LmdbSnapshot(txn, now.tables)
            txn.abort()
            self._generations.follow(now)

    @contextmanager
    def write(self) -> Iterator[LmdbSnapshot]:
        """See Store."""
        while True:
            now = self._generations.now
            with now.environment.begin(write=True, buffers=True) as txn:
                if not is_moved(txn, now.meta):
                    yield LmdbSnapshot(txn, now.tables)
                    return
            self._generations.follow(now)

    def compact(self, at_step: AtStep = lambda _step: None) -> None:
        """Have no file of the folder hold a byte of what was deleted; by the one who writes, between its writes.

        Readers go on; each notices at its next read, until which its process keeps the old file's space. A kill at any
        step leaves the state whole.

        Args:
            at_step: called before each step with its name, see generations.STEPS; "copy" comes every few milliseconds.
                What it raises ends the work there.

        Raises:
            CompactionRunningError: somebody else compacts; nothing was changed.
            NotCopiedError: no space, or somebody wrote meanwhile; nothing was changed.
            MarkError: the disk refuses.

        Cost: some 5 s a GB; the space of a second state.
        """
        self._generations.compact(_NAMES, _copy, at_step)

    def check_readers(self) -> None:
        """Free the slots of readers that died, and the file that a compaction left behind; every few seconds."""
        self.read().__exit__()
        self._generations.now.environment.reader_check()

    def close(self) -> None:
        """See Store."""
        self._generations.close()


def _made_tables(environment: lmdb.Environment, _number: int) -> dict[Table, Any]:
    return {table: environment.open_db(table.value.encode()) for table in Table}


def _copy(left: Generation[Table], successor: Successor) -> Callable[[Any], bool]:
    """Copy everything; what completes it has only to look whether somebody has written since."""
    with left.environment.begin() as txn:
        begun_id = txn.id()
    for table, handle in left.tables.items():
        successor.copy(left.environment, handle, table.value.encode())

    def complete(txn: Any) -> bool:
        if txn.id() != begun_id + 1:  # a transaction that changed something takes an id
            return False
        for table, handle in left.tables.items():
            if successor.rows(table.value.encode()) != txn.stat(handle)["entries"]:
                raise NotCopiedError(f"table {table.value} was not copied whole")
        return True

    return complete


class LmdbSnapshot:
    """See Transaction: one LMDB transaction, reading or writing."""

    __slots__ = ("_tables", "_txn")

    def __init__(self, txn: Any, tables: dict[Table, Any]) -> None:
        self._txn = txn
        self._tables = tables

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._txn.abort()  # of reading; what was written has been committed by then
        # Whoever keeps the snapshot, as an exception keeps its frames, must not keep an old generation's file open.
        self._txn, self._tables = None, {}

    def get(self, table: Table, key: bytes) -> memoryview | None:
        """See Snapshot."""
        value: memoryview | None = self._txn.get(key, db=self._tables[table])
        return value

    def scan(
        self, table: Table, prefix: bytes = b"", *, start: bytes = b"", reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """See Snapshot."""
        cursor = self._txn.cursor(self._tables[table])
        found = _before(cursor, start or prefix, is_start=bool(start)) if reverse else cursor.set_range(start or prefix)
        while found:
            key = bytes(cursor.key())
            if not key.startswith(prefix):
                return
            yield key, bytes(cursor.value())
            found = cursor.prev() if reverse else cursor.next()

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """See Transaction."""
        assert 1 <= len(key) <= 511, "keys are 1 to 511 bytes on every engine"
        self._txn.put(key, value, db=self._tables[table])

    def delete(self, table: Table, key: bytes) -> bool:
        """See Transaction."""
        return bool(self._txn.delete(key, db=self._tables[table]))


def _before(cursor: Any, key: bytes, *, is_start: bool) -> bool:
    """Put the cursor on the last pair not after a key, or with a mere prefix on the last that starts with it."""
    if is_start:
        if cursor.set_range(key):
            return bytes(cursor.key()) == key or bool(cursor.prev())
        return bool(cursor.last())
    following = key.rstrip(b"\xff")
    if not following:
        return bool(cursor.last())
    following = following[:-1] + bytes((following[-1] + 1,))
    return bool(cursor.prev()) if cursor.set_range(following) else bool(cursor.last())
