"""Random value expressions over random facts: what was lowered computes what CEL itself computes, to the last bit.

Two things are ours and not CEL's: a division by zero has no result (CEL's is infinite), and what is negative or above
the largest value is no value. So a small reading of our own, which divides either way, stands between the two: CEL must
agree with it where it divides as CEL does, and what was lowered where it divides as we do. A fact that is not known is
an error to CEL over maps, which spreads as our NaN does; the conditions drawn here hold no ternary, of which alone CEL
says less than Kleene's logic (see test_expressions.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from cel_expr_python import cel
from google.protobuf import descriptor_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import VALUE_MAX
from server.catalog.evaluation import compare, compute
from server.catalog.expressions import RuleCompiler
from server.catalog.value_expressions import NO_VALUE, VALUE_STEPS_MAX, ValueCompiler
from server.errors import Violation
from tests.support.rules import BOOL, MONEY, NO, NOT_KNOWN, NUMBER, TIME, YES, both, either, fact, negate
from tsugi.v1.value_pb2 import Value

Known = Mapping[str, Any]  # floats and booleans, by fact name

NUMBERS: Final = ("profile.age", "profile.worth", "context.load", "action.price")
FLAGS: Final = ("profile.member", "context.urgent", "action.premium")
FACTS: Final = [
    fact("now", TIME),
    *(fact(name, MONEY if name == "profile.worth" else NUMBER) for name in NUMBERS if "action" not in name),
    *(fact(name, BOOL) for name in FLAGS if "action" not in name),
]
ACTION_FACTS: Final = [fact("action.price", NUMBER), fact("action.premium", BOOL)]
ORDERS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "==": operator.eq,
    ">=": operator.ge,
}


def divide_as_cel(left: float, right: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float64(left) / np.float64(right))


def divide_as_we(left: float, right: float) -> float:
    return left / right if right else math.nan


Divide = Callable[[float, float], float]
OPERATIONS: Final[dict[str, Callable[[float, float], float]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


class Expression(NamedTuple):
    """A value as text, and the number it should be, NaN for unknown; whether that is a value is asked later."""

    text: str
    number: Callable[[Known, Divide], float]


class Rule(NamedTuple):
    """A condition as text, and what it should say."""

    text: str
    says: Callable[[Known], int]


def literal(number: float) -> Expression:
    return Expression(repr(number), lambda known, divide: number)


def reading(name: str) -> Expression:
    return Expression(name, lambda known, divide: known.get(name, math.nan))


def operation(left: Expression, sign: str, right: Expression) -> Expression:
    def number(known: Known, divide: Divide) -> float:
        return OPERATIONS.get(sign, divide)(left.number(known, divide), right.number(known, divide))

    return Expression(f"({left.text} {sign} {right.text})", number)


def opposite(inner: Expression) -> Expression:
    return Expression(f"-({inner.text})", lambda known, divide: -inner.number(known, divide))


def choice(asked: Rule, met: Expression, unmet: Expression) -> Expression:
    def number(known: Known, divide: Divide) -> float:
        verdict = asked.says(known)
        return math.nan if verdict == NOT_KNOWN else (met if verdict == YES else unmet).number(known, divide)

    return Expression(f"({asked.text} ? {met.text} : {unmet.text})", number)


def comparison(name: str, order: str, number: float) -> Rule:
    def says(known: Known) -> int:
        return NOT_KNOWN if name not in known else YES if ORDERS[order](known[name], number) else NO

    return Rule(f"{name} {order} {number!r}", says)


def flag(name: str) -> Rule:
    return Rule(name, lambda known: NOT_KNOWN if name not in known else YES if known[name] else NO)


def has(name: str) -> Rule:
    return Rule(f"has({name})", lambda known: YES if name in known else NO)


def joined(parts: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
    return st.one_of(
        parts.map(lambda a: Rule(f"!({a.text})", lambda known: negate(a.says(known)))),
        st.tuples(parts, parts).map(
            lambda p: Rule(f"({p[0].text} && {p[1].text})", lambda known: both(p[0].says(known), p[1].says(known)))
        ),
        st.tuples(parts, parts).map(
            lambda p: Rule(f"({p[0].text} || {p[1].text})", lambda known: either(p[0].says(known), p[1].says(known)))
        ),
    )


# Halves within ±4 meet equality, zero and each other; the others round, and overflow when multiplied.
halves = st.integers(-8, 8).map(lambda n: n / 2)
numbers = st.one_of(halves, st.sampled_from([0.0, -0.0]), st.sampled_from([0.1, -0.3, 1e-320, 1e200, -1e308]))
names = st.sampled_from(NUMBERS)
rules = st.recursive(
    st.one_of(
        st.builds(comparison, names, st.sampled_from(sorted(ORDERS)), halves),
        st.sampled_from(FLAGS).map(flag),
        st.sampled_from((*NUMBERS, *FLAGS)).map(has),
    ),
    joined,
    max_leaves=4,
)
leaves = st.one_of(names.map(reading), st.one_of(halves.map(abs), st.sampled_from([0.1, 3.7])).map(literal))


def combined(parts: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.builds(operation, parts, st.sampled_from([*OPERATIONS, "/"]), parts), st.builds(opposite, parts)
    )


plain_expressions = st.recursive(leaves, combined, max_leaves=6)
expressions = st.recursive(
    leaves, lambda parts: st.one_of(combined(parts), st.builds(choice, rules, parts, parts)), max_leaves=8
)
all_known = st.fixed_dictionaries(
    {
        **dict.fromkeys(NUMBERS, numbers),
        "action.price": halves,
        **dict.fromkeys(FLAGS, st.booleans()),
    }
)
some_known = st.tuples(all_known, st.sets(st.sampled_from((*NUMBERS, *FLAGS)), max_size=3)).map(
    lambda pair: {name: value for name, value in pair[0].items() if name not in pair[1]}
)
thorough = settings(max_examples=400, deadline=None, derandomize=True)


# Divisions of divisions by what is often zero: an infinite number in the middle would come out as zero.
quotients = st.recursive(
    leaves, lambda parts: st.builds(operation, parts, st.sampled_from(["/", "/", "-"]), parts), max_leaves=6
)
often_zero = st.fixed_dictionaries(dict.fromkeys(NUMBERS, st.sampled_from([0.0, -0.0, 0.5, 1.0])))


def action_of(known: Known) -> dict[str, Value]:
    values = {}
    for name, value in known.items():
        if name.startswith("action."):
            kind = {"bool_value": value} if isinstance(value, bool) else {"number_value": value}
            values[name.removeprefix("action.")] = Value(**kind)
    return values


def lowered(text: str, known: Known) -> float | list[str]:
    """Lower the expression for an action with these facts and compute it over the others, or say what is wrong."""
    rules_compiler = RuleCompiler(FACTS, ACTION_FACTS)
    compiler = ValueCompiler(FACTS, ACTION_FACTS, rules_compiler)
    violations: list[Violation] = []
    row, constant = compiler.add(text, action_of(known), "", violations)
    if violations:
        return [violation.description for violation in violations]
    if row == NO_VALUE:
        return constant
    vector = np.array([float(known.get(each.name, math.nan)) for each in FACTS])
    kept, values = rules_compiler.freeze(), compiler.freeze()
    assert values.starts[-1] <= VALUE_STEPS_MAX
    atoms = compare(vector, kept.left, kept.right, kept.operators, kept.constants)
    out = np.full(1, -1.0)
    compute(vector, atoms, kept.steps, kept.starts, *values.columns(), out)
    return float(out[row])


CEL: Final = cel.NewEnv(
    descriptor_pool=descriptor_pool.Default(),
    variables={root: cel.Type.Map(cel.Type.STRING, cel.Type.DYN) for root in ("profile", "context", "action")},
)


def cel_itself(text: str, known: Known) -> float:
    """Ask CEL over maps of anything: checked quite unlike the messages we compile against, an absent fact an error."""
    data: dict[str, Any] = {"profile": {}, "context": {}, "action": {}}
    for name, value in known.items():
        root, _, key = name.partition(".")
        data[root][key] = value
    value = CEL.compile(text).eval(data=data)
    if value.type() == cel.Type.ERROR:
        assert "Key not found" in value.value()
        return math.nan
    return float(value.value())


def assert_worth(got: float, number: float) -> None:
    """Assert that a computed number was taken for the value it is, or for none."""
    if not 0.0 <= number <= VALUE_MAX:
        assert math.isnan(got)
    else:
        assert got == number
        assert math.copysign(1.0, got) == 1.0


@pytest.mark.slow
@thorough
@given(expressions, some_known)
def test_our_reading_is_cels_where_it_divides_as_cel_does(expression: Expression, known: Known) -> None:
    np.testing.assert_array_equal(expression.number(known, divide_as_cel), cel_itself(expression.text, known))


@pytest.mark.slow
@thorough
@given(expressions, some_known)
def test_lowered_value_is_the_number_that_the_expression_states(expression: Expression, known: Known) -> None:
    got = lowered(expression.text, known)
    if isinstance(got, list):
        assert all("divides by 0" in fault or "is 0 to 1000000000000 currency units" in fault for fault in got)
    else:
        assert_worth(got, expression.number(known, divide_as_we))


@pytest.mark.slow
@thorough
@given(expressions, some_known)
def test_lowered_value_is_cels_unless_something_is_divided_by_zero(expression: Expression, known: Known) -> None:
    got = lowered(expression.text, known)
    number = expression.number(known, divide_as_we)
    if isinstance(got, float) and not math.isnan(number):
        assert_worth(got, cel_itself(expression.text, known))


@pytest.mark.slow
@thorough
@given(quotients, often_zero)
def test_nothing_comes_of_a_division_by_zero(expression: Expression, known: Known) -> None:
    got = lowered(expression.text, known)
    if isinstance(got, float):
        assert_worth(got, expression.number(known, divide_as_we))


@pytest.mark.slow
@thorough
@given(plain_expressions, some_known, all_known)
def test_refused_arithmetic_is_no_value_whatever_the_person(expression: Expression, known: Known, other: Known) -> None:
    if isinstance(lowered(expression.text, known), list):
        action = {name: value for name, value in known.items() if name.startswith("action.")}
        person = {name: value for name, value in other.items() if not name.startswith("action.")}
        number = expression.number({**action, **person}, divide_as_we)
        assert not 0.0 <= number <= VALUE_MAX


@pytest.mark.slow
@thorough
@given(expressions, some_known, st.data())
def test_learning_a_fact_never_changes_a_value_that_asks_no_has(
    expression: Expression, known: Known, data: st.DataObject
) -> None:
    before = lowered(expression.text, known)
    if "has(" in expression.text or isinstance(before, list) or math.isnan(before):
        return
    after = lowered(expression.text, {**data.draw(all_known), **known})
    assert isinstance(after, list) or after == before


@pytest.mark.slow
@thorough
@given(st.text(max_size=80) | st.text("profile.age()[]{}'\"!&|<>=?:-+*/ 1.e,in\\\n", max_size=80))
def test_any_text_is_lowered_or_refused_in_clean_lines(text: str) -> None:
    violations: list[Violation] = []
    compiler = ValueCompiler(FACTS, ACTION_FACTS, RuleCompiler(FACTS, ACTION_FACTS))
    lowered = compiler.add(text, {}, "value", violations)
    assert not violations or lowered == (NO_VALUE, 0.0)
    for violation in violations:
        assert violation.path == "value"
        assert "\n" not in violation.description
        assert len(violation.description) < 400
