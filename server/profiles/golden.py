"""One person out of many parts: what is known, whose word stands, and what follows from it at an instant.

Handed the parts of a person, it folds them into one golden record: the surviving value of each attribute, until when
that holds, and the series of everything that happened. The order of the parts is without effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from server.catalog.catalog import Catalog, Doubles
from server.catalog.profile_terms import Instants, ProfileTerms
from server.profiles import derived, history, holds, survivorship
from server.profiles import parts as stored_parts
from server.profiles.series import SeriesSet
from server.storage.store import Snapshot, Table
from tsugi.log.v1.state_pb2 import StoredClaim, StoredContact, StoredNode, StoredPart


class Golden(NamedTuple):
    """One person, folded."""

    leader: bytes  # key of the node that begins the profile
    parts: tuple[bytes, ...]  # keys of all its nodes, ascending
    facts: Doubles  # float64[attributes + consents], NaN where unknown
    refold_us: int  # the first instant at which a claim or consent runs out: from then on others may stand
    series: SeriesSet
    holds: Instants  # int64[h, 3], see holds.fold_holds
    history: Instants  # int64[h, 5], see history.fold


def fold(
    leader: bytes,
    parts: Sequence[tuple[bytes, StoredPart, SeriesSet]],
    contacts: Sequence[StoredContact],
    terms: ProfileTerms,
    now_us: int,
) -> Golden:
    """Fold the parts of one person.

    Args:
        leader: key of the node that begins the profile.
        parts: key, content and series of each node's part, any order.
        contacts: what was told to all of them, any order.
        terms: of the catalog in force.
        now_us: claims that are forgotten by then do not count.

    Cost: some 3 µs a claim.
    """
    claims = claims_by_attribute([part for _, part, _ in parts])
    trust = trust_of(terms)
    n = terms.first_window - 1
    facts = np.full(n, math.nan)
    refold_us = survivorship.NEVER_US
    for row, attribute in enumerate(terms.attributes):
        stated = claims.get(attribute.name)
        if stated is None:
            continue
        ranked = survivorship.standing(stated, attribute, trust, now_us)
        if ranked:
            facts[row] = attribute.fact.encode(ranked[0].value)
        if attribute.time_to_live_us:
            refold_us = min(refold_us, *(survivorship.expires_us(claim, attribute) for claim in stated))
    if terms.consents:
        ledger = [consent for _, part, _ in parts for consent in part.consents]
        for row, asked in enumerate(terms.consents, start=len(terms.attributes)):
            facts[row], until_us = stored_parts.consent_to(ledger, asked, now_us)
            refold_us = min(refold_us, until_us)
    series = parts[0][2].merge([each for _, _, each in parts[1:]], terms.journey)
    held = holds.fold_holds(contacts, terms.contacts, now_us)
    shown = history.fold([part for _, part, _ in parts])
    return Golden(leader, tuple(sorted(key for key, _, _ in parts)), facts, refold_us, series, held, shown)


def evaluate(folded: Golden, catalog: Catalog, now_us: int, out: Doubles) -> tuple[int, int]:
    """Write what is known of a person at an instant, and what follows from it.

    Args:
        folded: the person; attributes as they stand until refold_us.
        catalog: in force.
        now_us: the instant.
        out: float64[facts]; now and the profile's part are written.

    Returns:
        The first instant after now_us at which any of it is another, and the first at which a segment or the stage of
        the journey may be.
    """
    out[0] = now_us
    out[1 : 1 + folded.facts.size] = folded.facts
    until_us, segments_until_us = derived.of(catalog).evaluate(now_us, out, folded.series)
    return int(until_us), int(segments_until_us)


def fold_stored(snapshot: Snapshot, keys: Sequence[bytes], terms: ProfileTerms, now_us: int) -> Golden:
    """Fold a person from the store. Cost: some 100 µs, and more where series are made again for another layout."""
    parts = [
        (key, part, stored_parts.series_of(snapshot, key, part, terms)) for key, part in read_parts(snapshot, keys)
    ]
    return fold(keys[0], parts, holds.read_contacts(snapshot, keys, terms.contacts), terms, now_us)


def read_parts(snapshot: Snapshot, keys: Sequence[bytes]) -> list[tuple[bytes, StoredPart]]:
    """Read parts; a node under which nothing was recorded has an empty one."""
    found = [(key, snapshot.get(Table.PARTS, key)) for key in keys]
    return [(key, StoredPart.FromString(bytes(value)) if value is not None else StoredPart()) for key, value in found]


def node_of(snapshot: Snapshot, key: bytes) -> StoredNode | None:
    """Read one node of the identity graph."""
    value = snapshot.get(Table.NODES, key)
    return StoredNode.FromString(bytes(value)) if value is not None else None


def claims_by_attribute(parts: Sequence[StoredPart]) -> dict[str, list[StoredClaim]]:
    """Gather the claims of several parts by attribute."""
    claims: dict[str, list[StoredClaim]] = {}
    for part in parts:
        for claim in part.claims:
            claims.setdefault(claim.attribute, []).append(claim)
    return claims


def trust_of(terms: ProfileTerms) -> dict[str, int]:
    """Return how far each source is believed."""
    return {source.name: source.trust for source in terms.sources.values()}
