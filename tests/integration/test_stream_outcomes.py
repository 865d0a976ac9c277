"""A stream of outcomes to the real server: results in order, refusals in place, and once whatever breaks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import grpc
import pytest

from tests.support import catalogs
from tests.support.running import Server, serving, told, until
from tests.support.wire import Refusal, Wire
from tsugi.client import Client, outcome
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.outcome_service_pb2 import (
    ReportOutcomeRequest,
    StreamReportOutcomesRequest,
    StreamReportOutcomesResponse,
)

pytestmark = pytest.mark.slow

METHOD: Final = "StreamReportOutcomes"
PATH: Final = f"/tsugi.v1.OutcomeService/{METHOD}"
SHORT: Final = {"serve_connection_age_ms_max": 300, "serve_connection_age_grace_ms": 100}
TIMEOUT_S: Final = 60.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        with server.client() as client:
            client.push_catalog(catalogs.message())
        yield server
        assert server.roles() == roles, "a role died"


@pytest.fixture
def client(running: Server) -> Iterator[Client]:
    for server in told(running):
        with server.client() as client:
            yield client


def clicks(client: Client, label: str, n: int) -> list[ReportOutcomeRequest]:
    """Decide once and return so many outcomes of it."""
    decision = client.decide({"greedy": 1}, durable=True)
    return [outcome(decision.decision_id, decision.slots[0].action, f"{label} {i}", "click") for i in range(n)]


def sent(outcomes: Iterable[ReportOutcomeRequest]) -> list[bytes]:
    return [StreamReportOutcomesRequest(outcome=each).SerializeToString() for each in outcomes]


def lsns(replies: Iterable[StreamReportOutcomesResponse]) -> list[int]:
    places = [reply.accepted.lsn for reply in replies]
    assert all(places), "one was refused"
    return places


def recorded(client: Client, outcomes: list[ReportOutcomeRequest]) -> list[int]:
    """Return the place of each outcome in the log; all are there."""
    results = [
        result
        for i in range(0, len(outcomes), 500)
        for result in client.batch_report_outcomes(outcomes[i : i + 500]).results
    ]
    assert all(result.accepted.duplicate for result in results)
    return [result.accepted.lsn for result in results]


def test_each_outcome_is_answered_in_order_and_counts_once(client: Client) -> None:
    outcomes = clicks(client, "ordered", 3_000)
    first = list(client.stream_report_outcomes(outcomes, timeout_s=TIMEOUT_S))
    assert not any(reply.accepted.duplicate for reply in first)
    assert len(set(lsns(first))) == 3_000
    assert recorded(client, outcomes) == lsns(first) == sorted(lsns(first))
    again = list(client.stream_report_outcomes(outcomes, timeout_s=TIMEOUT_S))
    assert all(reply.accepted.duplicate for reply in again)
    assert lsns(again) == lsns(first)


def test_result_comes_while_the_stream_is_open(client: Client) -> None:
    n_answered = 0
    outcomes = clicks(client, "conversation", 5)

    def conversation() -> Iterator[ReportOutcomeRequest]:
        for i, each in enumerate(outcomes):
            until(lambda i=i: n_answered == i, "the outcome before is answered")  # type: ignore[misc]  # i is bound
            yield each

    for _ in client.stream_report_outcomes(conversation(), timeout_s=TIMEOUT_S):
        n_answered += 1
    assert n_answered == 5


def test_bad_outcomes_are_refused_in_their_places_and_the_stream_goes_on(client: Client) -> None:
    good, other, twice = clicks(client, "beside", 3)
    unknown, unchosen, forged, reused = (ReportOutcomeRequest() for _ in range(4))
    for bad in (unknown, unchosen, forged):
        bad.CopyFrom(good)
    unknown.type = "applause"
    unchosen.action = "nothing of the kind"
    forged.decision_id = "A" * 56
    reused.CopyFrom(twice)
    reused.type = "order"
    given = [good, unknown, ReportOutcomeRequest(), unchosen, forged, other, twice, twice, reused]
    replies = list(client.stream_report_outcomes(given, timeout_s=TIMEOUT_S))
    assert ["" if each.HasField("accepted") else ErrorReason.Name(each.error.reason)[13:] for each in replies] == [
        "", "RESOURCE_NOT_FOUND", "FIELD_INVALID", "ACTION_NOT_IN_DECISION", "DECISION_ID_INVALID", "", "", "",
        "IDEMPOTENCY_KEY_REUSED",
    ]  # fmt: skip
    assert replies[2].error.metadata["field"] == "action"
    assert [each.accepted.duplicate for each in replies[5:8]] == [False, False, True]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"\xff\xff\xff\xff", "REQUEST_MALFORMED"),
        (sent([ReportOutcomeRequest(action="x" * 300_000)])[0], "LIMIT_EXCEEDED"),
    ],
)
def test_request_that_is_none_ends_the_stream_after_what_came_before_it(
    running: Server, client: Client, broken: bytes, reason: str
) -> None:
    outcomes = clicks(client, reason, 5)
    with Wire(running.address) as wire:
        replies, refusal = wire.exchange(METHOD, [*sent(outcomes[:3]), broken, *sent(outcomes[3:])])
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.domain) == (f"ERROR_REASON_{reason}", "tsugi")
    answered = lsns(map(StreamReportOutcomesResponse.FromString, replies))
    assert recorded(client, outcomes[:3])[: len(answered)] == answered


def test_stream_that_breaks_off_keeps_what_was_answered_and_the_rest_is_sent_again(
    running: Server, client: Client
) -> None:
    outcomes = clicks(client, "broken off", 1_000)
    with Wire(running.address) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        call = both(iter(sent(outcomes)), timeout=TIMEOUT_S)
        answered = [StreamReportOutcomesResponse.FromString(reply) for reply in islice(call, 40)]
        call.cancel()
    again = list(client.stream_report_outcomes(outcomes, timeout_s=TIMEOUT_S))
    assert lsns(again[:40]) == lsns(answered)
    assert all(reply.accepted.duplicate for reply in again[:40])
    assert len(set(lsns(again))) == 1_000


def test_stream_that_has_no_more_time_ends_and_keeps_what_was_answered(running: Server, client: Client) -> None:
    outcomes = clicks(client, "late", 1)
    is_over = threading.Event()

    def requests() -> Iterator[bytes]:
        yield from sent(outcomes)
        is_over.wait(TIMEOUT_S)

    with Wire(running.address) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        call = both(requests(), timeout=2.0)
        reply = StreamReportOutcomesResponse.FromString(next(call))
        with pytest.raises(grpc.RpcError):
            next(call)
        is_over.set()
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert recorded(client, outcomes) == [reply.accepted.lsn]


def test_caller_who_takes_no_results_is_not_read_without_bound(running: Server, client: Client) -> None:
    """The server holds 256 outcomes; beside them, some stand in the windows of the connection, not in its memory."""
    n_sent = 0
    data = StreamReportOutcomesRequest(outcome=ReportOutcomeRequest(action="x" * 4_000)).SerializeToString()
    n_whole = 20_000
    windows = ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)  # results are small, windows grow

    def requests() -> Iterator[bytes]:
        nonlocal n_sent
        for _ in range(n_whole):
            n_sent += 1
            yield data

    with Wire(running.address, *windows) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        call = both(requests(), timeout=TIMEOUT_S)
        next(call)
        n_before = 0
        while n_sent > n_before:  # other calls are the clock: while they are answered it could be read on
            n_before = n_sent
            for i in range(10):
                client.batch_report_outcomes(clicks(client, f"meanwhile {i}", 100))
        assert n_sent < n_whole / 4
        call.cancel()


def test_outcomes_count_once_over_connections_that_end_and_a_worker_that_drains(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with serving(tmp_path_factory.mktemp("draining"), **SHORT) as server, server.client() as client:
        client.push_catalog(catalogs.message())
        pid = server.roles()["worker-0"]
        outcomes = clicks(client, "draining", 100_000)
        n_given = 0

        def until_replaced() -> Iterator[ReportOutcomeRequest]:
            nonlocal n_given
            for n_given, each in enumerate(outcomes, 1):
                yield each
                if n_given % 100 == 0 and server.roles().get("worker-0", pid) != pid:
                    return

        replies = []
        with server.client_on("worker-0") as drained:
            for reply in drained.stream_report_outcomes(until_replaced(), timeout_s=2 * TIMEOUT_S):
                replies.append(reply)
                if len(replies) == 100:
                    os.kill(pid, signal.SIGTERM)
        assert len(replies) == n_given
        assert len(set(lsns(replies))) == n_given
        assert recorded(client, outcomes[:n_given]) == lsns(replies)
