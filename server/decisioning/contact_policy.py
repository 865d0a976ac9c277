"""The contact policy gate: was this person told enough of it, or everybody, or are they to be left in peace?

Handed what may still be said of each target (see catalog.contact_terms) and which targets an action has on a channel.
What a request chooses counts for its later slots, so that no cap is passed within one decision; what goes together
within a request is counted the same way.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import RULE_STACK_MAX, Amounts, Bytes, Doubles, Mask, Rows
from server.catalog.contact_terms import BUDGET, CAP, COMPANION, COOL_OFF, PLACEMENT_LIMIT, STRICT_CAP, UNLIMITED
from server.catalog.evaluation import NO, compare, evaluate
from server.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

_FREQUENCY_CAP = int(RefusalReason.REFUSAL_REASON_FREQUENCY_CAP)
_COOL_OFF = int(RefusalReason.REFUSAL_REASON_COOL_OFF)
_SUPPRESSED = int(RefusalReason.REFUSAL_REASON_SUPPRESSED)
_BUDGET_SPENT = int(RefusalReason.REFUSAL_REASON_BUDGET_SPENT)
_NOT_EVALUATED = 3


@kernel
def hold(held: Amounts, kinds: Bytes, left: Amounts) -> None:
    """Take what a person's holds leave of each target.

    Args:
        held: int64[h, 2], of each hold that is in force now its target, and how often less that may be spoken of.
        kinds: uint8[t], see TargetColumns.
        left: int64[t], changed: how often each target may still be spoken of, or how much that may cost.
    """
    for i in range(held.shape[0]):
        target = held[i, 0]
        left[target] = max(left[target] - held[i, 1], 0)
    for target in range(kinds.size):
        if kinds[target] == STRICT_CAP:  # a record claims a target once
            left[target] = min(left[target], 1)


@kernel
def suppress(
    facts: Doubles,
    rules: Rows,
    atoms_left: Rows,
    atoms_right: Rows,
    operators: Bytes,
    constants: Doubles,
    steps: Rows,
    starts: Rows,
    left: Amounts,
) -> None:
    """Silence each target whose suppression holds, or cannot be told.

    Args:
        facts: float64[m], one request's fact vector.
        rules: int32[t], see TargetColumns.
        atoms_left: see server.catalog.catalog.Rules, as are the arguments after it.
        atoms_right: see Rules.
        operators: see Rules.
        constants: see Rules.
        steps: see Rules.
        starts: see Rules.
        left: int64[t], changed.

    Cost: nothing without suppressions; otherwise O(atoms + targets).
    """
    if not np.any(rules >= 0):
        return
    atoms = compare(facts, atoms_left, atoms_right, operators, constants)
    verdicts = np.full(starts.size - 1, _NOT_EVALUATED, np.uint8)
    stack = np.empty(RULE_STACK_MAX, np.uint8)
    for target in range(rules.size):
        rule = rules[target]
        if rule >= 0:
            if verdicts[rule] == _NOT_EVALUATED:
                verdicts[rule] = evaluate(atoms, steps[starts[rule] : starts[rule + 1]], stack)
            if verdicts[rule] != NO:
                left[target] = 0


@kernel
def refusing(row: int, channel: int, left: Amounts, starts: Rows, entries: Rows, amounts: Amounts) -> int:
    """Return a target for which an action may not be said on a channel now; -1 when it may."""
    for entry in range(starts[row], starts[row + 1]):
        target, held_on = entries[entry, 0], entries[entry, 1]
        if target >= 0 and left[target] < amounts[entry] and (held_on < 0 or held_on == channel):
            return int(target)
    return -1


@kernel
def take(row: int, channel: int, left: Amounts, starts: Rows, entries: Rows, amounts: Amounts) -> None:
    """Count an action as said on a channel, and open what it is the companion of."""
    for entry in range(starts[row], starts[row + 1]):
        target, held_on = entries[entry, 0], entries[entry, 1]
        if target < 0:
            left[~target] = UNLIMITED
        elif held_on < 0 or held_on == channel:
            left[target] -= amounts[entry]


@kernel
def begin_request(kinds: Bytes, left: Amounts) -> None:
    """Close what may be said only after another action of the request; after the gate, which it does not concern."""
    for target in range(kinds.size):
        if kinds[target] == COMPANION:
            left[target] = 0


@kernel
def begin_placement(kinds: Bytes, limits: Amounts, left: Amounts) -> None:
    """Let the limits of a placement begin anew."""
    for target in range(kinds.size):
        if kinds[target] == PLACEMENT_LIMIT:
            left[target] = limits[target]


@kernel
def gate(
    verdict: Bytes,
    channels: Rows,
    weights: Doubles,
    left: Amounts,
    kinds: Bytes,
    starts: Rows,
    entries: Rows,
    amounts: Amounts,
) -> tuple[Mask, Bytes]:
    """Pass the actions that may be said now in some placement which may be filled.

    Args:
        verdict: uint8[asks], 0 for those that may be filled.
        channels: int32[asks], the channel row of each placement asked for.
        weights: float64[n, channels], NaN where the action has no treatment for the channel.
        left: int64[t], how often each target may still be spoken of, or how much that may cost.
        kinds: see TargetColumns, as are the arguments after it.
        starts: see TargetColumns.
        entries: see TargetColumns.
        amounts: see TargetColumns.

    Returns:
        Who passes, and the refusal reason of who does not. Cost: O(n × asks × targets of an action).
    """
    n = weights.shape[0]
    passed = np.ones(n, np.bool_)
    reasons = np.zeros(n, np.uint8)
    if left.size == 0:
        return passed, reasons
    for row in range(n):
        refused_by = -1
        for ask in range(channels.size):
            if verdict[ask] == 0 and not np.isnan(weights[row, channels[ask]]):
                refused_by = refusing(row, channels[ask], left, starts, entries, amounts)
                if refused_by < 0:
                    break
        if refused_by >= 0:
            passed[row] = False
            reasons[row] = _reason(kinds[refused_by])
    return passed, reasons


@kernel
def _reason(kind: int) -> int:
    """Return why a target of this kind refuses."""
    if kind in (CAP, STRICT_CAP):
        return _FREQUENCY_CAP
    if kind == BUDGET:
        return _BUDGET_SPENT
    return _COOL_OFF if kind == COOL_OFF else _SUPPRESSED
