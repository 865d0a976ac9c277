from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from server import control
from server.control import SLOTS_MAX, ControlPage, Heart
from tests.support.running import until


@pytest.fixture
def pages(tmp_path: Path) -> tuple[ControlPage, ControlPage]:
    """Two views of one page, as two processes have."""
    return ControlPage(tmp_path / "control"), ControlPage(tmp_path / "control")


def test_latch_raised_by_one_holds_for_all_until_it_is_lowered(pages: tuple[ControlPage, ControlPage]) -> None:
    worker, supervisor = pages
    assert not supervisor.is_latched
    worker.latch()
    worker.latch()
    assert is_latched(supervisor)
    assert is_latched(worker)
    supervisor.unlatch()
    assert not is_latched(worker)


def is_latched(page: ControlPage) -> bool:
    return page.is_latched


def test_latch_outlives_the_process_that_raised_it(tmp_path: Path) -> None:
    ControlPage(tmp_path / "control").latch()
    assert ControlPage(tmp_path / "control").is_latched


def test_role_is_silent_since_its_last_beat_and_not_before_its_first(
    pages: tuple[ControlPage, ControlPage], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, supervisor = pages
    now_ns = 1_000_000_000
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    assert supervisor.silent_s(0) == 0.0
    worker.beat(0)
    worker.beat(SLOTS_MAX - 1)
    now_ns += 2_500_000_000
    assert supervisor.silent_s(0) == supervisor.silent_s(SLOTS_MAX - 1) == 2.5
    assert supervisor.silent_s(1) == 0.0
    worker.beat(0)
    assert (supervisor.silent_s(0), supervisor.silent_s(SLOTS_MAX - 1)) == (0.0, 2.5)
    supervisor.forget(SLOTS_MAX - 1)
    assert supervisor.silent_s(SLOTS_MAX - 1) == 0.0


def test_page_has_its_blocks_from_the_start(tmp_path: Path) -> None:
    # A write into a hole of a mapped file kills the writer when the volume is full.
    ControlPage(tmp_path / "control")
    status = (tmp_path / "control").stat()
    assert status.st_blocks * 512 >= status.st_size > 0


def test_heart_beats_while_the_loop_waits_for_the_disk_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    beats: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    heart = Heart(lambda: beats.append(now_s))

    class TenSecondsEach:
        """Stands for the event that ends the heart: each wait takes ten seconds; the loop turns in the fifth."""

        def wait(self, _timeout: float) -> bool:
            nonlocal now_s
            now_s += 10.0
            if now_s == 50.0:
                heart.turn()
            return now_s > 100.0

    monkeypatch.setattr(heart, "_ended", TenSecondsEach())
    heart._run()
    assert beats == [10.0, 20.0, 50.0, 60.0, 70.0]


def test_heart_beats_at_once_and_on_and_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "BEAT_S", 0.001)
    beats: list[None] = []
    with Heart(lambda: beats.append(None)) as heart:
        assert beats, "before the role says that it is ready"
        until(lambda: len(beats) >= 5, "it beats on")
    assert not heart._thread.is_alive()


def test_process_that_leaves_has_said_what_it_said_and_has_its_exit_code() -> None:
    script = "import sys; from server.control import leave; sys.stdout.write('said'); leave(7)"
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (left.returncode, left.stdout, left.stderr) == (7, b"said", b"")
