"""What the benchmark reads of the machine."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tests.benchmark.machine import Cores, Watch, anonymous_bytes, cpu_ns, disk_faults, everywhere


def test_the_cpu_of_a_process_includes_threads_that_have_ended() -> None:
    begun = cpu_ns(os.getpid())
    used: list[int] = []

    def work() -> None:
        while time.thread_time_ns() < 5_000_000:
            pass
        used.append(time.thread_time_ns())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cpu_ns(os.getpid()) - begun >= used[0]


def test_what_we_use_ourselves_is_not_foreign() -> None:
    watch = Watch(min(os.sched_getaffinity(0)), [os.getpid()])
    assert watch.used_ns() >= 0
    assert watch.foreign_share() >= 0.0


def test_server_and_generator_have_a_core_each_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 3, 7})
    assert Cores.choose() == Cores(server=3, generator=5)
    assert not Cores.choose().are_shared


def test_on_one_core_both_share_it_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
    assert Cores.choose() == Cores(server=2, generator=2)
    assert Cores.choose().are_shared


def test_anonymous_memory_grows_with_what_is_held() -> None:
    before = anonymous_bytes(os.getpid())
    held = bytearray(os.urandom(32 * 1024 * 1024))
    assert anonymous_bytes(os.getpid()) - before > len(held) // 2


def test_a_thread_is_back_on_its_core_after_it_was_everywhere() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with everywhere(Cores(min(before), max(before))):
            assert os.sched_getaffinity(0) == {min(before), max(before)}
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_waiting_for_the_disk_is_counted() -> None:
    assert disk_faults(os.getpid()) >= 0
