"""Compiles every kernel and fills their cache: run at install, and by each worker before it takes calls.

Decides over a made-up catalog that uses every policy, with all argument types as in service. The first run on a
machine compiles for some twenty seconds; later ones load from the cache in half a second.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from server.catalog.compile import compile_catalog
from server.decisioning.decide import EXPLORE, Questions, Scored, Scratch, decide, fill_again
from server.decisioning.features import encode_rows
from server.decisioning.models import align, no_champion
from server.profiles import derived
from tsugi.v1 import catalog_pb2


def warm() -> None:
    """Decide once over the sample catalog."""
    catalog = compile_catalog(_sample())
    models = align(catalog, no_champion(catalog), None)
    facts = np.zeros((1, len(catalog.space.facts)))
    n_asks = len(catalog.placements)
    questions = Questions(
        facts=facts,
        now_us=0,
        heads=np.array([[n_asks, EXPLORE, -1, 0]], np.int32),
        asks=np.array([[placement, 1, 0] for placement in range(n_asks)], np.int32),
        seeds=np.ones(1, np.uint64),
        listings=np.zeros((0, len(catalog.actions.names)), np.uint8),
        holds=np.zeros((0, 3), np.int64),
    )
    decided = decide(questions, catalog, models, Scratch())
    fill_again(questions, catalog, Scored(*(getattr(decided, name) for name in Scored._fields)))
    encode_rows(facts, catalog.learned)
    derived.warm(catalog)


def warm_profiles() -> None:
    """Fold one profile of the sample catalog: all that the projector needs."""
    derived.warm(compile_catalog(_sample()))


def _sample() -> catalog_pb2.Catalog:
    policies = (
        catalog_pb2.Exploration(greedy=catalog_pb2.Greedy()),
        catalog_pb2.Exploration(square_cb=catalog_pb2.SquareCb(gamma=10)),
        catalog_pb2.Exploration(thompson=catalog_pb2.Thompson(draws=16)),
        catalog_pb2.Exploration(upper_confidence=catalog_pb2.UpperConfidence()),
    )
    catalog = catalog_pb2.Catalog(
        currency_code="EUR",
        identity_namespaces=[catalog_pb2.IdentityNamespace(name="sample")],
        context_attributes=[catalog_pb2.Attribute(name="number", type=catalog_pb2.ATTRIBUTE_TYPE_NUMBER)],
        outcome_types=[catalog_pb2.OutcomeType(name="click")],
        channels=[catalog_pb2.Channel(name="web")],
        placements=[
            catalog_pb2.Placement(name=f"placement_{i}", channel="web", goal="click", exploration=policy)
            for i, policy in enumerate(policies)
        ],
        actions=[
            catalog_pb2.Action(
                name=f"action_{i}",
                eligibility="context.number >= 0.0 && !(context.number > 1.0)",
                treatments=[catalog_pb2.Treatment(name="only", channel="web")],
            )
            for i in range(4)
        ],
    )
    goal = catalog.goals.add(name="click", base_rate=0.1)
    goal.attribution_window.FromSeconds(1)
    goal.outcomes.add(type="click", reward=1.0)
    return catalog


if __name__ == "__main__":
    started = time.monotonic()
    warm()
    sys.stdout.write(f"kernels ready in {time.monotonic() - started:.1f} s\n")
