"""What a person allows and was told, over workers and identities: kept to from the next call on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest

from tests.support.catalogs import message
from tests.support.running import Server, serving, until
from tsugi.client import CallError, Client, consent, source_record
from tsugi.v1.decision_pb2 import ChoiceReason, RefusalReason
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.profile_service_pb2 import LinkVerdict

Pair = tuple[str, str]
_serial = count()

CATALOG = message(
    channels=[{"name": name} for name in ("web", "call", "poster", "door", "mail")],
    consentPurposes=[{"name": "marketing"}, {"name": "service", "consentExempt": True}],
    placements=[
        {"name": "page", "channel": "web", "goal": "click", "countMax": 3, "purpose": "service"},
        {"name": "agent", "channel": "call", "goal": "click", "purpose": "marketing"},
        {"name": "wall", "channel": "poster", "goal": "click", "purpose": "service"},
        {"name": "door", "channel": "door", "goal": "click", "purpose": "service"},
        {"name": "mail", "channel": "mail", "goal": "click", "purpose": "service",
         "activation": "ACTIVATION_ON_IMPRESSION"},
    ],
    actionGroups=[{"name": "money"}],
    actions=[
        {"name": name, "group": "money" if name != "weather" else "", "valueMicros": value,
         "treatments": [{"name": channel, "channel": channel} for channel in ("web", "call")]}
        for name, value in (("loan", 3_000_000), ("card", 2_000_000), ("weather", 1_000_000))
    ]
    + [
        {"name": "prize", "valueMicros": 9_000_000, "treatments": [{"name": "poster", "channel": "poster"}]},
        {"name": "flyer", "valueMicros": 8_000_000, "treatments": [{"name": "door", "channel": "door"}]},
        {"name": "nothing", "treatments": [{"name": "poster", "channel": "poster"}]},
        {"name": "letter", "treatments": [{"name": "mail", "channel": "mail"}]},
    ],
    contactPolicies=[
        {"name": "twice", "scope": "CONTACT_SCOPE_EACH_ACTION", "actions": ["loan", "card"],
         "cap": {"countMax": 2, "span": "3600s"}},
        {"name": "once", "scope": "CONTACT_SCOPE_EACH_ACTION", "actions": ["prize", "letter"],
         "cap": {"countMax": 1, "span": "3600s", "strict": True}},
        {"name": "loosely_once", "actions": ["flyer"], "cap": {"countMax": 1, "span": "3600s"}},
        {"name": "no_means_no", "scope": "CONTACT_SCOPE_EACH_GROUP", "groups": ["money"],
         "coolOff": {"outcomeTypes": ["dismiss"], "span": "3600s"}},
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        with server.client() as client:
            client.push_catalog(CATALOG)
        yield server


@pytest.fixture(scope="module")
def both(running: Server) -> Iterator[list[Client]]:
    """One client for each worker."""
    with running.client_on("worker-0") as first, running.client_on("worker-1") as second:
        yield [first, second]


def say(client: Client, *who: Pair, **parts: Any) -> int:
    return client.ingest_records([source_record(f"r{next(_serial)}", "crm", who, **parts)]).lsn


def ask(client: Client, who: Pair, lsn: int, placement: str = "page", n: int = 3) -> DecideResponse:
    """Decide on a state that surely includes an LSN."""
    until(lambda: client.audit_sources(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")
    return client.decide({placement: n}, identities=[who], at_least_lsn=lsn, durable=True)


def actions(reply: DecideResponse) -> list[str]:
    return [slot.action for slot in reply.slots if slot.action]


def test_consent_opens_and_its_withdrawal_closes_with_the_very_next_decision(both: list[Client]) -> None:
    who = ("customer_number", "consents")
    reply = ask(both[0], who, say(both[0], who), "agent", 1)
    assert list(reply.slots[0].reasons) == [ChoiceReason.CHOICE_REASON_NO_CONSENT]
    lsn = say(both[0], who, consents=[consent("marketing", granted=True)])
    assert actions(ask(both[1], who, lsn, "agent", 1)) == ["loan"]
    lsn = say(both[1], who, consents=[consent("marketing", granted=False, channel="call")])
    reply = ask(both[0], who, lsn, "agent", 1)
    assert list(reply.slots[0].reasons) == [ChoiceReason.CHOICE_REASON_NO_CONSENT]
    told = both[1].get_decision(reply.decision_id, explained=True)
    refused = [each for each in told.explanation.candidates if each.action in {"loan", "card", "weather"}]
    assert {each.refusal_reason for each in refused} == {RefusalReason.REFUSAL_REASON_CONSENT_WITHDRAWN}
    assert {each.refused_by for each in refused} == {"consent.marketing.call"}


def test_cap_counts_over_workers_and_identities_and_after_a_merge(both: list[Client]) -> None:
    one, other = ("customer_number", "capped"), ("browser_id", "capped")
    lsn = max(say(both[0], one), say(both[1], other))
    lsn = ask(both[0], one, lsn).lsn
    lsn = ask(both[1], other, lsn).lsn
    assert actions(ask(both[0], one, lsn)) == ["loan", "card", "weather"], "once as one, the second time"
    lsn = both[0].link_identities(one, other, LinkVerdict.LINK_VERDICT_SAME, stated_by="clerk", request_id="merge").lsn
    reply = ask(both[1], other, lsn)
    assert actions(reply) == ["weather"], "three contacts of one person by now"
    told = both[0].get_decision(reply.decision_id, explained=True)
    refused = {each.action: each.refused_by for each in told.explanation.candidates if each.refused_by}
    assert refused == {"loan": "twice: loan", "card": "twice: card"}


def test_rejection_silences_its_group_on_every_channel_at_once(both: list[Client]) -> None:
    who = ("customer_number", "rejects")
    lsn = say(both[0], who, consents=[consent("marketing", granted=True)])
    reply = ask(both[0], who, lsn, n=1)
    assert actions(reply) == ["loan"]
    lsn = both[1].report_outcome(reply.decision_id, "loan", "no", "dismiss").lsn
    assert actions(ask(both[1], who, lsn)) == ["weather"]
    assert actions(ask(both[0], who, lsn, "agent", 1)) == ["weather"], "nor does the agent offer it"


def test_decision_reads_back_as_it_was_answered(both: list[Client]) -> None:
    who = ("customer_number", "reads back")
    reply = ask(both[0], who, say(both[0], who))
    told = both[1].get_decision(reply.decision_id)
    assert [slot.action for slot in told.slots] == [slot.action for slot in reply.slots]
    assert (told.lsn, told.catalog_revision) == (reply.lsn, reply.catalog_revision)
    assert not told.HasField("explanation")
    explained = both[1].get_decision(reply.decision_id, explained=True).explanation
    assert "loan comes first" in explained.sentence
    assert explained.candidates[0].standings[0].priority == reply.slots[0].priority


def is_applied(client: Client, lsn: int) -> bool:
    return client.count_people(at_least_lsn=lsn).applied_lsn >= lsn


def rush(clients: list[Client], n: int, who: Pair, placement: str = "wall") -> list[DecideResponse]:
    """Ask at the same moment, over all workers; return the replies."""
    replies: list[DecideResponse] = []
    answered = threading.Semaphore(0)

    def take(reply: DecideResponse | CallError) -> None:
        assert isinstance(reply, DecideResponse), reply
        replies.append(reply)
        answered.release()

    for i in range(n):
        clients[i % len(clients)].decide_then(take, {placement: 1}, identities=[who], timeout_s=20)
    for _ in range(n):
        assert answered.acquire(timeout=20), "a call was not answered"
    return replies


def assert_one_gets_it(clients: list[Client], n_times: int) -> None:
    for number in range(n_times):
        who = ("customer_number", f"rush {n_times} {number}")
        if number % 2:  # known, or a stranger who names an identity
            until(partial(is_applied, clients[0], say(clients[0], who)), "they are known")
        chosen = Counter(reply.slots[0].action for reply in rush(clients, 64, who))
        assert chosen == {"prize": 1, "nothing": 63}


@pytest.mark.slow
def test_of_many_decisions_at_once_one_gets_what_a_strict_cap_allows_once(both: list[Client]) -> None:
    assert_one_gets_it(both, 20)


def test_negative_control_a_cap_that_is_not_strict_is_passed_by_decisions_at_once(both: list[Client]) -> None:
    chosen = Counter(reply.slots[0].action for reply in rush(both, 64, ("customer_number", "rushed"), "door"))
    assert chosen["flyer"] > 1


@pytest.mark.long
def test_of_many_decisions_at_once_one_gets_it_two_hundred_times(both: list[Client]) -> None:
    assert_one_gets_it(both, 200)


def test_reserved_contact_lapses_unless_its_impression_is_reported(both: list[Client]) -> None:
    seen, unseen = ("customer_number", "seen"), ("customer_number", "unseen")
    lsn = max(say(both[0], who) for who in (seen, unseen))
    first = {who: ask(both[0], who, lsn, "mail", 1) for who in (seen, unseen)}
    assert [actions(reply) for reply in first.values()] == [["letter"], ["letter"]]
    assert [actions(ask(both[1], who, lsn, "mail", 1)) for who in (seen, unseen)] == [[], []], "reserved"
    lsn = both[1].report_outcome(first[seen].decision_id, "letter", "shown", "impression").lsn

    def is_free_again() -> bool:
        return actions(both[0].decide({"mail": 1}, identities=[unseen], preview=True, at_least_lsn=lsn)) == ["letter"]

    until(is_free_again, "nothing but the reservation holds it")
    until(lambda: actions(ask(both[1], unseen, lsn, "mail", 1)) == ["letter"], "the window of two seconds closes")
    assert actions(ask(both[1], seen, lsn, "mail", 1)) == [], "what was seen counts for an hour"
