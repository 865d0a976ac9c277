"""The whole walk over the wire: a catalog, a person, a decision, an outcome, and what every worker then knows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import catalogs
from tests.support.running import Server, serving, told, until
from tsugi.client import Client, event, source_record
from tsugi.requests import DecideOptions
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.profile_pb2 import Profile

pytestmark = pytest.mark.slow

GREEDY = {"greedy": 1}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def both(server: Server) -> Iterator[list[Client]]:
    """One client for each worker."""
    with server.client_on("worker-0") as first, server.client_on("worker-1") as second:
        yield [first, second]


@pytest.fixture(scope="module", autouse=True)
def catalog_lsn(running: Server) -> int:
    """Two actions for members, the first of them worth more; and one for everybody."""
    actions = [
        {
            "name": name,
            "eligibility": rule,
            "valueMicros": value,
            "treatments": [{"name": "banner", "channel": "web", "content": {"title": name}}],
        }
        for name, rule, value in (
            ("anybody", "", 1_000_000),
            ("member_dear", "profile.member", 3_000_000),
            ("member_old", "profile.member && profile.age >= 60.0", 9_000_000),
        )
    ]
    with running.client() as client:
        return client.push_catalog(catalogs.message(actions=actions)).lsn


def ingest(client: Client, person: str, **attributes: float | bool | str) -> int:
    """Record attributes of one person and return the LSN."""
    record = source_record(f"{person}/{sorted(attributes)}", "crm", {"customer_number": person}, attributes=attributes)
    return client.ingest_records([record]).lsn


def profile_of(client: Client, person: str, at_least_lsn: int = 0) -> Profile:
    return client.get_profile(identity=("customer_number", person), at_least_lsn=at_least_lsn).profile


def test_decision_sees_what_was_ingested_up_to_the_lsn_it_names(both: list[Client]) -> None:
    for person, (writer, reader) in {"seen_1": both, "seen_2": both[::-1]}.items():
        lsn = ingest(writer, person, member=True, age=30)
        reply = reader.decide(GREEDY, identities={"customer_number": person}, at_least_lsn=lsn)
        assert [slot.action for slot in reply.slots] == ["member_dear"]
        assert Degradation.DEGRADATION_PROFILE_STALE not in reply.degradations
        lsn = ingest(writer, person, age=61)
        reply = reader.decide(GREEDY, identities={"customer_number": person}, at_least_lsn=lsn)
        assert [slot.action for slot in reply.slots] == ["member_old"]


def test_unknown_person_is_decided_on_context_alone(client: Client) -> None:
    reply = client.decide(GREEDY, identities={"customer_number": "never heard of"})
    assert [slot.action for slot in reply.slots] == ["anybody"]
    assert Degradation.DEGRADATION_PROFILE_UNKNOWN in reply.degradations


def test_reply_says_all_that_its_caller_needs(client: Client, catalog_lsn: int) -> None:
    lsn = ingest(client, "told", member=True)
    reply = client.decide(
        {"greedy": 2, "mail": 1}, identities={"customer_number": "told"}, at_least_lsn=lsn, durable=True
    )
    assert [(slot.placement, slot.position) for slot in reply.slots] == [("greedy", 0), ("greedy", 1), ("mail", 0)]
    best = reply.slots[0]
    assert (best.action, best.treatment, best.content["title"]) == ("member_dear", "banner", "member_dear")
    assert best.priority == pytest.approx(best.propensity * best.value)
    assert (best.value, best.selection_probability) == (3.0, 1.0)
    assert not reply.slots[2].action, "both eligible actions are shown already"
    assert reply.catalog_revision == client.get_catalog().revision
    assert reply.lsn > lsn > catalog_lsn
    assert reply.expire_time.seconds


def test_decision_is_a_contact_at_once_and_counts_once(both: list[Client]) -> None:
    lsn = ingest(both[0], "contacted", member=True)
    asked: DecideOptions = {"identities": {"customer_number": "contacted"}, "at_least_lsn": lsn, "durable": True}
    reply = both[0].decide(GREEDY, **asked)
    for outcome_type in ("click", "dismiss"):
        told_lsn = both[1].report_outcome(reply.decision_id, "member_dear", outcome_type, outcome_type).lsn
        (contact,) = profile_of(both[1], "contacted", told_lsn).contacts
        assert (contact.action, contact.count) == ("member_dear", 1)


def test_shown_later_is_a_contact_from_its_first_outcome_on(both: list[Client]) -> None:
    lsn = ingest(both[0], "impressed", member=True)
    reply = both[0].decide({"mail": 1}, identities={"customer_number": "impressed"}, at_least_lsn=lsn, durable=True)
    assert not profile_of(both[1], "impressed", reply.lsn).contacts
    for outcome_type in ("impression", "click"):
        told_lsn = both[1].report_outcome(reply.decision_id, "member_dear", outcome_type, outcome_type).lsn
        (contact,) = profile_of(both[1], "impressed", told_lsn).contacts
        assert (contact.action, contact.count) == ("member_dear", 1)


def test_event_and_every_identity_lead_to_one_profile(client: Client) -> None:
    record = source_record(
        "visit-1",
        "shop",
        {"browser_id": "b-1", "customer_number": "linked"},
        attributes={"tier": "gold"},
        event=event("visit", {"pages": 3}),
    )
    lsn = client.ingest_records([record]).lsn
    profiles = [
        client.get_profile(identity=identity, at_least_lsn=lsn).profile
        for identity in (("browser_id", "b-1"), ("customer_number", "linked"))
    ]
    assert profiles[0] == profiles[1]
    assert profiles[0].attributes["tier"].value.text_value == "gold"
    assert profiles[0].attributes["tier"].source == "shop"
    (visit,) = client.get_profile(identity=("browser_id", "b-1"), timeline_page_size=9).touchpoints
    assert visit.event.event.properties["pages"].number_value == 3.0
    assert visit.occurrence_time.seconds
    by_id = client.get_profile(profile_id=profiles[0].profile_id)
    assert by_id.profile == profiles[0]
    assert by_id.applied_lsn >= lsn


def test_preview_answers_and_records_nothing(client: Client) -> None:
    lsn = ingest(client, "previewed", member=True)
    person = {"customer_number": "previewed"}
    reply = client.decide(GREEDY, identities=person, at_least_lsn=lsn, preview=True)
    again = client.decide(GREEDY, identities=person, request_id="preview", preview=True)
    real = client.decide(GREEDY, identities=person, request_id="preview", durable=True)
    assert [slot.action for slot in (*reply.slots, *again.slots)] == ["member_dear", "member_dear"]
    assert (reply.decision_id, again.decision_id) == ("", "")
    assert real.decision_id, "the preview has not used up its request_id"
    (contact,) = profile_of(client, "previewed", real.lsn).contacts
    assert contact.count == 1


def test_accepted_decision_is_on_disk_soon_and_states_no_lsn(client: Client) -> None:
    lsn = ingest(client, "accepted", member=True)
    reply = client.decide(GREEDY, identities={"customer_number": "accepted"}, at_least_lsn=lsn)
    assert reply.lsn == 0
    until(lambda: profile_of(client, "accepted").contacts, "the contact is counted")


def test_workers_decide_alike(both: list[Client]) -> None:
    lsn = ingest(both[0], "alike", member=True, age=70)
    replies = [
        client.decide({"greedy": 3}, identities={"customer_number": "alike"}, at_least_lsn=lsn, preview=True)
        for client in both
    ]
    assert replies[0] == replies[1]
    assert [slot.action for slot in replies[0].slots] == ["member_old", "member_dear", "anybody"]


def test_lsn_that_never_comes_is_waited_for_briefly_and_told(client: Client) -> None:
    reply = client.decide(GREEDY, identities={"customer_number": "seen_1"}, at_least_lsn=1 << 60)
    assert Degradation.DEGRADATION_PROFILE_STALE in reply.degradations
    assert client.get_profile(identity=("customer_number", "seen_1"), at_least_lsn=1 << 60).applied_lsn < 1 << 60


def test_candidates_are_those_the_caller_names(client: Client) -> None:
    only = client.decide({"greedy": 3}, candidate_actions=["member_old", "anybody"], preview=True)
    assert [slot.action for slot in only.slots] == ["anybody", "", ""]
    without = client.decide({"greedy": 3}, excluded_actions=["anybody"], preview=True)
    assert [slot.action for slot in without.slots] == ["", "", ""]
