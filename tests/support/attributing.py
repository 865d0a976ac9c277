"""Paths to attribute: from plain rows, or told to a log; and the models once more, path by path and walk by walk.

The slow ones are written from the definitions, not from the code they check: Markov's by spreading everybody over the
chain, step by step, until nobody is left in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from server.outcomes.attribution import Model, Paths, Terms
from server.outcomes.journeys import Journeys
from server.profiles.identity import identity_key
from server.storage.log import Log
from server.storage.record import NO_KEY
from tests.support.catalogs import compiled
from tests.support.histories import SECOND_US, START_US, History, decision_key
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, Provenance, RecordKind, SlotRecord
from tsugi.requests import decide_request

HOUR_US = 3_600 * SECOND_US
Path = tuple[list[str], int, float]  # channels, outcomes, value
CATALOG = compiled(
    channels=[{"name": name} for name in ("web", "mail", "call")],
    placements=[
        {"name": "home", "channel": "web", "goal": "click", "countMax": 4},
        {"name": "letter", "channel": "mail", "goal": "click"},
        {"name": "desk", "channel": "call", "goal": "click", "activation": "ACTIVATION_ON_IMPRESSION"},
    ],
)
SEEN_PLACEMENTS = {"desk"}


class Row(NamedTuple):
    """One path, and what came of it."""

    codes: Sequence[int]
    outcomes: int = 1
    value: float = 0.0
    silences: int = 0
    ages: Sequence[float] | None = None  # by default of one touchpoint after the other


def paths_of(rows: Sequence[Row]) -> Paths:
    """Put rows into columns."""
    lengths = [len(row.codes) for row in rows]
    ages = [row.ages if row.ages is not None else range(len(row.codes) - 1, -1, -1) for row in rows]
    return Paths(
        codes=np.array([code for row in rows for code in row.codes], np.int32),
        starts=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        outcomes=np.array([row.outcomes for row in rows], np.int64),
        values=np.array([row.value for row in rows], np.float64),
        silences=np.array([row.silences for row in rows], np.int64),
        ages=np.array([age for path in ages for age in path], np.float64),
    )


def equal(paths: Paths, others: Paths) -> bool:
    """Say whether two sets of columns are the same, types and all."""
    return all(
        np.array_equal(one, other) and one.dtype == other.dtype
        for one, other in zip(_columns(paths), _columns(others), strict=True)
    )


def _columns(paths: Paths) -> list[np.ndarray[Any, Any]]:
    return list(paths)


def weights_of(row: Row, model: Model, terms: Terms) -> list[float]:
    """Return how one path's outcome is shared over its touchpoints, but for Markov."""
    n = len(row.codes)
    ages = row.ages if row.ages is not None else range(n - 1, -1, -1)
    if model is Model.TIME_DECAY:
        shares = [2.0 ** -(age / terms.half_life) for age in ages]
    elif model is Model.POSITION and n == 2 and terms.first_share + terms.last_share > 0.0:
        shares = [terms.first_share, terms.last_share]
    elif model is Model.POSITION and n > 2:
        between = (1.0 - terms.first_share - terms.last_share) / (n - 2)
        shares = [terms.first_share, *([between] * (n - 2)), terms.last_share]
    else:
        chosen = {Model.LAST: {n - 1}, Model.FIRST: {0}}.get(model, set(range(n)))
        shares = [float(i in chosen) for i in range(n)]
    return [share / sum(shares) for share in shares]


def attribute_slowly(rows: Sequence[Row], n_channels: int, model: Model, terms: Terms) -> list[tuple[float, float]]:
    """Return outcomes and value of each channel."""
    earned = [[0.0, 0.0] for _ in range(n_channels)]
    if model is Model.MARKOV:
        effects = effects_by_walking(rows, n_channels, terms.order)
        n_outcomes, value = sum(row.outcomes for row in rows), sum(row.value for row in rows)
        together = sum(effects) or 1.0
        return [(n_outcomes * effect / together, value * effect / together) for effect in effects]
    for row in rows:
        for code, weight in zip(row.codes, weights_of(row, model, terms), strict=True):
            earned[code][0] += weight * row.outcomes
            earned[code][1] += weight * row.value
    return [(outcomes, value) for outcomes, value in earned]


def effects_by_walking(rows: Sequence[Row], n_channels: int, order: int) -> list[float]:
    """Return the removal effect of each channel."""
    all_of_them = _chance_by_walking(rows, order, None)
    if not all_of_them:
        return [0.0] * n_channels
    return [1.0 - _chance_by_walking(rows, order, channel) / all_of_them for channel in range(n_channels)]


def _chance_by_walking(rows: Sequence[Row], order: int, removed: int | None) -> float:
    """Return the chance to come to an outcome where whoever comes to a channel is lost."""
    steps: dict[tuple[int, ...], dict[object, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        state: tuple[int, ...] = ()
        for code in row.codes:
            following = (*state, code)[-order:]
            steps[state][following] += row.outcomes + row.silences
            state = following
        steps[state]["outcome"] += row.outcomes
        steps[state]["silence"] += row.silences
    people: dict[tuple[int, ...], float] = {(): 1.0}
    arrived = 0.0
    while sum(people.values()) > 1e-15:
        after: dict[tuple[int, ...], float] = defaultdict(float)
        for state, share in people.items():
            together = sum(steps[state].values())
            for target, count in steps[state].items():
                if target == "outcome":
                    arrived += share * count / together if count else 0.0
                elif isinstance(target, tuple) and target[-1] != removed and count:
                    after[target] += share * count / together
        people = after
    return arrived


def told(laid: Journeys, channels: Sequence[str]) -> list[Path]:
    """Return laid out paths in words."""
    codes, starts, outcomes, values, silences, _ = (column.tolist() for column in laid.paths)
    assert [a + b for a, b in zip(outcomes, silences, strict=True)] == [1] * len(outcomes)
    return [
        ([channels[code] for code in codes[starts[i] : starts[i + 1]]], outcomes[i], values[i])
        for i in range(len(outcomes))
    ]


class Story(History):
    """Appends decisions with all that their touchpoints are read from, and outcomes at their times."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self._n_decisions = 0

    def tell(
        self,
        placement: str,
        *actions: str,
        hour: float = 0.0,
        profile_key: bytes = b"",
        identities: Mapping[str, str] | None = None,
        key: bytes | None = None,
    ) -> bytes:
        """Record a decision that filled slots of a placement; "" leaves one empty. Returns its key."""
        self._n_decisions += 1
        key = key if key is not None else decision_key(self._n_decisions)
        request = decide_request({placement: len(actions)}, identities=identities or {})
        decision = DecisionRecord(
            decision_key=key,
            profile_key=profile_key,
            request=request.SerializeToString(),
            now_us=at(hour),
            provenance=Provenance(catalog_sha256=CATALOG.sha256),
            slots=[
                SlotRecord(position=i, action=action, on_impression=placement in SEEN_PLACEMENTS and bool(action))
                for i, action in enumerate(actions)
            ],
        )
        subjects = (profile_key,) if profile_key else tuple(map(identity_key, request.identities))
        self.now_us = max(self.now_us, at(hour))
        self.record(RecordKind.RECORD_KIND_DECISION, decision, key, subjects)
        return key

    def come_to(
        self,
        key: bytes,
        action: str,
        outcome_type: str,
        hour: float,
        value: float = 0.0,
        outcome_key: bytes = NO_KEY,
        revoked_key: bytes = b"",
    ) -> int:
        """Record an outcome that happened at an hour, or with the key of another one that this is taken back."""
        outcome = OutcomeRecord(
            decision_key=key, action=action, type=outcome_type, value=value, occurrence_time_us=at(hour),
            revoked_key=revoked_key,
        )  # fmt: skip
        self.now_us = max(self.now_us, at(hour))
        return self.record(RecordKind.RECORD_KIND_OUTCOME, outcome, outcome_key)


def at(hour: float) -> int:
    """Return an instant, hours after the story begins."""
    return START_US + round(hour * HOUR_US)
