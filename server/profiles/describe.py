"""A golden record for people to read: what is known of one person, where each part of it comes from, what happened.

Handed a snapshot and a profile, it builds the public messages. It reads parts and nodes, never the log, and changes
nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import Catalog, Doubles
from server.catalog.history_terms import UNITS
from server.profiles import golden, history, parts, repository, survivorship
from server.profiles.identity import KEY_BYTES, link_rule
from server.profiles.repository import StoredRecord, timestamp
from server.profiles.series import entries_of
from server.profiles.standing import segment_key
from server.storage.store import Snapshot, Table
from tsugi.log.v1.state_pb2 import StoredClaim, StoredConsent, StoredContact, StoredNode, StoredPart
from tsugi.v1 import catalog_pb2, profile_pb2
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import LinkReason, Touchpoint
from tsugi.v1.profile_service_pb2 import LinkVerdict
from tsugi.v1.value_pb2 import Money, Value

WEIGHT_DECIMALS: Final = 3  # of bits shown: fewer than are computed, more than anybody needs
OTHER_CLAIMS_MAX: Final = 16
LINKS_MAX: Final = 256
OPEN_MATTERS_MAX: Final = 64
VISIT_US_MAX: Final = 86_400 * 1_000_000
INSTANT_US_MAX: Final = 253_402_300_800 * 1_000_000 - 1  # the end of year 9999
MICROS_MAX: Final = (1 << 63) - 1


class Page(NamedTuple):
    """Some touchpoints, newest first."""

    touchpoints: list[Touchpoint]
    next_token: str  # empty: there are no older ones


def describe(
    snapshot: Snapshot, profile_key: bytes, stored: StoredRecord, catalog: Catalog, now_us: int
) -> profile_pb2.Profile:
    """Build the public message of one profile, as it is at an instant. Cost: some 100 µs a part."""
    keys = stored.parts
    nodes = {key: node for key in keys if (node := golden.node_of(snapshot, key)) is not None}
    content = golden.read_parts(snapshot, keys)
    facts = np.full(len(catalog.space.facts), math.nan)
    facts[0] = now_us
    repository.write_facts(stored, catalog, snapshot, now_us, facts)
    profile = profile_pb2.Profile(
        profile_id=profile_key.hex(),
        identities=_identities(snapshot, nodes, catalog),
        attributes=_attributes([part for _, part in content], catalog, now_us),
        contacts=_contacts(snapshot, keys),
        lsn=stored.lsn,
        links=_links(snapshot, nodes),
        consents=[consent_state(each) for each in parts.consents_standing(ledger(content))],
        former_profile_ids=sorted(
            node.own_profile_key.hex()
            for node in nodes.values()
            if node.own_profile_key != profile_key and snapshot.get(Table.OWNERS, node.own_profile_key) is not None
        ),
        histories=[_history(each) for each in history.describe((part for _, part in content), now_us)],
    )
    _derive(profile, snapshot, profile_key, facts, catalog)
    _tell_open_matters(profile, snapshot, keys, catalog, now_us)
    return profile


def timeline(snapshot: Snapshot, keys: Sequence[bytes], size: int, token: bytes = b"") -> Page:
    """Return a page of touchpoints over all parts of a person, newest first.

    Args:
        snapshot: the state.
        keys: of the person's parts.
        size: at most so many, 1 or more.
        token: where the page before ended, see Page; empty: begin at the newest.

    Cost: one read of the store a touchpoint.
    """

    def newest_first(key: bytes) -> Iterator[tuple[bytes, bytes]]:
        start = key + token[:-KEY_BYTES] if token else b""
        for place, value in snapshot.scan(Table.TIMELINE, key, start=start, reverse=True):
            within_page = place[KEY_BYTES:] + key  # one record may say the same of two parts: those differ in the key
            if not token or within_page < token:
                yield within_page, value

    found: list[Touchpoint] = []
    last = b""
    for place, value in heapq.merge(*map(newest_first, keys), key=lambda entry: entry[0], reverse=True):
        if len(found) == size:
            return Page(found, last.hex())
        found.append(Touchpoint.FromString(value))
        last = place
    return Page(found, "")


def ledger(content: Iterable[tuple[bytes, StoredPart]]) -> list[StoredConsent]:
    """Return every consent that was said, over all parts."""
    return [stored for _, part in content for stored in part.consents]


def consent_state(stored: StoredConsent) -> profile_pb2.ConsentState:
    """Build the public message of one consent."""
    return profile_pb2.ConsentState(
        consent=stored.consent, source=stored.source, lsn=stored.lsn, record_time=timestamp(stored.record_time_us)
    )


def _identities(snapshot: Snapshot, nodes: dict[bytes, StoredNode], catalog: Catalog) -> list[Identity]:
    """List a person's identities in order of first mention, with those that are shared with others."""
    found = dict(nodes)
    for node in nodes.values():
        for edge in node.edges:
            if edge.reason != LinkReason.LINK_REASON_SHARED_RECORD or edge.other_key in found:
                continue
            other = golden.node_of(snapshot, edge.other_key)
            if other is not None and (
                other.too_shared
                or link_rule(other.identity.namespace, catalog.profiles) == catalog_pb2.LINK_RULE_HOUSEHOLD
            ):
                found[edge.other_key] = other
    ordered = sorted(found.values(), key=lambda node: (node.first_lsn, node.position))
    return [node.identity for node in ordered]


def _attributes(content: list[StoredPart], catalog: Catalog, now_us: int) -> dict[str, profile_pb2.AttributeValue]:
    terms = catalog.profiles
    trust = golden.trust_of(terms)
    told: dict[str, profile_pb2.AttributeValue] = {}
    for name, claims in sorted(golden.claims_by_attribute(content).items()):
        row = terms.attribute_rows.get(name)
        ranked = survivorship.standing(claims, terms.attributes[row], trust, now_us) if row is not None else []
        if not ranked:
            continue
        first = ranked[0]
        told[name] = profile_pb2.AttributeValue(
            value=first.value,
            source=first.source,
            update_time=timestamp(first.time_us),
            lsn=first.lsn,
            raw_text=first.raw_text,
            uncleansed=first.uncleansed,
            other_claims=[_claim(claim) for claim in ranked[1 : 1 + OTHER_CLAIMS_MAX]],
        )
    return told


def _claim(claim: StoredClaim) -> profile_pb2.AttributeClaim:
    return profile_pb2.AttributeClaim(
        value=claim.value,
        source=claim.source,
        update_time=timestamp(claim.time_us),
        lsn=claim.lsn,
        count=claim.count,
        raw_text=claim.raw_text,
    )


def _contacts(snapshot: Snapshot, keys: Sequence[bytes]) -> list[profile_pb2.Contact]:
    """Add up what every part was told."""
    found: dict[str, StoredContact] = {}
    for key in keys:
        for _, value in snapshot.scan(Table.CONTACTS, key):
            contact = StoredContact.FromString(value)
            sum_ = found.setdefault(contact.action, StoredContact(action=contact.action))
            sum_.count += contact.count
            sum_.last_contact_time_us = max(sum_.last_contact_time_us, contact.last_contact_time_us)
    return [
        profile_pb2.Contact(
            action=each.action, count=each.count, last_contact_time=timestamp(each.last_contact_time_us)
        )
        for _, each in sorted(found.items())
    ]


def _history(sums: history.Sums) -> profile_pb2.ActionHistory:
    return profile_pb2.ActionHistory(
        goal=sums.goal,
        action=sums.action,
        expected=sums.expected / UNITS,
        observed=sums.observed / UNITS,
        open=sums.n_open,
    )


def _links(snapshot: Snapshot, nodes: dict[bytes, StoredNode]) -> list[profile_pb2.IdentityLink]:
    """Tell what holds the person together, oldest first."""
    links = []
    for key, node in nodes.items():
        for edge in node.edges:
            other = nodes.get(edge.other_key)
            if other is None or edge.other_key < key or edge.verdict == LinkVerdict.LINK_VERDICT_DIFFERENT:
                continue
            link = profile_pb2.IdentityLink(
                identity=node.identity,
                other_identity=other.identity,
                reason=LinkReason.Name(edge.reason),
                source=edge.source,
                link_time=timestamp(edge.time_us),
                weight=round(edge.weight, WEIGHT_DECIMALS),
            )
            links.append((edge.lsn, key, edge.other_key, link))
    links.sort(key=lambda entry: entry[:3])
    return [link for *_, link in links[:LINKS_MAX]]


def _derive(
    profile: profile_pb2.Profile, snapshot: Snapshot, profile_key: bytes, facts: Doubles, catalog: Catalog
) -> None:
    """Fill in windows, segments and stage."""
    terms = catalog.profiles
    first = terms.first_window
    for offset, name in enumerate(terms.windows.names):
        value = _value(facts[first + offset], first + offset, catalog)
        if value is not None:
            profile.windows[name].CopyFrom(value)
    first_segment = catalog.space.profile_slice.stop - len(terms.segments.names)
    if terms.journey is not None:
        profile.journey_stage = terms.journey.stages[int(facts[first_segment - 1])]
    for offset, name in enumerate(terms.segments.names):
        if facts[first_segment + offset] == 1.0:
            stored = snapshot.get(Table.SEGMENTS, segment_key(name, profile_key))
            entered = int.from_bytes(bytes(stored), "big") if stored is not None else int(facts[0])
            profile.segments.add(segment=name, enter_time=timestamp(entered))


def _value(number: float, position: int, catalog: Catalog) -> Value | None:
    """Turn a fact's number back into a value; None where it is unknown, or a text nobody can turn back."""
    fact = catalog.space.facts[position]
    if math.isnan(number):
        return None
    match fact.type:
        case catalog_pb2.ATTRIBUTE_TYPE_BOOL:
            return Value(bool_value=bool(number))
        case catalog_pb2.ATTRIBUTE_TYPE_CATEGORY | catalog_pb2.ATTRIBUTE_TYPE_TEXT:
            text = next((text for text, code in fact.codes.items() if code == number), None)
            return Value(text_value=text) if text is not None else None
        case catalog_pb2.ATTRIBUTE_TYPE_TIME:  # the last instants of all become later ones as floats
            return Value(time_value=timestamp(min(int(number), INSTANT_US_MAX)))
        case catalog_pb2.ATTRIBUTE_TYPE_MONEY:
            micros = min(max(round(number * 1e6), -MICROS_MAX), MICROS_MAX)
            return Value(money_value=Money(currency_code=catalog.message.currency_code, amount_micros=micros))
    return Value(number_value=float(number))


def _tell_open_matters(
    profile: profile_pb2.Profile, snapshot: Snapshot, keys: Sequence[bytes], catalog: Catalog, now_us: int
) -> None:
    """Fill in the events that opened what is still open, newest first, as many as the windows count.

    Cost: 1 µs a touchpoint within the longest window's reach, and 20 more for those that open or close something.
    """
    terms = catalog.profiles
    columns = terms.windows
    reaches_us = {
        row: int(columns.spans_us[row]) or VISIT_US_MAX
        for row, name in enumerate(columns.names)
        if columns.kinds[row] == catalog_pb2.WINDOW_KIND_OPEN and profile.windows[name].number_value > 0
    }
    if not reaches_us:
        return
    series = {int(columns.series[row]) for row in reaches_us}
    types = {
        name.encode() for row in series for name in (terms.series[row].event_type, terms.series[row].closing_event_type)
    }
    happened: list[tuple[int, int, float, profile_pb2.Event]] = []
    since_us = now_us - max(reaches_us.values())
    for key in keys:
        for place, value in snapshot.scan(Table.TIMELINE, key, start=parts.touchpoint_key(key, since_us, 0)):
            instant_us = parts.instant_of(place)
            if instant_us > now_us:
                break
            if not any(name in value for name in types):
                continue  # most are others, and to parse them is what costs
            event = Touchpoint.FromString(value).event.event
            made = entries_of(event.type, instant_us, event.properties, terms)
            happened += [(row, instant_us, number, event) for row, _, number in made if row in series]
    found: list[tuple[int, str, profile_pb2.Event]] = []
    for window, reach_us in reaches_us.items():
        latest: dict[float, tuple[int, bool, profile_pb2.Event]] = {}
        for row, instant_us, number, event in happened:
            if row != columns.series[window] or instant_us <= now_us - reach_us:
                continue
            matter, is_closing = abs(number), number < 0
            if matter not in latest or (instant_us, is_closing) > latest[matter][:2]:
                latest[matter] = (instant_us, is_closing, event)
        name = columns.names[window]
        still_open = [(us, name, event) for us, is_closing, event in latest.values() if not is_closing]
        still_open.sort(key=lambda entry: -entry[0])
        found += still_open[: int(profile.windows[name].number_value)]  # the rest are of an earlier visit
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    for _, name, event in found[:OPEN_MATTERS_MAX]:
        profile.open_matters.add(window=name, event=event)
