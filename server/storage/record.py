"""What one log record looks like on disk, and how it proves itself.

A record is a fixed header and a body. Handed drafts and positions, it makes bytes; handed bytes, it verifies and takes
them apart. It never reads a clock, a disk or a random source: salt and instants are arguments.

Layout, little-endian, 128 bytes of header::

    0   u32  length of the whole record in bytes
    4   u16  format version, 1
    6   u8   kind (tsugi.log.v1.RecordKind)
    7   u8   flags; bit 0: tombstone, the body is gone and the digest stays
    8   16s  log id, the same in every record of one log
    24  u64  LSN
    32  i64  log time, microseconds since the epoch, never less than the record before
    40  u32  CRC32C of the record without these four bytes
    44  u32  length of the payload in bytes
    48  u8   number of subjects
    49  15x  zero
    64  32s  digest: SHA-256 of the body
    96  32s  chain: SHA-256 of (previous chain, bytes 4..40 and 44..64, digest); the flag tombstone counts as 0

    body: 16s salt, 16s idempotency key (zero: none), 16s payload digest, 16s × subjects, payload

The digest is salted and the salt lies in the body, so that a tombstone, which keeps the header and drops the body,
tells nothing about what it replaced and the chain still verifies.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c

FORMAT_VERSION = 1
HEADER_BYTES = 128
NO_KEY = bytes(16)
CHAIN_START = bytes(32)
SUBJECTS_MAX = 32
PAYLOAD_BYTES_MAX = 16 * 1024 * 1024
SPENDS_MAX = 256
AMOUNT_MAX = 2**62
COUNTER_MAX = 2**63 - 1

_HEAD = struct.Struct("<IHBB16sQq")  # bytes 0..40
_SIZES = struct.Struct("<IB15x")  # bytes 44..64
_FIXED_BODY = struct.Struct("<16s16s16s")
_CRC = struct.Struct("<I")
_TOMBSTONE = 1
_HASHED_BYTES = 2_047


class CorruptRecordError(Exception):
    """Bytes that should be a record are not the record that was written."""


class Claim(NamedTuple):
    """What a draft takes for itself: of something that may be taken only so often within a span of log time.

    Attributes:
        counted: 16-byte subjects, each with the span in microseconds for which a record about it counts.
        count_max: the draft is accepted when fewer records than this count; 1 to 64.
    """

    counted: tuple[tuple[bytes, int], ...]
    count_max: int


class Spend(NamedTuple):
    """What a draft adds to the counter of a budget; the record itself does not say so.

    Attributes:
        counter: 16 bytes naming it for ever; every period of a budget has its own.
        amount: in the budget's unit, 0 to 2**62.
        limit: the draft is accepted when the counter and the amount are together at most this, 0 to 2**63 - 1. None:
            it is counted whatever it comes to, because the caller has been told already.
    """

    counter: bytes
    amount: int
    limit: int | None


class Draft(NamedTuple):
    """What somebody wants recorded; the log adds place, time and proof.

    Attributes:
        kind: tsugi.log.v1.RecordKind.
        payload: the serialised message of that kind, at most 16 MiB.
        key: 16 bytes naming the request for ever, or NO_KEY.
        payload_digest: 16 bytes that tell two payloads under one key apart.
        subjects: 16-byte references of the people it is about, at most 32.
        head: the chain of changes this record heads from now on ("catalog", "role/1"), or "".
        expected_head: when not None, the LSN the head must have for the draft to be accepted.
        claims: all of them must hold for the draft to be accepted.
        spends: at most 256, all within their limits for the draft to be accepted. Each sees those before it: several
            from one counter add up.
    """

    kind: int
    payload: bytes
    key: bytes = NO_KEY
    payload_digest: bytes = NO_KEY
    subjects: tuple[bytes, ...] = ()
    head: str = ""
    expected_head: int | None = None
    claims: tuple[Claim, ...] = ()
    spends: tuple[Spend, ...] = ()


class Record(NamedTuple):
    """One verified log record."""

    lsn: int
    kind: int
    time_us: int
    payload: bytes
    key: bytes
    payload_digest: bytes
    subjects: tuple[bytes, ...]
    is_tombstone: bool
    chain: bytes


def body_of(draft: Draft, salt: bytes) -> tuple[bytes, bytes]:
    """Serialise a draft's body and return it with its digest. Cost: one SHA-256 over the body."""
    assert len(draft.payload) <= PAYLOAD_BYTES_MAX, "validation bounds every payload"
    assert len(draft.subjects) <= SUBJECTS_MAX, "validation bounds identities"
    assert draft.head or draft.expected_head is None, "a head that is compared has a name"
    assert not draft.spends or _are_sound(draft.spends), "validation bounds budgets"
    body = b"".join((_FIXED_BODY.pack(salt, draft.key, draft.payload_digest), *draft.subjects, draft.payload))
    return body, _sha256(body)


def seal(
    draft: Draft, body: bytes, digest: bytes, *, log_id: bytes, lsn: int, time_us: int, previous_chain: bytes
) -> tuple[bytes, bytes]:
    """Give a draft its place: returns the record's bytes and its chain value."""
    head = _HEAD.pack(HEADER_BYTES + len(body), FORMAT_VERSION, draft.kind, 0, log_id, lsn, time_us)
    sizes = _SIZES.pack(len(draft.payload), len(draft.subjects))
    chain = hashlib.sha256(b"".join((previous_chain, head[4:], sizes, digest))).digest()
    rest = b"".join((sizes, digest, chain, body))
    crc = google_crc32c.extend(google_crc32c.value(head), rest)
    return b"".join((head, _CRC.pack(crc), rest)), chain


def unseal(data: memoryview | bytes, offset: int = 0, previous_chain: bytes | None = None) -> Record:
    """Verify the record that starts at offset and take it apart; the payload is a copy.

    Args:
        data: bytes of one or more records.
        offset: where the record starts.
        previous_chain: when given, the chain is verified too.

    Raises:
        CorruptRecordError: length, version, checksum, digest or chain do not fit.
    """
    end = offset + _length_at(data, offset)
    record = bytes(data[offset:end])
    length, version, kind, flags, _, lsn, time_us = _HEAD.unpack_from(record)
    if version != FORMAT_VERSION:
        raise CorruptRecordError(f"record {lsn} has format version {version}, this build reads {FORMAT_VERSION}")
    (crc,) = _CRC.unpack_from(record, 40)
    if google_crc32c.extend(google_crc32c.value(record[:40]), record[44:]) != crc:
        raise CorruptRecordError(f"record at offset {offset} fails its CRC32C")
    payload_bytes, n_subjects = _SIZES.unpack_from(record, 44)
    digest, chain = record[64:96], record[96:128]
    if previous_chain is not None:
        # The length and its flag are outside the chain: a tombstone changes both and keeps the rest.
        header = b"".join((record[4:7], bytes((flags & ~_TOMBSTONE,)), record[8:40], record[44:64]))
        if hashlib.sha256(b"".join((previous_chain, header, digest))).digest() != chain:
            raise CorruptRecordError(f"record {lsn} does not continue the chain")
    if flags & _TOMBSTONE:
        return Record(lsn, kind, time_us, b"", NO_KEY, NO_KEY, (), True, chain)
    body = record[HEADER_BYTES:]
    if previous_chain is not None and _sha256(body) != digest:
        raise CorruptRecordError(f"record {lsn} fails its digest")
    _, key, payload_digest = _FIXED_BODY.unpack_from(body)
    first = _FIXED_BODY.size
    subjects = tuple(body[first + 16 * i : first + 16 * (i + 1)] for i in range(n_subjects))
    payload = body[length - HEADER_BYTES - payload_bytes :]
    return Record(lsn, kind, time_us, payload, key, payload_digest, subjects, False, chain)


def tombstone(data: bytes) -> bytes:
    """Return what stands in a record's place once it is erased: its header, flagged; a tombstone's is itself.

    Place, kind, digest and chain stay, so that the chain verifies. What is gone: body, key, payload digest, subjects.
    """
    header = bytearray(data[:HEADER_BYTES])
    _CRC.pack_into(header, 0, HEADER_BYTES)
    header[7] |= _TOMBSTONE
    crc = google_crc32c.extend(google_crc32c.value(bytes(header[:40])), bytes(header[44:]))
    _CRC.pack_into(header, 40, crc)
    return bytes(header)


def offsets(block: memoryview | bytes) -> Iterator[int]:
    """Yield where each record of a block starts.

    Raises:
        CorruptRecordError: a length does not fit into the block.
    """
    offset, size = 0, len(block)
    while offset < size:
        yield offset
        offset += _length_at(block, offset)


def _are_sound(spends: tuple[Spend, ...]) -> bool:
    return len(spends) <= SPENDS_MAX and all(
        len(counter) == len(NO_KEY) and 0 <= amount <= AMOUNT_MAX and (limit is None or 0 <= limit <= COUNTER_MAX)
        for counter, amount, limit in spends
    )


def _sha256(data: bytes) -> bytes:
    """Hash in pieces that keep the interpreter lock: from 2,048 bytes on hashlib lets go of it.

    The committer would then wait for it up to a switch interval, for every record, while the event loop works.
    """
    if len(data) < _HASHED_BYTES:
        return hashlib.sha256(data).digest()
    view, digest = memoryview(data), hashlib.sha256()
    for start in range(0, len(data), _HASHED_BYTES):
        digest.update(view[start : start + _HASHED_BYTES])
    return digest.digest()


def _length_at(data: memoryview | bytes, offset: int) -> int:
    if offset + HEADER_BYTES > len(data):
        raise CorruptRecordError(f"a record at offset {offset} is cut short")
    (length,) = _CRC.unpack_from(data, offset)
    if not HEADER_BYTES <= length <= len(data) - offset:
        raise CorruptRecordError(f"a record at offset {offset} states an impossible length")
    return int(length)
