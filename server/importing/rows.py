"""What every format of file gives: rows, each with its line, its place, and its cells or why it has none.

A place is where reading may go on: bytes into the (unpacked) text, or rows into a Parquet file. Physical lines are read
here as well, of bounded length and in any of the encodings, for the formats that consist of them.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol, TypeAlias

from server.errors import Violation
from server.importing.faults import Fault, RejectReason, refused

FIELD_BYTES_MAX: Final = 64 * 1024
ROW_BYTES_MAX: Final = 1024 * 1024
UNPACKED_BYTES: Final = 16 * 1024  # at once; where the packing is damaged, so much before it may be lost
# How far the end of a row that is too long is looked for, so that reading goes on after it and not within.
SEARCH_BYTES_MAX: Final = 16 * 1024 * 1024

# What the importer adds in a rejects file and passes over in a file it reads; _row holds a row that could not be read.
LINE, COLUMN, REASON, MESSAGE, RECORD_ID, ROW = "_line", "_column", "_reason", "_message", "_record_id", "_row"
RESERVED: Final = (LINE, COLUMN, REASON, MESSAGE, RECORD_ID, ROW)

_NOT_KEPT: Final = re.compile(r"line \d+ is too long to be kept here; correct it in .{1,255}$")
_UNREADABLE: Final = frozenset({RejectReason.ROW_MALFORMED, RejectReason.ROW_TOO_LONG, RejectReason.ENCODING_INVALID})

Cells: TypeAlias = "Sequence[str] | Mapping[str, Any]"


class Place(NamedTuple):
    """Where reading may go on."""

    at: int  # bytes, of Parquet rows; 0: from the start
    line: int  # lines before it


START: Final = Place(0, 0)


class Row(NamedTuple):
    """One row of a file."""

    line: int  # where it begins, from 1
    end: int  # the place after it
    end_line: int  # lines before that place
    cells: Cells | None  # in the order of the file's columns, or by name; None: it cannot be read
    fault: Fault | None  # why it is rejected as it stands
    raw: bytes  # as it came; empty: its text is not kept
    record_id: str  # that of an earlier import, from a rejects file; else empty


class Rows(Protocol):
    """A file as rows.

    Attributes:
        columns: the names of its own columns, as often as they stand in its header; None when it has no header.
        encoding: of its text and of its rejects; a codec's name.
        delimiter: between its cells; empty where rows are objects.
        size: what ``done`` comes to in the end.
    """

    columns: list[str] | None
    encoding: str
    delimiter: str
    size: int

    def read(self, start: Place) -> Iterator[Row]:
        """Yield the rows from a place on, in order.

        Raises:
            OSError, EOFError: the file cannot be read any further.
        """
        ...

    def done(self) -> int:
        """Say how much has been read."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Lines:
    """Physical lines of a file that may be packed with gzip.

    Args:
        path: the file.
        encoding: utf-8, utf-16, latin-1 or cp1252. A byte order mark is passed over, and of UTF-16 it tells the order;
            without one the lesser byte comes first.

    Attributes:
        encoding: the codec of the lines, byte order settled.
        start: bytes before the first line.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._file = path.open("rb")
        self.size = path.stat().st_size
        packed = gzip.GzipFile(fileobj=self._file) if path.suffix == ".gz" else None
        self._stream: BinaryIO = io.BufferedReader(packed, UNPACKED_BYTES) if packed is not None else self._file
        try:
            self.start, self.encoding = _mark(self._stream.read(3), encoding)
        except BaseException:  # not what gzip packs
            self.close()
            raise
        self._unit = 2 if encoding == "utf-16" else 1
        self.seek(self.start)

    def seek(self, at: int) -> None:
        """Go to a line's beginning. Cost: of a packed file, unpacking it up to there."""
        self._stream.seek(at)

    def read(self) -> tuple[bytes, int]:
        """Return the next line with its ending, and its size; no line at the end of the file.

        Of a line above SEARCH_BYTES_MAX only the beginning is returned, with the size of the whole.
        """
        raw = self._line(ROW_BYTES_MAX)
        size = len(raw)
        if size < ROW_BYTES_MAX or self._is_whole(raw):
            return raw, size
        pieces = [raw]
        while piece := self._line(ROW_BYTES_MAX):
            size += len(piece)
            if size <= SEARCH_BYTES_MAX:
                pieces.append(piece)
            if self._is_whole(piece):
                break
        return b"".join(pieces), size

    def done(self) -> int:
        """Say how many bytes of the file, packed or not, have been read."""
        return self._file.tell()

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()
        self._file.close()

    def _line(self, size_max: int) -> bytes:
        """Read up to a line's end; what is returned is even in UTF-16."""
        line = self._stream.readline(size_max)
        if self._unit == 1:
            return line
        while line and len(line) < size_max:
            if len(line) % 2 and line.endswith(b"\n"):  # the lesser byte of a unit; the greater one follows
                line += self._stream.read(1)
            if self._is_whole(line):
                break
            piece = self._stream.readline(size_max - len(line))
            if not piece:
                break
            line += piece
        return line

    def _is_whole(self, line: bytes) -> bool:
        if self._unit == 1:
            return line.endswith(b"\n")
        return len(line) % 2 == 0 and line.endswith(b"\n\0" if self.encoding == "utf-16-le" else b"\0\n")


def decoded(raw: bytes, encoding: str) -> tuple[str, bool]:
    """Return a text, and whether all of it is in that encoding; what is not stands as U+FFFD."""
    try:
        return raw.decode(encoding), True
    except UnicodeDecodeError:
        return raw.decode(encoding, "replace"), False


def not_kept(line: int, file_name: str) -> str:
    """Return what a rejects file says in place of a row too long to be copied."""
    return f"line {line} is too long to be kept here; correct it in {file_name}"


def fault_of_not_kept(reason: str, message: str) -> Fault | None:
    """Return the fault of a row of a rejects file that has neither cells nor text; None where it never had any.

    Args:
        reason: as the rejects file has it.
        message: the same; where it says which line was not kept, that is said again.
    """
    if reason not in _UNREADABLE:
        return None
    found = _NOT_KEPT.search(message)
    told = found[0] if found else "the row is not here, it was too long; correct it in the file it came from"
    return Fault(RejectReason.ROW_TOO_LONG, "", told)


def undecodable(column: str, encoding: str) -> Fault:
    """Return the fault of a row whose bytes are no text."""
    hint = "latin-1" if encoding == "utf-8" else "utf-8"
    told = f"bytes that are not {encoding}; state csv.encoding, such as {hint}"
    return Fault(RejectReason.ENCODING_INVALID, column, told)


def header_fault(path: Path, description: str) -> Exception:
    """Build the refusal of a file whose header cannot be used."""
    return refused(path.name, [Violation(f"{path.name}:1", description)])


def _mark(beginning: bytes, encoding: str) -> tuple[int, str]:
    if encoding == "utf-8" and beginning == codecs.BOM_UTF8:
        return 3, encoding
    if encoding != "utf-16":
        return 0, encoding
    if beginning.startswith(codecs.BOM_UTF16_BE):
        return 2, "utf-16-be"
    return 2 if beginning.startswith(codecs.BOM_UTF16_LE) else 0, "utf-16-le"
