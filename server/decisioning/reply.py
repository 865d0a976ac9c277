"""A decision as the caller sees it: a DecideResponse spliced from parts serialised long before.

What depends on the catalog alone (placement, position, action, treatment, content) was serialised when it was
compiled, what depends on the live set when that was made; here four numbers and a reason a slot are packed between
them. A property test parses the result and compares it with the message built field by field.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from server.wire import head, varint

# Tags of tsugi.v1.Slot: propensity = 6, value = 7, priority = 8, selection_probability = 9 (64-bit), reasons = 10
# (packed, one value). Of tsugi.v1.DecideResponse: decision_id = 1, slots = 2, degradations = 3, expire_time = 6,
# lsn = 7.
_NUMBERS = struct.Struct("<BdBdBdBdBBB")
_DECISION_ID = b"\x0a\x38"  # 56 characters follow
_SLOTS = 2
_DEGRADATIONS = b"\x1a"
_EXPIRE_TIME = b"\x32"
_LSN = b"\x38"


def slot(
    placement_bytes: bytes,
    action_bytes: bytes,
    propensity: float,
    value: float,
    priority: float,
    selection_probability: float,
    choice_reason: int,
) -> bytes:
    """Serialise one filled slot as a field of the reply."""
    numbers = _NUMBERS.pack(
        0x31, propensity, 0x39, value, 0x41, priority, 0x49, selection_probability, 0x52, 1, choice_reason
    )
    length = len(placement_bytes) + len(action_bytes) + len(numbers)
    return b"".join((head(_SLOTS, length), placement_bytes, action_bytes, numbers))


def empty_slot(placement_bytes: bytes, choice_reason: int) -> bytes:
    """Serialise one slot that nobody fills."""
    body = placement_bytes + bytes((0x52, 1, choice_reason))
    return head(_SLOTS, len(body)) + body


def decision_id(token: bytes) -> bytes:
    """Serialise the decision id."""
    return _DECISION_ID + token


def degradations(numbers: Sequence[int]) -> bytes:
    """Serialise the degradations, all below 128; nothing when there are none."""
    return b"".join((_DEGRADATIONS, bytes((len(numbers),)), bytes(numbers))) if numbers else b""


def expire_time(instant_us: int) -> bytes:
    """Serialise the instant, cut to milliseconds."""
    seconds, left_us = divmod(instant_us, 1_000_000)
    body = b"\x08" + varint(seconds)
    if left_us >= 1_000:
        body += b"\x10" + varint(left_us // 1_000 * 1_000_000)
    return b"".join((_EXPIRE_TIME, bytes((len(body),)), body))


def lsn(number: int) -> bytes:
    """Serialise the LSN."""
    return _LSN + varint(number)
