"""Which segments a person is in and which stage they have come to, kept current, with a touchpoint for each change.

Used by the projector alone, after a profile was folded. What decisions read is evaluated at their own instant; this is
the memory of it, for lists of a segment's people, for reports and for the timeline.
"""

from __future__ import annotations

from server.catalog.catalog import Catalog, Doubles
from server.profiles import parts
from server.storage.record import Record
from server.storage.store import Table, Transaction
from tsugi.v1.profile_pb2 import SegmentChange, StageChange, Touchpoint


class Standing:
    """Memberships and stages within one transaction, under one catalog."""

    def __init__(self, txn: Transaction, catalog: Catalog) -> None:
        self._txn = txn
        terms = catalog.profiles
        end = catalog.space.profile_slice.stop
        self._segments = terms.segments.names
        self._first_segment = end - len(self._segments)
        self._journey = terms.journey
        self._stage = self._first_segment - 1

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
            elif was_in and not is_in:
                self._txn.delete(Table.SEGMENTS, place)
            if is_in != was_in and not (is_in and segment in inherited):
                changes.append(Touchpoint(segment_change=SegmentChange(segment=segment, entered=is_in)))
        if self._journey is not None:
            stage = self._journey.stages[int(facts[self._stage])]
            stored = self._txn.get(Table.STAGES, profile_key)
            before = bytes(stored).decode() if stored is not None else self._journey.stages[0]
            if stored is None or before != stage:
                self._txn.put(Table.STAGES, profile_key, stage.encode())
            if before != stage:
                changes.append(Touchpoint(stage_change=StageChange(from_stage=before, to_stage=stage)))
        for serial, touchpoint in enumerate(changes, start=1):
            touchpoint.occurrence_time.FromMicroseconds(record.time_us)
            touchpoint.lsn = record.lsn
            key = parts.touchpoint_key(leader, record.time_us, record.lsn, serial)
            self._txn.put(Table.TIMELINE, key, touchpoint.SerializeToString(deterministic=True))

    def drop(self, profile_key: bytes) -> dict[str, int]:
        """Forget a profile's memberships and stage; return the segments with the instants it entered them."""
        entered: dict[str, int] = {}
        for segment in self._segments:
            place = segment_key(segment, profile_key)
            stored = self._txn.get(Table.SEGMENTS, place)
            if stored is not None:
                entered[segment] = int.from_bytes(bytes(stored), "big")
                self._txn.delete(Table.SEGMENTS, place)
        self._txn.delete(Table.STAGES, profile_key)
        return entered


def segment_key(segment: str, profile_key: bytes) -> bytes:
    """Return where a profile's membership of a segment stands; all of a segment's stand together."""
    return segment.encode() + b"\0" + profile_key
