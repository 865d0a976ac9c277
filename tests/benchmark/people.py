"""Made-up people in households, and what several systems write down about them; all from a seed.

They are there to be confused with one another: couples and children share a family name, an address and often a
telephone or an e-mail address, some children are twins, some sons bear their father's name, and common names are
common. What is written down has typing errors, gaps, swapped names, short forms, former addresses and names. The names
are made of syllables and belong to nobody.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tsugi.v1 import catalog_pb2

MEANINGS: Final = (
    ("given", catalog_pb2.MEANING_GIVEN_NAME),
    ("family", catalog_pb2.MEANING_FAMILY_NAME),
    ("born", catalog_pb2.MEANING_BIRTH_DATE),
    ("street", catalog_pb2.MEANING_STREET_ADDRESS),
    ("postcode", catalog_pb2.MEANING_POSTCODE),
    ("city", catalog_pb2.MEANING_CITY),
    ("phone", catalog_pb2.MEANING_PHONE),
    ("email", catalog_pb2.MEANING_EMAIL),
)

_ONSETS: Final = "b br ch d dr f fl g gr h j k kr l m n p pr r s sch sh st t tr v w z".split()
_VOWELS: Final = "a e i o u ai ea ee ie oa".split()
_CODAS: Final = ["", "", "", "n", "r", "l", "s", "t", "ck", "nd", "rt", "th", "m"]
_SUFFIXES: Final = "son man er ley ton field stein berg wood well".split()
_STREETS: Final = "Street Road Avenue Lane Court".split()
_PROVIDERS: Final = "northwind.example bluepost.example inbox.example quick-letters.example web.example".split()


class Written(NamedTuple):
    """One record and whose it is."""

    person: str
    texts: dict[str, str]


@dataclass
class _Person:
    person_id: str
    given: str
    family: str
    born: datetime.date
    street: str
    postcode: str
    city: str
    phone: str
    email: str
    former: dict[str, str] = field(default_factory=dict)  # what some systems still have


class _Names:
    """Stocks of names, the first ones the commonest (Zipf's law with exponent 0.8)."""

    def __init__(self, rng: random.Random, n_families: int) -> None:
        self._rng = rng
        self.emails: set[str] = set()  # that somebody has
        self._given = self._stock(400, lambda: self._syllables(2))
        self._family = self._stock(
            n_families, lambda: self._syllables(1) + rng.choice([*_SUFFIXES, self._syllables(1)])
        )
        self._cities = self._stock(60, lambda: self._syllables(2) + rng.choice(["ton", "ham", "burg", "field"]))
        self._streets = self._stock(2_000, lambda: self._syllables(2))

    def _syllables(self, count: int) -> str:
        return "".join(self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) for _ in range(count)) + self._rng.choice(
            _CODAS
        )

    def _stock(self, size: int, make: Callable[[], str]) -> tuple[list[str], list[float]]:
        names = list(dict.fromkeys(make().capitalize() for _ in range(2 * size)))[:size]
        weights, total = [], 0.0
        for rank in range(len(names)):
            total += (rank + 3.0) ** -0.8
            weights.append(total)
        return names, weights

    def _draw(self, stock: tuple[list[str], list[float]]) -> str:
        return self._rng.choices(stock[0], cum_weights=stock[1])[0]

    def given(self) -> str:
        return self._draw(self._given)

    def family(self) -> str:
        return self._draw(self._family)

    def city(self) -> str:
        return self._draw(self._cities)

    def street(self) -> str:
        return self._draw(self._streets)


def write_down(n_people: int, seed: int, errors: float = 1.0) -> list[Written]:
    """Return the records of some people, one to four each, in no order.

    Args:
        n_people: about how many.
        seed: of everything.
        errors: how faulty the records are; 1: about 7 % of the fields.
    """
    rng = random.Random(seed)
    names = _Names(rng, n_families=max(300, n_people // 6))
    everybody: list[_Person] = []
    while len(everybody) < n_people:
        everybody += _household(rng, names, len(everybody))
    records = [
        Written(person.person_id, _record(rng, person, errors))
        for person in everybody
        for _ in range(rng.choices([1, 2, 3, 4], [50, 30, 14, 6])[0])
    ]
    rng.shuffle(records)
    return records


def _household(rng: random.Random, names: _Names, start: int) -> list[_Person]:
    """Return the people of one address: one or two adults, up to four children, twins and namesakes among them."""
    family, city = names.family(), names.city()
    phone, postcode = _phone(rng), f"{rng.randrange(1_000, 9_999)}"
    street = f"{rng.randrange(1, 140)} {names.street()} {rng.choice(_STREETS)}"
    born = datetime.date(1930, 1, 1) + datetime.timedelta(days=rng.randrange(60 * 365))
    shared_email = _email(rng, names, "family", family)
    rows: list[tuple[str, str, datetime.date]] = [(names.given(), family, born)]
    if rng.random() < 0.6:
        partner_family = family if rng.random() < 0.75 else names.family()
        rows.append((names.given(), partner_family, born + datetime.timedelta(days=rng.randrange(-2_500, 2_500))))
        child = born + datetime.timedelta(days=rng.randrange(20 * 365, 34 * 365))
        for _ in range(rng.choices([0, 1, 2, 3, 4], [35, 25, 25, 10, 5])[0]):
            if not (len(rows) > 2 and rng.random() < 0.05):  # else a twin of the one before
                child += datetime.timedelta(days=rng.randrange(330, 1_800))
            given = rows[0][0] if rng.random() < 0.01 else names.given()
            rows.append((given, family, child))
    people = []
    for i, (given, own_family, own_born) in enumerate(rows):
        is_shared_phone, is_shared_email = rng.random() < 0.5, rng.random() < 0.12
        person = _Person(
            f"p{start + i}", given, own_family, own_born, street, postcode, city,
            phone if is_shared_phone else _phone(rng),
            shared_email if is_shared_email else _email(rng, names, given, own_family),
        )  # fmt: skip
        person.former = _former(rng, names, person)
        people.append(person)
    return people


def _former(rng: random.Random, names: _Names, person: _Person) -> dict[str, str]:
    """Return what was true once: somebody moved, married, has another telephone or e-mail address."""
    former: dict[str, str] = {}
    if rng.random() < 0.25:
        former["street"] = f"{rng.randrange(1, 140)} {names.street()} {rng.choice(_STREETS)}"
        former["postcode"] = f"{rng.randrange(1_000, 9_999)}"
        former["city"] = person.city if rng.random() < 0.5 else names.city()
    if rng.random() < 0.06:
        former["family"] = names.family()
    if rng.random() < 0.3:
        former["phone"] = _phone(rng)
    if rng.random() < 0.35:
        former["email"] = _email(rng, names, person.given, person.family)
    return former


def _phone(rng: random.Random) -> str:
    return f"+61 4{rng.randrange(10**7, 10**8)}"


def _email(rng: random.Random, names: _Names, given: str, family: str) -> str:
    """Return an e-mail address that nobody has yet."""
    given, family = given.lower(), family.lower()
    number = str(rng.randrange(1, 99)) if rng.random() < 0.5 else ""
    local = rng.choice([f"{given}.{family}", f"{given[0]}{family}", f"{given}{family[0]}", f"{family}{given}"])
    provider = rng.choice(_PROVIDERS)
    while f"{local}{number}@{provider}" in names.emails:
        number = str(int(number or "0") + rng.randrange(1, 50))
    names.emails.add(f"{local}{number}@{provider}")
    return f"{local}{number}@{provider}"


_GAPS: Final = {"given": 0.03, "family": 0.02, "born": 0.2, "street": 0.15, "postcode": 0.1, "city": 0.1, "phone": 0.35,
                "email": 0.35}  # fmt: skip


def _record(rng: random.Random, person: _Person, errors: float) -> dict[str, str]:
    """Return what one system wrote down about a person."""
    texts = {
        "given": person.given, "family": person.family, "born": person.born.isoformat(), "street": person.street,
        "postcode": person.postcode, "city": person.city, "phone": person.phone, "email": person.email,
    }  # fmt: skip
    if person.former and rng.random() < 0.4:
        texts |= person.former
    if rng.random() < 0.04 * errors:
        texts["given"] = texts["given"][:3] if rng.random() < 0.6 else texts["given"][:1]
    if rng.random() < 0.02 * errors:
        texts["given"], texts["family"] = texts["family"], texts["given"]
    if rng.random() < 0.01 * errors:
        texts["born"] = f"{texts['born'][:4]}-01-01"
    for name in texts:
        if rng.random() < 0.07 * errors:
            texts[name] = _mistyped(rng, texts[name], is_digits=name in {"born", "postcode", "phone"})
    return {name: text for name, text in texts.items() if rng.random() >= _GAPS[name]}


def _mistyped(rng: random.Random, text: str, *, is_digits: bool) -> str:
    """Return a text with one typing error: a sign replaced, exchanged with its neighbour, left out or doubled."""
    places = [i for i, sign in enumerate(text) if sign.isdigit() or (sign.isalpha() and not is_digits)]
    i = rng.choice(places)
    sign = rng.choice("0123456789" if text[i].isdigit() else "abcdefghijklmnopqrstuvwxyz")
    kind = rng.randrange(2 if is_digits else 4)
    if kind == 1 and i + 1 < len(text) and text[i + 1].isalnum():
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text[:i] + ("" if kind == 2 else 2 * text[i] if kind == 3 else sign) + text[i + 1 :]


def in_styles(records: Sequence[Written], seed: int) -> list[Written]:
    """Return records as if each came from one of three systems of a country with days before months.

    One writes all in capitals, national telephone numbers, AE for Ä. One has a title here and there, dates with points
    and abbreviated streets. One has everything small, some second given names, no accents, often given and family name
    in each other's place, and leaves a fifth of its fields empty.
    """
    rng = random.Random(seed)
    return [Written(one.person, rng.choice([_in_capitals, _with_titles, _in_haste])(rng, one.texts)) for one in records]


def _in_capitals(_rng: random.Random, texts: dict[str, str]) -> dict[str, str]:
    shouted = {name: text.upper() for name, text in _accented(texts, "ae", "oe").items()}
    return _with(shouted, "phone", lambda text: "0" + text.removeprefix("+61 "))


def _with_titles(rng: random.Random, texts: dict[str, str]) -> dict[str, str]:
    titled = _with(_accented(texts, "ä", "ö"), "given", lambda text: f"Dr. {text}" if rng.random() < 0.2 else text)
    dated = _with(titled, "born", lambda text: ".".join(reversed(text.split("-"))))
    return _with(dated, "street", lambda text: text.replace("Street", "St.").replace("Avenue", "Ave."))


def _in_haste(rng: random.Random, texts: dict[str, str]) -> dict[str, str]:
    plain = _accented(texts, "a", "o")
    small = {name: f" {text.lower()}" for name, text in plain.items() if rng.random() >= 0.2}
    if {"given", "family"} <= small.keys() and rng.random() < 0.15:
        small["given"], small["family"] = small["family"], small["given"]
    return _with(small, "given", lambda text: f"{text} {rng.choice('abcdefgh')}." if rng.random() < 0.2 else text)


def _accented(texts: dict[str, str], a: str, o: str) -> dict[str, str]:
    """Return texts with two vowels of names as a system spells them."""
    spelt = texts
    for name in ("given", "family"):
        spelt = _with(spelt, name, lambda text: text.replace("ai", a).replace("oa", o))
    return spelt


def _with(texts: dict[str, str], name: str, change: Callable[[str], str]) -> dict[str, str]:
    return texts | {name: change(texts[name])} if name in texts else texts


def without(records: Sequence[Written], *columns: str) -> list[Written]:
    """Return records that say nothing in some columns."""
    return [
        Written(one.person, {name: text for name, text in one.texts.items() if name not in columns}) for one in records
    ]
