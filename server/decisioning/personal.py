"""What this person's own history says: propensities shrunk from what holds for all, to the group, to the action.

Of each goal and action the profile keeps how many successes were expected and how many observed (profiles/history.py).
With Gamma(s, s) as what is assumed of the factor by which a person differs, and Poisson counts given it, the mean of
what is known afterwards is

    factor of a group   = (observed of the group + s_group × 1) / (expected of the group + s_group)
    factor of an action = (observed + s_action × factor of its group) / (expected + s_action)

(Clayton and Kaldor, "Empirical Bayes estimates of age-standardized relative risks", Biometrics 43, 1987; DuMouchel,
"Bayesian data mining in large frequency tables", American Statistician 53, 1999). The strengths s are learned online,
of each goal (training/personal.py); here their inverses are used, the spread: 0 is an infinite strength, and no effect.
An action without a group belongs to the one that all those share.

Cost sketch: nothing for who has no history; with 10 goals and actions of history some 0.1 µs to read it, and for each
placement and goal 0.1 and 2 ns a candidate.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import Amounts, Doubles, Floats, Mask, Rows
from server.kernel import kernel

PROPENSITY_MAX = 1.0 - 1e-6  # no history makes certain

_UNIT = 1e-9


@kernel
def read(
    history: Amounts, now_us: int, goal_keys: Amounts, is_kept: Mask, action_keys: Amounts, action_rows: Rows
) -> tuple[Rows, Doubles]:
    """Return what one person's history says at an instant, as the catalog knows goals and actions.

    Args:
        history: int64[h, 5], see profiles.history.fold.
        now_us: rows that count from later on are left out.
        goal_keys: see HistoryTerms, as are the arguments after it.
        is_kept: see HistoryTerms.
        action_keys: see HistoryTerms.
        action_rows: see HistoryTerms.

    Returns:
        int32[r, 2], goal row and action row; float64[r, 2], expected and observed.
    """
    places = np.empty((history.shape[0], 2), np.int32)
    sums = np.zeros((history.shape[0], 2), np.float64)
    r, i = 0, 0
    while i < history.shape[0]:
        goal_key, action_key = history[i, 0], history[i, 1]
        expected, observed = 0, 0
        while i < history.shape[0] and history[i, 0] == goal_key and history[i, 1] == action_key:
            if history[i, 2] <= now_us:
                expected += history[i, 3]
                observed += history[i, 4]
            i += 1
        place = np.searchsorted(action_keys, action_key)
        if (expected == 0 and observed == 0) or place == action_keys.size or action_keys[place] != action_key:
            continue
        for goal in range(goal_keys.size):
            if goal_keys[goal] == goal_key and is_kept[goal]:
                places[r, 0], places[r, 1] = goal, action_rows[place]
                sums[r, 0], sums[r, 1] = expected * _UNIT, observed * _UNIT
                r += 1
    return places[:r], sums[:r]


@kernel
def factors(places: Rows, sums: Doubles, goal: int, rows: Rows, groups: Rows, spreads: Doubles, out: Doubles) -> bool:
    """Write by what factor each candidate's propensity differs for this person; say whether any does.

    Args:
        places: int32[r, 2], see read.
        sums: float64[r, 2], see read.
        goal: its row.
        rows: int32[m], ascending: the catalog row of each candidate.
        groups: int32[n], see HistoryTerms.
        spreads: float64[2], inverses of the strengths of groups and of actions.
        out: float64[m], written: above 0.
    """
    out[:] = 1.0
    if spreads[0] == 0.0 and spreads[1] == 0.0:
        return False
    is_any = False
    of_groups = np.zeros((groups.max() + 1, 2), np.float64)
    for i in range(places.shape[0]):
        if places[i, 0] == goal:
            of_groups[groups[places[i, 1]]] += sums[i]
            is_any = True
    if not is_any:
        return False
    for i in range(rows.size):
        group = of_groups[groups[rows[i]]]
        out[i] = shrunk(group[0], group[1], 1.0, spreads[0])
    for i in range(places.shape[0]):
        if places[i, 0] == goal:
            place = np.searchsorted(rows, places[i, 1])
            if place < rows.size and rows[place] == places[i, 1]:
                out[place] = shrunk(sums[i, 0], sums[i, 1], out[place], spreads[1])
    return True


@kernel
def shrunk(expected: float, observed: float, assumed: float, spread: float) -> float:
    """Return a factor after what was observed: (observed + s × assumed) / (expected + s), where s = 1 / spread."""
    return (observed * spread + assumed) / (expected * spread + 1.0)


@kernel
def apply(factor: Doubles, propensities: Floats) -> None:
    """Multiply propensities by factors, below 1."""
    for i in range(factor.size):
        if factor[i] != 1.0:
            before = float(propensities[i])
            propensities[i] = min(before * factor[i], max(before, PROPENSITY_MAX))


@kernel
def of_action(places: Rows, sums: Doubles, goal: int, row: int, groups: Rows, out: Doubles) -> None:
    """Write what history says of one action: expected, observed, and those of its group; float64[4]."""
    for i in range(places.shape[0]):
        if places[i, 0] == goal and groups[places[i, 1]] == groups[row]:
            out[2] += sums[i, 0]
            out[3] += sums[i, 1]
            if places[i, 1] == row:
                out[0], out[1] = sums[i, 0], sums[i, 1]
