"""Recorded decisions decided again: which are taken, and what is told of one that was altered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from server.catalog.catalog import Catalog
from server.decisioning.recall import NotItsCatalogError
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tests.support.catalogs import compiled
from tests.support.deciding import Desk, key_of
from tests.support.populating import Person
from training.replay_decision import newest_decisions, replay_record, tell
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_service_pb2 import DecideRequest

NOW_US = 1_760_000_000_000_000
CATALOG = compiled(
    actions=[
        {
            "name": name,
            "valueMicros": value,
            "eligibility": "profile.age >= 18.0",
            "treatments": [{"name": "only", "channel": "web"}],
        }
        for name, value in (("loan", 3_000_000), ("card", 2_000_000))
    ]
)


def decided(*, age: float = 30.0, placement: str = "softmax") -> DecisionRecord:
    desk = Desk(CATALOG)
    desk.meet(Person({"age": age}, {"customer_number": "1"}))
    request = DecideRequest(profile_id="00" * 16)
    request.placements.add(placement=placement, count=3)
    return desk.ask(request, NOW_US).record


def log_of(*records: DecisionRecord) -> MemoryLog:
    log = MemoryLog()
    for number, record in enumerate(records):
        payload = record.SerializeToString()
        log.append([Draft(RecordKind.RECORD_KIND_DECISION, payload, key_of(str(number)))], NOW_US)
        log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], NOW_US)
    return log


def catalog_of(sha256: bytes) -> Catalog:
    assert sha256 == CATALOG.sha256
    return CATALOG


def test_newest_decisions_come_first_without_what_is_none_or_erased() -> None:
    log = log_of(*[decided()] * 4)
    log.erase([5])
    assert [record.lsn for record in newest_decisions(log, 2)] == [7, 3]
    assert [record.lsn for record in newest_decisions(log, 9)] == [7, 3, 1]
    assert list(newest_decisions(MemoryLog(), 9)) == []


@pytest.mark.parametrize("age", [30.0, 10.0])
def test_unaltered_decision_is_told_slot_by_slot(age: float) -> None:
    (record,) = newest_decisions(log_of(decided(age=age)), 1)
    replayed = replay_record(record, catalog_of)
    assert replayed.differences == []
    _, *slots, gates, verdict = tell(replayed)
    assert [line.split(":")[0] for line in slots] == ["  softmax"] * 3
    assert slots[2] == "  softmax: nothing, NO_CANDIDATE", "there are two actions"
    assert gates == ("  2 passed the gates, 0 were refused" if age >= 18 else "  0 passed the gates, 2 were refused")
    assert verdict == "  the same to the last bit"


def _other_fact(record: DecisionRecord) -> None:
    facts = np.frombuffer(record.facts).copy()
    facts[CATALOG.space.index["profile.age"]] = 10.0
    record.facts = facts.tobytes()


def _other_chance(record: DecisionRecord) -> None:
    record.slots[0].selection_probability = float(np.nextafter(record.slots[0].selection_probability, 0.0))


def _one_slot_less(record: DecisionRecord) -> None:
    del record.slots[2]


@pytest.mark.parametrize(
    ("alter", "differing"),
    [
        (_other_fact, ["refusal_reasons", "learned_features", "rows", "slots"]),
        (_other_chance, ["slots[0].selection_probability"]),
        (_one_slot_less, ["slots"]),
        (lambda record: record.slots[1].ClearField("row"), ["slots[1].row"]),
    ],
)
def test_altered_record_is_told(alter: Callable[[DecisionRecord], None], differing: list[str]) -> None:
    altered = decided()
    alter(altered)
    (record,) = newest_decisions(log_of(altered), 1)
    replayed = replay_record(record, catalog_of)
    assert set(replayed.differences) == set(differing)
    *_, verdict = tell(replayed)
    assert verdict == f"  differs: {', '.join(replayed.differences)}"


def test_record_that_does_not_fit_its_catalog_is_refused() -> None:
    other = decided()
    other.facts = other.facts[:-8]
    (record,) = newest_decisions(log_of(other), 1)
    with pytest.raises(NotItsCatalogError, match="facts are recorded"):
        replay_record(record, catalog_of)
