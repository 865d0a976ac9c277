"""The machine under the benchmark: which core does what, what a process used, and who else was there."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

_PACKAGES: Final = ("grpcio", "protobuf", "uvloop", "lmdb", "onnxruntime", "numpy", "numba", "river")
_TICK_NS: Final = 10**9 // os.sysconf("SC_CLK_TCK")
_ROOT: Final = Path(__file__).parents[2]


class Cores(NamedTuple):
    """Who runs where."""

    server: int
    generator: int

    @classmethod
    def choose(cls) -> Cores:
        """Take the first two cores this process may use; a single one for both where there is no second."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(cores[0], cores[min(1, len(cores) - 1)])

    @property
    def are_shared(self) -> bool:
        """Say whether server and generator are on one core, where nothing can be concluded."""
        return self.server == self.generator


@contextlib.contextmanager
def everywhere(cores: Cores) -> Iterator[None]:
    """Let this thread, and what it starts, run on all cores for a while."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(process_id: int, core: int) -> None:
    """Bind every thread of a process to one core."""
    for task in Path(f"/proc/{process_id}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def step_back(process_id: int) -> None:
    """Let every thread of a process run only where nobody else wants to."""
    for task in Path(f"/proc/{process_id}/task").iterdir():
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))


def cpu_ns(process_id: int) -> int:
    """Return the scheduler run time of all threads of a process, ended ones included, in nanoseconds.

    It is the process's CPU clock: what schedstat says of each thread, summed by the kernel.
    """
    return time.clock_gettime_ns((~process_id << 3) | 2)


def busy_ns(core: int) -> int:
    """Return for how long a core was not idle since boot, time taken by the machine's host included."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _wait, hard, soft, stolen = map(int, ticks[:8])
            return (user + nice + system + hard + soft + stolen) * _TICK_NS
    raise LookupError(f"/proc/stat does not list core {core}")


def disk_faults(process_id: int) -> int:
    """Return how often a process waited for a page of a file to come from the disk."""
    return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[9])


def anonymous_bytes(process_id: int) -> int:
    """Return the memory of a process that no file stands behind, resident."""
    for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise LookupError("smaps_rollup does not state Anonymous")


class Watch:
    """How much CPU processes used since this was made, and how much of their core others did.

    Args:
        core: where the processes are pinned.
        process_ids: the one that is measured first, then any others of ours on that core. Where this very process is
            among them, what it started and waited for counts with it.
    """

    def __init__(self, core: int, process_ids: Iterable[int]) -> None:
        self._core = core
        self._process_ids = tuple(process_ids)
        self._begun_s = time.perf_counter()
        self._begun = self._read()

    def used_ns(self) -> int:
        """Return what the first process used."""
        return self._read()[1] - self._begun[1]

    def foreign_share(self) -> float:
        """Return the share of the core that went to others: 0..1; the kernel counts a core's time in ticks."""
        now = self._read()
        busy, *ours = (after - before for after, before in zip(now, self._begun, strict=True))
        return max(0.0, (busy - sum(ours)) / 1e9 / (time.perf_counter() - self._begun_s))

    def _read(self) -> tuple[int, ...]:
        used = [cpu_ns(process_id) for process_id in self._process_ids]
        if os.getpid() in self._process_ids:
            used.append(int(1e9 * children_s()))
        return busy_ns(self._core), *used


def children_s() -> float:
    """Return the CPU seconds of every process this one started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def describe() -> dict[str, object]:
    """Say on what and with what a run was made."""
    return {
        "cpu_model": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "h2load": _output("h2load", "--version"),
        "git_revision": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD") or "unknown",
        "git_is_clean": not _output("git", "-C", str(_ROOT), "status", "--porcelain"),
        "load_average": os.getloadavg(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except FileNotFoundError:
        return ""
