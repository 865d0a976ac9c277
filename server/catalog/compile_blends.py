"""From the experiments and holdouts people push to the columns that each blend decides by.

A *branch* changes levers, rules, exploration or the model of some actions and placements; a *blend* is one way to
combine branches, one or none of every experiment. All blends are laid out when a catalog is compiled, so that a
decision costs the same in each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from server.catalog.allotting import allot
from server.catalog.catalog import (
    EPSILON_GREEDY,
    GREEDY,
    RULE_LAYERS,
    SOFTMAX,
    SQUARE_CB,
    THOMPSON,
    UPPER_CONFIDENCE,
    ActionColumns,
    Blends,
    Experiment,
    Holdout,
    PlacementColumns,
)
from server.catalog.contact_terms import Named
from server.catalog.declared import frozen
from server.catalog.expressions import NO_RULE, RuleCompiler
from server.errors import Violation
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_pb2 import Assignment
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRole
from tsugi.v1.value_pb2 import Value

THOMPSON_DRAWS: Final = 128
THOMPSON_FLOOR_SHARE: Final = 0.01
# Of the gap between random and best, with 4 actions whose chances deviate by 0.06 from a base rate of 0.1, widths of 0,
# 0.5, 1, 2, 3, 5 and 8 win 0.77, 0.78, 0.94, 0.94, 0.96, 0.94 and 0.84 in the last 800 of 4,000 decisions (24 worlds).
CONFIDENCE_WIDTH: Final = 2.0

_CHALLENGED: Final = {ModelRole.MODEL_ROLE_CHAMPION: False, ModelRole.MODEL_ROLE_CHALLENGER: True}
_VARIED_LAYERS: Final = ("applicability", "suitability")
_LEVER: Final = 1  # its column in worth
_POLICY, _DRAWS, _NEVER_ON = 2, 3, 4  # their columns in PlacementColumns.codes


@dataclass(slots=True)
class BranchChange:
    """What one branch changes, by row."""

    levers: dict[int, float] = field(default_factory=dict)  # by action row
    rules: dict[tuple[int, int], int] = field(default_factory=dict)  # by action row and column of the rules
    explorations: dict[int, tuple[catalog_pb2.Exploration, int]] = field(default_factory=dict)  # and its never_on
    is_challenged: bool | None = None  # None: as it was


def compile_branches(
    message: catalog_pb2.Catalog,
    actions: Sequence[catalog_pb2.Action],
    stated: Sequence[Mapping[str, Value]],
    placement_rows: Mapping[str, int],
    compiler: RuleCompiler,
    violations: list[Violation],
) -> list[list[BranchChange]]:
    """Compile what each branch of each experiment changes.

    Args:
        message: a catalog without faults but those of its rules.
        actions: its actions in the order of the columns.
        stated: what each of them states of the action attributes.
        placement_rows: by name.
        compiler: takes the rules.
        violations: gets their faults.

    Cost: O(branches × actions).
    """
    found = []
    for e, experiment in enumerate(message.experiments):
        changes = []
        for v, branch in enumerate(experiment.branches):
            path = f"experiments[{e}].branches[{v}]"
            change = BranchChange(is_challenged=_CHALLENGED.get(branch.model_role))
            _vary_actions(branch, path, actions, stated, compiler, violations, change)
            for i, placed in enumerate(branch.placements):
                at = f"{path}.placements[{i}].exploration.never_on"
                never = compile_never_on(placed.exploration, at, compiler, violations)
                change.explorations[placement_rows[placed.placement]] = (placed.exploration, never)
            changes.append(change)
        found.append(changes)
    return found


def compile_experiments(message: catalog_pb2.Catalog) -> tuple[Experiment, ...]:
    """Compile who is in which branch, as if the experiments began now; blends count the first experiment fastest."""
    experiments, stride = [], 1
    for experiment in message.experiments:
        experiments.append(
            Experiment(
                name=experiment.name,
                salt=experiment.salt or experiment.name,
                branches=tuple(branch.name for branch in experiment.branches),
                shares=tuple(branch.share for branch in experiment.branches),
                buckets=allot(experiment).buckets,
                stride=stride,
            )
        )
        stride *= 1 + len(experiment.branches)
    return tuple(experiments)


def lay_out_blends(
    message: catalog_pb2.Catalog,
    changes: Sequence[Sequence[BranchChange]],
    actions: ActionColumns,
    placements: PlacementColumns,
) -> Blends:
    """Lay out the columns of every blend. Cost: O(blends × (actions + placements))."""
    choices = [range(-1, len(branches)) for branches in changes]
    # The first experiment turns fastest, as strides are counted.
    blends = [combined[::-1] for combined in itertools.product(*choices[::-1])]
    rules, worth = np.stack([actions.rules] * len(blends)), np.stack([actions.worth] * len(blends))
    codes, parameters = np.stack([placements.codes] * len(blends)), np.stack([placements.parameters] * len(blends))
    assigned: list[list[Assignment]] = []
    challenged = []
    for blend, combined in enumerate(blends):
        taken = [(e, v) for e, v in enumerate(combined) if v >= 0]
        for change in (changes[e][v] for e, v in taken):
            for row, lever in change.levers.items():
                worth[blend, row, _LEVER] = lever
            for (row, column), rule in change.rules.items():
                rules[blend, row, column] = rule
            for row, (exploration, never) in change.explorations.items():
                policy, draws, *bounds = explored(exploration)
                codes[blend, row, [_POLICY, _DRAWS, _NEVER_ON]] = policy, draws, never
                parameters[blend, row] = bounds
        experiments = message.experiments
        assigned.append(
            [Assignment(experiment=experiments[e].name, branch=experiments[e].branches[v].name) for e, v in taken]
        )
        stated = [role for e, v in taken if (role := changes[e][v].is_challenged) is not None]
        challenged.append(bool(stated) and stated[-1])
    return Blends(
        rules=frozen(rules),
        worth=frozen(worth),
        codes=frozen(codes),
        parameters=frozen(parameters),
        challenged=tuple(challenged),
        reply_bytes=tuple(DecideResponse(assignments=each).SerializeToString() for each in assigned),
        record_bytes=tuple(DecisionRecord(assignments=each).SerializeToString() for each in assigned),
    )


def compile_holdouts(message: catalog_pb2.Catalog) -> tuple[Holdout, ...]:
    """Compile who is told nothing where."""
    return tuple(
        Holdout(
            name=holdout.name,
            salt=(holdout.salt or holdout.name).encode(),
            share=holdout.share,
            placements=frozenset(
                row
                for row, placement in enumerate(message.placements)
                if not placement.holdout_exempt and (not holdout.goals or first_goal(placement) in holdout.goals)
            ),
        )
        for holdout in message.holdouts
    )


def first_goal(placement: catalog_pb2.Placement) -> str:
    """Return the goal that a placement's decisions are learned for."""
    return placement.goals[0].goal if placement.goals else placement.goal


def explored(exploration: catalog_pb2.Exploration) -> tuple[int, int, float, float, float]:
    """Return how selection probability is spread: policy, Thompson's draws, parameter, share_max, probability_min."""
    policy, parameter, draws = GREEDY, 0.0, 0
    kind = exploration.WhichOneof("policy")
    if kind == "epsilon_greedy":
        policy, parameter = EPSILON_GREEDY, exploration.epsilon_greedy.epsilon
    elif kind == "square_cb":
        policy, parameter = SQUARE_CB, exploration.square_cb.gamma
    elif kind == "thompson":
        policy, parameter = THOMPSON, exploration.thompson.floor_share or THOMPSON_FLOOR_SHARE
        draws = exploration.thompson.draws or THOMPSON_DRAWS
    elif kind == "softmax":
        policy, parameter = SOFTMAX, exploration.softmax.temperature
    elif kind == "upper_confidence":
        upper = exploration.upper_confidence
        policy, parameter = UPPER_CONFIDENCE, upper.width if upper.HasField("width") else CONFIDENCE_WIDTH
    share_max = exploration.share_max if exploration.HasField("share_max") else 1.0
    return policy, draws, parameter, share_max, exploration.probability_min


def compile_never_on(
    exploration: catalog_pb2.Exploration, path: str, compiler: RuleCompiler, violations: list[Violation]
) -> int:
    """Compile when a placement must not explore."""
    return compiler.add(exploration.never_on, None, path, violations) if exploration.never_on else NO_RULE


def _vary_actions(
    branch: catalog_pb2.Branch,
    path: str,
    actions: Sequence[catalog_pb2.Action],
    stated: Sequence[Mapping[str, Value]],
    compiler: RuleCompiler,
    violations: list[Violation],
    change: BranchChange,
) -> None:
    meant = [Named.by(varied) for varied in branch.actions]
    rows = [[row for row, action in enumerate(actions) if each.has(action)] for each in meant]
    for varied, own in zip(branch.actions, rows, strict=True):
        if varied.HasField("lever"):
            change.levers.update(dict.fromkeys(own, varied.lever))
    for layer in _VARIED_LAYERS:
        column = 2 * RULE_LAYERS.index(layer) + 1  # the action's own rule stands after its group's
        varying = [(i, own) for i, own in enumerate(rows) if branch.actions[i].HasField(layer)]
        last = {row: i for i, own in varying for row in own}
        for i, own in varying:
            text, n_before = getattr(branch.actions[i], layer), len(violations)
            # The first one too where a later variation is about it, so that no text goes unread.
            for row in own[:1] + [row for row in own[1:] if last[row] == i]:
                at = f"{path}.actions[{i}].{layer}"
                change.rules[row, column] = compiler.add(text, stated[row], at, violations) if text else NO_RULE
                if len(violations) > n_before:
                    break  # thousands of actions would say the same again
