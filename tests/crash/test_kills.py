"""Kill worker, projector and learner at random moments under load; nothing acknowledged is lost or counted twice.

The witness is a caller in a process of its own (``ledger.py``). Afterwards the log is held against its file, the
learner's state against a learner that was never killed, and the projected state against a rebuild. The negative control
runs the same kills against a server that acknowledges before it commits, and must be caught.
"""

from __future__ import annotations

import base64
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import pytest

from server.decisioning.live import load_catalog
from server.files import Files
from server.outcomes.projector import Projector, state_hash
from server.registry.blobs import Blobs
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import Log, follow
from server.storage.memory import MemoryStore
from server.tokens import TokenKey
from tests.support.catalogs import message
from training.learn import Learner
from training.running import Running, running_server
from training.snapshots import state_hash as learner_hash
from tsugi.client import Client
from tsugi.log.v1.record_pb2 import RecordKind

HERE = Path(__file__).parent
MAP_BYTES = 1 << 32
# A worker twice, as there are two of them; and as a role that died waits longer each time before it starts again.
ROLES = ("server worker", "server projector", "server worker", "training learn")
SETTINGS = {"SERVE_WORKERS": 2, "SERVE_CONNECTION_AGE_MS_MAX": 500, "SERVE_CONNECTION_AGE_GRACE_MS": 500}
WAIT_S = 60.0

_Value = TypeVar("_Value")


class Acknowledged(NamedTuple):
    """What the witness wrote down."""

    decisions: list[str]
    outcomes: dict[tuple[str, str], int]  # (decision id, outcome id) → LSN


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    assert_survives(tmp_path, n_kills=20, seed=1)


@pytest.mark.long
def test_fifty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    assert_survives(tmp_path, n_kills=50, seed=2)


@pytest.mark.slow
def test_acknowledging_before_the_commit_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE / "acknowledges_early"), prepend=os.pathsep)
    files, acknowledged = killed_under_load(tmp_path, n_kills=6, seed=3, roles=("server worker",))
    with opened(files) as log, pytest.raises(AssertionError, match="was lost"):
        check_ledger(log, files, acknowledged)


def assert_survives(folder: Path, n_kills: int, seed: int) -> None:
    files, acknowledged = killed_under_load(folder, n_kills, seed, ROLES)
    with opened(files) as log:
        log.verify()
        check_ledger(log, files, acknowledged)
        check_learner(log, files, folder / "relearned")
        check_state(log, files)


def killed_under_load(folder: Path, n_kills: int, seed: int, roles: tuple[str, ...]) -> tuple[Files, Acknowledged]:
    """Run a server under load, kill its roles at random moments, let it end in order, and return what was promised."""
    ledger = folder / "ledger.txt"
    with running_server(folder / "data", SETTINGS) as server:
        with Client(server.address) as client:
            client.push_catalog(message())
        with witness(server, ledger, seed):
            kill_roles(server, ledger, n_kills, random.Random(seed), roles)
    return Files.below(folder / "data"), read_ledger(ledger)


@contextmanager
def witness(server: Running, ledger: Path, seed: int) -> Iterator[None]:
    arguments = [sys.executable, "-P", str(HERE / "ledger.py"), server.address, str(ledger), str(seed)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, env=environment) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(WAIT_S) == 0, "the witness met an answer it did not expect"


def kill_roles(server: Running, ledger: Path, n_kills: int, chance: random.Random, roles: tuple[str, ...]) -> None:
    """Kill one role after another; each time work has been acknowledged since, at a moment nobody chose."""
    supervisor = psutil.Process(server.pid)
    for number in range(n_kills):
        size = ledger.stat().st_size if ledger.exists() else 0
        wanted = roles[number % len(roles)]
        until_grown(ledger, size)
        victims = until(partial(running_roles, supervisor, wanted), wanted)
        time.sleep(chance.random() * 0.2)  # the random moment itself
        os.kill(chance.choice(victims).pid, signal.SIGKILL)
    for wanted in ROLES:
        until(partial(running_roles, supervisor, wanted), wanted)
    until_grown(ledger, ledger.stat().st_size)


def until_grown(ledger: Path, size: int) -> None:
    until(lambda: ledger.exists() and ledger.stat().st_size > size + 200, "acknowledged work")


def running_roles(supervisor: psutil.Process, wanted: str) -> list[psutil.Process]:
    found = []
    for child in supervisor.children():
        try:
            if wanted in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def until(condition: Callable[[], _Value], what: str) -> _Value:
    """Return what a condition gives as soon as it holds."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.01)
    return value


def read_ledger(path: Path) -> Acknowledged:
    acknowledged = Acknowledged([], {})
    for line in path.read_text().splitlines():
        kind, decision_id, *rest = line.split()
        if kind == "decision":
            acknowledged.decisions.append(decision_id)
        else:
            outcome_id, lsn = rest
            known = acknowledged.outcomes.setdefault((decision_id, outcome_id), int(lsn))
            assert known == int(lsn), f"{outcome_id} was acknowledged at {known} and at {lsn}"
    assert acknowledged.decisions and acknowledged.outcomes, "the witness saw no work; the test would prove nothing"
    return acknowledged


def check_ledger(log: Log, files: Files, acknowledged: Acknowledged) -> None:
    """Every acknowledgement stands in the log exactly once."""
    token_key = TokenKey(files.read_secret())
    times: Counter[bytes] = Counter()
    for record in follow(log, 1):
        if record.kind in {RecordKind.RECORD_KIND_OUTCOME, RecordKind.RECORD_KIND_DECISION}:
            times[record.key] += 1
    assert set(times.values()) <= {1}, "a record stands in the log twice"
    for decision_id in acknowledged.decisions:
        assert times[decision_key(decision_id)] == 1, f"decision {decision_id} was lost"
    for (decision_id, outcome_id), lsn in acknowledged.outcomes.items():
        key = token_key.record_key(b"outcome", decision_key(decision_id), outcome_id)
        entry = log.find(key)
        assert entry is not None, f"outcome {outcome_id} of {decision_id} was lost"
        assert entry.lsn == lsn, f"outcome {outcome_id} was acknowledged at {lsn} and stands at {entry.lsn}"


def decision_key(decision_id: str) -> bytes:
    return base64.urlsafe_b64decode(decision_id)[2:18]


def check_learner(log: LmdbLog, files: Files, folder: Path) -> None:
    """The learner that was killed again and again is, to the bit, the one that never was."""
    loader = partial(load_catalog, Blobs(files.registry))
    survived = Learner(log, files.learner, loader, lambda: 0.0)
    never_killed = Learner(log, folder, loader, lambda: 0.0)
    try:
        for learner in (survived, never_killed):
            while learner.step():
                pass
        assert survived.counts.learned > 0, "nothing was learned; the test would prove nothing"
        assert learner_hash(survived.state()) == learner_hash(never_killed.state())
    finally:
        survived.close()
        never_killed.close()


def check_state(log: LmdbLog, files: Files) -> None:
    """The projected state, caught up, is the one a rebuild from the log gives."""
    loader = partial(load_catalog, Blobs(files.registry))
    survived, rebuilt = LmdbStore(files.state, MAP_BYTES), MemoryStore()
    for store in (survived, rebuilt):
        projector = Projector(log, store, loader)
        while projector.step():
            pass
    assert state_hash(survived) == state_hash(rebuilt)
    survived.close()


@contextmanager
def opened(files: Files) -> Iterator[LmdbLog]:
    log = LmdbLog(files.log, MAP_BYTES)
    try:
        yield log
    finally:
        log.close()
