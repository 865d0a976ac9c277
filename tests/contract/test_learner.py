"""What every family of learners promises; a new file in training/learners is found and tested by being there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from server.catalog.catalog import Doubles
from training import learners
from training.families import FAMILIES, FIRST, LATER, POSTERIORS
from training.learners.base import (
    FEATURE_MAX,
    MODEL_FIELD,
    PRIOR_LOG_ODDS_MAX,
    Learner,
    Modelled,
    Row,
    settings_text,
    sigmoid,
)
from training.space import Space
from tsugi.log.v1.learner_pb2 import GoalArrays, MemberState

BASE_RATE = 0.1
NAMES = [f"profile.f{i}" for i in range(30)]
ACTIONS = ["book", "lamp", "rope"]
TOKENS = {"book": ("group=paper",), "lamp": ("group=house", "bright"), "rope": ("group=house",)}
Rows = list[tuple[Row, float]]


def _families() -> list[type[Learner]]:
    modules = [
        importlib.import_module(f"training.learners.{info.name}") for info in pkgutil.iter_modules(learners.__path__)
    ]
    return [
        cast(type[Learner], member)
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and isinstance(getattr(member, "family", None), str)
    ]


FOUND = _families()
LEARNING = [family for family in FOUND if family.family != "baseline"]


@pytest.fixture(params=FOUND, ids=lambda family: family.family)
def family(request: pytest.FixtureRequest) -> type[Learner]:
    found: type[Learner] = request.param
    return found


@pytest.fixture(params=LEARNING, ids=lambda family: family.family)
def learning(request: pytest.FixtureRequest) -> type[Learner]:
    """A family that learns something."""
    found: type[Learner] = request.param
    return found


def space_of(n_features: int = len(NAMES), actions: Sequence[str] = ACTIONS) -> Space:
    space = Space()
    space.admit_features(NAMES[:n_features])
    for action in actions:
        space.admit_action(action, TOKENS.get(action, ()))
    return space


def begun(family: type[Learner], space: Space) -> Learner:
    return family(space, BASE_RATE, family.choices[0])


def x_of(space: Space, values: dict[str, float]) -> Doubles:
    x = np.zeros(1 + len(space.columns))
    x[0] = 1.0
    for name, value in values.items():
        x[1 + space.columns[name]] = value
    return x


def row_of(space: Space, rng: random.Random) -> Row:
    known = list(space.columns)
    values = {name: rng.gauss(0.0, 2.0) for name in rng.sample(known, k=min(3, len(known)))}
    return Row(rng.randrange(len(space.rows)), x_of(space, values), rng.gauss(-1.0, 1.0), rng.choice((1.0, 1.0, 5.0)))


def grow(space: Space, step: int) -> None:
    """Have features and actions come: few at first, so that whatever grows has to grow."""
    space.admit_features(NAMES[: 3 + step // 4])
    for action in ACTIONS[: 1 + step // 20]:
        space.admit_action(action, TOKENS[action])


def reward_of(rng: random.Random) -> float:
    return rng.choice((0.0, 0.0, 0.3, 1.0))


def state_of(learner: Learner) -> bytes:
    state = MemberState(family=learner.family, settings=settings_text(learner.settings))
    learner.save(state)
    return bytes(state.SerializeToString(deterministic=True))


def restored(learner: Learner, space: Space) -> Learner:
    state = MemberState.FromString(state_of(learner))
    successor = type(learner)(space, BASE_RATE, learner.settings)
    successor.load(state)
    return successor


def exported_prediction(learner: Learner, row: Row) -> tuple[float, float]:
    """Score a row with what the learner publishes, as workers do."""
    arrays = {field: array[0] for field, array in learner.export([row.action]).items()}
    if isinstance(learner, Modelled):
        arrays[MODEL_FIELD] = np.frombuffer(learner.model(), np.uint8).astype(np.float64)
    return learner.score(arrays, type(learner).constants(BASE_RATE), row.x[1:], row.prior_log_odds)


def test_every_family_found_can_take_part() -> None:
    assert {family.family for family in FOUND} == set(FAMILIES)
    assert {FAMILIES[name] for name in FAMILIES} == set(FOUND)
    assert all(dict(settings) in FAMILIES[family].choices for family, settings in (*FIRST, *LATER))
    assert all(FAMILIES[family].is_posterior for family in POSTERIORS)


def test_family_is_named_after_its_module(family: type[Learner]) -> None:
    assert family.__module__ == f"training.learners.{family.family}"


def test_settings_are_told_apart_by_their_text(family: type[Learner]) -> None:
    assert len({settings_text(settings) for settings in family.choices}) == len(family.choices)


def test_restart_after_any_row_is_bit_identical(family: type[Learner]) -> None:
    rng, space = random.Random(1), space_of(0, ())
    grow(space, 0)
    uninterrupted, restarted = begun(family, space), begun(family, space)
    earlier: Rows = []
    for step in range(100):
        grow(space, step)
        row, reward = row_of(space, rng), reward_of(rng)
        assert uninterrupted.learn_one(row, reward) == restarted.learn_one(row, reward)
        earlier.append((row, reward))
        if step % 7 == 0:
            row, reward = earlier[rng.randrange(len(earlier))]
            row = row._replace(x=np.append(row.x, np.zeros(1 + len(space.columns) - row.x.size)))
            uninterrupted.correct_one(row, 0.5 - reward)
            restarted.correct_one(row, 0.5 - reward)
        if step % 3 == 0:
            restarted = restored(restarted, space)
        assert state_of(restarted) == state_of(uninterrupted)
        assert restarted.predict_one(row) == uninterrupted.predict_one(row)


def test_restart_after_a_correction_of_what_it_never_learned_is_bit_identical(family: type[Learner]) -> None:
    """A learner that begins late is told of corrections of rows before its time."""
    rng, space = random.Random(11), space_of()
    uninterrupted = begun(family, space)
    uninterrupted.correct_one(row_of(space, rng), 0.5)
    restarted = restored(uninterrupted, space)
    for _ in range(20):
        row, reward = row_of(space, rng), reward_of(rng)
        assert uninterrupted.learn_one(row, reward) == restarted.learn_one(row, reward)
        assert state_of(restarted) == state_of(uninterrupted)


def test_what_it_expected_before_a_row_is_what_it_says_when_it_learns_from_it(family: type[Learner]) -> None:
    rng, space = random.Random(8), space_of()
    learner = begun(family, space)
    for _ in range(60):
        row = row_of(space, rng)
        expected = min(max(learner.predict_one(row).mean, 0.0), 1.0)
        assert learner.learn_one(row, reward_of(rng)) == pytest.approx(expected, abs=1e-9)


def test_predicting_and_exporting_change_nothing(family: type[Learner]) -> None:
    rng, space = random.Random(2), space_of()
    watched, plain = begun(family, space), begun(family, space)
    for _ in range(60):
        row, reward = row_of(space, rng), reward_of(rng)
        for learner in (watched, plain):
            learner.learn_one(row, reward)
        watched.predict_one(row_of(space, rng))
        watched.export(list(range(len(ACTIONS))))
        exported_prediction(watched, row)
    assert state_of(watched) == state_of(plain)


def test_export_equals_river_although_features_and_actions_come(family: type[Learner]) -> None:
    rng, space = random.Random(3), space_of(0, ())
    grow(space, 0)
    learner = begun(family, space)
    for step in range(100):
        grow(space, step)
        row = row_of(space, rng)
        for x in (row.x, x_of(space, {}), np.ones(1 + len(space.columns))):
            for action in range(len(space.rows)):
                asked = row._replace(x=x, action=action)
                difference = np.subtract(exported_prediction(learner, asked), learner.predict_one(asked))
                assert np.abs(difference).max() <= 1e-6
        learner.learn_one(row, reward_of(rng))


def test_order_of_first_sight_changes_nothing_but_places(family: type[Learner]) -> None:
    turned = Space()
    turned.admit_features(reversed(NAMES))
    for action in reversed(ACTIONS):
        turned.admit_action(action, TOKENS[action])
    space, rng = space_of(), random.Random(9)
    one, other = begun(family, space), begun(family, turned)
    names = list(space.columns)
    for _ in range(50):
        row, reward = row_of(space, rng), reward_of(rng)
        same = row._replace(
            action=turned.rows[ACTIONS[row.action]], x=x_of(turned, dict(zip(names, row.x[1:].tolist(), strict=True)))
        )
        assert one.predict_one(row) == pytest.approx(other.predict_one(same), abs=1e-6)
        one.learn_one(row, reward)
        other.learn_one(same, reward)


def test_export_fills_fields_of_the_published_message(family: type[Learner]) -> None:
    rng, space = random.Random(4), space_of()
    learner = begun(family, space)
    for _ in range(5):
        learner.learn_one(row_of(space, rng), reward_of(rng))
    exported = learner.export([0, 2])
    assert {*exported, *family.constants(BASE_RATE)} <= {field.name for field in GoalArrays.DESCRIPTOR.fields}
    assert all(array.dtype == np.float64 and array.shape[0] == 2 for array in exported.values())


def test_hostile_rows_leave_finite_numbers(family: type[Learner]) -> None:
    rng, space = random.Random(5), space_of()
    learner = begun(family, space)
    for i in range(2_000):
        x = np.array([1.0, *(rng.choice((-FEATURE_MAX, FEATURE_MAX)) for _ in NAMES)])
        prior = rng.choice((-PRIOR_LOG_ODDS_MAX, PRIOR_LOG_ODDS_MAX))
        learner.learn_one(Row(i % 3, x, prior, rng.choice((1.0, 20.0))), float(i % 2))
    exported = learner.export(list(range(len(ACTIONS))))
    assert all(np.isfinite(array).all() and np.abs(array).max(initial=0.0) < 100.0 for array in exported.values())


@pytest.mark.parametrize("prior_log_odds", [-3.0, 0.0, 2.0])
def test_learning_moves_the_expectation_towards_the_rewards(learning: type[Learner], prior_log_odds: float) -> None:
    space = space_of(2)
    row = Row(0, np.array([1.0, 1.0, -0.5]), prior_log_odds)
    means = []
    for reward in (0.0, 0.3, 1.0):
        learner = begun(learning, space)
        for _ in range(300):
            learner.learn_one(row, reward)
        means.append(learner.predict_one(row).mean)
    assert means == sorted(means)
    assert means == pytest.approx([0.0, 0.3, 1.0], abs=0.15)


def test_what_is_learned_is_the_difference_from_the_prior(family: type[Learner]) -> None:
    rng, space = random.Random(6), space_of(1)
    learner = begun(family, space)
    for _ in range(1_000):
        prior = rng.choice((-2.0, 1.0))
        x = np.array([1.0, rng.gauss(0.0, 1.0)])
        learner.learn_one(Row(0, x, prior), float(rng.random() < sigmoid(prior)))
    for prior in (-2.0, 1.0):
        expected = learner.predict_one(Row(0, np.array([1.0, 0.0]), prior)).mean
        assert expected == pytest.approx(sigmoid(prior), abs=0.08)


def test_a_corrected_reward_leaves_about_what_the_right_one_would_have(learning: type[Learner]) -> None:
    """Half of all successes are taken back; what is expected then is nearer to a half than to all."""
    space, row = space_of(1), Row(0, np.array([1.0, 0.5]), 0.0)
    learner, never = begun(learning, space), begun(learning, space)
    for i in range(200):
        learner.learn_one(row, 1.0)
        never.learn_one(row, float(i % 2))
    before = learner.predict_one(row).mean
    for _ in range(100):
        learner.correct_one(row, -1.0)
    after = learner.predict_one(row).mean
    assert after < before
    assert abs(after - never.predict_one(row).mean) < abs(before - never.predict_one(row).mean)


def test_an_heir_expects_what_it_inherits(family: type[Learner]) -> None:
    rng, space = random.Random(7), space_of()
    learner = begun(family, space)
    for _ in range(200):
        learner.learn_one(row_of(space, rng), reward_of(rng))
    for settings in family.choices:
        heir = learner.heir(settings)
        assert heir.settings == settings
        assert state_of(restored(heir, space)) == state_of(heir)
        before = state_of(learner)
        heir.learn_one(row_of(space, rng), 1.0)
        assert state_of(learner) == before


def test_memory_is_bounded_by_what_is_stated(family: type[Learner]) -> None:
    rng, space = random.Random(10), space_of()
    learner = begun(family, space)
    for _ in range(300):
        learner.learn_one(row_of(space, rng), reward_of(rng))
    assert len(state_of(learner)) <= 1.2 * family.size_bytes(len(ACTIONS), len(NAMES)) + 4_096
