"""A goal's fleet as it is told: who takes part, how each does, why who serves serves; and what a reset leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from training import standing
from training.families import FIRST
from training.goal_fleet import CHANGES_KEPT, REVIEW_ROWS, GoalFleet
from training.learners.base import Row, settings_text
from training.learners.softmax import SoftmaxPolicy
from training.space import Space
from training.telling import goal_learners
from tsugi.log.v1.learner_pb2 import FleetChangeKind, GoalState
from tsugi.v1.learner_pb2 import GoalLearners, Learner, LearnerChangeKind
from tsugi.v1.model_pb2 import LearnerRole

SERVING, CHALLENGER = LearnerRole.LEARNER_ROLE_SERVING, LearnerRole.LEARNER_ROLE_CHALLENGER
BASELINE, POSTERIOR, ALL = (
    LearnerRole.LEARNER_ROLE_BASELINE, LearnerRole.LEARNER_ROLE_POSTERIOR, LearnerRole.LEARNER_ROLE_ALL
)  # fmt: skip
RESET = LearnerChangeKind.LEARNER_CHANGE_KIND_RESET
BASE_RATE = 0.1


def fleet_of(n_rows: int = 0, seed: int = 1) -> GoalFleet:
    space = Space()
    space.admit_features(["age"])
    space.admit_action("book", ())
    fleet = GoalFleet(space, "visit", BASE_RATE, lsn=3, time_us=3_000_000)
    teach(fleet, n_rows, seed)
    return fleet


def teach(fleet: GoalFleet, n_rows: int, seed: int = 1, chance: float = 0.5) -> None:
    """Teach rows whose rewards come far more often than the prior says."""
    rng = random.Random(seed)
    for _ in range(n_rows):
        lsn = 10 + fleet.n_rows
        x = np.array([1.0, rng.gauss(0.0, 1.0)])
        fleet.learn(Row(0, x, -2.2, 2.0), float(rng.random() < chance), lsn, lsn * 1_000_000)


def with_role(told: GoalLearners, role: LearnerRole) -> list[Learner]:
    return [each for each in told.learners if role in each.roles]


def numbers(told: GoalLearners) -> list[tuple[int, str, str]]:
    return [(each.number, each.family, each.settings) for each in told.learners]


def test_new_fleet_tells_who_takes_part_and_nothing_that_it_does_not_know() -> None:
    told = goal_learners(fleet_of())
    assert (told.goal, told.rows, told.promotions, told.demotions) == ("visit", 0, 0, 0)
    assert not told.HasField("serving_since")
    assert [each.number for each in told.learners] == list(range(len(told.learners)))
    assert {role for each in told.learners for role in each.roles} == {SERVING, CHALLENGER, BASELINE, POSTERIOR}
    for each in told.learners:
        assert len(each.roles) == 1
        assert (each.rows, each.weight, each.begun_lsn, each.begin_time.ToSeconds()) == (0, 0.0, 3, 3)
        for field in ("mean_loss", "loss_radius", "lead", "lead_radius", "expected_reward", "observed_reward"):
            assert not each.HasField(field), field


def test_told_numbers_are_those_that_decide() -> None:
    fleet = fleet_of(n_rows=199)
    told = goal_learners(fleet)
    assert all(each.mean_loss > 0.0 and not each.HasField("loss_radius") for each in told.learners), "too few rows"
    teach(fleet, 121, seed=2)
    told = goal_learners(fleet)
    (serving,) = with_role(told, SERVING)
    assert not serving.HasField("lead"), "over itself"
    for each, member, sums in zip(told.learners, fleet.members, fleet.sums, strict=True):
        assert (each.family, each.settings) == (member.learner.family, settings_text(member.learner.settings))
        assert (each.rows, each.weight) == (320, 640.0)
        assert (each.mean_loss, each.loss_radius) == tuple(standing.loss_of(sums, 0.05))
        assert each.observed_reward == sums[standing.OBSERVED] / 320
        assert each.expected_reward == sums[standing.EXPECTED] / 320
    (baseline,) = with_role(told, BASELINE)
    assert baseline.lead < -baseline.lead_radius, "rewards are far above the prior: learning pays"


def test_promotion_is_told_with_its_reason() -> None:
    fleet = fleet_of(n_rows=2 * REVIEW_ROWS)
    fleet.reset(90, 90_000_000, SERVING)
    teach(fleet, 40 * REVIEW_ROWS)
    told = goal_learners(fleet)
    (serving,) = with_role(told, SERVING)
    since = told.serving_since
    assert told.promotions == 1 and told.demotions == 0
    assert (since.kind, since.number) == (LearnerChangeKind.LEARNER_CHANGE_KIND_PROMOTED, serving.number)
    assert since.lead > since.lead_radius > 0.0
    assert since.compared_with == 0
    assert since.lsn > 90 and since.change_time.ToSeconds() == since.lsn
    assert since in told.changes


def test_changes_are_told_newest_first_and_bounded() -> None:
    fleet = fleet_of(REVIEW_ROWS)
    for lsn in (1_001, 1_002, 1_003, 1_004):
        fleet.reset(lsn, lsn * 1_000_000, ALL)
    lsns = [change.lsn for change in goal_learners(fleet).changes]
    assert lsns == sorted(lsns, reverse=True)
    assert len(lsns) == CHANGES_KEPT
    assert lsns[0] == 1_004


@pytest.mark.parametrize("n_rows", [0, 7 * REVIEW_ROWS + 5])
def test_reset_of_who_serves_leaves_the_others_and_lets_the_baseline_serve(n_rows: int) -> None:
    fleet = fleet_of(n_rows)
    before = goal_learners(fleet)
    (served,) = with_role(before, SERVING)
    fleet.reset(900, 900_000_000, SERVING)
    told = goal_learners(fleet)
    assert numbers(told) == numbers(before), "who takes part stays"
    assert [(each.number, list(each.roles)) for each in with_role(told, SERVING)] == [(0, [SERVING, BASELINE])]
    by_number = {each.number: each for each in told.learners}
    assert list(by_number[served.number].roles) == [CHALLENGER]
    assert (by_number[served.number].rows, by_number[served.number].begun_lsn) == (0, 900)
    for each in told.learners:
        if each.number != served.number:
            assert (each.rows, each.begun_lsn) == (n_rows, 3), "it learned on"
        assert not each.HasField("lead"), "leads are over another one now"
    assert (told.serving_since.kind, told.serving_since.number) == (RESET, served.number)
    assert [change.number for change in told.changes if change.lsn == 900] == [served.number]


def test_reset_of_who_serves_changes_nothing_of_consequence_when_that_is_the_baseline() -> None:
    fleet = fleet_of(100)
    fleet.reset(900, 0, SERVING)
    first = goal_learners(fleet).serving_since
    fleet.reset(901, 0, SERVING)
    told = goal_learners(fleet)
    assert [each.number for each in with_role(told, SERVING)] == [0]
    assert told.serving_since == first


def test_reset_of_challengers_leaves_who_serves() -> None:
    fleet = fleet_of(3 * REVIEW_ROWS)
    before = goal_learners(fleet)
    fleet.reset(900, 900_000_000, CHALLENGER)
    told = goal_learners(fleet)
    assert numbers(told) == numbers(before)
    assert with_role(told, SERVING) == with_role(before, SERVING)
    assert with_role(told, POSTERIOR) == with_role(before, POSTERIOR)
    assert all((each.rows, each.begun_lsn) == (0, 900) for each in with_role(told, CHALLENGER))
    assert not told.HasField("serving_since")
    assert [change.kind for change in told.changes] == [RESET] * len(with_role(told, CHALLENGER))


def test_reset_of_all_leaves_what_a_new_fleet_knows() -> None:
    fleet = fleet_of(3 * REVIEW_ROWS)
    fleet.reset(900, 900_000_000, ALL)
    told = goal_learners(fleet)
    assert all((each.rows, each.begun_lsn) == (0, 900) for each in told.learners)
    (serving,) = with_role(told, SERVING)
    assert serving.number == 2
    assert (told.serving_since.kind, told.serving_since.number) == (RESET, 2)
    row = Row(0, np.array([1.0, 0.5]), -1.0)
    for old, new in zip(fleet.members, fleet_of().members, strict=True):
        assert old.learner.predict_one(row) == new.learner.predict_one(row)


@pytest.mark.parametrize("role", [LearnerRole.LEARNER_ROLE_UNSPECIFIED, BASELINE, POSTERIOR, 99])
def test_reset_of_what_this_build_does_not_know_changes_nothing(role: int) -> None:
    fleet = fleet_of(REVIEW_ROWS)
    before = fleet.save()
    fleet.reset(900, 900_000_000, role)
    assert fleet.save() == before


@pytest.mark.parametrize("roles", [(SERVING,), (CHALLENGER,), (ALL,), (SERVING, SERVING, ALL, CHALLENGER)])
def test_restored_fleet_goes_on_alike_after_resets(roles: Sequence[LearnerRole]) -> None:
    fleet = fleet_of(2 * REVIEW_ROWS + 3)
    for role in roles:
        fleet.reset(900, 900_000_000, role)
    twin = GoalFleet.restored(fleet._space, GoalState.FromString(fleet.save().SerializeToString()))
    for each in (fleet, twin):
        teach(each, 20 * REVIEW_ROWS, seed=5)
    assert twin.save() == fleet.save()
    assert goal_learners(twin) == goal_learners(fleet)


def test_kinds_of_change_number_alike_on_disk_and_on_the_wire() -> None:
    told = {name.removeprefix("LEARNER_CHANGE_KIND_"): number for name, number in LearnerChangeKind.items()}
    assert {name.removeprefix("FLEET_CHANGE_KIND_"): number for name, number in FleetChangeKind.items()} == told


def test_after_a_reset_of_all_the_first_of_the_list_serves_whoever_stood_there() -> None:
    space = Space()
    space.admit_action("book", ())
    goal = GoalFleet(space, "visit", 0.1)
    goal.members[2].learner = SoftmaxPolicy(space, 0.1, SoftmaxPolicy.choices[0])
    goal.reset(5, 6)
    assert (goal.serving.learner.family, goal.serving.learner.settings) == FIRST[0]
    assert goal.serving is goal.members[2]
