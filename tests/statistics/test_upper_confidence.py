"""Upper confidence tries first what is less known, and comes to the best: the core and the posterior, in one process.

Everything is drawn from fixed seeds, so the tests are deterministic. Upper confidence is no certainty: where the best
began unluckily it may be left alone. Of 60 seeds none did so at width 3 and two at width 2, while at width 0 it was one
of four.
"""

from __future__ import annotations

import numpy as np
import pytest

from server.catalog.catalog import UPPER_CONFIDENCE, Catalog, Doubles
from server.decisioning.models import align, no_champion
from tests.support.catalogs import compiled
from tests.support.deciding import Desk, key_of
from tests.support.populating import Person
from training.learners.base import Row
from training.learners.bayesian import BayesianRegression
from training.space import Space
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.v1.decision_service_pb2 import DecideRequest

TRUTH = {"action_0": 0.10, "action_1": 0.14, "action_2": 0.22, "action_3": 0.05}
BASE_RATE = 0.1
TOGETHER = 10  # decisions between two publications of what was learned


class Shop:
    """Decides, learns what comes of it and publishes that, over and over."""

    def __init__(self, seed: int, width: float) -> None:
        placement = {"name": "home", "channel": "web", "goal": "click"}
        exploration = {"upperConfidence": {"width": width}}
        self.catalog: Catalog = compiled(placements=[placement | {"exploration": exploration}])
        self.space = Space()
        self.space.admit_features(self.catalog.learned.names)
        for name in self.catalog.actions.names:
            self.space.admit_action(name)
        self.learner = BayesianRegression(self.space, BASE_RATE, BayesianRegression.choices[0])
        self.desk = Desk(self.catalog)
        self.desk.meet(Person({"age": 40.0}, {}))
        self.rng = np.random.default_rng(seed)
        self.n_decided = 0

    def decide(self, n: int) -> tuple[list[int], Doubles]:
        """Return rows chosen and the distributions they were drawn from, float64[n, 4], of decisions made together."""
        request = DecideRequest(profile_id="00" * 16)
        request.placements.add(placement="home", count=1)
        keys = [key_of(str(self.n_decided + i)) for i in range(n)]
        self.n_decided += n
        _, decisions = self.desk.decisions([request] * n, 0, keys)
        self.learned = decisions.learned[0].astype(np.float64)
        return decisions.slot_codes[:, 2].tolist(), decisions.distributions.reshape(n, 4)

    def learn(self, row: int, reward: float) -> None:
        prior = float(self.catalog.goals[0].base_log_odds)
        self.learner.learn_one(Row(row, np.append(1.0, self.learned), prior), reward)

    def publish(self) -> None:
        arrays = LearnerArrays(format_version=1, epoch=1, features=self.catalog.learned.names)
        parts = {name: array.tobytes() for name, array in self.learner.export(range(4)).items()}
        parts |= {"correction_weights": bytes(8 * 4 * self.learned.size), "correction_intercepts": bytes(8 * 4)}
        constants = BayesianRegression.constants(BASE_RATE)
        arrays.goals.add(goal="click", actions=self.catalog.actions.names, **parts, **constants)
        self.desk.models = align(self.catalog, no_champion(self.catalog), arrays)

    def run(self, n: int) -> list[int]:
        """Return the rows chosen."""
        chosen: list[int] = []
        truth = list(TRUTH.values())
        for _ in range(n // TOGETHER):
            rows, _ = self.decide(TOGETHER)
            for row in rows:
                self.learn(row, float(self.rng.random() < truth[row]))
            self.publish()
            chosen += rows
        return chosen


def test_of_equal_ones_the_less_known_are_tried_first() -> None:
    shop = Shop(seed=1, width=1.0)
    assert shop.catalog.blends.codes[0, 0, 2] == UPPER_CONFIDENCE
    _, (distribution,) = shop.decide(1)
    np.testing.assert_array_equal(distribution, 0.25)
    is_open = np.ones(4, bool)
    for known in range(3):
        for _ in range(20):
            shop.learn(known, BASE_RATE)  # as expected: its mean stays, its deviation shrinks
        shop.publish()
        is_open[known] = False
        _, (distribution,) = shop.decide(1)
        np.testing.assert_allclose(distribution, is_open / is_open.sum())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_tries_all_and_comes_to_the_best(seed: int) -> None:
    chosen = Shop(seed, width=3.0).run(3_000)
    early, late = chosen[:500], chosen[-500:]
    assert set(early) == {0, 1, 2, 3}
    assert late.count(2) >= 0.95 * len(late)
    assert max(map(chosen.count, (0, 1, 3))) < 600, "the others no longer than it takes to know them"


def test_without_width_it_may_never_learn_which_is_best() -> None:
    """What width is for: always the best mean stays with the first that does better than expected."""
    stuck = [Shop(seed, width=0.0).run(1_000)[-100:].count(2) < 100 for seed in range(12)]
    assert any(stuck)
