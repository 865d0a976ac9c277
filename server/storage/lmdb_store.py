"""The store on LMDB: one environment, written by the projector, read by every worker through the page cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import lmdb

from server.storage.store import Table

_READERS_MAX = 1024


class LmdbStore:
    """A store in one folder, opened at most once in each process."""

    def __init__(self, folder: Path, map_bytes: int) -> None:
        """Open the store, making it when the folder is empty.

        Raises:
            lmdb.Error: the files cannot be opened; the folder may be deleted, it is rebuilt from the log.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(
            str(folder),
            map_size=map_bytes,
            max_dbs=len(Table),
            max_readers=_READERS_MAX,
            max_spare_txns=8,
            sync=True,
            metasync=True,
            writemap=False,
            meminit=False,
        )
        self._env.reader_check()
        self._tables = {table: self._env.open_db(table.value.encode()) for table in Table}

    def read(self) -> LmdbSnapshot:
        """See Store."""
        return LmdbSnapshot(self._env.begin(buffers=True), self._tables)

    @contextmanager
    def write(self) -> Iterator[LmdbSnapshot]:
        """See Store."""
        with self._env.begin(write=True, buffers=True) as txn:
            yield LmdbSnapshot(txn, self._tables)

    def close(self) -> None:
        """See Store."""
        self._env.close()


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

    def get(self, table: Table, key: bytes) -> memoryview | None:
        """See Snapshot."""
        value: memoryview | None = self._txn.get(key, db=self._tables[table])
        return value

    def scan(self, table: Table, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """See Snapshot."""
        cursor = self._txn.cursor(self._tables[table])
        found = cursor.set_range(prefix) if prefix else cursor.first()
        while found:
            key = bytes(cursor.key())
            if not key.startswith(prefix):
                return
            yield key, bytes(cursor.value())
            found = cursor.next()

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """See Transaction."""
        assert 1 <= len(key) <= 511, "keys are 1 to 511 bytes on every engine"
        self._txn.put(key, value, db=self._tables[table])

    def delete(self, table: Table, key: bytes) -> bool:
        """See Transaction."""
        return bool(self._txn.delete(key, db=self._tables[table]))
