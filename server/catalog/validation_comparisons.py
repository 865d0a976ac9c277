"""Whether the experiments, holdouts and budgets of a catalog are good ones; part of ``validation.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from server.catalog.catalog import BUCKETS
from server.catalog.faults import DAY_US, MINUTE_US, Faults
from tsugi.v1 import catalog_pb2
from tsugi.v1.model_pb2 import ModelRole

BLENDS_MAX: Final = 64  # ways to combine branches; each has its own columns
BLEND_ROWS_MAX: Final = 100_000  # blends × actions: some 10 MB
SALT_BYTES_MAX: Final = 64
PERIOD_US_MAX: Final = 366 * DAY_US
UNITS_MAX: Final = 10**12
COST_MICROS_MAX: Final = 10**15  # a thousand million currency units; so many of it as a request has slots fit int64

_Exploration = Callable[[str, catalog_pb2.Exploration, Faults], None]


class _Known(NamedTuple):
    """What a branch may name."""

    actions: set[str]
    groups: set[str]
    placements: set[str]


def check_experiments(catalog: catalog_pb2.Catalog, check_exploration: _Exploration, faults: Faults) -> None:
    """Note every fault of the experiments except those of rules."""
    known = _Known(
        actions={action.name for action in catalog.actions},
        groups={group.name for group in catalog.action_groups},
        placements={placement.name for placement in catalog.placements},
    )
    n_blends = 1
    salts: dict[str, int] = {}
    for e, experiment in enumerate(catalog.experiments):
        path = f"experiments[{e}]"
        _salt(f"{path}.salt", experiment.salt, faults)
        same = salts.setdefault(experiment.salt or experiment.name, e)
        if same != e:
            faults.add(f"{path}.salt", f"another one than experiments[{same}] has, or both have the same people")
        faults.count(f"{path}.branches", len(experiment.branches), 1, 16)
        faults.names(f"{path}.branches", [branch.name for branch in experiment.branches])
        total = 0
        for v, branch in enumerate(experiment.branches):
            at = f"{path}.branches[{v}]"
            is_share = 0.0 <= branch.share <= 1.0
            steps = branch.share * BUCKETS if is_share else 0.0
            is_share = is_share and abs(steps - round(steps)) < 1e-6
            faults.check(is_share, f"{at}.share", f"0 to 1 in steps of {1 / BUCKETS}, got {branch.share}")
            total += round(steps)
            _branch(at, branch, known, check_exploration, faults)
        faults.check(total <= BUCKETS, f"{path}.branches", f"shares of at most 1 together, got {total / BUCKETS:g}")
        n_blends *= 1 + len(experiment.branches)
    faults.check(
        n_blends <= BLENDS_MAX,
        "experiments",
        f"branches combine into at most {BLENDS_MAX} blends, got {n_blends}; drop a branch or end an experiment",
    )
    n_rows = n_blends * len(catalog.actions)
    faults.check(
        n_blends == 1 or n_rows <= BLEND_ROWS_MAX,
        "experiments",
        f"blends × actions are at most {BLEND_ROWS_MAX}, got {n_blends} × {len(catalog.actions)}; end an experiment",
    )


def _branch(
    path: str,
    branch: catalog_pb2.Branch,
    known: _Known,
    check_exploration: _Exploration,
    faults: Faults,
) -> None:
    faults.count(f"{path}.actions", len(branch.actions), 0, 64)
    faults.count(f"{path}.placements", len(branch.placements), 0, 256)
    for i, varied in enumerate(branch.actions):
        at = f"{path}.actions[{i}]"
        faults.refer(f"{at}.actions", varied.actions, known.actions, "action")
        faults.refer(f"{at}.groups", varied.groups, known.groups, "action group")
        if varied.HasField("lever") and not 0.0 <= varied.lever <= 1_000.0:
            faults.add(f"{at}.lever", f"0 to 1000, got {varied.lever}")
        if not any(map(varied.HasField, ("lever", "applicability", "suitability"))):
            faults.add(at, "one of lever, applicability and suitability is required")
    for i, placed in enumerate(branch.placements):
        at = f"{path}.placements[{i}]"
        faults.refers(f"{at}.placement", placed.placement, known.placements, "placement")
        check_exploration(f"{at}.exploration", placed.exploration, faults)
        if placed.exploration.HasField("budget"):
            faults.add(f"{at}.exploration.budget", "state it at the placement itself; a branch does not change it")
    if len({placed.placement for placed in branch.placements}) != len(branch.placements):
        faults.add(f"{path}.placements", "the same placement stands twice; vary it once")
    roles = (ModelRole.MODEL_ROLE_UNSPECIFIED, ModelRole.MODEL_ROLE_CHAMPION, ModelRole.MODEL_ROLE_CHALLENGER)
    if branch.model_role not in roles:
        faults.add(f"{path}.model_role", "MODEL_ROLE_CHAMPION or MODEL_ROLE_CHALLENGER")


def check_holdouts(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note every fault of the holdouts."""
    goals = {goal.name for goal in catalog.goals}
    for i, holdout in enumerate(catalog.holdouts):
        path = f"holdouts[{i}]"
        faults.check(0.0 <= holdout.share <= 0.5, f"{path}.share", f"0 to 0.5, got {holdout.share}")
        _salt(f"{path}.salt", holdout.salt, faults)
        faults.refer(f"{path}.goals", holdout.goals, goals, "goal")


def check_budgets(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note every fault of the budgets, and of what actions cost."""
    actions = {action.name for action in catalog.actions}
    groups = {group.name for group in catalog.action_groups}
    for i, budget in enumerate(catalog.budgets):
        path = f"budgets[{i}]"
        faults.refer(f"{path}.actions", budget.actions, actions, "action")
        faults.refer(f"{path}.groups", budget.groups, groups, "action group")
        kind = budget.WhichOneof("limit")
        if kind is None:
            faults.add(path, "one of unitsMax and costMicrosMax is required")
        else:
            most, limit = UNITS_MAX if kind == "units_max" else COST_MICROS_MAX, getattr(budget, kind)
            faults.check(1 <= limit <= most, f"{path}.{kind}", f"1 to {most}, got {limit}")
            faults.check(0 <= budget.slack <= limit, f"{path}.slack", f"0 to the limit itself, got {budget.slack}")
        if budget.HasField("period"):
            faults.span(f"{path}.period", budget.period, MINUTE_US, PERIOD_US_MAX)
        elif budget.paced:
            faults.add(f"{path}.period", "a period such as 86400s is required: the budget is paced over it")
    for i, action in enumerate(catalog.actions):
        cost = action.cost_micros
        faults.check(0 <= cost <= COST_MICROS_MAX, f"actions[{i}].cost_micros", f"0 to {COST_MICROS_MAX}, got {cost}")


def check_exploration_budget(path: str, exploration: catalog_pb2.Exploration, faults: Faults) -> None:
    """Note every fault of what exploring may cost."""
    if exploration.HasField("budget"):
        cost = exploration.budget.cost_micros_max
        faults.check(
            1 <= cost <= COST_MICROS_MAX, f"{path}.budget.cost_micros_max", f"1 to {COST_MICROS_MAX}, got {cost}"
        )
        faults.span(f"{path}.budget.period", exploration.budget.period, MINUTE_US, PERIOD_US_MAX)


def _salt(path: str, salt: str, faults: Faults) -> None:
    size = len(salt.encode())
    faults.check(size <= SALT_BYTES_MAX, path, f"at most {SALT_BYTES_MAX} bytes, got {size}")
