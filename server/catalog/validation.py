"""Whether a catalog is a good one: every fault, each with its path and a suggestion.

Handed the message alone. Rules are checked where they are compiled; sizes, names and references here, those of
everything about profiles in ``validation_profiles.py``. What passes can be compiled without a further question.
"""

from __future__ import annotations

import math
import re
from typing import Final

from server.catalog.catalog import VALUE_MAX
from server.catalog.faults import DAY_US, Faults, instant_us
from server.catalog.validation_comparisons import (
    SALT_BYTES_MAX,
    check_budgets,
    check_experiments,
    check_exploration_budget,
    check_holdouts,
)
from server.catalog.validation_contacts import check_compositions, check_contact_policies
from server.catalog.validation_profiles import check_attributes, check_profiles, check_purposes
from server.catalog.values import INSTANT_WANTED, is_instant
from server.errors import Violation
from tsugi.v1 import catalog_pb2

CATALOG_BYTES_MAX: Final = 16 * 1024 * 1024
ACTIONS_MAX: Final = 10_000
LEARNED_COLUMNS_MAX: Final = 64  # with any number of actions
LEARNED_COLUMNS_FEW_MAX: Final = 320  # with few; no more than the learner process keeps
LEARNED_NUMBERS_MAX: Final = 100 * (LEARNED_COLUMNS_MAX + 1) ** 2  # actions × (columns + 1)², beyond 64 columns
CONTENT_BYTES_MAX: Final = 4_096
WINDOW_US_MIN: Final = 100_000
WINDOW_US_MAX: Final = 90 * DAY_US
VALUE_MICROS_MAX: Final = int(VALUE_MAX) * 1_000_000

_CURRENCY = re.compile(r"[A-Z]{3}\Z")
_LISTS: Final = {
    "identity_namespaces": (1, 32),
    "profile_attributes": (0, 256),
    "context_attributes": (0, 64),
    "action_attributes": (0, 64),
    "event_types": (0, 256),
    "outcome_types": (1, 64),
    "goals": (1, 16),
    "channels": (1, 32),
    "placements": (1, 256),
    "actions": (0, ACTIONS_MAX),
    "action_groups": (0, 256),
    "contact_policies": (0, 64),
    "compositions": (0, 64),
    "experiments": (0, 8),
    "holdouts": (0, 8),
    "budgets": (0, 32),
    "sources": (0, 64),
    "consent_purposes": (0, 64),
    "windows": (0, 128),
    "recency_frequency_monetary": (0, 8),
    "segments": (0, 128),
}


def check(catalog: catalog_pb2.Catalog) -> list[Violation]:
    """Return every fault of a catalog except those of its rules; empty when there is none.

    Where a list is too long, that is told and nothing of what stands in it. Cost: O(size).
    """
    faults = Faults()
    n_bytes = catalog.ByteSize()
    faults.check(n_bytes <= CATALOG_BYTES_MAX, "", f"at most {CATALOG_BYTES_MAX} bytes serialised, got {n_bytes}")
    if not _CURRENCY.match(catalog.currency_code):
        faults.add("currency_code", f"an ISO 4217 code such as EUR, got {catalog.currency_code[:16]!r}")
    for field, (least, most) in _LISTS.items():
        faults.count(field, len(getattr(catalog, field)), least, most)
    if any(len(getattr(catalog, field)) > most for field, (_, most) in _LISTS.items()):
        return faults.violations  # to look at every entry of what is too long could take hours
    for field in _LISTS:
        faults.names(field, [entry.name for entry in getattr(catalog, field)])
    check_attributes("context_attributes", catalog.context_attributes, catalog, faults)
    check_attributes("action_attributes", catalog.action_attributes, catalog, faults)
    check_profiles(catalog, faults)
    _outcome_types(catalog, faults)
    _goals(catalog, faults)
    _placements(catalog, faults)
    check_purposes(catalog, faults)
    _actions(catalog, faults)
    check_contact_policies(catalog, faults)
    check_compositions(catalog, faults)
    check_experiments(catalog, _exploration, faults)
    check_holdouts(catalog, faults)
    check_budgets(catalog, faults)
    control = catalog.random_control
    faults.check(0.0 <= control.share <= 0.5, "random_control.share", f"0 to 0.5, got {control.share}")
    n_salt = len(control.salt.encode())
    faults.check(n_salt <= SALT_BYTES_MAX, "random_control.salt", f"at most {SALT_BYTES_MAX} bytes, got {n_salt}")
    return faults.violations


def _outcome_types(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    for i, outcome_type in enumerate(catalog.outcome_types):
        path = f"outcome_types[{i}]"
        faults.enum(f"{path}.kind", outcome_type.kind, catalog_pb2.OutcomeKind)
        bounds = (outcome_type.value_minimum, outcome_type.value_maximum)
        if not all(map(math.isfinite, bounds)) or bounds[0] > bounds[1]:
            faults.add(f"{path}.value_minimum", "finite and not above value_maximum")


def _goals(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    kinds = {outcome_type.name: outcome_type.kind for outcome_type in catalog.outcome_types}
    for i, goal in enumerate(catalog.goals):
        path = f"goals[{i}]"
        is_short = faults.count(f"{path}.outcomes", len(goal.outcomes), 1, 16)
        for j, outcome in enumerate(goal.outcomes if is_short else ()):
            faults.refers(f"{path}.outcomes[{j}].type", outcome.type, kinds, "outcome type")
            if kinds.get(outcome.type) == catalog_pb2.OUTCOME_KIND_IMPRESSION:
                faults.add(f"{path}.outcomes[{j}].type", "an impression settles no goal; name a response")
            faults.share(f"{path}.outcomes[{j}].reward", outcome.reward)
        if is_short and len({outcome.type for outcome in goal.outcomes}) != len(goal.outcomes):
            faults.add(f"{path}.outcomes", "the same outcome type stands twice; name it once")
        faults.span(f"{path}.attribution_window", goal.attribution_window, WINDOW_US_MIN, WINDOW_US_MAX)
        faults.share(f"{path}.default_reward", goal.default_reward)
        if not 0.0 < goal.base_rate < 1.0:
            faults.add(f"{path}.base_rate", f"above 0 and below 1, got {goal.base_rate}")
        faults.enum(f"{path}.settling", goal.settling, catalog_pb2.Settling)
        faults.span(f"{path}.late_limit", goal.late_limit, 0, WINDOW_US_MAX)
        if goal.HasField("influence_max") and not 0.0 < goal.influence_max <= 1.0:
            faults.add(f"{path}.influence_max", f"above 0, to 1, got {goal.influence_max}")
        is_short = faults.count(f"{path}.learners", len(goal.learners), 0, 8)
        for j, family in enumerate(goal.learners if is_short else ()):
            if family == catalog_pb2.LEARNER_FAMILY_UNSPECIFIED:
                faults.add(f"{path}.learners[{j}]", "name a family, such as LEARNER_FAMILY_FOREST")
            faults.enum(f"{path}.learners[{j}]", family, catalog_pb2.LearnerFamily)
        if is_short and len(set(goal.learners)) != len(goal.learners):
            faults.add(f"{path}.learners", "the same family stands twice; name it once")


def _placements(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    channels = {channel.name for channel in catalog.channels}
    goals = {goal.name for goal in catalog.goals}
    for i, placement in enumerate(catalog.placements):
        path = f"placements[{i}]"
        faults.refers(f"{path}.channel", placement.channel, channels, "channel")
        _goals_of(path, placement, goals, faults)
        if placement.count_max > 16:
            faults.add(f"{path}.count_max", f"at most 16, got {placement.count_max}")
        faults.enum(f"{path}.activation", placement.activation, catalog_pb2.Activation)
        _exploration(f"{path}.exploration", placement.exploration, faults)


def _goals_of(path: str, placement: catalog_pb2.Placement, goals: set[str], faults: Faults) -> None:
    if not placement.goals:
        faults.refers(f"{path}.goal", placement.goal, goals, "goal")
        return
    faults.check(not placement.goal, f"{path}.goal", "not beside goals; a placement has one goal, or several in goals")
    if not faults.count(f"{path}.goals", len(placement.goals), 1, 8):
        return
    for j, goal in enumerate(placement.goals):
        faults.refers(f"{path}.goals[{j}].goal", goal.goal, goals, "goal")
        if goal.HasField("weight") and not 0.0 < goal.weight <= 1_000.0:
            faults.add(f"{path}.goals[{j}].weight", f"above 0 and at most 1000, got {goal.weight}")
    if len({goal.goal for goal in placement.goals}) != len(placement.goals):
        faults.add(f"{path}.goals", "the same goal stands twice; name it once")


def _exploration(path: str, exploration: catalog_pb2.Exploration, faults: Faults) -> None:
    if exploration.HasField("share_max"):
        faults.share(f"{path}.share_max", exploration.share_max)
    faults.share(f"{path}.probability_min", exploration.probability_min)
    check_exploration_budget(path, exploration, faults)
    policy = exploration.WhichOneof("policy")
    if policy == "epsilon_greedy":
        faults.share(f"{path}.epsilon_greedy.epsilon", exploration.epsilon_greedy.epsilon)
    elif policy == "square_cb" and not 0.0 <= exploration.square_cb.gamma <= 1e6:
        faults.add(f"{path}.square_cb.gamma", f"0 to 1000000, got {exploration.square_cb.gamma}")
    elif policy == "softmax" and not 0.001 <= exploration.softmax.temperature <= 1_000.0:
        faults.add(f"{path}.softmax.temperature", f"0.001 to 1000, got {exploration.softmax.temperature}")
    elif policy == "upper_confidence" and not 0.0 <= exploration.upper_confidence.width <= 10.0:
        faults.add(f"{path}.upper_confidence.width", f"0 to 10, got {exploration.upper_confidence.width}")
    elif policy == "thompson":
        thompson = exploration.thompson
        if thompson.draws and not 16 <= thompson.draws <= 1024:
            faults.add(f"{path}.thompson.draws", f"16 to 1024, got {thompson.draws}")
        if thompson.floor_share and not 0.001 <= thompson.floor_share <= 1.0:
            faults.add(f"{path}.thompson.floor_share", f"0.001 to 1, got {thompson.floor_share}")


def _actions(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    channels = {channel.name for channel in catalog.channels}
    facts = {attribute.name: attribute for attribute in catalog.action_attributes}
    groups = {group.name for group in catalog.action_groups}
    for i, action in enumerate(catalog.actions):
        path = f"actions[{i}]"
        if action.group:
            faults.refers(f"{path}.group", action.group, groups, "action group")
        faults.check(
            0 <= action.value_micros <= VALUE_MICROS_MAX,
            f"{path}.value_micros",
            f"0 to {VALUE_MICROS_MAX}, got {action.value_micros}",
        )
        faults.check(
            not (action.HasField("value_micros") and action.value),
            f"{path}.value",
            "not beside value_micros; an action has one of them",
        )
        if action.HasField("lever") and not 0.0 <= action.lever <= 1_000.0:
            faults.add(f"{path}.lever", f"0 to 1000, got {action.lever}")
        _validity(path, action, faults)
        for name in action.attributes.fields:
            faults.refers(f"{path}.attributes.{name}", name, facts, "action attribute")
        faults.count(f"{path}.treatments", len(action.treatments), 1, 32)
        faults.names(f"{path}.treatments", [treatment.name for treatment in action.treatments])
        if len({treatment.channel for treatment in action.treatments}) != len(action.treatments):
            faults.add(f"{path}.treatments", "at most one treatment a channel")
        for j, treatment in enumerate(action.treatments):
            faults.refers(f"{path}.treatments[{j}].channel", treatment.channel, channels, "channel")
            if treatment.HasField("weight") and not 0.0 <= treatment.weight <= 1_000.0:
                faults.add(f"{path}.treatments[{j}].weight", f"0 to 1000, got {treatment.weight}")
            if treatment.content.ByteSize() > CONTENT_BYTES_MAX:
                size = treatment.content.ByteSize()
                faults.add(
                    f"{path}.treatments[{j}].content", f"at most {CONTENT_BYTES_MAX} bytes serialised, got {size}"
                )


def _validity(path: str, action: catalog_pb2.Action, faults: Faults) -> None:
    """Check when an action may be said."""
    are_instants = True
    for field in ("valid_from_time", "valid_until_time"):
        are_instants &= faults.check(is_instant(getattr(action, field)), f"{path}.{field}", INSTANT_WANTED)
    if are_instants and action.HasField("valid_from_time") and action.HasField("valid_until_time"):
        is_later = instant_us(action.valid_from_time) < instant_us(action.valid_until_time)
        faults.check(is_later, f"{path}.valid_until_time", "later than valid_from_time")
