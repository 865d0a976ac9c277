"""Many decisions in one call, and a rejection with the next request: order, refusals, deadlines, what is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest
from google.protobuf import json_format

from server.decisioning.recorded import DecisionReader
from server.decisioning.triggers import Triggers
from server.errors import TsugiError
from server.outcomes.ingest import Ingest
from server.rpc.decision_servicer import BATCH_TOGETHER, STREAM_DECISIONS_MAX, DecisionServicer
from server.rpc.methods import Context
from server.tokens import TokenKey
from tests.support import catalogs
from tests.support.faults import WAIT_S_MAX
from tests.unit.decisioning.test_service import NOW_US, POISON, SECRET, Desk, PoisonedStore, person
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import (
    BatchDecideRequest,
    BatchDecideResponse,
    DecideRequest,
    DecideResponse,
    StreamDecideRequest,
    StreamDecideResponse,
)
from tsugi.v1.error_reason_pb2 import ErrorReason

DECISION, OUTCOME = RecordKind.RECORD_KIND_DECISION, RecordKind.RECORD_KIND_OUTCOME
CATALOG = catalogs.compiled(
    actionGroups=[{"name": "money"}],
    actions=[
        {"name": name, "group": group, "valueMicros": value, "treatments": [{"name": "only", "channel": "web"}]}
        for name, group, value in (("loan", "money", 3), ("card", "money", 2), ("weather", "", 1))
    ],
    contactPolicies=[
        {
            "name": "no_means_no",
            "scope": "CONTACT_SCOPE_EACH_GROUP",
            "groups": ["money"],
            "coolOff": {"outcomeTypes": ["dismiss"], "span": "3600s"},
        }
    ],
)


class Call:
    """In place of gRPC's context: a call with a deadline."""

    def __init__(self, left_s: float | None = 5.0) -> None:
        self._left_s = left_s

    def time_remaining(self) -> float | None:
        """See grpc.aio.ServicerContext."""
        return self._left_s


class Counter:
    """A servicer over a decision service and an ingest in memory."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        desk.committer.is_held = False
        live = desk.service.live
        ingest = Ingest(
            log=desk.log,
            store=desk.store,
            committer=desk.committer,
            token_key=TokenKey(SECRET),
            catalog=lambda: live.catalog if live is not None else None,
            clock_us=lambda: NOW_US,
        )
        nothing: Any = None  # nobody reads decisions back here, or subscribes
        self.servicer = DecisionServicer(
            desk.service, cast(DecisionReader, nothing), cast(Triggers, nothing), ingest, lambda: NOW_US
        )

    async def decide(self, left_s: float | None = 5.0, **changes: Any) -> DecideResponse:
        """Decide one request."""
        request = ask(**changes)
        reply = await self.servicer.decide(request, request.SerializeToString(), call(left_s))
        await asyncio.sleep(0)  # the record follows the reply
        return DecideResponse.FromString(reply)

    async def batch(self, *requests: DecideRequest, left_s: float | None = 5.0) -> BatchDecideResponse:
        """Decide a batch."""
        batch = BatchDecideRequest(requests=requests)
        return BatchDecideResponse.FromString(await self.servicer.batch_decide(batch, b"", call(left_s)))

    def kinds(self) -> list[int]:
        """Return the kinds of all records, in order."""
        return [record.kind for record in self.desk.log.read(1)]

    def stream(self, *requests: DecideRequest) -> Any:
        """Begin a stream."""

        async def asked() -> AsyncIterator[StreamDecideRequest]:
            for request in requests:
                yield StreamDecideRequest(request=request)

        return self.servicer.stream_decide(asked(), call())


def call(left_s: float | None = 5.0) -> Context:
    return cast(Context, Call(left_s))


def ask(**changes: Any) -> DecideRequest:
    return json_format.ParseDict({"placements": [{"placement": "greedy"}]} | changes, DecideRequest())


def no(decision: DecideResponse, action: str, **changes: Any) -> dict[str, Any]:
    said = {"decisionId": decision.decision_id, "action": action, "outcomeId": "no", "type": "dismiss"}
    return {"outcomes": [said | changes]}


def reason(error: TsugiError) -> str:
    return ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")


def fates(reply: BatchDecideResponse) -> list[str]:
    return [
        ErrorReason.Name(each.error.reason).removeprefix("ERROR_REASON_") if each.HasField("error") else "decided"
        for each in reply.results
    ]


async def test_batch_answers_every_request_in_its_place() -> None:
    counter = Counter(Desk())
    n = 2 * BATCH_TOGETHER + 3
    requests = [ask(placements=[{"placement": "greedy", "count": 1 + i % 4}]) for i in range(n)]
    reply = await counter.batch(*requests)
    assert [len(each.decision.slots) for each in reply.results] == [1 + i % 4 for i in range(n)]
    assert len({each.decision.decision_id for each in reply.results}) == n
    assert len(await counter.desk.records()) == n


async def test_wrong_requests_of_a_batch_are_refused_alone() -> None:
    counter = Counter(Desk(store=PoisonedStore()))
    reply = await counter.batch(
        ask(),
        DecideRequest(),
        ask(placements=[{"placement": "nowhere"}]),
        ask(identities=person(POISON)),
        ask(requestId="x" * 129),
        ask(),
    )
    assert fates(reply) == [
        "decided", "FIELD_INVALID", "RESOURCE_NOT_FOUND", "INTERNAL_ERROR", "FIELD_INVALID", "decided",
    ]  # fmt: skip
    assert [each.error.metadata["field"] for each in reply.results if "field" in each.error.metadata] == [
        "placements", "placements[0].placement", "request_id",
    ]  # fmt: skip
    assert "breaks" not in str(reply), "what broke is in the log alone"
    assert len(await counter.desk.records()) == 2


async def test_batch_sent_again_is_answered_as_before_and_recorded_once() -> None:
    counter = Counter(Desk())
    requests = [ask(requestId=f"r{i}") for i in range(5)]
    first = await counter.batch(*requests)
    assert len(await counter.desk.records()) == 5
    assert await counter.batch(*requests) == first
    assert len(await counter.desk.records()) == 5


async def test_request_id_twice_in_a_batch_is_refused_where_it_comes_again() -> None:
    counter = Counter(Desk())
    reply = await counter.batch(ask(requestId="one"), ask(requestId="one"), ask(), ask())
    assert fates(reply) == ["decided", "FIELD_INVALID", "decided", "decided"]
    assert reply.results[1].error.metadata["field"] == "request_id"


async def test_empty_batch_is_answered_with_nothing_and_a_large_one_refused() -> None:
    counter = Counter(Desk())
    assert fates(await counter.batch()) == []
    with pytest.raises(TsugiError) as refusal:
        await counter.batch(*[ask()] * 501)
    assert refusal.value.metadata == {"field": "requests", "limit": "500", "got": "501"}


async def test_batch_that_its_deadline_is_too_short_for_is_refused_whole() -> None:
    counter = Counter(Desk())
    await counter.decide()
    with pytest.raises(TsugiError) as refusal:
        await counter.batch(*[ask()] * 500, left_s=1e-6)
    assert reason(refusal.value) == "DEADLINE_TOO_SHORT"
    assert len(await counter.desk.records()) == 1


async def test_others_are_decided_between_the_parts_of_a_batch() -> None:
    counter = Counter(Desk())
    batch = asyncio.ensure_future(counter.batch(*[ask()] * 4 * BATCH_TOGETHER))
    await asyncio.sleep(0)
    await counter.decide()
    assert not batch.done()
    assert fates(await batch) == ["decided"] * 4 * BATCH_TOGETHER


async def test_one_who_waits_holds_up_no_other_of_a_batch() -> None:
    counter = Counter(Desk())
    batch = asyncio.ensure_future(counter.batch(ask(atLeastLsn=9), *[ask()] * BATCH_TOGETHER))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(await counter.desk.records()) == BATCH_TOGETHER
    counter.desk.know("somebody", 9)
    assert fates(await batch) == ["decided"] * (BATCH_TOGETHER + 1)


async def test_batch_that_its_caller_leaves_decides_nothing_more() -> None:
    counter = Counter(Desk())
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    batch = asyncio.ensure_future(counter.batch(*[ask(atLeastLsn=9)] * 3, DecideRequest(), *[ask()] * 400))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    counter.desk.know("somebody", 9)
    await counter.decide(atLeastLsn=9)
    assert len(await counter.desk.records()) < 2 * BATCH_TOGETHER
    async with asyncio.timeout(WAIT_S_MAX):
        while counter.desk.service.queue_requests:  # noqa: ASYNC110  # who waited for the state goes at its next look
            await asyncio.sleep(0.001)
    assert complaints == []


async def test_stream_answers_in_order_and_goes_on_after_a_refusal() -> None:
    counter = Counter(Desk())
    requests = [ask(placements=[{"placement": "greedy", "count": 1 + i % 5}]) for i in range(3 * STREAM_DECISIONS_MAX)]
    replies = [StreamDecideResponse.FromString(body) async for body in counter.stream(*requests)]
    for i, reply in enumerate(replies):
        if i % 5 == 4:
            assert reply.error.metadata["field"] == "placements[0].count"
        else:
            assert len(reply.decision.slots) == 1 + i % 5
    assert len(replies) == len(requests)


async def test_stream_without_a_catalog_ends() -> None:
    counter = Counter(Desk(has_catalog=False))
    async with aclosing(counter.stream(ask())) as replies:
        with pytest.raises(TsugiError) as refusal:
            await anext(replies)
    assert reason(refusal.value) == "CATALOG_MISSING"
    with pytest.raises(TsugiError) as refusal:
        await counter.batch(ask())
    assert reason(refusal.value) == "CATALOG_MISSING"


async def test_rejection_and_its_group_are_out_before_the_projector_has_seen_it() -> None:
    counter = Counter(Desk(catalog=CATALOG))
    first = await counter.decide()
    assert first.slots[0].action == "loan"
    following = await counter.decide(**no(first, "loan"), left_s=0.02)
    assert following.slots[0].action == "weather"
    assert Degradation.DEGRADATION_PROFILE_STALE in following.degradations, "the projector was waited for"
    assert counter.kinds() == [DECISION, OUTCOME, DECISION]
    (_, record) = await counter.desk.records()
    assert len(record.held_targets) == 1, "the explanation can name the policy"


async def test_what_is_no_rejection_takes_nothing_out() -> None:
    counter = Counter(Desk(catalog=CATALOG))
    first = await counter.decide()
    following = await counter.decide(**no(first, "loan", type="click"), left_s=0.02)
    assert following.slots[0].action == "loan"


@pytest.mark.parametrize(
    ("changes", "reason_name", "path"),
    [
        ({"decisionId": "A" * 56}, "DECISION_ID_INVALID", "outcomes[1].decision_id"),
        ({"action": "card"}, "ACTION_NOT_IN_DECISION", "outcomes[1].action"),
        ({"type": "applause"}, "RESOURCE_NOT_FOUND", "outcomes[1].type"),
        ({"type": ""}, "FIELD_INVALID", "outcomes[1].type"),
        ({"outcomeId": ""}, "FIELD_INVALID", "outcomes[1].outcome_id"),
        ({"value": 1.0}, "FIELD_INVALID", "outcomes[1].value"),
        ({"occurrenceTime": "9999-01-01T00:00:00Z"}, "TIME_OUT_OF_RANGE", "outcomes[1].occurrence_time"),
    ],
)
async def test_wrong_outcome_refuses_the_call_and_nothing_is_recorded(
    changes: dict[str, Any], reason_name: str, path: str
) -> None:
    counter = Counter(Desk(catalog=CATALOG))
    first = await counter.decide()
    (good,) = no(first, "loan")["outcomes"]
    with pytest.raises(TsugiError) as refusal:
        await counter.decide(outcomes=[good, good | {"outcomeId": "second"} | changes])
    assert (reason(refusal.value), refusal.value.metadata["field"]) == (reason_name, path)
    assert {violation.path for violation in refusal.value.violations} <= {path}
    assert counter.kinds() == [DECISION]


async def test_outcome_id_of_another_outcome_refuses_the_call() -> None:
    counter = Counter(Desk(catalog=CATALOG))
    first = await counter.decide()
    await counter.decide(**no(first, "loan"), left_s=0.02)
    with pytest.raises(TsugiError) as refusal:
        await counter.decide(**no(first, "loan", type="click"))
    assert (reason(refusal.value), refusal.value.metadata["field"]) == ("IDEMPOTENCY_KEY_REUSED", "outcomes[0]")
    assert len(await counter.desk.records()) == 2


async def test_rejection_sent_again_with_its_request_id_is_answered_alike_and_counts_once() -> None:
    counter = Counter(Desk(catalog=CATALOG))
    first = await counter.decide()
    said = no(first, "loan") | {"requestId": "next"}
    assert await counter.decide(**said, left_s=0.02) == await counter.decide(**said, left_s=0.02)
    assert counter.kinds() == [DECISION, OUTCOME, DECISION]


async def test_preview_and_too_many_outcomes_are_refused() -> None:
    counter = Counter(Desk(catalog=CATALOG))
    said = no(await counter.decide(), "loan")
    for changes, reason_name in (
        (said | {"preview": True}, "FIELD_INVALID"),
        ({"outcomes": said["outcomes"] * 17}, "LIMIT_EXCEEDED"),
    ):
        with pytest.raises(TsugiError) as refusal:
            await counter.decide(**changes)
        assert (reason(refusal.value), refusal.value.metadata["field"]) == (reason_name, "outcomes")


async def test_wrong_outcome_in_a_batch_refuses_its_request_alone() -> None:
    counter = Counter(Desk(catalog=CATALOG))
    first = await counter.decide()
    reply = await counter.batch(ask(**no(first, "loan")), ask(**no(first, "card")), ask(), left_s=0.1)
    assert fates(reply) == ["decided", "ACTION_NOT_IN_DECISION", "decided"]
    assert reply.results[1].error.metadata["field"] == "outcomes[0].action"
    assert [each.decision.slots[0].action for each in reply.results if each.HasField("decision")] == ["weather", "loan"]


async def test_of_many_each_waits_for_learning_by_itself() -> None:
    desk = Desk(catalog=CATALOG)
    counter = Counter(desk)
    desk.know("somebody", 9)
    desk.learn(3)
    asked = [ask(atLeastLsn=lsn, waitForLearning=True) for lsn in (3, 8, 0)]
    stale = Degradation.DEGRADATION_LEARNER_STALE
    batch = await counter.batch(*asked, left_s=0.02)
    assert [stale in result.decision.degradations for result in batch.results] == [False, True, False]
    assert batch.results[2].error.reason == ErrorReason.ERROR_REASON_FIELD_INVALID
    begun = asyncio.create_task(counter.batch(*asked))
    for _ in range(20):
        await asyncio.sleep(0)
    assert desk.service.queue_requests == 1
    desk.learn(8)
    batch = await begun
    assert [stale in result.decision.degradations for result in batch.results] == [False] * 3
    async with aclosing(counter.stream(asked[1])) as replies:
        (reply,) = [StreamDecideResponse.FromString(each) async for each in replies]
    assert stale not in reply.decision.degradations
