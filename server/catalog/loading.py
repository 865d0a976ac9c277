"""From the YAML people write to the catalog message: is every line of it something a catalog can hold?

Handed a text, it gives the message, or every fault at once, each with its path and, where one is near, the name that
was probably meant. The YAML is exactly the JSON mapping of ``tsugi.v1.Catalog`` (protobuf's own names are taken too).
Whether the parts fit together is judged where catalogs are compiled.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from server.errors import TsugiError, Violation
from tsugi.v1 import catalog_pb2
from tsugi.v1.error_reason_pb2 import ErrorReason

DOCUMENT_BYTES_MAX: Final = 16 * 1024 * 1024
DOCUMENT_DEPTH_MAX: Final = 64
CONTENT_DEPTH_MAX: Final = 24  # of free-form values: protobuf reads 100 levels and spends up to three on each of ours
ALIASED_NODES_MAX: Final = 10_000  # values that aliases may repeat, all together
VIOLATIONS_MAX: Final = 1_000

_TAG: Final = "tag:yaml.org,2002:"
_COLLECTIONS: Final = (f"{_TAG}map", f"{_TAG}seq")
_NO_TAGS: Final = "tags (!) are not taken"
_JSON_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?\Z")
_BOOLEANS: Final = {"true": True, "false": False}
_INTEGERS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_WELL_KNOWN: Final[dict[str, tuple[type[Timestamp] | type[Duration], str]]] = {
    Timestamp.DESCRIPTOR.full_name: (Timestamp, "an instant with its zone, such as 2026-03-01T00:00:00Z"),
    Duration.DESCRIPTOR.full_name: (Duration, "a span in seconds, such as 3600s"),
}


def load_catalog(text: str) -> catalog_pb2.Catalog:
    """Read a catalog from YAML.

    Args:
        text: the document, at most 16 MiB of UTF-8.

    Raises:
        TsugiError: ERROR_REASON_CATALOG_INVALID with every fault (the first 1,000) as a violation. Paths are spelled
            as in the document: ``actions[3].treatments[0].chanel``.

    Cost: some 1.5 ms an action; for callers, not for the serving loop.
    """
    reader = _Reader()
    tree = reader.read(text)
    if reader.violations:
        raise _invalid(reader.violations)
    return json_format.ParseDict(tree, catalog_pb2.Catalog())


def _invalid(violations: list[Violation]) -> TsugiError:
    first = violations[0]
    return TsugiError(
        ErrorReason.ERROR_REASON_CATALOG_INVALID,
        f"the catalog has {len(violations)} faults, first {first.path or 'the document'}: {first.description}",
        violations=violations[:VIOLATIONS_MAX],
        faults=len(violations),
    )


class _FaultError(Exception):
    """One value is wrong; its neighbours are still read."""

    def __init__(self, path: str, description: str, node: Node | None = None) -> None:
        super().__init__(path)
        line = "" if node is None else f" (line {node.start_mark.line + 1})"
        self.violation = Violation(path, f"{description}{line}")


class _StopReadingError(Exception):
    """Reading on would cost more than it tells."""


class _Reader:
    """Walks the document along the message's descriptor and collects what does not fit."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._seen: set[int] = set()  # of nodes; an aliased node is the same object again
        self._n_aliased = 0

    def read(self, text: str) -> Any:
        """Return the tree that the JSON mapping takes; complete only when there are no violations."""
        try:
            return self._collect(self._document, text)
        except _StopReadingError:
            return None

    def _collect(self, read: Callable[..., Any], *arguments: object) -> Any:
        try:
            return read(*arguments)
        except _FaultError as fault:
            self._report(fault)
            return None

    def _report(self, fault: _FaultError) -> None:
        self.violations.append(fault.violation)
        if len(self.violations) == VIOLATIONS_MAX:
            raise _StopReadingError

    def _document(self, text: str) -> dict[str, Any]:
        if len(text.encode(errors="surrogatepass")) > DOCUMENT_BYTES_MAX:
            raise _FaultError("", f"at most {DOCUMENT_BYTES_MAX} bytes")
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = DOCUMENT_DEPTH_MAX
        yaml.composer.warn_double_anchors = False  # YAML allows it, and a warning is no way to tell anybody
        try:
            root = yaml.compose(text)
        except MaxDepthExceededError:
            raise _FaultError("", f"nested deeper than {DOCUMENT_DEPTH_MAX} levels") from None
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise _FaultError("", f"not YAML: {where}{error.problem or error.context}") from None
        except YAMLError as error:
            raise _FaultError("", f"not YAML: {str(error).partition(chr(10))[0]}") from None
        except (ValueError, OverflowError):  # the parser converts escapes such as \UFFFFFFFF unchecked
            raise _FaultError("", "not YAML: an escape sequence names no character") from None
        if root is None:
            raise _FaultError("", "the document is empty")
        return self._message(root, catalog_pb2.DESCRIPTOR.message_types_by_name["Catalog"], "")

    def _message(self, node: Node, descriptor: Descriptor, path: str) -> dict[str, Any]:
        fields = {field.json_name: field for field in descriptor.fields}
        names = {**fields, **descriptor.fields_by_name}
        message: dict[str, Any] = {}
        chosen: dict[str, str] = {}
        for name, value, value_path in self._entries(node, path):
            field = names.get(name)
            if field is None:
                self._report(_FaultError(value_path, f"no such field{_meant(name, fields)}", value))
            elif field.json_name in message:
                self._report(_FaultError(value_path, "the field stands here under both its names", value))
            elif value.tag != f"{_TAG}null":  # the same as absent, as in JSON
                message[field.json_name] = self._collect(self._field, field, value, value_path)
                oneof = field.containing_oneof
                if oneof is not None and chosen.setdefault(oneof.name, name) != name:
                    self._report(
                        _FaultError(value_path, f"not beside {chosen[oneof.name]}; only one may be set", value)
                    )
        return message

    def _field(self, field: FieldDescriptor, node: Node, path: str) -> Any:
        if not field.is_repeated:
            return self._value(field, node, path)
        if not isinstance(node, SequenceNode):
            raise _FaultError(path, "a list is expected, each entry after a dash", node)
        self._enter(node, path)
        return [self._collect(self._value, field, each, f"{path}[{i}]") for i, each in enumerate(node.value)]

    def _value(self, field: FieldDescriptor, node: Node, path: str) -> Any:
        kind = field.message_type
        if kind is None:
            return self._scalar(field, node, path)
        if kind.full_name == Struct.DESCRIPTOR.full_name:
            return {name: self._collect(self._content, *entry, 1) for name, *entry in self._entries(node, path)}
        if kind.full_name not in _WELL_KNOWN:
            return self._message(node, kind, path)
        well_known, example = _WELL_KNOWN[kind.full_name]
        value = self._plain(node, path)
        try:
            well_known().FromJsonString(value if isinstance(value, str) else "")
        except (ValueError, OverflowError):  # a span of 1e400s overflows inside protobuf
            raise _FaultError(path, f"{example}, is expected, got {_shown(node)}", node) from None
        return value

    def _scalar(self, field: FieldDescriptor, node: Node, path: str) -> Any:
        value = self._plain(node, path)
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if not isinstance(value, str):
                raise _FaultError(path, f"text is expected, got {_shown(node)}; quote it", node)
            case FieldDescriptor.CPPTYPE_BOOL if not isinstance(value, bool):
                raise _FaultError(path, f"true or false is expected, got {_shown(node)}", node)
            case FieldDescriptor.CPPTYPE_STRING | FieldDescriptor.CPPTYPE_BOOL:
                return value
        if field.enum_type is not None:
            if value not in field.enum_type.values_by_name:
                hint = _enum_meant(str(value), field.enum_type)
                raise _FaultError(path, f"{_shown(node)} is no {field.enum_type.name}{hint}", node)
            return value
        if isinstance(value, str) and _JSON_NUMBER.match(value):  # the JSON mapping writes 64-bit integers as text
            value = _number(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _FaultError(path, f"a number is expected, got {_shown(node)}", node)
        if field.cpp_type in _INTEGERS:
            least, most = _INTEGERS[field.cpp_type]
            if value != int(value) or not least <= value <= most:
                raise _FaultError(path, f"a whole number from {least} to {most} is expected, got {_shown(node)}", node)
        return value

    def _content(self, node: Node, path: str, depth: int) -> Any:
        """Read a free-form value, as a Struct holds it."""
        if depth > CONTENT_DEPTH_MAX:
            raise _FaultError(path, f"nested deeper than {CONTENT_DEPTH_MAX} levels", node)
        if isinstance(node, MappingNode):
            return {name: self._collect(self._content, *entry, depth + 1) for name, *entry in self._entries(node, path)}
        if isinstance(node, SequenceNode):
            self._enter(node, path)
            return [self._collect(self._content, each, f"{path}[{i}]", depth + 1) for i, each in enumerate(node.value)]
        value = self._plain(node, path)
        if isinstance(value, int) and int(float(value)) != value:
            raise _FaultError(path, f"{_shown(node)} has more digits than a number keeps; quote it", node)
        return value

    def _entries(self, node: Node, path: str) -> Iterator[tuple[str, Node, str]]:
        """Yield the name, value and path of each entry of a mapping."""
        if not isinstance(node, MappingNode):
            raise _FaultError(path, "names with values are expected here, such as name: …", node)
        self._enter(node, path)
        names: set[str] = set()
        for key, value in node.value:
            name = self._collect(self._name, key, path)
            if name is None:
                continue
            shown = name[:64] if name.isprintable() else repr(name[:64])
            entry_path = f"{path}.{shown}" if path else shown
            if name in names:
                self._report(_FaultError(entry_path, "stands here twice", key))
                continue
            names.add(name)
            yield name, value, entry_path

    def _name(self, node: Node, path: str) -> str:
        name = self._plain(node, path)
        if not isinstance(name, str):
            raise _FaultError(path, f"{_shown(node)} is no name; quote it if it is meant to be one", node)
        return name

    def _plain(self, node: Node, path: str) -> bool | float | str | None:
        self._enter(node, path)
        if not isinstance(node, ScalarNode):
            raise _FaultError(path, "a single value is expected here", node)
        text: str = node.value
        match str(node.tag).removeprefix(_TAG):
            case "str" | "timestamp" | "value":  # a date is text to YAML 1.2, and to JSON
                try:
                    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16")
                except UnicodeDecodeError:  # JSON escapes a rare character as two halves; one alone is none
                    raise _FaultError(path, "half a surrogate pair is no character", node) from None
            case "null":
                return None
            case "bool" if text.lower() in _BOOLEANS:
                return _BOOLEANS[text.lower()]
            case "int" | "float" if _JSON_NUMBER.match(text) and math.isfinite(_number(text)):
                return _number(text)
            case "int" | "float" | "bool":
                raise _FaultError(path, f"{_shown(node)} is no number or boolean of JSON; quote it if it is text", node)
            case "merge":
                raise _FaultError(path, "merging (<<) is not taken; write the fields out", node)
        raise _FaultError(path, _NO_TAGS, node)

    def _enter(self, node: Node, path: str) -> None:
        """Bound what aliases repeat: a few lines of them can stand for billions of values."""
        self._n_aliased += id(node) in self._seen
        self._seen.add(id(node))
        if self._n_aliased > ALIASED_NODES_MAX:
            self._report(_FaultError(path, f"aliases (*) repeat more than {ALIASED_NODES_MAX} values", node))
            raise _StopReadingError
        if not isinstance(node, ScalarNode) and node.tag not in _COLLECTIONS:
            raise _FaultError(path, _NO_TAGS, node)


def _number(text: str) -> float:
    """Return a JSON number, whole ones as int; infinite when it is too large for a float."""
    number = float(text)
    return int(text) if math.isfinite(number) and text.lstrip("-").isdigit() else number


def _shown(node: Node) -> str:
    """Return a value as the document has it, cut to what fits a line."""
    if not isinstance(node, ScalarNode):
        return "several values"
    return repr(node.value[:64]) if node.value else "nothing"


def _meant(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:64], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _enum_meant(name: str, enum: EnumDescriptor) -> str:
    """Suggest the value with this ending, else the nearest, else all (but the first, which means none)."""
    names = [value.name for value in enum.values[1:]]
    ending = f"_{name.upper()}"
    return next((f"; did you mean {each}?" for each in names if each.endswith(ending)), "") or (
        _meant(name.upper(), names) or f"; one of {', '.join(names)} is expected"
    )
