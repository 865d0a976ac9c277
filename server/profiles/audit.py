"""How the sources do: what each has said so far, counted as its records are applied.

Counts are of records, never of people, so nothing in them is personal. What is made of them for people to read is in
``describe_sources``.
"""

from __future__ import annotations

from server.catalog.catalog import Catalog
from server.storage.record import Record
from server.storage.store import Snapshot, Table, Transaction
from tsugi.log.v1.state_pb2 import StoredSource, StoredSourceAttribute
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_service_pb2 import AttributeAudit, SourceAudit, SourceRecord


class _Counts:
    """What one source has said so far, in plain numbers."""

    def __init__(self, stored: StoredSource) -> None:
        self.stored = stored
        self.event_types = set(stored.event_types)
        self.attributes = {each.attribute: [each.stated, each.conflicts, each.uncleansed] for each in stored.attributes}

    def attribute(self, name: str) -> list[int]:
        return self.attributes.setdefault(name, [0, 0, 0])

    def message(self) -> StoredSource:
        stored = self.stored
        del stored.attributes[:]
        stored.attributes.extend(
            StoredSourceAttribute(attribute=name, stated=stated, conflicts=conflicts, uncleansed=uncleansed)
            for name, (stated, conflicts, uncleansed) in sorted(self.attributes.items())
        )
        stored.event_types[:] = sorted(self.event_types)
        return stored


class SourceCounts:
    """Counts of one transaction, read once a source and written back by flush()."""

    def __init__(self, txn: Transaction) -> None:
        self._txn = txn
        self._sources: dict[str, _Counts] = {}

    def applied(self, said: SourceRecord, uncleansed: frozenset[str], record: Record, *, is_news: bool) -> None:
        """Count one record that had its effect."""
        source = self._source(said.source)
        stored = source.stored
        stored.records += 1
        stored.duplicates += not is_news
        stored.last_time_us = max(stored.last_time_us, record.time_us)
        stored.stating += bool(said.attributes)
        for name in said.attributes:
            counts = source.attribute(name)
            counts[0] += 1
            counts[2] += name in uncleansed
        if said.HasField("event"):
            source.event_types.add(said.event.type)

    def conflict(self, source: str, attribute: str) -> None:
        """Count one statement that differs from what stands from another source."""
        self._source(source).attribute(attribute)[1] += 1

    def quarantined(self, source: str) -> None:
        """Count one record that could have no effect."""
        self._source(source).stored.quarantined += 1

    def flush(self) -> None:
        """Write back what was counted."""
        for name, source in sorted(self._sources.items()):
            self._txn.put(Table.SOURCES, name.encode(), source.message().SerializeToString(deterministic=True))
        self._sources.clear()

    def _source(self, name: str) -> _Counts:
        if name not in self._sources:
            self._sources[name] = _Counts(_read(self._txn, name))
        return self._sources[name]


def _read(snapshot: Snapshot, name: str) -> StoredSource:
    stored = snapshot.get(Table.SOURCES, name.encode())
    return StoredSource.FromString(bytes(stored)) if stored is not None else StoredSource()


def describe_sources(snapshot: Snapshot, catalog: Catalog, now_us: int) -> tuple[list[SourceAudit], list[str]]:
    """Tell how each declared source does, and which attributes none of them has ever stated.

    Args:
        snapshot: the state.
        catalog: in force.
        now_us: what silence is measured to.
    """
    audits: list[SourceAudit] = []
    stated_by_any: set[str] = set()
    for declared, source in zip(catalog.message.sources, catalog.profiles.sources.values(), strict=True):
        stored = _read(snapshot, source.name)
        counts = {each.attribute: each for each in stored.attributes}
        stated_by_any |= counts.keys()
        silent_us = now_us - stored.last_time_us
        audit = SourceAudit(
            source=source.name,
            owner=declared.owner,
            party=catalog_pb2.Party.Name(declared.party).removeprefix("PARTY_").lower(),
            records=stored.records,
            duplicates=stored.duplicates,
            quarantined=stored.quarantined,
            stale=bool(source.silence_us_max) and silent_us > source.silence_us_max,
            attributes=[
                _audit(attribute.name, counts.get(attribute.name, StoredSourceAttribute()), stored.stating, catalog)
                for attribute in catalog.profiles.attributes
                if attribute.name in source.attributes
            ],
            unused_event_types=sorted(source.event_types - set(stored.event_types)),
        )
        if stored.records:
            audit.last_record_time.FromMicroseconds(stored.last_time_us)
        audits.append(audit)
    missing = [each.name for each in catalog.profiles.attributes if each.name not in stated_by_any]
    return audits, missing


def _audit(name: str, counts: StoredSourceAttribute, stating: int, catalog: Catalog) -> AttributeAudit:
    return AttributeAudit(
        attribute=name,
        completeness_share=counts.stated / stating if stating else 0.0,
        stated=counts.stated,
        conflicts=counts.conflicts,
        uncleansed=counts.uncleansed,
        unused=name in catalog.profiles.unread_attributes,
    )
