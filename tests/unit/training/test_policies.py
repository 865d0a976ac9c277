"""Learners of policies from rows that were chosen with unlike chances: weighted regression and softmax."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from training.learners.base import Learner, Row
from training.learners.logistic import LogisticCorrection
from training.learners.softmax import ACTIONS_MAX, SoftmaxPolicy, _step
from training.learners.weighted import WeightedCorrection
from training.space import Space

PLAIN, OTHER = 0, 1
World = Mapping[float, float]  # by the person's number: how likely the other action succeeds; the plain one always 0.5


def space_of(n_features: int = 1, n_actions: int = 2) -> Space:
    space = Space()
    space.admit_features(f"profile.f{i}" for i in range(n_features))
    for i in range(n_actions):
        space.admit_action(f"action_{i}")
    return space


def begun(family: type[Learner], space: Space) -> Learner:
    return family(space, 0.5, family.choices[0])


def teach(learner: Learner, world: World, shares: World, chance_of_other: Callable[[float], float], seed: int) -> None:
    """Teach 4,000 rows of people met with these shares, to whom the other action was said with a chance of theirs."""
    rng = random.Random(seed)
    for _ in range(4_000):
        (x,) = rng.choices(list(shares), list(shares.values()))
        chance = chance_of_other(x)
        action = OTHER if rng.random() < chance else PLAIN
        weight = 1.0 / (chance if action == OTHER else 1.0 - chance)
        reward = rng.random() < (world[x] if action == OTHER else 0.5)
        learner.learn_one(Row(action, np.array([1.0, x]), 0.0, min(weight, 20.0)), float(reward))


def chosen(learner: Learner, x: float) -> int:
    means = [learner.predict_one(Row(action, np.array([1.0, x]), 0.0)).mean for action in (PLAIN, OTHER)]
    return means.index(max(means))


def earned(learner: Learner, world: World, shares: World) -> float:
    """Return how often always the likeliest action succeeds more than the plain one does."""
    return sum(share * (world[x] - 0.5) for x, share in shares.items() if chosen(learner, x) == OTHER)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", [WeightedCorrection, SoftmaxPolicy])
def test_weights_correct_what_a_biased_choice_has_done_to_a_line(family: type[Learner], seed: int) -> None:
    """The other action is nearly always said to people above 0, where it gets better with their number.

    The line through them has it fail below 0, where it does well; the line for all people has not.
    """
    world, shares = {-2.0: 0.9, -1.0: 0.8, 1.0: 0.4, 2.0: 0.8}, dict.fromkeys((-2.0, -1.0, 1.0, 2.0), 0.25)
    plain, weighing = begun(LogisticCorrection, space_of()), begun(family, space_of())
    for learner in (plain, weighing):
        teach(learner, world, shares, lambda x: 0.95 if x > 0.0 else 0.05, seed)
    assert earned(weighing, world, shares) > earned(plain, world, shares) + 0.05


@pytest.mark.parametrize("seed", range(5))
def test_a_policy_is_right_where_it_decides_although_no_line_tells_how_likely_success_is(seed: int) -> None:
    """A few people far out, to whom the other action should not be said, turn the line round for everybody."""
    world, shares = {-1.0: 0.3, 1.0: 0.7, 8.0: 0.1}, {-1.0: 0.45, 1.0: 0.45, 8.0: 0.1}
    regression, policy = begun(WeightedCorrection, space_of()), begun(SoftmaxPolicy, space_of())
    for learner in (regression, policy):
        teach(learner, world, shares, lambda x: 0.5, seed)
    best_of_lines = 0.45 * 0.2 - 0.1 * 0.4
    assert earned(policy, world, shares) == pytest.approx(best_of_lines)
    assert earned(regression, world, shares) < best_of_lines / 2


def test_rows_that_all_weigh_the_same_teach_what_unweighted_ones_do() -> None:
    space, rng = space_of(3), random.Random(2)
    plain, weighing = begun(LogisticCorrection, space), begun(WeightedCorrection, space)
    for _ in range(300):
        row = Row(rng.randrange(2), np.array([1.0, *(rng.gauss(0.0, 1.0) for _ in range(3))]), -1.0, 7.0)
        reward = float(rng.random() < 0.3)
        assert weighing.learn_one(row, reward) == pytest.approx(plain.learn_one(row, reward), abs=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.4, 1.0])
def test_no_weight_carries_a_row_past_its_own_reward(reward: float) -> None:
    learner = begun(WeightedCorrection, space_of(20))
    row = Row(0, np.array([1.0, *[3.0] * 20]), -3.0, 1.0)
    for _ in range(5):
        learner.learn_one(row, 1.0 - reward)
    heavy = row._replace(weight=20.0)
    before = learner.predict_one(heavy).mean
    learner.learn_one(heavy, reward)
    after = learner.predict_one(heavy).mean
    assert min(before, reward) - 1e-9 <= after <= max(before, reward) + 1e-9


def test_a_step_is_along_the_gradient_of_chance_and_entropy() -> None:
    rng = np.random.default_rng(4)
    x, preferences, gain, temperature = rng.normal(size=3), rng.normal(size=(3, 4)), 1.7, 0.3

    def objective(given: np.ndarray) -> float:
        chances = np.exp(x @ given) / np.exp(x @ given).sum()
        return float(gain * chances[2] - temperature * (chances * np.log(chances)).sum())

    gradient = np.zeros_like(preferences)
    for place in np.ndindex(*preferences.shape):
        up, down = preferences.copy(), preferences.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        gradient[place] = (objective(up) - objective(down)) / 2e-6
    chances = np.exp(x @ preferences) / np.exp(x @ preferences).sum()
    moved, squares = preferences.copy(), np.zeros(4)
    _step(x, 2, gain, temperature, 1.0, chances, np.log(chances), moved, squares)
    lengths = math.sqrt(x @ x) * np.sqrt(1.0 + squares)
    np.testing.assert_allclose((moved - preferences) * lengths, gradient, atol=1e-7)
    np.testing.assert_allclose(squares * (x @ x), (gradient**2).sum(axis=0), atol=1e-7)


def test_a_policy_stays_within_its_actions_and_the_rest_have_the_level_of_all() -> None:
    space = space_of(1, ACTIONS_MAX + 2)
    learner, rng = begun(SoftmaxPolicy, space), random.Random(3)
    for i in range(2 * ACTIONS_MAX + 200):
        learner.learn_one(Row(i % (ACTIONS_MAX + 2), np.array([1.0, rng.gauss(0.0, 1.0)]), 0.0, 20.0), float(i % 2))
    exported = learner.export(range(ACTIONS_MAX + 2))
    assert np.count_nonzero(exported["correction_weights"]) == ACTIONS_MAX
    last = exported["correction_intercepts"][ACTIONS_MAX:]
    assert last[0] == last[1]
    assert list(learner.seen) == list(range(ACTIONS_MAX + 2))
