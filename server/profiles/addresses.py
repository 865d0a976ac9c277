"""Where does somebody live? Streets, towns, regions and postcodes, each in the one form it is compared in.

Handed a text and, where it is known, the country. Abbreviations of common kinds of street are written out, postcodes
take the form of their country; nothing is looked up in a list of places.
"""

from __future__ import annotations

import re
from typing import Final

from server.profiles.names import FAMILY_PARTICLES, mend_case, straighten
from server.profiles.texts import Cleansed, is_blank, is_exported_blank, is_too_long, settle, settle_digits, squash

# By word without its dot. "St" after a house number is a saint, after a word a street: see _street_pass.
_STREET_WORDS: Final = {
    "str": "Straße", "strasse": "Straße", "rd": "Road", "ave": "Avenue", "av": "Avenue", "blvd": "Boulevard",
    "bvd": "Boulevard", "bd": "Boulevard", "ln": "Lane", "dr": "Drive", "ct": "Court", "crt": "Court",
    "cres": "Crescent", "cr": "Crescent", "pl": "Place", "pde": "Parade", "tce": "Terrace", "ter": "Terrace",
    "hwy": "Highway", "pkwy": "Parkway", "cl": "Close", "cct": "Circuit", "gr": "Grove", "gdns": "Gardens",
    "sq": "Square", "apt": "Apartment", "ste": "Suite", "bldg": "Building", "fl": "Floor", "rte": "Route",
    "che": "Chemin", "chem": "Chemin", "imp": "Impasse",
}  # fmt: skip
_GERMAN_ENDING: Final = re.compile(r"(?i)(?<=[^\W\d_])(?:str\.|str|strasse|straße)$")
_POSTCODE_SHAPES: Final = {
    "AT": r"\d{4}", "AU": r"\d{4}", "BE": r"\d{4}", "CH": r"\d{4}", "DK": r"\d{4}", "NO": r"\d{4}", "NZ": r"\d{4}",
    "DE": r"\d{5}", "ES": r"\d{5}", "FR": r"\d{5}", "IT": r"\d{5}", "FI": r"\d{5}", "MX": r"\d{5}", "TR": r"\d{5}",
    "US": r"\d{5}(?:\d{4})?", "PL": r"\d{5}", "SE": r"\d{5}", "CZ": r"\d{5}", "SK": r"\d{5}", "GR": r"\d{5}",
    "PT": r"\d{7}", "JP": r"\d{7}", "BR": r"\d{8}", "IN": r"\d{6}", "CN": r"\d{6}", "SG": r"\d{6}",
    "NL": r"\d{4}[A-Z]{2}", "CA": r"[A-Z]\d[A-Z]\d[A-Z]\d", "GB": r"[A-Z]{1,2}\d[A-Z\d]?\d[A-Z]{2}",
}  # fmt: skip
_POSTCODE_BREAKS: Final = {"GB": (-3, " "), "CA": (3, " "), "NL": (4, " "), "JP": (3, "-"), "PT": (4, "-"),
                           "BR": (5, "-"), "PL": (2, "-"), "SE": (3, " "), "CZ": (3, " "), "SK": (3, " "),
                           "GR": (3, " ")}  # fmt: skip
_COUNTRY_PREFIX: Final = re.compile(r"(?:D|DE|A|AT|CH|F|FR|B|BE|L|NL|DK|S|SE|PL|CZ|SK|I|E)-(?=\d)")


def street_address(text: str) -> Cleansed:
    """Bring street and house number to one form: "HAUPTSTR. 5A" and "hauptstrasse 5 a" become "Hauptstraße 5a".

    Abbreviations are written out in English, German and French, capitals mended as for names. Not clean: blanks, and
    what has neither a letter nor a digit.

    Cost: 10 µs.
    """
    return Cleansed(text, False) if is_too_long(text) else settle(_street_pass, text)


def city(text: str) -> Cleansed:
    """Bring a town to one form: "FRANKFURT AM MAIN" becomes "Frankfurt am Main". Cost: 5 µs."""
    return Cleansed(text, False) if is_too_long(text) else settle(_city_pass, text)


def region(text: str) -> Cleansed:
    """Bring a state or province to one form: codes of up to three letters in capitals, names as towns. Cost: 4 µs."""
    return Cleansed(text, False) if is_too_long(text) else settle(_region_pass, text)


def postcode(text: str, country_code: str = "") -> Cleansed:
    """Bring a postcode to the form of its country; where the country is not known, to capitals without gaps.

    Not clean: what has not the shape of the stated country, anything over 12 characters, anything without a digit.

    Cost: 3 µs.
    """
    if is_too_long(text):
        return Cleansed(text, False)
    code = _COUNTRY_PREFIX.sub("", settle_digits(squash(text)).upper())
    bare = code.replace(" ", "").replace("-", "").replace(".", "")
    country = country_code.upper()
    shape = _POSTCODE_SHAPES.get(country)
    is_code = bare.isascii() and bare.isalnum() and any(one.isdigit() for one in bare) and len(bare) <= 12
    if not is_code or is_blank(bare) or (shape is not None and re.fullmatch(shape, bare) is None):
        return Cleansed(text, False)
    if country == "US" and len(bare) == 9:
        return Cleansed(f"{bare[:5]}-{bare[5:]}", True)
    place, mark = _POSTCODE_BREAKS.get(country, (0, ""))
    return Cleansed(f"{bare[:place]}{mark}{bare[place:]}" if place else bare, True)


def _city_pass(text: str) -> str | None:
    name = straighten(text).strip(" ,.;")
    if is_blank(name) or is_exported_blank(name) or not any(one.isalpha() for one in name):
        return None
    return " ".join(mend_case(name.split(), FAMILY_PARTICLES, is_particle_first=False))


def _region_pass(text: str) -> str | None:
    short = squash(text).replace(".", "")
    if 2 <= len(short) <= 3 and short.isascii() and short.isalpha() and not is_blank(short):
        return short.upper() if short not in {"nan", "NaN"} else None  # NA is Naples
    return _city_pass(text)


def _street_pass(text: str) -> str | None:
    plain = settle_digits(straighten(text)).strip(" ,;")
    if is_blank(plain) or is_exported_blank(plain) or not any(one.isalnum() for one in plain):
        return None
    words = mend_case(plain.replace(",", " ").split(), FAMILY_PARTICLES, is_particle_first=False)
    out: list[str] = []
    for place, word in enumerate(words):
        bare = word.rstrip(".").casefold()
        if bare == "st":
            out.append("Street" if place and not words[place - 1][:1].isdigit() else "St")
        elif bare in _STREET_WORDS and place:
            out.append(_STREET_WORDS[bare])
        elif _GERMAN_ENDING.search(word):
            out.append(_GERMAN_ENDING.sub("straße", word))
        elif out and len(word) == 1 and word.isalpha() and out[-1].isdigit() and not _is_direction(words, place):
            out[-1] += word.lower()  # 5 A
        elif word[:-1].isdigit() and word[-1].isalpha():
            out.append(word.lower())
        else:
            out.append(word)
    return " ".join(out)


def _is_direction(words: list[str], place: int) -> bool:
    """Tell whether a letter is the north of 12 N Main Street, and not the flat of Hauptstraße 5 N."""
    return words[place] in {"N", "S", "E", "W"} and place + 1 < len(words)
