"""The typed caller against a scripted server on loopback: what is repeated, where calls go, how refusals arrive."""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tsugi.client import CallError, Client, decide_request, outcome, source_record
from tsugi.unanswered import UNANSWERED_MAX
from tsugi.v1 import (
    catalog_service_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    profile_service_pb2,
)
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.outcome_service_pb2 import (
    ReportOutcomeRequest,
    ReportOutcomeResponse,
    StreamReportOutcomesRequest,
    StreamReportOutcomesResponse,
)

ANNA, BERTA = ("customer_number", "a"), ("email", "b@example.com")
ANNA_IDENTITY, BERTA_IDENTITY = (Identity(namespace=name, value=value) for name, value in (ANNA, BERTA))

Behaviour = Callable[[int, grpc.ServicerContext], decision_service_pb2.DecideResponse]


class _Decisions(decision_service_pb2_grpc.DecisionServiceServicer):
    """Answers the n-th attempt, from 0, as its script says."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.attempts = 0

    def Decide(  # noqa: N802  # the method's name in the API
        self, request: decision_service_pb2.DecideRequest, context: grpc.ServicerContext
    ) -> decision_service_pb2.DecideResponse:
        self.attempts += 1
        return self.behaviour(self.attempts - 1, context)

    def BatchDecide(  # noqa: N802  # the method's name in the API
        self, request: decision_service_pb2.BatchDecideRequest, context: grpc.ServicerContext
    ) -> decision_service_pb2.BatchDecideResponse:
        self.attempts += 1
        decision = self.behaviour(self.attempts - 1, context)
        results = [decision_service_pb2.DecideResult(decision=decision) for _ in request.requests]
        return decision_service_pb2.BatchDecideResponse(results=results)

    def StreamDecide(  # noqa: N802  # the method's name in the API
        self, request_iterator: Iterator[decision_service_pb2.StreamDecideRequest], context: grpc.ServicerContext
    ) -> Iterator[decision_service_pb2.StreamDecideResponse]:
        for part in request_iterator:
            self.attempts += 1
            decision = self.behaviour(self.attempts - 1, context)
            decision.catalog_revision = part.request.request_id
            yield decision_service_pb2.StreamDecideResponse(decision=decision)

    def GetDecision(  # noqa: N802  # the method's name in the API
        self, request: decision_service_pb2.GetDecisionRequest, context: grpc.ServicerContext
    ) -> decision_service_pb2.GetDecisionResponse:
        view = decision_service_pb2.DecisionView.Name(request.view)
        return decision_service_pb2.GetDecisionResponse(catalog_revision=f"{request.decision_id} {view}")

    def SubscribeTriggers(  # noqa: N802  # the method's name in the API
        self, request: decision_service_pb2.SubscribeTriggersRequest, context: grpc.ServicerContext
    ) -> Iterator[decision_service_pb2.SubscribeTriggersResponse]:
        raise NotImplementedError("those who need it say what it answers")


@contextmanager
def serving(
    behaviour: Behaviour, address: str = "127.0.0.1:0", others: Sequence[grpc.GenericRpcHandler] = ()
) -> Iterator[tuple[_Decisions, str]]:
    server = grpc.server(ThreadPoolExecutor(8))
    decisions = _Decisions(behaviour)
    decision_service_pb2_grpc.add_DecisionServiceServicer_to_server(decisions, server)
    server.add_generic_rpc_handlers(others)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield decisions, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def answer_with_peer(_: int, context: grpc.ServicerContext) -> decision_service_pb2.DecideResponse:
    return decision_service_pb2.DecideResponse(decision_id=context.peer())


def unavailable_twice(attempt: int, context: grpc.ServicerContext) -> decision_service_pb2.DecideResponse:
    if attempt < 2:
        context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
    return decision_service_pb2.DecideResponse(decision_id=f"attempt {attempt}")


def test_recorded_decision_is_asked_for_as_it_is_named() -> None:
    with serving(answer_with_peer) as (decisions, address), Client(address, timeout_s=10) as client:
        assert client.get_decision("d", explained=True).catalog_revision == "d DECISION_VIEW_EXPLAINED"
        assert client.get_decision("d").catalog_revision == "d DECISION_VIEW_BASIC"
        assert decisions.attempts == 0


def test_decide_with_request_id_is_repeated_until_it_is_answered() -> None:
    with serving(unavailable_twice) as (decisions, address), Client(address, timeout_s=10) as client:
        assert client.decide({"home_banner": 1}, request_id="r1").decision_id == "attempt 2"
        assert decisions.attempts == 3


def test_decide_without_request_id_is_not_repeated_once_the_server_saw_it() -> None:
    with serving(unavailable_twice) as (decisions, address), Client(address, timeout_s=10) as client:
        with pytest.raises(CallError) as refusal:
            client.decide({"home_banner": 1})
        assert (refusal.value.code, decisions.attempts) == (grpc.StatusCode.UNAVAILABLE, 1)


def test_batch_is_repeated_when_all_of_it_has_request_ids_and_only_then() -> None:
    known, unknown = decide_request({"home_banner": 1}, request_id="r1"), decide_request({"home_banner": 1})
    with serving(unavailable_twice) as (decisions, address), Client(address, timeout_s=10) as client:
        reply = client.batch_decide([known, known])
        assert [each.decision.decision_id for each in reply.results] == ["attempt 2", "attempt 2"]
        decisions.attempts = 0
        with pytest.raises(CallError):
            client.batch_decide([known, unknown])
        assert decisions.attempts == 1


def test_decisions_of_a_stream_come_as_they_are_asked_for_and_it_is_not_repeated() -> None:
    requests = [decide_request({"home_banner": 1}, request_id=f"r{i}") for i in range(5)]
    with serving(answer_with_peer) as (_, address), Client(address, timeout_s=10) as client:
        replies = client.stream_decide(requests)
        assert [reply.decision.catalog_revision for reply in replies] == [f"r{i}" for i in range(5)]
    with serving(unavailable_twice) as (decisions, address), Client(address, timeout_s=10) as client:
        with pytest.raises(CallError) as refusal:
            list(client.stream_decide(requests))
        assert (refusal.value.code, decisions.attempts) == (grpc.StatusCode.UNAVAILABLE, 1)


def test_channels_are_connections_of_their_own_and_calls_take_turns() -> None:
    with serving(answer_with_peer) as (_, address), Client(address, timeout_s=10, channels=3) as client:
        turns = [client.decide({"home_banner": 1}).decision_id for _ in range(6)]
        assert len(set(turns)) == 3
        assert turns[:3] == turns[3:]


def test_repeated_and_unrepeated_calls_share_the_connection_of_their_channel() -> None:
    with serving(answer_with_peer) as (_, address), Client(address, timeout_s=10) as client:
        unrepeated = client.decide({"home_banner": 1}).decision_id
        assert client.decide({"home_banner": 1}, request_id="r1").decision_id == unrepeated


def test_two_clients_share_no_connection() -> None:
    with serving(answer_with_peer) as (_, address), Client(address) as first, Client(address) as second:
        assert first.decide({"home_banner": 1}).decision_id != second.decide({"home_banner": 1}).decision_id


def test_refusal_arrives_with_reason_metadata_and_every_violation() -> None:
    def refuse(_: int, context: grpc.ServicerContext) -> decision_service_pb2.DecideResponse:
        status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="two fields are wrong")
        details = (
            error_details_pb2.ErrorInfo(
                reason="ERROR_REASON_FIELD_INVALID", domain="tsugi", metadata={"field": "context.hour"}
            ),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field="context.hour", description="a number"),
                    error_details_pb2.BadRequest.FieldViolation(field="placements", description="not empty"),
                ]
            ),
            error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000)),
        )
        for detail in details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))

    with serving(refuse) as (_, address), Client(address, timeout_s=10) as client:
        with pytest.raises(CallError) as refusal:
            client.decide({"home_banner": 1}, request_id="r1")
        assert refusal.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.value.reason == "ERROR_REASON_FIELD_INVALID"
        assert refusal.value.message == "two fields are wrong"
        assert refusal.value.metadata == {"field": "context.hour"}
        assert refusal.value.violations == [("context.hour", "a number"), ("placements", "not empty")]
        assert refusal.value.retry_delay_s == 0.25

        answers: queue.SimpleQueue[decision_service_pb2.DecideResponse | CallError] = queue.SimpleQueue()
        client.decide_then(answers.put, {"home_banner": 1})
        late_refusal = answers.get(timeout=10)
        assert isinstance(late_refusal, CallError)
        assert late_refusal.violations == refusal.value.violations


def test_status_of_the_library_has_a_code_and_no_reason() -> None:
    with serving(answer_with_peer) as (_, address), Client(address, timeout_s=10) as client:
        with pytest.raises(CallError) as refusal:
            client.get_catalog()  # this server has no such service
        assert (refusal.value.code, refusal.value.reason) == (grpc.StatusCode.UNIMPLEMENTED, "")


def test_call_waits_for_a_server_that_is_starting() -> None:
    with serving(answer_with_peer) as (_, address):
        pass  # leaves a free port behind
    with Client(address, timeout_s=10) as client:
        answers: queue.SimpleQueue[decision_service_pb2.DecideResponse | CallError] = queue.SimpleQueue()
        client.decide_then(answers.put, {"home_banner": 1})
        assert answers.empty()
        with serving(answer_with_peer, address):
            reply = answers.get(timeout=10)
        assert isinstance(reply, decision_service_pb2.DecideResponse)
        assert reply.decision_id


def test_call_without_a_server_ends_at_its_deadline() -> None:
    with serving(answer_with_peer) as (_, address):
        pass
    with Client(address) as client, pytest.raises(CallError) as refusal:
        client.decide({"home_banner": 1}, timeout_s=0.05)
    assert refusal.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_pushed_catalog_arrives_whole() -> None:
    def take(
        parts: Iterator[catalog_service_pb2.PushCatalogRequest], _: grpc.ServicerContext
    ) -> catalog_service_pb2.PushCatalogResponse:
        _header, *chunks = parts
        data = b"".join(part.chunk for part in chunks)
        return catalog_service_pb2.PushCatalogResponse(revision=hashlib.sha256(data).hexdigest())

    handler = grpc.stream_unary_rpc_method_handler(
        take,
        request_deserializer=catalog_service_pb2.PushCatalogRequest.FromString,
        response_serializer=catalog_service_pb2.PushCatalogResponse.SerializeToString,
    )
    catalogs = grpc.method_handlers_generic_handler("tsugi.v1.CatalogService", {"PushCatalog": handler})
    catalog = Catalog(name="n" * 300_000)
    with serving(answer_with_peer, others=[catalogs]) as (_, address), Client(address, timeout_s=10) as client:
        revision = client.push_catalog(catalog, request_id="r1").revision
    assert revision == hashlib.sha256(catalog.SerializeToString(deterministic=True)).hexdigest()


ABOUT_PEOPLE: list[tuple[str, Callable[[Client], object], Message]] = [
    (
        "GetProfile",
        lambda client: client.get_profile(identity=ANNA, at_least_lsn=7, timeline_page_size=9, timeline_page_token="t"),
        profile_service_pb2.GetProfileRequest(
            identity=ANNA_IDENTITY, at_least_lsn=7, timeline_page_size=9, timeline_page_token="t"
        ),
    ),
    (
        "GetProfile",
        lambda client: client.get_profile(profile_id="0f"),
        profile_service_pb2.GetProfileRequest(profile_id="0f"),
    ),
    (
        "ResolveIdentity",
        lambda client: client.resolve_identity([ANNA, BERTA], at_least_lsn=7),
        profile_service_pb2.ResolveIdentityRequest(identities=[ANNA_IDENTITY, BERTA_IDENTITY], at_least_lsn=7),
    ),
    (
        "LinkIdentities",
        lambda client: client.link_identities(
            ANNA, BERTA, profile_service_pb2.LINK_VERDICT_PROPOSED, weight=9.5, stated_by="clerk", request_id="r"
        ),
        profile_service_pb2.LinkIdentitiesRequest(
            identity=ANNA_IDENTITY,
            other_identity=BERTA_IDENTITY,
            verdict=profile_service_pb2.LINK_VERDICT_PROPOSED,
            weight=9.5,
            stated_by="clerk",
            request_id="r",
        ),
    ),
    (
        "SplitProfile",
        lambda client: client.split_profile("0f", [BERTA], stated_by="clerk", request_id="r", validate_only=True),
        profile_service_pb2.SplitProfileRequest(
            profile_id="0f", identities=[BERTA_IDENTITY], stated_by="clerk", request_id="r", validate_only=True
        ),
    ),
    (
        "ListMatchReviews",
        lambda client: client.list_match_reviews(page_size=3, page_token="t"),
        profile_service_pb2.ListMatchReviewsRequest(page_size=3, page_token="t"),
    ),
    (
        "ExportProfile",
        lambda client: client.export_profile(identity=ANNA, at_least_lsn=7),
        profile_service_pb2.ExportProfileRequest(identity=ANNA_IDENTITY, at_least_lsn=7),
    ),
    (
        "EraseProfile",
        lambda client: client.erase_profile("r", profile_id="0f"),
        profile_service_pb2.EraseProfileRequest(profile_id="0f", request_id="r"),
    ),
    (
        "GetErasure",
        lambda client: client.get_erasure("e"),
        profile_service_pb2.GetErasureRequest(erasure_id="e"),
    ),
    (
        "AuditSources",
        lambda client: client.audit_sources(at_least_lsn=7),
        profile_service_pb2.AuditSourcesRequest(at_least_lsn=7),
    ),
    (
        "CountPeople",
        lambda client: client.count_people(at_least_lsn=7),
        profile_service_pb2.CountPeopleRequest(at_least_lsn=7),
    ),
    (
        "ListProfiles",
        lambda client: client.list_profiles("vip", page_size=3, page_token="0f"),
        profile_service_pb2.ListProfilesRequest(segment="vip", page_size=3, page_token="0f"),
    ),
]


def test_calls_about_people_carry_exactly_what_was_said() -> None:
    asked: list[bytes] = []

    def take(request: bytes, _: grpc.ServicerContext) -> bytes:
        asked.append(request)
        return b""

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        method: grpc.unary_unary_rpc_method_handler(take) for method, *_ in ABOUT_PEOPLE
    }
    people = grpc.method_handlers_generic_handler("tsugi.v1.ProfileService", handlers)
    with serving(answer_with_peer, others=[people]) as (_, address), Client(address, timeout_s=10) as client:
        for _, call, wanted in ABOUT_PEOPLE:
            call(client)
            assert type(wanted).FromString(asked.pop()) == wanted


@contextmanager
def streaming(
    answer: Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]],
) -> Iterator[Client]:
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(answer)
    people = grpc.method_handlers_generic_handler("tsugi.v1.ProfileService", {"StreamIngestRecords": handler})
    with serving(answer_with_peer, others=[people]) as (_, address), Client(address, timeout_s=10) as client:
        yield client


def test_batches_of_a_stream_arrive_whole_and_replies_come_as_they_are_given() -> None:
    def answer(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            records = profile_service_pb2.StreamIngestRecordsRequest.FromString(request).records
            lsn = max(int(record.record_id) for record in records)
            yield profile_service_pb2.StreamIngestRecordsResponse(lsn=lsn).SerializeToString()

    with streaming(answer) as client:
        batches = ([source_record(str(i), "crm", [ANNA]) for i in range(n)] for n in (3, 1, 2))
        assert [reply.lsn for reply in client.stream_ingest_records(batches)] == [2, 0, 1]


def test_stream_that_breaks_gives_what_was_answered_and_then_the_error() -> None:
    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield b""
        context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    with streaming(answer) as client:
        replies = client.stream_ingest_records([[source_record(str(i), "crm", [ANNA])] for i in range(3)])
        assert next(replies) == profile_service_pb2.StreamIngestRecordsResponse()
        with pytest.raises(CallError) as refusal:
            next(replies)
        assert refusal.value.code is grpc.StatusCode.UNAVAILABLE


def test_stream_that_its_reader_leaves_is_cancelled_at_the_server() -> None:
    is_over = threading.Event()

    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(is_over.set)
        for _ in requests:
            yield b""

    with streaming(answer) as client:
        for _ in client.stream_ingest_records(iter([source_record("1", "crm", [ANNA])]) for _ in itertools.count()):
            break
        assert is_over.wait(10)


Reporting = Callable[[int, Iterator[str], grpc.ServicerContext], Iterator[int]]


@contextmanager
def reporting(answer: Reporting) -> Iterator[Client]:
    """Give a client of a server that answers the n-th stream of outcomes, from 0: outcome ids in, LSNs out."""
    turns = itertools.count()

    def report(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        ids = (StreamReportOutcomesRequest.FromString(each).outcome.outcome_id for each in requests)
        for lsn in answer(next(turns), ids, context):
            yield StreamReportOutcomesResponse(accepted=ReportOutcomeResponse(lsn=lsn)).SerializeToString()

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(report)
    outcomes = grpc.method_handlers_generic_handler("tsugi.v1.OutcomeService", {"StreamReportOutcomes": handler})
    with serving(answer_with_peer, others=[outcomes]) as (_, address), Client(address, timeout_s=10) as client:
        yield client


def numbered(n: int) -> Iterator[ReportOutcomeRequest]:
    return (outcome("d", "a", str(i), "click") for i in range(n))


def test_outcomes_that_were_not_answered_are_sent_again_when_the_server_ends_the_stream() -> None:
    heard: list[list[str]] = []

    def answer(turn: int, ids: Iterator[str], context: grpc.ServicerContext) -> Iterator[int]:
        heard.append([])
        for outcome_id in ids:
            heard[turn].append(outcome_id)
            if turn < 2 and len(heard[turn]) == 4:
                context.abort((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)[turn], "draining")
            yield int(outcome_id)

    with reporting(answer) as client:
        replies = client.stream_report_outcomes(numbered(20), timeout_s=20)
        assert [reply.accepted.lsn for reply in replies] == list(range(20))
    assert heard[0] == ["0", "1", "2", "3"]
    first_again = int(heard[1][0])
    assert first_again <= 3, "what was answered, and may not have come through"
    assert heard[2][-1] == "19"


def test_broken_stream_goes_on_while_the_caller_is_still_asked_for_an_outcome() -> None:
    is_second, is_asked = threading.Event(), threading.Event()

    def answer(turn: int, ids: Iterator[str], context: grpc.ServicerContext) -> Iterator[int]:
        if turn:
            is_second.set()
        for outcome_id in ids:
            yield int(outcome_id)
            if not turn:
                assert is_asked.wait(10)
                context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    def outcomes() -> Iterator[ReportOutcomeRequest]:
        first, second, third = numbered(3)
        yield first
        is_asked.set()
        assert is_second.wait(10), "asked on the thread of the first call, which has ended"
        yield second
        yield third

    with reporting(answer) as client:
        replies = client.stream_report_outcomes(outcomes(), timeout_s=20)
        assert [reply.accepted.lsn for reply in replies] == [0, 1, 2]


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_refused_stream_of_outcomes_is_not_repeated(code: grpc.StatusCode) -> None:
    turns = []

    def answer(turn: int, ids: Iterator[str], context: grpc.ServicerContext) -> Iterator[int]:
        turns.append(turn)
        yield int(next(ids))
        context.abort(code, "no")

    with reporting(answer) as client:
        replies = client.stream_report_outcomes(numbered(3))
        with pytest.raises(CallError) as refusal:
            list(replies)
    assert (refusal.value.code, turns) == (code, [0])


def test_stream_of_outcomes_is_not_gone_on_with_beyond_its_time() -> None:
    def answer(_turn: int, ids: Iterator[str], context: grpc.ServicerContext) -> Iterator[int]:
        for _ in ids:
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        yield 0

    with reporting(answer) as client, pytest.raises(CallError) as refusal:
        list(client.stream_report_outcomes(numbered(3), timeout_s=0.5))
    assert refusal.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_callers_own_failure_ends_the_stream_of_outcomes() -> None:
    def outcomes() -> Iterator[ReportOutcomeRequest]:
        yield from numbered(1)
        raise RuntimeError("the file cannot be read")

    with reporting(lambda _turn, ids, _context: map(int, ids)) as client, pytest.raises(CallError) as refusal:
        list(client.stream_report_outcomes(outcomes(), timeout_s=20))
    assert refusal.value.code is grpc.StatusCode.UNKNOWN


def test_no_more_outcomes_are_asked_for_than_may_be_unanswered() -> None:
    n_asked = 0
    go = threading.Event()

    def answer(_turn: int, ids: Iterator[str], _context: grpc.ServicerContext) -> Iterator[int]:
        heard = [next(ids) for _ in range(UNANSWERED_MAX)]  # all that may be sent without an answer
        go.set()
        yield from map(int, heard)
        yield from map(int, ids)

    def outcomes() -> Iterator[ReportOutcomeRequest]:
        nonlocal n_asked
        for each in numbered(3 * UNANSWERED_MAX):
            assert go.is_set() or n_asked < UNANSWERED_MAX
            n_asked += 1
            yield each

    with reporting(answer) as client:
        replies = list(client.stream_report_outcomes(outcomes(), timeout_s=30))
    assert [reply.accepted.lsn for reply in replies] == list(range(3 * UNANSWERED_MAX))


def subscribing(
    answer: Callable[[decision_service_pb2.SubscribeTriggersRequest, int, grpc.ServicerContext], Iterator[int]],
) -> AbstractContextManager[Client]:
    """Give a client of a server that answers the n-th subscription, from 0, with messages of these LSNs."""
    turns = itertools.count()

    class Script(_Decisions):
        def SubscribeTriggers(  # noqa: N802  # the method's name in the API
            self, request: decision_service_pb2.SubscribeTriggersRequest, context: grpc.ServicerContext
        ) -> Iterator[decision_service_pb2.SubscribeTriggersResponse]:
            for lsn in answer(request, next(turns), context):
                yield decision_service_pb2.SubscribeTriggersResponse(lsn=lsn)

    @contextmanager
    def give() -> Iterator[Client]:
        server = grpc.server(ThreadPoolExecutor(8))
        decision_service_pb2_grpc.add_DecisionServiceServicer_to_server(Script(answer_with_peer), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with Client(f"127.0.0.1:{port}") as client:
                yield client
        finally:
            server.stop(None).wait()

    return give()


def test_subscription_that_breaks_goes_on_after_what_was_dealt_with_over_another_connection() -> None:
    asked: list[decision_service_pb2.SubscribeTriggersRequest] = []
    peers: set[str] = set()

    def answer(
        request: decision_service_pb2.SubscribeTriggersRequest, turn: int, context: grpc.ServicerContext
    ) -> Iterator[int]:
        asked.append(request)
        peers.add(context.peer())
        yield from ((5, 7), (9,), (11,))[turn]
        if turn < 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    with subscribing(answer) as client:
        delay = timedelta(minutes=30)
        messages = client.subscribe_triggers(
            "carts", "cart", {"push": 2}, filter="true", delay=delay, context={"hour": 5.0}, timeout_s=20
        )
        assert [next(messages).lsn for _ in range(4)] == [5, 7, 9, 11]
    assert [request.after_lsn for request in asked] == [0, 7, 9]
    assert len(peers) == 3
    first = asked[0]
    assert (first.name, first.event_type, first.filter) == ("carts", "cart", "true")
    assert first.delay.ToTimedelta() == delay
    assert first.context["hour"].number_value == 5
    assert [(each.placement, each.count) for each in first.placements] == [("push", 2)]


def test_subscription_that_is_refused_or_out_of_time_raises() -> None:
    def answer(
        _: decision_service_pb2.SubscribeTriggersRequest, turn: int, context: grpc.ServicerContext
    ) -> Iterator[int]:
        yield 5
        if turn == 0:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        is_over = threading.Event()
        context.add_callback(is_over.set)
        is_over.wait(10)

    with subscribing(answer) as client:
        for timeout_s, code in ((20.0, "RESOURCE_EXHAUSTED"), (0.1, "DEADLINE_EXCEEDED")):
            messages = client.subscribe_triggers("carts", "cart", {"push": 1}, timeout_s=timeout_s)
            assert next(messages).lsn == 5
            with pytest.raises(CallError) as refusal:
                next(messages)
            assert refusal.value.code.name == code


def test_client_that_is_closed_ends_its_subscriptions() -> None:
    def answer(
        _: decision_service_pb2.SubscribeTriggersRequest, __: int, context: grpc.ServicerContext
    ) -> Iterator[int]:
        is_over = threading.Event()
        context.add_callback(is_over.set)
        yield 5
        is_over.wait(10)

    with subscribing(answer) as client:
        messages = client.subscribe_triggers("carts", "cart", {"push": 1})
        assert next(messages).lsn == 5
        client.close()
        with pytest.raises(CallError) as ended:
            next(messages)
        assert ended.value.code is grpc.StatusCode.CANCELLED
