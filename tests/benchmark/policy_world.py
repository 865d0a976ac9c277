"""The world of ``world.py`` with every policy capability in use: a catalog, consents, and what people were told.

The same actions, champion, people and questions; what is added is named in ``WANTED``, and ``lacking`` says of a
compiled catalog what it has less of, so that the benchmark cannot come to measure less without a word. Rules are fewer
and shared by more actions than in the plain world, as business rules are, and let nearly as many candidates through:
what is compared must score the same number of them.

Contacts are counted when they are seen. So the load, whose impressions nobody reports, does not change what people were
told: each was shown what one decision chose, which the caps count in every later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from server.catalog.catalog import SOFTMAX, Catalog
from server.catalog.contact_terms import CAPS, COOL_OFF, SUPPRESSION
from tests.benchmark import world
from tsugi.requests import PyValue, consent
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_service_pb2 import SourceRecord

IMPRESSION: Final = "seen"
DISMISSAL: Final = "dismissal"
BUDGET_UNITS: Final = 10**12  # and as much slack: no decision ever waits
N_BRANCHES: Final = 3
WANTED: Final[Mapping[str, int]] = {
    "actions": world.N_ACTIONS,
    "distinct rules of actions": 60,
    "rules of actions that read the context": 10,
    "frequency caps": 10,
    "goals of the placement": 2,
    "placements that ask for consent": 1,
    "cool-offs": 1,
    "suppressions": 1,
    "compositions": 2,
    "rules of action groups": 3,
    "actions with a value expression": 10,
    "unit budgets with slack": 1,
    "branches of an experiment": N_BRANCHES,
    "levers that a branch changes": 1,
    "suitability rules that a branch changes": 1,
    "explorations that a branch changes": 1,
    "holdouts": 1,
    "random controls": 1,
    "softmax with share_max and never_on": 1,
}

_DECADES: Final = 10  # actions of one share their rules
_SHARE_MAX: Final = 0.3
_DAY_S: Final = 24 * 3600
_SCOPE: Final = catalog_pb2.ContactScope
_RULES_OF_GROUPS: Final = {
    "new_arrival": {"eligibility": "!has(profile.age) || profile.age >= 14.0"},
    "discount": {"applicability": "!has(profile.basket_mean) || profile.basket_mean < 120.0"},
    "event": {"suitability": '!has(profile.region) || profile.region != "west" || profile.activity >= 3.0'},
    "service": {"eligibility": "!has(profile.tenure_years) || profile.tenure_years < 15.0"},
    "loyalty": {"applicability": "!has(profile.member) || profile.member || profile.activity >= 2.0"},
}
_RULES_OF_ACTIONS: Final = {  # by the action's number modulo ten
    3: {"applicability": "!has(profile.spend_12m) || profile.spend_12m < 900.0"},
    7: {"applicability": "!has(profile.days_since_purchase) || profile.days_since_purchase < 300.0"},
    9: {"suitability": "!has(profile.has_children) || profile.has_children || profile.activity >= 1.0"},
}


def catalog_message() -> catalog_pb2.Catalog:
    """Build the catalog: the plain one, and all that is in ``WANTED``."""
    message = world.catalog_message()
    message.outcome_types.add(name="click")
    message.outcome_types.add(name=DISMISSAL)
    message.outcome_types.add(name=IMPRESSION, kind=catalog_pb2.OUTCOME_KIND_IMPRESSION)
    visit = message.goals.add(name="visit", base_rate=0.1)
    visit.outcomes.add(type="click", reward=1)
    visit.attribution_window.FromSeconds(_DAY_S)
    message.consent_purposes.add(name="marketing")
    message.consent_purposes.add(name="order_state", consent_exempt=True)
    message.action_groups.extend(catalog_pb2.ActionGroup(name=name, **_RULES_OF_GROUPS[name]) for name in world.KINDS)
    message.contact_policies.extend(_policies())
    message.compositions.extend(_compositions())
    message.budgets.add(name="mailing", units_max=BUDGET_UNITS, slack=BUDGET_UNITS).period.FromSeconds(_DAY_S)
    message.experiments.append(_experiment())
    message.holdouts.add(name="quiet", share=0.01)
    message.random_control.share = 0.01
    for i, action in enumerate(message.actions):
        _add_policies(i, action)
    (placement,) = message.placements
    placement.ClearField("goal")
    placement.goals.add(goal=world.GOAL)
    placement.goals.add(goal="visit", weight=0.2)
    placement.purpose = "marketing"
    placement.activation = catalog_pb2.ACTIVATION_ON_IMPRESSION
    placement.exploration.CopyFrom(
        catalog_pb2.Exploration(
            softmax=catalog_pb2.Softmax(temperature=0.05), share_max=_SHARE_MAX, never_on="profile.activity < 3.0"
        )
    )
    return message


def source_records(everybody: list[dict[str, PyValue]]) -> Iterator[SourceRecord]:
    """State what is known of everybody, one record a person: the plain world's, and that all of them consent."""
    for record in world.source_records(everybody):
        record.consents.append(consent("marketing", granted=True, channel="web"))
        yield record


def stated(catalog: Catalog) -> dict[str, int]:
    """Count in a compiled catalog what ``WANTED`` names."""
    rules = sorted(set(catalog.blends.rules[catalog.blends.rules >= 0].tolist()))
    own, varied = catalog.blends.rules[0], catalog.blends.rules[1:]
    policies = [policy.kind for policy in catalog.profiles.contacts.policies]
    (codes,), ((_, share_max, _),) = catalog.blends.codes[0], catalog.blends.parameters[0]
    shares = [share for experiment in catalog.experiments for share in experiment.shares]
    budgets = catalog.budgets.limits
    return {
        "actions": len(catalog.actions.names),
        "distinct rules of actions": len(rules),
        "rules of actions that read the context": sum(_reads_context(catalog, rule) for rule in rules),
        "frequency caps": sum(kind in CAPS for kind in policies),
        "goals of the placement": int(np.count_nonzero(catalog.placement_columns.goal_weights[0])),
        "placements that ask for consent": int(np.count_nonzero(catalog.placement_columns.consents >= 0)),
        "cool-offs": policies.count(COOL_OFF),
        "suppressions": policies.count(SUPPRESSION),
        "compositions": len(catalog.message.compositions),
        "rules of action groups": len(set(own[:, ::2][own[:, ::2] >= 0].tolist())),
        "actions with a value expression": int(np.count_nonzero(catalog.actions.value_programs >= 0)),
        "unit budgets with slack": sum(each.slack == each.limit == BUDGET_UNITS for each in budgets),
        "branches of an experiment": sum(share > 0.0 for share in shares),
        "levers that a branch changes": int(np.count_nonzero(catalog.blends.worth[1:] != catalog.blends.worth[0])),
        "suitability rules that a branch changes": int(np.count_nonzero(varied[:, :, 4:] != own[:, 4:])),
        "explorations that a branch changes": int(
            np.count_nonzero(catalog.blends.codes[1:, 0, 2] != catalog.blends.codes[0, 0, 2])
        ),
        "holdouts": sum(each.share > 0.0 for each in catalog.holdouts),
        "random controls": int(catalog.random_control_share > 0.0),
        "softmax with share_max and never_on": int(codes[2] == SOFTMAX and share_max < 1.0 and codes[4] >= 0),
    }


def lacking(catalog: Catalog) -> list[str]:
    """Say what of ``WANTED`` a compiled catalog has less of; of rules, context rules and caps it has to be exactly so.

    Fewer are less to do; more that read the context would be another world than the one stated.
    """
    found = stated(catalog)
    exact = ("distinct rules of actions", "rules of actions that read the context", "frequency caps")
    return [
        f"{name}: wanted {n}, found {found[name]}"
        for name, n in WANTED.items()
        if found[name] < n or (name in exact and found[name] != n)
    ]


def _reads_context(catalog: Catalog, rule: int) -> bool:
    rules = catalog.rules
    atoms = [step for step in rules.steps[rules.starts[rule] : rules.starts[rule + 1]].tolist() if step >= 0]
    read = {int(side[atom]) for atom in atoms for side in (rules.left, rules.right)}
    return any(position > catalog.space.n_profile for position in read)


def _add_policies(i: int, action: catalog_pb2.Action) -> None:
    """Put an action into its group, and give it the rules of its decade and a value that depends on the person."""
    action.group = world.KINDS[i % len(world.KINDS)]
    threshold, rule, more = action.eligibility.partition(" && ")
    if threshold:
        decade = i * _DECADES // world.N_ACTIONS
        middle = (decade + 0.5) * 100 / _DECADES
        action.eligibility = f"profile.activity >= {middle}{rule}{more}"
    for layer, text in _RULES_OF_ACTIONS.get(i % 10, {}).items():
        setattr(action, layer, text)
    if i % 5 == 1:
        action.ClearField("value_micros")
        action.value = "(profile.activity > 50.0 ? 1.5 : 1.0) * (0.5 + action.price * 0.02) + profile.activity * 0.001"


def _policies() -> Iterator[catalog_pb2.ContactPolicy]:
    """Give ten caps, none of which is reached, a cool-off, and a suppression that concerns few."""
    for name, scope, count_max, days in (
        ("all", _SCOPE.CONTACT_SCOPE_TOGETHER, 60, 30),
        ("each_action", _SCOPE.CONTACT_SCOPE_EACH_ACTION, 8, 30),
        ("each_group", _SCOPE.CONTACT_SCOPE_EACH_GROUP, 20, 30),
        ("each_channel", _SCOPE.CONTACT_SCOPE_EACH_CHANNEL, 40, 14),
    ):
        yield _cap(catalog_pb2.ContactPolicy(name=name, scope=scope), count_max, days)
    for group in world.KINDS:
        yield _cap(catalog_pb2.ContactPolicy(name=f"weekly_{group}", groups=[group]), 20, 7)
    costly = [f"action_{i:05d}" for i in range(0, world.N_ACTIONS, 4)]
    yield _cap(catalog_pb2.ContactPolicy(name="costly", actions=costly, channels=["web"]), 12, 2)
    cool_off = catalog_pb2.ContactPolicy(
        name="dismissed", scope=_SCOPE.CONTACT_SCOPE_EACH_ACTION,
        cool_off=catalog_pb2.CoolOff(outcome_types=[DISMISSAL]),
    )  # fmt: skip
    cool_off.cool_off.span.FromSeconds(30 * _DAY_S)
    yield cool_off
    yield catalog_pb2.ContactPolicy(
        name="newcomers", groups=["loyalty"], suppression=catalog_pb2.Suppression(expression="profile.activity < 1.0")
    )


def _cap(policy: catalog_pb2.ContactPolicy, count_max: int, days: int) -> catalog_pb2.ContactPolicy:
    policy.cap.count_max = count_max
    policy.cap.span.FromSeconds(days * _DAY_S)
    return policy


def _compositions() -> Iterator[catalog_pb2.Composition]:
    yield catalog_pb2.Composition(name="variety", at_most=catalog_pb2.AtMost(count_max=2, each_group=True))
    yield catalog_pb2.Composition(
        name="one_surprise", actions=["action_00011", "action_00031", "action_00051"],
        at_most=catalog_pb2.AtMost(count_max=1, each_placement=True),
    )  # fmt: skip
    yield catalog_pb2.Composition(
        name="follows", actions=["action_00004", "action_00014"], requires=catalog_pb2.Requires(groups=["new_arrival"])
    )


def _experiment() -> catalog_pb2.Experiment:
    """Have a quarter of the people in each of three branches, which change levers, suitability and exploration."""
    variation = catalog_pb2.ActionVariation
    careful = catalog_pb2.Exploration(square_cb=catalog_pb2.SquareCb(gamma=400), share_max=_SHARE_MAX)
    return catalog_pb2.Experiment(
        name="trial",
        branches=[
            catalog_pb2.Branch(
                name="louder", share=0.25, actions=[variation(lever=1.1), variation(groups=["discount"], lever=1.3)]
            ),
            catalog_pb2.Branch(
                name="kinder",
                share=0.25,
                actions=[
                    variation(groups=["discount"], suitability="!has(profile.age) || profile.age < 85.0"),
                    variation(groups=["event"], suitability="!has(profile.has_app) || profile.activity >= 1.0"),
                ],
            ),
            catalog_pb2.Branch(
                name="bolder",
                share=0.25,
                placements=[catalog_pb2.PlacementVariation(placement=world.PLACEMENT, exploration=careful)],
            ),
        ],
    )
