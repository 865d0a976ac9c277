"""What the learner process tells of its fleet, and when it warns."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from structlog.typing import EventDict

from training.fleet import Fleet
from training.goal_fleet import GoalFleet
from training.learners.base import Row
from training.monitor import HALF_LIFE_ROWS, RATIO_CALM, RATIO_MAX, Calibration, Monitor
from training.space import FEATURES_MAX
from tsugi.v1.model_pb2 import LearnerRole


@pytest.fixture
def logs() -> Iterator[list[EventDict]]:
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    fleet.space.admit_features(["age"])
    fleet.space.admit_action("book", ())
    fleet.goals["monitored"] = GoalFleet(fleet.space, "monitored", 0.1)
    return fleet


def teach(fleet: Fleet, n_rows: int, chance: float) -> None:
    rng = random.Random(n_rows)
    for _ in range(n_rows):
        row = Row(0, np.array([1.0, 0.0]), -2.2)
        fleet.goals["monitored"].learn(row, float(rng.random() < chance))


def sample(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, name
    return value


def calibration(fleet: Fleet) -> Calibration:
    return Calibration(fleet.goals["monitored"].serving)


def test_metrics_tell_who_serves_and_how_it_does(fleet: Fleet) -> None:
    goal = fleet.goals["monitored"]
    monitor = Monitor()
    teach(fleet, 500, chance=0.5)
    monitor.look(fleet)
    assert sample("tsugi_learner_serving", goal="monitored") == goal.serving.number == 2
    assert sample("tsugi_learner_family", goal="monitored", family="logistic") == 1
    assert sample("tsugi_learner_family", goal="monitored", family="baseline") == 0
    losses = [sample("tsugi_learner_loss", goal="monitored", role=role) for role in ("serving", "baseline")]
    assert 0.6 < losses[0] < 0.9 < losses[1]
    goal.reset(1, 1, LearnerRole.LEARNER_ROLE_SERVING)
    teach(fleet, 500, chance=0.5)
    assert goal.promotions == 1
    goal.reset(2, 2, LearnerRole.LEARNER_ROLE_SERVING)
    monitor.look(fleet)
    assert sample("tsugi_learner_serving", goal="monitored") == 0
    assert sample("tsugi_learner_family", goal="monitored", family="logistic") == 0
    assert sample("tsugi_learner_family", goal="monitored", family="baseline") == 1
    assert sample("tsugi_learner_changes", goal="monitored", kind="promotion") == 1
    assert sample("tsugi_learner_changes", goal="monitored", kind="demotion") == 0


def test_learner_that_serves_and_is_off_is_warned_of_once(fleet: Fleet, logs: list[EventDict]) -> None:
    fleet.goals["monitored"].reset(1, 1, LearnerRole.LEARNER_ROLE_SERVING)  # the baseline expects 0.1 for ever
    monitor = Monitor()
    alarms = REGISTRY.get_sample_value("tsugi_alarms_total", {"alarm": "calibration"}) or 0.0
    for _ in range(5):
        teach(fleet, 30, chance=0.9)
        monitor.look(fleet)
    (warning,) = logs
    assert warning["event"] == "learner_miscalibrated"
    assert (warning["goal"], warning["number"]) == ("monitored", 0)
    assert sample("tsugi_alarms_total", alarm="calibration") == alarms + 1
    assert sample("tsugi_learner_calibration", goal="monitored") > RATIO_MAX


def test_few_rewards_alarm_nobody(fleet: Fleet) -> None:
    few = calibration(fleet)
    assert not few.hear(200.0, 1.0, 19.0)
    assert few.ratio == 10.0


def test_being_off_ends_well_inside_the_bound_and_the_next_crossing_counts(fleet: Fleet) -> None:
    heard = calibration(fleet)
    assert heard.hear(100.0, 10.0, 40.0)
    assert not heard.hear(100.0, 10.0, 40.0), "it is known"
    crossings = [
        heard.hear(100.0, expected, observed)
        for expected, observed in ((40.0, 40.0 * RATIO_CALM + 10.0), (80.0, 80.0), (200.0, 80.0))
    ]
    assert crossings == [False, False, True], "still off; no longer; and then too much is expected: that is off too"


def test_what_came_long_ago_fades(fleet: Fleet) -> None:
    heard = calibration(fleet)
    heard.hear(1_000.0, 100.0, 100.0)
    heard.hear(1_000.0 + HALF_LIFE_ROWS, 300.0, 100.0)
    assert heard.ratio == pytest.approx(51.0 / 251.0)


def test_another_learner_that_serves_is_judged_by_itself(fleet: Fleet, logs: list[EventDict]) -> None:
    goal = fleet.goals["monitored"]
    goal.reset(1, 1, LearnerRole.LEARNER_ROLE_SERVING)
    monitor = Monitor()
    for _ in range(2):
        teach(fleet, 150, chance=0.9)
        monitor.look(fleet)
        goal.reset(1, 1, LearnerRole.LEARNER_ROLE_ALL)
        goal.reset(1, 1, LearnerRole.LEARNER_ROLE_SERVING)
    assert [entry["event"] for entry in logs] == ["learner_miscalibrated"] * 2


def test_outcomes_that_stop_arriving_are_told_once_a_stop(fleet: Fleet, logs: list[EventDict]) -> None:
    monitor = Monitor()
    for stopped in ((), ("monitored",), ("monitored",), (), ("monitored",)):
        monitor.look(fleet, stopped)
    told = [log for log in logs if log["event"] == "outcomes_stopped"]
    assert [log["goal"] for log in told] == ["monitored", "monitored"]


def test_names_that_find_no_place_any_more_are_told_once(fleet: Fleet, logs: list[EventDict]) -> None:
    monitor = Monitor()
    fleet.space.admit_features(f"f{i}" for i in range(FEATURES_MAX - 2))
    monitor.look(fleet)
    assert not logs
    fleet.space.admit_features(["last", "turned away"])
    for _ in range(2):
        monitor.look(fleet)
    assert [log["n_features"] for log in logs] == [FEATURES_MAX]
