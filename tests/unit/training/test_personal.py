"""How much people differ is learned from what decisions recorded, and believed only where it shows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.catalog.catalog import Goal
from training.personal import STRENGTHS, Personal
from training.rewards import Lesson
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays

GOAL = Goal("visit", {"click": 1.0}, 1_000_000, 0.0, math.log(0.1 / 0.9))
NAMES = ("a", "b", "c")


def lesson(reward: float, general: float, history: tuple[float, float, float, float]) -> Lesson:
    return Lesson(GOAL, "a", (), b"", 0.0, reward, general_propensity=general, history=history)


def lived(of_people: float, of_actions: float, n_people: int = 150, n_shown: int = 60, seed: int = 1) -> Personal:
    """Learn from people whose own factors are drawn with these strengths, each shown three actions in turn."""
    rng, personal = np.random.default_rng(seed), Personal()
    expected, observed = np.zeros((n_people, 3)), np.zeros((n_people, 3))
    people = np.ones(n_people) if math.isinf(of_people) else rng.gamma(of_people, 1.0 / of_people, n_people)
    factors = (
        np.ones((n_people, 3)) if math.isinf(of_actions) else rng.gamma(of_actions, 1.0 / of_actions, (n_people, 3))
    )
    factors *= people[:, np.newaxis]
    for turn in range(n_shown):
        for person in range(n_people):
            action, general = turn % 3, float(rng.uniform(0.02, 0.12))
            reward = float(rng.random() < min(general * factors[person, action], 1.0))
            history = (
                expected[person, action], observed[person, action], expected[person].sum(), observed[person].sum()
            )  # fmt: skip
            personal.learn(lesson(reward, general, history))
            expected[person, action] += general
            observed[person, action] += reward
    return personal


@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_strength_of_groups_comes_near_the_true_one(strength: float) -> None:
    group, action = lived(strength, math.inf).strengths("visit")
    assert strength / 2 <= group <= strength * 2
    assert action >= 32.0, "within a group people were shown to differ in nothing"


def test_strength_of_actions_comes_near_the_true_one() -> None:
    group, action = lived(math.inf, 1.0).strengths("visit")
    assert 0.5 <= action <= 2.0
    assert group >= 2.0


@pytest.mark.parametrize(
    ("general", "history"),
    [
        (math.nan, (1.0, 3.0, 2.0, 6.0)),
        (0.1, (1.0, 3.0, math.nan, 6.0)),
        (0.1, (1.0, math.nan, 2.0, 6.0)),
        (0.1, (1.0, math.inf, 2.0, math.inf)),
        (0.1, (1e300, 1e300, 1e308, 1e308)),
    ],
)
def test_numbers_that_are_none_teach_nothing(general: float, history: tuple[float, float, float, float]) -> None:
    personal = lived(1.0, math.inf)
    before = personal.save()
    personal.learn(lesson(1.0, general, history))
    assert personal.save() == before


def test_where_people_do_not_differ_their_history_gets_no_say() -> None:
    for seed in range(3):
        assert lived(math.inf, math.inf, seed=seed).strengths("visit") == (math.inf, math.inf)


def test_little_evidence_changes_nothing() -> None:
    personal = Personal()
    assert personal.strengths("visit") == (math.inf, math.inf)
    personal.learn(lesson(1.0, 0.1, (0.5, 3.0, 0.5, 3.0)))
    assert personal.strengths("visit") == (math.inf, math.inf)
    for _ in range(20):
        personal.learn(lesson(1.0, 0.1, (0.5, 3.0, 0.5, 3.0)))
    assert min(personal.strengths("visit")) < 2.0


def test_pair_that_was_best_long_ago_gives_way() -> None:
    personal = Personal()
    for _ in range(100):
        personal.learn(lesson(1.0, 0.1, (1.0, 4.0, 1.0, 4.0)))
    assert min(personal.strengths("visit")) < 2.0
    for turn in range(12_000):
        personal.learn(lesson(float(turn % 10 == 0), 0.1, (1.0, 4.0, 1.0, 4.0)))
    assert personal.strengths("visit") == (math.inf, math.inf)


def test_lessons_without_history_or_from_before_it_was_kept_teach_nothing() -> None:
    personal = Personal()
    personal.learn(lesson(1.0, 0.1, (0.0, 0.0, 0.0, 0.0)))
    personal.learn(lesson(1.0, 0.0, (1.0, 1.0, 1.0, 1.0)))
    assert personal.save() == []


def test_restart_from_a_snapshot_goes_on_bit_for_bit() -> None:
    whole, rng = Personal(), np.random.default_rng(3)
    lessons = [
        lesson(float(rng.random() < 0.2), float(rng.uniform(0.01, 0.9)), tuple(rng.gamma(1.0, 1.0, 4).tolist()))
        for _ in range(200)
    ]
    for each in lessons:
        whole.learn(each)
    for cut in (0, 1, 77, 200):
        first, second = Personal(), Personal()
        for each in lessons[:cut]:
            first.learn(each)
        second.load(first.save())
        for each in lessons[cut:]:
            second.learn(each)
        assert second.save() == whole.save()


def test_absurd_histories_leave_the_sums_finite() -> None:
    personal = Personal()
    for general in (1e-30, 1.0, 5.0):
        for history in ((0.0, 1e9, 1e-9, 1e9), (1e9, 0.0, 1e9, 0.0)):
            for reward in (0.0, 0.5, 1.0):
                personal.learn(lesson(reward, general, history))
    (state,) = personal.save()
    assert np.isfinite(np.frombuffer(state.losses)).all()
    assert len(state.losses) == 8 * len(STRENGTHS) ** 2


def test_finite_strengths_are_published_and_infinite_ones_left_out() -> None:
    personal = lived(1.0, math.inf, n_people=60)
    arrays = LearnerArrays(goals=[GoalArrays(goal="visit"), GoalArrays(goal="sale")])
    personal.export(arrays)
    group, action = personal.strengths("visit")
    assert arrays.goals[0].group_strength == group < math.inf
    assert arrays.goals[0].personal_strength == (action if action < math.inf else 0.0)
    assert (arrays.goals[1].group_strength, arrays.goals[1].personal_strength) == (0.0, 0.0)
