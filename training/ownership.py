"""Who may write to the learner's folder: one process at a time, and never one that was replaced.

A lock keeps a second learner out while the first one lives. The epoch, a number on disk that rises with each start,
keeps out a first one that comes back after somebody broke its lock: it finds a newer epoch and stops.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from training.snapshots import write_durably


class FolderOwnedError(Exception):
    """Another learner process lives in this folder."""


class EpochFencedError(Exception):
    """A newer learner process has taken over; this one must write nothing more."""


class Ownership:
    """The right to write to one folder, from the constructor to close().

    Raises:
        FolderOwnedError: names the owner's process id.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "epoch"
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise FolderOwnedError(f"{folder} belongs to the learner process {owner}") from error
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())
        self.epoch = 0

    def begin_epoch(self, above: int) -> None:
        """Take the next epoch, greater than the one on disk and than ``above``; durable on return."""
        self.epoch = max(self._epoch_on_disk(), above) + 1
        write_durably(self._path, f"{self.epoch}\n".encode())

    def verify(self) -> None:
        """Make sure that the epoch on disk is still ours. Cost: about 20 µs.

        Raises:
            EpochFencedError: it is not.
        """
        on_disk = self._epoch_on_disk()
        if on_disk != self.epoch:
            raise EpochFencedError(f"epoch {self.epoch} was succeeded by {on_disk}")

    def close(self) -> None:
        """Let another process in."""
        os.close(self._lock)

    def _epoch_on_disk(self) -> int:
        try:
            return int(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return 0  # lost or damaged: snapshots know the epoch they were written in
