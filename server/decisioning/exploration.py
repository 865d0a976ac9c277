"""Spread selection probability over a slot's candidates, and take one from it.

Every policy writes one float64 a candidate, together 1, zero where a candidate is not open; equal candidates share
equally whatever their order, by construction. Then the placement's bounds are put on that: first on what may go to
others than the best, then on the least that everyone has. The draw takes its chance from a seed, so a decision can be
drawn again. What is logged is what was drawn from, hence exact.
"""

from __future__ import annotations

import math
import sys
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import RULE_STACK_MAX, Bytes, Doubles, Floats, Mask, Rows
from server.catalog.evaluation import NO, compare, evaluate
from server.kernel import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Standard normal quantiles at 4,096 equal steps: a posterior draw by one look-up. The outermost lies at 3.67.
_NORMALS: Floats = np.array([NormalDist().inv_cdf((i + 0.5) / 4096) for i in range(4096)], np.float32)
_NORMALS.flags.writeable = False
_TINY = sys.float_info.min  # the reciprocal of what is smaller is no finite number; it counts as no priority at all


@kernel
def share_best(priorities: Doubles, is_open: Mask, epsilon: float, out: Doubles) -> None:
    """Spread the share epsilon evenly over the open candidates and the rest over the best of them.

    Args:
        priorities: float64[m], finite where open.
        is_open: bool[m], at least one true.
        epsilon: 0..1; 0 is greedy, 1 is uniform.
        out: float64[m], written.

    Cost: O(m), two passes.
    """
    best, n_open, n_best = -math.inf, 0, 0
    for i in range(priorities.size):
        if is_open[i]:
            n_open += 1
            if priorities[i] > best:
                best, n_best = priorities[i], 1
            elif priorities[i] == best:
                n_best += 1
    for i in range(priorities.size):
        out[i] = epsilon / n_open if is_open[i] else 0.0
        if is_open[i] and priorities[i] == best:
            out[i] += (1.0 - epsilon) / n_best


@kernel
def inverse_gap(priorities: Doubles, is_open: Mask, gamma: float, out: Doubles) -> None:
    """Spread selection probability over the open candidates, less to those further behind the best.

    Args:
        priorities: float64[m], finite and 0 or more where open; scaled here by the best of them.
        is_open: bool[m], at least one true.
        gamma: greed, 0 or more, no unit. 0 is uniform; the larger, the closer to always the best.
        out: float64[m], written: at least 1 / (open + gamma) each; several best share the remainder equally.

    Cost: O(m), two passes.
    Source: Foster and Rakhlin, "Beyond UCB", ICML 2020, algorithm 1; stated there for losses in 0..1, here for
    priorities divided by the best one, hence the turned sign of the gap.
    """
    best, n_open, n_best = -math.inf, 0, 0
    for i in range(priorities.size):
        if is_open[i]:
            n_open += 1
            if priorities[i] > best:
                best, n_best = priorities[i], 1
            elif priorities[i] == best:
                n_best += 1
    scale = 1.0 / best if best >= _TINY else 0.0
    taken = 0.0
    for i in range(priorities.size):
        out[i] = 0.0
        if is_open[i] and priorities[i] != best:
            out[i] = 1.0 / (n_open + gamma * (best - priorities[i]) * scale)
            taken += out[i]
    for i in range(priorities.size):
        if is_open[i] and priorities[i] == best:
            out[i] = (1.0 - taken) / n_best


@kernel
def softmax(priorities: Doubles, is_open: Mask, temperature: float, out: Doubles) -> None:
    """Spread selection probability over the open candidates, by the same factor more for each step in priority.

    Args:
        priorities: float64[m], finite and 0 or more where open; scaled here by the best of them, so that what a
            temperature means depends on neither currency nor goal.
        is_open: bool[m], at least one true.
        temperature: above 0, no unit. The smaller, the closer to always the best; the larger, the more even.
        out: float64[m], written: in proportion to exp(priority / (temperature × best priority)).

    Cost: O(m), three passes, and one exponential a candidate.
    Source: Sutton and Barto, Reinforcement Learning, second edition, 2018, equation 2.11, with the priority over
    temperature × best as preference.
    """
    best = -math.inf
    for i in range(priorities.size):
        if is_open[i] and priorities[i] > best:
            best = priorities[i]
    scale = 1.0 / best if best >= _TINY else 0.0
    total = 0.0
    for i in range(priorities.size):
        out[i] = math.exp((priorities[i] - best) * scale / temperature) if is_open[i] else 0.0
        total += out[i]
    for i in range(priorities.size):
        out[i] /= total


@kernel
def cap_share(priorities: Doubles, is_open: Mask, share_max: float, out: Doubles) -> None:
    """Cut what goes to others than the best, in proportion, and give the rest to the best evenly.

    Args:
        priorities: float64[m], finite where open.
        is_open: bool[m], at least one true.
        share_max: 0..1, the most that all others may have together.
        out: float64[m], changed; together 1 before and after.

    Cost: O(m), three passes.
    """
    best = -math.inf
    for i in range(priorities.size):
        if is_open[i] and priorities[i] > best:
            best = priorities[i]
    share, n_best = 0.0, 0
    for i in range(priorities.size):
        if is_open[i] and priorities[i] == best:
            n_best += 1
        else:
            share += out[i]
    if share <= share_max:
        return
    for i in range(priorities.size):
        if is_open[i] and priorities[i] == best:
            out[i] += (share - share_max) / n_best
        else:
            out[i] *= share_max / share


@kernel
def raise_floor(is_open: Mask, probability_min: float, out: Doubles) -> None:
    """Raise every open candidate to a floor; those above give it, in proportion to what they have above it.

    Args:
        is_open: bool[m], at least one true.
        probability_min: 0..1; where that is more than an even share, the even share is the floor.
        out: float64[m], changed; together 1 before and after, none below the floor after. Who had more has no less.

    Cost: O(m), two passes.
    """
    n_open = 0
    for i in range(out.size):
        n_open += is_open[i]
    floor = min(probability_min, 1.0 / n_open)
    above, is_any_below = 0.0, False
    for i in range(out.size):
        if is_open[i]:
            above += max(out[i] - floor, 0.0)
            is_any_below |= out[i] < floor
    if is_any_below:
        kept = max(1.0 - n_open * floor, 0.0) / above if above > 0.0 else 0.0
        for i in range(out.size):
            if is_open[i]:
                out[i] = floor + max(out[i] - floor, 0.0) * kept


@kernel
def forbidden(
    facts: Doubles,
    rules: Rows,
    left: Rows,
    right: Rows,
    operators: Bytes,
    constants: Doubles,
    steps: Rows,
    starts: Rows,
    out: Mask,
) -> None:
    """Say in which placements nothing may be explored with this person now: the rule holds, or cannot be told.

    Args:
        facts: float64[m], one request's fact vector.
        rules: int32[asks], the rule of each placement asked for; -1: none.
        left: see server.catalog.catalog.Rules, as are the arguments after it.
        right: see Rules.
        operators: see Rules.
        constants: see Rules.
        steps: see Rules.
        starts: see Rules.
        out: bool[asks], changed: made true where the rule holds.

    Cost: nothing without such rules; otherwise O(atoms) for each.
    """
    for ask in range(rules.size):
        rule = rules[ask]
        if rule >= 0 and not out[ask]:
            atoms = compare(facts, left, right, operators, constants)
            stack = np.empty(RULE_STACK_MAX, np.uint8)
            out[ask] = evaluate(atoms, steps[starts[rule] : starts[rule + 1]], stack) != NO


@kernel
def posterior_draws(
    means: Floats, deviations: Floats, worths: Doubles, hashes: NDArray[np.uint64], seed: np.uint64, out: Floats
) -> None:
    """Write seeded posterior draws of each candidate's priority.

    The noise of an action depends on the seed, the draw and the action's own hash: it is the same wherever the action
    stands among the candidates, and whoever else is there.

    Args:
        means: float32[m], posterior means of the reward.
        deviations: float32[m], their standard deviations.
        worths: float64[m], value × lever × weight.
        hashes: uint64[m], of the actions' names.
        seed: uint64, of the decision.
        out: float32[draws, m], written.

    Cost: O(draws × m), some 3 ns each.
    """
    for draw in range(out.shape[0]):
        salt = seed + np.uint64(draw + 1) * _GOLDEN
        for i in range(means.size):
            bits = mix(salt ^ hashes[i])
            noise = _NORMALS[bits >> np.uint64(52)]
            out[draw, i] = (means[i] + deviations[i] * noise) * worths[i]


@kernel
def upper_bounds(means: Floats, deviations: Floats, worths: Doubles, width: float) -> Doubles:
    """Return the most that each candidate's priority may be worth, as far as is known: float64[m].

    Args:
        means: float32[m], posterior means of the reward.
        deviations: float32[m], their standard deviations.
        worths: float64[m], value × lever × weight.
        width: deviations above the mean, 0 or more, no unit.

    Source: Li, Chu, Langford and Schapire, "A contextual-bandit approach to personalized news article recommendation",
    WWW 2010, algorithm 1, whose alpha is width and whose ridge regression is here the goal's posterior.
    """
    bounds = np.empty(means.size, np.float64)
    for i in range(means.size):
        bounds[i] = (np.float64(means[i]) + width * np.float64(deviations[i])) * worths[i]
    return bounds


@kernel
def win_shares(draws: Floats, kinds: NDArray[np.uint64], is_open: Mask, floor_share: float, out: Doubles) -> None:
    """Spread selection probability as often as each open candidate wins a draw, mixed with an even floor.

    Candidates of the same kind (equal mean, deviation and worth) get the average of their shares, so that equal
    candidates share equally although their noise differs.

    Args:
        draws: float32[draws, m], see posterior_draws.
        kinds: uint64[m], equal for candidates that are equal.
        is_open: bool[m], at least one true.
        floor_share: 0..1, spread evenly over the open candidates.
        out: float64[m], written.

    Cost: O(draws × m + m log m).
    """
    n_draws, m = draws.shape
    wins = np.zeros(m, np.float64)
    n_open = 0
    for i in range(m):
        n_open += is_open[i]
    for draw in range(n_draws):
        winner, best = -1, -np.float32(math.inf)
        for i in range(m):
            if is_open[i] and (winner < 0 or draws[draw, i] > best):
                winner, best = i, draws[draw, i]
        wins[winner] += 1.0
    order = np.argsort(kinds)
    first = 0
    while first < m:
        last, total, count = first, 0.0, 0
        while last < m and kinds[order[last]] == kinds[order[first]]:
            if is_open[order[last]]:
                total += wins[order[last]]
                count += 1
            last += 1
        for k in range(first, last):
            out[order[k]] = 0.0
            if is_open[order[k]]:
                out[order[k]] = (1.0 - floor_share) * total / count / n_draws + floor_share / n_open
        first = last


@kernel
def kinds_of(means: Floats, deviations: Floats, worths: Doubles) -> NDArray[np.uint64]:
    """Return 64 bits a candidate, equal for candidates that are equal: uint64[m]."""
    kinds = np.empty(means.size, np.uint64)
    bits = np.empty(3, np.float64)
    for i in range(means.size):
        bits[0], bits[1], bits[2] = means[i], deviations[i], worths[i]
        words = bits.view(np.uint64)
        kinds[i] = mix(mix(mix(words[0]) ^ words[1]) ^ words[2])
    return kinds


@kernel
def draw(probabilities: Doubles, seed: np.uint64, slot: int) -> int:
    """Take one candidate from a distribution; the chance is a hash of the decision's seed and the slot.

    Args:
        probabilities: float64[m], together 1 within rounding.
        seed: uint64, of the decision.
        slot: index of the slot within the decision.

    Returns:
        The index of a candidate whose probability is above 0.
    """
    chance = float(mix(seed + np.uint64(slot + 1) * _GOLDEN) >> np.uint64(11)) / 9007199254740992.0
    total, last = 0.0, -1
    for i in range(probabilities.size):
        if probabilities[i] > 0.0:
            total += probabilities[i]
            last = i
            if chance < total:
                return i
    return last  # rounding left the total a hair below the chance


@kernel
def mix(bits: np.uint64) -> np.uint64:
    """Scramble 64 bits (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    bits = bits + _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
