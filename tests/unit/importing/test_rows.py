"""Files as rows: whatever is wrong with one row, its line is right and the rows after it are read."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import TsugiError
from server.importing.csv_rows import CsvRows
from server.importing.json_rows import JsonRows
from server.importing.rows import FIELD_BYTES_MAX, SEARCH_BYTES_MAX, START, Place, Row, Rows

HEADER = b"id,text,last\n"
Told = list[tuple[int, Any]]


def told(rows: Rows, start: Place = START) -> Told:
    """Return each row's line, and its cells or the reason why it has none."""
    with_lines: Told = []
    for row in rows.read(start):
        with_lines.append((row.line, row.cells if row.fault is None else row.fault.reason))
    rows.close()
    return with_lines


def of_csv(folder: Path, data: bytes, encoding: str = "utf-8", delimiter: str = ",") -> Told:
    path = folder / "a.csv"
    path.write_bytes(data)
    return told(CsvRows(path, encoding, delimiter))


def of_json(folder: Path, data: bytes, encoding: str = "utf-8") -> Told:
    path = folder / "a.jsonl"
    path.write_bytes(data)
    return told(JsonRows(path, encoding))


GOOD = b"9,good,z\n"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"1,a,b\r\n2,c,d", [(2, ["1", "a", "b"]), (3, ["2", "c", "d"])]),
        (b'1,"a ""x"", b",c\n', [(2, ["1", 'a "x", b', "c"])]),
        (b'1,"a\nb\r\n",c\n' + GOOD, [(2, ["1", "a\nb\r\n", "c"]), (5, ["9", "good", "z"])]),
        (b"\n\n1,a,b\n\n", [(4, ["1", "a", "b"])]),
        (b"1,a\n1,a,b,c\n" + GOOD, [(2, "ROW_MALFORMED"), (3, "ROW_MALFORMED"), (4, ["9", "good", "z"])]),
        (b"1,M\xfcller,b\n" + GOOD, [(2, "ENCODING_INVALID"), (3, ["9", "good", "z"])]),
        (b'1,"a"x,b\n' + GOOD, [(2, "ROW_MALFORMED"), (3, ["9", "good", "z"])]),
        # A quote that is never closed costs its own line, to the end of the file ...
        (b'1,"a,b\n' + GOOD + GOOD, [(2, "ROW_MALFORMED"), (3, ["9", "good", "z"]), (4, ["9", "good", "z"])]),
        # ... and up to the next quote, which does not close it.
        (
            b'1,"a,b\n' + GOOD + b'3,"x, y",z\n',
            [(2, "ROW_MALFORMED"), (3, ["9", "good", "z"]), (4, ["3", "x, y", "z"])],
        ),
        (b"1,a\rb,c\n" + GOOD, [(2, "ROW_MALFORMED"), (3, ["9", "good", "z"])]),
        (b"1,a\0b,c\n", [(2, ["1", "a\0b", "c"])]),
        (b"", []),
    ],
)
def test_wrong_csv_row_costs_itself_alone(tmp_path: Path, data: bytes, wanted: Told) -> None:
    assert of_csv(tmp_path, HEADER + data) == wanted


@pytest.mark.parametrize("size", [FIELD_BYTES_MAX + 6, 200_000, 2_000_000])
@pytest.mark.parametrize("shape", ["plain", "quoted", "lines"])
def test_field_that_is_too_long_costs_its_row_alone(tmp_path: Path, size: int, shape: str) -> None:
    field = {"plain": b"x" * size, "quoted": b'"' + b"x" * size + b'"', "lines": b'"' + b"1,2,3\n" * (size // 6) + b'"'}
    data = b"1," + field[shape] + b",c\n"
    found = of_csv(tmp_path, HEADER + GOOD + data + GOOD)
    good = ["9", "good", "z"]
    assert found == [(2, good), (3, "ROW_TOO_LONG"), (3 + data.count(b"\n"), good)]


def test_line_longer_than_is_searched_costs_its_row_alone(tmp_path: Path) -> None:
    data = b'1,"' + b"x" * (SEARCH_BYTES_MAX + 100) + b'",c\n'
    good = ["9", "good", "z"]
    assert of_csv(tmp_path, HEADER + GOOD + data + GOOD) == [(2, good), (3, "ROW_TOO_LONG"), (4, good)]
    assert of_json(tmp_path, b'{"a":1}\n' + data + b'{"a":2}\n') == [(1, {"a": 1}), (2, "ROW_TOO_LONG"), (3, {"a": 2})]


def test_open_quote_before_many_rows_costs_its_line_alone(tmp_path: Path) -> None:
    many = GOOD * 20_000  # more than a field may hold
    found = of_csv(tmp_path, HEADER + b'1,"a,b\n' + many)
    assert found[0] == (2, "ROW_MALFORMED")
    assert len(found) == 20_001
    assert found[-1] == (20_002, ["9", "good", "z"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "latin-1", "cp1252"])
def test_every_encoding_is_read_with_right_lines(tmp_path: Path, encoding: str) -> None:
    last = "Ċ" if encoding.startswith("utf") else "ö"  # U+010A has a line feed for a byte
    data = f'id,text,last\n1,"Zoë\nÄ",{last}\n2,"x",y\n'.encode(encoding)
    data = codecs.BOM_UTF16_BE + data if encoding == "utf-16-be" else data
    found = of_csv(tmp_path, data, "utf-16" if encoding.startswith("utf-16") else encoding)
    assert found == [(2, ["1", "Zoë\nÄ", last]), (4, ["2", "x", "y"])]


def test_byte_order_mark_belongs_to_no_column(tmp_path: Path) -> None:
    assert of_csv(tmp_path, codecs.BOM_UTF8 + HEADER + GOOD) == [(2, ["9", "good", "z"])]
    assert of_json(tmp_path, codecs.BOM_UTF8 + b'{"a": 1}\n') == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"", "utf-8"),
        (b"\n", "utf-8"),
        (b'"a,b\n', "utf-8"),
        (b"a,\xfc\n", "utf-8"),
        ("a,b\n".encode("utf-16"), "utf-8"),
    ],
)
def test_file_without_a_header_is_refused(tmp_path: Path, data: bytes, encoding: str) -> None:
    with pytest.raises(TsugiError):
        of_csv(tmp_path, data, encoding)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("a,ü\n".encode("latin-1"), "state csv.encoding, such as latin-1"),
        ("a,b\n".encode("utf-16"), "state csv.encoding, such as utf-16"),
        ("a,b\r\n".encode("utf-16"), "state csv.encoding, such as utf-16"),
        (b'"a";"b"\n', "csv.delimiter"),
        ("a,b\n".encode("utf-16-le"), "state csv.encoding, such as utf-16"),
        (b"a,b\r1,2\r", "lines end with a line feed"),
    ],
)
def test_header_that_cannot_be_read_says_what_to_state(tmp_path: Path, data: bytes, hint: str) -> None:
    with pytest.raises(TsugiError) as refusal:
        of_csv(tmp_path, data)
    assert hint in refusal.value.violations[0].description


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_row_in_another_encoding_says_what_to_state(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes((HEADER + b"1,M\xfcller,b\n") if ending == "csv" else b'{"a": "M\xfcller"}\n')
    rows = CsvRows(path, "utf-8", ",") if ending == "csv" else JsonRows(path, "utf-8")
    (row,) = rows.read(START)
    rows.close()
    assert row.fault is not None
    assert row.fault.message == "bytes that are not utf-8; state csv.encoding, such as latin-1"


def test_packed_file_is_read_like_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(HEADER + GOOD * 3))
    rows = CsvRows(path, "utf-8", ",")
    listed = list(rows.read(START))
    assert [row.line for row in listed] == [2, 3, 4]
    assert told(rows, Place(listed[1].end, listed[1].end_line)) == [(4, ["9", "good", "z"])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "ROW_MALFORMED"),
        (b"[1]", "ROW_MALFORMED"),
        (b"1", "ROW_MALFORMED"),
        (b'{"a": NaN}', "ROW_MALFORMED"),
        (b'{"a": 1, "a": 1}', "ROW_MALFORMED"),
        (b'{"a": {"b": 1, "b": 2}}', "ROW_MALFORMED"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "ROW_MALFORMED"),
        (b"[" * 100_000, "ROW_MALFORMED"),
        (b'{"a": "\xfc"}', "ENCODING_INVALID"),
        (b'{"a": "' + b"x" * FIELD_BYTES_MAX + b'y"}', "ROW_TOO_LONG"),
    ],
)
def test_wrong_json_line_costs_itself_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    found = of_json(tmp_path, b'{"a": 1}\n\n' + line + b'\n{"a": {"b": [2]}}')
    assert found == [(1, {"a": 1}), (3, reason), (4, {"a": {"b": [2]}})]


ANY_ROW = st.one_of(
    st.lists(st.text('ab,"\n\r é', max_size=6), min_size=3, max_size=3).map(lambda cells: _written(cells).encode()),
    st.sampled_from([b'1,"a,b\n', b"1,a\n", b'"\n', b"1,\xff,3\n", b'1,"a"b,3\n', b"\n", b'1,"a\nb",3\n']),
)


def _written(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


@given(st.lists(ANY_ROW, max_size=12), st.integers(0, 11))
def test_reading_may_stop_after_any_row_and_go_on_there(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], stop: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    path.write_bytes(HEADER + b"".join(pieces))
    whole = _listed(path, START)
    if stop < len(whole):
        assert _listed(path, Place(whole[stop].end, whole[stop].end_line)) == whole[stop + 1 :]
    assert _without_ends(row.raw for row in whole) == _without_ends(pieces)  # nothing is lost; blank lines are no rows


def _without_ends(pieces: Iterable[bytes]) -> bytes:
    return b"".join(pieces).translate(None, b"\r\n")


def _listed(path: Path, start: Place) -> list[Row]:
    rows = CsvRows(path, "utf-8", ",")
    try:
        return list(rows.read(start))
    finally:
        rows.close()


@given(st.lists(st.lists(st.text('ab,"\n é', max_size=6), min_size=3, max_size=3), max_size=8))
def test_what_a_csv_writer_wrote_comes_back(tmp_path_factory: pytest.TempPathFactory, table: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    path.write_bytes(HEADER + "".join(_written(cells) for cells in table).encode())
    assert [row.cells for row in _listed(path, START)] == table
