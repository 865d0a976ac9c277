"""Whether two parts without a shared identity are of one person: what to compare, where to look, how much it says.

Handed the clean texts of parts and a catalog's terms, it gives blocking keys, the weight of a pair in bits (Fellegi and
Sunter 1969; the numbers are in ``ladders.py``, the comparisons in ``similarity.py``), and clusters. It keeps and reads
nothing; the same texts give the same result in any order, process and release of Python.

A pair's weight is the lesser of two: against strangers, and against people of one household, who share what a household
shares. So neither a family nor twins become one person by their address, telephone and family name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from server.catalog.profile_terms import ProfileTerms
from server.profiles import comparables, ladders, similarity
from server.profiles.comparables import COUNTRY, FULL, MEANINGS, STREET, Comparable, together
from server.profiles.ladders import HOUSEHOLD_START_BITS, levels
from server.profiles.similarity import Name
from tsugi.v1 import catalog_pb2

__all__ = [
    "BETWEEN_BITS_MIN", "BLOCK_PARTS_MAX", "Agreement", "Comparable", "MatchFields", "blocking_keys", "cluster",
    "comparable", "explain", "fields_of", "levels", "match_fields", "together", "weight", "weight_between",
]  # fmt: skip

BLOCK_PARTS_MAX: Final = 64  # a block of more says nothing, and comparing all of it would cost milliseconds
BLOCK_KEY_BYTES: Final = 8
BETWEEN_BITS_MIN: Final = 10.0  # two people are not made one when less is left of a link's weight, see cluster()

_UNKNOWN: Final = -1  # missing on either side: says nothing

# Town, postcode and street are one fact told three times over: beside the one that says most, the others count for a
# part. Somebody who moved differs in all of them at once, hence the lesser part.
_PLACE_AGREEMENT_SHARE: Final = 0.5
_PLACE_DISAGREEMENT_SHARE: Final = 0.25

T = TypeVar("T")


class Agreement(NamedTuple):
    """What one attribute adds to a pair's weight."""

    attribute: str  # the first declared one of its meaning; empty: for what a household begins with
    level: str  # of the meaning's ladder
    bits: float


@dataclass(frozen=True, slots=True)
class MatchFields:
    """Which attributes are compared, and what each level of agreement adds; made once a catalog."""

    attributes: tuple[tuple[str, ...], ...]  # by meaning, in declared order
    against_strangers: tuple[tuple[float, ...], ...]  # by meaning, by level, bits
    against_household: tuple[tuple[float, ...], ...]  # the same
    is_full_weighed: bool  # full names have weights of their own


def fields_of(terms: ProfileTerms) -> MatchFields:
    """Return what a catalog's attributes are matched by."""
    return match_fields([(one.name, one.meaning) for one in terms.attributes], terms.matching.weights)


def match_fields(
    attributes: Iterable[tuple[str, catalog_pb2.Meaning]], weights: Mapping[str, Sequence[float]]
) -> MatchFields:
    """Return what attributes are matched by.

    Attributes of one meaning are read as one: of several telephones, towns or dates the two that agree best count, and
    names and the lines of a street address are put together in declared order.

    Args:
        attributes: name and meaning of each, in declared order; those without a meaning are left out.
        weights: by attribute, bits in the order of its meaning's ladder, in place of the built-in ones; of several
            attributes of one meaning those of the first count.
    """
    by_meaning: dict[catalog_pb2.Meaning, list[str]] = {}
    for name, meaning in attributes:
        by_meaning.setdefault(meaning, []).append(name)
    names = tuple(tuple(by_meaning.get(meaning, ())) for meaning in MEANINGS)
    own = tuple(next((weights[name] for name in group if name in weights), ()) for group in names)
    bits = [ladders.weights(levels(meaning), given) for meaning, given in zip(MEANINGS, own, strict=True)]
    return MatchFields(
        attributes=names,
        against_strangers=tuple(pair[0] for pair in bits),
        against_household=tuple(pair[1] for pair in bits),
        is_full_weighed=bool(own[FULL]),
    )


def comparable(fields: MatchFields, texts: Mapping[str, str]) -> Comparable:
    """Return a part's texts, ready to compare.

    Args:
        fields: of the catalog in force.
        texts: by attribute, clean ones only; others than those of the fields are left out.

    Cost: 20 µs for ten attributes.
    """
    return comparables.comparable(fields.attributes, texts)


def weight(fields: MatchFields, a: Comparable, b: Comparable) -> float:
    """Return how much two parts agree, in bits: log2 of how much likelier that is for one person than for two.

    What is missing on either side adds nothing, and where nothing can be compared the weight is 0.0. The order of the
    two is without effect. Cost: 4 µs for one person's, 15 for strangers'.
    """
    return _lesser(fields, _rows(fields, a, b))


def weight_between(fields: MatchFields, ones: Sequence[Comparable], others: Sequence[Comparable]) -> float:
    """Return how much two people agree of whom several parts each are known, in bits.

    Of each meaning the level of the two parts that agree best counts. So what one part leaves open another can settle:
    father and son of one name stay apart, though a third part without a date of birth is like either.

    Args:
        fields: of the catalog in force.
        ones: of one person, one or more; better ``together``.
        others: of the other, one or more.

    Cost: that of a weight for each pair.
    """
    pairs = [_rows(fields, one, other) for one in ones for other in others]
    return _lesser(fields, pairs[0] if len(pairs) == 1 else _best_rows(pairs))


def _best_rows(pairs: Iterable[Sequence[int]]) -> list[int]:
    return [min((row for row in rows if row != _UNKNOWN), default=_UNKNOWN) for rows in zip(*pairs, strict=True)]


def _lesser(fields: MatchFields, rows: Sequence[int]) -> float:
    against_household = HOUSEHOLD_START_BITS + _total(fields.against_household, rows)
    return min(_total(fields.against_strangers, rows), against_household)


def explain(fields: MatchFields, a: Comparable, b: Comparable) -> list[Agreement]:
    """Return what a weight is made of; the bits add up to it.

    Where people of one household are harder to tell apart than strangers, the bits are those against a household, and
    the first entry, of no attribute, is what such a pair begins with.
    """
    rows = _rows(fields, a, b)
    bits, start = fields.against_strangers, 0.0
    if HOUSEHOLD_START_BITS + _total(fields.against_household, rows) < _total(fields.against_strangers, rows):
        bits, start = fields.against_household, HOUSEHOLD_START_BITS
    counted = [bits[i][row] if row != _UNKNOWN else 0.0 for i, row in enumerate(rows)]
    counted[STREET:] = _discounted(counted[STREET:])
    agreements = [Agreement("", "one household", start)] if start else []
    for i, row in enumerate(rows):
        if row != _UNKNOWN:
            attribute = (fields.attributes[i] or fields.attributes[FULL])[0]
            agreements.append(Agreement(attribute, levels(MEANINGS[i])[row].name, counted[i]))
    return agreements


def _total(bits: Sequence[Sequence[float]], rows: Sequence[int]) -> float:
    """Return the sum of what levels add, places counted as one fact."""
    total = 0.0
    for i in range(STREET):
        row = rows[i]
        if row >= 0:
            total += bits[i][row]
    best = worst = agreeing = disagreeing = 0.0
    for i in range(STREET, COUNTRY + 1):
        row = rows[i]
        if row >= 0:
            added = bits[i][row]
            if added > 0.0:
                agreeing += added
                best = max(best, added)
            else:
                disagreeing += added
                worst = min(worst, added)
    total += best + _PLACE_AGREEMENT_SHARE * (agreeing - best)
    return total + worst + _PLACE_DISAGREEMENT_SHARE * (disagreeing - worst)


def _discounted(added: Sequence[float]) -> list[float]:
    """Return what each place counts for beside the others: the sum is that of _total."""
    best, worst = max(added), min(added)
    is_best_left, is_worst_left = best > 0.0, worst < 0.0
    counted = []
    for one in added:
        if one == best and is_best_left:
            is_best_left = False
            counted.append(one)
        elif one == worst and is_worst_left:
            is_worst_left = False
            counted.append(one)
        else:
            counted.append(one * (_PLACE_AGREEMENT_SHARE if one > 0.0 else _PLACE_DISAGREEMENT_SHARE))
    return counted


def _rows(fields: MatchFields, a: Comparable, b: Comparable) -> tuple[int, ...]:
    """Return the level of each meaning, in their order."""
    given, family = _name_rows(a, b)
    full = _UNKNOWN
    if fields.is_full_weighed and a.is_full and b.is_full:
        full, given, family = _full_row(given, family), _UNKNOWN, _UNKNOWN
    return (
        given,
        family,
        full,
        _best(similarity.birth_level, a.births, b.births),
        _best(similarity.id_level, a.ids, b.ids),
        _best(similarity.email_level, a.emails, b.emails),
        _best(similarity.phone_level, a.phones, b.phones),
        similarity.street_level(a.street, b.street) if a.street and b.street else _UNKNOWN,
        _best(similarity.postcode_level, a.postcodes, b.postcodes),
        _best(similarity.city_level, a.cities, b.cities),
        _best(similarity.region_level, a.regions, b.regions),
        _best(similarity.country_level, a.countries, b.countries),
    )


def _best(level: Callable[[T, T], int], ones: Sequence[T], others: Sequence[T]) -> int:
    """Return the level of the two values that agree best."""
    if not ones or not others:
        return _UNKNOWN
    if len(ones) == 1 == len(others):
        return level(ones[0], others[0])
    return min(level(one, other) for one in ones for other in others)


def _name_rows(a: Comparable, b: Comparable) -> tuple[int, int]:
    """Return the levels of given and family name, which may stand in each other's place on one side."""
    given = similarity.given_level(a.given, b.given) if a.given and b.given else _UNKNOWN
    family = similarity.family_level(a.family, b.family) if a.family and b.family else _UNKNOWN
    is_given_alike = _UNKNOWN < given <= ladders.GIVEN_SHORT
    is_family_alike = _UNKNOWN < family <= ladders.FAMILY_PART
    if is_given_alike or is_family_alike:
        if (a.is_full or b.is_full) and not (is_given_alike and is_family_alike):
            return _regrouped_rows(a, b, given, family)
        return given, family
    crossed = (_likeness(a.given, b.family), _likeness(a.family, b.given))
    if max(crossed) != _ALIKE or min(crossed) == _UNLIKE:
        return given, family
    # Where only one of the four names can be compared with another, it counts as the family name, whoever wrote it.
    return _UNKNOWN if _MISSING in crossed else ladders.GIVEN_SWAPPED, ladders.FAMILY_SWAPPED


_UNLIKE, _MISSING, _SIMILAR, _ALIKE = range(-1, 3)


def _likeness(one: Name | None, other: Name | None) -> int:
    """Return how alike a given and a family name are."""
    if not one or not other:
        return _MISSING
    if similarity.is_close(one.text, other.text):
        return _ALIKE
    return _SIMILAR if similarity.is_similar(one, other) else _UNLIKE


def _regrouped_rows(a: Comparable, b: Comparable, given: int, family: int) -> tuple[int, int]:
    """Return better levels where a full name was taken apart in another place: Maria Garcia (Lopez)."""
    words, others = ({*(name.words if name else ()), *(last.words if last else ())}
                     for name, last in ((a.given, a.family), (b.given, b.family)))  # fmt: skip
    if words == others:
        return ladders.GIVEN_EXACT, ladders.FAMILY_EXACT
    if len(words & others) >= 2 and (words < others or others < words):
        return ladders.GIVEN_SHORT, ladders.FAMILY_PART
    return given, family


def _full_row(given: int, family: int) -> int:
    is_given = given in {ladders.GIVEN_EXACT, ladders.GIVEN_SHORT, ladders.GIVEN_CLOSE, ladders.GIVEN_SWAPPED,
                         ladders.GIVEN_INITIAL}  # fmt: skip
    is_family = family in {ladders.FAMILY_EXACT, ladders.FAMILY_CLOSE, ladders.FAMILY_PART, ladders.FAMILY_SWAPPED}
    if given == ladders.GIVEN_EXACT and family == ladders.FAMILY_EXACT:
        return ladders.FULL_EXACT
    if is_given and is_family:
        return ladders.FULL_CLOSE
    if given == _UNKNOWN == family:
        return _UNKNOWN
    if is_given:
        return ladders.FULL_GIVEN
    return ladders.FULL_FAMILY if is_family else ladders.FULL_DIFFERENT


def blocking_keys(fields: MatchFields, one: Comparable) -> list[bytes]:
    """Return where to look for parts of the same person: each key is one block, 8 bytes, distinct, in no order.

    Each key joins two facts or takes one that is rare by itself, so that blocks stay small among a million people; and
    any typing error, swap or gap leaves some keys as they are. Given and family name are not told apart, since they are
    swapped at times.

    Args:
        fields: of the catalog in force.
        one: the part's.

    Returns:
        Some 16 keys, up to 30; none where the part says too little. Cost: 16 µs.
    """
    del fields  # the same whatever a catalog weighs
    return [_block_key(text) for text in dict.fromkeys(_block_texts(one))]


def _block_key(text: str) -> bytes:
    return hashlib.blake2b(
        text.encode(errors="surrogatepass"), digest_size=BLOCK_KEY_BYTES, person=b"tsugi.block"
    ).digest()


def _block_texts(one: Comparable) -> Iterable[str]:
    sounds = sorted({similarity.sound(word) for name in (one.given, one.family) if name for word in name.words[:2]})
    pairs = [f"{a}|{b}" for i, a in enumerate(sounds) for b in sounds[i + 1 :]]
    yield from _birth_blocks(one, sounds, pairs)
    yield from _place_blocks(one, sounds, pairs)
    for identifier in one.ids:
        yield f"id|{identifier}"
    for email in one.emails:
        yield f"email|{email.text}"
        if not email.is_name:
            yield f"local|{email.local}"
    for phone in one.phones:
        yield f"phone|{phone[-8:]}"


def _birth_blocks(one: Comparable, sounds: Sequence[str], pairs: Sequence[str]) -> Iterable[str]:
    for birth in one.births:
        year, month, day = birth[:4], birth[4:6], birth[6:]
        first, last = sorted((month, day))
        yield f"birth|{year}{first}{last}"
        for sound in sounds:
            yield f"birth, name|{year}{first}{last}|{sound[0]}"
            yield f"name, month|{sound}|{year}{month}"
            yield f"name, day|{sound}|{year}|{day}"
            yield f"name, birthday|{sound}|{month}{day}"
        for pair in pairs:
            yield f"names, year|{pair}|{year}"


def _place_blocks(one: Comparable, sounds: Sequence[str], pairs: Sequence[str]) -> Iterable[str]:
    for pair in pairs:
        yield f"names|{pair}"
        for city in one.cities:
            yield f"names, city|{pair}|{similarity.sound(city)}"
        for postcode in one.postcodes:
            yield f"names, postcode|{pair}|{postcode[:3]}"
    for sound in sounds:
        for postcode in one.postcodes:
            yield f"name, postcode|{sound}|{postcode}"
    if one.street:
        word = max(sorted(one.street.words), key=len, default="")
        for number in sorted(one.street.numbers)[:2]:
            yield f"street|{number}|{similarity.sound(word)}"
        for sound in sounds:
            yield f"name, street|{sound}|{word}"


def cluster(
    n: int,
    edges: Iterable[tuple[int, int, float]],
    between: Callable[[Sequence[int], Sequence[int]], float],
    between_min: float = BETWEEN_BITS_MIN,
) -> list[int]:
    """Say which of n parts are one person, so that a chain of look-alikes does not join people who differ.

    Edges are taken from the heaviest to the lightest. Each makes one cluster of two, if these agree as wholes too. The
    result depends on the set of edges alone, neither on the order in which they are given nor on their direction.

    Args:
        n: how many parts there are, numbered in the order of their keys: of edges of one weight that with the lower
            numbers goes first.
        edges: (part, other part, bits), those heavy enough to link.
        between: how much two clusters agree, given the numbers of their parts: ``weight_between``. Symmetric.
        between_min: bits.

    Returns:
        A label a part, the least number in its cluster. Cost: O(edges log edges), and a call of between for each edge
        that does not lie within a cluster.
    """
    members = {i: [i] for i in range(n)}
    labels = list(range(n))
    for _, i, j in sorted((-bits, min(i, j), max(i, j)) for i, j, bits in edges):
        one, other = sorted((labels[i], labels[j]))
        if one == other or between(members[one], members[other]) < between_min:
            continue
        for row in members[other]:
            labels[row] = one
        members[one] += members.pop(other)
    return labels
