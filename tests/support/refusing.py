"""A catalog, two people and one decision for tests of what is refused, and one valid request for every unary method.

``World`` is what bad requests are made from; each of them is a valid one with one thing wrong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf import json_format
from google.protobuf.message import Message

from tests.support import catalogs
from tests.support.wire import request_class
from tsugi.client import Client, source_record
from tsugi.v1.catalog_pb2 import Catalog

PERSON = {"namespace": "customer_number", "value": "known"}
OTHER_PERSON = {"namespace": "customer_number", "value": "other"}


class World(NamedTuple):
    """What a running server knows."""

    decision_id: str
    action: str  # which that decision chose
    record_lsn: int  # of no configuration change


def catalog() -> Catalog:
    """Build a catalog with a fact of every type on every side."""
    facts: list[dict[str, Any]] = [
        {"name": "hour", "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0, "maximum": 23},
        {"name": "device", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["phone", "desktop"]},
        {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL"},
        {"name": "note", "type": "ATTRIBUTE_TYPE_TEXT"},
        {"name": "since", "type": "ATTRIBUTE_TYPE_TIME"},
    ]
    return catalogs.message(
        profileAttributes=facts, contextAttributes=facts, eventTypes=[{"name": "visit", "properties": facts}]
    )


def make_world(client: Client) -> World:
    """Push the catalog, have both people known, and decide once."""
    client.push_catalog(catalog())
    records = [
        source_record(each["value"], "crm", {each["namespace"]: each["value"]}) for each in (PERSON, OTHER_PERSON)
    ]
    record_lsn = client.ingest_records(records).lsn
    reply = client.decide({"greedy": 1}, durable=True)
    return World(reply.decision_id, reply.slots[0].action, record_lsn)


def outcome(world: World, **changes: Any) -> dict[str, Any]:
    """Return a valid outcome, changed, as JSON has it."""
    valid = {"decisionId": world.decision_id, "action": world.action, "outcomeId": "o", "type": "order", "value": 5}
    return valid | changes


def source(**changes: Any) -> dict[str, Any]:
    """Return a valid source record, changed."""
    valid = {
        "recordId": "r",
        "source": "crm",
        "identities": [PERSON],
        "attributes": {"hour": {"numberValue": 5}},
        "event": {"type": "visit", "properties": {"hour": {"numberValue": 5}}},
    }
    return valid | changes


def valid(method: str, world: World) -> dict[str, Any]:
    """Return one valid request of a unary method, as JSON has it; every field that may repeat does."""
    return {
        "Decide": {
            "identities": [PERSON],
            "placements": [{"placement": "greedy", "count": 1}],
            "context": {"hour": {"numberValue": 5}},
            "candidateActions": ["action_0"],
            "excludedActions": ["action_1"],
        },
        "ReportOutcome": outcome(world),
        "BatchReportOutcomes": {"outcomes": [outcome(world)]},
        "IngestRecords": {"records": [source()]},
        "GetProfile": {"identity": PERSON},
        "GetCatalog": {},
        "ListCatalogRevisions": {},
        "RollbackCatalog": {},
        "ListModelRevisions": {},
        "AssignModelRole": {"role": "MODEL_ROLE_CHAMPION"},
        "RollbackModel": {"role": "MODEL_ROLE_CHAMPION"},
    }[method]


def request(method: str, world: World, **changes: Any) -> Message:
    """Build a valid request of a unary method with changes."""
    return json_format.ParseDict(valid(method, world) | changes, request_class(method)())
