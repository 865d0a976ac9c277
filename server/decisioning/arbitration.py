"""Which first: propensities become priorities.

propensity = sigmoid(prior log-odds + correction), and priority = propensity × value × weight × lever; where a placement
has several goals, the sum of weight × propensity over them stands in place of the propensity. Handed columns, gives
columns.
"""

from __future__ import annotations

import math

import numpy as np

from server.catalog.catalog import Doubles, Floats, Rows
from server.kernel import kernel


@kernel
def propensities(
    prior_log_odds: Floats,
    rows: Rows,
    learned: Floats,
    weights: Doubles,
    intercepts: Doubles,
    prior_slope: float,
    out: Floats,
) -> None:
    """Write the propensity of each candidate: the prior corrected by what was learned seconds ago.

    Args:
        prior_log_odds: float32[m].
        rows: int32[m], the catalog row of each candidate.
        learned: float32[d], what the learners read of person and context.
        weights: float64[n, d], the learner's correction for each catalog row; zero where nothing was learned.
        intercepts: float64[n].
        prior_slope: factor on the prior.
        out: float32[m], written; within (0, 1).

    Cost: O(m × d), some 1 ns each, and one exponential a candidate.
    """
    for i in range(rows.size):
        row = rows[i]
        log_odds = prior_slope * float(prior_log_odds[i]) + intercepts[row]
        for j in range(learned.size):
            log_odds += weights[row, j] * learned[j]
        out[i] = 1.0 / (1.0 + math.exp(-log_odds))


@kernel
def shifted(log_odds: Floats, offsets: Doubles) -> Floats:
    """Return float32[m] log-odds with float64[m] added."""
    out = np.empty(log_odds.size, np.float32)
    for i in range(log_odds.size):
        out[i] = float(log_odds[i]) + offsets[i]
    return out


@kernel
def weigh(propensity: Floats, goal_weight: float, out: Doubles) -> None:
    """Add what one goal brings: its weight × float32[m] to float64[m]."""
    for i in range(propensity.size):
        out[i] += goal_weight * float(propensity[i])


@kernel
def values(rows: Rows, worth: Doubles, programs: Rows, computed: Doubles, out: Doubles) -> None:
    """Write what success with each candidate is worth: a constant, or what its expression came to.

    Args:
        rows: int32[m].
        worth: float64[n, 2], value and lever.
        programs: int32[n], the program that gives the value; -1: it is the constant.
        computed: float64[v], what each program came to.
        out: float64[m], written: currency units.
    """
    for i in range(rows.size):
        row = rows[i]
        out[i] = worth[row, 0] if programs[row] < 0 else computed[programs[row]]


@kernel
def priorities(rows: Rows, value: Doubles, worth: Doubles, weights: Doubles, channel: int, out: Doubles) -> None:
    """Multiply by value × lever × weight of each candidate; NaN where it has no treatment for the channel.

    Args:
        rows: int32[m].
        value: float64[m], see values.
        worth: float64[n, 2], value and lever.
        weights: float64[n, channels].
        channel: the channel's row.
        out: float64[m], changed: what the goals bring, see weigh.
    """
    for i in range(rows.size):
        row = rows[i]
        out[i] = out[i] * value[i] * worth[row, 1] * weights[row, channel]


@kernel
def posteriors(
    prior_log_odds: Floats,
    rows: Rows,
    learned: Floats,
    posterior_rows: Rows,
    means: Doubles,
    covariances: Doubles,
    scale: float,
    goal_weight: float,
    factors: Doubles,
    mean_out: Floats,
    deviation_out: Floats,
) -> None:
    """Add one goal to mean and standard deviation of each candidate's reward under the Bayesian learner.

    mean = sigmoid(prior) + μ·x and variance = x'Σx, where x is (learned, 1) × scale (Bishop, Pattern Recognition and
    Machine Learning, 2006, equations 3.58 and 3.59, without the noise of a single outcome). Of a weighted sum of goals
    the means add, and the variances with the square of the weight: each goal is learned by itself. A person's own
    history multiplies both by its factor; how uncertain the factor is is not drawn.

    Args:
        prior_log_odds: float32[m].
        rows: int32[m].
        learned: float32[d].
        posterior_rows: int32[n], where each catalog row's posterior stands; those not learned about share the prior's.
        means: float64[r, d + 1], μ, the intercept last.
        covariances: float64[r, d + 1, d + 1], Σ.
        scale: factor on x.
        goal_weight: of this goal.
        factors: float64[m], see personal.factors; empty: nobody's history has a say.
        mean_out: float32[m], changed; 0 before the first goal.
        deviation_out: float32[m], changed; 0 before the first goal.

    Cost: O(m × d²); the quadratic form dominates, some 0.6 µs a candidate at d = 24.
    """
    d = learned.size
    x = np.empty(d + 1, np.float64)
    x[:d] = learned
    x[d] = 1.0
    x *= scale
    for i in range(rows.size):
        row = posterior_rows[rows[i]]
        mean = 1.0 / (1.0 + math.exp(-float(prior_log_odds[i])))
        variance = 0.0
        for j in range(d + 1):
            mean += means[row, j] * x[j]
            inner = 0.0
            for k in range(d + 1):
                inner += covariances[row, j, k] * x[k]
            variance += x[j] * inner
        weight = goal_weight * factors[i] if factors.size else goal_weight
        mean_out[i] = float(mean_out[i]) + weight * mean
        before = float(deviation_out[i])
        deviation_out[i] = math.sqrt(before * before + weight * weight * max(variance, 0.0))
