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


def message(**parts: Any) -> catalog_pb2.Catalog:
    """Build a catalog message from its JSON mapping; parts replace those of a small valid one."""
    small: dict[str, Any] = {
        "currencyCode": "EUR",
        "identityNamespaces": [{"name": "customer_number"}, {"name": "browser_id"}],
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
        + [{"name": "mail", "channel": "web", "goal": "click", "activation": "ACTIVATION_ON_IMPRESSION"}],
        "actions": [{"name": f"action_{i}", "treatments": [{"name": "only", "channel": "web"}]} for i in range(4)],
    }
    return json_format.ParseDict(small | parts, catalog_pb2.Catalog())


def compiled(**parts: Any) -> Catalog:
    """Compile what message builds."""
    return compile_catalog(message(**parts))


def seeded(seed: int, n_actions: int) -> Catalog:
    """Compile a catalog of many actions with rules, dates, values, levers and two channels."""
    rng = np.random.default_rng(seed)
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
    goals = [
        {"name": name, "outcomes": [{"type": "click", "reward": 1}], "attributionWindow": "2s", "baseRate": rate}
        for name, rate in (("click", 0.1), ("sale", 0.02))
    ]
    return compiled(
        actions=actions,
        placements=placements,
        goals=goals,
        channels=[{"name": "web"}, {"name": "call"}],
        actionAttributes=[{"name": "least_age", "type": "ATTRIBUTE_TYPE_NUMBER"}],
    )
