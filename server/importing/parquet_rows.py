"""Rows of a Parquet file, by way of pyarrow; a row's number stands for its line.

pyarrow is large and only some need it, hence the extra; its absence is told in one sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from server.errors import Violation
from server.importing.faults import refused
from server.importing.rows import Place, Row

BATCH_ROWS: Final = 1_000


class ParquetRows:
    """A Parquet file as rows; see Rows for the attributes. Nested columns are mappings within a row.

    Args:
        path: the file.
        encoding: of its rejects, which are JSON lines.

    Raises:
        TsugiError: FIELD_INVALID: pyarrow is not installed, or the file is not Parquet.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        try:
            # By name, because it ships no types.
            parquet: Any = importlib.import_module("pyarrow.parquet")
            self._fault: Any = importlib.import_module("pyarrow").ArrowException
        except ImportError:
            install = "Parquet files need pyarrow; install it with: pip install 'tsugi[training]'"
            raise refused(path.name, [Violation(path.name, install)]) from None
        try:
            self._file: Any = parquet.ParquetFile(path)
        except (self._fault, ValueError):
            raise refused(path.name, [Violation(path.name, "no Parquet file, or a damaged one")]) from None
        schema = self._file.schema_arrow
        self.columns: list[str] | None = [name for field in schema for name in _names(field, "")]
        self.encoding = "utf-16-le" if encoding == "utf-16" else encoding
        self.delimiter = ""
        self.size = int(self._file.metadata.num_rows)
        self._n_done = 0

    def read(self, start: Place) -> Iterator[Row]:
        """See Rows."""
        number = 0
        groups: list[int] = []
        for group in range(self._file.num_row_groups):
            n_rows = int(self._file.metadata.row_group(group).num_rows)
            if not groups and number + n_rows <= start.at:
                number += n_rows
            else:
                groups.append(group)
        try:
            for batch in self._file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups):
                for cells in batch.to_pylist():
                    number += 1
                    if number > start.at:
                        self._n_done = number
                        yield Row(number, number, number, cells, None, b"", "")
        except (self._fault, ValueError, OverflowError) as error:  # the latter of texts that are none, and of instants
            raise OSError("the file is damaged") from error

    def done(self) -> int:
        """See Rows."""
        return self._n_done

    def close(self) -> None:
        """See Rows."""
        self._file.close()


def _names(field: Any, prefix: str) -> Iterator[str]:
    """Yield the name of a column and those of its parts, as a mapping writes them."""
    yield prefix + field.name
    if hasattr(field.type, "fields"):  # a structure
        for part in field.type.fields:
            yield from _names(part, f"{prefix}{field.name}.")
