"""Random rules over random facts: what was lowered says the same as CEL itself, and as an oracle of our own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from cel_expr_python import cel
from google.protobuf import descriptor_pool
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import Fact
from server.catalog.expressions import RuleCompiler
from server.catalog.scopes import ELIGIBILITY, FILTER, Scope, segment_scope
from server.errors import Violation
from tests.support.rules import (
    BOOL,
    CATEGORY,
    MONEY,
    NO,
    NOT_KNOWN,
    NUMBER,
    SET,
    TEXT,
    TIME,
    YES,
    both,
    either,
    evaluate,
    fact,
    negate,
)
from tsugi.v1.value_pb2 import Money, TextSet, Value

Known = Mapping[str, Any]  # floats, booleans, texts, instants and sets of texts, by fact name

NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
TIERS: Final = ("gold", "silver", "iron")
CITIES: Final = ("Graz", "Kyōto", "")  # the empty text is a text like any other
NUMBERS: Final = ("profile.age", "profile.worth", "context.load", "action.price")
AMOUNTS: Final = ("profile.worth",)
FLAGS: Final = ("profile.member", "context.urgent", "action.premium")
TIERED: Final = ("profile.tier", "context.tier", "action.tier")
PLACED: Final = ("profile.city", "action.city")
TIMED: Final = ("profile.joined", "context.seen", "action.start")
SETS: Final = ("profile.tags", "profile.labels")
FACTS: Final = [
    fact(name, kind, values)
    for names, kind, values in (
        (("now",), TIME, ()),
        (tuple(name for name in NUMBERS if name not in AMOUNTS), NUMBER, ()),
        (AMOUNTS, MONEY, ()),
        (FLAGS, BOOL, ()),
        (TIERED, CATEGORY, TIERS),
        (PLACED, TEXT, ()),
        (TIMED, TIME, ()),
        (SETS, SET, TIERS),
    )
    for name in names
]
OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}

# Halves within ±4: sums of them are exact, so equality is really met. Times a few microseconds around now.
halves = st.integers(-8, 8).map(lambda n: n / 2)
spans = st.integers(-3, 3).map(lambda n: timedelta(microseconds=n))
instants = spans.map(lambda span: NOW + span)
orders = st.sampled_from(sorted(OPERATORS))
equalities = st.sampled_from(["==", "!="])


class Rule(NamedTuple):
    """A rule as text, and what it should say of known facts by a reading of our own."""

    text: str
    says: Callable[[Known], int]


def compare(left: str, order: str, right: str, values: Callable[[Known], tuple[Any, Any]]) -> Rule:
    def says(known: Known) -> int:
        try:
            return YES if OPERATORS[order](*values(known)) else NO
        except KeyError:
            return NOT_KNOWN

    return Rule(f"{left} {order} {right}", says)


def instant_literal(instant: datetime) -> str:
    return f"timestamp('{instant:%Y-%m-%dT%H:%M:%S.%f}Z')"


def span_literal(span: timedelta) -> str:
    return f"duration('{span // timedelta(microseconds=1)}us')"


def fact_and_number(a: str, order: str, number: float) -> Rule:
    return compare(a, order, repr(number), lambda known: (known[a], number))


def number_and_fact(number: float, order: str, a: str) -> Rule:
    return compare(repr(number), order, a, lambda known: (number, known[a]))


def fact_and_fact(pair: tuple[str, str], order: str) -> Rule:
    return compare(pair[0], order, pair[1], lambda known: (known[pair[0]], known[pair[1]]))


def difference_and_number(a: str, b: str, order: str, number: float) -> Rule:
    return compare(f"{a} - {b}", order, repr(number), lambda known: (known[a] - known[b], number))


def fact_and_instant(a: str, order: str, instant: datetime) -> Rule:
    return compare(a, order, instant_literal(instant), lambda known: (known[a], instant))


def difference_and_span(a: str, b: str, order: str, span: timedelta) -> Rule:
    return compare(f"{a} - {b}", order, span_literal(span), lambda known: (known[a] - known[b], span))


def fact_and_shifted(a: str, order: str, b: str, span: timedelta) -> Rule:
    return compare(a, order, f"{b} + {span_literal(span)}", lambda known: (known[a], known[b] + span))


def word_and_fact(word: str, order: str, a: str) -> Rule:
    return compare(repr(word), order, a, lambda known: (word, known[a]))


def fact_among(a: str, words: list[str]) -> Rule:
    return Rule(f"{a} in {words!r}", compare("", "==", "", lambda known: (known[a] in words, True)).says)


def word_in_set(word: str, a: str) -> Rule:
    return Rule(f"{word!r} in {a}", compare("", "==", "", lambda known: (word in known[a], True)).says)


def fact_in_set(needle: str, a: str) -> Rule:
    return Rule(f"{needle} in {a}", compare("", "==", "", lambda known: (known[needle] in known[a], True)).says)


def flag(name: str) -> Rule:
    return Rule(name, lambda known: NOT_KNOWN if name not in known else YES if known[name] else NO)


def has(name: str) -> Rule:
    return Rule(f"has({name})", lambda known: YES if name in known else NO)


def pairs(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, str]]:
    return st.tuples(st.sampled_from(names), st.sampled_from(names))


number_names, tier_names, place_names = map(st.sampled_from, (NUMBERS, TIERED, PLACED))
time_names = st.sampled_from(("now", *TIMED))
comparisons = st.one_of(
    st.builds(fact_and_number, number_names, orders, halves),
    st.builds(number_and_fact, halves, orders, number_names),
    st.builds(fact_and_fact, st.one_of(pairs(NUMBERS), pairs(("now", *TIMED))), orders),
    st.builds(difference_and_number, number_names, number_names, orders, halves),
    st.builds(fact_and_instant, time_names, orders, instants),
    st.builds(difference_and_span, time_names, time_names, orders, spans),
    st.builds(fact_and_shifted, time_names, orders, time_names, spans),
    st.builds(fact_and_fact, st.one_of(pairs(TIERED), pairs(FLAGS), st.just(PLACED)), equalities),
    st.builds(word_and_fact, st.sampled_from(TIERS), equalities, tier_names),
    st.builds(word_and_fact, st.sampled_from(CITIES), equalities, place_names),
    st.builds(fact_among, tier_names, st.lists(st.sampled_from(TIERS), min_size=1, max_size=3)),
    st.builds(fact_among, place_names, st.lists(st.sampled_from(CITIES), min_size=1, max_size=3)),
    st.builds(word_in_set, st.sampled_from(TIERS), st.sampled_from(SETS)),
    st.builds(fact_in_set, st.sampled_from(["action.tier", "action.city"]), st.sampled_from(SETS)),
)
leaves = st.one_of(
    comparisons,
    st.sampled_from(FLAGS).map(flag),
    st.sampled_from((*NUMBERS, *FLAGS, *TIERED, *PLACED, *TIMED, *SETS)).map(has),
    st.sampled_from([Rule("true", lambda _: YES), Rule("false", lambda _: NO)]),
)


def joined(parts: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
    return st.one_of(
        parts.map(lambda a: Rule(f"!({a.text})", lambda known: negate(a.says(known)))),
        st.tuples(parts, parts).map(
            lambda p: Rule(f"({p[0].text}) && ({p[1].text})", lambda known: both(p[0].says(known), p[1].says(known)))
        ),
        st.tuples(parts, parts).map(
            lambda p: Rule(f"({p[0].text}) || ({p[1].text})", lambda known: either(p[0].says(known), p[1].says(known)))
        ),
    )


def choice(asked: Rule, met: Rule, unmet: Rule) -> Rule:
    return Rule(
        f"({asked.text}) ? ({met.text}) : ({unmet.text})",
        lambda known: either(
            both(asked.says(known), met.says(known)), both(negate(asked.says(known)), unmet.says(known))
        ),
    )


plain_rules = st.recursive(leaves, joined, max_leaves=8)
rules = st.recursive(
    leaves,
    lambda parts: st.one_of(joined(parts), st.tuples(parts, parts, parts).map(lambda p: choice(*p))),
    max_leaves=8,
)
all_known = st.fixed_dictionaries(
    {
        "now": st.just(NOW),
        **dict.fromkeys(NUMBERS, halves),
        **dict.fromkeys(FLAGS, st.booleans()),
        **dict.fromkeys(TIERED, st.sampled_from(TIERS)),
        **dict.fromkeys(PLACED, st.sampled_from((*CITIES, "Linz"))),
        **dict.fromkeys(TIMED, instants),
        **dict.fromkeys(SETS, st.frozensets(st.sampled_from(TIERS))),
    }
)
some_known = st.tuples(all_known, st.sets(st.sampled_from([each.name for each in FACTS[1:]]))).map(
    lambda pair: {name: value for name, value in pair[0].items() if name not in pair[1]}
)
thorough = settings(max_examples=300, deadline=None, derandomize=True)


def typed(value: object, kind: int = NUMBER) -> Value:
    match value:
        case frozenset():
            return Value(set_value=TextSet(values=sorted(value)))
        case float() if kind == MONEY:
            return Value(money_value=Money(currency_code="EUR", amount_micros=round(value * 1e6)))
        case bool():
            return Value(bool_value=value)
        case float():
            return Value(number_value=value)
        case str():
            return Value(text_value=value)
        case datetime():
            return Value(time_value=timestamp(value))
    raise TypeError(value)


def timestamp(instant: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(instant)
    return message


def lowered(text: str, known: Known) -> int:
    """Lower the rule for an action with these facts, and evaluate it over the others."""
    facts = fresh(FACTS)
    vector_facts = [each for each in facts if not each.name.startswith("action.")]
    action_facts = [each for each in facts if each.name.startswith("action.")]
    return lowered_over(vector_facts, action_facts, ELIGIBILITY, text, known)


def fresh(facts: list[Fact]) -> list[Fact]:
    """Copy facts, because lowering fills the codes of texts."""
    return [fact(each.name, each.type, list(each.codes)) for each in facts]


def lowered_over(facts: list[Fact], action_facts: list[Fact], scope: Scope, text: str, known: Known) -> int:
    kinds = {each.name: each.type for each in (*facts, *action_facts)}
    values = {name: typed(value, kinds[name]) for name, value in known.items() if name in kinds}
    action = {each.name.removeprefix("action."): values[each.name] for each in action_facts if each.name in values}
    violations: list[Violation] = []
    compiler = RuleCompiler(facts, action_facts, scope)
    row = compiler.add(text, action, "", violations)
    assert violations == []
    vector = [each.encode(values[each.name]) if each.name in values else math.nan for each in facts]
    return evaluate(compiler.freeze(), row, np.array(vector))


# Maps of anything: checked quite unlike the messages rules are compiled against, and an absent fact is an error.
PROPERTIES: Final = [(each.name, each.type, each.codes) for each in FACTS if each.name.startswith("profile.")]
CEL: Final = cel.NewEnv(
    descriptor_pool=descriptor_pool.Default(),
    variables={
        "now": cel.Type.TIMESTAMP,
        **{root: cel.Type.Map(cel.Type.STRING, cel.Type.DYN) for root in ("profile", "context", "action", "event")},
    },
)


def plain(value: object) -> object:
    """Return a value as CEL takes it."""
    if isinstance(value, frozenset):
        return sorted(value)
    return timestamp(value) if isinstance(value, datetime) else value


def cel_itself(text: str, known: Known) -> int:
    data: dict[str, Any] = {"now": NOW, "profile": {}, "context": {}, "action": {}, "event": {}}
    for name, value in known.items():
        root, _, key = name.partition(".")
        if key:
            data[root][key] = plain(value)
    value = CEL.compile(text).eval(data=data)
    if value.type() == cel.Type.ERROR:
        assert "Key not found" in value.value()
        return NOT_KNOWN
    return YES if value.value() else NO


@pytest.mark.slow
@thorough
@given(rules, all_known)
def test_lowered_rule_says_what_cel_says_when_all_is_known(rule: Rule, known: Known) -> None:
    assert lowered(rule.text, known) == cel_itself(rule.text, known) == rule.says(known)


@pytest.mark.slow
@thorough
@given(plain_rules, some_known)
def test_unknown_fact_spreads_as_an_error_does_in_cel(rule: Rule, known: Known) -> None:
    assert lowered(rule.text, known) == cel_itself(rule.text, known)


@pytest.mark.slow
@thorough
@given(rules, some_known)
def test_unknown_facts_follow_kleenes_logic(rule: Rule, known: Known) -> None:
    assert lowered(rule.text, known) == rule.says(known)


@pytest.mark.slow
@thorough
@given(rules, some_known, st.data())
def test_learning_a_fact_never_turns_a_rule_that_asks_no_has_around(
    rule: Rule, known: Known, data: st.DataObject
) -> None:
    before = lowered(rule.text, known)
    if "has(" in rule.text or before == NOT_KNOWN:
        return
    more: Known = {**data.draw(all_known), **known}
    assert lowered(rule.text, more) == before


def rules_over(*roots: str) -> st.SearchStrategy[Rule]:
    """Draw rules that read none but these roots."""
    others = [root for root in ("now", "profile.", "context.", "action.") if root not in roots]
    return st.recursive(
        leaves.filter(lambda rule: not any(other in rule.text for other in others)), joined, max_leaves=8
    )


@pytest.mark.slow
@thorough
@given(rules_over("now", "profile."), some_known)
def test_segment_says_what_cel_says(rule: Rule, known: Known) -> None:
    facts = [each for each in fresh(FACTS) if not each.name.startswith("action.")]
    assert lowered_over(facts, [], segment_scope(["loyal"]), rule.text, known) == cel_itself(rule.text, known)


@pytest.mark.slow
@thorough
@given(rules_over("profile."), some_known)
def test_filter_says_what_cel_says(rule: Rule, known: Known) -> None:
    text = rule.text.replace("profile.", "event.")
    event = {name.replace("profile.", "event."): value for name, value in known.items() if "profile." in name}
    facts = [fact(name.replace("profile.", "event."), kind, list(codes)) for name, kind, codes in PROPERTIES]
    assert lowered_over([fact("now", TIME), *facts], [], FILTER, text, event) == cel_itself(text, event)


@pytest.mark.slow
@thorough
@given(st.text(max_size=80) | st.text("profile.age()[]{}'\"!&|<>=?:-+*/ 1.e,in\\\n", max_size=80))
def test_any_text_is_lowered_or_refused_in_clean_lines(text: str) -> None:
    violations: list[Violation] = []
    row = RuleCompiler(FACTS[:1], []).add(text, {}, "rule", violations)
    assert (row >= 0) == (not violations)
    for violation in violations:
        assert violation.path == "rule"
        assert "\n" not in violation.description
        assert len(violation.description) < 400
