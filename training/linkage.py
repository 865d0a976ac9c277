"""How much each level of agreement says among these very people, and which pairs of them are worth a look: by Splink.

Handed parts of people, ready to compare, it counts what strangers have in common in pairs drawn at random (u), learns
what the records of one person have in common by expectation maximisation (m), and looks through all pairs that share a
block. Levels are told by the functions the projector compares with; Splink is handed numbers of values, never a text.

Source: Fellegi and Sunter, "A theory for record linkage", JASA 1969; Winkler, "Using the EM algorithm for weight
computation in the Fellegi-Sunter model of record linkage", ASA 1988.

Cost sketch: 25 µs a pair that is compared, once; some 100 MB for a million pairs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import duckdb
from splink import DuckDBAPI, Linker, block_on
from splink.internals.splink_dataframe import SplinkDataFrame

from server.profiles import matching
from server.profiles.comparables import BIRTH, COUNTRY, EMAIL, FULL, ID, MEANINGS, PHONE, STREET
from server.profiles.ladders import Ladder
from server.profiles.matching import Comparable, MatchFields, levels
from tsugi.v1.identity_pb2 import Identity

BLOCK_PARTS_MAX: Final = 4 * matching.BLOCK_PARTS_MAX  # nobody waits here, so larger blocks are looked through
STRANGERS_PAIRS: Final = 200_000  # drawn to count what strangers have in common
TRAINING_PAIRS_MIN: Final = 50  # of one value, for what else they agree in to be learned from
SESSIONS: Final = 2  # of expectation maximisation; what one holds equal the other learns
RARE_PAIRS: Final = 20.0  # a level seen in fewer is told by the built-in numbers
PRIOR_PAIRS: Final = 10.0  # so many pairs the built-in numbers count for beside those that were seen
BITS_DECIMALS: Final = 2  # of a weight
BITS_BEYOND_MAX: Final = 2.0  # more than this above the built-in bits of full agreement no level says

_KNOWN_PAIRS_MAX: Final = 1 << 20
_UNKNOWN: Final = -1  # missing on either side
# What two parts may have in common for the rest to be learned from, the best first: nobody else in a household has it.
_SESSION_COLUMNS: Final = ("name", f"meaning_{BIRTH}", f"meaning_{ID}", f"meaning_{EMAIL}", f"meaning_{PHONE}")

Told = Callable[[str, int, int], None]  # what is done, how much of it, of how much; 0: unknown


def silent(_what: str, _n_done: int, _n_all: int) -> None:
    """Tell nobody how far it has come."""


class Part(NamedTuple):
    """What is recorded under one identity, ready to compare."""

    key: bytes
    identity: Identity
    profile_key: bytes
    comparable: Comparable


class Level(NamedTuple):
    """How often one level of agreement is met."""

    m: float  # its share among pairs of records of one person, above 0
    u: float  # its share among pairs of strangers, above 0


class Linkage:
    """The parts of a population as Splink sees them: rows of numbers, and a function that tells levels of agreement.

    Args:
        parts: two or more, in an order that does not depend on when they came.
        fields: what they are matched by.
        seed: of the pairs that are drawn.
    """

    def __init__(self, parts: Sequence[Part], fields: MatchFields, seed: int) -> None:
        self._parts = parts
        self._fields = fields
        self._seed = seed
        logging.getLogger("splink").setLevel(logging.CRITICAL)  # it has much to say, to whoever runs the program
        # One thread: sums come out the same each time, and the functions are Python's, one at a time anyway.
        self._connection = duckdb.connect(":memory:", config={"threads": 1, "temp_directory": ""})
        self._connection.execute("SET enable_progress_bar = false")
        self._agreements = _Agreements([part.comparable for part in parts], fields)
        self._connection.create_function("agreement", self._agreements.level, ["BIGINT"] * 3, "BIGINT")
        said = list(zip(*(_said(part.comparable) for part in parts), strict=True))
        self._meanings = [i for i in range(len(MEANINGS)) if any(said[i]) and (i != FULL or fields.is_full_weighed)]
        self._shares = {i: sum(map(bool, said[i])) / len(parts) for i in self._meanings}
        columns = {_column(i): _numbered(said[i]) for i in self._meanings}
        self._database = DuckDBAPI(self._connection)
        self._rows = self._database.register({"part": list(range(len(parts))), **columns})

    def close(self) -> None:
        """Let go of the tables."""
        self._connection.close()

    def train(self, told: Told = silent, strangers_pairs_max: int = STRANGERS_PAIRS) -> dict[int, list[Level]]:
        """Return how often each level is met, by meaning; without those that too few pairs of one person have.

        Args:
            told: progress.
            strangers_pairs_max: about so many pairs are drawn.
        """
        columns = [column for column in _SESSION_COLUMNS if self._n_sharing(column) >= TRAINING_PAIRS_MIN][:SESSIONS]
        if not columns:
            return {}
        told("training", 0, 1 + len(columns))
        linker = self._linker(lambda i: [Level(each.m, each.u) for each in levels(MEANINGS[i])])
        pairs_max = min(strangers_pairs_max, len(self._parts) * (len(self._parts) - 1) // 2)
        linker.training.estimate_u_using_random_sampling(
            max_pairs=pairs_max, seed=self._seed, min_count_per_level=None, num_chunks=1
        )
        n_same: Counter[int] = Counter()  # pairs of one person that were learned from, by meaning
        for n_done, column in enumerate(columns, start=1):
            told("training", n_done, 1 + len(columns))
            session = linker.training.estimate_parameters_using_expectation_maximisation(block_on(column))
            share = float(session.core_model_settings.probability_two_random_records_match)
            for i in self._meanings:
                if _column(i) != column:
                    n_same[i] += round(share * self._n_sharing(column, i))
        told("training", 1 + len(columns), 1 + len(columns))
        learned = {one["output_column_name"]: one["comparison_levels"] for one in _model(linker)["comparisons"]}
        return {
            i: _levels(levels(MEANINGS[i]), learned[f"agreement_{i}"][1:], n_same[i], pairs_max * self._shares[i] ** 2)
            for i in self._meanings
            if n_same[i] >= TRAINING_PAIRS_MIN
        }

    def predict(self, fields: MatchFields, weight_min: float) -> list[tuple[int, int]]:
        """Return the pairs of parts of two profiles that share a block and may weigh enough, ascending.

        Args:
            fields: with the weights to go by.
            weight_min: bits.
        """
        bits = fields.against_strangers
        # What differs of a place may count for less than Splink, which knows of no such thing, takes it for.
        lenience = sum(-min(bits[i]) for i in self._meanings if STREET <= i <= COUNTRY)
        linker = self._linker(lambda i: [_of_bits(each) for each in bits[i]])
        blocked = self._blocked()
        if blocked is None:
            return []
        linker.table_management.register_blocked_pairs_for_predict(blocked)
        found = linker.inference.predict(threshold_match_weight=weight_min - lenience, warning_mode="never")
        rows = self._connection.execute(f'SELECT part_l, part_r FROM "{found.physical_name}" ORDER BY ALL').fetchall()  # noqa: S608  # Splink's own name
        return [(int(one), int(other)) for one, other in rows]

    def _blocked(self) -> SplinkDataFrame | None:
        """Return a table of the pairs that share a block and are of two profiles; None where nothing has a block."""
        keys, rows, numbers = list[int](), list[int](), dict[bytes, int]()
        for row, part in enumerate(self._parts):
            for key in matching.blocking_keys(self._fields, part.comparable):
                keys.append(int.from_bytes(key, "big", signed=True))
                rows.append(row)
        if not keys:
            return None
        people = [numbers.setdefault(part.profile_key, len(numbers)) for part in self._parts]
        members = self._database.register({"block": keys, "part": rows, "person": [people[row] for row in rows]})
        name = members.physical_name
        self._connection.execute(
            f"""
            CREATE TABLE blocked_pairs AS
            WITH small AS (SELECT * FROM "{name}" WHERE block IN
                (SELECT block FROM "{name}" GROUP BY block HAVING count(*) BETWEEN 2 AND {BLOCK_PARTS_MAX}))
            SELECT DISTINCT l.part AS join_key_l, r.part AS join_key_r, '0' AS match_key
            FROM small l JOIN small r ON l.block = r.block AND l.part < r.part AND l.person <> r.person
            ORDER BY ALL
            """  # noqa: S608  # Splink's own name, our own number
        )
        return self._database.register("blocked_pairs")

    def _n_sharing(self, column: str, meaning: int | None = None) -> int:
        """Return how many pairs of parts have the same value in a column, and say something of a meaning."""
        if column not in {_column(i) for i in self._meanings}:
            return 0
        compared = "" if meaning is None else f"AND agreement({meaning}, l.part, r.part) <> {_UNKNOWN}"
        ((count,),) = self._connection.execute(
            f"""
            SELECT count(*) FROM "{self._rows.physical_name}" l JOIN "{self._rows.physical_name}" r
            ON l.{column} = r.{column} AND l.part < r.part {compared}
            """  # noqa: S608  # names and numbers of our own
        ).fetchall()
        return int(count)

    def _linker(self, shares: Callable[[int], Sequence[Level]]) -> Linker:
        """Return a Splink model, with the shares of each meaning's levels to begin with."""
        settings = {
            "link_type": "dedupe_only",
            "unique_id_column_name": "part",
            "blocking_rules_to_generate_predictions": [],
            "probability_two_random_records_match": 0.5,  # so that a match weight is what the agreements say, alone
            "retain_matching_columns": False,
            "comparisons": [_comparison(i, shares(i)) for i in self._meanings],
        }
        return Linker(self._rows, settings, log_level=None)


def says_anything(one: Comparable) -> bool:
    """Say whether there is anything to compare."""
    return any(_said(one))


class _Agreements:
    """The levels of agreement of pairs, told from the comparisons of the online matcher; kept for a while."""

    def __init__(self, comparables: Sequence[Comparable], fields: MatchFields) -> None:
        self._comparables = comparables
        # Meanings in the place of attributes, so that each agreement says which one it is of.
        self._fields = dataclasses.replace(fields, attributes=tuple((str(i),) for i in range(len(MEANINGS))))
        self._rows = {
            (str(i), level.name): (i, row)
            for i, meaning in enumerate(MEANINGS)
            for row, level in enumerate(levels(meaning))
        }
        self._known: dict[int, tuple[int, ...]] = {}
        self._kept: dict[tuple[int, ...], tuple[int, ...]] = {}  # few patterns, many pairs

    def level(self, meaning: int, one: int, other: int) -> int:
        """Return the row of a meaning's ladder on which two parts stand."""
        place = one * len(self._comparables) + other
        found = self._known.get(place)
        if found is None:
            if len(self._known) == _KNOWN_PAIRS_MAX:
                self._known.clear()
            found = self._compare(self._comparables[one], self._comparables[other])
            found = self._known[place] = self._kept.setdefault(found, found)
        return found[meaning]

    def _compare(self, one: Comparable, other: Comparable) -> tuple[int, ...]:
        rows = [_UNKNOWN] * len(MEANINGS)
        for agreement in matching.explain(self._fields, one, other):
            if agreement.attribute:
                i, row = self._rows[agreement.attribute, agreement.level]
                rows[i] = row
        return tuple(rows)


def _column(meaning: int) -> str:
    """Return the column of a meaning; names stand in one, since each may be taken for the other."""
    return "name" if meaning <= FULL else f"meaning_{meaning}"


def _numbered(said: Sequence[Hashable]) -> list[int | None]:
    """Give equal values equal numbers, None where nothing is said.

    A value that too many share, or half a name, gets a number of its own: nothing can be learned from sharing it.
    """
    counts = Counter(said)
    numbers: dict[Hashable, int] = {}
    return [
        None
        if not value
        else -1 - row
        if counts[value] > BLOCK_PARTS_MAX or (isinstance(value, tuple) and None in value)
        else numbers.setdefault(value, len(numbers))
        for row, value in enumerate(said)
    ]


def _comparison(meaning: int, shares: Sequence[Level]) -> dict[str, Any]:
    """Return a comparison of Splink's: a level for each row of the meaning's ladder, told by our own function."""
    column, level = _column(meaning), f"agreement({meaning}, part_l, part_r)"
    missing = f"{column}_l IS NULL OR {column}_r IS NULL OR {level} = {_UNKNOWN}"
    conditions = [*(f"{level} = {row}" for row in range(len(shares) - 1)), "ELSE"]
    return {
        "output_column_name": f"agreement_{meaning}",
        "comparison_levels": [
            {"sql_condition": missing, "is_null_level": True, "label_for_charts": "missing"},
            *(
                {"sql_condition": condition, "label_for_charts": str(row), "m_probability": m, "u_probability": u}
                for row, (condition, (m, u)) in enumerate(zip(conditions, shares, strict=True))
            ),
        ],
    }


def _of_bits(bits: float) -> Level:
    """Return shares of which the weight is a number of bits; only their ratio means anything."""
    return Level(min(0.5, 0.5 * 2.0**bits), min(0.5, 0.5 * 2.0**-bits))


def _model(linker: Linker) -> dict[str, Any]:
    model = linker.misc.save_model_to_json()
    assert isinstance(model, dict), "without a file it is returned"
    return model


def _levels(ladder: Ladder, learned: Sequence[Mapping[str, Any]], n_same: float, n_strangers: float) -> list[Level]:
    """Return the shares of a ladder's levels: what was seen, with the built-in numbers where little was."""
    found = []
    for built_in, told in zip(ladder, learned, strict=True):
        m, u = (share if isinstance(share := told.get(f"{each}_probability"), float) else 0.0 for each in "mu")
        if n_same * m + n_strangers * u < RARE_PAIRS:
            found.append(Level(built_in.m, built_in.u))
            continue
        found.append(
            Level(
                (n_same * m + PRIOR_PAIRS * built_in.m) / (n_same + PRIOR_PAIRS),
                (n_strangers * u + PRIOR_PAIRS * built_in.u) / (n_strangers + PRIOR_PAIRS),
            )
        )
    return found


def bits_of(ladder: Ladder, shares: Sequence[Level]) -> list[float]:
    """Return the weights of a ladder's levels: finite, never rising, and within bounds.

    Levels that stand in the wrong order count as one. Disagreement says no more than by the built-in numbers: pairs
    that share a name or a date of birth are better written than others, so the shares of disagreement come out small.
    Nor does agreement say more than a few bits beyond them: what is rare among some thousand people is met by chance
    among more.
    """
    groups: list[tuple[float, float, int]] = []
    for m, u in shares:
        group = (m, u, 1)
        while groups and groups[-1][0] * group[1] <= group[0] * groups[-1][1]:
            before = groups.pop()
            group = (before[0] + group[0], before[1] + group[1], before[2] + group[2])
        groups.append(group)
    low, high = ladder[-1].bits, ladder[0].bits + BITS_BEYOND_MAX
    found = [
        round(min(max(math.log2(m / u), low), high), BITS_DECIMALS) for m, u, count in groups for _ in range(count)
    ]
    assert all(map(math.isfinite, found)), "shares are above 0"
    return found


def _said(one: Comparable) -> tuple[Hashable, ...]:
    """Return what a part says of each meaning, in their order; empty where it does not."""
    name = (one.given and one.given.text, one.family and one.family.text)
    names = name if any(name) else ()
    return (
        names, names, names, one.births, one.ids, one.emails, one.phones,
        (one.street.numbers, one.street.text) if one.street else (), one.postcodes, one.cities, one.regions,
        one.countries,
    )  # fmt: skip
