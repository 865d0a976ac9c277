"""A stream of records to the real server: batches in, replies out in order, and what is left when it breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice

import grpc
import pytest

from tests.support import catalogs
from tests.support.running import Server, serving, told, until
from tests.support.wire import Refusal, Wire
from tsugi.client import Client, source_record
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.profile_service_pb2 import SourceRecord, StreamIngestRecordsRequest, StreamIngestRecordsResponse

pytestmark = pytest.mark.slow

METHOD = "StreamIngestRecords"
PATH = f"/tsugi.v1.ProfileService/{METHOD}"


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


@pytest.fixture
def wire(running: Server) -> Iterator[Wire]:
    for server in told(running):
        with Wire(server.address) as wire:
            yield wire


def batch(label: str, n: int, *, age: float = 30.0) -> list[SourceRecord]:
    return [
        source_record(f"{label}/{i}", "crm", {"customer_number": f"{label}/{i}"}, attributes={"age": age})
        for i in range(n)
    ]


def sent(batches: Sequence[Sequence[SourceRecord]]) -> list[bytes]:
    return [StreamIngestRecordsRequest(records=each).SerializeToString() for each in batches]


def lsns(reply: StreamIngestRecordsResponse) -> list[int]:
    assert all(result.HasField("accepted") for result in reply.results), reply
    return [result.accepted.lsn for result in reply.results]


def test_each_batch_is_answered_in_order_and_is_in_force_with_its_lsn(client: Client) -> None:
    batches = [batch(f"ordered {i}", 1 + i % 3) for i in range(30)]
    replies = list(client.stream_ingest_records(batches))
    assert [len(reply.results) for reply in replies] == [len(each) for each in batches]
    all_lsns = [lsn for reply in replies for lsn in lsns(reply)]
    assert len(set(all_lsns)) == len(all_lsns)
    for records, reply in zip(batches, replies, strict=True):
        assert reply.lsn == max(lsns(reply))
        again = client.ingest_records(records)  # says which record has which place
        assert [result.accepted.lsn for result in again.results] == lsns(reply)
        assert all(result.accepted.duplicate for result in again.results)
    last = replies[-1].lsn
    until(lambda: client.audit_sources(at_least_lsn=last).applied_lsn >= last, "the projector gets there")
    assert client.get_profile(identity=("customer_number", "ordered 29/0")).profile.profile_id


def test_reply_comes_while_the_stream_is_open(client: Client) -> None:
    n_answered = 0

    def batches() -> Iterator[list[SourceRecord]]:
        for i in range(3):
            until(lambda i=i: n_answered == i, "the batch before is answered")  # type: ignore[misc]  # i is bound
            yield batch(f"conversation {i}", 2)

    for _ in client.stream_ingest_records(batches()):
        n_answered += 1
    assert n_answered == 3


def test_twenty_batches_of_five_hundred_go_in_and_count_once(client: Client) -> None:
    batches = [batch(f"many {i}", 500) for i in range(20)]
    first = [lsn for reply in client.stream_ingest_records(batches) for lsn in lsns(reply)]
    assert len(set(first)) == 10_000
    again = list(client.stream_ingest_records(batches))
    assert [lsn for reply in again for lsn in lsns(reply)] == first
    assert all(result.accepted.duplicate for reply in again for result in reply.results)


def test_bad_records_are_refused_alone_and_the_stream_goes_on(client: Client) -> None:
    bad = source_record("bad", "crm", {"badge": "7"})
    worse = batch("worse", 1, age=-1.0)[0]
    strange = source_record("strange", "rumours", {"customer_number": "7"})
    batches = [[bad, *batch("beside", 1)], [worse], [], [*batch("after", 1), strange]]
    replies = list(client.stream_ingest_records(batches))
    told_of = [
        ["" if each.HasField("accepted") else ErrorReason.Name(each.error.reason)[13:] for each in reply.results]
        for reply in replies
    ]
    assert told_of == [["RESOURCE_NOT_FOUND", ""], ["FIELD_INVALID"], [], ["", "SOURCE_NOT_ALLOWED"]]
    assert replies[0].results[0].error.metadata["field"] == "identities[0].namespace"
    assert [bool(reply.lsn) for reply in replies] == [True, False, False, True]


def test_record_twice_in_a_stream_counts_once_and_another_under_its_id_is_refused(client: Client) -> None:
    (record,) = batch("twice", 1)
    (other,) = batch("twice", 1, age=31.0)
    first, again, refused = (
        result for reply in client.stream_ingest_records([[record, record], [other]]) for result in reply.results
    )
    assert {first.accepted.duplicate, again.accepted.duplicate} == {False, True}
    assert first.accepted.lsn == again.accepted.lsn
    assert refused.error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"\xff\xff\xff\xff", "REQUEST_MALFORMED"),
        (StreamIngestRecordsRequest(records=batch("one too many", 501)).SerializeToString(), "LIMIT_EXCEEDED"),
    ],
)
def test_request_that_is_none_ends_the_stream_and_keeps_what_was_answered(
    wire: Wire, client: Client, broken: bytes, reason: str
) -> None:
    good = [batch(f"before {reason} {i}", 3) for i in range(3)]
    replies, refusal = wire.exchange(METHOD, [*sent(good), broken, *sent([batch(f"behind {reason}", 1)])])
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.domain) == (f"ERROR_REASON_{reason}", "tsugi")
    answered = [StreamIngestRecordsResponse.FromString(reply) for reply in replies]
    for records, reply in zip(good, answered, strict=False):
        again = client.ingest_records(records)
        assert [(each.accepted.lsn, each.accepted.duplicate) for each in again.results] == [
            (lsn, True) for lsn in lsns(reply)
        ]


def test_stream_that_breaks_off_keeps_what_was_answered_and_the_rest_is_sent_again(running: Server) -> None:
    batches = [batch(f"broken off {i}", 50) for i in range(12)]
    with Wire(running.address) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        call = both(iter(sent(batches)), timeout=60)
        answered = [StreamIngestRecordsResponse.FromString(reply) for reply in islice(call, 5)]
        call.cancel()
    with running.client() as client:
        again = list(client.stream_ingest_records(batches))
    assert len(again) == len(batches)
    for before, after in zip(answered, again, strict=False):
        assert lsns(after) == lsns(before)
        assert all(result.accepted.duplicate for result in after.results)
    assert len({lsn for reply in again for lsn in lsns(reply)}) == 600


def test_caller_who_goes_without_a_word_takes_no_worker_along(running: Server) -> None:
    go = threading.Event()

    def endless() -> Iterator[bytes]:
        yield from sent([batch("gone", 5)])
        go.wait(60)

    with Wire(running.address) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        reply = StreamIngestRecordsResponse.FromString(next(both(endless(), timeout=60)))
    go.set()
    with running.client() as client:
        again = client.ingest_records(batch("gone", 5))
    assert [result.accepted.lsn for result in again.results] == lsns(reply)


def test_caller_who_takes_no_replies_is_not_read_without_bound(running: Server, client: Client) -> None:
    """The server holds four requests; beside them, some stand in the windows of the connection, not in its memory."""
    n_sent = 0
    records = [source_record("x" * 100 + str(i), "unknown", {"customer_number": "x" * 200}) for i in range(500)]
    (data,) = sent([records])
    n_whole = 2_000
    assert len(data) > 100_000

    def requests() -> Iterator[bytes]:
        nonlocal n_sent
        for _ in range(n_whole):
            n_sent += 1
            yield data

    with Wire(running.address) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        call = both(requests(), timeout=60)
        next(call)
        n_before = 0
        while n_sent > n_before:  # other calls are the clock: while they are answered it could be read on
            n_before = n_sent
            for i in range(10):
                client.ingest_records(batch(f"meanwhile {i}", 100))
        assert n_sent < n_whole / 4
        call.cancel()


def test_slow_caller_slows_nobody_else(running: Server, client: Client) -> None:
    with Wire(running.address) as wire:
        both: grpc.StreamStreamMultiCallable[bytes, bytes] = wire.channel.stream_stream(PATH)
        call = both(iter(sent([batch(f"slow {i}", 100) for i in range(20)])), timeout=60)
        next(call)
        replies = list(client.stream_ingest_records([batch(f"quick {i}", 100) for i in range(20)]))
        assert len(replies) == 20
        assert len(list(call)) == 19, "and gets its own in the end"
