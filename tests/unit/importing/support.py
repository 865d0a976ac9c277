"""What tests of the importer share: a catalog, a mapping, and a destination that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from server.catalog.loading import load_catalog
from server.importing.checking import check_mapping
from server.importing.mapping import load_mapping
from server.importing.run import Outcome, Plan, import_file, open_all
from tests.support.catalogs import message
from training.fit import MODELS_FOLDER
from tsugi.v1.catalog_pb2 import Catalog, Delivery, IdentityNamespace, Meaning, Party, Source
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.item_error_pb2 import ItemError
from tsugi.v1.profile_service_pb2 import AcceptedRecord, IngestRecordResult, IngestRecordsResponse, SourceRecord

EXAMPLE: Final = MODELS_FOLDER / "import"

MAPPING: Final = """
recordId: "{order_no}"
observationTime: {column: updated_at}
identities:
  - {namespace: customer_number, column: cust_no}
  - {namespace: browser_id, column: browser}
attributes:
  age: {column: age}
  member: {column: club, true: [y, yes, 1], false: [n, no, 0]}
event:
  type: purchase
  when: {column: kind, equals: order}
  occurrenceTime: {column: ordered_at}
  properties: {total: {column: total}}
consents:
  - {purpose: marketing, channel: mail, column: optin, granted: ["yes"], withdrawn: ["no"]}
"""
BY_LINE: Final = """
identities: [{namespace: customer_number, column: cust_no}]
attributes: {age: {column: age}}
"""


def catalog(**parts: Any) -> Catalog:
    """Return a catalog with every type of attribute and two event types."""
    number, text = {"type": "ATTRIBUTE_TYPE_NUMBER"}, {"type": "ATTRIBUTE_TYPE_TEXT"}
    in_files = {"party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH"}
    declared: dict[str, Any] = {
        "profileAttributes": [
            {"name": "age", "minimum": 0, "maximum": 120, **number},
            {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL"},
            {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["silver", "gold"]},
            {"name": "tags", "type": "ATTRIBUTE_TYPE_SET", "allowedValues": ["new", "vip", "wholesale"]},
            {"name": "spend", "type": "ATTRIBUTE_TYPE_MONEY"},
            {"name": "taste", "type": "ATTRIBUTE_TYPE_VECTOR", "dimensions": 2},
            {"name": "joined", "type": "ATTRIBUTE_TYPE_TIME"},
            {"name": "surname", **text},
            {"name": "birth_date", "meaning": "MEANING_BIRTH_DATE", **text},
        ],
        "eventTypes": [
            {"name": "purchase", "properties": [{"name": "total", **number}]},
            {"name": "page_view", "properties": [{"name": "page", **text}]},
        ],
        "channels": [{"name": "web"}, {"name": "mail"}],
        "consentPurposes": [{"name": "marketing"}],
        "sources": [
            {"name": "crm", **in_files},
            {"name": "narrow", "attributes": ["age"], "eventTypes": ["page_view"], **in_files},
        ],
    }
    return message(**(declared | parts))


def shop_catalog() -> Catalog:
    """Return the example catalog with what the example files need beside it."""
    found = load_catalog((MODELS_FOLDER / "catalog.yaml").read_text())
    if all(namespace.name != "email" for namespace in found.identity_namespaces):
        found.identity_namespaces.append(IdentityNamespace(name="email", meaning=Meaning.MEANING_EMAIL))
    if all(source.name != "loyalty" for source in found.sources):
        found.sources.append(Source(name="loyalty", party=Party.PARTY_FIRST, delivery=Delivery.DELIVERY_BATCH))
    return found


class Kept:
    """A destination that behaves as the server does: idempotent by record id, one result a record.

    Args:
        before: called with the number of the call, from 0, before anything is kept; may raise.
        refuse: record ids that are refused.
    """

    def __init__(self, before: Callable[[int], None] = lambda _: None, refuse: Iterable[str] = ()) -> None:
        self.records: dict[str, SourceRecord] = {}
        self.batches: list[int] = []
        self.refuse = set(refuse)
        self._before = before
        self._n_calls = 0
        self._lock = threading.Lock()

    def ingest_records(
        self, records: Iterable[SourceRecord], *, timeout_s: float | None = None
    ) -> IngestRecordsResponse:
        """See Destination."""
        assert timeout_s is not None
        with self._lock:
            number, self._n_calls = self._n_calls, self._n_calls + 1
            self._before(number)
            response = IngestRecordsResponse(results=[self._result(record) for record in records])
            self.batches.append(len(response.results))
            response.lsn = len(self.records)
            return response

    def _result(self, record: SourceRecord) -> IngestRecordResult:
        if record.record_id in self.refuse:
            metadata = {"field": "attributes.age"}
            reason = ErrorReason.ERROR_REASON_FIELD_INVALID
            return IngestRecordResult(error=ItemError(reason=reason, message="not this one", metadata=metadata))
        known = self.records.get(record.record_id)
        if known is not None and known != record:
            reason = ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
            return IngestRecordResult(error=ItemError(reason=reason, message="another payload"))
        self.records.setdefault(record.record_id, record)
        return IngestRecordResult(accepted=AcceptedRecord(lsn=len(self.records), duplicate=known is not None))


class Clock:
    """A clock that a test moves; by default half a second at each look."""

    def __init__(self, step_s: float = 0.5) -> None:
        self._now_s = 0.0
        self._step_s = step_s

    def __call__(self) -> float:
        """Return the time."""
        self._now_s += self._step_s
        return self._now_s


def plan(mapping: str = MAPPING, source: str = "crm") -> Plan:
    """Return a plan that was checked."""
    read = load_mapping(mapping)
    check_mapping(read, catalog(), source)
    return Plan(read, catalog(), source)


def imported(
    path: Path,
    destination: Any,
    mapping: str = MAPPING,
    *,
    is_restart: bool = False,
    pause: Callable[[float], bool] | None = None,
    step_s: float = 0.5,
) -> Outcome:
    """Import one file."""
    chosen = plan(mapping)
    (opened,) = open_all([path], chosen.mapping, None)
    return import_file(opened, chosen, destination, lambda *_: None, Clock(step_s), is_restart=is_restart, pause=pause)
