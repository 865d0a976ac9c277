"""A mapping before the first row is read: does everything it names exist, in the catalog and in the file?

Every fault is found at once, each with its path in the mapping and the name that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

from server.errors import Violation
from server.importing.faults import refused
from server.importing.mapping import FactColumn, Mapping, meant
from tsugi.v1.catalog_pb2 import Attribute, AttributeType, Catalog, Source

IDENTITIES_MAX: Final = 16
CONSENTS_MAX: Final = 64

_DELIMITERS: Final = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z_ .-]{0,63}")
_NO_NAME: Final = re.compile(r"^\s*\d|[@\"'{}]")  # a number, a date, an address, quoted text, JSON

_BOOL: Final = AttributeType.ATTRIBUTE_TYPE_BOOL
_SPLIT: Final = frozenset({AttributeType.ATTRIBUTE_TYPE_SET, AttributeType.ATTRIBUTE_TYPE_VECTOR})
_RENAMED: Final = frozenset(
    {AttributeType.ATTRIBUTE_TYPE_CATEGORY, AttributeType.ATTRIBUTE_TYPE_TEXT, AttributeType.ATTRIBUTE_TYPE_SET}
)


def check_mapping(mapping: Mapping, catalog: Catalog, source: str) -> None:
    """Refuse a mapping that names what the catalog does not have, or the source may not write.

    Raises:
        TsugiError: FIELD_INVALID with every fault as a violation.
    """
    check = _Check(mapping, catalog, source)
    if check.faults:
        raise refused("the mapping", check.faults)


def check_columns(mapping: Mapping, columns: Sequence[str] | None, file_name: str) -> None:
    """Refuse a file whose header lacks a column that the mapping reads, or has it twice; nothing without a header.

    Raises:
        TsugiError: FIELD_INVALID with every fault as a violation.
    """
    if columns is None:
        return
    faults = []
    wanted = mapping.columns()
    only = columns[0] if len(columns) == 1 and columns[0] not in wanted else ""
    mark = max(_DELIMITERS, key=only.count)
    if mark in only and not only.startswith("{"):
        told = f"the header of {file_name} is one cell, with {_DELIMITERS[mark]} in it; state csv.delimiter"
        raise refused("the mapping", [Violation("csv.delimiter", told)])
    names = _names(columns)
    if not names and not set(columns) & wanted.keys():
        told = f"it does not look like a header, with columns that the mapping reads, such as {next(iter(wanted))!r}"
        raise refused(file_name, [Violation(f"{file_name}:1", told)])
    for column, path in wanted.items():
        count = columns.count(column)
        if count == 0:
            faults.append(Violation(path, f"{file_name} has no column {column!r}{meant(column, names)}"))
        elif count > 1:
            faults.append(Violation(path, f"{file_name} has {count} columns {column!r}; rename all but one"))
    if faults:
        raise refused("the mapping", faults)


def _names(columns: Sequence[str]) -> list[str]:
    """Return what may be repeated of a first row: nothing where it may be somebody's data in place of a header."""
    if any(_NO_NAME.search(column) for column in columns):
        return []
    return [column for column in columns if _NAME.fullmatch(column)]


class _Check:
    def __init__(self, mapping: Mapping, catalog: Catalog, source: str) -> None:
        self.faults: list[Violation] = []
        sources = {each.name: each for each in catalog.sources}
        self._known("--source", "source", source, sources)
        self._source = sources.get(source, Source())
        self._identities(mapping, catalog)
        attributes = {each.name: each for each in catalog.profile_attributes}
        for column in mapping.attributes:
            if self._known(column.path, "profile attribute", column.name, attributes):
                self._allowed(column.path, "attribute", column.name, self._source.attributes)
                self._fact(column, attributes[column.name])
        self._event(mapping, catalog)
        self._consents(mapping, catalog)
        if mapping.form.currency not in {"", catalog.currency_code}:
            self._fault("csv.currency", f"the catalog's currency is {catalog.currency_code}, another is not taken")

    def _identities(self, mapping: Mapping, catalog: Catalog) -> None:
        namespaces = [each.name for each in catalog.identity_namespaces]
        if len(mapping.identities) > IDENTITIES_MAX:
            self._fault("identities", f"at most {IDENTITIES_MAX} are taken")
        for identity in mapping.identities:
            path = f"{identity.path}.namespace"
            if self._known(path, "identity namespace", identity.namespace, namespaces):
                self._allowed(path, "identity namespace", identity.namespace, self._source.identity_namespaces)

    def _event(self, mapping: Mapping, catalog: Catalog) -> None:
        event = mapping.event
        if event is None:
            return
        declared = {each.name: each for each in catalog.event_types}
        chosen = (
            [("type", event.type)]
            if event.type
            else [(f"type.values.{text}", name) for text, name in event.type_values]
        )
        for key, name in chosen:
            path = f"{event.path}.{key}"
            if self._known(path, "event type", name, declared):
                self._allowed(path, "event type", name, self._source.event_types)
        kinds = [declared[name] for _, name in chosen if name in declared] or list(declared.values())
        for column in event.properties:
            properties = {each.name: each for kind in kinds for each in kind.properties}
            if self._known(column.path, "event property", column.name, properties):
                for kind in kinds:
                    for each in kind.properties:
                        if each.name == column.name:
                            self._fact(column, each)

    def _consents(self, mapping: Mapping, catalog: Catalog) -> None:
        purposes = [each.name for each in catalog.consent_purposes]
        channels = [each.name for each in catalog.channels]
        if len(mapping.consents) > CONSENTS_MAX:
            self._fault("consents", f"at most {CONSENTS_MAX} are taken")
        for consent in mapping.consents:
            self._known(f"{consent.path}.purpose", "consent purpose", consent.purpose, purposes)
            if consent.channel:
                self._known(f"{consent.path}.channel", "channel", consent.channel, channels)

    def _fact(self, column: FactColumn, attribute: Attribute) -> None:
        """Check what the mapping says of values against the type that is declared."""
        kind = AttributeType.Name(attribute.type).removeprefix("ATTRIBUTE_TYPE_").lower()
        if column.true_texts and attribute.type != _BOOL:
            self._fault(f"{column.path}.true", f"is for booleans, and {attribute.name} is a {kind}")
        if column.split and attribute.type not in _SPLIT:
            self._fault(f"{column.path}.split", f"is for sets and vectors, and {attribute.name} is a {kind}")
        if column.values and attribute.type not in _RENAMED:
            self._fault(f"{column.path}.values", f"is for categories, sets and texts, and {attribute.name} is a {kind}")
        for text, name in column.values if attribute.allowed_values else ():
            self._known(f"{column.path}.values.{text}", f"value of {attribute.name}", name, attribute.allowed_values)

    def _known(self, path: str, what: str, name: str, names: Collection[str]) -> bool:
        if name in names:
            return True
        near = meant(name, names) or (f"; there are {', '.join(list(names)[:8])}" if names else "; there is none")
        self._fault(path, f"the catalog has no {what} {name[:64]!r}{near}")
        return False

    def _allowed(self, path: str, what: str, name: str, allowed: Collection[str]) -> None:
        if allowed and name not in allowed:
            self._fault(path, f"the catalog does not let {self._source.name} write {what} {name!r}")

    def _fault(self, path: str, description: str) -> None:
        self.faults.append(Violation(path, description))
