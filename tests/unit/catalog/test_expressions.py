from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.catalog import RULE_STACK_MAX, Fact
from server.catalog.conditions import EXPRESSION_BYTES_MAX
from server.catalog.expressions import ATOMS_MAX, NO_RULE, NO_RULES, RULE_ATOMS_MAX, RULES_MAX, RuleCompiler
from server.catalog.scopes import FILTER, segment_scope
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
    VECTOR,
    YES,
    evaluate,
    fact,
)
from tsugi.v1.value_pb2 import Value

NOW_US = 1_772_000_000_000_000
DAY_US = 86_400_000_000


def declared() -> tuple[list[Fact], list[Fact]]:
    return (
        [
            fact("now", TIME),
            fact("profile.age", NUMBER),
            fact("profile.balance", NUMBER),
            fact("profile.member", BOOL),
            fact("profile.tier", CATEGORY, ["gold", "silver"]),
            fact("profile.city", TEXT),
            fact("profile.joined", TIME),
            fact("context.device", CATEGORY, ["web", "app"]),
            fact("context.tier", CATEGORY, ["gold", "silver"]),
            fact("context.city", TEXT),
            fact("context.urgent", BOOL),
            fact("profile.sports", SET, ["ski", "bike", "run"]),
            fact("profile.worth", MONEY),
            fact("profile.taste", VECTOR),
        ],
        [
            fact("action.price", NUMBER),
            fact("action.tier", CATEGORY, ["silver", "gold", "iron"]),
            fact("action.city", TEXT),
            fact("action.start", TIME),
            fact("action.premium", BOOL),
        ],
    )


class Rulebook:
    """A compiler with its facts at hand."""

    def __init__(self) -> None:
        self.facts, self.action_facts = declared()
        self.compiler = RuleCompiler(self.facts, self.action_facts)

    def verdict(self, text: str, action: Mapping[str, Value] | None = None, **known: float | str | bool) -> int:
        violations: list[Violation] = []
        row = self.compiler.add(text, action or {}, "rule", violations)
        assert violations == []
        vector = np.full(len(self.facts), math.nan)
        vector[0] = NOW_US
        for index, each in enumerate(self.facts):
            value = known.get(each.name.replace(".", "_"))
            if value is not None:
                vector[index] = each.codes.get(value, -1) if isinstance(value, str) else value
        return evaluate(self.compiler.freeze(), row, vector)

    def faults(self, text: str) -> list[str]:
        violations: list[Violation] = []
        assert self.compiler.add(text, {}, "actions[3].eligibility", violations) == NO_RULE
        assert {violation.path for violation in violations} == {"actions[3].eligibility"}
        return [violation.description for violation in violations]


@pytest.fixture
def book() -> Rulebook:
    return Rulebook()


def number(value: float) -> Value:
    return Value(number_value=value)


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("profile.age >= 18.0", 18, 17.5),
        ("18.0 <= profile.age", 18, 17.5),
        ("profile.age < -1.5", -2, -1.5),
        ("-profile.age > 1.5", -2, -1.5),
        ("profile.age == 18.0", 18, 19),
        ("profile.age != 18.0", 19, 18),
        ("profile.age in [18.0, 21.0]", 21, 20),
        ("!(profile.age in [18.0, 21.0])", 20, 21),
        ("profile.age - 3.0 > 1.0", 5, 4),
        ("!(profile.age <= 4.0) // grown up", 5, 4),
        ("profile.age > 4.0 ? profile.age < 6.0 : profile.age < 2.0", 5, 3),
    ],
)
def test_number_is_compared_with_literals(book: Rulebook, text: str, yes: float, no: float) -> None:
    assert book.verdict(text, profile_age=yes) == YES
    assert book.verdict(text, profile_age=no) == NO
    assert book.verdict(text) == NOT_KNOWN


def test_two_facts_are_compared_by_their_difference(book: Rulebook) -> None:
    assert book.verdict("profile.age < profile.balance", profile_age=1, profile_balance=2) == YES
    assert book.verdict("profile.age - profile.balance >= 1.0", profile_age=2, profile_balance=1) == YES
    assert book.verdict("1.0 > profile.age - profile.balance", profile_age=2, profile_balance=1) == NO
    assert book.verdict("profile.age == profile.balance", profile_age=2) == NOT_KNOWN
    assert book.verdict("profile.member == context.urgent", profile_member=True, context_urgent=True) == YES


def test_times_are_compared_in_microseconds(book: Rulebook) -> None:
    joined = NOW_US - 30 * DAY_US
    assert book.verdict("now - profile.joined >= duration('720h')", profile_joined=joined) == YES
    assert book.verdict("now - profile.joined > duration('720h')", profile_joined=joined) == NO
    assert book.verdict("profile.joined + duration('720h') < now", profile_joined=joined - 1) == YES
    assert book.verdict("profile.joined > timestamp('2026-01-01T02:00:00+02:00')", profile_joined=joined) == YES
    assert book.verdict("profile.joined < timestamp('1970-01-01T00:00:00.000001Z')", profile_joined=0) == YES
    assert book.verdict("profile.joined == timestamp('1969-12-31T23:59:59Z')", profile_joined=-1_000_000) == YES
    assert book.verdict("now > profile.joined") == NOT_KNOWN


def test_bare_boolean_fact_is_a_condition(book: Rulebook) -> None:
    for text in ("profile.member", "profile.member == true", "profile.member != false", "!!profile.member"):
        assert book.verdict(text, profile_member=True) == YES
        assert book.verdict(text, profile_member=False) == NO
        assert book.verdict(f"!({text})") == NOT_KNOWN


def test_category_is_compared_with_its_allowed_values(book: Rulebook) -> None:
    assert book.verdict("profile.tier == 'silver'", profile_tier="silver") == YES
    assert book.verdict("'silver' != profile.tier", profile_tier="gold") == YES
    assert book.verdict("profile.tier in ['silver', 'gold']", profile_tier="gold") == YES
    assert book.verdict("profile.tier == context.tier", profile_tier="gold", context_tier="silver") == NO
    assert book.verdict("profile.tier in ['silver']") == NOT_KNOWN


def test_text_literals_are_numbered_while_rules_are_added(book: Rulebook) -> None:
    (city,) = (each for each in book.facts if each.name == "profile.city")
    assert city.codes == {}
    text = "profile.city in ['Kyōto', 'Graz'] || profile.city == 'Kyōto'"
    assert book.verdict(text, profile_city="Kyōto") == YES
    assert city.codes == {"Kyōto": 0, "Graz": 1}
    assert book.verdict(text, profile_city="Linz") == NO
    assert book.verdict("profile.city != 'Graz'", profile_city="Linz") == YES


def test_has_asks_whether_a_fact_is_known(book: Rulebook) -> None:
    assert book.verdict("has(profile.age)", profile_age=0) == YES
    assert book.verdict("has(profile.age)") == NO
    assert book.verdict("!has(profile.age) || profile.age > 18.0") == YES
    assert book.verdict("has(profile.city)", profile_city="anything") == YES
    assert book.verdict("has(action.price) && !has(action.start)", {"price": number(1)}) == YES


def test_unknown_spreads_by_kleenes_rules(book: Rulebook) -> None:
    assert book.verdict("profile.member && false") == NO
    assert book.verdict("profile.member || true") == YES
    assert book.verdict("profile.member && context.urgent", context_urgent=True) == NOT_KNOWN
    assert book.verdict("profile.member && context.urgent", context_urgent=False) == NO
    assert book.verdict("profile.member ? true : true") == NOT_KNOWN
    assert book.verdict("profile.member ? false : false") == NO


def test_action_facts_are_folded_into_each_rule(book: Rulebook) -> None:
    text = "profile.balance - action.price >= 2.0"
    assert book.verdict(text, {"price": number(3)}, profile_balance=5) == YES
    assert book.verdict(text, {"price": number(4)}, profile_balance=5) == NO
    assert book.verdict("action.price > profile.balance", {"price": number(4)}, profile_balance=3) == YES
    assert book.verdict("action.price > 3.0", {"price": number(4)}) == YES
    assert book.verdict("action.premium ? profile.member : true", {"premium": Value(bool_value=False)}) == YES
    start = Value(time_value=Timestamp(seconds=NOW_US // 1_000_000))
    assert book.verdict("now - action.start == duration('0s')", {"start": start}) == YES


def test_action_texts_are_compared_by_their_words(book: Rulebook) -> None:
    gold, iron = Value(text_value="gold"), Value(text_value="iron")
    assert book.verdict("action.tier == profile.tier", {"tier": gold}, profile_tier="gold") == YES
    assert book.verdict("action.tier == profile.tier", {"tier": gold}, profile_tier="silver") == NO
    assert book.verdict("action.tier != profile.tier", {"tier": iron}, profile_tier="gold") == YES
    assert book.verdict("action.tier == profile.tier", {"tier": iron}) == NOT_KNOWN
    assert book.verdict("action.tier in ['gold', 'iron']", {"tier": iron}) == YES
    graz = Value(text_value="Graz")
    book.verdict("profile.city == action.city", {"city": graz})  # numbers the text before the profile is encoded
    assert book.verdict("profile.city == action.city", {"city": graz}, profile_city="Graz") == YES
    assert book.verdict("action.city == 'Graz'", {"city": graz}) == YES
    assert book.verdict("action.city == 'Linz'", {"city": graz}) == NO
    assert book.verdict("action.city == action.tier", {"city": Value(text_value="gold"), "tier": gold}) == YES


@pytest.mark.parametrize("text", ["action.price > 3.0", "profile.age > action.price", "!(action.price > 3.0)"])
def test_action_fact_that_is_not_stated_is_unknown(book: Rulebook, text: str) -> None:
    assert book.verdict(text, profile_age=18) == NOT_KNOWN
    assert book.verdict(text, {"price": Value(text_value="three")}, profile_age=18) == NOT_KNOWN


def test_set_is_asked_for_one_of_its_allowed_values(book: Rulebook) -> None:
    for sports, ski, run in ((0b000, NO, NO), (0b001, YES, NO), (0b100, NO, YES), (0b111, YES, YES)):
        assert book.verdict("'ski' in profile.sports", profile_sports=sports) == ski
        assert book.verdict("'run' in profile.sports", profile_sports=sports) == run
        assert book.verdict("!('run' in profile.sports)", profile_sports=sports) == YES - run
        both = "'run' in profile.sports && 'ski' in profile.sports"
        assert book.verdict(both, profile_sports=sports) == (YES if ski == run == YES else NO)
    assert book.verdict("'ski' in profile.sports") == NOT_KNOWN
    assert book.verdict("has(profile.sports)", profile_sports=0) == YES  # that it is empty is known
    assert book.verdict("has(profile.sports)") == NO


def test_set_is_asked_for_a_text_of_the_action(book: Rulebook) -> None:
    ski, gold = Value(text_value="ski"), Value(text_value="gold")
    assert book.verdict("action.city in profile.sports", {"city": ski}, profile_sports=0b001) == YES
    assert book.verdict("action.city in profile.sports", {"city": ski}, profile_sports=0b110) == NO
    assert book.verdict("action.tier in profile.sports", {"tier": gold}, profile_sports=0b111) == NO
    assert book.verdict("action.tier in profile.sports", {"tier": gold}) == NOT_KNOWN
    assert book.verdict("action.city in profile.sports", profile_sports=0b111) == NOT_KNOWN


def test_amount_is_a_number_and_a_vector_is_known_or_not(book: Rulebook) -> None:
    assert book.verdict("profile.worth >= 2.5", profile_worth=2.5) == YES
    assert book.verdict("profile.worth - action.price > 0.0", {"price": number(3)}, profile_worth=3) == NO
    assert book.verdict("has(profile.taste) && profile.worth > 1.0", profile_taste=1.0, profile_worth=2) == YES
    assert book.verdict("has(profile.taste)") == NO


def declared_events() -> list[Fact]:
    return [fact("now", TIME), fact("event.sport", CATEGORY, ["ski", "bike"]), fact("event.tags", SET, ["new", "used"])]


def test_filter_reads_the_properties_of_its_event_alone() -> None:
    violations: list[Violation] = []
    compiler = RuleCompiler(declared_events(), scope=FILTER)
    row = compiler.add("event.sport == 'ski' && 'used' in event.tags", {}, "", violations)
    rules = compiler.freeze()
    assert violations == []
    assert evaluate(rules, row, np.array([math.nan, 0, 0b10])) == YES
    assert evaluate(rules, row, np.array([math.nan, 0, 0b01])) == NO
    for text, name in (
        ("now > now", "now"),
        ("profile.age > 1.0", "profile.age"),
        ("has(action.price)", "action.price"),
    ):
        violations.clear()
        assert compiler.add(text, {}, "", violations) == NO_RULE
        assert violations
        assert all(f"{name} cannot be read here; a filter reads" in each.description for each in violations)


def test_segment_reads_the_profile_and_now_where_they_stand_in_the_whole_vector() -> None:
    facts = [fact("now", TIME), fact("profile.age", NUMBER), fact("profile.vip", BOOL), fact("profile.old", BOOL)]
    facts.append(fact("context.hour", NUMBER))
    violations: list[Violation] = []
    compiler = RuleCompiler(facts, scope=segment_scope(["vip", "old"]))
    assert compiler.add("profile.age > 60.0 && now > timestamp('2026-01-01T00:00:00Z')", {}, "", violations) == 0
    assert sorted(compiler.freeze().left.tolist()) == [0, 1]
    for text, fault in (
        ("profile.old || profile.age > 3.0", "profile.old is a segment; a segment reads no other segment"),
        ("context.hour > 3.0", "context.hour cannot be read here; a segment reads profile and now"),
        ("profile.olf", "profile.olf is not declared"),
    ):
        violations.clear()
        assert compiler.add(text, {}, "", violations) == NO_RULE
        assert violations == [Violation("", f"column 8: {fault}")]


def test_no_rules_are_what_a_compiler_without_rules_gives(book: Rulebook) -> None:
    theirs = book.compiler.freeze()
    assert [array.tolist() for array in NO_RULES.columns()] == [array.tolist() for array in theirs.columns()]
    assert [array.dtype for array in NO_RULES.columns()] == [array.dtype for array in theirs.columns()]
    assert not any(array.flags.writeable for array in NO_RULES.columns())


def test_equal_rules_and_comparisons_are_kept_once(book: Rulebook) -> None:
    violations: list[Violation] = []
    texts = ["profile.age > 1.0", "1.0 < profile.age", "profile.age > action.price", "profile.age > 1.0 && true"]
    rows = [book.compiler.add(text, {"price": number(1)}, "", violations) for text in texts]
    assert rows == [0, 0, 0, 0]
    assert book.compiler.add("profile.age > 1.0 || profile.member", {}, "", violations) == 1
    assert book.compiler.add("action.price > 1.0 || action.start < now", {}, "", violations) == 2
    assert (
        book.compiler.add("profile.age > action.price && has(action.price)", {"price": number(1)}, "", violations) == 0
    )
    rules = book.compiler.freeze()
    assert violations == []
    assert rules.left.size == 3
    assert rules.starts.tolist() == [0, 1, 4, 7]


def test_frozen_rules_are_read_only_and_typed(book: Rulebook) -> None:
    rules = book.compiler.freeze()
    assert rules.starts.tolist() == [0]
    book.verdict("profile.age > 1.0")
    rules = book.compiler.freeze()
    assert [array.dtype.name for array in rules.columns()] == ["int32", "int32", "uint8", "float64", "int32", "int32"]
    assert not any(array.flags.writeable for array in rules.columns())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("profile.age > 18", "column 13: > does not take (number, whole number); write 18.0"),
        ("5 < profile.age && profile.member", "column 3: < does not take (whole number, number); write 5.0"),
        ("profile.age in [1, 2]", "column 13: in does not take (number, list(whole number)); write 1.0"),
        ("profile.aeg > 18.0", "column 8: profile.aeg is not declared; did you mean profile.age?"),
        ("has(profile.aeg)", "column 4: profile.aeg is not declared; did you mean profile.age?"),
        ("profil.age > 18.0", "column 7: profil.age is not declared; did you mean profile.age?"),
        ("device == 'web'", "column 1: device is not declared; did you mean context.device?"),
        ("profile.zzz\n> 18.0", "line 1, column 8: profile.zzz is not declared"),
        ("profile.age >\n", "line 2, column 1: the rule ends too early"),
        ("profile.member and profile.age > 1.0", "column 16: and is not understood here; write &&"),
        ("profile.tier = 'gold'", "column 14: = is not understood here; write =="),
        (
            "profile.age == null",
            "column 13: == does not take (number, null); whether a fact is known is asked with has(...)",
        ),
        ("profile.joined == null", "column 19: whether a fact is known is asked with has(...)"),
        (
            "now > '2026'",
            "column 5: > does not take (time, text); write an instant as timestamp('2026-03-01T00:00:00Z')",
        ),
        ("now - now > 3.0", "column 11: > does not take (duration, number); write a span as duration('720h')"),
        ("now > timestamp('2026')", "column 16: write timestamp('2026-03-01T00:00:00Z')"),
        ("now - now > duration('30d')", "column 21: write duration('720h')"),
        ("profile.tier == 'glod'", "column 17: 'glod' is no allowed value of profile.tier; did you mean gold?"),
        ("context.device in ['tv']", "column 20: 'tv' is no allowed value of context.device; allowed are web, app"),
        ("profile.age", "a rule is true or false; compare this value with something"),
        ("profile.tier < 'gold'", "column 14: texts have no order; compare them with ==, != or in"),
        ("profile.age + 'x' == 'y'", "column 13: + does not take (number, text)"),
        ("profile.city + 'x' == 'y'", "column 8: texts cannot be added"),
        ("1.0 < 2.0", "column 5: no fact is compared here"),
        ("'a' == 'b'", "column 5: no fact is compared here"),
        ("1 == 1", "column 1: numbers have a point: write 1.0"),
        ("profile.age > 1e999", "column 13: the number is too large"),
        ("profile.age + profile.balance > 1.0", "column 31: a comparison takes one fact, or one fact minus another"),
        ("'sky' in profile.sports", "column 1: 'sky' is no allowed value of profile.sports; did you mean ski?"),
        (
            "profile.city in profile.sports",
            "column 14: a set is asked for a literal or for a text of the action, in profile.sports",
        ),
        ("profile.sports == ['ski']", "column 8: a set is asked for its values: 'ski' in profile.sports"),
        ("1.0 in profile.sports", "column 5: in does not take (number, list(text))"),
        ("1.0 in profile.taste", "column 15: of a vector a rule asks only whether it is known: has(profile.taste)"),
        ("profile.taste == [1.0]", "column 8: of a vector a rule asks only whether it is known: has(profile.taste)"),
        (
            "event.total > 1.0",
            "column 6: event.total cannot be read here; a rule reads profile, context, action and now",
        ),
        ("", "column 1: the rule ends too early"),
    ],
)
def test_fault_says_where_and_what_to_write_instead(book: Rulebook, text: str, fault: str) -> None:
    assert book.faults(text) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "profile.city.startsWith('G')",
        "profile.city.matches('(a+)+$')",
        "size(profile.city) > 3",
        "[1, 2].exists(x, x == 1)",
        "[1].map(x, " * 12 + "1" + ")" * 12 + " == []",
        "[1].map(x, " * 25 + "1" + ")" * 25 + " == []",
        "profile.age * 2.0 > 1.0",
        "(profile.age > 1.0) == true",
        "(profile.member ? 1.0 : 2.0) > profile.age",
        "profile == profile",
        "profile.city in []",
        "profile.sports.exists(sport, sport == 'ski')",
        "size(profile.sports) == 1",
        "profile.sports[0] == 'ski'",
        "dyn(profile.age) == 3",
        "double('nan') < profile.age",
        "now.getHours() > 3",
        "tsugi.facts.profile{age: 3.0}.age > 1.0",
        "type(profile.age) == double",
        "b'a' == b'a'",
        "__import__('os').system('true') == 0",
        "profile.__class__.__mro__ == 1.0",
    ],
)
def test_what_cannot_be_lowered_is_refused_in_one_clean_line(book: Rulebook, text: str) -> None:
    faults = book.faults(text)
    assert faults
    assert all(fault.isprintable() and len(fault) < 300 for fault in faults)
    assert "RuntimeError" not in faults[0]
    assert "a rule compares facts" in faults[0] or "is not declared" in faults[0]


def test_all_faults_of_a_rule_are_told_at_once(book: Rulebook) -> None:
    assert len(book.faults("profile.age > 18 && profile.aeg < 3.0 || profile.tier == 3.0")) == 3
    assert len(book.faults("profile.tier in ['a', 'b'] && size(profile.city) > 3 && 1.0 < 2.0")) == 4
    assert len(book.faults(" || ".join(["a.b > 1"] * 100))) == 16


def test_rejected_pair_of_texts_is_explained(book: Rulebook) -> None:
    book.verdict("profile.city == 'Graz' || context.city == 'Graz'")  # both number the text alike; others they do not
    for text in ("profile.city == context.city", "profile.tier == context.device", "profile.tier == profile.city"):
        (fault,) = book.faults(text)
        assert "cannot be compared" in fault


def test_size_depth_and_comparisons_of_a_rule_are_bounded(book: Rulebook) -> None:
    assert book.faults("x" * (EXPRESSION_BYTES_MAX + 1)) == ["at most 2048 bytes, got 2049"]
    assert book.faults("(" * 33 + "true" + ")" * 33) == ["nested too deeply; at most 32 levels"]
    assert book.faults("profile.age" + " - 1.0" * 200 + " > 0.0") == ["nested too deeply; at most 32 levels"]
    many = " || ".join(f"profile.age == {n}.0" for n in range(RULE_ATOMS_MAX + 1))
    assert book.faults(many) == [
        f"a rule holds at most {RULE_ATOMS_MAX} distinct comparisons, got {RULE_ATOMS_MAX + 1}"
    ]
    assert book.verdict(many.rpartition(" || ")[0], profile_age=63) == YES


def test_nested_ternaries_are_bounded_though_lowering_doubles_them(book: Rulebook) -> None:
    for text in ("profile.member", "true"):
        rule = text
        for _ in range(28):
            rule = f"({rule} ? {text} : {text})"
        assert text == "true" or "too long once lowered" in book.faults(rule)[0]
        assert text != "true" or book.verdict(rule) == YES


def test_deepest_stack_stays_below_the_kernels_bound(book: Rulebook) -> None:
    rule = "profile.member"
    for n in range(29):
        rule = f"profile.age > {n}.0 {'&&' if n % 2 else '||'} ({rule})"
    book.verdict(rule)
    rules = book.compiler.freeze()
    depth, deepest = 0, 0
    for step in rules.steps[rules.starts[-2] :]:
        depth += 1 if step >= 0 else -1
        deepest = max(deepest, depth)
    assert deepest == 2 < RULE_STACK_MAX


@pytest.mark.slow
def test_distinct_rules_and_comparisons_of_a_catalog_are_bounded() -> None:
    violations: list[Violation] = []
    compiler = RuleCompiler(*declared())
    texts = [f"profile.age > {n}.0" for n in range(RULES_MAX + 1)]
    rows = [compiler.add(text, {}, text, violations) for text in texts]
    assert rows == [*range(RULES_MAX), NO_RULE]
    assert violations == [Violation(texts[-1], f"a catalog holds at most {RULES_MAX} distinct rules")]

    violations.clear()
    compiler = RuleCompiler(*declared())
    for n in range(RULES_MAX + 1):
        compiler.add("profile.age > action.price", {"price": number(n)}, "", violations)
    assert [v.description.partition(",")[0] for v in violations] == [
        f"a catalog holds at most {RULES_MAX} distinct rules"
    ]

    violations.clear()
    compiler = RuleCompiler(*declared())
    for n in range(ATOMS_MAX // RULE_ATOMS_MAX):
        text = " || ".join(f"profile.age == {n * RULE_ATOMS_MAX + each}.0" for each in range(RULE_ATOMS_MAX))
        compiler.add(text, {}, "", violations)
    assert violations == []
    compiler.add("profile.age == 0.5", {}, "one.more", violations)
    assert violations == [Violation("one.more", f"a catalog holds at most {ATOMS_MAX} distinct comparisons")]


def test_facts_whose_names_differ_by_an_underscore_stand_side_by_side() -> None:
    facts = [fact("now", TIME), fact("profile.a_b", NUMBER), fact("profile.ab", NUMBER), fact("profile.type", BOOL)]
    violations: list[Violation] = []
    compiler = RuleCompiler(facts, [])
    assert compiler.add("profile.a_b > profile.ab && profile.type", {}, "", violations) == 0
    assert violations == []
