"""Many decisions in one call, and "no, the next please" in one: against the real server, over its workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import grpc
import pytest

from tests.integration.test_policies import CATALOG, Pair, actions, say
from tests.support.running import Server, serving, told, until
from tests.support.wire import Refusal, Wire
from tsugi.client import Client, consent, decide_request, outcome
from tsugi.v1.decision_pb2 import RefusalReason
from tsugi.v1.decision_service_pb2 import (
    BatchDecideResponse,
    DecideRequest,
    StreamDecideRequest,
    StreamDecideResponse,
)
from tsugi.v1.error_reason_pb2 import ErrorReason

pytestmark = pytest.mark.slow

STREAM = "/tsugi.v1.DecisionService/StreamDecide"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        with server.client() as client:
            client.push_catalog(CATALOG)
        yield server
        assert server.roles() == roles, "a role died"


@pytest.fixture
def client(running: Server) -> Iterator[Client]:
    for server in told(running):
        with server.client() as client:
            yield client


@pytest.fixture(scope="module")
def both(running: Server) -> Iterator[list[Client]]:
    """One client for each worker."""
    with running.client_on("worker-0") as first, running.client_on("worker-1") as second:
        yield [first, second]


def customer(name: str) -> list[Pair]:
    return [("customer_number", name)]


def asked(name: str, placement: str = "page", n: int = 1, request_id: str = "") -> DecideRequest:
    return decide_request({placement: n}, identities=customer(name), request_id=request_id)


def fates(reply: BatchDecideResponse) -> list[str]:
    return [ErrorReason.Name(each.error.reason)[13:] if each.HasField("error") else "decided" for each in reply.results]


def test_five_hundred_are_decided_in_order_and_the_same_batch_again_is_answered_alike(client: Client) -> None:
    batch = [asked(f"batch {i}", n=1 + i % 3, request_id=f"batch {i}") for i in range(500)]
    first = client.batch_decide(batch, timeout_s=20)
    assert fates(first) == ["decided"] * 500
    assert [len(each.decision.slots) for each in first.results] == [1 + i % 3 for i in range(500)]
    last = first.results[-1].decision
    until(lambda: client.report_outcome(last.decision_id, last.slots[0].action, "o", "click").lsn, "it is on record")
    assert client.batch_decide(batch, timeout_s=20) == first


def test_wrong_requests_of_a_batch_are_refused_alone(client: Client) -> None:
    reply = client.batch_decide([asked("a"), asked("b", "nowhere"), asked("c", n=9), DecideRequest(), asked("d")])
    assert fates(reply) == ["decided", "RESOURCE_NOT_FOUND", "LIMIT_EXCEEDED", "FIELD_INVALID", "decided"]
    assert reply.results[1].error.metadata["field"] == "placements[0].placement"


def test_strict_cap_holds_within_a_batch_and_over_batches_at_once(both: list[Client]) -> None:
    with_cap = [asked("strictly one", "wall") for _ in range(50)]
    streams = [both[i % 2].stream_decide(with_cap, timeout_s=20) for i in range(2)]
    replies = [both[0].batch_decide(with_cap, timeout_s=20)]
    chosen = Counter(each.decision.slots[0].action for reply in replies for each in reply.results)
    chosen += Counter(reply.decision.slots[0].action for stream in streams for reply in stream)
    assert chosen == {"prize": 1, "nothing": 149}


def test_stream_answers_each_request_in_order_and_goes_on_after_a_refusal(client: Client) -> None:
    requests = (asked(f"stream {i}", n=1 + i % 4) for i in range(1_000))
    replies = list(client.stream_decide(requests, timeout_s=30))
    assert len(replies) == 1_000
    for i, reply in enumerate(replies):
        if i % 4 == 3:
            assert reply.error.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
        else:
            assert len(reply.decision.slots) == 1 + i % 4


def test_decision_comes_while_the_stream_is_open(client: Client) -> None:
    n_answered = 0

    def requests() -> Iterator[DecideRequest]:
        for i in range(5):
            until(lambda i=i: n_answered == i, "the request before is answered")  # type: ignore[misc]  # i is bound
            yield asked(f"conversation {i}")

    for _ in client.stream_decide(requests(), timeout_s=30):
        n_answered += 1
    assert n_answered == 5


def test_request_that_is_none_ends_the_stream_and_keeps_what_was_answered(running: Server) -> None:
    good = [StreamDecideRequest(request=asked(f"before {i}")).SerializeToString() for i in range(3)]
    with Wire(running.address) as wire:
        replies, refusal = wire.exchange("StreamDecide", [*good, b"\xff\xff\xff\xff", *good])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "ERROR_REASON_REQUEST_MALFORMED"
    assert all(StreamDecideResponse.FromString(reply).HasField("decision") for reply in replies)


def test_caller_who_takes_no_decisions_is_not_read_without_bound(running: Server, client: Client) -> None:
    """The server holds 64 requests; beside them, some stand in the windows of the connection, not in its memory."""
    n_sent = 0
    request = decide_request({"page": 3}, identities=customer("x"), excluded_actions=["loan"] * 300)
    data = StreamDecideRequest(request=request).SerializeToString()
    n_whole = 20_000
    windows = ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)  # replies are small, windows grow

    def requests() -> Iterator[bytes]:
        nonlocal n_sent
        for _ in range(n_whole):
            n_sent += 1
            yield data

    with Wire(running.address, *windows) as wire:
        many: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(STREAM)
        call = many(requests(), timeout=60)
        next(call)
        n_before = 0
        while n_sent > n_before:  # other calls are the clock: while they are answered it could be read on
            n_before = n_sent
            for i in range(200):
                client.decide({"page": 1}, identities=customer(f"meanwhile {i}"))
        assert n_sent < n_whole / 4
        call.cancel()


def test_stream_that_breaks_off_is_asked_again_and_decides_nobody_twice(client: Client) -> None:
    requests = [asked(f"broken off {i}", request_id=f"broken off {i}") for i in range(300)]
    answered = list(islice(client.stream_decide(requests, timeout_s=30), 40))
    again = list(client.stream_decide(requests, timeout_s=30))
    assert [reply.decision.decision_id for reply in again[:40]] == [reply.decision.decision_id for reply in answered]
    assert len({reply.decision.decision_id for reply in again}) == 300


@pytest.mark.parametrize("durable", [True, False])
def test_no_and_the_next_in_one_call_on_whichever_channel_and_worker(both: list[Client], durable: bool) -> None:
    for i in range(20):
        who = ("customer_number", f"says no {i} {durable}")
        lsn = say(both[0], who, consents=[consent("marketing", granted=True)])
        until(lambda lsn=lsn: both[0].count_people(at_least_lsn=lsn).applied_lsn >= lsn, "their consent is known")  # type: ignore[misc]  # bound
        first = both[0].decide({"page": 1}, identities=[who], at_least_lsn=lsn, durable=durable)
        assert actions(first) == ["loan"]
        rejected = outcome(first.decision_id, "loan", "no", "dismiss")
        placement = ("page", "agent")[i % 2]
        following = both[i // 2 % 2].decide({placement: 1}, identities=[who], outcomes=[rejected], durable=True)
        assert actions(following) == ["weather"], "the rejected one is out, and what is of its group"
        told_of = both[0].get_decision(following.decision_id, explained=True).explanation
        fate = {each.action: (each.refusal_reason, each.refused_by) for each in told_of.candidates}
        assert fate["loan"] == (RefusalReason.REFUSAL_REASON_EXCLUDED, "outcomes")
        assert fate["card"] == (RefusalReason.REFUSAL_REASON_COOL_OFF, "no_means_no: money")
        if durable:  # otherwise the first decision may come into the log behind the following one
            later = both[0].decide({"page": 3}, identities=[who], at_least_lsn=following.lsn)
            assert actions(later) == ["weather"], "and stay out"
