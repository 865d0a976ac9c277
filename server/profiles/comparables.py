"""A part's clean texts, ready to compare: folded and taken apart once, read many times.

Handed clean texts and which attribute means what, it gives what the comparisons read. It compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, TypeVar

from server.profiles import similarity
from server.profiles.similarity import Email, Name, Street
from server.profiles.texts import fold
from tsugi.v1 import catalog_pb2

VALUES_MAX: Final = 4  # of one meaning in a part; attributes beyond are left out

# What can be compared, in the order of all rows of levels below; full names only where a catalog weighs them itself.
MEANINGS: Final = (
    catalog_pb2.MEANING_GIVEN_NAME, catalog_pb2.MEANING_FAMILY_NAME, catalog_pb2.MEANING_FULL_NAME,
    catalog_pb2.MEANING_BIRTH_DATE, catalog_pb2.MEANING_NATIONAL_ID, catalog_pb2.MEANING_EMAIL,
    catalog_pb2.MEANING_PHONE, catalog_pb2.MEANING_STREET_ADDRESS, catalog_pb2.MEANING_POSTCODE,
    catalog_pb2.MEANING_CITY, catalog_pb2.MEANING_REGION, catalog_pb2.MEANING_COUNTRY,
)  # fmt: skip
GIVEN, FAMILY, FULL, BIRTH, ID, EMAIL, PHONE, STREET, POSTCODE, CITY, REGION, COUNTRY = range(12)

# Entered where nobody knows the date; they say nothing.
_NO_DATES: Final = frozenset({"19000101", "19010101", "19700101", "18991230", "18991231", "99991231"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Comparable:
    """What a part says, folded and taken apart for comparing. None and empty: it does not say."""

    given: Name | None
    family: Name | None
    is_full: bool  # both names were taken from a full one
    births: tuple[str, ...]  # YYYYMMDD
    ids: tuple[str, ...]
    emails: tuple[Email, ...]
    phones: tuple[str, ...]
    street: Street | None
    postcodes: tuple[str, ...]
    cities: tuple[str, ...]
    regions: tuple[str, ...]
    countries: tuple[str, ...]


def comparable(attributes: Sequence[Sequence[str]], texts: Mapping[str, str]) -> Comparable:
    """Return a part's texts, ready to compare.

    Args:
        attributes: by meaning, in the order of MEANINGS; names in declared order.
        texts: by attribute, clean ones only; others than those are left out.

    Cost: 20 µs for ten attributes.
    """
    said = [[texts[name] for name in group if texts.get(name)] for group in attributes]
    given, family = _fold_joined(said[GIVEN]), _fold_joined(said[FAMILY])
    is_full = bool(said[FULL]) and not (given and family)
    if is_full:
        given, family = _taken_apart(fold(said[FULL][0]), given, family)
    names = (*given.split(), *family.split())
    street = _fold_joined(said[STREET])
    return Comparable(
        given=similarity.name_of(given) if given else None,
        family=similarity.name_of(family) if family else None,
        is_full=is_full,
        births=tuple(digits for digits in map(_digits, said[BIRTH]) if len(digits) == 8 and digits not in _NO_DATES),
        ids=_several(said[ID], lambda text: fold(text).replace(" ", "")),
        emails=_several(said[EMAIL], lambda text: similarity.email_of(text.lower(), names)),
        phones=_several(said[PHONE], _digits),
        street=similarity.street_of(street) if street else None,
        postcodes=_several(said[POSTCODE], lambda text: fold(text).replace(" ", "")),
        cities=_several(said[CITY], fold),
        regions=_several(said[REGION], fold),
        countries=_several(said[COUNTRY], fold),
    )


def together(parts: Sequence[Comparable]) -> list[Comparable]:
    """Return as few comparables as say what several parts of one person say.

    All values that are compared one by one stand in the first; further ones are there for further names and streets.
    Cost: 2 µs a part.
    """
    names = list(dict.fromkeys((part.given, part.family, part.is_full) for part in parts))
    streets = list(dict.fromkeys(part.street for part in parts))
    found = []
    for i in range(max(len(names), len(streets))):
        given, family, is_full = names[i] if i < len(names) else (None, None, False)
        street = streets[i] if i < len(streets) else None
        values = [_union(getattr(part, name) for part in parts) if i == 0 else () for name in _LISTS]
        births, ids, emails, phones, postcodes, cities, regions, countries = values
        found.append(
            Comparable(
                given, family, is_full, births, ids, emails, phones, street, postcodes, cities, regions, countries
            )
        )
    return found


def _union(values: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(values)))


_LISTS: Final = ("births", "ids", "emails", "phones", "postcodes", "cities", "regions", "countries")


def _fold_joined(texts: Sequence[str]) -> str:
    return fold(" ".join(texts[:VALUES_MAX])) if texts else ""


def _several(texts: Sequence[str], clean: Callable[[str], T]) -> tuple[T, ...]:
    """Return cleaned values, each once; of what nothing is left is left out."""
    return tuple(dict.fromkeys(value for text in texts[:VALUES_MAX] if (value := clean(text)))) if texts else ()


def _digits(text: str) -> str:
    return "".join(c for c in text if "0" <= c <= "9")


def _taken_apart(full: str, given: str, family: str) -> tuple[str, str]:
    """Return given and family name of a folded full one; what is known already stays.

    The last word is the family name, with the small words before it (van der Berg); a single word is taken for one.
    """
    words = full.split()
    start = len(words) - 1
    while start > 1 and words[start - 1] in _PARTICLES:
        start -= 1
    return given or " ".join(words[: max(start, 0)]), family or " ".join(words[max(start, 0) :])


_PARTICLES: Final = frozenset(
    "al bin da de del della den der di do dos du el la le mac mc san st ter van von y zu".split()
)
