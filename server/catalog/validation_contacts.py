"""Whether the contact policies and compositions of a catalog are good ones; part of ``validation.py``."""

from __future__ import annotations

from typing import Final

from server.catalog.contact_terms import Named
from server.catalog.faults import DAY_US, MINUTE_US, Faults
from tsugi.v1 import catalog_pb2

COUNT_MAX: Final = 64  # contacts of an action that are remembered one by one
STRICT_MAX: Final = 4  # each takes a place among what a record is about, for each slot
SPAN_US_MAX: Final = 366 * DAY_US
AT_MOST_MAX: Final = 256  # slots of a request


def check_contact_policies(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note every fault of the contact policies except those of expressions."""
    actions = {action.name for action in catalog.actions}
    groups = {group.name for group in catalog.action_groups}
    channels = {channel.name for channel in catalog.channels}
    outcome_types = {outcome_type.name for outcome_type in catalog.outcome_types}
    for i, policy in enumerate(catalog.contact_policies):
        path = f"contact_policies[{i}]"
        faults.enum(f"{path}.scope", policy.scope, catalog_pb2.ContactScope)
        faults.refer(f"{path}.actions", policy.actions, actions, "action")
        faults.refer(f"{path}.groups", policy.groups, groups, "action group")
        faults.refer(f"{path}.channels", policy.channels, channels, "channel")
        kind = policy.WhichOneof("policy")
        faults.check(
            sum(each.cap.strict for each in catalog.contact_policies[:i]) < STRICT_MAX or not policy.cap.strict,
            f"{path}.cap.strict",
            f"at most {STRICT_MAX} caps are strict",
        )
        if kind == "cap":
            _cap(f"{path}.cap", policy.cap, faults)
        elif kind == "cool_off":
            _cool_off(f"{path}.cool_off", policy.cool_off, outcome_types, faults)
        elif kind is None:
            faults.add(path, "one of cap, coolOff and suppression is required")


def _cap(path: str, cap: catalog_pb2.FrequencyCap, faults: Faults) -> None:
    faults.check(1 <= cap.count_max <= COUNT_MAX, f"{path}.count_max", f"1 to {COUNT_MAX}, got {cap.count_max}")
    faults.span(f"{path}.span", cap.span, MINUTE_US, SPAN_US_MAX)


def _cool_off(path: str, cool_off: catalog_pb2.CoolOff, outcome_types: set[str], faults: Faults) -> None:
    faults.refer(f"{path}.outcome_types", cool_off.outcome_types, outcome_types, "outcome type")
    if not cool_off.outcome_types and not cool_off.ignored:
        faults.add(f"{path}.outcome_types", "name an outcome type, or set ignored")
    faults.check(cool_off.count <= COUNT_MAX, f"{path}.count", f"at most {COUNT_MAX}, got {cool_off.count}")
    if cool_off.count > 1 or cool_off.HasField("within"):
        faults.span(f"{path}.within", cool_off.within, MINUTE_US, SPAN_US_MAX)
    faults.span(f"{path}.span", cool_off.span, MINUTE_US, SPAN_US_MAX)


def check_compositions(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note every fault of what goes together."""
    actions = {action.name for action in catalog.actions}
    groups = {group.name for group in catalog.action_groups}
    for i, composition in enumerate(catalog.compositions):
        path = f"compositions[{i}]"
        faults.refer(f"{path}.actions", composition.actions, actions, "action")
        faults.refer(f"{path}.groups", composition.groups, groups, "action group")
        rule = composition.WhichOneof("rule")
        if rule == "at_most":
            count_max = composition.at_most.count_max
            faults.check(
                1 <= count_max <= AT_MOST_MAX, f"{path}.at_most.count_max", f"1 to {AT_MOST_MAX}, got {count_max}"
            )
        elif rule == "requires":
            requires = composition.requires
            faults.refer(f"{path}.requires.actions", requires.actions, actions, "action")
            faults.refer(f"{path}.requires.groups", requires.groups, groups, "action group")
            if not requires.actions and not requires.groups:
                faults.add(f"{path}.requires", "name an action or a group")
        else:
            faults.add(path, "one of atMost and requires is required")
    _check_order(catalog, faults)


def _check_order(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note the requirements that can never be met, because each of two actions waits for the other."""
    requirements = {i: each for i, each in enumerate(catalog.compositions) if each.HasField("requires")}
    waiting = {i: _members(each, catalog) for i, each in requirements.items()}
    opening = {i: _members(each.requires, catalog) for i, each in requirements.items()}
    unmet = set(waiting)
    while met := {i for i in unmet if opening[i].difference(*(waiting[other] for other in unmet))}:
        unmet -= met
    for i in sorted(unmet):
        if waiting[i] and opening[i]:
            faults.add(f"compositions[{i}].requires", "none of these can come first: each waits for another action")


def _members(message: catalog_pb2.Composition | catalog_pb2.Requires, catalog: catalog_pb2.Catalog) -> set[str]:
    named = Named.by(message)
    return {action.name for action in catalog.actions if named.has(action)}
