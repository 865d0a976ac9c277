"""Whose value stands? One attribute's claims, from any number of sources, and the rule that chooses among them.

Handed claims, it orders them: the first stands, the others are the losing values that a golden record shows. It knows
nothing of where claims are kept, and the order in which they are handed over is without effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from server.catalog.profile_terms import AttributeTerms
from tsugi.log.v1.state_pb2 import StoredClaim
from tsugi.v1 import catalog_pb2
from tsugi.v1.value_pb2 import TextSet, Value

NEVER_US: Final = (1 << 63) - 1

_Rank = Callable[[StoredClaim], tuple[Any, ...]]  # greater stands before


def standing(
    claims: Sequence[StoredClaim], attribute: AttributeTerms, trust: Mapping[str, int], now_us: int
) -> list[StoredClaim]:
    """Order the claims to one attribute, the one that stands first.

    A text that could not be cleansed stands behind every clean one. Where a rule leaves claims equal, the latest
    observed stands, then the one of the more trusted source, then the one recorded last. A value that the catalog does
    not allow any more stands nowhere.

    Args:
        claims: of all parts of one person; those alive of the same source and value count together.
        attribute: its rule and time to live.
        trust: of each source; one that is not declared any more has none.
        now_us: claims whose time to live has passed by then are left out.

    Returns:
        New claims; empty when none is alive. Of a set that keeps all, the first is the union.
    """
    alive = _together(
        [
            claim
            for claim in claims
            if expires_us(claim, attribute) > now_us and not math.isnan(attribute.fact.encode(claim.value))
        ]
    )
    if len(alive) < 2:
        return alive

    def age(claim: StoredClaim) -> tuple[Any, ...]:
        return claim.time_us, trust.get(claim.source, 0), claim.source, claim.lsn

    ranked = sorted(alive, key=_rank(alive, attribute, trust, age), reverse=True)
    if attribute.survivorship == catalog_pb2.SURVIVORSHIP_KEEP_ALL and ranked[0].value.HasField("set_value"):
        first = StoredClaim()
        first.CopyFrom(ranked[0])
        union = {text for claim in ranked for text in claim.value.set_value.values}
        first.value.CopyFrom(Value(set_value=TextSet(values=sorted(union))))
        ranked[0] = first
    return ranked


def expires_us(claim: StoredClaim, attribute: AttributeTerms) -> int:
    """Return the instant from which on a claim is forgotten."""
    return claim.time_us + attribute.time_to_live_us if attribute.time_to_live_us else NEVER_US


def _rank(claims: Iterable[StoredClaim], attribute: AttributeTerms, trust: Mapping[str, int], age: _Rank) -> _Rank:
    """Return what the rule orders by; it only looks at each source's latest word where it compares sources."""
    latest: dict[str, StoredClaim] = {}
    counts: dict[bytes, int] = {}
    for claim in claims:
        if claim.source not in latest or age(claim) > age(latest[claim.source]):
            latest[claim.source] = claim
        value = claim.value.SerializeToString()
        counts[value] = counts.get(value, 0) + claim.count
    current = {id(claim) for claim in latest.values()}
    by_rule: dict[int, _Rank] = {
        catalog_pb2.SURVIVORSHIP_MOST_TRUSTED: lambda claim: (id(claim) in current, trust.get(claim.source, 0)),
        catalog_pb2.SURVIVORSHIP_MOST_FREQUENT: lambda claim: (counts[claim.value.SerializeToString()],),
        catalog_pb2.SURVIVORSHIP_LONGEST: lambda claim: (id(claim) in current, len(claim.value.text_value)),
        catalog_pb2.SURVIVORSHIP_MINIMUM: lambda claim: (id(claim) in current, -_number(claim.value)),
        catalog_pb2.SURVIVORSHIP_MAXIMUM: lambda claim: (id(claim) in current, _number(claim.value)),
    }
    rule = by_rule.get(attribute.survivorship, _no_rule)
    return lambda claim: (not claim.uncleansed, *rule(claim), *age(claim))


def _no_rule(_claim: StoredClaim) -> tuple[Any, ...]:
    return ()


def _number(value: Value) -> float:
    match value.WhichOneof("kind"):
        case "number_value":
            return value.number_value
        case "money_value":
            return float(value.money_value.amount_micros)
        case "time_value":
            return value.time_value.seconds + value.time_value.nanos / 1e9
    return 0.0


def _together(claims: Sequence[StoredClaim]) -> list[StoredClaim]:
    """Count claims of one source and value together; parts of one person may hold the same."""
    if len(claims) < 2:
        return list(claims)
    found: dict[tuple[str, bytes], StoredClaim] = {}
    for claim in claims:
        key = (claim.source, claim.value.SerializeToString(deterministic=True))
        before = found.get(key)
        if before is None:
            found[key] = claim
            continue
        latest = max(before, claim, key=lambda each: (each.time_us, each.lsn))
        both = StoredClaim()
        both.CopyFrom(latest)
        both.count = before.count + claim.count
        found[key] = both
    return list(found.values())
