"""How alike two texts of one meaning are: the rung of the meaning's ladder they stand on.

Handed texts that were cleansed and folded (lower case, no accents, single spaces), each function gives a row of a
ladder (``ladders.py``), lowest for full agreement. It knows neither weights nor records. Nothing here depends on the
order of its two arguments. Distances are by rapidfuzz: 0.1 µs for a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from rapidfuzz.distance import OSA, JaroWinkler

from server.profiles import ladders

# Jaro-Winkler, from Winkler, "String comparator metrics and enhanced decision rules", 1990. 0.92 is about one error in
# a name of six letters that begins alike, and 0.78 is reached by 1 in 150 pairs of strangers' names.
_CLOSE: Final = 0.92
_SIMILAR: Final = 0.78

# Pet names that are no beginnings of the full one, in English mostly; those that are need no table.
_PET_NAMES: Final = (
    "alexander sandy sasha xander", "andrew drew", "anthony tony", "barbara babs", "catherine katherine kate kathy "
    "katie kitty", "charles chuck charlie", "dorothy dot dolly", "edward ned ted eddie teddy", "eleanor nell ellie",
    "elizabeth bess bessie beth betsy betty elsie libby lisa liz lizzie", "francis frank", "george geordie",
    "harold harry", "helen nell", "henry hal hank harry", "isabella bella", "jacob jake", "james jamie jim jimmy",
    "john jack jackie johnny", "joseph jo joe joey", "lawrence larry", "leonard len lenny",
    "margaret daisy greta maggie "
    "marge meg peggy", "martha patty", "mary molly polly", "michael mick mike mikey", "nathaniel nat", "patricia patty "
    "tricia trish", "rebecca becky", "richard dick rick", "robert bob bobby rob", "rose rosie", "sarah sally",
    "susan sue susie", "theodore ted teddy", "theresa terry tess", "thomas tommy", "timothy tim", "victoria vicky tori",
    "virginia ginny", "william bill billy liam will willy",
)  # fmt: skip
_PETS: Final[dict[str, frozenset[int]]] = {
    name: frozenset(row for row, group in enumerate(_PET_NAMES) if name in group.split())
    for name in {name for group in _PET_NAMES for name in group.split()}
}
_NO_PETS: Final[frozenset[int]] = frozenset()

# Soundex's classes of consonants (Russell 1918); vowels part them, h and w do not.
_CLASSES: Final = {letter: str(i) for i, letters in enumerate(("bfpv", "cgjkqsxz", "dt", "l", "mn", "r"), 1)
                   for letter in letters}  # fmt: skip

# Words that say what kind of street it is, in the languages whose addresses are cleansed: they tell no two apart.
_STREET_KINDS: Final = frozenset(
    """street st road rd avenue ave av lane ln drive drv dr court ct close cl place pl crescent cres circuit cct way
    highway hwy boulevard blvd terrace tce parade square sq strasse str weg platz allee gasse rue chemin route
    impasse via viale piazza calle avenida plaza rua the of de la le les du des der die das am an im""".split()
)
_WORD: Final = re.compile(r"\w+")


class Name(NamedTuple):
    """A given or family name, ready to compare."""

    text: str  # its words with single spaces
    words: tuple[str, ...]
    sound: str  # of its first word


class Email(NamedTuple):
    """An e-mail address, ready to compare."""

    text: str
    local: str
    domain: str
    digits: str  # those of the local part
    is_name: bool  # what stands before the @ is no more than a name, or that of an office


class Street(NamedTuple):
    """A street address, ready to compare."""

    numbers: frozenset[str]
    words: frozenset[str]  # without the kinds of street
    text: str  # the words in order
    number: str  # the first one; empty: there is none


def sound(word: str) -> str:
    """Return how a word sounds, four characters: Soundex, which is the same for most misspellings of English names.

    A word without Latin letters gives its first four characters.
    """
    first, rest = word[:1] or " ", word[1:]
    if not "a" <= first <= "z":
        return word[:4]
    code, last = first, _CLASSES.get(first, "")
    for letter in rest:
        kind = _CLASSES.get(letter, "")
        if kind and kind != last:
            code += kind
            if len(code) == 4:
                return code
        if letter not in "hw":
            last = kind
    return code.ljust(4, "0")


def name_of(text: str) -> Name:
    """Return a folded name, ready to compare."""
    words = tuple(text.split())
    return Name(" ".join(words), words, sound(words[0]) if words else "")


def street_of(text: str) -> Street:
    """Return a folded street address, ready to compare: words that hold a digit are its numbers."""
    found = _WORD.findall(text)
    numbers = [word for word in found if any(c.isdigit() for c in word)]
    words = [word for word in found if word not in numbers]
    telling = [word for word in words if word not in _STREET_KINDS] or words
    # The first plain number, because flats come with signs: "flat 2 12 high street" is at 12 or at 2 alike.
    return Street(frozenset(numbers), frozenset(telling), " ".join(telling), numbers[0] if numbers else "")


def is_close(a: str, b: str) -> bool:
    """Say whether two names differ by no more than a typing error: one edit, two in a long name, or a like beginning.

    Names of up to three letters are all alike in this sense, so they are close only when they are equal.
    """
    if a == b:
        return True
    n_a, n_b = len(a), len(b)
    if n_a < 3 or n_b < 3 or (n_a == 3 == n_b):
        return False
    if -3 < n_a - n_b < 3:
        edits_max = 2 if n_a >= 8 or n_b >= 8 else 1
        if OSA.distance(a, b, score_cutoff=edits_max) <= edits_max:
            return True
    if a[0] != b[0]:
        return False  # what follows asks for a like beginning
    return JaroWinkler.similarity(a, b) >= _CLOSE or a.replace(" ", "") == b.replace(" ", "")


def is_similar(a: Name, b: Name) -> bool:
    """Say whether two names sound or look alike: for 1 in 100 pairs of strangers' names they do."""
    if a.sound == b.sound and a.sound[1:] != "000":
        return True
    length = max(len(a.text), len(b.text))
    if length >= 5 and OSA.distance(a.text, b.text, score_cutoff=3) <= (2 if length < 8 else 3):
        return True
    return JaroWinkler.similarity(a.text, b.text) >= _SIMILAR


def given_level(a: Name, b: Name) -> int:
    """Return the level of two given names, without regard to family names."""
    if a.text == b.text:
        return ladders.GIVEN_EXACT
    if is_close(a.text, b.text):
        return ladders.GIVEN_SHORT if _ends_otherwise(a.text, b.text) else ladders.GIVEN_CLOSE
    one, other = a.words[0], b.words[0]
    if len(one) == 1 or len(other) == 1:
        return ladders.GIVEN_INITIAL if one[0] == other[0] else ladders.GIVEN_DIFFERENT
    if _is_short(one, other) or not set(a.words).isdisjoint(b.words):
        return ladders.GIVEN_SHORT
    if len(a.words) + len(b.words) > 2 and any(is_close(x, y) for x in a.words for y in b.words):
        return ladders.GIVEN_SHORT
    return ladders.GIVEN_SIMILAR if is_similar(a, b) else ladders.GIVEN_DIFFERENT


def _ends_otherwise(a: str, b: str) -> bool:
    """Say whether two names differ in their ending alone, as those of brother and sister may: Daniel, Daniela."""
    return a[:-1] == b[:-1] or a.startswith(b) or b.startswith(a)


def _is_short(a: str, b: str) -> bool:
    """Say whether one name is a short form of the other: rob, robbie or bob for robert."""
    if not _PETS.get(a, _NO_PETS).isdisjoint(_PETS.get(b, _NO_PETS)):
        return True
    return _begins(a, b) or _begins(b, a)


def _begins(short: str, long: str) -> bool:
    """Say whether a name begins as the short one does, less the ending of a pet name and the doubling before it."""
    if len(short) >= 3 and long.startswith(short):
        return True
    stem = short.rstrip("iey")
    if stem == short or len(stem) < 4:
        return False
    return long.startswith(stem[:-1] if stem[-1] == stem[-2] else stem)


def family_level(a: Name, b: Name) -> int:
    """Return the level of two family names, without regard to given names."""
    if a.text == b.text:
        return ladders.FAMILY_EXACT
    if is_close(a.text, b.text):
        return ladders.FAMILY_CLOSE
    if len(a.words) + len(b.words) > 2 and any(x == y and len(x) > 3 for x in a.words for y in b.words):
        return ladders.FAMILY_PART
    return ladders.FAMILY_SIMILAR if is_similar(a, b) else ladders.FAMILY_DIFFERENT


def birth_level(a: str, b: str) -> int:
    """Return the level of two dates of birth, each YYYYMMDD."""
    if a == b:
        return ladders.BIRTH_NEW_YEAR if a.endswith("0101") else ladders.BIRTH_EXACT
    if OSA.distance(a, b, score_cutoff=1) <= 1 or (a[:4] == b[:4] and a[4:6] == b[6:] and a[6:] == b[4:6]):
        return ladders.BIRTH_TYPO
    n_equal_parts = (a[:4] == b[:4]) + (a[4:6] == b[4:6]) + (a[6:] == b[6:])
    if n_equal_parts == 2 or OSA.distance(a, b, score_cutoff=2) <= 2:
        return ladders.BIRTH_NEAR
    return ladders.BIRTH_AROUND if abs(_day(a) - _day(b)) <= 400 else ladders.BIRTH_DIFFERENT


def _day(date: str) -> int:
    """Return a number that grows by about one a day; months and years have gaps."""
    return int(date[:4]) * 372 + int(date[4:6]) * 31 + int(date[6:])


def id_level(a: str, b: str) -> int:
    """Return the level of two national identifiers: close ones differ by one edit and have six characters or more."""
    if a == b:
        return ladders.ID_EXACT
    if min(len(a), len(b)) >= 6 and OSA.distance(a, b, score_cutoff=1) <= 1:
        return ladders.ID_CLOSE
    return ladders.ID_DIFFERENT


def email_level(a: Email, b: Email) -> int:
    """Return the level of two e-mail addresses.

    Close ones differ by typing errors, before and after the @. Other digits before it are no typing error: that is how
    namesakes tell themselves apart.
    """
    if a.text == b.text:
        return ladders.EMAIL_EXACT
    is_typo = a.digits == b.digits and _is_near(a.domain, b.domain, 3) and _is_near(a.local, b.local, 2)
    if is_typo and (a.domain == b.domain or not _PROVIDERS.issuperset((a.domain, b.domain))):
        return ladders.EMAIL_CLOSE
    if a.local == b.local:
        is_name = a.is_name or b.is_name or len(a.local) < 5
        return ladders.EMAIL_NAME if is_name else ladders.EMAIL_LOCAL
    return ladders.EMAIL_DIFFERENT


def _is_near(a: str, b: str, edits_max: int) -> bool:
    """Say whether one text is the other but for an edit in every four characters, at most edits_max."""
    allowed = min(edits_max, max(len(a), len(b)) // 4)
    return a == b or OSA.distance(a, b, score_cutoff=allowed) <= allowed


def phone_level(a: str, b: str) -> int:
    """Return the level of two telephone numbers, digits only."""
    if a == b:
        return ladders.PHONE_EXACT
    if a[-8:] == b[-8:] and len(a) > 8 < len(b):
        return ladders.PHONE_ENDING
    return ladders.PHONE_CLOSE if OSA.distance(a, b, score_cutoff=1) <= 1 else ladders.PHONE_DIFFERENT


def street_level(a: Street, b: Street) -> int:
    """Return the level of two street addresses; the order of their words is without effect."""
    if a.words == b.words and a.words:
        if a.numbers == b.numbers:
            return ladders.STREET_EXACT if a.numbers else ladders.STREET_ALONE
        share = 1.0
    else:
        share = _shared(a, b)
    is_number_shared = not a.numbers.isdisjoint(b.numbers)
    if share < 0.5:
        return ladders.STREET_SOME if is_number_shared and not (a.words and b.words) else ladders.STREET_DIFFERENT
    if is_number_shared:
        return ladders.STREET_CLOSE
    if not a.numbers or not b.numbers or OSA.distance(a.number, b.number, score_cutoff=1) <= 1:
        return ladders.STREET_ALONE
    return ladders.STREET_NEIGHBOUR


def _shared(a: Street, b: Street) -> float:
    """Return the share of the shorter address's words that the other has too, typing errors allowed."""
    short, long = sorted((a.words, b.words), key=len)
    if not short:
        return 0.0
    missing = short - long
    n_shared = len(short) - len(missing)
    if missing:
        n_shared += sum(any(is_close(word, other) for other in long) for word in missing)
        if 2 * n_shared < len(short) and JaroWinkler.similarity(a.text, b.text) >= _CLOSE:
            return 1.0  # a blank too many or too few
    return n_shared / len(short)


def postcode_level(a: str, b: str) -> int:
    """Return the level of two postcodes, without blanks."""
    if a == b:
        is_fine = len(a) >= 7 or (len(a) >= 5 and not a.isdigit())
        return ladders.POSTCODE_FINE if is_fine else ladders.POSTCODE_EXACT
    if OSA.distance(a, b, score_cutoff=1) <= 1:
        return ladders.POSTCODE_CLOSE
    return ladders.POSTCODE_AREA if len(a) > 3 < len(b) and a[:3] == b[:3] else ladders.POSTCODE_DIFFERENT


def city_level(a: str, b: str) -> int:
    """Return the level of two towns; one that holds the other's words is a part of it, as with districts."""
    if a == b:
        return ladders.CITY_EXACT
    if is_close(a, b):
        return ladders.CITY_CLOSE
    words, others = set(a.split()), set(b.split())
    if words <= others or others <= words:
        return ladders.CITY_PART
    return ladders.CITY_CLOSE if JaroWinkler.similarity(a, b) >= _CLOSE - 0.05 else ladders.CITY_DIFFERENT


def region_level(a: str, b: str) -> int:
    """Return the level of two regions: close ones are written with the same letters, or nearly so in long names."""
    if a == b:
        return ladders.REGION_EXACT
    is_shuffled = len(a) > 1 and sorted(a) == sorted(b)
    return ladders.REGION_CLOSE if is_shuffled or is_close(a, b) else ladders.REGION_DIFFERENT


def country_level(a: str, b: str) -> int:
    """Return the level of two countries."""
    return ladders.COUNTRY_EXACT if a == b else ladders.COUNTRY_DIFFERENT


def email_of(text: str, names: Iterable[str]) -> Email:
    """Return a clean e-mail address, ready to compare.

    Args:
        text: in lower case.
        names: the words of the person's names, folded; a local part that is made of these alone says little more.
    """
    local, _, domain = text.rpartition("@")
    local = local.partition("+")[0] or local  # what follows a plus is the person's own note
    rest = local
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 1:
            rest = rest.replace(name, "", 1)
    n_left = sum(c.isalnum() for c in rest)
    digits = "".join(c for c in local if c.isdigit())
    return Email(text, local, domain, digits, local in _OFFICES or (n_left <= 1 and rest != local))


# Where a great many people have their mail: one of these instead of another is no typing error.
_PROVIDERS: Final = frozenset(
    """163.com aol.com email.com fastmail.com free.fr gmail.com gmx.at gmx.ch gmx.com gmx.de gmx.net googlemail.com
    hotmail.com hotmail.de hotmail.fr icloud.com laposte.net libero.it live.com mac.com mail.com mail.ru mailbox.org
    me.com msn.com orange.fr outlook.com outlook.de posteo.de proton.me protonmail.com qq.com t-online.de web.de
    wp.pl yahoo.co.jp yahoo.co.uk yahoo.com yahoo.de yahoo.fr yandex.com yandex.ru ymail.com zoho.com""".split()
)
_OFFICES: Final = frozenset(
    """admin billing contact email enquiries hello help home info kontakt mail me marketing office post sales service
    support team welcome""".split()
)
