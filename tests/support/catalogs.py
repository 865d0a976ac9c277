"""Catalogs for tests: small ones by hand, large ones from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf import json_format

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from tsugi.v1 import catalog_pb2

POLICIES: dict[str, dict[str, Any]] = {
    "greedy": {"greedy": {}},
    "epsilon_greedy": {"epsilonGreedy": {"epsilon": 0.2}},
    "square_cb": {"squareCb": {"gamma": 8.0}},
    "thompson": {"thompson": {"draws": 64, "floorShare": 0.05}},
}
# Explorations with bounds, and a policy that came later; placements of these names stand after all others.
BOUNDED: dict[str, dict[str, Any]] = {
    "softmax": {"softmax": {"temperature": 0.4}},
    "capped": {"epsilonGreedy": {"epsilon": 0.5}, "shareMax": 0.2},
    "floored": {"softmax": {"temperature": 0.1}, "probabilityMin": 0.04},
    "bounded": {"thompson": {"draws": 64, "floorShare": 0.05}, "shareMax": 0.4, "probabilityMin": 0.1},
    "upper": {"upperConfidence": {"width": 1.5}},
    "upper_bounded": {"upperConfidence": {}, "shareMax": 0.7, "probabilityMin": 0.05},
}
CALM: dict[str, Any] = {"squareCb": {"gamma": 2.0}, "neverOn": "profile.member"}  # of the seeded catalogs alone

SOURCES = [
    {"name": name, "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM"}
    for name in ("crm", "shop", "command_line", "benchmark", "experiment", "demo")
]


def message(**parts: Any) -> catalog_pb2.Catalog:
    """Build a catalog message from its JSON mapping; parts replace those of a small valid one."""
    small: dict[str, Any] = {
        "currencyCode": "EUR",
        "identityNamespaces": [{"name": "customer_number"}, {"name": "browser_id"}],
        "sources": SOURCES,
        "profileAttributes": [
            {"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0, "maximum": 120, "center": 40, "spread": 15},
            {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL"},
            {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["bronze", "silver", "gold"]},
        ],
        "contextAttributes": [{"name": "hour", "type": "ATTRIBUTE_TYPE_NUMBER", "center": 12, "spread": 6}],
        "eventTypes": [{"name": "visit", "properties": [{"name": "pages", "type": "ATTRIBUTE_TYPE_NUMBER"}]}],
        "outcomeTypes": [
            {"name": "click"},
            {"name": "dismiss"},
            {"name": "order", "valueMaximum": 1000.0},
            {"name": "impression", "kind": "OUTCOME_KIND_IMPRESSION"},
        ],
        "goals": [
            {
                "name": "click",
                "outcomes": [{"type": "click", "reward": 1}, {"type": "order", "reward": 1}, {"type": "dismiss"}],
                "attributionWindow": "2s",
                "baseRate": 0.1,
            }
        ],
        "channels": [{"name": "web"}],
        "placements": [
            {"name": name, "channel": "web", "goal": "click", "countMax": 4, "exploration": policy}
            for name, policy in POLICIES.items()
        ]
        + [{"name": "mail", "channel": "web", "goal": "click", "activation": "ACTIVATION_ON_IMPRESSION"}]
        + [
            {"name": name, "channel": "web", "goal": "click", "countMax": 4, "exploration": exploration}
            for name, exploration in BOUNDED.items()
        ],
        "actions": [{"name": f"action_{i}", "treatments": [{"name": "only", "channel": "web"}]} for i in range(4)],
    }
    if "consentPurposes" in parts and "placements" not in parts:
        parts = parts | _for_service(small["placements"], parts["consentPurposes"])
    return json_format.ParseDict(small | parts, catalog_pb2.Catalog())


def _for_service(placements: list[dict[str, Any]], purposes: list[dict[str, Any]]) -> dict[str, Any]:
    """Let placements be for a purpose that asks nobody, so that only tests about consent need any."""
    others = [purpose for purpose in purposes if purpose["name"] != "service"]
    return {
        "placements": [placement | {"purpose": "service"} for placement in placements],
        "consentPurposes": [*others, {"name": "service", "consentExempt": True}],
    }


def compiled(**parts: Any) -> Catalog:
    """Compile what message builds."""
    return compile_catalog(message(**parts))


def whole(**parts: Any) -> catalog_pb2.Catalog:
    """Build a catalog message that says something of everything there is about profiles; parts replace its own."""
    number, text, money = "ATTRIBUTE_TYPE_NUMBER", "ATTRIBUTE_TYPE_TEXT", "ATTRIBUTE_TYPE_MONEY"
    sports = ["ski", "bike", "run"]
    everything: dict[str, Any] = {
        "identityNamespaces": [
            {"name": "customer_number", "valuesPerProfileMax": 1},
            {"name": "browser_id", "linkRule": "LINK_RULE_SHARED_DEVICE", "sharedMax": 4},
            {"name": "phone", "meaning": "MEANING_PHONE", "defaultCountryCode": "JP"},
        ],
        "sources": [
            {
                "name": "crm",
                "owner": "customer care",
                "party": "PARTY_FIRST",
                "delivery": "DELIVERY_BATCH",
                "trust": 0,
                "attributes": ["age"],
                "eventTypes": ["purchase"],
                "identityNamespaces": ["phone"],
                "defaultCountryCode": "DE",
                "channel": "web",
                "silenceMax": "86400s",
            },
            {"name": "shop", "party": "PARTY_SECOND", "delivery": "DELIVERY_STREAM"},
        ],
        "consentPurposes": [{"name": "marketing"}, {"name": "profiling"}],
        "profileAttributes": [
            {"name": "age", "type": number, "minimum": 0, "maximum": 120, "center": 40, "spread": 15, "unit": "years"},
            {"name": "sports", "type": "ATTRIBUTE_TYPE_SET", "allowedValues": sports},
            {"name": "worth", "type": money, "maximum": 1000, "survivorship": "SURVIVORSHIP_MAXIMUM"},
            {"name": "taste", "type": "ATTRIBUTE_TYPE_VECTOR", "dimensions": 2},
            {
                "name": "email",
                "type": text,
                "meaning": "MEANING_EMAIL",
                "personalData": True,
                "purposes": ["marketing"],
                "timeToLive": "3600s",
                "survivorship": "SURVIVORSHIP_LONGEST",
            },
        ],
        "eventTypes": [
            {
                "name": "purchase",
                "properties": [
                    {"name": "total", "type": money},
                    {"name": "pieces", "type": number},
                    {"name": "sport", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": sports},
                    {"name": "code", "type": text},
                ],
            },
            {
                "name": "complaint",
                "properties": [{"name": "ticket", "type": text}],
                "retention": "864000s",
                "channel": "web",
            },
            {"name": "settlement", "properties": [{"name": "ticket", "type": text}]},
            {"name": "visit"},
        ],
        "windows": [
            {"name": "buys_7d", "kind": "WINDOW_KIND_COUNT", "eventType": "purchase", "span": "604800s", "spread": 2},
            {"name": "buys_30d", "kind": "WINDOW_KIND_COUNT", "eventType": "purchase", "span": "2592000s"},
            {"name": "visits_now", "kind": "WINDOW_KIND_COUNT", "eventType": "visit", "session": True},
            {
                "name": "ski_spend",
                "kind": "WINDOW_KIND_SUM",
                "eventType": "purchase",
                "property": "total",
                "filter": "event.sport == 'ski' && event.total > 1.5",
                "span": "86400s",
            },
            {
                "name": "last_sport",
                "kind": "WINDOW_KIND_LAST",
                "eventType": "purchase",
                "property": "sport",
                "span": "86400s",
            },
            {
                "name": "last_code",
                "kind": "WINDOW_KIND_LAST",
                "eventType": "purchase",
                "property": "code",
                "span": "86400s",
            },
            {
                "name": "n_sports",
                "kind": "WINDOW_KIND_DISTINCT",
                "eventType": "purchase",
                "property": "sport",
                "span": "86400s",
            },
            {"name": "since_visit", "kind": "WINDOW_KIND_RECENCY", "eventType": "visit", "span": "604800s"},
            {
                "name": "n_open",
                "kind": "WINDOW_KIND_OPEN",
                "eventType": "complaint",
                "property": "ticket",
                "closingEventType": "settlement",
                "span": "864000s",
                "excludedFromLearning": True,
            },
        ],
        "recencyFrequencyMonetary": [{"name": "worth", "eventType": "purchase", "property": "total"}],
        "sessionGap": "600s",
        "segments": [
            {"name": "skier", "expression": "'ski' in profile.sports || profile.last_sport == 'ski'"},
            {
                "name": "angry",
                "expression": "profile.n_open > 0.0 && now > timestamp('2026-01-01T00:00:00Z')",
                "excludedFromLearning": True,
            },
        ],
        "journey": {
            "stages": [{"name": "awareness"}, {"name": "engagement"}, {"name": "retention"}],
            "transitions": [
                {"fromStages": ["awareness"], "eventType": "purchase", "toStage": "engagement"},
                {"fromStages": ["awareness", "engagement"], "eventType": "purchase", "toStage": "retention"},
                {"outcomeType": "dismiss", "toStage": "awareness"},
            ],
        },
        "matching": {"fields": [{"attribute": "email", "weights": [9, 0, -4]}], "linkWeightMin": 10},
    }
    return message(**(everything | parts))


def seeded(seed: int, n_actions: int, **parts: Any) -> Catalog:
    """Compile a catalog of many actions with rules, dates, values, levers, two channels, goals and compositions."""
    return compile_catalog(seeded_message(seed, n_actions, **parts))


def eventful(seed: int, n_actions: int) -> Catalog:
    """Compile a seeded catalog that uses the rest too: policies, budgets, values, experiments, holdouts."""
    rng = np.random.default_rng(seed + 2)
    names = [f"action_{i:05d}" for i in range(n_actions)]
    worths = ["profile.age * 0.1 + action.least_age", "profile.member ? 3.0 : context.hour / 4.0", "profile.age - 40.0"]
    plain = seeded_message(seed, n_actions)
    for action in plain.actions:
        action.cost_micros = int(rng.integers(0, 2_000_000))
        if rng.random() < 0.3:
            action.ClearField("value_micros")
            action.value = worths[rng.integers(len(worths))]
    varied: list[dict[str, Any]] = [
        {
            "name": "loud",
            "share": 0.3,
            "actions": [
                {"groups": ["red"], "lever": 3.0},
                {"actions": names[: n_actions // 2], "suitability": "profile.age >= 25.0"},
            ],
        },
        {
            "name": "bold",
            "share": 0.3,
            "placements": [{"placement": "greedy", "exploration": {"softmax": {"temperature": 0.5}}}],
        },
        {"name": "challenged", "share": 0.2, "modelRole": "MODEL_ROLE_CHALLENGER"},
    ]
    extras = {
        "contactPolicies": [
            {"name": "weekly", "scope": "CONTACT_SCOPE_EACH_GROUP", "cap": {"countMax": 2, "span": "604800s"}},
            {"name": "peace", "groups": ["green"], "suppression": {"expression": "profile.age > 60.0"}},
        ],
        "experiments": [
            {"name": "first", "branches": varied},
            {"name": "second", "branches": [{"name": "thompson", "share": 0.5, "placements": [
                {"placement": "square_cb", "exploration": {"thompson": {"draws": 32}}},
            ]}]},
        ],
        "holdouts": [{"name": "quiet", "share": 0.1}, {"name": "no_sale", "share": 0.2, "goals": ["sale"]}],
        "budgets": [
            {"name": "daily", "unitsMax": 1000, "period": "86400s", "slack": 100},
            {"name": "money", "groups": ["blue"], "costMicrosMax": 5_000_000},
        ],
        "randomControl": {"share": 0.1, "salt": "s"},
    }  # fmt: skip
    plain.MergeFrom(json_format.ParseDict(extras, catalog_pb2.Catalog()))
    plain.placements[0].exploration.budget.cost_micros_max = 3_000_000
    plain.placements[0].exploration.budget.period.FromSeconds(86_400)
    return compile_catalog(plain)


def seeded_message(seed: int, n_actions: int, **parts: Any) -> catalog_pb2.Catalog:
    """Build what seeded compiles; parts replace its own."""
    rng = np.random.default_rng(seed)
    grouping = np.random.default_rng(seed + 1)
    rules = [
        "",
        "profile.age >= 30.0",
        "profile.member",
        "profile.tier in ['silver', 'gold'] && profile.age < 60.0",
        "!has(profile.age) || profile.age > action.least_age",
        "context.hour < 12.0 || profile.member",
        "!(profile.tier == 'bronze')",
    ]
    actions = []
    for i in range(n_actions):
        action: dict[str, Any] = {
            "name": f"action_{i:05d}",
            "eligibility": rules[rng.integers(len(rules))],
            "valueMicros": int(rng.integers(0, 5_000_000)),
            "lever": float(rng.choice([0.5, 1.0, 2.0])),
            "attributes": {"least_age": float(rng.integers(18, 70))},
            "treatments": [{"name": "banner", "channel": "web", "weight": float(rng.choice([0.5, 1.0]))}],
        }
        if grouping.random() < 0.5:
            action["group"] = str(grouping.choice(["red", "green", "blue"]))
        if rng.random() < 0.1:
            action["validUntilTime"] = "2026-01-01T00:00:00Z"
        if rng.random() < 0.5:
            action["treatments"].append({"name": "script", "channel": "call"})
        actions.append(action)
    placements = [
        {"name": name, "channel": channel, "goal": goal, "countMax": 4, "exploration": policy}
        for (name, policy), channel, goal in zip(
            POLICIES.items(), ["web", "call", "web", "web"], ["click", "sale", "click", "sale"], strict=True
        )
    ]
    several: dict[str, Any] = {
        "capped": [{"goal": "click"}],
        "floored": [{"goal": "click", "weight": 0.5}, {"goal": "sale", "weight": 20}],
        "bounded": [{"goal": "sale", "weight": 3}, {"goal": "click"}],
        "upper": [{"goal": "click"}, {"goal": "sale", "weight": 4}],
    }
    placements += [
        {"name": name, "channel": "call" if name == "bounded" else "web", "countMax": 4, "exploration": exploration}
        | ({"goals": several[name]} if name in several else {"goal": "sale"})
        for name, exploration in (BOUNDED | {"calm": CALM}).items()
    ]
    goals = [
        {"name": name, "outcomes": [{"type": "click", "reward": 1}], "attributionWindow": "2s", "baseRate": rate}
        for name, rate in (("click", 0.1), ("sale", 0.02))
    ]
    own: dict[str, Any] = {
        "actions": actions,
        "placements": placements,
        "goals": goals,
        "channels": [{"name": "web"}, {"name": "call"}],
        "actionAttributes": [{"name": "least_age", "type": "ATTRIBUTE_TYPE_NUMBER"}],
        "actionGroups": [{"name": "red"}, {"name": "green"}, {"name": "blue"}],
        "compositions": [
            {"name": "variety", "atMost": {"countMax": 1, "eachGroup": True, "eachPlacement": True}},
            {"name": "little_red", "groups": ["red"], "atMost": {"countMax": 2}},
            {"name": "blue_after_green", "groups": ["blue"], "requires": {"groups": ["green"]}},
        ],
    }
    return message(**(own | parts))
