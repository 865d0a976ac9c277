"""A person is erased from a running server, and no file holds a byte of what was said of them.

Everything that can be said of anybody is said of one person in words that stand nowhere else, beside other people; then
every byte of every file below the data directory is searched, and what the server said of itself. Each search has its
negative control: the same search before the erasure.

What is kept for ever, and not looked for: the idempotency keys of requests, which are hashes under the installation's
secret, each with the digest of its payload; LSNs, log times and kinds of tombstones; and the erasure's own key.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.decisioning.live import load_catalog
from server.files import Files
from server.outcomes.eraser import verify_receipt
from server.profiles.erased import ERASED_HEAD
from server.profiles.identity import identity_key
from server.registry.blobs import Blobs
from server.storage.lmdb_log import LmdbLog
from server.storage.log import GROUP_RECORDS_MAX, follow
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tests.support.erasing import Canary, applied, erasure_catalog, files_with, held, ingest
from tests.support.running import Server, serving, until
from training.learn import Learner
from training.snapshots import parse, state_hash
from tsugi.client import CallError, Client, event, source_record
from tsugi.log.v1.learner_pb2 import GoalState, LearnerSnapshot
from tsugi.log.v1.record_pb2 import (
    CatalogChange,
    DecisionRecord,
    Provenance,
    RecordKind,
    SlotRecord,
    SourceRecordAccepted,
)
from tsugi.requests import decide_request
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.profile_service_pb2 import ErasureReceipt, ErasureState, LinkVerdict

pytestmark = pytest.mark.slow

MAP_BYTES = 1 << 34
N_OTHERS = 40
ERASED_S_MAX = 120.0
CATCH_UP_S_MAX = 1_800.0
GIGABYTE = 10**9
N_DECISIONS, DECISIONS_A_PERSON, DECISION_BYTES = 440_000, 20, 2_000
OF_ERASURES = {
    RecordKind.RECORD_KIND_ERASURE_ACCEPTED,
    RecordKind.RECORD_KIND_ERASURE_FULFILLED,
    RecordKind.RECORD_KIND_LOG_ERASED,
}
CATALOG = erasure_catalog()
CANARY = Canary()


class Learned(NamedTuple):
    """What was learned, by whom."""

    with_them: LearnerSnapshot  # before the erasure
    after: LearnerSnapshot  # by the server that erased them
    from_tombstones: LearnerSnapshot  # by one that never saw more of them
    without_them: LearnerSnapshot  # by one that learned where they never were


class Erased(NamedTuple):
    """A person who was erased, what was found of them before, and where to look now."""

    server: Server
    client: Client
    decision_id: str
    profile_ids: list[str]
    found_before: dict[bytes, list[str]]
    others_before: list[list[str]]
    learned: Learned
    erasure_id: str
    receipt: ErasureReceipt


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Erased]:
    """Gives a server that erased somebody, stopped, and started again."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, learner_enabled=True, learner_snapshot_ms_min=100) as server:
        with server.client() as client:
            client.push_catalog(CATALOG.message)
            others(client, range(N_OTHERS // 2))
            decision_id = CANARY.tell(client)
            others(client, range(N_OTHERS // 2, N_OTHERS))
            profile = client.get_profile(identity=CANARY.number).profile
            ids = [profile.profile_id, *profile.former_profile_ids]
            until(lambda: has_learned_of_them(server), "the learner learns from the person and saves it")
            with_them = newest_snapshot(server)
            found = search(server, ids)
            seen = [other(client, number) for number in range(N_OTHERS)]
            wish = client.erase_profile("erase one", identity=CANARY.phone)
            receipt = fulfilled(client, wish.erasure_id)
        server.stop()
        learned = Learned(with_them, newest_snapshot(server), *learned_anew(server, folder))
        server.start()
        with server.client() as client:
            yield Erased(server, client, decision_id, ids, found, seen, learned, wish.erasure_id, receipt)


def others(client: Client, numbers: range) -> None:
    """Have other people known, decided for and answering; each decision waits for its record."""
    lsn = ingest(
        client,
        *(
            source_record(
                f"record of {number}", "crm", [("customer_number", f"c{number}"), ("email", f"c{number}@example.com")],
                attributes={"age": 20.0 + number}, event=event("purchase", {"total": 10.0 + number, "item": "shoe"}),
            )
            for number in numbers
        ),
    )  # fmt: skip
    applied(client, lsn)
    for number in numbers:
        decision = client.decide({"square_cb": 1}, identities=[("customer_number", f"c{number}")], durable=True)
        lsn = decision.lsn
        if number % 3:
            lsn = client.report_outcome(decision.decision_id, decision.slots[0].action, "answer", "click").lsn
    applied(client, lsn)


def other(client: Client, number: int) -> list[str]:
    """Return all that is known of somebody else, but for what the passing of time changes."""
    reply = client.get_profile(identity=("email", f"c{number}@example.com"), timeline_page_size=100)
    reply.profile.ClearField("windows")
    for history in reply.profile.histories:  # a chance is open until its window closes, and expected from then on
        history.ClearField("expected")
        history.ClearField("open")
    return [str(reply.profile), *map(str, reply.touchpoints)]


def search(server: Server, profile_ids: list[str], *more: str) -> dict[bytes, list[str]]:
    """Look for everything that tells of the person, in every file of the server and in what it said."""
    folder = server.data.parent  # with what the program wrote
    keys = [*CANARY.keys(CATALOG), *map(bytes.fromhex, profile_ids)]
    texts = [*CANARY.texts, *profile_ids, *(key.hex() for key in CANARY.keys(CATALOG)), *more]
    return files_with(folder, texts, [*CANARY.numbers, *keys])


def newest_snapshot(server: Server) -> LearnerSnapshot:
    """Read the learner's newest state; while it saves, names come and go."""
    while True:
        paths = sorted(Files.below(server.data).learner.glob("*.snapshot"))
        try:
            return parse(paths[-1].read_bytes()) if paths else LearnerSnapshot()
        except FileNotFoundError:
            continue


def has_learned_of_them(server: Server) -> bool:
    """Say whether somebody learned from the person alone: nobody else gets that action."""
    return "theirs" in actions_learned(newest_snapshot(server))


def actions_learned(snapshot: LearnerSnapshot) -> set[str]:
    regressions = (each for goal in snapshot.goals for member in goal.members for each in member.logistic.regressions)
    return {snapshot.actions[regression.action] for regression in regressions}


def numbers_learned(snapshot: LearnerSnapshot) -> tuple[object, ...]:
    """Return all that was learned, without the places in the log where it was: tombstones have places too."""
    goals = [GoalState.FromString(goal.SerializeToString()) for goal in snapshot.goals]
    for goal in goals:
        for member in goal.members:
            member.begun_lsn = 0
        for change in goal.changes:
            change.lsn = 0
    return goals, list(snapshot.features), snapshot.scales


def learned_anew(server: Server, folder: Path) -> tuple[LearnerSnapshot, LearnerSnapshot]:
    """Learn from the log of a stopped server, and from one that has the same records without its tombstones."""
    loader = partial(load_catalog, Blobs(Files.below(server.data).registry))
    log = LmdbLog(Files.below(server.data).log, MAP_BYTES, writable=False)
    never = MemoryLog()
    states: list[LearnerSnapshot] = []
    try:
        for record in follow(log, 1):
            if not record.is_tombstone and record.kind not in OF_ERASURES:
                never.append([Draft(record.kind, record.payload, record.key)], record.time_us)
        for each in (log, never):
            learner = Learner(each, folder / f"learner-{len(states)}", loader, lambda: 0.0)
            while learner.step():
                pass
            states.append(learner.state())
            learner.close()
    finally:
        log.close()
    return states[0], states[1]


def fulfilled(client: Client, erasure_id: str, within_s: float = ERASED_S_MAX) -> ErasureReceipt:
    def is_fulfilled() -> bool:
        return client.get_erasure(erasure_id).state == ErasureState.ERASURE_STATE_FULFILLED

    until(is_fulfilled, "the erasure is fulfilled", within_s)
    return client.get_erasure(erasure_id).receipt


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CallError) as refusal:
        call()
    return refusal.value.reason


def test_everything_said_of_the_person_is_found_before_and_no_byte_of_it_after(erased: Erased) -> None:
    keys = CANARY.keys(CATALOG)
    missed = {needle for needle, names in erased.found_before.items() if not names}
    unwritten = {each.encode() for each in (*(key.hex() for key in keys), *erased.profile_ids)} | {keys[-1]}
    assert missed <= unwritten, "the search can fail; keys are written as bytes, and what links nobody has no node"
    assert held(search(erased.server, erased.profile_ids)) == {}


def test_household_that_nobody_else_named_is_gone_too(erased: Erased) -> None:
    assert held(files_with(erased.server.data, [CANARY.household[1]])) == {}


def test_nobody_else_lost_anything(erased: Erased) -> None:
    assert [other(erased.client, number) for number in range(N_OTHERS)] == erased.others_before


def test_receipt_proves_itself_and_an_altered_one_does_not(erased: Erased) -> None:
    receipt = erased.receipt
    verify_receipt(receipt)
    assert receipt.erasure_id == erased.erasure_id
    assert receipt.erased_records >= 8
    secret = Files.below(erased.server.data).receipt_key.read_bytes()
    assert receipt.public_key == Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    for alter in (
        lambda each: each.fulfil_time.FromMicroseconds(0),
        lambda each: each.accept_time.FromMicroseconds(0),
        lambda each: setattr(each, "erased_records", each.erased_records + 1),
        lambda each: setattr(each, "erasure_id", "0" * 32),
        lambda each: setattr(each, "log_id", "0" * 32),
        lambda each: setattr(each, "public_key", Ed25519PrivateKey.generate().public_key().public_bytes_raw()),
    ):
        altered = ErasureReceipt()
        altered.CopyFrom(receipt)
        alter(altered)
        with pytest.raises(InvalidSignature):
            verify_receipt(altered)


def test_erased_person_is_not_linked_not_split_and_not_merged(erased: Erased) -> None:
    somebody = ("customer_number", "c1")
    for number, (one, another) in enumerate([(CANARY.email, somebody), (somebody, CANARY.browser)]):
        assert (
            refused(
                partial(
                    erased.client.link_identities, one, another, LinkVerdict.LINK_VERDICT_SAME,
                    stated_by="clerk", request_id=f"link the erased {number}",
                )
            )
            == "ERROR_REASON_RESOURCE_NOT_FOUND"
        )  # fmt: skip
    for profile_id in erased.profile_ids:
        assert (
            refused(
                partial(
                    erased.client.split_profile, profile_id, [CANARY.email], stated_by="clerk", request_id="split",
                )
            )
            == "ERROR_REASON_RESOURCE_NOT_FOUND"
        )  # fmt: skip
        assert refused(partial(erased.client.get_profile, profile_id=profile_id)) == "ERROR_REASON_RESOURCE_NOT_FOUND"
        assert (
            refused(partial(erased.client.export_profile, profile_id=profile_id)) == "ERROR_REASON_RESOURCE_NOT_FOUND"
        )


def test_learner_is_to_the_bit_the_one_that_never_met_the_person(erased: Erased) -> None:
    after, never = erased.learned.after, erased.learned.without_them
    assert after.learned_lsn == erased.learned.from_tombstones.learned_lsn
    assert state_hash(after) == state_hash(erased.learned.from_tombstones)
    assert numbers_learned(after) == numbers_learned(never)
    assert actions_learned(after) == {"plain", "other"}
    assert actions_learned(erased.learned.with_them) == {"plain", "other", "theirs"}, "the comparison can fail"


def test_records_of_the_person_sent_again_stay_forgotten_and_a_new_one_begins_a_new_person(erased: Erased) -> None:
    again = source_record("zwyx-record-4", "crm", [CANARY.number], attributes={"email_address": "zwyx no e-mail"})
    (result,) = erased.client.ingest_records([again]).results
    assert result.accepted.duplicate
    (result,) = erased.client.ingest_records([source_record("zwyx-record-4", "crm", [CANARY.number])]).results
    assert result.error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
    late = erased.client.report_outcome(erased.decision_id, "theirs", "zwyx-outcome-2", "click")
    applied(erased.client, late.lsn)
    assert held(search(erased.server, erased.profile_ids)) == {}

    lsn = ingest(erased.client, source_record("zwyx-record-5", "crm", [CANARY.number], attributes={"age": 31.0}))
    applied(erased.client, lsn)
    profile = erased.client.get_profile(identity=CANARY.number, timeline_page_size=100)
    assert profile.profile.profile_id not in erased.profile_ids
    assert [each.value for each in profile.profile.identities] == [CANARY.number[1]]
    assert list(profile.profile.attributes) == ["age"]
    assert not profile.profile.links
    assert not profile.profile.consents
    assert not [each for each in profile.touchpoints if not each.HasField("segment_change")]
    assert refused(partial(erased.client.get_profile, identity=CANARY.email)) == "ERROR_REASON_RESOURCE_NOT_FOUND"

    wish = erased.client.erase_profile("erase the new one", identity=CANARY.number)
    verify_receipt(fulfilled(erased.client, wish.erasure_id))
    assert held(search(erased.server, erased.profile_ids, profile.profile.profile_id)) == {}
    assert erased.client.get_erasure(erased.erasure_id).receipt == erased.receipt, "a receipt is given once"


@pytest.mark.parametrize(("n_kills", "seed"), [(3, 1), pytest.param(12, 2, marks=pytest.mark.long)])
def test_erasure_goes_on_when_projector_and_learner_are_killed_meanwhile(
    tmp_path: Path, n_kills: int, seed: int
) -> None:
    chance = random.Random(seed)
    with serving(tmp_path, learner_enabled=True, learner_snapshot_ms_min=100) as server:
        with server.client() as client:
            client.push_catalog(CATALOG.message)
            CANARY.tell(client)
            others(client, range(20))
            profile = client.get_profile(identity=CANARY.number).profile
            ids = [profile.profile_id, *profile.former_profile_ids]
            wishes = [client.erase_profile("erase one", identity=CANARY.email)]
            for number in range(n_kills):
                kill(server, ("projector", "learner")[number % 2], chance.random() * 0.5)
                wish = client.erase_profile(f"erase another {number}", identity=("customer_number", f"c{number}"))
                wishes.append(wish)
            for wish in wishes:
                verify_receipt(fulfilled(client, wish.erasure_id))
            assert held(search(server, ids)) == {}
            assert all(other(client, number) for number in range(n_kills, 20)), "nobody else was erased"
        server.stop()
        assert held(search(server, ids)) == {}
        after, (anew, _) = newest_snapshot(server), learned_anew(server, tmp_path)
        assert state_hash(after) == state_hash(anew)


def kill(server: Server, role: str, after_s: float) -> None:
    """Kill a role at a moment that nobody chose, and wait until another has its place."""
    time.sleep(after_s)  # the random moment itself
    pid = server.roles()[role]
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.roles().get(role, pid) != pid, f"a new {role} is there")


@pytest.mark.long
def test_person_is_erased_from_a_gigabyte_of_others(tmp_path: Path) -> None:
    """Prints the time from the wish to the receipt, and what of it was spent until the log was rid of the person."""
    files = Files.below(tmp_path / "data")
    tail = filled(files)
    with serving(tmp_path, learner_enabled=True, data_log_map_bytes=MAP_BYTES) as server, server.client() as client:
        until(lambda: client.audit_sources().applied_lsn >= tail, "the projector catches up", CATCH_UP_S_MAX)
        CANARY.tell(client)
        until(lambda: has_learned_of_them(server), "the learner catches up and meets the person", CATCH_UP_S_MAX)
        assert held(files_with(files.root, ["zwyx-record-1"])), "the search can fail"
        profile = client.get_profile(identity=CANARY.number).profile
        size = sum(path.stat().st_size for path in files.log.glob("**/data.mdb"))
        assert size > GIGABYTE
        started = time.monotonic()
        wish = client.erase_profile("erase one", identity=CANARY.phone)
        verify_receipt(fulfilled(client, wish.erasure_id, CATCH_UP_S_MAX))
        took_s = time.monotonic() - started
        assert held(search(server, [profile.profile_id, *profile.former_profile_ids])) == {}
        log = LmdbLog(files.log, MAP_BYTES, writable=False)
        rid_us = log.read(log.head(ERASED_HEAD), 1)[0].time_us - log.read(wish.lsn, 1)[0].time_us
        log.close()
    sys.stdout.write(
        f"a log of {size / GIGABYTE:.2f} GB, {tail} records: erased within {took_s:.1f} s, "
        f"the log rid of the person within {rid_us / 1e6:.1f} s\n"
    )


def filled(files: Files) -> int:
    """Begin a log with a gigabyte of people and decisions about them, an hour ago; return its last LSN."""
    files.create()
    Blobs(files.registry).put(CATALOG.message.SerializeToString(deterministic=True))
    log = LmdbLog(files.log, MAP_BYTES)
    change = CatalogChange(catalog_sha256=CATALOG.sha256).SerializeToString()
    now_us = int(time.time() - 3_600) * 1_000_000
    log.append([Draft(RecordKind.RECORD_KIND_CATALOG_CHANGE, change, head="catalog")], now_us)
    decision = DecisionRecord(
        provenance=Provenance(catalog_sha256=CATALOG.sha256),
        learned_features=bytes(4 * len(CATALOG.learned.names)),
        slots=[SlotRecord(action="plain", goal="click", prior_log_odds=-2.0)],
        reply=bytes(range(250)) * (DECISION_BYTES // 250),  # as much as the columns of so many candidates
    )
    drafts: list[Draft] = []
    for person in range(N_DECISIONS // DECISIONS_A_PERSON):
        one = {"customer_number": f"filler {person}"}
        said = source_record(f"filler {person}", "crm", one, attributes={"age": float(person % 80)})
        data = SourceRecordAccepted(record=said).SerializeToString()
        keys = tuple(map(identity_key, said.identities))
        drafts.append(Draft(RecordKind.RECORD_KIND_SOURCE_RECORD, data, subjects=keys))
        decision.request = decide_request({"greedy": 1}, identities=one).SerializeToString()
        for number in range(DECISIONS_A_PERSON):
            decision.decision_key = person.to_bytes(8, "big") + number.to_bytes(8, "big")
            data = decision.SerializeToString()
            drafts.append(Draft(RecordKind.RECORD_KIND_DECISION, data, decision.decision_key, subjects=keys))
        if len(drafts) > GROUP_RECORDS_MAX - DECISIONS_A_PERSON - 1:
            now_us += 1_000_000
            log.append(drafts, now_us)
            drafts.clear()
    if drafts:
        log.append(drafts, now_us)
    lsn = log.tail().lsn
    log.close()
    return lsn
