"""The model of all actions: what one teaches says something about the others, and memory does not grow with them."""

from __future__ import annotations

import math
import random
from collections import defaultdict

import numpy as np
import pytest

from training.learners.base import Row, sigmoid
from training.learners.hashed import CURVATURE_MIN, PLACES_BITS, HashedCorrection, hash_of
from training.learners.sources import TOKENS_MAX
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

SETTINGS = HashedCorrection.choices[0]
GROUPS = ("paper", "house", "garden")


def space_of(n_features: int, n_actions: int = 1) -> Space:
    space = Space()
    space.admit_features(f"profile.f{i}" for i in range(n_features))
    for i in range(n_actions):
        space.admit_action(f"a{i}", (f"group={GROUPS[i % 3]}",))
    return space


class Plain:
    """The same by name, weight for weight, as one would write it down."""

    def __init__(self) -> None:
        self.weights: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.told: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.keep = 0.5 ** (1.0 / SETTINGS["memory_rows"])

    def parts(self, space: Space, row: Row) -> dict[tuple[str, str], float]:
        sources = ["all", list(space.rows)[row.action], *space.tokens[row.action]]
        return {
            (name, source): value
            for name, value in zip(["1", *space.columns], row.x.tolist(), strict=True)
            for source in sources
            if value
        }

    def log_odds(self, parts: dict[tuple[str, str], float], row: Row) -> float:
        return row.prior_log_odds + sum(value * self.weights[each] for each, value in parts.items())

    def move(self, parts: dict[tuple[str, str], float], row: Row, change: float, keep: float) -> None:
        before = self.log_odds(parts, row)
        spreads = {
            each: 1.0
            / (SETTINGS["own" if each[1].startswith("a") and each[1] != "all" else "shared"] + self.told[each])
            for each in parts
        }
        variance = sum(spreads[each] * value**2 for each, value in parts.items())
        low, high = min(change, 0.0), max(change, 0.0)
        for _ in range(200):
            step = 0.5 * (low + high)
            is_short = change - (sigmoid(before + variance * step) - sigmoid(before)) > step
            low, high = (step, high) if is_short else (low, step)
        chance = sigmoid(before + variance * step)
        for each, value in parts.items():
            self.weights[each] += spreads[each] * value * step
            self.told[each] = keep * (self.told[each] + max(chance * (1.0 - chance), CURVATURE_MIN) * value**2)


def test_it_learns_what_the_plain_form_does() -> None:
    space, rng, plain = space_of(6, 5), random.Random(1), Plain()
    learner = HashedCorrection(space, 0.1, SETTINGS)
    for i in range(300):
        x = np.array([1.0, *(rng.choice((0.0, rng.gauss(0.0, 2.0))) for _ in range(6))])
        row = Row(rng.randrange(5), x, rng.gauss(-1.0, 1.0))
        parts, reward = plain.parts(space, row), rng.choice((0.0, 0.3, 1.0))
        expected = sigmoid(plain.log_odds(parts, row))
        assert learner.predict_one(row).mean == pytest.approx(expected, abs=1e-9)
        if i % 5 == 4:
            learner.correct_one(row, reward - 0.5)
            plain.move(parts, row, reward - 0.5, 1.0)
        else:
            assert learner.learn_one(row, reward) == pytest.approx(expected, abs=1e-9)
            plain.move(parts, row, reward - expected, plain.keep)


@pytest.mark.parametrize("prior_log_odds", [-15.0, -3.0, 0.0, 15.0])
@pytest.mark.parametrize("reward", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [0.1, 1.0, 8.0])
def test_one_row_moves_its_own_expectation_towards_its_reward_and_never_past_it(
    prior_log_odds: float, reward: float, length: float
) -> None:
    learner = HashedCorrection(space_of(30), 0.1, SETTINGS)
    row = Row(0, np.array([1.0, *[length] * 30]), prior_log_odds)
    before = learner.predict_one(row).mean
    learner.learn_one(row, reward)
    after = learner.predict_one(row).mean
    assert min(before, reward) - 1e-9 <= after <= max(before, reward) + 1e-9


@pytest.mark.parametrize("change", [-1.0, 0.5, 1.0])
def test_a_correction_moves_no_further_than_the_reward_changed(change: float) -> None:
    learner = HashedCorrection(space_of(30), 0.1, SETTINGS)
    row = Row(0, np.array([1.0, *[8.0] * 30]), -2.0)
    before = learner.predict_one(row).mean
    learner.correct_one(row, change)
    assert 0.0 < (learner.predict_one(row).mean - before) / change <= 1.0


def test_an_action_never_seen_is_expected_to_do_as_others_with_its_tokens_do() -> None:
    """30 actions are learned from and 30 others judged by; what a feature does follows from the group."""
    space, rng, prior = space_of(4, 60), random.Random(2), -1.0
    effects = {name: [rng.gauss(0.0, 1.0) for _ in range(5)] for name in GROUPS}
    learner = HashedCorrection(space, 0.3, SETTINGS)
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


def test_what_was_learned_gives_way_when_the_world_turns_round() -> None:
    settings = next(choice for choice in HashedCorrection.choices if choice["memory_rows"] == 1_000)
    rng, learner = random.Random(7), HashedCorrection(space_of(1), 0.5, settings)
    for i in range(6_000):
        x, is_turned = rng.choice((-1.0, 1.0)), i >= 3_000
        reward = float((rng.random() < 0.8) == ((x > 0.0) != is_turned))
        learner.learn_one(Row(0, np.array([1.0, x]), 0.0), reward)
    assert learner.predict_one(Row(0, np.array([1.0, 1.0]), 0.0)).mean < 0.35


def test_thousands_of_actions_fit_in_what_one_takes() -> None:
    space, rng = space_of(3, 5_000), random.Random(4)
    learner = HashedCorrection(space, 0.1, SETTINGS)
    for action in range(5_000):
        x = np.array([1.0, *(rng.gauss(0.0, 1.0) for _ in range(3))])
        learner.learn_one(Row(action, x, -2.0), float(action % 7 == 0))
    state = MemberState()
    learner.save(state)
    places = np.frombuffer(state.hashed.places, np.uint32)
    n_weights = 4 * (5_000 + len(GROUPS) + 1)
    n_apart = (1 << PLACES_BITS) * -math.expm1(-n_weights / (1 << PLACES_BITS))
    assert places.size == pytest.approx(n_apart, rel=0.01), "as many share a place as when places are drawn"
    assert state.ByteSize() <= 20 << PLACES_BITS


def test_an_action_whose_tokens_change_does_as_those_of_the_new_ones() -> None:
    space = space_of(1, 3)
    learner = HashedCorrection(space, 0.5, SETTINGS)
    for _ in range(100):
        learner.learn_one(Row(0, np.array([1.0, 0.5]), 0.0), 1.0)
    row = Row(1, np.array([1.0, 0.5]), 0.0)
    before = learner.predict_one(row).mean
    learner.learn_one(row, before)  # expected: teaches nothing
    space.admit_action("a1", ("group=paper",))
    assert learner.predict_one(row).mean > before + 0.05
    assert learner.learn_one(row, 1.0) == pytest.approx(learner.predict_one(row).mean, abs=0.2)


def test_tokens_said_twice_and_beyond_the_limit_count_for_nothing() -> None:
    tokens = tuple(f"t{i}" for i in range(TOKENS_MAX))
    row = Row(0, np.array([1.0, 0.5]), 0.0)
    expected = []
    for admitted in (tokens, (tokens[0], *tokens, "more")):
        space = space_of(1, 0)
        space.admit_action("book", admitted)
        learner = HashedCorrection(space, 0.5, SETTINGS)
        expected += [learner.learn_one(row, 1.0), learner.learn_one(row, 1.0)]
    assert expected[:2] == expected[2:]


def test_hashes_follow_from_names_alone() -> None:
    """State on disk is laid out by them: other numbers here would make nonsense of every snapshot."""
    assert hash_of("profile.age") == 0xCDE169E7C0622087


def test_actions_are_exported_alike_together_and_alone() -> None:
    space, rng = space_of(3, 5), random.Random(8)
    space.admit_action("alone")
    learner = HashedCorrection(space, 0.1, SETTINGS)
    for _ in range(50):
        learner.learn_one(
            Row(rng.randrange(4), np.array([1.0, *(rng.gauss(0.0, 1.0) for _ in range(3))]), -1.0),
            rng.choice((0.0, 1.0)),
        )
    together, alone = learner.export([5, 1, 4, 0]), [learner.export([action]) for action in (5, 1, 4, 0)]
    for field, array in together.items():
        assert array == pytest.approx(np.concatenate([one[field] for one in alone]), abs=1e-12)
        assert learner.export([])[field].shape == (0, *array.shape[1:])
