"""Faults in how a placement explores, what it is for and what goes together are told with their paths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from server.catalog.catalog import UPPER_CONFIDENCE
from server.catalog.compile import compile_catalog
from server.catalog.faults import VIOLATIONS_MAX, Faults
from server.errors import TsugiError
from tests.support.catalogs import compiled, message
from tsugi.v1 import catalog_pb2

HOME = {"name": "home", "channel": "web", "goal": "click"}
SEVERAL = {"name": "home", "channel": "web"}
COMPOSITION = {"name": "pair", "actions": ["action_0"]}
CLICK = {"goal": "click"}


def faults(**parts: Any) -> list[tuple[str, str]]:
    with pytest.raises(TsugiError) as caught:
        compiled(**parts)
    return [(violation.path, violation.description) for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("exploration", "path", "description"),
    [
        ({"softmax": {}}, "softmax.temperature", "0.001 to 1000, got 0.0"),
        ({"softmax": {"temperature": 1e4}}, "softmax.temperature", "0.001 to 1000, got 10000.0"),
        ({"softmax": {"temperature": "NaN"}}, "softmax.temperature", "0.001 to 1000, got nan"),
        ({"upperConfidence": {"width": -0.1}}, "upper_confidence.width", "0 to 10, got -0.1"),
        ({"upperConfidence": {"width": 10.5}}, "upper_confidence.width", "0 to 10, got 10.5"),
        ({"upperConfidence": {"width": "NaN"}}, "upper_confidence.width", "0 to 10, got nan"),
        ({"upperConfidence": {"width": "Infinity"}}, "upper_confidence.width", "0 to 10, got inf"),
        ({"greedy": {}, "shareMax": 1.5}, "share_max", "0 to 1, got 1.5"),
        ({"greedy": {}, "shareMax": "NaN"}, "share_max", "0 to 1, got nan"),
        ({"greedy": {}, "probabilityMin": -0.1}, "probability_min", "0 to 1, got -0.1"),
        ({"greedy": {}, "neverOn": "profile.agee > 1.0"}, "never_on", "column 8: profile.agee is not declared"),
        ({"greedy": {}, "neverOn": "profile.age"}, "never_on", "a rule is true or false"),
        ({"greedy": {}, "neverOn": "action.price > 1.0"}, "never_on", "action.price cannot be read here"),
        ({"greedy": {}, "neverOn": "has(action.price)"}, "never_on", "action.price cannot be read here"),
    ],
)
def test_fault_of_exploration_is_told(exploration: dict[str, Any], path: str, description: str) -> None:
    price = [{"name": "price", "type": "ATTRIBUTE_TYPE_NUMBER"}]
    ((at, said),) = faults(placements=[HOME | {"exploration": exploration}], actionAttributes=price)
    assert at == f"placements[0].exploration.{path}"
    assert said.startswith(description)


@pytest.mark.parametrize(("stated", "width"), [({}, 2.0), ({"width": 0}, 0.0), ({"width": 10}, 10.0)])
def test_width_of_upper_confidence_is_two_unless_it_is_stated(stated: dict[str, float], width: float) -> None:
    catalog = compiled(placements=[HOME | {"exploration": {"upperConfidence": stated}}])
    assert catalog.blends.codes[0, 0, 2] == UPPER_CONFIDENCE
    assert catalog.blends.parameters[0, 0].tolist() == [width, 1.0, 0.0]


@pytest.mark.parametrize(
    ("placement", "path", "description"),
    [
        (SEVERAL, "goal", "the name of one goal is required, such as 'click'"),
        (HOME | {"goals": [CLICK]}, "goal", "not beside goals; a placement has one goal, or several in goals"),
        (SEVERAL | {"goals": [{"goal": "clik"}]}, "goals[0].goal", "no goal is named 'clik'; did you mean 'click'?"),
        (SEVERAL | {"goals": [CLICK, CLICK]}, "goals", "the same goal stands twice; name it once"),
        (SEVERAL | {"goals": [CLICK | {"weight": 0}]}, "goals[0].weight", "above 0 and at most 1000, got 0.0"),
        (SEVERAL | {"goals": [CLICK | {"weight": "NaN"}]}, "goals[0].weight", "above 0 and at most 1000, got nan"),
    ],
)
def test_fault_of_several_goals_is_told(placement: dict[str, Any], path: str, description: str) -> None:
    assert faults(placements=[placement]) == [(f"placements[0].{path}", description)]


@pytest.mark.parametrize(
    ("change", "path", "description"),
    [
        ({"settling": 5}, "settling", "one of SETTLING_FIRST, SETTLING_LAST, SETTLING_SUM, SETTLING_MAX, got 5"),
        ({"lateLimit": "7776001s"}, "late_limit", "0s to 7776000s (90 days), got 7776001s"),
        ({"influenceMax": 0.0}, "influence_max", "above 0, to 1, got 0.0"),
        ({"influenceMax": 1.01}, "influence_max", "above 0, to 1, got 1.01"),
        ({"influenceMax": "NaN"}, "influence_max", "above 0, to 1, got nan"),
        ({"lateLimit": "-1s"}, "late_limit", "0s to 7776000s (90 days), got -1s"),
        ({"baseRate": 0}, "base_rate", "above 0 and below 1, got 0.0"),
        ({"baseRate": 1}, "base_rate", "above 0 and below 1, got 1.0"),
        ({"baseRate": "NaN"}, "base_rate", "above 0 and below 1, got nan"),
        ({"defaultReward": "NaN"}, "default_reward", "0 to 1, got nan"),
        ({"defaultReward": 1.5}, "default_reward", "0 to 1, got 1.5"),
        ({"outcomes": [{"type": "click", "reward": "NaN"}]}, "outcomes[0].reward", "0 to 1, got nan"),
        ({"outcomes": [{"type": "click", "reward": "Infinity"}]}, "outcomes[0].reward", "0 to 1, got inf"),
        ({"outcomes": [{"type": "impression"}]}, "outcomes[0].type", "an impression settles no goal; name a response"),
        ({"outcomes": [{"type": "click"}] * 2}, "outcomes", "the same outcome type stands twice; name it once"),
        ({"outcomes": []}, "outcomes", "1 to 16 entries, got 0"),
    ],
)
def test_fault_of_a_goal_is_told(change: dict[str, Any], path: str, description: str) -> None:
    goal = {"name": "click", "outcomes": [{"type": "click", "reward": 1}], "attributionWindow": "60s", "baseRate": 0.1}
    assert faults(goals=[goal | change]) == [(f"goals[0].{path}", description)]


def test_list_that_is_too_long_is_told_and_nothing_of_what_stands_in_it() -> None:
    """Of one number a byte, 16 million fit in a catalog; to look at each takes minutes, to tell of each gigabytes."""
    catalog = message()
    catalog.goals[0].learners.extend([99] * 20_000)  # type: ignore[list-item]  # what a later caller may send
    catalog.goals[0].outcomes.extend([catalog_pb2.GoalOutcome(type="clik", reward=math.nan)] * 1_000)
    catalog.placements[0].goals.extend([catalog_pb2.GoalWeight(goal="clik")] * 1_000)
    catalog.placements[0].ClearField("goal")
    with pytest.raises(TsugiError) as caught:
        compile_catalog(catalog)
    assert [(violation.path, violation.description) for violation in caught.value.violations] == [
        ("goals[0].outcomes", "1 to 16 entries, got 1003"),
        ("goals[0].learners", "0 to 8 entries, got 20000"),
        ("placements[0].goals", "1 to 8 entries, got 1000"),
    ]


@pytest.mark.parametrize(("seconds", "nanos"), [(5, 1_000_000_000), (5, -1), (5, 2**31 - 1), (0, -(2**31))])
def test_span_that_has_no_json_is_told(seconds: int, nanos: int) -> None:
    catalog = message()
    catalog.goals[0].late_limit.seconds, catalog.goals[0].late_limit.nanos = seconds, nanos
    with pytest.raises(TsugiError) as caught:
        compile_catalog(catalog)
    assert [violation.path for violation in caught.value.violations] == ["goals[0].late_limit"]


def test_of_many_faults_the_first_thousand_are_told() -> None:
    actions = [{"name": f"a{i}", "lever": -1, "treatments": [{"name": "t", "channel": "gone"}]} for i in range(1_000)]
    assert len(faults(actions=actions)) == 1_000


def test_nothing_is_suggested_for_faults_that_are_not_told() -> None:
    class Known(set[str]):
        n_read = 0

        def __iter__(self) -> Iterator[str]:
            self.n_read += 1
            return super().__iter__()

    known, found = Known({"a"}), Faults()
    for _ in range(VIOLATIONS_MAX + 10):
        assert not found.refers("actions", "", known, "action")
    assert known.n_read == len(found.violations) == VIOLATIONS_MAX


@pytest.mark.parametrize(
    ("composition", "path", "description"),
    [
        (COMPOSITION, "", "one of atMost and requires is required"),
        (COMPOSITION | {"atMost": {}}, ".at_most.count_max", "1 to 256, got 0"),
        (
            COMPOSITION | {"groups": ["gone"], "atMost": {"countMax": 1}},
            ".groups[0]",
            "no action group is named 'gone'",
        ),
        (COMPOSITION | {"requires": {}}, ".requires", "name an action or a group"),
        (COMPOSITION | {"requires": {"actions": ["action_9"]}}, ".requires.actions[0]", "no action is named"),
        (COMPOSITION | {"requires": {"groups": ["gone"]}}, ".requires.groups[0]", "no action group is named 'gone'"),
        (COMPOSITION | {"requires": {"actions": ["action_0"]}}, ".requires", "none of these can come first"),
        ({"name": "all", "requires": {"actions": ["action_1"]}}, ".requires", "none of these can come first"),
    ],
)
def test_fault_of_a_composition_is_told(composition: dict[str, Any], path: str, description: str) -> None:
    at, said = faults(compositions=[composition])[0]
    assert at == f"compositions[0]{path}"
    assert said.startswith(description)


def test_actions_that_wait_for_each_other_are_told_wherever_they_stand() -> None:
    told = faults(
        compositions=[
            {"name": "fine", "actions": ["action_0"], "requires": {"actions": ["action_1", "action_3"]}},
            {"name": "one", "actions": ["action_1"], "requires": {"actions": ["action_2"]}},
            {"name": "other", "actions": ["action_2"], "requires": {"actions": ["action_1"]}},
        ]
    )
    assert [path for path, _ in told] == ["compositions[1].requires", "compositions[2].requires"]


def test_suppression_reads_no_facts_of_actions() -> None:
    told = faults(
        actionAttributes=[{"name": "price", "type": "ATTRIBUTE_TYPE_NUMBER"}],
        contactPolicies=[{"name": "dear", "suppression": {"expression": "action.price > 100.0"}}],
    )
    assert told == [
        (
            "contact_policies[0].suppression.expression",
            "action.price cannot be read here; this rule is of no action",
        )
    ]


def test_policy_and_composition_may_share_a_name() -> None:
    catalog = compiled(
        contactPolicies=[{"name": "pair", "cap": {"countMax": 3, "span": "3600s"}}],
        compositions=[{"name": "pair", "atMost": {"countMax": 2}}],
    )
    assert sorted(catalog.profiles.contacts.targets.limits.tolist()) == [2, 3]


@pytest.mark.parametrize(
    ("learners", "path", "description"),
    [
        (["LEARNER_FAMILY_UNSPECIFIED"], "learners[0]", "name a family, such as LEARNER_FAMILY_FOREST"),
        (
            ["LEARNER_FAMILY_FOREST", 99],
            "learners[1]",
            "one of LEARNER_FAMILY_LOGISTIC, LEARNER_FAMILY_FOREST, got 99",
        ),
        (["LEARNER_FAMILY_FOREST"] * 2, "learners", "the same family stands twice; name it once"),
    ],
)
def test_fault_of_who_learns_is_told(learners: list[Any], path: str, description: str) -> None:
    goal = {
        "name": "click",
        "outcomes": [{"type": "click", "reward": 1}],
        "attributionWindow": "1800s",
        "baseRate": 0.05,
    }
    assert (f"goals[0].{path}", description) in faults(goals=[goal | {"learners": learners}])


def test_who_learns_beside_the_usual_is_named_by_family() -> None:
    goal = {
        "name": "click",
        "outcomes": [{"type": "click", "reward": 1}],
        "attributionWindow": "1800s",
        "baseRate": 0.05,
    }
    catalog = compiled(goals=[goal, goal | {"name": "sale", "learners": ["LEARNER_FAMILY_FOREST"]}])
    assert [each.learners for each in catalog.goals] == [(), ("forest",)]
