"""What becomes of people by the mere passing of time, and how much of it at once."""

from __future__ import annotations

import math

import pytest

from server.profiles import writer
from server.storage.store import Table
from tests.support.histories import SECOND_US, START_US
from tests.support.people import People, at, people_catalog
from tests.unit.profiles.test_catalog_changes import ANNA, fact, with_attributes
from tsugi.log.v1.state_pb2 import StoredSource
from tsugi.requests import event, source_record

HOUR_US = 3_600 * SECOND_US
HOURLY = with_attributes(**{name: {"timeToLive": "3600s"} for name in ("age", "tags", "city")})


def test_most_trusted_word_that_is_forgotten_makes_way_for_another_at_that_very_instant() -> None:
    people = People(HOURLY)
    people.say(source_record("1", "crm", [ANNA], attributes={"age": 30.0}))
    people.history.now_us += 60 * SECOND_US
    people.say(source_record("2", "shop", [ANNA], attributes={"age": 31.0}))
    people.project()
    seen = []
    for instant_us in (START_US + HOUR_US - 1, START_US + HOUR_US, START_US + HOUR_US + 60 * SECOND_US):
        people.history.now_us = instant_us
        seen.append(fact(people, "age"))
    assert seen[:2] == [30.0, 31.0]
    assert math.isnan(seen[2])


def test_text_that_is_forgotten_leaves_the_set_that_keeps_all() -> None:
    people = People(HOURLY)
    people.say(source_record("1", "crm", [ANNA], attributes={"tags": {"a"}}))
    people.history.now_us += 60 * SECOND_US
    people.say(source_record("2", "crm", [ANNA], attributes={"tags": {"b"}}))
    people.project()
    assert fact(people, "tags") == 3.0
    people.history.now_us = START_US + HOUR_US
    assert fact(people, "tags") == 2.0
    people.project(START_US + HOUR_US)
    assert fact(people, "tags") == 2.0
    with people.store.read() as snapshot:
        assert all(b"a" not in value.partition(b"tags")[2][:8] for _, value in snapshot.scan(Table.PARTS))


def test_what_was_over_before_it_was_said_does_not_stay() -> None:
    people = People(HOURLY)
    people.say(source_record("1", "crm", [ANNA], attributes={"city": "Atlantis"}, observation_time=at(-7_200)))
    people.project(START_US + SECOND_US)
    with people.store.read() as snapshot:
        assert all(b"Atlantis" not in value for _, value in snapshot.scan(Table.PARTS))


def test_people_in_whom_something_changes_at_one_instant_are_seen_to_a_few_at_a_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "TIMERS_AT_A_TICK", 5)
    people = People()
    people.say(
        *(source_record(f"{i}", "crm", [("email", f"{i}@a.example")], attributes={"mood": "x"}) for i in range(9))
    )
    people.project()

    def n_waiting() -> int:
        with people.store.read() as snapshot:
            return sum(1 for _ in snapshot.scan(Table.TIMERS))

    people.history.now_us += HOUR_US
    people.say(source_record("9", "crm", [ANNA], attributes={"age": 30.0}))
    people.project()
    assert n_waiting() == 9 - writer.TIMERS_AT_A_RECORD
    people.project(people.history.now_us)
    assert n_waiting() == 9 - writer.TIMERS_AT_A_RECORD - 5
    people.project(people.history.now_us)
    assert n_waiting() == 0


def test_segment_over_the_distance_of_two_events_is_not_looked_at_for_ever() -> None:
    people = People(
        people_catalog(
            windows=[
                {"name": f"{kind}_age", "kind": "WINDOW_KIND_RECENCY", "eventType": kind, "span": "864000s"}
                for kind in ("view", "purchase")
            ],
            recencyFrequencyMonetary=[],
            segments=[{"name": "cooled", "expression": "profile.purchase_age - profile.view_age > 86400.0"}],
        )
    )
    for kind, seconds in (("purchase", -2 * 86_400), ("view", -86_400)):
        people.say(source_record(kind, "shop", [ANNA], event=event(kind, occurrence_time=at(seconds))))
    people.project()
    with people.store.read() as snapshot:
        ((key, _),) = snapshot.scan(Table.TIMERS)
    assert int.from_bytes(key[:8], "big") == START_US + 8 * 86_400 * SECOND_US, "when the purchase leaves its window"


def test_events_of_one_instant_are_compared_with_a_few_only() -> None:
    people = People()
    said = ["purchase", *["view"] * writer.REPEATS_MAX, "view", "purchase"]
    people.say(
        *(
            source_record(f"{i}", "shop", [ANNA], event=event(kind, occurrence_time=at(0)))
            for i, kind in enumerate(said)
        )
    )
    people.project()
    with people.store.read() as snapshot:
        ((_, value),) = snapshot.scan(Table.SOURCES)
    assert StoredSource.FromString(value).duplicates == writer.REPEATS_MAX, "of the views all but the first"
