"""What a push of another catalog leaves as it was, and what goes with the old one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict

from server.catalog.catalog import Catalog
from server.profiles import repository, standing
from server.storage.store import Table
from tests.support.histories import SECOND_US, START_US
from tests.support.people import CATALOG, People, at, people_catalog
from tsugi.requests import event, source_record

ANNA = ("customer_number", "1")
DAY_US = 86_400 * SECOND_US
WHOLE = MessageToDict(CATALOG.message)
WITH_WINDOW = people_catalog(
    windows=[
        {"name": "solved_day", "kind": "WINDOW_KIND_COUNT", "eventType": "solved", "span": "86400s"},
        *WHOLE["windows"],
    ]
)


def with_attributes(**changes: Mapping[str, Any]) -> Catalog:
    return people_catalog(
        profileAttributes=[each | changes.get(each["name"], {}) for each in WHOLE["profileAttributes"]]
    )


def push(people: People, catalog: Catalog) -> None:
    people.history.put_in_force(catalog)
    people.catalog = catalog
    people.project()


def fact(people: People, name: str, catalog: Catalog | None = None) -> float:
    """Return what a decision reads, under the catalog in force or one the projector has not come to."""
    catalog = catalog or people.catalog
    out = np.full(len(catalog.space.facts), math.nan)
    key = people.key_of(*ANNA)
    assert key is not None
    with people.store.read() as snapshot:
        stored = repository.load(snapshot, key)
        assert stored is not None
        repository.write_facts(stored, catalog, snapshot, people.history.now_us, out)
    return float(out[catalog.space.index[f"profile.{name}"]])


def test_stage_outlives_its_events_and_a_push_that_adds_a_window() -> None:
    people = People(CATALOG, WITH_WINDOW)
    people.say(source_record("1", "shop", [ANNA], event=event("purchase", occurrence_time=at(-5))))
    people.project(START_US + 405 * DAY_US)
    with people.store.read() as snapshot:
        assert all(b"purchase" not in value for _, value in snapshot.scan(Table.TIMELINE))
    assert fact(people, "journey_stage", WITH_WINDOW) == 1.0, "before the projector knows of it"
    for catalog in (WITH_WINDOW, CATALOG, WITH_WINDOW):
        push(people, catalog)
        assert people.profile(*ANNA).journey_stage == "acquisition"


def test_stage_outlives_events_forgotten_after_the_push_that_declared_the_journey() -> None:
    journey = people_catalog()
    people = People(people_catalog(journey=None), journey)
    people.say(source_record("1", "shop", [ANNA], event=event("purchase", occurrence_time=at(-5))))
    people.project()
    push(people, journey)
    people.project(START_US + 405 * DAY_US)
    people.say(source_record("2", "shop", [ANNA], event=event("view")))
    people.project()
    assert people.profile(*ANNA).journey_stage == "acquisition"


def test_added_window_counts_what_happened_before_it_was_declared() -> None:
    people = People(CATALOG, WITH_WINDOW)
    for i, kind in enumerate(("solved", "view", "solved", "purchase")):
        people.say(source_record(f"{i}", "shop", [ANNA], event=event(kind, occurrence_time=at(i - 9))))
    people.project()
    assert fact(people, "solved_day", WITH_WINDOW) == 2.0
    push(people, WITH_WINDOW)
    assert (fact(people, "solved_day"), fact(people, "purchases_hour"), fact(people, "views_visit")) == (2.0, 1.0, 1.0)


def test_value_that_is_not_allowed_any_more_makes_way_for_one_that_is() -> None:
    narrow = with_attributes(tags={"allowedValues": ["a", "b"]}, age={"maximum": 120})
    people = People(CATALOG, narrow)
    people.say(
        source_record("1", "crm", [ANNA], attributes={"tags": {"a"}, "age": 999.0}),
        source_record("2", "crm", [ANNA], attributes={"tags": {"c"}}),
        source_record("3", "shop", [ANNA], attributes={"age": 30.0}),
    )
    people.project()
    push(people, narrow)
    assert (fact(people, "tags"), fact(people, "age")) == (1.0, 30.0)
    attributes = people.profile(*ANNA).attributes
    assert (list(attributes["tags"].value.set_value.values), attributes["age"].value.number_value) == (["a"], 30.0)
    people.say(source_record("4", "shop", [ANNA], attributes={"age": 31.0}))  # beside a value of no account
    people.project()
    assert fact(people, "age") == 31.0


def test_memberships_go_with_their_segment_and_stages_with_the_journey() -> None:
    bare = people_catalog(segments=[], journey=None)
    people = People(CATALOG, bare)
    people.say(source_record("1", "crm", [ANNA], attributes={"age": 30.0}))
    people.project()
    push(people, bare)
    people.project(START_US + SECOND_US)
    with people.store.read() as snapshot:
        assert not [*snapshot.scan(Table.SEGMENTS), *snapshot.scan(Table.STAGES)]
        assert [key for key, _ in snapshot.scan(Table.COUNTS)] == [standing.PEOPLE_COUNT]
    push(people, CATALOG)
    people.project(START_US + 2 * SECOND_US)
    assert [each.segment for each in people.profile(*ANNA).segments] == ["adult"]


def test_erased_person_is_in_no_segment_that_left_the_catalog() -> None:
    bare = people_catalog(segments=[])
    people = People(CATALOG, bare)
    people.say(*(source_record(f"{i}", "crm", [("customer_number", f"{i}")], attributes={"age": 30.0}) for i in (1, 2)))
    people.project()
    people.history.put_in_force(bare)
    people.history.forget(bytes(16), [("customer_number", "2")])
    people.projector.apply(people.log.read(people.projector.applied.lsn + 1, 2))
    with people.store.read() as snapshot:
        assert standing.count(snapshot, standing.segment_count("adult")) == len([*snapshot.scan(Table.SEGMENTS)]) == 0
