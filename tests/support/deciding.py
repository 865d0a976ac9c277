"""Decide without a server: the real gathering, core and remembering over a state in memory, with given propensities.

``Desk`` is handed a compiled catalog and people; ``ask`` takes a request and gives the reply as its caller sees it,
the record as the log would keep it, and the refusal reason of every action.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.catalog.catalog import Catalog, FeatureColumns, Floats
from server.decisioning.budgets import Budgets
from server.decisioning.decide import Decisions, Scratch, decide
from server.decisioning.gather import Asked, Batch, gather_profile, gather_request
from server.decisioning.live import make_live
from server.decisioning.models import Champion, Models, align, no_champion
from server.decisioning.remember import Views
from server.profiles.erased import NOBODY
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.record import Draft, Spend
from server.tokens import TokenKey
from tests.support import populating
from tests.support.populating import Person
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_pb2 import RefusalReason
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse

TOKEN_KEY = TokenKey(bytes(range(32)))
CATALOG_LSN = 1


@dataclass(frozen=True)
class Answer:
    """One decision from both sides."""

    reply: DecideResponse
    record: DecisionRecord
    refused: dict[str, str]  # action → refusal reason


class GivenPropensities:
    """A scorer that states what it was given; its one input column is the action's row."""

    def __init__(self, log_odds: Floats) -> None:
        self._log_odds = log_odds

    def score(self, inputs: Floats) -> Floats:
        return self._log_odds[inputs[:, 0].astype(np.intp)]


def given_champion(catalog: Catalog, propensities: Mapping[str, float], goal: str) -> Champion:
    """Make a champion of stated propensities, so that no model matters."""
    stated = np.array([propensities.get(name, 0.1) for name in catalog.actions.names])
    log_odds = np.log(stated / (1.0 - stated)).astype(np.float32)
    nothing = no_champion(catalog)
    shared: FeatureColumns = nothing.shared
    template = np.arange(len(catalog.actions.names), dtype=np.float32)[:, np.newaxis].copy()
    template.flags.writeable = False  # as every champion's is, or the kernels would be compiled once more
    return Champion(
        sha256=bytes(32),
        goal_row=catalog.goal_rows[goal],
        shared=shared,
        shared_positions=nothing.shared_positions,
        template=template,
        scorer=GivenPropensities(log_odds),
    )


class Desk:
    """A catalog, people and models, ready to be asked."""

    def __init__(
        self, catalog: Catalog, *, champion: Champion | None = None, arrays: LearnerArrays | None = None
    ) -> None:
        self.catalog = catalog
        self.models: Models = align(catalog, champion or no_champion(catalog), arrays)
        self.live = make_live(catalog, self.models, CATALOG_LSN, 0, "tests")
        self.store = MemoryStore()
        self._log = MemoryLog()
        self._budgets = Budgets(self._log, n_workers=1)
        self._scratch = Scratch()

    def meet(self, person: Person, profile_key: bytes = bytes(16), now_us: int = 0) -> bytes:
        """Put one person into the state, as known at an instant."""
        with self.store.write() as txn:
            populating.put(txn, profile_key, person, self.catalog, lsn=CATALOG_LSN, now_us=now_us)
        return profile_key

    def spend(self, budget: str, amount: int, now_us: int) -> None:
        """Have all others spend of a budget, or of a placement's budget for exploring, in the period of an instant."""
        terms = self.catalog.budgets
        names = [each.name for each in self.catalog.message.budgets]
        limit = (
            terms.limits[names.index(budget)]
            if budget in names
            else terms.exploration[self.catalog.placement_rows[budget]]
        )
        spend = Spend(limit.counter(now_us), amount, None)
        self._log.append([Draft(RecordKind.RECORD_KIND_TICK, b"", spends=(spend,))], now_us)

    def decisions(
        self, requests: Sequence[DecideRequest], now_us: int, decision_keys: Sequence[bytes], mode: int | None = None
    ) -> tuple[Batch, Decisions]:
        """Decide requests together and return the columns."""
        batch = Batch(self.catalog, now_us, len(requests))
        loop = asyncio.new_event_loop()
        self._budgets.look(self.catalog, now_us)
        try:
            with self.store.read() as snapshot:
                for request, key in zip(requests, decision_keys, strict=True):
                    asked = Asked(request, request.SerializeToString(), loop.create_future(), 0.0, 0.0)
                    asked.decision_key = key
                    gather_request(asked, batch)
                    gather_profile(asked, batch, snapshot, NOBODY)
                    self._budgets.constrain(asked, self.catalog)
                    if mode is not None:
                        asked.mode = mode
                    batch.add(asked, TOKEN_KEY.seed(key), CATALOG_LSN)
        finally:
            loop.close()
        return batch, decide(batch.questions(), self.catalog, self.models, self._scratch)

    def ask_all(
        self, requests: Sequence[DecideRequest], now_us: int, decision_keys: Sequence[bytes], mode: int | None = None
    ) -> list[Answer]:
        """Decide requests together, as one flush does."""
        batch, decisions = self.decisions(requests, now_us, decision_keys, mode)
        names = self.catalog.actions.names
        answers = []
        views = Views(batch, decisions, self.catalog, self.live.champion)
        for q in range(len(requests)):
            reply_bytes = views.reply(q, TOKEN_KEY)
            answers.append(
                Answer(
                    DecideResponse.FromString(reply_bytes),
                    DecisionRecord.FromString(views.record(q, reply_bytes)),
                    {
                        name: RefusalReason.Name(int(reason))
                        for name, reason in zip(names, decisions.reasons[q], strict=True)
                        if reason
                    },
                )
            )
        return answers

    def ask(self, request: DecideRequest, now_us: int = 0, decision_id: str = "d", mode: int | None = None) -> Answer:
        """Decide one request."""
        return self.ask_all([request], now_us, [key_of(decision_id)], mode)[0]


def key_of(decision_id: str) -> bytes:
    """Return the decision key that a readable id of a test stands for."""
    return hashlib.blake2b(decision_id.encode(), digest_size=16).digest()
