"""Rules (eligibility, segments, filters of windows): what does this CEL text compare?

Handed the catalog's declared facts and rule texts, it has the CEL library parse and type-check each text once, then
lowers the checked tree to comparisons on the fact vector (``Rules``). Facts of an action are constants of that action
and are folded away. CEL itself never takes part in a decision, and what cannot be lowered is refused, never guessed.

Stricter than CEL in one point: CEL reads an absent fact as zero or empty text; here its comparison is unknown, and an
unknown rule lets nobody pass (Kleene's strong three-valued logic).
"""

from __future__ import annotations

import math
import operator as python
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

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
    NOW_FACT,
    OR,
    RULE_STACK_MAX,
    TRUE,
    Fact,
    Rules,
)
from server.catalog.conditions import (
    Choice,
    Comparison,
    Condition,
    Join,
    Known,
    Language,
    Negation,
    code_of,
)
from server.catalog.rule_faults import RefusedError
from server.catalog.scopes import ELIGIBILITY, Scope
from server.errors import Violation
from tsugi.v1.value_pb2 import Value

RULE_ATOMS_MAX: Final = 64
RULE_STEPS_MAX: Final = 1_024  # only nested ternaries come near it: lowering writes their condition twice
RULES_MAX: Final = 1_000
ATOMS_MAX: Final = 4_096
NO_RULE: Final = -1

_HOLDS: Final = {
    LESS: python.lt,
    LESS_EQUAL: python.le,
    EQUAL: python.eq,
    NOT_EQUAL: python.ne,
    GREATER_EQUAL: python.ge,
    GREATER: python.gt,
}


class _Atom(NamedTuple):
    left: int
    right: int
    operator: int
    constant: float


class RuleProgram(NamedTuple):
    """A rule before its atoms have places: postfix steps, and the stack they need."""

    steps: tuple[_Atom | int, ...]
    stack: int = 1


ALWAYS: Final = RuleProgram((TRUE,))
NEVER: Final = RuleProgram((FALSE,))
# Always this one object, because NaN equals nothing but itself.
NEVER_KNOWN: Final = RuleProgram((_Atom(NOW_FACT, -1, EQUAL, math.nan),))


def _frozen(rules: Rules) -> Rules:
    for array in rules.columns():
        array.flags.writeable = False
    return rules


NO_RULES: Final = _frozen(
    Rules(
        left=np.zeros(0, np.int32),
        right=np.zeros(0, np.int32),
        operators=np.zeros(0, np.uint8),
        constants=np.zeros(0),
        steps=np.zeros(0, np.int32),
        starts=np.zeros(1, np.int32),
    )
)


class RuleCompiler:
    """Lowers the rules of one catalog; equal rules and equal comparisons are kept once.

    Lowering *fills* ``Fact.codes`` of text facts with the texts that rules compare them with, so profiles and actions
    are encoded, and the fact space is frozen, only after the last rule was added.
    """

    def __init__(self, facts: Sequence[Fact], action_facts: Sequence[Fact] = (), scope: Scope = ELIGIBILITY) -> None:
        """Declare what rules may speak of.

        Args:
            facts: the vector that rules are evaluated over, in its order, such as now, profile.*, context.*. Names are
                valid and unique.
            action_facts: action.*, valid and unique too.
            scope: which of these facts a rule may read.

        Cost: about 1 ms.
        """
        self._language = Language(facts, action_facts, scope)
        self._conditions: dict[str, Condition | list[str]] = {}  # or what is wrong with the text
        self._atoms: dict[_Atom, int] = {}
        self._rules: dict[tuple[int, ...], int] = {}

    def add(self, text: str, action_values: Mapping[str, Value] | None, path: str, violations: list[Violation]) -> int:
        """Lower one rule for one action, or for none.

        Args:
            text: the CEL text, not empty.
            action_values: what the action states of its facts, by attribute name without "action."; a value of the
                wrong type or outside its bounds counts as not stated. None: the rule is of no action, and may
                not read any's facts.
            path: where the text stands, for violations.
            violations: gets every fault of the text.

        Returns:
            The rule's row, shared by all that lower to the same comparisons; NO_RULE when there was a fault.

        Cost: 0.1 to 2 ms the first time a text is seen, after that some 2 µs a comparison.
        """
        try:
            return self.place(self.bind(self._condition(text), action_values))
        except RefusedError as refusal:
            violations.extend(Violation(path, fault) for fault in refusal.faults)
            return NO_RULE

    def freeze(self) -> Rules:
        """Return all rules added so far; the arrays are read-only."""
        columns = np.array(list(self._atoms), np.float64).reshape(-1, 4).T
        lengths = [len(steps) for steps in self._rules]
        return _frozen(
            Rules(
                left=columns[0].astype(np.int32),
                right=columns[1].astype(np.int32),
                operators=columns[2].astype(np.uint8),
                constants=columns[3].copy(),
                steps=np.array([step for steps in self._rules for step in steps], np.int32),
                starts=np.cumsum([0, *lengths], dtype=np.int32),
            )
        )

    def bind(self, condition: Condition, values: Mapping[str, Value] | None) -> RuleProgram:
        """Fill in an action's facts and fold what has become constant: ALWAYS and NEVER met, or NEVER_KNOWN.

        Raises:
            RefusedError: it reads facts of an action and is of none, or is too long once lowered.
        """
        match condition:
            case bool():
                return ALWAYS if condition else NEVER
            case Comparison():
                return _compare(condition, values)
            case Known():
                return _known(condition, values)
            case Negation(inner):
                return _negate(self.bind(inner, values))
            case Join(step, parts):
                return _join(step, (self.bind(part, values) for part in parts))
            case Choice(asked, met, unmet):
                verdict = self.bind(asked, values)
                return _join(
                    OR,
                    (
                        _join(AND, (verdict, self.bind(met, values))),
                        _join(AND, (_negate(verdict), self.bind(unmet, values))),
                    ),
                )

    def place(self, program: RuleProgram) -> int:
        """Keep a rule, and return its row, which equal rules share.

        Raises:
            RefusedError: the rule, or all rules of the catalog together, would be too many steps or comparisons.
        """
        assert program.stack <= RULE_STACK_MAX, "heavier operands come first, so the stack grows with log2(steps)"
        atoms = {step for step in program.steps if isinstance(step, _Atom)}
        if len(atoms) > RULE_ATOMS_MAX:
            raise RefusedError([f"a rule holds at most {RULE_ATOMS_MAX} distinct comparisons, got {len(atoms)}"])
        steps = tuple(
            self._atoms.setdefault(step, len(self._atoms)) if isinstance(step, _Atom) else step
            for step in program.steps
        )
        if len(self._atoms) > ATOMS_MAX:
            raise RefusedError([f"a catalog holds at most {ATOMS_MAX} distinct comparisons"])
        row = self._rules.setdefault(steps, len(self._rules))
        if row >= RULES_MAX:
            raise RefusedError([f"a catalog holds at most {RULES_MAX} distinct rules, each action's facts filled in"])
        return row

    def _condition(self, text: str) -> Condition:
        condition = self._conditions.get(text)
        if condition is None:
            if len(self._conditions) == RULES_MAX:
                raise RefusedError([f"a catalog holds at most {RULES_MAX} distinct rules"])
            try:
                condition = self._language.read(text)
            except RefusedError as refusal:
                condition = refusal.faults
            self._conditions[text] = condition
        if isinstance(condition, list):
            raise RefusedError(condition)
        return condition


def _compare(comparison: Comparison, values: Mapping[str, Value] | None) -> RuleProgram:
    constant = comparison.constant
    for sign, fact in comparison.action_facts:
        constant += sign * own_number(fact, comparison.coder, values)
    if math.isnan(constant):
        return NEVER_KNOWN
    if comparison.left is None:
        return ALWAYS if _HOLDS[comparison.operator](0.0, constant) else NEVER
    right = -1 if comparison.right is None else comparison.right
    return RuleProgram((_Atom(comparison.left, right, comparison.operator, constant),))


def _known(known: Known, values: Mapping[str, Value] | None) -> RuleProgram:
    if known.row is not None:
        return RuleProgram((_Atom(known.row, -1, KNOWN, 0.0),))
    return NEVER if math.isnan(own_number(known.fact, None, values)) else ALWAYS


def own_number(fact: Fact, coder: Fact | None, values: Mapping[str, Value] | None) -> float:
    """Return an action's own fact; NaN when it does not state it. Texts get their code in the coder's words."""
    if values is None:
        raise RefusedError([f"{fact.name} cannot be read here; this rule is of no action"])
    value = values.get(fact.name.removeprefix("action."))
    number = math.nan if value is None else fact.encode(value)
    if value is None or coder is None or math.isnan(number):
        return number
    return code_of(coder, value.text_value)


def _negate(program: RuleProgram) -> RuleProgram:
    if program in (ALWAYS, NEVER):
        return NEVER if program == ALWAYS else ALWAYS
    return RuleProgram((*program.steps, NOT), program.stack)


def _join(step: int, programs: Iterable[RuleProgram]) -> RuleProgram:
    """Join by AND or OR; the part that needs more stack comes first, which keeps the stack at log2(steps)."""
    settling, joined = (NEVER, ALWAYS) if step == AND else (ALWAYS, NEVER)
    neutral = joined
    for program in programs:
        if settling in (joined, program):
            joined = settling
        elif neutral in (joined, program):
            joined = program if joined == neutral else joined
        elif len(joined.steps) + len(program.steps) >= RULE_STEPS_MAX:
            raise RefusedError(
                [f"the rule is too long once lowered, over {RULE_STEPS_MAX} steps; nest fewer ternaries"]
            )
        else:
            first, second = (joined, program) if joined.stack >= program.stack else (program, joined)
            joined = RuleProgram((*first.steps, *second.steps, step), max(first.stack, second.stack + 1))
    return joined
