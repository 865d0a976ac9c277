"""Which day is meant? Dates as people and programs write them, and the one form they are compared in.

Handed a text and, where it is known, the country it comes from, which says whether day or month stands first; where it
is not known the day does. A date that is in no calendar is none.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Final

from server.profiles.texts import Cleansed, is_too_long, settle_digits, squash

YEAR_MIN: Final = 1850
YEAR_MAX: Final = 2199
# A birth date of two digits: there is no clock here, and nobody above a hundred writes two digits. Up to this year of
# the century it is ours, above it the last one.
PIVOT: Final = 29

_MONTH_FIRST: Final = frozenset({"US", "PH", "PR", "GU", "FM", "MH", "PW"})
_MONTHS: Final = {
    name: number
    for number, names in enumerate(
        (
            "jan january januar janvier janv enero ene gennaio januari jänner",
            "feb february februar février fevrier febrero febbraio februari",
            "mar march märz maerz mars marzo maart mrz", "apr april avril abril aprile avr", "may mai mayo maggio mei",
            "jun june juni juin junio giugno", "jul july juli juillet julio luglio juil",
            "aug august août aout agosto augustus",
            "sep sept september septembre septiembre settembre", "oct october oktober octobre octubre ottobre okt",
            "nov november novembre noviembre", "dec december dezember décembre decembre diciembre dicembre dez",
        ),
        start=1,
    )
    for name in names.split()
}  # fmt: skip
_COMPACT: Final = re.compile(r"(\d{4})(\d{2})(\d{2})")
_MIDNIGHT: Final = re.compile(r"(?i)[T ](?:00?:00(?::00(?:\.0+)?)?(?:Z|\+00:00)?|12:00(?::00)? ?am)$")  # of exports
_YEAR_FIRST: Final = re.compile(r"(\d{4})[-/. ]{1,2}(\d{1,2})[-/. ]{1,2}(\d{1,2})\.?")
_JAPANESE: Final = re.compile(r"(\d{4})年(\d{1,2})月(\d{1,2})日")
_YEAR_LAST: Final = re.compile(r"(\d{1,2})[-/. ]{1,2}(\d{1,2})[-/. ]{1,2}(\d{4}|\d{2})\.?")
_DAY_NAMED: Final = re.compile(
    r"(\d{1,2})(?:st|nd|rd|th|er|\.)?[-/ ]{0,2}(?:of |de )?([^\W\d_]+)"
    r"\.?,?[-/ ]{0,2}(?:de )?(\d{4}|\d{2})"
)
_MONTH_NAMED: Final = re.compile(r"([^\W\d_]+)\.? (\d{1,2})(?:st|nd|rd|th)?,? (\d{4})")


def birth_date(text: str, country_code: str = "") -> Cleansed:
    """Bring a date of birth to YYYY-MM-DD.

    Day before month, but in the United States and where their way is followed; where one of the two is above 12 the
    other is the month. Not clean: days that no calendar has, years before 1850 or after 2199, anything else.

    Cost: 3 µs.
    """
    found = read_date(text, country_code.upper() not in _MONTH_FIRST)
    return Cleansed(text, False) if found is None else Cleansed(found.isoformat(), True)


def read_date(text: str, day_first: bool = True) -> date | None:
    """Return the day that a text names; None when it names none.

    Args:
        text: as it came.
        day_first: whether 3/4/1990 is in April.
    """
    if is_too_long(text):
        return None
    plain = settle_digits(squash(text))
    if ":" in plain:
        plain = _MIDNIGHT.sub("", plain)
    for pattern in (_COMPACT, _YEAR_FIRST, _JAPANESE):
        if (match := pattern.fullmatch(plain)) is not None:
            year, month, day = map(int, match.groups())
            return _day(year, month, day)
    if (match := _YEAR_LAST.fullmatch(plain)) is not None:
        first, second = int(match[1]), int(match[2])
        day, month = (first, second) if day_first else (second, first)
        if month > 12 >= day:
            day, month = month, day
        return _day(_year(match[3]), month, day)
    lower = plain.casefold()
    if (match := _DAY_NAMED.fullmatch(lower)) is not None and match[2] in _MONTHS:
        return _day(_year(match[3]), _MONTHS[match[2]], int(match[1]))
    if (match := _MONTH_NAMED.fullmatch(lower)) is not None and match[1] in _MONTHS:
        return _day(int(match[3]), _MONTHS[match[1]], int(match[2]))
    return None


def _year(digits: str) -> int:
    year = int(digits)
    return year if len(digits) == 4 else year + (2000 if year <= PIVOT else 1900)


def _day(year: int, month: int, day: int) -> date | None:
    if not YEAR_MIN <= year <= YEAR_MAX:
        return None
    try:
        return date(year, month, day)
    except ValueError:
        return None
