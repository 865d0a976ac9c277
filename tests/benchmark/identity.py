"""How well records without a shared identity find each other: ``python -m tests.benchmark.identity --data FOLDER``.

Handed a folder of public sets with known truth, or any CSV files with ``--csv FILE --map column=meaning … --truth
COLUMN``, it sends every record once, in a random order, as from several systems, to a running server, asks for the
golden record of each, and compares with the truth, pair by pair; then again in five other orders, in this process. The
truth never reaches Tsugi. Settings are the built-in ones, the same for all sets. Prints a table and writes
build/identity.json.

With the public sets come some that are made from a seed (``people.py``): people in households, with twins and
namesakes. They are resolved in this process alone.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from rich.console import Console
from rich.table import Table

from tests.benchmark.identity_sets import MEANINGS, DataSet, SetError, known_sets, load, made_sets
from tests.benchmark.resolution import Pair, Resolution, resolve, resolve_served

ROOT: Final = Path(__file__).parents[2]
RESULT: Final = ROOT / "build" / "identity.json"
ORDERS: Final = 6  # the first is judged against the truth, the others against the first


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


def measure(data: DataSet, n_orders: int = ORDERS, *, is_served: bool = False) -> dict[str, Any]:
    """Return the figures of one set.

    Args:
        data: the set.
        n_orders: in which it is sent.
        is_served: the first order goes to a running server, and all others are compared with what that one says.
    """
    orders = [_resolved(data, seed) for seed in range(n_orders)]
    first, others = orders[0], [each.profile_ids for each in orders[1:]]
    served = resolve_served(data.attributes, data.records, 0, data.country_code) if is_served else None
    judged = first
    if served is not None:
        judged = served
        others.append(first.profile_ids)
    result = quality(judged.profile_ids, data.truths)
    true_pairs = _true_pairs(data.truths)
    figures = {
        "records": len(data.records),
        "people": len(set(data.truths)),
        "true_pairs": len(true_pairs),
        "refused": judged.n_refused,
        "precision": result.precision,
        "recall": result.recall,
        "f1": result.f1,
        "order_f1_min": min((quality(other, judged.profile_ids).f1 for other in others), default=1.0),
        "pair_completeness": len(true_pairs & first.candidates) / max(1, len(true_pairs)),
        "candidate_pairs": len(first.candidates),
        "review_pairs": len(first.reviews),
        "review_true_share": len(first.reviews & true_pairs) / max(1, len(first.reviews)),
        "project_record_us": min(each.record_us for each in orders),  # the least disturbed
    }
    return figures | ({"ingest_record_us": served.record_us} if served is not None else {})


def _resolved(data: DataSet, seed: int) -> Resolution:
    return resolve(data.attributes, data.records, seed, data.country_code)


def _true_pairs(truths: Sequence[str]) -> set[Pair]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, truth in enumerate(truths):
        rows[truth].append(row)
    return {pair for together in rows.values() for pair in itertools.combinations(together, 2)}


def table(sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the figures for people to read."""
    shown = Table("set", "records", "true pairs", "precision", "recall", "F1", "F1 of orders", "found by blocks",
                  "reviews", "true", "project, µs", "ingest, µs")  # fmt: skip
    for name, one in sets.items():
        shown.add_row(
            name, f"{one['records']:,}", f"{one['true_pairs']:,}", f"{one['precision']:.4f}", f"{one['recall']:.4f}",
            f"{one['f1']:.4f}", f"{one['order_f1_min']:.4f}", f"{one['pair_completeness']:.4f}",
            f"{one['review_pairs']:,}", f"{one['review_true_share']:.2f}", f"{one['project_record_us']:.0f}",
            f"{one['ingest_record_us']:.0f}" if "ingest_record_us" in one else "",
        )  # fmt: skip
    return shown


def _column(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Read what --map says, or tell what is wrong with it."""
    columns = []
    for text in texts:
        column, _, meaning = text.rpartition("=")
        if not column or meaning.strip() not in MEANINGS:
            raise click.BadParameter(f"{text!r} is not COLUMN=MEANING; the meanings are {', '.join(MEANINGS)}")
        columns.append(("+".join(one.strip() for one in column.split("+")), meaning.strip()))
    return columns


def _sets(
    folder: Path | None, paths: Sequence[Path], columns: Sequence[tuple[str, str]], truth: str, name: str, country: str
) -> list[DataSet]:
    """Return the sets that were asked for."""
    if paths and not (columns and truth):
        raise click.UsageError("--csv needs --truth COLUMN and at least one --map COLUMN=MEANING")
    if not paths and (columns or truth):
        raise click.UsageError("--map and --truth describe a file: name it with --csv FILE")
    if not paths and folder is None:
        raise click.UsageError(
            "nothing to measure: name the folder of the public sets with --data FOLDER or TSUGI_DATASETS_DIR, or a "
            "file with --csv FILE --map COLUMN=MEANING --truth COLUMN"
        )
    try:
        if paths:
            return [load(paths, columns, truth, name or paths[0].name, country)]
        return known_sets(folder) if folder is not None else []
    except SetError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.option("--data", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False),
              envvar="TSUGI_DATASETS_DIR", help="Folder of the public sets; else TSUGI_DATASETS_DIR.")  # fmt: skip
@click.option("--csv", "paths", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True,
              help="Any other set instead, gzipped or not; several files are one set.")  # fmt: skip
@click.option("--map", "columns", multiple=True, metavar="COLUMN=MEANING", callback=_column,
              help="What a column means; a+b joins two, and a meaning may have several.")  # fmt: skip
@click.option("--truth", default="", metavar="COLUMN", help="The column that says who it is.")
@click.option("--name", default="", help="What to call it; else the first file's name.")
@click.option("--country", default="", help="Of records that do not say it, ISO 3166-1 alpha-2.")
@click.option("--people", "n_people", default=1_000, show_default=True, help="Made up beside the public sets.")
def main(
    folder: Path | None,
    paths: Sequence[Path],
    columns: Sequence[tuple[str, str]],
    truth: str,
    name: str,
    country: str,
    n_people: int,
) -> None:
    """Measure how well records without a shared identity find each other."""
    given = _sets(folder, paths, columns, truth, name, country)
    made = made_sets(n_people) if n_people and not paths else []
    figures: dict[str, dict[str, Any]] = {}
    for data in (*given, *made):
        click.echo(f"{data.name}: {len(data.records):,} records …", err=True)
        figures[data.name] = measure(data, is_served=data in given)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"sets": figures}, indent=2) + "\n", encoding="utf-8")
    Console(width=180).print(table(figures))  # files and pipes have no width of their own


if __name__ == "__main__":
    main()
