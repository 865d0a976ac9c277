"""The learner process over a whole log: nothing is learned twice or never, whenever it is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from server.files import Files
from server.storage.lmdb_log import LmdbLog
from server.storage.log import Log
from server.storage.memory import MemoryLog
from server.storage.record import Record
from tests.support.learning import SALE_WINDOW_US, SECOND, Writer, load_catalog, write_history
from training import learn
from training.fleet import ARITHMETIC
from training.learn import ARRAYS_FILE, EXIT_OWNED, Learner
from training.ownership import EpochFencedError
from training.snapshots import AtStep, Snapshots, state_hash
from tsugi.log.v1.learner_pb2 import LearnerArrays

MAP_BYTES = 16 * 1024 * 1024


class PartOf(MemoryLog):
    """A log of which only the first records can be read on from, while keys of all are found: as when others append."""

    def __init__(self) -> None:
        super().__init__(b"log-id-16-bytes.")
        self.read_lsn_max = 0

    def read(self, from_lsn: int, records_max: int = 4_096) -> list[Record]:
        return super().read(from_lsn, max(0, min(records_max, self.read_lsn_max + 1 - from_lsn)))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class KilledError(Exception):
    """Stands for the death of the process at one step."""


@pytest.fixture(params=["memory", "lmdb"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    engine = MemoryLog(b"log-id-16-bytes.") if request.param == "memory" else LmdbLog(tmp_path / "log", MAP_BYTES)
    yield engine
    engine.close()


def start(
    log: Log, folder: Path, clock: Callable[[], float] | None = None, at_step: AtStep = lambda _step: None
) -> Learner:
    return Learner(log, folder, load_catalog, clock or Clock(), at_step=at_step)


def learn_all(learner: Learner) -> None:
    while learner.step():
        pass


def final_hash(log: Log, folder: Path) -> bytes:
    """Return the state hash of a learner that was never interrupted."""
    learner = start(log, folder)
    learn_all(learner)
    learner.close()
    return state_hash(learner.state())


def read_arrays(folder: Path) -> LearnerArrays:
    data = (folder / ARRAYS_FILE).read_bytes()
    assert hashlib.sha256(data[32:]).digest() == data[:32]
    return LearnerArrays.FromString(data[32:])


@pytest.mark.slow
@pytest.mark.parametrize("flushed_every", [1, 7])
def test_restart_after_every_record_comes_to_the_state_of_an_uninterrupted_run(
    tmp_path: Path, flushed_every: int
) -> None:
    log = PartOf()
    write_history(log, seed=30 + flushed_every, n_steps=300)
    uninterrupted = start(log, tmp_path / "uninterrupted")
    n_in_the_middle = 0
    for lsn in range(1, log.tail().lsn + 1):
        log.read_lsn_max = lsn
        learn_all(uninterrupted)
        restarted = start(log, tmp_path / "restarted")
        assert restarted.learned_lsn == (lsn - 1) // flushed_every * flushed_every
        learn_all(restarted)
        assert state_hash(restarted.state()) == state_hash(uninterrupted.state()), f"at record {lsn}"
        n_in_the_middle += restarted.n_open > 0
        if lsn % flushed_every == 0:
            restarted.flush()
        restarted.close()
    uninterrupted.close()
    counts = uninterrupted.counts
    assert len(uninterrupted.state().personal) == 2, "strengths were learned too"
    assert n_in_the_middle > 200
    assert min(counts.learned, counts.silent, counts.late, counts.orphaned, counts.unseen, counts.quarantined) > 0
    assert min(counts.revoked, counts.corrected, counts.moot) > 0


def test_replay_in_batches_of_any_size_comes_to_the_same_state(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_history(log, seed=3, n_steps=600)
    hashes = set()
    for batch in (1, 7, 512):
        monkeypatch.setattr(learn, "BATCH_RECORDS_MAX", batch)
        hashes.add(final_hash(log, tmp_path / str(batch)))
    assert len(hashes) == 1


def test_kill_at_every_step_of_a_snapshot_loses_and_doubles_nothing(log: Log, tmp_path: Path) -> None:
    write_history(log, seed=4, n_steps=300)
    expected = final_hash(log, tmp_path / "uninterrupted")
    killed_at: list[str] = []

    def at_step(step: str) -> None:
        if step not in killed_at:  # each start gets one step further
            killed_at.append(step)
            raise KilledError

    for _ in range(4):  # once the file has its name, there is nothing left to save
        learner = start(log, tmp_path / "killed", at_step=at_step)
        learn_all(learner)
        assert state_hash(learner.state()) == expected
        with pytest.raises(KilledError):
            learner.flush()
        learner.close()
    assert killed_at == ["write", "fsync", "verify", "rename"]
    survivor = start(log, tmp_path / "killed", at_step=at_step)
    learn_all(survivor)
    with pytest.raises(KilledError):
        survivor.flush()
    survivor.close()
    restarted = start(log, tmp_path / "killed")
    assert restarted.learned_lsn == log.tail().lsn
    assert state_hash(restarted.state()) == expected
    restarted.close()


def test_damaged_snapshot_costs_a_replay_and_nothing_else(tmp_path: Path) -> None:
    log = PartOf()
    write_history(log, seed=5, n_steps=300)
    for log.read_lsn_max in (100, 200, 300):
        learner = start(log, tmp_path / "damaged")
        learn_all(learner)
        learner.flush()
        learner.close()
    newest = max((tmp_path / "damaged").glob("*.snapshot"))
    newest.write_bytes(newest.read_bytes()[:-1])
    restarted = start(log, tmp_path / "damaged")
    assert restarted.learned_lsn == 200
    learn_all(restarted)
    restarted.close()
    assert state_hash(restarted.state()) == final_hash(log, tmp_path / "uninterrupted")


def test_what_is_published_follows_what_is_learned(log: Log, tmp_path: Path) -> None:
    writer = Writer(log)
    writer.put_in_force(SECOND)
    clock = Clock()
    learner = start(log, tmp_path / "learner", clock)
    learn_all(learner)
    assert learner.publish_if_due()
    arrays = read_arrays(tmp_path / "learner")
    assert (arrays.epoch, arrays.learned_lsn) == (1, log.tail().lsn)
    assert [(block.goal, list(block.actions)) for block in arrays.goals] == [("visit", []), ("sale", [])]

    key = writer.decide([("tent", "visit")], catalog=SECOND)
    writer.report(key, "tent", "click")
    learn_all(learner)
    assert not learner.publish_if_due(), "at most every 100 ms"
    clock.now_s += 0.1
    assert learner.publish_if_due()
    clock.now_s += 0.1
    assert not learner.publish_if_due(), "nothing is new"
    learner.close()
    arrays = read_arrays(tmp_path / "learner")
    assert (arrays.learned_lsn, arrays.learned_time_us) == (log.tail().lsn, log.tail().time_us)
    assert list(arrays.features) == list(SECOND.learned.names)
    assert list(arrays.goals[0].actions) == ["tent"]
    assert np.frombuffer(arrays.goals[0].correction_intercepts, "<f8")[0] > 0.0


def test_oldest_outcome_that_is_new_is_told_once_whoever_publishes_it(tmp_path: Path) -> None:
    log = MemoryLog(b"log-id-16-bytes.")
    writer = Writer(log)

    def told(learner: Learner) -> tuple[int, int]:
        learn_all(learner)
        learner.flush()
        arrays = read_arrays(tmp_path)
        assert arrays.learned_lsn == log.tail().lsn
        return arrays.new_outcome_lsn, arrays.new_outcome_time_us

    keys = [writer.decide([("book", "visit")]) for _ in range(4)]
    learner = start(log, tmp_path)
    assert told(learner) == (0, 0)
    writer.report(keys[0], "book", "click")
    expected = (log.tail().lsn, log.tail().time_us)
    writer.now_us += 10
    writer.report(keys[1], "book", "click")
    assert told(learner) == expected
    writer.tick()
    assert told(learner) == (0, 0)
    writer.report(keys[2], "book", "click")
    (tmp_path / ARRAYS_FILE).with_name(f"{ARRAYS_FILE}.unfinished").mkdir()  # nothing can be written for once
    learn_all(learner)
    learner.flush()
    assert learner.n_faults == 1
    (tmp_path / ARRAYS_FILE).with_name(f"{ARRAYS_FILE}.unfinished").rmdir()
    assert told(learner) == (log.tail().lsn, log.tail().time_us)
    learner.close()
    for later in sorted(tmp_path.glob("*.snapshot"))[1:]:
        later.unlink()  # so that what was published is learned again
    writer.report(keys[3], "book", "click")
    learner = start(log, tmp_path)
    assert learner.learned_lsn < log.tail().lsn - 1, "it learns again what it told before"
    assert told(learner) == (log.tail().lsn, log.tail().time_us), "the others were told before"
    learner.close()


@pytest.mark.parametrize("damage", ["none", "bit", "other log"])
def test_restart_takes_nothing_back_that_was_published(tmp_path: Path, damage: str) -> None:
    log = PartOf()
    write_history(log, seed=6, n_steps=300)
    log.read_lsn_max = 200
    learner = start(log, tmp_path)
    learn_all(learner)
    learner.publish_if_due()  # and is killed before it saves
    learner.close()
    if damage == "bit":
        path = tmp_path / ARRAYS_FILE
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "other log":
        arrays = LearnerArrays(learned_lsn=log.tail().lsn + 1)
        body = arrays.SerializeToString()
        (tmp_path / ARRAYS_FILE).write_bytes(hashlib.sha256(body).digest() + body)
    is_held = damage == "none"
    clock = Clock()
    learner = start(log, tmp_path, clock)
    for log.read_lsn_max in (150, 199, 200):
        learn_all(learner)
        clock.now_s += 60.0
        assert learner.learned_lsn == log.read_lsn_max
        assert learner.behind == (log.tail().lsn - log.read_lsn_max, log.tail().time_us - learner.learned_time_us)
        assert learner.publish_if_due() == (log.read_lsn_max == 200 or not is_held)
    assert read_arrays(tmp_path).epoch == learner.epoch == 2
    learner.close()


def test_state_is_saved_when_due_and_new(tmp_path: Path) -> None:
    log = MemoryLog()
    Writer(log).tick()
    clock = Clock()
    learner = start(log, tmp_path, clock)
    assert not learner.snapshot_if_due(), "nothing was learned yet"
    learn_all(learner)
    assert learner.snapshot_if_due()
    Writer(log).tick()
    learn_all(learner)
    assert not learner.snapshot_if_due(), "at most every 2 s"
    clock.now_s += 2.0
    assert learner.snapshot_if_due()
    assert learner.saved_lsn == 2
    learner.close()


def test_writing_slows_down_rather_than_hinder_learning(tmp_path: Path) -> None:
    log = MemoryLog()
    clock = Clock()

    def slow_disk(_step: str) -> None:
        clock.now_s += 1.0

    learner = start(log, tmp_path, clock, at_step=slow_disk)
    saved_at_s = []
    for _ in range(1_000):
        Writer(log).tick()
        learn_all(learner)
        clock.now_s += 1.0
        if learner.snapshot_if_due():
            saved_at_s.append(clock.now_s)
    learner.close()
    assert np.diff(saved_at_s).min() >= 20 * 6, "six slow steps may take a twentieth of the time"


def test_replaced_learner_publishes_and_saves_nothing_more(tmp_path: Path) -> None:
    log = MemoryLog()
    writer = Writer(log)
    replaced = start(log, tmp_path)
    (tmp_path / "lock").unlink()  # as when an operator breaks the lock of a process that hangs
    successor = start(log, tmp_path)
    writer.tick()
    learn_all(replaced)
    with pytest.raises(EpochFencedError):
        replaced.publish_if_due()
    with pytest.raises(EpochFencedError):
        replaced.flush()
    learn_all(successor)
    successor.flush()
    assert read_arrays(tmp_path).epoch == successor.epoch == 2
    successor.close()
    replaced.close()


def test_state_that_is_not_finite_is_neither_published_nor_saved(tmp_path: Path) -> None:
    log = MemoryLog()
    writer = Writer(log)
    key = writer.decide([("book", "visit")])
    writer.report(key, "book", "click")
    learner = start(log, tmp_path)
    learn_all(learner)
    learner.flush()
    poisoned = learner.state()
    learner.close()
    for member in (member for goal in poisoned.goals for member in goal.members):
        for regression in member.logistic.regressions:
            regression.mean = np.full(len(regression.mean) // 8, np.nan).tobytes()
    Snapshots(tmp_path, log, ARITHMETIC).save(poisoned)

    published = (tmp_path / ARRAYS_FILE).read_bytes()
    writer.tick()
    learner = start(log, tmp_path)
    learn_all(learner)
    learner.flush()
    learner.close()
    assert learner.n_faults == 2
    assert learner.saved_lsn == 2
    assert (tmp_path / ARRAYS_FILE).read_bytes() == published


def test_full_disk_leaves_what_was_there_and_is_tried_again(tmp_path: Path) -> None:
    log = MemoryLog()
    Writer(log).tick()
    is_full = True

    def at_step(step: str) -> None:
        if is_full and step == "fsync":
            raise OSError(28, "No space left on device")

    clock = Clock()
    learner = start(log, tmp_path, clock, at_step=at_step)
    learn_all(learner)
    assert not learner.snapshot_if_due()
    assert learner.n_faults == 1
    is_full = False
    clock.now_s += 2.0
    assert learner.snapshot_if_due()
    learner.close()


def test_run_learns_what_is_appended_meanwhile_and_saves_when_stopped(tmp_path: Path) -> None:
    log = MemoryLog()
    writer = Writer(log)
    learner = start(log, tmp_path, time.monotonic)
    stop = threading.Event()
    thread = threading.Thread(target=learn.run, args=(learner, stop, lambda: None))
    thread.start()
    key = writer.decide([("book", "sale")])
    writer.report(key, "book", "buy")
    writer.now_us += SALE_WINDOW_US
    writer.tick()
    deadline_s = time.monotonic() + 10.0
    while learner.learned_lsn < log.tail().lsn and time.monotonic() < deadline_s:
        thread.join(0.001)
    stop.set()
    thread.join(10.0)
    assert learner.saved_lsn == learner.published_lsn == log.tail().lsn
    assert (learner.counts.learned, learner.counts.silent) == (1, 0)


@pytest.mark.slow
def test_command_waits_for_the_log_keeps_others_out_and_exits_cleanly_when_told(tmp_path: Path) -> None:
    def spawn() -> subprocess.Popen[bytes]:
        program = "from training.learn import learn_command; learn_command()"
        arguments = [sys.executable, "-c", program, "--data", str(tmp_path), "--log-map-bytes", str(MAP_BYTES)]
        return subprocess.Popen(arguments, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, stdout=subprocess.PIPE)

    files = Files.below(tmp_path)
    first = spawn()
    try:
        log = LmdbLog(files.log, MAP_BYTES)
        Writer(log).tick()
        assert first.stdout is not None
        assert first.stdout.readline() == b"ready\n"
        second = spawn()
        second.communicate(timeout=30.0)
        assert second.returncode == EXIT_OWNED
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=30.0)
        assert first.returncode == 0
        assert files.arrays.exists()
        newest = Snapshots(files.learner, log, ARITHMETIC).newest()
        assert newest is not None
        assert newest.learned_lsn == 1
        log.close()
    finally:
        first.kill()
        first.communicate()
