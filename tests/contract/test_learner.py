"""What every family of learners promises; a new file in training/learners is found and tested by being there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
from typing import cast

import numpy as np
import pytest

from training import learners
from training.fleet import FAMILIES
from training.learners.base import FEATURE_MAX, PRIOR_LOG_ODDS_MAX, ActionLearner, Features
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerState

BASE_RATE = 0.1
NAMES = [f"profile.f{i}" for i in range(30)]
Rows = list[tuple[Features, float, float]]


def _families() -> list[type[ActionLearner]]:
    modules = [
        importlib.import_module(f"training.learners.{info.name}") for info in pkgutil.iter_modules(learners.__path__)
    ]
    return [
        cast(type[ActionLearner], member)
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and isinstance(getattr(member, "family", None), str)
    ]


FOUND = _families()


@pytest.fixture(params=FOUND, ids=lambda family: family.family)
def family(request: pytest.FixtureRequest) -> type[ActionLearner]:
    found: type[ActionLearner] = request.param
    return found


def rows_of(seed: int, n: int) -> Rows:
    """Make rows whose features come and go: few at first, so that whatever grows has to grow."""
    rng = random.Random(seed)
    rows: Rows = []
    for i in range(n):
        names = rng.sample(NAMES[: 3 + i // 4], k=3)
        rows.append(
            ({name: rng.gauss(0.0, 2.0) for name in names}, rng.gauss(-1.0, 1.0), rng.choice((0.0, 0.0, 0.3, 1.0)))
        )
    return rows


def state_of(learner: ActionLearner) -> bytes:
    state = LearnerState(n_rows=learner.n_rows)
    learner.save(state)
    return state.SerializeToString(deterministic=True)


def restored(learner: ActionLearner) -> ActionLearner:
    state = LearnerState.FromString(state_of(learner))
    successor = type(learner)(BASE_RATE)
    successor.n_rows = state.n_rows
    successor.load(state)
    return successor


def learned_from(family: type[ActionLearner], rows: Rows) -> ActionLearner:
    learner = family(BASE_RATE)
    for row in rows:
        learner.learn_one(*row)
    return learner


def exported_prediction(learner: ActionLearner, features: Features, prior_log_odds: float) -> tuple[float, float]:
    """Score a row with what the learner publishes, as workers do."""
    columns = {name: column for column, name in enumerate(reversed(NAMES))}
    vector = np.array([features.get(name, 0.0) for name in columns])
    return learner.score(learner.export(columns), type(learner).constants(BASE_RATE), vector, prior_log_odds)


def test_every_family_found_is_in_the_fleet() -> None:
    assert {family.family for family in FOUND} == {family.family for family in FAMILIES}
    assert FOUND


def test_family_is_named_after_its_module(family: type[ActionLearner]) -> None:
    assert family.__module__ == f"training.learners.{family.family}"


def test_restart_after_any_row_is_bit_identical(family: type[ActionLearner]) -> None:
    rows = rows_of(seed=1, n=120)
    uninterrupted, restarted = family(BASE_RATE), family(BASE_RATE)
    for row in rows:
        uninterrupted.learn_one(*row)
        restarted.learn_one(*row)
        restarted = restored(restarted)
        assert state_of(restarted) == state_of(uninterrupted)
        assert restarted.predict_one(*row[:2]) == uninterrupted.predict_one(*row[:2])


def test_predicting_and_exporting_change_nothing(family: type[ActionLearner]) -> None:
    rows = rows_of(seed=2, n=60)
    watched = family(BASE_RATE)
    for features, prior_log_odds, reward in rows:
        watched.learn_one(features, prior_log_odds, reward)
        watched.predict_one({"profile.unheard_of": 1.0}, 0.0)
        exported_prediction(watched, features, prior_log_odds)
    assert state_of(watched) == state_of(learned_from(family, rows))


def test_export_equals_river_although_features_come_and_go(family: type[ActionLearner]) -> None:
    learner = family(BASE_RATE)
    for features, prior_log_odds, reward in rows_of(seed=3, n=120):
        for x in (features, {}, dict.fromkeys(NAMES, 1.0)):
            difference = np.subtract(
                exported_prediction(learner, x, prior_log_odds), learner.predict_one(x, prior_log_odds)
            )
            assert np.abs(difference).max() <= 1e-6
        learner.learn_one(features, prior_log_odds, reward)


def test_export_fills_fields_of_the_published_message(family: type[ActionLearner]) -> None:
    learner = learned_from(family, rows_of(seed=4, n=5))
    fields = {field.name for field in GoalArrays.DESCRIPTOR.fields}
    exported = learner.export({name: column for column, name in enumerate(NAMES)})
    assert {*exported, *family.constants(BASE_RATE)} <= fields
    assert all(array.dtype == np.float64 for array in exported.values())


def test_hostile_rows_leave_finite_numbers(family: type[ActionLearner]) -> None:
    learner = family(BASE_RATE)
    rng = random.Random(5)
    for i in range(2_000):
        features = {name: rng.choice((-FEATURE_MAX, FEATURE_MAX)) for name in NAMES}
        learner.learn_one(features, rng.choice((-PRIOR_LOG_ODDS_MAX, PRIOR_LOG_ODDS_MAX)), float(i % 2))
    exported = learner.export({name: column for column, name in enumerate(NAMES)})
    assert all(np.isfinite(array).all() and np.abs(array).max() < 100.0 for array in exported.values())


@pytest.mark.parametrize("prior_log_odds", [-3.0, 0.0, 2.0])
def test_learning_moves_the_expectation_towards_the_rewards(family: type[ActionLearner], prior_log_odds: float) -> None:
    features = {"profile.f0": 1.0, "profile.f1": -0.5}
    means = []
    for reward in (0.0, 0.3, 1.0):
        learner = learned_from(family, [(features, prior_log_odds, reward)] * 300)
        means.append(learner.predict_one(features, prior_log_odds).mean)
    assert means == sorted(means)
    assert means == pytest.approx([0.0, 0.3, 1.0], abs=0.15)


def test_what_is_learned_is_the_difference_from_the_prior(family: type[ActionLearner]) -> None:
    rng = random.Random(6)
    learner = family(BASE_RATE)
    for _ in range(1_000):
        prior_log_odds = rng.choice((-2.0, 1.0))
        chance = 1.0 / (1.0 + np.exp(-prior_log_odds))
        learner.learn_one({"profile.f0": rng.gauss(0.0, 1.0)}, prior_log_odds, float(rng.random() < chance))
    for prior_log_odds in (-2.0, 1.0):
        chance = 1.0 / (1.0 + np.exp(-prior_log_odds))
        assert learner.predict_one({"profile.f0": 0.0}, prior_log_odds).mean == pytest.approx(chance, abs=0.08)
