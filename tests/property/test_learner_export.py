"""Published arrays: aligned by name, equal to River's own predictions within 1e-6, and withheld when they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import Catalog, Doubles, Goal
from server.catalog.compile import compile_catalog
from server.decisioning.models import align, no_champion
from tests.support.learning import make_catalog
from training.export import Exporter, UnsafeArraysError
from training.fleet import Fleet
from training.learners.base import FEATURE_MAX, Arrays, Prediction, Row, log_odds_of, sigmoid
from training.learners.bayesian import BayesianRegression
from training.learners.logistic import LogisticCorrection
from training.rewards import Lesson
from training.scaling import VALUE_MAX
from training.space import FEATURES_MAX
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays, LearnerSnapshot

GOALS = {
    name: Goal(name, {}, 1_000_000, 0.0, math.log(rate / (1.0 - rate)))
    for name, rate in (("visit", 0.2), ("sale", 0.01))
}
SCHEMAS = [("profile.a", "profile.b", "context.c"), ("profile.b", "context.d"), ("context.c", "profile.e", "profile.a")]

lessons = st.builds(
    lambda goal, action, names, values, prior, reward: Lesson(
        GOALS[goal], action, names, np.array(values[: len(names)], "<f4").tobytes(), prior, reward
    ),
    st.sampled_from(sorted(GOALS)),
    st.sampled_from(["book", "lamp", "rope"]),
    st.sampled_from(SCHEMAS),
    st.lists(st.floats(width=32), min_size=3, max_size=3),  # NaN, infinities and all
    st.floats(-20.0, 20.0),
    st.floats(0.0, 1.0),
)


def published(exporter: Exporter) -> LearnerArrays:
    exporter.renew()
    return LearnerArrays.FromString(exporter.message(1, 2, 3).SerializeToString())


def predictions(
    arrays: LearnerArrays, goal: str, action: str, x: Mapping[str, float], prior: float
) -> list[Prediction]:
    """Score one row as workers do, from the published bytes alone; a feature not published has its prior, 0 and 1."""
    (block,) = [block for block in arrays.goals if block.goal == goal]
    row = list(block.actions).index(action)
    vector = np.array([x.get(name, 0.0) for name in arrays.features])
    d = vector.size
    propensity = prior + _field(block, "correction_weights", d)[row] @ vector
    propensity += _field(block, "correction_intercepts")[row]
    z = block.posterior_scale * np.append(vector, 1.0)
    mean = 1.0 / (1.0 + np.exp(-prior)) + _field(block, "posterior_means", d + 1)[row] @ z
    variance = z @ _field(block, "posterior_covariances", d + 1, d + 1)[row] @ z
    variance += sum((block.posterior_scale * x[name]) ** 2 for name in x.keys() - set(arrays.features))
    return [Prediction(1.0 / (1.0 + np.exp(-propensity)), 0.0), Prediction(mean, variance)]


def expectations(fleet: Fleet, goal: str, action: str, x: Mapping[str, float], prior: float) -> list[Prediction]:
    """Score one row as the learners that are published do."""
    columns, rows = fleet.space.columns, fleet.space.rows
    row = np.array([1.0, *(x.get(name, 0.0) for name in columns)])
    serving, posterior = fleet.goals[goal].serving.learner, fleet.goals[goal].posterior.learner
    propensity, reward = (learner.predict_one(Row(rows[action], row, prior)) for learner in (serving, posterior))
    scale = BayesianRegression.constants(fleet.goals[goal].base_rate)["posterior_scale"]
    unknown = sum((scale * x[name]) ** 2 for name in x.keys() - columns.keys())  # has its prior: mean 0, variance 1
    return [propensity, reward._replace(variance=reward.variance + unknown)]


def _field(block: GoalArrays, field: str, *shape: int) -> Doubles:
    return np.frombuffer(getattr(block, field), "<f8").reshape(len(block.actions), *shape)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(lessons, max_size=12), min_size=1, max_size=4))
def test_published_arrays_score_as_river_does(batches: list[list[Lesson]]) -> None:
    fleet = Fleet()
    exporter = Exporter(fleet)
    for batch in batches:
        for lesson in batch:
            fleet.learn(lesson)
        arrays = published(exporter)
        assert list(arrays.features) == list(fleet.space.columns)
        for block in arrays.goals:
            for action in block.actions:
                for x in ({}, {"profile.a": 3.0, "context.c": -1.0}, dict.fromkeys(fleet.space.columns, 1.0)):
                    for prior in (-2.0, 0.5):
                        ours = predictions(arrays, block.goal, action, x, prior)
                        rivers = expectations(fleet, block.goal, action, x, prior)
                        np.testing.assert_allclose(ours, rivers, rtol=0.0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(lessons, min_size=1, max_size=20))
def test_arrays_are_the_same_however_often_they_were_renewed(rows: list[Lesson]) -> None:
    often, once = Fleet(), Fleet()
    exporter = Exporter(often)
    for lesson in rows:
        often.learn(lesson)
        exporter.renew()
        once.learn(lesson)
    assert published(exporter) == published(Exporter(once))


@settings(max_examples=30, deadline=None)
@given(st.lists(lessons, min_size=1, max_size=20))
def test_restored_fleet_publishes_the_same_numbers(rows: list[Lesson]) -> None:
    fleet, restored = Fleet(), Fleet()
    for lesson in rows:
        fleet.learn(lesson)
    restored.load(saved(fleet))
    before, after = published(Exporter(fleet)), published(Exporter(restored))
    assert list(before.features) == list(after.features)
    for block in before.goals:
        for action in block.actions:
            x = dict.fromkeys(fleet.space.columns, 1.0)
            assert predictions(before, block.goal, action, x, 0.0) == predictions(after, block.goal, action, x, 0.0)


def saved(fleet: Fleet) -> LearnerSnapshot:
    snapshot = LearnerSnapshot()
    fleet.save(snapshot)
    return snapshot


def lesson_of(names: tuple[str, ...] = SCHEMAS[0], value: float = 1.0, reward: float = 1.0) -> Lesson:
    values = np.full(len(names), value, "<f4").tobytes()
    return Lesson(GOALS["visit"], "book", names, values, 0.0, reward)


def test_goal_is_published_before_anything_was_learned_about_it() -> None:
    fleet = Fleet()
    fleet.meet(GOALS.values())
    arrays = published(Exporter(fleet))
    scales = {block.goal: block.posterior_scale for block in arrays.goals}
    assert scales == pytest.approx({"visit": 0.1 * math.sqrt(0.2 * 0.8), "sale": 0.1 * math.sqrt(0.01 * 0.99)})


def test_numbers_far_outside_are_cut_before_they_teach() -> None:
    fleet, cut = Fleet(), Fleet()
    for value, value_max in ((1.0, 1.0), (3e38, VALUE_MAX), (-3e38, -VALUE_MAX)):
        fleet.learn(lesson_of(value=value))
        cut.learn(lesson_of(value=value_max))
    assert saved(fleet) == saved(cut)
    (row,) = fleet.goals["visit"].stale.values()
    assert np.abs(row.x).max() <= FEATURE_MAX


def thompson_catalog(numbers: tuple[str, ...]) -> Catalog:
    message = make_catalog(("book", "lamp"), numbers).message
    message.placements[0].exploration.thompson.draws = 64
    return compile_catalog(message)


@pytest.mark.parametrize("numbers", [("age", "spend"), ("spend", "visits"), ("visits",)])
def test_workers_score_what_is_recorded_as_learners_score_it_in_units_of_its_spread(numbers: tuple[str, ...]) -> None:
    """Also under a catalog that has come to lack a number, which then lies at its center, or to have a new one."""
    fleet, first, used = Fleet(), thompson_catalog(("age", "spend")), thompson_catalog(numbers)
    rng = np.random.default_rng(4)
    drawn = rng.normal((40.0, 20_000.0), (12.0, 5_000.0), (220, 2))
    for i, row in enumerate(drawn[:200].astype("<f4")):
        fleet.learn(Lesson(first.goals[0], "book", first.learned.names, row.tobytes(), -1.0, float(i % 3 == 0)))
    models, book = align(used, no_champion(used), published(Exporter(fleet))), used.actions.rows["book"]
    posterior = models.posterior_rows[0, book]
    for age, spend in drawn[200:]:
        recorded = {"profile.age": age, "profile.spend": spend, "profile.visits": 0.5}
        x = np.array([recorded[name] for name in used.learned.names])
        log_odds = -models.prior_slopes[0] + models.correction_weights[0, book] @ x
        log_odds += models.correction_intercepts[0, book]
        z = models.posterior_scales[0] * np.append(x, 1.0)
        mean = sigmoid(-1.0) + models.posterior_means[posterior] @ z
        ours = [Prediction(sigmoid(log_odds), 0.0), Prediction(mean, z @ models.posterior_covariances[posterior] @ z)]
        units = {name: units_of(fleet, name, recorded[name]) for name in used.learned.names}
        propensity, reward = expectations(fleet, "visit", "book", units, -1.0)
        slope, intercept = fleet.goals["visit"].calibration.scaling
        mended = sigmoid(slope * log_odds_of(propensity.mean) + intercept)
        theirs = [propensity._replace(mean=mended), reward]
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=1e-6)


def units_of(fleet: Fleet, name: str, value: float) -> float:
    column = fleet.space.columns.get(name)
    return value if column is None else float((value - fleet.scaling.centers[column]) / fleet.scaling.spreads[column])


def test_features_beyond_the_budget_are_not_learned_from() -> None:
    fleet = Fleet()
    for catalog in range(3):
        fleet.learn(lesson_of(tuple(f"profile.c{catalog}_{i}" for i in range(FEATURES_MAX // 2 + 1)), value=0.1))
    fleet.learn(lesson_of(SCHEMAS[0]))
    assert len(fleet.space.columns) == FEATURES_MAX
    assert published(Exporter(fleet)).goals[0].actions == ["book"]


class _Lying(LogisticCorrection):
    def export(self, actions: Sequence[int]) -> Arrays:
        arrays = super().export(actions)
        return arrays | {"correction_intercepts": arrays["correction_intercepts"] + 1e-4}


class _Broken(LogisticCorrection):
    def export(self, actions: Sequence[int]) -> Arrays:
        arrays = super().export(actions)
        return arrays | {"correction_weights": np.full_like(arrays["correction_weights"], math.nan)}


@pytest.mark.parametrize("faulty", [_Lying, _Broken])
def test_arrays_that_do_not_say_what_river_says_are_withheld_until_they_do(faulty: type[LogisticCorrection]) -> None:
    fleet = Fleet()
    exporter = Exporter(fleet)
    fleet.learn(lesson_of())
    good = published(exporter)
    serving = fleet.goals["visit"].serving
    sound = serving.learner
    serving.learner = faulty(fleet.space, 0.2, sound.settings)
    fleet.learn(lesson_of(reward=0.0))
    for _ in range(2):
        with pytest.raises(UnsafeArraysError):
            exporter.renew()
    serving.learner = sound
    assert published(exporter) != good


def test_who_comes_to_serve_is_published_for_all_actions() -> None:
    fleet = Fleet()
    exporter = Exporter(fleet)
    for action in ("book", "lamp"):
        for _ in range(5):
            fleet.learn(lesson_of()._replace(action=action))
    before = published(exporter)
    goal = fleet.goals["visit"]
    goal.serve(0)
    after = published(exporter)
    assert np.any(_field(before.goals[0], "correction_intercepts"))
    assert not np.any(_field(after.goals[0], "correction_intercepts"))
    assert list(after.goals[0].posterior_actions) == ["book", "lamp"]


@pytest.mark.parametrize("posterior", ["bayesian", "diagonal"])
def test_workers_keep_no_covariances_of_actions_that_nothing_was_learned_of(
    posterior: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner that all actions share is published for all of them; a posterior like the prior is the prior."""
    monkeypatch.setattr("training.goal_fleet.POSTERIORS", (posterior,))
    fleet, catalog = Fleet(), thompson_catalog(("age", "spend"))
    fleet.meet(catalog.goals, catalog.learned.names, {"book": (), "lamp": ()})
    for i in range(20):
        values = np.array([i, 30 - i], "<f4").tobytes()
        fleet.learn(Lesson(catalog.goals[0], "book", catalog.learned.names, values, -1.0, float(i % 3 == 0)))
    goal = fleet.goals["visit"]
    goal.serve(next(place for place, member in enumerate(goal.members) if member.learner.is_shared))
    arrays = published(Exporter(fleet))
    models = align(catalog, no_champion(catalog), arrays)
    assert list(arrays.goals[0].actions) == ["book", "lamp"]
    assert models.posterior_rows[0].tolist() == [1, 0]
    assert models.posterior_covariances.shape[0] == 2
    assert not np.array_equal(models.posterior_covariances[0], models.posterior_covariances[1])


def test_posteriors_are_of_actions_with_rows_alone_whoever_serves() -> None:
    """Covariances of actions that nothing is known of would be most of a file; they have their prior anyway."""
    fleet, catalog = Fleet(), thompson_catalog(("age",))
    names = catalog.learned.names
    fleet.meet(catalog.goals, names, {"book": (), "lamp": ()})
    goal = fleet.goals["visit"]
    goal.serve(next(i for i, member in enumerate(goal.members) if member.learner.is_shared))
    for i in range(20):
        fleet.learn(Lesson(catalog.goals[0], "book", names, np.ones(1, "<f4").tobytes(), -1.0, float(i % 2)))
    (block,) = [block for block in published(Exporter(fleet)).goals if block.goal == "visit"]
    assert (list(block.actions), list(block.posterior_actions)) == (["book", "lamp"], ["book"])
    models = align(catalog, no_champion(catalog), published(Exporter(fleet)))
    rows = catalog.actions.rows
    assert models.posterior_rows[0, [rows["book"], rows["lamp"]]].tolist() == [1, 0]
    assert models.correction_intercepts[0, rows["lamp"]] != 0.0, "what is shared says something about it too"
