"""Decisions are exact at their own instant: they see what the state holds once the projector has come to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import Doubles
from server.profiles import repository
from server.storage.store import Table
from tests.support.histories import SECOND_US, START_US
from tests.support.people import CATALOG, People, at, people_catalog
from tsugi.requests import event, money, source_record
from tsugi.v1.profile_service_pb2 import SourceRecord

HOURS_US = 3_600 * SECOND_US
FORGETFUL = people_catalog(
    profileAttributes=[
        each | {"timeToLive": f"{hours * 3_600}s"}
        for hours, each in enumerate(MessageToDict(CATALOG.message)["profileAttributes"], start=1)
    ]
)
ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "age": st.sampled_from([17.0, 30.0]),
        "tier": st.sampled_from(["silver", "gold"]),
        "nickname": st.sampled_from(["Al", "Alexandra"]),
        "city": st.sampled_from(["Berlin", "Köln"]),
        "spend": st.sampled_from([money(5, "EUR"), money(7, "EUR")]),
        "tags": st.sampled_from([{"a"}, {"b", "c"}]),
    },
)
SAID = st.builds(
    lambda source, identity, attributes, hours, kind: source_record(
        "r", source, [("email", "a@shop.example"), identity], attributes=attributes,
        observation_time=at(-3_600 * hours), event=event(kind, occurrence_time=at(-3_600 * hours)) if kind else None,
    ),
    st.sampled_from(["crm", "shop"]),
    st.sampled_from([("customer_number", "1"), ("customer_number", "2")]),
    ATTRIBUTES,
    st.integers(0, 8),
    st.sampled_from([None, "view", "purchase"]),
)  # fmt: skip


def facts_of(people: People, now_us: int) -> Doubles:
    """Return what a decision at an instant reads of the one person there is."""
    with people.store.read() as snapshot:
        ((key, _),) = snapshot.scan(Table.PROFILES)
        stored = repository.load(snapshot, key)
        assert stored is not None
        out = np.full(len(FORGETFUL.space.facts), math.nan)
        repository.write_facts(stored, FORGETFUL, snapshot, now_us, out)
    return out[FORGETFUL.space.profile_slice]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(SAID, min_size=1, max_size=8), st.integers(-1, 0))
def test_decisions_see_at_any_instant_what_the_state_then_comes_to_hold(said: list[SourceRecord], more: int) -> None:
    people = People(FORGETFUL)
    people.say(*said)
    people.project()
    instants = [START_US + hours * HOURS_US + more for hours in range(1, 10)]
    seen = [facts_of(people, instant_us) for instant_us in instants]
    for instant_us, facts in zip(instants, seen, strict=True):
        people.project(instant_us)
        np.testing.assert_array_equal(facts_of(people, instant_us), facts)
