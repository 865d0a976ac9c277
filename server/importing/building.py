"""A mapping compiled against a catalog and a file's columns: from a row's cells to its source record.

``Builder`` is made once a file; ``build`` is called a row and gives the record, or every fault that keeps it back, each
with the column it stands in. The same cells always give the same record, byte for byte, for it is idempotent by its id.

Cost: 10 to 20 µs a row of ten cells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from server.errors import TsugiError
from server.importing.conversion import Setter, fill_time, identity_text, setter, word
from server.importing.faults import Fault, RejectReason, RowFault
from server.importing.mapping import EventColumns, FactColumn, Mapping
from server.importing.rows import Cells, Row
from server.rpc import validate
from tsugi.v1.catalog_pb2 import Attribute, Catalog
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.item_error_pb2 import ItemError
from tsugi.v1.profile_pb2 import ConsentDecision
from tsugi.v1.profile_service_pb2 import SourceRecord
from tsugi.v1.value_pb2 import Value

RECORD_ID_BYTES_MAX: Final = 128

Getter: TypeAlias = Callable[[Any], Any]  # from a row's cells to one of them; None where nothing is stated

_PLACE_IN_LIST: Final = re.compile(r"(identities|consents)\[(\d{1,3})\]")


class _Fact(NamedTuple):
    name: str
    column: str
    get: Getter
    put: Setter


class _Consent(NamedTuple):
    purpose: str
    channel: str
    column: str
    get: Getter
    states: dict[str, ConsentDecision]
    effective_time: _Time | None


class _Time(NamedTuple):
    column: str
    get: Getter


class Builder:
    """Makes source records of a file's rows.

    Args:
        mapping: checked against this catalog.
        catalog: in force.
        source: whose records they are.
        columns: the file's own columns in order; None where cells stand by name.
        id_prefix: begins the ids of records whose mapping has no template; followed by the row's line.
    """

    def __init__(
        self, mapping: Mapping, catalog: Catalog, source: str, columns: Sequence[str] | None, id_prefix: str
    ) -> None:
        self._getters = _at(columns)
        self._mapping = mapping
        self._source = source
        self._id_prefix = id_prefix
        self._id_parts = [
            (before, column, self._getters(column) if column else None) for before, column in mapping.record_id
        ]
        self._observation_time = self._time(mapping.observation_time)
        self._identities = [(each.namespace, each.column, self._getters(each.column)) for each in mapping.identities]
        declared = {attribute.name: attribute for attribute in catalog.profile_attributes}
        self._currency = catalog.currency_code
        self._attributes = self._facts(mapping.attributes, declared)
        self._consents = [
            _Consent(
                each.purpose,
                each.channel,
                each.column,
                self._getters(each.column),
                dict.fromkeys(each.granted, ConsentDecision.CONSENT_DECISION_GRANTED)
                | dict.fromkeys(each.withdrawn, ConsentDecision.CONSENT_DECISION_WITHDRAWN),
                self._time(each.effective_time),
            )
            for each in mapping.consents
        ]
        event = mapping.event
        self._when = self._getters(event.when_column) if event and event.when_column else None
        self._type = self._getters(event.type_column) if event and event.type_column else None
        self._types = dict(event.type_values) if event else {}
        self._occurrence_time = self._time(event.occurrence_time) if event else None
        # Of each event type: the properties it has, and those of other types, which must not be stated with it.
        self._properties: dict[str, tuple[list[_Fact], list[tuple[str, str, Getter]]]] = {}
        allowed = {name for each in catalog.sources if each.name == source for name in each.event_types}
        for kind in catalog.event_types if event else ():
            if allowed and kind.name not in allowed:
                continue
            known = {each.name: each for each in kind.properties}
            stated = event.properties if event else ()
            self._properties[kind.name] = (
                self._facts([each for each in stated if each.name in known], known),
                [(each.name, each.column, self._getters(each.column)) for each in stated if each.name not in known],
            )

    def build(self, row: Row) -> SourceRecord | Fault:
        """Make a row's record, or say all that keeps it back; of a row that can be read."""
        cells = row.cells
        assert cells is not None, "a row without cells was rejected before"
        record = SourceRecord(source=self._source)
        faults: list[Fault] = []
        self._add_identities(record, cells, faults)
        if self._attributes:
            _put_facts(self._attributes, record.attributes, cells, faults)
        if self._observation_time is not None:
            self._fill(record.observation_time, self._observation_time, cells, faults)
        if self._mapping.event is not None:
            self._add_event(record, self._mapping.event, cells, faults)
        if self._consents:
            self._add_consents(record, cells, faults)
        try:
            record.record_id = self._record_id(row)
        except RowFault as fault:
            faults.append(fault.told())
        if faults:
            first, *further = dict.fromkeys(faults)  # one cell may be read for two things
            return first._replace(further=tuple(further))
        return record

    def try_out(self, row: Row, now_us: int) -> SourceRecord | Fault:
        """Make a row's record as build does, and hold it against those of the server's rules that need no state."""
        made = self.build(row)
        if isinstance(made, SourceRecord):
            try:
                validate.source_record(made, now_us)
            except TsugiError as error:
                told = ItemError(reason=error.reason, message=error.message, metadata=error.metadata)
                return self.refusal(told, made)
        return made

    def column_of(self, error: ItemError, record: SourceRecord) -> str:
        """Return the column that the server's refusal of a record is about; empty when it is about none."""
        field = error.metadata.get("field", "")
        if found := _PLACE_IN_LIST.match(field):
            return self._listed(found[1], int(found[2]), field, record)
        group, _, name = field.rpartition(".")
        event = self._mapping.event
        if group == "attributes":
            return next((each.column for each in self._mapping.attributes if each.name == name), "")
        if event is not None and group == "event.properties":
            return next((each.column for each in event.properties if each.name == name), "")
        times = {"observation_time": self._observation_time, "event.occurrence_time": self._occurrence_time}
        time = times.get(field)
        return time.column if time is not None else ""

    def refusal(self, error: ItemError, record: SourceRecord) -> Fault:
        """Return the server's refusal of a record as a fault of its row."""
        reason = (
            ErrorReason.Name(error.reason) if error.reason in ErrorReason.values() else str(error.reason)
        ).removeprefix("ERROR_REASON_")
        return Fault(reason, self.column_of(error, record), error.message)

    def record_id(self, row: Row) -> str:
        """Return the id that a row's record has or would have; empty when its columns do not state one."""
        if self._id_parts and row.cells is None:
            return ""
        try:
            return self._record_id(row)
        except RowFault:
            return row.record_id

    def _listed(self, group: str, position: int, field: str, record: SourceRecord) -> str:
        if group == "identities" and position < len(record.identities):
            namespace = record.identities[position].namespace
            return next((column for name, column, _ in self._identities if name == namespace), "")
        if group == "consents" and position < len(record.consents):
            stated = record.consents[position].purpose, record.consents[position].channel
            consent = next((each for each in self._consents if (each.purpose, each.channel) == stated), None)
            if consent is not None and consent.effective_time is not None and field.endswith(".effective_time"):
                return consent.effective_time.column
            return consent.column if consent is not None else ""
        return ""

    def _add_identities(self, record: SourceRecord, cells: Cells, faults: list[Fault]) -> None:
        for namespace, column, get in self._identities:
            cell = get(cells)
            if cell is not None:
                try:
                    record.identities.add(namespace=namespace, value=identity_text(cell))
                except RowFault as fault:
                    faults.append(fault.told(column))
        if not record.identities and not faults:
            wanted = " or ".join(column for _, column, _ in self._identities[:4])
            faults.append(Fault(RejectReason.IDENTITY_MISSING, "", f"it says of nobody; {wanted} must be stated"))

    def _add_event(self, record: SourceRecord, event: EventColumns, cells: Cells, faults: list[Fault]) -> None:
        try:
            if self._when is not None:
                cell = self._when(cells)
                if cell is None or _word(cell, event.when_column) not in event.when_equals:
                    return
            kind = event.type or self._event_type(event.type_column, cells)
        except RowFault as fault:
            faults.append(fault.told())
            return
        if not kind:
            return
        record.event.type = kind
        if self._occurrence_time is not None:
            self._fill(record.event.occurrence_time, self._occurrence_time, cells, faults)
        facts, others = self._properties[kind]
        if facts:
            _put_facts(facts, record.event.properties, cells, faults)
        for name, column, get in others:
            if get(cells) is not None:
                told = f"an event of type {kind} has no property {name}; leave it empty"
                faults.append(Fault(RejectReason.VALUE_INVALID, column, told))

    def _event_type(self, column: str, cells: Cells) -> str:
        assert self._type is not None, "an event has a type or a column that tells it"
        cell = self._type(cells)
        if cell is None:
            return ""
        text = _word(cell, column)
        kind = self._types.get(text, "") if self._types else text
        if kind not in self._properties:
            known = list(self._types or self._properties)
            raise RowFault(f"one of {', '.join(known[:8])} is expected", column)
        return kind

    def _add_consents(self, record: SourceRecord, cells: Cells, faults: list[Fault]) -> None:
        for purpose, channel, column, get, states, effective_time in self._consents:
            cell = get(cells)
            if cell is None:
                continue
            try:
                state = states.get(_word(cell, column))
                if state is None:
                    raise RowFault(f"one of {', '.join(states)} is expected", column)
            except RowFault as fault:
                faults.append(fault.told())
                continue
            consent = record.consents.add(purpose=purpose, channel=channel, state=state)
            if effective_time is not None:
                self._fill(consent.effective_time, effective_time, cells, faults)

    def _record_id(self, row: Row) -> str:
        texts = []
        if not self._id_parts:
            texts.append(identity_text(row.record_id) if row.record_id else f"{self._id_prefix}{row.line}")
        for before, column, get in self._id_parts:
            texts.append(before)
            if get is not None:
                cell = get(row.cells)
                if cell is None:
                    message = "it is part of the record's id and must be stated"
                    raise RowFault(message, column, RejectReason.RECORD_ID_INVALID)
                try:
                    texts.append(identity_text(cell))
                except RowFault as fault:
                    raise RowFault(str(fault), column, RejectReason.RECORD_ID_INVALID) from None
        record_id = "".join(texts)
        if len(record_id.encode()) > RECORD_ID_BYTES_MAX:
            raise RowFault(f"a record id has at most {RECORD_ID_BYTES_MAX} bytes", "", RejectReason.RECORD_ID_INVALID)
        return record_id

    def _facts(self, columns: Sequence[FactColumn], declared: dict[str, Attribute]) -> list[_Fact]:
        form = self._mapping.form
        return [
            _Fact(
                each.name,
                each.column,
                self._getters(each.column),
                setter(declared[each.name], each, form, self._currency),
            )
            for each in columns
        ]

    def _time(self, column: str) -> _Time | None:
        return _Time(column, self._getters(column)) if column else None

    def _fill(self, timestamp: Timestamp, time: _Time, cells: Cells, faults: list[Fault]) -> None:
        cell = time.get(cells)
        if cell is not None:
            try:
                fill_time(timestamp, cell, self._mapping.form)
            except RowFault as fault:
                faults.append(fault.told(time.column))


def _put_facts(facts: list[_Fact], values: MutableMapping[str, Value], cells: Cells, faults: list[Fault]) -> None:
    for name, column, get, put in facts:
        cell = get(cells)
        if cell is not None:
            try:
                put(values[name], cell)
            except RowFault as fault:
                faults.append(fault.told(column))


def _word(cell: Any, column: str) -> str:
    try:
        return word(cell)
    except RowFault as fault:
        fault.column = column
        raise


def _at(columns: Sequence[str] | None) -> Callable[[str], Getter]:
    """Return what makes getters: by position where there is a header, else by name or path."""
    if columns is None:
        return _by_path
    positions = {name: i for i, name in enumerate(columns)}

    def by_position(column: str) -> Getter:
        i = positions[column]

        def get(cells: Sequence[str]) -> str | None:
            cell = cells[i]
            return cell if cell and not cell.isspace() else None

        return get

    return by_position


def _by_path(column: str) -> Getter:
    steps = column.split(".")

    def get(cells: Any) -> Any:
        cell = cells.get(column)
        if cell is None and len(steps) > 1:
            cell = cells
            for step in steps:
                cell = cell.get(step) if isinstance(cell, dict) else None
        return None if isinstance(cell, str) and (not cell or cell.isspace()) else cell

    return get
