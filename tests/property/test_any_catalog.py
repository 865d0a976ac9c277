"""Catalogs near good ones and far from them: each is refused with its faults, or what is asked under it is decided.

Decided means: nothing is raised but a refusal of ours, what is chosen was let through by every gate and has a number to
be ranked by, reply and record can be read, and the record decided again gives the same to the last bit.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from server.decisioning.budgets import Budgets
from server.decisioning.explanation import explain
from server.decisioning.recall import differences
from server.decisioning.remember import Views
from server.errors import TsugiError
from server.storage.memory import MemoryLog
from server.storage.record import AMOUNT_MAX
from tests.support import catalogs
from tests.support.deciding import TOKEN_KEY, Desk, key_of
from tests.support.near_catalogs import is_path, near
from tests.support.populating import Person
from tests.unit.catalog.test_loading import BOOTS
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.profile_pb2 import Consent
from tsugi.v1.value_pb2 import Value

NOW_US = 1_767_225_600_000_000
N_REQUESTS = 3
WORDS = ("web", "age", "boots", "skier", "marketing", "purchase", "visit", "click", "action_00003", "first", "daily")


@lru_cache(1)
def seeds() -> list[catalog_pb2.Catalog]:
    return [load_catalog(BOOTS), catalogs.whole(), catalogs.eventful(11, 12).message, catalogs.eventful(12, 8).message]


def compiled(message: catalog_pb2.Catalog) -> Catalog | None:
    """Compile a catalog, or hold its refusal to what is promised of every one."""
    try:
        return compile_catalog(message)
    except TsugiError as error:
        assert error.reason == ErrorReason.ERROR_REASON_CATALOG_INVALID
        assert error.violations
        for path, description in error.violations:
            assert is_path(path, message), (path, description)
            assert description, path
            assert "\n" not in description, (path, description)
        return None


def random_value(rng: np.random.Generator, attribute: catalog_pb2.Attribute, currency_code: str) -> Value:
    """Return a value of an attribute's type, now and then out of its range."""
    number = float(rng.choice([0.0, 1.0, 20.0, 40.0, 55.5, 119.0, 1e-310, 1e300, -1e300, rng.uniform(0, 100)]))
    allowed = list(attribute.allowed_values) or ["none"]
    value = Value(number_value=number)
    match attribute.type:
        case catalog_pb2.ATTRIBUTE_TYPE_BOOL:
            value.bool_value = bool(rng.random() < 0.5)
        case catalog_pb2.ATTRIBUTE_TYPE_CATEGORY | catalog_pb2.ATTRIBUTE_TYPE_TEXT:
            value.text_value = str(rng.choice([*allowed, "gold", "other"]))
        case catalog_pb2.ATTRIBUTE_TYPE_TIME:
            value.time_value.seconds = int(rng.integers(-62_135_596_800, 253_402_300_800))
        case catalog_pb2.ATTRIBUTE_TYPE_SET:
            value.set_value.values.extend(each for each in allowed if rng.random() < 0.5)
        case catalog_pb2.ATTRIBUTE_TYPE_MONEY:
            value.money_value.amount_micros = int(rng.choice([0, 5_000_000, (1 << 63) - 1]))
            value.money_value.currency_code = currency_code
        case catalog_pb2.ATTRIBUTE_TYPE_VECTOR:
            value.vector_value.numbers.extend([number] * attribute.dimensions)
    return value


def random_person(rng: np.random.Generator, message: catalog_pb2.Catalog) -> Person:
    """Return somebody of whom most is known, and who allows most."""
    known = {
        each.name: random_value(rng, each, message.currency_code)
        for each in message.profile_attributes
        if rng.random() < 0.8
    }
    consents = [
        Consent(purpose=purpose.name, channel=channel.name, state="CONSENT_DECISION_GRANTED")
        for purpose in message.consent_purposes
        for channel in message.channels
        if rng.random() < 0.9
    ]
    namespace = message.identity_namespaces[0].name
    return Person(known, {namespace: f"c-{rng.integers(1_000)}"}, consents)


def random_request(rng: np.random.Generator, message: catalog_pb2.Catalog) -> DecideRequest:
    """Return a request that the catalog mostly allows."""
    request = DecideRequest(profile_id="00" * 16)
    n_asks = min(int(rng.integers(1, 4)), len(message.placements))
    for row in rng.choice(len(message.placements), n_asks, replace=False):
        placement = message.placements[int(row)]
        most = placement.count_max or 1
        request.placements.add(placement=placement.name, count=int(rng.integers(0, most + 1 + (rng.random() < 0.05))))
    for attribute in message.context_attributes:
        if rng.random() < 0.8:
            request.context[attribute.name].CopyFrom(random_value(rng, attribute, message.currency_code))
            if attribute.type == catalog_pb2.ATTRIBUTE_TYPE_NUMBER and rng.random() < 0.8:
                request.context[attribute.name].number_value = 11.0
    names = [action.name for action in message.actions]
    if names and rng.random() < 0.2:
        request.excluded_actions.append(str(rng.choice(names)))
    if names and rng.random() < 0.1:
        request.candidate_actions.extend(names[: len(names) // 2 + 1])
    return request


def decide_some(catalog: Catalog, seed: int, n_requests: int = N_REQUESTS) -> int:
    """Decide for some people under a catalog as promised, and return how many slots were filled."""
    rng = np.random.default_rng(seed)
    here, message, n_filled = Desk(catalog), catalog.message, 0
    for budget in message.budgets:
        limit = budget.cost_micros_max or budget.units_max
        if rng.random() < 0.5:
            here.spend(budget.name, max(limit - int(rng.integers(0, 3)), 0), NOW_US)
    for number in range(n_requests):
        try:
            here.meet(random_person(rng, message), now_us=NOW_US)
            batch, decisions = here.decisions([random_request(rng, message)], NOW_US, [key_of(f"{seed}/{number}")])
        except TsugiError:
            continue
        views = Views(batch, decisions, catalog, here.live.champion)
        reply_bytes = views.reply(0, TOKEN_KEY)
        reply, record = DecideResponse.FromString(reply_bytes), DecisionRecord.FromString(views.record(0, reply_bytes))
        check_reply(reply, decisions.reasons[0].tolist(), catalog)
        check_budgets(record, catalog)
        check_spending(batch.asked[0], views, catalog)
        assert differences(record, catalog) == []
        assert explain(record, catalog).sentence
        n_filled += sum(bool(slot.action) for slot in reply.slots)
    return n_filled


def check_reply(reply: DecideResponse, reasons: list[int], catalog: Catalog) -> None:
    chosen = [slot.action for slot in reply.slots if slot.action]
    assert len(set(chosen)) == len(chosen)
    for slot in reply.slots:
        if slot.action:
            assert reasons[catalog.actions.rows[slot.action]] == 0, slot
            assert 0.0 < slot.selection_probability <= 1.0 + 1e-12, slot
            assert 0.0 <= slot.propensity <= 1.0, slot
            assert 0.0 <= slot.value < math.inf, slot
            assert 0.0 <= slot.priority < math.inf, slot


def check_budgets(record: DecisionRecord, catalog: Catalog) -> None:
    """No decision spends more than was left of a budget near its end."""
    keys, terms = catalog.budgets.keys, catalog.budgets
    rows = [slot.row for slot in record.slots if slot.action]
    for reading in record.budgets:
        budget = keys.index(reading.target)
        assert sum(amount for row in rows for b, amount in terms.amounts[row] if b == budget) <= reading.left


def check_spending(asked: Any, views: Views, catalog: Catalog) -> None:
    budgets = Budgets(MemoryLog(), n_workers=2)
    budgets.look(catalog, NOW_US)
    spent = budgets.spend(asked, views.chosen(0), catalog)
    assert spent is None or all(0 < each.amount <= AMOUNT_MAX for each in spent.spends)


@pytest.mark.slow
def test_catalog_is_refused_with_its_faults_or_decided_under() -> None:
    seen: Counter[str] = Counter()

    @given(message=near(seeds(), WORDS), seed=st.integers(0, 1 << 32))
    @settings(max_examples=3 * settings().max_examples)
    def run(message: catalog_pb2.Catalog, seed: int) -> None:
        catalog = compiled(message)
        seen["refused" if catalog is None else "compiled"] += 1
        seen["slots"] += decide_some(catalog, seed) if catalog is not None else 0

    run()
    # Both happen often, or the test would show little.
    assert min(seen["refused"], seen["compiled"], seen["slots"]) > seen.total() / 10, seen


HUGE: list[dict[str, Any]] = [
    {"value": "profile.age * 1e9"},
    {"value": "profile.age * 1e300"},
    {"value": "profile.age * 1e-310"},
    {"value": "profile.age > 1e-300 ? 1e12 : 1e-310"},
    {"valueMicros": 10**18},
    {"valueMicros": 0},
    {"valueMicros": 1},
    {"lever": 1e-310},
    {"lever": 0.0},
]


def said(name: str, weight: float = 1.0, **parts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "lever": 1_000.0,
        "treatments": [{"name": "only", "channel": "web", "weight": weight}],
    } | parts


@pytest.mark.parametrize("weight", [1_000.0, 1e-310])
def test_priorities_of_every_size_are_numbers_to_choose_by(weight: float) -> None:
    """As much as a catalog can state: value × goals × weight × lever at their most, and at their least."""
    explorations = catalogs.POLICIES | catalogs.BOUNDED
    goals = [{"name": f"goal_{i}", "outcomes": [{"type": "click", "reward": 1}], "attributionWindow": "2s",
              "baseRate": [0.1, 1 - 1e-9, 5e-324][i % 3]} for i in range(8)]  # fmt: skip
    budget = {"costMicrosMax": 10**15, "period": "60s"}
    catalog = catalogs.compiled(
        goals=goals,
        placements=[
            {
                "name": name, "channel": "web", "countMax": 4, "exploration": exploration | {"budget": budget},
                "goals": [{"goal": goal["name"], "weight": 1_000.0} for goal in goals],
            }
            for name, exploration in explorations.items()
        ],
        actions=[said(f"a{i}", weight, **parts) for i, parts in enumerate(HUGE)],
    )  # fmt: skip
    assert sum(decide_some(catalog, seed, 4) for seed in range(10)) > 100


def test_value_beyond_the_largest_refuses() -> None:
    catalog = catalogs.compiled(
        actions=[said("much", value="profile.age * 1e10"), said("too_much", value="profile.age * 3e10")]
    )
    here = Desk(catalog)
    here.meet(Person({"age": 50.0}, {}))
    answer = here.ask(DecideRequest(profile_id="00" * 16, placements=[{"placement": "greedy", "count": 2}]))
    assert [(slot.action, slot.value) for slot in answer.reply.slots] == [("much", 5e11), ("", 0.0)]
    assert answer.refused == {"too_much": "REFUSAL_REASON_VALUE_UNKNOWN"}


@pytest.mark.parametrize("n_left", [0, 1, 255, 256])
def test_largest_budget_and_dearest_actions_in_the_most_slots_fit(n_left: int) -> None:
    """As much of a budget is spent as fits into what is left, and never more."""
    most, placements = 10**15, [f"p{i:02d}" for i in range(16)]
    catalog = catalogs.compiled(
        placements=[{"name": name, "channel": "web", "goal": "click", "countMax": 16} for name in placements],
        actions=[said(f"a{i}", costMicros=most // 256) for i in range(300)],
        budgets=[{"name": f"b{i}", "costMicrosMax": most} for i in range(32)],
    )
    here = Desk(catalog)
    here.spend("b31", most - n_left * (most // 256), NOW_US)
    request = DecideRequest(placements=[{"placement": name, "count": 16} for name in placements])
    batch, decisions = here.decisions([request], NOW_US, [key_of("d")])
    views = Views(batch, decisions, catalog, here.live.champion)
    assert sum(chosen.row >= 0 for chosen in views.chosen(0)) == n_left
    check_spending(batch.asked[0], views, catalog)
    record = DecisionRecord.FromString(views.record(0, views.reply(0, TOKEN_KEY)))
    check_budgets(record, catalog)
    assert differences(record, catalog) == []


def test_dearest_actions_are_said_once_by_the_largest_budget() -> None:
    most = 10**15
    catalog = catalogs.compiled(
        actions=[said(f"a{i}", costMicros=most) for i in range(4)], budgets=[{"name": "all", "costMicrosMax": most}]
    )
    answer = Desk(catalog).ask(DecideRequest(placements=[{"placement": "greedy", "count": 4}]), NOW_US)
    assert [bool(slot.action) for slot in answer.reply.slots] == [True, False, False, False]


@pytest.mark.parametrize(
    ("n_actions", "experiments"),
    [
        (10_000, [(9, 1)]),
        (1_562, [(1, 6)]),  # 64 blends
    ],
)
def test_as_many_blends_as_there_may_be_decide(n_actions: int, experiments: list[tuple[int, int]]) -> None:
    ((n_branches, n_experiments),) = experiments
    branches = [
        {
            "name": f"v{v}",
            "share": round(0.9 / n_branches, 2),
            "actions": [{"lever": v + 2.0, "suitability": "profile.age > 20.0"}] * 64,
        }
        for v in range(n_branches)
    ]
    catalog = catalogs.compiled(
        actions=[said(f"a{i:05d}") for i in range(n_actions)],
        experiments=[{"name": f"e{e}", "branches": branches} for e in range(n_experiments)],
    )
    assert len(catalog.blends.challenged) * n_actions > 99_900
    assert decide_some(catalog, 1, 2)
