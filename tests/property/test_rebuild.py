"""State is a projection: whatever the log holds, and however it came to be projected, it gives the same bytes."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalog.catalog import Catalog
from server.outcomes.projector import Projector, state_hash
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import Log
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Store, Table
from tests.support.catalogs import compiled
from tests.support.faults import KilledError, MortalStore
from tests.support.histories import SECOND_US, History, decision_key
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.requests import event

MAP_BYTES = 1 << 26

ATTRIBUTES: list[list[dict[str, Any]]] = [
    [
        {"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER"},
        {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["silver", "gold"]},
    ],
    [
        {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["gold", "silver"]},
        {"name": "age", "type": "ATTRIBUTE_TYPE_TEXT"},
    ],
    [{"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER", "maximum": 50}],
]
CATALOGS = [compiled(profileAttributes=attributes) for attributes in ATTRIBUTES]
IDENTITIES = [(namespace, str(i)) for namespace in ("customer_number", "browser_id") for i in range(4)]
KNOWN: list[dict[str, str | float]] = [{}, {"age": 41.0}, {"age": 60.0, "tier": "gold"}, {"tier": "silver", "age": "x"}]
ACTIONS = ["action_0", "action_1", "action_2", ""]
KINDS = [RecordKind.RECORD_KIND_DECISION, RecordKind.RECORD_KIND_OUTCOME, RecordKind.RECORD_KIND_SOURCE_RECORD]

Step = Callable[[History], object]
NUMBERS = st.integers(0, 5)  # few decisions, so that outcomes come before, after, late and twice


def _decide(number: int, person: int | None, actions: Sequence[str], *, on_impression: bool) -> Step:
    def step(history: History) -> object:
        # Of somebody that a source record began, or would have begun had it not been set aside.
        profile_key = b"" if person is None else history.profile_key(1 + person % max(1, history.log.tail().lsn))
        return history.decide(decision_key(number), actions, profile_key=profile_key, on_impression=on_impression)

    return step


def _know(named: list[tuple[str, str]], known: dict[str, str | float], has_event: bool, source: str) -> Step:
    said = event("visit", {"pages": 3}) if has_event else None
    return lambda history: history.know(dict(named), known, said, source)


STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        _know,
        st.lists(st.sampled_from(IDENTITIES), min_size=1, max_size=3, unique=True),
        st.sampled_from(KNOWN),
        st.booleans(),
        st.sampled_from(["crm", "shop"]),
    ),
    st.builds(
        _decide,
        NUMBERS,
        st.none() | st.integers(0, 20),
        st.lists(st.sampled_from(ACTIONS), max_size=3, unique=True),
        on_impression=st.booleans(),
    ),
    st.builds(lambda number, action: lambda history: history.report(decision_key(number), action), NUMBERS,
              st.sampled_from(ACTIONS[:3])),
    st.builds(lambda catalog: lambda history: history.put_in_force(catalog), st.sampled_from(CATALOGS)),
    st.builds(lambda kind: lambda history: history.record(kind, b"\xff\xff"), st.sampled_from(KINDS)),
    st.just(lambda history: history.assign_champion()),
    st.just(lambda history: history.tick()),
)  # fmt: skip
HISTORIES = st.lists(st.tuples(STEPS, st.integers(-SECOND_US, SECOND_US)), max_size=25)
SPLITS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def load_catalog(sha256: bytes) -> Catalog:
    return next(catalog for catalog in CATALOGS if catalog.sha256 == sha256)


def begin(log: Log) -> History:
    history = History(log)
    history.put_in_force(CATALOGS[0])
    return history


def written(steps: Sequence[tuple[Step, int]]) -> MemoryLog:
    """Return the log of a history."""
    log = MemoryLog(b"log-id-16-bytes.")
    history = begin(log)
    for step, later_us in steps:
        history.now_us += later_us
        step(history)
    return log


def project(log: Log, store: Store, splits: Sequence[int] = (512,)) -> None:
    """Project a log in batches of the sizes given, by a new projector each, as one restarted after every batch."""
    for n_records in cycle(splits):
        projector = Projector(log, store, load_catalog)
        records = log.read(projector.applied.lsn + 1, n_records)
        if not records:
            return
        projector.apply(records)


def projected(log: Log, splits: Sequence[int] = (512,)) -> bytes:
    store = MemoryStore()
    project(log, store, splits)
    return state_hash(store)


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tsugi-rebuild-"))
    yield path
    shutil.rmtree(path)


@given(HISTORIES, SPLITS)
def test_state_is_the_same_for_any_split_into_batches(steps: list[tuple[Step, int]], splits: list[int]) -> None:
    log = written(steps)
    assert projected(log, splits) == projected(log) == projected(log, [1])


@pytest.mark.slow
@given(HISTORIES, SPLITS)
def test_deleted_state_is_rebuilt_as_it_was_at_every_lsn_while_the_log_grew(
    steps: list[tuple[Step, int]], splits: list[int]
) -> None:
    # While the log grows, what stands later in it is not there yet; at the rebuild it is.
    with folder() as path:
        log = LmdbLog(path / "log", MAP_BYTES)
        history = begin(log)
        state = LmdbStore(path / "state", MAP_BYTES)
        projector = Projector(log, state, load_catalog)
        hashes: dict[int, bytes] = {}
        pauses = cycle(splits)
        next_pause = next(pauses)
        for done, (step, later_us) in enumerate(steps, start=1):
            history.now_us += later_us
            step(history)
            if done == next_pause or done == len(steps):
                projector.step()
                hashes[projector.applied.lsn] = state_hash(state)
                next_pause += next(pauses)
        state.close()
        shutil.rmtree(path / "state")
        state = LmdbStore(path / "state", MAP_BYTES)
        rebuilt = Projector(log, state, load_catalog)
        in_memory = MemoryStore()
        projector = Projector(log, in_memory, load_catalog)
        for lsn, wanted in hashes.items():
            for each, store in ((rebuilt, state), (projector, in_memory)):
                if lsn > each.applied.lsn:
                    each.apply(log.read(each.applied.lsn + 1, lsn - each.applied.lsn))
                assert state_hash(store) == wanted
        state.close()
        log.close()


@given(HISTORIES, SPLITS, st.integers(0, 80))
def test_projector_killed_at_any_change_goes_on_to_the_same_state(
    steps: list[tuple[Step, int]], splits: list[int], n_changes: int
) -> None:
    log = written(steps)
    assert resumed(log, MemoryStore(), n_changes, splits) == projected(log)


def resumed(log: Log, store: Store, n_changes: int, splits: Sequence[int], *, is_atomic: bool = True) -> bytes:
    """Project with a writer that is killed, then with one that lives; return the hash of the state."""
    mortal = MortalStore(store, n_changes, is_atomic=is_atomic)
    try:
        project(log, mortal, splits)
    except KilledError:
        project(log, store, splits)
    return state_hash(store)


def long_history() -> MemoryLog:
    """Write one history in which everything happens, the same at every run."""
    rng = random.Random(2)
    log = MemoryLog(b"log-id-16-bytes.")
    history = begin(log)
    history.report(decision_key(0), "action_0")
    for turn in range(60):
        history.now_us += rng.randrange(SECOND_US)
        lsn = history.know(dict(rng.sample(IDENTITIES, 2)), rng.choice(KNOWN), event("visit"))
        history.decide(
            decision_key(rng.randrange(20)), rng.sample(ACTIONS, 2), profile_key=history.profile_key(lsn),
            on_impression=turn % 2 == 0,
        )  # fmt: skip
        history.report(decision_key(rng.randrange(20)), rng.choice(ACTIONS[:3]))
        if turn % 20 == 7:
            history.put_in_force(CATALOGS[turn % 3])
    return log


PROJECTED = [Table.META, Table.PROFILES, Table.IDENTITIES, Table.CONTACTS, Table.IMPRESSIONS, Table.QUARANTINE]


def test_everything_happens_in_the_long_history() -> None:
    store = MemoryStore()
    project(long_history(), store)
    with store.read() as snapshot:
        assert all(any(snapshot.scan(table)) for table in PROJECTED)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["memory", "lmdb"])
def test_projector_killed_at_each_change_of_a_long_history_goes_on_to_the_same_state(engine: str) -> None:
    log = long_history()
    n_changes, wanted = changes_of(log), projected(log)
    with folder() as path:
        for n in range(0, n_changes, 1 if engine == "memory" else 20):
            store: Store = MemoryStore() if engine == "memory" else LmdbStore(path / str(n), MAP_BYTES)
            assert resumed(log, store, n, [40]) == wanted
            store.close()


def changes_of(log: Log) -> int:
    mortal = MortalStore(MemoryStore(), 1 << 30)
    project(log, mortal, [40])
    return (1 << 30) - mortal.left


@pytest.mark.slow
def test_negative_control_a_store_that_keeps_half_a_batch_is_caught() -> None:
    log = long_history()
    wanted = projected(log)
    differing = sum(
        resumed(log, MemoryStore(), n, [40], is_atomic=False) != wanted for n in range(0, changes_of(log), 10)
    )
    assert differing > 0
