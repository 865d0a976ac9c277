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
from itertools import islice

import structlog
from google.protobuf.message import DecodeError

from server import telemetry
from server.catalog.catalog import Catalog
from server.outcomes.erasure import records_about
from server.profiles.matching import MatchFields, fields_of
from server.profiles.parts import keep_layout
from server.profiles.writer import NotApplicableError, ProfileWriter
from server.storage.applied import Applied, read_applied, write_applied
from server.storage.log import Log
from server.storage.record import Record
from server.storage.store import Store, Table, Transaction
from tsugi.log.v1.record_pb2 import (
    CatalogChange,
    DecisionRecord,
    ErasureAccepted,
    ErasureFulfilled,
    LinkStated,
    LogErased,
    OutcomeRecord,
    ProfileSplit,
    RecordKind,
    SourceRecordAccepted,
)
from tsugi.log.v1.state_pb2 import StoredErasure

BATCH_RECORDS_MAX = 128  # so that what came last is seen some 30 ms after what came first
UNREADABLE_MAX = 1_000

_CATALOG_KEY = b"catalog"
_LOG_KEY = b"log"
_SWEEP_KEY = b"sweep"  # the last profile that was folded anew for the catalog in force; absent: all are
SWEPT_AT_A_TICK = 512  # when nothing else is to be done
SWEPT_AT_A_RECORD = 1
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


def is_of(store: Store, log_id: bytes) -> bool:
    """Say whether a state is a projection of the log with this id."""
    with store.read() as snapshot:
        found = snapshot.get(Table.META, _LOG_KEY)
        return found is not None and bytes(found) == log_id


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
            self._catalog: Catalog | None = None
            self._fields: MatchFields | None = None
            if sha256 is not None:
                self._take(load_catalog(bytes(sha256)))
            self._n_unreadable = sum(why == _UNREADABLE for _, why in snapshot.scan(Table.QUARANTINE))
            self._has_parked = any(True for _ in snapshot.scan(Table.PARKED))
            self._is_sweeping = snapshot.get(Table.META, _SWEEP_KEY) is not None
        self._profiles: ProfileWriter | None = None

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
            self._begin(txn)
            for record in records:
                if record.kind in _CONFIGURATION_KINDS:
                    configuration_lsn = record.lsn
                if self._profiles is not None:
                    self._profiles.pass_time(record)
                if not record.is_tombstone:
                    self._apply_or_quarantine(record, txn)
                if self._is_sweeping:
                    self._sweep(record, txn)
            if self._profiles is not None:
                self._profiles.flush()
            last = Applied(records[-1].lsn, records[-1].time_us, configuration_lsn)
            write_applied(txn, last)
        self._applied = last

    def _apply_or_quarantine(self, record: Record, txn: Transaction) -> None:
        try:
            self._apply(record, txn)
        except NotApplicableError as error:
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

    def _take(self, catalog: Catalog) -> None:
        """Go on under a catalog."""
        self._catalog, self._fields = catalog, fields_of(catalog.profiles)

    def _begin(self, txn: Transaction) -> None:
        """Take up profiles in a transaction, under the catalog in force."""
        if self._catalog is not None and self._fields is not None:
            self._profiles = ProfileWriter(txn, self._catalog, self._fields, self._log.log_id)

    def _apply(self, record: Record, txn: Transaction) -> None:
        match record.kind:
            case RecordKind.RECORD_KIND_DECISION:
                self._apply_decision(record, txn)
            case RecordKind.RECORD_KIND_OUTCOME:
                self._apply_outcome(record, txn, as_of_lsn=record.lsn)
            case RecordKind.RECORD_KIND_SOURCE_RECORD:
                self._apply_source_record(record)
            case RecordKind.RECORD_KIND_CATALOG_CHANGE:
                self._apply_catalog(CatalogChange.FromString(record.payload).catalog_sha256, txn)
            case RecordKind.RECORD_KIND_LINK_STATED:
                self._writer().apply_link(record, LinkStated.FromString(record.payload))
            case RecordKind.RECORD_KIND_PROFILE_SPLIT:
                self._writer().apply_split(record, ProfileSplit.FromString(record.payload))
            case RecordKind.RECORD_KIND_ERASURE_ACCEPTED:
                self._apply_erasure(record, txn)
            case RecordKind.RECORD_KIND_LOG_ERASED:
                _note_erased(LogErased.FromString(record.payload), txn)
            case RecordKind.RECORD_KIND_ERASURE_FULFILLED:
                fulfilled = ErasureFulfilled.FromString(record.payload)
                stored = StoredErasure(erased_records=fulfilled.erased_records, receipt=fulfilled.receipt)
                txn.put(Table.ERASURES, fulfilled.erasure_key, stored.SerializeToString(deterministic=True))

    def _writer(self) -> ProfileWriter:
        if self._profiles is None:
            raise NotApplicableError("no catalog was in force")
        return self._profiles

    def _apply_catalog(self, sha256: bytes, txn: Transaction) -> None:
        """Go on under another catalog; profiles that it reads otherwise are folded anew, a few at each record."""
        before, after = self._catalog, self._load_catalog(sha256)
        self._take(after)
        txn.put(Table.META, _CATALOG_KEY, sha256)
        keep_layout(txn, after.profiles)
        if self._profiles is not None:
            self._profiles.flush()
        self._begin(txn)
        if before is not None and (
            before.space.profile_layout != after.space.profile_layout
            or before.profiles.namespaces != after.profiles.namespaces
        ):
            txn.put(Table.META, _SWEEP_KEY, bytes(16))
            self._is_sweeping = True

    def _sweep(self, record: Record, txn: Transaction) -> None:
        """Fold the next profiles anew; by record and not by time, so that a rebuild does the same."""
        last = bytes(txn.get(Table.META, _SWEEP_KEY) or b"")
        n_profiles = SWEPT_AT_A_TICK if record.kind == RecordKind.RECORD_KIND_TICK else SWEPT_AT_A_RECORD
        following = (key for key, _ in txn.scan(Table.PROFILES, start=last) if key != last)
        keys = list(islice(following, n_profiles))
        for key in keys:
            self._writer().sweep(key, record)
        if keys:
            txn.put(Table.META, _SWEEP_KEY, keys[-1])
        else:
            txn.delete(Table.META, _SWEEP_KEY)
            self._is_sweeping = False

    def _apply_erasure(self, record: Record, txn: Transaction) -> None:
        """Forget a person in the state, and note which records are still to become tombstones."""
        accepted = ErasureAccepted.FromString(record.payload)
        if not accepted.erasure_key:  # nobody is to be forgotten; the chain of wishes goes on
            return
        forgotten = self._writer().erase(record, accepted)
        lsns = records_about(self._log, forgotten, record.lsn, self._catalog) if self._catalog is not None else []
        stored = StoredErasure(lsn=record.lsn, time_us=record.time_us, lsns=lsns, erased_records=len(lsns))
        txn.put(Table.ERASURES, accepted.erasure_key, stored.SerializeToString(deterministic=True))

    def _apply_decision(self, record: Record, txn: Transaction) -> None:
        decision = DecisionRecord.FromString(record.payload)
        if self._profiles is not None:
            self._profiles.apply_decision(record, decision)
        if self._has_parked:
            for key, _ in list(txn.scan(Table.PARKED, decision.decision_key)):
                parked = self._log.get(int.from_bytes(key[16:], "big"))
                assert parked is not None, "a parked outcome is in the log"
                txn.delete(Table.PARKED, key)
                if parked.is_tombstone:
                    continue
                try:  # one that does not fit must not take the decision and the others with it
                    self._apply_outcome(parked, txn, as_of_lsn=record.lsn)
                except NotApplicableError as error:
                    self._quarantine(parked, str(error), txn)

    def _apply_outcome(self, record: Record, txn: Transaction, as_of_lsn: int) -> None:
        """Count the contact that an action's first outcome confirms, once; to take one back confirms nothing.

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
            raise NotApplicableError("the decision did not choose the outcome's action")
        is_contact = False
        if slot.on_impression and not outcome.revoked_key:
            mark = entry.lsn.to_bytes(8, "big") + outcome.action.encode()
            if txn.get(Table.IMPRESSIONS, mark) is None:
                txn.put(Table.IMPRESSIONS, mark, b"\0")
                is_contact = True
        if self._profiles is not None:
            self._profiles.apply_outcome(record, outcome, decision, found, is_contact=is_contact)

    def _apply_source_record(self, record: Record) -> None:
        said = SourceRecordAccepted.FromString(record.payload).record
        writer = self._writer()
        try:
            writer.apply_source_record(record, said)
        except NotApplicableError:
            writer.quarantined(said)
            raise


def _note_erased(erased: LogErased, txn: Transaction) -> None:
    """Note erasures whose own records are tombstones: a state that is made anew knows of them from here."""
    for each in erased.erasures:
        stored = StoredErasure(lsn=each.lsn, time_us=each.time_us, erased_records=each.erased_records)
        txn.put(Table.ERASURES, each.erasure_key, stored.SerializeToString(deterministic=True))


def run(
    projector: Projector,
    stop: threading.Event,
    turned: Callable[[], None],
    store_turn: threading.Lock,
    idle_wait_s: float = 0.002,
) -> None:
    """Apply records until told to stop; wait briefly whenever there is nothing new.

    Args:
        projector: its store is written by nobody else.
        stop: set by somebody else.
        turned: told each turn of the loop.
        store_turn: held while the store is written to; somebody who copies it holds it meanwhile.
        idle_wait_s: how long to wait when there is nothing new.
    """
    while not stop.is_set():
        turned()
        if not store_turn.acquire(timeout=idle_wait_s):
            continue  # the store is being copied; the heart must hear from the loop all the same
        try:
            n_applied = projector.step()
        finally:
            store_turn.release()
        telemetry.APPLIED_LSN.set(projector.applied.lsn)
        if n_applied == 0:
            stop.wait(idle_wait_s)
