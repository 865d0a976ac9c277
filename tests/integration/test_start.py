"""Starts that are refused, each with its exit code and a sentence; and how the settings are shown."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.files import Files
from tests.support import catalogs
from tests.support.running import command, environment, processes_of, serving, until

pytestmark = pytest.mark.slow

RUN_S_MAX = 60.0
EXIT_DATA, EXIT_OWNED, EXIT_CONFIGURATION = 65, 75, 78


def run(folder: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run the program until it ends by itself."""
    return subprocess.run(
        command(*(arguments or ("serve",))),
        env=environment(folder, settings),
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )


@contextmanager
def occupied(address: str = "127.0.0.1") -> Iterator[int]:
    """Hold a port that nobody else may have."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as holder:
        holder.bind((address, 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_address_that_others_can_reach_is_refused_with_the_reason(tmp_path: Path, address: str) -> None:
    ended = run(tmp_path, serve_address=address)
    assert ended.returncode == EXIT_CONFIGURATION
    assert ended.stderr.startswith("tsugi cannot start: serve.address: ")
    assert "no access control yet" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_setting_is_told_at_once(tmp_path: Path) -> None:
    settings = tmp_path / "tsugi.toml"
    settings.write_text(
        """
        [serve]
        prot = 7410
        workers = -1
        [commit]
        wait_ms_max = "soon"
        [kitchen]
        sink = true
        """
    )
    ended = run(tmp_path / "data", "serve", "--config", str(settings), serve_listeners=1_000)
    assert ended.returncode == EXIT_CONFIGURATION
    told = ended.stderr.splitlines()
    assert all(line.startswith("tsugi cannot start: ") for line in told)
    # workers comes from the environment here, which overrides the file.
    for word in ("serve.prot", "serve.listeners", "commit.wait_ms_max", "kitchen"):
        assert any(word in line for line in told), word
    assert not (tmp_path / "data").exists()


def test_second_supervisor_of_a_directory_is_refused_and_disturbs_nothing(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with occupied() as metrics_port:
        pass  # leaves a free port behind
    with serving(tmp_path_factory.mktemp("server"), serve_metrics_port=metrics_port) as server:
        with server.client() as client:
            client.push_catalog(catalogs.message())
            client.decide({"greedy": 1}, durable=True)
            ended = run(server.data)
            assert ended.returncode == EXIT_OWNED
            assert f"process {server.pid} already" in ended.stderr
            assert len(ended.stderr.splitlines()) == 1
            client.decide({"greedy": 1}, durable=True)
            metrics = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10).read().decode()
            assert "tsugi_decisions_total 2.0" in metrics, "the first one's counts are whole"
        server.kill()
        until(lambda: not server.processes(), "its roles end without it")
        server.start()


def test_port_of_somebody_else_is_refused_by_name(tmp_path: Path) -> None:
    with occupied() as port:
        for setting in ("serve_port", "serve_metrics_port"):
            ended = run(tmp_path, **{setting: port})
            assert ended.returncode == EXIT_CONFIGURATION
            assert ended.stderr.startswith(f"tsugi cannot start: {setting.replace('_', '.', 1)}: ")
            assert len(ended.stderr.splitlines()) == 1


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = run(tmp_path / "file" / "data")
    assert ended.returncode == EXIT_CONFIGURATION
    assert ended.stderr.startswith("tsugi cannot start: data.dir: ")
    assert len(ended.stderr.splitlines()) == 1


def test_log_that_is_none_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "data.mdb").write_bytes(b"something else" * 1_000)
    before = (tmp_path / "log" / "data.mdb").read_bytes()
    ended = run(tmp_path)
    assert ended.returncode == EXIT_DATA
    assert "LOG_NEEDS_REPAIR" in ended.stderr
    assert (tmp_path / "log" / "data.mdb").read_bytes() == before


def test_state_that_cannot_be_read_is_rebuilt(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("server"), serve_workers=1) as server:
        with server.client() as client:
            client.push_catalog(catalogs.message())
            lsn = client.decide({"greedy": 1}, durable=True).lsn
        server.stop()
        (server.data / "state" / "data.mdb").write_bytes(b"something else" * 1_000)
        server.start()
        with server.client() as client:
            reply = client.decide({"greedy": 1}, at_least_lsn=lsn, durable=True)
            assert reply.lsn > lsn
        assert server.events("state_rebuilt")


@pytest.mark.parametrize("address", ["::1", "localhost"])
def test_loopback_by_another_name_is_served(tmp_path: Path, address: str) -> None:
    with serving(tmp_path, serve_address=address, serve_workers=1) as server, server.client() as client:
        assert client.list_catalog_revisions().next_page_token == ""
        assert server.host == (f"[{address}]" if ":" in address else address)


def test_server_told_to_stop_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("wb") as log:
        starting = subprocess.Popen(command("serve"), stdout=log, stderr=log, env=environment(tmp_path / "data", {}))
    control = Files.below(tmp_path / "data").control
    until(lambda: control.exists() or starting.poll() is not None, "it has begun to start roles")
    os.kill(starting.pid, signal.SIGTERM)
    assert starting.wait(RUN_S_MAX) in {0, -signal.SIGTERM}, (tmp_path / "log.txt").read_text()
    until(lambda: not processes_of(tmp_path / "data"), "its roles end with it")


def test_settings_are_shown_with_their_origin(tmp_path: Path) -> None:
    settings = tmp_path / "tsugi.toml"
    settings.write_text("[decide]\nqueue_requests_max = 5\n")
    ended = run(tmp_path, "check-config", "--config", str(settings), serve_workers=3)
    assert ended.returncode == 0
    lines = ended.stdout.splitlines()
    assert "decide.queue_requests_max = 5  (file)" in lines
    assert "serve.workers = 3  (TSUGI_SERVE_WORKERS)" in lines
    assert "serve.reflection = True  (default)" in lines
    wrong = run(tmp_path, "check-config", serve_workers=1_000)
    assert wrong.returncode == EXIT_CONFIGURATION
    assert "serve.workers" in wrong.stderr
