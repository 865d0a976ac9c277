from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalog.catalog import Doubles
from server.profiles import repository
from server.profiles.repository import CorruptProfileError
from server.storage.memory import MemoryStore
from server.storage.store import Table
from tests.support.catalogs import compiled
from tests.support.deciding import stored_profile
from tsugi.log.v1.state_pb2 import StoredProfile
from tsugi.v1.identity_pb2 import Identity

CATALOG = compiled()
OTHER = compiled(profileAttributes=[{"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["gold"]}])
KEY = bytes(range(16))
ANNA = {"customer_number": "7", "browser_id": "b-1"}
GOLD = {"age": 41.0, "member": True, "tier": "gold"}


def identity(namespace: str, value: str) -> Identity:
    return Identity(namespace=namespace, value=value)


def saved(profile: StoredProfile, store: MemoryStore | None = None) -> MemoryStore:
    store = store or MemoryStore()
    with store.write() as txn:
        repository.save(txn, KEY, profile, CATALOG.space, lsn=9)
    return store


def facts(attributes: Mapping[str, float | bool | str]) -> Doubles:
    return repository.encode(stored_profile(attributes, {}), CATALOG.space)


def test_saved_profile_is_found_by_each_identity_and_comes_back_whole() -> None:
    profile = stored_profile(GOLD, ANNA)
    with saved(profile).read() as snapshot:
        for namespace, value in ANNA.items():
            assert repository.find(snapshot, [identity(namespace, value)]) == KEY
        stored = repository.load(snapshot, KEY)
        assert stored is not None
        assert repository.parse(stored) == profile
        assert (stored.lsn, stored.layout) == (9, CATALOG.space.profile_layout)
        np.testing.assert_array_equal(stored.facts, [41.0, 1.0, 2.0])
        assert repository.load(snapshot, bytes(16)) is None


def test_first_known_identity_leads_and_all_of_them_are_told_apart() -> None:
    store = saved(stored_profile({}, ANNA))
    with store.write() as txn:
        repository.save(txn, bytes(16), stored_profile({}, {"customer_number": "8"}), CATALOG.space, lsn=10)
    nobody, anna, berta = identity("browser_id", "?"), identity("browser_id", "b-1"), identity("customer_number", "8")
    with store.read() as snapshot:
        assert repository.find(snapshot, [nobody]) is None
        assert repository.find(snapshot, []) is None
        assert repository.find(snapshot, [nobody, berta, anna]) == bytes(16)
        assert repository.find_all(snapshot, [nobody, berta, anna, berta]) == [bytes(16), KEY]
        assert repository.find_all(snapshot, [identity("customer_number", "7"), anna]) == [KEY]
        assert repository.find_all(snapshot, [nobody]) == []


def test_identity_keys_differ_by_namespace_and_value() -> None:
    keys = {repository.identity_key(identity(*pair)) for pair in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "bb"))}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {16}


def test_new_profile_keys_are_the_same_at_every_rebuild_and_differ_by_log_and_lsn() -> None:
    keys = [repository.new_profile_key(log_id, lsn) for log_id in (b"a" * 16, b"b" * 16) for lsn in (1, 2, 1 << 40)]
    assert len(set(keys)) == 6
    assert keys[0] == repository.new_profile_key(b"a" * 16, 1)


def test_facts_unknown_or_not_of_their_type_are_nan() -> None:
    np.testing.assert_array_equal(facts({}), [math.nan] * 3)
    np.testing.assert_array_equal(facts({"age": "41", "member": 1.0, "tier": "platinum"}), [math.nan] * 3)
    np.testing.assert_array_equal(facts({"age": 121.0, "member": False, "tier": "bronze"}), [math.nan, 0.0, 0.0])
    np.testing.assert_array_equal(facts({"age": math.inf, "unheard_of": 1.0}), [math.nan] * 3)


def test_facts_under_another_catalog_are_encoded_afresh_and_under_the_same_are_the_stored_ones() -> None:
    profile = stored_profile(GOLD, ANNA)
    with saved(profile).read() as snapshot:
        stored = repository.load(snapshot, KEY)
        assert stored is not None
        assert repository.facts_under(stored, CATALOG.space) is stored.facts
        np.testing.assert_array_equal(repository.facts_under(stored, OTHER.space), [0.0])
        np.testing.assert_array_equal(
            repository.facts_under(stored, OTHER.space), repository.encode(profile, OTHER.space)
        )


def test_every_flipped_bit_and_every_truncation_of_a_stored_profile_is_noticed() -> None:
    store = saved(stored_profile(GOLD, {"customer_number": "7"}))
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


def test_profile_of_a_later_version_is_not_guessed_at() -> None:
    store = saved(stored_profile({}, ANNA))
    with store.write() as txn:
        data = bytearray(txn.get(Table.PROFILES, KEY) or b"")
        struct.pack_into("<H", data, 4, 2)
        txn.put(Table.PROFILES, KEY, bytes(data))
        with pytest.raises(CorruptProfileError, match="version 2"):
            repository.load(txn, KEY)


def test_too_many_identities_are_the_programmers_fault() -> None:
    profile = StoredProfile(identities=[identity("browser_id", str(i)) for i in range(65)])
    with pytest.raises(AssertionError, match="quarantines"):
        saved(profile)


def test_contacts_are_counted_by_person_and_action_and_the_latest_stands() -> None:
    store = saved(stored_profile({}, ANNA))
    with store.write() as txn:
        for time_us in (5_000_000, 7_000_000, 6_000_000):
            repository.count_contact(txn, KEY, "call", time_us)
        repository.count_contact(txn, KEY, "banner", 1_500_000)
        repository.count_contact(txn, bytes(16), "call", 9_000_000)
    with store.read() as snapshot:
        stored = repository.load(snapshot, KEY)
        assert stored is not None
        contacts = repository.describe(snapshot, KEY, stored).contacts
    assert [(contact.action, contact.count, contact.last_contact_time.ToMicroseconds()) for contact in contacts] == [
        ("banner", 1, 1_500_000),
        ("call", 3, 7_000_000),
    ]


def test_described_profile_tells_everything_with_the_newest_event_first() -> None:
    profile = stored_profile(GOLD, ANNA)
    for pages in (1, 2):
        profile.events.add(type="visit").properties["pages"].number_value = pages
    with saved(profile).read() as snapshot:
        stored = repository.load(snapshot, KEY)
        assert stored is not None
        described = repository.describe(snapshot, KEY, stored)
    assert described.profile_id == KEY.hex()
    assert [(each.namespace, each.value) for each in described.identities] == list(ANNA.items())
    assert described.attributes["tier"].value.text_value == "gold"
    assert [event.properties["pages"].number_value for event in described.events] == [2, 1]
    assert described.lsn == 9


@given(st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999))
def test_instants_are_timestamps_of_the_same_microsecond(instant_us: int) -> None:
    instant = repository.timestamp(instant_us)
    assert 0 <= instant.nanos < 1_000_000_000
    assert instant.seconds * 1_000_000 + instant.nanos // 1_000 == instant_us
