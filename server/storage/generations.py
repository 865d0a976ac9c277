"""Where an LMDB environment lies when its file is replaced under everybody's hands: in numbered generations.

A file of LMDB keeps the bytes of what was deleted, in free pages and inside of pages. To let them go, what is alive is
copied row by row into the next generation, a folder of its own, and the old file is removed. Nobody is told: the last
change of the old environment is a mark that names its successor, and every transaction of every process looks for it.
Handed a folder, this opens the generation in force, follows marks, and makes a successor; it knows nothing of what the
tables hold.

Generation 0 lies in the folder itself, the others in subfolders of ten digits; the newest is in force. The commit of
the mark is the one moment of the switch: before it a successor is unfinished and worth nothing, after it whoever meets
the mark gives the successor its final name. So a kill at any step leaves one generation whole and in force:

    step           done before it                        after a kill here
    copy, sync     part of the successor                 the old one is in force, the rest is swept
    mark           the whole successor, on disk          the old one is in force, the successor is swept
    rename         the mark, on disk                     whoever meets the mark renames
    fsync_folder   the rename                            the new one is in force, the old one is swept
    unlink         the rename, on disk                   the new one is in force, the old one is swept

Cost sketch: looking for the mark costs each transaction one get, 0.15 µs. Following it costs 1 ms, once a switch.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import lmdb

from server.storage.successor import META, READERS_MAX, AtStep, Successor, sync_folder

STEPS: Final = ("copy", "sync", "mark", "rename", "fsync_folder", "unlink")
ATTEMPTS_MAX: Final = 3  # at copying, when what was copied already is changed meanwhile

_DATA_FILE, _LOCK_FILE = "data.mdb", "lock.mdb"
_OWNER_FILE = "compact.lock"  # held by the one who compacts; stays when one ever did
_UNFINISHED = ".unfinished"
_FINISHED_NAME = re.compile(r"\d{10}")
_MARK = b"moved"
_NUMBER = struct.Struct(">Q")

K = TypeVar("K")


class MovedError(Exception):
    """The environment was left; a newer generation is in force."""


class CompactionRunningError(Exception):
    """Another process, or thread, compacts this folder now."""


class NotCopiedError(Exception):
    """The environment could not be compacted; it is in force and as it was."""


class MarkError(Exception):
    """The disk refused the mark, and whether it stands is unknown; either generation is whole, one is in force."""


class Generation(NamedTuple, Generic[K]):
    """One open environment. It stays open as long as anybody holds it or a transaction of it.

    Never closed while others may be inside: dropping the last reference closes it.
    """

    number: int
    environment: lmdb.Environment
    meta: Any
    tables: dict[K, Any]


def newest(folder: Path) -> int:
    """Return the number of the generation in force, 0 where there are no subfolders."""
    return max((int(path.name) for path in _finished(folder)), default=0)


def path_of(folder: Path, number: int) -> Path:
    """Return where a generation lies."""
    return folder / f"{number:010d}" if number else folder


def is_made(folder: Path) -> bool:
    """Say whether there is an environment to open."""
    return folder.exists() and (path_of(folder, newest(folder)) / _DATA_FILE).exists()


def is_moved(txn: lmdb.Transaction, meta: Any) -> bool:
    """Say whether a transaction is one of an environment that was left. Cost: one get, 0.15 µs."""
    return txn.get(_MARK, db=meta) is not None


def stop_if_moved(txn: lmdb.Transaction, meta: Any) -> None:
    """Raise MovedError in a transaction of an environment that was left. Cost: one get, 0.15 µs."""
    if txn.get(_MARK, db=meta) is not None:
        raise MovedError


class Generations(Generic[K]):
    """The generation in force of one folder, opened at most once in each process, by any number of its threads.

    Args:
        folder: made when absent.
        map_bytes: the most a generation may ever hold; sparse, so large costs nothing.
        tables_max: how many tables it may have.
        open_tables: opens the tables of an environment, handed with its number, making what is missing where that may
            be.
        writable: false for readers of what exists.

    Attributes:
        now: the newest generation as far as this process has noticed. Whoever uses it looks for the mark in its
            transaction, and calls follow() with it when there is one.

    Raises:
        lmdb.Error: the files cannot be opened, or the newest are gone.
    """

    def __init__(
        self,
        folder: Path,
        map_bytes: int,
        tables_max: int,
        open_tables: Callable[[lmdb.Environment, int], dict[K, Any]],
        *,
        writable: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._map_bytes = map_bytes
        self._tables_max = tables_max
        self._open_tables = open_tables
        self._writable = writable
        self._following = threading.Lock()
        self.now = self._open()
        if writable and (folder / _OWNER_FILE).exists():
            with contextlib.suppress(CompactionRunningError), self._owning():
                self._sweep()

    def follow(self, left: Generation[K]) -> None:
        """Have the newest generation open after a transaction of ``left`` met the mark.

        The one that was left closes by itself, with the last transaction of this process that is still inside.
        """
        with self._following:
            if self.now is left:  # or another thread was here before
                with left.environment.begin() as txn:
                    _finish(self._folder, _marked(txn, left.meta))
                self.now = self._open()

    def close(self) -> None:
        """Let go of files; nothing may be called afterwards."""
        self.now.environment.close()

    def compact(
        self,
        names: Iterable[bytes],
        copy: Callable[[Generation[K], Successor], Callable[[lmdb.Transaction], bool]],
        at_step: AtStep,
    ) -> None:
        """Replace the environment by one that holds what is alive and no byte of anything else, and remove the old.

        Args:
            names: of all tables.
            copy: is handed the generation in force and its successor and fills the latter, while others write; returns
                what finishes it once they cannot: handed the write transaction, it completes the successor, or says
                by False that it has to be filled anew.
            at_step: called before each step with its name, of STEPS; "copy" and "sync" come several times. What it
                raises ends the work there.

        Raises:
            CompactionRunningError: somebody else compacts; nothing was changed.
            NotCopiedError: the volume is full or refuses, or what was copied was changed meanwhile, at each attempt;
                nothing was changed.
            MarkError: the disk refused the mark.
            lmdb.Error, OSError: after the mark. What is missing of the switch is made up for by the next who opens or
                compacts.
        """
        with self._owning():
            self._sweep()
            left = self.now
            unfinished = _unfinished(self._folder, left.number + 1)
            try:
                self._make(unfinished, names, copy, at_step)
            except (lmdb.Error, OSError) as error:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise NotCopiedError(str(error)) from error
            _finish(self._folder, left.number + 1, at_step)
            self.follow(left)
            at_step("unlink")
            self._sweep()

    def _make(
        self,
        unfinished: Path,
        names: Iterable[bytes],
        copy: Callable[[Generation[K], Successor], Callable[[lmdb.Transaction], bool]],
        at_step: AtStep,
    ) -> None:
        """Make the successor and leave the mark; where the copy has to be made anew, a bounded number of times."""
        for _ in range(ATTEMPTS_MAX):
            successor = Successor(unfinished, self._map_bytes, names, at_step)
            try:
                complete = copy(self.now, successor)
                successor.sync()  # nearly everything, so that little is left to do while others wait
                if self._switch(successor, complete, at_step):
                    return
            finally:
                successor.close()
        raise OSError("what was copied was changed meanwhile, at every attempt")

    def _switch(self, successor: Successor, complete: Callable[[lmdb.Transaction], bool], at_step: AtStep) -> bool:
        """Complete the successor and leave the mark, in one transaction that keeps all other writers out."""
        left = self.now
        txn = left.environment.begin(write=True)
        try:
            if not complete(txn):
                txn.abort()
                return False
            successor.sync()
            successor.close()
            at_step("mark")
            txn.put(_MARK, _NUMBER.pack(left.number + 1), db=left.meta)
        except BaseException:
            txn.abort()
            raise
        try:
            txn.commit()
        except lmdb.Error as error:
            raise MarkError(str(error)) from error
        return True

    def _open(self) -> Generation[K]:
        while True:
            number = newest(self._folder)
            try:
                environment = self._open_environment(number)
            except lmdb.Error:
                if newest(self._folder) == number:
                    raise
                continue  # it was left, and removed, a moment ago
            try:
                # Asked again: a path that was left a moment ago would have been opened as an empty environment.
                if newest(self._folder) == number:
                    tables = self._open_tables(environment, number)
                    meta = environment.open_db(META, create=False)
                    with environment.begin() as txn:
                        moved_to = _marked(txn, meta)
                    if not moved_to:
                        return Generation(number, environment, meta, tables)
                    _finish(self._folder, moved_to)
            except BaseException:
                environment.close()  # or nobody in this process could open the folder again
                raise
            environment.close()

    def _open_environment(self, number: int) -> lmdb.Environment:
        path = path_of(self._folder, number)
        # What was compacted is never begun anew in silence: its newest generation would have been lost.
        if (number or (self._folder / _OWNER_FILE).exists()) and not (path / _DATA_FILE).exists():
            raise lmdb.Error(f"generation {number} is gone")
        environment = lmdb.open(
            str(path),
            map_size=self._map_bytes,
            max_dbs=self._tables_max,
            max_readers=READERS_MAX,
            max_spare_txns=8,
            create=False,
            readonly=not self._writable,
            sync=True,
            metasync=True,
            writemap=False,
            # Fresh pages begin zeroed: else they would carry to disk what this process had in memory, persons included.
            meminit=True,
        )
        environment.reader_check()
        return environment

    @contextlib.contextmanager
    def _owning(self) -> Iterator[None]:
        """Be the only one who compacts or sweeps this folder."""
        with (self._folder / _OWNER_FILE).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CompactionRunningError("another compaction of this folder is running") from error
            yield

    def _renew(self) -> None:
        """Have the generation in force open; by the owner, so that it remains so."""
        while True:
            now = self.now
            with now.environment.begin() as txn:
                if not is_moved(txn, now.meta):
                    return
            self.follow(now)

    def _sweep(self) -> None:
        """Remove what is not in force; by the owner. Who still has it open is not disturbed."""
        self._renew()  # a mark that was left just now gives an unfinished successor its worth
        for path in self._folder.iterdir():
            if path.name.endswith(_UNFINISHED):
                shutil.rmtree(path)
        for path in _finished(self._folder):
            if int(path.name) < self.now.number:
                (path / _DATA_FILE).unlink(missing_ok=True)
                # Somebody may be opening the path just now; what that leaves is empty and goes with the next sweep.
                shutil.rmtree(path, ignore_errors=True)
        if self.now.number:
            for name in (_DATA_FILE, _LOCK_FILE):
                (self._folder / name).unlink(missing_ok=True)
        sync_folder(self._folder)


def _finished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _FINISHED_NAME.fullmatch(path.name)]


def _unfinished(folder: Path, number: int) -> Path:
    path = path_of(folder, number)
    return path.with_name(path.name + _UNFINISHED)


def _marked(txn: lmdb.Transaction, meta: Any) -> int:
    """Return the generation that an environment was left for, 0 while it is in force."""
    value = txn.get(_MARK, db=meta)
    return int(_NUMBER.unpack(value)[0]) if value is not None else 0


def _finish(folder: Path, number: int, at_step: AtStep = lambda _step: None) -> None:
    """Give a marked successor its final name, durably; done by whoever comes first, and by others without effect."""
    at_step("rename")
    try:
        if not path_of(folder, number).exists():
            _unfinished(folder, number).rename(path_of(folder, number))
    except OSError as error:
        if newest(folder) < number:
            raise lmdb.Error(f"generation {number} is gone") from error
    at_step("fsync_folder")
    sync_folder(folder)
