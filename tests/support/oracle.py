"""The decision leaves once more, as plain numpy: what the compiled kernels must agree with.

Written from the formulas, not from the kernels; slow and short.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import (
    EQUALS,
    GREEDY,
    SCALED,
    SQUARE_CB,
    THOMPSON,
    Catalog,
    Doubles,
    FeatureColumns,
    Floats,
    Rows,
)
from server.decisioning.models import Models
from tests.support.rules import YES, evaluate


def eligible(catalog: Catalog, facts: Doubles, now_us: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Say of each action whether its dates and its rule let this person have it."""
    actions = catalog.actions
    dates = (actions.valid_from_us <= now_us) & (now_us < actions.valid_until_us)
    verdicts = [rule < 0 or evaluate(catalog.rules, rule, facts) == YES for rule in actions.rules.tolist()]
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
    log_odds = prior + models.correction_weights[goal, rows] @ learned + models.correction_intercepts[goal, rows]
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
    """Spread selection probability, for every policy but Thompson."""
    out = np.zeros(priorities.size)
    p = priorities[is_open]
    best = p == p.max()
    if policy == SQUARE_CB:
        gaps = (p.max() - p) / p.max() if p.max() > 0 else np.zeros(p.size)
        shares = 1.0 / (p.size + parameter * gaps)
        shares[best] = 0.0
        shares[best] = (1.0 - shares.sum()) / best.sum()
    else:
        assert policy != THOMPSON, "its shares are counted, not computed"
        epsilon = parameter if policy != GREEDY else 0.0
        shares = epsilon / p.size + (1.0 - epsilon) * best / best.sum()
    out[is_open] = shares
    return out
