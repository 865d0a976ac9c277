"""How is somebody called? Given, family and full names without titles, in one order and with their capitals mended.

Handed a text, it gives the name that an envelope would bear. Most names are plain and go a short way; only what has a
title, a suffix, a comma, brackets or quotes is taken apart by nameparser, whose vocabulary is cut down here to words
that are nobody's name: King, Dean, Baron, Major, Ma and Do are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Final

from nameparser import Lexicon, Parser

from server.profiles.texts import Cleansed, is_blank, is_exported_blank, is_too_long, settle, squash

_CHARACTERS_MAX: Final = 200  # after squashing; nameparser takes 2 ms for this much of the worst
_WORDS_MAX: Final = 24

_TITLES: Final = frozenset(
    """capt captain cdr cpl dhr doctor dott dr dra frau frk fru herr herrn herra lcdr lt ltcol madam madame
    mademoiselle meneer mevr mevrouw mgr misses miss mister mlle mme monsieur monsignor mr mrs ms msgt mx prof
    professor rev reverend senhor senhora senhorita señor señora señorita sgt sig signor signora signore signorina sir
    sr sra srta dipl doz fh habil hc jur med na nat phil priv ra rer ssa theol univ""".split()
)
_DOTTED_TITLES: Final = frozenset("adm c col h hr ing mag".split())  # without a dot they are somebody's name
_HONORARY: Final = frozenset(("h.", "c.", "h.c.", "hc"))  # after a title, and small: Dr. H. C. has two initials
_SUFFIXES: Final = frozenset("jr sr snr jnr ii iii iv esq esquire ret".split())
_DEGREES: Final = frozenset(
    """phd dphil edd jd llm mba mfa mph msc bsc mphil dds dmd dvm rn cpa cfa mbbch mbchb pharmd psyd obe mbe kbe meng
    dsc dsm""".split()
)
_BIRTH_NAMES: Final = frozenset("geb geborene geboren nee né née".split())  # what follows is a name no longer borne
_MARKS: Final = _TITLES | _DOTTED_TITLES | _SUFFIXES | _DEGREES | _BIRTH_NAMES
_APOSTROPHES: Final = str.maketrans(dict.fromkeys("´`‘’‛ʼʻʹ′", "'"))
_DASHES: Final = re.compile(r"\s*[-‐‑‒–—−]\s*")  # surrounded by spaces or not, the parts belong together
# "N.", "o'neil" and "Ann-Marie" pass; a digit, a sign or an @ says that this is no name.
_PUNCTUATION: Final = frozenset(" '.-·・,()\"“”„«»")
_MC: Final = re.compile(r"Mc(?=[A-Z])")  # small in McDONALD, which is all in capitals nevertheless
_PAIRS: Final = re.compile(r"(?i)(?:^|\s)(?:&|\+|and|et|(?<!von )(?<!Von )(?<!VON )und)\s")
_DUTCH_ARTICLE: Final = re.compile(r"(?i)'[ts][ -]\w")
_NESTED: Final = re.compile(r"[(\"“”„«»]")

FAMILY_PARTICLES: Final = frozenset(
    """af al av bin bint da dal de del della den der di do dos du el het ibn la le las los op 't te ten ter van vom von
    y zu zum zur e und am""".split()
)


def given_name(text: str) -> Cleansed:
    """Bring a given name, or several, to one form.

    "Dr. ANNA-MARIA" becomes "Anna-Maria". Titles and suffixes go. Capitals are mended only where all that remains is
    in capitals or all of it small, for who wrote "DeShawn" meant it. Not clean: what is_blank says, "NA" and "nan" as
    exports write them, anything with a digit, an @ or the like, two persons in one, over 200 characters.

    Cost: 5 µs in the usual case, 130 µs where nameparser is asked.
    """
    return _cleanse(text, frozenset(), is_full=False)


def family_name(text: str) -> Cleansed:
    """Bring a family name to one form: "VAN DER BERG" becomes "van der Berg", "O´NEIL, JR." "O'Neil".

    Otherwise as given_name. Not clean, too: "Smith, John", which is more than a family name.
    """
    return _cleanse(text, FAMILY_PARTICLES, is_full=False)


def full_name(text: str) -> Cleansed:
    """Bring a whole name to the order in which it is spoken: "Müller, Dr. Anna" becomes "Anna Müller".

    Names in Han, kana or Hangul stay in theirs. Nicknames in quotes or brackets go, so do names at birth. Otherwise as
    given_name. "ANNA VAN DAM" becomes "Anna van Dam", while "Van Morrison" begins with a given name.
    """
    return _cleanse(text, FAMILY_PARTICLES, is_full=True)


def mend_case(words: Sequence[str], particles: frozenset[str], is_particle_first: bool) -> list[str]:
    """Give words their capitals back, where all of them are in capitals or all small; else return them as they are.

    Args:
        words: not empty.
        particles: small letters, to be kept small, but not as the last word.
        is_particle_first: a particle may stand first as well, as in "van der Berg".
    """
    whole = _MC.sub("MC", "".join(words))
    if not (whole.isupper() or whole.islower()):
        return list(words)
    last = len(words) - 1
    return [
        word.lower()
        if word.lower() in particles and place < last and (place or is_particle_first)
        else _capitalise(word, particles)
        for place, word in enumerate(words)
    ]


def straighten(text: str) -> str:
    """Squash, with one kind of apostrophe and of dash.

    The apostrophe first: NFKC would make the acute accent that many type for it a space with an accent above.
    """
    if is_too_long(text):
        return text
    return _DASHES.sub("-", squash(text.translate(_APOSTROPHES)).translate(_APOSTROPHES))


def _cleanse(text: str, particles: frozenset[str], is_full: bool) -> Cleansed:
    if is_too_long(text):
        return Cleansed(text, False)
    if text.isascii():  # here one pass is known to be enough, where nameparser has no say
        plain = _plain(straighten(text))
        if plain is not None and not _is_marked(plain):
            return _finish(text, plain, particles, is_full)
    return settle(partial(_pass, particles=particles, is_full=is_full), text)


def _pass(text: str, particles: frozenset[str], is_full: bool) -> str | None:
    name = _plain(straighten(text))
    if name is not None and _is_marked(name):
        name = _parse(name, is_full)
    if name is None:
        return None
    finished = _finish(text, name, particles, is_full)
    return finished.text if finished.is_clean else None


def _plain(name: str) -> str | None:
    """Return the name without dots and commas at its ends; None where it cannot be the name of one person."""
    if len(name) > _CHARACTERS_MAX or name.count(" ") >= _WORDS_MAX:
        return None
    if _PAIRS.search(name):
        return None
    if not name.isascii() or not name.replace(" ", "").isalpha():
        for one in name:
            if one not in _PUNCTUATION and unicodedata.category(one)[0] not in "LM":
                return None
    bare = name.strip(" ,-·・'")
    if is_exported_blank(bare):
        return None
    return f"'{bare}" if bare and _DUTCH_ARTICLE.match(name) else bare or None


def _is_marked(name: str) -> bool:
    """Tell whether there is something to take apart."""
    if "," in name or _NESTED.search(name):
        return True
    return not _MARKS.isdisjoint(_mark(name).replace("-", " ").split())


def _mark(word: str) -> str:
    return word.casefold().replace(".", "")


def _parse(name: str, is_full: bool) -> str | None:
    """Return given, middle and family names in the order in which they are spoken; None where nothing remains."""
    parsed = _PARSER.parse(name)
    if "," in name and not is_full and parsed.given and parsed.family:
        return None
    # The parser takes any word with a dot at the beginning for a title, but Chr. and Jos. are names cut short.
    cut_short = [word for word in parsed.title.split() if _MARKS.isdisjoint(_mark(word).split("-"))]
    words = " ".join((*cut_short, parsed.given, parsed.middle, parsed.family)).split()
    is_titled = bool(parsed.title) and not cut_short
    while len(words) > 1 and _is_title(words[0], is_titled):
        del words[0]
        is_titled = True
    return " ".join(words) or None


def _is_title(word: str, is_titled: bool) -> bool:
    """Tell whether a word before a name is one of those that the parser does not know: Dipl.-Ing., h.c. after Dr."""
    parts = _mark(word).split("-")
    if len(parts) > 1:
        return word.endswith(".") and _TITLES.union(_DOTTED_TITLES).issuperset(parts)
    return is_titled and (word in _HONORARY or (word.endswith(".") and parts[0] in _TITLES))


def _finish(text: str, name: str, particles: frozenset[str], is_full: bool) -> Cleansed:
    """Judge what remains of a name and mend its capitals."""
    if is_blank(name):
        return Cleansed(text, False)
    mended = " ".join(mend_case(name.split(), particles, is_particle_first=not is_full))
    return Cleansed(mended, True) if not is_too_long(mended) else Cleansed(text, False)


def _capitalise(word: str, particles: frozenset[str]) -> str:
    """Return a word with a capital at its start and after each dash, dot and the apostrophe of O' and D'."""
    parts = re.split(r"([-./])", word.lower())
    capitalised = "".join(
        part if place and part in particles and place < len(parts) - 1 else _capitalise_part(part)
        for place, part in enumerate(parts)
    )
    return capitalised if capitalised.isascii() else unicodedata.normalize("NFC", capitalised)  # İ fell apart


def _capitalise_part(part: str) -> str:
    head, mark, tail = part.partition("'")
    if mark and len(head) <= 2 and len(tail) > 1:
        return f"{head[:1].title()}{head[1:]}'{tail[:1].title()}{tail[1:]}"
    if part.startswith("mc") and len(part) >= 5:
        return f"Mc{part[2:3].title()}{part[3:]}"
    return part[:1].title() + part[1:]


def _parser() -> Parser:
    """Build a parser that takes nobody's name for a title or a degree."""
    lexicon = Lexicon.default()
    titles = {word for word in lexicon.titles if word.isascii() and word not in _TITLES}
    degrees = lexicon.suffix_acronyms - _DEGREES
    words = {word for word in lexicon.suffix_words if word.isascii() and word not in _SUFFIXES}
    return Parser(
        lexicon.remove(
            titles=titles,
            given_name_titles=lexicon.given_name_titles & titles,
            suffix_acronyms=degrees,
            suffix_acronyms_ambiguous=lexicon.suffix_acronyms_ambiguous & degrees,
            suffix_words=words,
            honorific_tails=lexicon.honorific_tails & words,
            after_given_titles=lexicon.after_given_titles & titles,
        )
    )


_PARSER: Final = _parser()
