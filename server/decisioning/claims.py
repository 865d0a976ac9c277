"""What a decision takes for itself in the log, so that no two decisions at once pass a strict cap or a budget.

A contact under a strict cap is a *claim*: the decision's record is about the target and the person, and the log accepts
it only while fewer such records stand within the cap's span. Where the placement activates on impression the record is
a *reservation*, which lapses when the goal's attribution window closes; the report of the impression confirms it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from server.catalog.catalog import Catalog
from server.storage.record import SUBJECTS_MAX, Claim, Spend

MAX: Final = SUBJECTS_MAX - 16  # that always fit, beside the identities a request may name

_CONTACT: Final = b"tsugi.contact"
_RESERVED: Final = b"tsugi.reserved"


class Chosen(NamedTuple):
    """What a decision chose for one slot."""

    placement_row: int
    row: int  # -1: nothing
    forgone: float  # by how much the best open candidate's priority is above


class Claimed(NamedTuple):
    """What one decision claims."""

    targets: tuple[int, ...]  # keys, one a claim
    claims: tuple[Claim, ...]
    subjects: tuple[bytes, ...]  # what its record is about, beside the person
    confirming: tuple[tuple[bytes, ...], ...]  # one a slot: what the report of its impression is about


class Spent(NamedTuple):
    """What one decision spends."""

    spends: tuple[Spend, ...]
    keys: tuple[int, ...]  # of each spend the contact target to do without where the log refuses it
    waits: bool  # for the log to agree


def claim(slots: Iterable[Chosen], parts: Sequence[bytes], leader: bytes, catalog: Catalog) -> Claimed | None:
    """Return what a decision has to claim; None when it may go ahead.

    Args:
        slots: what was chosen for each slot.
        parts: keys of the person's identities; empty: nobody, who has nothing to claim.
        leader: the key that a contact is claimed under.
        catalog: the revision decided under.

    Cost: nothing without strict caps; some 3 µs a target and identity.
    """
    contacts = catalog.profiles.contacts
    if not contacts.strict or not parts:
        return None
    targets: list[int] = []
    claims: list[Claim] = []
    subjects: list[bytes] = []
    confirming: list[tuple[bytes, ...]] = []
    for placement_row, row, _ in slots:
        placement = catalog.placements[placement_row]
        confirmed: list[bytes] = []
        for target in contacts.strict_targets(row, placement.channel_row) if row >= 0 else ():
            key = contacts.target_keys[target].to_bytes(8, "little", signed=True)
            policy = contacts.policies[contacts.target_policies[target]]
            counted = [(_subject(_CONTACT, key, part), policy.span_us) for part in parts]
            if catalog.reserving_us:
                counted += [(_subject(_RESERVED, key, part), catalog.reserving_us) for part in parts]
            targets.append(contacts.target_keys[target])
            claims.append(Claim(tuple(counted), policy.count))
            if placement.on_impression:
                subjects.append(_subject(_RESERVED, key, leader))
                confirmed.append(_subject(_CONTACT, key, leader))
            else:
                subjects.append(_subject(_CONTACT, key, leader))
        confirming.append(tuple(confirmed))
    if not claims:
        return None
    return Claimed(tuple(targets), tuple(claims), tuple(subjects), tuple(confirming))


def fits(claimed: Claimed, n_subjects: int) -> bool:
    """Say whether a record about so many others has room for what is claimed."""
    return len(claimed.subjects) + n_subjects <= SUBJECTS_MAX


def _subject(kind: bytes, target: bytes, part: bytes) -> bytes:
    return hashlib.blake2b(target + part, digest_size=16, person=kind).digest()
