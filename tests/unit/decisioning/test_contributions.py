"""What each fact did to a propensity is what the champion's input and the learners' weights say it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pytest

from server.catalog.catalog import Catalog, Floats
from server.decisioning import contributions
from server.decisioning.bundle_columns import bundle_columns
from server.decisioning.contributions import Correction, Corrections, contribute, mostly
from server.decisioning.explanation import explain
from server.decisioning.models import Champion, Models, align, make_champion, no_champion
from server.registry.scorers import ScoringError
from tests.support.catalogs import compiled
from tests.support.deciding import Answer, Desk
from tests.support.populating import Person
from tsugi.log.v1.bundle_pb2 import Feature, Manifest, Scaled
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays
from tsugi.log.v1.record_pb2 import Provenance
from tsugi.requests import decide_request
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import Contribution

ANNA: Final = ("customer_number", "1")
TIERS: Final = ("bronze", "silver", "gold")
PRICES: Final = (4.0, 25.0, None, 12.0)
FEATURES: Final = (
    Feature(fact="profile.age", scaled=Scaled(center=40.0, spread=15.0, limit=4.0, when_unknown=-0.5)),
    Feature(fact="profile.tier", equals="silver"),
    Feature(fact="action.price", scaled=Scaled(center=10.0, spread=5.0, limit=3.0)),
    Feature(fact="profile.tier", is_unknown=True),
    Feature(fact="context.hour", scaled=Scaled(center=12.0, spread=6.0, limit=4.0)),
    Feature(fact="action.price", is_unknown=True),
    Feature(fact="profile.tier", equals="gold"),
)
WEIGHTS: Final = np.array([0.5, -0.75, -0.25, 1.5, 0.125, 0.375, 0.0625], np.float32)
ARRAYS: Final = bytes(range(32))
GOALS: Final = [
    {"name": name, "outcomes": [{"type": kind, "reward": 1}], "attributionWindow": "2s", "baseRate": rate}
    for name, kind, rate in (("click", "click", 0.1), ("sale", "order", 0.02))
]


class Linear:
    """A logistic model, which remembers how many rows it was called with."""

    def __init__(self, weights: Floats) -> None:
        self._weights = weights
        self.n_rows: list[int] = []

    def score(self, inputs: Floats) -> Floats:
        self.n_rows.append(len(inputs))
        return (inputs @ self._weights - np.float32(1.0)).astype(np.float32)


class Failing:
    """A model that gives no number."""

    def score(self, _inputs: Floats) -> Floats:
        raise ScoringError("as the test wants it")


def with_prices(n_actions: int = 4, **parts: Any) -> Catalog:
    actions = [
        {"name": f"action_{i:03}", "treatments": [{"name": "only", "channel": "web"}]}
        | ({"attributes": {"price": PRICES[i % 4]}} if PRICES[i % 4] is not None else {})
        for i in range(n_actions)
    ]
    prices = [{"name": "price", "type": "ATTRIBUTE_TYPE_NUMBER"}]
    places = [
        {"name": "page", "channel": "web", "goal": "click", "countMax": 4},
        {"name": "side", "channel": "web", "goals": [{"goal": "sale", "weight": 9}, {"goal": "click"}]},
    ]
    return compiled(**({"actions": actions, "actionAttributes": prices, "goals": GOALS, "placements": places} | parts))


def champion_of(catalog: Catalog, scorer: Any, features: tuple[Feature, ...] = FEATURES) -> Champion:
    columns = bundle_columns(Manifest(goal="click", features=features), catalog)
    return make_champion(catalog, ARRAYS, "click", columns, scorer)


def learned_by(catalog: Catalog, weights: Mapping[str, float], intercept: float = 0.25) -> LearnerArrays:
    """Publish the same weights for two actions, for both goals."""
    d, names = len(weights), catalog.actions.names[:2]
    goals = [
        GoalArrays(
            goal=goal,
            actions=names,
            correction_weights=np.tile(list(weights.values()), (2, 1)).astype(np.float64).tobytes(),
            correction_intercepts=np.full(2, intercept).tobytes(),
            posterior_means=np.zeros((2, d + 1)).tobytes(),
            posterior_covariances=np.tile(np.eye(d + 1), (2, 1, 1)).tobytes(),
            posterior_scale=1.0,
        )
        for goal in ("click", "sale")
    ]
    return LearnerArrays(format_version=1, epoch=1, features=list(weights), goals=goals)


def correction_of(models: Models) -> Correction:
    return Correction(models.correction_weights, models.correction_intercepts, models.prior_slopes)


def asked(desk: Desk, **facts: Any) -> Answer:
    desk.meet(Person(facts or {"age": 70.0, "tier": "silver"}, dict([ANNA])))
    return desk.ask(decide_request({"page": 1, "side": 1}, identities=[ANNA], context={"hour": 21.0}))


def told_of(contributions: list[Contribution], *, learned: bool) -> dict[str, float]:
    return {each.feature: each.log_odds for each in contributions if each.learned == learned}


@pytest.mark.parametrize(
    ("facts", "age", "tier"),
    [
        ({"age": 70.0, "tier": "silver"}, 0.5 * 2.0, -0.75),
        ({"age": 25.0, "tier": "gold"}, -0.5, 0.0625),
        ({"member": True}, 0.5 * -0.5, 1.5),
        ({"age": 40.0, "tier": "bronze"}, None, None),
    ],
)
def test_of_a_linear_champion_each_fact_did_weight_times_value_over_all_its_columns(
    facts: dict[str, Any], age: float | None, tier: float | None
) -> None:
    catalog = with_prices()
    champion = champion_of(catalog, Linear(WEIGHTS))
    record = asked(Desk(catalog, champion=champion), **facts).record
    told = contribute(record, catalog, champion, None, range(4))
    for place, price in enumerate([0.25 * 1.2, -0.25 * 3.0, 0.375, -0.25 * 0.4]):
        expected = {"profile.age": age, "profile.tier": tier, "context.hour": 0.125 * 1.5, "action.price": price}
        known = {fact: effect for fact, effect in expected.items() if effect is not None}
        assert told_of(told[0, place], learned=False) == pytest.approx(known, abs=1e-6)
        sizes = [abs(each.log_odds) for each in told[0, place]]
        assert sizes == sorted(sizes, reverse=True)
    assert (1, 0) not in told, "of the other goal the prior is a base rate"


def test_learners_part_is_weight_times_column_added_up_by_fact() -> None:
    catalog = with_prices()
    weights = {"profile.age": 0.2, "profile.tier=silver": -0.3, "profile.tier=gold": 5.0, "context.hour": 1e-7}
    desk = Desk(catalog, arrays=learned_by(catalog, weights))
    record = asked(desk).record
    told = contribute(record, catalog, None, correction_of(desk.models), range(4))
    expected = {"profile.age": 0.4, "profile.tier": -0.3, "learned for the action": 0.25}
    for ask in range(2):
        assert told_of(told[ask, 0], learned=True) == pytest.approx(expected)
        assert told[ask, 3] == [], "nothing was learned about it"


def test_learners_part_is_one_sum_where_the_arrays_are_gone_and_none_where_there_were_none() -> None:
    catalog = with_prices()
    desk = Desk(catalog, arrays=learned_by(catalog, {"profile.age": 0.2}))
    record = asked(desk).record
    assert contribute(record, catalog, None, None, range(4)) == {}
    record.provenance.arrays_sha256 = ARRAYS
    told = contribute(record, catalog, None, None, range(4))
    assert [told_of(told[ask, 1], learned=True) for ask in range(2)] == [{"learned": pytest.approx(0.65, abs=1e-6)}] * 2
    record.propensities = np.array([1.0, 0.0] * 4, np.float32).tobytes()
    told = contribute(record, catalog, None, None, range(4))
    assert all(np.isfinite(each.log_odds) for each in told[0, 0] + told[0, 1]), "rounded, yet told"


def test_nothing_is_told_of_a_prior_that_the_champion_did_not_give() -> None:
    catalog = with_prices()
    good, failing = champion_of(catalog, Linear(WEIGHTS)), champion_of(catalog, Failing())
    record = asked(Desk(catalog, champion=failing)).record
    record.degradations.append(Degradation.DEGRADATION_MODEL_UNAVAILABLE)
    assert contribute(record, catalog, good, None, range(4)) == {}
    record = asked(Desk(catalog, champion=good)).record
    assert contribute(record, catalog, None, None, range(4)) == {}
    assert contribute(record, catalog, no_champion(catalog), None, range(4)) == {}
    assert contribute(record, catalog, failing, None, [0, 1])[0, 1] == [], "it fails only now"
    record.degradations.append(Degradation.DEGRADATION_MODEL_UNAVAILABLE)
    assert contribute(record, catalog, good, None, range(4))[0, 1], "it stood in for a challenger"


def test_calls_and_contributions_are_bounded_and_those_in_front_are_told_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    catalog = with_prices(300)
    scorer = Linear(WEIGHTS)
    champion = champion_of(catalog, scorer)
    record = asked(Desk(catalog, champion=champion)).record
    places = list(range(299, -1, -1))
    scorer.n_rows.clear()
    told = contribute(record, catalog, champion, None, places)
    assert [place for _, place in told] == places[:256], "512 shared by two placements"
    assert scorer.n_rows == [1_020, 260], "one of each candidate, and one with each of four facts hidden"
    monkeypatch.setattr(contributions, "SCORED_ROWS_MAX", 54)
    scorer.n_rows.clear()
    assert [place for _, place in contribute(record, catalog, champion, None, places)] == places[:10]
    assert scorer.n_rows == [50]
    monkeypatch.setattr(contributions, "CONTRIBUTIONS_MAX", 2)
    told = contribute(record, catalog, champion, None, [0])
    assert [each.feature for each in told[0, 0]] == ["profile.age", "profile.tier"]


def models_of(catalog: Catalog, sha256: bytes, erased_lsn: int = 0) -> Models:
    arrays = learned_by(catalog, {"profile.age": 0.2})
    arrays.erased_lsn = erased_lsn
    return align(catalog, no_champion(catalog), arrays, sha256)


def test_corrections_are_kept_within_their_bytes_the_oldest_going_first() -> None:
    catalog = with_prices()
    names = [bytes([i]) * 32 for i in range(5)]
    one = correction_of(models_of(catalog, names[0])).n_bytes
    corrections = Corrections(bytes_max=3 * one)

    def kept() -> list[int]:
        made_with = [Provenance(arrays_sha256=name, catalog_sha256=catalog.sha256) for name in names]
        return [i for i, each in enumerate(made_with) if corrections.of(each) is not None]

    for name in (*names[:4], names[3], names[1]):
        corrections.keep(catalog, models_of(catalog, name))
    assert kept() == [1, 2, 3], "the same again takes no more room"
    corrections.keep(catalog, models_of(catalog, names[4]))
    assert kept() == [1, 3, 4]
    corrections.keep(catalog, models_of(catalog, b""))
    assert kept() == [1, 3, 4], "before the first arrays there is nothing to keep"
    corrections.keep(catalog, models_of(catalog, names[0], erased_lsn=7))
    assert kept() == [0], "what rests on people who were erased is gone"
    small = Corrections(bytes_max=one - 1)
    for name in names:
        small.keep(catalog, models_of(catalog, name))
    assert small.of(Provenance(arrays_sha256=names[4], catalog_sha256=catalog.sha256)), "the newest is in use anyway"
    assert not small.of(Provenance(arrays_sha256=names[3], catalog_sha256=catalog.sha256))
    assert not small.of(Provenance(arrays_sha256=names[4], catalog_sha256=bytes(32))), "rows of another catalog"


@pytest.mark.parametrize(
    ("effects", "words"),
    [
        ([("profile.age", 0.9, False), ("action.price", -0.4, False)], ", mostly because of profile.age"),
        ([("profile.age", 0.9, False), ("context.hour", 0.8, False), ("action.price", 0.4, False)],
         ", mostly because of profile.age and context.hour"),
        ([("profile.age", 0.9, False), ("context.hour", 0.8, False), ("action.price", 0.7, False)], ""),
        ([("profile.age", -0.9, False), ("action.price", 0.4, False)], ""),
        ([("profile.age", 0.9, False), ("profile.age", -0.9, True), ("action.price", 0.4, False)],
         ", mostly because of action.price"),
        ([("learned", 0.5, True)], ", mostly because of what was learned"),
        ([("learned for the action", 0.5, True)], ", mostly because of what was learned for the action"),
        ([("profile.age", 0.09, False)], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_only_what_clearly_leads_is_said(effects: list[tuple[str, float, bool]], words: str) -> None:
    told = [Contribution(feature=name, log_odds=effect, learned=learned) for name, effect, learned in effects]
    assert mostly(told) == words


def test_explanation_tells_contributions_and_the_sentence_the_strongest() -> None:
    catalog = with_prices()
    champion = champion_of(catalog, Linear(np.array([1.0, 0.01, 0, 0, 0.01, 0, 0], np.float32)))
    desk = Desk(catalog, champion=champion, arrays=learned_by(catalog, {"profile.age": 0.01}))
    record = asked(desk).record
    correction = correction_of(desk.models)
    told = explain(record, catalog, lambda places: contribute(record, catalog, champion, correction, places))
    page, side = next(each for each in told.candidates if each.action == "action_000").standings
    assert told_of(list(page.contributions), learned=False)["profile.age"] == pytest.approx(2.0)
    assert set(told_of(list(page.contributions), learned=True)) == {"profile.age", "learned for the action"}
    assert set(told_of(list(side.contributions), learned=False)) == set()
    assert ", mostly because of profile.age; then " in told.sentence
    before = explain(record, catalog)
    assert "because of" not in before.sentence
    assert not any(each.contributions for candidate in before.candidates for each in candidate.standings)
