"""What every keeper of blobs promises: whole or absent, named by content, verified at every load, idempotent."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from server.registry.blobs import BlobAbsentError, BlobAlteredError, Blobs

DATA = bytes(range(256)) * 1_000
DIGEST = hashlib.sha256(DATA).digest()

# Puts DATA once a fork, each into its own folder, and kills the fork before the n-th line of blobs.py that it comes to,
# for n = 1, 2, … until a fork lives to the end. Prints n.
KILL_BEFORE_EACH_LINE = """
import os, signal, sys
from pathlib import Path
from server.registry import blobs

def put_and_die(n):
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != blobs.__file__:
            return None
        lines += event == "line"
        if lines == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    store = blobs.Blobs(Path(sys.argv[1], str(n)))
    sys.settrace(trace)
    store.put(bytes(range(256)) * 1_000)
    os._exit(0)

n = 1
while True:
    child = os.fork()
    if child == 0:
        put_and_die(n)
    if os.waitpid(child, 0)[1] == 0:
        break
    n += 1
print(n)
"""


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "registry")


def files(blobs: Blobs) -> list[Path]:
    return sorted(blobs._folder.iterdir())


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_put_bytes_come_back_under_their_sha256(blobs: Blobs, data: bytes) -> None:
    digest = blobs.put(data)
    assert digest == hashlib.sha256(data).digest()
    assert blobs.has(digest)
    assert blobs.get(digest) == data


def test_same_bytes_twice_are_one_blob(blobs: Blobs) -> None:
    assert blobs.put(DATA) == blobs.put(DATA)
    assert [path.name for path in files(blobs)] == [DIGEST.hex()]


def test_what_one_process_puts_another_gets(blobs: Blobs) -> None:
    digest = blobs.put(DATA)
    assert Blobs(blobs._folder).get(digest) == DATA


def test_unknown_digest_is_absent(blobs: Blobs) -> None:
    assert not blobs.has(DIGEST)
    with pytest.raises(BlobAbsentError) as caught:
        blobs.get(DIGEST)
    assert caught.value.digest == DIGEST


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "swap"])
def test_altered_blob_is_not_given_out_and_putting_it_again_mends_it(blobs: Blobs, change: str) -> None:
    path = blobs._folder / blobs.put(DATA).hex()
    altered = {"flip": DATA[:1000] + b"\x00" + DATA[1001:], "cut": DATA[:-1], "grow": DATA + b"\0", "swap": b"other"}
    path.write_bytes(altered[change])
    with pytest.raises(BlobAlteredError):
        blobs.get(DIGEST)
    blobs.put(DATA)
    assert blobs.get(DIGEST) == DATA


def test_sweep_removes_what_interrupted_writers_left_and_nothing_else(blobs: Blobs) -> None:
    blobs.put(DATA)
    (blobs._folder / f"{DIGEST.hex()}.0123456789abcdef.unfinished").write_bytes(DATA[:10])
    assert blobs.sweep() == 1
    assert blobs.sweep() == 0
    assert blobs.get(DIGEST) == DATA


@pytest.mark.slow
def test_killed_before_any_step_leaves_nothing_or_the_whole_blob(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_BEFORE_EACH_LINE, str(tmp_path)]
    n_lines = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    whole, leftovers = [], 0
    for n in range(1, n_lines + 1):
        blobs = Blobs(tmp_path / str(n))
        whole.append(blobs.has(DIGEST))
        if whole[-1]:
            assert blobs.get(DIGEST) == DATA
        leftovers += blobs.sweep()
        assert [path.name for path in files(blobs)] == [DIGEST.hex()] * whole[-1]
        blobs.put(DATA)
        assert blobs.get(DIGEST) == DATA
    # The kills fell on all three sides: before the rename, with a file half written, and after it.
    assert whole == sorted(whole)
    assert not whole[0]
    assert whole[-2]
    assert leftovers > 0


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_put_returns(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(handle: int) -> None:
        steps.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().suffix or 'folder'}")
        fsync(handle)

    def traced_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    blobs.put(DATA)
    assert steps == ["fsync .unfinished", "rename", "fsync folder"]
    blobs.put(DATA)
    assert steps[3:] == ["fsync folder"]  # the first writer may have been killed before its own


def test_refused_fsync_leaves_no_blob_and_no_leftover(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output"):
            blobs.put(DATA)
    assert files(blobs) == []


def test_volume_that_takes_only_a_part_leaves_no_blob_and_no_leftover(blobs: Blobs) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            blobs.put(DATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert files(blobs) == []


def test_bytes_that_do_not_read_back_as_written_are_no_blob(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", lambda path: DATA[:-1] + b"\x00")
        with pytest.raises(BlobAlteredError):
            blobs.put(DATA)
    assert files(blobs) == []
