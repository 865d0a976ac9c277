"""Faults of experiments, holdouts and budgets: each with its path and what would be right."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.compile import compile_catalog
from server.catalog.faults import SUGGESTIONS_MAX
from server.errors import TsugiError
from tests.support import catalogs

BRANCH = {"name": "one", "share": 0.1}
EXPERIMENT = {"name": "trial", "branches": [BRANCH]}
BUDGET = {"name": "daily", "unitsMax": 10}
BRANCH_PATH = "experiments[0].branches[0]"


def faults(**parts: Any) -> dict[str, str]:
    with pytest.raises(TsugiError) as caught:
        catalogs.compiled(**parts)
    return {violation.path: violation.description for violation in caught.value.violations}


def varied(**parts: Any) -> dict[str, Any]:
    return {"experiments": [EXPERIMENT | {"branches": [BRANCH | parts]}]}


@pytest.mark.parametrize(
    ("parts", "path", "words"),
    [
        ({"experiments": [EXPERIMENT, EXPERIMENT]}, "experiments[1].name", "already"),
        ({"experiments": [EXPERIMENT | {"salt": "x" * 65}]}, "experiments[0].salt", "64 bytes"),
        ({"experiments": [{"name": "trial"}]}, "experiments[0].branches", "1 to 16"),
        (
            {"experiments": [EXPERIMENT, EXPERIMENT | {"name": "other", "salt": "trial"}]},
            "experiments[1].salt",
            "the same people",
        ),
        (varied(share=-0.1), BRANCH_PATH + ".share", "0 to 1"),
        (varied(share=1.5), BRANCH_PATH + ".share", "0 to 1"),
        (varied(share="NaN"), BRANCH_PATH + ".share", "0 to 1"),
        (varied(share=0.00005), BRANCH_PATH + ".share", "steps of 0.0001"),
        (
            {
                "experiments": [
                    EXPERIMENT | {"branches": [BRANCH | {"share": 0.6}, BRANCH | {"name": "two", "share": 0.6}]}
                ]
            },
            "experiments[0].branches",
            "at most 1 together, got 1.2",
        ),
        (
            varied(actions=[{"actions": ["acton_1"], "lever": 2}]),
            BRANCH_PATH + ".actions[0].actions[0]",
            "did you mean 'action_1'",
        ),
        (varied(actions=[{"groups": ["x"], "lever": 2}]), BRANCH_PATH + ".actions[0].groups[0]", "no action group"),
        (varied(actions=[{"lever": -1}]), BRANCH_PATH + ".actions[0].lever", "0 to 1000"),
        (varied(actions=[{}]), BRANCH_PATH + ".actions[0]", "is required"),
        (varied(actions=[{"suitability": "profile.agee > 1.0"}]), BRANCH_PATH + ".actions[0].suitability", "age"),
        (
            varied(actions=[{"applicability": "profile.age"}]),
            BRANCH_PATH + ".actions[0].applicability",
            "true or false",
        ),
        (varied(placements=[{"placement": "x"}]), BRANCH_PATH + ".placements[0].placement", "no placement"),
        (
            varied(placements=[{"placement": "mail", "exploration": {"epsilonGreedy": {"epsilon": 2}}}]),
            BRANCH_PATH + ".placements[0].exploration.epsilon_greedy.epsilon",
            "0 to 1",
        ),
        (
            varied(placements=[{"placement": "mail", "exploration": {"neverOn": "profile.x"}}]),
            BRANCH_PATH + ".placements[0].exploration.never_on",
            "profile",
        ),
        (
            varied(
                placements=[{"placement": "mail", "exploration": {"budget": {"costMicrosMax": 1, "period": "60s"}}}]
            ),
            BRANCH_PATH + ".placements[0].exploration.budget",
            "a branch does not change it",
        ),
        (varied(placements=[{"placement": "mail"}] * 2), BRANCH_PATH + ".placements", "twice"),
        (varied(modelRole="MODEL_ROLE_LEARNER"), BRANCH_PATH + ".model_role", "CHALLENGER"),
        (
            {"experiments": [{"name": f"e{i}", "branches": [{"name": f"v{j}"} for j in range(4)]} for i in range(3)]},
            "experiments",
            "at most 64 blends, got 125",
        ),
        ({"holdouts": [{"name": "quiet", "share": 0.6}]}, "holdouts[0].share", "0 to 0.5"),
        ({"holdouts": [{"name": "quiet", "share": 0.1, "goals": ["x"]}]}, "holdouts[0].goals[0]", "no goal"),
        ({"holdouts": [{"name": "quiet", "salt": "x" * 65}]}, "holdouts[0].salt", "64 bytes"),
        ({"budgets": [{"name": "daily"}]}, "budgets[0]", "unitsMax and costMicrosMax"),
        ({"budgets": [BUDGET | {"unitsMax": 0}]}, "budgets[0].units_max", "1 to 1000000000000"),
        (
            {"budgets": [{"name": "daily", "costMicrosMax": 10**16}]},
            "budgets[0].cost_micros_max",
            "1 to 1000000000000000",
        ),
        ({"budgets": [BUDGET | {"slack": 11}]}, "budgets[0].slack", "limit itself"),
        ({"budgets": [BUDGET | {"slack": -1}]}, "budgets[0].slack", "limit itself"),
        ({"budgets": [BUDGET | {"paced": True}]}, "budgets[0].period", "paced"),
        ({"budgets": [BUDGET | {"period": "1s"}]}, "budgets[0].period", "60s"),
        ({"budgets": [BUDGET | {"actions": ["x"]}]}, "budgets[0].actions[0]", "no action"),
    ],
)
def test_fault_is_told_with_its_path(parts: dict[str, Any], path: str, words: str) -> None:
    found = faults(**parts)
    assert path in found, found
    assert words in found[path]


def test_faults_of_actions_and_placements() -> None:
    action = {"name": "a", "treatments": [{"name": "only", "channel": "web"}]}
    placement = {"name": "home", "channel": "web", "goal": "click"}
    assert faults(actions=[action | {"costMicros": -1}]) == {"actions[0].cost_micros": "0 to 1000000000000000, got -1"}
    assert faults(actions=[action | {"value": "1.0", "valueMicros": 5}]) == {
        "actions[0].value": "not beside value_micros; an action has one of them"
    }
    assert faults(actions=[action | {"valueMicros": 10**18 + 1}]) == {
        "actions[0].value_micros": "0 to 1000000000000000000, got 1000000000000000001"
    }
    assert faults(actions=[action | {"value": "profile.member"}]).keys() == {"actions[0].value"}
    assert faults(placements=[placement | {"exploration": {"budget": {"period": "1s"}}}]).keys() == {
        "placements[0].exploration.budget.cost_micros_max",
        "placements[0].exploration.budget.period",
    }


def test_many_actions_bound_the_blends() -> None:
    actions = [{"name": f"a{i}", "treatments": [{"name": "only", "channel": "web"}]} for i in range(2_000)]
    branches = [{"name": f"v{i}", "share": 0.01} for i in range(16)]
    experiments = [{"name": f"e{i}", "branches": branches[: 16 if i == 0 else 2]} for i in range(2)]
    assert "end an experiment" in faults(actions=actions, experiments=experiments)["experiments"]


@pytest.mark.parametrize("field", ["valid_from_time", "valid_until_time"])
@pytest.mark.parametrize("instant", [Timestamp(seconds=1 << 62), Timestamp(seconds=-(1 << 62)), Timestamp(nanos=-1)])
def test_action_is_valid_from_and_until_instants(field: str, instant: Timestamp) -> None:
    message = catalogs.message()
    getattr(message.actions[0], field).CopyFrom(instant)
    with pytest.raises(TsugiError) as caught:
        compile_catalog(message)
    assert caught.value.violations == ((f"actions[0].{field}", "an instant within years 1 to 9999 is required"),)


def test_fault_of_a_group_is_told_once_however_many_actions_have_it() -> None:
    actions = [
        {"name": f"a{i}", "group": "red", "treatments": [{"name": "only", "channel": "web"}]} for i in range(100)
    ]
    groups = [{"name": "red", "eligibility": "profile.agee > 1.0"}]
    with pytest.raises(TsugiError) as caught:
        catalogs.compiled(actions=actions, actionGroups=groups)
    assert [violation.path for violation in caught.value.violations] == ["action_groups[0].eligibility"]


def test_fault_of_a_branch_is_told_once_however_many_actions_it_varies() -> None:
    """Where each action's facts filled in makes more rules than a catalog holds, the first one too many tells it."""
    actions = [
        {
            "name": f"a{i}",
            "attributes": {"price": i},
            "treatments": [{"name": "only", "channel": "web"}],
        }
        for i in range(1_100)
    ]
    with pytest.raises(TsugiError) as caught:
        catalogs.compiled(
            actions=actions,
            actionAttributes=[{"name": "price", "type": "ATTRIBUTE_TYPE_NUMBER"}],
            **varied(actions=[{"suitability": "profile.age > action.price"}] * 2),
        )
    assert [violation.path for violation in caught.value.violations] == [f"{BRANCH_PATH}.actions[1].suitability"]


def test_last_variation_of_an_action_holds_and_all_are_read() -> None:
    earlier = {"actions": ["action_0", "action_1"], "lever": 2, "suitability": "profile.age > 1.0"}
    later = {"actions": ["action_1", "action_2"], "lever": 3, "suitability": ""}
    catalog = catalogs.compiled(**varied(actions=[earlier, later, {"actions": ["action_2"], "lever": 0.5}]))
    assert catalog.blends.worth[1, :4, 1].tolist() == [2.0, 3.0, 0.5, 1.0]
    assert (catalog.blends.rules[1, :4, 5] >= 0).tolist() == [True, False, False, False]
    wrong = earlier | {"suitability": "profile.agee > 1.0"}
    assert faults(**varied(actions=[wrong, earlier])).keys() == {f"{BRANCH_PATH}.actions[0].suitability"}


def test_list_that_is_too_long_is_told_alone() -> None:
    """To look at every entry of it could take hours."""
    found = faults(budgets=[BUDGET | {"name": "X", "actions": ["gone"]}] * 33, holdouts=[{"name": "quiet", "share": 2}])
    assert found == {"budgets": "0 to 32 entries, got 33"}


def test_names_are_suggested_for_the_first_wrong_references_alone() -> None:
    """To look for a close name among thousands takes longer than all other checks."""
    found = faults(budgets=[BUDGET | {"actions": [f"acton_{i}" for i in range(100)]}])
    told = [found[f"budgets[0].actions[{i}]"] for i in range(100)]
    assert sum("did you mean" in each for each in told) == SUGGESTIONS_MAX
    assert all("no action is named" in each for each in told)
