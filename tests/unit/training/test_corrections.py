"""A reward that is replaced is told to those that learned the row, and to nobody who began since."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from server.catalog.catalog import Goal
from training import standing
from training.fleet import Fleet
from training.learners.base import Row, log_odds_of, sigmoid
from training.rewards import Lesson
from tsugi.log.v1.learner_pb2 import GoalState, LearnerSnapshot
from tsugi.v1.model_pb2 import LearnerRole

RATE = 0.05
PRIOR = math.log(RATE / (1.0 - RATE))
GOAL = Goal("sale", {}, 1_000_000, 0.0, PRIOR)
NAMES = tuple(f"profile.f{i}" for i in range(6))
SQUARES = [standing.LOSS_SQUARES, standing.LEAD_SQUARES]
NUMBERS = np.random.default_rng(1)


def lessons(n: int) -> Iterator[Lesson]:
    for i in range(n):
        features = NUMBERS.normal(size=len(NAMES)).astype("<f4").tobytes()
        yield Lesson(GOAL, ("book", "lamp")[i % 2], NAMES, features, PRIOR, 0.1 if i % 4 == 0 else 0.0)


def taught(n: int, fleet: Fleet | None = None) -> tuple[Fleet, list[Lesson]]:
    """Teach rows, and return lessons that replace every reward by 1."""
    fleet = fleet or Fleet()
    fleet.meet([GOAL], NAMES, {"book": (), "lamp": ()})
    first = list(lessons(n))
    rows = [fleet.learn(lesson) for lesson in first]
    return fleet, [
        lesson._replace(reward=1.0, taught=lesson.reward, row=row) for lesson, row in zip(first, rows, strict=True)
    ]


def state_of(fleet: Fleet) -> GoalState:
    return fleet.goals["sale"].save()


def test_rows_of_a_goal_are_numbered_from_one() -> None:
    _, replaced = taught(5)
    assert [lesson.row for lesson in replaced] == [1, 2, 3, 4, 5]


def test_after_a_reset_what_was_learned_before_it_is_not_corrected() -> None:
    fleet, replaced = taught(200)
    fleet.reset(role=LearnerRole.LEARNER_ROLE_ALL)
    before = state_of(fleet)
    for lesson in replaced:
        fleet.learn(lesson)
    assert state_of(fleet) == before


def test_a_reset_of_challengers_leaves_corrections_to_the_others() -> None:
    fleet, replaced = taught(200)
    goal = fleet.goals["sale"]
    fleet.reset(role=LearnerRole.LEARNER_ROLE_CHALLENGER)
    before = state_of(fleet)
    for lesson in replaced:
        fleet.learn(lesson)
    changed = {old.number for old, new in zip(before.members, state_of(fleet).members, strict=True) if old != new}
    assert changed == {0, goal.serving.number, goal.posterior.number}, "the baseline is judged by it"
    _, later = taught(1, fleet)
    before = state_of(fleet)
    fleet.learn(later[0])
    changed = {old.number for old, new in zip(before.members, state_of(fleet).members, strict=True) if old != new}
    assert changed == {member.number for member in goal.members}


def test_who_knows_of_a_row_survives_a_restart() -> None:
    fleet, replaced = taught(200)
    fleet.reset(role=LearnerRole.LEARNER_ROLE_CHALLENGER)
    snapshot = LearnerSnapshot()
    fleet.save(snapshot)
    restored = Fleet()
    restored.load(LearnerSnapshot.FromString(snapshot.SerializeToString()))
    for each in (fleet, restored):
        for lesson in replaced:
            each.learn(lesson)
    assert state_of(restored) == state_of(fleet)


@pytest.mark.parametrize("n_before", [0, 300])
def test_learners_come_to_the_rate_of_now_whatever_becomes_of_rows_before_a_reset(n_before: int) -> None:
    fleet, replaced = taught(n_before)
    fleet.reset(role=LearnerRole.LEARNER_ROLE_ALL)
    for lesson in replaced:
        fleet.learn(lesson)
    taught(400, fleet)
    row = Row(0, np.append(1.0, np.zeros(len(NAMES))), PRIOR)
    for member in fleet.goals["sale"].members[2:]:
        assert member.learner.predict_one(row).mean < 2.0 * RATE, member.learner.family


def test_an_heir_is_told_of_rows_that_its_forebear_learned() -> None:
    fleet, replaced = taught(1_024)
    goal = fleet.goals["sale"]
    heirs = [member for member in goal.members if member.begun_lsn == 0 and member.begun_row == 0 and member.number > 5]
    assert heirs, "the first round is over"
    before = state_of(fleet)
    fleet.learn(replaced[-1])
    changed = {old.number for old, new in zip(before.members, state_of(fleet).members, strict=True) if old != new}
    assert {heir.number for heir in heirs} <= changed


@pytest.mark.parametrize("delay", [0, 50])
def test_learners_are_judged_and_mended_by_what_rewards_come_to(delay: int) -> None:
    """Half of all rows are 0.1 at first and 1 soon after; who says so is right, whatever was taught first."""
    numbers, fleet, waiting = np.random.default_rng(3), Fleet(), list[Lesson]()
    fleet.meet([GOAL], NAMES, {"book": (), "lamp": ()})
    for lesson in lessons(4_000):
        first = lesson._replace(reward=0.1 if numbers.random() < 0.8 else 0.0)
        row = fleet.learn(first)
        if first.reward and numbers.random() < 0.5:
            waiting.append(first._replace(reward=1.0, taught=0.1, row=row))
        if len(waiting) > delay:
            fleet.learn(waiting.pop(0))
    goal = fleet.goals["sale"]
    row_of_mean = Row(0, np.append(1.0, np.zeros(len(NAMES))), PRIOR)
    slope, intercept = goal.calibration.scaling
    stated = sigmoid(slope * log_odds_of(goal.serving.learner.predict_one(row_of_mean).mean) + intercept)
    assert stated == pytest.approx(0.44, abs=0.1)
    assert goal.demotions == 0
    sums = goal.sums[goal.members.index(goal.serving)]
    assert sums[standing.EXPECTED] == pytest.approx(sums[standing.OBSERVED], rel=0.15)


def test_corrected_at_once_counts_as_if_it_had_come_so() -> None:
    """Of learners that expect the same before and after, all sums but the squares, which may only be larger."""
    chances, rng = np.array([0.2, 0.5, 0.7]), np.random.default_rng(4)
    plain, amended = np.zeros((3, standing.COLUMNS)), np.zeros((3, standing.COLUMNS))
    rows = [(float(rng.random()), float(rng.random()), float(rng.uniform(1.0, 20.0))) for _ in range(50)]
    for i, (before, reward, weight) in enumerate(rows):
        standing.tally(chances, reward, weight, 1, i >= 25, plain)
        standing.tally(chances, before, weight, 1, i >= 25, amended)
    for i, (before, reward, weight) in enumerate(rows):
        standing.amend(chances, before, reward, weight, 1, float(len(rows) - 1 - i), amended)
    kept = [c for c in range(standing.COLUMNS) if c not in SQUARES and c != standing.BLOCK_LOSS]
    np.testing.assert_allclose(amended[:, kept], plain[:, kept], rtol=1e-9, atol=1e-9)
    assert (amended[:, SQUARES] >= plain[:, SQUARES] - 1e-9).all()


def test_rows_before_a_learner_or_a_test_began_change_none_of_its_sums() -> None:
    sums = np.zeros((2, standing.COLUMNS))
    for _ in range(5):
        standing.tally(np.array([0.2, 0.5]), 0.0, 1.0, 0, False, sums)
    before = sums.copy()
    standing.amend(np.array([0.2, 0.5]), 0.0, 1.0, 1.0, 0, 5.0, sums)
    standing.amend(np.array([math.nan, math.nan]), 0.0, 1.0, 1.0, 0, 1.0, sums)
    np.testing.assert_array_equal(sums, before)
    standing.begin_test(sums[1], 2)
    standing.amend(np.array([0.2, 0.5]), 0.0, 1.0, 1.0, 0, 4.0, sums)
    assert sums[1, standing.OBSERVED] == 1.0
    assert sums[1, standing.LEAD] == 0.0
