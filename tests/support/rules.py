"""Lowered rules read slowly: what the compiled kernel must compute, one step a line.

Also builds the facts that rule tests speak of.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Final

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
    Doubles,
    Fact,
    Rules,
)
from tsugi.v1 import catalog_pb2

NO, YES, NOT_KNOWN = range(3)

NUMBER = catalog_pb2.ATTRIBUTE_TYPE_NUMBER
BOOL = catalog_pb2.ATTRIBUTE_TYPE_BOOL
CATEGORY = catalog_pb2.ATTRIBUTE_TYPE_CATEGORY
TEXT = catalog_pb2.ATTRIBUTE_TYPE_TEXT
TIME = catalog_pb2.ATTRIBUTE_TYPE_TIME
SET = catalog_pb2.ATTRIBUTE_TYPE_SET
MONEY = catalog_pb2.ATTRIBUTE_TYPE_MONEY
VECTOR = catalog_pb2.ATTRIBUTE_TYPE_VECTOR

_COMPARE: Final[dict[int, Callable[[float, float], bool]]] = {
    LESS: operator.lt,
    LESS_EQUAL: operator.le,
    EQUAL: operator.eq,
    NOT_EQUAL: operator.ne,
    GREATER_EQUAL: operator.ge,
    GREATER: operator.gt,
    CONTAINS: lambda values, code: code >= 0.0 and f"{int(values):b}"[::-1][int(code) :][:1] == "1",
}


def fact(name: str, kind: catalog_pb2.AttributeType, values: Sequence[str] = ()) -> Fact:
    """Declare a fact without bounds; an amount is in EUR, a vector has two dimensions."""
    codes = {value: code for code, value in enumerate(values)}
    return Fact(name, kind, codes, -math.inf, math.inf, "EUR" if kind == MONEY else "", 2 if kind == VECTOR else 0)


def evaluate(rules: Rules, rule: int, facts: Doubles) -> int:
    """Evaluate one rule over one fact vector: NO, YES or NOT_KNOWN."""
    stack: list[int] = []
    for step in rules.steps[rules.starts[rule] : rules.starts[rule + 1]]:
        if step == NOT:
            stack.append(negate(stack.pop()))
        elif step in (AND, OR):
            stack.append((both if step == AND else either)(stack.pop(), stack.pop()))
        elif step in (TRUE, FALSE):
            stack.append(YES if step == TRUE else NO)
        else:
            stack.append(_atom(rules, step, facts))
    (verdict,) = stack
    return verdict


def negate(verdict: int) -> int:
    """Kleene's not."""
    return {NO: YES, YES: NO, NOT_KNOWN: NOT_KNOWN}[verdict]


def both(a: int, b: int) -> int:
    """Kleene's and."""
    if NO in (a, b):
        return NO
    return NOT_KNOWN if NOT_KNOWN in (a, b) else YES


def either(a: int, b: int) -> int:
    """Kleene's or."""
    return negate(both(negate(a), negate(b)))


def _atom(rules: Rules, atom: int, facts: Doubles) -> int:
    left = float(facts[rules.left[atom]])
    right = float(facts[rules.right[atom]]) if rules.right[atom] >= 0 else 0.0
    constant = float(rules.constants[atom])
    if rules.operators[atom] == KNOWN:
        return NO if math.isnan(left) else YES
    if math.isnan(left) or math.isnan(right) or math.isnan(constant):
        return NOT_KNOWN
    return YES if _COMPARE[int(rules.operators[atom])](left - right, constant) else NO
