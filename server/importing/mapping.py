"""From the mapping people write to what it says: which column of a file becomes what of a source record.

Handed the text of a YAML document, it gives a ``Mapping``, or every fault at once, each with its path and the key that
was probably meant. The grammar is closed and small. What names mean is the catalog's to say (``checking.py``), whether
columns exist the file's.
"""

from __future__ import annotations

import difflib
import hashlib
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from server.errors import TsugiError, Violation
from server.importing.faults import refused

DOCUMENT_BYTES_MAX: Final = 1024 * 1024
DEPTH_MAX: Final = 16
NODES_MAX: Final = 100_000  # also counts what aliases repeat

ENCODINGS: Final = {
    "utf-8": "utf-8", "utf8": "utf-8", "utf-16": "utf-16", "latin-1": "latin-1", "iso-8859-1": "latin-1",
    "windows-1252": "cp1252", "cp1252": "cp1252",
}  # fmt: skip

# A document whose scalars are all text, as they stand: 007 stays 007, and yes stays yes.
Tree: TypeAlias = "str | list[Tree] | dict[str, Tree] | None"


@dataclass(frozen=True, slots=True)
class IdentityColumn:
    """A column that holds identities of one namespace."""

    path: str  # of this part in the document, for faults
    namespace: str
    column: str


@dataclass(frozen=True, slots=True)
class FactColumn:
    """A column that holds values of one attribute or property."""

    path: str
    name: str
    column: str
    true_texts: tuple[str, ...] = ()  # for booleans; empty: true and 1
    false_texts: tuple[str, ...] = ()  # empty: false and 0
    split: str = ""  # what separates the members of a set or vector
    values: tuple[tuple[str, str], ...] = ()  # what texts are called in the catalog; empty: as they stand


@dataclass(frozen=True, slots=True)
class EventColumns:
    """What makes an event of a row; at most one a row."""

    path: str
    type: str  # empty: a column tells it
    type_column: str
    type_values: tuple[tuple[str, str], ...]  # what texts of the column are called in the catalog; empty: as they are
    when_column: str  # empty: every row states an event
    when_equals: tuple[str, ...]
    occurrence_time: str  # a column; empty: when the record is accepted
    properties: tuple[FactColumn, ...]


@dataclass(frozen=True, slots=True)
class ConsentColumn:
    """A column that tells whether a person allows one purpose."""

    path: str
    purpose: str
    channel: str  # empty: all channels
    column: str
    granted: tuple[str, ...]
    withdrawn: tuple[str, ...]
    effective_time: str  # a column; empty: since the record was observed


@dataclass(frozen=True, slots=True)
class Form:
    """How texts of a file are to be read. Of other formats than CSV all but the delimiter holds, too."""

    delimiter: str  # empty: a comma, in .tsv files a tab
    encoding: str  # a codec's name: utf-8, utf-16, latin-1 or cp1252
    day_first: bool | None  # of dates like 03/04/2026; None: refused as ambiguous
    currency: str  # of amounts that name none; empty: the catalog's
    decimal: str  # "." or ","; empty: a point, and no thousands separators


@dataclass(frozen=True, slots=True)
class Mapping:
    """What a file's columns become.

    ``record_id`` is a template in parts: (text before, column), a column of "" meaning none. Empty: the id is made of
    the file's digest and the row's line.
    """

    record_id: tuple[tuple[str, str], ...]
    observation_time: str
    identities: tuple[IdentityColumn, ...]
    attributes: tuple[FactColumn, ...]
    event: EventColumns | None
    consents: tuple[ConsentColumn, ...]
    form: Form
    sha256: str  # of the document

    def columns(self) -> dict[str, str]:
        """Return every column the mapping reads, each with the first path in the document that reads it."""
        found: dict[str, str] = {}
        for _, column in self.record_id:
            found.setdefault(column, "recordId")
        found.setdefault(self.observation_time, "observationTime.column")
        event = self.event
        facts = (*self.attributes, *(event.properties if event else ()))
        parts: list[IdentityColumn | FactColumn | ConsentColumn] = [*self.identities, *facts, *self.consents]
        for each in parts:
            found.setdefault(each.column, f"{each.path}.column")
        for consent in self.consents:
            found.setdefault(consent.effective_time, f"{consent.path}.effectiveTime.column")
        if event:
            found.setdefault(event.type_column, f"{event.path}.type.column")
            found.setdefault(event.when_column, f"{event.path}.when.column")
            found.setdefault(event.occurrence_time, f"{event.path}.occurrenceTime.column")
        found.pop("", None)
        return found


def load_mapping(text: str) -> Mapping:
    """Read a mapping from YAML.

    Args:
        text: the document, at most 1 MiB.

    Raises:
        TsugiError: FIELD_INVALID with every fault as a violation; paths are spelled as in the document.
    """
    faults: list[Violation] = []
    tree = _tree(text, faults)
    if not faults:
        mapping = _mapping(_Part(faults, "", tree, _KEYS), hashlib.sha256(text.encode()).hexdigest())
    if faults:
        raise refused("the mapping", faults)
    return mapping


def meant(name: str, names: Iterable[str]) -> str:
    """Return a suggestion to append to a fault; empty when no name is near."""
    close = difflib.get_close_matches(name[:64], list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


_KEYS: Final = ("recordId", "observationTime", "identities", "attributes", "event", "consents", "csv")
_FACT_KEYS: Final = ("column", "true", "false", "split", "values")
_EVENT_KEYS: Final = ("type", "when", "occurrenceTime", "properties")
_CONSENT_KEYS: Final = ("purpose", "channel", "column", "granted", "withdrawn", "effectiveTime")
_FORM_KEYS: Final = ("delimiter", "encoding", "dayFirst", "currency", "decimal")


class _Part:
    """One mapping of the document, which knows where it stands and which keys it takes; collects faults.

    Args:
        faults: where faults go.
        path: where this part stands.
        tree: what stands there.
        keys: the keys it takes; None: any, they are names.
    """

    def __init__(self, faults: list[Violation], path: str, tree: Tree, keys: tuple[str, ...] | None) -> None:
        self._faults = faults
        self.path = path
        self._tree: dict[str, Tree] = {}
        if isinstance(tree, dict):
            self._tree = tree
        else:
            self.report("", "keys with values are expected here, such as column: name")
        for key in self._tree if keys is not None else ():
            if keys is not None and key not in keys:
                self.report(key, f"no such key{meant(key, keys) or '; one of ' + ', '.join(keys) + ' is expected'}")

    def report(self, key: str, description: str) -> None:
        self._faults.append(Violation(self.at(key), description))

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path and key else self.path or key

    def has(self, key: str) -> bool:
        return self._tree.get(key) is not None

    def is_part(self, key: str) -> bool:
        return isinstance(self._tree.get(key), dict)

    def names(self) -> list[str]:
        return list(self._tree)

    def text(self, key: str, *, required: bool = False) -> str:
        value = self._tree.get(key)
        if isinstance(value, str) and value:
            return value
        if value is not None:
            self.report(key, "one text is expected" if value else "a text is expected, got nothing")
        elif required and isinstance(self._tree, dict):
            self.report(key, "is required")
        return ""

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._tree.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        texts = tuple(each for each in listed if isinstance(each, str))
        if len(texts) < len(listed) or (value is not None and not texts):
            self.report(key, "a list of texts is expected, such as [y, yes, 1]")
        return texts

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        if not self.has(key):
            return ()
        part = self.part(key, None)
        return tuple((each, part.text(each, required=True)) for each in part.names())

    def part(self, key: str, keys: tuple[str, ...] | None) -> _Part:
        return _Part(self._faults, self.at(key), self._tree.get(key), keys)

    def parts(self, key: str, keys: tuple[str, ...]) -> list[_Part]:
        value = self._tree.get(key)
        if value is not None and not isinstance(value, list):
            self.report(key, "a list is expected, each entry after a dash")
        listed = value if isinstance(value, list) else []
        return [_Part(self._faults, f"{self.at(key)}[{i}]", each, keys) for i, each in enumerate(listed)]

    def column(self, key: str) -> str:
        """Return the column of a part such as {column: name}; empty where there is none."""
        return self.part(key, ("column",)).text("column", required=True) if self.has(key) else ""


def _mapping(root: _Part, sha256: str) -> Mapping:
    if not root.has("identities"):
        root.report("identities", "at least one identity is required")
    return Mapping(
        record_id=_template(root, root.text("recordId")),
        observation_time=root.column("observationTime"),
        identities=tuple(
            IdentityColumn(part.path, part.text("namespace", required=True), part.text("column", required=True))
            for part in root.parts("identities", ("namespace", "column"))
        ),
        attributes=_facts(root, "attributes"),
        event=_event(root.part("event", _EVENT_KEYS)) if root.has("event") else None,
        consents=tuple(_consent(part) for part in root.parts("consents", _CONSENT_KEYS)),
        form=_form(root.part("csv", _FORM_KEYS) if root.has("csv") else _Part([], "csv", {}, _FORM_KEYS)),
        sha256=sha256,
    )


def _template(root: _Part, template: str) -> tuple[tuple[str, str], ...]:
    parts = []
    try:
        for before, column, form, conversion in string.Formatter().parse(template):
            if form or conversion:
                root.report("recordId", "a column's name alone stands between braces")
            elif column == "":
                root.report("recordId", "a column's name is expected between the braces")
            parts.append((before, column or ""))
    except ValueError:
        root.report("recordId", "every { needs its }; write {{ for a brace itself")
    if template and not any(column for _, column in parts):
        root.report("recordId", "at least one {column} is required, or all records would have one id")
    return tuple(parts)


def _facts(parent: _Part, key: str) -> tuple[FactColumn, ...]:
    if not parent.has(key):
        return ()
    named = parent.part(key, None)
    return tuple(_fact(named.part(name, _FACT_KEYS), name) for name in named.names())


def _fact(part: _Part, name: str) -> FactColumn:
    fact = FactColumn(
        path=part.path,
        name=name,
        column=part.text("column", required=True),
        true_texts=part.texts("true"),
        false_texts=part.texts("false"),
        split=part.text("split"),
        values=part.pairs("values"),
    )
    if bool(fact.true_texts) != bool(fact.false_texts):
        part.report("false" if fact.true_texts else "true", "true and false are stated together, or neither")
    for text in set(fact.true_texts) & set(fact.false_texts):
        part.report("false", f"{text!r} is both true and false")
    return fact


def _event(part: _Part) -> EventColumns:
    typed = part.part("type", ("column", "values")) if part.is_part("type") else None
    when = part.part("when", ("column", "equals")) if part.has("when") else None
    if when is not None and not when.has("equals"):
        when.report("equals", "is required")
    return EventColumns(
        path=part.path,
        type="" if typed else part.text("type", required=True),
        type_column=typed.text("column", required=True) if typed else "",
        type_values=typed.pairs("values") if typed else (),
        when_column=when.text("column", required=True) if when else "",
        when_equals=when.texts("equals") if when else (),
        occurrence_time=part.column("occurrenceTime"),
        properties=_facts(part, "properties"),
    )


def _consent(part: _Part) -> ConsentColumn:
    consent = ConsentColumn(
        path=part.path,
        purpose=part.text("purpose", required=True),
        channel=part.text("channel"),
        column=part.text("column", required=True),
        granted=part.texts("granted"),
        withdrawn=part.texts("withdrawn"),
        effective_time=part.column("effectiveTime"),
    )
    if not consent.granted and not consent.withdrawn:
        part.report("granted", "texts that mean granted or withdrawn are required")
    for text in set(consent.granted) & set(consent.withdrawn):
        part.report("withdrawn", f"{text!r} is both granted and withdrawn")
    return consent


def _form(part: _Part) -> Form:
    delimiter, decimal, currency = part.text("delimiter"), part.text("decimal"), part.text("currency")
    delimiter = "\t" if delimiter == "\\t" else delimiter
    if delimiter and (len(delimiter) != 1 or delimiter in '"\r\n'):
        part.report("delimiter", 'one character is expected, such as ";" or "\\t"')
    encoding = part.text("encoding") or "utf-8"
    if encoding.lower() not in ENCODINGS:
        part.report("encoding", f"one of {', '.join(ENCODINGS)} is expected{meant(encoding.lower(), ENCODINGS)}")
    day_first = part.text("dayFirst")
    if day_first not in {"", "true", "false"}:
        part.report("dayFirst", "true or false is expected")
    if decimal not in {"", ".", ","}:
        part.report("decimal", 'a point or a comma in quotes is expected, such as ","')
    if currency and not (len(currency) == 3 and currency.isascii() and currency.isupper()):
        part.report("currency", "an ISO 4217 code is expected, such as EUR")
    return Form(
        delimiter=delimiter,
        encoding=ENCODINGS.get(encoding.lower(), "utf-8"),
        day_first={"true": True, "false": False}.get(day_first),
        currency=currency,
        decimal=decimal,
    )


def _tree(text: str, faults: list[Violation]) -> Tree:
    if len(text) > DOCUMENT_BYTES_MAX:
        faults.append(Violation("", f"at most {DOCUMENT_BYTES_MAX} bytes"))
        return None
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # they are allowed, and a warning is no way to tell anybody
    try:
        root = yaml.compose(text)
        return _Texts(faults).of(root, "", 0) if root is not None else {}
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        faults.append(Violation("", f"not YAML: {where}{error.problem or error.context}"))
    except (YAMLError, RecursionError, ValueError, OverflowError) as error:
        faults.append(Violation("", f"not YAML: {str(error).partition(chr(10))[0]}"))
    except TsugiError as error:
        faults.extend(error.violations)
    return None


class _Texts:
    """Turns nodes into a tree of texts."""

    def __init__(self, faults: list[Violation]) -> None:
        self._faults = faults
        self._n_nodes = 0

    def of(self, node: Node, path: str, depth: int) -> Tree:
        self._n_nodes += 1
        if depth > DEPTH_MAX or self._n_nodes > NODES_MAX:
            raise refused("the mapping", [Violation(path, "nested too deeply, or too much")])
        if isinstance(node, ScalarNode):
            return None if str(node.tag).endswith(":null") else str(node.value)
        if isinstance(node, SequenceNode):
            return [self.of(each, f"{path}[{i}]", depth + 1) for i, each in enumerate(node.value)]
        assert isinstance(node, MappingNode), "YAML has three kinds of nodes"
        tree: dict[str, Tree] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, ScalarNode) else ""
            entry_path = f"{path}.{name}" if path else name
            if name in tree:
                self._faults.append(Violation(entry_path, f"stands here twice (line {key.start_mark.line + 1})"))
            elif not isinstance(key, ScalarNode):
                self._faults.append(Violation(path, f"a name is expected (line {key.start_mark.line + 1})"))
            else:
                tree[name] = self.of(value, entry_path, depth + 1)
        return tree
