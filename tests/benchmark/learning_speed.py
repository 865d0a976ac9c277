"""How many outcomes a second does the learner process learn from? ``outcomes_per_s`` of build/learning.json.

All of its way but the waiting: records as workers write them, of 100 candidates, 40 features and 100 actions, are read
from a log on disk, checked, joined, and taught to the default fleet: the baseline, the posterior, the one that serves
and three challengers. Arrays are published and snapshots saved as they fall due. Median of several passes over the same
log, each by a learner that starts from nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np

from server.storage.lmdb_log import LmdbLog
from server.storage.record import Draft
from tests.support.learning import START_US, make_catalog
from training.learn import Learner
from tsugi.log.v1.record_pb2 import CatalogChange, DecisionRecord, OutcomeRecord, Provenance, RecordKind, SlotRecord

N_FEATURES: Final = 40
N_ACTIONS: Final = 100
N_FACTS: Final = 60
MAP_BYTES: Final = 1 << 30
BATCH: Final = 200
WARM_ROWS: Final = 1_000  # before the clock starts: kernels are loaded and every action has been met


def outcomes_per_s(n_outcomes: int = 10_000, n_passes: int = 3) -> float:
    """Return the median rate of some passes over a log of so many decisions, each with its outcome."""
    actions = [f"action_{i:03d}" for i in range(N_ACTIONS)]
    catalog = make_catalog(actions, [f"number_{i:02d}" for i in range(N_FEATURES)])
    with tempfile.TemporaryDirectory() as folder:
        log = LmdbLog(Path(folder) / "log", MAP_BYTES, writable=True)
        try:
            _write(log, catalog.sha256, list(catalog.actions.names), len(catalog.learned.names), n_outcomes + WARM_ROWS)
            rates = []
            for each in range(n_passes):
                learner = Learner(log, Path(folder) / f"learner{each}", lambda _sha256: catalog, time.monotonic)
                rates.append(_rate(learner))
                learner.close()
        finally:
            log.close()
    return statistics.median(rates)


def _rate(learner: Learner) -> float:
    while learner.counts.learned < WARM_ROWS:
        learner.step()
    before, started_s = learner.counts.learned, time.perf_counter()
    while learner.step():
        learner.publish_if_due()
        learner.snapshot_if_due()
    return (learner.counts.learned - before) / (time.perf_counter() - started_s)


def _write(log: LmdbLog, catalog_sha256: bytes, actions: list[str], d: int, n_decisions: int) -> None:
    """Append decisions as large as real ones are, each followed by a click or a refusal some records later."""
    rng = np.random.default_rng(5)
    drafts = [Draft(RecordKind.RECORD_KIND_CATALOG_CHANGE, _bytes(CatalogChange(catalog_sha256=catalog_sha256)))]
    provenance = Provenance(catalog_sha256=catalog_sha256, arrays_sha256=bytes(32), build="benchmark", learned_lsn=1)
    for i in range(n_decisions):
        key, action = i.to_bytes(16, "big"), actions[int(rng.integers(len(actions)))]
        drafts.append(
            Draft(
                RecordKind.RECORD_KIND_DECISION,
                _bytes(
                    DecisionRecord(
                        decision_key=key,
                        provenance=provenance,
                        request=bytes(80),
                        facts=rng.normal(size=N_FACTS).tobytes(),
                        learned_features=rng.normal(size=d).astype("<f4").tobytes(),
                        refusal_reasons=bytes(N_ACTIONS),
                        rows=bytes(2 * N_ACTIONS),
                        prior_log_odds=bytes(4 * N_ACTIONS),
                        propensities=bytes(4 * N_ACTIONS),
                        slots=[
                            SlotRecord(
                                action=action,
                                goal="visit",
                                prior_log_odds=-2.0,
                                selection_probability=float(rng.uniform(0.01, 1.0)),
                                distribution=bytes(4 * N_ACTIONS),
                            )
                        ],
                    )
                ),
                key,
            )
        )
        happened = "click" if rng.random() < 0.1 else "peek"
        drafts.append(
            Draft(RecordKind.RECORD_KIND_OUTCOME, _bytes(OutcomeRecord(decision_key=key, action=action, type=happened)))
        )
        if len(drafts) >= BATCH:
            log.append(drafts, START_US)
            drafts = []
    if drafts:
        log.append(drafts, START_US)


def _bytes(message: CatalogChange | DecisionRecord | OutcomeRecord) -> bytes:
    return bytes(message.SerializeToString())
