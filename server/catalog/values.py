"""What a typed value must be whatever its declaration says: texts of bounded length, instants that are instants.

Whether a value is of the declared type and within the declared range is Fact.encode's to say.
"""

from __future__ import annotations

import re
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from server.errors import field_invalid, limit_exceeded
from tsugi.v1.value_pb2 import Value

TEXT_BYTES_MAX: Final = 1_024

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MIN_SECONDS = -62_135_596_800  # year 1
_MAX_SECONDS = 253_402_300_799  # year 9999


def check_value(path: str, value: Value) -> None:
    """Refuse a text that is too long or has control characters, and a time that is no instant.

    Raises:
        TsugiError: LIMIT_EXCEEDED or FIELD_INVALID, naming the path.
    """
    kind = value.WhichOneof("kind")
    if kind == "text_value":
        size = len(value.text_value.encode())
        if size > TEXT_BYTES_MAX:
            raise limit_exceeded(path, size, TEXT_BYTES_MAX, "bytes")
        if _CONTROL.search(value.text_value):
            raise field_invalid(path, "control characters are not allowed")
    elif kind == "time_value":
        check_instant(path, value.time_value)


def check_instant(path: str, instant: Timestamp) -> None:
    """Refuse a timestamp outside years 1 to 9999.

    Raises:
        TsugiError: FIELD_INVALID, naming the path.
    """
    if not (_MIN_SECONDS <= instant.seconds <= _MAX_SECONDS and 0 <= instant.nanos < 1_000_000_000):
        raise field_invalid(path, "an instant within years 1 to 9999 is required")
