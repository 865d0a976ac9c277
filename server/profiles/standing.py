"""Which segments a person is in and which stage they have come to, kept current, with a touchpoint for each change.

Used by the projector alone, after a profile was folded. What decisions read is evaluated at their own instant; this is
the memory of it, for lists of a segment's people, for reports and for the timeline.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from server.catalog.catalog import Catalog, Doubles
from server.profiles import parts
from server.storage.record import Record
from server.storage.store import Snapshot, Table, Transaction
from tsugi.v1.profile_pb2 import SegmentChange, StageChange, Touchpoint

PEOPLE_COUNT: Final = b"people"  # what all people are counted under

_SEGMENT: Final = b"segment\0"


class Standing:
    """Memberships and stages within one transaction, under one catalog."""

    def __init__(self, txn: Transaction, catalog: Catalog) -> None:
        self._txn = txn
        terms = catalog.profiles
        end = catalog.space.profile_slice.stop
        self._segments = terms.segments.names
        counted = (key.removeprefix(_SEGMENT).decode() for key, _ in txn.scan(Table.COUNTS, _SEGMENT))
        self._left = [segment for segment in counted if segment not in self._segments]  # by the catalog, not by people
        self._first_segment = end - len(self._segments)
        self._journey = terms.journey
        self._stage = self._first_segment - 1
        self._changes: Counter[bytes] = Counter()

    @property
    def is_declared(self) -> bool:
        """Say whether the catalog has any segment or stage to keep."""
        return bool(self._segments) or self._journey is not None

    def update(
        self, profile_key: bytes, leader: bytes, facts: Doubles, record: Record, inherited: dict[str, int]
    ) -> None:
        """Bring a profile's memberships and stage into step with its facts.

        Args:
            profile_key: whose.
            leader: the node under which changes stand on the timeline.
            facts: float64[facts], evaluated at the record's log time.
            record: what changed the profile.
            inherited: segments that profiles merged into this one were in, with the instants they entered.
        """
        changes: list[Touchpoint] = []
        for offset, segment in enumerate(self._segments):
            place = segment_key(segment, profile_key)
            is_in, was_in = facts[self._first_segment + offset] == 1.0, self._txn.get(Table.SEGMENTS, place) is not None
            if is_in and not was_in:
                entered_us = inherited.get(segment, record.time_us)
                self._txn.put(Table.SEGMENTS, place, entered_us.to_bytes(8, "big"))
                self._changes[segment_count(segment)] += 1
            elif was_in and not is_in:
                self._leave(segment, profile_key)
            if is_in != was_in and not (is_in and segment in inherited):
                changes.append(Touchpoint(segment_change=SegmentChange(segment=segment, entered=is_in)))
        for segment in self._left:
            self._leave(segment, profile_key)
        if self._journey is not None:
            stage = self._journey.stages[int(facts[self._stage])]
            stored = self._txn.get(Table.STAGES, profile_key)
            before = bytes(stored).decode() if stored is not None else self._journey.stages[0]
            if stored is None or before != stage:
                self._txn.put(Table.STAGES, profile_key, stage.encode())
                self._changes[stage_count(stage)] += 1
            if stored is not None and before != stage:
                self._changes[stage_count(before)] -= 1
            if before != stage:
                changes.append(Touchpoint(stage_change=StageChange(from_stage=before, to_stage=stage)))
        else:
            self._forget_stage(profile_key)
        for serial, touchpoint in enumerate(changes, start=1):
            touchpoint.occurrence_time.FromMicroseconds(record.time_us)
            touchpoint.lsn = record.lsn
            key = parts.touchpoint_key(leader, record.time_us, record.lsn, serial)
            self._txn.put(Table.TIMELINE, key, touchpoint.SerializeToString(deterministic=True))

    def drop(self, profile_key: bytes) -> dict[str, int]:
        """Forget a profile's memberships and stage; return the segments with the instants it entered them."""
        entered: dict[str, int] = {}
        for segment in (*self._segments, *self._left):
            stored = self._txn.get(Table.SEGMENTS, segment_key(segment, profile_key))
            if stored is not None:
                entered[segment] = int.from_bytes(bytes(stored), "big")
                self._leave(segment, profile_key)
        self._forget_stage(profile_key)
        return entered

    def _forget_stage(self, profile_key: bytes) -> None:
        stage = self._txn.get(Table.STAGES, profile_key)
        if stage is not None:
            self._changes[stage_count(bytes(stage).decode())] -= 1
            self._txn.delete(Table.STAGES, profile_key)

    def _leave(self, segment: str, profile_key: bytes) -> None:
        """End a membership, where there is one."""
        if self._txn.delete(Table.SEGMENTS, segment_key(segment, profile_key)):
            self._changes[segment_count(segment)] -= 1

    def count_people(self, n_more: int) -> None:
        """Count people who are new, or gone."""
        self._changes[PEOPLE_COUNT] += n_more

    def flush(self) -> None:
        """Write back what was counted."""
        for what, n_more in sorted(self._changes.items()):
            n_people = count(self._txn, what) + n_more
            assert n_people >= 0, "who leaves was counted"
            if n_people:
                self._txn.put(Table.COUNTS, what, n_people.to_bytes(8, "big"))
            else:
                self._txn.delete(Table.COUNTS, what)
        self._changes.clear()


def count(snapshot: Snapshot, what: bytes) -> int:
    """Return how many people are counted under a name. Cost: one read."""
    stored = snapshot.get(Table.COUNTS, what)
    return int.from_bytes(bytes(stored), "big") if stored is not None else 0


def segment_count(segment: str) -> bytes:
    """Return what a segment's people are counted under."""
    return _SEGMENT + segment.encode()


def stage_count(stage: str) -> bytes:
    """Return what the people at a stage are counted under."""
    return b"stage\0" + stage.encode()


def segment_key(segment: str, profile_key: bytes) -> bytes:
    """Return where a profile's membership of a segment stands; all of a segment's stand together."""
    return segment.encode() + b"\0" + profile_key
