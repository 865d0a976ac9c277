"""Contact policies, ready to use: by the projector, which says until when a person is left in peace, and by the gate.

A *target* is what one policy counts together: all it holds for, or one action, group or channel. A *hold* is a span in
which a target is not to be spoken of, or may be once less; it names its target by a hash of names, so that it means the
same whatever else a catalog declares.

What goes together within one request is counted by targets too, of which no history is kept: nobody holds them, and
they are whole again in the next request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from server.catalog.catalog import Amounts, Bytes, Rows
from tsugi.v1 import catalog_pb2

CAP, COOL_OFF, SUPPRESSION, STRICT_CAP = 0, 1, 2, 3
CAPS: Final = (CAP, STRICT_CAP)
# Of compositions: so often in a request, so often in each placement of it, not before another action opened it.
REQUEST_LIMIT, PLACEMENT_LIMIT, COMPANION = 4, 5, 6
BUDGET: Final = 7  # of all people together
ANY_CHANNEL: Final = -1
UNLIMITED: Final = 1 << 62  # what a target may be spoken of that is held by no cap


Naming = catalog_pb2.Composition | catalog_pb2.Requires | catalog_pb2.Budget | catalog_pb2.ActionVariation


@dataclass(frozen=True, slots=True)
class ContactPolicyTerms:
    """One policy."""

    name: str
    kind: int  # CAP, COOL_OFF, SUPPRESSION or STRICT_CAP
    scope: catalog_pb2.ContactScope  # never unspecified
    actions: frozenset[str]  # that it holds for,
    action_groups: frozenset[str]  # beside those of these groups; without either, for all
    channels: frozenset[str]  # that it holds on; empty: on all
    count: int  # of caps: at most so many; of COOL_OFF: from so many on
    within_us: int  # of COOL_OFF
    span_us: int
    outcome_types: frozenset[str]  # of COOL_OFF
    ignored: bool  # of COOL_OFF

    def member(self, action: str, group: str, channel: str) -> str | None:
        """Return what a contact is counted with; None when it is not counted."""
        if self.channels and channel not in self.channels:
            return None
        if (self.actions or self.action_groups) and action not in self.actions and group not in self.action_groups:
            return None
        if self.scope == catalog_pb2.CONTACT_SCOPE_EACH_ACTION:
            return action
        if self.scope == catalog_pb2.CONTACT_SCOPE_EACH_GROUP:
            return group or None
        return channel if self.scope == catalog_pb2.CONTACT_SCOPE_EACH_CHANNEL else ""


@dataclass(frozen=True, slots=True)
class Named:
    """Actions meant by their own names or their groups'; all, where nothing is named."""

    actions: frozenset[str]
    groups: frozenset[str]

    @classmethod
    def by(cls, message: Naming) -> Named:
        """Return whom a message means."""
        return cls(frozenset(message.actions), frozenset(message.groups))

    def has(self, action: catalog_pb2.Action) -> bool:
        """Say whether an action is meant."""
        is_all = not self.actions and not self.groups
        return is_all or action.name in self.actions or action.group in self.groups


@dataclass(frozen=True, slots=True)
class TargetColumns:
    """What the gate reads: t targets, and which of them an action has on which channel."""

    kinds: Bytes  # uint8[t]: CAP, COOL_OFF, SUPPRESSION, STRICT_CAP, REQUEST_LIMIT, PLACEMENT_LIMIT, COMPANION, BUDGET
    limits: Amounts  # int64[t]: how often it may be spoken of, or how much that may cost, before any hold
    rules: Rows  # int32[t]: of SUPPRESSION the rule that suppresses it; -1: none
    starts: Rows  # int32[n + 1]: the targets of action row r are entries starts[r]..starts[r + 1]
    entries: Rows  # int32[e, 2]: target (~target: a COMPANION that it opens), and the channel row or ANY_CHANNEL
    amounts: Amounts  # int64[e]: what saying the action once takes of the target: 1, or micros of a money budget

    def columns(self) -> tuple[Bytes, Amounts, Rows, Rows, Rows, Amounts]:
        """Return the arrays in the order kernels take them."""
        return self.kinds, self.limits, self.rules, self.starts, self.entries, self.amounts


@dataclass(frozen=True, slots=True)
class ContactTerms:
    """All contact policies of a catalog."""

    policies: tuple[ContactPolicyTerms, ...]
    groups: dict[str, str]  # action → group, where it has one
    targets: TargetColumns
    target_rows: dict[int, int]  # target key → row
    taken_by_hold: dict[int, tuple[int, int]]  # target key → row, and how often less a hold lets it be spoken of
    target_keys: tuple[int, ...]  # by row
    target_policies: tuple[int, ...]  # by row: the policy's place; -1: of a composition or budget
    target_names: tuple[str, ...]  # by row: policy, composition or budget, and where it counts by member that too
    strict: bool  # whether any cap is

    def all_claimed(self) -> list[tuple[int, int]]:
        """Return a hold of every target that the log has to agree to: of strict caps and of budgets."""
        kinds = self.targets.kinds.tolist()
        return [(target, UNLIMITED) for target, kind in enumerate(kinds) if kind in {STRICT_CAP, BUDGET}]

    def strict_targets(self, row: int, channel: int) -> list[int]:
        """Return the targets of strict caps that an action has on a channel."""
        starts, entries = self.targets.starts, self.targets.entries
        return [
            target
            for target, held_on in entries[starts[row] : starts[row + 1]].tolist()
            if target >= 0 and self.targets.kinds[target] == STRICT_CAP and held_on in {ANY_CHANNEL, channel}
        ]

    def layout(self) -> Sequence[object]:
        """Return what holds depend on: when any of it changes they are made anew."""
        if not self.counting:
            return []
        policies = [
            (
                each.name, each.kind, each.scope, sorted(each.actions), sorted(each.action_groups),
                sorted(each.channels), each.count, each.within_us, each.span_us, sorted(each.outcome_types),
                each.ignored,
            )
            for each in self.counting
        ]  # fmt: skip
        return [policies, sorted(self.groups.items()) if self._reads_groups() else []]

    @property
    def counting(self) -> list[ContactPolicyTerms]:
        """The policies that count contacts."""
        return [each for each in self.policies if each.kind != SUPPRESSION]

    def _reads_groups(self) -> bool:
        return any(each.action_groups or each.scope == catalog_pb2.CONTACT_SCOPE_EACH_GROUP for each in self.counting)


def target_key(policy: str, member: str) -> int:
    """Return the number that names a target for ever, within int64."""
    digest = hashlib.blake2b(f"{policy}\0{member}".encode(), digest_size=8, person=b"tsugi.target").digest()
    return int.from_bytes(digest, "little", signed=True)
