"""No decision breaks a contact policy: random histories through the projector, counted again by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalog.catalog import Catalog
from server.catalog.contact_terms import CAPS, ContactPolicyTerms
from server.storage.memory import MemoryStore
from tests.support.catalogs import compiled
from tests.support.deciding import Desk, key_of
from tests.support.histories import SECOND_US
from tests.support.people import People
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.requests import decide_request, source_record

ACTIONS = ("action_0", "action_1", "action_2", "action_3")
GROUPS = {"action_0": "sport", "action_1": "sport", "action_2": "money"}
WINDOW_US = 2 * SECOND_US  # of the goal
ONE, OTHER = ("customer_number", "1"), ("browser_id", "b")


def _catalog(policies: Sequence[dict[str, object]]) -> Catalog:
    return compiled(
        actionGroups=[{"name": "sport"}, {"name": "money"}],
        actions=[
            {"name": name, "group": GROUPS.get(name, ""),
             "treatments": [{"name": channel, "channel": channel} for channel in ("web", "call")]}
            for name in ACTIONS
        ],
        channels=[{"name": "web"}, {"name": "call"}],
        placements=[
            {"name": "page", "channel": "web", "goal": "click", "countMax": 4,
             "exploration": {"squareCb": {"gamma": 1}}},
            {"name": "agent", "channel": "call", "goal": "click", "countMax": 2},
        ],
        contactPolicies=[{"name": f"p{i}", **policy} for i, policy in enumerate(policies)],
    )  # fmt: skip


@st.composite
def policies(draw: st.DrawFn) -> dict[str, object]:
    policy: dict[str, object] = {
        "scope": draw(st.sampled_from([f"CONTACT_SCOPE_{each}" for each in ("TOGETHER", "EACH_ACTION", "EACH_GROUP",
                                                                              "EACH_CHANNEL")])),
        "actions": draw(st.lists(st.sampled_from(ACTIONS), max_size=2, unique=True)),
        "groups": draw(st.lists(st.sampled_from(["sport", "money"]), max_size=1)),
        "channels": draw(st.lists(st.sampled_from(["web", "call"]), max_size=1)),
    }  # fmt: skip
    span = f"{draw(st.integers(60, 300))}s"
    if draw(st.booleans()):
        return policy | {"cap": {"countMax": draw(st.integers(1, 3)), "span": span}}
    cool_off: dict[str, object] = {"span": span, "ignored": draw(st.booleans()), "outcomeTypes": ["dismiss"]}
    if draw(st.booleans()):
        cool_off |= {"count": 2, "within": f"{draw(st.integers(60, 300))}s"}
    return policy | {"coolOff": cool_off}


class Told(NamedTuple):
    """What was really said, kept by the test."""

    action: str
    channel: str
    time_us: int
    reactions: list[tuple[str, int]]


def broken(policy: ContactPolicyTerms, told: Sequence[Told], action: str, channel: str, now_us: int) -> bool:
    """Say whether one more contact now would break a policy, counted from its words."""
    group = GROUPS.get(action, "")
    member = policy.member(action, group, channel)
    if member is None:
        return False
    alike = [each for each in told if policy.member(each.action, GROUPS.get(each.action, ""), each.channel) == member]
    if policy.kind in CAPS:
        return sum(now_us - each.time_us < policy.span_us for each in alike) >= policy.count
    causes = []
    for each in alike:
        causes += [time_us for kind, time_us in each.reactions if kind in policy.outcome_types]
        closed_us = each.time_us + WINDOW_US
        if policy.ignored and not any(time_us < closed_us for _, time_us in each.reactions):
            causes.append(closed_us)
    for cause in causes:
        within = [each for each in causes if cause - policy.within_us <= each <= cause] if policy.count > 1 else causes
        if len(within) >= policy.count and cause <= now_us < cause + policy.span_us:
            return True
    return False


STEPS = st.lists(
    st.tuples(st.integers(1, 90), st.booleans(), st.sampled_from(["", "", "dismiss", "click"])), min_size=1, max_size=12
)


@pytest.mark.slow
@given(st.lists(policies(), min_size=1, max_size=3), STEPS, st.booleans())
def test_what_is_said_breaks_no_policy_and_what_is_refused_would(
    declared: list[dict[str, object]], steps: list[tuple[int, bool, str]], is_merged: bool
) -> None:
    catalog = _catalog(declared)
    people = People(catalog)
    people.say(source_record("1", "crm", [ONE]), source_record("2", "shop", [OTHER]))
    if is_merged:
        people.say(source_record("3", "crm", [ONE, OTHER]))
    people.project()
    desk = Desk(catalog)
    assert isinstance(people.store, MemoryStore)
    desk.store = people.store
    told: list[Told] = []
    for number, (later, is_call, comes) in enumerate(steps):
        people.history.now_us += later * SECOND_US
        now_us = people.history.now_us
        channel, request = ("call", {"agent": 2}) if is_call else ("web", {"page": 4})
        who = OTHER if is_merged and number % 2 else ONE
        answer = desk.ask(decide_request(request, identities=[who]), now_us=now_us, decision_id=str(number))
        chosen = [slot.action for slot in answer.reply.slots if slot.action]
        for action in ACTIONS:  # before this decision
            is_broken = any(broken(each, told, action, channel, now_us) for each in catalog.profiles.contacts.policies)
            assert is_broken == (action in answer.refused)
        for action in chosen:  # slot by slot, each counts for the next
            assert not any(broken(each, told, action, channel, now_us) for each in catalog.profiles.contacts.policies)
            told.append(Told(action, channel, now_us, []))
        people.history.record(RecordKind.RECORD_KIND_DECISION, answer.record, key_of(str(number)))
        if comes and chosen:
            people.history.now_us += SECOND_US
            people.history.report(key_of(str(number)), chosen[0], comes)
            told[-len(chosen)].reactions.append((comes, people.history.now_us))
        people.project()
