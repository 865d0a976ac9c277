"""Workers and servers that are told to stop under load: what was accepted is answered and on record."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import catalogs
from tests.support.load import PERSON, Load, decide_on, request_of
from tests.support.running import Server, serving, told, until
from tsugi.client import Client, source_record

pytestmark = pytest.mark.slow

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SHORT: Final = {"serve_connection_age_ms_max": 400, "serve_connection_age_grace_ms": 500}
CALLS: Final = 200


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), **SHORT) as server, server.client() as client:
        client.push_catalog(catalogs.message())
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


def test_connections_that_reach_their_age_fail_no_call(server: Server) -> None:
    load = Load(server.address)
    with load.running():
        load.wait_for(5 * CALLS)
    assert load.failures == {}


@pytest.mark.long
def test_call_that_finds_its_connection_gone_was_never_decided(server: Server) -> None:
    """A call may start while the server's last word on its connection, GOAWAY, is under way. gRPC then sends it again
    by itself, since no server has seen it; where that is switched off, the call fails, and has had no effect.
    """
    with server.client() as client:
        contacts(client, client.ingest_records([source_record("know", "crm", PERSON)]).lsn)
        load = Load(server.address, threads=4, channels=8, is_bare=True)
        with load.running():
            for _ in range(50):
                load.wait_for(CALLS)
        assert all("max_age" in failure for failure in load.failures), load.failures
        until(lambda: contacts(client) == load.n_answered, "each answered call is one contact, and no other is")


def contacts(client: Client, at_least_lsn: int = 0) -> int:
    """Return how often the load's person has been told something."""
    profile = client.get_profile(identity=next(iter(PERSON.items())), at_least_lsn=at_least_lsn).profile
    return sum(contact.count for contact in profile.contacts)


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_workers_restarted_one_by_one_fail_no_call(server: Server, rounds: int) -> None:
    load = Load(server.address)
    with load.running():
        for role in ("worker-0", "worker-1") * rounds:
            load.wait_for(CALLS)
            before = server.roles()
            os.kill(before[role], signal.SIGTERM)
            until(lambda: server.roles().get(role, before[role]) != before[role], f"{role} is replaced")  # noqa: B023  # called now
            until(lambda: server.has_listening(role), f"{role} takes calls again")  # noqa: B023  # called now
            load.wait_for(CALLS)
    assert load.failures == {}
    ended = [(entry["name"], entry["exit_code"]) for entry in server.events("role_ended")]
    assert ended[-2:] == [("worker-0", 0), ("worker-1", 0)]


def test_draining_worker_says_so_first_and_goes_on_answering(server: Server) -> None:
    until(lambda: server.has_listening("worker-0"), "it takes calls")
    pid = server.roles()["worker-0"]
    with server.channel_on("worker-0") as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watched).status == SERVING
        os.kill(pid, signal.SIGTERM)
        assert next(watched).status == NOT_SERVING
        decide = decide_on(channel)
        assert decide(request_of(""), timeout=10).slots
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert check.status in {NOT_SERVING, SERVING}, "of this worker, or over a new connection of the other"
        watched.cancel()
    until(lambda: server.roles().get("worker-0", pid) != pid, "it is replaced")


def test_stopped_server_has_answered_and_recorded_what_it_accepted(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("stopped"), **SHORT) as server:
        with server.client() as client:
            client.push_catalog(catalogs.message())
        load = Load(server.address, waits=False, name="call")
        with load.running():
            load.wait_for(CALLS)
            server.stop()
        not_sent = {failure for failure in load.failures if "failed to connect" in failure.lower()}
        assert set(load.failures) == not_sent, "only calls that found no server failed"
        server.start()
        with grpc.insecure_channel(server.address) as channel:
            decide = decide_on(channel)
            for request_id, reply in list(load.replies.items())[-CALLS:]:
                again = decide(request_of(request_id), timeout=30, wait_for_ready=True)
                assert again == reply, "its record has the time it was decided at"
