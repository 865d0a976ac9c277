"""The learner process's durable state on disk: files that are whole or absent, and the newest that is to be trusted.

A file is a magic number, a format version, the sha256 of the message, and the message, a LearnerSnapshot. It is written
under another name, synced, read back, renamed, and its folder synced, so that a kill at any moment leaves the old state
or the new one. Whatever does not prove itself is set aside with the reason, and the one before it is taken: replaying
the log from there gives the same state.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from server.storage.log import Log
from tsugi.log.v1.learner_pb2 import LearnerSnapshot

FORMAT_VERSION: Final = 2
SNAPSHOTS_KEPT: Final = 3

_HEAD = struct.Struct("<8sI32s")
_MAGIC = b"TSUGILRN"
_SUFFIX = ".snapshot"
_UNFINISHED = ".unfinished"
_REFUSED = ".refused"

AtStep = Callable[[str], None]


class SnapshotRefusedError(Exception):
    """A snapshot that must not be gone on from."""


def write_durably(path: Path, data: bytes, at_step: AtStep = lambda _step: None) -> None:
    """Put data under a name: afterwards, and after a kill or power cut, the name holds the old content or all of data.

    Args:
        path: replaced when it exists.
        data: the whole content.
        at_step: called before each step with its name; what it raises ends the write there, as a kill would.

    Raises:
        OSError: the volume is full or refuses; the old content stands.

    Cost: two fsyncs, one write and one read of data.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        at_step("write")
        file.write(data)
        at_step("fsync")
        file.flush()
        os.fsync(file.fileno())
    at_step("verify")
    if unfinished.read_bytes() != data:
        raise OSError(f"{unfinished.name} did not read back as written")
    at_step("rename")
    unfinished.replace(path)
    at_step("fsync_folder")
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Snapshots:
    """The snapshots of one folder, made of one log.

    Args:
        folder: exists; nobody else writes to it.
        log: the log the state is of.
        arithmetic: what makes the numbers; a snapshot that names another is refused.
        at_step: see write_durably.
    """

    def __init__(self, folder: Path, log: Log, arithmetic: str, at_step: AtStep = lambda _step: None) -> None:
        self._folder = folder
        self._log = log
        self._arithmetic = arithmetic
        self._at_step = at_step
        for leftover in folder.glob(f"*{_UNFINISHED}"):
            leftover.unlink()

    def save(self, snapshot: LearnerSnapshot) -> None:
        """Make a state durable, and keep the newest three.

        Raises:
            OSError: the volume is full or refuses; the older ones stand.
        """
        message = snapshot.SerializeToString(deterministic=True)
        head = _HEAD.pack(_MAGIC, FORMAT_VERSION, hashlib.sha256(message).digest())
        write_durably(self._folder / f"{snapshot.learned_lsn:020d}{_SUFFIX}", head + message, self._at_step)
        self._at_step("prune")
        for path in self._paths()[SNAPSHOTS_KEPT:]:
            path.unlink()

    def forget_before(self, lsn: int) -> None:
        """Remove every snapshot but that of an LSN, refused ones too."""
        kept = self._folder / f"{lsn:020d}{_SUFFIX}"
        for path in (*self._folder.glob(f"*{_SUFFIX}"), *self._folder.glob(f"*{_REFUSED}")):
            if path != kept:
                path.unlink()

    def newest(self) -> LearnerSnapshot | None:
        """Return the newest state that proves itself, None when there is none; refused ones are renamed.

        Raises:
            CorruptRecordError: the log is damaged where a snapshot ends.
        """
        for path in self._paths():
            try:
                snapshot = parse(path.read_bytes())
                self._check_origin(snapshot)
            except SnapshotRefusedError as error:
                structlog.get_logger().error("snapshot_refused", file=path.name, why=str(error))
                # Under its own name it would count among the three that are kept, and be refused for ever.
                path.rename(path.with_name(path.name + _REFUSED))
            else:
                return snapshot
        return None

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"*{_SUFFIX}"), reverse=True)

    def _check_origin(self, snapshot: LearnerSnapshot) -> None:
        if snapshot.log_id != self._log.log_id:
            raise SnapshotRefusedError("it was learned from another log")
        if snapshot.arithmetic != self._arithmetic:
            raise SnapshotRefusedError(f"it was made by {snapshot.arithmetic!r}, this is {self._arithmetic!r}")
        record = self._log.get(snapshot.learned_lsn)
        if record is None or record.chain != snapshot.learned_chain:
            raise SnapshotRefusedError(f"the log does not lead to its record {snapshot.learned_lsn}")


def parse(data: bytes) -> LearnerSnapshot:
    """Return what a snapshot file says.

    Raises:
        SnapshotRefusedError: it is cut short, altered, or of another format.
    """
    if len(data) < _HEAD.size:
        raise SnapshotRefusedError("it is cut short")
    magic, version, digest = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise SnapshotRefusedError("it is of another format")
    message = data[_HEAD.size :]
    if hashlib.sha256(message).digest() != digest:
        raise SnapshotRefusedError("its sha256 does not fit")
    try:
        return LearnerSnapshot.FromString(message)
    except DecodeError as error:
        raise SnapshotRefusedError("it is no LearnerSnapshot") from error


def state_hash(snapshot: LearnerSnapshot) -> bytes:
    """Return SHA-256 over everything but the epoch: equal for equal states, whoever came to them how."""
    state = LearnerSnapshot()
    state.CopyFrom(snapshot)
    state.epoch = 0
    return hashlib.sha256(state.SerializeToString(deterministic=True)).digest()
