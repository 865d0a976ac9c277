"""What a person was told, and from when until when they are therefore left in peace.

Handed the contacts of all parts of a person and the contact policies in force, it gives holds: spans of time in which a
target is not to be spoken of, or may be once less (see catalog.contact_terms). The order of the parts is without
effect, and so is the order in which contacts of one instant were recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from server.catalog.contact_terms import CAPS, ContactPolicyTerms, ContactTerms, target_key
from server.catalog.profile_terms import Instants
from server.storage.store import Snapshot, Table
from tsugi.log.v1.state_pb2 import StoredContact, StoredReaction, StoredTouch

TOUCHES_MAX: Final = 64  # of one action in a part; the oldest goes first
REACTIONS_MAX: Final = 16  # of one contact; what comes after is counted and not remembered here
HOLDS_MAX: Final = 1_024  # of a person; those that end first go first

NO_HOLDS: Final[Instants] = np.zeros((0, 3), np.int64)
NO_HOLDS.flags.writeable = False


def read_contacts(snapshot: Snapshot, keys: Iterable[bytes], terms: ContactTerms) -> list[StoredContact]:
    """Read what was told to some parts, where a policy counts it. Cost: one scan a part."""
    if not terms.counting:
        return []
    return [StoredContact.FromString(value) for key in keys for _, value in snapshot.scan(Table.CONTACTS, key)]


def add_touch(contact: StoredContact, touch: StoredTouch) -> None:
    """Count one more contact and remember it."""
    contact.count += 1
    contact.last_contact_time_us = max(contact.last_contact_time_us, touch.time_us)
    contact.recent.append(touch)
    del contact.recent[:-TOUCHES_MAX]


def add_reaction(contact: StoredContact, decision_lsn: int, reaction: StoredReaction) -> bool:
    """Note what came of a contact, and say whether it is remembered still."""
    for touch in contact.recent:
        if touch.decision_lsn == decision_lsn and len(touch.reactions) < REACTIONS_MAX:
            touch.reactions.append(reaction)
            return True
    return False


def fold_holds(contacts: Sequence[StoredContact], terms: ContactTerms, now_us: int) -> Instants:
    """Return a person's holds.

    Args:
        contacts: of all parts, any order.
        terms: of the catalog in force.
        now_us: holds that are over by then are left out.

    Returns:
        int64[h, 3]: target key, from when on, until when; ascending, read-only.

    Cost: some 1 µs a contact and policy.
    """
    if not terms.counting or not contacts:
        return NO_HOLDS
    found: set[tuple[int, int, int]] = set()
    rows: list[tuple[int, int, int]] = []
    for policy in terms.counting:
        for member, touches in _by_member(contacts, policy, terms).items():
            key = target_key(policy.name, member)
            if policy.kind in CAPS:
                newest = sorted((touch.time_us for touch in touches), reverse=True)[: policy.count]
                rows += [(key, time_us, time_us + policy.span_us) for time_us in newest]
            else:
                found.update((key, *span) for span in _silences(touches, policy))
    rows += found
    rows = [row for row in rows if row[2] > now_us]
    if not rows:
        return NO_HOLDS
    rows = sorted(sorted(rows, key=lambda row: (-row[2], row))[:HOLDS_MAX])
    holds = np.array(rows, np.int64)
    holds.flags.writeable = False
    return holds


def _by_member(
    contacts: Sequence[StoredContact], policy: ContactPolicyTerms, terms: ContactTerms
) -> dict[str, list[StoredTouch]]:
    """Gather the contacts that a policy counts together."""
    members: dict[str, list[StoredTouch]] = {}
    for contact in contacts:
        group = terms.groups.get(contact.action, "")
        for touch in contact.recent:
            member = policy.member(contact.action, group, touch.channel)
            if member is not None:
                members.setdefault(member, []).append(touch)
    return members


def _silences(touches: Sequence[StoredTouch], policy: ContactPolicyTerms) -> list[tuple[int, int]]:
    """Return the spans of silence that a cool-off asks for after what came of some contacts."""
    instants = sorted(instant for touch in touches for instant in _causes(touch, policy))
    silences = []
    for i in range(policy.count - 1, len(instants)):
        first, last = instants[i - policy.count + 1], instants[i]
        if policy.count == 1 or last - first <= policy.within_us:
            silences.append((last, last + policy.span_us))
    return silences


def _causes(touch: StoredTouch, policy: ContactPolicyTerms) -> list[int]:
    """Return the instants at which one contact gave a cause for silence."""
    instants = [each.time_us for each in touch.reactions if each.type in policy.outcome_types]
    responded = any(each.is_response and each.time_us < touch.ignored_us for each in touch.reactions)
    if policy.ignored and not responded:
        instants.append(touch.ignored_us)
    return instants
