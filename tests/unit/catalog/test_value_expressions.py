from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from server.catalog.catalog import CHOOSE, CONSTANT, FACT, NEGATE, VALUE_MAX, VALUE_STACK_MAX, Fact, Values
from server.catalog.conditions import EXPRESSION_BYTES_MAX
from server.catalog.evaluation import compare, compute
from server.catalog.expressions import RULE_ATOMS_MAX, RULES_MAX, RuleCompiler
from server.catalog.value_expressions import NO_VALUE, VALUE_STEPS_MAX, VALUES_MAX, ValueCompiler
from server.errors import Violation
from tests.support.rules import BOOL, CATEGORY, MONEY, NUMBER, SET, TEXT, TIME, VECTOR, fact
from tsugi.v1.value_pb2 import Money, Value

NOW_US = 1_772_000_000_000_000


def declared() -> tuple[list[Fact], list[Fact]]:
    return (
        [
            fact("now", TIME),
            fact("profile.age", NUMBER),
            fact("profile.basket_total", MONEY),
            fact("profile.discount", NUMBER),
            fact("profile.member", BOOL),
            fact("profile.tier", CATEGORY, ["gold", "silver"]),
            fact("profile.city", TEXT),
            fact("profile.sports", SET, ["ski", "run"]),
            fact("profile.taste", VECTOR),
            fact("profile.joined", TIME),
            fact("context.is_business", BOOL),
        ],
        [
            fact("action.price", NUMBER),
            fact("action.margin", MONEY),
            fact("action.premium", BOOL),
            fact("action.city", TEXT),
        ],
    )


class Pricebook:
    """Both compilers with their facts at hand."""

    def __init__(self) -> None:
        self.facts, self.action_facts = declared()
        self.rules = RuleCompiler(self.facts, self.action_facts)
        self.compiler = ValueCompiler(self.facts, self.action_facts, self.rules)

    def add(self, text: str, action: Mapping[str, Value] | None = None) -> int:
        violations: list[Violation] = []
        self.lowered = self.compiler.add(text, action or {}, "actions[3].value", violations)
        assert violations == []
        return self.lowered.row

    def worth(self, text: str, action: Mapping[str, Value] | None = None, **known: float | str | bool) -> float:
        row = self.add(text, action)
        if row == NO_VALUE:
            return self.lowered.constant
        vector = np.full(len(self.facts), math.nan)
        vector[0] = NOW_US
        for index, each in enumerate(self.facts):
            value = known.get(each.name.replace(".", "_"))
            if value is not None:
                vector[index] = each.codes.get(value, -1) if isinstance(value, str) else value
        rules = self.rules.freeze()
        atoms = compare(vector, rules.left, rules.right, rules.operators, rules.constants)
        values = self.compiler.freeze()
        out = np.full(values.starts.size - 1, -1.0)
        compute(vector, atoms, rules.steps, rules.starts, *values.columns(), out)
        return float(out[row])

    def faults(self, text: str, action: Mapping[str, Value] | None = None) -> list[str]:
        violations: list[Violation] = []
        assert self.compiler.add(text, action or {}, "actions[3].value", violations) == (NO_VALUE, 0.0)
        assert {violation.path for violation in violations} == {"actions[3].value"}
        return [violation.description for violation in violations]


@pytest.fixture
def book() -> Pricebook:
    return Pricebook()


def number(value: float) -> Value:
    return Value(number_value=value)


def n_steps(values: Values) -> list[int]:
    return [int(n) for n in np.diff(values.starts)]


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("12.5", 12.5),
        ("profile.age", 8.0),
        ("profile.basket_total * 0.25 + 1.0", 6.0),
        ("profile.age - profile.discount", 6.0),
        ("profile.discount - -profile.age", 10.0),
        ("profile.age / profile.discount / 2.0", 2.0),
        ("profile.age / (profile.discount / 2.0)", 8.0),
        ("profile.age - (profile.discount - 1.0)", 7.0),
        ("-(profile.discount - profile.age)", 6.0),
        ("1.0 + 2.0 * 3.0 - profile.discount // in euro", 5.0),
    ],
)
def test_arithmetic_on_facts_is_worth_its_result(book: Pricebook, text: str, worth: float) -> None:
    assert book.worth(text, profile_age=8.0, profile_discount=2.0, profile_basket_total=20.0) == worth


def test_condition_chooses_between_two_values(book: Pricebook) -> None:
    text = "context.is_business ? 200.0 : action.price - profile.discount / 2.0"
    action = {"price": number(10)}
    assert book.worth(text, action, context_is_business=True) == 200.0  # the other branch may be unknown
    assert book.worth(text, action, context_is_business=False, profile_discount=4.0) == 8.0
    assert math.isnan(book.worth(text, action, context_is_business=False))
    assert math.isnan(book.worth(text, action, profile_discount=4.0))


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("profile.tier == 'silver' && 'run' in profile.sports ? 2.0 : 1.0", 2.0),
        ("now - profile.joined >= duration('24h') ? 2.0 : 1.0", 1.0),
        ("has(profile.taste) || profile.age > 3.0 ? 2.0 : 1.0", 2.0),
        ("has(profile.discount) ? profile.discount : 3.0", 3.0),
        ("profile.age * (profile.member ? 2.0 : 1.0) + 1.0", 9.0),
        ("!profile.member ? (profile.age > 5.0 ? 1.0 : 2.0) : (profile.age > 5.0 ? 3.0 : 4.0)", 4.0),
        ("(profile.member ? profile.age > 5.0 : profile.age < 5.0) ? 1.0 : 2.0", 2.0),
        ("true ? 1.0 : profile.age", 1.0),
    ],
)
def test_condition_may_say_all_that_a_rule_may(book: Pricebook, text: str, worth: float) -> None:
    known: dict[str, Any] = {"profile_sports": 0b10, "profile_joined": NOW_US - 1, "profile_age": 4.0}
    assert book.worth(text, profile_tier="silver", profile_member=True, **known) == worth


def test_condition_numbers_texts_as_the_rules_do(book: Pricebook) -> None:
    book.rules.add("profile.city == 'Graz'", {}, "", [])
    assert book.worth("profile.city == 'Linz' ? 2.0 : 1.0", profile_city="Linz") == 2.0
    (city,) = (each for each in book.facts if each.name == "profile.city")
    assert city.codes == {"Graz": 0, "Linz": 1}
    graz = {"city": Value(text_value="Graz")}
    assert book.worth("profile.city == action.city ? 2.0 : 1.0", graz, profile_city="Graz") == 2.0


def test_conditions_are_kept_among_the_rules_once(book: Pricebook) -> None:
    assert book.rules.add("profile.member", {}, "", []) == 0
    book.add("profile.member ? 1.0 : profile.age")
    book.add("profile.age * (profile.member == true ? 1.0 : 2.0)")
    assert book.rules.freeze().starts.tolist() == [0, 1]
    book.add("profile.age > 3.0 ? 1.0 : 2.0")
    assert book.rules.freeze().starts.tolist() == [0, 1, 2]


def test_facts_of_the_action_are_folded_into_each_value(book: Pricebook) -> None:
    margin = Value(money_value=Money(currency_code="EUR", amount_micros=2_500_000))
    assert book.worth("action.price * 2.0 + action.margin", {"price": number(3), "margin": margin}) == 8.5
    assert book.worth("profile.age + action.price * 0.5", {"price": number(3)}, profile_age=1.0) == 2.5
    assert n_steps(book.compiler.freeze()) == [3]


def test_choice_that_the_action_settles_leaves_no_trace(book: Pricebook) -> None:
    premium, plain = ({"premium": Value(bool_value=flag)} for flag in (True, False))
    text = "action.premium ? profile.age : (profile.member ? 1.0 : -1.0 / action.price)"
    assert book.worth(text, {**premium, "price": number(0)}, profile_age=7.0) == 7.0
    assert book.rules.freeze().starts.tolist() == [0]
    assert book.worth("has(action.price) ? action.price : profile.age", {}, profile_age=7.0) == 7.0
    assert book.worth(text, {**plain, "price": number(-2)}, profile_member=False) == 0.5
    assert n_steps(book.compiler.freeze()) == [1, 3]


@pytest.mark.parametrize(
    "text",
    [
        "action.price",
        "action.price * 0.0",
        "-action.price",
        "profile.age / action.price + 1.0",
        "profile.age - (profile.member ? 1.0 : 2.0) * action.price",
        "action.premium ? 1.0 : 2.0",
        "action.price > 3.0 ? 1.0 : 2.0",
        "!(action.price > 3.0) ? 1.0 : 2.0",
        "profile.member ? action.price : 2.0",
    ],
)
def test_fact_that_the_action_does_not_state_makes_the_value_unknown(book: Pricebook, text: str) -> None:
    known: dict[str, Any] = {"profile_age": 7.0, "profile_member": True}
    assert math.isnan(book.worth(text, {}, **known))
    assert math.isnan(book.worth(text, {"price": Value(text_value="three"), "premium": number(1)}, **known))


def test_only_the_branch_that_is_unknown_is_unknown(book: Pricebook) -> None:
    assert book.worth("profile.member ? action.price : 2.0", profile_member=False) == 2.0


def test_unknown_programs_of_all_actions_are_one(book: Pricebook) -> None:
    texts = [
        "action.price",
        "profile.age + action.margin",
        "-action.price",
        "(profile.member ? 1.0 : 2.0) * action.price",
        "action.premium ? 1.0 : profile.age",
    ]
    assert [book.add(text) for text in texts] == [0, 0, 0, 0, 0]
    assert n_steps(book.compiler.freeze()) == [1]
    assert book.rules.freeze().starts.tolist() == [0]


def test_constants_and_equal_programs_are_kept_once(book: Pricebook) -> None:
    texts = ["profile.age * 6.0", "profile.age * (2.0 * 3.0)", "profile.age * action.price", "profile.age * -(-6.0)"]
    assert [book.add(text, {"price": number(6)}) for text in texts] == [0, 0, 0, 0]
    assert book.add("6.0 * profile.age") == 1
    assert [book.add(text) for text in ("profile.age + 0.0", "profile.age + -0.0")] == [2, 2]
    assert n_steps(book.compiler.freeze()) == [3, 3, 3]


def test_order_of_arithmetic_is_kept(book: Pricebook) -> None:
    left, right = "profile.age + 0.1 + 0.2", "profile.age + (0.1 + 0.2)"
    assert book.worth(left, profile_age=0.3) == 0.3 + 0.1 + 0.2
    assert book.worth(right, profile_age=0.3) == 0.3 + (0.1 + 0.2)


@pytest.mark.parametrize(
    ("text", "age", "worth"),
    [
        ("profile.age", -0.5, math.nan),
        ("profile.age", 0.0, 0.0),
        ("profile.age * -1.0", 0.0, 0.0),
        ("-profile.age", 0.0, 0.0),
        ("1.0 / profile.age", 0.0, math.nan),
        ("1.0 / (1.0 / profile.age)", 0.0, math.nan),
        ("0.0 / profile.age", 0.0, math.nan),
        ("profile.age", VALUE_MAX, VALUE_MAX),
        ("profile.age", 2.0 * VALUE_MAX, math.nan),
        ("profile.age * 1e300", 1e300, math.nan),
        ("profile.age", 1e12, 1e12),
        ("profile.age + 1.0", 1e12, math.nan),
        ("profile.age * 1e300 - profile.age * 1e300", 1e300, math.nan),
        ("1.0 / (profile.age * 1e300)", 1e300, 0.0),
        ("0.0 - profile.age + 3.0", 2.0, 1.0),
        ("profile.age > 0.0 ? 1.0 / profile.age : 4.0", 0.0, 4.0),
    ],
)
def test_negative_and_too_large_results_are_unknown(book: Pricebook, text: str, age: float, worth: float) -> None:
    got = book.worth(text, profile_age=age)
    np.testing.assert_array_equal(got, worth)
    assert math.isnan(got) or math.copysign(1.0, got) == 1.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("-3.0", "a value is 0 to 1000000000000 currency units, got -3.0"),
        ("2.0 - 3.5", "a value is 0 to 1000000000000 currency units, got -1.5"),
        ("action.price - 12.0", "a value is 0 to 1000000000000 currency units, got -2.0"),
        ("profile.member ? -3.0 : 1.0", "a value is 0 to 1000000000000 currency units, got -3.0"),
        (
            "profile.member ? 1.0 : (profile.age > 1.0 ? 1.0 : -4.0)",
            "a value is 0 to 1000000000000 currency units, got -4.0",
        ),
        ("1e12 + 1.0", "a value is 0 to 1000000000000 currency units, got 1000000000001.0"),
        ("1.0 / 0.0", "column 5: divides by 0"),
        ("profile.age / -0.0", "column 13: divides by 0"),
        ("profile.age + 1.0 / (action.price - 10.0)", "column 19: divides by 0"),
        ("1e300 * 1e300", "column 7: 1e+300 * 1e+300 is no finite number"),
        ("profile.age / (1e300 * -1e300)", "column 22: 1e+300 * -1e+300 is no finite number"),
        ("1e999", "column 1: the number is too large"),
        ("profile.age + -1e999", "column 15: the number is too large"),
    ],
)
def test_constant_that_can_be_no_value_is_named(book: Pricebook, text: str, fault: str) -> None:
    assert book.faults(text, {"price": number(10)}) == [fault]


def test_constant_below_zero_may_be_part_of_a_value(book: Pricebook) -> None:
    assert book.worth("profile.age + (profile.member ? -3.0 : 1.0)", profile_age=5.0, profile_member=True) == 2.0
    assert book.worth("-3.0 * profile.age", profile_age=-2.0) == 6.0
    assert book.worth("-0.0") == 0.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("2 * profile.age", "column 3: * does not take (whole number, number); write 2.0"),
        ("profile.age - 10", "column 13: - does not take (number, whole number); write 10.0"),
        (
            "profile.member ? 200 : action.price",
            "column 16: ? : does not take (bool, whole number, number); write 200.0",
        ),
        ("2", "column 1: numbers have a point: write 2.0"),
        (
            "profile.member ? 1.0 : 2.0 + profile.aeg",
            "column 37: profile.aeg is not declared; did you mean profile.age?",
        ),
        ("profile.member * 2.0", "column 16: * does not take (bool, number)"),
        ("profile.sports * 2.0", "column 16: * does not take (list(text), number)"),
        ("profile.taste + 2.0", "column 15: + does not take (list(number), number)"),
        ("profile.age % 2.0", "column 13: % does not take (number, number)"),
        ("profile.age ** 2.0", "column 14: * is not understood here"),
        ("profile.age *", "column 14: the value ends too early"),
        ("", "column 1: the value ends too early"),
        ("profile.age\n+ 1", "line 2, column 1: + does not take (number, whole number); write 1.0"),
        (
            "event.total * 2.0",
            "column 6: event.total cannot be read here; a value reads profile, context, action and now",
        ),
        (
            "profile.tier == 'glod' ? 1.0 : 2.0",
            "column 17: 'glod' is no allowed value of profile.tier; did you mean gold?",
        ),
        ("profile.age ? 1.0 : 2.0", "column 13: ? : does not take (number, number, number)"),
    ],
)
def test_fault_says_where_and_what_to_write_instead(book: Pricebook, text: str, fault: str) -> None:
    assert book.faults(text) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "profile.member",
        "profile.age > 3.0",
        "profile.tier",
        "'12.5'",
        "null",
        "now",
        "now - profile.joined",
        "profile.sports",
        "profile.taste",
        "profile",
        "dyn(profile.age)",
        "1u",
    ],
)
def test_text_of_another_type_is_told_what_a_value_is(book: Pricebook, text: str) -> None:
    assert book.faults(text) == [
        "a value is a number of currency units; by a condition choose between two with ? :",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "min(profile.age, 2.0)",
        "profile.age.max(2.0)",
        "double('12.5')",
        "double(profile.tier)",
        "size(profile.sports)",
        "int(profile.age)",
        "profile.taste[0] * 2.0",
        "[1.0, 2.0][0]",
        "{'a': 1.0}['a']",
        "profile.taste.map(x, x * 2.0)[0]",
        "tsugi.facts.profile{age: 3.0}.age",
        "now.getHours()",
        "__import__('os').system('true')",
    ],
)
def test_what_cannot_be_lowered_is_refused_in_one_clean_line(book: Pricebook, text: str) -> None:
    faults = book.faults(text)
    assert all(fault.isprintable() and len(fault) < 300 for fault in faults)
    assert "a value adds, subtracts, multiplies and divides" in faults[0] or "is not declared" in faults[0]


def test_condition_that_no_rule_may_state_is_refused_as_in_a_rule(book: Pricebook) -> None:
    for text in ("size(profile.sports) > 1 ? 1.0 : 2.0", "profile.age * 2.0 > 1.0 ? 1.0 : 2.0"):
        (fault,) = book.faults(text)
        assert "a rule compares facts" in fault


def test_all_faults_of_a_text_are_told_at_once(book: Pricebook) -> None:
    assert book.faults("(profile.member ? 1 : 2) + 3") == [
        f"column {column}: numbers have a point: write {whole}.0" for column, whole in ((19, 1), (23, 2), (28, 3))
    ]
    assert len(book.faults("2 * profile.aeg + 3 * profile.age")) == 2
    faults = book.faults("double('1') + (1.0 < 2.0 ? double('2') : 1e999)")
    assert [fault.partition(":")[0] for fault in faults] == ["column 7", "column 20", "column 34", "column 42"]


def test_same_text_gives_the_same_faults_again(book: Pricebook) -> None:
    assert book.faults("2 * profile.age") == book.faults("2 * profile.age")


def test_size_and_depth_of_a_text_are_bounded(book: Pricebook) -> None:
    assert book.faults("x" * (EXPRESSION_BYTES_MAX + 1)) == ["at most 2048 bytes, got 2049"]
    assert book.faults("(" * 33 + "1.0" + ")" * 33) == ["nested too deeply; at most 32 levels"]
    assert book.faults("profile.age" + " - 1.0" * 200) == ["nested too deeply; at most 32 levels"]


def balanced(leaves: int) -> str:
    if leaves == 1:
        return "profile.age"
    return f"({balanced(leaves // 2)} + {balanced(leaves - leaves // 2)})"


def test_steps_of_a_value_are_bounded(book: Pricebook) -> None:
    assert book.worth(f"-({balanced(32)})", profile_age=-1.0) == 32.0
    assert n_steps(book.compiler.freeze()) == [VALUE_STEPS_MAX]
    assert book.faults(f"-(-({balanced(32)}))") == ["a value takes at most 64 steps once lowered, got 65"]
    assert book.worth(f"-({balanced(31)} + 1.0 * 1.0)", profile_age=-1.0) == 30.0  # steps are counted when folded


def test_deepest_stack_stays_within_the_kernels_bound(book: Pricebook) -> None:
    text, n_branches = "profile.age", 0
    while len(text) < EXPRESSION_BYTES_MAX:
        longer = f"(profile.member ? 1.0 : {text})" if n_branches % 2 else f"profile.age - ({text})"
        if book.compiler.add(longer, {}, "", []).row == NO_VALUE:
            break
        text, n_branches = longer, n_branches + 1
    assert n_branches > 10
    assert book.worth(text, profile_age=1.0, profile_member=True) == 0.0
    values = book.compiler.freeze()
    depth, deepest = 0, 0
    for operator in values.operators[values.starts[-2] :]:
        depth += 1 if operator in (CONSTANT, FACT) else -1
        deepest = max(deepest, depth)
    assert deepest == n_branches + 1 <= VALUE_STACK_MAX


def test_limits_of_rules_hold_for_conditions_too(book: Pricebook) -> None:
    many = " || ".join(f"profile.age == {n}.0" for n in range(RULE_ATOMS_MAX + 1))
    assert book.faults(f"{many} ? 1.0 : 2.0") == [
        f"a rule holds at most {RULE_ATOMS_MAX} distinct comparisons, got {RULE_ATOMS_MAX + 1}"
    ]


def test_what_reads_the_action_alone_is_a_constant_and_takes_no_program(book: Pricebook) -> None:
    assert book.add("action.price * 0.5 + 1.0", {"price": number(6)}) == NO_VALUE
    assert book.lowered.constant == 4.0
    assert n_steps(book.compiler.freeze()) == []


def test_distinct_values_and_their_conditions_are_bounded() -> None:
    book = Pricebook()
    for n in range(VALUES_MAX):
        assert book.add(f"profile.age + {n}.0") == n
    assert book.faults("profile.age + 0.5") == [f"a catalog holds at most {VALUES_MAX} distinct values"]
    assert book.add("profile.age + 7.0") == 7

    book = Pricebook()
    for n in range(VALUES_MAX):
        assert book.add("profile.age + action.price", {"price": number(n)}) == n
    assert book.faults("profile.age + action.price", {"price": number(0.5)}) == [
        f"a catalog holds at most {VALUES_MAX} distinct values, each action's facts filled in"
    ]

    book = Pricebook()
    for n in range(RULES_MAX):
        book.rules.add("profile.age > action.price", {"price": number(n)}, "", [])
    assert book.faults("profile.member ? 1.0 : 2.0") == [
        f"a catalog holds at most {RULES_MAX} distinct rules, each action's facts filled in"
    ]


def test_frozen_values_are_read_only_and_typed(book: Pricebook) -> None:
    for starts in ([0], [0, 4]):
        values = book.compiler.freeze()
        assert values.starts.tolist() == starts
        assert [array.dtype.name for array in values.columns()] == ["uint8", "float64", "int32"]
        assert not any(array.flags.writeable for array in values.columns())
        book.add("profile.member ? profile.age : -profile.age")
        book.add("profile.member ? profile.age : -profile.age")
    assert values.operators.tolist() == [FACT, FACT, NEGATE, CHOOSE]
    assert values.operands.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_all_values_are_computed_at_once(book: Pricebook) -> None:
    for text in ("profile.age", "profile.member ? 1.0 : 2.0", "action.price", "profile.age - 9.0"):
        book.add(text)
    vector = np.full(len(book.facts), math.nan)
    vector[[1, 4]] = 4.0, 0.0
    rules, values, out = book.rules.freeze(), book.compiler.freeze(), np.full(4, -1.0)
    atoms = compare(vector, rules.left, rules.right, rules.operators, rules.constants)
    compute(vector, atoms, rules.steps, rules.starts, *values.columns(), out)
    np.testing.assert_array_equal(out, [4.0, 2.0, math.nan, math.nan])
