"""From a row to its source record: everything the mapping says, and of a bad row its line's column."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from server.importing.building import Builder
from server.importing.faults import Fault
from server.importing.mapping import load_mapping
from server.importing.rows import Row
from tests.unit.importing.support import BY_LINE, MAPPING, catalog
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.item_error_pb2 import ItemError
from tsugi.v1.profile_service_pb2 import SourceRecord

COLUMNS = ["order_no", "cust_no", "browser", "age", "club", "kind", "ordered_at", "updated_at", "total", "optin"]
FULL = dict(zip(COLUMNS, ["o1", "c1", "b1", "31", "y", "order", "2026-02-03", "2026-02-04", "9.5", "yes"], strict=True))


def built(mapping: str = MAPPING, *, record_id: str = "", **cells: str) -> SourceRecord | Fault:
    builder = Builder(load_mapping(mapping), catalog(), "crm", COLUMNS, "digest:")
    values = [(FULL | cells)[name] for name in COLUMNS]
    return builder.build(Row(7, 0, 0, values, None, b"", record_id))


def built_of_tree(mapping: str, tree: dict[str, Any]) -> SourceRecord | Fault:
    return Builder(load_mapping(mapping), catalog(), "crm", None, "digest:").build(Row(7, 0, 0, tree, None, b"", ""))


def as_json(record: SourceRecord | Fault) -> Any:
    assert isinstance(record, SourceRecord), record
    return json_format.MessageToDict(record)


def test_row_becomes_all_the_mapping_says() -> None:
    assert as_json(built()) == {
        "recordId": "o1",
        "source": "crm",
        "identities": [
            {"namespace": "customer_number", "value": "c1"},
            {"namespace": "browser_id", "value": "b1"},
        ],
        "attributes": {"age": {"numberValue": 31.0}, "member": {"boolValue": True}},
        "event": {
            "type": "purchase",
            "occurrenceTime": "2026-02-03T00:00:00Z",
            "properties": {"total": {"numberValue": 9.5}},
        },
        "consents": [{"purpose": "marketing", "channel": "mail", "state": "CONSENT_DECISION_GRANTED"}],
        "observationTime": "2026-02-04T00:00:00Z",
    }


def test_empty_cells_state_nothing() -> None:
    record = as_json(built(browser="", age=" ", club="", kind="", updated_at="", optin=""))
    assert set(record) == {"recordId", "source", "identities"}
    assert len(record["identities"]) == 1


@pytest.mark.parametrize(
    ("cells", "reason", "column"),
    [
        ({"age": "old"}, "VALUE_INVALID", "age"),
        ({"club": "perhaps"}, "VALUE_INVALID", "club"),
        ({"ordered_at": "2026-02-30"}, "VALUE_INVALID", "ordered_at"),
        ({"updated_at": "soon"}, "VALUE_INVALID", "updated_at"),
        ({"total": "1,234.5"}, "VALUE_INVALID", "total"),
        ({"optin": "maybe"}, "VALUE_INVALID", "optin"),
        ({"cust_no": "x" * 300}, "VALUE_INVALID", "cust_no"),
        ({"cust_no": "", "browser": ""}, "IDENTITY_MISSING", ""),
        ({"order_no": ""}, "RECORD_ID_INVALID", "order_no"),
        ({"order_no": "x" * 129}, "RECORD_ID_INVALID", ""),
    ],
)
def test_bad_cell_keeps_its_row_back_and_names_its_column(cells: dict[str, str], reason: str, column: str) -> None:
    fault = built(**cells)
    assert isinstance(fault, Fault)
    assert (fault.reason, fault.column) == (reason, column)


def test_all_that_is_wrong_with_a_row_is_found_at_once_and_each_cell_once() -> None:
    mapping = MAPPING.replace("occurrenceTime: {column: ordered_at}", "occurrenceTime: {column: updated_at}")
    found = built(mapping, age="old", updated_at="soon", total="much", optin="maybe", order_no="")
    assert isinstance(found, Fault)
    assert found.columns() == "age, updated_at, total, optin, order_no"
    assert len(found.further) == 4
    assert found.told().startswith("age: a number such as 1234.5 is expected; updated_at: an instant such as ")


def test_record_without_a_template_is_named_by_file_and_line_or_by_what_it_was_before() -> None:
    assert as_json(built(BY_LINE))["recordId"] == "digest:7"
    assert as_json(built(BY_LINE, record_id="older:3"))["recordId"] == "older:3"
    assert as_json(built(record_id="older:3"))["recordId"] == "o1"


def test_event_type_may_come_from_a_column() -> None:
    typed = f"""
{BY_LINE}
event:
  type: {{column: kind, values: {{order: purchase, view: page_view}}}}
  properties: {{total: {{column: total}}}}
"""
    assert as_json(built(typed))["event"]["type"] == "purchase"
    assert as_json(built(typed, kind="view", total=""))["event"] == {"type": "page_view"}
    assert "event" not in as_json(built(typed, kind=""))
    assert built(typed, kind="return") == Fault("VALUE_INVALID", "kind", "one of order, view is expected")
    refused = built(typed, kind="view")
    assert isinstance(refused, Fault) and refused.column == "total"  # it would be lost in silence


def test_cells_are_found_by_path_in_nested_rows() -> None:
    mapping = """
identities: [{namespace: customer_number, column: customer.id}]
attributes: {tags: {column: customer.tags}, age: {column: "flat.age"}, surname: {column: a.b.c}}
"""
    record = as_json(built_of_tree(mapping, {"customer": {"id": 4711, "tags": ["vip"]}, "flat.age": 3, "a": {"b": 1}}))
    assert record["identities"][0]["value"] == "4711"
    assert record["attributes"] == {"tags": {"setValue": {"values": ["vip"]}}, "age": {"numberValue": 3.0}}
    assert isinstance(built_of_tree(mapping, {"customer": {"id": 4711.0}}), Fault)


def test_refusal_of_the_server_is_told_with_its_column() -> None:
    mapping = MAPPING.replace('withdrawn: ["no"]', 'withdrawn: ["no"], effectiveTime: {column: optin_at}')
    builder = Builder(load_mapping(mapping), catalog(), "crm", [*COLUMNS, "optin_at"], "")
    record = built()
    assert isinstance(record, SourceRecord)
    for field, column in {
        "attributes.age": "age",
        "event.properties.total": "total",
        "event.occurrence_time": "ordered_at",
        "observation_time": "updated_at",
        "identities[1].value": "browser",
        "identities[9].value": "",
        "consents[0].state": "optin",
        "consents[0].effective_time": "optin_at",
        "record_id": "",
    }.items():
        error = ItemError(reason=ErrorReason.ERROR_REASON_FIELD_INVALID, message="no", metadata={"field": field})
        assert builder.refusal(error, record) == Fault("FIELD_INVALID", column, "no")


def test_event_type_of_a_column_is_one_the_source_may_report() -> None:
    typed = f"{BY_LINE}\nevent: {{type: {{column: kind}}}}"
    builder = Builder(load_mapping(typed), catalog(), "narrow", COLUMNS, "")
    values = [(FULL | {"kind": "purchase"})[name] for name in COLUMNS]
    assert builder.build(Row(7, 0, 0, values, None, b"", "")) == Fault(
        "VALUE_INVALID", "kind", "one of page_view is expected"
    )
