"""The factorisation machine: few factors tell actions of a kind apart, and one row never carries it past the mark."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from river import facto

from server.catalog.catalog import Doubles
from training.learners.base import Row, sigmoid
from training.learners.factorised import (
    CURVATURE_MIN,
    FACTOR_PRECISION,
    RANK_MAX,
    WEIGHT_PRECISION,
    FactorisedCorrection,
    first_factors,
)
from training.learners.logistic import LogisticCorrection
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

SETTINGS = FactorisedCorrection.choices[0]
RANK = int(SETTINGS["rank"])
GROUPS = ("paper", "house", "garden")


def space_of(n_features: int, n_actions: int = 1, *, is_grouped: bool = False) -> Space:
    space = Space()
    space.admit_features(f"profile.f{i}" for i in range(n_features))
    for i in range(n_actions):
        space.admit_action(f"a{i}", (f"group={GROUPS[i % 3]}",) if is_grouped else ())
    return space


def random_row(rng: random.Random, n_features: int, n_actions: int) -> Row:
    x = np.array([1.0, *(rng.choice((0.0, rng.gauss(0.0, 2.0))) for _ in range(n_features))])
    return Row(rng.randrange(n_actions), x, rng.gauss(-1.0, 1.0))


def numbers_of(learner: FactorisedCorrection) -> tuple[Doubles, dict[str, Doubles]]:
    """Return what it saves: of the columns, and of the sources by name, float64[..., 2, 1 + rank]."""
    state = MemberState()
    learner.save(state)
    shape = (-1, 2, 1 + int(learner.settings["rank"]))
    sources = np.frombuffer(state.factorised.sources).reshape(shape)
    return (
        np.frombuffer(state.factorised.columns).reshape(shape),
        dict(zip(state.factorised.source_names, sources, strict=True)),
    )


def moved(values: Doubles, told: Doubles, prior: Doubles, slopes: Doubles, before: float, change: float) -> float:
    """Move numbers, all that is linear, in place, and return what is left of the change: the plain form of a half."""
    spreads = 1.0 / (prior + told)
    variance = float(spreads @ slopes**2)
    low, high = min(change, 0.0), max(change, 0.0)
    for _ in range(200):
        step = 0.5 * (low + high)
        is_short = change - (sigmoid(before + variance * step) - sigmoid(before)) > step
        low, high = (step, high) if is_short else (low, step)
    chance = sigmoid(before + variance * step)
    values += spreads * slopes * step
    told += max(chance * (1.0 - chance), CURVATURE_MIN) * slopes**2 * (slopes != 0.0)
    return step


@pytest.mark.parametrize("is_corrected", [False, True])
def test_it_learns_what_the_plain_form_does(is_corrected: bool) -> None:
    settings = {**SETTINGS, "memory_rows": 1e12}  # nothing is forgotten
    space, rng = space_of(5, 4, is_grouped=True), random.Random(1)
    learner = FactorisedCorrection(space, 0.1, settings)
    for _ in range(30):
        learner.learn_one(random_row(rng, 5, 4), rng.choice((0.0, 1.0)))
    row, change = random_row(rng, 5, 4), 0.4
    columns, sources = numbers_of(learner)
    own = [sources[name] for name in (f"action a{row.action}", f"token group={GROUPS[row.action % 3]}")]
    x, factors = row.x, columns[1:, :, 1:]
    mixed = np.append(1.0, x[1:] @ factors[:, 0])
    values = np.concatenate([columns[:, 0, 0], own[0][0], own[1][0]])
    told = np.concatenate([columns[:, 1, 0], own[0][1], own[1][1]])
    slopes = np.concatenate([x, mixed, mixed])
    prior = np.concatenate([np.full(x.size, WEIGHT_PRECISION), np.full(2 * mixed.size, SETTINGS["precision"])])
    before = row.prior_log_odds + float(values @ slopes)
    left = moved(values, told, prior, slopes, before, change if is_corrected else 1.0 - sigmoid(before))
    between = row.prior_log_odds + float(values @ slopes)
    total = values[x.size :].reshape(2, -1).sum(axis=0)[1:]
    flat, flat_told = factors[:, 0].flatten(), factors[:, 1].flatten()
    flat_prior = np.full(flat.size, FACTOR_PRECISION)
    moved(flat, flat_told, flat_prior, np.outer(x[1:], total).flatten(), between, left)

    if is_corrected:
        learner.correct_one(row, change)
    else:
        assert learner.learn_one(row, 1.0) == pytest.approx(sigmoid(before), abs=1e-9)
    columns, sources = numbers_of(learner)
    own = [sources[name] for name in (f"action a{row.action}", f"token group={GROUPS[row.action % 3]}")]
    assert columns[1:, 0, 1:].flatten() == pytest.approx(flat, abs=1e-8)
    assert columns[1:, 1, 1:].flatten() == pytest.approx(flat_told, abs=1e-8)
    assert np.concatenate([columns[:, 0, 0], own[0][0], own[1][0]]) == pytest.approx(values, abs=1e-8)
    assert np.concatenate([columns[:, 1, 0], own[0][1], own[1][1]]) == pytest.approx(told, abs=1e-8)


def test_the_pairs_left_out_say_nothing_about_the_order_of_actions() -> None:
    """River's machine, pairs of features and all, puts the same distance between any two actions."""
    space, rng = space_of(5, 2), random.Random(3)
    learner = FactorisedCorrection(space, 0.1, SETTINGS)
    for _ in range(200):
        learner.learn_one(random_row(rng, 5, 2), rng.choice((0.0, 1.0)))
    columns, sources = numbers_of(learner)
    river = facto.FMClassifier(n_factors=RANK)
    named = {**dict(zip(["1", *space.columns], columns, strict=True)), **sources}
    river.weights.update({name: numbers[0, 0] for name, numbers in named.items()})
    river.latents.update({name: numbers[0, 1:] for name, numbers in named.items()})
    for _ in range(20):
        row = random_row(rng, 5, 2)
        features = dict(zip(["1", *space.columns], row.x.tolist(), strict=True))
        gaps = []
        for action in range(2):
            whole = river.predict_proba_one({**features, f"action a{action}": 1.0})  # type: ignore[no-untyped-call]
            ours = learner.predict_one(row._replace(action=action)).mean
            gaps.append(math.log(ours / (1.0 - ours)) - math.log(whole[True] / whole[False]))
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-6)


@pytest.mark.parametrize("prior_log_odds", [-15.0, -3.0, 0.0, 15.0])
@pytest.mark.parametrize("reward", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [0.1, 1.0, 8.0])
def test_a_row_moves_its_own_expectation_towards_its_reward_and_never_past_it(
    prior_log_odds: float, reward: float, length: float
) -> None:
    learner = FactorisedCorrection(space_of(30), 0.1, SETTINGS)
    row = Row(0, np.array([1.0, *[length] * 30]), prior_log_odds)
    for _ in range(3):  # from the second on, factors of features move too
        before = learner.predict_one(row).mean
        learner.learn_one(row, reward)
        after = learner.predict_one(row).mean
        assert min(before, reward) - 1e-9 <= after <= max(before, reward) + 1e-9


def test_nothing_but_the_prior_is_expected_at_first() -> None:
    learner = FactorisedCorrection(space_of(5, 2), 0.1, SETTINGS)
    row = random_row(random.Random(4), 5, 2)
    assert learner.predict_one(row).mean == pytest.approx(sigmoid(row.prior_log_odds), abs=1e-12)


def test_few_rows_of_an_action_do_when_two_numbers_tell_actions_apart() -> None:
    """100 actions of 80 rows each; 20 features of which two mixtures matter. One model an action cannot know that."""
    space, rng = space_of(20, 100), np.random.default_rng(5)
    effects = rng.normal(0.0, 1.0, (100, 2)) @ rng.normal(0.0, 0.5, (2, 20))
    ours, apart = (
        FactorisedCorrection(space, 0.3, SETTINGS),
        LogisticCorrection(space, 0.3, LogisticCorrection.choices[0]),
    )
    losses = np.zeros(2)
    for i in range(8_000):
        x = np.append(1.0, rng.normal(size=20))
        row = Row(int(rng.integers(100)), x, -1.0)
        reward = float(rng.random() < sigmoid(-1.0 + float(effects[row.action] @ x[1:])))
        chances = np.array([learner.learn_one(row, reward) for learner in (ours, apart)])
        losses -= np.log(np.abs(1.0 - reward - chances)) * (i >= 4_000)
    assert losses[0] < 0.95 * losses[1]


def test_an_action_never_seen_is_expected_to_do_as_others_with_its_tokens_do() -> None:
    space, rng, prior = space_of(4, 60, is_grouped=True), random.Random(2), -1.0
    effects = {name: [rng.gauss(0.0, 1.0) for _ in range(5)] for name in GROUPS}
    learner = FactorisedCorrection(space, 0.3, SETTINGS)
    ours, baseline = 0.0, 0.0
    for i in range(4_000):
        is_judged = i >= 3_000
        action = rng.randrange(30) + 30 * is_judged
        x = np.array([1.0, *(rng.gauss(0.0, 1.0) for _ in range(4))])
        row = Row(action, x, prior)
        reward = float(rng.random() < sigmoid(prior + float(np.dot(effects[GROUPS[action % 3]], x))))
        if is_judged:
            ours -= math.log(abs(1.0 - reward - learner.predict_one(row).mean))
            baseline -= math.log(abs(1.0 - reward - sigmoid(prior)))
        else:
            learner.learn_one(row, reward)
    assert ours < 0.8 * baseline


def test_an_heir_of_more_factors_expects_the_same_and_one_of_fewer_keeps_the_strongest() -> None:
    space, rng = space_of(6, 4), random.Random(6)
    learner = FactorisedCorrection(space, 0.1, SETTINGS)
    for _ in range(300):
        row = random_row(rng, 6, 4)
        learner.learn_one(row, float(row.x[1 + row.action] > 0.0))
    wide, narrow = (
        learner.heir(next(choice for choice in learner.choices if choice["rank"] == rank)) for rank in (RANK_MAX, 4)
    )
    misses = []
    for _ in range(50):
        row = random_row(rng, 6, 4)
        expected = learner.predict_one(row).mean
        assert wide.predict_one(row).mean == pytest.approx(expected, abs=1e-12)
        misses.append((abs(narrow.predict_one(row).mean - expected), abs(sigmoid(row.prior_log_odds) - expected)))
    assert np.mean(misses, axis=0)[0] < np.mean(misses, axis=0)[1], "nearer to it than to the prior"


def test_first_factors_follow_from_names_alone_and_differ() -> None:
    """A replay begins with them again: other numbers here would make another state of the same log."""
    ages = first_factors("profile.age", 4)
    assert ages == pytest.approx([-0.01069391651852, 0.02005594909889, -0.20143049399058, 0.06105040108831], abs=1e-12)
    drawn = np.array([first_factors(f"profile.f{i}", RANK_MAX) for i in range(500)])
    assert np.abs(drawn.mean(axis=0)).max() < 0.02
    assert (drawn**2).sum(axis=1).mean() == pytest.approx(0.09, rel=0.05)


def test_actions_are_exported_alike_together_and_alone() -> None:
    space, rng = space_of(3, 5, is_grouped=True), random.Random(8)
    space.admit_action("alone")
    learner = FactorisedCorrection(space, 0.1, SETTINGS)
    for _ in range(50):
        learner.learn_one(random_row(rng, 3, 4), rng.choice((0.0, 1.0)))
    together, alone = learner.export([5, 1, 4, 0]), [learner.export([action]) for action in (5, 1, 4, 0)]
    for field, array in together.items():
        assert array == pytest.approx(np.concatenate([one[field] for one in alone]), abs=1e-12)
        assert learner.export([])[field].shape == (0, *array.shape[1:])
