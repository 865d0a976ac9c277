"""Who is compared with whom: branches, challenger and holdout, the same for a person wherever and however asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Final

import numpy as np
import pytest
from google.protobuf import json_format

from server.catalog.allotting import NO_BRANCH, allot, bucket_of
from server.catalog.catalog import BUCKETS
from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from server.files import Files
from server.profiles.identity import lookup_key
from server.storage.lmdb_log import LmdbLog
from server.storage.record import Record
from server.tokens import TokenKey
from tests.support import bundles
from tests.support.damage import MAP_BYTES
from tests.support.running import Server, serving, told, until
from tsugi.client import Client, decide_request, source_record
from tsugi.log.v1.record_pb2 import Allotment, CatalogChange, DecisionRecord
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_pb2 import Assignment, ChoiceReason, Degradation, RefusalReason
from tsugi.v1.decision_service_pb2 import DecideResponse, GetDecisionResponse
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.model_pb2 import ModelRole

pytestmark = pytest.mark.slow

BATCH: Final = 500
PEOPLE: Final = [f"person {i}" for i in range(2_000)]
CHAMPION, CHALLENGER = ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER
UNAVAILABLE: Final = Degradation.DEGRADATION_MODEL_UNAVAILABLE
# What the models read of a person nobody knows, on no device: see bundles.FEATURES; tea's price is 4.
UNKNOWN: Final = np.array([[-0.5, 1.0, 0.0, -1.2, 0.0]], np.float32)


def catalog(shares: Mapping[str, float], name: str = "") -> Catalog:
    """Build a catalog whose experiment has branches of these shares; "new_model" is the challenger's."""
    message = load_catalog(bundles.CATALOG)
    branches: list[dict[str, Any]] = [
        {"name": branch, "share": share}
        | ({"modelRole": "MODEL_ROLE_CHALLENGER"} if branch == "new_model" else {"actions": [{"lever": 2.0}]})
        for branch, share in shares.items()
    ]
    more = {
        "name": name or message.name,
        "identityNamespaces": [{"name": "loyalty_number"}],
        "sources": [{"name": "crm", "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM"}],
        "goals": [{"name": "look", "outcomes": [{"type": "order", "reward": 1}], "attributionWindow": "2s",
                   "baseRate": 0.1}],
        "placements": [{"name": "side", "channel": "web", "goal": "look"}],
        "experiments": [{"name": "trial", "branches": branches}],
        "holdouts": [{"name": "quiet", "share": 0.2, "goals": ["look"]}],
    }  # fmt: skip
    message.MergeFrom(json_format.ParseDict(more, Catalog()))
    return message


SHARES: Final = {"loud": 0.3, "new_model": 0.3}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        with server.client() as client:
            client.push_catalog(catalog(SHARES))
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture
def both(server: Server) -> Iterator[list[Client]]:
    """One client for each worker."""
    with server.client_on("worker-0") as first, server.client_on("worker-1") as second:
        yield [first, second]


def branch_in(assignments: Sequence[Assignment]) -> str:
    """Return the branch a reply names; empty: none."""
    assert {each.experiment for each in assignments} <= {"trial"}
    (branch,) = [each.branch for each in assignments] or [""]
    return branch


def batched(client: Client, people: Sequence[str], *, namespace: str = "email", **options: Any) -> list[DecideResponse]:
    """Decide for many people, who stand for themselves."""
    replies: list[DecideResponse] = []
    for first in range(0, len(people), BATCH):
        requests = [
            decide_request({"home": 1}, identities={namespace: each}, **options)
            for each in people[first : first + BATCH]
        ]
        results = client.batch_decide(requests).results
        assert all(each.HasField("decision") for each in results)
        replies += [each.decision for each in results]
    return replies


def branches_of(client: Client, people: Sequence[str]) -> dict[str, str]:
    """Ask in which branch each of some people is, without deciding anything."""
    replies = batched(client, people, preview=True)
    return {each: branch_in(reply.assignments) for each, reply in zip(people, replies, strict=True)}


def recorded(server: Server, decision_ids: Sequence[str]) -> list[DecisionRecord]:
    """Return the records of decisions."""
    files = Files.below(server.data)
    token_key = TokenKey(files.read_secret())
    with closing(LmdbLog(files.log, MAP_BYTES, writable=False)) as log:
        entries = [log.find(token_key.verify(each).decision_key) for each in decision_ids]
        records = [log.get(entry.lsn) for entry in entries if entry is not None]
    return [DecisionRecord.FromString(record.payload) for record in records if record is not None]


def told_of(client: Client, reply: DecideResponse, *, explained: bool = False) -> GetDecisionResponse:
    return client.get_decision(reply.decision_id, explained=explained)


def on_record(client: Client, lsn: int) -> None:
    until(lambda: client.count_people(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")


def test_branch_of_a_person_is_the_same_by_every_identity_on_every_worker_and_after_a_restart(server: Server) -> None:
    emails, numbers = ([f"{kind} of {i}" for i in range(60)] for kind in ("email", "number"))
    with server.client_on("worker-0") as first, server.client_on("worker-1") as second:
        strangers = [branch_in(reply.assignments) for reply in batched(first, emails)]
        lsn = first.ingest_records(
            source_record(f"know {email}", "crm", [("email", email), ("loyalty_number", number)])
            for email, number in zip(emails, numbers, strict=True)
        ).lsn
        on_record(first, lsn)
        replies = batched(first, emails, durable=True, at_least_lsn=lsn)
        by_number = batched(second, numbers, namespace="loyalty_number", durable=True, at_least_lsn=lsn)
        answered = [branch_in(reply.assignments) for reply in replies]
        assert set(answered) == {"", "loud", "new_model"}
        assert strangers == answered, "who becomes known by an identity stays where it was"
        assert [branch_in(reply.assignments) for reply in by_number] == answered
        assert [branch_in(told_of(second, reply).assignments) for reply in replies] == answered
    records = recorded(server, [reply.decision_id for reply in replies])
    assert [branch_in(record.assignments) for record in records] == answered
    server.stop()
    server.start()
    with server.client() as client:
        again = batched(client, numbers, namespace="loyalty_number", preview=True)
        assert [branch_in(reply.assignments) for reply in again] == answered


def newest_allotment(server: Server) -> Allotment:
    """Return who is in which branch by the newest catalog change."""
    with closing(LmdbLog(Files.below(server.data).log, MAP_BYTES, writable=False)) as log:
        record: Record | None = log.get(log.head("catalog"))
    assert record is not None
    (allotment,) = CatalogChange.FromString(record.payload).allotments
    return allotment


def owners_of(allotment: Allotment) -> list[str]:
    """Return the branch of each bucket by name."""
    names = ["", *allotment.branches]
    assert names[NO_BRANCH] == ""
    return [names[owner] for owner in allotment.buckets]


def n_moved(before: Sequence[str], after: Sequence[str], old: str, new: str) -> int:
    return sum((a, b) == (old, new) for a, b in zip(before, after, strict=True))


def test_only_those_move_who_must(server: Server, both: list[Client]) -> None:
    profiles = compile_catalog(catalog(SHARES)).profiles
    bucket = {
        each: bucket_of("trial", lookup_key(Identity(namespace="email", value=each), profiles)) for each in PEOPLE
    }
    first = both[0].push_catalog(catalog(SHARES)).revision
    owners, branches = owners_of(newest_allotment(server)), branches_of(both[1], PEOPLE)

    def check(changed: list[str]) -> None:
        """See that everybody is where their bucket is, whichever worker is asked."""
        for client, people in zip(both, (PEOPLE[::2], PEOPLE[1::2]), strict=True):
            assert branches_of(client, people) == {each: changed[bucket[each]] for each in people}

    check(owners)
    assert {branch: list(branches.values()).count(branch) for branch in ("", "loud", "new_model")} == {
        "": pytest.approx(800, abs=100), "loud": pytest.approx(600, abs=100), "new_model": pytest.approx(600, abs=100),
    }  # fmt: skip
    steps: list[tuple[Catalog | None, dict[tuple[str, str], float]]] = [
        (catalog(SHARES, name="another catalog with the same shares"), {}),
        (catalog({"loud": 0.5, "new_model": 0.1}), {("new_model", "loud"): 0.2}),
        (catalog({"new_model": 0.1, "third": 0.15, "loud": 0.5}), {("", "third"): 0.15}),
        (catalog({"loud": 0.2, "third": 0.15}), {("loud", ""): 0.3, ("new_model", ""): 0.1}),
        (None, {("third", ""): 0.15, ("", "loud"): 0.1, ("", "new_model"): 0.3}),  # back to the first
    ]
    for step, moves in steps:
        if step is None:
            assert both[1].rollback_catalog(first).revision == first
        else:
            both[1].push_catalog(step)
        changed = owners_of(newest_allotment(server))
        moved = {(a, b) for a, b in zip(owners, changed, strict=True) if a != b}
        assert moved == set(moves)
        for (old, new), share in moves.items():
            assert n_moved(owners, changed, old, new) == round(share * BUCKETS)
        check(changed)
        owners = changed


def test_rollback_to_an_experiment_that_was_dropped_brings_everybody_back(server: Server, both: list[Client]) -> None:
    both[0].push_catalog(catalog(SHARES))
    dropped = catalog({"loud": 0.1, "new_model": 0.5})
    both[0].push_catalog(dropped)
    owners = owners_of(newest_allotment(server))
    assert owners != owners_of(allot(dropped.experiments[0])), "whoever begins anew is elsewhere"
    without = catalog(SHARES)
    without.ClearField("experiments")
    both[0].push_catalog(without)
    assert set(branches_of(both[1], PEOPLE[:100]).values()) == {""}
    both[1].rollback_catalog()
    assert owners_of(newest_allotment(server)) == owners


def test_challenger_scores_for_its_branch_alone_and_is_named(server: Server, both: list[Client]) -> None:
    both[0].push_catalog(catalog(SHARES))
    nets = {role: bundles.mlp(hidden=(size,)) for role, size in ((CHAMPION, 8), (CHALLENGER, 5))}
    propensities = {role: float(net.score(UNKNOWN)[0]) for role, net in nets.items()}
    assert abs(propensities[CHAMPION] - propensities[CHALLENGER]) > 0.01
    revisions = {}
    for role, size in ((CHAMPION, 8), (CHALLENGER, 5)):
        data = bundles.good_bundle(hidden=(size,)).SerializeToString()
        revisions[role] = both[0].push_model(data, f"size_{size}").model_revision.revision
    both[0].assign_model_role(revisions[CHAMPION])
    lsn = both[1].assign_model_role(revisions[CHALLENGER], role=CHALLENGER).lsn
    for client in both:
        replies = batched(client, PEOPLE[:200], durable=True, at_least_lsn=lsn)
        records = recorded(server, [reply.decision_id for reply in replies])
        seen = set()
        for reply, record in zip(replies, records, strict=True):
            role = CHALLENGER if branch_in(reply.assignments) == "new_model" else CHAMPION
            seen.add(role)
            assert UNAVAILABLE not in reply.degradations
            assert [(use.role, use.revision) for use in reply.model_revisions] == [(role, revisions[role])]
            assert reply.slots[0].propensity == pytest.approx(propensities[role], abs=1e-6)
            made_with = {CHAMPION: record.provenance.champion_sha256, CHALLENGER: record.provenance.challenger_sha256}
            assert {each: sha256.hex() for each, sha256 in made_with.items() if sha256} == {role: revisions[role]}
        assert seen == {CHAMPION, CHALLENGER}
        (use,) = told_of(client, replies[0]).model_revisions
        assert use == replies[0].model_revisions[0]
    lsn = both[0].assign_model_role("", role=CHALLENGER).lsn
    for client in both:
        replies = batched(client, PEOPLE[:100], durable=True, at_least_lsn=lsn)
        for reply in replies:
            assert (UNAVAILABLE in reply.degradations) == (branch_in(reply.assignments) == "new_model")
            assert [(use.role, use.revision) for use in reply.model_revisions] == [(CHAMPION, revisions[CHAMPION])]
            assert reply.slots[0].propensity == pytest.approx(propensities[CHAMPION], abs=1e-6)
    lsn = both[0].rollback_model(role=CHALLENGER).lsn
    reply = next(
        each for each in batched(both[1], PEOPLE[:100], at_least_lsn=lsn) if UNAVAILABLE not in each.degradations
    )
    assert reply.model_revisions


def test_who_is_held_out_is_told_nothing_where_the_holdout_holds(both: list[Client]) -> None:
    requests = [
        decide_request({"side": 1, "home": 1}, identities={"email": each}, durable=True) for each in PEOPLE[:BATCH]
    ]
    replies, again = ([each.decision for each in client.batch_decide(requests).results] for client in both)
    held = ChoiceReason.CHOICE_REASON_HELD_OUT
    is_held = [list(reply.slots[0].reasons) == [held] for reply in replies]
    assert is_held == [list(reply.slots[0].reasons) == [held] for reply in again]
    assert sum(is_held) == pytest.approx(100, abs=40)
    for reply, empty in zip(replies, is_held, strict=True):
        side, home = reply.slots
        assert (side.action, home.action) == ("" if empty else "tea", "" if not empty else "tea")
    reply = replies[is_held.index(True)]
    held_out = told_of(both[0], reply, explained=True)
    assert list(held_out.holdouts) == ["quiet"]
    assert list(told_of(both[0], replies[is_held.index(False)]).holdouts) == []
    alone = both[1].decide({"side": 1}, identities={"email": PEOPLE[is_held.index(True)]}, durable=True)
    (candidate,) = told_of(both[0], alone, explained=True).explanation.candidates
    assert (candidate.refusal_reason, candidate.refused_by) == (RefusalReason.REFUSAL_REASON_HELD_OUT, "quiet")
