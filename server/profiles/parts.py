"""What is recorded under one identity: claims, consents and series, the unit that moves when profiles merge and split.

Handed a stored part and a record, it gives what the part says afterwards. A part is the same whatever the order in
which its records came, but for the numbers of log records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from server.catalog.profile_terms import NO_ROW, STAMP_BYTES, ConsentTerms, ProfileTerms, Source
from server.profiles.cleansing import cleanse
from server.profiles.series import Entry, SeriesSet, entries_of, outcome_entries
from server.profiles.survivorship import NEVER_US
from server.storage.store import Snapshot, Table, Transaction
from tsugi.log.v1.state_pb2 import StoredClaim, StoredConsent, StoredPart
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_pb2 import Consent, ConsentDecision, Touchpoint
from tsugi.v1.profile_service_pb2 import SourceRecord

CLAIMS_MAX: Final = 16  # of one attribute and source in a part; the longest unheard of goes first
CONSENTS_MAX: Final = 256  # in a part's ledger; the oldest that does not stand goes first, withdrawals that stand last

_PAST_US: Final = 1 << 62  # added to instants, so that those before the epoch sort first
_TOUCHPOINT_KEY_BYTES: Final = 16 + 8 + 8 + 2


class Added(NamedTuple):
    """What a record's attributes changed in a part."""

    is_news: bool  # it said something its source had not said before
    is_text_changed: bool  # of an attribute that has a meaning
    uncleansed: frozenset[str]  # attributes


def add_claims(
    part: StoredPart, record: SourceRecord, terms: ProfileTerms, source: Source, lsn: int, observed_us: int
) -> Added:
    """Put a record's attributes into a part, cleansed.

    Args:
        part: changed.
        record: checked when it was accepted; attributes that are not declared any more are left out.
        terms: of the catalog in force.
        source: the record's.
        lsn: the record's.
        observed_us: when its source knew it.
    """
    known: dict[tuple[str, str], list[StoredClaim]] = {}
    for claim in part.claims:
        known.setdefault((claim.attribute, claim.source), []).append(claim)
    new: list[StoredClaim] = []
    is_text_changed = False
    uncleansed: set[str] = set()
    for name in sorted(record.attributes):
        row = terms.attribute_rows.get(name)
        if row is None:
            continue
        claim = StoredClaim(
            attribute=name, value=record.attributes[name], source=source.name, time_us=observed_us, lsn=lsn, count=1
        )
        if terms.attributes[row].meaning and _cleanse(claim, terms.attributes[row].meaning, source):
            uncleansed.add(name)
        same = next((each for each in known.get((name, source.name), ()) if each.value == claim.value), None)
        if same is None:
            new.append(claim)
            is_text_changed |= bool(terms.attributes[row].meaning)
        else:
            _count(same, claim)
    if new:
        _put(part, new, known)
    return Added(bool(new), is_text_changed, frozenset(uncleansed))


def _cleanse(claim: StoredClaim, meaning: catalog_pb2.Meaning, source: Source) -> bool:
    """Bring a claim's text into its clean form; say whether that was impossible."""
    text = claim.value.text_value
    if not claim.value.HasField("text_value"):
        return False
    clean = cleanse(meaning, text, source.default_country_code)
    claim.uncleansed = not clean.is_clean
    if clean.text != text:
        claim.value.text_value, claim.raw_text = clean.text, text
    return claim.uncleansed


def _count(known: StoredClaim, again: StoredClaim) -> None:
    """Count a claim that was made before."""
    known.count += 1
    if (again.time_us, again.lsn) >= (known.time_us, known.lsn):
        known.time_us, known.lsn = again.time_us, again.lsn
        known.raw_text, known.uncleansed = again.raw_text, again.uncleansed


def _put(part: StoredPart, new: list[StoredClaim], known: dict[tuple[str, str], list[StoredClaim]]) -> None:
    """Put new claims in their places among the others; where a source has too many of an attribute the oldest goes."""
    if not part.claims:
        part.claims.extend(new)  # in order as they are: of one source, one an attribute, by attribute
        return
    claims = [*part.claims, *new]
    for claim in new:
        rivals = [*known.get((claim.attribute, claim.source), ()), claim]
        if len(rivals) > CLAIMS_MAX:  # the new one may be it, whatever came first
            claims.remove(min(rivals, key=lambda each: (each.time_us, each.value.SerializeToString())))
    claims.sort(key=lambda each: (each.attribute, each.source, each.value.SerializeToString(deterministic=True)))
    copies = [StoredClaim.FromString(each.SerializeToString()) for each in claims]
    del part.claims[:]
    part.claims.extend(copies)


def add_consents(part: StoredPart, record: SourceRecord, lsn: int, observed_us: int, time_us: int) -> bool:
    """Put a record's consents into a part's ledger, and say whether any is news; what was said before stays in it.

    Args:
        part: changed.
        record: checked when it was accepted.
        lsn: the record's.
        observed_us: the effective time of consents that state none.
        time_us: the record's log time.
    """
    is_news = False
    for said in record.consents:
        consent = Consent()
        consent.CopyFrom(said)
        if not consent.HasField("effective_time"):
            consent.effective_time.FromMicroseconds(observed_us)
        stored = StoredConsent(consent=consent, source=record.source, lsn=lsn, record_time_us=time_us)
        order = _consent_order(stored)
        place = next((i for i, each in enumerate(part.consents) if _consent_order(each) >= order), len(part.consents))
        if place == len(part.consents) or _consent_order(part.consents[place]) != order:
            part.consents.insert(place, stored)
            is_news = True
    while len(part.consents) > CONSENTS_MAX:
        kept = {_consent_order(each) for each in consents_standing(part.consents)}
        part.consents.remove(min(part.consents, key=lambda each: _worth(each, stands=_consent_order(each) in kept)))
    return is_news


def consents_standing(ledger: Iterable[StoredConsent]) -> list[StoredConsent]:
    """Return the consent that stands for each purpose and channel: the latest effective one, then the withdrawal."""
    found: dict[tuple[str, str], StoredConsent] = {}
    for stored in ledger:
        key = (stored.consent.purpose, stored.consent.channel)
        if key not in found or _consent_strength(stored) > _consent_strength(found[key]):
            found[key] = stored
    return [found[key] for key in sorted(found)]


def consent_to(ledger: Sequence[StoredConsent], asked: ConsentTerms, now_us: int) -> tuple[float, int]:
    """Return what a person says to a purpose on a channel, and until when.

    The latest of what they said of the purpose on this channel, or on all, stands; of two at the same time, the
    withdrawal.

    Args:
        ledger: all consents of all parts, any order.
        asked: what is to be allowed.
        now_us: a consent that has run out by then was never given.

    Returns:
        1 for allowed, 0 for withdrawn, NaN for nothing said; and the instant at which that is over, in microseconds.
    """
    said = [
        each for each in ledger if each.consent.purpose == asked.purpose and each.consent.channel in {"", asked.channel}
    ]
    if not said:
        return math.nan, NEVER_US
    latest = max(said, key=_consent_strength)
    if latest.consent.state == ConsentDecision.CONSENT_DECISION_WITHDRAWN:
        return 0.0, NEVER_US
    if not asked.valid_for_us:
        return 1.0, NEVER_US
    until_us = latest.consent.effective_time.ToMicroseconds() + asked.valid_for_us
    return (1.0, until_us) if until_us > now_us else (math.nan, NEVER_US)


def _consent_strength(stored: StoredConsent) -> tuple[int, bool, str]:
    return stored.consent.effective_time.ToMicroseconds(), _is_withdrawn(stored), stored.source


def _worth(stored: StoredConsent, *, stands: bool) -> tuple[bool, bool, tuple[int, bool, str]]:
    """Return what a ledger that is full keeps by: what stands before what does not, withdrawals before grants."""
    return stands, stands and _is_withdrawn(stored), _consent_strength(stored)


def _is_withdrawn(stored: StoredConsent) -> bool:
    return stored.consent.state == ConsentDecision.CONSENT_DECISION_WITHDRAWN


def _consent_order(stored: StoredConsent) -> tuple[str, str, int, bool, str]:
    return stored.consent.purpose, stored.consent.channel, *_consent_strength(stored)


def series_of(snapshot: Snapshot, key: bytes, part: StoredPart, terms: ProfileTerms) -> SeriesSet:
    """Return a part's series for a catalog: as stored, or for another layout those that it has too as stored.

    Only what the layout lacks is made from the timeline: a journey remembers what has long left that.

    Cost: where something is made, 1 µs a touchpoint, and 4 more for those it is made of.
    """
    if part.series_layout == terms.series_layout:
        return SeriesSet.from_bytes(part.series)
    if not part.series_layout:  # nothing was recorded
        return SeriesSet.empty(len(terms.series))
    stored = bytes(snapshot.get(Table.META, _layout_key(part.series_layout)) or b"")
    known = {stored[start : start + STAMP_BYTES]: row for row, start in enumerate(range(0, len(stored), STAMP_BYTES))}
    rows = [known.get(stamp, NO_ROW) for stamp in terms.series_stamps]
    series = SeriesSet.from_bytes(part.series).rearranged(rows)
    lacking = {row for row, before in enumerate(rows) if before == NO_ROW}
    if not lacking:
        return series
    types = _types_of(lacking, terms)
    entries: list[Entry] = []
    for place, value in snapshot.scan(Table.TIMELINE, key):
        if not any(name in value for name in types):
            continue  # most are of other types, and parsing costs more than everything else here
        touchpoint, instant_us = Touchpoint.FromString(value), instant_of(place)
        match touchpoint.WhichOneof("kind"):
            case "event":
                event = touchpoint.event.event
                entries += entries_of(event.type, instant_us, event.properties, terms)
            case "outcome" if not touchpoint.outcome.revokes:
                entries += outcome_entries(touchpoint.outcome.type, instant_us, terms)
    return series.insert([entry for entry in entries if entry[0] in lacking], terms.journey)


def _types_of(series: set[int], terms: ProfileTerms) -> list[bytes]:
    """Return the names of the types of events and outcomes that make entries of any of some series."""
    types = {name for name, event in terms.events.items() if not series.isdisjoint(event.series)}
    if terms.journey is not None and terms.journey.series in series:
        types |= {name for _, name in terms.journey.symbols}
    return [name.encode() for name in sorted(types)]


def keep_layout(txn: Transaction, terms: ProfileTerms) -> None:
    """Note what a layout of series consists of, for parts that will still have it under a later catalog."""
    txn.put(Table.META, _layout_key(terms.series_layout), b"".join(terms.series_stamps))


def _layout_key(series_layout: bytes) -> bytes:
    return b"series" + series_layout


def keep_series(part: StoredPart, series: SeriesSet, terms: ProfileTerms) -> None:
    """Put series into a part."""
    part.series, part.series_layout = series.to_bytes(), terms.series_layout


def touchpoint_key(key: bytes, instant_us: int, lsn: int, serial: int = 0) -> bytes:
    """Return where a touchpoint of a part stands: by part, then instant, then log record."""
    return b"".join(
        (key, (instant_us + _PAST_US).to_bytes(8, "big"), lsn.to_bytes(8, "big"), serial.to_bytes(2, "big"))
    )


def instant_of(touchpoint_key: bytes) -> int:
    """Return the instant of the touchpoint that stands under a key, microseconds since the epoch."""
    assert len(touchpoint_key) == _TOUCHPOINT_KEY_BYTES, "made by touchpoint_key"
    return int.from_bytes(touchpoint_key[16:24], "big") - _PAST_US


def touchpoints(snapshot: Snapshot, key: bytes) -> Iterator[Touchpoint]:
    """Yield everything on a part's timeline, oldest first."""
    for _, value in snapshot.scan(Table.TIMELINE, key):
        yield Touchpoint.FromString(value)
