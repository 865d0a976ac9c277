"""Protobuf's wire format, as far as replies and records are spliced from it by hand.

A message is the concatenation of its fields in any order, and parts that never change were serialised long before; what
remains is to put a tag and a length before bytes. Property tests parse the results with the generated code.
"""

from __future__ import annotations

import functools
from typing import Final

_HEADS_KEPT: Final = 65_536


def varint(number: int) -> bytes:
    """Serialise a number, 0 or more."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@functools.lru_cache(_HEADS_KEPT)
def head(field: int, length: int) -> bytes:
    """Serialise tag and length of a length-delimited field. Cost: 60 ns once a length has been seen."""
    return varint(field << 3 | 2) + varint(length)
