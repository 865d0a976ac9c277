"""One form for what sources send, before it is compared: what a text means decides how it is cleansed.

Pure functions of one text: no clock, no network, nothing kept. What cannot be cleansed is given back as it came, and
said to be so: it is kept, shown and never matched by. To cleanse what is clean changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Final

import phonenumbers
from email_validator import EmailNotValidError, validate_email

from server.profiles.addresses import city, postcode, region, street_address
from server.profiles.countries import country
from server.profiles.dates import birth_date
from server.profiles.names import family_name, full_name, given_name
from server.profiles.texts import Cleansed, fold, is_blank, is_filler, is_too_long, settle, settle_digits, squash
from tsugi.v1 import catalog_pb2

__all__ = ["Cleansed", "cleanse", "email", "fold", "national_id", "phone", "squash"]

_DISPLAY_NAME: Final = re.compile(r"[^<>]*<([^<>]+)>")
_MAILTO: Final = re.compile(r"(?i)mailto:\s*")
_ADDRESS_CHARACTERS_MAX: Final = 254  # of RFC 5321
_LETTERS_MAX: Final = 63  # of a domain's internationalised labels: each costs 10 µs, and one label of DNS has no more
_NOBODY: Final = frozenset(
    [
        "noreply",
        "no-reply",
        "donotreply",
        "do-not-reply",
        "none",
        "na",
        "n/a",
        "unknown",
        "noemail",
        "nomail",
        "no",
        "nobody",
        "anonymous",
        "test",
        "xxx",
    ]
)
_NOWHERE: Final = frozenset(
    ["none.com", "na.com", "noemail.com", "nomail.com", "test.com", "test.test", "x.com", "xx.com", "xxx.com"]
)
_EXTENSION: Final = re.compile(r"(?i)\s*(?:ext\.?|extension|x|durchwahl|#)\s*\d{1,6}$")
_PHONE_DIGITS_MIN: Final = 7
_PHONE_CHARACTERS_MAX: Final = 40
_ID_CHARACTERS: Final = (4, 32)


def cleanse(meaning: catalog_pb2.Meaning, text: str, country_code: str = "") -> Cleansed:
    """Bring a text of some meaning to the form it is compared in.

    Args:
        meaning: what the text says; of none it is clean as it came.
        text: anything. Over 1,024 bytes it is not clean, and given back at once.
        country_code: of the source, ISO 3166-1 alpha-2; empty: not known.

    Cost: 3 to 65 µs, see each function.
    """
    function = _BY_MEANING.get(meaning)
    return function(text, country_code) if function is not None else Cleansed(text, True)


def email(text: str) -> Cleansed:
    """Bring an e-mail address to lower case, its domain to Unicode, without display name, brackets or mailto:.

    Lower case on both sides of the @: the standard allows providers to tell apart by case, and none of any size does.
    Not clean: what no server would take, what people enter to be left alone, a domain with over 63 letters
    in internationalised labels.

    Cost: 25 µs, and 10 more for each letter of an internationalised label.
    """
    if is_too_long(text):
        return Cleansed(text, False)
    address = squash(text)
    if (match := _DISPLAY_NAME.fullmatch(address)) is not None:
        address = match[1].strip()
    address = _MAILTO.sub("", address).strip(" ,;.")
    if len(address) > _ADDRESS_CHARACTERS_MAX or _is_costly(address.rpartition("@")[2]):
        return Cleansed(text, False)
    try:
        checked = validate_email(address, check_deliverability=False, test_environment=True)
    except (EmailNotValidError, UnicodeError):
        return Cleansed(text, False)
    local, domain = checked.local_part.lower(), checked.domain.lower()
    if local in _NOBODY or domain in _NOWHERE or _is_costly(domain):
        return Cleansed(text, False)
    clean = f"{local}@{domain}"
    return Cleansed(clean, True) if not is_too_long(clean) else Cleansed(text, False)


def _is_costly(domain: str) -> bool:
    labels = domain.lower().split(".")
    return sum(len(each) for each in labels if not each.isascii() or each.startswith("xn--")) > _LETTERS_MAX


def phone(text: str, country_code: str = "") -> Cleansed:
    """Bring a telephone number to E.164, without its extension.

    Not clean: a number without a country where none is known, one too long or too short for its country, fillers.

    Cost: 30 µs in this form, 65 in others.
    """
    if is_too_long(text):
        return Cleansed(text, False)
    return settle(partial(_phone_pass, country_code=country_code.upper()), text)


def _phone_pass(text: str, country_code: str) -> str | None:
    """Parse once: what is left of a number dialled in a strange way may be read otherwise the next time."""
    number = _EXTENSION.sub("", settle_digits(squash(text)))
    digits = "".join(one for one in number if one.isdigit())
    if len(number) > _PHONE_CHARACTERS_MAX or len(digits) < _PHONE_DIGITS_MIN or is_filler(digits):
        return None
    if number.startswith("00"):
        number = f"+{number[2:]}"
    try:
        parsed = phonenumbers.parse(number, country_code or None)
    except phonenumbers.NumberParseException:
        return None
    national = str(parsed.national_number)
    if not phonenumbers.is_possible_number(parsed) or (is_filler(national) and len(national) > 3):
        return None
    parsed.extension = None
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


def national_id(text: str) -> Cleansed:
    """Bring a number that a state gives to capitals and digits; 4 to 32 of them, no filler. Cost: 2 µs."""
    if is_too_long(text):
        return Cleansed(text, False)
    bare = "".join(one for one in settle_digits(squash(text)).upper() if one.isalnum())
    least, most = _ID_CHARACTERS
    if not least <= len(bare) <= most or is_blank(bare) or is_filler(bare) or not any(one.isdigit() for one in bare):
        return Cleansed(text, False)
    return Cleansed(bare, True)


_BY_MEANING: Final[dict[int, Callable[[str, str], Cleansed]]] = {
    catalog_pb2.MEANING_EMAIL: lambda text, _country: email(text),
    catalog_pb2.MEANING_PHONE: phone,
    catalog_pb2.MEANING_GIVEN_NAME: lambda text, _country: given_name(text),
    catalog_pb2.MEANING_FAMILY_NAME: lambda text, _country: family_name(text),
    catalog_pb2.MEANING_FULL_NAME: lambda text, _country: full_name(text),
    catalog_pb2.MEANING_STREET_ADDRESS: lambda text, _country: street_address(text),
    catalog_pb2.MEANING_CITY: lambda text, _country: city(text),
    catalog_pb2.MEANING_REGION: lambda text, _country: region(text),
    catalog_pb2.MEANING_POSTCODE: postcode,
    catalog_pb2.MEANING_COUNTRY: lambda text, _country: country(text),
    catalog_pb2.MEANING_BIRTH_DATE: birth_date,
    catalog_pb2.MEANING_NATIONAL_ID: lambda text, _country: national_id(text),
}
