"""What a worker serves follows the log's heads and the learner's file; what cannot be loaded changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from server.catalog.compile import serialise
from server.catalog.loading import load_catalog
from server.decisioning.live import CATALOG_HEAD, ROLE_HEADS, Heads, Live, Watcher
from server.registry.blobs import Blobs
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tests.support import bundles, catalogs, sports_retail
from tests.support.running import until
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays
from tsugi.log.v1.record_pb2 import CatalogChange, DecisionRecord, ModelRoleChange, RecordKind
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRole

CHAMPION, CHALLENGER = ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER
LEARNER = ModelRole.MODEL_ROLE_LEARNER


class MovingLog(MemoryLog):
    """A log that others write to between two readings."""

    def __init__(self) -> None:
        super().__init__()
        self.at_catalog: list[Callable[[], None]] = []  # each is done once, while somebody asks for the catalog's head

    def head(self, name: str) -> int:
        head = super().head(name)
        if name == CATALOG_HEAD and self.at_catalog:
            self.at_catalog.pop()()
        return head


class Bench:
    """A watcher with everything it looks at."""

    def __init__(self, folder: Path) -> None:
        self.log = MovingLog()
        self.registry = folder / "registry"
        self.blobs = Blobs(self.registry)
        self.arrays = folder / "arrays.binpb"
        self.swaps: list[Live] = []
        self.watcher = Watcher(self.log, self.blobs, self.arrays, "tests", self.swaps.append)

    def push(self, catalog: catalog_pb2.Catalog) -> bytes:
        """Put a catalog in force."""
        sha256 = self.blobs.put(serialise(catalog))
        self.change_catalog(sha256)
        return sha256

    def change_catalog(self, sha256: bytes) -> None:
        payload = CatalogChange(catalog_sha256=sha256).SerializeToString()
        self.log.append([Draft(RecordKind.RECORD_KIND_CATALOG_CHANGE, payload, head=CATALOG_HEAD)], 0)

    def assign(self, sha256: bytes, role: ModelRole = CHAMPION) -> None:
        """Give a role to a bundle."""
        payload = ModelRoleChange(role=role, bundle_sha256=sha256).SerializeToString()
        self.log.append([Draft(RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE, payload, head=ROLE_HEADS[role])], 0)

    def switch(self, *, is_baseline: bool) -> None:
        """Give the role learner to the baseline or to the fleet."""
        payload = ModelRoleChange(role=LEARNER, baseline=is_baseline).SerializeToString()
        self.log.append([Draft(RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE, payload, head=ROLE_HEADS[LEARNER])], 0)

    def publish(self, data: bytes) -> None:
        """Publish as the learner does: whole or not at all."""
        new = self.arrays.with_suffix(".new")
        new.write_bytes(data)
        new.replace(self.arrays)

    def poll(self) -> Live | None:
        """Look once and return what serves now."""
        self.watcher.poll()
        return self.swaps[-1] if self.swaps else None


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def logs() -> Iterator[list[EventDict]]:
    with capture_logs() as logs:
        yield logs


def arrays(weight: float, epoch: int = 1) -> LearnerArrays:
    """Build arrays of one action and one feature."""
    return LearnerArrays(
        format_version=1,
        epoch=epoch,
        learned_lsn=100 + epoch,
        learned_time_us=5,
        features=["context.hour"],
        goals=[
            GoalArrays(
                goal="click",
                actions=["action_2"],
                correction_weights=np.array([weight]).tobytes(),
                correction_intercepts=np.zeros(1).tobytes(),
                posterior_means=np.zeros(2).tobytes(),
                posterior_covariances=np.eye(2).tobytes(),
                posterior_scale=1.0,
            )
        ],
    )


def sealed(message: LearnerArrays) -> bytes:
    body = message.SerializeToString()
    return hashlib.sha256(body).digest() + body


def weight_of(served: Live | None) -> float:
    assert served is not None
    column = served.catalog.learned.names.index("context.hour")
    return float(served.models.correction_weights[0, served.catalog.actions.rows["action_2"], column])


def test_nothing_is_served_before_the_first_catalog(bench: Bench) -> None:
    bench.publish(sealed(arrays(0.5)))
    assert bench.poll() is None
    sha256 = bench.push(catalogs.message())
    served = bench.poll()
    assert served is not None
    assert (served.catalog.sha256, served.heads) == (sha256, Heads(1, 0, 0))
    assert weight_of(served) == 0.5, "arrays that were there already"


def test_each_change_of_catalog_is_taken_once(bench: Bench) -> None:
    first = bench.push(catalogs.message())
    bench.poll()
    second = bench.push(catalogs.message(name="second"))
    bench.poll()
    n_swaps = len(bench.swaps)
    bench.poll()
    assert len(bench.swaps) == n_swaps == 2
    assert [served.catalog.sha256 for served in bench.swaps] == [first, second]
    reply = DecideResponse.FromString(bench.swaps[-1].reply_bytes)
    assert reply.catalog_revision == second.hex()


def test_catalog_put_in_force_again_is_not_compiled_again(bench: Bench) -> None:
    sha256 = bench.push(catalogs.message())
    before = bench.poll()
    bench.change_catalog(sha256)
    after = bench.poll()
    assert before is not None
    assert after is not None
    assert after.catalog is before.catalog
    assert (before.lsn, after.lsn) == (1, 2)


@pytest.mark.slow
def test_change_of_champion_is_taken_and_told(bench: Bench) -> None:
    bench.push(sports_retail.catalog().message)
    bench.poll()
    sha256 = bench.blobs.put(sports_retail.bundle())
    bench.assign(sha256)
    served = bench.poll()
    assert served is not None
    assert served.models.champion.sha256 == sha256
    assert served.heads.champion_lsn == served.lsn == 2
    (use,) = DecideResponse.FromString(served.reply_bytes).model_revisions
    assert (use.role, use.revision) == (ModelRole.MODEL_ROLE_CHAMPION, sha256.hex())
    bench.assign(b"")
    served = bench.poll()
    assert served is not None
    assert not served.models.champion.sha256
    assert not DecideResponse.FromString(served.reply_bytes).model_revisions


@pytest.fixture
def judged(bench: Bench) -> tuple[bytes, bytes]:
    """A catalog with a champion and a challenger, which are not served yet."""
    bench.push(load_catalog(bundles.CATALOG))
    champion, challenger = (
        bench.blobs.put(bundles.good_bundle(hidden=(width,)).SerializeToString()) for width in (8, 16)
    )
    bench.assign(champion)
    bench.assign(challenger, CHALLENGER)
    return champion, challenger


def test_challenger_serves_beside_the_champion_over_the_same_arrays(bench: Bench, judged: tuple[bytes, bytes]) -> None:
    bench.publish(sealed(arrays(0.5)))
    served = bench.poll()
    assert served is not None
    assert served.challenger is not None
    assert (served.heads, served.lsn) == (Heads(1, 2, 3), 3)
    for part, role, sha256 in zip((served.champion, served.challenger), (CHAMPION, CHALLENGER), judged, strict=True):
        assert part.models.champion.sha256 == sha256
        assert part.models.correction_weights is served.models.correction_weights
        assert part.models.learner_epoch == 1
        reply = DecideResponse.FromString(part.reply_bytes)
        assert reply.catalog_revision == served.catalog.revision
        assert [(use.role, use.revision) for use in reply.model_revisions] == [
            (role, sha256.hex()), (ModelRole.MODEL_ROLE_LEARNER, "1")
        ]  # fmt: skip
        provenance = DecisionRecord.FromString(part.provenance_bytes).provenance
        told = (provenance.champion_sha256, provenance.challenger_sha256)
        assert told == ((sha256, b"") if role == CHAMPION else (b"", sha256))
        assert (provenance.catalog_sha256, provenance.learner_epoch) == (served.catalog.sha256, 1)
    bench.publish(sealed(arrays(0.75, 2)))
    again = bench.poll()
    assert again is not None
    assert again.challenger is not None
    assert again.challenger.models.champion is served.challenger.models.champion
    assert again.challenger.models.learner_epoch == again.models.learner_epoch == 2


def test_model_that_serves_in_one_role_is_not_loaded_again_for_the_other(
    bench: Bench, judged: tuple[bytes, bytes]
) -> None:
    before = bench.poll()
    assert before is not None
    assert before.challenger is not None
    bench.assign(judged[1])
    bench.assign(b"", CHALLENGER)
    after = bench.poll()
    assert after is not None
    assert after.models.champion is before.challenger.models.champion
    assert after.challenger is None
    assert after.lsn == 5
    (use,) = DecideResponse.FromString(after.reply_bytes).model_revisions
    assert (use.role, use.revision) == (CHAMPION, judged[1].hex())


@pytest.mark.parametrize("fault", ["absent", "altered", "does not fit"])
def test_challenger_that_cannot_be_used_is_missing_told_once_and_hinders_nobody(
    bench: Bench, judged: tuple[bytes, bytes], logs: list[EventDict], fault: str
) -> None:
    other = sports_retail.bundle() if fault == "does not fit" else b"not a bundle"
    sha256 = bytes(32) if fault == "absent" else bench.blobs.put(other)
    if fault == "altered":
        (bench.registry / sha256.hex()).write_bytes(b"something else")
    bench.assign(sha256, CHALLENGER)
    for epoch in (1, 2):
        bench.publish(sealed(arrays(0.5, epoch)))
        served = bench.poll()
        assert served is not None
        assert served.challenger is None
        assert (served.models.champion.sha256, served.models.learner_epoch) == (judged[0], epoch)
        assert served.lsn == 4, "whoever waits for the change need not wait longer"
    assert [entry["event"] for entry in logs] == ["challenger_unavailable"]
    bench.assign(judged[1], CHALLENGER)
    served = bench.poll()
    assert served is not None
    assert served.challenger is not None
    assert served.challenger.models.champion.sha256 == judged[1]


def test_challenger_that_a_new_catalog_does_not_fit_is_missing_and_comes_back(
    bench: Bench, judged: tuple[bytes, bytes]
) -> None:
    bench.poll()
    bench.push(catalogs.message())
    served = bench.poll()
    assert served is not None
    assert served.challenger is None
    assert served.models.champion.is_unavailable
    bench.push(load_catalog(bundles.CATALOG))
    served = bench.poll()
    assert served is not None
    assert served.challenger is not None
    assert served.challenger.models.champion.sha256 == judged[1]
    assert served.models.champion.sha256 == judged[0]


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize(("role", "heads"), [(CHAMPION, Heads(4, 5, 3)), (CHALLENGER, Heads(4, 2, 5))])
def test_set_claims_no_change_that_it_has_passed_over(bench: Bench, role: ModelRole, heads: Heads) -> None:
    bench.poll()
    n_swaps = len(bench.swaps)

    def write() -> None:
        bench.push(catalogs.message())
        bench.assign(b"", role)

    # The catalog's head is read before both changes, the role's after them: a set of these would miss the catalog.
    bench.log.at_catalog.append(write)
    bench.watcher.poll()
    assert len(bench.swaps) == n_swaps, "nothing is taken before two readings agree"
    served = bench.poll()
    assert served is not None
    assert served.heads == heads


def test_published_arrays_are_taken_once_and_told(bench: Bench) -> None:
    bench.push(catalogs.message())
    bench.poll()
    for epoch in (1, 2):
        bench.publish(sealed(arrays(float(epoch), epoch)))
        n_swaps = len(bench.swaps)
        assert weight_of(bench.poll()) == epoch
        assert weight_of(bench.poll()) == epoch
        assert len(bench.swaps) == n_swaps + 1
        (use,) = DecideResponse.FromString(bench.swaps[-1].reply_bytes).model_revisions
        assert (use.role, use.revision, use.learned_lsn) == (ModelRole.MODEL_ROLE_LEARNER, str(epoch), 100 + epoch)


def damaged() -> list[bytes]:
    good = sealed(arrays(9.0, 2))
    short = arrays(9.0, 2)
    short.goals[0].correction_weights = b""
    ragged = arrays(9.0, 2)
    ragged.goals[0].posterior_covariances = bytes(8)
    no_message = b"\xff\xff"
    return [
        b"",
        good[:20],
        good[:-1],
        good[:-1] + bytes([good[-1] ^ 1]),
        hashlib.sha256(no_message).digest() + no_message,
        sealed(short),
        sealed(ragged),
    ]


@pytest.mark.parametrize("data", damaged())
def test_damaged_arrays_change_nothing(bench: Bench, logs: list[EventDict], data: bytes) -> None:
    bench.push(catalogs.message())
    bench.publish(sealed(arrays(0.5)))
    bench.poll()
    bench.publish(data)
    for _ in range(3):
        assert weight_of(bench.poll()) == 0.5
    assert [entry["event"] for entry in logs] == ["arrays_refused"], "told once"
    bench.push(catalogs.message(name="second"))
    served = bench.poll()
    assert served is not None
    assert served.catalog.message.name == "second"
    assert weight_of(served) == 0.5, "the last good arrays serve under the new catalog too"
    bench.publish(sealed(arrays(0.75, 3)))
    assert weight_of(bench.poll()) == 0.75


def test_catalog_that_cannot_be_loaded_leaves_the_old_one_serving(bench: Bench, logs: list[EventDict]) -> None:
    first = bench.push(catalogs.message())
    bench.poll()
    bench.change_catalog(bytes(32))
    altered = bench.push(catalogs.message(name="altered"))
    (bench.registry / altered.hex()).write_bytes(b"something else")
    for _ in range(3):
        served = bench.poll()
        assert served is not None
        assert served.catalog.sha256 == first
    assert [entry["event"] for entry in logs] == ["swap_refused"], "told once"
    third = bench.push(catalogs.message(name="third"))
    served = bench.poll()
    assert served is not None
    assert served.catalog.sha256 == third


def test_champion_that_cannot_be_loaded_leaves_the_old_set_serving(bench: Bench, logs: list[EventDict]) -> None:
    bench.push(catalogs.message())
    before = bench.poll()
    bench.assign(bytes(32))
    assert bench.poll() is before
    assert [entry["event"] for entry in logs] == ["swap_refused"]


def test_champion_that_does_not_fit_is_missing_and_told(bench: Bench, logs: list[EventDict]) -> None:
    bench.push(catalogs.message())
    bench.assign(bench.blobs.put(sports_retail.bundle()))
    served = bench.poll()
    assert served is not None
    assert served.models.champion.is_unavailable
    assert "champion_does_not_fit_catalog" in [entry["event"] for entry in logs]
    bench.assign(b"")
    served = bench.poll()
    assert served is not None
    assert not served.models.champion.is_unavailable, "nobody is to have the role, so nobody is missing"


def test_watcher_sees_by_itself_and_ends_when_told(bench: Bench) -> None:
    bench.push(catalogs.message())
    assert bench.watcher.start() is not None
    try:
        bench.push(catalogs.message(name="second"))
        until(lambda: bench.swaps[-1].catalog.message.name == "second", "the swap")
        bench.publish(sealed(arrays(0.5)))
        until(lambda: weight_of(bench.swaps[-1]) == 0.5, "the arrays")
    finally:
        bench.watcher.stop()
    bench.push(catalogs.message(name="third"))
    assert bench.swaps[-1].catalog.message.name == "second"


def told_learner(served: Live) -> list[tuple[str, int]]:
    """Return what replies say of the learner."""
    uses = DecideResponse.FromString(served.reply_bytes).model_revisions
    return [(use.revision, use.learned_lsn) for use in uses if use.role == LEARNER]


def test_baseline_leaves_out_what_was_learned_until_the_fleet_has_the_role_again(bench: Bench) -> None:
    bench.push(catalogs.message())
    bench.publish(sealed(arrays(0.5)))
    served = bench.poll()
    assert served is not None
    assert (weight_of(served), served.is_baseline, told_learner(served)) == (0.5, False, [("1", 101)])

    bench.switch(is_baseline=True)
    served = bench.poll()
    assert served is not None
    assert (weight_of(served), served.is_baseline, served.lsn) == (0.0, True, 2)
    assert told_learner(served) == [("baseline", 0)]
    provenance = DecisionRecord.FromString(served.provenance_bytes).provenance
    assert (provenance.learner_epoch, provenance.learned_lsn, provenance.arrays_sha256) == (0, 0, b"")
    assert provenance.baseline

    erased = arrays(0.75, 2)
    erased.erased_lsn = 9
    bench.publish(sealed(erased))
    served = bench.poll()
    assert served is not None
    assert (weight_of(served), served.is_baseline, told_learner(served)) == (0.0, True, [("baseline", 0)])
    assert served.published == erased, "what is learned meanwhile can be looked at"
    assert served.models.erased_lsn == 9, "what was kept of former arrays goes"
    bench.push(catalogs.message(name="another"))
    served = bench.poll()
    assert served is not None
    assert (weight_of(served), served.is_baseline) == (0.0, True), "another catalog does not end it"

    bench.switch(is_baseline=False)
    served = bench.poll()
    assert served is not None
    assert (weight_of(served), served.is_baseline, told_learner(served)) == (0.75, False, [("2", 102)])
    assert not DecisionRecord.FromString(served.provenance_bytes).provenance.baseline


@pytest.mark.usefixtures("judged")
def test_baseline_is_in_force_for_the_challenger_too(bench: Bench) -> None:
    bench.publish(sealed(arrays(0.5)))
    bench.switch(is_baseline=True)
    served = bench.poll()
    assert served is not None
    assert served.challenger is not None
    assert served.challenger.models.learner_epoch == 0
    assert DecisionRecord.FromString(served.challenger.provenance_bytes).provenance.baseline


def test_kill_switch_works_while_a_catalog_cannot_be_loaded(bench: Bench, logs: list[EventDict]) -> None:
    sha256 = bench.push(catalogs.message())
    bench.publish(sealed(arrays(0.5)))
    bench.poll()
    bench.change_catalog(bytes(32))
    bench.poll()
    for is_baseline in (True, False, True):
        bench.switch(is_baseline=is_baseline)
        for _ in range(2):
            served = bench.poll()
        assert served is not None
        assert served.is_baseline is is_baseline
        assert weight_of(served) == (0.0 if is_baseline else 0.5)
        assert (served.catalog.sha256, served.lsn) == (sha256, 1), "it claims no change that it has passed over"
    n_swaps = len(bench.swaps)
    bench.poll()
    assert len(bench.swaps) == n_swaps
    assert {entry["event"] for entry in logs} == {"swap_refused"}
    bench.change_catalog(sha256)
    served = bench.poll()
    assert served is not None
    assert (served.is_baseline, served.lsn) == (True, 6)
