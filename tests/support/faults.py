"""Ports that fail by script: a log whose n-th append raises or waits, a store whose n-th change is the last.

Each wraps a real engine, so that whatever is not in the script behaves as the contract says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from server.storage.committer import GroupCommitter, _Queued
from server.storage.log import Fate, LogUnavailableError, Receipt
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from server.storage.store import Snapshot, Store, Table, Transaction

WAIT_S_MAX = 30.0  # of any wait in a test: far above what it takes, so that only a defect reaches it


class Gate:
    """A point that a thread waits at until the test lets it go on."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def pass_through(self) -> None:
        self._reached.set()
        assert self._opened.wait(WAIT_S_MAX), "nobody opened the gate"

    def wait_until_reached(self) -> None:
        assert self._reached.wait(WAIT_S_MAX), "nobody came to the gate"

    def open(self) -> None:
        self._opened.set()


class RecordsThenFailsError(LogUnavailableError):
    """The group is on disk, and the disk says that it is not."""


class FaultyLog(MemoryLog):
    """A log in memory that follows a script.

    Args:
        script: what happens at which append, counted from 1: an error is raised instead of appending (after it, for
            RecordsThenFailsError), a gate is waited at before appending.

    Attributes:
        groups: the drafts each append was handed, in order; failed ones included.
    """

    def __init__(self, script: Mapping[int, Exception | Gate] | None = None) -> None:
        super().__init__()
        self.groups: list[list[Draft]] = []
        self._script = dict(script or {})

    def append(self, drafts: Sequence[Draft], wall_us: int) -> list[Receipt]:
        self.groups.append(list(drafts))
        fault = self._script.get(len(self.groups))
        if isinstance(fault, Gate):
            fault.pass_through()
        elif isinstance(fault, RecordsThenFailsError):
            super().append(drafts, wall_us)
            raise fault
        elif fault is not None:
            raise fault
        return super().append(drafts, wall_us)


class HastyCommitter(GroupCommitter):
    """The negative control: acknowledges a group before it is on disk."""

    def _commit(self, group: list[_Queued]) -> None:
        self._deliver(group, [Receipt(Fate.RECORDED, 0, 0)] * len(group))
        super()._commit(group)


class KilledError(Exception):
    """The process would be gone here."""


class MortalStore:
    """A store whose writer is killed before its n-th change.

    Args:
        store: the real engine.
        n_changes: how many puts and deletes succeed in all.
        is_atomic: false breaks the engine's promise: changes made before the kill stay.
    """

    def __init__(self, store: Store, n_changes: int, *, is_atomic: bool = True) -> None:
        self._store = store
        self.left = n_changes
        self._is_atomic = is_atomic

    def read(self) -> AbstractContextManager[Snapshot]:
        return self._store.read()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        killed: KilledError | None = None
        with self._store.write() as txn:
            try:
                yield _MortalTransaction(self, txn)
            except KilledError as error:
                if self._is_atomic:
                    raise
                killed = error
        if killed is not None:
            raise killed

    def close(self) -> None:
        self._store.close()


class _MortalTransaction:
    def __init__(self, store: MortalStore, txn: Transaction) -> None:
        self._store = store
        self._txn = txn

    def get(self, table: Table, key: bytes) -> memoryview | bytes | None:
        return self._txn.get(table, key)

    def scan(
        self, table: Table, prefix: bytes = b"", *, start: bytes = b"", reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        return self._txn.scan(table, prefix, start=start, reverse=reverse)

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        self._live_on()
        self._txn.put(table, key, value)

    def delete(self, table: Table, key: bytes) -> bool:
        self._live_on()
        return self._txn.delete(table, key)

    def _live_on(self) -> None:
        if self._store.left == 0:
            raise KilledError
        self._store.left -= 1
