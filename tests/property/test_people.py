"""Who is one person does not depend on the order in which records came, and what was joined comes apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.histories import SECOND_US, START_US
from tests.support.people import People, at
from tsugi.requests import consent, event, money, source_record
from tsugi.v1.profile_service_pb2 import SourceRecord

IDENTITIES = [
    *(("customer_number", str(i)) for i in range(5)),
    *(("email", f"p{i}@shop.example") for i in range(5)),
    *(("browser_id", f"b{i}") for i in range(3)),
    *(("family_account", f"f{i}") for i in range(2)),
    ("order_number", "o1"),
    ("email", "none"),
]
ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "age": st.sampled_from([17.0, 30.0, 31.0]),
        "tier": st.sampled_from(["silver", "gold"]),
        "nickname": st.sampled_from(["Al", "Alex", "Alexandra"]),
        "city": st.sampled_from(["BERLIN", "berlin", "Köln"]),
        "spend": st.sampled_from([money(5, "EUR"), money(7, "EUR")]),
        "tags": st.sampled_from([{"a"}, {"b", "c"}, set()]),
        "mood": st.sampled_from(["fine", "low"]),
    },
)
EVENTS = st.none() | st.builds(
    lambda kind, seconds: event(
        kind,
        {"total": 10.0 + seconds % 97, "item": f"i{seconds % 3}"} if kind == "purchase"
        else {"ticket": f"t{seconds % 2}"} if kind in {"complaint", "solved"} else {},
        occurrence_time=at(seconds),
    ),
    st.sampled_from(["view", "purchase", "complaint", "solved"]),
    st.integers(-3_000, 0),
)  # fmt: skip
CONSENTS = st.lists(
    st.builds(
        lambda purpose, granted, seconds: consent(purpose, granted=granted, effective_time=at(seconds)),
        st.sampled_from(["marketing", "service"]),
        st.booleans(),
        st.integers(-3, 0),
    ),
    max_size=2,
)


@st.composite
def records(draw: Any, size_max: int = 14) -> list[SourceRecord]:
    """Draw source records whose observation times all differ, so that no order of arrival is hidden in them."""
    n = draw(st.integers(1, size_max))
    seconds = draw(st.lists(st.integers(-3_000, 0), min_size=n, max_size=n, unique=True))
    return [
        source_record(
            f"r{i}",
            draw(st.sampled_from(["crm", "shop"])),
            draw(st.lists(st.sampled_from(IDENTITIES), min_size=1, max_size=3, unique=True)),
            attributes=draw(ATTRIBUTES),
            event=draw(EVENTS),
            consents=draw(CONSENTS),
            observation_time=at(seconds[i]),
        )
        for i in range(n)
    ]


def people_of(said: Sequence[SourceRecord]) -> People:
    people = People()
    people.say(*said)
    people.project(START_US + SECOND_US)
    return people


@settings(max_examples=60)
@given(st.data())
def test_order_of_arrival_changes_nothing_anybody_sees(data: st.DataObject) -> None:
    said = data.draw(records())
    first, second = people_of(said), people_of(data.draw(st.permutations(said)))
    assert first.groups() == second.groups()
    assert first.views() == second.views()


@settings(max_examples=40)
@given(records(), st.data())
def test_split_gives_both_the_histories_they_had_before_they_were_joined(
    said: list[SourceRecord], data: st.DataObject
) -> None:
    people = people_of(said)
    before, views = people.groups(), people.views()
    joinable = [group for group in before if any(name in {"customer_number", "email"} for name, _ in group)]
    if len(joinable) < 2:
        return
    one, other = data.draw(st.lists(st.sampled_from(sorted(joinable, key=sorted)), min_size=2, max_size=2, unique=True))
    ends = [min(pair for pair in group if pair[0] in {"customer_number", "email"}) for group in (one, other)]
    people.history.link(ends[0], ends[1])
    people.project()
    people.history.split(sorted(other), sorted(one))
    people.project()
    assert people.groups() == before
    assert people.views() == views


@given(records())
def test_nobody_has_more_values_of_a_namespace_than_the_catalog_allows(said: list[SourceRecord]) -> None:
    for group in people_of(said).groups():
        assert sum(name == "customer_number" for name, _ in group) <= 2


@pytest.mark.parametrize("n_customers", [3, 4, 5])
def test_negative_control_without_the_limit_customers_of_one_email_would_be_one_person(n_customers: int) -> None:
    said = [
        source_record(f"r{i}", "crm", [("customer_number", str(i)), ("email", "p@shop.example")])
        for i in range(n_customers)
    ]
    groups = people_of(said).groups()
    assert max(sum(name == "customer_number" for name, _ in group) for group in groups) == (
        2 if n_customers == 3 else 1
    )
