"""The servers that are measured: Tsugi as anybody starts it, and two echoes beside it; each ends with its block."""

from __future__ import annotations

import abc
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import IO, Final, Self

import psutil

from tests.benchmark import machine

DECIDE: Final = "/tsugi.v1.DecisionService/Decide"
REPORT_OUTCOME: Final = "/tsugi.v1.OutcomeService/ReportOutcome"
INGEST: Final = "/tsugi.v1.ProfileService/IngestRecords"
STREAM_INGEST: Final = "/tsugi.v1.ProfileService/StreamIngestRecords"
READY_S_MAX: Final = 120.0
STOP_S_MAX: Final = 30.0

# A connection's age would end runs in their middle; all else is as shipped.
SETTINGS: Final = {"TSUGI_SERVE_PORT": "0", "TSUGI_SERVE_WORKERS": "1", "TSUGI_SERVE_CONNECTION_AGE_MS_MAX": "3600000"}


class Server(abc.ABC):
    """A process that serves, from the constructor to the end of its ``with`` block.

    Attributes:
        port: where it serves.
        process_id: the process that answers calls, with all its threads.
    """

    port: int
    process_id: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abc.abstractmethod
    def stop(self) -> None:
        """End it and everything it started."""


class Tsugi(Server):
    """``tsugi serve`` with one worker: that one on the server's core, all else off it.

    On two cores projector and learner share the generator's, and use what it leaves: otherwise a run would measure how
    late they make the generator.

    Args:
        folder: its data directory.
        cores: who runs where.
        log: takes its standard error.
        with_learner: whether the learner process runs.
        is_pinned: false: projector and learner get their share of the other core, as shipped.

    Attributes:
        background_ids: supervisor, projector and learner.
    """

    def __init__(
        self, folder: Path, cores: machine.Cores, log: IO[bytes], *, with_learner: bool, is_pinned: bool = True
    ) -> None:
        self._metrics_port = _free_port()
        environment = os.environ | SETTINGS | {
            "TSUGI_DATA_DIR": str(folder),
            "TSUGI_SERVE_METRICS_PORT": str(self._metrics_port),
            "TSUGI_LEARNER_ENABLED": str(with_learner).lower(),
        }  # fmt: skip
        with machine.everywhere(cores):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.port = int(_await_line(self._process, r"tsugi serves on 127\.0\.0\.1:(\d+),"))
            if is_pinned:
                machine.pin(self._process.pid, cores.generator)
            self.background_ids = [self._process.pid]
            for role in self._roles():
                if "worker" in role.cmdline():
                    self.process_id = role.pid
                else:
                    if is_pinned:
                        machine.step_back(role.pid)
                    self.background_ids.append(role.pid)
        except BaseException:
            self.stop()
            raise

    def metrics(self) -> dict[str, float]:
        """Read the Prometheus endpoint: every sample by name and labels, and of each name the sum over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        values: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                sample, _, number = line.rpartition(" ")
                for key in {sample, sample.partition("{")[0]}:
                    values[key] = values.get(key, 0.0) + float(number)
        return values

    def stop(self) -> None:
        """Drain the server; whatever is left of it after a while is killed."""
        roles = self._roles()
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for role in psutil.wait_procs(roles, timeout=2.0)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                role.kill()

    def _roles(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []


class Echo(Server):
    """One echo on the server's core; see echo.py.

    Args:
        reply_path: the file with its constant reply.
        cores: who runs where.
        same_transport: with the transport recipe of our workers.
    """

    def __init__(self, reply_path: Path, cores: machine.Cores, *, same_transport: bool) -> None:
        command = [sys.executable, "-m", "tests.benchmark.echo", str(reply_path), str(cores.server)]
        self._process = subprocess.Popen(
            [*command, "--same-transport"] if same_transport else command, stdout=subprocess.PIPE, text=True
        )
        self.process_id = self._process.pid
        try:
            self.port = int(_await_line(self._process, r"(\d+)"))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill it; it owns nothing."""
        self._process.kill()
        self._process.wait()


def _await_line(process: subprocess.Popen[str], pattern: str) -> str:
    """Read a process's output up to the line that matches, and return its first group."""
    assert process.stdout is not None, "a pipe was asked for"
    timer = threading.Timer(READY_S_MAX, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            found = re.match(pattern, line)
            if found:
                return found[1]
    finally:
        timer.cancel()
    raise RuntimeError(f"{process.args!r} ended, or was not ready within {READY_S_MAX:.0f} s")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
