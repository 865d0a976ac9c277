"""Lowered rules at work: which comparisons hold for some facts, and what a rule says of them.

Handed the columns of a catalog's ``Rules`` and one fact vector. Three-valued: a fact that is not known makes its
comparison unknown (Kleene's strong logic). Eligibility, segments and the filters of windows are all evaluated here.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import (
    AND,
    CONTAINS,
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
    TRUE,
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
