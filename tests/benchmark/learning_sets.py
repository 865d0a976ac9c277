"""Classification sets played as bandits: what each row says, and which class it is of.

Classes are actions, and the reward is 1 where the action chosen is the row's class. Handed a folder of public sets, it
reads them as they are: a column whose every cell is a number is a number, any other a category. Nothing is computed
from the values in advance; the catalog declares neither center nor spread.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from server.catalog.catalog import Catalog, Doubles
from server.catalog.compile import compile_catalog
from tsugi.v1 import catalog_pb2

GOAL: Final = "right"

_KEEL: Final = (
    "chess", "contraceptive", "german", "led7digit", "magic", "mushroom", "penbased", "satimage", "segment", "splice",
    "vowel",
)  # fmt: skip
# Name, path below the folder, whether the class is the first column instead of the last.
_KNOWN: Final = (
    *((name, f"keel/{name}.dat.gz", False) for name in _KEEL),
    ("mushroom_full", "mushroom/agaricus-lepiota.csv.gz", True),
)


class SetError(ValueError):
    """A set cannot be read."""


class Column(NamedTuple):
    """One column: a number, or a category with these values."""

    name: str
    values: tuple[str, ...]  # sorted; empty: a number


class BanditSet(NamedTuple):
    """A classification set."""

    name: str
    columns: tuple[Column, ...]
    cells: list[list[str]]  # by row, as the file has them but for blanks around them
    classes: NDArray[np.int64]  # of each row, 0..n_classes-1
    n_classes: int


def known_sets(folder: Path, names: Sequence[str] = ()) -> list[BanditSet]:
    """Return the public sets that are in a folder, or those of them that are named.

    Raises:
        SetError: none is there, one that is named is not, or one cannot be read.
    """
    unknown = set(names) - {name for name, _, _ in _KNOWN}
    if unknown:
        raise SetError(f"no set is called {sorted(unknown)[0]!r}; there are {', '.join(each[0] for each in _KNOWN)}")
    wanted = [each for each in _KNOWN if not names or each[0] in names]
    found = [each for each in wanted if (folder / each[1]).exists()]
    if not found or (names and len(found) < len(wanted)):
        missing = [path for _, path, _ in wanted if not (folder / path).exists()]
        raise SetError(f"{folder} does not hold {', '.join(missing)}: name the folder of the public sets")
    return [read_set(folder / path, name, is_class_first=is_class_first) for name, path, is_class_first in found]


def read_set(path: Path, name: str, *, is_class_first: bool = False) -> BanditSet:
    """Read one set: comma-separated, without a header, gzipped or not.

    Args:
        path: of the file.
        name: of the set.
        is_class_first: the class is the first column; otherwise it is the last.

    Raises:
        SetError: it is no such file, has no rows, rows of several lengths, or fewer than two classes.
    """
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SetError(f"{path}: {error}") from error
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise SetError(f"{path}: it has no rows, or not as many cells in each")
    labels = [row.pop(0 if is_class_first else -1) for row in rows]
    classes = {label: i for i, label in enumerate(sorted(set(labels)))}
    if len(classes) < 2:
        raise SetError(f"{path}: all rows are of one class")
    columns = tuple(_column(j, [row[j] for row in rows]) for j in range(len(rows[0])))
    return BanditSet(name, columns, rows, np.array([classes[label] for label in labels]), len(classes))


def order(data: BanditSet, seed: int, n_rows_max: int) -> list[int]:
    """Return the rows of one run: the first of a shuffle."""
    return [int(row) for row in np.random.default_rng(seed).permutation(len(data.cells))[:n_rows_max]]


def make_catalog(data: BanditSet, exploration: dict[str, Any]) -> Catalog:
    """Compile the catalog a set is played under: an action a class, and numbers of which nothing is declared.

    Args:
        data: the set.
        exploration: of its one placement, as in a catalog's JSON.
    """
    attributes = [
        {"name": column.name, "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": column.values}
        if column.values
        else {"name": column.name, "type": "ATTRIBUTE_TYPE_NUMBER"}
        for column in data.columns
    ]
    message = {
        "name": "classes",
        "currencyCode": "EUR",
        "identityNamespaces": [{"name": "row"}],
        "profileAttributes": attributes,
        "outcomeTypes": [{"name": "right"}],
        "goals": [
            {
                "name": GOAL,
                "outcomes": [{"type": "right", "reward": 1}],
                "attributionWindow": "1s",
                "baseRate": 1 / data.n_classes,  # of a uniform policy, whatever the set
            }
        ],
        "channels": [{"name": "web"}],
        "placements": [{"name": "page", "channel": "web", "goal": GOAL, "exploration": exploration}],
        "actions": [
            {"name": action_name(i), "treatments": [{"name": "only", "channel": "web"}]} for i in range(data.n_classes)
        ],
    }
    return compile_catalog(json_format.ParseDict(message, catalog_pb2.Catalog()))


def action_name(class_row: int) -> str:
    """Return the action that stands for a class; their order in a catalog is that of the classes."""
    return f"class_{class_row:03}"


def fact_rows(data: BanditSet, catalog: Catalog) -> Doubles:
    """Return every row as a fact vector of its catalog: float64[rows, m], NaN where nothing is said."""
    facts = np.full((len(data.cells), len(catalog.space.facts)), math.nan)
    for j, column in enumerate(data.columns):
        position = catalog.space.index[f"profile.{column.name}"]
        codes = catalog.space.facts[position].codes
        facts[:, position] = [float(codes[row[j]] if column.values else row[j]) for row in data.cells]
    return facts


def _column(j: int, cells: list[str]) -> Column:
    if all(map(_is_number, cells)):
        return Column(f"n{j}", ())
    return Column(f"c{j}", tuple(sorted(set(cells))))


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
