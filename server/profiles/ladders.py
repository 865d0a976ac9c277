"""How much each level of agreement says: one ladder a meaning, from full agreement to disagreement.

A level's weight is log2(m / u): m is how often it is seen between two records of one person, u how often between
records of two people (Fellegi and Sunter, "A theory for record linkage", JASA 1969). Two kinds of other people are told
apart, because they differ so much: strangers, and people of one household, who share a family name, an address, often a
telephone, and as twins even the date of birth. A pair has to be told from both.

The numbers are general knowledge, rounded; none was estimated from a set of records, though several were thought over
again after looking at what was missed, and what was merged wrongly, in public sets and in made-up households (measured
by tests/benchmark/identity.py). m holds for records typed by people or heard by telephone: 5 to 10 % of fields
mistyped, some swapped, names that change, people who move. u of exact agreement is not the frequency of a typical value
but that of one met in a typical agreement, hence of the commoner values; and it is held on the large side, because
defaults serve small and large populations alike: a date of birth says 14 bits at the most and is taken for 8, so that
some hundred thousand people may be told apart at the usual threshold of 12; with millions, a catalog may raise that. By
construction none of these alone reaches it: a name, an e-mail address, a telephone, an address, a date of birth, the
names together with the town. Each column of a ladder sums to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from tsugi.v1 import catalog_pb2


class Level(NamedTuple):
    """One rung of a ladder."""

    name: str
    m: float  # its share among pairs of records of one person, above 0
    u: float  # its share among pairs of strangers, above 0
    household: float  # its share among pairs of two people of one household, above 0

    @property
    def bits(self) -> float:
        """Its weight against strangers."""
        return math.log2(self.m / self.u)

    @property
    def household_bits(self) -> float:
        """Its weight against people of one household."""
        return math.log2(self.m / self.household)


Ladder = tuple[Level, ...]

# The rows of each ladder, in its order; ladders without a row of some name never reach it.
(GIVEN_EXACT, GIVEN_CLOSE, GIVEN_SHORT, GIVEN_SWAPPED, GIVEN_INITIAL, GIVEN_SIMILAR, GIVEN_DIFFERENT) = range(7)
(FAMILY_EXACT, FAMILY_CLOSE, FAMILY_PART, FAMILY_SWAPPED, FAMILY_SIMILAR, FAMILY_DIFFERENT) = range(6)
(FULL_EXACT, FULL_CLOSE, FULL_GIVEN, FULL_FAMILY, FULL_DIFFERENT) = range(5)
(BIRTH_EXACT, BIRTH_NEW_YEAR, BIRTH_TYPO, BIRTH_NEAR, BIRTH_AROUND, BIRTH_DIFFERENT) = range(6)
(ID_EXACT, ID_CLOSE, ID_DIFFERENT) = range(3)
(EMAIL_EXACT, EMAIL_CLOSE, EMAIL_LOCAL, EMAIL_NAME, EMAIL_DIFFERENT) = range(5)
(PHONE_EXACT, PHONE_ENDING, PHONE_CLOSE, PHONE_DIFFERENT) = range(4)
(STREET_EXACT, STREET_CLOSE, STREET_ALONE, STREET_NEIGHBOUR, STREET_SOME, STREET_DIFFERENT) = range(6)
(POSTCODE_FINE, POSTCODE_EXACT, POSTCODE_CLOSE, POSTCODE_AREA, POSTCODE_DIFFERENT) = range(5)
(CITY_EXACT, CITY_CLOSE, CITY_PART, CITY_DIFFERENT) = range(4)
(REGION_EXACT, REGION_CLOSE, REGION_DIFFERENT) = range(3)
(COUNTRY_EXACT, COUNTRY_DIFFERENT) = range(2)


def _ladder(*levels: tuple[str, float, float, float]) -> Ladder:
    return tuple(Level(*level) for level in levels)


# Parents and children, brothers and sisters rarely share a given name: 1.5 % (namesakes of a parent), or else theirs
# look alike. u of exact agreement, 1 in 30, is that of the commonest names of one generation.
_GIVEN: Final = _ladder(
    ("exact", 0.70, 0.033, 0.008),
    ("close", 0.09, 0.007, 0.003),  # a typing error, but not in how the name ends
    ("short", 0.07, 0.007, 0.013),  # a pet name, a beginning, another ending (Daniela), one of several names
    ("swapped", 0.05, 0.003, 0.0015),  # it is the other's family name
    ("initial", 0.03, 0.006, 0.006),
    ("similar", 0.03, 0.012, 0.070),  # several typing errors, or another spelling
    ("different", 0.03, 0.932, 0.8985),
)
_FAMILY: Final = _ladder(
    ("exact", 0.72, 0.016, 0.65),
    ("close", 0.09, 0.005, 0.09),
    ("part", 0.03, 0.004, 0.04),  # one of several, as in double names
    ("swapped", 0.05, 0.003, 0.03),
    ("similar", 0.03, 0.010, 0.03),
    ("different", 0.08, 0.962, 0.16),  # 8 %: marriage
)
# Only where a catalog gives it weights of its own; a full name is otherwise read as given and family name.
_FULL: Final = _ladder(
    ("exact", 0.66, 0.0007, 0.014),
    ("close", 0.20, 0.0013, 0.020),
    ("given alone", 0.06, 0.038, 0.010),
    ("family alone", 0.05, 0.020, 0.70),
    ("different", 0.03, 0.94, 0.256),
)
# Twins are 3 % of all births, a little less of the pairs in a household. The first of January is what is entered when
# only the year is known.
_BIRTH: Final = _ladder(
    ("exact", 0.76, 0.0030, 0.020),
    ("new year", 0.02, 0.0009, 0.002),
    ("typo", 0.09, 0.0025, 0.010),  # one digit, two neighbours exchanged, or month and day
    ("near", 0.05, 0.0150, 0.045),  # two digits, or two of year, month and day
    ("around", 0.03, 0.0300, 0.060),  # within thirteen months
    ("different", 0.05, 0.9486, 0.863),
)
# Twins and couples who register together often get numbers that follow one another.
_ID: Final = _ladder(
    ("exact", 0.88, 0.00006, 0.0005),
    ("close", 0.07, 0.0004, 0.060),
    ("different", 0.05, 0.99954, 0.9395),
)
# People have several addresses; couples share one.
_EMAIL: Final = _ladder(
    ("exact", 0.47, 0.0002, 0.045),
    ("close", 0.09, 0.0003, 0.015),
    ("local", 0.05, 0.002, 0.010),  # the same before the @, elsewhere
    ("name", 0.03, 0.015, 0.020),  # the same before the @, which is no more than their name
    ("different", 0.36, 0.9825, 0.910),
)
_PHONE: Final = _ladder(
    ("exact", 0.55, 0.0008, 0.40),
    ("ending", 0.03, 0.0003, 0.02),  # the same but for the prefix
    ("close", 0.05, 0.0008, 0.04),
    ("different", 0.37, 0.9981, 0.54),
)
# Where somebody lives says nothing against people who live together: the third column is the first.
_STREET: Final = _ladder(
    ("exact", 0.50, 0.0025, 0.50),
    ("close", 0.15, 0.0015, 0.15),
    ("street alone", 0.07, 0.003, 0.07),
    ("neighbour", 0.03, 0.004, 0.03),  # the street, with another number
    ("some", 0.05, 0.030, 0.05),
    ("different", 0.20, 0.959, 0.20),
)
_POSTCODE: Final = _ladder(
    ("fine", 0.35, 0.005, 0.35),  # of the kind that names some houses: long, or with letters
    ("exact", 0.35, 0.030, 0.35),
    ("close", 0.10, 0.020, 0.10),
    ("area", 0.05, 0.060, 0.05),
    ("different", 0.15, 0.885, 0.15),
)
_CITY: Final = _ladder(
    ("exact", 0.68, 0.17, 0.68),
    ("close", 0.12, 0.04, 0.12),
    ("part", 0.05, 0.025, 0.05),
    ("different", 0.15, 0.765, 0.15),
)
_REGION: Final = _ladder(("exact", 0.86, 0.45, 0.86), ("close", 0.04, 0.03, 0.04), ("different", 0.10, 0.52, 0.10))
_COUNTRY: Final = _ladder(("exact", 0.97, 0.85, 0.97), ("different", 0.03, 0.15, 0.03))

LADDERS: Final[dict[catalog_pb2.Meaning, Ladder]] = {
    catalog_pb2.MEANING_GIVEN_NAME: _GIVEN,
    catalog_pb2.MEANING_FAMILY_NAME: _FAMILY,
    catalog_pb2.MEANING_FULL_NAME: _FULL,
    catalog_pb2.MEANING_BIRTH_DATE: _BIRTH,
    catalog_pb2.MEANING_NATIONAL_ID: _ID,
    catalog_pb2.MEANING_EMAIL: _EMAIL,
    catalog_pb2.MEANING_PHONE: _PHONE,
    catalog_pb2.MEANING_STREET_ADDRESS: _STREET,
    catalog_pb2.MEANING_POSTCODE: _POSTCODE,
    catalog_pb2.MEANING_CITY: _CITY,
    catalog_pb2.MEANING_REGION: _REGION,
    catalog_pb2.MEANING_COUNTRY: _COUNTRY,
}

# Bits by which a pair of one household begins. Among pairs that share a block, two records of one person and two
# people of one household are about equally frequent, while strangers are some thousand times as many: the threshold
# holds that against strangers, and this gives back what it asks for too much against a household.
HOUSEHOLD_START_BITS: Final = 7.0


def levels(meaning: catalog_pb2.Meaning) -> Ladder:
    """Return the built-in ladder of a meaning, from full agreement to disagreement; empty for MEANING_UNSPECIFIED."""
    return LADDERS.get(meaning, ())


def weights(ladder: Ladder, own: Sequence[float] = ()) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the bits of a ladder's levels against strangers and against people of one household.

    Args:
        ladder: of a meaning.
        own: a catalog's bits against strangers, in the ladder's order; where they end early the last one stands for
            the rest, what is too much is left out. Empty: the built-in ones.

    Returns:
        Two tuples, one number a level. A catalog's number says against a household in proportion to what it says
        against strangers, and never more than the built-in one, or sharing an address could be made to merge a family;
        the built-in numbers given as one's own change nothing, and one of 0 says nothing against either.
    """
    if not own:
        return tuple(level.bits for level in ladder), tuple(level.household_bits for level in ladder)
    against_strangers = tuple(own[min(i, len(own) - 1)] for i in range(len(ladder)))
    return against_strangers, tuple(_against_household(*pair) for pair in zip(ladder, against_strangers, strict=True))


def _against_household(level: Level, bits: float) -> float:
    """Return what a level says against a household where it says so many bits against strangers."""
    if level.bits > 0.0:
        return level.household_bits * min(bits / level.bits, 1.0) if bits >= 0.0 else bits
    return level.household_bits * min(max(bits / level.bits, 0.0), 2.0) if level.bits else level.household_bits
