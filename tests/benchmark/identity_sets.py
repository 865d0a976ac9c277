"""Records with known truth: the public sets, any CSV files, and made-up people.

A set says who each record is of, and that is kept apart from what its sources wrote. Files may be gzipped, in UTF-8 or
Latin-1, with commas, semicolons, tabs or bars between their cells.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from server.profiles import ladders
from tests.benchmark import people
from tsugi.v1.catalog_pb2 import Meaning

MEANINGS: Final = {Meaning.Name(one).removeprefix("MEANING_").lower(): one for one in ladders.LADDERS}

Columns = Sequence[tuple[str, str]]  # a column, or several joined by +, and the meaning, in order; see MEANINGS

_DELIMITERS: Final = ",;\t|"
_FEBRL_ID: Final = re.compile(r"(rec-\d+)-(?:org|dup-\d+)")  # the person, and which record of theirs


class DataSet(NamedTuple):
    """Records with known truth."""

    name: str
    attributes: Sequence[tuple[str, Meaning]]
    records: Sequence[Mapping[str, str]]  # attribute → text as its source wrote it
    truths: Sequence[str]  # the person of each record
    country_code: str = ""


class SetError(ValueError):
    """A set cannot be read as it was described."""


class _KnownSet(NamedTuple):
    name: str
    path: str
    columns: Columns
    truth: str
    country_code: str


_FEBRL: Final[Columns] = (
    ("given_name", "given_name"), ("surname", "family_name"), ("street_number", "street_address"),
    ("address_1", "street_address"), ("address_2", "street_address"), ("suburb", "city"), ("postcode", "postcode"),
    ("state", "region"), ("date_of_birth", "birth_date"), ("soc_sec_id", "national_id"),
)  # fmt: skip
_FAKE: Final[Columns] = (
    ("first_name", "given_name"), ("surname", "family_name"), ("dob", "birth_date"), ("city", "city"),
    ("email", "email"),
)  # fmt: skip
_KNOWN: Final = (
    _KnownSet("febrl1", "febrl/dataset1.csv.gz", _FEBRL, "rec_id", "AU"),
    _KnownSet("febrl2", "febrl/dataset2.csv.gz", _FEBRL, "rec_id", "AU"),
    _KnownSet("fake_1000", "splink/fake_1000.csv", _FAKE, "cluster", "GB"),
)


def known_sets(folder: Path) -> list[DataSet]:
    """Return the public sets that are in a folder.

    Raises:
        SetError: none is there, or one cannot be read.
    """
    found = [known for known in _KNOWN if (folder / known.path).exists()]
    if not found:
        raise SetError(f"{folder} holds none of {', '.join(known.path for known in _KNOWN)}")
    return [load([folder / one.path], one.columns, one.truth, one.name, one.country_code) for one in found]


def load(paths: Sequence[Path], columns: Columns, truth: str, name: str, country_code: str = "") -> DataSet:
    """Read one set from one or more CSV files.

    Rows whose truth is not known are left out. Blanks around names of columns and values count for nothing.

    Args:
        paths: of the files; a column that is missing in some of them is empty there.
        columns: what to send, and what it means.
        truth: the column that says who it is; of values such as rec-12-dup-0, what stands before the second hyphen.
        name: of the set.
        country_code: of records that do not say it themselves.

    Raises:
        SetError: a file has no rows, a column is nowhere, a meaning is not known.
    """
    attributes = [(attribute, MEANINGS[meaning]) for attribute, meaning in _attributes(columns)]
    tables = [read_rows(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if not table:
            raise SetError(f"{path}: it has no rows")
        if truth not in table[0]:
            raise SetError(f"{path}: there is no column {truth!r} for the truth; it has {', '.join(table[0])}")
    rows = [row for table in tables for row in table if row[truth]]
    for column in dict.fromkeys(one for joined, _ in columns for one in joined.split("+")):
        if not any(column in table[0] for table in tables):
            raise SetError(f"there is no column {column!r}; there are {', '.join(dict.fromkeys(_headers(tables)))}")
    records = [
        {
            attribute: text
            for (attribute, _), (joined, _) in zip(attributes, columns, strict=True)
            if (text := " ".join(filter(None, (row.get(one, "") for one in joined.split("+")))))
        }
        for row in rows
    ]
    return DataSet(name, attributes, records, [_person(row[truth]) for row in rows], country_code)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by column.

    Raises:
        SetError: two columns have one name, or it is no CSV file.
    """
    data = path.read_bytes()
    try:
        text = _decoded(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).lstrip("\r\n")
        first_line = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first_line.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        header = [cell.strip() for cell in next(reader, [])]
        rows = [[cell.strip() for cell in cells] for cells in reader if cells]
    except (csv.Error, EOFError, OSError) as error:
        raise SetError(f"{path}: {error}") from error
    if len(set(header)) < len(header):
        raise SetError(f"{path}: two columns have one name, among {', '.join(header)}")
    return [dict.fromkeys(header, "") | dict(zip(header, cells, strict=False)) for cells in rows]


def made_sets(n_people: int) -> list[DataSet]:
    """Return made-up people with everything, with one fact or another missing everywhere, and written otherwise."""
    written = people.write_down(n_people, seed=1)
    gaps: dict[str, Iterable[str]] = {
        "made up": (),
        "made up, no birth date": ("born",),
        "made up, no e-mail or telephone": ("email", "phone"),
        "made up, no family name": ("family",),
        "made up, no given name": ("given",),
        "made up, names, birth date, town": ("email", "phone", "street", "postcode"),
        "made up, names, birth date, postcode": ("email", "phone", "street", "city"),
        "made up, names, telephone": ("email", "born", "street", "postcode", "city"),
        "made up, names, e-mail": ("phone", "born", "street", "postcode", "city"),
    }
    sets = {name: people.without(written, *columns) for name, columns in gaps.items()}
    sets["made up, many errors"] = people.write_down(n_people, seed=2, errors=2.5)
    return [_made_set(name, rows, "AU") for name, rows in sets.items()] + [
        _made_set("made up, each source in its style", people.in_styles(people.write_down(n_people, seed=3), 3), "AU")
    ]


def _made_set(name: str, rows: Sequence[people.Written], country_code: str) -> DataSet:
    return DataSet(name, people.MEANINGS, [one.texts for one in rows], [one.person for one in rows], country_code)


def _attributes(columns: Columns) -> list[tuple[str, str]]:
    """Name an attribute for each column after its meaning: given_name, street_address, street_address_2."""
    counts: dict[str, int] = {}
    named = []
    for _, meaning in columns:
        if meaning not in MEANINGS:
            raise SetError(f"no meaning {meaning!r}; the meanings are {', '.join(MEANINGS)}")
        counts[meaning] = counts.get(meaning, 0) + 1
        named.append((meaning if counts[meaning] == 1 else f"{meaning}_{counts[meaning]}", meaning))
    return named


def _headers(tables: Iterable[Sequence[Mapping[str, str]]]) -> Iterable[str]:
    return (column for table in tables for column in table[0])


def _person(truth: str) -> str:
    found = _FEBRL_ID.fullmatch(truth)
    return found[1] if found else truth


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")
