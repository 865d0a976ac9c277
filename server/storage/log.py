"""The log port: how we remember.

An append-only sequence of records, ordered by LSN and by nothing else. Every other state is a projection of it. The
contract below is executable in ``tests/contract/test_log.py``, and every engine passes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from server.errors import TsugiError
from server.storage.record import Draft, Record
from tsugi.v1.error_reason_pb2 import ErrorReason

READ_RECORDS_MAX = 4_096
GROUP_RECORDS_MAX = 256


class Fate(Enum):
    """What became of one draft."""

    RECORDED = "recorded"
    DUPLICATE = "duplicate"  # the same key and payload were recorded before
    KEY_REUSED = "key_reused"  # the same key was recorded with another payload
    HEAD_MOVED = "head_moved"  # expected_head is not the head any more
    CLAIM_REFUSED = "claim_refused"  # something was taken as often as it may be
    SPEND_REFUSED = "spend_refused"  # a budget has less left than was to be spent


class Receipt(NamedTuple):
    """What became of one draft, and where: its own place, or that of the record that stands in its way.

    Where a claim was refused, lsn is its index among the draft's claims; where a spend was, that of the first refused
    among the draft's spends.
    """

    fate: Fate
    lsn: int
    time_us: int  # log time of the group


class Tail(NamedTuple):
    """The newest record's place, log time and chain; (0, 0, …) for an empty log."""

    lsn: int
    time_us: int
    chain: bytes


class KeyEntry(NamedTuple):
    """Where the record with some key stands, and the digest of its payload."""

    lsn: int
    payload_digest: bytes


class LogUnavailableError(Exception):
    """The log cannot record, and whether it holds the group is unknown; the engine must be opened anew."""


class LogFullError(Exception):
    """The volume or the map is full; nothing of the group was recorded, and reading still works.

    Attributes:
        is_map: true when the engine's own bound is reached, false when the volume has no space.
    """

    def __init__(self, *, is_map: bool) -> None:
        super().__init__("the log's map is full" if is_map else "the log's volume is full")
        self.is_map = is_map


class Log(Protocol):
    """What every engine gives."""

    @property
    def log_id(self) -> bytes:
        """The 16 bytes that name this log for ever."""

    def append(self, drafts: Sequence[Draft], wall_us: int) -> list[Receipt]:
        """Record drafts as one group: when it returns, all of them are on disk; when it raises, none is.

        LSNs are consecutive in the order given. Log time is the greater of wall_us and the last log time. Keys, heads
        and indexes change together with the records. A draft that is refused (any fate but RECORDED) takes no LSN and
        does not hinder the others; a key given twice within the group is a duplicate too. A claim counts the records
        before, those of the same group among them.

        Counters change together with the records: by what the drafts that were recorded spend, and by nothing else. A
        spend sees what was spent before, by earlier drafts of the group among others. A counter stays at 2**63 - 1 once
        it is there.

        Args:
            drafts: 1 to 256 drafts.
            wall_us: the wall clock, microseconds since the epoch.

        Returns:
            One receipt a draft, in order.

        Raises:
            LogFullError: no space; the engine stays usable.
            LogUnavailableError: the disk refused; whether the group is durable is unknown, so it must not be
                acknowledged, and this engine takes no further append.
        """

    def tick(self, wall_us: int, idle_us_min: int) -> bool:
        """Record the passing of time when the newest record is at least idle_us_min old; say whether it did."""

    def read(self, from_lsn: int, records_max: int = READ_RECORDS_MAX) -> list[Record]:
        """Return up to records_max verified records from from_lsn on, ascending, without a gap.

        Raises:
            CorruptRecordError: a record fails its checksum or is missing.
        """

    def get(self, lsn: int) -> Record | None:
        """Return one verified record, or None when there is none.

        Raises:
            CorruptRecordError: the record fails its checksum.
        """

    def erase(self, lsns: Sequence[int]) -> int:
        """Replace records by tombstones and forget what they said and whom they were about; return how many were new.

        Place, kind and log time stay, the chain still verifies, and find() still leads from their keys to their LSNs:
        a request is known for ever. In groups of at most 64: when it returns, all are on disk; when it raises, some
        groups may be, and to erase the same records again goes on from there. Counters stay as they are.

        Args:
            lsns: of records in the log, any order and number. Those erased before are skipped. One that heads a chain
                of changes is the programmer's fault.

        Raises:
            LogFullError, LogUnavailableError: as for append.
            CorruptRecordError: a record cannot be read.
        """

    def find(self, key: bytes) -> KeyEntry | None:
        """Return where the record with this key stands."""

    def about(self, subject: bytes) -> list[int]:
        """Return the LSNs of all records about one subject, ascending."""

    def head(self, name: str) -> int:
        """Return the LSN of the newest record of a chain of changes, 0 before the first."""

    def spent(self, counters: Sequence[bytes]) -> list[int]:
        """Return what each of some counters stands at, 0 to 2**63 - 1; 0 where it was never spent from.

        All at one instant, in the order asked. Cost: one read transaction, about 2 µs, and 1 µs a counter.
        """

    def tail(self) -> Tail:
        """Return the place of the newest record. Cost: one read transaction, about 2 µs."""

    def verify(self) -> Tail:
        """Read the whole log, verifying every digest, the chain, and that keys and subjects find; return the tail.

        Counters are taken as they stand: no record says what it spent.

        Raises:
            CorruptRecordError: names the first record that fails.
        """

    def close(self) -> None:
        """Let go of files; nothing may be called afterwards."""


def follow(log: Log, from_lsn: int) -> Iterator[Record]:
    """Yield the records from from_lsn on until the present end, in bounded reads."""
    while records := log.read(from_lsn):
        yield from records
        from_lsn = records[-1].lsn + 1


def settled(receipt: Receipt) -> Receipt:
    """Return the receipt of a draft that stands in the log, now or since before.

    Raises:
        TsugiError: the key was used with another payload, or the head has moved.
    """
    if receipt.fate is Fate.KEY_REUSED:
        raise TsugiError(
            ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED,
            "this id was used before with another payload; the first stands, use a new id",
            lsn=receipt.lsn,
        )
    if receipt.fate is Fate.HEAD_MOVED:
        raise TsugiError(
            ErrorReason.ERROR_REASON_ETAG_MISMATCH,
            f"etag: the present one is {receipt.lsn}; read again and decide anew",
            etag=receipt.lsn,
        )
    return receipt


def refusal(error: LogFullError | LogUnavailableError) -> TsugiError:
    """Say to a caller that nothing was recorded."""
    if isinstance(error, LogFullError):
        if error.is_map:
            return TsugiError(
                ErrorReason.ERROR_REASON_LOG_MAP_FULL,
                "the log's map is full, nothing was recorded; raise log.map_bytes, then retry with the same id",
            )
        return TsugiError(
            ErrorReason.ERROR_REASON_LOG_VOLUME_FULL,
            "the log's volume is full, nothing was recorded; free space, then retry with the same id",
        )
    return TsugiError(ErrorReason.ERROR_REASON_LOG_UNAVAILABLE, "the log cannot record now; retry with the same id")
