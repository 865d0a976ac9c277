"""Cleansing takes any text at all, settles at once, and gives what was meant alike one form, however it was typed."""

from __future__ import annotations

import unicodedata
from datetime import date

import phonenumbers
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.catalog.values import TEXT_BYTES_MAX
from server.profiles.cleansing import Cleansed, cleanse, email, phone
from server.profiles.countries import CODES
from server.profiles.dates import YEAR_MAX, YEAR_MIN, birth_date
from server.profiles.ladders import LADDERS
from server.profiles.texts import fold, settle_digits, squash
from tsugi.v1 import catalog_pb2

MEANINGS = sorted(LADDERS)
COUNTRIES = st.sampled_from(["", "AU", "DE", "US", "JP", "GB", "CA", "NL", "FR", "IT", "CN", "br", "XX", "Europe"])

# Beginnings, ends and middles of what people type, with letters that change their number when their case changes.
PIECES = st.sampled_from(
    """Anna ANNA de von der VAN O' Mc Mac Dr. Prof. h.c. Dipl.-Ing. jr. III PhD geb. née & und and ( " „ , . - ‐ ・ 's
    't ´ ` ’ ß İ ı ŉ ǰ ﬁ ǅ ΐ Σ ς Å å 李 小龙 山田 김 Мария عمر @ + < > mailto: example.com mail.de info noreply +49 0049
    0011 (0) 030 12345678 ٠١٢٣ １２ ① ½ ext x12 # / 1980 05 17 30.02. May Mai 年 月 日 T00:00:00Z Str. str St. Rd 12a 5
    A N NSW N.S.W. n/a none test xxx nan NaN NA SW1A 1AA D-10115 K1A0B1 the U.S.A. ㎏ ﷺ 😀""".split()
) | st.sampled_from(["A\u030a", "\u0345", "\u0307", "\u00a0", "\u200b", "\ufeff", "\u3000", "\t", "\n", "\x00", "\x85"])
TEXTS = (
    st.text(max_size=40)
    | st.lists(PIECES | st.text(max_size=4), max_size=9).map("".join)
    | st.lists(PIECES, max_size=7).map(" ".join)
)
LONG = st.builds(lambda text, n: text * n, TEXTS.filter(bool), st.integers(1, TEXT_BYTES_MAX))
NOISE = st.sampled_from(["", " ", "  ", "\t", "\u00a0", "\u200b", "\ufeff", "\u3000", "\r\n"])


@pytest.mark.parametrize("meaning", MEANINGS, ids=catalog_pb2.Meaning.Name)
@given(TEXTS | LONG, COUNTRIES)
def test_any_text_is_cleansed_for_good_or_kept_as_it_came(
    meaning: catalog_pb2.Meaning, text: str, country_code: str
) -> None:
    clean = cleanse(meaning, text, country_code)
    assert cleanse(meaning, text, country_code) == clean
    if not clean.is_clean:
        assert clean.text is text
        return
    assert 0 < len(clean.text.encode()) <= TEXT_BYTES_MAX
    assert squash(clean.text) == clean.text
    assert cleanse(meaning, clean.text, country_code) == clean


@pytest.mark.parametrize("meaning", MEANINGS, ids=catalog_pb2.Meaning.Name)
@given(TEXTS, COUNTRIES, NOISE, NOISE)
def test_what_cannot_be_seen_changes_nothing(
    meaning: catalog_pb2.Meaning, text: str, country_code: str, before: str, after: str
) -> None:
    clean = cleanse(meaning, text, country_code)
    seen_alike = before + unicodedata.normalize("NFD", text).replace(" ", "\u00a0\u200b") + after
    again = cleanse(meaning, seen_alike, country_code)
    assert again == (clean if clean.is_clean else Cleansed(seen_alike, False))


@given(st.sampled_from(MEANINGS), TEXTS.filter(bool), st.integers(1, 9))
def test_what_is_too_long_is_given_back(meaning: catalog_pb2.Meaning, text: str, n_more: int) -> None:
    long = text * (TEXT_BYTES_MAX // len(text.encode()) + n_more)
    assert cleanse(meaning, long) == (long, False)


@given(st.text(alphabet=st.characters(), max_size=30))
def test_keys_of_any_characters_settle_at_once(text: str) -> None:
    for make in (squash, fold, settle_digits):
        assert make(make(text)) == make(text)
    assert fold(squash(text)) == fold(text)


LOCAL = st.from_regex(r"[a-z][a-z0-9]{1,9}([._+-][a-z0-9]{1,6}){0,2}", fullmatch=True)
DOMAIN = st.from_regex(r"[a-z][a-z0-9]{2,8}(-[a-z0-9]{1,5})?\.(example|com|co\.uk|de)", fullmatch=True)
EMAIL_FORMS = st.sampled_from(
    [
        "{}",
        " {} ",
        "<{}>",
        "Anna Muster <{}>",
        '"Muster, Anna" <{}>',
        "mailto:{}",
        "MailTo: {}",
        "{};",
        "{},",
        "\u200b{}",
    ]
)


@given(LOCAL, DOMAIN, EMAIL_FORMS)
def test_an_address_has_one_form_however_it_is_written(local: str, domain: str, form: str) -> None:
    address = f"{local}@{domain}"
    assume(email(address).is_clean)  # none of those that people enter to be left alone
    mixed = "".join(c.upper() if i % 3 else c for i, c in enumerate(address))
    for written in (address, address.upper(), mixed, form.format(address), form.format(mixed)):
        assert email(written) == (address, True)


MOBILES = st.sampled_from(
    [("AU", "+614", 8), ("DE", "+4915", 9), ("GB", "+447", 9), ("FR", "+336", 8), ("US", "+1212", 7)]
)
DIGITS = st.text("23456789", min_size=9, max_size=9)


@given(MOBILES, DIGITS, st.integers(0, 99_999))
def test_a_telephone_number_has_one_form_however_it_is_written(
    country: tuple[str, str, int], digits: str, extension: int
) -> None:
    code, prefix, n_digits = country
    number = prefix + digits[:n_digits]
    parsed = phonenumbers.parse(number)
    assume(phonenumbers.is_valid_number(parsed))
    assume(phone(number).is_clean)  # no filler
    forms = phonenumbers.PhoneNumberFormat
    international, national, uri = (
        phonenumbers.format_number(parsed, form) for form in (forms.INTERNATIONAL, forms.NATIONAL, forms.RFC3966)
    )
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in national)
    dialled = f"00{number[1:]}"
    dashed, extended = national.replace(" ", "-"), f"{national} ext. {extension}"
    for written in (number, international, national, uri, wide, dialled, dashed, extended, f"{number} x{extension}"):
        assert phone(written, code) == (number, True)
        assert phone(written, code.lower()) == (number, True)
    assert phone(international) == (number, True)
    assert not phone(national).is_clean or code == "US"  # nobody knows whose country


@given(st.dates(date(YEAR_MIN, 1, 1), date(YEAR_MAX, 12, 31)))
def test_a_date_has_one_form_however_it_is_written(day: date) -> None:
    y, m, d = day.year, day.month, day.day
    month = ("January February March April May June July August September October November December".split())[m - 1]
    for written in (f"{y:04}-{m:02}-{d:02}", f"{y}/{m}/{d}", f"{y}.{m:02}.{d:02}.", f"{y}{m:02}{d:02}", f"{d}.{m}.{y}",
                    f"{d:02} {m:02} {y}", f"{d} {month} {y}", f"{d:02}-{month[:3].upper()}-{y}", f"{month} {d}, {y}",
                    f"{y}年{m}月{d}日", f"{y}-{m:02}-{d:02}T00:00:00.000Z", f"{y}-{m:02}-{d:02} 00:00:00",
                    f"{d}/{m}/{y} 0:00"):  # fmt: skip
        assert birth_date(written) == (day.isoformat(), True)
    for written in (f"{m}/{d}/{y}", f"{m:02}-{d:02}-{y}", f"{m}/{d}/{y} 12:00:00 AM"):
        assert birth_date(written, "US") == (day.isoformat(), True)
    if d > 12:  # then there is but one reading
        assert birth_date(f"{m}/{d}/{y}", "AU") == birth_date(f"{d}/{m}/{y}", "US") == (day.isoformat(), True)


@given(st.integers(0, 9_999), st.integers(0, 99), st.integers(0, 99), COUNTRIES)
def test_days_of_no_calendar_are_no_dates(y: int, m: int, d: int, country_code: str) -> None:
    written = (f"{y:04}-{m:02}-{d:02}", f"{y:04}{m:02}{d:02}")
    try:
        day = date(y, m, d)
    except ValueError:
        assert all(birth_date(text, country_code) == (text, False) for text in written)
    else:
        assume(YEAR_MIN <= y <= YEAR_MAX)
        assert all(birth_date(text, country_code) == (day.isoformat(), True) for text in written)


def test_every_country_is_known_by_each_of_its_names() -> None:
    for name, code in CODES.items():
        for written in (name, name.upper(), f" {name} ", name.replace(" ", ". ")):
            assert cleanse(catalog_pb2.MEANING_COUNTRY, written) == (code, True)
