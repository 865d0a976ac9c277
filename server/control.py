"""What the processes of one server tell each other without talking: heartbeats and the latch, in one small shared file.

Each role has a slot and writes the monotonic clock into it from its main loop; the supervisor replaces a role that
falls silent. The latch is raised by the first process whose log write failed: from then on nobody acknowledges anything
until the supervisor has opened and verified the log anew. Eight bytes are written at once, so no reader sees half a
number.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path
from typing import Final

SLOTS_MAX: Final = 300
BEAT_S: Final = 0.25
SILENT_S_MAX: Final = 3.0

_WORD: Final = struct.Struct("<Q")
_LATCH: Final = 0


class ControlPage:
    """One open control page.

    Args:
        path: the shared file; made when absent.
    """

    def __init__(self, path: Path) -> None:
        size = _WORD.size * (SLOTS_MAX + 1)
        with path.open("a+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)

    def beat(self, slot: int) -> None:
        """Say that this role's main loop turns."""
        self._write(1 + slot, time.monotonic_ns())

    def forget(self, slot: int) -> None:
        """Clear a slot, before its role starts: no beat yet."""
        self._write(1 + slot, 0)

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
