"""What holds people together and what does not, in numbers where it used to depend on who came first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from server.outcomes.projector import Projector
from server.profiles import matching, repository
from server.profiles.identity import IDENTITIES_MAX, identity_key
from server.profiles.matching import BLOCK_PARTS_MAX
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Table
from tests.support.histories import erase
from tests.support.people import People, people_catalog
from tsugi.log.v1.state_pb2 import StoredErasure
from tsugi.v1.identity_pb2 import Identity

TEXT = "ATTRIBUTE_TYPE_TEXT"
MATCHED = people_catalog(
    identityNamespaces=[{"name": "customer_number"}],
    sources=[{"name": "crm", "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH"}],
    profileAttributes=[
        {"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER"},
        {"name": "given", "type": TEXT, "meaning": "MEANING_GIVEN_NAME"},
        {"name": "family", "type": TEXT, "meaning": "MEANING_FAMILY_NAME"},
        {"name": "born", "type": TEXT, "meaning": "MEANING_BIRTH_DATE"},
        {"name": "city", "type": TEXT, "meaning": "MEANING_CITY"},
        *({"name": f"phone_{i}", "type": TEXT, "meaning": "MEANING_PHONE"} for i in range(2)),
    ],
    segments=[],
)
LOOK = {"given": "Anna", "family": "Muster", "born": "1980-01-02", "city": "Berlin"}


def namespaces(**changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    changes = {"browser_id": {"linkRule": "LINK_RULE_SHARED_DEVICE"}} | changes
    names = ("customer_number", "email", "phone", "browser_id")
    return [{"name": name, **changes.get(name, {})} for name in names]


def told(said: Sequence[Mapping[str, str]], **changes: Mapping[str, Any]) -> People:
    people = People(people_catalog(identityNamespaces=namespaces(**changes)))
    for identities in said:
        people.history.know(identities, {"age": 1.0})
    people.project()
    return people


def too_shared(people: People) -> set[str]:
    return {node.identity.value for node in people.nodes().values() if node.too_shared}


def rebuilt(people: People) -> People:
    """Make the state anew from the log in which whoever was erased is tombstones."""
    assert isinstance(people.log, MemoryLog)
    with people.store.read() as snapshot:
        for _, value in snapshot.scan(Table.ERASURES):
            stored = StoredErasure.FromString(value)
            for lsn in (*stored.lsns, stored.lsn):
                erase(people.log, lsn)
    again = People(people.catalog, log=people.log)
    again.store = MemoryStore()
    again.projector = Projector(people.log, again.store, {people.catalog.sha256: people.catalog}.__getitem__)
    again.project()
    return again


def key(namespace: str, value: str) -> bytes:
    return identity_key(Identity(namespace=namespace, value=value))


@pytest.mark.parametrize("n_strangers", [17, 40])
def test_number_that_stands_beside_everybodys_address_makes_no_person_of_them(n_strangers: int) -> None:
    people = told([{"customer_number": "none", "email": f"p{i}@shop.example"} for i in range(n_strangers)])
    assert too_shared(people) == {"none"}
    assert {len(group) for group in people.groups()} == {1}


@pytest.mark.parametrize("namespace", ["email", "phone"])
def test_customer_of_sixteen_addresses_and_any_number_of_browsers_is_one_person(namespace: str) -> None:
    said = [{"customer_number": "1", namespace: f"{i}@shop.example"} for i in range(16)]
    said += [{"customer_number": "1", "browser_id": str(i)} for i in range(40)]
    people = told(said)
    assert not too_shared(people)
    assert len(people.groups()) == 1


def test_limit_that_a_catalog_states_above_the_default_holds_for_all() -> None:
    said = [{"customer_number": "1", "email": f"{i}@shop.example"} for i in range(40)]
    assert len(told(said, customer_number={"sharedMax": 50}).groups()) == 1


def test_what_stands_beside_a_value_counts_whether_or_not_that_is_too_shared_already() -> None:
    desk = [{"customer_number": str(i), "email": "desk"} for i in range(3)]
    phones = [{"email": email, "phone": "tel"} for email in ("desk", "a", "b")]
    limits = {name: {"sharedMax": 2} for name in ("email", "phone")}
    first, second = told(desk + phones, **limits), told(phones + desk, **limits)
    assert first.groups() == second.groups()
    assert too_shared(first) == too_shared(second) == {"desk", "tel"}


@pytest.mark.slow
def test_every_node_is_a_part_of_the_profile_it_leads_to_however_long_the_chain() -> None:
    said = [{"customer_number": str(i // 2), "email": str((i + 1) // 2)} for i in range(500)]
    people = told(said[::2] + said[1::2])
    with people.store.read() as snapshot:
        for each, node in people.nodes().items():
            assert each in repository.members(snapshot, node.profile_key)
    assert max(map(len, people.groups())) <= IDENTITIES_MAX


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, -1])
def test_block_of_more_than_its_limit_joins_nobody_whoever_came_first(turn: int) -> None:
    people = People(MATCHED)
    numbers = [f"{i:03d}" for i in range(BLOCK_PARTS_MAX + 1)][::turn]
    for number in numbers[:-1]:
        people.history.know({"customer_number": number}, LOOK)
    people.project()
    assert len(people.groups()) == 1
    people.history.know({"customer_number": numbers[-1]}, LOOK)
    people.project()
    assert {len(group) for group in people.groups()} == {1}
    with people.store.read() as snapshot:
        assert not list(snapshot.scan(Table.REVIEWS))


@pytest.mark.slow
@pytest.mark.parametrize("leaves", ["renamed", "erased"])
def test_block_that_is_small_again_joins_those_who_are_left(leaves: str) -> None:
    people = People(MATCHED)
    for i in range(BLOCK_PARTS_MAX + 1):
        people.history.know({"customer_number": f"{i:03d}"}, LOOK)
    people.project()
    if leaves == "renamed":
        people.history.know({"customer_number": "007"}, {"given": "Xaver", "family": "Quell", "born": "1950-12-11"})
    else:
        people.history.forget(b"e" * 16, [("customer_number", "007")])
    people.project()
    assert max(map(len, people.groups())) == BLOCK_PARTS_MAX


@pytest.mark.slow
def test_look_alikes_who_may_not_be_one_person_are_not_compared_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    people, side = People(MATCHED), 12
    for x in range(side):
        for y in range(side):
            phones = {"phone_0": f"+49151200{x:03d}77", "phone_1": f"+49151300{y:03d}77"}
            people.history.know({"customer_number": f"{x}.{y}"}, LOOK | phones)
    people.project()
    n_compared = 0
    rows = matching._rows

    def counting(*args: Any) -> tuple[int, ...]:
        nonlocal n_compared
        n_compared += 1
        return rows(*args)

    monkeypatch.setattr(matching, "_rows", counting)
    people.history.know({"customer_number": "one more"}, LOOK | {"phone_0": "+4915120000077"})
    people.project()
    assert max(map(len, people.groups())) == IDENTITIES_MAX
    assert n_compared < 1_000


def test_value_is_not_too_shared_any_more_when_those_who_shared_it_are_erased() -> None:
    people = told([{"customer_number": str(i), "email": "desk"} for i in range(5)], email={"sharedMax": 3})
    assert too_shared(people) == {"desk"}
    for i in range(2):
        people.history.forget(bytes([i]) * 16, [("customer_number", str(i))])
    people.project()
    assert too_shared(people) == set()
    assert people.groups() == rebuilt(people).groups()
    assert len(people.groups()) == 1


def test_value_that_only_somebody_erased_had_is_forgotten_with_them() -> None:
    people = People()
    people.history.know({"customer_number": "1", "family_account": "family of one"})
    people.history.know({"customer_number": "2", "family_account": "family of two"})
    people.history.know({"customer_number": "3", "family_account": "family of two"})
    people.history.know({"family_account": "family with a past"}, {"age": 3.0})
    people.history.know({"customer_number": "1", "family_account": "family with a past"})
    people.project()
    people.history.forget(b"e" * 16, [("customer_number", "1")])
    people.history.forget(b"f" * 16, [("customer_number", "2")])
    people.project()
    left = {node.identity.value for node in people.nodes().values()}
    assert left == {"3", "family of two", "family with a past"}
    assert people.groups() == rebuilt(people).groups()


def test_proposals_about_somebody_erased_are_no_longer_under_review() -> None:
    people = told([{"customer_number": "1"}, {"customer_number": "2"}, {"customer_number": "3"}])
    for weight in (8.0, 9.0):  # the later one stands
        people.history.link(("customer_number", "1"), ("customer_number", "2"), "PROPOSED", weight=weight)
    people.history.link(("customer_number", "2"), ("customer_number", "3"), "PROPOSED", weight=8.0)
    people.project()
    with people.store.read() as snapshot:
        assert len(list(snapshot.scan(Table.REVIEWS))) == 2
    people.history.forget(b"e" * 16, [("customer_number", "1")])
    people.project()
    with people.store.read() as snapshot:
        assert [key("customer_number", "1") in place for place, _ in snapshot.scan(Table.REVIEWS)] == [False]
