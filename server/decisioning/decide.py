"""The pure core: what is the best next action, for a few requests at once.

Candidates → eligibility → consent → contact policy → features → score → arbitrate → explore. Five inputs, taken once by
the shell and unchanged during the call, so a hot swap never mixes two revisions; no clock, no random source, no I/O, no
logging. Requests that are in flight together are decided together, each as if alone.

Cost sketch at 100 candidates, 47 of them eligible, three slots, 16 requests together: gates and features 5 µs, the
champion 14 to 26, arbitration and exploration 6; alone 16, 47 and 17, entering the two kernels some 10 of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import Amounts, Bytes, Catalog, Doubles, Floats, Mask, Rows
from server.decisioning import (
    candidacy,
    consent,
    contact_policy,
    eligibility,
    exploration,
    features,
    holdout,
    personal,
    worth,
)
from server.decisioning.filling import (
    EXPLORE,
    NO_EXPLORATION,
    RANDOM_CONTROL,
    explores_by_posterior,
    fill,
    lay_out,
    score,
)
from server.decisioning.forests import offsets_of
from server.decisioning.models import NO_GOAL, Champion, Models, no_champion
from server.kernel import kernel

__all__ = ["EXPLORE", "NO_EXPLORATION", "RANDOM_CONTROL", "Decisions", "Questions", "Scratch", "decide", "fill_again"]

NO_HISTORIES: Amounts = np.empty((0, 5), np.int64)
NO_STARTS: Rows = np.empty(0, np.int32)

BUDGET_SPENT = 2  # mark of an ask, beside holdout.MARK: its budget for exploring is spent


class Questions(NamedTuple):
    """What b requests ask. An *ask* is one placement of one request; asks lie in request order."""

    facts: Doubles  # float64[b, m], see FactSpace; column NOW_FACT is now_us for all
    now_us: int
    heads: Rows  # int32[b, 4]: number of asks; EXPLORE, RANDOM_CONTROL or NO_EXPLORATION; listing, -1: none; blend
    asks: Rows  # int32[a, 3]: the placement's catalog row; the slots asked for, 1 or more; marks
    seeds: NDArray[np.uint64]  # uint64[b]
    listings: Bytes  # uint8[l, n], see candidacy.gate: what the callers who name actions say of each
    holds: Amounts  # int64[h, 3], by request: request, contact target, how much less that may be spoken of now
    histories: Amounts = NO_HISTORIES  # int64[h, 5], by request, see profiles.history.fold
    history_starts: Rows = NO_STARTS  # int32[b + 1]: where each request's begin; empty where nobody has any


class Decisions(NamedTuple):
    """What was decided, as columns. A *survivor* is a candidate that passed every gate.

    The survivors of request q are ``rows[starts[q]:starts[q + 1]]``. Ask a has a block of one entry a survivor in
    every column of asks, from ``ask_blocks[a]`` on; slot s has one in ``distributions``, from ``slot_blocks[s]`` on.
    """

    reasons: Bytes  # uint8[b, n]: refusal reasons, 0 for survivors
    learned: Floats  # float32[b, d]: what the learners read
    starts: Rows  # int32[b + 1]
    rows: Rows  # int32[survivors], ascending within a request
    prior_log_odds: Floats  # float32[asks × survivors]
    propensities: Floats  # the same shape; of the placement's first goal
    other_propensities: Floats  # of ask a's other goals, in their rows' order, one block each from other_blocks[a] on
    means: Floats  # posterior means of the reward, the same shape; empty when no ask explores by them
    deviations: Floats  # their standard deviations
    ask_blocks: Rows  # int32[a + 1]
    other_blocks: Rows  # int32[a + 1]
    priorities: Doubles  # as propensities, NaN where the action has no treatment for the placement's channel
    slot_blocks: NDArray[np.int64]  # int64[s + 1]
    slot_codes: Rows  # int32[s, 4]: ask; chosen survivor's index in its request, its catalog row; choice reason
    slot_numbers: Doubles  # float64[s, 6], of the chosen: selection probability, propensity, priority, prior log-odds,
    # value, and by how much the best open candidate's priority is above its own
    distributions: Doubles  # float64[slots × survivors]
    general_propensities: Floats  # as propensities, before the person's history counted; empty where nobody has any
    slot_histories: Doubles  # float64[s, 5], of the chosen: general propensity, 0: its goal keeps no history; what that
    # said of it, expected and observed, and of its group
    is_model_unavailable: bool  # the champion failed, base rates stood in; or trees did, and added nothing
    champion_log_odds: (
        Floats  # float32[survivors], the prior of the champion's goal; empty: base rates were every prior
    )
    champion_goal: int  # the row of that goal; NO_GOAL: none


class Scored(NamedTuple):
    """What filling takes from scoring, see Decisions: the part of a decision that is an input of the rest."""

    prior_log_odds: Floats
    propensities: Floats
    other_propensities: Floats
    means: Floats
    deviations: Floats


class OtherSurvivorsError(Exception):
    """What is handed in as scored is of other survivors than pass the gates."""

    def __init__(self, reasons: Bytes, learned: Floats, rows: Rows) -> None:
        super().__init__("other candidates pass the gates than were scored")
        self.reasons = reasons
        self.learned = learned
        self.rows = rows


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
    gated = _gate_and_encode(*_gates(questions, catalog, champion, inputs))
    reasons, verdicts, is_settled, left, computed, learned, starts, rows = gated
    prior, is_model_unavailable = champion.score(inputs[: rows.size])
    prior_goal = NO_GOAL if is_model_unavailable else champion.goal_row  # then base rates are the prior of every goal
    offsets, has_tree_failed = offsets_of(models.forests, len(catalog.goals), learned, starts, rows)
    chosen = _score_and_fill(
        learned,
        prior,
        prior_goal,
        offsets,
        catalog.goal_base_log_odds,
        models.correction_weights,
        models.correction_intercepts,
        models.prior_slopes,
        models.posterior_rows,
        models.posterior_means,
        models.posterior_covariances,
        models.posterior_scales,
        models.history_spreads,
        questions.now_us,
        questions.histories,
        questions.history_starts,
        *catalog.history.columns(),
        *_filling(questions, catalog, verdicts, is_settled, left, computed, starts, rows),
    )
    is_model_unavailable |= has_tree_failed
    return Decisions(reasons, learned, starts, rows, *chosen, is_model_unavailable, prior, prior_goal)


def fill_again(questions: Questions, catalog: Catalog, scored: Scored) -> Decisions:
    """Decide again from recorded propensities: gates and filling, without any model.

    Args:
        questions: as they were.
        catalog: the revision that was in force.
        scored: as recorded.

    Returns:
        What was decided, to the last bit, by the build that decided it.

    Raises:
        OtherSurvivorsError: the sizes do not fit.
    """
    no_inputs = np.empty((questions.facts.shape[0] * len(catalog.actions.names), 0), np.float32)
    gated = _gate_and_encode(*_gates(questions, catalog, no_champion(catalog), no_inputs))
    reasons, verdicts, is_settled, left, computed, learned, starts, rows = gated
    ask_blocks, other_blocks, _ = lay_out(
        questions.heads, questions.asks, starts, catalog.placement_columns.goal_weights
    )
    size = int(ask_blocks[-1])
    n_drawn = size if explores_by_posterior(questions.heads, questions.asks, catalog.blends.codes) else 0
    if [column.size for column in scored] != [size, size, other_blocks[-1], n_drawn, n_drawn]:
        raise OtherSurvivorsError(reasons, learned, rows)
    chosen = fill(*(*_filling(questions, catalog, verdicts, is_settled, left, computed, starts, rows), *scored))
    nothing = np.empty(0, np.float32), np.zeros((len(chosen[4]), 5))
    filled = (*scored, *chosen, *nothing)
    return Decisions(reasons, learned, starts, rows, *filled, False, np.empty(0, np.float32), NO_GOAL)


def _gates(questions: Questions, catalog: Catalog, champion: Champion, inputs: Floats) -> tuple[Any, ...]:
    """Return what the gates read, in the order the kernel takes it."""
    return (
        questions.facts,
        questions.now_us,
        questions.heads,
        questions.asks,
        questions.listings,
        questions.holds,
        catalog.blends.codes,
        catalog.placement_columns.consents,
        catalog.actions.weights,
        catalog.actions.valid_from_us,
        catalog.actions.valid_until_us,
        catalog.blends.rules,
        *catalog.rules.columns(),
        *catalog.values.columns(),
        catalog.actions.value_programs,
        *catalog.profiles.contacts.targets.columns(),
        *catalog.learned.columns(),
        *champion.shared.columns(),
        champion.shared_positions,
        champion.template,
        inputs,
    )


def _filling(
    questions: Questions,
    catalog: Catalog,
    verdicts: Bytes,
    is_settled: Mask,
    left: Amounts,
    computed: Doubles,
    starts: Rows,
    rows: Rows,
) -> tuple[Any, ...]:
    """Return what filling reads beside scores, in the order the kernels take it."""
    kinds, limits, _, target_starts, entries, amounts = catalog.profiles.contacts.targets.columns()
    return (
        questions.heads,
        questions.asks,
        questions.seeds,
        verdicts,
        is_settled,
        left,
        kinds,
        limits,
        target_starts,
        entries,
        amounts,
        starts,
        rows,
        computed,
        catalog.blends.codes,
        catalog.blends.parameters,
        catalog.placement_columns.goal_weights,
        catalog.blends.worth,
        catalog.actions.weights,
        catalog.actions.hashes,
        catalog.actions.value_programs,
    )


@kernel
def _refuse(reasons: Bytes, passed: Mask, new_reasons: Bytes) -> None:
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
    holds: Amounts,
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
    value_operators: Bytes,
    value_operands: Doubles,
    value_starts: Rows,
    value_programs: Rows,
    target_kinds: Bytes,
    target_limits: Amounts,
    target_rules: Rows,
    target_starts: Rows,
    target_entries: Rows,
    target_amounts: Amounts,
    learned_sources: Rows,
    learned_kinds: Bytes,
    learned_parameters: Doubles,
    shared_sources: Rows,
    shared_kinds: Bytes,
    shared_parameters: Doubles,
    shared_positions: Rows,
    template: Floats,
    inputs: Floats,
) -> tuple[Bytes, Bytes, Mask, Amounts, Doubles, Floats, Rows, Rows]:
    b, n = facts.shape[0], weights.shape[0]
    reasons = np.zeros((b, n), np.uint8)
    learned = np.empty((b, learned_sources.size), np.float32)
    shared = np.empty(shared_sources.size, np.float32)
    computed = np.empty((b, value_starts.size - 1), np.float64)
    starts = np.zeros(b + 1, np.int32)
    rows = np.empty(b * n, np.int32)
    channels = np.empty(asks.shape[0], np.int32)
    positions = np.empty(asks.shape[0], np.int32)
    never_rules = np.empty(asks.shape[0], np.int32)
    verdicts = np.empty(asks.shape[0], np.uint8)
    is_settled = np.empty(asks.shape[0], np.bool_)
    left_of = np.empty((b, target_limits.size), np.int64)
    nothing_named = np.empty(0, np.uint8)
    m, ask, first_hold = 0, 0, 0
    for q in range(b):
        listing_row, blend = heads[q, 2], heads[q, 3]
        listing = listings[listing_row] if listing_row >= 0 else nothing_named
        own = slice(ask, ask + heads[q, 0])
        for each in range(own.start, own.stop):
            codes = placement_codes[blend, asks[each, 0]]
            channels[each], never_rules[each] = codes[0], codes[4]
            positions[each] = placement_consents[asks[each, 0]]
            is_settled[each] = asks[each, 2] & BUDGET_SPENT != 0
        person, refused, may_say = facts[q], reasons[q], left_of[q]
        ask = own.stop
        _refuse(refused, *candidacy.gate(listing, channels[own], weights))
        _refuse(
            refused,
            *eligibility.gate(
                person, now_us, valid_from_us, valid_until_us, action_rules[blend],
                left, right, operators, constants, steps, step_starts,
            ),
        )  # fmt: skip
        worth.evaluate(
            person, left, right, operators, constants, steps, step_starts,
            value_operators, value_operands, value_starts, computed[q],
        )  # fmt: skip
        _refuse(refused, *worth.gate(value_programs, computed[q]))
        verdicts[own] = consent.verdicts(person, positions[own])
        holdout.verdicts(asks[own, 2], verdicts[own])
        _refuse(refused, *consent.gate(verdicts[own], channels[own], weights))
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
                verdicts[own], channels[own], weights, may_say, target_kinds, target_starts, target_entries,
                target_amounts,
            ),
        )  # fmt: skip
        contact_policy.begin_request(target_kinds, may_say)
        exploration.forbidden(
            person, never_rules[own], left, right, operators, constants, steps, step_starts, is_settled[own]
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
    return reasons, verdicts, is_settled, left_of, computed, learned, starts, rows[:m].copy()


@kernel
def _score_and_fill(
    learned: Floats,
    prior: Floats,
    prior_goal: int,
    offsets: Doubles,
    base_log_odds: Floats,
    correction_weights: Doubles,
    correction_intercepts: Doubles,
    prior_slopes: Doubles,
    posterior_rows: Rows,
    posterior_means: Doubles,
    posterior_covariances: Doubles,
    posterior_scales: Doubles,
    spreads: Doubles,
    now_us: int,
    histories: Amounts,
    history_starts: Rows,
    goal_keys: Amounts,
    is_kept: Mask,
    action_keys: Amounts,
    action_rows: Rows,
    groups: Rows,
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
) -> tuple[
    Floats, Floats, Floats, Floats, Floats, Rows, Rows, Doubles, NDArray[np.int64], Rows, Doubles, Doubles, Floats,
    Doubles,
]:  # fmt: skip
    """Score and fill in one call, because entering a kernel with so many arrays costs more than leaving one out."""
    prior_log_odds, propensities, others, means, deviations, general = score(
        heads, asks, is_settled, starts, rows, learned, prior, prior_goal, offsets, base_log_odds, placement_codes,
        goal_weights, correction_weights, correction_intercepts, prior_slopes, posterior_rows, posterior_means,
        posterior_covariances, posterior_scales, now_us, histories, history_starts, goal_keys, is_kept, action_keys,
        action_rows, groups, spreads,
    )  # fmt: skip
    filled = fill(
        heads, asks, seeds, verdicts, is_settled, left, target_kinds, target_limits, target_starts, target_entries,
        target_amounts, starts, rows, computed, placement_codes, placement_parameters, goal_weights, worth, weights,
        hashes, value_programs, prior_log_odds, propensities, others, means, deviations,
    )  # fmt: skip
    slot_histories = _slot_histories(
        heads, asks, filled[0], filled[4], propensities, general, now_us, histories, history_starts, goal_keys, is_kept,
        action_keys, action_rows, groups, placement_codes,
    )  # fmt: skip
    return (prior_log_odds, propensities, others, means, deviations, *filled, general, slot_histories)


@kernel
def _slot_histories(
    heads: Rows,
    asks: Rows,
    ask_blocks: Rows,
    slot_codes: Rows,
    propensities: Floats,
    general: Floats,
    now_us: int,
    histories: Amounts,
    history_starts: Rows,
    goal_keys: Amounts,
    is_kept: Mask,
    action_keys: Amounts,
    action_rows: Rows,
    groups: Rows,
    placement_codes: Rows,
) -> Doubles:
    """Say of each chosen action what the record keeps of its propensity and the person's history, see Decisions."""
    told = np.zeros((slot_codes.shape[0], 5), np.float64)
    before = general if histories.shape[0] else propensities
    places, sums = np.empty((0, 2), np.int32), np.empty((0, 2), np.float64)
    slot, first_ask = 0, 0
    for q in range(heads.shape[0]):
        if histories.shape[0]:
            own = histories[history_starts[q] : history_starts[q + 1]]
            places, sums = personal.read(own, now_us, goal_keys, is_kept, action_keys, action_rows)
        for ask in range(first_ask, first_ask + heads[q, 0]):
            goal = placement_codes[heads[q, 3], asks[ask, 0], 1]
            for _ in range(asks[ask, 1]):
                pick, row = slot_codes[slot, 1], slot_codes[slot, 2]
                if pick >= 0 and is_kept[goal]:
                    told[slot, 0] = before[ask_blocks[ask] + pick]
                    personal.of_action(places, sums, goal, row, groups, told[slot, 1:])
                slot += 1
        first_ask += heads[q, 0]
    return told
