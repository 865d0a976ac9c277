"""How well records without a shared identity find each other: ``python -m tests.benchmark.identity --data FOLDER``.

Handed a folder of public sets with known truth, or any CSV file with ``--csv FILE --map column=meaning … --truth
COLUMN``, it sends every record once, in a random order, as from several systems, asks for the profile of each, and
compares with the truth, pair by pair; then again in five other orders. The truth never reaches the resolver. Settings
are the built-in ones, the same for all sets. Prints a table and writes build/identity.json.

Sets made from a seed (``people.py``) come with it: people in households, with twins and namesakes, at several sizes.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import click
from rich.console import Console
from rich.table import Table

from server.profiles import ladders, matching
from server.profiles.cleansing import cleanse
from tests.benchmark import people
from tsugi.v1.catalog_pb2 import Meaning

ROOT: Final = Path(__file__).parents[2]
RESULT: Final = ROOT / "build" / "identity.json"
ORDERS: Final = 6  # the first is judged against the truth, the others against the first
LINK_BITS_MIN, REVIEW_BITS_MIN = 12.0, 6.0  # the catalog's defaults

Attributes = Sequence[tuple[str, Meaning]]
Columns = Mapping[str, str]  # column → meaning, in lower case without its prefix


MEANINGS: Final = {Meaning.Name(one).removeprefix("MEANING_").lower(): one for one in ladders.LADDERS}


class DataSet(NamedTuple):
    """Records with known truth."""

    name: str
    attributes: Attributes
    records: Sequence[Mapping[str, str]]  # attribute → text as its source wrote it
    truths: Sequence[str]  # the person of each record
    country_code: str = ""


class KnownSet(NamedTuple):
    """A public set and what its columns mean."""

    name: str
    path: str
    columns: Columns
    truth: str
    country_code: str


_FEBRL: Final[Columns] = {
    "given_name": "given_name", "surname": "family_name", "street_number": "street_address",
    "address_1": "street_address", "address_2": "street_address", "suburb": "city", "postcode": "postcode",
    "state": "region", "date_of_birth": "birth_date", "soc_sec_id": "national_id",
}  # fmt: skip
_FAKE: Final[Columns] = {
    "first_name": "given_name", "surname": "family_name", "dob": "birth_date", "city": "city", "email": "email"
}  # fmt: skip
KNOWN: Final = (
    KnownSet("febrl1", "febrl/dataset1.csv.gz", _FEBRL, "rec_id", "AU"),
    KnownSet("febrl2", "febrl/dataset2.csv.gz", _FEBRL, "rec_id", "AU"),
    KnownSet("fake_1000", "splink/fake_1000.csv", _FAKE, "cluster", "GB"),
)


class Resolver(Protocol):
    """Whatever tells people apart."""

    def send(self, record_id: str, record: Mapping[str, str]) -> None:
        """Take in one record."""

    def profile_of(self, record_id: str) -> Hashable:
        """Return the profile a record belongs to now."""


class MemoryResolver:
    """The functions of ``server/profiles/matching.py`` over dictionaries; records are parts, one each.

    Args:
        attributes: name and meaning of each.
        country_code: of records that do not say it themselves.
    """

    def __init__(self, attributes: Attributes, country_code: str) -> None:
        self._fields = matching.match_fields(attributes, {})
        self._meanings = dict(attributes)
        self._country_code = country_code
        self._comparables: dict[str, matching.Comparable] = {}
        self._blocks: dict[bytes, list[str]] = defaultdict(list)
        self._edges: dict[str, dict[str, float]] = defaultdict(dict)
        self._profiles: dict[str, str] = {}
        self.n_compared = 0

    def send(self, record_id: str, record: Mapping[str, str]) -> None:
        clean = {name: cleanse(self._meanings[name], text, self._country_code) for name, text in record.items() if text}
        mine = matching.comparable(self._fields, {name: one.text for name, one in clean.items() if one.is_clean})
        found: set[str] = set()
        for key in matching.blocking_keys(self._fields, mine):
            block = self._blocks[key]
            if len(block) <= matching.BLOCK_PARTS_MAX:
                found.update(block)
                block.append(record_id)
        self.n_compared += len(found)
        for other in found:
            bits = matching.weight(self._fields, mine, self._comparables[other])
            if bits >= REVIEW_BITS_MIN:
                self._edges[record_id][other] = self._edges[other][record_id] = bits
        self._comparables[record_id] = mine
        self._profiles.clear()

    def profile_of(self, record_id: str) -> Hashable:
        if record_id not in self._profiles:
            self._group(record_id)
        return self._profiles[record_id]

    def candidates(self) -> set[tuple[str, str]]:
        """Return all pairs that some block brings together, as they are now."""
        return {
            pair
            for block in self._blocks.values()
            if len(block) <= matching.BLOCK_PARTS_MAX
            for pair in itertools.combinations(sorted(block), 2)
        }

    def reviews(self) -> set[tuple[str, str]]:
        """Return the pairs whose weight is enough for a review, of different profiles."""
        return {
            (one, other)
            for one, edges in self._edges.items()
            for other in edges
            if one < other and self.profile_of(one) != self.profile_of(other)
        }

    def explain(self, one: str, other: str) -> list[matching.Agreement]:
        return matching.explain(self._fields, self._comparables[one], self._comparables[other])

    def _group(self, record_id: str) -> None:
        """Tell all records that links lead to from this one their profiles."""
        reached, waiting = {record_id}, [record_id]
        while waiting:
            for other, bits in self._edges[waiting.pop()].items():
                if bits >= LINK_BITS_MIN and other not in reached:
                    reached.add(other)
                    waiting.append(other)
        keys = sorted(reached)
        rows = {key: row for row, key in enumerate(keys)}
        edges = [
            (rows[key], rows[other], bits)
            for key in keys
            for other, bits in self._edges[key].items()
            if key < other and bits >= LINK_BITS_MIN
        ]
        labels = matching.cluster(
            len(keys),
            edges,
            lambda ones, others: matching.weight_between(
                self._fields, [self._comparables[keys[i]] for i in ones], [self._comparables[keys[j]] for j in others]
            ),
        )
        self._profiles |= {key: keys[label] for key, label in zip(keys, labels, strict=True)}


class Quality(NamedTuple):
    """How one partition of records compares with another, pair by pair."""

    precision: float
    recall: float
    f1: float


def quality(found: Sequence[Hashable], truths: Sequence[Hashable]) -> Quality:
    """Compare two partitions of the same records: of the pairs found, how many are true, and the reverse."""
    n_found = _n_pairs(found)
    n_true = _n_pairs(truths)
    n_both = _n_pairs(list(zip(found, truths, strict=True)))
    precision = n_both / n_found if n_found else 1.0
    recall = n_both / n_true if n_true else 1.0
    return Quality(precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)


def _n_pairs(labels: Sequence[Hashable]) -> int:
    return sum(count * (count - 1) // 2 for count in Counter(labels).values())


def resolve(data: DataSet, seed: int) -> tuple[MemoryResolver, list[Hashable]]:
    """Send a set in a random order; return the resolver and the profile of each record."""
    resolver = MemoryResolver(data.attributes, data.country_code)
    order = list(range(len(data.records)))
    random.Random(seed).shuffle(order)
    for row in order:
        resolver.send(f"{row:07d}", data.records[row])
    return resolver, [resolver.profile_of(f"{row:07d}") for row in range(len(data.records))]


def measure(data: DataSet, n_orders: int = ORDERS) -> dict[str, Any]:
    """Return the figures of one set."""
    started = time.perf_counter()
    resolver, first = resolve(data, seed=0)
    elapsed_s = time.perf_counter() - started
    result = quality(first, data.truths)
    others = [quality(resolve(data, seed)[1], first).f1 for seed in range(1, n_orders)]
    true_pairs = _true_pairs(data.truths)
    reviews = resolver.reviews()
    return {
        "records": len(data.records),
        "people": len(set(data.truths)),
        "true_pairs": len(true_pairs),
        "precision": result.precision,
        "recall": result.recall,
        "f1": result.f1,
        "order_f1_min": min(others, default=1.0),
        "pair_completeness": len(true_pairs & resolver.candidates()) / max(1, len(true_pairs)),
        "compared_per_record": resolver.n_compared / len(data.records),
        "review_pairs": len(reviews),
        "review_true_share": len(reviews & true_pairs) / max(1, len(reviews)),
        "record_us": 1e6 * elapsed_s / len(data.records),
    }


def _true_pairs(truths: Sequence[str]) -> set[tuple[str, str]]:
    people_rows: dict[str, list[str]] = defaultdict(list)
    for row, truth in enumerate(truths):
        people_rows[truth].append(f"{row:07d}")
    return {pair for rows in people_rows.values() for pair in itertools.combinations(rows, 2)}


def load(path: Path, columns: Columns, truth: str, name: str, country_code: str = "") -> DataSet:
    """Read a CSV file, gzipped or not, blanks around values allowed.

    Args:
        path: of the file.
        columns: to send, with their meanings.
        truth: the column that says who it is; of values such as rec-12-dup-0 what stands before the second hyphen.
        name: of the set.
        country_code: of records that do not say it themselves.
    """
    meanings = [(column, MEANINGS[meaning]) for column, meaning in columns.items()]
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        rows = [
            {key.strip(): (value or "").strip() for key, value in row.items()}
            for row in csv.DictReader(lines, skipinitialspace=True)
        ]
    records = [{column: row[column] for column in columns if row[column]} for row in rows]
    truths = ["-".join(row[truth].split("-")[:2]) if row[truth].startswith("rec-") else row[truth] for row in rows]
    return DataSet(name, meanings, records, truths, country_code)


def known_sets(folder: Path) -> list[DataSet]:
    """Return the public sets that are there."""
    return [
        load(folder / known.path, known.columns, known.truth, known.name, known.country_code)
        for known in KNOWN
        if (folder / known.path).exists()
    ]


def made_sets(n_people: int) -> list[DataSet]:
    """Return made-up people with everything, and with one fact or another missing everywhere."""
    written = people.write_down(n_people, seed=1)
    gaps = {
        "made up": (),
        "made up, no birth date": ("born",),
        "made up, no e-mail or telephone": ("email", "phone"),
        "made up, name, birth date and town": ("email", "phone", "street", "postcode"),
        "made up, no family name": ("family",),
        "made up, no given name": ("given",),
    }
    sets = [(name, people.without(written, *columns)) for name, columns in gaps.items()]
    sets.append(("made up, many errors", people.write_down(n_people, seed=2, errors=2.5)))
    return [
        DataSet(name, people.MEANINGS, [one.texts for one in rows], [one.person for one in rows], "AU")
        for name, rows in sets
    ]


def table(sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the figures for people to read."""
    shown = Table("set", "records", "true pairs", "precision", "recall", "F1", "F1 of orders", "found by blocks",
                  "compared", "reviews", "true", "µs a record")  # fmt: skip
    for name, one in sets.items():
        shown.add_row(
            name, f"{one['records']:,}", f"{one['true_pairs']:,}", f"{one['precision']:.4f}", f"{one['recall']:.4f}",
            f"{one['f1']:.4f}", f"{one['order_f1_min']:.4f}", f"{one['pair_completeness']:.4f}",
            f"{one['compared_per_record']:.1f}", f"{one['review_pairs']:,}", f"{one['review_true_share']:.2f}",
            f"{one['record_us']:.0f}",
        )  # fmt: skip
    return shown


@click.command()
@click.option("--data", "folder", type=click.Path(path_type=Path, exists=True), help="Folder of the public sets.")
@click.option("--csv", "path", type=click.Path(path_type=Path, exists=True), help="Any other file, gzipped or not.")
@click.option("--map", "mappings", multiple=True, metavar="COLUMN=MEANING", help="What a column of it means.")
@click.option("--truth", default="", help="The column that says who it is.")
@click.option("--name", default="", help="What to call it; else the file's name.")
@click.option("--country", default="", help="Of its records, ISO 3166-1 alpha-2.")
@click.option("--people", "n_people", default=4_000, show_default=True, help="How many to make up; 0: none.")
def main(
    folder: Path | None, path: Path | None, mappings: Sequence[str], truth: str, name: str, country: str, n_people: int
) -> None:
    """Measure how well records without a shared identity find each other."""
    sets = known_sets(folder) if folder else []
    if path:
        columns = {column: meaning for column, _, meaning in (mapping.partition("=") for mapping in mappings)}
        if not truth or not columns or not set(columns.values()) <= MEANINGS.keys():
            raise click.UsageError(f"--csv needs --truth and --map COLUMN=MEANING; meanings: {', '.join(MEANINGS)}")
        sets.append(load(path, columns, truth, name or path.name, country))
    if n_people:
        sets += made_sets(n_people)
    figures: dict[str, dict[str, Any]] = {}
    for data in sets:
        click.echo(f"{data.name} …", err=True)
        figures[data.name] = measure(data)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"sets": figures}, indent=2) + "\n", encoding="utf-8")
    Console(width=180).print(table(figures))  # files and pipes have no width of their own


if __name__ == "__main__":
    main()
