"""Snapshots on disk: whole or absent, the newest that proves itself, and never one of something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from server.storage.memory import MemoryLog
from server.storage.record import Draft
from training.ownership import EpochFencedError, FolderOwnedError, Ownership
from training.snapshots import FORMAT_VERSION, SNAPSHOTS_KEPT, Snapshots, state_hash, write_durably
from tsugi.log.v1.learner_pb2 import LearnerSnapshot
from tsugi.log.v1.record_pb2 import RecordKind

LOG_ID = b"log-id-16-bytes."
ARITHMETIC = "river 1.2.3"


class KilledError(Exception):
    """Stands for the death of the process at one step."""


def kill_at(n: int) -> Callable[[str], None]:
    """Return a hook that raises at its n-th call, counted from 0."""
    steps: list[str] = []

    def at_step(step: str) -> None:
        steps.append(step)
        if len(steps) == n + 1:
            raise KilledError(step)

    return at_step


def make_log(log_id: bytes = LOG_ID, n_records: int = 6, first_us: int = 1) -> MemoryLog:
    log = MemoryLog(log_id)
    for i in range(n_records):
        log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], first_us + i)
    return log


def snapshot_of(log: MemoryLog, lsn: int, **changes: object) -> LearnerSnapshot:
    record = log.get(lsn)
    assert record is not None
    snapshot = LearnerSnapshot(
        log_id=log.log_id, learned_lsn=lsn, learned_chain=record.chain, arithmetic=ARITHMETIC, features=["a", "b"]
    )
    for field, value in changes.items():
        setattr(snapshot, field, value)
    return snapshot


@pytest.fixture
def log() -> MemoryLog:
    return make_log()


@pytest.fixture
def snapshots(tmp_path: Path, log: MemoryLog) -> Snapshots:
    return Snapshots(tmp_path, log, ARITHMETIC)


def newest_lsn(folder: Path, log: MemoryLog, arithmetic: str = ARITHMETIC) -> int | None:
    """Return where a newly started process would go on from."""
    snapshot = Snapshots(folder, log, arithmetic).newest()
    return snapshot.learned_lsn if snapshot is not None else None


def file_of(folder: Path, lsn: int) -> Path:
    (path,) = folder.glob(f"*{lsn:05d}.snapshot")
    return path


def test_what_was_saved_comes_back(snapshots: Snapshots, log: MemoryLog) -> None:
    assert snapshots.newest() is None
    saved = snapshot_of(log, 3)
    snapshots.save(saved)
    assert snapshots.newest() == saved


def test_three_newest_are_kept(snapshots: Snapshots, log: MemoryLog, tmp_path: Path) -> None:
    for lsn in range(1, 6):
        snapshots.save(snapshot_of(log, lsn))
    assert len(list(tmp_path.iterdir())) == SNAPSHOTS_KEPT
    assert newest_lsn(tmp_path, log) == 5


def test_kill_at_any_step_leaves_the_old_state_or_the_new_one(log: MemoryLog, tmp_path: Path) -> None:
    n_killed = 0
    while True:
        folder = tmp_path / str(n_killed)
        folder.mkdir()
        Snapshots(folder, log, ARITHMETIC).save(snapshot_of(log, 1))
        try:
            Snapshots(folder, log, ARITHMETIC, kill_at(n_killed)).save(snapshot_of(log, 2))
        except KilledError:
            n_killed += 1
            assert newest_lsn(folder, log) in (1, 2)
            assert not list(folder.glob("*.unfinished")), "leftovers are removed at start"
            continue
        break
    assert n_killed == 6, "write, fsync, verify, rename, fsync_folder, prune"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:20], id="head-cut"),
        pytest.param(lambda data: data[:-1], id="tail-cut"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: b"X" + data[1:], id="other-magic"),
        pytest.param(lambda data: data[:8] + bytes([FORMAT_VERSION + 1]) + data[9:], id="later-format"),
    ],
)
def test_damaged_snapshot_is_refused_and_the_one_before_it_taken(
    snapshots: Snapshots, log: MemoryLog, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    snapshots.save(snapshot_of(log, 2))
    snapshots.save(snapshot_of(log, 4))
    path = file_of(tmp_path, 4)
    path.write_bytes(damage(path.read_bytes()))
    assert newest_lsn(tmp_path, log) == 2
    assert path.with_name(path.name + ".refused").exists()


def test_every_flipped_bit_is_noticed(snapshots: Snapshots, log: MemoryLog, tmp_path: Path) -> None:
    snapshots.save(snapshot_of(log, 2))
    good = file_of(tmp_path, 2).read_bytes()
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << (position % 8)
        file = tmp_path / f"{2:020d}.snapshot"
        file.write_bytes(flipped)
        assert newest_lsn(tmp_path, log) is None, f"byte {position}"


def test_snapshot_of_another_log_is_refused(snapshots: Snapshots, log: MemoryLog, tmp_path: Path) -> None:
    snapshots.save(snapshot_of(log, 2))
    assert newest_lsn(tmp_path, make_log(b"another 16 bytes")) is None


def test_snapshot_ahead_of_a_restored_log_is_refused(snapshots: Snapshots, log: MemoryLog, tmp_path: Path) -> None:
    snapshots.save(snapshot_of(log, 3))
    snapshots.save(snapshot_of(log, 6))
    assert newest_lsn(tmp_path, make_log(n_records=4)) == 3


def test_snapshot_of_a_log_that_went_on_differently_is_refused(
    snapshots: Snapshots, log: MemoryLog, tmp_path: Path
) -> None:
    snapshots.save(snapshot_of(log, 3))
    assert newest_lsn(tmp_path, make_log(first_us=100)) is None


def test_snapshot_of_other_arithmetic_is_refused(snapshots: Snapshots, log: MemoryLog, tmp_path: Path) -> None:
    snapshots.save(snapshot_of(log, 3))
    assert newest_lsn(tmp_path, log, arithmetic="river 1.2.4") is None


def test_refused_snapshots_do_not_crowd_out_new_ones(snapshots: Snapshots, log: MemoryLog, tmp_path: Path) -> None:
    for lsn in (4, 5, 6):
        snapshots.save(snapshot_of(log, lsn, log_id=b"another 16 bytes"))
    restarted = Snapshots(tmp_path, log, ARITHMETIC)
    assert restarted.newest() is None
    restarted.save(snapshot_of(log, 1))
    assert newest_lsn(tmp_path, log) == 1


def test_state_hash_is_the_same_whoever_came_to_the_state(log: MemoryLog) -> None:
    first, second = snapshot_of(log, 3, epoch=1), snapshot_of(log, 3, epoch=9)
    assert state_hash(first) == state_hash(second)
    assert state_hash(first) != state_hash(snapshot_of(log, 3, learned_time_us=1))


def test_write_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_epoch_rises_with_each_start(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        owner = Ownership(tmp_path)
        owner.begin_epoch(above=0)
        epochs.append(owner.epoch)
        owner.close()
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "not a number"])
def test_epoch_rises_above_the_snapshots_when_its_file_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "epoch").write_text(content)
    owner = Ownership(tmp_path)
    owner.begin_epoch(above=7)
    assert owner.epoch == 8
    owner.close()


def test_second_owner_is_kept_out_and_told_who_the_first_is(tmp_path: Path) -> None:
    owner = Ownership(tmp_path)
    with pytest.raises(FolderOwnedError, match=r"process \d+"):
        Ownership(tmp_path)
    owner.close()
    Ownership(tmp_path).close()


def test_owner_whose_lock_was_broken_is_fenced(tmp_path: Path) -> None:
    replaced = Ownership(tmp_path)
    replaced.begin_epoch(above=0)
    replaced.verify()
    (tmp_path / "lock").unlink()
    successor = Ownership(tmp_path)
    successor.begin_epoch(above=0)
    with pytest.raises(EpochFencedError):
        replaced.verify()
    successor.verify()
    successor.close()
    replaced.close()
