"""Golden records in the state store: found by identity, read as columns, evaluated at the instant of a decision.

A stored profile is flat: the facts that decisions read, as float64 columns encoded for one catalog's fact space and
true until a stated instant; beside them what is needed to say what they are later, and the keys of the parts it was
folded from. Where the catalog in force has another layout, or a claim has been forgotten since, the reader folds afresh
from the parts.

Layout, little-endian: u32 CRC32C of the rest, u16 version, u16 number of facts, u64 LSN of the last change, 8s layout
stamp, i64 instant until which the facts hold, i64 instant from which on they are to be folded afresh, 16s key of the
node that begins it, u16 number of parts, u16 number of rows of history (0 in version 4, which had none), u32 number of
holds; 16s × parts, float64 × facts, 3 × i64 × holds, 5 × i64 × history, series (see series.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Final

import google_crc32c
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.catalog import Catalog, Doubles
from server.catalog.profile_terms import Instants
from server.profiles import derived, golden
from server.profiles.golden import Golden
from server.profiles.history import ROW_BYTES
from server.profiles.series import SeriesSet
from server.storage.store import Snapshot, Table, Transaction

PROFILE_KEY_BYTES: Final = 16

_VERSION: Final = 5
_VERSIONS_READ: Final = (4, 5)
_HOLD_BYTES: Final = 24
_HEADER: Final = struct.Struct("<IHHQ8sqq16sHHI")
_COUNTS: Final = struct.Struct("<HI")  # its end


class CorruptProfileError(Exception):
    """A stored profile is not what was written; it can be rebuilt from the log."""


class StoredRecord:
    """One stored profile, copied out of the store; taken apart where it is asked for more than its facts.

    Attributes:
        lsn: of the last change.
        layout: stamp of the fact space it was stored under.
        until_us: the first instant at which the facts are others.
        refold_us: the first instant at which other claims may stand than those the facts were folded from.
        leader: key of the node that begins it.
    """

    __slots__ = (
        "_data", "_facts_start", "_n_facts", "_n_holds", "_n_parts", "_n_shown", "layout", "leader", "lsn",
        "refold_us", "until_us",
    )  # fmt: skip

    def __init__(self, data: bytes) -> None:
        """Verify and read one record.

        Raises:
            CorruptProfileError: checksum or version do not fit.
        """
        if len(data) < _HEADER.size:
            raise CorruptProfileError("profile record is cut short")
        (
            crc, version, self._n_facts, self.lsn, self.layout, self.until_us, self.refold_us, self.leader,
            self._n_parts, self._n_shown, self._n_holds,
        ) = _HEADER.unpack_from(data)  # fmt: skip
        if google_crc32c.value(data[4:]) != crc or version not in _VERSIONS_READ:
            raise CorruptProfileError(f"profile record of version {version} fails its checksum")
        self._data = data
        self._facts_start = _HEADER.size + 16 * self._n_parts

    @property
    def parts(self) -> list[bytes]:
        """Keys of the nodes it was folded from."""
        return [self._data[start : start + 16] for start in range(_HEADER.size, self._facts_start, 16)]

    @property
    def facts(self) -> Doubles:
        """float64[n_profile], as they stood when it was stored; read-only."""
        return np.frombuffer(self._data, np.float64, self._n_facts, self._facts_start)

    @property
    def holds(self) -> Instants:
        """int64[h, 3]: see holds.fold_holds; read-only."""
        return np.frombuffer(self._data, np.int64, 3 * self._n_holds, self._holds_start).reshape(self._n_holds, 3)

    @property
    def history(self) -> bytes:
        """The rows of history.fold, as bytes; the same whatever catalog is in force. Cost: 0.1 µs without any."""
        if not self._n_shown:
            return b""
        start = self._history_start
        return self._data[start : start + ROW_BYTES * self._n_shown]

    @property
    def series(self) -> SeriesSet:
        """The person's series; read-only views."""
        return SeriesSet.from_bytes(self._data, self._history_start + ROW_BYTES * self._n_shown)

    def with_told(self, holds: Instants, history: Instants) -> bytes:
        """Return the record with other holds and another history. Cost: some 3 µs."""
        counts = _COUNTS.pack(len(history), len(holds))
        version = _VERSION.to_bytes(2, "little")
        head = version + self._data[6 : _HEADER.size - _COUNTS.size] + counts
        facts = self._data[_HEADER.size : self._holds_start]
        series = self._data[self._history_start + ROW_BYTES * self._n_shown :]
        return _sealed(b"".join((head, facts, holds.tobytes(), history.tobytes(), series)))

    @property
    def _holds_start(self) -> int:
        return int(self._facts_start + 8 * self._n_facts)

    @property
    def _history_start(self) -> int:
        return int(self._holds_start + _HOLD_BYTES * self._n_holds)


def find(snapshot: Snapshot, keys: Iterable[bytes]) -> bytes | None:
    """Return the key of the profile that the first known of some identity keys leads to. Cost: 1 µs a key."""
    for key in keys:
        found = snapshot.get(Table.IDENTITIES, key)
        if found is not None:
            return bytes(found)
    return None


def present_key(snapshot: Snapshot, profile_key: bytes) -> bytes | None:
    """Return the key of the profile that a key leads to now: itself, or the one it was merged into."""
    if snapshot.get(Table.PROFILES, profile_key) is not None:
        return profile_key
    owner = snapshot.get(Table.OWNERS, profile_key)
    node = golden.node_of(snapshot, bytes(owner)) if owner is not None else None
    return node.profile_key if node is not None else None


def load(snapshot: Snapshot, profile_key: bytes) -> StoredRecord | None:
    """Read one profile, verified.

    Raises:
        CorruptProfileError: checksum or version do not fit.

    Cost: 2 µs.
    """
    view = snapshot.get(Table.PROFILES, profile_key)
    return StoredRecord(bytes(view)) if view is not None else None


def write_facts(stored: StoredRecord, catalog: Catalog, snapshot: Snapshot, now_us: int, out: Doubles) -> Instants:
    """Write a profile's facts as they are at an instant, and return its holds.

    Args:
        stored: the profile.
        catalog: in force.
        snapshot: the state it was read from; its parts are read where it must be folded afresh.
        now_us: the instant.
        out: float64[facts], one row of a batch; the profile's part is written.

    Cost: 1 µs while the stored facts hold; some 4 where time has changed them; 100 and more under another layout, and
    from the instant at which a claim is forgotten until the projector sees to it.
    """
    space = catalog.space
    if stored.layout != space.profile_layout or now_us >= stored.refold_us:
        folded = golden.fold_stored(snapshot, stored.parts, catalog.profiles, now_us)
        golden.evaluate(folded, catalog, now_us, out)
        return folded.holds
    out[space.profile_slice] = stored.facts
    if now_us >= stored.until_us:
        derived.of(catalog).evaluate(now_us, out, stored.series)
    return stored.holds


def save(
    txn: Transaction, profile_key: bytes, folded: Golden, catalog: Catalog, lsn: int, now_us: int
) -> tuple[Doubles, int]:
    """Write one profile whole, as it is at an instant.

    Args:
        txn: the projector's.
        profile_key: where.
        folded: what is known of the person.
        catalog: in force.
        lsn: the log record that changed it.
        now_us: that record's log time.

    Returns:
        Its facts, float64[facts], NaN beyond the profile's; and the first instant at which a segment or the stage of
        the journey may be another.
    """
    facts = np.full(len(catalog.space.facts), math.nan)
    until_us, standing_until_us = golden.evaluate(folded, catalog, now_us, facts)
    profile_facts = facts[catalog.space.profile_slice]
    header = _HEADER.pack(
        0, _VERSION, profile_facts.size, lsn, catalog.space.profile_layout, until_us, folded.refold_us, folded.leader,
        len(folded.parts), len(folded.history), len(folded.holds),
    )  # fmt: skip
    told = folded.holds.tobytes() + folded.history.tobytes()
    rest = b"".join((header[4:], *folded.parts, profile_facts.tobytes(), told, folded.series.to_bytes()))
    txn.put(Table.PROFILES, profile_key, _sealed(rest))
    return facts, standing_until_us


def _sealed(rest: bytes) -> bytes:
    """Put the checksum before a record."""
    return struct.pack("<I", google_crc32c.value(rest)) + rest


def timestamp(instant_us: int) -> Timestamp:
    """Return microseconds since the epoch as a Timestamp."""
    return Timestamp(seconds=instant_us // 1_000_000, nanos=instant_us % 1_000_000 * 1_000)


def members(snapshot: Snapshot, profile_key: bytes) -> Sequence[bytes]:
    """Return the keys of a profile's parts; none for a profile that is not there."""
    stored = load(snapshot, profile_key) if profile_key else None
    return stored.parts if stored is not None else ()
