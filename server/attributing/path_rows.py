"""Paths from a file: one a row, with how often it came to an outcome, what that was worth, and how often it did not.

The columns are those that such files have elsewhere: ``path``, channels with " > " between them, the oldest first;
``total_conversions``; and where there are any, ``total_conversion_value`` and ``total_null``. CSV, also packed as
.csv.gz, or Parquet. A row that is not as it should be refuses the file, for a sum over part of it would be no sum.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from server.errors import Violation, limit_exceeded
from server.importing.csv_rows import CsvRows
from server.importing.faults import refused
from server.importing.parquet_rows import ParquetRows
from server.importing.rows import START, Row, Rows
from server.outcomes.attribution import CHANNELS_MAX, Paths, keep_newest

PATH, OUTCOMES, VALUE, SILENCES = "path", "total_conversions", "total_conversion_value", "total_null"
COLUMNS: Final = (PATH, OUTCOMES, VALUE, SILENCES)
REQUIRED: Final = (PATH, OUTCOMES)

ROWS_MAX: Final = 1_000_000
TOUCHPOINTS_IN_PATHS_MAX: Final = 20_000_000
NAME_LENGTH_MAX: Final = 128
COUNT_MAX: Final = 10**12  # of one row; a million of them fit an int64
VALUE_MAX: Final = 1e15
VIOLATIONS_MAX: Final = 10  # then reading stops


class PathFile(NamedTuple):
    """What a file holds."""

    channels: tuple[str, ...]  # in the order of their first touchpoint
    paths: Paths  # ages in touchpoints: 0 for the newest, 1 for the one before it
    n_cut: int  # paths longer than may be; of them the newest touchpoints are there


def read_paths(path: Path) -> PathFile:
    """Read a file of paths.

    Raises:
        TsugiError: FIELD_INVALID, with the line and column of the first ten faults; LIMIT_EXCEEDED.
        OSError, EOFError: the file cannot be read.

    Cost: some 5 µs a row and 0.2 µs a touchpoint.
    """
    opened: Rows = ParquetRows(path, "utf-8") if path.suffix == ".parquet" else CsvRows(path, "utf-8", ",")
    with closing(opened) as rows:
        columns = _columns_of(path, rows)
        reader = _Reader(path.name)
        for row in rows.read(START):
            reader.take(row, columns)
    return reader.finished()


def _columns_of(path: Path, rows: Rows) -> tuple[str, ...]:
    columns = tuple(rows.columns or ())
    faults = [f"column {name} is missing" for name in REQUIRED if name not in columns]
    faults += [f"{name[:64]!r} is none of {', '.join(COLUMNS)}" for name in columns if name not in COLUMNS]
    faults += [f"column {name} stands there twice" for name in COLUMNS if columns.count(name) > 1]
    if faults:
        raise refused(path.name, [Violation(f"{path.name}:1", fault) for fault in faults[:VIOLATIONS_MAX]])
    return columns


class _WrongError(Exception):
    """A cell is not what it should be; the text says what would be right."""


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name
        self._violations: list[Violation] = []
        self._channels: dict[str, int] = {}
        self._codes, self._lengths = array("i"), array("q")
        self._outcomes, self._values, self._silences = array("q"), array("d"), array("q")

    def take(self, row: Row, columns: tuple[str, ...]) -> None:
        """Take in one row, or remember what is wrong with it."""
        place = f"{self._name}:{row.line}"
        if row.cells is None or row.fault is not None:
            fault = row.fault
            self._refuse(place, fault.told() if fault is not None else "it cannot be read")
            return
        cells = row.cells if isinstance(row.cells, Mapping) else dict(zip(columns, row.cells, strict=True))
        column = PATH
        try:
            codes = self._coded(cells[PATH])
            column = OUTCOMES
            outcomes = _count(cells[OUTCOMES])
            column = VALUE
            value = _amount(cells.get(VALUE, 0.0))
            if value and not outcomes:
                raise _WrongError("0 is required where there is no outcome")
            column = SILENCES
            silences = _count(cells.get(SILENCES, 0))
        except _WrongError as error:
            self._refuse(f"{place}.{column}", str(error))
            return
        self._codes.extend(codes)
        self._lengths.append(len(codes))
        self._outcomes.append(outcomes)
        self._values.append(value)
        self._silences.append(silences)
        if len(self._lengths) > ROWS_MAX:
            raise limit_exceeded(self._name, len(self._lengths), ROWS_MAX, "rows; put equal paths together")
        if len(self._codes) > TOUCHPOINTS_IN_PATHS_MAX:
            raise limit_exceeded(self._name, len(self._codes), TOUCHPOINTS_IN_PATHS_MAX, "touchpoints")

    def finished(self) -> PathFile:
        """Return what was read.

        Raises:
            TsugiError: FIELD_INVALID: something was wrong.
        """
        if self._violations:
            raise refused(self._name, self._violations)
        starts = np.concatenate(([0], np.cumsum(np.array(self._lengths, np.int64)))).astype(np.int64)
        lengths = np.diff(starts)
        paths, n_cut = keep_newest(
            Paths(
                codes=np.array(self._codes, np.int32),
                starts=starts,
                outcomes=np.array(self._outcomes, np.int64),
                values=np.array(self._values, np.float64),
                silences=np.array(self._silences, np.int64),
                ages=np.repeat(starts[1:] - 1, lengths).astype(np.float64) - np.arange(len(self._codes)),
            )
        )
        return PathFile(tuple(self._channels), paths, n_cut)

    def _coded(self, cell: object) -> list[int]:
        if not isinstance(cell, str):
            raise _WrongError("a text is required")
        names = [name.strip() for name in cell.split(">")]
        if not all(0 < len(name) <= NAME_LENGTH_MAX and name.isprintable() for name in names):
            raise _WrongError(f'channels of 1 to {NAME_LENGTH_MAX} characters are required, with " > " between them')
        codes = [self._channels.setdefault(name, len(self._channels)) for name in names]
        if len(self._channels) > CHANNELS_MAX:
            raise limit_exceeded(PATH, len(self._channels), CHANNELS_MAX, "channels")
        return codes

    def _refuse(self, place: str, why: str) -> None:
        self._violations.append(Violation(place, why))
        if len(self._violations) == VIOLATIONS_MAX:
            raise refused(self._name, self._violations)


def _count(cell: object) -> int:
    number = _number(cell)
    if not (0 <= number <= COUNT_MAX and number == math.floor(number)):
        raise _WrongError(f"a whole number from 0 to {COUNT_MAX} is required")
    return int(number)


def _amount(cell: object) -> float:
    number = _number(cell)
    if not abs(number) <= VALUE_MAX:
        raise _WrongError(f"a number within ±{VALUE_MAX:g} is required")
    return number


def _number(cell: object) -> float:
    """Read a number; what is none is NaN, which no bound lets pass."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return math.nan
    if isinstance(cell, str) and "_" in cell:  # Python's own way to write 1_000
        return math.nan
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return math.nan
