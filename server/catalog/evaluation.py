"""Lowered rules and values at work: which comparisons hold for some facts, what a rule says, what success is worth.

Handed the columns of a catalog's ``Rules`` and ``Values`` and one fact vector. Three-valued: a fact that is not known
makes its comparison unknown (Kleene's strong logic), and a value computed from it NaN. Eligibility, segments, the
filters of windows and the values of actions are all evaluated here.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import (
    ADD,
    AND,
    CHOOSE,
    CONSTANT,
    CONTAINS,
    EQUAL,
    FACT,
    FALSE,
    GREATER,
    GREATER_EQUAL,
    KNOWN,
    LESS,
    LESS_EQUAL,
    MULTIPLY,
    NEGATE,
    NOT,
    NOT_EQUAL,
    OR,
    RULE_STACK_MAX,
    SUBTRACT,
    TRUE,
    VALUE_MAX,
    VALUE_STACK_MAX,
    Bytes,
    Doubles,
    Rows,
)
from server.kernel import kernel

NO, YES, NOT_KNOWN = 0, 1, 2


@kernel
def compare(facts: Doubles, left: Rows, right: Rows, operators: Bytes, constants: Doubles) -> Bytes:
    """Evaluate every atom: uint8[atoms] of NO, YES or NOT_KNOWN."""
    atoms = np.empty(left.size, np.uint8)
    for i in range(left.size):
        fact = facts[left[i]]
        if right[i] >= 0:
            fact -= facts[right[i]]
        atoms[i] = compare_one(fact, operators[i], constants[i])
    return atoms


@kernel
def compare_one(fact: float, operator: int, constant: float) -> int:
    """Evaluate one atom over its fact, or the difference of its two: NO, YES or NOT_KNOWN."""
    if operator == KNOWN:
        return NO if np.isnan(fact) else YES
    if np.isnan(fact) or np.isnan(constant):
        return NOT_KNOWN
    if operator == CONTAINS:
        return YES if constant >= 0.0 and (np.int64(fact) >> np.int64(constant)) & 1 == 1 else NO
    holds = (
        (operator == LESS and fact < constant)
        or (operator == LESS_EQUAL and fact <= constant)
        or (operator == EQUAL and fact == constant)
        or (operator == NOT_EQUAL and fact != constant)
        or (operator == GREATER_EQUAL and fact >= constant)
        or (operator == GREATER and fact > constant)
    )
    return YES if holds else NO


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


@kernel
def compute(
    facts: Doubles,
    atoms: Bytes,
    rule_steps: Rows,
    rule_starts: Rows,
    operators: Bytes,
    operands: Doubles,
    starts: Rows,
    out: Doubles,
) -> None:
    """Run every value's program: what success is worth, in currency units, NaN where that cannot be told.

    Args:
        facts: float64[m], one request's fact vector.
        atoms: of the same facts, as compare gives them.
        rule_steps: see server.catalog.catalog.Rules, as is rule_starts.
        rule_starts: see Rules.
        operators: see server.catalog.catalog.Values, as are the two after it.
        operands: see Values.
        starts: see Values.
        out: float64[v], written: each value 0 to VALUE_MAX, or NaN.

    Cost: O(steps) and those of the rules chosen by, each as often as it is chosen by; two small scratch arrays a call.
    """
    stack = np.empty(VALUE_STACK_MAX)
    rule_stack = np.empty(RULE_STACK_MAX, np.uint8)
    for value in range(starts.size - 1):
        top = -1
        for step in range(starts[value], starts[value + 1]):
            operator = operators[step]
            if operator == CONSTANT or operator == FACT:
                top += 1
                stack[top] = operands[step] if operator == CONSTANT else facts[int(operands[step])]
            elif operator == NEGATE:
                stack[top] = -stack[top]
            elif operator == CHOOSE:
                top -= 1
                rule = int(operands[step])
                verdict = evaluate(atoms, rule_steps[rule_starts[rule] : rule_starts[rule + 1]], rule_stack)
                if verdict != YES:
                    stack[top] = stack[top + 1] if verdict == NO else np.nan
            else:
                top -= 1
                stack[top] = operate(operator, stack[top], stack[top + 1])
        # Adding zero drops the sign of a negative zero.
        out[value] = stack[0] + 0.0 if 0.0 <= stack[0] <= VALUE_MAX else np.nan


@kernel
def operate(operator: int, left: float, right: float) -> float:
    """Return left operator right by IEEE 754, but NaN for a division by zero."""
    if operator == ADD:
        return left + right
    if operator == SUBTRACT:
        return left - right
    if operator == MULTIPLY:
        return left * right
    # DIVIDE
    return left / right if right != 0.0 else np.nan
