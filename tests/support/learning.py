"""Small logs to learn from: two catalogs that share goals but not all features and actions, and their records."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from google.protobuf import json_format

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.decisioning.live import CATALOG_HEAD
from server.storage.log import Fate, Log
from server.storage.record import Draft
from tsugi.log.v1.record_pb2 import (
    CatalogChange,
    DecisionRecord,
    GoalPrior,
    LearnerReset,
    OutcomeRecord,
    Provenance,
    RecordKind,
    SlotHistory,
    SlotRecord,
)
from tsugi.v1 import catalog_pb2
from tsugi.v1.model_pb2 import LearnerRole

START_US = 1_760_000_000_000_000
SECOND_US = 1_000_000
VISIT_WINDOW_US = 2 * SECOND_US
SALE_WINDOW_US = 10 * SECOND_US


def make_catalog(
    actions: Sequence[str],
    numbers: Sequence[str],
    visit_base_rate: float = 0.2,
    changes: Mapping[str, dict[str, object]] | None = None,
    more_goals: Sequence[Mapping[str, object]] = (),
    exploration: Mapping[str, object] | None = None,
) -> Catalog:
    """Compile a catalog with the goals visit (2 s; click 1, peek 0.3) and sale (10 s; buy 1, refuse 0, silence 0.1).

    Changes of their fields are by the name of the goal.
    """
    changes = changes or {}
    return compile_catalog(
        json_format.ParseDict(
            {
                "name": "small",
                "currencyCode": "EUR",
                "identityNamespaces": [{"name": "number"}],
                "profileAttributes": [{"name": name, "type": "ATTRIBUTE_TYPE_NUMBER"} for name in numbers],
                "outcomeTypes": [
                    *({"name": name} for name in ("click", "peek", "buy", "refuse", "remark")),
                    {"name": "seen", "kind": "OUTCOME_KIND_IMPRESSION"},
                ],
                "goals": [
                    {
                        "name": "visit",
                        "outcomes": [{"type": "click", "reward": 1.0}, {"type": "peek", "reward": 0.3}],
                        "attributionWindow": "2s",
                        "baseRate": visit_base_rate,
                    }
                    | changes.get("visit", {}),
                    {
                        "name": "sale",
                        "outcomes": [{"type": "buy", "reward": 1.0}, {"type": "refuse", "reward": 0.0}],
                        "attributionWindow": "10s",
                        "defaultReward": 0.1,
                        "baseRate": 0.05,
                    }
                    | changes.get("sale", {}),
                    *more_goals,
                ],
                "channels": [{"name": "web"}],
                "placements": [
                    {"name": "page", "channel": "web", "goal": "visit", "exploration": exploration or {"greedy": {}}}
                ],
                "actions": [{"name": name, "treatments": [{"name": "plain", "channel": "web"}]} for name in actions],
            },
            catalog_pb2.Catalog(),
        )
    )


FIRST = make_catalog(("book", "lamp", "rope"), ("age", "spend"))
SECOND = make_catalog(("lamp", "rope", "tent"), ("spend", "visits", "weight"), visit_base_rate=0.4)
# FIRST, but what a visit is worth is the sum of its outcomes, and what was counted can be taken back for long.
SUMMED = make_catalog(
    ("book", "lamp", "rope"), ("age", "spend"),
    changes={"visit": {"settling": "SETTLING_SUM", "lateLimit": "100s"}, "sale": {"settling": "SETTLING_LAST"}},
)  # fmt: skip
# FIRST, but for what no goal means.
EXPLORING = make_catalog(("book", "lamp", "rope"), ("age", "spend"), exploration={"epsilonGreedy": {"epsilon": 0.2}})


def load_catalog(sha256: bytes) -> Catalog:
    """Return the catalog with this sha256."""
    return {catalog.sha256: catalog for catalog in (FIRST, SECOND, SUMMED, EXPLORING)}[sha256]


class Writer:
    """Appends what workers would append, at instants the test chooses.

    Attributes:
        now_us: the wall clock; the test moves it.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.now_us = START_US
        self._n_keys = 0

    def new_key(self) -> bytes:
        """Return a decision key not used before."""
        self._n_keys += 1
        return self._n_keys.to_bytes(16, "big")

    def put_in_force(self, catalog: Catalog) -> None:
        """Record a catalog change."""
        change = CatalogChange(catalog_sha256=catalog.sha256, previous_lsn=self.log.head(CATALOG_HEAD))
        self._append(RecordKind.RECORD_KIND_CATALOG_CHANGE, change, head=CATALOG_HEAD)

    def decide(
        self,
        slots: Sequence[tuple[str, str]],
        *,
        key: bytes | None = None,
        on_impression: bool = False,
        catalog: Catalog = FIRST,
        features: Sequence[float] | None = None,
        prior_log_odds: float = -1.0,
        other_goals: Mapping[str, float] | None = None,
    ) -> bytes:
        """Record a decision for (action, goal) slots, an empty one where the action is "", and return its key.

        Other goals of every slot are given with their prior log-odds.
        """
        key = key if key is not None else self.new_key()
        values = features if features is not None else [0.5] * len(catalog.learned.names)
        # Whoever has a history, every third has none, has seen more and done more than it told.
        expected = (self._n_keys % 3) / 2.0
        history = SlotHistory(
            expected=expected / 2, observed=expected, group_expected=expected, group_observed=3 * expected
        )
        decision = DecisionRecord(
            decision_key=key,
            provenance=Provenance(catalog_sha256=catalog.sha256),
            learned_features=np.array(values, "<f4").tobytes(),
            slots=[
                SlotRecord(
                    action=action,
                    goal=goal,
                    on_impression=on_impression,
                    prior_log_odds=prior_log_odds,
                    selection_probability=0.5,
                    other_goals=[
                        GoalPrior(goal=name, prior_log_odds=odds) for name, odds in (other_goals or {}).items()
                    ],
                    general_propensity=0.25,
                    history=history if expected else None,
                )
                if action
                else SlotRecord()
                for action, goal in slots
            ],
        )
        self._append(RecordKind.RECORD_KIND_DECISION, decision, key)
        return key

    def report(
        self, key: bytes, action: str, outcome_type: str, outcome_key: bytes | None = None, reporter: str = ""
    ) -> bytes:
        """Record an outcome, and return its key."""
        outcome_key = outcome_key if outcome_key is not None else self.new_key()
        outcome = OutcomeRecord(decision_key=key, action=action, type=outcome_type, reporter=reporter)
        self._append(RecordKind.RECORD_KIND_OUTCOME, outcome, outcome_key)
        return outcome_key

    def take_back(self, key: bytes, action: str, outcome_key: bytes) -> bytes:
        """Record that an outcome is taken back, and return the key of that."""
        revocation = OutcomeRecord(decision_key=key, action=action, revoked_key=outcome_key)
        own_key = self.new_key()
        self._append(RecordKind.RECORD_KIND_OUTCOME, revocation, own_key)
        return own_key

    def reset(self, role: LearnerRole, goals: Sequence[str] = ()) -> int:
        """Record that learners are to begin anew; returns its LSN."""
        return self._append(RecordKind.RECORD_KIND_LEARNER_RESET, LearnerReset(role=role, goals=goals))

    def tick(self) -> None:
        """Record the passing of time."""
        self.log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], self.now_us)

    def raw(self, kind: RecordKind, payload: bytes) -> None:
        """Record any bytes."""
        self.log.append([Draft(kind, payload)], self.now_us)

    def _append(
        self,
        kind: RecordKind,
        message: CatalogChange | DecisionRecord | OutcomeRecord | LearnerReset,
        key: bytes = bytes(16),
        head: str = "",
    ) -> int:
        (receipt,) = self.log.append([Draft(kind, message.SerializeToString(), key, head=head)], self.now_us)
        assert receipt.fate is Fate.RECORDED, "a test's keys are its own"
        return receipt.lsn


def write_history(log: Log, seed: int, n_steps: int) -> None:
    """Write a random history in which everything the join can meet happens, some of it in the wrong order."""
    _History(log, random.Random(seed)).write(n_steps)


class _History:
    def __init__(self, log: Log, rng: random.Random) -> None:
        self._rng = rng
        self._writer = Writer(log)
        self._catalog = FIRST
        self._decided: list[tuple[bytes, Sequence[str]]] = []
        self._early: list[bytes] = []
        self._reported: list[tuple[bytes, str, bytes]] = []

    def write(self, n_steps: int) -> None:
        rng, writer = self._rng, self._writer
        steps: dict[Callable[[], None], float] = {
            self._decide: 5,
            self._report_recent: 6,
            self._report_any: 0.5,
            self._report_early: 0.5,
            self._decide_late: 0.4,
            self._take_back: 1,
            writer.tick: 0.3,
            lambda: writer.raw(RecordKind.RECORD_KIND_SOURCE_RECORD, b"not ours to read"): 0.3,
            lambda: writer.raw(RecordKind.RECORD_KIND_OUTCOME, b"\xff\xff\xff"): 0.3,
            self._change_catalog: 0.2,
        }
        self._change_catalog()
        for _ in range(n_steps):
            if rng.random() < 0.7:
                writer.now_us += rng.randrange(SECOND_US // 4)
            elif rng.random() < 0.03:
                writer.now_us += rng.randrange(2_000 * SECOND_US)
            (step,) = rng.choices(list(steps), list(steps.values()))
            step()

    def _change_catalog(self) -> None:
        self._catalog = self._rng.choice([each for each in (FIRST, SECOND, SUMMED) if each is not self._catalog])
        self._writer.put_in_force(self._catalog)

    def _decide(self, key: bytes | None = None) -> None:
        rng, catalog = self._rng, self._catalog
        actions = rng.sample(catalog.actions.names, rng.choice((0, 1, 1, 1, 2, 3)))
        features = [rng.gauss(0, 2) for _ in catalog.learned.names]
        if rng.random() < 0.05:
            features[0] = rng.choice((3e38, -1e30, math.nan, math.inf))
        is_for_both = rng.random() < 0.2
        key = self._writer.decide(
            [(action, "sale" if is_for_both else rng.choice(("visit", "sale"))) for action in actions]
            + [("", "")] * rng.choice((0, 0, 1)),
            key=key,
            catalog=catalog,
            features=features,
            on_impression=rng.random() < 0.3,
            prior_log_odds=rng.gauss(-1, 1),
            other_goals={"visit": -1.0} if is_for_both else None,
        )
        self._decided.append((key, actions))

    def _decide_late(self) -> None:
        if self._early:
            self._decide(self._early.pop(0))

    def _report(self, key: bytes, actions: Sequence[str]) -> None:
        action = self._rng.choice((*actions, *actions, "book", "nowhere"))
        outcome_type = self._rng.choice(("click", "peek", "buy", "refuse", "remark", "seen"))
        outcome_key = self._writer.new_key()
        if self._rng.random() < 0.05:
            self._writer.take_back(key, action, outcome_key)
        self._reported.append((key, action, self._writer.report(key, action, outcome_type, outcome_key)))

    def _take_back(self) -> None:
        if self._reported:
            self._writer.take_back(*self._rng.choice(self._reported[-8:]))

    def _report_recent(self) -> None:
        if self._decided:
            self._report(*self._rng.choice(self._decided[-8:]))

    def _report_any(self) -> None:
        if self._decided:
            self._report(*self._rng.choice(self._decided))

    def _report_early(self) -> None:
        self._early.append(self._writer.new_key())
        self._report(self._early[-1], ("lamp",))
