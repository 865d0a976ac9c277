"""The invented world the benchmark decides in: a catalog, a champion, people, and what is asked about them.

Everything follows from seeds, so two runs ask the same. Each person has between two and all of the actions eligible,
half of them fewer than about 47 of 100: an action's rule wants a person to be active enough, the more so the higher the
action's number, and most rules want one thing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from google.protobuf.struct_pb2 import Struct

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.decisioning import eligibility
from tests.support import bundles
from tsugi.log.v1.bundle_pb2 import Bundle, Feature, Scaled
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays
from tsugi.requests import PyValue, decide_request, source_record, to_value
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_service_pb2 import SourceRecord

N_ACTIONS: Final = 100
N_PROFILES: Final = 10_000
N_SLOTS: Final = 3
NAMESPACE: Final = "account_number"
PLACEMENT: Final = "home_banner"
OUTCOME: Final = "purchase"
GOAL: Final = bundles.GOAL
KNOWN_SHARE: Final = 0.9  # of the attributes that may be missing

_NUMBERS: Final = {  # name: (minimum, maximum, center, spread)
    "activity": (0.0, 100.0, 50.0, 30.0),
    "age": (0.0, 120.0, 45.0, 15.0),
    "spend_12m": (0.0, 100_000.0, 200.0, 200.0),
    "days_since_purchase": (0.0, 10_000.0, 60.0, 60.0),
    "tenure_years": (0.0, 100.0, 4.0, 3.0),
    "basket_mean": (0.0, 100_000.0, 40.0, 30.0),
}
_BOOLS: Final = ("member", "has_app", "reads_letters", "has_children")
_CATEGORIES: Final = {
    "region": ("north", "east", "south", "west"),
    "interest": ("running", "cycling", "football", "outdoor", "yoga"),
}
_CONTEXT: Final = {"device": ("phone", "tablet", "desktop"), "page": ("home", "product", "basket")}
KINDS: Final = ("new_arrival", "discount", "event", "service", "loyalty")
_TIERS: Final = ("plain", "fine")
_ALWAYS_ELIGIBLE: Final = 2  # the first actions have no rule
_THRESHOLDS: Final = 100
_MORE: Final = (
    "",
    " && profile.age >= 18.0",
    " && (profile.member || profile.spend_12m > 40.0)",
    " && context.hour >= 7.0",
    ' && profile.region != "north"',
)


def catalog_message(n_actions: int = N_ACTIONS) -> catalog_pb2.Catalog:
    """Build the catalog: 23 learned columns, one placement of three slots that explores by SquareCB."""
    attribute = catalog_pb2.Attribute
    number, boolean = catalog_pb2.ATTRIBUTE_TYPE_NUMBER, catalog_pb2.ATTRIBUTE_TYPE_BOOL
    category = catalog_pb2.ATTRIBUTE_TYPE_CATEGORY
    return catalog_pb2.Catalog(
        name="benchmark",
        currency_code="EUR",
        identity_namespaces=[catalog_pb2.IdentityNamespace(name=NAMESPACE)],
        sources=[
            catalog_pb2.Source(name="benchmark", party=catalog_pb2.PARTY_FIRST, delivery=catalog_pb2.DELIVERY_BATCH)
        ],
        profile_attributes=[
            *(
                attribute(name=name, type=number, minimum=low, maximum=high, center=center, spread=spread)
                for name, (low, high, center, spread) in _NUMBERS.items()
            ),
            *(attribute(name=name, type=boolean) for name in _BOOLS),
            *(attribute(name=name, type=category, allowed_values=values) for name, values in _CATEGORIES.items()),
        ],
        context_attributes=[
            attribute(name="hour", type=number, minimum=0, maximum=23, center=14, spread=5),
            attribute(name="device", type=category, allowed_values=_CONTEXT["device"]),
            attribute(name="basket_total", type=number, minimum=0, excluded_from_learning=True),
            attribute(name="page", type=category, allowed_values=_CONTEXT["page"], excluded_from_learning=True),
        ],
        action_attributes=[
            attribute(name="price", type=number, minimum=0, center=30, spread=20),
            attribute(name="margin", type=number, minimum=0, center=0.3, spread=0.2),
            attribute(name="kind", type=category, allowed_values=KINDS),
            attribute(name="tier", type=category, allowed_values=_TIERS),
        ],
        outcome_types=[catalog_pb2.OutcomeType(name=OUTCOME, value_maximum=10_000)],
        goals=[_goal()],
        channels=[catalog_pb2.Channel(name="web")],
        placements=[
            catalog_pb2.Placement(
                name=PLACEMENT,
                channel="web",
                goal=GOAL,
                count_max=N_SLOTS,
                exploration=catalog_pb2.Exploration(square_cb=catalog_pb2.SquareCb(gamma=400)),
            )
        ],
        actions=[_action(i, n_actions) for i in range(n_actions)],
    )


def make_bundle(catalog: Catalog) -> Bundle:
    """Build the champion: an MLP 64-64-64-1 with random weights over 40 columns of profile, context and action."""
    features = _features()
    net = bundles.mlp(len(features), (64, 64, 64), is_probability=False)
    rows = bundles.inputs(d=len(features))
    assert len(catalog.learned.names) < len(features), "the champion reads more than the learners do"
    return bundles.bundle(net.model(), features=features, rows=rows, outputs=net.score(rows), is_probability=False)


def make_arrays(catalog: Catalog) -> LearnerArrays:
    """Build learner arrays with random corrections for every action, for catalogs that no learner has seen."""
    random = np.random.default_rng(5)
    n, d = len(catalog.actions.names), len(catalog.learned.names)
    return LearnerArrays(
        epoch=1,
        learned_lsn=1,
        features=catalog.learned.names,
        goals=[
            GoalArrays(
                goal=GOAL,
                actions=catalog.actions.names,
                correction_weights=random.normal(0.0, 0.05, (n, d)).tobytes(),
                correction_intercepts=random.normal(0.0, 0.05, n).tobytes(),
            )
        ],
    )


def people(n_profiles: int = N_PROFILES) -> list[dict[str, PyValue]]:
    """Draw everybody's attributes; about a tenth of all but the first is missing."""
    random = np.random.default_rng(1)
    everybody = []
    for _ in range(n_profiles):
        person: dict[str, PyValue] = {"activity": float(100.0 * random.random() ** 0.85)}
        optional: dict[str, PyValue] = {
            name: float(np.clip(random.normal(center, spread), low, high))
            for name, (low, high, center, spread) in _NUMBERS.items()
            if name != "activity"
        }
        optional |= {name: bool(random.random() < 0.5) for name in _BOOLS}
        optional |= {name: values[random.integers(len(values))] for name, values in _CATEGORIES.items()}
        person |= {name: value for name, value in optional.items() if random.random() < KNOWN_SHARE}
        everybody.append(person)
    return everybody


def source_records(everybody: list[dict[str, PyValue]]) -> Iterator[SourceRecord]:
    """State what is known of everybody, one record a person."""
    for i, person in enumerate(everybody):
        yield source_record(f"r-{i}", "benchmark", [(NAMESPACE, account(i))], attributes=person)


def account(i: int) -> str:
    """Name person i."""
    return f"acc-{i:08d}"


def contexts(n: int) -> list[dict[str, PyValue]]:
    """Draw the facts of n requests."""
    random = np.random.default_rng(2)
    return [
        {
            "hour": float(random.integers(24)),
            "device": _CONTEXT["device"][random.integers(3)],
            "basket_total": float(random.integers(20_000)) / 100,
            "page": _CONTEXT["page"][random.integers(3)],
        }
        for _ in range(n)
    ]


def decide_messages(n_profiles: int) -> list[bytes]:
    """Serialise one Decide for each person, in random order."""
    order = np.random.default_rng(3).permutation(n_profiles).tolist()
    return [decide_message(i, context) for i, context in zip(order, contexts(n_profiles), strict=True)]


def decide_message(i: int, context: Mapping[str, PyValue] | None = None) -> bytes:
    """Serialise a Decide for person i; without a request_id, or all calls after the first would be repeats."""
    return decide_request(
        [(PLACEMENT, N_SLOTS)], identities=[(NAMESPACE, account(i))], context=context or contexts(1)[0]
    ).SerializeToString()


def eligible_counts(everybody: list[dict[str, PyValue]], n_actions: int = N_ACTIONS) -> list[int]:
    """Count the actions each person has eligible at noon on a phone, by the server's own rules."""
    catalog = compile_catalog(catalog_message(n_actions))
    actions = catalog.actions
    counts = []
    for person in everybody:
        facts = np.full(len(catalog.space.facts), np.nan)
        stated = {f"profile.{name}": value for name, value in person.items()}
        for name, value in (stated | {"context.hour": 12.0, "context.device": "phone"}).items():
            position = catalog.space.index[name]
            facts[position] = catalog.space.facts[position].encode(to_value(value))
        passed, _ = eligibility.gate(
            facts, 0, actions.valid_from_us, actions.valid_until_us, actions.rules, *catalog.rules.columns()
        )
        counts.append(int(passed.sum()))
    return counts


def _goal() -> catalog_pb2.Goal:
    """Build the goal; its window is longer than a run, so that silence teaches nobody while we measure."""
    goal = catalog_pb2.Goal(name=GOAL, outcomes=[catalog_pb2.GoalOutcome(type=OUTCOME, reward=1)], base_rate=0.05)
    goal.attribution_window.FromSeconds(24 * 3600)
    return goal


def _action(i: int, n_actions: int) -> catalog_pb2.Action:
    attributes, content = Struct(), Struct()
    attributes.update(
        {
            "price": 5.0 + i % 53,
            "margin": 0.1 + 0.01 * (i % 37),
            "kind": KINDS[i % len(KINDS)],
            "tier": _TIERS[i % len(_TIERS)],
        }
    )
    content.update({"title": f"What action {i} has to say", "image": f"/images/action-{i:05d}.webp"})
    threshold = i * _THRESHOLDS // n_actions  # larger catalogs repeat their rules, as they do in life
    return catalog_pb2.Action(
        name=f"action_{i:05d}",
        eligibility=f"profile.activity >= {threshold}.0{_MORE[i % len(_MORE)]}" if i >= _ALWAYS_ELIGIBLE else "",
        value_micros=1_000_000 + 10_000 * (i % 41),
        attributes=attributes,
        treatments=[catalog_pb2.Treatment(name="banner", channel="web", content=content)],
    )


def _features() -> list[Feature]:
    """List the champion's columns: what learners read, whether it is known, and the facts of the action."""
    scaled = {name: Scaled(center=center, spread=spread, limit=5) for name, (_, _, center, spread) in _NUMBERS.items()}
    categories = _CATEGORIES | {"device": _CONTEXT["device"]}
    return [
        *(Feature(fact=f"profile.{name}", scaled=scaling) for name, scaling in scaled.items()),
        *(Feature(fact=f"profile.{name}", equals="true") for name in _BOOLS),
        *(
            Feature(fact=f"{'context' if name in _CONTEXT else 'profile'}.{name}", equals=value)
            for name, values in categories.items()
            for value in values
        ),
        Feature(fact="context.hour", scaled=Scaled(center=14, spread=5, limit=5)),
        *(Feature(fact=f"profile.{name}", is_unknown=True) for name in (*_NUMBERS, *_CATEGORIES)),
        Feature(fact="action.price", scaled=Scaled(center=30, spread=20, limit=5)),
        Feature(fact="action.margin", scaled=Scaled(center=0.3, spread=0.2, limit=5)),
        *(Feature(fact="action.kind", equals=value) for value in KINDS),
        *(Feature(fact="action.tier", equals=value) for value in _TIERS),
    ]
