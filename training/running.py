"""Starts a whole server for as long as a block lasts, and leaves nothing running.

The demonstration and the replays talk to the product as its users do: by its own command, over its own port.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

READY_S_MAX: Final = 120.0
STOP_S_MAX: Final = 30.0
LOG_CHARS_MAX: Final = 4_000
READY_PREFIX: Final = "tsugi serves on "


class NotStartedError(Exception):
    """The server did not come up; its log says why."""


class Running(NamedTuple):
    """A server that is up."""

    address: str
    pid: int  # of its supervisor


@contextmanager
def running_server(folder: Path, settings: Mapping[str, str | int | bool] | None = None) -> Iterator[Running]:
    """Run a server on a data directory; stops it, whatever happens.

    Args:
        folder: data directory; the server's own log lands beside it in ``<folder>.log``.
        settings: as TSUGI_SECTION_KEY without the prefix, such as {"SERVE_WORKERS": 1}. Port and metrics port are
            chosen by the system unless they are named here.

    Raises:
        NotStartedError: not ready within READY_S_MAX.
    """
    stated = {"DATA_DIR": str(folder), "SERVE_PORT": 0, "SERVE_METRICS_PORT": 0} | dict(settings or {})
    environment = os.environ | {
        f"TSUGI_{name}": str(value).lower() if isinstance(value, bool) else str(value) for name, value in stated.items()
    }
    log_path = folder.with_name(f"{folder.name}.log")
    with log_path.open("w") as log:
        server = subprocess.Popen(  # our own program
            [sys.executable, "-P", "-m", "server", "serve"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        late = threading.Timer(READY_S_MAX, server.kill)
        late.start()
        try:
            assert server.stdout is not None, "a pipe was asked for"
            line = server.stdout.readline()
            late.cancel()
            if not line.startswith(READY_PREFIX):
                raise NotStartedError("the server did not start")
            yield Running(line.removeprefix(READY_PREFIX).partition(",")[0].strip(), server.pid)
        except BaseException:
            sys.stderr.write(f"the server's log ends with:\n{log_path.read_text()[-LOG_CHARS_MAX:]}\n")
            raise
        finally:
            late.cancel()
            _stop(server)
            if server.stdout is not None:
                server.stdout.close()


def _stop(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
