"""Faults of experiments, holdouts and budgets: each with its path and what would be right."""

from __future__ import annotations

from typing import Any

import pytest

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
        "actions[0].value": "not beside value_micros"
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
