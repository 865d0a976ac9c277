"""How far an import has come, on disk: what a killed import is resumed from.

The journal says up to which place of the file every row has been answered, how long the rejects file was then, and
what the answers came to. It is written whole under a name of its own and then renamed, after the rejects file has been
synced: at any instant the disk holds a journal whose every word is true. What lies behind it is done again; the
server answers rows it has with duplicate, and the rejects file is cut back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from server.importing.faults import Fault

FORMAT: Final = 1
KINDS_MAX: Final = 100  # kinds of faults counted apart; further ones are counted together

_SUFFIX: Final = ".tsugi-import.json"
_OTHERS: Final = "other faults, see the rejects file"


class FaultCount(msgspec.Struct, forbid_unknown_fields=True):
    """How often one kind of fault was met."""

    reason: str
    column: str
    message: str
    count: int
    example_line: int


class Tally(msgspec.Struct, forbid_unknown_fields=True):
    """What became of the rows of one file."""

    rows: int = 0
    accepted: int = 0  # not known before, now on the server's disk; in a dry run: would be sent
    duplicates: int = 0  # known to the server under their record ids
    rejected: int = 0
    lsn: int = 0  # the highest that was answered
    seconds: float = 0.0
    faults: list[FaultCount] = []

    def reject(self, line: int, fault: Fault) -> None:
        """Count a rejected row, by the first of its faults."""
        self.rejected += 1
        for known in self.faults:
            if (known.reason, known.column, known.message) == fault[:3]:
                known.count += 1
                return
        if len(self.faults) < KINDS_MAX:
            self.faults.append(FaultCount(fault.reason, fault.column, fault.message, 1, line))
            return
        if self.faults[-1].message != _OTHERS:
            self.faults.append(FaultCount("", "", _OTHERS, 0, line))
        self.faults[-1].count += 1


class Journal(msgspec.Struct, forbid_unknown_fields=True):
    """One import of one file, as far as it has come."""

    file_bytes: int
    file_sha256: str
    plan_sha256: str  # of the source's name and the mapping
    format: int = FORMAT
    at: int = 0  # the place up to which every row is answered; see rows.Place
    line: int = 0
    rejects_bytes: int = 0  # length of the rejects file at that place
    is_finished: bool = False
    tally: Tally = msgspec.field(default_factory=Tally)

    def is_of(self, other: Journal) -> bool:
        """Say whether both are of the same file, mapping and source."""
        return (self.format, self.file_bytes, self.file_sha256, self.plan_sha256) == (
            other.format,
            other.file_bytes,
            other.file_sha256,
            other.plan_sha256,
        )


def journal_path(file: Path, folder: Path | None) -> Path:
    """Return where a file's journal lies: beside it, or in a folder of journals."""
    return (folder or file.parent) / f"{file.name}{_SUFFIX}"


def new_journal(file: Path, source: str, mapping_sha256: str) -> Journal:
    """Return the journal of an import that has not begun. Cost: reads the file, about a second a GB.

    All of the file counts: a cell corrected far behind its beginning makes it another file.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return Journal(
        file_bytes=file.stat().st_size,
        file_sha256=digest.hexdigest(),
        plan_sha256=hashlib.sha256(f"{source}\n{mapping_sha256}".encode()).hexdigest(),
    )


def load(path: Path) -> Journal | None:
    """Read a journal; None when there is none, or another program's file stands there.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Journal)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def save(path: Path, journal: Journal) -> None:
    """Write a journal; it is on disk on return. Cost: two syncs, some milliseconds."""
    with whole(path) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(journal), indent=2) + b"\n")


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole: it has its name only when all of it is on disk; till then stands what had that name before.

    Cost: two syncs, some milliseconds.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb", opener=private) as stream:  # Path.open takes no opener
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def private(path: str, flags: int) -> int:
    """Open a file, for ``open``; one that is made by it is its owner's alone, for it is about people."""
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Make names made or changed in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
