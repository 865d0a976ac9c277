"""What is in force changes by log records: checked first, refused whole, rolled back along a history, once per id."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
from pathlib import Path
from typing import Final

import pytest

from server.catalog.compile import serialise
from server.catalog.loading import load_catalog
from server.decisioning.configuration import Changed, Configuration, Wish
from server.decisioning.history import THE_BASELINE
from server.decisioning.live import (
    CATALOG_HEAD,
    CHALLENGER_HEAD,
    CHAMPION_HEAD,
    LEARNER_HEAD,
    MODEL_HEAD,
    RESET_HEAD,
    ROLE_HEADS,
    Live,
    Watcher,
)
from server.errors import TsugiError
from server.registry.blobs import BlobError, Blobs
from server.storage.log import LogFullError, LogUnavailableError
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tests.support import bundles, catalogs
from tests.support.committing import ScriptedCommitter
from tests.support.deciding import TOKEN_KEY
from tsugi.log.v1.record_pb2 import LearnerReset, ModelPushed, ModelRoleChange, RecordKind
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.model_pb2 import LearnerRole, ModelRole

ANY: Final = Wish()
CHECK: Final = Wish(validate_only=True)
CHAMPION, CHALLENGER = ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER
LEARNER = ModelRole.MODEL_ROLE_LEARNER
SERVING, EVERYBODY = LearnerRole.LEARNER_ROLE_SERVING, LearnerRole.LEARNER_ROLE_ALL


class FullBlobs(Blobs):
    """Blobs on a volume without space."""

    def put(self, data: bytes) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")


class Office:
    """A configuration with everything around it; what it changes is served at the next look."""

    def __init__(self, folder: Path, blobs: type[Blobs] = Blobs) -> None:
        self.folder = folder / "registry"
        self.log = MemoryLog()
        self.blobs = blobs(self.folder)
        self.committer = ScriptedCommitter(self.log, lambda: 0)
        self._served: list[Live] = []
        self._watcher = Watcher(self.log, self.blobs, folder / "none", "tests", self._served.append)
        self.configuration = Configuration(
            log=self.log,
            blobs=self.blobs,
            committer=self.committer,
            token_key=TOKEN_KEY,
            current=self.current,
            is_served=lambda _lsn: True,
        )

    def current(self) -> Live | None:
        """Return what is in force by now."""
        self._watcher.poll()
        return self._served[-1] if self._served else None

    @property
    def name(self) -> str:
        """The name of the catalog in force."""
        live = self.current()
        assert live is not None
        return live.catalog.message.name

    async def push(self, name: str, wish: Wish = ANY) -> Changed:
        """Push a small catalog."""
        return await self.configuration.push_catalog(serialise(catalogs.message(name=name)), wish)

    async def equip(self) -> list[bytes]:
        """Put the catalog of the test bundles in force and store two bundles, without the sandbox's seconds."""
        await self.configuration.push_catalog(serialise(load_catalog(bundles.CATALOG)), ANY)
        digests = []
        for width in (8, 16):
            sha256 = self.blobs.put(bundles.good_bundle(hidden=(width,)).SerializeToString())
            message = ModelPushed(bundle_sha256=sha256, previous_lsn=self.log.head(MODEL_HEAD))
            key = TOKEN_KEY.record_key(b"push_model", b"", sha256.hex())
            draft = Draft(RecordKind.RECORD_KIND_MODEL_PUSHED, message.SerializeToString(), key, head=MODEL_HEAD)
            self.log.append([draft], 0)
            digests.append(sha256)
        return digests

    def holders(self) -> tuple[bytes, bytes]:
        """Return whom the log names champion and challenger, once it is seen that they serve."""
        live = self.current()
        assert live is not None
        told = self.configuration.holders()
        assert live.models.champion.sha256 == told[CHAMPION]
        assert (live.challenger.models.champion.sha256 if live.challenger is not None else b"") == told[CHALLENGER]
        return told[CHAMPION], told[CHALLENGER]


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def revision(name: str) -> bytes:
    return catalogs.compiled(name=name).sha256


def reason_of(refusal: pytest.ExceptionInfo[TsugiError]) -> str:
    return ErrorReason.Name(refusal.value.reason).removeprefix("ERROR_REASON_")


async def test_push_puts_a_catalog_in_force_and_says_where_it_stands(office: Office) -> None:
    pushed = await office.push("one")
    assert pushed == Changed(revision("one"), pushed.lsn, pushed.lsn, is_duplicate=False)
    assert office.name == "one"
    data, sha256, etag = await office.configuration.catalog_data(None)
    assert (Catalog.FromString(data).name, sha256, etag) == ("one", revision("one"), pushed.etag)


async def test_validation_alone_changes_nothing(office: Office) -> None:
    first = await office.push("one")
    checked = await office.push("two", CHECK)
    assert checked == Changed(revision("two"), first.etag, 0, is_duplicate=False)
    assert office.name == "one"
    assert not office.blobs.has(revision("two"))


async def test_faulty_catalog_leaves_nothing_behind(office: Office) -> None:
    faulty = catalogs.message()
    faulty.placements[0].channel = "nowhere"
    for data, reason in ((serialise(faulty), "CATALOG_INVALID"), (b"\xff", "REQUEST_MALFORMED")):
        with pytest.raises(TsugiError) as refusal:
            await office.configuration.push_catalog(data, ANY)
        assert reason_of(refusal) == reason
    assert office.log.tail().lsn == 0
    assert list(office.folder.iterdir()) == []


async def test_etag_admits_one_of_two_writers(office: Office) -> None:
    first = await office.push("one", Wish(etag=0))
    office.committer.is_held = True
    rivals = [asyncio.create_task(office.push(name, Wish(etag=first.etag))) for name in ("two", "three")]
    await office.committer.until_held(2)
    office.committer.commit()
    results = await asyncio.gather(*rivals, return_exceptions=True)
    (winner,) = [result for result in results if isinstance(result, Changed)]
    (loser,) = [result for result in results if isinstance(result, TsugiError)]
    assert loser.reason == ErrorReason.ERROR_REASON_ETAG_MISMATCH
    assert loser.metadata["etag"] == str(winner.etag)


async def test_without_an_etag_both_of_two_writers_are_taken(office: Office) -> None:
    await office.push("one")
    pushed = await asyncio.gather(*(office.push(name) for name in ("two", "three")))
    chain = [entry.record.lsn for entry in office.configuration.history(CATALOG_HEAD)]
    assert chain == sorted({1, *(changed.lsn for changed in pushed)}, reverse=True)


async def test_rollbacks_walk_back_and_a_push_goes_on_from_there(office: Office) -> None:
    for name in ("one", "two", "three"):
        await office.push(name)
    for name in ("two", "one"):
        await office.configuration.rollback_catalog(None, ANY)
        assert office.name == name
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.rollback_catalog(None, ANY)
    assert reason_of(refusal) == "NO_PREVIOUS_REVISION"
    await office.push("four")
    await office.configuration.rollback_catalog(None, ANY)
    assert office.name == "one"
    await office.configuration.rollback_catalog(revision("three"), ANY)
    assert office.name == "three"
    entries = list(office.configuration.history(CATALOG_HEAD))
    assert [entry.sha256 for entry in entries] == [
        revision(name) for name in ("three", "one", "four", "one", "two", "three", "two", "one")
    ]


async def test_rollback_checks_before_it_writes(office: Office) -> None:
    for name in ("one", "two"):
        await office.push(name)
    tail = office.log.tail()
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.rollback_catalog(bytes(32), ANY)
    assert reason_of(refusal) == "RESOURCE_NOT_FOUND"
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.rollback_catalog(None, Wish(etag=99))
    assert reason_of(refusal) == "ETAG_MISMATCH"
    assert (await office.configuration.rollback_catalog(None, CHECK)).sha256 == revision("one")
    (office.folder / revision("one").hex()).unlink()
    with pytest.raises(BlobError):
        await office.configuration.rollback_catalog(None, ANY)
    assert office.log.tail() == tail
    assert office.name == "two"


async def test_request_id_is_one_change_for_ever(office: Office) -> None:
    first = await office.push("one", Wish("id"))
    await office.push("two")
    again = await office.push("one", Wish("id"))
    assert again == first._replace(is_duplicate=True)
    assert office.name == "two"
    with pytest.raises(TsugiError) as refusal:
        await office.push("three", Wish("id"))
    assert reason_of(refusal) == "IDEMPOTENCY_KEY_REUSED"
    back = await office.configuration.rollback_catalog(None, Wish("id"))
    assert not back.is_duplicate, "an id belongs to its method"
    assert (await office.configuration.rollback_catalog(None, Wish("id"))).lsn == back.lsn
    assert office.name == "one"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(LogUnavailableError("disk"), "LOG_UNAVAILABLE"), (LogFullError(is_map=False), "LOG_VOLUME_FULL")],
)
async def test_change_that_cannot_be_recorded_is_refused(office: Office, failure: Exception, reason: str) -> None:
    await office.push("one")
    office.committer.failure = failure
    with pytest.raises(TsugiError) as refusal:
        await office.push("two")
    assert reason_of(refusal) == reason
    assert office.name == "one"


async def test_blob_that_cannot_be_stored_is_told_and_no_change_is_recorded(tmp_path: Path) -> None:
    full = Office(tmp_path / "full", FullBlobs)
    with pytest.raises(TsugiError) as refusal:
        await full.push("one")
    assert reason_of(refusal) == "LOG_VOLUME_FULL"
    gone = Office(tmp_path / "gone")
    shutil.rmtree(gone.folder)
    with pytest.raises(TsugiError) as refusal:
        await gone.push("one")
    assert reason_of(refusal) == "LOG_UNAVAILABLE"
    assert full.log.tail().lsn == gone.log.tail().lsn == 0


async def test_history_starts_only_at_its_own_changes(office: Office) -> None:
    await office.push("one")
    await office.configuration.assign_role(CHAMPION, b"", ANY)
    for lsn in (0, 2, 3, (1 << 64) - 1):
        with pytest.raises(TsugiError) as refusal:
            list(office.configuration.history(CATALOG_HEAD, lsn))
        assert reason_of(refusal) == "FIELD_INVALID"
    assert [entry.record.lsn for entry in office.configuration.history(CATALOG_HEAD, 1)] == [1]
    await office.configuration.assign_role(CHALLENGER, b"", ANY)
    for role, lsn in ((CHAMPION, 3), (CHALLENGER, 2)):
        with pytest.raises(TsugiError) as refusal:
            list(office.configuration.history(ROLE_HEADS[role], lsn))
        assert reason_of(refusal) == "FIELD_INVALID", "a change of the other role"


async def test_everything_but_a_push_needs_a_catalog(office: Office) -> None:
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.catalog_data(None)
    assert reason_of(refusal) == "CATALOG_MISSING"
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.assign_role(CHAMPION, b"", ANY)
    assert reason_of(refusal) == "CATALOG_MISSING"
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.push_model(bundles.good_bundle().SerializeToString(), "b", validate_only=False)
    assert reason_of(refusal) == "CATALOG_MISSING"


@pytest.mark.slow
async def test_bundle_is_stored_once_and_has_no_role_until_it_is_given_one(office: Office) -> None:
    configuration = office.configuration
    await configuration.push_catalog(serialise(load_catalog(bundles.CATALOG)), ANY)
    data = [bundles.good_bundle(hidden=(width,)).SerializeToString() for width in (8, 16)]
    checked, bundle, is_duplicate = await configuration.push_model(data[0], "first", validate_only=True)
    assert (checked, bundle.manifest.goal, is_duplicate) == (None, bundles.GOAL, False)
    assert configuration.etag(MODEL_HEAD) == 0
    digests = []
    for each in data:
        entry, _, is_duplicate = await configuration.push_model(each, "label", validate_only=False)
        assert entry is not None
        assert not is_duplicate
        digests.append(entry.sha256)
    again, _, is_duplicate = await configuration.push_model(data[0], "another label", validate_only=False)
    assert again is not None
    assert (again.sha256, is_duplicate) == (digests[0], True)
    assert [entry.sha256 for entry in configuration.history(MODEL_HEAD)] == digests[::-1]
    assert configuration.etag(CHAMPION_HEAD) == 0

    for digest in digests:
        await configuration.assign_role(CHAMPION, digest, ANY)
    for expected in (digests[0], b""):
        assert (await configuration.rollback_role(CHAMPION, ANY)).sha256 == expected
        live = office.current()
        assert live is not None
        assert live.models.champion.sha256 == expected
    with pytest.raises(TsugiError) as refusal:
        await configuration.rollback_role(CHAMPION, ANY)
    assert reason_of(refusal) == "NO_PREVIOUS_REVISION"


@pytest.mark.slow
async def test_one_bundle_is_checked_at_a_time(office: Office) -> None:
    await office.configuration.push_catalog(serialise(load_catalog(bundles.CATALOG)), ANY)
    results = await asyncio.gather(
        *(
            office.configuration.push_model(
                bundles.good_bundle(hidden=(width,)).SerializeToString(), "b", validate_only=False
            )
            for width in (8, 16)
        ),
        return_exceptions=True,
    )
    (busy,) = [result for result in results if isinstance(result, TsugiError)]
    assert busy.reason == ErrorReason.ERROR_REASON_UPLOAD_BUSY


@pytest.mark.slow
async def test_stored_bundle_that_was_altered_gets_no_role(office: Office) -> None:
    await office.configuration.push_catalog(serialise(load_catalog(bundles.CATALOG)), ANY)
    data = bundles.good_bundle().SerializeToString()
    entry, _, _ = await office.configuration.push_model(data, "b", validate_only=False)
    assert entry is not None
    (office.folder / entry.sha256.hex()).write_bytes(data[:-1] + b"x")
    with pytest.raises(BlobError):
        await office.configuration.assign_role(CHAMPION, entry.sha256, ANY)
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.assign_role(CHAMPION, bytes(32), ANY)
    assert reason_of(refusal) == "RESOURCE_NOT_FOUND"
    assert office.configuration.etag(CHAMPION_HEAD) == 0


async def test_roles_change_and_go_back_independently(office: Office) -> None:
    configuration, (first, second) = office.configuration, await office.equip()
    await configuration.assign_role(CHAMPION, first, ANY)
    etag = configuration.etag(CHAMPION_HEAD)
    assert configuration.etag(CHALLENGER_HEAD) == 0
    for sha256 in (second, first, second):
        changed = await configuration.assign_role(CHALLENGER, sha256, Wish(etag=configuration.etag(CHALLENGER_HEAD)))
        assert changed == (sha256, changed.lsn, changed.lsn, False)
        assert office.holders() == (first, sha256)
    assert configuration.etag(CHAMPION_HEAD) == etag
    for expected in (first, second, b""):
        checked = await configuration.rollback_role(CHALLENGER, CHECK)
        assert (checked.sha256, checked.lsn) == (expected, 0)
        assert (await configuration.rollback_role(CHALLENGER, ANY)).sha256 == expected
        assert office.holders() == (first, expected)
    with pytest.raises(TsugiError) as refusal:
        await configuration.rollback_role(CHALLENGER, ANY)
    assert reason_of(refusal) == "NO_PREVIOUS_REVISION"
    await configuration.assign_role(CHALLENGER, second, ANY)
    assert (await configuration.rollback_role(CHAMPION, ANY)).sha256 == b""
    assert office.holders() == (b"", second)
    with pytest.raises(TsugiError) as refusal:
        await configuration.assign_role(CHALLENGER, first, Wish(etag=configuration.etag(CHAMPION_HEAD)))
    assert reason_of(refusal) == "ETAG_MISMATCH", "an etag is of one role"


@pytest.mark.parametrize("role", [CHAMPION, CHALLENGER])
async def test_role_is_given_only_to_what_is_stored_and_fits(office: Office, role: ModelRole) -> None:
    sha256 = (await office.equip())[0]
    tail = office.log.tail()
    assert (await office.configuration.assign_role(role, sha256, CHECK)).sha256 == sha256
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.assign_role(role, bytes(32), ANY)
    assert reason_of(refusal) == "RESOURCE_NOT_FOUND"
    assert office.log.tail() == tail
    await office.push("another")
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.assign_role(role, sha256, ANY)
    assert reason_of(refusal) == "BUNDLE_CONTRACT_MISMATCH"
    assert office.holders() == (b"", b"")


async def test_catalog_must_fit_who_has_a_role_and_is_told_by_which(office: Office) -> None:
    configuration, (first, second) = office.configuration, await office.equip()
    for holders, named in (((b"", second), {"challenger"}), ((first, second), {"champion", "challenger"})):
        for role, sha256 in zip((CHAMPION, CHALLENGER), holders, strict=True):
            await configuration.assign_role(role, sha256, ANY)
        tail = office.log.tail()
        with pytest.raises(TsugiError) as refusal:
            await office.push("another", CHECK)
        assert reason_of(refusal) == "CATALOG_INVALID"
        paths = [violation.path.split(".") for violation in refusal.value.violations]
        assert {path[0] for path in paths} == named
        assert {path[1] for path in paths} >= {"manifest"}
        assert all(f"the {role} in force" in refusal.value.message for role in named)
        assert office.log.tail() == tail
    await configuration.assign_role(CHAMPION, b"", ANY)
    await configuration.assign_role(CHALLENGER, b"", ANY)
    await office.push("another")


async def test_request_id_stands_for_a_change_of_one_role(office: Office) -> None:
    configuration, (first, second) = office.configuration, await office.equip()
    for role, other in ((CHAMPION, CHALLENGER), (CHALLENGER, CHAMPION)):
        wish = Wish(f"given to {role}")
        changed = await configuration.assign_role(role, first, wish)
        assert await configuration.assign_role(role, first, wish) == changed._replace(is_duplicate=True)
        for refused_role, sha256 in ((role, second), (other, first), (other, second), (other, b"")):
            with pytest.raises(TsugiError) as refusal:
                await configuration.assign_role(refused_role, sha256, wish)
            assert reason_of(refusal) == "IDEMPOTENCY_KEY_REUSED"
        back = await configuration.rollback_role(role, wish)
        assert await configuration.rollback_role(role, wish) == back._replace(is_duplicate=True)
        with pytest.raises(TsugiError) as refusal:
            await configuration.rollback_role(other, wish)
        assert reason_of(refusal) == "IDEMPOTENCY_KEY_REUSED"
    assert office.holders() == (b"", b"")


async def test_request_id_for_both_roles_at_once_is_one_change(office: Office) -> None:
    sha256 = (await office.equip())[0]
    office.current()
    office.committer.is_held = True
    rivals = [
        asyncio.create_task(office.configuration.assign_role(role, sha256, Wish("both")))
        for role in (CHAMPION, CHALLENGER)
    ]
    await office.committer.until_held(2)
    office.committer.commit()
    results = await asyncio.gather(*rivals, return_exceptions=True)
    (refusal,) = [result for result in results if isinstance(result, TsugiError)]
    assert refusal.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
    assert sorted(office.holders()) == [b"", sha256]


async def test_request_id_of_a_log_that_knew_one_role_is_still_known(office: Office) -> None:
    sha256 = (await office.equip())[0]
    # As it was written when only the champion could be assigned.
    message = ModelRoleChange(role=1, bundle_sha256=sha256)
    draft = Draft(
        RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE,
        message.SerializeToString(),
        TOKEN_KEY.record_key(b"assign_model_role", b"", "of old"),
        hashlib.blake2b(sha256, digest_size=16).digest(),
        head="role/champion",
    )
    (receipt,) = office.log.append([draft], 0)
    again = await office.configuration.assign_role(CHAMPION, sha256, Wish("of old"))
    assert again == Changed(sha256, receipt.lsn, receipt.lsn, is_duplicate=True)
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.assign_role(CHALLENGER, sha256, Wish("of old"))
    assert reason_of(refusal) == "IDEMPOTENCY_KEY_REUSED"


async def test_rollback_takes_people_back_to_the_branches_they_were_in(office: Office) -> None:
    def trial(one: float, two: float) -> bytes:
        branches = [{"name": "one", "share": one}, {"name": "two", "share": two}]
        return serialise(catalogs.message(experiments=[{"name": "trial", "branches": branches}]))

    def buckets() -> bytes:
        live = office.current()
        assert live is not None
        return live.catalog.experiments[0].buckets

    await office.configuration.push_catalog(trial(0.5, 0.5), ANY)
    at_first = buckets()
    await office.configuration.push_catalog(trial(0.8, 0.2), ANY)
    moved = buckets()
    assert sum(a != b for a, b in zip(at_first, moved, strict=True)) == 3_000
    await office.configuration.rollback_catalog(None, ANY)
    assert buckets() == at_first
    await office.push("without experiments")
    await office.configuration.rollback_catalog(None, ANY)
    assert buckets() == at_first


def is_baseline(office: Office) -> bool:
    live = office.current()
    assert live is not None
    return live.is_baseline


async def test_learner_role_goes_to_the_baseline_and_back(office: Office) -> None:
    configuration = office.configuration
    with pytest.raises(TsugiError) as refusal:
        await configuration.assign_role(LEARNER, THE_BASELINE, ANY)
    assert reason_of(refusal) == "CATALOG_MISSING"
    await office.push("one")
    assert not is_baseline(office)
    with pytest.raises(TsugiError) as refusal:
        await configuration.rollback_role(LEARNER, ANY)
    assert reason_of(refusal) == "NO_PREVIOUS_REVISION"
    assert (await configuration.assign_role(LEARNER, THE_BASELINE, CHECK)).lsn == 0
    assert not is_baseline(office)
    wish = Wish("kill", etag=0)
    killed = await configuration.assign_role(LEARNER, THE_BASELINE, wish)
    assert killed == (THE_BASELINE, configuration.etag(LEARNER_HEAD), killed.lsn, False)
    assert is_baseline(office)
    assert configuration.holders() == {CHAMPION: b"", CHALLENGER: b"", LEARNER: THE_BASELINE}
    with pytest.raises(TsugiError) as refusal:
        await configuration.assign_role(LEARNER, b"", Wish(etag=0))
    assert reason_of(refusal) == "ETAG_MISMATCH"
    assert (await configuration.rollback_role(LEARNER, ANY)).sha256 == b""
    assert not is_baseline(office)
    assert await configuration.assign_role(LEARNER, THE_BASELINE, wish) == killed._replace(is_duplicate=True)
    assert not is_baseline(office), "a repeated request is no new change"
    for sha256 in (THE_BASELINE, b"", THE_BASELINE):
        await configuration.assign_role(LEARNER, sha256, ANY)
    for expected in (b"", THE_BASELINE, b""):
        assert (await configuration.rollback_role(LEARNER, ANY)).sha256 == expected
        assert is_baseline(office) == bool(expected)


async def test_catalog_may_change_while_the_baseline_has_the_role_learner(office: Office) -> None:
    await office.push("one")
    await office.configuration.assign_role(LEARNER, THE_BASELINE, ANY)
    await office.push("two")
    assert office.name == "two"
    assert is_baseline(office)


async def test_request_id_of_the_learner_role_is_of_no_other_role(office: Office) -> None:
    await office.push("one")
    configuration = office.configuration
    await configuration.assign_role(LEARNER, b"", Wish("id"))
    for role in (CHAMPION, CHALLENGER):
        with pytest.raises(TsugiError) as refusal:
            await configuration.assign_role(role, b"", Wish("id"))
        assert reason_of(refusal) == "IDEMPOTENCY_KEY_REUSED"


async def test_reset_is_one_record_for_ever_and_changes_nothing_that_workers_serve(office: Office) -> None:
    await office.push("one")
    configuration, served = office.configuration, office.current()
    assert (await configuration.reset_learners(SERVING, ["click"], CHECK)).lsn == 0
    assert configuration.etag(RESET_HEAD) == 0
    wish = Wish("once", etag=0)
    reset = await configuration.reset_learners(SERVING, ["click"], wish)
    assert reset == (b"", configuration.etag(RESET_HEAD), reset.lsn, False)
    record = office.log.get(reset.lsn)
    assert record is not None
    assert record.kind == RecordKind.RECORD_KIND_LEARNER_RESET
    assert LearnerReset.FromString(record.payload) == LearnerReset(role=SERVING, goals=["click"])
    assert office.current() is served
    for role, goals in ((EVERYBODY, ["click"]), (SERVING, [])):
        with pytest.raises(TsugiError) as refusal:
            await configuration.reset_learners(role, goals, wish)
        assert reason_of(refusal) == "IDEMPOTENCY_KEY_REUSED"
    with pytest.raises(TsugiError) as refusal:
        await configuration.reset_learners(EVERYBODY, [], Wish(etag=0))
    assert reason_of(refusal) == "ETAG_MISMATCH"
    second = await configuration.reset_learners(EVERYBODY, [], Wish(etag=reset.etag))
    assert configuration.etag(RESET_HEAD) == second.etag > reset.etag
    assert await configuration.reset_learners(SERVING, ["click"], wish) == reset._replace(is_duplicate=True)
    assert office.log.tail().lsn == second.lsn


async def test_reset_needs_a_catalog_and_goals_that_are_known(office: Office) -> None:
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.reset_learners(EVERYBODY, [], ANY)
    assert reason_of(refusal) == "CATALOG_MISSING"
    await office.push("one")
    with pytest.raises(TsugiError) as refusal:
        await office.configuration.reset_learners(EVERYBODY, ["click", "wealth"], ANY)
    assert reason_of(refusal) == "RESOURCE_NOT_FOUND"
    assert [violation.path for violation in refusal.value.violations] == ["goals[1]"]
    assert office.configuration.etag(RESET_HEAD) == 0
