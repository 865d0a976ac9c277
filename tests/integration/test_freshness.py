"""What is learned is used at once: an acknowledged outcome, the decision that waits for it, and the lag on record."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import catalogs
from tests.support.running import Server, serving, told, until
from tsugi.client import CallError, Client, decide_request
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRole

pytestmark = pytest.mark.slow

GREEDY: Final = {"greedy": 1}
STALE: Final = Degradation.DEGRADATION_LEARNER_STALE
N_OUTCOMES: Final = 20
# A learner that stands still is replaced after 3 s; all that is asked of a stopped one is over well before.
DEADLINE_S: Final = 1.5
_numbers = itertools.count()


@pytest.fixture(scope="module")
def metrics_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, serve_workers=1, learner_enabled=True, serve_metrics_port=metrics_port) as server:
        with server.client() as client:
            client.push_catalog(catalogs.message())
            until(lambda: learned_lsn(client.decide(GREEDY, preview=True)), "the learner publishes")
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


def learned_lsn(reply: DecideResponse) -> int:
    """Return how far the learner had come that a decision was made with; 0 without one."""
    return sum(use.learned_lsn for use in reply.model_revisions if use.role == ModelRole.MODEL_ROLE_LEARNER)


def report(client: Client) -> int:
    """Decide, report an outcome of it, and return its LSN."""
    decision = client.decide(GREEDY, durable=True)
    return client.report_outcome(decision.decision_id, decision.slots[0].action, f"o-{next(_numbers)}", "click").lsn


def lags(port: int) -> tuple[float, float]:
    """Return how many learning lags the metrics hold, and their sum in seconds."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
    assert families["tsugi_learner_behind_records"].samples[0].value >= 0
    assert families["tsugi_learner_behind_seconds"].samples[0].value >= 0
    values = {each.name.rpartition("_")[2]: each.value for each in families["tsugi_learning_lag_seconds"].samples}
    return values["count"], values["sum"]


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Let the learner stand still."""
    learner = server.roles()["learner"]
    os.kill(learner, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(learner, signal.SIGCONT)


def test_decision_that_waits_has_learned_from_the_outcome_just_acknowledged(client: Client, metrics_port: int) -> None:
    n_before, _ = lags(metrics_port)
    waited_s = []
    for _ in range(N_OUTCOMES):
        lsn = report(client)
        begun = time.monotonic()
        reply = client.decide(GREEDY, at_least_lsn=lsn, wait_for_learning=True)
        waited_s.append(time.monotonic() - begun)
        assert learned_lsn(reply) >= lsn
        assert STALE not in reply.degradations
    # Learner and worker look every 5 and 20 ms, and arrays are published every 100: 150 ms on a machine with nothing
    # else to do. The median, because here there is something else.
    assert sorted(waited_s)[N_OUTCOMES // 2] < 0.5
    n_counted, sum_s = lags(metrics_port)
    assert n_counted - n_before == N_OUTCOMES
    assert 0.0 < sum_s <= N_OUTCOMES


def test_batch_and_stream_wait_as_one_decision_does(client: Client) -> None:
    request = decide_request(GREEDY, at_least_lsn=report(client), wait_for_learning=True)
    replies = [
        client.batch_decide([request]).results[0].decision,
        *(reply.decision for reply in client.stream_decide([request])),
    ]
    assert all(learned_lsn(reply) >= request.at_least_lsn for reply in replies)


def test_wait_without_anything_to_wait_for_is_refused(client: Client) -> None:
    with pytest.raises(CallError) as refusal:
        client.decide(GREEDY, wait_for_learning=True)
    assert refusal.value.reason == "ERROR_REASON_FIELD_INVALID"
    assert [path for path, _ in refusal.value.violations] == ["wait_for_learning"]


def test_learner_that_stands_still_is_waited_for_within_bounds_and_told(server: Server, client: Client) -> None:
    answers: queue.Queue[tuple[float, DecideResponse | CallError]] = queue.Queue()
    with stopped(server):
        lsn = report(client)
        begun = time.monotonic()
        client.decide_then(
            lambda reply: answers.put((time.monotonic() - begun, reply)),
            GREEDY,
            at_least_lsn=lsn,
            wait_for_learning=True,
            timeout_s=DEADLINE_S,
        )
        assert STALE not in client.decide(GREEDY).degradations, "who does not wait is not told, nor held up"
        assert answers.empty()
        waited_s, reply = answers.get(timeout=DEADLINE_S)
    assert isinstance(reply, DecideResponse), reply
    assert DEADLINE_S / 2 * 0.9 <= waited_s < DEADLINE_S
    assert STALE in reply.degradations
    assert learned_lsn(reply) < lsn
    assert reply.slots[0].action
    reply = client.decide(GREEDY, at_least_lsn=lsn, wait_for_learning=True)
    assert learned_lsn(reply) >= lsn
    assert STALE not in reply.degradations
