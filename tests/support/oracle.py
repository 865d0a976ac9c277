"""The decision leaves once more, as plain numpy: what the compiled kernels must agree with.

Written from the formulas, not from the kernels; slow and short.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import (
    EQUALS,
    GREEDY,
    SCALED,
    SOFTMAX,
    SQUARE_CB,
    THOMPSON,
    UPPER_CONFIDENCE,
    Catalog,
    Doubles,
    FeatureColumns,
    Floats,
    Rows,
)
from server.decisioning.models import Models
from tests.support.rules import YES, evaluate
from tsugi.v1.catalog_pb2 import Catalog as CatalogMessage


def eligible(catalog: Catalog, facts: Doubles, now_us: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Say of each action whether its dates and its rules let this person have it."""
    actions = catalog.actions
    dates = (actions.valid_from_us <= now_us) & (now_us < actions.valid_until_us)
    verdicts = [
        all(rule < 0 or evaluate(catalog.rules, rule, facts) == YES for rule in rules)
        for rules in actions.rules.tolist()
    ]
    passed: np.ndarray[tuple[int], np.dtype[np.bool_]] = dates & np.array(verdicts, bool)
    return passed


def encode(facts: Doubles, columns: FeatureColumns) -> Floats:
    """Encode one fact vector."""
    values = facts[columns.sources]
    center, spread, limit, when_unknown = columns.parameters.T
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.clip((values - center) / spread, -limit, limit)
    scaled = np.where(np.isnan(values), when_unknown, scaled)
    return np.where(
        columns.kinds == SCALED, scaled, np.where(columns.kinds == EQUALS, values == center, np.isnan(values))
    ).astype(np.float32)


def propensities(prior: Floats, rows: Rows, learned: Floats, models: Models, goal: int) -> Doubles:
    """Correct the prior and squash it."""
    rows = rows.astype(np.intp)
    log_odds = models.prior_slopes[goal] * prior + models.correction_weights[goal, rows] @ learned
    log_odds += models.correction_intercepts[goal, rows]
    probabilities: Doubles = 1.0 / (1.0 + np.exp(-log_odds))
    return probabilities


def posterior(prior: Floats, rows: Rows, learned: Floats, models: Models, goal: int) -> tuple[Doubles, Doubles]:
    """Return means and standard deviations of the reward."""
    x = np.append(learned, 1.0) * models.posterior_scales[goal]
    where = models.posterior_rows[goal, rows.astype(np.intp)]
    means = 1.0 / (1.0 + np.exp(-prior.astype(np.float64))) + models.posterior_means[where] @ x
    variances = np.einsum("j,ijk,k->i", x, models.posterior_covariances[where], x)
    return means, np.sqrt(np.maximum(variances, 0.0))


def distribution(policy: int, parameter: float, priorities: Doubles, is_open: np.ndarray) -> Doubles:
    """Spread selection probability, for every policy but Thompson; upper confidence is handed its bounds."""
    out = np.zeros(priorities.size)
    p = priorities[is_open]
    best = p == p.max()
    if policy == SQUARE_CB:
        gaps = (p.max() - p) / p.max() if p.max() > 0 else np.zeros(p.size)
        shares = 1.0 / (p.size + parameter * gaps)
        shares[best] = 0.0
        shares[best] = (1.0 - shares.sum()) / best.sum()
    elif policy == SOFTMAX:
        shares = np.exp((p / p.max() if p.max() > 0 else np.zeros(p.size)) / parameter)
        shares /= shares.sum()
    else:
        assert policy != THOMPSON, "its shares are counted, not computed"
        epsilon = parameter if policy not in (GREEDY, UPPER_CONFIDENCE) else 0.0
        shares = epsilon / p.size + (1.0 - epsilon) * best / best.sum()
    out[is_open] = shares
    return out


def bounded(shares: Doubles, priorities: Doubles, is_open: np.ndarray, share_max: float, floor: float) -> Doubles:
    """Put a placement's bounds on what a policy spread: first what others than the best may have, then the least."""
    out, p = shares.copy(), np.where(is_open, priorities, -np.inf)
    best = p == p.max()
    if out[~best].sum() > share_max:
        out[best] += (out[~best].sum() - share_max) / best.sum()
        out[~best] *= share_max / out[~best].sum()
    floor = min(floor, 1.0 / is_open.sum())
    if (out[is_open] < floor).any():
        above = np.maximum(out[is_open] - floor, 0.0)
        out[is_open] = floor + above * (1.0 - floor * is_open.sum()) / max(above.sum(), 1e-300)
    return out


def goes_with(catalog: CatalogMessage, chosen: list[tuple[str, str]], placement: str) -> dict[str, bool]:
    """Say of each action whether it may be said in a placement, after what was chosen: placements and actions."""
    groups = {action.name: action.group for action in catalog.actions}
    goes = dict.fromkeys(groups, True)
    for composition in catalog.compositions:
        meant = {name for name, group in groups.items() if name in composition.actions or group in composition.groups}
        meant = meant if composition.actions or composition.groups else set(groups)
        if composition.HasField("requires"):
            wanted = composition.requires
            is_open = any(name in wanted.actions or groups[name] in wanted.groups for _, name in chosen)
            goes |= {name: False for name in meant if not is_open}
            continue
        limit = composition.at_most
        here = [name for at, name in chosen if name in meant and (at == placement or not limit.each_placement)]
        for name in meant:
            alike = [other for other in here if not limit.each_group or groups[other] == groups[name]]
            if len(alike) >= limit.count_max and (groups[name] or not limit.each_group):
                goes[name] = False
    return goes
