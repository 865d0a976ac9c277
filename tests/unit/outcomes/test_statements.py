"""What is stated about somebody who is forgotten already, though the state still knows them."""

from __future__ import annotations

import asyncio

import pytest

from server.errors import TsugiError
from server.outcomes.erasure import records_since
from server.outcomes.ingest import Accepted
from server.outcomes.statements import Statements
from server.storage.store import Table
from tests.support.committing import ScriptedCommitter
from tests.support.deciding import TOKEN_KEY
from tests.support.people import People
from tsugi.log.v1.state_pb2 import StoredErasure
from tsugi.requests import source_record
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import (
    EraseProfileRequest,
    LinkIdentitiesRequest,
    LinkVerdict,
    SplitProfileRequest,
)

ANNA, BERTA = ("customer_number", "1"), ("customer_number", "2")
EMAIL = ("email", "anna@shop.example")


class Desk:
    """One worker's statements about two people, of whom the first has two identities."""

    def __init__(self) -> None:
        self.people = People()
        self.people.say(source_record("1", "crm", [ANNA, EMAIL]), source_record("2", "crm", [BERTA]))
        self.people.project()
        self.committer = self._committer()
        self.statements = self._statements(self.committer)
        self.elsewhere = self._statements(self._committer())  # another worker

    def _committer(self) -> ScriptedCommitter:
        return ScriptedCommitter(self.people.log, lambda: self.people.history.now_us)

    def _statements(self, committer: ScriptedCommitter) -> Statements:
        return Statements(
            log=self.people.log,
            store=self.people.store,
            committer=committer,
            token_key=TOKEN_KEY,
            catalog=lambda: self.people.catalog,
        )

    async def link(self, one: tuple[str, str], other: tuple[str, str], request_id: str = "l") -> Accepted | None:
        return await self.statements.link(
            LinkIdentitiesRequest(
                identity=named(one),
                other_identity=named(other),
                verdict=LinkVerdict.LINK_VERDICT_SAME,
                stated_by="clerk",
                request_id=request_id,
            )
        )

    async def split(self, leaving: tuple[str, str], profile_key: bytes) -> Accepted | None:
        return await self.statements.split(
            SplitProfileRequest(
                profile_id=profile_key.hex(), identities=[named(leaving)], stated_by="clerk", request_id="s"
            )
        )

    async def erase(self, one: tuple[str, str]) -> None:
        await self.elsewhere.erase(EraseProfileRequest(identity=named(one), request_id="e"))

    def since(self) -> list[int]:
        """Return what came after the one erasure and goes with it."""
        self.people.project()
        with self.people.store.read() as snapshot:
            ((_, value),) = snapshot.scan(Table.ERASURES)
        return records_since(self.people.log, StoredErasure.FromString(value))


def named(one: tuple[str, str]) -> Identity:
    return Identity(namespace=one[0], value=one[1])


async def test_erased_person_is_neither_linked_nor_split_before_the_state_knows() -> None:
    desk = Desk()
    key = desk.people.key_of(*ANNA)
    assert key is not None
    await desk.erase(ANNA)
    for stating in (desk.link(ANNA, BERTA), desk.link(BERTA, EMAIL), desk.split(EMAIL, key)):
        with pytest.raises(TsugiError) as refusal:
            await stating
        assert refusal.value.reason == ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND
    assert desk.since() == []


async def test_statements_under_way_when_a_person_is_erased_go_with_them() -> None:
    desk = Desk()
    key = desk.people.key_of(*ANNA)
    assert key is not None
    desk.committer.is_held = True
    under_way = [asyncio.create_task(desk.link(BERTA, EMAIL)), asyncio.create_task(desk.split(EMAIL, key))]
    await desk.committer.until_held(2)
    await desk.erase(ANNA)
    desk.committer.commit()
    accepted = await asyncio.gather(*under_way)
    assert desk.since() == [each.lsn for each in accepted if each is not None]


async def test_statement_about_the_new_person_of_an_erased_identity_stays() -> None:
    desk = Desk()
    await desk.erase(ANNA)
    desk.people.say(source_record("3", "crm", [ANNA]))
    desk.people.project()
    accepted = await desk.link(ANNA, BERTA)
    assert accepted is not None
    assert desk.since() == []
