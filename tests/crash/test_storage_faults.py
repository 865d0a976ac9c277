"""A disk that refuses, fills up, or loses power: nobody is told of a record that is not there afterwards.

What needs rights or tools that are absent here is reported as not run. Every check comes with a negative control, a
program that breaks the promise and must be caught by the same check.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from server.control import ControlPage
from server.storage.lmdb_log import LmdbLog
from server.storage.log import Fate, LogFullError, follow
from server.storage.record import Draft
from tests.support.crash_states import TRACED, Acknowledged, events_of, states
from tests.support.faults import WAIT_S_MAX
from tsugi.log.v1.record_pb2 import RecordKind

MAP_BYTES = 1 << 28
ROOT = Path(__file__).parents[2]
NOW_US = 1_760_000_000_000_000
N_COMMITS = 8


class Program:
    """The committing program in a process of its own; each request is one commit.

    Args:
        folder: where its log lies.
        tracer: a command that runs it, such as strace with what to inject.
        control: the control page it shares with others.
        case: the negative control it plays, if any.

    Attributes:
        pid: its own, or the tracer's.
        said: every line it wrote; all of them once it has ended.
    """

    def __init__(self, folder: Path, tracer: Sequence[str] = (), control: Path | None = None, case: str = "") -> None:
        command = [sys.executable, "-m", "tests.support.writers", "commit", str(folder), str(MAP_BYTES)]
        self._process = subprocess.Popen(
            [*tracer, *command, str(control or ""), case],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self.said: list[str] = []

    def __enter__(self) -> Self:
        if self._read() != "ready":
            self.__exit__()
            raise AssertionError("the program could not start")
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.said += self._process.communicate(timeout=WAIT_S_MAX)[0].splitlines()
        finally:
            self._process.kill()

    def commit(self) -> str:
        """Ask for one commit and return what became of it: "acknowledged", "refused", or "" for a dead program."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        while (line := self._read()) == "failed":
            pass
        return line.split(" ")[0]

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        self.said.append(line)
        return line


@pytest.fixture(scope="module")
def strace() -> str:
    """Gives the path of strace, where it may trace."""
    path = shutil.which("strace")
    if path is None:
        pytest.skip("NOT RUN: strace is absent; disk faults cannot be injected here")
    attempt = subprocess.run([path, "-qq", "-o", os.devnull, "true"], capture_output=True, check=False)
    if attempt.returncode:
        pytest.skip("NOT RUN: this account may not trace; disk faults cannot be injected here")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gives the folder of an empty log, whose creation no fault hits."""
    LmdbLog(tmp_path / "log", MAP_BYTES).close()
    return tmp_path / "log"


def injecting(strace: str, fault: str) -> list[str]:
    call = fault.partition(":")[0]
    return [strace, "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={fault}"]


def run(folder: Path, tracer: Sequence[str], case: str = "", n_commits: int = N_COMMITS) -> list[str]:
    program = Program(folder, tracer, case=case)
    with program:
        for _ in range(n_commits):
            program.commit()
    return program.said


def check(folder: Path, said: Sequence[str]) -> None:
    """Nothing is acknowledged after the first failure, and everything acknowledged is in the log, once."""
    acknowledged = [line.split()[1] for line in said if line.startswith("acknowledged")]
    if "failed" in said:
        after = said[said.index("failed") :]
        assert not [line for line in after if line.startswith("acknowledged")], "acknowledged after the failure"
    log = LmdbLog(folder, MAP_BYTES)
    keys = [record.key.hex() for record in follow(log, 1)]
    assert log.verify().lsn == len(keys)
    (receipt,) = log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], NOW_US)
    assert receipt.lsn == len(keys) + 1
    log.close()
    assert len(set(keys)) == len(keys), "recorded twice"
    assert set(acknowledged) <= set(keys), "an acknowledged record was lost"


def assert_fails_honestly(strace: str, folder: Path, call: str, how: str, n: str) -> bool:
    """Inject one fault and check; say whether it was met."""
    said = run(folder, injecting(strace, f"{call}:{how}:when={n}"))
    check(folder, said)
    is_met = "failed" in said
    assert len([line for line in said if line.startswith("refused")]) > 0 or not is_met
    return is_met


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fdatasync", "writev", "pwrite64"])
@pytest.mark.parametrize("n", ["1", "2", "3", "5", "2+"])
def test_nothing_is_acknowledged_after_a_call_has_failed(strace: str, folder: Path, call: str, n: str) -> None:
    assert assert_fails_honestly(strace, folder, call, "error=EIO", n)


@pytest.mark.long
@pytest.mark.parametrize("call", ["fdatasync", "writev", "pwrite64"])
@pytest.mark.parametrize("how", ["error=EIO", "error=ENOSPC", "error=EINTR"])
def test_nothing_is_acknowledged_after_any_call_has_failed(strace: str, tmp_path: Path, call: str, how: str) -> None:
    n = 0
    is_met = True
    while is_met or n < N_COMMITS:
        n += 1
        folder = tmp_path / str(n)
        LmdbLog(folder, MAP_BYTES).close()
        is_met = assert_fails_honestly(strace, folder, call, how, str(n))


@pytest.mark.slow
def test_negative_control_acknowledging_before_the_commit_is_caught(strace: str, folder: Path) -> None:
    said = run(folder, injecting(strace, "fdatasync:error=EIO:when=3"), case="hasty")
    with pytest.raises(AssertionError, match=r"an acknowledged record was lost|acknowledged after the failure"):
        check(folder, said)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fdatasync", "writev", "pwrite64"])
def test_killed_at_a_call_everything_acknowledged_is_there_and_others_go_on(
    strace: str, folder: Path, call: str
) -> None:
    # The one who dies holds the writer lock.
    with Program(folder) as other, Program(folder, injecting(strace, f"{call}:signal=KILL:when=3")) as killed:
        before = other.commit()
        said = [killed.commit() for _ in range(N_COMMITS)]
        after = other.commit()
    assert (before, said[0], said[-1], after) == ("acknowledged", "acknowledged", "", "acknowledged")
    check(folder, other.said + killed.said)


@pytest.mark.slow
def test_reader_slots_of_the_killed_are_freed(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    with Program(folder) as reader:
        assert str(reader.pid) in log._env.readers()
        os.kill(reader.pid, signal.SIGKILL)
    assert str(reader.pid) in log._env.readers()
    log.check_readers()
    assert str(reader.pid) not in log._env.readers()
    log.close()


@pytest.mark.slow
@pytest.mark.parametrize("looks_at_the_latch", [True, False])
def test_failure_of_one_process_stops_all_that_look_at_the_latch(
    strace: str, folder: Path, tmp_path: Path, looks_at_the_latch: bool
) -> None:
    control = tmp_path / "control"
    tracer = injecting(strace, "fdatasync:error=EIO:when=2")
    with Program(folder, control=control if looks_at_the_latch else None) as other:
        with Program(folder, tracer, control) as failing:
            assert [other.commit(), failing.commit(), failing.commit()] == ["acknowledged", "acknowledged", "refused"]
        assert ControlPage(control).is_latched
        # Without the latch, the negative control, the other one goes on acknowledging.
        assert [other.commit(), other.commit()] == ["refused" if looks_at_the_latch else "acknowledged"] * 2


@pytest.mark.slow
def test_no_legal_state_after_a_power_cut_lacks_an_acknowledged_record(strace: str, tmp_path: Path) -> None:
    lost, unopenable, n_states = explored(strace, tmp_path, n_commits=12, n_random=12)
    assert (lost, unopenable) == (0, 0)
    assert n_states >= 200


@pytest.mark.slow
def test_negative_control_commits_that_do_not_wait_for_the_disk_are_caught(strace: str, tmp_path: Path) -> None:
    lost, _, _ = explored(strace, tmp_path, n_commits=6, n_random=2, case="unsynced")
    assert lost > 0


@pytest.mark.long
def test_no_state_of_twenty_thousand_lacks_an_acknowledged_record(strace: str, tmp_path: Path) -> None:
    n_states = 0
    for round_ in range(20):
        lost, unopenable, n = explored(strace, tmp_path / str(round_), n_commits=40, n_random=10, seed=round_)
        assert (lost, unopenable) == (0, 0)
        n_states += n
    assert n_states >= 20_000


def explored(
    strace: str, tmp_path: Path, n_commits: int, n_random: int, case: str = "", seed: int = 0
) -> tuple[int, int, int]:
    """Trace a short run, rebuild what power cuts may leave of it, open each; count lost, unopenable and all states."""
    folder, trace, copies = tmp_path / "log", tmp_path / "trace", tmp_path / "states"
    LmdbLog(folder, MAP_BYTES).close()
    start = (folder / "data.mdb").read_bytes()
    tracer = [strace, "-f", "-qq", "-xx", "-s", "100000000", "-o", str(trace), "-e", f"trace={TRACED}"]
    said = run(folder, tracer, case, n_commits)
    check(folder, said)
    events = events_of(trace, folder / "data.mdb")
    assert sum(isinstance(event, Acknowledged) for event in events) == n_commits
    found = list(states(start, events, n_random, seed))
    for number, state in enumerate(found):
        copy = copies / f"{number:06d}"
        copy.mkdir(parents=True)
        (copy / "data.mdb").write_bytes(state.data)
    command = [sys.executable, "-m", "tests.support.opener", str(copies), str(MAP_BYTES), "write"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=20 * WAIT_S_MAX, check=True)
    shutil.rmtree(copies)
    lost = unopenable = 0
    for state, line in zip(found, done.stdout.splitlines(), strict=True):
        verdict, *rest = line.split()
        unopenable += verdict != "read"
        lost += not set(state.acknowledged) <= set(rest[1:])
    return lost, unopenable, len(found)


@contextmanager
def volume(path: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """Mount a small volume; not run where this account may not."""
    mountpoint, image = path / "volume", path / "image"
    mountpoint.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mountpoint)]
    try:
        if kind == "ext4":
            image.write_bytes(b"")
            os.truncate(image, megabytes << 20)
            mount = ["mount", "-o", "loop", str(image), str(mountpoint)]
            # Without a reserve for root, which would hide the fault.
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"NOT RUN: a small {kind} volume cannot be made here: {error}")
    if mounted.returncode:
        pytest.skip(f"NOT RUN: a small {kind} volume cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        # Lazily: where a test fails, its log is still open.
        subprocess.run(["umount", "--lazy", str(mountpoint)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_volume_refuses_reads_on_and_heals(tmp_path: Path, kind: str) -> None:
    fill_and_free(tmp_path, kind, n_rounds=3)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_volume_refuses_reads_on_and_heals_fifty_times(tmp_path: Path, kind: str) -> None:
    fill_and_free(tmp_path, kind, n_rounds=50)


def fill_and_free(tmp_path: Path, kind: str, n_rounds: int) -> None:
    with volume(tmp_path, kind, megabytes=64) as mountpoint:
        log = LmdbLog(mountpoint / "log", MAP_BYTES)
        acknowledged: dict[bytes, int] = {}
        number = 0

        def append() -> None:
            key = (number + 1).to_bytes(16, "big")
            (receipt,) = log.append([Draft(RecordKind.RECORD_KIND_OUTCOME, os.urandom(3_000), key)], NOW_US)
            assert receipt.fate is Fate.RECORDED
            acknowledged[key] = receipt.lsn

        for _ in range(n_rounds):
            append()
            number += 1
            fill(mountpoint / "filler")
            with pytest.raises(LogFullError) as caught:
                for _ in range(10_000):
                    append()
                    number += 1
            assert not caught.value.is_map
            assert [record.lsn for record in log.read(1)] == list(acknowledged.values())
            assert log.find((number + 1).to_bytes(16, "big")) is None
            (mountpoint / "filler").unlink()
            append()  # the same id, taken at once
            number += 1
        assert log.verify().lsn == len(acknowledged)
        for key, lsn in acknowledged.items():
            entry = log.find(key)
            assert entry is not None
            assert entry.lsn == lsn
        log.close()


def fill(path: Path) -> None:
    """Take all the space there is."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
