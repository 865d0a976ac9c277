"""The projector: turns log records into state, in LSN order, and is the only one who writes it.

Each batch of records and the LSN it reaches are committed together, so a kill at any moment leaves a state that is
exactly some prefix of the log. Time comes from the records; everything written depends on the log alone, so deleting
the state and running again gives the same bytes (``state_hash`` compares them).
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Sequence

import structlog
from google.protobuf.message import DecodeError

from server import telemetry
from server.catalog.catalog import Catalog
from server.profiles import repository
from server.storage.applied import Applied, read_applied, write_applied
from server.storage.log import Log
from server.storage.record import Record
from server.storage.store import Store, Table, Transaction
from tsugi.log.v1.record_pb2 import (
    CatalogChange,
    DecisionRecord,
    OutcomeRecord,
    RecordKind,
    SourceRecordAccepted,
)
from tsugi.log.v1.state_pb2 import StoredAttribute, StoredProfile
from tsugi.v1.profile_pb2 import AttributeValue
from tsugi.v1.profile_service_pb2 import SourceRecord

BATCH_RECORDS_MAX = 512
UNREADABLE_MAX = 1_000

_CATALOG_KEY = b"catalog"
_LOG_KEY = b"log"
_UNREADABLE = b"it is not the message of its kind"
_CONFIGURATION_KINDS = frozenset({RecordKind.RECORD_KIND_CATALOG_CHANGE, RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE})

LoadCatalog = Callable[[bytes], Catalog]


class TooManyUnreadableError(Exception):
    """More records could not be read than can be an accident; somebody must look."""


def state_hash(store: Store) -> bytes:
    """Return SHA-256 over all tables, keys and values in order: equal for equal states."""
    digest = hashlib.sha256()
    with store.read() as snapshot:
        for table in Table:
            for key, value in snapshot.scan(table):
                digest.update(struct.pack("<16sII", table.value.encode(), len(key), len(value)) + key + value)
    return digest.digest()


def forget_foreign(log: Log, store: Store) -> None:
    """Empty a state that is not a projection of this log: made from another one, or ahead of one that was restored."""
    with store.write() as txn:
        log_id = txn.get(Table.META, _LOG_KEY)
        if log_id is not None and (bytes(log_id) != log.log_id or read_applied(txn).lsn > log.tail().lsn):
            structlog.get_logger().error("state_forgotten", why="it is not of this log")
            for table in Table:
                for key, _ in list(txn.scan(table)):
                    txn.delete(table, key)
        txn.put(Table.META, _LOG_KEY, log.log_id)


class Projector:
    """Applies the log to one store.

    Args:
        log: read only.
        store: written by nobody else.
        load_catalog: gives the compiled catalog of a sha256; called once a revision.
    """

    def __init__(self, log: Log, store: Store, load_catalog: LoadCatalog) -> None:
        self._log = log
        self._store = store
        self._load_catalog = load_catalog
        forget_foreign(log, store)
        with store.read() as snapshot:
            self._applied = read_applied(snapshot)
            sha256 = snapshot.get(Table.META, _CATALOG_KEY)
            self._catalog = load_catalog(bytes(sha256)) if sha256 is not None else None
            self._n_unreadable = sum(why == _UNREADABLE for _, why in snapshot.scan(Table.QUARANTINE))
            self._has_parked = any(True for _ in snapshot.scan(Table.PARKED))

    @property
    def applied(self) -> Applied:
        """How far the state has come."""
        return self._applied

    def step(self) -> int:
        """Apply the next records, at most BATCH_RECORDS_MAX, in one commit; return how many.

        Raises:
            CorruptRecordError: the log is damaged; nothing after it can be applied.
            TooManyUnreadableError: see there.
        """
        records = self._log.read(self._applied.lsn + 1, BATCH_RECORDS_MAX)
        if records:
            self.apply(records)
        return len(records)

    def apply(self, records: Sequence[Record]) -> None:
        """Apply records that follow the applied LSN without a gap, and commit them with the LSN they reach."""
        assert records[0].lsn == self._applied.lsn + 1, "the log is applied in order, without a gap"
        configuration_lsn = self._applied.configuration_lsn
        with self._store.write() as txn:
            for record in records:
                if record.kind in _CONFIGURATION_KINDS:
                    configuration_lsn = record.lsn
                if not record.is_tombstone:
                    self._apply_or_quarantine(record, txn)
            last = Applied(records[-1].lsn, records[-1].time_us, configuration_lsn)
            write_applied(txn, last)
        self._applied = last

    def _apply_or_quarantine(self, record: Record, txn: Transaction) -> None:
        try:
            self._apply(record, txn)
        except _NotApplicableError as error:
            self._quarantine(record, str(error), txn)
        except DecodeError:
            self._n_unreadable += 1
            if self._n_unreadable > UNREADABLE_MAX:
                raise TooManyUnreadableError(
                    f"{UNREADABLE_MAX} records could not be read; see the quarantine"
                ) from None
            self._quarantine(record, _UNREADABLE.decode(), txn)

    def _quarantine(self, record: Record, why: str, txn: Transaction) -> None:
        """Set one record aside by name: it stays in the log, and has no effect."""
        txn.put(Table.QUARANTINE, record.lsn.to_bytes(8, "big"), why.encode())
        telemetry.RECORDS_QUARANTINED.inc()
        structlog.get_logger().warning("record_quarantined", lsn=record.lsn, kind=record.kind, why=why)

    def _apply(self, record: Record, txn: Transaction) -> None:
        match record.kind:
            case RecordKind.RECORD_KIND_DECISION:
                self._apply_decision(record, txn)
            case RecordKind.RECORD_KIND_OUTCOME:
                self._apply_outcome(record, txn, as_of_lsn=record.lsn)
            case RecordKind.RECORD_KIND_SOURCE_RECORD:
                self._apply_source_record(record, txn)
            case RecordKind.RECORD_KIND_CATALOG_CHANGE:
                sha256 = CatalogChange.FromString(record.payload).catalog_sha256
                self._catalog = self._load_catalog(sha256)
                txn.put(Table.META, _CATALOG_KEY, sha256)

    def _apply_decision(self, record: Record, txn: Transaction) -> None:
        decision = DecisionRecord.FromString(record.payload)
        if decision.profile_key:
            for slot in decision.slots:
                if slot.action and not slot.on_impression:
                    repository.count_contact(txn, decision.profile_key, slot.action, record.time_us)
        if self._has_parked:
            for key, _ in list(txn.scan(Table.PARKED, decision.decision_key)):
                parked = self._log.get(int.from_bytes(key[16:], "big"))
                assert parked is not None, "a parked outcome is in the log"
                txn.delete(Table.PARKED, key)
                if parked.is_tombstone:
                    continue
                try:  # one that does not fit must not take the decision and the others with it
                    self._apply_outcome(parked, txn, as_of_lsn=record.lsn)
                except _NotApplicableError as error:
                    self._quarantine(parked, str(error), txn)

    def _apply_outcome(self, record: Record, txn: Transaction, as_of_lsn: int) -> None:
        """Count the contact that an action's first outcome confirms, once.

        The log read now may hold a decision that stands after as_of_lsn; a rebuild must park where the first run
        parked, so the order of LSNs decides, not what is there by now.
        """
        outcome = OutcomeRecord.FromString(record.payload)
        entry = self._log.find(outcome.decision_key)
        if entry is None or entry.lsn > as_of_lsn:
            txn.put(Table.PARKED, outcome.decision_key + record.lsn.to_bytes(8, "big"), b"\0")
            self._has_parked = True
            return
        found = self._log.get(entry.lsn)
        if found is None or found.is_tombstone:
            return
        decision = DecisionRecord.FromString(found.payload)
        slot = next((slot for slot in decision.slots if slot.action == outcome.action), None)
        if slot is None:
            raise _NotApplicableError("the decision did not choose the outcome's action")
        if not decision.profile_key or not slot.on_impression:
            return
        mark = entry.lsn.to_bytes(8, "big") + outcome.action.encode()
        if txn.get(Table.IMPRESSIONS, mark) is None:
            txn.put(Table.IMPRESSIONS, mark, b"\0")
            repository.count_contact(txn, decision.profile_key, outcome.action, record.time_us)

    def _apply_source_record(self, record: Record, txn: Transaction) -> None:
        if self._catalog is None:
            raise _NotApplicableError("no catalog was in force")
        source_record = SourceRecordAccepted.FromString(record.payload).record
        keys = repository.find_all(txn, source_record.identities)
        if len(keys) > 1:
            raise _NotApplicableError("its identities belong to two known profiles")
        profile_key = keys[0] if keys else repository.new_profile_key(self._log.log_id, record.lsn)
        stored = repository.load(txn, profile_key) if keys else None
        profile = repository.parse(stored) if stored is not None else StoredProfile()
        if not _merge(profile, source_record, record):
            raise _NotApplicableError(f"the profile would have over {repository.IDENTITIES_MAX} identities")
        repository.save(txn, profile_key, profile, self._catalog.space, record.lsn)


class _NotApplicableError(Exception):
    """One record cannot have an effect; the others can."""


def _merge(profile: StoredProfile, source_record: SourceRecord, record: Record) -> bool:
    """Put one source record's facts into a profile; False when it would know too many identities."""
    known = {(identity.namespace, identity.value) for identity in profile.identities}
    for identity in source_record.identities:
        if (identity.namespace, identity.value) not in known:
            known.add((identity.namespace, identity.value))
            profile.identities.append(identity)
    if len(profile.identities) > repository.IDENTITIES_MAX:
        return False
    attributes = {attribute.name: attribute.attribute_value for attribute in profile.attributes}
    for name, value in source_record.attributes.items():
        attributes[name] = AttributeValue(
            value=value,
            source=source_record.source,
            update_time=repository.timestamp(record.time_us),
            lsn=record.lsn,
        )
    survivors = [StoredAttribute(name=name, attribute_value=attributes[name]) for name in sorted(attributes)]
    del profile.attributes[:]
    profile.attributes.extend(survivors)
    if source_record.HasField("event"):
        event = profile.events.add()
        event.CopyFrom(source_record.event)
        if not event.HasField("occurrence_time"):
            event.occurrence_time.CopyFrom(repository.timestamp(record.time_us))
        del profile.events[: -repository.EVENTS_MAX]
    return True


def run(projector: Projector, stop: threading.Event, turned: Callable[[], None], idle_wait_s: float = 0.002) -> None:
    """Apply records until told to stop; wait briefly whenever there is nothing new; tell each turn of the loop."""
    while not stop.is_set():
        turned()
        n_applied = projector.step()
        telemetry.APPLIED_LSN.set(projector.applied.lsn)
        if n_applied == 0:
            stop.wait(idle_wait_s)
