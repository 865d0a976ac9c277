"""The supervisor: starts, watches, restarts and drains the process roles; owns no data and answers no call.

Roles are spawned, never forked, and each is started again with back-off when it dies; the others go on meanwhile. A
role that falls silent is killed first. When a log write has failed anywhere, every worker is stopped, the log is opened
and verified anew, and only then do they start again. On SIGTERM the workers drain first, so that what they accepted is
still projected and learned from.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Final, NamedTuple
from wsgiref.simple_server import WSGIServer

import lmdb
import structlog

from server import telemetry
from server.config import Settings, as_environment
from server.control import SILENT_S_MAX, ControlPage
from server.files import Files
from server.kernel_cache import CACHE_FOLDER
from server.registry.blobs import Blobs
from server.storage.lmdb_log import LmdbLog, SchemaTooNewError
from server.storage.lmdb_store import LmdbStore
from server.storage.record import CorruptRecordError

EXIT_DATA: Final = 65
EXIT_STORAGE: Final = 74
EXIT_CONFIGURATION: Final = 78

BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 5.0
STEADY_S: Final = 10.0  # a role that ran this long starts again at once
WATCH_S: Final = 0.5
READY_S_MAX: Final = 120.0  # a new machine compiles the kernels meanwhile
ROLE_STOP_S: Final = 10.0


class RefusedStartError(Exception):
    """The server cannot start.

    Attributes:
        exit_code: as in sysexits.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Role(NamedTuple):
    """One process to keep alive."""

    name: str  # "worker-0", "projector", "learner"
    command: tuple[str, ...]
    slot: int
    cpus: frozenset[int]
    is_worker: bool


def build_name() -> str:
    """Return name and version of this program, for decision records."""
    return f"tsugi {metadata.version('tsugi')}"


class Supervisor:
    """Runs one server.

    Args:
        settings: everything an operator chose; the caller owns their data directory.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # A second thread of a numeric library would fight the role's own for its core.
        self._environment = os.environ | as_environment(settings) | {"OPENBLAS_NUM_THREADS": "1"}
        self._files = Files.below(settings.data.dir)
        self._stopping = asyncio.Event()
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._ready: dict[str, asyncio.Event] = {}

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            RefusedStartError: files or port cannot be used.
        """
        _refuse_open_kernel_cache()
        self._open_once()
        self._control = ControlPage(self._files.control)
        self._control.unlatch()
        reserved = _reserve_port(self._settings.serve.address, self._settings.serve.port)
        port = reserved.getsockname()[1]
        roles = self._roles(port)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        self._ready = {role.name: asyncio.Event() for role in roles}
        metrics = self._serve_metrics()  # before any role runs: it is the last that can be refused
        keeping = {role: asyncio.create_task(self._keep(role)) for role in roles}
        watching = asyncio.create_task(self._watch(roles))
        announcing = asyncio.create_task(self._announce(port))
        await self._stopping.wait()
        structlog.get_logger().info("draining")
        announcing.cancel()
        await self._stop([role for role in roles if role.is_worker], keeping, self._drain_s())
        await self._stop([role for role in roles if not role.is_worker], keeping, ROLE_STOP_S)
        watching.cancel()
        reserved.close()
        if metrics is not None:
            metrics.shutdown()
        structlog.get_logger().info("stopped")

    def _open_once(self) -> None:
        """Open log and state to see that they can be, making what is missing; state that cannot is rebuilt."""
        Blobs(self._files.registry).sweep()
        try:
            LmdbLog(self._files.log, self._settings.data.log_map_bytes).close()
        except SchemaTooNewError as error:
            raise RefusedStartError(f"log: SCHEMA_TOO_NEW: {error}", EXIT_DATA) from error
        except lmdb.Error as error:
            raise RefusedStartError(f"log: LOG_NEEDS_REPAIR: {error}", EXIT_DATA) from error
        try:
            LmdbStore(self._files.state, self._settings.data.state_map_bytes).close()
        except lmdb.Error as error:
            structlog.get_logger().error("state_rebuilt", why=str(error))
            shutil.rmtree(self._files.state)
            LmdbStore(self._files.state, self._settings.data.state_map_bytes).close()

    def _roles(self, port: int) -> list[Role]:
        serve = self._settings.serve
        cpus = sorted(os.sched_getaffinity(0))
        n_workers = serve.workers or len(cpus)
        others = frozenset(cpus[n_workers:]) or frozenset(cpus)
        python = (sys.executable, "-P", "-m")
        roles = [
            Role(
                name=f"worker-{index}",
                command=(*python, "server", "worker", "--slot", str(index), "--port", str(port)),
                slot=index,
                cpus=frozenset({cpus[index % len(cpus)]}),
                is_worker=True,
            )
            for index in range(n_workers)
        ]
        roles.append(
            Role("projector", (*python, "server", "projector", "--slot", str(n_workers)), n_workers, others, False)
        )
        if self._settings.learner.enabled:
            data = self._settings.data
            command = (
                *python, "training", "learn", "--data", str(self._files.root),
                "--log-map-bytes", str(data.log_map_bytes),
                "--publish-ms", str(self._settings.learner.publish_ms_min),
                "--snapshot-ms", str(self._settings.learner.snapshot_ms_min),
                "--slot", str(n_workers + 1),
            )  # fmt: skip
            roles.append(Role("learner", command, n_workers + 1, others, False))
        return roles

    async def _keep(self, role: Role) -> None:
        """Start a role, and start it again whenever it ends, until the server stops."""
        backoff_s = BACKOFF_S_MIN
        while not self._stopping.is_set():
            started = time.monotonic()
            exit_code = await self._run_once(role)
            if self._stopping.is_set():
                return
            backoff_s = BACKOFF_S_MIN if time.monotonic() - started > STEADY_S else min(2 * backoff_s, BACKOFF_S_MAX)
            structlog.get_logger().warning("role_ended", name=role.name, exit_code=exit_code, again_in_s=backoff_s)
            if exit_code == EXIT_STORAGE or self._control.is_latched:
                await self._reopen_log()
            await asyncio.sleep(backoff_s)

    async def _run_once(self, role: Role) -> int:
        self._control.forget(role.slot)
        process = await asyncio.create_subprocess_exec(
            *role.command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, env=self._environment
        )
        self._running[role.name] = process
        if self._stopping.is_set():  # it came too late to be told with the others
            _signal(process, signal.SIGTERM)
        telemetry.ROLE_STARTS.labels(role.name).inc()
        with contextlib.suppress(ProcessLookupError):  # it ended already; wait() below tells how
            os.sched_setaffinity(process.pid, role.cpus)
        assert process.stdout is not None, "a pipe was asked for"
        try:
            if await asyncio.wait_for(process.stdout.readline(), READY_S_MAX):
                self._ready[role.name].set()
        except TimeoutError:
            structlog.get_logger().error("role_not_ready", name=role.name, role_pid=process.pid)
            _signal(process, signal.SIGKILL)
        exit_code = await process.wait()
        self._running.pop(role.name, None)
        telemetry.forget_process(process.pid)
        return exit_code

    async def _watch(self, roles: Sequence[Role]) -> None:
        """Kill a role that has fallen silent; a supervisor that was late itself judges nobody."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(WATCH_S)
            now = loop.time()
            was_late, last = now - last > 2 * WATCH_S, now
            if was_late:
                continue
            for role in roles:
                process = self._running.get(role.name)
                if process is not None and self._control.silent_s(role.slot) > SILENT_S_MAX:
                    structlog.get_logger().error("role_silent", name=role.name, role_pid=process.pid)
                    process.kill()

    async def _reopen_log(self) -> None:
        """Stop all workers, verify the log's tail, and let them start again."""
        for name, process in list(self._running.items()):
            if name.startswith("worker"):
                process.kill()
                await process.wait()
        if self._control.is_latched:
            try:
                log = LmdbLog(self._files.log, self._settings.data.log_map_bytes)
                tail = log.tail()
                log.read(max(1, tail.lsn - 100))
                log.close()
            except (lmdb.Error, CorruptRecordError) as error:
                structlog.get_logger().error("log_needs_repair", why=str(error))
                return
            structlog.get_logger().info("log_verified", lsn=tail.lsn)
            self._control.unlatch()

    async def _announce(self, port: int) -> None:
        """Say where the server is, once every role works."""
        await asyncio.gather(*(event.wait() for event in self._ready.values()))
        serve = self._settings.serve
        host = f"[{serve.address}]" if ":" in serve.address else serve.address
        metrics = f", metrics on http://{host}:{serve.metrics_port}/metrics" if serve.metrics_port else ""
        sys.stdout.write(f"tsugi serves on {host}:{port}, data in {self._files.root}{metrics}\n")
        sys.stdout.flush()

    async def _stop(self, roles: Sequence[Role], keeping: dict[Role, asyncio.Task[None]], within_s: float) -> None:
        """Tell roles to stop and wait for them; one that does not in time is killed."""
        processes = [process for role in roles if (process := self._running.get(role.name)) is not None]
        for process in processes:
            _signal(process, signal.SIGTERM)
        tasks = [keeping[role] for role in roles]
        _, late = await asyncio.wait(tasks, timeout=within_s)
        for process in processes if late else ():
            _signal(process, signal.SIGKILL)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _serve_metrics(self) -> WSGIServer | None:
        serve = self._settings.serve
        if not serve.metrics_port:
            return None
        try:
            return telemetry.serve_metrics(serve.metrics_port, serve.address)
        except OSError as error:
            raise RefusedStartError(f"serve.metrics_port: {error.strerror}", EXIT_CONFIGURATION) from error

    def _drain_s(self) -> float:
        serve = self._settings.serve
        return 1.1 * serve.connection_age_ms_max / 1000 + serve.connection_age_grace_ms / 1000 + ROLE_STOP_S


def _reserve_port(address: str, port: int) -> socket.socket:
    """Bind the port without listening, so that it is ours and every worker may listen on it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    reserved = socket.socket(family, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((address, port))
    except OSError as error:
        raise RefusedStartError(
            f"serve.port: cannot bind {address}:{port}: {error.strerror}", EXIT_CONFIGURATION
        ) from error
    return reserved


def _refuse_open_kernel_cache() -> None:
    """Refuse to run compiled code that somebody else may have written."""
    for folder in (CACHE_FOLDER, *CACHE_FOLDER.rglob("*")):
        if folder.exists() and folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RefusedStartError(f"{folder}: others may write to the cache of compiled code", EXIT_CONFIGURATION)


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
