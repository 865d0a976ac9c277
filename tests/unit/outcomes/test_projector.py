from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from server.outcomes import projector as projector_module
from server.outcomes.projector import Projector, TooManyUnreadableError, state_hash
from server.profiles import describe, repository
from server.registry.blobs import BlobAbsentError
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.record import CorruptRecordError, Draft
from server.storage.store import Table
from tests.support.histories import SECOND_US, START_US, erase
from tests.support.projecting import ANNA, BERTA, CATALOG, CATALOGS, ONE, OTHER, World, load_catalog
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.requests import event
from tsugi.v1.model_pb2 import ModelRole


@pytest.fixture
def world() -> World:
    world = World()
    world.history.put_in_force(CATALOG)
    return world


@pytest.fixture
def anna(world: World) -> bytes:
    """Gives the profile key of somebody known."""
    key = world.history.profile_key(world.history.know(ANNA))
    world.project()
    return key


def test_first_record_begins_a_profile_with_the_lineage_of_each_value(world: World) -> None:
    lsn = world.history.know({"customer_number": "1", "browser_id": "b"}, {"age": 41.0, "tier": "gold"}, source="shop")
    world.project()
    profile = world.profile(world.history.profile_key(lsn))
    assert profile is not None
    assert [(each.namespace, each.value) for each in profile.identities] == [
        ("customer_number", "1"),
        ("browser_id", "b"),
    ]
    age = profile.attributes["age"]
    assert (age.value.number_value, age.source, age.lsn) == (41.0, "shop", lsn)
    assert age.update_time.ToMicroseconds() == START_US
    assert profile.lsn == lsn
    assert world.projector.applied == (lsn, START_US, 1)


def test_latest_value_survives_and_the_others_stay(world: World) -> None:
    first = world.history.know(ANNA, {"age": 41.0, "tier": "gold"}, source="shop")
    world.history.now_us += SECOND_US
    second = world.history.know(ANNA, {"age": 42.0, "member": True}, source="crm")
    world.project()
    profile = world.profile(world.history.profile_key(first))
    assert profile is not None
    assert {name: (each.source, each.lsn) for name, each in profile.attributes.items()} == {
        "age": ("crm", second),
        "member": ("crm", second),
        "tier": ("shop", first),
    }
    assert profile.attributes["age"].value.number_value == 42.0
    assert profile.attributes["age"].update_time.ToMicroseconds() == START_US + SECOND_US


def test_unknown_identity_is_linked_to_the_known_one_and_leads_there_from_then_on(world: World) -> None:
    lsn = world.history.know(ANNA)
    world.history.know({"browser_id": "b", **ANNA})
    world.history.know({"browser_id": "b"}, {"age": 30.0})
    world.project()
    key = world.history.profile_key(lsn)
    assert world.key_of("browser_id", "b") == world.key_of("customer_number", "1") == key
    profile = world.profile(key)
    assert profile is not None
    assert [each.value for each in profile.identities] == ["1", "b"]
    assert profile.attributes["age"].value.number_value == 30.0


def test_record_that_names_two_known_people_makes_them_one(world: World) -> None:
    anna, berta = world.history.know(ANNA, {"age": 1.0}), world.history.know(BERTA, {"age": 2.0})
    both = world.history.know({"browser_id": "b", "customer_number": "2"})
    world.history.know({"browser_id": "b", "customer_number": "1"}, {"member": True})
    world.project()
    assert world.quarantined() == {}
    profile = world.profile(world.history.profile_key(anna))
    assert profile is not None
    assert profile.attributes["age"].value.number_value == 2.0
    assert world.profile(world.history.profile_key(berta)) is None
    assert world.key_of("customer_number", "2") == world.history.profile_key(anna)
    assert berta < both


def test_record_before_any_catalog_is_set_aside() -> None:
    world = World()
    early = world.history.know(ANNA)
    world.history.put_in_force(CATALOG)
    world.history.know(BERTA)
    world.project()
    assert world.quarantined() == {early: "no catalog was in force"}
    assert world.key_of("customer_number", "1") is None
    assert world.key_of("customer_number", "2") is not None


def test_events_without_an_instant_have_log_time(world: World) -> None:
    stated = datetime(2025, 10, 1, tzinfo=UTC)
    lsn = world.history.know(ANNA)
    for pages, instant in ((1, None), (2, stated)):
        world.history.now_us += SECOND_US
        world.history.know(ANNA, event=event("visit", {"pages": pages}, occurrence_time=instant))
    world.project()
    with world.store.read() as snapshot:
        keys = repository.members(snapshot, world.history.profile_key(lsn))
        told = describe.timeline(snapshot, keys, 10).touchpoints
    assert [each.event.event.properties["pages"].number_value for each in told] == [1.0, 2.0]
    assert told[0].occurrence_time.ToMicroseconds() == START_US + SECOND_US
    assert told[1].occurrence_time.ToDatetime(UTC) == stated


def test_identities_beyond_those_of_one_person_are_somebody_else(world: World) -> None:
    lsn = world.history.know({"customer_number": "1"})
    for i in range(64):
        world.history.know({"browser_id": str(i)})
        world.history.link(("customer_number", "1"), ("browser_id", str(i)))
    world.history.know(ANNA, {"age": 5.0})
    world.project()
    profile = world.profile(world.history.profile_key(lsn))
    assert profile is not None
    assert len(profile.identities) == 64
    assert profile.attributes["age"].value.number_value == 5.0
    strangers = [i for i in range(64) if world.key_of("browser_id", str(i)) != world.history.profile_key(lsn)]
    assert len(strangers) == 1


def test_facts_are_encoded_for_the_catalog_in_force_when_the_profile_changes(world: World) -> None:
    key = world.history.profile_key(world.history.know(ANNA, {"age": 41.0, "tier": "gold"}))
    world.project()
    before = stored_facts(world, key)
    world.history.put_in_force(OTHER)
    world.project()
    assert before == (CATALOG.space.profile_layout, "[41.0, nan, 2.0]")
    assert stored_facts(world, key) == (OTHER.space.profile_layout, "[0.0, nan, nan]"), "swept by the change itself"
    world.history.know(ANNA, {"shoe_size": 38.0})
    world.project()
    assert stored_facts(world, key) == (OTHER.space.profile_layout, "[0.0, nan, 38.0]")


def stored_facts(world: World, key: bytes) -> tuple[bytes, str]:
    with world.store.read() as snapshot:
        stored = repository.load(snapshot, key)
        assert stored is not None
        return stored.layout, str(stored.facts.tolist())


@pytest.mark.parametrize("role", [ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER])
def test_configuration_lsn_is_that_of_the_last_change_of_catalog_or_role(world: World, role: ModelRole) -> None:
    role_lsn = world.history.assign_role(role)
    world.history.know(ANNA)
    world.history.record(RecordKind.RECORD_KIND_MODEL_PUSHED, b"")
    world.history.tick()
    world.project()
    assert world.projector.applied == (world.log.tail().lsn, START_US, role_lsn)
    catalog = world.history.put_in_force(OTHER)
    world.project()
    assert world.projector.applied.configuration_lsn == catalog


@pytest.mark.parametrize(
    "kind",
    [
        RecordKind.RECORD_KIND_DECISION,
        RecordKind.RECORD_KIND_OUTCOME,
        RecordKind.RECORD_KIND_SOURCE_RECORD,
        RecordKind.RECORD_KIND_CATALOG_CHANGE,
    ],
)
def test_record_that_is_not_its_message_is_set_aside_and_the_next_is_applied(world: World, kind: RecordKind) -> None:
    broken = world.history.record(kind, b"\xff\xff\xff", ONE)
    outcome = world.history.report(ONE, "action_1")  # of a decision that cannot be read, where it is one
    world.history.know(ANNA)
    world.project()
    assert world.quarantined()[broken] == "it is not the message of its kind"
    assert world.key_of("customer_number", "1") is not None
    assert world.parked() == []
    assert (outcome in world.quarantined()) or kind != RecordKind.RECORD_KIND_DECISION


def test_record_of_a_kind_that_a_later_build_knows_has_no_effect(world: World) -> None:
    lsn = world.history.record(200, b"whatever")
    world.project()
    assert world.projector.applied.lsn == lsn
    assert world.quarantined() == {}


def test_erased_records_have_no_effect(world: World) -> None:
    source = world.history.know(ANNA)
    outcome = world.history.report(ONE, "action_1")
    world.project()
    assert world.parked() == [outcome]
    erase(world.log, outcome)
    lost = world.history.decide(ONE, ["action_1"], profile_key=world.history.profile_key(source), on_impression=True)
    world.history.report(ONE, "action_1")
    erase(world.log, lost)
    world.project()
    assert world.parked() == [outcome]  # the erased decision has freed nobody
    assert world.contacts(world.history.profile_key(source)) == {}
    rebuilt = World()
    rebuilt.log = world.log
    erase(world.log, source)
    rebuilt.projector = Projector(world.log, rebuilt.store, load_catalog)
    rebuilt.project()
    assert rebuilt.key_of("customer_number", "1") is None


def test_catalog_that_cannot_be_had_stops_the_projector_until_it_can(
    world: World, anna: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Going on under another catalog would make a state that no rebuild makes again.
    before = (world.projector.applied, state_hash(world.store))
    with monkeypatch.context() as lost:
        lost.delitem(CATALOGS, OTHER.sha256)
        world.history.put_in_force(OTHER)
        world.history.know(ANNA, {"shoe_size": 38.0})
        with pytest.raises(BlobAbsentError):
            world.projector.step()
        assert (world.projector.applied, state_hash(world.store)) == before
    world.projector = Projector(world.log, world.store, load_catalog)
    world.project()
    assert stored_facts(world, anna)[0] == OTHER.space.profile_layout


def test_damaged_log_stops_the_projector_before_the_damage_has_an_effect(world: World) -> None:
    world.history.know(ANNA)
    before = state_hash(world.store)
    world.log._records[1] = world.log._records[1][:-1] + b"?"
    with pytest.raises(CorruptRecordError):
        world.projector.step()
    assert state_hash(world.store) == before


def test_more_unreadable_records_than_can_be_an_accident_stop_the_projector(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector_module, "UNREADABLE_MAX", 3)
    for _ in range(2):
        world.history.record(RecordKind.RECORD_KIND_OUTCOME, b"\xff")
    world.project()
    assert len(world.quarantined()) == 2
    for _ in range(2):
        world.history.record(RecordKind.RECORD_KIND_OUTCOME, b"\xff")
    before = state_hash(world.store)
    for projector in (world.projector, Projector(world.log, world.store, load_catalog)):
        with pytest.raises(TooManyUnreadableError):
            projector.step()
        assert state_hash(world.store) == before


def test_records_are_applied_in_order_without_a_gap(world: World) -> None:
    world.history.know(ANNA)
    records = world.log.read(1)
    for wrong in (records[1:], records[1:] + records[:1]):
        with pytest.raises(AssertionError, match="without a gap"):
            world.projector.apply(wrong)
    world.projector.apply(records)
    with pytest.raises(AssertionError, match="without a gap"):
        world.projector.apply(records)


def test_projector_goes_on_where_the_state_says_it_stopped(world: World) -> None:
    key = world.history.profile_key(world.history.know(ANNA, {"age": 1.0}))
    world.history.report(ONE, "action_1")
    world.project()
    again = Projector(world.log, world.store, load_catalog)
    assert again.applied == world.projector.applied
    assert again.step() == 0
    world.projector = again
    world.history.know(ANNA, {"age": 2.0})
    world.history.decide(ONE, ["action_1"], profile_key=key, on_impression=True)
    world.project()
    profile = world.profile(key)
    assert profile is not None
    assert profile.attributes["age"].value.number_value == 2.0
    assert world.contacts(key) == {"action_1": (1, START_US)}  # it knew of the parked one


def test_hash_is_of_every_table_key_and_value() -> None:
    stores = [MemoryStore() for _ in range(5)]
    pairs: Sequence[tuple[Table, bytes, bytes]] = [
        (Table.PROFILES, b"key", b"value"),
        (Table.CONTACTS, b"key", b"value"),
        (Table.PROFILES, b"keyv", b"alue"),
        (Table.PROFILES, b"key", b"other"),
    ]
    for store, (table, key, value) in zip(stores, pairs, strict=False):
        with store.write() as txn:
            txn.put(table, key, value)
    assert len({state_hash(store) for store in stores}) == 5
    assert state_hash(MemoryStore()) == state_hash(stores[4])


def test_loop_applies_what_is_there_beats_each_turn_and_ends_when_told(world: World) -> None:
    for i in range(300):
        world.log.append([Draft(RecordKind.RECORD_KIND_TICK, b"", i.to_bytes(16, "big"))], START_US)
    stop = threading.Event()
    beats = []

    def beat() -> None:
        beats.append(world.projector.applied.lsn)
        if len(beats) == 5:
            stop.set()

    projector_module.run(world.projector, stop, beat, threading.Lock(), idle_wait_s=0.0)
    assert beats == [0, 128, 256, 301, 301]


def test_state_of_another_log_is_forgotten_and_made_anew(world: World) -> None:
    world.history.know(ANNA, {"age": 1.0})
    world.project()
    foreign = Projector(MemoryLog(b"another log's id"), world.store, load_catalog)
    assert foreign.applied.lsn == 0
    with world.store.read() as snapshot:
        assert not list(snapshot.scan(Table.PROFILES))


def test_state_ahead_of_a_restored_log_is_forgotten(world: World) -> None:
    world.history.know(ANNA, {"age": 1.0})
    world.project()
    assert Projector(MemoryLog(world.log.log_id), world.store, load_catalog).applied.lsn == 0
