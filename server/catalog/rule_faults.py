"""What is wrong with a rule or a value, said so that its author can mend it.

Handed the CEL library's words and the author's text, it gives single lines of ours: where, what, and what to write
instead. Decides nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

FAULTS_MAX: Final = 16  # of one text; the rest follows from them more often than not
SUPPORTED: Final = (
    "a rule compares facts, or the difference of two, with literals or with one another (== != < <= > >= in), "
    "asks has(fact), and joins that with && || ! and ?:"
)
VALUE_SUPPORTED: Final = (
    "a value adds, subtracts, multiplies and divides numbers and amounts (+ - * /), and chooses between two by a rule "
    "(? :)"
)
EXAMPLES: Final = {"timestamp": "timestamp('2026-03-01T00:00:00Z')", "duration": "duration('720h')"}

_ERROR: Final = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_OVERLOAD: Final = re.compile(r"found no matching overload for '(.*)' applied to '\((.*)\)'")
_FIELD: Final = re.compile(r"undefined field '(.*)' not found in struct '.*\.(\w+)'")
_NAME: Final = re.compile(r"undeclared reference to '(.*)' \(in container")
_SYNTAX: Final = re.compile(r"Syntax error: .*?'(.*)'(?: expecting |$)")
_WRITTEN: Final = {"=": "==", "and": "&&", "or": "||", "not": "!"}
_WHOLE_NUMBER: Final = re.compile(r"(?<![\w.])-?\d+(?![\w.])")
_TYPES: Final = {
    "google.protobuf.Timestamp": "time",
    "google.protobuf.Duration": "duration",
    "double": "number",
    "int": "whole number",
    "string": "text",
    "null_type": "null",
}


class Wanted(NamedTuple):
    """What a text is meant to be, in words."""

    noun: str
    supported: str  # what may be written in it
    mistyped: str  # said of a text of another type


RULE: Final = Wanted("rule", SUPPORTED, "a rule is true or false; compare this value with something")
VALUE: Final = Wanted(
    "value", VALUE_SUPPORTED, "a value is a number of currency units; by a condition choose between two with ? :"
)


class RefusedError(Exception):
    """A text cannot be lowered.

    Attributes:
        faults: why, one line each, at least one.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


def position(text: str, offset: int) -> str:
    """Return where in the text an offset is, for people: counted from 1, the line only when there are several."""
    before = text[:offset]
    column = f"column {offset - before.rfind(chr(10))}"
    return f"line {before.count(chr(10)) + 1}, {column}" if "\n" in text else column


def meant(name: str, names: Collection[str]) -> str:
    """Return "; did you mean …?" with the declared name that comes nearest, or nothing."""
    ends = {each.rpartition(".")[2]: each for each in names}
    close = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)
    return f"; did you mean {ends[close[0]]}?" if close else ""


def spelling(function: str) -> str:
    """Return a function as it is written in a rule: "_&&_" is &&, "@in" is in."""
    return "? :" if function == "_?_:_" else function.strip("_@")


def compile_faults(
    text: str, message: str, names: Collection[str], why_hidden: Callable[[str], str], wanted: Wanted
) -> list[str]:
    """Turn the library's message about a text that does not compile into our faults.

    Args:
        text: the rule or value.
        message: what the library raised, several lines.
        names: every fact that it may read.
        why_hidden: says of a name that is declared elsewhere why it may not be read, else nothing.
        wanted: what the text is meant to be.
    """
    if "recursion" in message:
        return ["nested too deeply; at most 32 levels"]
    faults = []
    for line, column, what in _ERROR.findall(message):
        offset = sum(len(each) for each in text.splitlines(keepends=True)[: int(line) - 1]) + int(column) - 1
        faults.append(f"{position(text, offset)}: {_say(text, offset, what, names, why_hidden, wanted)}")
        if what.startswith("Syntax error"):
            break  # what follows a syntax error is a guess
    return faults[:FAULTS_MAX] or ["not a CEL expression"]


def _say(
    text: str, offset: int, what: str, names: Collection[str], why_hidden: Callable[[str], str], wanted: Wanted
) -> str:
    if found := _FIELD.match(what) or _NAME.match(what):
        name = ".".join(reversed(found.groups()))[:128]
        if "." not in name and text[offset : offset + 1] == "(":
            return f"there is no function {name}; {wanted.supported}"
        why = why_hidden(name)
        return f"{name} {why}" if why else f"{name} is not declared" + meant(name, names)
    if found := _OVERLOAD.match(what):
        return _say_overload(text, offset, found[1], found[2])
    if found := _SYNTAX.match(what):
        word = " ".join(found[1].split())[:64]
        if word == "<EOF>":
            return f"the {wanted.noun} ends too early"
        hint = _WRITTEN.get(word.lower())
        return f"{word} is not understood here" + (f"; write {hint}" if hint else "")
    return " ".join(what.split())[:256]


def _say_overload(text: str, offset: int, function: str, types: str) -> str:
    for theirs, ours in _TYPES.items():
        types = re.sub(rf"(?<![\w.]){re.escape(theirs)}(?![\w.])", ours, types)
    said = f"{spelling(function)} does not take ({types})"
    if "null" in types:
        return f"{said}; whether a fact is known is asked with has(...)"
    if "time" in types:
        return f"{said}; write an instant as {EXAMPLES['timestamp']}"
    if "duration" in types:
        return f"{said}; write a span as {EXAMPLES['duration']}"
    literals = list(_WHOLE_NUMBER.finditer(text))
    if literals and "whole number" in types and re.search("(?<!whole )number", types):
        nearest = min(literals, key=lambda literal: abs(literal.start() - offset))
        return f"{said}; write {nearest[0]}.0"
    return said
