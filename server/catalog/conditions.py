"""What a CEL text means, in our own few words: the reading half of lowering a rule.

Handed the declared facts and one text, it gives the condition that the text states as a small tree, or every fault it
finds, said so that the author can mend it. Knows nothing of actions' values, programs or limits of a whole catalog.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cel.expr import checked_pb2, syntax_pb2
from cel_expr_python import cel
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from server.catalog.catalog import (
    AND,
    CONTAINS,
    EQUAL,
    GREATER,
    GREATER_EQUAL,
    LESS,
    LESS_EQUAL,
    NOT_EQUAL,
    OR,
    Fact,
)
from server.catalog.rule_faults import (
    EXAMPLES,
    RULE,
    RefusedError,
    Wanted,
    compile_faults,
    meant,
    position,
    spelling,
)
from server.catalog.scopes import ELIGIBILITY, NOW, PACKAGE, Scope, messages
from tsugi.v1 import catalog_pb2

EXPRESSION_BYTES_MAX: Final = 2_048

_CATEGORY: Final = catalog_pb2.ATTRIBUTE_TYPE_CATEGORY
_SET: Final = catalog_pb2.ATTRIBUTE_TYPE_SET
_TEXTUAL: Final = (_CATEGORY, catalog_pb2.ATTRIBUTE_TYPE_TEXT)
_COMPARISONS: Final = {
    "_<_": LESS,
    "_<=_": LESS_EQUAL,
    "_==_": EQUAL,
    "_!=_": NOT_EQUAL,
    "_>=_": GREATER_EQUAL,
    "_>_": GREATER,
}
_MIRRORED: Final = {
    LESS: GREATER,
    LESS_EQUAL: GREATER_EQUAL,
    EQUAL: EQUAL,
    NOT_EQUAL: NOT_EQUAL,
    GREATER_EQUAL: LESS_EQUAL,
    GREATER: LESS,
}
_WORDS: Final = {"comprehension_expr": "a macro", "struct_expr": "a message", "list_expr": "a list"}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """facts[left] - facts[right] compared with the constant plus an action's own facts, each with its sign.

    CONTAINS asks facts[left], a set, for the value whose code that sum is.
    """

    operator: int
    left: int | None  # None: nothing but action facts is compared, and 0 stands here
    right: int | None
    constant: float
    action_facts: tuple[tuple[float, Fact], ...]
    coder: Fact | None  # of texts: the fact whose codes number them; of CONTAINS the set


@dataclass(frozen=True, slots=True)
class Known:
    """Whether the fact is known; row is None for a fact of the action."""

    fact: Fact
    row: int | None


@dataclass(frozen=True, slots=True)
class Negation:
    """Not so."""

    inner: Condition


@dataclass(frozen=True, slots=True)
class Join:
    """All parts (AND) or at least one (OR)."""

    step: int
    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """asked ? met : unmet."""

    asked: Condition
    met: Condition
    unmet: Condition


Condition = bool | Comparison | Known | Negation | Join | Choice

_CONNECTIVES: Final[dict[str, Callable[..., Condition]]] = {
    "_&&_": lambda *parts: Join(AND, parts),
    "_||_": lambda *parts: Join(OR, parts),
    "!_": Negation,
    "_?_:_": Choice,
}


@dataclass(frozen=True, slots=True)
class _Sum:
    """Facts added, facts taken away, and a constant: all that one side of a comparison may be."""

    plus: tuple[Fact, ...] = ()
    minus: tuple[Fact, ...] = ()
    constant: float = 0.0

    def __add__(self, other: _Sum) -> _Sum:
        return _Sum(self.plus + other.plus, self.minus + other.minus, self.constant + other.constant)

    def __neg__(self) -> _Sum:
        return _Sum(self.minus, self.plus, -self.constant)


def code_of(coder: Fact, text: str) -> float:
    """Return the number that stands for a text wherever the coder's values are compared.

    A text fact gives a new text the next code; a category or set knows its allowed values, and -1 is none of them.
    """
    if coder.type == catalog_pb2.ATTRIBUTE_TYPE_TEXT:
        return float(coder.codes.setdefault(text, len(coder.codes)))
    return float(coder.codes.get(text, -1))


class Language:
    """The CEL of one catalog: its facts as typed messages, and the library's compiler over them."""

    def __init__(self, facts: Sequence[Fact], action_facts: Sequence[Fact], scope: Scope = ELIGIBILITY) -> None:
        """Declare the facts; see RuleCompiler."""
        self.scope = scope
        self.facts = {fact.name: fact for fact in scope.readable((*facts, *action_facts))}
        self.rows = {fact.name: row for row, fact in enumerate(facts)}
        self._env = cel.NewEnv(
            descriptor_pool=messages(self.facts.values(), scope.roots),
            variables={
                root: cel.Type.TIMESTAMP if root == NOW else cel.Type(f"{PACKAGE}.{root}") for root in scope.roots
            },
        )
        # The library reads its own literals, so that no second grammar of instants and spans exists.
        literals = cel.NewEnv(variables={"text": cel.Type.STRING})
        self._literals = {name: literals.compile(f"{name}(text)") for name in ("timestamp", "duration")}

    def read(self, text: str) -> Condition:
        """Return the condition a text states.

        Raises:
            RefusedError: with every fault of the text.

        Cost: 0.1 to 2 ms.
        """
        checked = self.check(text, RULE, cel.Type.BOOL)
        reader = Reader(self, text, checked)
        condition = reader.condition(checked.expr)
        if reader.faults:
            raise RefusedError(reader.faults)
        return condition

    def check(self, text: str, wanted: Wanted, *types: cel.Type) -> checked_pb2.CheckedExpr:
        """Parse and type-check a text that is to be of one of these types; see read."""
        n_bytes = len(text.encode())
        if n_bytes > EXPRESSION_BYTES_MAX:
            raise RefusedError([f"at most {EXPRESSION_BYTES_MAX} bytes, got {n_bytes}"])
        try:
            expression = self._env.compile(text)
        except RuntimeError as error:
            raise RefusedError(compile_faults(text, str(error), self.facts, self.scope.why_hidden, wanted)) from None
        if expression.return_type() not in types:
            raise RefusedError([wanted.mistyped])
        checked = checked_pb2.CheckedExpr()
        try:
            any_pb2.Any.FromString(expression.serialize()).Unpack(checked)
        except DecodeError:  # nested deeper than protobuf decodes, which only expanded macros are
            raise RefusedError([wanted.supported]) from None
        return checked

    def microseconds(self, function: str, text: str) -> float | None:
        """Return the instant since the epoch, or the span, that a literal names; None when it is malformed."""
        value = self._literals[function].eval(data={"text": text}).value()
        if isinstance(value, datetime):
            return float((value - _EPOCH) // _MICROSECOND)
        return float(value // _MICROSECOND) if isinstance(value, timedelta) else None


class Reader:
    """Walks one checked tree. A part that cannot be lowered leaves its fault and reads as false."""

    def __init__(self, language: Language, text: str, checked: checked_pb2.CheckedExpr) -> None:
        self.faults: list[str] = []
        self._facts = language.facts
        self._rows = language.rows
        self._microseconds = language.microseconds
        self._text = text
        self._offsets = checked.source_info.positions

    def condition(self, expr: syntax_pb2.Expr) -> Condition:
        """Return the condition that a part of the tree states."""
        return self._collect(self._condition, expr)

    def _collect(self, read: Callable[..., Condition], *arguments: object) -> Condition:
        try:
            return read(*arguments)
        except RefusedError as refusal:
            self._note(refusal)
            return False

    def _note(self, refusal: RefusedError) -> None:
        self.faults.extend(fault for fault in refusal.faults if fault not in self.faults)

    def _condition(self, expr: syntax_pb2.Expr) -> Condition:
        if expr.const_expr.WhichOneof("constant_kind") == "bool_value":
            return bool(expr.const_expr.bool_value)
        if expr.HasField("select_expr"):
            fact = self._fact(expr)
            if expr.select_expr.test_only:
                return Known(fact, self._rows.get(fact.name))
            return self._difference(expr, EQUAL, _Sum((fact,)), _Sum(constant=1.0))
        function, arguments = expr.call_expr.function, expr.call_expr.args
        if function in _COMPARISONS:
            return self._compare(expr, _COMPARISONS[function], *arguments)
        if function == "@in":
            return self._among(expr, *arguments)
        if function in _CONNECTIVES:
            return _CONNECTIVES[function](*map(self.condition, arguments))
        raise self._unsupported(expr)

    def _among(self, expr: syntax_pb2.Expr, needle: syntax_pb2.Expr, haystack: syntax_pb2.Expr) -> Condition:
        if haystack.HasField("select_expr"):
            return self._contains(expr, needle, haystack)
        elements = haystack.list_expr.elements
        if not elements:
            raise self._unsupported(expr)
        return Join(OR, tuple(self._collect(self._compare, each, EQUAL, needle, each) for each in elements))

    def _contains(self, expr: syntax_pb2.Expr, needle: syntax_pb2.Expr, haystack: syntax_pb2.Expr) -> Condition:
        """Read whether a set has a value: a literal, or a text of the action."""
        fact, value = self._fact(haystack), self._term(needle)
        if fact.type != _SET:
            raise self._only_known(haystack, fact)
        own: tuple[tuple[float, Fact], ...] = ()
        code = 0.0
        if isinstance(value, str):
            code = self._code(needle, value, fact)
        elif _is_textual(value) and value.plus[0].name not in self._rows:
            own = ((1.0, value.plus[0]),)
        else:
            raise self._refusal(expr, f"a set is asked for a literal or for a text of the action, in {fact.name}")
        return Comparison(CONTAINS, self._rows[fact.name], None, code, own, fact)

    def _compare(
        self, expr: syntax_pb2.Expr, operator: int, left: syntax_pb2.Expr, right: syntax_pb2.Expr
    ) -> Condition:
        a, b = self._term(left), self._term(right)
        if isinstance(a, _Sum) and isinstance(b, _Sum) and not _is_textual(a) and not _is_textual(b):
            return self._difference(expr, operator, a, b)
        if operator not in (EQUAL, NOT_EQUAL):
            raise self._refusal(expr, "texts have no order; compare them with ==, != or in")
        facts = [fact for side in (a, b) if isinstance(side, _Sum) for fact in side.plus]
        own = [fact for fact in facts if fact.name in self._rows]
        if len(own) == 2 and not (own[0].type == own[1].type == _CATEGORY and own[0].codes == own[1].codes):
            raise self._refusal(
                expr,
                f"{own[0].name} and {own[1].name} cannot be compared: two facts of text never, two categories only "
                "when their allowed values are the same, in the same order",
            )
        coder = next(iter(own or facts), None)
        return self._difference(expr, operator, self._coded(left, a, coder), self._coded(right, b, coder), coder)

    def _coded(self, expr: syntax_pb2.Expr, side: _Sum | str, coder: Fact | None) -> _Sum:
        if isinstance(side, _Sum) or coder is None:
            return side if isinstance(side, _Sum) else _Sum()
        return _Sum(constant=self._code(expr, side, coder))

    def _code(self, expr: syntax_pb2.Expr, text: str, coder: Fact) -> float:
        if coder.type in (_CATEGORY, _SET) and text not in coder.codes:
            hint = meant(text, coder.codes) or f"; allowed are {', '.join(list(coder.codes)[:8])}"
            raise self._refusal(expr, f"{text[:64]!r} is no allowed value of {coder.name}{hint}")
        return code_of(coder, text)

    def _difference(
        self, expr: syntax_pb2.Expr, operator: int, left: _Sum, right: _Sum, coder: Fact | None = None
    ) -> Comparison:
        """Bring a comparison into the one form that is evaluated: fact - fact compared with a constant.

        Constants of a sum are added once here, left to right; CEL may round a last bit differently.
        """
        total = left + -right
        plus, minus = ([fact for fact in side if fact.name in self._rows] for side in (total.plus, total.minus))
        if not total.plus and not total.minus:
            raise self._refusal(expr, "no fact is compared here")
        if len(plus) > 1 or len(minus) > 1:
            raise self._refusal(expr, "a comparison takes one fact, or one fact minus another")
        if not math.isfinite(total.constant):
            raise self._refusal(expr, "the number is too large")
        sign = 1.0 if plus or not minus else -1.0
        if sign < 0.0:
            plus, minus, operator = minus, plus, _MIRRORED[operator]
        return Comparison(
            operator=operator,
            left=self._rows[plus[0].name] if plus else None,
            right=self._rows[minus[0].name] if minus else None,
            constant=0.0 - sign * total.constant,  # never a negative zero
            action_facts=(
                *((-sign, fact) for fact in total.plus if fact.name not in self._rows),
                *((sign, fact) for fact in total.minus if fact.name not in self._rows),
            ),
            coder=coder,
        )

    def _term(self, expr: syntax_pb2.Expr) -> _Sum | str:
        """Read one side of a comparison: a text literal, or anything that is a sum."""
        match expr.WhichOneof("expr_kind"):
            case "const_expr":
                return self._literal(expr)
            case "ident_expr" if expr.ident_expr.name == "now":
                return _Sum((self._facts["now"],))
            case "select_expr" if not expr.select_expr.test_only:
                fact = self._fact(expr)
                if fact.type in (_SET, catalog_pb2.ATTRIBUTE_TYPE_VECTOR):
                    raise self._only_known(expr, fact)
                return _Sum((fact,))
            case "call_expr":
                return self._call(expr)
        raise self._unsupported(expr)

    def _literal(self, expr: syntax_pb2.Expr) -> _Sum | str:
        constant = expr.const_expr
        match constant.WhichOneof("constant_kind"):
            case "string_value":
                return str(constant.string_value)
            case "double_value":
                return _Sum(constant=constant.double_value)
            case "bool_value":
                return _Sum(constant=float(constant.bool_value))
            case "int64_value":
                raise self._refusal(expr, f"numbers have a point: write {constant.int64_value}.0")
            case "null_value":
                raise self._refusal(expr, "whether a fact is known is asked with has(...)")
        raise self._unsupported(expr)

    def _call(self, expr: syntax_pb2.Expr) -> _Sum:
        function, arguments = expr.call_expr.function, expr.call_expr.args
        if function in ("timestamp", "duration"):
            text = arguments[0].const_expr.string_value
            microseconds = self._microseconds(function, text) if text else None
            if microseconds is None:
                raise self._refusal(expr, f"write {EXAMPLES[function]}")
            return _Sum(constant=microseconds)
        if function in ("_+_", "_-_", "-_"):
            sums = [self._addend(argument) for argument in arguments]
            last = sums[-1] if function == "_+_" else -sums[-1]
            return sums[0] + last if len(sums) == 2 else last
        raise self._unsupported(expr)

    def _addend(self, expr: syntax_pb2.Expr) -> _Sum:
        term = self._term(expr)
        if isinstance(term, str) or _is_textual(term):
            raise self._refusal(expr, "texts cannot be added")
        return term

    def _fact(self, expr: syntax_pb2.Expr, wanted: Wanted = RULE) -> Fact:
        select = expr.select_expr
        fact = self._facts.get(f"{select.operand.ident_expr.name.removeprefix('.')}.{select.field}")
        if fact is None:
            raise self._unsupported(expr, wanted)
        return fact

    def _only_known(self, expr: syntax_pb2.Expr, fact: Fact) -> RefusedError:
        if fact.type == _SET:
            return self._refusal(expr, f"a set is asked for its values: {next(iter(fact.codes))!r} in {fact.name}")
        return self._refusal(expr, f"of a vector a rule asks only whether it is known: has({fact.name})")

    def _unsupported(self, expr: syntax_pb2.Expr, wanted: Wanted = RULE) -> RefusedError:
        what = spelling(expr.call_expr.function) or _WORDS.get(str(expr.WhichOneof("expr_kind")), "this")
        return self._refusal(expr, f"{what} cannot be used here; {wanted.supported}")

    def _refusal(self, expr: syntax_pb2.Expr, fault: str) -> RefusedError:
        return RefusedError([f"{self._position(expr)}: {fault}"])

    def _position(self, expr: syntax_pb2.Expr) -> str:
        return position(self._text, self._offsets[expr.id])


def _is_textual(side: _Sum) -> bool:
    return any(fact.type in _TEXTUAL for fact in side.plus + side.minus)
