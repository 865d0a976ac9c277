"""Logs to project: what workers append, at instants a test chooses, in any order it likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import Message

from server.catalog.catalog import Catalog
from server.profiles.identity import identity_key, own_profile_key
from server.storage.log import Fate, Log
from server.storage.memory import MemoryLog
from server.storage.record import NO_KEY, Draft
from tests.support.damage import tombstone_of
from tsugi.log.v1.record_pb2 import (
    CatalogChange,
    DecisionRecord,
    ErasureAccepted,
    LinkStated,
    ModelRoleChange,
    OutcomeRecord,
    ProfileSplit,
    RecordKind,
    SlotRecord,
    SourceRecordAccepted,
)
from tsugi.requests import PyValue, source_record
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.model_pb2 import ModelRole
from tsugi.v1.profile_pb2 import Consent, Event
from tsugi.v1.profile_service_pb2 import LinkVerdict, SourceRecord

START_US = 1_760_000_000_000_000
SECOND_US = 1_000_000


class History:
    """Appends what workers would append.

    Attributes:
        now_us: the wall clock; the test moves it.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.now_us = START_US

    def put_in_force(self, catalog: Catalog) -> int:
        """Record a catalog change; returns its LSN, as all of these do."""
        return self.record(RecordKind.RECORD_KIND_CATALOG_CHANGE, CatalogChange(catalog_sha256=catalog.sha256))

    def assign_role(self, role: ModelRole = ModelRole.MODEL_ROLE_CHAMPION) -> int:
        """Record a change of model role."""
        change = ModelRoleChange(role=role, bundle_sha256=bytes(32))
        return self.record(RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE, change)

    def know(
        self,
        identities: Mapping[str, str],
        attributes: Mapping[str, PyValue] | None = None,
        event: Event | None = None,
        source: str = "crm",
        consents: Sequence[Consent] = (),
    ) -> int:
        """Record what a source says about one person."""
        return self.say(source_record("r", source, identities, attributes=attributes, event=event, consents=consents))

    def say(self, said: SourceRecord) -> int:
        """Record a source record as it stands."""
        subjects = tuple(map(identity_key, said.identities))
        return self.record(RecordKind.RECORD_KIND_SOURCE_RECORD, SourceRecordAccepted(record=said), subjects=subjects)

    def decide(
        self,
        key: bytes,
        actions: Sequence[str],
        *,
        profile_key: bytes = b"",
        on_impression: bool = False,
        propensity: float = 0.0,
        identities: Mapping[str, str] | None = None,
    ) -> int:
        """Record a decision that filled a slot an action, an empty one for ""; the same key again changes nothing.

        With a propensity, before the person's own history counted, every slot is for the goal click and is kept in it.
        """
        for_goal = SlotRecord(goal="click", general_propensity=propensity) if propensity else SlotRecord()
        slots = [SlotRecord(action=action, on_impression=on_impression and bool(action)) for action in actions]
        for slot in slots:
            if slot.action:
                slot.MergeFrom(for_goal)
        named = [Identity(namespace=namespace, value=value) for namespace, value in (identities or {}).items()]
        request = DecideRequest(identities=named).SerializeToString()
        decision = DecisionRecord(decision_key=key, profile_key=profile_key, slots=slots, request=request)
        return self.record(RecordKind.RECORD_KIND_DECISION, decision, key, (profile_key,) if profile_key else ())

    def report(self, key: bytes, action: str, outcome_type: str = "click") -> int:
        """Record an outcome."""
        outcome = OutcomeRecord(decision_key=key, action=action, type=outcome_type)
        return self.record(RecordKind.RECORD_KIND_OUTCOME, outcome)

    def link(self, one: tuple[str, str], other: tuple[str, str], verdict: str = "SAME", weight: float = 0.0) -> int:
        """Record a statement about two identities."""
        stated = LinkStated(
            identity=Identity(namespace=one[0], value=one[1]),
            other_identity=Identity(namespace=other[0], value=other[1]),
            verdict=LinkVerdict.Value(f"LINK_VERDICT_{verdict}"),
            weight=weight,
            stated_by="test",
        )
        return self.record(RecordKind.RECORD_KIND_LINK_STATED, stated)

    def split(self, leaving: Sequence[tuple[str, str]], staying: Sequence[tuple[str, str]]) -> int:
        """Record a split."""
        sides = [[Identity(namespace=name, value=value) for name, value in side] for side in (leaving, staying)]
        return self.record(
            RecordKind.RECORD_KIND_PROFILE_SPLIT, ProfileSplit(leaving=sides[0], staying=sides[1], stated_by="test")
        )

    def forget(self, erasure_key: bytes, identities: Sequence[tuple[str, str]]) -> int:
        """Record the wish to forget whoever has these identities."""
        keys = [identity_key(Identity(namespace=name, value=value)) for name, value in identities]
        return self.record(
            RecordKind.RECORD_KIND_ERASURE_ACCEPTED, ErasureAccepted(erasure_key=erasure_key, identity_keys=keys)
        )

    def tick(self) -> int:
        """Record the passing of time."""
        return self.record(RecordKind.RECORD_KIND_TICK, b"")

    def record(self, kind: int, payload: Message | bytes, key: bytes = NO_KEY, subjects: tuple[bytes, ...] = ()) -> int:
        """Record anything."""
        data = payload if isinstance(payload, bytes) else payload.SerializeToString(deterministic=True)
        (receipt,) = self.log.append([Draft(kind, data, key, subjects=subjects)], self.now_us)
        assert receipt.fate in {Fate.RECORDED, Fate.DUPLICATE}, "a test's keys are its own"
        return receipt.lsn

    def profile_key(self, lsn: int) -> bytes:
        """Return the key of the profile that the first identity of the source record at this LSN began."""
        return own_profile_key(self.log.log_id, lsn, 0)


def decision_key(number: int) -> bytes:
    """Return a decision key that a test calls by a number."""
    return b"d" * 8 + number.to_bytes(8, "big")


def erase(log: MemoryLog, lsn: int) -> None:
    """Put a tombstone in the place of one record."""
    log._records[lsn - 1] = tombstone_of(log._records[lsn - 1])
