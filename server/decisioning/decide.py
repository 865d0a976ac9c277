"""The pure core: what is the best next action, for a few requests at once.

Candidates → eligibility → consent → contact policy → features → score → arbitrate → explore. Five inputs, taken once by
the shell and unchanged during the call, so a hot swap never mixes two revisions; no clock, no random source, no I/O, no
logging. Requests that are in flight together are decided together, each as if alone.

Cost sketch at 100 candidates, 47 of them eligible, three slots, 16 requests together: gates and features 5 µs, the
champion 14 to 26, arbitration and exploration 6; alone 16, 47 and 17, entering the two kernels some 10 of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import GREEDY, SOFTMAX, SQUARE_CB, THOMPSON, Bytes, Catalog, Doubles, Floats, Rows
from server.decisioning import arbitration, candidacy, consent, contact_policy, eligibility, exploration, features
from server.decisioning.models import NO_GOAL, Models
from server.kernel import kernel
from tsugi.v1.decision_pb2 import ChoiceReason

EXPLORE, RANDOM_CONTROL, NO_EXPLORATION = 0, 1, 2

_BEST = int(ChoiceReason.CHOICE_REASON_BEST)
_EXPLORED = int(ChoiceReason.CHOICE_REASON_EXPLORED)
_RANDOM_CONTROL = int(ChoiceReason.CHOICE_REASON_RANDOM_CONTROL)
_NO_CANDIDATE = int(ChoiceReason.CHOICE_REASON_NO_CANDIDATE)
_NO_CONSENT = int(ChoiceReason.CHOICE_REASON_NO_CONSENT)


class Questions(NamedTuple):
    """What b requests ask. An *ask* is one placement of one request; asks lie in request order."""

    facts: Doubles  # float64[b, m], see FactSpace; column NOW_FACT is now_us for all
    now_us: int
    heads: Rows  # int32[b, 3]: number of asks; EXPLORE, RANDOM_CONTROL or NO_EXPLORATION; listing, -1: none
    asks: Rows  # int32[a, 2]: the placement's catalog row, and the slots asked for, 1 or more
    seeds: NDArray[np.uint64]  # uint64[b]
    listings: Bytes  # uint8[l, n], see candidacy.gate: what the callers who name actions say of each
    holds: Rows  # int32[h, 3], by request: request, contact target, how often less that may be spoken of now


class Decisions(NamedTuple):
    """What was decided, as columns. A *survivor* is a candidate that passed every gate.

    The survivors of request q are ``rows[starts[q]:starts[q + 1]]``. Ask a has a block of one entry a survivor in
    every column of asks, from ``ask_blocks[a]`` on; slot s has one in ``distributions``, from ``slot_blocks[s]`` on.
    """

    reasons: Bytes  # uint8[b, n]: refusal reasons, 0 for survivors
    learned: Floats  # float32[b, d]: what the learners read
    starts: Rows  # int32[b + 1]
    rows: Rows  # int32[survivors], ascending within a request
    ask_blocks: Rows  # int32[a + 1]
    prior_log_odds: Floats  # float32[asks × survivors]
    propensities: Floats  # the same shape; of the placement's first goal
    other_blocks: Rows  # int32[a + 1]
    other_propensities: Floats  # of ask a's other goals, in their rows' order, one block each from other_blocks[a] on
    priorities: Doubles  # the same shape, NaN where the action has no treatment for the placement's channel
    means: Floats  # posterior means of the reward, the same shape; empty when no ask explores by Thompson
    deviations: Floats  # their standard deviations
    slot_blocks: NDArray[np.int64]  # int64[s + 1]
    slot_codes: Rows  # int32[s, 4]: ask; chosen survivor's index in its request, its catalog row; choice reason
    slot_numbers: Doubles  # float64[s, 4]: selection probability, propensity, priority, prior log-odds of the chosen
    distributions: Doubles  # float64[slots × survivors]
    is_model_unavailable: bool  # the champion failed; base rates stood in


class Scratch:
    """The one large buffer of the core, kept from call to call because fresh pages cost more than the scoring.

    Args:
        floats_max: how many float32 to begin with; grows as needed.
    """

    def __init__(self, floats_max: int = 1 << 16) -> None:
        self._floats = np.empty(floats_max, np.float32)

    def inputs(self, rows_max: int, d: int) -> Floats:
        """Return float32[rows_max, d], uninitialised, valid until the next call."""
        if self._floats.size < rows_max * d:
            self._floats = np.empty(2 * rows_max * d, np.float32)
        return self._floats[: rows_max * d].reshape(rows_max, d)


def decide(questions: Questions, catalog: Catalog, models: Models, scratch: Scratch) -> Decisions:
    """Decide b requests under one catalog and one set of models.

    Args:
        questions: the requests, validated, b >= 1.
        catalog: the revision in force.
        models: champion and learners, aligned with that catalog.
        scratch: the buffer for model inputs; its content means nothing between calls.

    Returns:
        All of it as columns; selection probabilities sum to 1 over each filled slot's survivors.

    Raises: nothing to handle; a failing champion is a degradation.
    """
    b, n = questions.facts.shape[0], len(catalog.actions.names)
    champion = models.champion
    inputs = scratch.inputs(b * n, champion.template.shape[1])
    targets = catalog.profiles.contacts.targets.columns()
    reasons, consents, is_forbidden, left, learned, starts, rows = _gate_and_encode(
        questions.facts,
        questions.now_us,
        questions.heads,
        questions.asks,
        questions.listings,
        questions.holds,
        catalog.placement_columns.codes,
        catalog.placement_columns.consents,
        catalog.actions.weights,
        catalog.actions.valid_from_us,
        catalog.actions.valid_until_us,
        catalog.actions.rules,
        *catalog.rules.columns(),
        *targets,
        *catalog.learned.columns(),
        *champion.shared.columns(),
        champion.shared_positions,
        champion.template,
        inputs,
    )
    prior, is_model_unavailable = champion.score(inputs[: rows.size])
    chosen = _score_and_fill(
        questions.heads,
        questions.asks,
        questions.seeds,
        consents,
        is_forbidden,
        left,
        *targets[:2],
        *targets[-2:],
        starts,
        rows,
        learned,
        prior,
        NO_GOAL if is_model_unavailable else champion.goal_row,  # then base rates are the prior of every goal
        catalog.goal_base_log_odds,
        catalog.placement_columns.codes,
        catalog.placement_columns.parameters,
        catalog.placement_columns.goal_weights,
        catalog.actions.worth,
        catalog.actions.weights,
        catalog.actions.hashes,
        models.correction_weights,
        models.correction_intercepts,
        models.posterior_rows,
        models.posterior_means,
        models.posterior_covariances,
        models.posterior_scales,
    )
    return Decisions(reasons, learned, starts, rows, *chosen, is_model_unavailable)


@kernel
def _refuse(reasons: Bytes, passed: NDArray[np.bool_], new_reasons: Bytes) -> None:
    """Name the refusals of one gate; the first gate to refuse names the reason."""
    for row in range(reasons.size):
        if not passed[row] and reasons[row] == 0:
            reasons[row] = new_reasons[row]


@kernel
def _gate_and_encode(
    facts: Doubles,
    now_us: int,
    heads: Rows,
    asks: Rows,
    listings: Bytes,
    holds: Rows,
    placement_codes: Rows,
    placement_consents: Rows,
    weights: Doubles,
    valid_from_us: NDArray[np.int64],
    valid_until_us: NDArray[np.int64],
    action_rules: Rows,
    left: Rows,
    right: Rows,
    operators: Bytes,
    constants: Doubles,
    steps: Rows,
    step_starts: Rows,
    target_kinds: Bytes,
    target_limits: Rows,
    target_rules: Rows,
    target_starts: Rows,
    target_entries: Rows,
    learned_sources: Rows,
    learned_kinds: Bytes,
    learned_parameters: Doubles,
    shared_sources: Rows,
    shared_kinds: Bytes,
    shared_parameters: Doubles,
    shared_positions: Rows,
    template: Floats,
    inputs: Floats,
) -> tuple[Bytes, Bytes, NDArray[np.bool_], Rows, Floats, Rows, Rows]:
    b, n = facts.shape[0], weights.shape[0]
    reasons = np.zeros((b, n), np.uint8)
    learned = np.empty((b, learned_sources.size), np.float32)
    shared = np.empty(shared_sources.size, np.float32)
    starts = np.zeros(b + 1, np.int32)
    rows = np.empty(b * n, np.int32)
    channels = np.empty(asks.shape[0], np.int32)
    positions = np.empty(asks.shape[0], np.int32)
    never_rules = np.empty(asks.shape[0], np.int32)
    consents = np.empty(asks.shape[0], np.uint8)
    is_forbidden = np.empty(asks.shape[0], np.bool_)
    for ask in range(asks.shape[0]):
        channels[ask] = placement_codes[asks[ask, 0], 0]
        never_rules[ask] = placement_codes[asks[ask, 0], 4]
        positions[ask] = placement_consents[asks[ask, 0]]
    left_of = np.empty((b, target_limits.size), np.int32)
    nothing_named = np.empty(0, np.uint8)
    m, ask, first_hold = 0, 0, 0
    for q in range(b):
        listing_row = heads[q, 2]
        listing = listings[listing_row] if listing_row >= 0 else nothing_named
        own = slice(ask, ask + heads[q, 0])
        person, refused, may_say = facts[q], reasons[q], left_of[q]
        ask = own.stop
        _refuse(refused, *candidacy.gate(listing, channels[own], weights))
        _refuse(
            refused,
            *eligibility.gate(
                person, now_us, valid_from_us, valid_until_us, action_rules,
                left, right, operators, constants, steps, step_starts,
            ),
        )  # fmt: skip
        consents[own] = consent.verdicts(person, positions[own])
        _refuse(refused, *consent.gate(consents[own], channels[own], weights))
        end_hold = first_hold
        while end_hold < holds.shape[0] and holds[end_hold, 0] == q:
            end_hold += 1
        may_say[:] = target_limits
        contact_policy.hold(holds[first_hold:end_hold, 1:], target_kinds, may_say)
        first_hold = end_hold
        contact_policy.suppress(person, target_rules, left, right, operators, constants, steps, step_starts, may_say)
        _refuse(
            refused,
            *contact_policy.gate(
                consents[own], channels[own], weights, may_say, target_kinds, target_starts, target_entries
            ),
        )
        contact_policy.begin_request(target_kinds, may_say)
        exploration.forbidden(
            person, never_rules[own], left, right, operators, constants, steps, step_starts, is_forbidden[own]
        )
        features.encode(person, learned_sources, learned_kinds, learned_parameters, learned[q])
        features.encode(person, shared_sources, shared_kinds, shared_parameters, shared)
        for row in range(n):
            if refused[row] == 0:
                for j in range(template.shape[1]):
                    inputs[m, j] = template[row, j]
                for j in range(shared_positions.size):
                    inputs[m, shared_positions[j]] = shared[j]
                rows[m] = row
                m += 1
        starts[q + 1] = m
    return reasons, consents, is_forbidden, left_of, learned, starts, rows[:m].copy()


@kernel
def _score_and_fill(
    heads: Rows,
    asks: Rows,
    seeds: NDArray[np.uint64],
    consents: Bytes,
    is_forbidden: NDArray[np.bool_],
    left: Rows,
    target_kinds: Bytes,
    target_limits: Rows,
    target_starts: Rows,
    target_entries: Rows,
    starts: Rows,
    rows: Rows,
    learned: Floats,
    prior: Floats,
    prior_goal: int,
    base_log_odds: Floats,
    placement_codes: Rows,
    placement_parameters: Doubles,
    goal_weights: Doubles,
    worth: Doubles,
    weights: Doubles,
    hashes: NDArray[np.uint64],
    correction_weights: Doubles,
    correction_intercepts: Doubles,
    posterior_rows: Rows,
    posterior_means: Doubles,
    posterior_covariances: Doubles,
    posterior_scales: Doubles,
) -> tuple[Rows, Floats, Floats, Rows, Floats, Doubles, Floats, Floats, NDArray[np.int64], Rows, Doubles, Doubles]:
    ask_blocks, other_blocks, slot_blocks = _lay_out(heads, asks, starts, goal_weights)
    size, n_slots = ask_blocks[-1], slot_blocks.size - 1
    explores_by_thompson = np.any(placement_codes[:, 2][asks[:, 0]] == THOMPSON)
    prior_log_odds = np.empty(size, np.float32)
    propensities = np.empty(size, np.float32)
    other_propensities = np.empty(other_blocks[-1], np.float32)
    priorities = np.zeros(size, np.float64)
    means = np.zeros(size if explores_by_thompson else 0, np.float32)
    deviations = np.zeros(size if explores_by_thompson else 0, np.float32)
    distributions = np.zeros(slot_blocks[-1], np.float64)
    slot_codes = np.empty((n_slots, 4), np.int32)
    slot_numbers = np.zeros((n_slots, 4), np.float64)

    first_ask, slot = 0, 0
    for q in range(starts.size - 1):
        mode, first_slot, may_say = heads[q, 1], slot, left[q]
        survivors = rows[starts[q] : starts[q + 1]]
        is_free, is_open = np.ones(survivors.size, np.bool_), np.empty(survivors.size, np.bool_)
        for ask in range(first_ask, first_ask + heads[q, 0]):
            placement = asks[ask, 0]
            channel, goal, policy, n_draws, _ = placement_codes[placement]
            parameter, share_max, probability_min = placement_parameters[placement]
            if mode != EXPLORE or is_forbidden[ask]:
                policy, parameter = GREEDY, 1.0 if mode == RANDOM_CONTROL else 0.0
                share_max, probability_min = 1.0, 0.0
            block = slice(ask_blocks[ask], ask_blocks[ask + 1])
            log_odds, propensity, priority = prior_log_odds[block], propensities[block], priorities[block]
            others = other_propensities[other_blocks[ask] : other_blocks[ask + 1]]
            for each in range(goal_weights.shape[1]):
                goal_weight = goal_weights[placement, each]
                if goal_weight == 0.0:
                    continue
                odds, propensity_of = log_odds, propensity
                if each != goal:
                    odds, propensity_of = np.empty(survivors.size, np.float32), others[: survivors.size]
                    others = others[survivors.size :]
                if each == prior_goal:
                    odds[:] = prior[starts[q] : starts[q + 1]]
                else:
                    odds[:] = base_log_odds[each]
                arbitration.propensities(
                    odds, survivors, learned[q], correction_weights[each], correction_intercepts[each], propensity_of
                )
                arbitration.weigh(propensity_of, goal_weight, priority)
                if policy == THOMPSON:
                    arbitration.posteriors(
                        odds, survivors, learned[q], posterior_rows[each], posterior_means, posterior_covariances,
                        posterior_scales[each], goal_weight, means[block], deviations[block],
                    )  # fmt: skip
            arbitration.priorities(survivors, worth, weights, channel, priority)
            draws, kinds = np.empty((0, 0), np.float32), np.empty(0, np.uint64)
            if policy == THOMPSON:
                worths = worth[:, 0][survivors] * worth[:, 1][survivors] * weights[:, channel][survivors]
                kinds = exploration.kinds_of(means[block], deviations[block], worths)
                draws = np.empty((n_draws, survivors.size), np.float32)
                exploration.posterior_draws(
                    means[block], deviations[block], worths, hashes[survivors], seeds[q], draws
                )  # fmt: skip
            contact_policy.begin_placement(target_kinds, target_limits, may_say)
            for _ in range(asks[ask, 1]):
                is_allowed = consents[ask] == consent.ALLOWED
                _write(slot_codes[slot], (ask, -1, -1, _NO_CANDIDATE if is_allowed else _NO_CONSENT))
                if is_allowed and _open(
                    is_free, priority, survivors, channel, may_say, target_starts, target_entries, is_open
                ):
                    distribution = distributions[slot_blocks[slot] : slot_blocks[slot + 1]]
                    if policy == SQUARE_CB:
                        exploration.inverse_gap(priority, is_open, parameter, distribution)
                    elif policy == THOMPSON:
                        exploration.win_shares(draws, kinds, is_open, parameter, distribution)
                    elif policy == SOFTMAX:
                        exploration.softmax(priority, is_open, parameter, distribution)
                    else:
                        exploration.share_best(priority, is_open, parameter, distribution)
                    if share_max < 1.0:
                        exploration.cap_share(priority, is_open, share_max, distribution)
                    if probability_min > 0.0:
                        exploration.raise_floor(is_open, probability_min, distribution)
                    pick = exploration.draw(distribution, seeds[q], slot - first_slot)
                    is_free[pick] = False
                    contact_policy.take(survivors[pick], channel, may_say, target_starts, target_entries)
                    choice_reason = _choice_reason(mode, priority, is_open, pick)
                    _write(slot_codes[slot], (ask, pick, survivors[pick], choice_reason))
                    _write(slot_numbers[slot], (distribution[pick], propensity[pick], priority[pick], log_odds[pick]))
                slot += 1
        first_ask += heads[q, 0]
    return (
        ask_blocks, prior_log_odds, propensities, other_blocks, other_propensities, priorities, means, deviations,
        slot_blocks, slot_codes, slot_numbers, distributions,
    )  # fmt: skip


@kernel
def _open(
    is_free: NDArray[np.bool_],
    priority: Doubles,
    survivors: Rows,
    channel: int,
    left: Rows,
    starts: Rows,
    entries: Rows,
    is_open: NDArray[np.bool_],
) -> bool:
    """Mark who may fill a slot: not chosen yet, may be said on this channel now, goes with what was chosen; is any?"""
    is_any = False
    for i in range(survivors.size):
        is_open[i] = is_free[i] and not np.isnan(priority[i])
        if is_open[i] and left.size:
            is_open[i] = contact_policy.refusing(survivors[i], channel, left, starts, entries) < 0
        is_any |= is_open[i]
    return is_any


@kernel
def _lay_out(heads: Rows, asks: Rows, starts: Rows, goal_weights: Doubles) -> tuple[Rows, Rows, NDArray[np.int64]]:
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
def _write(row: Rows | Doubles, values: tuple[float, float, float, float]) -> None:
    """Fill a row of four; a compiled function takes no tuple of mixed types for a slice."""
    row[0], row[1], row[2], row[3] = values


@kernel
def _choice_reason(mode: int, priority: Doubles, is_open: NDArray[np.bool_], pick: int) -> int:
    if mode == RANDOM_CONTROL:
        return _RANDOM_CONTROL
    for i in range(priority.size):
        if is_open[i] and priority[i] > priority[pick]:
            return _EXPLORED
    return _BEST
