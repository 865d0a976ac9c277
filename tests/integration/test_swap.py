"""Catalog and champion change while calls run on both workers: no call fails, and no reply mixes two revisions."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final, NamedTuple

import pytest

from tests.support import sports_retail
from tests.support.running import Server, serving, told, until
from tsugi.client import CallError, Client
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRole

pytestmark = pytest.mark.slow

CALLERS: Final = 3
CONNECTIONS: Final = 8  # of each caller, so that every worker gets some of the calls
ROUNDS: Final = 3
PLACEMENTS: Final = {"home_banner": 3, "agent_upsell": 1}
CHAMPION, CHALLENGER = ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER


class Seen(NamedTuple):
    """What one reply says of what it was decided with."""

    revision: str
    champion: str
    slots: frozenset[tuple[str, str]]  # action and treatment


class Callers:
    """Threads that decide without pause, never repeat a call, and remember every reply."""

    def __init__(self, address: str) -> None:
        self.seen: list[Seen] = []
        self.failures: list[CallError] = []
        self._address = address
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(i,)) for i in range(CALLERS)]

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Call for as long as the block lasts."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join()

    def has_seen(self, since: int, *, revision: str | None = None, champion: str | None = None) -> bool:
        """Say whether a reply since then names a revision or a champion."""
        return any(
            (revision is None or seen.revision == revision) and (champion is None or seen.champion == champion)
            for seen in self.seen[since:]
        )

    def _call(self, number: int) -> None:
        with Client(self._address, timeout_s=30.0, channels=CONNECTIONS) as client:
            for i in count():
                if self._stopping.is_set():
                    return
                try:
                    reply = client.decide(
                        PLACEMENTS,
                        identities={"customer_number": f"{number}-{i % 50}"},
                        context={"device": "phone", "hour": float(i % 24)},
                    )
                except CallError as error:
                    self.failures.append(error)
                else:
                    self.seen.append(seen_in(reply))


def seen_in(reply: DecideResponse) -> Seen:
    champions = [use.revision for use in reply.model_revisions if use.role == CHAMPION]
    assert len(champions) <= 1
    slots = frozenset((slot.action, slot.treatment) for slot in reply.slots if slot.action)
    return Seen(reply.catalog_revision, champions[0] if champions else "", slots)


def renamed(catalog: Catalog, mark: str) -> Catalog:
    """Return a catalog whose treatments and half of whose actions have other names; a champion reads neither."""
    other = Catalog()
    other.CopyFrom(catalog)
    other.name = mark
    for i, action in enumerate(other.actions):
        if i % 2:
            action.name = f"{action.name}_{mark}"
        for treatment in action.treatments:
            treatment.name = f"{treatment.name}_{mark}"
    return other


def offered(catalog: Catalog) -> set[tuple[str, str]]:
    """Return every action and treatment that a reply under a catalog may hold."""
    return {(action.name, treatment.name) for action in catalog.actions for treatment in action.treatments}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


def test_swaps_under_load_fail_no_call_and_mix_no_revisions(server: Server) -> None:
    catalogs = [sports_retail.catalog().message]
    catalogs += [renamed(catalogs[0], mark) for mark in ("second", "third")]
    callers, acknowledged_s, seen_s = Callers(server.address), [], []
    with server.client() as client:
        revisions = [client.push_catalog(catalogs[0]).revision]
        champion = client.push_model(sports_retail.bundle(), "seed").model_revision.revision
        with callers.calling():

            def swap(change: object, **wanted: str) -> None:
                """Wait until replies name what a change put in force, and note how long that took."""
                since, sent = len(callers.seen), time.monotonic()
                assert callable(change)
                change()
                acknowledged = time.monotonic()
                until(lambda: callers.has_seen(since, **wanted), f"replies name {wanted}")
                acknowledged_s.append(acknowledged - sent)
                seen_s.append(time.monotonic() - acknowledged)

            for round_ in range(ROUNDS):
                for catalog in catalogs[1:]:
                    revisions.append(client.push_catalog(catalog, validate_only=True).revision)
                    swap(lambda catalog=catalog: client.push_catalog(catalog), revision=revisions[-1])
                swap(lambda: client.assign_model_role(champion), champion=champion)
                swap(lambda: client.rollback_catalog(revisions[0]), revision=revisions[0])
                swap(client.rollback_model if round_ % 2 else lambda: client.assign_model_role(""), champion="")
    # Shown by pytest -rP; how long a swap takes is for the benchmark to judge.
    told_s = {"swap_s_max": max(acknowledged_s), "first_reply_s_max": max(seen_s), "calls": len(callers.seen)}
    sys.stdout.write(f"{json.dumps(told_s)}\n")
    assert callers.failures == []
    may_hold = dict(zip(revisions[:3], map(offered, catalogs), strict=True))
    for seen in callers.seen:
        assert seen.slots, "everybody is shown something"
        assert seen.slots <= may_hold[seen.revision]
        assert seen.champion in {"", champion}
    assert {seen.revision for seen in callers.seen} == set(may_hold)
    assert {(seen.revision, seen.champion) for seen in callers.seen} > {(revisions[0], ""), (revisions[0], champion)}


def test_acknowledged_change_is_served_by_every_worker(server: Server) -> None:
    catalog = sports_retail.catalog().message
    with server.client_on("worker-0") as first, server.client_on("worker-1") as second:
        for i, (writer, reader) in enumerate([(first, second), (second, first)] * 3):
            pushed = writer.push_catalog(renamed(catalog, f"number_{i}"))
            reply = reader.decide(PLACEMENTS, context={"device": "phone"})
            assert reply.catalog_revision == pushed.revision


def test_challenger_has_its_own_role_and_keeps_it_over_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("judged")) as server:
        with server.client_on("worker-0") as writer, server.client_on("worker-1") as reader:
            writer.push_catalog(sports_retail.catalog().message)
            revision = writer.push_model(sports_retail.bundle(), "seed").model_revision.revision
            assigned = writer.assign_model_role(revision, role=CHALLENGER, request_id="try it")
            assert roles_and_etags(reader) == ([CHALLENGER], "0", assigned.etag)
            reply = reader.decide(PLACEMENTS, at_least_lsn=assigned.lsn)
            troubles = {Degradation.DEGRADATION_PROFILE_STALE, Degradation.DEGRADATION_MODEL_UNAVAILABLE}
            assert troubles.isdisjoint(reply.degradations)
            assert {use.role for use in reply.model_revisions} <= {ModelRole.MODEL_ROLE_LEARNER}, (
                "it decides for nobody"
            )
            with pytest.raises(CallError) as refusal:
                reader.assign_model_role(revision, request_id="try it")
            assert refusal.value.reason == "ERROR_REASON_IDEMPOTENCY_KEY_REUSED"
            champion = reader.assign_model_role(revision)
            assert roles_and_etags(writer) == ([CHAMPION, CHALLENGER], champion.etag, assigned.etag)
            back = reader.rollback_model(role=CHALLENGER)
            assert back.revision == ""
            assert roles_and_etags(writer) == ([CHAMPION], champion.etag, back.etag)
            again = writer.assign_model_role(revision, role=CHALLENGER, etag=back.etag)
            reader.assign_model_role("", etag=champion.etag)
        server.stop()
        server.start()
        with server.client() as client:
            roles, _, challenger_etag = roles_and_etags(client)
            assert (roles, challenger_etag) == ([CHALLENGER], again.etag)
            repeated = client.assign_model_role(revision, role=CHALLENGER, request_id="try it")
            assert (repeated.duplicate, repeated.lsn) == (True, assigned.lsn)


def roles_and_etags(client: Client) -> tuple[list[int], str, str]:
    """Return the roles of the only revision, and the etags of champion and challenger."""
    listed = client.list_model_revisions()
    (revision,) = listed.model_revisions
    return list(revision.roles), listed.champion_etag, listed.challenger_etag
