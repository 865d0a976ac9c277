"""What happened and what is known: outcomes and source records on their way into the log.

Handed validated messages, checks them against catalog, token and state, and appends them with their idempotency keys.
It answers after the commit and never before; what an item is worth to profiles and learners is the projector's and the
learner's to find out.

Cost sketch: 20 µs an item and 30 more for each identity whose namespace has a meaning, so a batch may take long. It is
worked on in steps: one batch of the worker at a time, the others waiting in the order in which they came, and decisions
taking their turns in between.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import Message

from server import telemetry
from server.catalog.catalog import Catalog, Fact
from server.catalog.profile_terms import ProfileTerms, Source
from server.errors import TsugiError, field_invalid, not_found, within
from server.profiles import golden
from server.profiles.identity import Named, named_all
from server.storage.committer import GroupCommitter
from server.storage.log import Fate, KeyEntry, Log, LogFullError, LogUnavailableError, refusal, settled
from server.storage.record import CorruptRecordError, Draft, Record
from server.storage.store import Snapshot, Store, Table
from server.tokens import TokenKey
from server.wire import head
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, RecordKind
from tsugi.v1 import catalog_pb2
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_service_pb2 import SourceRecord
from tsugi.v1.value_pb2 import Value

# Clocks of callers and of this machine differ; an outcome may seem to lie this much before its decision.
CLOCK_SKEW_US: Final = 5 * 60 * 1_000_000

STEP_S: Final = 0.002  # of work on a batch, before others have their turn

_RECORD: Final = 1  # field of SourceRecordAccepted


_Item = TypeVar("_Item")


class Accepted(NamedTuple):
    """An item that is on disk."""

    lsn: int
    is_duplicate: bool


class Ingest:
    """Takes in outcomes and source records for one worker.

    Args:
        log: read for the decisions that outcomes name.
        store: read for the profiles that identities name.
        committer: where records go.
        token_key: verifies decision ids.
        catalog: gives the catalog in force, or None before the first.
        clock_us: the wall clock, microseconds since the epoch.
    """

    def __init__(
        self,
        *,
        log: Log,
        store: Store,
        committer: GroupCommitter,
        token_key: TokenKey,
        catalog: Callable[[], Catalog | None],
        clock_us: Callable[[], int],
    ) -> None:
        self._log = log
        self._store = store
        self._committer = committer
        self._token_key = token_key
        self._catalog = catalog
        self._clock_us = clock_us
        self._drafting = asyncio.Lock()

    async def report(self, outcomes: Iterable[ReportOutcomeRequest | TsugiError]) -> list[Accepted | TsugiError]:
        """Record outcomes; every Accepted is on disk, and calls are recorded in the order in which they were made.

        Args:
            outcomes: validated requests; in place of an invalid one its error, which is handed through. They are taken
                when it is their turn, so validation may be left until then.

        Raises:
            TsugiError: CATALOG_MISSING, LOG_*: of the whole call, nothing may be taken as recorded.
        """
        catalog = require_catalog(self._catalog())
        return await self._take(outcomes, lambda outcome: self._outcome(outcome, catalog), "outcome")

    async def report_all(self, outcomes: Sequence[ReportOutcomeRequest]) -> int:
        """Record outcomes together and return the last one's LSN; where one is wrong none is recorded.

        Args:
            outcomes: validated, at least one.

        Raises:
            TsugiError: of the call, as report; or of the first outcome refused, at its path below ``outcomes``. An id
                used before with another payload is noticed when the others are recorded.
        """
        catalog = require_catalog(self._catalog())
        results = await self._take(outcomes, lambda outcome: self._outcome(outcome, catalog), "outcome", is_whole=True)
        _raise_first(results)
        return max(result.lsn for result in results if isinstance(result, Accepted))

    async def ingest(self, records: Iterable[SourceRecord | TsugiError]) -> list[Accepted | TsugiError]:
        """Record source records; every Accepted is on disk. See report for arguments and errors."""
        catalog = require_catalog(self._catalog())
        return await self._take(records, lambda record: self._source_record(record, catalog), "source_record")

    async def _take(
        self, items: Iterable[_Item | TsugiError], make: Callable[[_Item], Draft], kind: str, *, is_whole: bool = False
    ) -> list[Accepted | TsugiError]:
        async with self._drafting:
            drafts = await _each(items, make)
            if is_whole:
                _raise_first(drafts)
            commit = self._committer.submit([draft for draft in drafts if isinstance(draft, Draft)])
        try:
            receipts = iter(await commit)
        except (LogFullError, LogUnavailableError) as error:
            raise refusal(error) from error
        results: list[Accepted | TsugiError] = []
        for draft in drafts:
            if isinstance(draft, TsugiError):
                results.append(draft)
                continue
            try:
                receipt = settled(next(receipts))
                results.append(Accepted(receipt.lsn, receipt.fate is Fate.DUPLICATE))
            except TsugiError as error:
                results.append(error)
        telemetry.RECORDS_ACCEPTED.labels(kind).inc(sum(isinstance(result, Accepted) for result in results))
        return results

    def _outcome(self, request: ReportOutcomeRequest, catalog: Catalog) -> Draft:
        token = self._token_key.verify(request.decision_id)
        instant = request.occurrence_time
        occurrence_time_us = (
            instant.seconds * 1_000_000 + instant.nanos // 1_000
            if request.HasField("occurrence_time")
            else self._clock_us()
        )
        record = OutcomeRecord(
            decision_key=token.decision_key,
            action=request.action,
            type=request.type,
            value=request.value,
            occurrence_time_us=occurrence_time_us,
            revoked_key=self._outcome_key(token.decision_key, request.revokes) if request.revokes else b"",
            reporter=request.reporter,
        )
        draft = Draft(
            kind=RecordKind.RECORD_KIND_OUTCOME,
            payload=record.SerializeToString(),
            key=self._outcome_key(token.decision_key, request.outcome_id),
            payload_digest=_digest(request),
        )
        try:
            _check_outcome(request, catalog)
            if request.revokes:
                self._check_revoked(record)
            return draft._replace(subjects=self._check_against_decision(request, record, catalog))
        except TsugiError:
            if self._is_recorded(draft):
                return draft
            raise

    def _outcome_key(self, decision_key: bytes, outcome_id: str) -> bytes:
        return self._token_key.record_key(b"outcome", decision_key, outcome_id)

    def _check_revoked(self, revocation: OutcomeRecord) -> None:
        """Refuse what takes back no outcome of its action, where what it names is visible; else the join will check."""
        entry = self._log.find(revocation.revoked_key)
        record = self._get(entry, "the outcome's") if entry is not None else None
        if record is None or record.is_tombstone:
            return
        revoked = OutcomeRecord.FromString(record.payload)
        if revoked.revoked_key:
            raise field_invalid("revokes", "what takes an outcome back cannot be taken back; report the outcome anew")
        if revoked.action != revocation.action:
            raise field_invalid("action", "the outcome that is taken back was reported for another action")

    def _get(self, entry: KeyEntry, whose: str) -> Record | None:
        """Read a record.

        Raises:
            TsugiError: RECORD_CHECKSUM: it is damaged.
        """
        try:
            return self._log.get(entry.lsn)
        except CorruptRecordError as error:
            raise TsugiError(
                ErrorReason.ERROR_REASON_RECORD_CHECKSUM,
                f"{whose} record fails its checksum; tell the operator",
                lsn=entry.lsn,
            ) from error

    def _is_recorded(self, draft: Draft) -> bool:
        """Say whether this very item was accepted before: a repeat counts, whatever the catalog says by now."""
        entry = self._log.find(draft.key)
        return entry is not None and entry.payload_digest == draft.payload_digest

    def _check_against_decision(
        self, request: ReportOutcomeRequest, outcome: OutcomeRecord, catalog: Catalog
    ) -> tuple[bytes, ...]:
        """Return whom the decision is about, if it is visible yet; otherwise the join will check.

        The report of an impression is about the contacts, too, that the decision reserved.
        """
        entry = self._log.find(outcome.decision_key)
        record = self._get(entry, "the decision's") if entry is not None else None
        if record is None or record.is_tombstone:
            return ()
        decision = DecisionRecord.FromString(record.payload)
        if request.action not in [slot.action for slot in decision.slots]:
            raise TsugiError(
                ErrorReason.ERROR_REASON_ACTION_NOT_IN_DECISION,
                f"action: the decision did not choose {request.action[:64]!r}; report an action of its slots",
                field="action",
                action=request.action[:64],
            )
        if outcome.occurrence_time_us < decision.now_us - CLOCK_SKEW_US:
            raise TsugiError(
                ErrorReason.ERROR_REASON_TIME_OUT_OF_RANGE,
                "occurrence_time: more than 5 minutes before the decision",
                field="occurrence_time",
            )
        subjects = [subject for subject in record.subjects if subject not in decision.claimed_subjects]
        kind = catalog.outcome_types[request.type].kind if not request.revokes else catalog_pb2.OUTCOME_KIND_RESPONSE
        if kind == catalog_pb2.OUTCOME_KIND_IMPRESSION:
            slot = next(slot for slot in decision.slots if slot.action == request.action)
            subjects += slot.confirming_subjects
        return tuple(subjects)

    def _source_record(self, record: SourceRecord, catalog: Catalog) -> Draft:
        data = record.SerializeToString(deterministic=True)
        terms = catalog.profiles
        source = terms.sources.get(record.source)
        ids = named_all(record.identities, terms, source.default_country_code if source is not None else "")
        draft = Draft(
            kind=RecordKind.RECORD_KIND_SOURCE_RECORD,
            payload=head(_RECORD, len(data)) + data,  # a SourceRecordAccepted
            key=self._token_key.record_key(b"source_record", record.source.encode(), record.record_id),
            payload_digest=hashlib.blake2b(data, digest_size=16).digest(),
            subjects=tuple([one.key for one in ids]),
        )
        try:
            _check_source_record(record, source, catalog)
            with self._store.read() as snapshot:
                _check_shared(ids, terms, snapshot)
        except TsugiError:
            if not self._is_recorded(draft):
                raise
        return draft


def require_catalog(catalog: Catalog | None) -> Catalog:
    """Return the catalog in force.

    Raises:
        TsugiError: CATALOG_MISSING: there is none yet.
    """
    if catalog is None:
        raise TsugiError(
            ErrorReason.ERROR_REASON_CATALOG_MISSING, "no catalog is in force yet; push one with PushCatalog"
        )
    return catalog


async def _each(items: Iterable[_Item | TsugiError], make: Callable[[_Item], Draft]) -> list[Draft | TsugiError]:
    """Make a draft of each item, or keep the error that says why not; others have a turn every few milliseconds."""
    drafts: list[Draft | TsugiError] = []
    until = time.monotonic() + STEP_S
    for item in items:
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + STEP_S
        if isinstance(item, TsugiError):
            drafts.append(item)
            continue
        try:
            drafts.append(make(item))
        except TsugiError as error:
            drafts.append(error)
    return drafts


def _raise_first(results: Sequence[object]) -> None:
    """Refuse the whole for the first part that was refused."""
    for i, result in enumerate(results):
        if isinstance(result, TsugiError):
            raise within(f"outcomes[{i}]", result)


def _check_outcome(request: ReportOutcomeRequest, catalog: Catalog) -> None:
    if request.revokes and not request.type:
        return
    declared = catalog.outcome_types.get(request.type)
    if declared is None:
        raise not_found("outcome type", request.type, "type")
    if not declared.value_minimum <= request.value <= declared.value_maximum:
        raise field_invalid(
            "value",
            f"must be finite and within [{declared.value_minimum:g}, {declared.value_maximum:g}], "
            f"got {request.value:g}",
        )


def _check_source_record(record: SourceRecord, source: Source | None, catalog: Catalog) -> None:
    """Refuse what is not declared, what the source may not say, and values that are not as declared."""
    terms = catalog.profiles
    if source is None:
        raise _not_allowed("source", record.source, "no source of this name is declared; add it to the catalog")
    for i, identity in enumerate(record.identities):
        if identity.namespace not in terms.namespaces:
            raise not_found("identity namespace", identity.namespace, f"identities[{i}].namespace")
        if identity.namespace not in source.namespaces:
            raise _not_allowed(f"identities[{i}].namespace", record.source, f"it may not name a {identity.namespace}")
    for name, value in record.attributes.items():
        row = terms.attribute_rows.get(name)
        if row is None:
            raise not_found("profile attribute", name, f"attributes.{name[:64]}")
        if name not in source.attributes:
            raise _not_allowed(f"attributes.{name}", record.source, f"it may not write {name}")
        _check_fact("attributes", name, terms.attributes[row].fact, value)
    if record.HasField("event"):
        _check_event(record, source, terms)
    for i, consent in enumerate(record.consents):
        if consent.purpose not in terms.consent_purposes:
            raise not_found("consent purpose", consent.purpose, f"consents[{i}].purpose")
        if consent.channel and consent.channel not in catalog.channel_rows:
            raise not_found("channel", consent.channel, f"consents[{i}].channel")


def _check_event(record: SourceRecord, source: Source, terms: ProfileTerms) -> None:
    event = terms.events.get(record.event.type)
    if event is None:
        raise not_found("event type", record.event.type, "event.type")
    if record.event.type not in source.event_types:
        raise _not_allowed("event.type", record.source, f"it may not report a {record.event.type}")
    for name, value in record.event.properties.items():
        fact = event.properties.get(name)
        if fact is None:
            raise not_found("event property", name, f"event.properties.{name[:64]}")
        _check_fact("event.properties", name, fact, value)


def _check_fact(path: str, name: str, fact: Fact, value: Value) -> None:
    """Refuse a value that is not of the declared type or not within its bounds."""
    if math.isnan(fact.encode(value)):
        raise field_invalid(f"{path}.{name}", fact.wanted())


def _check_shared(ids: Sequence[Named], terms: ProfileTerms, snapshot: Snapshot) -> None:
    """Refuse a record that nothing but values shared by too many people would say whose it is."""
    if snapshot.get(Table.NODES, ids[0].key) is None:  # who was never named stands beside nobody
        return
    for one in ids:
        if snapshot.get(Table.IDENTITIES, one.key) is not None:
            return
    for one in ids:
        node = golden.node_of(snapshot, one.key)
        if node is None or not node.too_shared:
            return
    limit = terms.namespaces[ids[0].identity.namespace].shared_max
    raise TsugiError(
        ErrorReason.ERROR_REASON_IDENTITY_TOO_SHARED,
        f"identities: each stands beside more than {limit} others; send one that is the person's own",
        field="identities",
        limit=limit,
    )


def _not_allowed(field: str, source: str, why: str) -> TsugiError:
    return TsugiError(
        ErrorReason.ERROR_REASON_SOURCE_NOT_ALLOWED,
        f"{field}: source {source[:64]!r}: {why}",
        field=field,
        source=source[:64],
    )


def _digest(message: Message) -> bytes:
    return hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=16).digest()
