"""Numbers, amounts and instants as files write them: one reading or none.

Pure functions of a text and of what the mapping says about it. ``None`` says that the text has no reading, or two.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

_CHARS_MAX: Final = 64  # no number or instant is longer; bounds what the expressions below look at
_PLAIN: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_GROUPED: Final = {  # with the separators that the mapping states
    ".": re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", re.ASCII),
    ",": re.compile(r"[+-]?\d{1,3}(?:\.\d{3})+(?:,\d*)?", re.ASCII),
}
_COMMA: Final = re.compile(r"[+-]?(?:\d+(?:,\d*)?|,\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_CODE: Final = re.compile(r"\s*(?:([A-Z]{3})\s*)?([^A-Z]*?)(?:\s*([A-Z]{3}))?\s*")
_SYMBOLS: Final = {"€": "EUR", "£": "GBP", "$": "USD", "¥": "JPY"}

_ISO: Final = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:\s?Z|\s?[+-]\d\d:?\d\d)?)?", re.ASCII
)
_COMPACT: Final = re.compile(r"\d{8}", re.ASCII)
_DAY: Final = re.compile(r"(\d{1,2})([./-])(\d{1,2})\2(\d{4})(?:[T ](\d{1,2}):(\d\d)(?::(\d\d))?)?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def number(text: str, decimal: str) -> float | None:
    """Read a number; thousands separators only where the decimal sign is stated.

    Args:
        text: as the file has it; blanks around it are passed over.
        decimal: "." or ","; empty: a point, and no thousands separators.
    """
    digits = _digits(text, decimal)
    return None if digits is None else float(digits)


def micros(text: str, currency: str, decimal: str) -> int | None:
    """Read an amount in millionths, rounded; a currency that it names must be the expected one.

    Args:
        text: such as 12.50, EUR 12.50, 12.50 €.
        currency: ISO 4217 code that is expected.
        decimal: as for number.
    """
    if len(text) > _CHARS_MAX:
        return None
    for symbol, code in _SYMBOLS.items():
        text = text.replace(symbol, f" {code} ")
    found = _CODE.fullmatch(text)
    if found is None or any(code not in {None, currency} for code in found.group(1, 3)):
        return None
    digits = _digits(found[2], decimal)
    return None if digits is None else round(Decimal(digits) * 1_000_000)


def instant(text: str, day_first: bool | None) -> int | None:
    """Read an instant in microseconds since the epoch; without a zone it is UTC, a day is its first instant.

    Args:
        text: ISO 8601, YYYYMMDD, or day, month and year with points, slashes or hyphens between.
        day_first: whether 03/04/2026 is in April. None: it has two readings, hence none; 13/04/2026 has one, and so
            have days with points, which are written day first everywhere.
    """
    text = text.strip()
    if len(text) > _CHARS_MAX:
        return None
    try:
        if _ISO.fullmatch(text):
            moment = datetime.fromisoformat(text.replace(" Z", "Z").replace(" +", "+"))
        elif _COMPACT.fullmatch(text):
            moment = datetime(int(text[:4]), int(text[4:6]), int(text[6:]))
        elif found := _DAY.fullmatch(text):
            moment = _in_order(found, day_first)
        else:
            return None
    except ValueError:  # a day or an hour that does not exist, or two readings
        return None
    span = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds


def _digits(text: str, decimal: str) -> str | None:
    """Return a number as Python reads it."""
    text = text.strip()
    if len(text) > _CHARS_MAX:
        return None
    if decimal == ",":
        if _COMMA.fullmatch(text):
            return text.replace(",", ".")
        return text.replace(".", "").replace(",", ".") if _GROUPED[","].fullmatch(text) else None
    if _PLAIN.fullmatch(text):
        return text
    return text.replace(",", "") if decimal and _GROUPED["."].fullmatch(text) else None


def _in_order(found: re.Match[str], day_first: bool | None) -> datetime:
    first, mark, second, year, hour, minute, second_of_minute = found.groups()
    day, month = int(first), int(second)
    if day_first is False or (day_first is None and month > 12 and mark != "."):
        day, month = month, day
    elif day_first is None and mark != "." and day <= 12 and day != month:
        raise ValueError("it has two readings")
    return datetime(int(year), month, day, int(hour or 0), int(minute or 0), int(second_of_minute or 0))
