"""Files of paths: what is read, and what refuses a file, with its place."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from server.attributing import path_rows
from server.attributing.path_rows import read_paths
from server.errors import TsugiError
from tests.support.attributing import Row, equal, paths_of
from tsugi.v1.error_reason_pb2 import ErrorReason

HEADER = "path,total_conversions,total_conversion_value,total_null\n"


def written(folder: Path, text: str, name: str = "paths.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def violations(path: Path) -> list[tuple[str, str]]:
    with pytest.raises(TsugiError) as refused:
        read_paths(path)
    assert refused.value.reason == ErrorReason.ERROR_REASON_FIELD_INVALID
    return [(each.path, each.description) for each in refused.value.violations]


def test_rows_become_columns(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + "mail > web > mail,2,10.5,1\nweb,0,0,3.0\n direct mail>web ,1,-2e1,0\n")
    read = read_paths(path)
    assert read.channels == ("mail", "web", "direct mail")
    assert read.n_cut == 0
    wanted = paths_of([Row([0, 1, 0], 2, 10.5, 1), Row([1], 0, 0.0, 3), Row([2, 1], 1, -20.0)])
    assert equal(read.paths, wanted)


def test_value_and_silences_may_be_left_out_and_columns_stand_in_any_order(tmp_path: Path) -> None:
    read = read_paths(written(tmp_path, "total_conversions,path\n4,a > b\n"))
    assert (read.paths.outcomes.tolist(), read.paths.values.tolist(), read.paths.silences.tolist()) == ([4], [0.0], [0])


def test_packed_file_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "paths.csv.gz"
    path.write_bytes(gzip.compress((HEADER + "a > b,1,2,3\n").encode()))
    assert read_paths(path).channels == ("a", "b")


def test_parquet_is_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="untested: that paths are read from Parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "paths.parquet"
    table = pyarrow.table({"path": ["a > b"], "total_conversions": [3], "total_null": [2.0]})
    parquet.write_table(table, path)
    read = read_paths(path)
    assert read.channels == ("a", "b")
    assert (read.paths.outcomes.tolist(), read.paths.silences.tolist()) == ([3], [2])


def test_of_a_path_that_is_too_long_the_newest_touchpoints_count(tmp_path: Path) -> None:
    read = read_paths(written(tmp_path, HEADER + f"{'a > ' * 3}{' > '.join('b' * 1_000)},1,1,0\n"))
    assert (read.n_cut, read.channels, set(read.paths.codes.tolist())) == (1, ("a", "b"), {1})


def test_file_without_rows_has_no_paths(tmp_path: Path) -> None:
    assert read_paths(written(tmp_path, HEADER)).paths.starts.tolist() == [0]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("path,total_null", "column total_conversions is missing"),
        ("path,total_conversions,total_nul", "'total_nul' is none of path, total_conversions, "),
        ("path,total_conversions,path", "column path stands there twice"),
    ],
)
def test_columns_are_known_and_whole(tmp_path: Path, header: str, said: str) -> None:
    ((place, description),) = violations(written(tmp_path, header + "\n"))
    assert place == "paths.csv:1"
    assert description.startswith(said)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (",1,1,0", "path"),
        ("a > > b,1,1,0", "path"),
        (f"{'a' * 129},1,1,0", "path"),
        ('"a\tb",1,1,0', "path"),
        ("a,-1,0,0", "total_conversions"),
        ("a,1.5,0,0", "total_conversions"),
        ("a,1_000,0,0", "total_conversions"),
        ("a,,0,0", "total_conversions"),
        ("a,inf,0,0", "total_conversions"),
        ("a,1e13,0,0", "total_conversions"),
        ("a,1,nan,0", "total_conversion_value"),
        ("a,1,1e16,0", "total_conversion_value"),
        ("a,1,much,0", "total_conversion_value"),
        ("a,0,1,0", "total_conversion_value"),
        ("a,1,1,-2", "total_null"),
        ("a,1,1", ""),
    ],
)
def test_a_wrong_cell_refuses_the_file_with_its_place(tmp_path: Path, row: str, column: str) -> None:
    ((place, _),) = violations(written(tmp_path, HEADER + f"a,1,1,0\n{row}\n"))
    assert place == (f"paths.csv:3.{column}" if column else "paths.csv:3")


def test_at_most_ten_faults_are_told(tmp_path: Path) -> None:
    assert len(violations(written(tmp_path, HEADER + "a,x,1,0\n" * 30))) == 10


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("CHANNELS_MAX", "path: at most 1 channels"),
        ("ROWS_MAX", "paths.csv: at most 1 rows"),
        ("TOUCHPOINTS_IN_PATHS_MAX", "paths.csv: at most 1 touchpoints"),
    ],
)
def test_limits_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, said: str) -> None:
    monkeypatch.setattr(path_rows, limit, 1)
    row = "a > b,1,1,0\n" if limit == "CHANNELS_MAX" else "a,1,1,0\n"
    with pytest.raises(TsugiError, match=said) as refused:
        read_paths(written(tmp_path, HEADER + row * 2))
    assert refused.value.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
