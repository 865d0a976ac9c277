"""What each kind of text becomes, and what of it is kept, flagged and not matched by when it becomes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from server.profiles.cleansing import cleanse, fold
from server.profiles.texts import is_blank, is_filler
from tests.benchmark.identity_sets import MEANINGS
from tests.support.people import People, people_catalog
from tsugi.requests import source_record
from tsugi.v1 import catalog_pb2


def clean(meaning: str, text: str, country_code: str = "") -> str | None:
    """Return the clean form, None where there is none."""
    found = cleanse(MEANINGS[meaning], text, country_code)
    if not found.is_clean:
        assert found.text == text
    return found.text if found.is_clean else None


@pytest.mark.parametrize(
    ("meaning", "text", "wanted"),
    [
        ("given_name", "  anna ", "Anna"),
        ("given_name", "ANNA-MARIA", "Anna-Maria"),
        ("given_name", "DeShawn", "DeShawn"),
        ("given_name", "Dr. Anna", "Anna"),
        ("given_name", "Ann (Annie)", "Ann"),
        ("given_name", "JOSE\u0301", "José"),
        ("given_name", "İLKAY", "İlkay"),
        ("given_name", "Мария", "Мария"),
        ("given_name", "小龙", "小龙"),
        ("given_name", "Na", "Na"),
        ("given_name", "Chr.", "Chr."),
        ("family_name", "VAN DER BERG", "van der Berg"),
        ("family_name", "de la cruz", "de la Cruz"),
        ("family_name", "VON", "Von"),
        ("family_name", "O´NEIL, JR.", "O'Neil"),
        ("family_name", "d’angelo", "D'Angelo"),
        ("family_name", "MCDONALD", "McDonald"),
        ("family_name", "MacDonald", "MacDonald"),
        ("family_name", "Smith III", "Smith"),
        ("family_name", "Müller geb. Weber", "Müller"),
        ("family_name", "LÜDEN - SCHEIDT", "Lüden-Scheidt"),
        ("family_name", "山田", "山田"),
        ("full_name", "Müller, Dr. Anna", "Anna Müller"),
        ("full_name", "SMITH, JOHN A", "John A Smith"),
        ("full_name", "John Smith, Jr.", "John Smith"),
        ("full_name", "ANNA VAN DAM", "Anna van Dam"),
        ("full_name", "Van Morrison", "Van Morrison"),
        ("full_name", 'Robert "Bob" Smith', "Robert Smith"),
        ("full_name", "Prof. Dr. h.c. Anna Müller", "Anna Müller"),
        ("full_name", "Priv.-Doz. Dr. Anna Müller", "Anna Müller"),
        ("full_name", "Dipl.-Ing. Anna Müller", "Anna Müller"),
        ("full_name", "Dr. rer. nat. Anna Müller", "Anna Müller"),
        ("full_name", "Dr. H. C. Andersen", "H. C. Andersen"),
        ("full_name", "李小龙", "李小龙"),
        ("full_name", "김 민준", "김 민준"),
        ("birth_date", "17-MAY-80", "1980-05-17"),
        ("birth_date", "17. Mai 1980", "1980-05-17"),
        ("birth_date", "1er mai 1980", "1980-05-01"),
        ("birth_date", "17 de mayo de 1980", "1980-05-17"),
        ("birth_date", "١٩٨٠-٠٥-١٧", "1980-05-17"),
        ("birth_date", "29.02.2000", "2000-02-29"),
        ("birth_date", "1.2.29", "2029-02-01"),
        ("birth_date", "1.2.30", "1930-02-01"),
        ("street_address", "HAUPTSTR. 5A", "Hauptstraße 5a"),
        ("street_address", "hauptstrasse 5 a", "Hauptstraße 5a"),
        ("street_address", "12 MAIN ST.", "12 Main Street"),
        ("street_address", "12 N Main St", "12 N Main Street"),
        ("street_address", "12 St. Johns Ave", "12 St Johns Avenue"),
        ("street_address", "Flat 2, 12 High Street", "Flat 2 12 High Street"),
        ("street_address", "5 bd de la Liberté", "5 Boulevard de la Liberté"),
        ("street_address", "中央区１-２-３", "中央区1-2-3"),
        ("city", "FRANKFURT AM MAIN", "Frankfurt am Main"),
        ("city", "saint-denis", "Saint-Denis"),
        ("city", "東京", "東京"),
        ("region", "n.s.w.", "NSW"),
        ("region", "new south wales", "New South Wales"),
        ("region", "NA", "NA"),
        ("country", "Deutschland", "DE"),
        ("country", "the U.S.A.", "US"),
        ("country", "The Netherlands", "NL"),
        ("national_id", " ab-12 34/c ", "AB1234C"),
        ("email", " Anna.Berger+shop@Mail.Example; ", "anna.berger+shop@mail.example"),
        ("email", "anna@xn--bcher-kva.example", "anna@bücher.example"),
        ("phone", "+61 (0)412 345 679", "+61412345679"),
    ],
)
def test_texts_have_one_form(meaning: str, text: str, wanted: str) -> None:
    assert clean(meaning, text) == wanted


@pytest.mark.parametrize(
    ("meaning", "country_code", "text", "wanted"),
    [
        ("birth_date", "", "3/4/1990", "1990-04-03"),  # where no country says otherwise the day stands first
        ("birth_date", "DE", "3/4/1990", "1990-04-03"),
        ("birth_date", "US", "3/4/1990", "1990-03-04"),
        ("birth_date", "US", "17/4/1990", "1990-04-17"),
        ("phone", "DE", "(030) 12 34 56", "+4930123456"),
        ("phone", "US", "415.555.2671", "+14155552671"),
        ("phone", "IT", "06 1234 5678", "+390612345678"),
        ("phone", "", "415.555.2671", None),
        ("phone", "XX", "415.555.2671", None),
        ("postcode", "DE", "d-10115", "10115"),
        ("postcode", "GB", "sw1a1aa", "SW1A 1AA"),
        ("postcode", "US", "123456789", "12345-6789"),
        ("postcode", "US", "1234", None),
        ("postcode", "", "sw1a 1aa", "SW1A1AA"),
    ],
)
def test_country_says_how_a_text_is_read(meaning: str, country_code: str, text: str, wanted: str | None) -> None:
    assert clean(meaning, text, country_code) == wanted
    assert clean(meaning, text, country_code.lower()) == wanted


@pytest.mark.parametrize(
    ("meaning", "texts"),
    [
        ("given_name", ["", " ", "-", "N/A", "unknown", "xxx", "nan", "NA", "- NaN", "Anna2", "anna@mail.example",
                        "Anna & Bernd", "Dr.", "x" * 201, "a " * 25, "😀"]),
        ("family_name", ["Smith, John", "Jr.", "Null", "test"]),
        ("full_name", ["Mr and Mrs Smith", "Eheleute Müller und Weber", "n. n."]),
        ("birth_date", ["30.02.1980", "29.02.1900", "1980-13-01", "0000-00-00", "99/99/9999", "1849-12-31",
                        "2200-01-01", "1980", "May 1980", "1980-05-17 13:00", "yesterday", "17.5.980"]),
        ("street_address", ["", "n/a", "-", "?!", "nan"]),
        ("city", ["12345", "n/a", "NaN"]),
        ("region", ["x", "-", "nan"]),
        ("postcode", ["abc", "1234567890123", "12#34", "-"]),
        ("country", ["Germny", "X", "", "Congo or so"]),
        ("national_id", ["12", "abcdef", "1111111", "12345678", "1" * 33, "n/a"]),
        ("email", ["anna@", "anna", "anna@localhost", "noreply@shop.example", "a@b@c.example", "anna @shop.example",
                   "anna@none.com", "n/a", f"{'x' * 300}@shop.example", f"anna@{'bücherei.' * 8}example",
                   f"anna@{'xn--bcherei-n2a.' * 8}example"]),
        ("phone", ["110", "+61 000 000 000", "1234567890", "+49 1", "call me", f"+61{'4' * 40}"]),
    ],
)  # fmt: skip
def test_what_says_nothing_is_kept_as_it_came(meaning: str, texts: list[str]) -> None:
    assert [clean(meaning, text) for text in texts] == [None] * len(texts)


def test_text_without_a_meaning_is_clean_as_it_came() -> None:
    assert cleanse(catalog_pb2.MEANING_UNSPECIFIED, " N/A ") == (" N/A ", True)


def test_keys_tell_case_accents_and_width_from_nothing_else() -> None:
    assert fold("ÉCOLE Straße Æsir ŁÓDŹ ﬁn") == "ecole strasse aesir lodz fin"
    assert fold("Ｏ’Neil-Smith") == fold("o neil smith")
    assert fold("कि") != fold("क")  # there a mark is a vowel
    assert not is_blank("Noah")
    assert is_blank("unknown, unknown")
    assert is_filler("9876543")
    assert not is_filler("9876542")


GARBLED = {
    "born": "31.02.1980",
    "email": "none@nowhere",
    "phone": "0000000000",
    "street": "n/a",
    "tax_number": "1111111",
}
PERSON = {"given": "Anna", "family": "Berger"}


def _people() -> People:
    text = "ATTRIBUTE_TYPE_TEXT"
    meanings = {"given": "GIVEN_NAME", "family": "FAMILY_NAME", "born": "BIRTH_DATE", "email": "EMAIL",
                "phone": "PHONE", "street": "STREET_ADDRESS", "tax_number": "NATIONAL_ID"}  # fmt: skip
    attributes: list[dict[str, Any]] = [
        {"name": name, "type": text, "meaning": f"MEANING_{meaning}"} for name, meaning in meanings.items()
    ]
    sources = [{"name": "crm", "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH", "defaultCountryCode": "AU"}]
    return People(people_catalog(profileAttributes=attributes, sources=sources, windows=[], segments=[],
                                 recencyFrequencyMonetary=[]))  # fmt: skip


def _told_twice(texts: dict[str, str]) -> People:
    """Let two records without a shared identity say the same."""
    people = _people()
    for number in "12":
        people.say(source_record(number, "crm", {"customer_number": number}, attributes=dict(texts)))
    people.project()
    return people


def test_what_could_not_be_cleansed_is_kept_flagged_and_matches_nobody() -> None:
    people = _told_twice(PERSON | GARBLED)
    assert len(people.groups()) == 2
    values = people.profile("customer_number", "1").attributes
    for name, text in GARBLED.items():
        assert values[name].value.text_value == text
        assert values[name].uncleansed


@pytest.mark.parametrize(
    "known", [{"born": "17.05.1980"}, {"email": "A.Berger77@Mail.example"}, {"phone": "0412 345 679"}]
)
def test_what_was_cleansed_is_kept_beside_its_raw_text_and_matches(known: dict[str, str]) -> None:
    people = _told_twice(PERSON | GARBLED | known | {"street": "12 MILL ST"})
    assert len(people.groups()) == 1
    ((name, text),) = known.items()
    value = people.profile("customer_number", "2").attributes[name]
    assert value.raw_text == text != value.value.text_value
    assert not value.uncleansed
