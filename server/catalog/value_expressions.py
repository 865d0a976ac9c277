"""Value expressions: what is success with an action worth to this person, here, now?

Handed the catalog's declared facts and CEL texts that state a worth in currency units, it lowers each text to a postfix
program over float64 (``Values``), with the CEL library as its parser and type checker. Facts of an action are constants
of that action and are folded away; the conditions of ``? :`` become rules like all others. What cannot be lowered is
refused, never guessed.

Stricter than CEL in two points: an absent fact is unknown and not zero, and a division by zero has no result.
"""

from __future__ import annotations

import functools
import math
import operator as python
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import (
    ADD,
    CHOOSE,
    CONSTANT,
    DIVIDE,
    FACT,
    MULTIPLY,
    NEGATE,
    SUBTRACT,
    VALUE_MAX,
    VALUE_STACK_MAX,
    Fact,
    Values,
)
from server.catalog.conditions import Language
from server.catalog.declared import frozen
from server.catalog.expressions import ALWAYS, NEVER, NEVER_KNOWN, RuleCompiler, RuleProgram, own_number
from server.catalog.quantities import Alternative, Operation, Opposite, Quantity, Reference, read_quantity
from server.catalog.rule_faults import RefusedError
from server.catalog.scopes import VALUES
from server.errors import Violation
from tsugi.v1.value_pb2 import Value

VALUE_STEPS_MAX: Final = 64
VALUES_MAX: Final = 1_000
NO_VALUE: Final = -1

_ARITHMETIC: Final[Mapping[int, tuple[str, Callable[[float, float], float]]]] = {
    ADD: ("+", python.add),
    SUBTRACT: ("-", python.sub),
    MULTIPLY: ("*", python.mul),
    DIVIDE: ("/", python.truediv),
}


class _Step(NamedTuple):
    operator: int
    operand: float | RuleProgram = 0.0  # of CHOOSE the rule, before it has a row


_Program = tuple[_Step, ...]

# Always this one object, because NaN equals nothing but itself.
_UNKNOWN: Final[_Program] = (_Step(CONSTANT, math.nan),)


class Lowered(NamedTuple):
    """What a value expression came to for one action."""

    row: int  # NO_VALUE: it is a constant
    constant: float = 0.0


class ValueCompiler:
    """Lowers the value expressions of one catalog; equal programs are kept once.

    Conditions add to the rules, and *fill* ``Fact.codes`` as rules do, so the rules are frozen, and profiles and
    actions are encoded, only after the last value was added.
    """

    def __init__(self, facts: Sequence[Fact], action_facts: Sequence[Fact], rules: RuleCompiler) -> None:
        """Declare what values may speak of.

        Args:
            facts: the vector that values are computed over; the same objects, in the same order, as those of the rules.
            action_facts: action.*, those of the rules too.
            rules: gets the conditions by which values choose.

        Cost: nothing; the first value costs about 1 ms more.
        """
        self._facts = (facts, action_facts)
        self._rules = rules
        self._quantities: dict[str, Quantity | list[str]] = {}  # or what is wrong with the text
        self._programs: dict[tuple[tuple[int, float], ...], int] = {}

    def add(self, text: str, action_values: Mapping[str, Value], path: str, violations: list[Violation]) -> Lowered:
        """Lower one value expression for one action.

        Args:
            text: the CEL text, not empty.
            action_values: what the action states of its facts; see RuleCompiler.add. An expression that reads another
                is unknown.
            path: where the text stands, for violations.
            violations: gets every fault of the text, or else the first that shows once the action's facts are filled
                in.

        Returns:
            The row of the value, shared by all that lower to the same program; or a constant, where the expression
            reads nothing but the action's own facts, or there was a fault.

        Cost: 0.1 to 2 ms the first time a text is seen, after that some µs a step.
        """
        try:
            program = _worth(self._quantity(text), action_values, self._rules)
            constant = _constant(program)
            if constant is not None and not math.isnan(constant):
                return Lowered(NO_VALUE, constant + 0.0)
            return Lowered(self._place(program))
        except RefusedError as refusal:
            violations.extend(Violation(path, fault) for fault in refusal.faults)
            return Lowered(NO_VALUE)

    def freeze(self) -> Values:
        """Return all values added so far; the arrays are read-only."""
        steps = [step for program in self._programs for step in program]
        return Values(
            operators=frozen(np.array([operator for operator, _ in steps], np.uint8)),
            operands=frozen(np.array([operand for _, operand in steps], np.float64)),
            starts=frozen(np.cumsum([0, *map(len, self._programs)], dtype=np.int32)),
        )

    @functools.cached_property
    def _language(self) -> Language:
        """Made for the first value: most catalogs have none, and it is half of what a small one costs to compile."""
        return Language(*self._facts, VALUES)

    def _quantity(self, text: str) -> Quantity:
        quantity = self._quantities.get(text)
        if quantity is None:
            if len(self._quantities) == VALUES_MAX:
                raise RefusedError([f"a catalog holds at most {VALUES_MAX} distinct values"])
            try:
                quantity = read_quantity(self._language, text)
            except RefusedError as refusal:
                quantity = refusal.faults
            self._quantities[text] = quantity
        if isinstance(quantity, list):
            raise RefusedError(quantity)
        return quantity

    def _place(self, program: _Program) -> int:
        if len(program) > VALUE_STEPS_MAX:
            raise RefusedError([f"a value takes at most {VALUE_STEPS_MAX} steps once lowered, got {len(program)}"])
        assert _stack(program) <= VALUE_STACK_MAX, "each step of two operands takes one off, so 64 steps stack up 32"
        placed = tuple(
            (operator, float(self._rules.place(operand) if isinstance(operand, RuleProgram) else operand))
            for operator, operand in program
        )
        row = self._programs.setdefault(placed, len(self._programs))
        if row >= VALUES_MAX:
            raise RefusedError([f"a catalog holds at most {VALUES_MAX} distinct values, each action's facts filled in"])
        return row


def _worth(quantity: Quantity, values: Mapping[str, Value], rules: RuleCompiler) -> _Program:
    """Lower what is the value itself: no constant that may come out is negative or too large."""
    if isinstance(quantity, Alternative):
        return _select(quantity, values, rules, _worth)
    program = _bind(quantity, values, rules)
    constant = _constant(program)
    if constant is not None and not math.isnan(constant) and not 0.0 <= constant <= VALUE_MAX:
        raise RefusedError([f"a value is 0 to {VALUE_MAX:.0f} currency units, got {constant!r}"])
    return program


def _bind(quantity: Quantity, values: Mapping[str, Value], rules: RuleCompiler) -> _Program:
    """Fill in an action's facts and fold what has become constant, never in another order than it is written."""
    match quantity:
        case float():
            return _pushed(quantity)
        case Reference(fact, None):
            return _pushed(own_number(fact, None, values))
        case Reference(_, row):
            assert row is not None, "the case above has the facts of the action"
            return (_Step(FACT, float(row)),)
        case Opposite(inner):
            program = _bind(inner, values, rules)
            constant = _constant(program)
            return (*program, _Step(NEGATE)) if constant is None else _pushed(-constant)
        case Operation():
            return _operate(quantity, _bind(quantity.left, values, rules), _bind(quantity.right, values, rules))
        case Alternative():
            return _select(quantity, values, rules, _bind)


def _select(
    alternative: Alternative,
    values: Mapping[str, Value],
    rules: RuleCompiler,
    lower: Callable[[Quantity, Mapping[str, Value], RuleCompiler], _Program],
) -> _Program:
    """Lower a choice; where the action's own facts settle it, the other branch is as if it were not written."""
    verdict = rules.bind(alternative.asked, values)
    if verdict == NEVER_KNOWN:
        return _UNKNOWN
    if verdict in (ALWAYS, NEVER):
        return lower(alternative.met if verdict == ALWAYS else alternative.unmet, values, rules)
    met, unmet = lower(alternative.met, values, rules), lower(alternative.unmet, values, rules)
    return (*met, *unmet, _Step(CHOOSE, verdict))


def _operate(operation: Operation, left: _Program, right: _Program) -> _Program:
    if _UNKNOWN in (left, right):
        return _UNKNOWN
    a, b = _constant(left), _constant(right)
    if operation.operator == DIVIDE and b == 0.0:
        raise RefusedError([f"{operation.position}: divides by 0"])
    if a is None or b is None:
        return (*left, *right, _Step(operation.operator))
    sign, compute = _ARITHMETIC[operation.operator]
    number = compute(a, b)
    if not math.isfinite(number):
        raise RefusedError([f"{operation.position}: {a!r} {sign} {b!r} is no finite number"])
    return _pushed(number)


def _pushed(number: float) -> _Program:
    return _UNKNOWN if math.isnan(number) else (_Step(CONSTANT, number),)


def _constant(program: _Program) -> float | None:
    """Return the number that a program pushes and nothing more, NaN for the unknown one; None for all others."""
    (operator, operand), *others = program
    return operand if not others and operator == CONSTANT and isinstance(operand, float) else None


def _stack(program: _Program) -> int:
    depth = deepest = 0
    for operator, _ in program:
        depth += 1 if operator in (CONSTANT, FACT) else -1 if operator != NEGATE else 0
        deepest = max(deepest, depth)
    return deepest
