"""What is said of a decision afterwards is what was decided then."""

from __future__ import annotations

import pytest

from server.catalog.catalog import Catalog
from server.decisioning.explanation import explain
from tests.support.catalogs import compiled
from tests.support.deciding import Answer, Desk, given_champion
from tests.support.populating import Person
from tsugi.log.v1.state_pb2 import StoredContact, StoredTouch
from tsugi.requests import consent, decide_request
from tsugi.v1.decision_pb2 import RefusalReason
from tsugi.v1.decision_service_pb2 import CandidateExplanation, Explanation

NOW_US = 1_767_225_600_000_000
DAY_US = 86_400_000_000
ANNA = ("customer_number", "1")
ON_BOTH = [{"name": channel, "channel": channel} for channel in ("web", "call")]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return compiled(
        channels=[{"name": "web"}, {"name": "call"}],
        consentPurposes=[{"name": "marketing"}, {"name": "service", "consentExempt": True}],
        placements=[
            {"name": "page", "channel": "web", "goal": "click", "countMax": 3, "purpose": "service",
             "exploration": {"epsilonGreedy": {"epsilon": 0.3}}},
            {"name": "agent", "channel": "call", "goal": "click", "purpose": "marketing"},
        ],
        actionGroups=[{"name": "grown_up", "eligibility": "profile.age >= 18.0"}],
        actions=[
            {"name": "beer", "group": "grown_up", "treatments": ON_BOTH},
            {"name": "boots", "valueMicros": 5_000_000, "lever": 2.0, "treatments": ON_BOTH},
            {"name": "gold", "suitability": "profile.tier == 'gold' && context.hour > 6.0", "treatments": ON_BOTH},
            {"name": "lamp", "treatments": ON_BOTH[1:]},
            {"name": "socks", "treatments": ON_BOTH[:1]},
            {"name": "tent", "treatments": ON_BOTH},
        ],
        contactPolicies=[
            {"name": "once_a_day", "scope": "CONTACT_SCOPE_EACH_ACTION", "actions": ["tent"],
             "cap": {"countMax": 1, "span": "86400s"}},
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def answer(catalog: Catalog) -> Answer:
    desk = Desk(catalog, champion=given_champion(catalog, {"boots": 0.4, "socks": 0.2}, "click"))
    touch = StoredTouch(time_us=NOW_US - DAY_US // 2, channel="web", decision_lsn=1, ignored_us=NOW_US)
    contact = StoredContact(action="tent", count=1, recent=[touch])
    person = Person({"age": 16.0, "tier": "silver"}, dict([ANNA]), [consent("marketing", granted=False)], [contact])
    desk.meet(person, now_us=NOW_US)
    request = decide_request({"page": 2, "agent": 1}, identities=[ANNA], context={"hour": 9.0})
    return desk.ask(request, now_us=NOW_US)


@pytest.fixture(scope="module")
def explanation(answer: Answer, catalog: Catalog) -> Explanation:
    return explain(answer.record, catalog)


def of(explanation: Explanation, action: str) -> CandidateExplanation:
    return next(each for each in explanation.candidates if each.action == action)


@pytest.mark.parametrize(
    ("action", "reason", "refused_by", "facts"),
    [
        ("beer", "NOT_ELIGIBLE", "profile.age >= 18.0", {"profile.age": 16.0}),
        ("gold", "NOT_SUITABLE", "profile.tier == 'gold' && context.hour > 6.0",
         {"profile.tier": "silver", "context.hour": 9.0}),
        ("lamp", "CONSENT_WITHDRAWN", "consent.marketing.call", {"consent.marketing.call": False}),
        ("tent", "FREQUENCY_CAP", "once_a_day: tent", {}),
    ],
)  # fmt: skip
def test_refused_candidate_names_what_refused_it_and_the_facts_it_read(
    explanation: Explanation, action: str, reason: str, refused_by: str, facts: dict[str, object]
) -> None:
    told = of(explanation, action)
    assert RefusalReason.Name(told.refusal_reason) == f"REFUSAL_REASON_{reason}"
    assert told.refused_by == refused_by
    found = {each.fact: getattr(each.value, each.value.WhichOneof("kind") or "") for each in told.facts}
    assert found == facts


def test_survivor_has_each_factor_of_its_priority(explanation: Explanation, answer: Answer) -> None:
    assert [each.action for each in explanation.candidates[:2]] == ["boots", "socks"], "the best first"
    (page, agent) = of(explanation, "boots").standings
    assert (page.placement, agent.placement) == ("page", "agent")
    assert page.propensity == pytest.approx(0.4, abs=1e-6)
    assert (page.value, page.lever, page.weight) == (5.0, 2.0, 1.0)
    assert page.priority == pytest.approx(page.propensity * 10.0)
    assert page.priority == answer.reply.slots[0].priority or answer.reply.slots[0].action != "boots"


def test_chances_are_those_that_were_drawn_from(explanation: Explanation, answer: Answer) -> None:
    first, second = answer.reply.slots[:2]
    for slot in (first, second):
        (standing,) = [each for each in of(explanation, slot.action).standings if each.placement == "page"]
        assert standing.selection_probabilities[slot.position] == pytest.approx(slot.selection_probability, abs=1e-6)
    (standing,) = [each for each in of(explanation, first.action).standings if each.placement == "page"]
    assert standing.selection_probabilities[1] == 0.0, "taken by then"


def test_sentence_can_be_said_to_a_person(explanation: Explanation) -> None:
    assert "others were left out" in explanation.sentence
    assert "_REASON_" not in explanation.sentence
    assert explanation.sentence.endswith(".")


def test_several_goals_are_told_apart_and_their_sum_is_in_the_priority() -> None:
    goals = [
        {"name": name, "outcomes": [{"type": kind, "reward": 1}], "attributionWindow": "2s", "baseRate": rate}
        for name, kind, rate in (("click", "click", 0.1), ("sale", "order", 0.02), ("stay", "dismiss", 0.5))
    ]
    catalog = compiled(
        goals=goals,
        placements=[
            {"name": "one", "channel": "web", "goal": "stay"},
            {"name": "page", "channel": "web", "goals": [{"goal": "sale", "weight": 9}, {"goal": "click"}]},
            {"name": "side", "channel": "web", "goals": [{"goal": "stay"}, {"goal": "click", "weight": 3}]},
        ],
    )
    desk = Desk(catalog, champion=given_champion(catalog, {"action_2": 0.4}, "click"))
    answer = desk.ask(decide_request({"one": 1, "page": 1, "side": 1}, identities=[ANNA]))
    one, page, side = of(explain(answer.record, catalog), "action_2").standings
    told = [
        [(each.goal, each.weight, round(each.propensity, 6)) for each in standing.goals]
        for standing in (one, page, side)
    ]
    assert told == [
        [("stay", 1.0, 0.5)],
        [("sale", 9.0, 0.02), ("click", 1.0, 0.4)],
        [("stay", 1.0, 0.5), ("click", 3.0, 0.4)],
    ]
    assert [page.propensity, side.propensity] == pytest.approx([0.02, 0.5])
    assert [page.priority, side.priority] == pytest.approx([0.58, 1.7])
    assert answer.reply.slots[1].priority in {
        standing.priority
        for candidate in explain(answer.record, catalog).candidates
        for standing in candidate.standings
        if standing.placement == "page"
    }, "to the last bit"
    assert [slot.goal for slot in answer.record.slots] == ["stay", "sale", "stay"], "learned from for the first"
