"""The eligibility gate: may this person be shown this at all, now?

Handed validity dates and the catalog's lowered rules. Each comparison is made once a decision and each distinct rule
evaluated once, however many actions share it. Three-valued: a fact that is not known makes its comparison unknown,
and what is unknown never lets an action through.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import (
    AND,
    EQUAL,
    FALSE,
    GREATER,
    GREATER_EQUAL,
    KNOWN,
    LESS,
    LESS_EQUAL,
    NOT,
    NOT_EQUAL,
    OR,
    RULE_STACK_MAX,
    TRUE,
    Bytes,
    Doubles,
    Mask,
    Rows,
)
from server.decisioning.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

NO, YES, NOT_KNOWN = 0, 1, 2

_NOT_YET_VALID = int(RefusalReason.REFUSAL_REASON_NOT_YET_VALID)
_NO_LONGER_VALID = int(RefusalReason.REFUSAL_REASON_NO_LONGER_VALID)
_NOT_ELIGIBLE = int(RefusalReason.REFUSAL_REASON_NOT_ELIGIBLE)
_FACT_UNKNOWN = int(RefusalReason.REFUSAL_REASON_FACT_UNKNOWN)
_NOT_EVALUATED = 3


@kernel
def gate(
    facts: Doubles,
    now_us: int,
    valid_from_us: NDArray[np.int64],
    valid_until_us: NDArray[np.int64],
    action_rules: Rows,
    left: Rows,
    right: Rows,
    operators: Bytes,
    constants: Doubles,
    steps: Rows,
    starts: Rows,
) -> tuple[Mask, Bytes]:
    """Pass the actions that are valid now and whose rule is true for these facts.

    Args:
        facts: float64[m], one request's fact vector.
        now_us: the instant of the decision.
        valid_from_us: int64[n], inclusive.
        valid_until_us: int64[n], exclusive.
        action_rules: int32[n], the rule of each action, -1 for none.
        left: see server.catalog.catalog.Rules, as are the arguments after it.
        right: see Rules.
        operators: see Rules.
        constants: see Rules.
        steps: see Rules.
        starts: see Rules.

    Returns:
        Who passes, and the refusal reason of who does not. Cost: O(n + atoms + steps), some 2 ns each.
    """
    atoms = compare(facts, left, right, operators, constants)
    verdicts = np.full(starts.size - 1, _NOT_EVALUATED, np.uint8)
    n = action_rules.size
    passed = np.ones(n, np.bool_)
    reasons = np.zeros(n, np.uint8)
    stack = np.empty(RULE_STACK_MAX, np.uint8)
    for row in range(n):
        if now_us < valid_from_us[row]:
            reasons[row] = _NOT_YET_VALID
        elif now_us >= valid_until_us[row]:
            reasons[row] = _NO_LONGER_VALID
        elif action_rules[row] >= 0:
            rule = action_rules[row]
            if verdicts[rule] == _NOT_EVALUATED:
                verdicts[rule] = evaluate(atoms, steps[starts[rule] : starts[rule + 1]], stack)
            if verdicts[rule] != YES:
                reasons[row] = _NOT_ELIGIBLE if verdicts[rule] == NO else _FACT_UNKNOWN
        passed[row] = reasons[row] == 0
    return passed, reasons


@kernel
def compare(facts: Doubles, left: Rows, right: Rows, operators: Bytes, constants: Doubles) -> Bytes:
    """Evaluate every atom: uint8[atoms] of NO, YES or NOT_KNOWN."""
    atoms = np.empty(left.size, np.uint8)
    for i in range(left.size):
        fact = facts[left[i]]
        if right[i] >= 0:
            fact -= facts[right[i]]
        constant = constants[i]
        operator = operators[i]
        if operator == KNOWN:
            atoms[i] = NO if np.isnan(fact) else YES
        elif np.isnan(fact) or np.isnan(constant):
            atoms[i] = NOT_KNOWN
        else:
            atoms[i] = (
                (operator == LESS and fact < constant)
                or (operator == LESS_EQUAL and fact <= constant)
                or (operator == EQUAL and fact == constant)
                or (operator == NOT_EQUAL and fact != constant)
                or (operator == GREATER_EQUAL and fact >= constant)
                or (operator == GREATER and fact > constant)
            )
    return atoms


@kernel
def evaluate(atoms: Bytes, steps: Rows, stack: Bytes) -> int:
    """Run one rule's postfix program over the atoms: NO, YES or NOT_KNOWN (Kleene's strong three-valued logic).

    The stack is scratch: to make one for each rule would cost more than the rule.
    """
    top = -1
    for step in steps:
        if step == AND or step == OR:
            a, b = stack[top - 1], stack[top]
            top -= 1
            settling = NO if step == AND else YES
            if a == settling or b == settling:
                stack[top] = settling
            elif a == NOT_KNOWN or b == NOT_KNOWN:
                stack[top] = NOT_KNOWN
            else:
                stack[top] = YES - settling
        elif step == NOT:
            if stack[top] != NOT_KNOWN:
                stack[top] = YES - stack[top]
        else:
            top += 1
            if step == TRUE:
                stack[top] = YES
            elif step == FALSE:
                stack[top] = NO
            else:
                stack[top] = atoms[step]
    return int(stack[0])
