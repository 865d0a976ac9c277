"""Which log records are about a person who is to be forgotten.

Handed what the state knew of the person, it names the records that must become tombstones: everything recorded under
the person's identities and profiles, and every decision that names one of them. What merely went through the same
profile at some time, and belongs to somebody else by now, stays. So does what comes later, but for what was under way.
"""

from __future__ import annotations

from server.catalog.catalog import Catalog
from server.profiles.identity import named_all
from server.profiles.writer import Forgotten
from server.storage.log import Log
from server.storage.record import Record
from tsugi.log.v1.record_pb2 import DecisionRecord, ErasureAccepted, OutcomeRecord, RecordKind
from tsugi.log.v1.state_pb2 import StoredErasure
from tsugi.v1.decision_service_pb2 import DecideRequest


def records_about(log: Log, forgotten: Forgotten, until_lsn: int, catalog: Catalog) -> list[int]:
    """Return the LSNs of the records about a person, ascending, none after until_lsn.

    Args:
        log: read by subject.
        forgotten: keys of the person's identities and profiles, and what stood on the timeline.
        until_lsn: the erasure's own.
        catalog: in force; gives identities the form they are compared in.

    Cost: one read of the log a record.
    """
    found = set(forgotten.lsns)
    for subject in (*forgotten.nodes, *forgotten.profiles):
        found.update(log.about(subject))
    nodes, profiles = frozenset(forgotten.nodes), frozenset(forgotten.profiles)
    lsns = []
    for lsn in sorted(found):
        record = log.get(lsn) if lsn < until_lsn else None
        if record is not None and not record.is_tombstone and _is_about(log, record, nodes, profiles, catalog):
            lsns.append(lsn)
    return lsns


def records_since(log: Log, erasure: StoredErasure) -> list[int]:
    """Return the LSNs of records that came after a wish and are about the person all the same, ascending.

    They are decisions that were under way for a profile nobody has any more, outcomes of decisions about the person,
    and statements that were under way about identities of theirs, which no source had named again by then. What else
    names their identities since then is about the new person they have become.

    Args:
        log: read by subject.
        erasure: as noted when it was projected; its records and its own may be tombstones by now, then there are none.

    Cost: one read of the log for each record recorded since under the person's identities and profiles.
    """
    wish = log.get(erasure.lsn)
    if wish is None or wish.is_tombstone:
        return []
    accepted = ErasureAccepted.FromString(wish.payload)
    profiles, erased, unnamed = frozenset(accepted.profile_keys), set(erasure.lsns), set(accepted.identity_keys)
    found = {lsn for key in (*accepted.identity_keys, *accepted.profile_keys) for lsn in log.about(key)}
    lsns = []
    for lsn in sorted(found):
        record = log.get(lsn) if lsn > erasure.lsn else None
        if record is None:
            continue
        if record.kind == RecordKind.RECORD_KIND_SOURCE_RECORD:
            unnamed.difference_update(record.subjects)
        if _is_about_erased(log, record, profiles, erased, unnamed):
            erased.add(lsn)
            lsns.append(lsn)
    return lsns


def _is_about_erased(
    log: Log, record: Record, profiles: frozenset[bytes], erased: set[int], unnamed: set[bytes]
) -> bool:
    """Say whether a record is one of those that records_since looks for."""
    if record.kind in _STATEMENTS:
        return not unnamed.isdisjoint(record.subjects)
    if record.kind == RecordKind.RECORD_KIND_DECISION:
        return DecisionRecord.FromString(record.payload).profile_key in profiles
    if record.kind != RecordKind.RECORD_KIND_OUTCOME:
        return False
    entry = log.find(OutcomeRecord.FromString(record.payload).decision_key)
    if entry is None or entry.lsn in erased:
        return entry is not None
    decided = log.get(entry.lsn)
    return decided is None or decided.is_tombstone


def _is_about(log: Log, record: Record, nodes: frozenset[bytes], profiles: frozenset[bytes], catalog: Catalog) -> bool:
    """Say whether a record is about the person, and not about somebody whose profile was the same for a time."""
    if record.kind == RecordKind.RECORD_KIND_OUTCOME:
        entry = log.find(OutcomeRecord.FromString(record.payload).decision_key)
        decided = log.get(entry.lsn) if entry is not None else None
        if decided is None or decided.is_tombstone:
            return True
        record = decided
    if record.kind != RecordKind.RECORD_KIND_DECISION:
        return record.kind in _OF_PEOPLE
    decision = DecisionRecord.FromString(record.payload)
    named = named_all(DecideRequest.FromString(decision.request).identities, catalog.profiles)
    if named:
        return any(one.key in nodes for one in named)
    return decision.profile_key in profiles


_STATEMENTS = frozenset({RecordKind.RECORD_KIND_LINK_STATED, RecordKind.RECORD_KIND_PROFILE_SPLIT})
_OF_PEOPLE = _STATEMENTS | {RecordKind.RECORD_KIND_SOURCE_RECORD}
