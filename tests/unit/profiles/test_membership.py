"""A segment's people, page by page: everybody who is in it at the instant, once, and nobody who is forgotten."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from server.errors import TsugiError
from server.profiles import membership
from server.profiles.erased import ERASURE_HEAD
from server.profiles.identity import identity_key
from server.storage.lmdb_store import LmdbStore
from server.storage.record import Draft
from server.storage.store import Table
from tests.support.histories import SECOND_US
from tests.support.people import People, at
from tests.unit.profiles.test_reader import Watched, reader_of
from tsugi.log.v1.record_pb2 import ErasureAccepted, RecordKind
from tsugi.requests import event, source_record
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity

N_PEOPLE = 40


def grown_up(number: int) -> bool:
    return number % 3 == 0


@pytest.fixture
def people() -> People:
    """People of whom every third is of age."""
    people = People()
    people.say(
        *(
            source_record(
                str(i), "crm", [("customer_number", str(i))], attributes={"age": 30.0 if grown_up(i) else 10.0}
            )
            for i in range(N_PEOPLE)
        )
    )
    people.project()
    return people


def adults(people: People) -> list[str]:
    keys = [people.key_of("customer_number", str(i)) for i in range(N_PEOPLE) if grown_up(i)]
    return sorted(key.hex() for key in keys if key is not None)


async def listed(people: People, segment: str = "adult", size: int = 500) -> list[list[str]]:
    """Return the ids of every page."""
    reader, pages, token = reader_of(people), [], ""
    while True:
        page = await reader.listing(segment, size, token)
        assert len(page.profile_ids) <= size
        pages.append(list(page.profile_ids))
        token = page.next_page_token
        if not token:
            return pages


@pytest.mark.parametrize("size", [1, 4, 14, 500])
async def test_pages_hold_everybody_in_the_segment_once_and_in_order(people: People, size: int) -> None:
    pages = await listed(people, size=size)
    assert [each for page in pages for each in page] == adults(people)
    assert all(len(page) == size for page in pages[:-1])


async def test_total_is_what_the_state_counts(people: People) -> None:
    page = await reader_of(people).listing("adult", 2, "")
    assert (page.total_size, len(page.profile_ids)) == (len(adults(people)), 2)


async def test_call_that_has_seen_enough_gives_an_empty_page_and_where_to_go_on(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "SEEN_MAX", 5)
    monkeypatch.setattr(membership, "PIECE_PROFILES", 1)
    pages = await listed(people)
    assert len(pages) == N_PEOPLE // 5
    assert [each for page in pages for each in page] == adults(people)
    monkeypatch.setattr(membership, "SEEN_MAX", 1)
    assert [] in await listed(people)


async def test_call_that_takes_long_ends_and_goes_on_with_the_next(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "PAGE_S_MAX", 0.0)
    monkeypatch.setattr(membership, "PIECE_PROFILES", 7)
    pages = await listed(people)
    assert len(pages) == -(-N_PEOPLE // 7)
    assert [each for page in pages for each in page] == adults(people)


async def test_segment_is_that_of_the_instant_and_not_of_the_last_record() -> None:
    people = People()
    bought = event("purchase", {"total": 5}, occurrence_time=at(0))
    people.say(source_record("1", "shop", [("customer_number", "1")], event=bought))
    people.project()
    assert [len(page) for page in await listed(people, "just_bought")] == [1]
    people.history.now_us += 600 * SECOND_US  # and nothing is projected
    assert await listed(people, "just_bought") == [[]]


async def test_whoever_is_forgotten_is_not_listed_before_the_state_knows(people: People) -> None:
    gone = people.key_of("customer_number", "0")
    assert gone is not None
    identity = identity_key(Identity(namespace="customer_number", value="0"))
    wish = ErasureAccepted(erasure_key=b"e" * 16, identity_keys=[identity])
    kind = RecordKind.RECORD_KIND_ERASURE_ACCEPTED
    people.log.append([Draft(kind, wish.SerializeToString(), head=ERASURE_HEAD)], people.history.now_us)
    assert await listed(people) == [[each for each in adults(people) if each != gone.hex()]]


async def test_damaged_profile_is_passed_over(people: People) -> None:
    damaged = people.key_of("customer_number", "3")
    assert damaged is not None
    with people.store.write() as txn:
        txn.put(Table.PROFILES, damaged, b"damaged")
    assert await listed(people) == [[each for each in adults(people) if each != damaged.hex()]]


async def test_profiles_are_read_beside_the_event_loop(people: People) -> None:
    store = Watched(people.store)
    await reader_of(people, store).listing("adult", 500, "")
    assert store.readers - {threading.current_thread()}


async def test_pages_of_the_engine_on_disk_are_the_same(people: People, tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "state", 1 << 24)
    with people.store.read() as snapshot, store.write() as txn:
        for table in Table:
            for key, value in snapshot.scan(table):
                txn.put(table, key, value)
    page = await reader_of(people, store).listing("adult", 500, "")
    store.close()
    assert list(page.profile_ids) == adults(people)


async def test_undeclared_segment_is_told() -> None:
    with pytest.raises(TsugiError) as refusal:
        await reader_of(People()).listing("nobody", 5, "")
    assert refusal.value.reason == ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND
