"""Parquet files as rows: skipped where pyarrow is not installed, and then its absence is what is told."""

from __future__ import annotations

import datetime
import importlib.util
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from server.errors import TsugiError
from server.importing.parquet_rows import ParquetRows
from server.importing.rows import START, Place
from tests.unit.importing.support import Kept, imported

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
MAPPING = """
identities: [{namespace: customer_number, column: customer.id}]
observationTime: {column: at}
attributes:
  age: {column: age}
  tags: {column: tags}
  taste: {column: taste}
  spend: {column: spend}
  joined: {column: joined}
"""


@pytest.mark.skipif(HAS_PYARROW, reason="pyarrow is installed")
def test_missing_pyarrow_is_told_with_the_extra_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(TsugiError) as refusal:
        ParquetRows(path, "utf-8")
    assert "tsugi[training]" in refusal.value.violations[0].description


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pyarrow: Any = pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet files are not tested")
    writer: Any = pytest.importorskip("pyarrow.parquet")
    at = datetime.datetime(2026, 2, 3, 10, tzinfo=datetime.UTC)
    table = pyarrow.table(
        {
            "customer": [{"id": i} for i in range(25)],
            "at": [at] * 25,
            "age": [float(i) for i in range(24)] + [500.0],
            "tags": [["vip"]] * 24 + [None],
            "taste": [[0.5, 1.5]] * 25,
            "spend": [Decimal("12.50")] * 25,
            "joined": [datetime.date(2026, 1, 2)] * 25,
            "note": [float("inf")] * 25,
        }
    )
    path = tmp_path / "a.parquet"
    writer.write_table(table, path, row_group_size=10)
    return path


def test_rows_of_parquet_go_in_typed(parquet: Path) -> None:
    kept = Kept()
    outcome = imported(parquet, kept, MAPPING)
    assert (outcome.tally.accepted, outcome.tally.rejected) == (24, 1)
    attributes = next(iter(kept.records.values())).attributes
    assert list(attributes["tags"].set_value.values) == ["vip"]
    assert attributes["spend"].money_value.amount_micros == 12_500_000
    assert attributes["joined"].time_value.ToJsonString() == "2026-01-02T00:00:00Z"


def test_rejects_of_parquet_are_json_lines_that_can_be_sent(parquet: Path) -> None:
    kept = Kept()
    rejects = imported(parquet, kept, MAPPING).rejects
    assert rejects is not None and rejects.name == "a.parquet.rejects.jsonl"
    told = json.loads(rejects.read_text())
    assert (told["_line"], told["_column"], told["customer"]) == (25, "age", {"id": 24})
    assert (told["note"], told["spend"]) == ("inf", 12.5), "what JSON has no number for is text"
    rejects.write_text(rejects.read_text().replace("500.0", "50"))
    assert imported(rejects, kept, MAPPING).tally.accepted == 1


def test_reading_goes_on_after_any_row_of_any_group(parquet: Path) -> None:
    rows = ParquetRows(parquet, "utf-8")
    whole = list(rows.read(START))
    for at in (0, 1, 9, 10, 11, 20, 24, 25):
        assert list(rows.read(Place(at, at))) == whole[at:]
    rows.close()


def test_columns_of_structures_are_known_by_path(parquet: Path) -> None:
    rows = ParquetRows(parquet, "utf-8")
    assert rows.columns is not None and {"customer", "customer.id", "age"} <= set(rows.columns)
    rows.close()


def test_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet files are not tested")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1, but for the rest")
    with pytest.raises(TsugiError):
        ParquetRows(path, "utf-8")
