"""What the processes of one server tell each other without talking: heartbeats and the latch, in one small shared file.

Each role has a slot and writes the monotonic clock into it from its main loop; the supervisor replaces a role that
falls silent. The latch is raised by the first process whose log write failed: from then on nobody acknowledges anything
until the supervisor has opened and verified the log anew. Each worker also says which configuration it serves, so that
a push can answer when all of them do. Eight bytes are written at once, so no reader sees half a number. And how a role
leaves: at once.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, Self

SLOTS_MAX: Final = 300
BEAT_S: Final = 0.25
SILENT_S_MAX: Final = 3.0
ABSENT_S_MIN: Final = 1.0  # a worker silent for so long is not waited for
TURN_S_MAX: Final = 30.0  # a loop that waits for a disk may take so long for one turn

_WORD: Final = struct.Struct("<Q")
_LATCH: Final = 0


def leave(exit_code: int) -> NoReturn:
    """End this process at once, once all that must last is closed and no thread of ours runs.

    Freeing every module and compiled kernel one by one, as the interpreter would, takes 0.4 s that a restart waits for.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class ControlPage:
    """One open control page.

    Args:
        path: the shared file; made when absent.
    """

    def __init__(self, path: Path) -> None:
        size = _WORD.size * (1 + 2 * SLOTS_MAX)
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a hole would kill its writer on a full volume
            self._map = mmap.mmap(file.fileno(), size)

    def beat(self, slot: int) -> None:
        """Say that this role's main loop turns."""
        self._write(1 + slot, time.monotonic_ns())

    def forget(self, slot: int) -> None:
        """Clear a slot, before its role starts: no beat yet, and nothing served."""
        self._write(1 + slot, 0)
        self._write(1 + SLOTS_MAX + slot, 0)

    def serve(self, slot: int, lsn: int) -> None:
        """Say that this worker serves the configuration of an LSN; 0: it has none yet."""
        self._write(1 + SLOTS_MAX + slot, 1 + lsn)

    def is_served(self, lsn: int) -> bool:
        """Say whether every worker that is alive serves the configuration of this LSN, or a newer one."""
        served = (self._read(1 + SLOTS_MAX + slot) for slot in range(SLOTS_MAX) if self.silent_s(slot) < ABSENT_S_MIN)
        return all(1 + lsn <= one for one in served if one)

    def silent_s(self, slot: int) -> float:
        """Return for how long a role has been silent; 0 before its first beat."""
        beaten = self._read(1 + slot)
        return (time.monotonic_ns() - beaten) / 1e9 if beaten else 0.0

    @property
    def is_latched(self) -> bool:
        """Say whether a log write has failed since the log was last verified."""
        return self._read(_LATCH) != 0

    def latch(self) -> None:
        """Raise the latch."""
        self._write(_LATCH, 1)

    def unlatch(self) -> None:
        """Lower the latch; the supervisor's alone, after it has verified the log."""
        self._write(_LATCH, 0)

    def _write(self, index: int, value: int) -> None:
        self._map[_WORD.size * index : _WORD.size * (index + 1)] = _WORD.pack(value)

    def _read(self, index: int) -> int:
        return int(_WORD.unpack_from(self._map, _WORD.size * index)[0])


class Heart:
    """Beats for a role whose loop waits for the disk itself, from a thread of its own.

    A commit on a busy disk may take longer than a role may be silent, and to kill the role would only make it begin
    again. So the loop says at each turn that it turns, and the heart beats on as long as it said so lately. A process
    that is stopped, or holds the interpreter lock for good, falls silent at once all the same.

    Args:
        beat: beats once.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._turned = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def turn(self) -> None:
        """Say that the loop turns. Cost: a clock reading."""
        self._turned = time.monotonic()

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            if time.monotonic() - self._turned < TURN_S_MAX:
                self._beat()
