"""From the message people push to the columns decisions read.

All faults of a catalog are found at once; what comes out is complete and frozen. The same catalog compiles to the same
columns whatever the order of its actions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from google.protobuf import struct_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog import validation
from server.catalog.budget_terms import compile_budgets
from server.catalog.catalog import (
    EQUALS,
    RULE_LAYERS,
    SCALED,
    ActionColumns,
    Catalog,
    Fact,
    FactSpace,
    FeatureColumns,
    Goal,
    Placement,
    PlacementColumns,
)
from server.catalog.compile_blends import (
    compile_branches,
    compile_experiments,
    compile_holdouts,
    compile_never_on,
    explored,
    first_goal,
    lay_out_blends,
)
from server.catalog.compile_contacts import compile_contacts
from server.catalog.compile_profiles import compile_profiles, positions_read, profile_layout
from server.catalog.declared import NOW, Declared, Reading, declare, frozen, make_fact, reading
from server.catalog.expressions import NO_RULE, RuleCompiler
from server.catalog.faults import duration_us, instant_us
from server.catalog.history_terms import compile_history, keeps_history
from server.catalog.profile_terms import ProfileTerms
from server.catalog.validation import LEARNED_COLUMNS_FEW_MAX, LEARNED_COLUMNS_MAX, LEARNED_NUMBERS_MAX
from server.catalog.value_expressions import NO_VALUE, Lowered, ValueCompiler
from server.errors import TsugiError, Violation
from tsugi.log.v1.record_pb2 import GoalPrior, SlotRecord
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_pb2 import Slot
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.value_pb2 import Value

_FOREVER_US: Final = (1 << 62) - 1


def serialise(message: catalog_pb2.Catalog) -> bytes:
    """Return the bytes whose sha256 is the catalog's revision."""
    return message.SerializeToString(deterministic=True)


def compile_catalog(message: catalog_pb2.Catalog, data: bytes | None = None) -> Catalog:
    """Compile one catalog revision.

    Args:
        message: the catalog.
        data: the bytes it was pushed as, when at hand; the revision is their sha256.

    Raises:
        TsugiError: ERROR_REASON_CATALOG_INVALID with every fault as a violation.

    Cost: about 0.1 ms an action.
    """
    violations = validation.check(message)
    if violations:
        raise _invalid(violations)
    sha256 = hashlib.sha256(data if data is not None else serialise(message)).digest()
    currency_code = message.currency_code
    action_facts = tuple(make_fact("action", attribute, currency_code) for attribute in message.action_attributes)
    declared = declare(message)
    context_facts = [make_fact("context", attribute, currency_code) for attribute in message.context_attributes]
    facts = (NOW, *declared.facts, *context_facts)
    actions = sorted(enumerate(message.actions), key=lambda entry: entry[1].name)

    typed = [_typed_attributes(action, action_facts) for _, action in actions]
    compiler = RuleCompiler(facts, action_facts)
    groups = {group.name: (i, group) for i, group in enumerate(message.action_groups)}
    rule_rows = [
        _rules_of(action, f"actions[{i}]", groups, values, compiler, violations)
        for (i, action), values in zip(actions, typed, strict=True)
    ]
    channel_rows = {channel.name: row for row, channel in enumerate(message.channels)}
    contacts = compile_contacts(message, [action for _, action in actions], channel_rows, compiler, violations)
    never_rules = [
        compile_never_on(placement.exploration, f"placements[{i}].exploration.never_on", compiler, violations)
        for i, placement in enumerate(message.placements)
    ]
    placement_rows = {placement.name: row for row, placement in enumerate(message.placements)}
    changes = compile_branches(message, [action for _, action in actions], typed, placement_rows, compiler, violations)
    worth = ValueCompiler(facts, action_facts, compiler)
    lowered = [
        worth.add(action.value, given, f"actions[{i}].value", violations) if action.value else _stated_value(action)
        for (i, action), given in zip(actions, typed, strict=True)
    ]
    rules = compiler.freeze()
    learned = _learned_columns(facts, [*declared.readings, *map(reading, message.context_attributes)])
    read = positions_read(rules) | set(learned.sources.tolist())
    profiles = compile_profiles(message, declared, facts, read, contacts, violations)
    # Only now do text facts know the texts that rules compare them with.
    values = [_encoded(i, given, action_facts, violations) for (i, _), given in zip(actions, typed, strict=True)]
    if len(learned.names) > (columns_max := _learned_columns_max(len(actions))):
        violations.append(
            Violation(
                "profile_attributes",
                f"learners read at most {columns_max} columns of this many actions (one a number or boolean, one a "
                f"category value), got {len(learned.names)}; set excluded_from_learning on some",
            )
        )
    if violations:
        raise _invalid(violations)

    goal_rows = {goal.name: row for row, goal in enumerate(message.goals)}
    goals = tuple(compile_goal(goal) for goal in message.goals)
    placements = tuple(_placement(placement, channel_rows, goal_rows, goals) for placement in message.placements)
    action_columns = _action_columns(
        [action for _, action in actions], channel_rows, rule_rows, values, len(action_facts), lowered
    )
    placement_columns = _placement_columns(
        message, placements, goal_rows, never_rules, _consent_positions(message, declared)
    )
    return Catalog(
        sha256=sha256,
        revision=sha256.hex(),
        message=message,
        space=_fact_space(facts, declared, profiles),
        profiles=profiles,
        action_facts=action_facts,
        learned=learned,
        rules=rules,
        actions=action_columns,
        goals=goals,
        goal_base_log_odds=frozen(np.array([goal.base_log_odds for goal in goals], np.float32)),
        placements=placements,
        placement_columns=placement_columns,
        placement_rows=placement_rows,
        goal_rows=goal_rows,
        channel_rows=channel_rows,
        namespaces=frozenset(profiles.namespaces),
        event_properties=declared.properties,
        outcome_types={outcome_type.name: outcome_type for outcome_type in message.outcome_types},
        reserving_us=max((goals[each.goal_row].window_us for each in placements if each.on_impression), default=0),
        random_control_share=message.random_control.share,
        random_control_salt=message.random_control.salt.encode(),
        values=worth.freeze(),
        experiments=compile_experiments(message),
        blends=lay_out_blends(message, changes, action_columns, placement_columns),
        holdouts=compile_holdouts(message),
        budgets=compile_budgets(message, [action for _, action in actions], contacts.target_rows),
        history=compile_history(message, [action for _, action in actions]),
    )


def _invalid(violations: list[Violation]) -> TsugiError:
    violations = list(dict.fromkeys(violations))  # each action of a group tells the same faults of the group's rules
    first = violations[0]
    rest = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return TsugiError(
        ErrorReason.ERROR_REASON_CATALOG_INVALID,
        f"the catalog has faults: {first.path}: {first.description}{rest}",
        violations=violations,
        faults=len(violations),
    )


def _fact_space(facts: tuple[Fact, ...], declared: Declared, profiles: ProfileTerms) -> FactSpace:
    """Freeze the space, after the rules have named the texts they compare with."""
    n_profile = len(declared.facts)
    return FactSpace(
        facts=facts,
        index={fact.name: position for position, fact in enumerate(facts)},
        context={
            fact.name.removeprefix("context."): (position, fact)
            for position, fact in enumerate(facts)
            if position > n_profile
        },
        n_profile=n_profile,
        profile_layout=profile_layout(declared, profiles),
    )


def _consent_positions(message: catalog_pb2.Catalog, declared: Declared) -> list[int]:
    """Return where the consent that each placement needs stands; -1 where it needs none."""
    first = 1 + len(declared.attributes)
    positions = {(each.purpose, each.channel): first + row for row, each in enumerate(declared.consents)}
    return [positions.get((placement.purpose, placement.channel), -1) for placement in message.placements]


def _learned_columns_max(n_actions: int) -> int:
    """Return how many columns learners may read: what they keep of an action grows with the square."""
    of_few = math.isqrt(LEARNED_NUMBERS_MAX // max(n_actions, 1)) - 1
    return min(max(of_few, LEARNED_COLUMNS_MAX), LEARNED_COLUMNS_FEW_MAX)


def _learned_columns(facts: tuple[Fact, ...], readings: Sequence[Reading | None]) -> FeatureColumns:
    names: list[str] = []
    rows: list[tuple[int, int, float, float, float, float]] = []
    for source, (fact, read) in enumerate(zip(facts[1:], readings, strict=True), start=1):
        if read is None:
            continue
        if fact.type in (catalog_pb2.ATTRIBUTE_TYPE_NUMBER, catalog_pb2.ATTRIBUTE_TYPE_MONEY):
            names.append(fact.name)
            rows.append((source, SCALED, read.center, read.spread, read.limit, 0.0))
        elif fact.type == catalog_pb2.ATTRIBUTE_TYPE_BOOL:
            names.append(fact.name)
            rows.append((source, EQUALS, 1.0, 0.0, 0.0, 0.0))
        elif fact.type == catalog_pb2.ATTRIBUTE_TYPE_CATEGORY:
            names.extend(f"{fact.name}={value}" for value in fact.codes)
            rows.extend((source, EQUALS, float(code), 0.0, 0.0, 0.0) for code in fact.codes.values())
    table = np.array(rows, np.float64).reshape(len(rows), 6)
    return FeatureColumns(
        names=tuple(names),
        sources=frozen(table[:, 0].astype(np.int32)),
        kinds=frozen(table[:, 1].astype(np.uint8)),
        parameters=frozen(np.ascontiguousarray(table[:, 2:])),
    )


def _typed_attributes(action: catalog_pb2.Action, action_facts: tuple[Fact, ...]) -> dict[str, Value]:
    facts = {fact.name.removeprefix("action."): fact for fact in action_facts}
    return {name: _typed(value, facts[name]) for name, value in action.attributes.fields.items()}


def _encoded(
    i: int, given: dict[str, Value], action_facts: tuple[Fact, ...], violations: list[Violation]
) -> list[float]:
    """Encode an action's own facts; NaN for those it does not state."""
    encoded = []
    for fact in action_facts:
        name = fact.name.removeprefix("action.")
        number = fact.encode(given[name]) if name in given else math.nan
        if name in given and math.isnan(number):
            violations.append(Violation(f"actions[{i}].attributes.{name}", fact.wanted()))
        encoded.append(number)
    return encoded


def _typed(plain: struct_pb2.Value, fact: Fact) -> Value:
    """Turn a JSON value into a typed one; of no kind where the types do not fit."""
    kind = plain.WhichOneof("kind")
    if kind == "number_value":
        return Value(number_value=plain.number_value)
    if kind == "bool_value":
        return Value(bool_value=plain.bool_value)
    if kind == "string_value" and fact.type == catalog_pb2.ATTRIBUTE_TYPE_TIME:
        instant = Timestamp()
        try:
            instant.FromJsonString(plain.string_value)
        except ValueError:
            return Value()
        return Value(time_value=instant)
    return Value(text_value=plain.string_value) if kind == "string_value" else Value()


def _rules_of(
    action: catalog_pb2.Action,
    path: str,
    groups: Mapping[str, tuple[int, catalog_pb2.ActionGroup]],
    values: Mapping[str, Value],
    compiler: RuleCompiler,
    violations: list[Violation],
) -> list[int]:
    """Compile what an action has to meet, layer by layer: its group's rule, then its own."""
    place, group = groups.get(action.group, (0, catalog_pb2.ActionGroup()))
    rows = []
    for layer in RULE_LAYERS:
        for text, at in ((getattr(group, layer), f"action_groups[{place}]"), (getattr(action, layer), path)):
            rows.append(compiler.add(text, values, f"{at}.{layer}", violations) if text else NO_RULE)
    return rows


def _stated_value(action: catalog_pb2.Action) -> Lowered:
    return Lowered(NO_VALUE, action.value_micros / 1e6 if action.HasField("value_micros") else 1.0)


def _action_columns(
    actions: list[catalog_pb2.Action],
    channel_rows: dict[str, int],
    rule_rows: list[list[int]],
    values: list[list[float]],
    n_facts: int,
    lowered: list[Lowered],
) -> ActionColumns:
    n, n_channels = len(actions), len(channel_rows)
    weights = np.full((n, n_channels), math.nan)
    slot_bytes = []
    for row, action in enumerate(actions):
        parts = [b""] * n_channels
        for treatment in action.treatments:
            channel = channel_rows[treatment.channel]
            weights[row, channel] = treatment.weight if treatment.HasField("weight") else 1.0
            slot = Slot(action=action.name, treatment=treatment.name)
            if treatment.HasField("content"):
                slot.content.CopyFrom(treatment.content)
            parts[channel] = slot.SerializeToString(deterministic=True)
        slot_bytes.append(tuple(parts))
    names = tuple(action.name for action in actions)
    lever = [action.lever if action.HasField("lever") else 1.0 for action in actions]
    from_us = [instant_us(a.valid_from_time) if a.HasField("valid_from_time") else -_FOREVER_US for a in actions]
    until_us = [instant_us(a.valid_until_time) if a.HasField("valid_until_time") else _FOREVER_US for a in actions]
    hashes = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in names]
    return ActionColumns(
        names=names,
        rows={name: row for row, name in enumerate(names)},
        hashes=frozen(np.array(hashes, np.uint64)),
        valid_from_us=frozen(np.array(from_us, np.int64)),
        valid_until_us=frozen(np.array(until_us, np.int64)),
        rules=frozen(np.array(rule_rows, np.int32).reshape(n, 2 * len(RULE_LAYERS))),
        worth=frozen(np.array([[each.constant for each in lowered], lever], np.float64).T.copy()),
        weights=frozen(weights),
        facts=frozen(np.array(values, np.float64).reshape(n, n_facts)),
        slot_bytes=tuple(slot_bytes),
        record_bytes=tuple(SlotRecord(row=row, action=name).SerializeToString() for row, name in enumerate(names)),
        costs=tuple(action.cost_micros for action in actions),
        value_programs=frozen(np.array([each.row for each in lowered], np.int32)),
    )


def compile_goal(goal: catalog_pb2.Goal) -> Goal:
    """Make one valid goal ready to use."""
    return Goal(
        name=goal.name,
        rewards={outcome.type: outcome.reward for outcome in goal.outcomes},
        window_us=duration_us(goal.attribution_window),
        default_reward=goal.default_reward,
        base_log_odds=math.log(goal.base_rate / (1.0 - goal.base_rate)),
        settling=goal.settling or catalog_pb2.SETTLING_FIRST,
        late_limit_us=duration_us(goal.late_limit),
        keeps_history=keeps_history(goal),
        influence_max=goal.influence_max if goal.HasField("influence_max") else 1.0,
        learners=tuple(
            catalog_pb2.LearnerFamily.Name(family).removeprefix("LEARNER_FAMILY_").lower() for family in goal.learners
        ),
    )


def _placement(
    placement: catalog_pb2.Placement, channel_rows: dict[str, int], goal_rows: dict[str, int], goals: Sequence[Goal]
) -> Placement:
    count_max = placement.count_max or 1
    others = sorted(goal_rows[each.goal] for each in placement.goals[1:])
    goal = first_goal(placement)
    on_impression = placement.activation == catalog_pb2.ACTIVATION_ON_IMPRESSION
    return Placement(
        name=placement.name,
        channel_row=channel_rows[placement.channel],
        goal_row=goal_rows[goal],
        count_max=count_max,
        on_impression=on_impression,
        slot_bytes=tuple(
            Slot(placement=placement.name, position=position).SerializeToString() for position in range(count_max)
        ),
        record_bytes=SlotRecord(goal=goal, on_impression=on_impression).SerializeToString(),
        other_goals=tuple((row, other_goal_bytes(goals[row], goals[row].base_log_odds)) for row in others),
        window_us=max(goals[row].window_us for row in (goal_rows[goal], *others)),
    )


def other_goal_bytes(goal: Goal, prior_log_odds: float) -> bytes:
    """Return what a SlotRecord says about one of the goals after the first, serialised."""
    prior = GoalPrior(goal=goal.name, prior_log_odds=prior_log_odds)
    return SlotRecord(other_goals=[prior]).SerializeToString()


def _placement_columns(
    message: catalog_pb2.Catalog,
    placements: Sequence[Placement],
    goal_rows: Mapping[str, int],
    never_rules: Sequence[int],
    consents: Sequence[int],
) -> PlacementColumns:
    codes, parameters = [], []
    goal_weights = np.zeros((len(placements), len(goal_rows)))
    for row, (each, placement) in enumerate(zip(placements, message.placements, strict=True)):
        policy, draws, *bounds = explored(placement.exploration)
        codes.append((each.channel_row, each.goal_row, policy, draws, never_rules[row]))
        parameters.append(bounds)
        goal_weights[row, each.goal_row] = 1.0
        for goal in placement.goals:
            goal_weights[row, goal_rows[goal.goal]] = goal.weight if goal.HasField("weight") else 1.0
    return PlacementColumns(
        codes=frozen(np.array(codes, np.int32)),
        parameters=frozen(np.array(parameters, np.float64)),
        goal_weights=frozen(goal_weights),
        consents=frozen(np.array(consents, np.int32)),
    )
