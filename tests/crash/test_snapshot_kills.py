"""Kill the learner at every step of its snapshot, again and again; a restart comes to the state of one never killed.

In process, what is raised at a step stands for the kill: everything the learner held is dropped, and its lock with it.
Beside that, learners in processes of their own (``killed_learner.py``) die by SIGKILL, at a step they were told or at a
moment nobody chose. The histories hold decisions whose windows close in silence, outcomes that came before their
decision, and records that say nothing.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.storage.log import Log
from server.storage.memory import MemoryLog
from server.storage.record import Record
from tests.crash import killed_learner
from tests.crash.killed_learner import GrowingLmdb
from tests.support.learning import load_catalog, write_history
from training import goal_fleet
from training.learn import Learner
from training.snapshots import SNAPSHOTS_KEPT, AtStep, parse, state_hash

ROOT = Path(__file__).parents[2]
MAP_BYTES = 1 << 26
STEPS = ("write", "fsync", "verify", "rename", "fsync_folder", "prune")
BETWEEN = "between update and snapshot"
RECORDS_A_KILL = 12


class KilledError(BaseException):
    """Stands for the death of the process; nothing that catches errors may catch it."""


class Growing(MemoryLog):
    """A log of which only the first records can be read on from, while keys of all are found: as when others append."""

    read_lsn_max = 0

    def read(self, from_lsn: int, records_max: int = 4_096) -> list[Record]:
        return super().read(from_lsn, max(0, min(records_max, self.read_lsn_max + 1 - from_lsn)))


class Tally:
    """What was seen over all kills of a test."""

    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self.n_different = self.n_with_open = self.n_with_parked = 0

    def note(self, what: str, survivor: Learner, never_killed: Learner) -> None:
        """Compare a learner that has come back and caught up with the one that was never killed."""
        self.kills[what] += 1
        state = survivor.state()
        self.n_different += state_hash(state) != state_hash(never_killed.state())
        self.n_with_open += survivor.n_open > 0
        self.n_with_parked += len(state.parked_lsns) > 0


def start(log: Log, folder: Path, at_step: AtStep = lambda _step: None) -> Learner:
    return Learner(log, folder, load_catalog, lambda: 0.0, at_step=at_step)


def learn_all(learner: Learner) -> None:
    while learner.step():
        pass


def advance(log: Growing, learner: Learner, rng: random.Random) -> None:
    """Have a few records more to learn from, and learn from them."""
    log.read_lsn_max += rng.randrange(1, RECORDS_A_KILL // 2)
    learn_all(learner)


def check_folder(folder: Path, survivor: Learner) -> None:
    """No half-written file is left, and epochs rise with what was learned, up to that of the one who lives."""
    assert not list(folder.glob("*.snapshot.unfinished"))
    assert not list(folder.glob("*.refused")), "a kill leaves the old file or the new one, never a part"
    epochs = [parse(path.read_bytes()).epoch for path in sorted(folder.glob("*.snapshot"))]
    assert epochs == sorted(epochs), "an older epoch was written over a newer one"
    assert survivor.epoch > max(epochs, default=0)


def kill_in_process(folder: Path, n_kills: int, seed: int) -> tuple[Tally, Learner]:
    """Kill a learner so many times, at each step in turn and between them, while a log grows at random."""
    log, rng, tally = Growing(b"log-id-16-bytes."), random.Random(seed), Tally()
    write_history(log, seed, n_kills * RECORDS_A_KILL)
    never_killed = start(log, folder / "never killed")
    kinds = (*STEPS, BETWEEN)
    for number in range(n_kills):
        kind = kinds[number % len(kinds)]
        deadly: set[str] = set()

        def at_step(step: str, deadly: set[str] = deadly) -> None:
            if step in deadly:
                raise KilledError

        victim = start(log, folder / "killed", at_step)
        advance(log, victim, rng)
        victim.flush()  # the first snapshot is whole
        advance(log, victim, rng)
        if kind != BETWEEN:
            deadly.add(kind)
            with pytest.raises(KilledError):
                victim.flush()
        n_snapshots = len(list((folder / "killed").glob("*.snapshot")))
        assert n_snapshots <= SNAPSHOTS_KEPT + (kind in {"fsync_folder", "prune"})
        victim.close()  # as the system does with a dead process's lock
        learn_all(never_killed)
        survivor = start(log, folder / "killed")
        check_folder(folder / "killed", survivor)
        learn_all(survivor)
        tally.note(kind, survivor, never_killed)
        survivor.close()
    never_killed.close()
    return tally, never_killed


def check(tally: Tally, never_killed: Learner, n_kills: int) -> None:
    assert tally.kills.total() == n_kills
    assert tally.n_different == 0
    assert tally.n_with_open > n_kills // 2 and tally.n_with_parked > 0
    counts = never_killed.counts
    assert min(counts.learned, counts.silent, counts.late, counts.orphaned) > 0, "else little is shown"


@pytest.mark.slow
def test_200_kills_at_every_step_of_a_snapshot_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_fleet, "ROUND_ROWS_MIN", 64)  # so that learners come and go meanwhile
    tally, never_killed = kill_in_process(tmp_path, n_kills=200, seed=1)
    check(tally, never_killed, 200)
    assert all(len(goal.changes) > 3 for goal in never_killed.state().goals)
    assert set(tally.kills) == {*STEPS, BETWEEN} and min(tally.kills.values()) >= 28


def test_a_kill_before_each_pruning_leaves_no_more_than_one_too_many_for_each(tmp_path: Path) -> None:
    """And the next that lives takes them all away."""
    log = Growing(b"log-id-16-bytes.")
    write_history(log, 2, 60)

    def at_step(step: str) -> None:
        if step == "prune":
            raise KilledError

    for n_saved in range(1, 6):
        log.read_lsn_max = 5 * n_saved
        victim = start(log, tmp_path, at_step)
        learn_all(victim)
        with pytest.raises(KilledError):
            victim.flush()
        victim.close()
        assert len(list(tmp_path.glob("*.snapshot"))) == n_saved
    log.read_lsn_max = 40
    survivor = start(log, tmp_path)
    assert survivor.learned_lsn == 25
    learn_all(survivor)
    survivor.flush()
    survivor.close()
    kept = sorted(int(path.stem) for path in tmp_path.glob("*.snapshot"))
    assert kept == [20, 25, 40]


@contextmanager
def victims(log_folder: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the program that forks learners to be killed."""
    program = [sys.executable, "-m", killed_learner.__name__, str(log_folder), str(folder), str(MAP_BYTES)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60.0) == 0


def kill_processes(folder: Path, n_kills: int, seed: int) -> None:
    """Kill a learner in a process of its own so many times; each time one comes back here and is compared."""
    log, rng, tally = GrowingLmdb(folder / "log", MAP_BYTES), random.Random(seed), Tally()
    write_history(log, seed, n_kills * RECORDS_A_KILL)
    never_killed = start(log, folder / "never killed")
    with victims(folder / "log", folder / "killed") as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(n_kills):
            log.read_lsn_max += RECORDS_A_KILL
            # Two of three die before a step they are told, the third at a moment nobody chose.
            kind = "moment" if number % 3 == 2 else "step"
            where = rng.random() * 0.1 if kind == "moment" else rng.randrange(1, 3 * len(STEPS))
            process.stdin.write(f"{kind} {where} {log.read_lsn_max}\n")
            process.stdin.flush()
            died_of = int(process.stdout.readline())
            assert died_of == -signal.SIGKILL, "it ended otherwise than by the kill"
            survivor = start(log, folder / "killed")
            check_folder(folder / "killed", survivor)
            learn_all(survivor)
            learn_all(never_killed)
            tally.note(kind, survivor, never_killed)
            survivor.close()
    never_killed.close()
    log.close()
    check(tally, never_killed, n_kills)


@pytest.mark.slow
def test_24_learner_processes_killed_at_steps_and_moments_lose_nothing(tmp_path: Path) -> None:
    kill_processes(tmp_path, n_kills=24, seed=3)


@pytest.mark.long
def test_200_learner_processes_killed_at_steps_and_moments_lose_nothing(tmp_path: Path) -> None:
    kill_processes(tmp_path, n_kills=200, seed=4)
