"""The real program for tests: started on a directory of its own, watched, and stopped with nothing left behind.

``serving`` gives a Server with its address, its roles' pids and its log; settings are named as the environment names
them, without the prefix. Whoever shares one server among the tests of a module wraps it in ``told``, so that a failing
test shows what the server said meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import grpc
import psutil

from tsugi.client import Client

READY_S_MAX: Final = 90.0
STOP_S_MAX: Final = 90.0
WAIT_S_MAX: Final = 30.0
POLL_S: Final = 0.01
CONNECTIONS_TRIED_MAX: Final = 100

_ROOT: Final = Path(__file__).parents[2]
_READY: Final = re.compile(r"^tsugi serves on (.+):(\d+), data in ", re.MULTILINE)
_ROLE: Final = re.compile(r" server (worker|projector) --slot (\d+)")
_DEFAULTS: Final = {
    "serve_port": 0,
    "serve_metrics_port": 0,
    "serve_workers": 2,
    "serve_listeners": 4,
    "learner_enabled": False,
}
_connections = count()


class _Connection(Protocol):
    def close(self) -> None: ...


_Closable = TypeVar("_Closable", bound=_Connection)


def until(condition: Callable[[], object], what: str, within_s: float = WAIT_S_MAX) -> None:
    """Wait for a condition, not for ever."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(POLL_S)


def environment(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """Return the environment that makes the program use a data directory and settings, and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TSUGI_")}
    chosen = {f"TSUGI_{name}".upper(): json.dumps(value) for name, value in (_DEFAULTS | dict(settings)).items()}
    return inherited | {"TSUGI_DATA_DIR": str(folder)} | chosen


def command(*arguments: str) -> list[str]:
    """Return the command line of the program."""
    return [sys.executable, "-m", "server", *arguments]


def processes_of(data: Path) -> list[psutil.Process]:
    """Return every process that runs on a data directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(data) in process.environ().get("TSUGI_DATA_DIR", ""):
                found.append(process)
        except psutil.Error:  # gone, or somebody else's
            continue
    return found


class Server:
    """One server on one data directory; may be stopped, killed and started again.

    Args:
        folder: holds the data directory and what the program writes.
        settings: such as serve_workers=1.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.data = folder / "data"
        self._settings = settings
        self._output = folder / "output.txt"
        self._log = folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None
        self.host, self.port = "", 0

    @property
    def address(self) -> str:
        """Where it is."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self._process is not None, "it was started"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until every role works."""
        self._output.write_bytes(b"")
        with self._output.open("ab") as output, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command("serve"), stdout=output, stderr=log, env=environment(self.data, self._settings), cwd=_ROOT
            )
        process = self._process
        until(lambda: process.poll() is not None or self._announced(), "the server is ready", READY_S_MAX)
        announced = self._announced()
        assert announced is not None, f"it ended with {process.returncode}:\n{self.log()}"
        self.host, self.port = announced[1], int(announced[2])

    def stop(self) -> None:
        """Tell it to stop, and see that it does so well and that nothing is left."""
        assert self._process is not None, "it was started"
        self._process.terminate()
        exit_code = self._process.wait(STOP_S_MAX)
        assert exit_code == 0, f"it ended with {exit_code}"
        assert self.processes() == [], "it left processes behind"
        self._process = None

    def kill(self) -> None:
        """Kill the supervisor, as a machine might."""
        assert self._process is not None, "it was started"
        self._process.kill()
        self._process.wait()
        self._process = None

    def end(self) -> None:
        """End whatever is left of it, without asking."""
        for process in self.processes():
            process.kill()
        if self._process is not None:
            self._process.wait()
            self._process = None

    def roles(self) -> dict[str, int]:
        """Return the pid of each role that lives now, by name."""
        return {name: process.pid for name, process in self._role_processes().items()}

    def processes(self) -> list[psutil.Process]:
        """Return every process that has this data directory, whoever its parent is."""
        return processes_of(self.data)

    def client(self, **options: Any) -> Client:
        """Return a client; see tsugi.client.Client for the options."""
        return Client(self.address, **({"timeout_s": WAIT_S_MAX} | options))

    def client_on(self, role: str) -> Client:
        """Return a client whose one connection leads to a certain worker.

        Raises:
            LookupError: none of many did: it does not listen.
        """

        def connect() -> Client:
            client = self.client()
            client.list_catalog_revisions(page_size=1)
            return client

        return self._on(role, connect)

    def has_listening(self, role: str) -> bool:
        """Say whether a worker listens, so that connections lead to it."""
        process = self._role_processes().get(role)
        try:
            connections = process.net_connections("tcp") if process is not None else []
        except psutil.Error:  # it has ended
            return False
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == self.port for each in connections)

    def channel_on(self, role: str) -> grpc.Channel:
        """Return a plain channel whose one connection leads to a certain worker; as client_on."""

        def connect() -> grpc.Channel:
            # A number of its own, or channels to one address would share a connection.
            options = [("grpc.enable_http_proxy", 0), ("tests.connection", next(_connections))]
            channel = grpc.insecure_channel(self.address, options=options)
            grpc.channel_ready_future(channel).result(WAIT_S_MAX)
            return channel

        return self._on(role, connect)

    def _on(self, role: str, connect: Callable[[], _Closable]) -> _Closable:
        for _ in range(CONNECTIONS_TRIED_MAX):
            process = self._role_processes().get(role)
            before = self._peers_of(psutil.Process(), is_remote=True)
            connected = connect()
            ours = self._peers_of(psutil.Process(), is_remote=True) - before
            if process is not None and ours & self._peers_of(process, is_remote=False):
                return connected
            connected.close()
        raise LookupError(f"no connection led to {role}")

    def log(self) -> str:
        """Return all it has said."""
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return what it said of one kind of event."""
        entries = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == name]

    def _announced(self) -> re.Match[str] | None:
        return _READY.search(self._output.read_text())

    def _role_processes(self) -> dict[str, psutil.Process]:
        roles = {}
        for child in psutil.Process(self.pid).children():
            try:
                line = " ".join(child.cmdline())
            except psutil.Error:  # gone since
                continue
            if found := _ROLE.search(line):
                roles["projector" if found[1] == "projector" else f"worker-{found[2]}"] = child
            elif " training learn " in line:
                roles["learner"] = child
        return roles

    def _peers_of(self, process: psutil.Process, *, is_remote: bool) -> set[int]:
        """Return the callers' ports of the connections to this server that a process holds one end of."""
        ports: set[int] = set()
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:  # it has ended
            return ports
        for connection in connections:
            if connection.status == psutil.CONN_ESTABLISHED and connection.raddr and connection.laddr:
                ours, theirs = connection.laddr.port, connection.raddr.port
                if (theirs if is_remote else ours) == self.port:
                    ports.add(ours if is_remote else theirs)
        return ports


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[Server]:
    """Give a running server, and stop it; an error on the way shows its log."""
    server = Server(folder, settings)
    try:
        server.start()
        yield server
        if server.processes():
            server.stop()
        assert server.events("internal_error") == []
    except BaseException:
        sys.stdout.write(server.log())
        raise
    finally:
        server.end()


def told(server: Server) -> Iterator[Server]:
    """Give a shared server to one test, and print what it said meanwhile; pytest shows it where the test failed."""
    n_before = len(server.log())
    yield server
    sys.stdout.write(server.log()[n_before:])
