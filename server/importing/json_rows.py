"""Rows of a JSON lines file: one object a line, read strictly, each line for itself.

Cost: some 6 µs a row of ten members.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from server.importing.faults import Fault, RejectReason, RowFault
from server.importing.rows import (
    FIELD_BYTES_MAX,
    MESSAGE,
    REASON,
    RECORD_ID,
    RESERVED,
    ROW,
    ROW_BYTES_MAX,
    Lines,
    Place,
    Row,
    decoded,
    fault_of_not_kept,
    undecodable,
)


class JsonRows:
    """A JSON lines file as rows; see Rows for the attributes.

    Args:
        path: the file.
        encoding: as for Lines.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._lines = Lines(path, encoding)
        self.columns: list[str] | None = None
        self.encoding = self._lines.encoding
        self.delimiter = ""
        self.size = self._lines.size
        self._decoder = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_no_constant)

    def read(self, start: Place) -> Iterator[Row]:
        """See Rows."""
        at, line = max(start.at, self._lines.start), start.line
        self._lines.seek(at)
        while True:
            raw, size = self._lines.read()
            if not size:
                return
            at, line = at + size, line + 1
            if not raw.strip(b" \t\r\n\0"):  # a blank line
                continue
            if size > ROW_BYTES_MAX:
                fault = Fault(RejectReason.ROW_TOO_LONG, "", f"at most {ROW_BYTES_MAX} bytes a row")
                yield Row(line, at, line, None, fault, b"", "")
                continue
            yield self._row(raw, at, line)

    def done(self) -> int:
        """See Rows."""
        return self._lines.done()

    def close(self) -> None:
        """See Rows."""
        self._lines.close()

    def _row(self, raw: bytes, at: int, line: int) -> Row:
        cells: dict[str, Any] | None = None
        fault, record_id = None, ""
        try:
            text, is_whole = decoded(raw, self.encoding)
            if not is_whole:
                return Row(line, at, line, None, undecodable("", self.encoding), raw, "")
            cells = self._parsed(text)
            if any(name in cells for name in RESERVED):
                row, record_id = cells.get(ROW), str(cells.get(RECORD_ID) or "")
                reason, message = str(cells.get(REASON) or ""), str(cells.get(MESSAGE) or "")
                cells = {name: value for name, value in cells.items() if name not in RESERVED}
                if not cells and isinstance(row, str):
                    raw, cells = row.encode(self.encoding, "replace"), None
                    cells = self._reread(row)
                elif not cells:
                    fault = fault_of_not_kept(reason, message)
            if len(raw) > FIELD_BYTES_MAX:
                fault = _too_long(cells)
        except RowFault as told:
            fault = told.told()
        return Row(line, at, line, cells, fault, raw, record_id)

    def _reread(self, text: str) -> dict[str, Any]:
        """Read the text of a row that could not be read before."""
        if "\ufffd" in text:  # stands in a rejects file for bytes that are no text
            raise RowFault("bytes that are no text still stand as U+FFFD", ROW, RejectReason.ENCODING_INVALID)
        return self._parsed(text)

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            tree = self._decoder.decode(text)
        except (ValueError, RecursionError) as error:
            hint = "; state csv.encoding, such as utf-16" if "\0" in text and self.encoding == "utf-8" else ""
            raise RowFault(_told(error) + hint, "", RejectReason.ROW_MALFORMED) from None
        if not isinstance(tree, dict):
            raise RowFault("an object {…} is expected", "", RejectReason.ROW_MALFORMED)
        return tree


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name stands in an object twice")
    return members


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are no JSON")


def _told(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg[:1].lower()}{error.msg[1:]}"
    if isinstance(error, RecursionError):
        return "no JSON anybody means: nested too deeply"
    text = str(error)
    return text if text.startswith(("a name", "NaN")) else "no JSON: a number has too many digits"


def _too_long(tree: dict[str, Any]) -> Fault | None:
    for name, value in tree.items():
        if isinstance(value, str) and len(value.encode(errors="surrogatepass")) > FIELD_BYTES_MAX:
            return Fault(RejectReason.ROW_TOO_LONG, name, f"at most {FIELD_BYTES_MAX} bytes a cell")
    return None
