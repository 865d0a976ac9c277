from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.storage.record import (
    CHAIN_START,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    SUBJECTS_MAX,
    CorruptRecordError,
    Draft,
    Record,
    body_of,
    offsets,
    seal,
    unseal,
)
from tests.support.damage import tombstone_of, with_crc

LOG_ID = b"log-id-16-bytes."
SALT = bytes(range(16))
NAMES = st.binary(min_size=16, max_size=16)

DRAFTS = st.builds(
    Draft,
    kind=st.integers(0, 255),
    payload=st.binary(max_size=300),
    key=NAMES,
    payload_digest=NAMES,
    subjects=st.lists(NAMES, max_size=3).map(tuple),
    head=st.just(""),
    expected_head=st.none(),
    spends=st.just(()),
)


def sealed(
    draft: Draft, lsn: int = 1, time_us: int = 0, previous_chain: bytes = CHAIN_START, salt: bytes = SALT
) -> tuple[bytes, bytes]:
    body, digest = body_of(draft, salt)
    return seal(draft, body, digest, log_id=LOG_ID, lsn=lsn, time_us=time_us, previous_chain=previous_chain)


def chained(*drafts: Draft) -> list[bytes]:
    """Seal drafts one after the other, from LSN 1 on."""
    records, chain = [], CHAIN_START
    for lsn, draft in enumerate(drafts, start=1):
        data, chain = sealed(draft, lsn, 1_000 * lsn, chain)
        records.append(data)
    return records


def verified(records: list[bytes]) -> list[Record]:
    """Unseal records that lie together, each against the chain of the one before it."""
    found, chain = [], CHAIN_START
    block = b"".join(records)
    for offset in offsets(block):
        found.append(unseal(block, offset, chain))
        chain = found[-1].chain
    return found


SMALL = Draft(kind=2, payload=b"payload", key=b"k" * 16, payload_digest=b"d" * 16, subjects=(b"s" * 16,))


@given(DRAFTS, st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.binary(min_size=32, max_size=32))
def test_sealed_draft_comes_back_whole(draft: Draft, lsn: int, time_us: int, previous_chain: bytes) -> None:
    data, chain = sealed(draft, lsn, time_us, previous_chain)
    record = unseal(data, 0, previous_chain)
    assert record == Record(
        lsn, draft.kind, time_us, draft.payload, draft.key, draft.payload_digest, draft.subjects, False, chain
    )
    assert unseal(b"before" + data + b"after", len("before")) == record
    assert unseal(memoryview(data), 0, previous_chain) == record


def test_most_subjects_come_back_in_their_order() -> None:
    subjects = tuple(bytes([i]) * 16 for i in range(SUBJECTS_MAX))
    assert unseal(sealed(SMALL._replace(subjects=subjects))[0]).subjects == subjects


@given(st.lists(DRAFTS, max_size=5))
def test_records_that_lie_together_are_told_apart(drafts: list[Draft]) -> None:
    assert [(record.lsn, record.payload) for record in verified(chained(*drafts))] == [
        (lsn, draft.payload) for lsn, draft in enumerate(drafts, start=1)
    ]


def test_every_flipped_bit_of_a_record_is_noticed() -> None:
    data, _ = sealed(SMALL)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptRecordError):
            unseal(bytes(flipped))


def test_every_flipped_bit_of_a_record_among_others_is_noticed() -> None:
    # Here a length that was flipped upwards still fits.
    first, second, third = chained(SMALL, SMALL, SMALL)
    for position in range(8 * len(second)):
        flipped = bytearray(second)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptRecordError):
            unseal(first + bytes(flipped) + third, len(first))


def test_every_flipped_bit_of_a_tombstone_is_noticed() -> None:
    data = tombstone_of(sealed(SMALL)[0])
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptRecordError):
            unseal(bytes(flipped))


def test_every_truncation_is_noticed() -> None:
    data, _ = sealed(SMALL)
    for size in range(len(data)):
        with pytest.raises(CorruptRecordError):
            unseal(data[:size])
    for size in range(1, HEADER_BYTES):
        with pytest.raises(CorruptRecordError):
            list(offsets(data + data[:size]))


def test_record_of_a_later_format_is_refused_and_named() -> None:
    data, _ = sealed(SMALL, lsn=7)
    later = with_crc(data[:4] + struct.pack("<H", 2) + data[6:])
    with pytest.raises(CorruptRecordError, match="record 7 has format version 2, this build reads 1"):
        unseal(later)


EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "one removed": lambda records: [records[0], records[2]],
    "two swapped": lambda records: [records[0], records[2], records[1]],
    "first removed": lambda records: records[1:],
    "one repeated": lambda records: [records[0], *records],
    "one inserted": lambda records: [records[0], sealed(SMALL, 2)[0], *records[1:]],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_chain_notices_records_out_of_place(edit: Callable[[list[bytes]], list[bytes]]) -> None:
    records = chained(SMALL, SMALL._replace(payload=b"second"), SMALL._replace(payload=b"third"))
    assert len(verified(records)) == 3
    with pytest.raises(CorruptRecordError, match="chain"):
        verified(edit(records))


def test_chain_notices_every_byte_that_a_forger_with_the_checksum_changes() -> None:
    first, second, third = chained(SMALL, SMALL, SMALL)
    # All but the length, which must fit, and the checksum, which the forger makes fit.
    for position in (*range(4, 40), *range(44, len(second))):
        forged = bytearray(second)
        forged[position] ^= 0x10
        with pytest.raises(CorruptRecordError):
            verified([first, with_crc(bytes(forged)), third])


def test_chain_notices_a_border_moved_between_subjects_and_payload() -> None:
    # The body stays as it is; only what is read as subject and as payload differs.
    (data,) = chained(SMALL)
    moved = data[:44] + struct.pack("<IB", len(SMALL.payload) + 16, 0) + data[49:]
    with pytest.raises(CorruptRecordError, match="chain"):
        verified([with_crc(moved)])


def test_tombstone_tells_place_and_kind_and_the_chain_still_verifies() -> None:
    records = chained(SMALL, SMALL._replace(payload=b"personal data", kind=3), SMALL)
    whole = verified(records)
    records[1] = tombstone_of(records[1])
    assert b"personal data" not in records[1]
    assert len(records[1]) == HEADER_BYTES
    erased = verified(records)
    assert erased[0] == whole[0]
    assert erased[2] == whole[2]
    assert erased[1] == Record(2, 3, 2_000, b"", bytes(16), bytes(16), (), True, whole[1].chain)
    assert unseal(records[1]) == erased[1]


def test_tombstone_digest_tells_nothing_without_the_salt() -> None:
    one, other = (sealed(SMALL, salt=bytes([i]) * 16)[0] for i in range(2))
    assert one[64:96] != other[64:96]  # the same body under another salt


def test_record_turned_back_from_a_tombstone_with_another_body_is_noticed() -> None:
    first, second = chained(SMALL, SMALL)
    forged, _ = sealed(SMALL._replace(payload=b"another"), 2, 2_000)
    grafted = with_crc(second[:HEADER_BYTES] + forged[HEADER_BYTES:])
    with pytest.raises(CorruptRecordError, match="digest"):
        verified([first, grafted])


def test_payloads_and_subjects_out_of_bounds_are_the_programmers_fault() -> None:
    with pytest.raises(AssertionError, match="bounds every payload"):
        body_of(Draft(kind=1, payload=bytes(PAYLOAD_BYTES_MAX + 1)), SALT)
    with pytest.raises(AssertionError, match="bounds identities"):
        body_of(Draft(kind=1, payload=b"", subjects=(b"s" * 16,) * (SUBJECTS_MAX + 1)), SALT)
