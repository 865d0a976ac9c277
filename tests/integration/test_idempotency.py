"""A caller's id stands for one thing for ever: the same again is told so, another payload is refused, twins are one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import grpc
import pytest

from tests.support import catalogs
from tests.support.running import Server, serving, told
from tsugi.client import CallError, Client, outcome, source_record
from tsugi.requests import DecideOptions
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.error_reason_pb2 import ErrorReason

pytestmark = pytest.mark.slow

TWINS = 24
EXPLORED = {"epsilon_greedy": 2}  # drawn, so that two decisions would differ

_Reply = TypeVar("_Reply")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server, server.client() as client:
        actions = [{"name": f"action_{i}", "treatments": [{"name": "t", "channel": "web"}]} for i in range(50)]
        client.push_catalog(catalogs.message(actions=actions), request_id="first catalog")
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture
def both(server: Server) -> Iterator[list[Client]]:
    """One client for each worker."""
    with server.client_on("worker-0") as first, server.client_on("worker-1") as second:
        yield [first, second]


def at_once(calls: list[Callable[[], _Reply]]) -> list[_Reply | CallError]:
    """Make calls in parallel and return their replies and refusals."""

    def settle(call: Callable[[], _Reply]) -> _Reply | CallError:
        try:
            return call()
        except CallError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(settle, calls))


def count_of_contacts(client: Client, person: str, lsn: int) -> int:
    profile = client.get_profile(identity=("customer_number", person), at_least_lsn=lsn).profile
    return sum(contact.count for contact in profile.contacts)


def know(client: Client, person: str) -> int:
    """Have a person known, and return the LSN."""
    return client.ingest_records([source_record(f"know {person}", "crm", {"customer_number": person})]).lsn


def test_durable_decision_repeated_is_the_same_reply_on_every_worker(both: list[Client]) -> None:
    asked: DecideOptions = {"identities": {"customer_number": "nobody"}, "request_id": "repeated", "durable": True}
    replies = [client.decide(EXPLORED, **asked) for client in both * 3]
    assert all(reply == replies[0] for reply in replies)
    assert replies[0].lsn


def test_decision_repeated_counts_one_contact(both: list[Client]) -> None:
    lsn = know(both[0], "once")
    asked = DecideOptions(identities={"customer_number": "once"}, request_id="o", at_least_lsn=lsn, durable=True)
    replies = [client.decide({"greedy": 1}, **asked) for client in both * 3]
    assert count_of_contacts(both[1], "once", replies[0].lsn) == 1


def test_accepted_decision_is_repeated_from_its_record_and_a_durable_repeat_is_another_payload(
    both: list[Client],
) -> None:
    first = both[0].decide(EXPLORED, request_id="accepted")
    lsn = know(both[0], "later")  # committed after the decision before it in the same queue
    assert lsn
    again = both[1].decide(EXPLORED, request_id="accepted")
    assert again == first
    assert again.lsn == 0
    with pytest.raises(CallError) as refusal:
        both[1].decide(EXPLORED, request_id="accepted", durable=True)
    assert refusal.value.reason == "ERROR_REASON_IDEMPOTENCY_KEY_REUSED"


def test_request_id_with_another_payload_is_refused(both: list[Client]) -> None:
    both[0].decide(EXPLORED, request_id="taken", durable=True)
    for client in both:
        with pytest.raises(CallError) as refusal:
            client.decide({"greedy": 1}, request_id="taken", durable=True)
        assert refusal.value.code is grpc.StatusCode.ALREADY_EXISTS
        assert refusal.value.reason == "ERROR_REASON_IDEMPOTENCY_KEY_REUSED"


def test_durable_twins_are_one_decision(both: list[Client]) -> None:
    lsn = know(both[0], "twin")
    asked = DecideOptions(identities={"customer_number": "twin"}, request_id="t", at_least_lsn=lsn, durable=True)
    replies = at_once([partial(both[i % 2].decide, EXPLORED, **asked) for i in range(TWINS)])
    assert all(isinstance(reply, DecideResponse) and reply == replies[0] for reply in replies), replies
    assert isinstance(replies[0], DecideResponse)
    assert count_of_contacts(both[0], "twin", replies[0].lsn) == 2, "two slots, once"


def test_twins_with_two_payloads_are_one_decision_and_refusals(both: list[Client]) -> None:
    placements: list[dict[str, int]] = [{"greedy": 1}, {"greedy": 2}]
    rivals = DecideOptions(request_id="rivals", durable=True)
    replies = at_once([partial(both[i % 2].decide, placements[i // 2 % 2], **rivals) for i in range(TWINS)])
    accepted = [reply for reply in replies if isinstance(reply, DecideResponse)]
    refused = [reply for reply in replies if isinstance(reply, CallError)]
    assert len(accepted) == len(refused) == TWINS // 2
    assert all(reply == accepted[0] for reply in accepted)
    assert {refusal.reason for refusal in refused} == {"ERROR_REASON_IDEMPOTENCY_KEY_REUSED"}


def test_outcome_sent_many_times_at_once_is_one_record(both: list[Client]) -> None:
    reply = both[0].decide({"greedy": 1}, durable=True)
    action = reply.slots[0].action
    told_of = (reply.decision_id, action, "o", "click")
    replies = at_once([partial(both[i % 2].report_outcome, *told_of) for i in range(TWINS)])
    answered = [each for each in replies if not isinstance(each, CallError)]
    assert len(answered) == TWINS
    assert sum(not each.duplicate for each in answered) == 1
    assert len({each.lsn for each in answered}) == 1


def test_outcome_id_belongs_to_its_decision_and_to_one_payload(both: list[Client]) -> None:
    decisions = [both[0].decide({"greedy": 1}, durable=True) for _ in range(2)]
    lsns = {
        both[1].report_outcome(each.decision_id, each.slots[0].action, "same id", "order", value=10.0).lsn
        for each in decisions
    }
    assert len(lsns) == 2
    with pytest.raises(CallError) as refusal:
        both[0].report_outcome(decisions[0].decision_id, decisions[0].slots[0].action, "same id", "order", value=11.0)
    assert refusal.value.code is grpc.StatusCode.ALREADY_EXISTS


def test_batch_tells_a_duplicate_a_reused_id_and_a_new_one_apart(both: list[Client]) -> None:
    reply = both[0].decide({"greedy": 1}, durable=True)
    action = reply.slots[0].action
    first = outcome(reply.decision_id, action, "o1", "click")
    other = outcome(reply.decision_id, action, "o1", "dismiss")
    new = outcome(reply.decision_id, action, "o2", "click")
    both[0].batch_report_outcomes([first])
    results = both[1].batch_report_outcomes([first, other, new, new]).results
    assert [result.accepted.duplicate for result in results] == [True, False, False, True]
    assert [result.error.reason for result in results] == [0, ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED, 0, 0]
    assert results[2].accepted.lsn == results[3].accepted.lsn


def test_source_record_sent_many_times_at_once_is_one_record(both: list[Client]) -> None:
    record = source_record("r1", "crm", {"customer_number": "recorded"}, attributes={"age": 20})
    replies = at_once([partial(both[i % 2].ingest_records, [record]) for i in range(TWINS)])
    results = [each.results[0].accepted for each in replies if not isinstance(each, CallError)]
    assert len(results) == TWINS
    assert sum(not result.duplicate for result in results) == 1
    assert len({result.lsn for result in results}) == 1


def test_record_id_belongs_to_its_source_and_to_one_payload(both: list[Client]) -> None:
    records = [source_record("r2", source, {"customer_number": "sourced"}) for source in ("crm", "web")]
    assert len({both[0].ingest_records([record]).lsn for record in records}) == 2
    changed = source_record("r2", "crm", {"customer_number": "sourced"}, attributes={"age": 20})
    (result,) = both[1].ingest_records([changed]).results
    assert result.error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED


def test_configuration_write_repeated_is_one_change(both: list[Client]) -> None:
    catalog = catalogs.message(name="other")
    pushes = [client.push_catalog(catalog, request_id="push once") for client in both]
    assert [push.duplicate for push in pushes] == [False, True]
    assert pushes[0].lsn == pushes[1].lsn
    with pytest.raises(CallError) as refusal:
        both[1].push_catalog(catalogs.message(name="third"), request_id="push once")
    assert refusal.value.code is grpc.StatusCode.ALREADY_EXISTS
    backs = [client.rollback_catalog(request_id="back once") for client in both]
    assert [back.duplicate for back in backs] == [False, True]
    assert backs[0].revision == backs[1].revision != pushes[0].revision


def test_ids_are_remembered_over_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("restarted")) as server:
        record = source_record("r", "crm", {"customer_number": "kept"})
        asked: DecideOptions = {"identities": {"customer_number": "kept"}, "request_id": "d", "durable": True}
        with server.client() as client:
            pushed = client.push_catalog(catalogs.message(), request_id="c")
            recorded = client.ingest_records([record])
            decided = client.decide(EXPLORED, **asked)
            reported = client.report_outcome(decided.decision_id, decided.slots[0].action, "o", "click")
        server.stop()
        server.start()
        with server.client() as client:
            again = client.push_catalog(catalogs.message(), request_id="c")
            assert (again.duplicate, again.lsn) == (True, pushed.lsn)
            assert client.decide(EXPLORED, **asked) == decided
            (result,) = client.ingest_records([record]).results
            assert (result.accepted.duplicate, result.accepted.lsn) == (True, recorded.lsn)
            outcome_again = client.report_outcome(decided.decision_id, decided.slots[0].action, "o", "click")
            assert (outcome_again.duplicate, outcome_again.lsn) == (True, reported.lsn)
