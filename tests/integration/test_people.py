"""People over the wire: how history comes together, parts again, waits for a judgement, leaves, and is accounted for.

One server with two workers serves the whole file; every test speaks of people of its own. What one worker is told the
other is asked about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf import json_format

from tests.support import catalogs
from tests.support.running import Server, serving, told, until
from tsugi.client import CallError, Client, consent, event, outcome, source_record
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.profile_pb2 import ConsentDecision, LinkReason, Profile, Touchpoint
from tsugi.v1.profile_service_pb2 import (
    ErasureState,
    GetProfileResponse,
    IdentityState,
    LinkVerdict,
    ResolvedIdentity,
    SourceAudit,
    SourceRecord,
)

pytestmark = pytest.mark.slow

SAME, DIFFERENT = LinkVerdict.LINK_VERDICT_SAME, LinkVerdict.LINK_VERDICT_DIFFERENT
PROPOSED = LinkVerdict.LINK_VERDICT_PROPOSED
NOON = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)

Pair = tuple[str, str]
_serial = count()


def catalog() -> Catalog:
    """Actions for whoever has something in the cart, spent much, or is a member; and one for everybody."""
    text, number = {"type": "ATTRIBUTE_TYPE_TEXT"}, {"type": "ATTRIBUTE_TYPE_NUMBER"}
    return catalogs.message(
        identityNamespaces=[
            {"name": "customer_number", "valuesPerProfileMax": 1},
            {"name": "email", "meaning": "MEANING_EMAIL"},
            {"name": "browser_id", "linkRule": "LINK_RULE_SHARED_DEVICE", "sharedMax": 2},
            {"name": "family_account", "linkRule": "LINK_RULE_HOUSEHOLD"},
        ],
        sources=[
            {"name": "crm", "owner": "customer care", "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH",
             "trust": 90, "silenceMax": "3600s"},
            {"name": "shop", "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM", "trust": 40, "channel": "web"},
            {"name": "survey", "owner": "research", "party": "PARTY_SECOND", "delivery": "DELIVERY_BATCH",
             "attributes": ["age", "shoe_size", "birth_date"], "eventTypes": ["visit", "purchase"],
             "silenceMax": "3600s"},
            {"name": "bought", "party": "PARTY_THIRD", "delivery": "DELIVERY_BATCH", "silenceMax": "60s"},
        ],
        consentPurposes=[{"name": "marketing"}, {"name": "service"}],
        profileAttributes=[
            {"name": "given_name", "meaning": "MEANING_GIVEN_NAME", "personalData": True, **text},
            {"name": "family_name", "meaning": "MEANING_FAMILY_NAME", "personalData": True, **text},
            {"name": "email_address", "meaning": "MEANING_EMAIL", "personalData": True, **text},
            {"name": "birth_date", "meaning": "MEANING_BIRTH_DATE", **text},
            {"name": "age", "survivorship": "SURVIVORSHIP_MOST_TRUSTED", "minimum": 0, "maximum": 120, **number},
            {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL"},
            {"name": "shoe_size", "excludedFromLearning": True, **number},
            {"name": "nickname", **text},
        ],
        eventTypes=[
            {"name": "visit"},
            {"name": "cart", "properties": [{"name": "total", **number}]},
            {"name": "purchase", "properties": [{"name": "total", **number}]},
        ],
        windows=[
            {"name": "carts_visit", "kind": "WINDOW_KIND_COUNT", "eventType": "cart", "session": True},
            {"name": "spent", "kind": "WINDOW_KIND_SUM", "eventType": "purchase", "property": "total",
             "span": "2592000s"},
        ],
        segments=[{"name": "spender", "expression": "profile.spent > 100.0"}],
        channels=[{"name": "web"}, {"name": "mail"}],
        actions=[
            {"name": name, "eligibility": rule, "valueMicros": value,
             "treatments": [{"name": "banner", "channel": "web"}]}
            for name, rule, value in (
                ("welcome", "", 1_000_000),
                ("member_offer", "profile.member", 3_000_000),
                ("finish_order", "profile.carts_visit > 0.0", 5_000_000),
                ("thank_you", "profile.spender", 9_000_000),
            )
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        with server.client() as client:
            client.push_catalog(catalog())
        yield server
        assert server.roles() == roles, "a role died"


@pytest.fixture(scope="module")
def connections(running: Server) -> Iterator[list[Client]]:
    with running.client_on("worker-0") as first, running.client_on("worker-1") as second:
        yield [first, second]


@pytest.fixture
def both(running: Server, connections: list[Client]) -> Iterator[list[Client]]:
    """One client for each worker."""
    for _ in told(running):
        yield connections


@pytest.fixture
def client(both: list[Client]) -> Client:
    return both[0]


def say(client: Client, source: str, *who: Pair, **parts: Any) -> int:
    """Record what a source says about one person, under an id of its own; return the LSN."""
    return send(client, source_record(f"r{next(_serial)}", source, who, **parts))


def send(client: Client, *records: SourceRecord) -> int:
    reply = client.ingest_records(records)
    assert all(result.HasField("accepted") for result in reply.results), reply
    return reply.lsn


def applied(client: Client, lsn: int) -> None:
    until(lambda: client.audit_sources(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")


def known(client: Client, who: Pair, lsn: int = 0, **options: Any) -> GetProfileResponse:
    """Read a golden record as it stands when an LSN is applied."""
    applied(client, lsn)
    return client.get_profile(identity=who, **options)


def shown(client: Client, lsn: int, n: int = 4, **whose: Any) -> list[str]:
    """Decide on a state that includes an LSN; return the actions, best first."""
    applied(client, lsn)
    reply = client.decide({"greedy": n}, at_least_lsn=lsn, preview=True, **whose)
    assert Degradation.DEGRADATION_PROFILE_STALE not in reply.degradations
    return [slot.action for slot in reply.slots if slot.action]


def resolved(client: Client, *who: Pair) -> list[ResolvedIdentity]:
    return list(client.resolve_identity(who).resolved)


def names(profile: Profile) -> set[Pair]:
    return {(identity.namespace, identity.value) for identity in profile.identities}


def lasting(client: Client, who: Pair) -> tuple[Any, ...]:
    """Return all that a golden record says but for instants and log positions of its joining and parting."""
    reply = known(client, who, timeline_page_size=500)
    profile = reply.profile
    return (
        profile.profile_id,
        names(profile),
        {name: str(value) for name, value in profile.attributes.items()},
        {name: str(value) for name, value in profile.windows.items()},
        {each.segment for each in profile.segments},
        [str(each) for each in profile.contacts],
        [str(each) for each in profile.consents],
        list(profile.former_profile_ids),
        [str(each) for each in reply.touchpoints if not each.HasField("segment_change")],
    )


# History and decisions.


def test_what_is_put_into_the_cart_changes_the_next_page_of_the_same_visit(both: list[Client]) -> None:
    browser = ("browser_id", "cart")
    lsn = say(both[0], "shop", browser, event=event("visit"))
    assert shown(both[1], lsn, identities=[browser]) == ["welcome"]
    lsn = say(both[0], "shop", browser, event=event("cart", {"total": 20}))
    assert shown(both[1], lsn, identities=[browser]) == ["finish_order", "welcome"]


def test_cart_of_another_visit_is_no_matter_of_this_one(client: Client) -> None:
    browser = ("browser_id", "yesterday's cart")
    lsn = say(client, "shop", browser, event=event("cart", {"total": 20}, occurrence_time=NOON))
    assert shown(client, lsn, identities=[browser]) == ["welcome"]


def test_login_brings_nameless_history_to_the_person_and_the_next_decision_shows_it(both: list[Client]) -> None:
    browser, number = ("browser_id", "nameless"), ("customer_number", "nameless no more")
    say(both[0], "shop", browser, event=event("purchase", {"total": 150}))
    lsn = say(both[0], "crm", number, attributes={"member": True})
    nameless = known(both[0], browser, lsn).profile
    assert shown(both[1], lsn, identities=[number]) == ["member_offer", "welcome"]
    lsn = say(both[1], "shop", browser, number, event=event("visit"))
    for who in (browser, number):
        assert shown(both[0], lsn, identities=[who]) == ["thank_you", "member_offer", "welcome"]
    person = known(both[1], number, lsn, timeline_page_size=10)
    assert names(person.profile) == {browser, number}
    assert [segment.segment for segment in person.profile.segments] == ["spender"]
    kinds = [each.event.event.type for each in person.touchpoints if each.HasField("event")]
    assert kinds == ["visit", "purchase"]
    assert {link.reason for link in person.profile.links} == {LinkReason.LINK_REASON_SHARED_RECORD}
    assert nameless.profile_id in {person.profile.profile_id, *person.profile.former_profile_ids}


def test_device_of_two_people_shows_neither_what_the_other_did(both: list[Client]) -> None:
    browser, one, other = ("browser_id", "shared"), ("customer_number", "s1"), ("customer_number", "s2")
    say(both[0], "shop", browser, one, event=event("purchase", {"total": 500}))
    lsn = say(both[0], "shop", browser, other, event=event("visit"))
    assert shown(both[1], lsn, identities=[other]) == ["welcome"]
    assert shown(both[1], lsn, identities=[one]) == ["thank_you", "welcome"]
    assert shown(both[1], lsn, identities=[browser]) == ["welcome"]


# Merging, splitting, reviewing.


def test_merge_brings_two_people_together_and_split_gives_each_their_own_back(both: list[Client]) -> None:
    one, other = ("customer_number", "merged"), ("email", "merged@example.com")
    say(both[0], "crm", one, attributes={"member": True, "age": 40}, consents=[consent("marketing", granted=True)])
    lsn = say(both[0], "shop", other, attributes={"age": 30}, event=event("purchase", {"total": 150}))
    for who in (one, other):
        lsn = both[0].decide({"greedy": 1}, identities=[who], at_least_lsn=lsn, durable=True).lsn
    applied(both[1], lsn)
    before = [lasting(both[1], who) for who in (one, other)]
    assert before[0][0] != before[1][0]

    checked = both[0].link_identities(one, other, SAME, stated_by="clerk", request_id="merge", validate_only=True)
    assert checked.lsn == 0
    assert [lasting(both[1], who) for who in (one, other)] == before, "a mere check changes nothing"
    lsn = both[0].link_identities(one, other, SAME, stated_by="clerk", request_id="merge").lsn
    merged = known(both[1], one, lsn).profile
    assert names(merged) == {one, other}
    assert merged.profile_id == before[0][0], "the older id stands"
    assert list(merged.former_profile_ids) == [before[1][0]]
    assert merged.attributes["age"].value.number_value == 40.0, "the more trusted source is believed"
    assert [claim.value.number_value for claim in merged.attributes["age"].other_claims] == [30.0]
    assert sum(contact.count for contact in merged.contacts) == 2
    (link,) = merged.links
    assert (link.reason, link.source) == (LinkReason.LINK_REASON_STATED, "clerk")

    former = before[1][0]
    assert both[0].get_profile(profile_id=former).profile.profile_id == merged.profile_id
    assert json.loads(both[1].export_profile(profile_id=former))["profile"]["profileId"] == merged.profile_id
    for profile_id in (merged.profile_id, former):
        assert shown(both[0], lsn, profile_id=profile_id) == ["thank_you", "member_offer", "welcome"]

    whole = lasting(both[0], one)
    both[1].split_profile(former, [other], stated_by="clerk", request_id="split", validate_only=True)
    assert lasting(both[0], one) == whole, "a mere check changes nothing"
    lsn = both[1].split_profile(former, [other], stated_by="clerk", request_id="split").lsn
    applied(both[0], lsn)
    assert [lasting(both[0], who) for who in (one, other)] == before
    assert shown(both[0], lsn, identities=[one]) == ["member_offer", "welcome"]
    assert shown(both[0], lsn, profile_id=former) == ["thank_you", "welcome"]
    lsn = say(both[0], "crm", one, other)
    assert known(both[1], one, lsn).profile.profile_id != known(both[1], other).profile.profile_id, "they stay apart"


def alike(client: Client, given_name: str) -> tuple[Pair, Pair, int]:
    """Have two people known who agree somewhat: one name, two e-mail addresses."""
    one, other = ("customer_number", given_name.lower()), ("email", f"{given_name.lower()}@example.org")
    mine = {"given_name": given_name, "family_name": "Okonkwo", "email_address": "first.choice@example.com"}
    say(client, "crm", one, attributes=mine)
    lsn = say(client, "shop", other, attributes=mine | {"email_address": f"{given_name}.o@example.net"})
    return one, other, lsn


def reviewed(client: Client) -> dict[frozenset[Pair], Any]:
    """Read the whole queue, a pair at a time."""
    found: dict[frozenset[Pair], Any] = {}
    token, weights = "", []
    while True:
        page = client.list_match_reviews(page_size=1, page_token=token)
        for each in page.reviews:
            ends = ((each.identity.namespace, each.identity.value),
                    (each.other_identity.namespace, each.other_identity.value))  # fmt: skip
            assert frozenset(ends) not in found
            found[frozenset(ends)] = each
            weights.append(each.weight)
        token = page.next_page_token
        if not token:
            assert weights == sorted(weights, reverse=True), "the most certain come first"
            return found


def test_pair_that_agrees_somewhat_waits_for_review_and_goes_when_it_is_judged(both: list[Client]) -> None:
    same = alike(both[0], "Ngozi")
    different = alike(both[0], "Chidera")
    applied(both[1], max(same[2], different[2]))
    pairs = [frozenset(each[:2]) for each in (same, different)]
    waiting = reviewed(both[1])
    assert set(pairs) <= waiting.keys()
    review = waiting[pairs[0]]
    ids = {known(both[1], who).profile.profile_id for who in same[:2]}
    assert {review.profile_id, review.other_profile_id} == ids
    assert len(ids) == 2
    assert 6.0 <= review.weight < 12.0

    lsn = both[0].link_identities(*same[:2], SAME, stated_by="clerk", request_id="judge one").lsn
    applied(both[1], lsn)
    assert pairs[0] not in reviewed(both[1])
    assert len({known(both[1], who).profile.profile_id for who in same[:2]}) == 1

    lsn = both[0].link_identities(*different[:2], DIFFERENT, stated_by="clerk", request_id="judge other").lsn
    applied(both[1], lsn)
    assert pairs[1] not in reviewed(both[1])
    lsn = say(both[0], "crm", *different[:2])
    applied(both[1], lsn)
    assert len({known(both[1], who).profile.profile_id for who in different[:2]}) == 2, "a record does not overrule it"
    lsn = both[0].link_identities(*different[:2], SAME, stated_by="clerk", request_id="judge anew").lsn
    applied(both[1], lsn)
    assert len({known(both[1], who).profile.profile_id for who in different[:2]}) == 1, "a later statement does"
    profile = known(both[0], different[0]).profile
    both[0].split_profile(profile.profile_id, [different[1]], stated_by="clerk", request_id="part them again")
    applied(both[1], say(both[0], "crm", different[0]))
    assert pairs[1] not in reviewed(both[1]), "who was parted is no longer in question"


def proposed(client: Client, label: str, weight: float, **attributes: str) -> tuple[frozenset[Pair], int]:
    """Have a pair proposed; return it, and how many people it is of then."""
    one, other = ("customer_number", label), ("email", f"{label}@example.com")
    say(client, "crm", one, attributes=attributes)
    applied(client, say(client, "shop", other, attributes=attributes))
    reply = client.link_identities(one, other, PROPOSED, weight=weight, stated_by="matcher", request_id=label)
    return frozenset((one, other)), len({known(client, who, reply.lsn).profile.profile_id for who in (one, other)})


def test_proposals_are_judged_by_the_thresholds_of_the_catalog(client: Client) -> None:
    light, n_of_light = proposed(client, "light", 3.0)
    middling, n_of_middling = proposed(client, "middling", 9.0)
    heavy, n_of_heavy = proposed(
        client, "heavy", 15.0, given_name="Ilse", family_name="Aakjaer", birth_date="1950-02-03"
    )
    assert (n_of_light, n_of_middling, n_of_heavy) == (2, 2, 1)
    queue = reviewed(client)
    assert [pair in queue for pair in (light, middling, heavy)] == [False, True, False]
    assert queue[middling].weight == 9.0


def test_heavy_proposal_links_people_of_whom_nothing_else_is_known(client: Client) -> None:
    assert proposed(client, "heavy_and_bare", 15.0)[1] == 1


def test_people_who_agree_in_nearly_all_become_one_by_themselves(client: Client) -> None:
    attributes = {"given_name": "Matthias", "family_name": "Oberhuber", "birth_date": "1971-03-09"}
    one, other = ("customer_number", "oberhuber"), ("email", "oberhuber@example.com")
    say(client, "crm", one, attributes=attributes)
    lsn = say(client, "shop", other, attributes=attributes | {"email_address": "matthias@example.com"})
    profile = known(client, one, lsn).profile
    assert names(profile) == {one, other}
    (link,) = profile.links
    assert link.reason == LinkReason.LINK_REASON_MATCHED
    assert link.weight >= 12.0


def test_identity_says_whom_it_leads_to_and_why_not(both: list[Client]) -> None:
    client = both[0]
    browser, family = ("browser_id", "in the library"), ("family_account", "the Lis")
    one, other, third = [("customer_number", f"reader {i}") for i in range(3)]
    say(client, "shop", one, family, browser)
    lsn = say(client, "shop", other, family)
    ids = sorted(known(client, who, lsn).profile.profile_id for who in (one, other))
    states = resolved(both[1], ("customer_number", "nobody at all"), one, browser, family)
    assert [each.state for each in states] == [
        IdentityState.IDENTITY_STATE_UNKNOWN,
        IdentityState.IDENTITY_STATE_LEADS,
        IdentityState.IDENTITY_STATE_LEADS,
        IdentityState.IDENTITY_STATE_SHARED,
    ]
    assert [len(each.profile_ids) for each in states] == [0, 1, 1, 2]
    assert states[1].profile_ids == states[2].profile_ids
    assert list(states[3].profile_ids) == ids, "a household leads to all of its people"

    lsn = say(client, "shop", browser, other)
    applied(both[1], lsn)
    (state,) = resolved(both[1], browser)
    assert state.state == IdentityState.IDENTITY_STATE_SHARED
    assert set(ids) <= set(state.profile_ids)
    lsn = say(client, "shop", browser, third)
    applied(both[1], lsn)
    (state,) = resolved(both[1], browser)
    assert (state.state, list(state.profile_ids)) == (IdentityState.IDENTITY_STATE_TOO_SHARED, [])
    refused = client.ingest_records([source_record("by the library alone", "shop", [browser])]).results[0]
    assert refused.error.metadata["limit"] == "2"


def test_identity_is_compared_in_one_form(client: Client) -> None:
    lsn = say(client, "shop", ("email", "Greta.Holm@Example.COM"), attributes={"age": 50})
    applied(client, lsn)
    (state,) = resolved(client, ("email", " greta.holm@EXAMPLE.com "))
    assert state.state == IdentityState.IDENTITY_STATE_LEADS
    assert state.identity.value == "greta.holm@example.com"


# What is told of a person.


def moment(touchpoint: Touchpoint) -> tuple[int, int]:
    return touchpoint.occurrence_time.ToNanoseconds(), touchpoint.lsn


def test_timeline_pages_through_everything_in_order_without_loss_or_repeat(both: list[Client]) -> None:
    browser, number = ("browser_id", "long history"), ("customer_number", "long history")
    lsns = [
        say(both[0], "shop", (browser, number)[i % 2], event=event("cart", {"total": i}, occurrence_time=NOON + after))
        for i, after in enumerate([timedelta(hours=h) for h in (5, 3, 3, 3, 1, 4, 2, 2)])
    ]
    say(both[0], "crm", browser, number, attributes={"age": 33})  # no event: it is no touchpoint
    lsns.append(say(both[0], "shop", browser, number, event=event("purchase", {"total": 500})))
    applied(both[0], lsns[-1])
    for i in range(3):
        reply = both[0].decide({"greedy": 2}, identities=[number], at_least_lsn=lsns[-1], durable=True)
        lsns.append(reply.lsn)
        told_of = both[0].batch_report_outcomes(
            [outcome(reply.decision_id, reply.slots[0].action, f"o{i}", kind) for kind in ("click",)]
        )
        lsns.append(told_of.results[0].accepted.lsn)

    whole = known(both[1], number, lsns[-1], timeline_page_size=500)
    assert whole.next_timeline_page_token == ""
    touchpoints = list(whole.touchpoints)
    assert touchpoints == sorted(touchpoints, key=moment, reverse=True), "newest first"
    noted = [each.lsn for each in touchpoints if not each.HasField("segment_change")]
    assert sorted(noted) == sorted(lsns), "each once"
    kinds = [each.WhichOneof("kind") for each in touchpoints]
    assert {kind: kinds.count(kind) for kind in ("event", "decision", "outcome", "segment_change")} == {
        "event": 9, "decision": 3, "outcome": 3, "segment_change": 1,
    }  # fmt: skip
    first = next(each for each in touchpoints if each.HasField("outcome"))
    assert first.outcome.decision_lsn in lsns
    assert {each.channel for each in touchpoints if each.HasField("decision")} == {"web"}

    for size in (1, 4, len(touchpoints)):
        paged: list[Touchpoint] = []
        token, n_pages = "", 0
        while True:
            page = both[n_pages % 2].get_profile(identity=number, timeline_page_size=size, timeline_page_token=token)
            paged += page.touchpoints
            token, n_pages = page.next_timeline_page_token, n_pages + 1
            if not token:
                break
        assert paged == touchpoints
        assert n_pages == -(-len(touchpoints) // size), "no page is empty"
    assert not known(both[1], number).touchpoints, "nobody asked for them"


def test_changes_of_two_parts_by_one_record_are_on_pages_of_their_own(client: Client) -> None:
    one, other = ("customer_number", "parted"), ("email", "parted@example.com")
    say(client, "shop", one, event=event("visit"))
    lsn = say(client, "shop", one, other)
    lsn = say(client, "shop", other, event=event("purchase", {"total": 300}))
    profile_id = known(client, one, lsn).profile.profile_id
    lsn = client.split_profile(profile_id, [other], stated_by="clerk", request_id="parted").lsn
    applied(client, lsn)
    lsn = client.link_identities(one, other, SAME, stated_by="clerk", request_id="together again").lsn
    whole = list(known(client, one, lsn, timeline_page_size=500).touchpoints)
    assert len({(each.lsn, str(each.segment_change)) for each in whole}) == len(whole)
    paged: list[Touchpoint] = []
    token = ""
    while len(paged) < len(whole):
        page = client.get_profile(identity=one, timeline_page_size=1, timeline_page_token=token)
        paged += page.touchpoints
        token = page.next_timeline_page_token
        if not token:
            break
    assert paged == whole


def test_page_begun_before_a_merge_goes_on_after_it(both: list[Client]) -> None:
    one, other = ("customer_number", "paged"), ("email", "paged@example.com")
    for i in range(4):
        say(both[0], "shop", one, event=event("cart", {"total": i}, occurrence_time=NOON + timedelta(hours=2 * i)))
    lsn = say(both[0], "shop", other, event=event("cart", {"total": 9}, occurrence_time=NOON + timedelta(hours=1)))
    first = known(both[1], one, lsn, timeline_page_size=2)
    lsn = both[0].link_identities(one, other, SAME, stated_by="clerk", request_id="merge between pages").lsn
    rest = known(
        both[1], one, lsn, timeline_page_size=10, timeline_page_token=first.next_timeline_page_token
    ).touchpoints
    totals = [each.event.event.properties["total"].number_value for each in (*first.touchpoints, *rest)]
    assert totals == [3.0, 2.0, 1.0, 9.0, 0.0]


def test_export_is_json_with_every_source_record(client: Client) -> None:
    browser, number = ("browser_id", "exported"), ("customer_number", "exported")
    records = [
        source_record("e1", "shop", [browser], event=event("cart", {"total": 12.5}, occurrence_time=NOON)),
        source_record("e2", "crm", [number], attributes={"given_name": "Zoë", "age": 61}),
        source_record("e3", "shop", [browser, number], consents=[consent("marketing", granted=True, channel="mail")]),
        source_record("e4", "crm", [number], consents=[consent("marketing", granted=False, channel="mail")]),
    ]
    lsn = send(client, *records)
    applied(client, lsn)
    document = json.loads(client.export_profile(identity=number))
    assert document["format"] == "tsugi.profile.v1"
    assert document["appliedLsn"] >= lsn
    assert [each["record"] for each in document["sourceRecords"]] == [
        json_format.MessageToDict(record) for record in records
    ]
    assert {(each["namespace"], each["value"]) for each in document["profile"]["identities"]} == {browser, number}
    assert document["profile"]["attributes"]["given_name"]["value"]["textValue"] == "Zoë"
    assert [each["consent"]["state"] for each in document["consentLedger"]] == [
        "CONSENT_DECISION_GRANTED", "CONSENT_DECISION_WITHDRAWN",
    ]  # fmt: skip
    (touchpoint,) = document["timeline"]
    assert touchpoint["event"]["source"] == "shop"
    assert document["personalDataAttributes"] == ["given_name", "family_name", "email_address"]
    by_id = json.loads(client.export_profile(profile_id=document["profile"]["profileId"], at_least_lsn=lsn))
    assert by_id["sourceRecords"] == document["sourceRecords"]


def states_of(profile: Profile) -> dict[Pair, str]:
    return {
        (each.consent.purpose, each.consent.channel): ConsentDecision.Name(each.consent.state).rpartition("_")[2]
        for each in profile.consents
    }


def test_withdrawn_consent_stands_before_a_grant_of_the_same_instant_and_of_an_earlier_one(client: Client) -> None:
    one, other = ("customer_number", "consenting"), ("email", "consenting@example.com")
    earlier, later = NOON, NOON + timedelta(hours=1)
    withdrawal = consent("marketing", granted=False, effective_time=later)
    say(client, "crm", one, consents=[withdrawal])
    say(client, "shop", one, consents=[consent("marketing", granted=True, effective_time=later)])
    say(client, "shop", one, consents=[consent("marketing", granted=True, effective_time=earlier)])
    say(client, "crm", one, consents=[consent("service", granted=False, effective_time=earlier)])
    lsn = say(client, "shop", one, consents=[consent("service", granted=True)], observation_time=later)
    lsn = say(client, "shop", one, consents=[consent("marketing", granted=True, channel="mail")])
    profile = known(client, one, lsn).profile
    assert states_of(profile) == {
        ("marketing", ""): "WITHDRAWN", ("marketing", "mail"): "GRANTED", ("service", ""): "GRANTED",
    }  # fmt: skip
    stands = next(each for each in profile.consents if not each.consent.channel and each.consent.purpose == "marketing")
    assert (stands.source, stands.consent) == ("crm", withdrawal)
    say(client, "shop", other, consents=[consent("service", granted=False, effective_time=later + timedelta(hours=1))])
    lsn = say(client, "shop", one, other)
    assert states_of(known(client, one, lsn).profile)["service", ""] == "WITHDRAWN", (
        "also of the other half of a person"
    )


def audits(client: Client, lsn: int) -> dict[str, SourceAudit]:
    applied(client, lsn)
    return {each.source: each for each in client.audit_sources().sources}


def test_audit_counts_what_each_source_says_and_what_it_never_does(both: list[Client]) -> None:
    number = ("customer_number", "audited")
    before = audits(both[0], say(both[0], "crm", number, attributes={"age": 40, "member": True}))
    say(both[0], "survey", number, attributes={"age": 44, "shoe_size": 43})
    say(both[0], "survey", number, attributes={"age": 40})
    say(both[0], "survey", number, attributes={"age": 40})  # nothing new
    say(both[0], "survey", number, attributes={"birth_date": "the day before yesterday"})
    lsn = say(both[0], "survey", number, event=event("visit"))
    reply = both[1]
    after = audits(reply, lsn)
    assert list(after) == ["crm", "shop", "survey", "bought"]
    survey, was = after["survey"], before["survey"]
    assert (survey.owner, survey.party) == ("research", "second")
    assert survey.records - was.records == 5
    assert survey.duplicates - was.duplicates == 1
    assert survey.quarantined == 0
    assert survey.last_record_time.ToMicroseconds() > 0
    by_name = {each.attribute: each for each in survey.attributes}
    assert list(by_name) == ["birth_date", "age", "shoe_size"], "those it may write, as declared"
    assert (by_name["age"].stated, by_name["age"].conflicts) == (3, 1)
    assert by_name["age"].completeness_share == 3 / 4
    assert (by_name["shoe_size"].stated, by_name["shoe_size"].conflicts) == (1, 0)
    assert by_name["birth_date"].uncleansed == 1
    assert by_name["shoe_size"].unused
    assert not by_name["age"].unused
    assert list(survey.unused_event_types) == ["purchase"]
    assert after["crm"].records == before["crm"].records
    assert {name: audit.stale for name, audit in after.items()} == {
        "crm": False, "shop": False, "survey": False, "bought": True,
    }  # fmt: skip
    assert not after["bought"].HasField("last_record_time")
    assert both[1].audit_sources().missing_attributes == ["nickname"]


def test_people_are_counted_over_all_workers_as_they_come_spend_and_are_merged(both: list[Client]) -> None:
    before = both[0].count_people()
    one, other = ("customer_number", "counted"), ("email", "counted@example.com")
    lsn = max(say(both[0], "shop", who, event=event("purchase", {"total": 200})) for who in (one, other))
    applied(both[1], lsn)
    grown = both[1].count_people()
    assert [each.name for each in grown.segments] == ["spender"]
    assert grown.people - before.people == grown.segments[0].people - before.segments[0].people == 2
    lsn = both[1].link_identities(one, other, SAME, stated_by="clerk", request_id="counted").lsn
    applied(both[0], lsn)
    merged = both[0].count_people()
    assert (merged.people, merged.segments[0].people) == (grown.people - 1, grown.segments[0].people - 1)


# Asked twice.


def refused(call: Any) -> str:
    with pytest.raises(CallError) as refusal:
        call()
    return str(refusal.value.reason)


def pairs_known(client: Client, label: str) -> Sequence[Pair]:
    one, other, third = ("customer_number", label), ("email", f"{label}@example.com"), ("browser_id", label)
    for who in (one, other, third):
        lsn = say(client, "shop", who)
    applied(client, lsn)
    return one, other, third


def test_statement_repeated_is_the_same_statement_and_its_id_takes_no_other(both: list[Client]) -> None:
    one, other, third = pairs_known(both[0], "linked-twice")
    link = {"stated_by": "clerk", "request_id": "link twice"}
    first = both[0].link_identities(one, other, SAME, **link)  # type: ignore[arg-type]  # texts for texts
    again = both[1].link_identities(one, other, SAME, **link)  # type: ignore[arg-type]  # texts for texts
    assert (first.duplicate, again.duplicate, again.lsn) == (False, True, first.lsn)
    for other_call in (
        lambda: both[1].link_identities(one, other, DIFFERENT, **link),  # type: ignore[arg-type]  # texts for texts
        lambda: both[1].link_identities(one, third, SAME, **link),  # type: ignore[arg-type]  # texts for texts
    ):
        assert refused(other_call) == "ERROR_REASON_IDEMPOTENCY_KEY_REUSED"

    profile_id = known(both[1], one, first.lsn).profile.profile_id
    split = both[0].split_profile(profile_id, [other], stated_by="clerk", request_id="split twice")
    applied(both[1], split.lsn)
    again_split = both[1].split_profile(profile_id, [other], stated_by="clerk", request_id="split twice")
    assert (split.duplicate, again_split.duplicate, again_split.lsn) == (False, True, split.lsn)
    assert known(both[1], one).profile.profile_id != known(both[1], other).profile.profile_id
    again = both[1].link_identities(one, other, SAME, **link)  # type: ignore[arg-type]  # texts for texts
    assert again.duplicate, "an old statement repeated does not undo what came after it"
    applied(both[0], again.lsn)
    assert known(both[0], one).profile.profile_id != known(both[0], other).profile.profile_id
    assert (
        refused(lambda: both[1].split_profile(profile_id, [one], stated_by="clerk", request_id="split twice"))
        == "ERROR_REASON_IDEMPOTENCY_KEY_REUSED"
    )


def test_erased_person_is_a_stranger_at_once_and_the_wish_may_be_repeated(both: list[Client]) -> None:
    one, other, third = pairs_known(both[0], "forgotten")
    lsn = say(both[0], "shop", one, other, third, event=event("purchase", {"total": 200}))
    assert shown(both[1], lsn, identities=[one]) == ["thank_you", "welcome"]
    profile_id = known(both[1], one).profile.profile_id
    wish = both[0].erase_profile("forget me", identity=one)
    for who in (one, other, third):
        reply = both[1].decide({"greedy": 1}, identities=[who], preview=True)
        assert Degradation.DEGRADATION_PROFILE_UNKNOWN in reply.degradations
        assert reply.slots[0].action == "welcome"
        assert refused(lambda who=who: both[1].get_profile(identity=who)) == "ERROR_REASON_RESOURCE_NOT_FOUND"
    assert refused(lambda: both[1].export_profile(profile_id=profile_id)) == "ERROR_REASON_RESOURCE_NOT_FOUND"
    assert [each.state for each in resolved(both[1], one, other, third)] == [IdentityState.IDENTITY_STATE_UNKNOWN] * 3

    again = both[1].erase_profile("forget me", identity=one)
    assert (wish.duplicate, again.duplicate) == (False, True)
    assert (again.erasure_id, again.lsn) == (wish.erasure_id, wish.lsn)
    assert refused(lambda: both[1].erase_profile("forget me", identity=other)) == "ERROR_REASON_IDEMPOTENCY_KEY_REUSED"
    stranger = both[1].erase_profile("forget a stranger", identity=("customer_number", "never known"))
    assert not stranger.duplicate, "strangers are answered alike"

    def fulfilled() -> bool:
        return both[0].get_erasure(wish.erasure_id).state == ErasureState.ERASURE_STATE_FULFILLED

    until(fulfilled, "the erasure is fulfilled")
    receipt = both[1].get_erasure(wish.erasure_id).receipt
    assert receipt.erasure_id == wish.erasure_id
    assert receipt.erased_records >= 4
    signature, receipt.signature = receipt.signature, b""
    key, receipt.public_key = receipt.public_key, b""
    Ed25519PublicKey.from_public_bytes(key).verify(signature, receipt.SerializeToString(deterministic=True))
    lsn = say(both[0], "shop", one)
    assert names(known(both[1], one, lsn).profile) == {one}, "who comes back comes back as a new person"
    assert known(both[1], one).profile.profile_id != profile_id


def old_files(running: Server) -> list[str]:
    """Return the data files that are gone and still open in some role."""
    return [
        f"{role}: {target}"
        for role, pid in running.roles().items()
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if (target := str(entry.readlink())).endswith("data.mdb (deleted)")
    ]


def test_refused_call_keeps_no_file_of_the_state_before_an_erasure_open(running: Server, both: list[Client]) -> None:
    who = ("customer_number", "kept open?")
    profile_id = known(both[0], who, say(both[0], "shop", who, attributes={"nickname": "Zyx"})).profile.profile_id
    nobody = ("customer_number", "nobody")
    for client in both:
        for call in (
            lambda client=client: client.get_profile(identity=nobody),
            lambda client=client: client.export_profile(identity=nobody),
            lambda client=client: client.split_profile(profile_id, [nobody], stated_by="clerk", request_id="refused"),
            lambda client=client: client.link_identities(who, nobody, SAME, stated_by="clerk", request_id="refused"),
        ):
            assert refused(call) == "ERROR_REASON_RESOURCE_NOT_FOUND"
    wish = both[0].erase_profile("leave nothing open", identity=who)
    until(
        lambda: both[0].get_erasure(wish.erasure_id).state == ErasureState.ERASURE_STATE_FULFILLED,
        "the erasure is fulfilled",
    )
    until(lambda: not old_files(running), "every role lets go of the old files")


def test_who_is_not_projected_yet_is_not_called_unknown(client: Client) -> None:
    nobody = ("customer_number", "not yet")
    at_least_lsn = client.count_people().applied_lsn + 1_000_000
    with pytest.raises(CallError) as caught:
        client.get_profile(identity=nobody, at_least_lsn=at_least_lsn)
    assert caught.value.reason == "ERROR_REASON_STATE_BEHIND"
    assert caught.value.metadata["at_least_lsn"] == str(at_least_lsn)
    assert refused(lambda: client.get_profile(identity=nobody)) == "ERROR_REASON_RESOURCE_NOT_FOUND"
