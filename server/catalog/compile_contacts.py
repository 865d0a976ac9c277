"""From the contact policies and compositions people push to what the projector and the core read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from server.catalog.budget_terms import budget_target
from server.catalog.contact_terms import (
    ANY_CHANNEL,
    BUDGET,
    CAP,
    CAPS,
    COMPANION,
    COOL_OFF,
    PLACEMENT_LIMIT,
    REQUEST_LIMIT,
    STRICT_CAP,
    SUPPRESSION,
    UNLIMITED,
    ContactPolicyTerms,
    ContactTerms,
    Named,
    TargetColumns,
    target_key,
)
from server.catalog.declared import frozen
from server.catalog.expressions import NO_RULE, RuleCompiler
from server.catalog.faults import duration_us
from server.errors import Violation
from tsugi.v1 import catalog_pb2


def compile_contacts(
    message: catalog_pb2.Catalog,
    actions: Sequence[catalog_pb2.Action],
    channel_rows: Mapping[str, int],
    compiler: RuleCompiler,
    violations: list[Violation],
) -> ContactTerms:
    """Compile the contact policies, compositions and budgets of a catalog.

    Args:
        message: a catalog without faults but those of its rules.
        actions: its actions in the order of the columns.
        channel_rows: by channel name.
        compiler: takes the expressions of suppressions.
        violations: gets their faults.

    Cost: O(policies × actions × channels + (compositions + budgets) × actions).
    """
    policies = tuple(map(_policy, message.contact_policies))
    rules = [
        compiler.add(each.suppression.expression, None, f"contact_policies[{i}].suppression.expression", violations)
        if each.HasField("suppression")
        else NO_RULE
        for i, each in enumerate(message.contact_policies)
    ]
    compositions = [
        (composition, Named.by(composition), Named.by(composition.requires)) for composition in message.compositions
    ]
    budgets = [(budget, Named.by(budget)) for budget in message.budgets]
    targets = _Targets()
    starts: list[int] = [0]
    entries: list[tuple[int, int, int]] = []
    for action in actions:
        for place, (policy, rule) in enumerate(zip(policies, rules, strict=True)):
            is_by_channel = policy.channels or policy.scope == catalog_pb2.CONTACT_SCOPE_EACH_CHANNEL
            places = list(channel_rows.items()) if is_by_channel else [("", ANY_CHANNEL)]
            for channel, channel_row in places:
                member = policy.member(action.name, action.group, channel)
                if member is not None:
                    entries.append((targets.of_policy(place, policy, rule, member), channel_row, 1))
        for composition, meant, opening in compositions:
            if composition.HasField("requires"):
                # It begins unlimited, so that no gate refuses it; the core closes it when it begins to fill.
                target = targets.of_composition(composition.name, "", COMPANION, UNLIMITED)
                entries += [(target, ANY_CHANNEL, 1)] if meant.has(action) else []
                entries += [(~target, ANY_CHANNEL, 1)] if opening.has(action) else []
            elif meant.has(action) and (action.group or not composition.at_most.each_group):
                limit = composition.at_most
                kind = PLACEMENT_LIMIT if limit.each_placement else REQUEST_LIMIT
                member = action.group if limit.each_group else ""
                target = targets.of_composition(composition.name, member, kind, limit.count_max)
                entries.append((target, ANY_CHANNEL, 1))
        for budget, meant in budgets:
            if meant.has(action):
                amount = action.cost_micros if budget.HasField("cost_micros_max") else 1
                entries.append((targets.of_budget(budget.name), ANY_CHANNEL, amount))
        starts.append(len(entries))
    columns = targets.columns(starts, entries)
    taken = [1 if kind in CAPS else UNLIMITED for kind in columns.kinds.tolist()]
    return ContactTerms(
        policies=policies,
        groups={action.name: action.group for action in actions if action.group},
        targets=columns,
        target_rows=targets.rows,
        taken_by_hold={key: (row, taken[row]) for key, row in targets.rows.items()},
        target_keys=tuple(targets.rows),
        target_policies=tuple(targets.policies),
        target_names=tuple(targets.names),
        strict=any(policy.kind == STRICT_CAP for policy in policies),
    )


class _Targets:
    """Targets in order of first mention."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.names: list[str] = []
        self.policies: list[int] = []
        self._described: list[tuple[int, int, int]] = []

    def of_policy(self, place: int, policy: ContactPolicyTerms, rule: int, member: str) -> int:
        limit = policy.count if policy.kind in CAPS else UNLIMITED
        return self._row(target_key(policy.name, member), policy.name, member, place, (policy.kind, limit, rule))

    def of_composition(self, name: str, member: str, kind: int, limit: int) -> int:
        key = target_key(f"composition {name}", member)  # no policy's name has a blank
        return self._row(key, name, member, -1, (kind, limit, NO_RULE))

    def of_budget(self, name: str) -> int:
        return self._row(budget_target(name), name, "", -1, (BUDGET, UNLIMITED, NO_RULE))

    def _row(self, key: int, name: str, member: str, place: int, described: tuple[int, int, int]) -> int:
        if key not in self.rows:
            self.rows[key] = len(self.rows)
            self.names.append(f"{name}: {member}" if member else name)
            self.policies.append(place)
            self._described.append(described)
        return self.rows[key]

    def columns(self, starts: list[int], entries: list[tuple[int, int, int]]) -> TargetColumns:
        table = np.array(self._described, np.int64).reshape(len(self._described), 3)
        taken = np.array(entries, np.int64).reshape(len(entries), 3)
        return TargetColumns(
            kinds=frozen(table[:, 0].astype(np.uint8)),
            limits=frozen(np.ascontiguousarray(table[:, 1])),
            rules=frozen(table[:, 2].astype(np.int32)),
            starts=frozen(np.array(starts, np.int32)),
            entries=frozen(np.ascontiguousarray(taken[:, :2], np.int32)),
            amounts=frozen(np.ascontiguousarray(taken[:, 2])),
        )


def _policy(message: catalog_pb2.ContactPolicy) -> ContactPolicyTerms:
    cap = STRICT_CAP if message.cap.strict else CAP
    kind = {"cap": cap, "cool_off": COOL_OFF}.get(message.WhichOneof("policy") or "", SUPPRESSION)
    cool_off = message.cool_off
    return ContactPolicyTerms(
        name=message.name,
        kind=kind,
        scope=message.scope or catalog_pb2.CONTACT_SCOPE_TOGETHER,
        actions=frozenset(message.actions),
        action_groups=frozenset(message.groups),
        channels=frozenset(message.channels),
        count=message.cap.count_max if kind in CAPS else cool_off.count or 1,
        within_us=duration_us(cool_off.within),
        span_us=duration_us(message.cap.span if kind in CAPS else cool_off.span),
        outcome_types=frozenset(cool_off.outcome_types),
        ignored=cool_off.ignored,
    )
