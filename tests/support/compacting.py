"""A program that has a log or a state open while somebody compacts it, and does one thing a line of standard input.

Run as ``python -m tests.support.compacting KIND FOLDER MAP_BYTES``; KIND is ``log``, ``reader`` (of a log), ``state``.
It answers each line by one: ``append``, ``read``, ``spent``, ``verify``, ``hold`` (a snapshot of the state), ``held``,
``rows``, and ``compact STEP N``, which ends the process where that step is met for the n-th time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbSnapshot, LmdbStore
from server.storage.log import follow
from server.storage.record import Draft, Spend
from server.storage.store import Table
from tests.support.faults import WAIT_S_MAX
from tsugi.log.v1.record_pb2 import RecordKind

GROUP_RECORDS = 3
KILLED = 9  # the exit code of one that ended at its step
NOW_US = 1_760_000_000_000_000
APPENDED = b"appended meanwhile"  # the payload of what a program appends
COUNTER = b"counter-of-them-"  # every record of a program adds 1

_ROOT = Path(__file__).parents[2]


class Program:
    """The program in a process of its own."""

    def __init__(self, kind: str, folder: Path, map_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.compacting", kind, str(folder), str(map_bytes)],
            cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        assert self.answer() == "ready"
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._process.communicate(timeout=WAIT_S_MAX)
        finally:
            self._process.kill()

    def ask(self, request: str) -> str:
        """Have it do something and return what it says; "" when it ended instead."""
        self.tell(request)
        return self.answer()

    def tell(self, request: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def exit_code(self) -> int:
        return self._process.wait(WAIT_S_MAX)


def killer(step: str, nth: int, end: Callable[[], None]) -> Callable[[str], None]:
    """Return what ends the work where a step is met for the n-th time, from 1."""
    left = nth

    def at_step(name: str) -> None:
        nonlocal left
        left -= name == step
        if name == step and left == 0:
            end()

    return at_step


def _die() -> None:
    os._exit(KILLED)


class _LogProgram:
    def __init__(self, folder: Path, map_bytes: int, *, writable: bool) -> None:
        self._log = LmdbLog(folder, map_bytes, writable=writable)
        self._n_appended = 0
        self._read_lsn = 0

    def append(self) -> str:
        """Append a group under keys of this process; say each key and where it stands."""
        drafts = []
        for _ in range(GROUP_RECORDS):
            self._n_appended += 1
            key = os.getpid().to_bytes(8, "big") + self._n_appended.to_bytes(8, "big")
            draft = Draft(RecordKind.RECORD_KIND_OUTCOME, APPENDED, key, subjects=(b"m" * 16,))
            drafts.append(draft._replace(spends=(Spend(COUNTER, 1, None),)))
        receipts = self._log.append(drafts, NOW_US)
        return " ".join(f"{draft.key.hex()}:{receipt.lsn}" for draft, receipt in zip(drafts, receipts, strict=True))

    def read(self) -> str:
        """Read on from where it left off; say from where to where."""
        records = list(follow(self._log, self._read_lsn + 1))
        assert [record.lsn for record in records] == list(range(self._read_lsn + 1, self._log.tail().lsn + 1))
        self._read_lsn += len(records)
        return str(self._read_lsn)

    def spent(self) -> str:
        return str(self._log.spent([COUNTER])[0])

    def verify(self) -> str:
        return str(self._log.verify().lsn)

    def compact(self, step: str, nth: str) -> str:
        self._log.compact(killer(step, int(nth), _die))
        return "compacted"


class _StateProgram:
    def __init__(self, folder: Path, map_bytes: int) -> None:
        self._store = LmdbStore(folder, map_bytes)
        self._held: LmdbSnapshot | None = None

    def hold(self) -> str:
        self._held = self._store.read()
        return "held"

    def held(self) -> str:
        """Say what the snapshot holds, and let go of it."""
        assert self._held is not None
        with self._held as snapshot:
            return _said(snapshot)

    def rows(self) -> str:
        with self._store.read() as snapshot:
            return _said(snapshot)

    def compact(self, step: str, nth: str) -> str:
        self._store.compact(killer(step, int(nth), _die))
        return "compacted"


def _said(snapshot: LmdbSnapshot) -> str:
    return " ".join(f"{key.hex()}={len(value)}" for key, value in snapshot.scan(Table.PROFILES))


def main(kind: str, folder: Path, map_bytes: int) -> None:
    """Do what each line says, to the end of input."""
    program: object = (
        _StateProgram(folder, map_bytes) if kind == "state" else _LogProgram(folder, map_bytes, writable=kind == "log")
    )
    _say("ready")
    for line in sys.stdin:
        name, *arguments = line.split()
        _say(_called(program, name, arguments))


def _called(program: object, name: str, arguments: Sequence[str]) -> str:
    return str(getattr(program, name)(*arguments))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
