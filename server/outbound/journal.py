"""How far an outbound run has come, on disk: what a killed run is resumed from.

Beside the output stands a folder with the run's journal and its finished parts. The journal names the run, and the
people of the page that is being decided: it is on disk before the first of them is asked, so that after a kill exactly
these are asked again, under the same request ids, and whoever was decided is answered as recorded. Each part says what
comes after it. Every file is written whole under another name and then renamed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from server.importing.journal import sync_folder, whole
from server.outbound.plan import OutboundRefused, Plan

FORMAT: Final = 1

_FOLDER_SUFFIX: Final = ".run"
_JOURNAL: Final = "run.json"
_PART_SUFFIX: Final = ".parquet"


class Tally(msgspec.Struct, forbid_unknown_fields=True):
    """What became of the people of one run."""

    people: int = 0  # who were asked about
    contacts: dict[str, int] = {}  # filled slots by action
    nothing: int = 0  # people for whom no slot was filled
    gone: int = 0  # people who were forgotten between listing and deciding
    errors: dict[str, int] = {}  # people whose decision was refused, by error reason
    lsn: int = 0  # the highest of a decision
    seconds: float = 0.0


class Page(msgspec.Struct, forbid_unknown_fields=True):
    """The people of one part."""

    number: int  # of the part, from 1
    profile_ids: list[str]
    next_page_token: str  # what is listed next; empty: nobody
    total_size: int = 0  # how many people there are in the segment, about


class Journal(msgspec.Struct, forbid_unknown_fields=True):
    """One run."""

    run_id: str
    segment: str
    channel: str
    asked: tuple[str, ...]  # see Plan
    placements: tuple[tuple[str, int], ...]  # as they were when the run began: the same request id, the same request
    format: int = FORMAT
    page: Page | None = None  # the one under way
    finished: Tally | None = None  # the output is in its place; parts may be gone

    def is_of(self, plan: Plan) -> bool:
        """Say whether it asks what a plan asks."""
        return (self.segment, self.channel, self.asked) == (plan.segment, plan.channel, plan.asked)


class RunFolder:
    """The files of one run, beside its output.

    Args:
        out: the output.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}{_FOLDER_SUFFIX}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder where there is none, and keep other runs away from it.

        Raises:
            OutboundRefused: another run holds it.
        """
        if not self.path.exists():
            self.path.mkdir(mode=0o700)
            sync_folder(self.path.parent)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutboundRefused(f"another command is making {self.out.name} already") from None
        except OSError:  # a file system without locks
            return

    def load(self) -> Journal | None:
        """Read the journal; None when no run has begun.

        Raises:
            OutboundRefused: the folder is none of this program's, or damaged.
        """
        try:
            journal = msgspec.json.decode((self.path / _JOURNAL).read_bytes(), type=Journal)
        except FileNotFoundError:
            if any(self.path.glob(f"*{_PART_SUFFIX}")):
                raise self._unreadable() from None
            return None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._unreadable() from None
        if journal.format != FORMAT:
            raise self._unreadable()
        return journal

    def save(self, journal: Journal) -> None:
        """Write the journal; it is on disk on return."""
        with whole(self.path / _JOURNAL) as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(journal), indent=2) + b"\n")

    def part(self, number: int) -> Path:
        """Return where a part stands."""
        return self.path / f"{number:06d}{_PART_SUFFIX}"

    def parts(self) -> list[Path]:
        """Return the finished parts, in order.

        Raises:
            OutboundRefused: one is missing.
        """
        found = sorted(self.path.glob(f"*{_PART_SUFFIX}"), key=lambda path: (len(path.name), path.name))
        if found != [self.part(number) for number in range(1, len(found) + 1)]:
            raise self._unreadable()
        return found

    def clear(self) -> None:
        """Remove all that a run leaves in the folder; the journal last, for parts without one say nothing."""
        for path in [*self.path.glob(f"*{_PART_SUFFIX}"), *self.path.glob("*.unfinished"), self.path / _JOURNAL]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        self.clear()
        self.path.rmdir()
        sync_folder(self.path.parent)

    def _unreadable(self) -> OutboundRefused:
        return OutboundRefused(
            f"{self.path.name} holds no whole run of this program; remove it to begin anew, and who was asked may be "
            "asked again"
        )
