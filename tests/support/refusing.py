"""A catalog, some people and one decision for tests of what is refused, and a valid request for every method.

Uploads are left out; they consist of parts. ``World`` is what bad requests are made from; each of them is a valid one
with one thing wrong.
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
OTHER_BROWSER = {"namespace": "browser_id", "value": "of the other"}
STRANGER = {"namespace": "customer_number", "value": "never heard of"}
SHARED = {"namespace": "email", "value": "office@example.com"}  # by more than may share one
N_SHARING = 3


class World(NamedTuple):
    """What a running server knows."""

    decision_id: str
    action: str  # which that decision chose
    record_lsn: int  # of no configuration change
    profile_id: str = "0" * 32  # of OTHER_PERSON, who has OTHER_BROWSER too
    erasure_id: str = "0" * 32  # of STRANGER


def catalog() -> Catalog:
    """Build a catalog with a fact of every type on every side, and a source that may say little."""
    facts: list[dict[str, Any]] = [
        {"name": "hour", "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0, "maximum": 23},
        {"name": "device", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["phone", "desktop"]},
        {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL"},
        {"name": "note", "type": "ATTRIBUTE_TYPE_TEXT"},
        {"name": "since", "type": "ATTRIBUTE_TYPE_TIME"},
    ]
    several: list[dict[str, Any]] = [
        {"name": "sports", "type": "ATTRIBUTE_TYPE_SET", "allowedValues": ["ski", "bike"]},
        {"name": "spend", "type": "ATTRIBUTE_TYPE_MONEY", "minimum": 0, "maximum": 100},
        {"name": "taste", "type": "ATTRIBUTE_TYPE_VECTOR", "dimensions": 2},
    ]
    return catalogs.message(
        identityNamespaces=[
            {"name": "customer_number", "valuesPerProfileMax": 1},
            {"name": "browser_id", "linkRule": "LINK_RULE_SHARED_DEVICE"},
            {"name": "email", "sharedMax": N_SHARING - 1},
            {"name": "order_number", "linkRule": "LINK_RULE_NEVER"},
        ],
        sources=[
            *catalogs.SOURCES,
            {
                "name": "narrow",
                "party": "PARTY_THIRD",
                "delivery": "DELIVERY_BATCH",
                "attributes": ["hour"],
                "eventTypes": ["visit"],
                "identityNamespaces": ["customer_number"],
            },
        ],
        consentPurposes=[{"name": "marketing"}],
        profileAttributes=facts + several,
        segments=[{"name": "members", "expression": "profile.member"}],
        contextAttributes=facts,
        eventTypes=[{"name": "visit", "properties": facts}, {"name": "call"}],
    )


def make_world(client: Client) -> World:
    """Push the catalog, have some people known and a stranger forgotten, and decide once."""
    client.push_catalog(catalog())
    known: list[list[dict[str, str]]] = [[PERSON], [OTHER_PERSON, OTHER_BROWSER]]
    known += [[{"namespace": "customer_number", "value": f"at the office {i}"}, SHARED] for i in range(N_SHARING)]
    records = [
        source_record(f"known {i}", "crm", [(each["namespace"], each["value"]) for each in person])
        for i, person in enumerate(known)
    ]
    record_lsn = client.ingest_records(records).lsn
    other = client.get_profile(identity=(OTHER_PERSON["namespace"], OTHER_PERSON["value"]), at_least_lsn=record_lsn)
    erasure = client.erase_profile("the stranger", identity=(STRANGER["namespace"], STRANGER["value"]))
    reply = client.decide({"greedy": 1}, durable=True)
    return World(reply.decision_id, reply.slots[0].action, record_lsn, other.profile.profile_id, erasure.erasure_id)


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
        "consents": [{"purpose": "marketing", "channel": "web", "state": "CONSENT_DECISION_GRANTED"}],
        "observationTime": "2026-01-01T00:00:00Z",
    }
    return valid | changes


def valid(method: str, world: World) -> dict[str, Any]:
    """Return one valid request of a method that takes no upload, as JSON has it; every field that may repeat does."""
    decide = {
        "identities": [PERSON],
        "placements": [{"placement": "greedy", "count": 1}],
        "context": {"hour": {"numberValue": 5}},
        "candidateActions": ["action_0"],
        "excludedActions": ["action_1"],
        "outcomes": [outcome(world)],
    }
    requests: dict[str, dict[str, Any]] = {
        "GetDecision": {"decisionId": world.decision_id, "view": "DECISION_VIEW_EXPLAINED"},
        "Decide": decide,
        "BatchDecide": {"requests": [decide]},
        "StreamDecide": {"request": decide},
        "SubscribeTriggers": {
            "name": "tests",
            "eventType": "visit",
            "filter": "event.hour < 24.0 && profile.hour >= 0.0",
            "delay": "1s",
            "placements": [{"placement": "greedy", "count": 1}],
            "context": {"hour": {"numberValue": 5}},
        },
        "ReportOutcome": outcome(world),
        "BatchReportOutcomes": {"outcomes": [outcome(world)]},
        "StreamReportOutcomes": {"outcome": outcome(world)},
        "IngestRecords": {"records": [source()]},
        "StreamIngestRecords": {"records": [source()]},
        "GetProfile": {"identity": PERSON, "timelinePageSize": 5},
        "ResolveIdentity": {"identities": [PERSON]},
        "LinkIdentities": {
            "identity": PERSON,
            "otherIdentity": OTHER_BROWSER,
            "verdict": "LINK_VERDICT_DIFFERENT",
            "statedBy": "somebody",
            "requestId": "link",
            "validateOnly": True,
        },
        "SplitProfile": {
            "profileId": world.profile_id,
            "identities": [OTHER_BROWSER],
            "statedBy": "somebody",
            "requestId": "split",
            "validateOnly": True,
        },
        "ListMatchReviews": {"pageSize": 5},
        "ExportProfile": {"identity": PERSON},
        "EraseProfile": {"identity": STRANGER, "requestId": "the stranger"},
        "GetErasure": {"erasureId": world.erasure_id},
        "AuditSources": {},
        "CountPeople": {},
        "ListProfiles": {"segment": "members", "pageSize": 5},
        "GetCatalog": {},
        "ListCatalogRevisions": {},
        "RollbackCatalog": {},
        "ListModelRevisions": {},
        "AssignModelRole": {"role": "MODEL_ROLE_CHAMPION"},
        "RollbackModel": {"role": "MODEL_ROLE_CHAMPION"},
        "ListLearners": {},
        "ResetLearner": {"role": "LEARNER_ROLE_ALL", "goals": ["click"], "validateOnly": True},
    }
    return requests[method]


def request(method: str, world: World, **changes: Any) -> Message:
    """Build a valid request of a method that takes no upload, with changes."""
    return json_format.ParseDict(valid(method, world) | changes, request_class(method)())
