"""What was in force when: the histories of catalogs, bundles and model roles, read from the log.

A history is a chain of records, each of which names the one before it; the log knows its head. Handed a log, these
functions walk a chain and find what a rollback would restore. They write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from server.decisioning.live import BASELINE, CATALOG_HEAD, MODEL_HEAD, RESET_HEAD, ROLE_HEADS
from server.errors import field_invalid
from server.storage.log import Log
from server.storage.record import Record
from tsugi.log.v1.record_pb2 import CatalogChange, LearnerReset, ModelPushed, ModelRoleChange, RecordKind

Change = CatalogChange | ModelPushed | ModelRoleChange | LearnerReset

KINDS: Final[dict[type[Change], RecordKind]] = {
    CatalogChange: RecordKind.RECORD_KIND_CATALOG_CHANGE,
    ModelPushed: RecordKind.RECORD_KIND_MODEL_PUSHED,
    ModelRoleChange: RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE,
    LearnerReset: RecordKind.RECORD_KIND_LEARNER_RESET,
}
THE_BASELINE: Final = BASELINE.encode()  # who has the role learner, where others are named by their sha256

_MESSAGES: Final[dict[int, type[Change]]] = {kind: message for message, kind in KINDS.items()}


class Entry(NamedTuple):
    """One link of a history."""

    record: Record
    change: Change

    @property
    def sha256(self) -> bytes:
        """What the change is about: a catalog or a bundle; THE_BASELINE; empty: nobody, or the fleet."""
        match self.change:
            case CatalogChange():
                return self.change.catalog_sha256
            case LearnerReset():
                return b""
            case ModelRoleChange(baseline=True):
                return THE_BASELINE
        return self.change.bundle_sha256

    @property
    def head(self) -> str:
        """The name of the history it belongs to."""
        if isinstance(self.change, ModelRoleChange):
            return ROLE_HEADS.get(self.change.role, "")
        if isinstance(self.change, LearnerReset):
            return RESET_HEAD
        return CATALOG_HEAD if isinstance(self.change, CatalogChange) else MODEL_HEAD


def entry_at(log: Log, lsn: int) -> Entry:
    """Return the change at the LSN that a head or another change names. Cost: one read."""
    record = log.get(lsn)
    assert record is not None, "a history names records"
    return Entry(record, _MESSAGES[record.kind].FromString(record.payload))


def entries(log: Log, head: str, from_lsn: int | None = None) -> Iterator[Entry]:
    """Yield a history, newest first, from a change on or from the head. Cost: one read a change.

    Raises:
        TsugiError: FIELD_INVALID: from_lsn is no change of this history.
    """
    lsn = log.head(head) if from_lsn is None else from_lsn
    if from_lsn is not None:
        first = log.get(from_lsn) if from_lsn else None
        if first is None or first.kind not in _MESSAGES or entry_at(log, from_lsn).head != head:
            raise field_invalid("page_token", "pass it exactly as received")
    while lsn:
        entry = entry_at(log, lsn)
        yield entry
        lsn = entry.change.previous_lsn


def holder(log: Log, head: str) -> bytes:
    """Return the sha256 of what is in force by a history's newest change; empty: nothing."""
    lsn = log.head(head)
    return entry_at(log, lsn).sha256 if lsn else b""


def base(log: Log, head: str) -> Entry | None:
    """Return the change whose content is in force: the newest one, or the one that it restored; None for none."""
    lsn = log.head(head)
    if not lsn:
        return None
    newest = entry_at(log, lsn)
    assert isinstance(newest.change, CatalogChange | ModelRoleChange), "only these are rolled back"
    if not newest.change.rollback:
        return newest
    return entry_at(log, newest.change.restored_lsn) if newest.change.restored_lsn else None


def before(log: Log, head: str) -> Entry | None:
    """Return the change before the one whose content is in force."""
    present = base(log, head)
    if present is None or not present.change.previous_lsn:
        return None
    earlier = entry_at(log, present.change.previous_lsn)
    assert isinstance(earlier.change, CatalogChange | ModelRoleChange), "only these are rolled back"
    restored_lsn = earlier.change.restored_lsn
    return entry_at(log, restored_lsn) if earlier.change.rollback and restored_lsn else earlier
