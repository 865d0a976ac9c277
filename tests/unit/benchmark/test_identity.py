"""The benchmark of matching reads any CSV file of people, says what is wrong with a request, and counts pairs right."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.benchmark import identity
from tests.benchmark.identity import quality
from tests.benchmark.identity_sets import SetError, known_sets, load, read_rows

COLUMNS = [("name", "full_name"), ("born", "birth_date")]
ROWS = [{"id": "1", "name": "Zoë, A.", "born": "1980-05-17"}, {"id": "2", "name": "", "born": "1 May"}]
TEXT = 'id,name,born\n1,"Zoë, A.",1980-05-17\n2,,1 May\n'


def write(folder: Path, data: str | bytes, name: str = "people.csv") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(identity.main, [*arguments], env={"TSUGI_DATASETS_DIR": None})
    assert result.exit_code == 2
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("latin-1"),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        gzip.compress(TEXT.encode(), mtime=0),
        TEXT.replace("\n", "\r\n").encode(),
        b"\n\n" + TEXT.encode() + b"\n\n",
        b'id;name;born\n1;"Zo\xc3\xab, A.";1980-05-17\n2;;1 May\n',
        b"id\tname\tborn\n1\tZo\xc3\xab, A.\t1980-05-17\n2\t\t1 May\n",
        b'id, name, born\n1, "Zo\xeb, A.", 1980-05-17 \n2, , 1 May\n',
        b"id|name|born\n1|Zo\xeb, A.|1980-05-17\n2||1 May\n",
    ],
)  # fmt: skip
def test_files_are_read_as_they_come(tmp_path: Path, data: bytes) -> None:
    assert read_rows(write(tmp_path, data)) == ROWS


def test_columns_become_attributes_named_after_their_meanings(tmp_path: Path) -> None:
    path = write(tmp_path, "no,road,y,m,d,who\n12,Mill Lane,1980,5,17,rec-3-dup-0\n,,1981,,,rec-3-org\n,,,,,\n")
    columns = [("no", "street_address"), ("road", "street_address"), ("y+m+d", "birth_date")]
    data = load([path], columns, "who", "a set", "AU")
    assert [name for name, _ in data.attributes] == ["street_address", "street_address_2", "birth_date"]
    first = {"street_address": "12", "street_address_2": "Mill Lane", "birth_date": "1980 5 17"}
    assert data.records == [first, {"birth_date": "1981"}]
    assert data.truths == ["rec-3", "rec-3"]


def test_several_files_are_one_set_and_a_column_may_be_missing_in_some(tmp_path: Path) -> None:
    paths = [write(tmp_path, "id,name\n1,A\n", "a.csv"), write(tmp_path, "born,id\n1980-05-17,1\n", "b.csv")]
    assert load(paths, COLUMNS, "id", "a set").records == [{"full_name": "A"}, {"birth_date": "1980-05-17"}]


@pytest.mark.parametrize(
    ("data", "columns", "said"),
    [
        ("", COLUMNS, "no rows"),
        ("id,name,born\n", COLUMNS, "no rows"),
        ("id,name,id\n1,2,3\n", COLUMNS, "two columns have one name"),
        ("id,name\n1,2\n", COLUMNS, "no column 'born'; there are id, name"),
        ("name,born\n1,2\n", COLUMNS, "no column 'id' for the truth; it has name, born"),
        (TEXT, [("name", "surname")], "no meaning 'surname'; the meanings are given_name, family_name"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], COLUMNS, "people.csv: "),
    ],
)
def test_what_cannot_be_read_says_why(
    tmp_path: Path, data: str | bytes, columns: list[tuple[str, str]], said: str
) -> None:
    with pytest.raises(SetError, match=said):
        load([write(tmp_path, data)], columns, "id", "a set")


def test_folder_without_public_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetError, match=r"holds none of febrl/dataset1\.csv\.gz"):
        known_sets(tmp_path)
    assert "holds none of febrl" in refused("--data", str(tmp_path))


def test_malformed_command_lines_say_what_is_wanted(tmp_path: Path) -> None:
    path = str(write(tmp_path, TEXT))
    assert "name the folder of the public sets with --data FOLDER or TSUGI_DATASETS_DIR" in refused()
    assert "needs --truth COLUMN and at least one --map" in refused("--csv", path, "--map", "name=full_name")
    assert "'name' is not COLUMN=MEANING; the meanings are given_name" in refused("--csv", path, "--map", "name")
    assert "'name=who' is not COLUMN=MEANING" in refused("--csv", path, "--map", "name=who", "--truth", "id")
    assert "no column 'age'" in refused("--csv", path, "--map", "age=birth_date", "--truth", "id")
    assert "no column 'who' for the truth" in refused("--csv", path, "--map", "name=full_name", "--truth", "who")
    assert "name it with --csv FILE" in refused("--truth", "id")


def test_pairs_are_counted_against_the_truth() -> None:
    assert quality("aabbc", "xxxyz") == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert quality("abc", "xyz") == (1.0, 1.0, 1.0)
    assert quality("aab", "xyz").precision == 0.0
