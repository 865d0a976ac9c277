"""State is a projection: whatever the log holds, and however it came to be projected, it gives the same bytes."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from server.catalog.catalog import Catalog
from server.outcomes.projector import Projector, state_hash
from server.profiles import standing
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import Log
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Store, Table
from tests.support.faults import KilledError, MortalStore
from tests.support.histories import SECOND_US, History, decision_key
from tests.support.people import CATALOG, people_catalog
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.requests import PyValue, consent, event, money
from tsugi.v1.profile_pb2 import Consent, Event

MAP_BYTES = 1 << 26

WHOLE = json_format.MessageToDict(CATALOG.message)
PEOPLE = {each["name"]: each for each in WHOLE["profileAttributes"]}
OTHERS = [
    {"age": {"maximum": 50, "timeToLive": "3600s"}, "city": {"survivorship": "SURVIVORSHIP_LONGEST"}},
    {"tier": {"allowedValues": ["gold", "silver"]}, "mood": {"type": "ATTRIBUTE_TYPE_NUMBER"}},
]
CATALOGS = [
    CATALOG,
    # The same attributes, folded and coded otherwise; fewer segments, and an address whoever shares it may link by.
    people_catalog(profileAttributes=[each | OTHERS[0].get(name, {}) for name, each in PEOPLE.items()], segments=[]),
    people_catalog(
        windows=[each for each in reversed(WHOLE["windows"]) if each["name"] != "purchases_hour"],
        profileAttributes=[each | OTHERS[1].get(name, {}) for name, each in reversed(PEOPLE.items())],
        identityNamespaces=[
            {"name": name}
            for name in ("customer_number", "email", "browser_id", "family_account", "order_number")
        ],
    ),
]  # fmt: skip
IDENTITIES = [
    *((namespace, str(i)) for namespace in ("customer_number", "browser_id") for i in range(4)),
    ("email", "a@shop.example"),
    ("email", "not an address"),
    ("family_account", "1"),
]
KNOWN: list[dict[str, PyValue]] = [
    {},
    {"age": 41.0},
    {"age": 60.0, "tier": "gold", "phone": "030 123456", "city": "Berlin"},
    {"tier": "silver", "age": "x", "phone": "+49 30 123456", "city": "BERLIN", "nickname": "Al"},
    {"spend": money(5, "EUR"), "tags": {"a"}, "mood": "fine"},
]
EVENTS = [
    None,
    event("view"),
    event("purchase", {"total": 80.0, "item": "ski"}),
    event("complaint", {"ticket": "t"}),
    event("solved", {"ticket": "t"}),
    event("unknown"),
]
SAID = [(), (consent("marketing", granted=True),), (consent("marketing", granted=False, channel="web"),)]
VERDICTS = ["SAME", "DIFFERENT", "PROPOSED"]
ACTIONS = ["action_0", "action_1", "action_2", ""]
KINDS = [RecordKind.RECORD_KIND_DECISION, RecordKind.RECORD_KIND_OUTCOME, RecordKind.RECORD_KIND_SOURCE_RECORD]

Step = Callable[[History], object]
NUMBERS = st.integers(0, 5)  # few decisions, so that outcomes come before, after, late and twice


def _decide(number: int, person: int | None, actions: Sequence[str], *, on_impression: bool) -> Step:
    def step(history: History) -> object:
        # Of somebody that a source record began, or would have begun had it not been set aside.
        profile_key = b"" if person is None else history.profile_key(1 + person % max(1, history.log.tail().lsn))
        return history.decide(
            decision_key(number), actions, profile_key=profile_key, on_impression=on_impression, propensity=0.3
        )

    return step


def _know(
    named: list[tuple[str, str]],
    known: dict[str, PyValue],
    said: Event | None,
    source: str,
    consents: Sequence[Consent],
) -> Step:
    return lambda history: history.know(dict(named), known, said, source, consents)


def _link(one: tuple[str, str], other: tuple[str, str], verdict: str, weight: float) -> Step:
    return lambda history: history.link(one, other, verdict, weight)


def _split(named: list[tuple[str, str]], n_leaving: int) -> Step:
    return lambda history: history.split(named[:n_leaving], named[n_leaving:])


def _wait(history: History) -> object:
    history.now_us += 3_600 * SECOND_US
    return history.tick()


def _forget(number: int, named: list[tuple[str, str]]) -> Step:
    return lambda history: history.forget(bytes(15) + bytes([number]), named)


STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        _know,
        st.lists(st.sampled_from(IDENTITIES), min_size=1, max_size=3, unique=True),
        st.sampled_from(KNOWN),
        st.sampled_from(EVENTS),
        st.sampled_from(["crm", "shop", "bought"]),
        st.sampled_from(SAID),
    ),
    st.builds(
        _link,
        st.sampled_from(IDENTITIES),
        st.sampled_from(IDENTITIES),
        st.sampled_from(VERDICTS),
        st.sampled_from([0.0, 8.0, 20.0]),
    ),
    st.builds(_split, st.lists(st.sampled_from(IDENTITIES), min_size=2, max_size=3, unique=True), st.just(1)),
    st.builds(_forget, NUMBERS, st.lists(st.sampled_from(IDENTITIES), max_size=2, unique=True)),
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
    st.just(lambda history: history.assign_role()),
    st.just(lambda history: history.tick()),
    st.just(_wait),
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


@given(HISTORIES, SPLITS)
def test_people_are_counted_as_a_recount_counts_them(steps: list[tuple[Step, int]], splits: list[int]) -> None:
    store = MemoryStore()
    project(written(steps), store, splits)
    with store.read() as snapshot:
        recount = Counter(standing.stage_count(bytes(stage).decode()) for _, stage in snapshot.scan(Table.STAGES))
        recount.update(
            standing.segment_count(key.split(b"\0", 1)[0].decode()) for key, _ in snapshot.scan(Table.SEGMENTS)
        )
        recount[standing.PEOPLE_COUNT] = sum(1 for _ in snapshot.scan(Table.PROFILES))
        counted = {key: int.from_bytes(value, "big") for key, value in snapshot.scan(Table.COUNTS)}
        assert +Counter(counted) == +recount


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
        named = rng.sample(IDENTITIES, 2)
        lsn = history.know(
            dict(named), rng.choice(KNOWN), rng.choice(EVENTS), rng.choice(["crm", "shop", "bought"]), rng.choice(SAID)
        )
        history.decide(
            decision_key(rng.randrange(20)), rng.sample(ACTIONS, 2), profile_key=history.profile_key(lsn),
            on_impression=turn % 2 == 0, propensity=0.3,
        )  # fmt: skip
        history.report(decision_key(rng.randrange(20)), rng.choice(ACTIONS[:3]))
        history.link(named[0], rng.choice(IDENTITIES), VERDICTS[turn % 3], rng.choice([8.0, 20.0]))
        if turn % 9 == 5:
            history.split(named[:1], named[1:])
        if turn % 25 == 13:
            history.forget(bytes([turn]) * 16, named)
        if turn % 20 == 7:
            history.put_in_force(CATALOGS[turn % 3])
    return log


def test_everything_happens_in_the_long_history() -> None:
    store = MemoryStore()
    project(long_history(), store)
    with store.read() as snapshot:
        assert all(any(snapshot.scan(table)) for table in Table if table is not Table.PARKED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "every"), [("memory", 37), ("lmdb", 97), pytest.param("memory", 1, marks=pytest.mark.long)]
)
def test_projector_killed_at_changes_of_a_long_history_goes_on_to_the_same_state(engine: str, every: int) -> None:
    log = long_history()
    n_changes, wanted = changes_of(log), projected(log)
    with folder() as path:
        for n in range(0, n_changes, every):
            store: Store = MemoryStore() if engine == "memory" else LmdbStore(path / str(n), MAP_BYTES)
            assert resumed(log, store, n, [40]) == wanted
            store.close()


def changes_of(log: Log) -> int:
    mortal = MortalStore(MemoryStore(), 1 << 30)
    project(log, mortal, [40])
    return (1 << 30) - mortal.left


def gone_wrong(log: Log, n_changes: int, wanted: bytes) -> bool:
    try:
        return resumed(log, MemoryStore(), n_changes, [40], is_atomic=False) != wanted
    except AssertionError:  # the projector itself saw that its state is not whole
        return True


@pytest.mark.slow
def test_negative_control_a_store_that_keeps_half_a_batch_is_caught() -> None:
    log = long_history()
    wanted = projected(log)
    assert any(gone_wrong(log, n, wanted) for n in range(0, changes_of(log), 10))
