"""Rows of a CSV file: read strictly, and whatever is wrong with a row, the rows after it are read.

Python's csv reader does the parsing, on lines this module hands to it and remembers until their row is whole. A row
that cannot be parsed is one of two things. Where its quotes end properly further on, it is a long row, which is
rejected whole. Where they do not, a quote was opened and never meant to be closed: then its first line alone is
rejected, and reading goes on with the second.

Cost: some 2 µs a row of ten cells.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from server.importing.faults import Fault, RejectReason
from server.importing.rows import (
    FIELD_BYTES_MAX,
    MESSAGE,
    REASON,
    RECORD_ID,
    RESERVED,
    ROW,
    ROW_BYTES_MAX,
    SEARCH_BYTES_MAX,
    Lines,
    Place,
    Row,
    fault_of_not_kept,
    header_fault,
    undecodable,
)

_LOST: Final = ("\ufffd", "\\ufffd")  # stands in a rejects file for bytes that are no text; the second in cp1252


class _TooLongError(Exception):
    """The lines of a row have become too many bytes."""


class CsvRows:
    """A CSV file as rows; see Rows for the attributes.

    Args:
        path: the file; the first row is its header.
        encoding: as for Lines.
        delimiter: between cells.

    Raises:
        TsugiError: FIELD_INVALID: the header cannot be read.
    """

    def __init__(self, path: Path, encoding: str, delimiter: str) -> None:
        self._lines = Lines(path, encoding)
        self.encoding = self._lines.encoding
        self.delimiter = delimiter
        self.size = self._lines.size
        self._taken: list[tuple[bytes, int]] = []
        self._again: deque[tuple[bytes, int]] = deque()  # to be read once more
        self._bytes_max = ROW_BYTES_MAX
        self._n_taken_bytes = 0
        self._is_damaged = False
        self._place = Place(self._lines.start, 0)
        try:
            header = self._header(path)
        except BaseException:
            self._lines.close()
            raise
        self._own = [i for i, name in enumerate(header) if name not in RESERVED]
        self.columns: list[str] | None = [header[i] for i in self._own]
        self._n_cells = len(header)
        self._reserved = {name: header.index(name) for name in RESERVED if name in header}
        self._is_plain = len(self._own) == len(header)

    def read(self, start: Place) -> Iterator[Row]:
        """See Rows."""
        if start.at:
            self._place = start
        self._lines.seek(self._place.at)
        self._again.clear()
        self._forget()
        reader = self._reader()
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, _TooLongError) as error:
                yield self._rejected(error)
                reader = self._reader()
                continue
            if cells:
                yield self._whole(cells)
            else:
                self._pass()  # a blank line

    def done(self) -> int:
        """See Rows."""
        return self._lines.done()

    def close(self) -> None:
        """See Rows."""
        self._lines.close()

    def _header(self, path: Path) -> list[str]:
        self._lines.seek(self._place.at)
        try:
            header = next(self._reader(), [])
        except (csv.Error, _TooLongError) as error:
            if self._is_damaged or any(b"\0" in raw for raw, _ in self._taken):
                raise self._undecodable_header(path) from None
            told = "its quotes, its length or csv.delimiter are wrong"
            told = _told(error) if "new-line" in str(error) else told
            raise header_fault(path, f"the first row is no header: {told}") from None
        if not any(header):
            raise header_fault(path, "the first row is empty where the header is expected")
        if self._is_damaged or "\0" in "".join(header):
            raise self._undecodable_header(path)
        self._pass()
        return header

    def _undecodable_header(self, path: Path) -> Exception:
        is_wide = any(b"\0" in raw for raw, _ in self._taken) and not self.encoding.startswith("utf-16")
        hint = "utf-16" if is_wide else "latin-1" if self.encoding == "utf-8" else "utf-8"
        return header_fault(path, f"the header is not in {self.encoding}; state csv.encoding, such as {hint}")

    def _reader(self) -> Iterator[list[str]]:
        return iter(csv.reader(self._feed(), delimiter=self.delimiter, strict=True))

    def _feed(self) -> Iterator[str]:
        """Hand lines to the parser, and remember them."""
        while True:
            line = self._again.popleft() if self._again else self._lines.read()
            if not line[1]:
                return
            self._taken.append(line)
            self._n_taken_bytes += line[1]
            if self._n_taken_bytes > self._bytes_max:
                raise _TooLongError
            try:
                text = line[0].decode(self.encoding)
            except UnicodeDecodeError:
                text = line[0].decode(self.encoding, "replace")
                self._is_damaged = True
            yield text

    def _whole(self, cells: list[str]) -> Row:
        line = self._place.line + 1
        raw = self._taken[0][0] if len(self._taken) == 1 else b"".join(raw for raw, _ in self._taken)
        is_damaged = self._is_damaged
        self._pass()
        fault, record_id = None, ""
        if len(cells) != self._n_cells:
            fault = _miscounted(len(cells), self._n_cells)
        elif is_damaged:
            fault = self._undecodable(cells)
        elif not self._is_plain:
            return self._resent(cells, line, raw)
        elif len(raw) > FIELD_BYTES_MAX:
            fault = self._too_long(cells)
        kept = cells if fault is None or fault.reason == RejectReason.ROW_TOO_LONG else None
        return Row(line, self._place.at, self._place.line, kept, fault, raw, record_id)

    def _resent(self, cells: list[str], line: int, raw: bytes) -> Row:
        """Read a row of a rejects file: its own cells, or where they are empty the text in _row."""
        stated = {name: cells[i] for name, i in self._reserved.items()}
        record_id, text = stated.get(RECORD_ID, ""), stated.get(ROW, "")
        own: list[str] | None = [cells[i] for i in self._own]
        fault = self._too_long(own) if own and len(raw) > FIELD_BYTES_MAX else None
        if own is not None and not any(own):
            if text:
                raw = text.encode(self.encoding, "replace")
                own, fault = self._reread(text)
            else:
                fault = fault_of_not_kept(stated.get(REASON, ""), stated.get(MESSAGE, ""))
        return Row(line, self._place.at, self._place.line, own, fault, raw, record_id)

    def _reread(self, text: str) -> tuple[list[str] | None, Fault | None]:
        if any(lost in text for lost in _LOST):
            return None, Fault(RejectReason.ENCODING_INVALID, ROW, "bytes that are no text still stand as U+FFFD")
        try:
            rows = list(csv.reader(text.splitlines(keepends=True), delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            return None, Fault(RejectReason.ROW_MALFORMED, ROW, _told(error))
        if len(rows) != 1:
            return None, Fault(RejectReason.ROW_MALFORMED, ROW, "one row is expected")
        if len(rows[0]) != len(self._own):
            return None, _miscounted(len(rows[0]), len(self._own))
        return rows[0], None

    def _rejected(self, error: Exception) -> Row:
        """Reject what cannot be parsed, and have the rest read on."""
        is_long = isinstance(error, _TooLongError) or "field larger than" in str(error)
        if is_long and self._ends_properly():
            fault = Fault(RejectReason.ROW_TOO_LONG, "", f"at most {FIELD_BYTES_MAX} bytes a cell, {ROW_BYTES_MAX} all")
        else:
            self._again.extendleft(reversed(self._taken[1:]))
            del self._taken[1:]
            fault = Fault(RejectReason.ROW_MALFORMED, "", _told(error))
            if self._taken[0][1] > ROW_BYTES_MAX:
                fault = Fault(RejectReason.ROW_TOO_LONG, "", f"at most {ROW_BYTES_MAX} bytes a row")
        line, size = self._place.line + 1, sum(size for _, size in self._taken)
        raw = b"".join(raw for raw, _ in self._taken) if size <= ROW_BYTES_MAX else b""
        self._pass()
        return Row(line, self._place.at, self._place.line, None, fault, raw, "")

    def _ends_properly(self) -> bool:
        """Say whether the row that is being read ends properly further on; its lines are taken then."""
        self._again.extendleft(reversed(self._taken))
        self._forget()
        self._bytes_max = SEARCH_BYTES_MAX
        limit_before = csv.field_size_limit(SEARCH_BYTES_MAX)
        try:
            next(self._reader())
        except (csv.Error, _TooLongError):
            return False
        finally:
            csv.field_size_limit(limit_before)
            self._bytes_max = ROW_BYTES_MAX
        return True

    def _pass(self) -> None:
        """Go on behind the lines taken."""
        self._place = Place(self._place.at + sum(size for _, size in self._taken), self._place.line + len(self._taken))
        self._forget()

    def _forget(self) -> None:
        self._taken.clear()
        self._n_taken_bytes = 0
        self._is_damaged = False

    def _undecodable(self, cells: list[str]) -> Fault:
        column = next((i for i, cell in enumerate(cells) if "\ufffd" in cell), -1)
        return undecodable(self._name(column), self.encoding)

    def _too_long(self, cells: list[str]) -> Fault | None:
        for i, cell in enumerate(cells):
            if len(cell.encode()) > FIELD_BYTES_MAX:
                return Fault(RejectReason.ROW_TOO_LONG, self._name(i), f"at most {FIELD_BYTES_MAX} bytes a cell")
        return None

    def _name(self, position: int) -> str:
        names = self.columns or []
        return names[position] if 0 <= position < len(names) else ""


def _miscounted(got: int, wanted: int) -> Fault:
    return Fault(
        RejectReason.ROW_MALFORMED, "", f"{'too many' if got > wanted else 'too few'} cells: the header has {wanted}"
    )


def _told(error: Exception) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "a quote is opened and never closed"
    if "new-line character" in text:
        return "a carriage return stands alone; lines end with a line feed, with or without one before it"
    return 'what follows a closing quote is no delimiter; write a quote within quotes as ""'
