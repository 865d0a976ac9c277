"""A stored profile: found by identity, read as columns, verified, and true at the instant it is asked for."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalog.catalog import Catalog, Doubles
from server.profiles import repository
from server.profiles.identity import identity_key, own_profile_key
from server.profiles.repository import CorruptProfileError
from server.storage.memory import MemoryStore
from server.storage.store import Table
from tests.support import populating
from tests.support.catalogs import compiled
from tests.support.histories import SECOND_US, START_US
from tests.support.people import People, at
from tests.support.populating import Person
from tsugi.requests import PyValue, event, source_record
from tsugi.v1.identity_pb2 import Identity

CATALOG = compiled()
OTHER = compiled(profileAttributes=[{"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["gold"]}])
KEY = bytes(range(16))
ANNA = {"customer_number": "7", "browser_id": "b-1"}
GOLD: Mapping[str, PyValue] = {"age": 41.0, "member": True, "tier": "gold"}


def key_of(namespace: str, value: str) -> bytes:
    return identity_key(Identity(namespace=namespace, value=value))


def saved(attributes: Mapping[str, PyValue], identities: Mapping[str, str]) -> MemoryStore:
    store = MemoryStore()
    with store.write() as txn:
        populating.put(txn, KEY, Person(attributes, identities), CATALOG, lsn=9)
    return store


def facts(store: MemoryStore, catalog: Catalog = CATALOG, now_us: int = START_US) -> Doubles:
    out = np.full(len(catalog.space.facts), math.nan)
    out[0] = now_us
    with store.read() as snapshot:
        stored = repository.load(snapshot, KEY)
        assert stored is not None
        repository.write_facts(stored, catalog, snapshot, now_us, out)
    return out[catalog.space.profile_slice]


def test_saved_profile_is_found_by_each_identity_and_comes_back_whole() -> None:
    store = saved(GOLD, ANNA)
    with store.read() as snapshot:
        for pair in ANNA.items():
            assert repository.find(snapshot, [key_of(*pair)]) == KEY
        stored = repository.load(snapshot, KEY)
        assert stored is not None
        assert (stored.lsn, stored.layout) == (9, CATALOG.space.profile_layout)
        assert stored.leader == key_of("customer_number", "7")
        assert set(stored.parts) == {key_of(*pair) for pair in ANNA.items()}
        np.testing.assert_array_equal(stored.facts, [41.0, 1.0, 2.0])
        assert repository.load(snapshot, bytes(16)) is None


def test_first_known_identity_leads() -> None:
    store = saved({}, ANNA)
    with store.write() as txn:
        populating.put(txn, bytes(16), Person({}, {"customer_number": "8"}), CATALOG, lsn=10)
    nobody, anna, berta = key_of("browser_id", "?"), key_of("browser_id", "b-1"), key_of("customer_number", "8")
    with store.read() as snapshot:
        assert repository.find(snapshot, [nobody]) is None
        assert repository.find(snapshot, []) is None
        assert repository.find(snapshot, [nobody, berta, anna]) == bytes(16)


def test_identity_keys_differ_by_namespace_and_value() -> None:
    keys = {key_of(*pair) for pair in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "bb"))}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {16}


def test_new_profile_keys_are_the_same_at_every_rebuild_and_differ_by_log_lsn_and_place() -> None:
    keys = [
        own_profile_key(log_id, lsn, place) for log_id in (b"a" * 16, b"b" * 16) for lsn in (1, 2) for place in (0, 1)
    ]
    assert len(set(keys)) == 8
    assert keys[0] == own_profile_key(b"a" * 16, 1, 0)


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({}, [math.nan] * 3),
        ({"age": "41", "member": 1.0, "tier": "platinum"}, [math.nan] * 3),
        ({"age": 121.0, "member": False, "tier": "bronze"}, [math.nan, 0.0, 0.0]),
        ({"age": math.inf, "unheard_of": 1.0}, [math.nan] * 3),
    ],
)
def test_facts_unknown_or_not_of_their_type_are_nan(attributes: Mapping[str, PyValue], wanted: list[float]) -> None:
    np.testing.assert_array_equal(facts(saved(attributes, ANNA)), wanted)


def test_facts_under_another_catalog_are_folded_afresh() -> None:
    store = saved(GOLD, ANNA)
    np.testing.assert_array_equal(facts(store), [41.0, 1.0, 2.0])
    np.testing.assert_array_equal(facts(store, OTHER), [0.0])


def test_facts_are_those_of_the_instant_asked_for_though_the_profile_was_stored_before() -> None:
    people = People()
    people.say(
        source_record(
            "1", "shop", [("customer_number", "7")], attributes={"mood": "fine"},
            event=event("purchase", {"total": 150.0, "item": "x"}, occurrence_time=at(0)),
        )
    )  # fmt: skip
    people.project()
    space = people.catalog.space
    key = people.key_of("customer_number", "7")
    assert key is not None

    def fact(name: str, seconds: float) -> float:
        now_us = START_US + int(seconds * SECOND_US)
        out = np.full(len(space.facts), math.nan)
        out[0] = now_us
        with people.store.read() as snapshot:
            stored = repository.load(snapshot, key)
            assert stored is not None
            repository.write_facts(stored, people.catalog, snapshot, now_us, out)
        return float(out[space.index[f"profile.{name}"]])

    hour, day = 3_600.0, 86_400.0
    assert [fact("purchases_hour", seconds) for seconds in (0.0, hour - 1e-6, hour)] == [1.0, 1.0, 0.0]
    assert [fact("spent_day", seconds) for seconds in (day - 1e-6, day)] == [150.0, 0.0]
    assert [fact("spender", seconds) for seconds in (day - 1e-6, day)] == [1.0, 0.0]
    assert [fact("rfm_recency", seconds) for seconds in (0.0, 12.5)] == [0.0, 12.5]
    assert [fact("just_bought", seconds) for seconds in (599.0, 600.0)] == [1.0, 0.0]
    assert not math.isnan(fact("mood", hour - 1.0))
    assert math.isnan(fact("mood", hour))


def test_every_flipped_bit_and_every_truncation_of_a_stored_profile_is_noticed() -> None:
    store = saved(GOLD, {"customer_number": "7"})
    with store.read() as snapshot:
        data = bytes(snapshot.get(Table.PROFILES, KEY) or b"")
    damaged = [data[:size] for size in range(len(data))]
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        damaged.append(bytes(flipped))
    with store.write() as txn:
        for value in damaged:
            txn.put(Table.PROFILES, KEY, value)
            with pytest.raises(CorruptProfileError):
                repository.load(txn, KEY)
        txn.put(Table.PROFILES, KEY, data)
        assert repository.load(txn, KEY) is not None


def test_profile_of_another_version_is_not_guessed_at() -> None:
    store = saved({}, ANNA)
    with store.write() as txn:
        data = bytearray(txn.get(Table.PROFILES, KEY) or b"")
        struct.pack_into("<H", data, 4, 1)
        txn.put(Table.PROFILES, KEY, bytes(data))
        with pytest.raises(CorruptProfileError, match="version 1"):
            repository.load(txn, KEY)


@given(st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999))
def test_instants_are_timestamps_of_the_same_microsecond(instant_us: int) -> None:
    instant = repository.timestamp(instant_us)
    assert 0 <= instant.nanos < 1_000_000_000
    assert instant.seconds * 1_000_000 + instant.nanos // 1_000 == instant_us
