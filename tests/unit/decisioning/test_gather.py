"""Requests and people as rows of columns: names resolved, values in their places, and nothing of one row in another."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from server.catalog.catalog import NOW_FACT, Catalog
from server.decisioning.candidacy import EXCLUDED, LISTED, NOT_LISTED
from server.decisioning.decide import EXPLORE, RANDOM_CONTROL
from server.decisioning.gather import Asked, Batch, assign, gather_profile, gather_request
from server.errors import TsugiError
from server.profiles.erased import NOBODY
from server.profiles.identity import identity_key
from server.storage.memory import MemoryStore
from server.storage.store import Table
from tests.support import catalogs, populating
from tests.support.populating import Person
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity

NOW_US = 1_760_000_000_000_000
ANNA, BERT = b"a" * 16, b"b" * 16


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return catalogs.compiled()


@pytest.fixture(scope="module")
def store(catalog: Catalog) -> MemoryStore:
    store = MemoryStore()
    with store.write() as txn:
        for key, number, age in ((ANNA, "1", 30), (BERT, "2", 60)):
            profile = Person({"age": age, "member": True}, {"customer_number": number, "browser_id": number})
            populating.put(txn, key, profile, catalog)
    return store


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def ask(loop: asyncio.AbstractEventLoop, **request: Any) -> Asked:
    message = json_format.ParseDict({"placements": [{"placement": "greedy"}]} | request, DecideRequest())
    return Asked(message, message.SerializeToString(), loop.create_future(), 0.0, 0.0)


def fact(batch: Batch, row: int, name: str) -> float:
    return float(batch.facts[row, batch.catalog.space.index[name]])


def test_names_become_rows_and_values_facts(catalog: Catalog, loop: asyncio.AbstractEventLoop) -> None:
    batch = Batch(catalog, NOW_US, 1)
    asked = ask(
        loop,
        placements=[{"placement": "mail"}, {"placement": "greedy", "count": 3}],
        context={"hour": {"numberValue": 7}},
    )
    gather_request(asked, batch)
    assert asked.asks == [(catalog.placement_rows["mail"], 1), (catalog.placement_rows["greedy"], 3)]
    assert fact(batch, 0, "context.hour") == 7.0
    assert batch.facts[0, NOW_FACT] == NOW_US


def test_lists_of_actions_become_marks(catalog: Catalog, loop: asyncio.AbstractEventLoop) -> None:
    batch = Batch(catalog, NOW_US, 1)
    listed = ask(loop, candidateActions=["action_0", "action_1", "action_1"], excludedActions=["action_1"])
    gather_request(listed, batch)
    assert listed.listing is not None
    assert listed.listing.tolist() == [LISTED, EXCLUDED, NOT_LISTED, NOT_LISTED]
    excluding = ask(loop, excludedActions=["action_3"])
    gather_request(excluding, batch)
    assert excluding.listing is not None
    assert excluding.listing.tolist() == [LISTED, LISTED, LISTED, EXCLUDED]
    free = ask(loop)
    gather_request(free, batch)
    assert free.listing is None


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (
            {"placements": [{"placement": "greedy"}, {"placement": "nowhere"}]},
            "RESOURCE_NOT_FOUND",
            "placements[1].placement",
        ),
        (
            {"placements": [{"placement": "greedy"}, {"placement": "greedy"}]},
            "FIELD_INVALID",
            "placements[1].placement",
        ),
        ({"placements": [{"placement": "greedy", "count": 5}]}, "LIMIT_EXCEEDED", "placements[0].count"),
        ({"placements": [{"placement": "mail", "count": 2}]}, "LIMIT_EXCEEDED", "placements[0].count"),
        ({"candidateActions": ["action_0", "x"]}, "RESOURCE_NOT_FOUND", "candidate_actions[1]"),
        ({"excludedActions": ["x"]}, "RESOURCE_NOT_FOUND", "excluded_actions[0]"),
        ({"context": {"x": {"numberValue": 1}}}, "RESOURCE_NOT_FOUND", "context.x"),
        ({"context": {"hour": {"textValue": "noon"}}}, "FIELD_INVALID", "context.hour"),
        ({"context": {"hour": {"numberValue": "NaN"}}}, "FIELD_INVALID", "context.hour"),
        ({"context": {"hour": {}}}, "FIELD_INVALID", "context.hour"),
        ({"identities": [{"namespace": "x", "value": "1"}]}, "RESOURCE_NOT_FOUND", "identities[0].namespace"),
    ],
)
def test_wrong_request_is_refused_with_its_path(
    catalog: Catalog, loop: asyncio.AbstractEventLoop, request_: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(TsugiError) as refusal:
        gather_request(ask(loop, **request_), Batch(catalog, NOW_US, 1))
    assert ErrorReason.Name(refusal.value.reason) == f"ERROR_REASON_{reason}"
    assert refusal.value.metadata["field"] == field


def test_nothing_of_a_refused_request_reaches_the_next(
    catalog: Catalog, store: MemoryStore, loop: asyncio.AbstractEventLoop
) -> None:
    batch = Batch(catalog, NOW_US, 2)
    with store.read() as snapshot:
        gone = ask(
            loop, identities=[{"namespace": "customer_number", "value": "1"}], context={"hour": {"numberValue": 7}}
        )
        gather_request(gone, batch)
        gather_profile(gone, batch, snapshot, NOBODY)
        batch.discard()  # refused after all
        wrong = ask(loop, context={"hour": {"numberValue": 9}}, identities=[{"namespace": "x", "value": "1"}])
        with pytest.raises(TsugiError):
            gather_request(wrong, batch)
        batch.discard()
        stranger = ask(loop, identities=[{"namespace": "customer_number", "value": "99"}])
        gather_request(stranger, batch)
        gather_profile(stranger, batch, snapshot, NOBODY)
        batch.add(stranger, seed=5, state_lsn=3)
    assert np.isnan(batch.facts[0, 1:]).all()
    assert stranger.degradations == [Degradation.DEGRADATION_PROFILE_UNKNOWN]
    assert (stranger.seed, stranger.state_lsn, stranger.profile_key) == (5, 3, b"")


def test_first_known_identity_leads_to_the_person(
    catalog: Catalog, store: MemoryStore, loop: asyncio.AbstractEventLoop
) -> None:
    batch = Batch(catalog, NOW_US, 1)
    asked = ask(
        loop,
        identities=[
            {"namespace": "browser_id", "value": "unknown"},
            {"namespace": "browser_id", "value": "2"},
            {"namespace": "customer_number", "value": "1"},
        ],
    )
    with store.read() as snapshot:
        gather_request(asked, batch)
        gather_profile(asked, batch, snapshot, NOBODY)
    assert asked.profile_key == BERT
    assert asked.subjects == (BERT,)
    assert (fact(batch, 0, "profile.age"), fact(batch, 0, "profile.member")) == (60.0, 1.0)
    assert math.isnan(fact(batch, 0, "profile.tier"))
    assert asked.degradations == []


def test_profile_id_counts_before_identities_and_may_be_unknown(
    catalog: Catalog, store: MemoryStore, loop: asyncio.AbstractEventLoop
) -> None:
    identities = [{"namespace": "customer_number", "value": "2"}]
    batch = Batch(catalog, NOW_US, 2)
    with store.read() as snapshot:
        known = ask(loop, profileId=ANNA.hex(), identities=identities)
        gather_request(known, batch)
        gather_profile(known, batch, snapshot, NOBODY)
        batch.add(known, 0, 0)
        unknown = ask(loop, profileId="00" * 16, identities=identities)
        gather_request(unknown, batch)
        gather_profile(unknown, batch, snapshot, NOBODY)
    assert known.profile_key == ANNA
    assert unknown.profile_key == b""
    assert unknown.degradations == [Degradation.DEGRADATION_PROFILE_UNKNOWN]
    assert unknown.subjects == (identity_key(Identity(namespace="customer_number", value="2")),)


def test_profile_that_cannot_be_read_is_as_if_nothing_were_known(
    catalog: Catalog, loop: asyncio.AbstractEventLoop
) -> None:
    store = MemoryStore()
    with store.write() as txn:
        populating.put(txn, ANNA, Person({"age": 30}, {"customer_number": "1"}), catalog)
        data = txn.get(Table.PROFILES, ANNA)
        assert data is not None
        txn.put(Table.PROFILES, ANNA, bytes(data[:-1]) + bytes([data[-1] ^ 1]))
    batch = Batch(catalog, NOW_US, 1)
    asked = ask(loop, identities=[{"namespace": "customer_number", "value": "1"}])
    with store.read() as snapshot:
        gather_request(asked, batch)
        gather_profile(asked, batch, snapshot, NOBODY)
    assert asked.degradations == [Degradation.DEGRADATION_PROFILE_UNAVAILABLE]
    assert np.isnan(batch.facts[0, 1:]).all()
    assert asked.profile_key == ANNA, "whose contact it is stays known"


def test_columns_lie_in_request_order(catalog: Catalog, loop: asyncio.AbstractEventLoop) -> None:
    batch = Batch(catalog, NOW_US, 3)
    requests: list[dict[str, Any]] = [
        {"placements": [{"placement": "greedy", "count": 2}, {"placement": "mail"}]},
        {"excludedActions": ["action_0"]},
        {"context": {"hour": {"numberValue": 3}}},
    ]
    for i, request in enumerate(requests):
        asked = ask(loop, **request)
        gather_request(asked, batch)
        batch.add(asked, seed=(1 << 64) - 1 - i, state_lsn=1)
    questions = batch.questions()
    greedy, mail = catalog.placement_rows["greedy"], catalog.placement_rows["mail"]
    assert questions.heads.tolist() == [[2, EXPLORE, -1, 0], [1, EXPLORE, 0, 0], [1, EXPLORE, -1, 0]]
    assert questions.asks.tolist() == [[greedy, 2, 0], [mail, 1, 0], [greedy, 1, 0], [greedy, 1, 0]]
    assert questions.listings.shape == (1, 4)
    assert questions.seeds.tolist() == [(1 << 64) - 1 - i for i in range(3)]
    assert questions.facts.shape[0] == 3


def test_random_control_has_its_share_and_stays(catalog: Catalog, loop: asyncio.AbstractEventLoop) -> None:
    def is_control(catalog: Catalog, person: bytes) -> bool:
        asked = ask(loop)
        assign(asked, catalog, person)
        return asked.mode == RANDOM_CONTROL

    control = catalogs.compiled(randomControl={"share": 0.3, "salt": "one"})
    other = catalogs.compiled(randomControl={"share": 0.3, "salt": "two"})
    people = [i.to_bytes(16, "big") for i in range(4_000)]
    chosen = [is_control(control, person) for person in people]
    assert chosen == [is_control(control, person) for person in people]
    assert 0.27 < np.mean(chosen) < 0.33  # four standard deviations
    both = np.mean([is_control(other, person) for person, is_in in zip(people, chosen, strict=True) if is_in])
    assert 0.24 < both < 0.36, "another salt draws other people"
    assert not any(is_control(catalog, person) for person in people)
    assert not is_control(control, b""), "nobody is in no control"


def test_person_not_known_yet_is_in_the_control_by_the_first_identity(
    store: MemoryStore, loop: asyncio.AbstractEventLoop
) -> None:
    control = catalogs.compiled(randomControl={"share": 0.5, "salt": "s"})
    modes = set()
    with store.read() as snapshot:
        for i in range(100, 130):
            batch = Batch(control, NOW_US, 1)
            asked = ask(loop, identities=[{"namespace": "browser_id", "value": str(i)}])
            gather_request(asked, batch)
            gather_profile(asked, batch, snapshot, NOBODY)
            key = identity_key(Identity(namespace="browser_id", value=str(i)))
            same = ask(loop)
            assign(same, control, key)
            assert asked.mode == same.mode
            modes.add(asked.mode)
    assert modes == {RANDOM_CONTROL, EXPLORE}
