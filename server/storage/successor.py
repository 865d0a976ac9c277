"""The next generation of an LMDB environment while it is being filled: rows are put into it, then it is closed on disk.

It is handed rows and where to put them; it decides neither when it is whole nor when it is in force.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import lmdb

META: Final = b"meta"  # every environment that has generations has this table
READERS_MAX: Final = 1024

_CHUNK_BYTES_MAX = 4 * 1024 * 1024  # copied in one transaction, so that none is open for long
_ROW_BYTES = 100  # what a row costs beside its bytes, in time

AtStep = Callable[[str], None]


class Successor:
    """The next generation while it is being filled. Nobody else sees it, and a kill leaves nothing of worth.

    Its pages begin zeroed and take nothing but rows handed to it, so its file holds no byte of anything else.

    Args:
        path: where to make it; what lies there is removed.
        map_bytes: the most it may hold.
        names: of its tables.
        at_step: called before each step with its name; what it raises ends the work there, as a kill would.
    """

    def __init__(self, path: Path, map_bytes: int, names: Iterable[bytes], at_step: AtStep) -> None:
        self._path = path
        self._at_step = at_step
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        names = {META, *names}
        self._is_open = True
        self._environment = lmdb.open(
            str(path), map_size=map_bytes, max_dbs=len(names), max_readers=READERS_MAX, sync=False, meminit=True
        )
        self._tables = {name: self._environment.open_db(name) for name in names}

    def write(self, name: bytes, rows: Iterable[tuple[Any, Any]], *, append: bool = False) -> None:
        """Put rows into a table.

        Args:
            name: of the table.
            rows: (key, value), any bytes-like; a later value stands.
            append: their keys ascend and are above all others, which fills pages to the brim.
        """
        with self._environment.begin(write=True) as txn:
            txn.cursor(self._tables[name]).putmulti(rows, append=append)

    def copy(self, source: lmdb.Environment, table: Any, name: bytes, until: bytes | None = None) -> None:
        """Copy a table, or its keys up to and including one, in short transactions on either side.

        What others change meanwhile behind the place that is reached is missed; the caller makes up for it.
        """
        last: bytes | None = None
        while True:
            self._at_step("copy")
            with source.begin(db=table, buffers=True) as txn:
                cursor = txn.cursor()
                if not _seek_after(cursor, last):
                    return
                rows = _Rows(cursor, until)
                self.write(name, rows, append=True)
                last = rows.last
                if rows.is_end:
                    return

    def rows(self, name: bytes) -> int:
        """Return how many rows a table has."""
        with self._environment.begin() as txn:
            return int(txn.stat(self._tables[name])["entries"])

    def sync(self) -> None:
        """Put everything written so far on disk."""
        self._at_step("sync")
        self._environment.sync(True)

    def close(self) -> None:
        """Let go of the files, and have them found after a power cut."""
        if self._is_open:
            self._is_open = False
            self._environment.close()
            sync_folder(self._path)
            sync_folder(self._path.parent)


def sync_folder(path: Path) -> None:
    """Have names of a folder found after a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Rows:
    """The rows from a cursor on, up to a bound; afterwards it says how far it came.

    Attributes:
        last: the last key.
        is_end: whether there are no more.
    """

    def __init__(self, cursor: Any, until: bytes | None) -> None:
        self._cursor = cursor
        self._until = until
        self.last: bytes | None = None
        self.is_end = False

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        n_bytes = 0
        for key, value in self._cursor:
            if self._until is not None and bytes(key) > self._until:
                break
            yield key, value
            n_bytes += _ROW_BYTES + len(key) + len(value)
            if n_bytes >= _CHUNK_BYTES_MAX:
                self.last = bytes(key)
                return
        self.is_end = True


def _seek_after(cursor: Any, key: bytes | None) -> bool:
    """Put a cursor on the first row after a key, on the very first for None."""
    if key is None:
        return bool(cursor.first())
    if not cursor.set_range(key):
        return False
    return bool(cursor.next()) if cursor.key() == key else True
