"""What a typed value must be whatever its declaration says: of bounded length, finite, instants that are instants.

Whether a value is of the declared type and within the declared range is Fact.encode's to say.
"""

from __future__ import annotations

import math
import re
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from server.errors import field_invalid, limit_exceeded
from tsugi.v1.value_pb2 import Value

TEXT_BYTES_MAX: Final = 1_024
SET_VALUES_MAX: Final = 52  # a fact is a float64, which holds the bits of that many exactly
VECTOR_NUMBERS_MAX: Final = 256
INSTANT_WANTED: Final = "an instant within years 1 to 9999 is required"

_CURRENCY = re.compile(r"[A-Z]{3}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MIN_SECONDS = -62_135_596_800  # year 1
_MAX_SECONDS = 253_402_300_799  # year 9999


def check_value(path: str, value: Value) -> None:
    """Refuse what no declaration could allow: too long, of no currency, not finite, no instant, control characters.

    Raises:
        TsugiError: LIMIT_EXCEEDED or FIELD_INVALID, naming the path.
    """
    match value.WhichOneof("kind"):
        case "text_value":
            _check_text(path, value.text_value)
        case "time_value":
            check_instant(path, value.time_value)
        case "set_value":
            texts = value.set_value.values
            if len(texts) > SET_VALUES_MAX:
                raise limit_exceeded(path, len(texts), SET_VALUES_MAX, "values")
            for text in texts:
                _check_text(path, text)
        case "money_value":
            if not _CURRENCY.match(value.money_value.currency_code):
                raise field_invalid(path, "an ISO 4217 currency code, such as EUR, is required")
        case "vector_value":
            numbers = value.vector_value.numbers
            if len(numbers) > VECTOR_NUMBERS_MAX:
                raise limit_exceeded(path, len(numbers), VECTOR_NUMBERS_MAX, "numbers")
            if not all(map(math.isfinite, numbers)):
                raise field_invalid(path, "finite numbers are required")


def _check_text(path: str, text: str) -> None:
    size = len(text.encode())
    if size > TEXT_BYTES_MAX:
        raise limit_exceeded(path, size, TEXT_BYTES_MAX, "bytes")
    if _CONTROL.search(text):
        raise field_invalid(path, "control characters are not allowed")


def check_instant(path: str, instant: Timestamp) -> None:
    """Refuse a timestamp outside years 1 to 9999.

    Raises:
        TsugiError: FIELD_INVALID, naming the path.
    """
    if not is_instant(instant):
        raise field_invalid(path, INSTANT_WANTED)


def is_instant(instant: Timestamp) -> bool:
    """Say whether a timestamp lies within years 1 to 9999."""
    return _MIN_SECONDS <= instant.seconds <= _MAX_SECONDS and 0 <= instant.nanos < 1_000_000_000
