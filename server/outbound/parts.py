"""Rows of an outbound run as Parquet, by way of pyarrow: parts while it goes on, one file when it is done.

pyarrow is large and only some need it, hence the extra; its absence is told in one sentence before anybody is asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from server.importing.journal import whole
from server.outbound.journal import Tally
from server.outbound.plan import OutboundRefused

ROWS_TOGETHER: Final = 64 * 1024  # of the parts, in one row group of the output

_MARK: Final = b"tsugi.outbound"


class Contact(NamedTuple):
    """One row of the output: one filled slot, or a person whose decision was refused."""

    profile_id: str
    placement: str | None = None
    position: int | None = None
    action: str | None = None
    treatment: str | None = None
    content: str | None = None  # JSON
    propensity: float | None = None
    value: float | None = None
    priority: float | None = None
    selection_probability: float | None = None
    decision_id: str | None = None
    expire_time: datetime | None = None  # UTC
    error_reason: str | None = None


class Mark(msgspec.Struct, forbid_unknown_fields=True):
    """What stands beside the rows of a part."""

    page_token: str  # to go on from; empty: nobody is left
    tally: Tally  # of this part and all before it


class Parquet:
    """Writes and reads parts.

    Raises:
        OutboundRefused: pyarrow is not installed.
    """

    def __init__(self) -> None:
        try:
            # By name, because it ships no types.
            self._arrow: Any = importlib.import_module("pyarrow")
            self._files: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise OutboundRefused(
                "the output is Parquet, which needs pyarrow; install it with: pip install 'tsugi[training]'"
            ) from None
        text, number = self._arrow.string(), self._arrow.float64()
        others = {"position": self._arrow.int32(), "expire_time": self._arrow.timestamp("us", tz="UTC")}
        numbers = dict.fromkeys(("propensity", "value", "priority", "selection_probability"), number)
        types = others | numbers
        self._schema: Any = self._arrow.schema([(name, types.get(name, text)) for name in Contact._fields])

    def write(self, path: Path, rows: Sequence[Contact], mark: Mark) -> None:
        """Write one part; it is on disk on return."""
        schema = self._schema.with_metadata({_MARK: msgspec.json.encode(mark)})
        table = self._arrow.Table.from_pylist([row._asdict() for row in rows], schema=schema)
        with whole(path) as stream:
            self._files.write_table(table, stream)

    def mark(self, path: Path) -> Mark:
        """Read what stands beside the rows of a part.

        Raises:
            OutboundRefused: it is no part, or a damaged one.
        """
        try:
            metadata = self._files.read_schema(path).metadata or {}
            return msgspec.json.decode(metadata[_MARK], type=Mark)
        except (self._arrow.ArrowException, KeyError, msgspec.DecodeError):
            raise OutboundRefused(f"{path.parent.name}/{path.name} is no part of a run, or damaged") from None

    def join(self, parts: Sequence[Path], out: Path) -> None:
        """Write the rows of all parts, in order, into one file; it is on disk on return. Memory: one row group."""
        with whole(out) as stream, self._files.ParquetWriter(stream, self._schema) as writer:
            together: list[Any] = []
            for path in parts:
                together.append(self._files.read_table(path).replace_schema_metadata(None))
                if sum(table.num_rows for table in together) >= ROWS_TOGETHER:
                    writer.write_table(self._arrow.concat_tables(together))
                    together.clear()
            if together:
                writer.write_table(self._arrow.concat_tables(together))
