"""The second half of the core: how likely is each survivor to succeed, and which of them fill the slots?

Two compiled steps. *Scoring* gives propensities from priors and what was learned; *filling* gives priorities, selection
probabilities and choices from propensities. Where one ends and the other begins is what a decision record keeps as
inputs: filling can be done again from it, to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import (
    GREEDY,
    POSTERIOR_POLICIES,
    SOFTMAX,
    SQUARE_CB,
    THOMPSON,
    UPPER_CONFIDENCE,
    Amounts,
    Bytes,
    Doubles,
    Floats,
    Mask,
    Rows,
)
from server.decisioning import arbitration, contact_policy, exploration, holdout, personal
from server.kernel import kernel
from tsugi.v1.decision_pb2 import ChoiceReason

EXPLORE, RANDOM_CONTROL, NO_EXPLORATION = 0, 1, 2

_BEST = int(ChoiceReason.CHOICE_REASON_BEST)
_EXPLORED = int(ChoiceReason.CHOICE_REASON_EXPLORED)
_RANDOM_CONTROL = int(ChoiceReason.CHOICE_REASON_RANDOM_CONTROL)
_NO_CANDIDATE = int(ChoiceReason.CHOICE_REASON_NO_CANDIDATE)
_NO_CONSENT = int(ChoiceReason.CHOICE_REASON_NO_CONSENT)
_HELD_OUT = int(ChoiceReason.CHOICE_REASON_HELD_OUT)


@kernel
def score(
    heads: Rows,
    asks: Rows,
    is_settled: Mask,
    starts: Rows,
    rows: Rows,
    learned: Floats,
    prior: Floats,
    prior_goal: int,
    offsets: Doubles,
    base_log_odds: Floats,
    placement_codes: Rows,
    goal_weights: Doubles,
    correction_weights: Doubles,
    correction_intercepts: Doubles,
    prior_slopes: Doubles,
    posterior_rows: Rows,
    posterior_means: Doubles,
    posterior_covariances: Doubles,
    posterior_scales: Doubles,
    now_us: int,
    histories: Amounts,
    history_starts: Rows,
    goal_keys: Amounts,
    is_kept: Mask,
    action_keys: Amounts,
    action_rows: Rows,
    groups: Rows,
    spreads: Doubles,
) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """Say how likely each survivor is to succeed, in each placement and for each of its goals.

    Args:
        heads: see decide.Questions.
        asks: see Questions.
        is_settled: bool[asks], true where the best is taken without exploring.
        starts: see decide.Decisions.
        rows: see Decisions.
        learned: see Decisions.
        prior: float32[survivors], the champion's log-odds; empty: base rates are the prior of every goal.
        prior_goal: whose prior that is.
        offsets: float64[goals, survivors], what trees add to log-odds; empty: nothing.
        base_log_odds: float32[goals].
        placement_codes: int32[blends, p, 5], see PlacementColumns.
        goal_weights: see PlacementColumns.
        correction_weights: see models.Models, as are the arguments after it.
        correction_intercepts: see Models.
        prior_slopes: see Models.
        posterior_rows: see Models.
        posterior_means: see Models.
        posterior_covariances: see Models.
        posterior_scales: see Models.
        now_us: see Questions.
        histories: see Questions.
        history_starts: see Questions.
        goal_keys: see HistoryTerms, as are the arguments up to groups.
        is_kept: see HistoryTerms.
        action_keys: see HistoryTerms.
        action_rows: see HistoryTerms.
        groups: see HistoryTerms.
        spreads: see Models.

    Returns:
        prior_log_odds, propensities, other_propensities, means, deviations and general_propensities, see Decisions.
    """
    ask_blocks, other_blocks, _ = lay_out(heads, asks, starts, goal_weights)
    size = ask_blocks[-1]
    n_drawn = size if explores_by_posterior(heads, asks, placement_codes) else 0
    prior_log_odds = np.empty(size, np.float32)
    propensities = np.empty(size, np.float32)
    other_propensities = np.empty(other_blocks[-1], np.float32)
    means = np.zeros(n_drawn, np.float32)
    deviations = np.zeros(n_drawn, np.float32)
    is_anybody_known = histories.shape[0] > 0
    general_propensities = np.empty(size if is_anybody_known else 0, np.float32)
    places, sums, factor = np.empty((0, 2), np.int32), np.empty((0, 2), np.float64), np.empty(0, np.float64)
    first_ask = 0
    for q in range(starts.size - 1):
        blend = heads[q, 3]
        survivors = rows[starts[q] : starts[q + 1]]
        if is_anybody_known:
            own = histories[history_starts[q] : history_starts[q + 1]]
            places, sums = personal.read(own, now_us, goal_keys, is_kept, action_keys, action_rows)
            factor = np.ones(survivors.size if places.shape[0] else 0, np.float64)
        for ask in range(first_ask, first_ask + heads[q, 0]):
            placement = asks[ask, 0]
            goal = placement_codes[blend, placement, 1]
            is_drawn = (
                placement_codes[blend, placement, 2] in POSTERIOR_POLICIES
                and heads[q, 1] == EXPLORE
                and not is_settled[ask]
            )
            block = slice(ask_blocks[ask], ask_blocks[ask + 1])
            others = other_propensities[other_blocks[ask] : other_blocks[ask + 1]]
            for each in range(goal_weights.shape[1]):
                goal_weight = goal_weights[placement, each]
                if goal_weight == 0.0:
                    continue
                odds, propensity = prior_log_odds[block], propensities[block]
                if each != goal:
                    odds, propensity = np.empty(survivors.size, np.float32), others[: survivors.size]
                    others = others[survivors.size :]
                if each == prior_goal:
                    odds[:] = prior[starts[q] : starts[q + 1]]
                else:
                    odds[:] = base_log_odds[each]
                corrected = odds  # which stays the prior, as it is recorded
                if offsets.size:
                    corrected = arbitration.shifted(odds, offsets[each, starts[q] : starts[q + 1]])
                arbitration.propensities(
                    corrected, survivors, learned[q], correction_weights[each], correction_intercepts[each],
                    prior_slopes[each], propensity,
                )  # fmt: skip
                if is_anybody_known and each == goal:
                    general_propensities[block] = propensity
                if factor.size and personal.factors(places, sums, each, survivors, groups, spreads[each], factor):
                    personal.apply(factor, propensity)
                if is_drawn:
                    arbitration.posteriors(
                        odds, survivors, learned[q], posterior_rows[each], posterior_means, posterior_covariances,
                        posterior_scales[each], goal_weight, factor, means[block], deviations[block],
                    )  # fmt: skip
        first_ask += heads[q, 0]
    return prior_log_odds, propensities, other_propensities, means, deviations, general_propensities


@kernel
def fill(
    heads: Rows,
    asks: Rows,
    seeds: NDArray[np.uint64],
    verdicts: Bytes,
    is_settled: Mask,
    left: Amounts,
    target_kinds: Bytes,
    target_limits: Amounts,
    target_starts: Rows,
    target_entries: Rows,
    target_amounts: Amounts,
    starts: Rows,
    rows: Rows,
    computed: Doubles,
    placement_codes: Rows,
    placement_parameters: Doubles,
    goal_weights: Doubles,
    worth: Doubles,
    weights: Doubles,
    hashes: NDArray[np.uint64],
    value_programs: Rows,
    prior_log_odds: Floats,
    propensities: Floats,
    other_propensities: Floats,
    means: Floats,
    deviations: Floats,
) -> tuple[Rows, Rows, Doubles, NDArray[np.int64], Rows, Doubles, Doubles]:
    """Fill the slots of all placements of each request together, by priority and exploration.

    Args:
        heads: see decide.Questions.
        asks: see Questions.
        seeds: see Questions.
        verdicts: uint8[asks], the refusal reason of placements that stay empty, see consent.verdicts.
        is_settled: bool[asks], true where the best is taken without exploring.
        left: int64[b, t], see contact_policy; changed.
        target_kinds: see TargetColumns, as are the arguments up to target_amounts.
        target_limits: see TargetColumns.
        target_starts: see TargetColumns.
        target_entries: see TargetColumns.
        target_amounts: see TargetColumns.
        starts: see decide.Decisions.
        rows: see Decisions.
        computed: float64[b, v], what each value expression came to.
        placement_codes: see catalog.Blends.
        placement_parameters: see Blends.
        goal_weights: see PlacementColumns.
        worth: see Blends.
        weights: see ActionColumns.
        hashes: see ActionColumns.
        value_programs: see ActionColumns.
        prior_log_odds: see Decisions, as are the arguments after it.
        propensities: see Decisions.
        other_propensities: see Decisions.
        means: see Decisions.
        deviations: see Decisions.

    Returns:
        ask_blocks, other_blocks, priorities, slot_blocks, slot_codes, slot_numbers and distributions, see Decisions.
    """
    ask_blocks, other_blocks, slot_blocks = lay_out(heads, asks, starts, goal_weights)
    n_slots = slot_blocks.size - 1
    priorities = np.zeros(ask_blocks[-1], np.float64)
    distributions = np.zeros(slot_blocks[-1], np.float64)
    slot_codes = np.empty((n_slots, 4), np.int32)
    slot_numbers = np.zeros((n_slots, 6), np.float64)
    first_ask, slot = 0, 0
    for q in range(starts.size - 1):
        mode, blend, first_slot, may_say = heads[q, 1], heads[q, 3], slot, left[q]
        survivors = rows[starts[q] : starts[q + 1]]
        values = np.empty(survivors.size, np.float64)
        arbitration.values(survivors, worth[blend], value_programs, computed[q], values)
        is_free, is_open = np.ones(survivors.size, np.bool_), np.empty(survivors.size, np.bool_)
        for ask in range(first_ask, first_ask + heads[q, 0]):
            placement = asks[ask, 0]
            channel, goal, policy, n_draws, _ = placement_codes[blend, placement]
            parameter, share_max, probability_min = placement_parameters[blend, placement]
            if mode != EXPLORE or is_settled[ask]:
                policy, parameter = GREEDY, 1.0 if mode == RANDOM_CONTROL else 0.0
                share_max, probability_min = 1.0, 0.0
            block = slice(ask_blocks[ask], ask_blocks[ask + 1])
            priority, propensity = priorities[block], propensities[block]
            others = other_propensities[other_blocks[ask] : other_blocks[ask + 1]]
            _weigh_goals(propensity, others, goal_weights[placement], goal, priority)
            arbitration.priorities(survivors, values, worth[blend], weights, channel, priority)
            draws, kinds, bounds = np.empty((0, 0), np.float32), np.empty(0, np.uint64), np.empty(0, np.float64)
            if policy in POSTERIOR_POLICIES:
                worths = values * worth[blend][:, 1][survivors] * weights[:, channel][survivors]
            if policy == UPPER_CONFIDENCE:
                bounds = exploration.upper_bounds(means[block], deviations[block], worths, parameter)
            if policy == THOMPSON:
                kinds = exploration.kinds_of(means[block], deviations[block], worths)
                draws = np.empty((n_draws, survivors.size), np.float32)
                exploration.posterior_draws(
                    means[block], deviations[block], worths, hashes[survivors], seeds[q], draws
                )  # fmt: skip
            contact_policy.begin_placement(target_kinds, target_limits, may_say)
            for _ in range(asks[ask, 1]):
                _write(slot_codes[slot], (ask, -1, -1, _why_empty(verdicts[ask])))
                if verdicts[ask] == 0 and _open(
                    is_free, priority, survivors, channel, may_say, target_starts, target_entries, target_amounts,
                    is_open,
                ):  # fmt: skip
                    distribution = distributions[slot_blocks[slot] : slot_blocks[slot + 1]]
                    _spread(
                        policy, parameter, share_max, probability_min, priority, draws, kinds, bounds, is_open,
                        distribution,
                    )  # fmt: skip
                    pick = exploration.draw(distribution, seeds[q], slot - first_slot)
                    is_free[pick] = False
                    contact_policy.take(
                        survivors[pick], channel, may_say, target_starts, target_entries, target_amounts
                    )
                    forgone = _forgone(priority, is_open, pick)
                    reason = _RANDOM_CONTROL if mode == RANDOM_CONTROL else _EXPLORED if forgone > 0.0 else _BEST
                    _write(slot_codes[slot], (ask, pick, survivors[pick], reason))
                    numbers = slot_numbers[slot]
                    numbers[0], numbers[1], numbers[2] = distribution[pick], propensity[pick], priority[pick]
                    numbers[3], numbers[4], numbers[5] = prior_log_odds[block][pick], values[pick], forgone
                slot += 1
        first_ask += heads[q, 0]
    return ask_blocks, other_blocks, priorities, slot_blocks, slot_codes, slot_numbers, distributions


@kernel
def _weigh_goals(propensity: Floats, others: Floats, weights: Doubles, first_goal: int, priority: Doubles) -> None:
    """Add what each goal of a placement brings, in the order of goals; others holds those after the first."""
    taken = 0
    for goal in range(weights.size):
        if weights[goal] == 0.0:
            continue
        if goal == first_goal:
            arbitration.weigh(propensity, weights[goal], priority)
        else:
            arbitration.weigh(others[taken : taken + propensity.size], weights[goal], priority)
            taken += propensity.size


@kernel
def _spread(
    policy: int,
    parameter: float,
    share_max: float,
    probability_min: float,
    priority: Doubles,
    draws: Floats,
    kinds: NDArray[np.uint64],
    bounds: Doubles,
    is_open: Mask,
    distribution: Doubles,
) -> None:
    """Spread selection probability over one slot's open candidates, within the placement's bounds."""
    if policy == SQUARE_CB:
        exploration.inverse_gap(priority, is_open, parameter, distribution)
    elif policy == THOMPSON:
        exploration.win_shares(draws, kinds, is_open, parameter, distribution)
    elif policy == SOFTMAX:
        exploration.softmax(priority, is_open, parameter, distribution)
    elif policy == UPPER_CONFIDENCE:
        exploration.share_best(bounds, is_open, 0.0, distribution)
    else:
        exploration.share_best(priority, is_open, parameter, distribution)
    if share_max < 1.0:
        exploration.cap_share(priority, is_open, share_max, distribution)
    if probability_min > 0.0:
        exploration.raise_floor(is_open, probability_min, distribution)


@kernel
def lay_out(heads: Rows, asks: Rows, starts: Rows, goal_weights: Doubles) -> tuple[Rows, Rows, NDArray[np.int64]]:
    """Place the blocks of asks, of their goals after the first, and of slots: one entry a survivor of their request."""
    ask_blocks = np.zeros(asks.shape[0] + 1, np.int32)
    other_blocks = np.zeros(asks.shape[0] + 1, np.int32)
    slot_blocks = np.zeros(asks[:, 1].sum() + 1, np.int64)
    ask, slot = 0, 0
    for q in range(starts.size - 1):
        m = starts[q + 1] - starts[q]
        for _ in range(heads[q, 0]):
            n_others = np.count_nonzero(goal_weights[asks[ask, 0]]) - 1
            ask_blocks[ask + 1] = ask_blocks[ask] + m
            other_blocks[ask + 1] = other_blocks[ask] + m * n_others
            for _ in range(asks[ask, 1]):
                slot_blocks[slot + 1] = slot_blocks[slot] + m
                slot += 1
            ask += 1
    return ask_blocks, other_blocks, slot_blocks


@kernel
def explores_by_posterior(heads: Rows, asks: Rows, placement_codes: Rows) -> bool:
    """Say whether any placement asked for explores by what is not yet known in its request's blend."""
    ask = 0
    for q in range(heads.shape[0]):
        for _ in range(heads[q, 0]):
            if placement_codes[heads[q, 3], asks[ask, 0], 2] in POSTERIOR_POLICIES:
                return True
            ask += 1
    return False


@kernel
def _open(
    is_free: Mask,
    priority: Doubles,
    survivors: Rows,
    channel: int,
    left: Amounts,
    starts: Rows,
    entries: Rows,
    amounts: Amounts,
    is_open: Mask,
) -> bool:
    """Mark who may fill a slot: not chosen yet, may be said on this channel now, goes with what was chosen; is any?"""
    is_any = False
    for i in range(survivors.size):
        is_open[i] = is_free[i] and not np.isnan(priority[i])
        if is_open[i] and left.size:
            is_open[i] = contact_policy.refusing(survivors[i], channel, left, starts, entries, amounts) < 0
        is_any |= is_open[i]
    return is_any


@kernel
def _write(row: Rows, values: tuple[int, int, int, int]) -> None:
    """Fill a row of four; a compiled function takes no tuple of mixed types for a slice."""
    row[0], row[1], row[2], row[3] = values


@kernel
def _why_empty(verdict: int) -> int:
    """Return the choice reason of a slot that nobody fills."""
    if verdict == 0:
        return _NO_CANDIDATE
    return _HELD_OUT if verdict == holdout.HELD_OUT else _NO_CONSENT


@kernel
def _forgone(priority: Doubles, is_open: Mask, pick: int) -> float:
    """Return by how much the best open candidate's priority is above the chosen one's."""
    best = priority[pick]
    for i in range(priority.size):
        if is_open[i] and priority[i] > best:
            best = priority[i]
    return float(best - priority[pick])
