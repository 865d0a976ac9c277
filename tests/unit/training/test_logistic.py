"""The logistic correction: one row never carries it past the mark, and it follows a world that turns round."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.learners.base import Row
from training.learners.logistic import LogisticCorrection
from training.space import Space


def space_of(n_features: int) -> Space:
    space = Space()
    space.admit_features(f"profile.f{i}" for i in range(n_features))
    space.admit_action("book")
    return space


@pytest.mark.parametrize("prior_log_odds", [-15.0, -3.0, 0.0, 15.0])
@pytest.mark.parametrize("reward", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [0.1, 1.0, 8.0])
def test_one_row_moves_its_own_expectation_towards_its_reward_and_never_past_it(
    prior_log_odds: float, reward: float, length: float
) -> None:
    learner = LogisticCorrection(space_of(30), 0.1, LogisticCorrection.choices[0])
    row = Row(0, np.array([1.0, *[length] * 30]), prior_log_odds)
    before = learner.predict_one(row).mean
    learner.learn_one(row, reward)
    after = learner.predict_one(row).mean
    assert min(before, reward) - 1e-9 <= after <= max(before, reward) + 1e-9
    assert abs(reward - after) <= abs(reward - before)


def test_what_was_learned_gives_way_when_the_world_turns_round() -> None:
    settings = {"precision": 10.0, "memory_rows": 1_000}
    rng, learner = random.Random(7), LogisticCorrection(space_of(1), 0.5, settings)
    for i in range(6_000):
        x, is_turned = rng.choice((-1.0, 1.0)), i >= 3_000
        reward = float((rng.random() < 0.8) == ((x > 0.0) != is_turned))
        learner.learn_one(Row(0, np.array([1.0, x]), 0.0), reward)
    assert learner.predict_one(Row(0, np.array([1.0, 1.0]), 0.0)).mean < 0.35


def test_an_heir_of_another_precision_is_what_it_would_have_been() -> None:
    """With every row of the same weight, the prior's precision and the rows' add up whenever they are put together."""
    space, rng = space_of(3), random.Random(3)
    first = LogisticCorrection(space, 0.5, LogisticCorrection.choices[0])
    rows = [Row(0, np.array([1.0, *(rng.gauss(0.0, 1.0) for _ in range(3))]), 0.0) for _ in range(50)]
    for row in rows:
        first.learn_one(row, float(row.x[1] > 0.0))
    heir = first.heir(LogisticCorrection.choices[1]).heir(LogisticCorrection.choices[0])
    for row in rows:
        assert heir.predict_one(row).mean == pytest.approx(first.predict_one(row).mean, abs=1e-9)
    narrow = first.heir(LogisticCorrection.choices[1])
    for learner in (first, narrow):
        learner.learn_one(rows[0]._replace(x=-5.0 * rows[0].x), 1.0)
    moved = [abs(each.predict_one(rows[0]).mean - heir.predict_one(rows[0]).mean) for each in (first, narrow)]
    assert moved[1] < moved[0], "a narrower prior moves less"
