"""The logistic correction: one row never carries it past the mark, and it follows a world that turns round."""

from __future__ import annotations

import random

import pytest

from training.learners.logistic import MEMORY_ROWS, LogisticCorrection


@pytest.mark.parametrize("prior_log_odds", [-15.0, -3.0, 0.0, 15.0])
@pytest.mark.parametrize("reward", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [0.1, 1.0, 8.0])
def test_one_row_moves_its_own_expectation_towards_its_reward_and_never_past_it(
    prior_log_odds: float, reward: float, length: float
) -> None:
    learner, features = LogisticCorrection(0.1), {f"profile.f{i}": length for i in range(30)}
    before = learner.predict_one(features, prior_log_odds).mean
    learner.learn_one(features, prior_log_odds, reward)
    after = learner.predict_one(features, prior_log_odds).mean
    assert min(before, reward) - 1e-9 <= after <= max(before, reward) + 1e-9
    assert abs(reward - after) <= abs(reward - before)


@pytest.mark.slow
def test_what_was_learned_gives_way_when_the_world_turns_round() -> None:
    rng, learner = random.Random(7), LogisticCorrection(0.5)
    for i in range(6 * MEMORY_ROWS):
        x, is_turned = rng.choice((-1.0, 1.0)), i >= 3 * MEMORY_ROWS
        learner.learn_one({"profile.f0": x}, 0.0, float((rng.random() < 0.8) == ((x > 0.0) != is_turned)))
    assert learner.predict_one({"profile.f0": 1.0}, 0.0).mean < 0.35
