"""Whole people as callers see them: nobody who is forgotten, and nobody else held up meanwhile."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import orjson
import pytest

from server.profiles.erased import ERASURE_HEAD
from server.profiles.identity import identity_key
from server.profiles.reader import ProfileReader
from server.storage.record import Draft
from server.storage.store import Snapshot, Store
from tests.support.people import People, at
from tsugi.log.v1.record_pb2 import ErasureAccepted, RecordKind
from tsugi.requests import event, source_record
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import ExportProfileRequest, GetProfileRequest

ANNA, BERTA = ("customer_number", "1"), ("customer_number", "2")
WHO = Identity(namespace=ANNA[0], value=ANNA[1])


class Watched:
    """A store that knows which threads read it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.write, self.close = store.write, store.close
        self.readers: set[threading.Thread] = set()

    def read(self) -> AbstractContextManager[Snapshot]:
        """See Store."""
        self.readers.add(threading.current_thread())
        return self._store.read()


def reader_of(people: People, store: Store | None = None) -> ProfileReader:
    return ProfileReader(
        log=people.log,
        store=store or people.store,
        catalog=lambda: people.catalog,
        clock_us=lambda: people.history.now_us,
    )


@pytest.mark.parametrize("method", ["get", "export"])
async def test_whole_person_is_read_beside_the_event_loop(method: str) -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA]))
    people.project()
    store = Watched(people.store)
    reader = reader_of(people, store)
    if method == "get":
        await reader.get(GetProfileRequest(identity=WHO, timeline_page_size=1))
    else:
        await reader.export(ExportProfileRequest(identity=WHO))
    assert store.readers
    assert threading.current_thread() not in store.readers


async def test_export_is_one_json_object_with_all_lists() -> None:
    people = People()
    happened = event("complaint", {"ticket": "t-1"}, occurrence_time=at(-20))
    people.say(source_record("1", "crm", [ANNA], attributes={"nickname": 'A "quoted"\nname'}, event=happened))
    people.project()
    exported = await reader_of(people).export(ExportProfileRequest(identity=WHO))
    document = orjson.loads(exported.json)
    assert document["format"] == "tsugi.profile.v1"
    assert [each["record"]["recordId"] for each in document["sourceRecords"]] == ["1"]
    assert [each["event"]["event"]["type"] for each in document["timeline"]] == ["complaint"]
    assert document["consentLedger"] == []
    assert document["personalDataAttributes"] == ["phone"]
    assert document["profile"]["attributes"]["nickname"]["value"]["textValue"] == 'A "quoted"\nname'


def test_pair_of_somebody_erased_is_no_review_before_the_state_knows() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA]), source_record("2", "crm", [BERTA]))
    people.history.link(ANNA, BERTA, "PROPOSED", weight=8.0)
    people.project()
    reader = reader_of(people)
    assert len(reader.reviews(10, "").reviews) == 1
    wish = ErasureAccepted(erasure_key=b"e" * 16, identity_keys=[identity_key(WHO)])
    kind = RecordKind.RECORD_KIND_ERASURE_ACCEPTED
    people.log.append([Draft(kind, wish.SerializeToString(), head=ERASURE_HEAD)], people.history.now_us)
    assert not reader.reviews(10, "").reviews
