"""Decisions that events cause, as a gateway receives them: the right person's, in time, and none is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, Final, Protocol

import grpc
import pytest

from tests.support.catalogs import message
from tests.support.running import Server, serving, told, until
from tests.support.wire import refusal_of
from tsugi.client import CallError, Client, event, source_record
from tsugi.requests import subscribe_triggers_request
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_service_pb2 import SubscribeTriggersResponse

pytestmark = pytest.mark.slow

WAIT_S: Final = 30.0
PUSH: Final = {"push": 1}
AGES: Final = {"serve_connection_age_ms_max": 4_000, "serve_connection_age_grace_ms": 500}
SUBSCRIPTIONS_MAX: Final = 16  # as the proto says
_serial = count()


class Subscription(Protocol):
    """A call that gives messages."""

    def __iter__(self) -> Iterator[bytes]: ...

    def __next__(self) -> bytes: ...

    def cancel(self) -> bool: ...


def catalog(**parts: Any) -> Catalog:
    """Build a catalog with carts and orders; what is pushed depends on the person's tier."""
    everything: dict[str, Any] = {
        "eventTypes": [
            {"name": "cart", "properties": [{"name": "total", "type": "ATTRIBUTE_TYPE_NUMBER"}]},
            {"name": "order"},
        ],
        "windows": [{"name": "orders_30m", "kind": "WINDOW_KIND_COUNT", "eventType": "order", "span": "1800s"}],
        "placements": [{"name": "push", "channel": "web", "goal": "click"}],
        "actions": [
            {"name": tier, "eligibility": f"profile.tier == '{tier}'", "treatments": [{"name": "x", "channel": "web"}]}
            for tier in ("silver", "gold")
        ],
    }
    return message(**(everything | parts))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), **AGES) as server:
        with server.client() as client:
            client.push_catalog(catalog())
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


class Gateway:
    """One subscription of a name of its own, taken message by message."""

    def __init__(self, client: Client, name: str, **options: Any) -> None:
        self._messages = client.subscribe_triggers(name, "cart", PUSH, timeout_s=WAIT_S, **options)
        self.lsn = next(self._messages).lsn  # so that what happens from here on is told

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self._messages.close()  # type: ignore[attr-defined]  # it is a generator

    def take(self, n: int) -> list[SubscribeTriggersResponse]:
        """Return the next messages that tell of an event."""
        found: list[SubscribeTriggersResponse] = []
        while len(found) < n:
            found += [each for each in [next(self._messages)] if each.HasField("trigger")]
        return found


def happens(client: Client, who: str, what: str = "cart", *, tier: str = "silver", **properties: float) -> int:
    """Record an event of a customer; return its LSN."""
    record = source_record(
        f"r{next(_serial)}",
        "shop",
        {"customer_number": who},
        attributes={"tier": tier},
        event=event(what, {name: float(number) for name, number in properties.items()}),
    )
    return client.ingest_records([record]).lsn


def told_of(messages: list[SubscribeTriggersResponse]) -> list[tuple[str, str]]:
    """Return who was told of, and what was decided."""
    return [(each.trigger.identities[0].value, each.trigger.decision.slots[0].action) for each in messages]


def decision_ids(messages: list[SubscribeTriggersResponse]) -> list[str]:
    return [each.trigger.decision.decision_id for each in messages]


def test_event_causes_the_decision_of_its_own_person(client: Client) -> None:
    with Gateway(client, "own") as gateway:
        lsns = [happens(client, f"own {tier}", tier=tier) for tier in ("gold", "silver")]
        messages = gateway.take(2)
    assert told_of(messages) == [("own gold", "gold"), ("own silver", "silver")]
    assert [each.lsn for each in messages] == lsns
    for each in messages:
        trigger = each.trigger
        who = (trigger.identities[0].namespace, trigger.identities[0].value)
        assert trigger.profile_id == client.get_profile(identity=who, at_least_lsn=each.lsn).profile.profile_id
        recorded = client.get_decision(trigger.decision.decision_id)
        assert recorded.lsn == trigger.decision.lsn > each.lsn
        assert recorded.request.request_id == f"trigger/own/{each.lsn}"


def test_filter_asks_event_and_person(client: Client) -> None:
    with Gateway(client, "filtered", filter="event.total > 50.0 && profile.tier == 'gold'") as gateway:
        happens(client, "small", tier="gold", total=50)
        happens(client, "not gold", total=60)
        happens(client, "says nothing", tier="gold")
        happens(client, "right", tier="gold", total=60)
        assert told_of(gateway.take(1)) == [("right", "gold")]


def test_delay_gives_the_person_time_to_order(client: Client) -> None:
    delay = timedelta(milliseconds=300)
    with Gateway(client, "abandoned", delay=delay, filter="profile.orders_30m == 0.0") as gateway:
        before = datetime.now(UTC)
        happens(client, "orders")
        happens(client, "leaves")
        happens(client, "orders", "order")
        (only,) = gateway.take(1)
    assert told_of([only]) == [("leaves", "silver")]
    decided = client.get_decision(only.trigger.decision.decision_id).decide_time.ToDatetime(UTC)
    assert decided - before >= delay
    assert decided - only.trigger.event.occurrence_time.ToDatetime(UTC) >= delay


def test_break_loses_nothing_and_nobody_is_asked_twice(server: Server, client: Client) -> None:
    with Gateway(client, "broken") as gateway:
        begin_lsn = gateway.lsn
        lsns = [happens(client, f"broken {i}") for i in range(3)]
        first = gateway.take(2)
    lsns.append(happens(client, "broken 3"))
    with server.client_on("worker-0") as other, Gateway(other, "broken", after_lsn=first[-1].lsn) as gateway:
        rest = gateway.take(2)
    assert [each.lsn for each in first + rest] == lsns
    with server.client_on("worker-1") as other, Gateway(other, "broken", after_lsn=begin_lsn) as gateway:
        again = gateway.take(4)
    assert again == first + rest
    with Gateway(client, "broken", after_lsn=begin_lsn, filter="false", context={"hour": 5.0}) as gateway:
        assert decision_ids(gateway.take(4)) == decision_ids(first + rest), "what was decided stands"
    with Gateway(client, "another", after_lsn=begin_lsn) as gateway:
        assert not set(decision_ids(gateway.take(4))) & set(decision_ids(first + rest))


def test_erased_person_is_passed_over(client: Client) -> None:
    with Gateway(client, "erased", delay=timedelta(milliseconds=300)) as gateway:
        happens(client, "forgotten", tier="gold")
        client.erase_profile("forget them", identity=("customer_number", "forgotten"))
        happens(client, "remembered")
        assert told_of(gateway.take(1)) == [("remembered", "silver")]


@pytest.mark.parametrize(
    ("changes", "reason", "path"),
    [
        ({"event_type": "wedding"}, "RESOURCE_NOT_FOUND", "event_type"),
        ({"filter": "event.totl > 5.0"}, "FIELD_INVALID", "filter"),
        ({"filter": "context.hour > 5.0"}, "FIELD_INVALID", "filter"),
        ({"placements": {"nowhere": 1}}, "RESOURCE_NOT_FOUND", "placements[0].placement"),
        ({"after_lsn": 1 << 60}, "FIELD_INVALID", "after_lsn"),
    ],
)
def test_request_that_does_not_fit_is_refused(client: Client, changes: Any, reason: str, path: str) -> None:
    valid = {"name": "bad", "event_type": "cart", "placements": PUSH, "timeout_s": WAIT_S}
    with pytest.raises(CallError) as refusal:
        next(client.subscribe_triggers(**(valid | changes)))
    assert refusal.value.reason == f"ERROR_REASON_{reason}"
    assert path in [field for field, _ in refusal.value.violations]


def subscription(channel: grpc.Channel, name: str) -> Subscription:
    """Open a subscription on a channel, and wait until it is served."""
    subscribe: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
        "/tsugi.v1.DecisionService/SubscribeTriggers"
    )
    call = subscribe(subscribe_triggers_request(name, "cart", PUSH).SerializeToString(), timeout=WAIT_S)
    assert SubscribeTriggersResponse.FromString(next(call)).lsn
    return call


def test_worker_serves_so_many_and_says_why_it_refuses_another(server: Server) -> None:
    with server.channel_on("worker-0") as channel:
        calls = [subscription(channel, f"many{i}") for i in range(SUBSCRIPTIONS_MAX)]
        with pytest.raises(grpc.RpcError) as error:
            subscription(channel, "toomany")
        refusal = refusal_of(error.value)
        assert (refusal.reason, refusal.metadata) == ("ERROR_REASON_OVERLOADED", {"limit": str(SUBSCRIPTIONS_MAX)})
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        calls.pop().cancel()

        def is_served() -> bool:
            try:
                calls.append(subscription(channel, "toomany"))
            except grpc.RpcError:
                return False
            return True

        until(is_served, "the place that was given back is taken")
        for call in calls:
            call.cancel()


def test_catalog_that_knows_no_such_event_ends_the_subscription(client: Client) -> None:
    try:
        with Gateway(client, "swapped") as gateway:
            client.push_catalog(catalog(eventTypes=[{"name": "order"}]))
            with pytest.raises(CallError) as refusal:
                gateway.take(1)
    finally:
        client.push_catalog(catalog())
    assert refusal.value.reason == "ERROR_REASON_RESOURCE_NOT_FOUND"
    assert [field for field, _ in refusal.value.violations] == ["event_type"]


def test_worker_that_drains_ends_its_subscriptions_and_the_client_goes_on_at_another(
    server: Server, client: Client
) -> None:
    pid = server.roles()["worker-0"]
    with server.channel_on("worker-0") as channel, Gateway(client, "drained") as gateway:
        call = subscription(channel, "ends")
        happens(client, "before")
        assert told_of(gateway.take(1)) == [("before", "silver")]
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as error:
            while True:
                next(call)
        refusal = refusal_of(error.value)
        assert (refusal.reason, refusal.code) == ("ERROR_REASON_DRAINING", grpc.StatusCode.UNAVAILABLE)
        with server.client_on("worker-1") as other:
            for i in range(5):
                happens(other, f"meanwhile {i}")
        assert told_of(gateway.take(5)) == [(f"meanwhile {i}", "silver") for i in range(5)]


def test_connection_that_reaches_its_age_is_gone_on_with_over_another(server: Server, client: Client) -> None:
    codes: list[grpc.StatusCode] = []

    def read(call: Subscription) -> None:
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            codes.append(error.code())

    with server.channel_on("worker-1") as channel, Gateway(client, "aged") as gateway:
        # As old as the gateway's first connection, and without a client that goes on.
        reading = threading.Thread(target=read, args=(subscription(channel, "cut"),))
        reading.start()
        n_told = 0
        while reading.is_alive():
            happens(client, f"aged {n_told}")
            assert told_of(gateway.take(1)) == [(f"aged {n_told}", "silver")]
            n_told += 1
    assert codes[0] in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
