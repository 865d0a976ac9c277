"""The rejects file: every row that did not go in, as it stood, with its line, column, reason and message beside it.

It has the form of the file the rows came from (of Parquet: JSON lines), so that it can be corrected and sent with the
same mapping; the columns added here are passed over then. A row that could be read stands in its own columns. One that
could not stands as text in ``_row`` with its own columns empty: corrected there, or filled into the columns, it can be
sent as well, and left as it is it is rejected again instead of going in by half. Rows above 64 KiB that cannot be read
are not copied; their message says where they are. The file holds what people's rows hold: its owner alone can read it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Final

from server.importing.faults import Fault
from server.importing.journal import private, sync_folder
from server.importing.rows import (
    COLUMN,
    FIELD_BYTES_MAX,
    LINE,
    MESSAGE,
    REASON,
    RECORD_ID,
    RESERVED,
    ROW,
    Row,
    Rows,
    decoded,
    not_kept,
)

_UTF16_MARK: Final = b"\xff\xfe"


def rejects_path(file: Path, rows: Rows) -> Path:
    """Return where the rejects of a file go."""
    return file.with_name(f"{file.name}.rejects.{'csv' if rows.delimiter else 'jsonl'}")


class Rejects:
    """A file that grows by a row at a time and is cut back to what a journal says.

    Args:
        path: made with the first row.
        source: the file the rows come from.
        rows: the file whose rows are rejected.
        size: its length up to which it stands; what lies behind is cut off.
    """

    def __init__(self, path: Path, source: Path, rows: Rows, size: int) -> None:
        self._path = path
        self._source = source
        self._rows = rows
        self._encoding = rows.encoding.replace("utf-16-be", "utf-16-le")
        self._file: BinaryIO | None = None
        self._size = size
        if path.exists() and size:
            os.truncate(path, size)
        else:
            path.unlink(missing_ok=True)

    def add(self, row: Row, fault: Fault, record_id: str) -> None:
        """Append a row; see sync."""
        make = self._csv_row if self._rows.delimiter else self._json_row
        self._write(make(row, fault, record_id))

    def sync(self) -> int:
        """Bring all rows to disk and return the length of the file."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, text: str) -> None:
        if self._file is None:
            is_new = not self._path.exists()
            self._file = open(self._path, "ab", opener=private)  # noqa: SIM115  # closed by close
            if is_new:
                sync_folder(self._path.parent)
        data = text.encode(self._encoding, "backslashreplace")
        if not self._size:
            header = self._csv_line([*(self._rows.columns or ()), *RESERVED]) if self._rows.delimiter else ""
            mark = _UTF16_MARK if self._encoding.startswith("utf-16") else b""
            data = mark + header.encode(self._encoding, "backslashreplace") + data
        self._file.write(data)
        self._size += len(data)

    def _csv_row(self, row: Row, fault: Fault, record_id: str) -> str:
        own = row.cells if isinstance(row.cells, Sequence) else [""] * len(self._rows.columns or ())
        told = self._told(row, fault, record_id)
        return self._csv_line([*own, *(str(told.get(name, "")) for name in RESERVED)])

    def _csv_line(self, cells: Sequence[str]) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter=self._rows.delimiter, lineterminator="\n").writerow(cells)
        return line.getvalue()

    def _json_row(self, row: Row, fault: Fault, record_id: str) -> str:
        is_ascii = not self._encoding.startswith("utf")
        told = json.dumps(self._told(row, fault, record_id), ensure_ascii=is_ascii)
        if not isinstance(row.cells, Mapping):
            return told + "\n"
        own = self._object(row, row.cells, is_ascii)
        return f"{own[:-1].rstrip()}{', ' if row.cells else ''}{told[1:]}\n"

    def _object(self, row: Row, cells: Mapping[str, Any], is_ascii: bool) -> str:
        """Return a row's own object, character by character as it came where that can be had."""
        text, _ = decoded(row.raw, self._rows.encoding)
        text = text.strip()
        if text.startswith("{") and not any(f'"{name}"' in text for name in RESERVED) and "\n" not in text:
            return text
        return json.dumps(_jsonable(cells), ensure_ascii=is_ascii, default=str)

    def _told(self, row: Row, fault: Fault, record_id: str) -> dict[str, Any]:
        told: dict[str, Any] = {
            LINE: row.line,
            COLUMN: fault.columns(),
            REASON: fault.reason,
            MESSAGE: fault.told(),
            RECORD_ID: record_id,
        }
        if row.cells is None and 0 < len(row.raw) <= FIELD_BYTES_MAX:
            told[ROW] = decoded(row.raw, self._rows.encoding)[0].rstrip("\r\n")
        elif row.cells is None:
            told[MESSAGE] += f"; {not_kept(row.line, self._source.name)}"
        return told


def _jsonable(value: Any) -> Any:
    """Return a value of Parquet as JSON has it: numbers stay numbers, and what JSON has no number for is text."""
    if isinstance(value, Mapping):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_jsonable(each) for each in value]
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    return value
