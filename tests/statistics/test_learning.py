"""Simulated worlds whose truth is known: does what we learn come to it, and is what is logged worth what it says?

A world gives each action a chance of success that depends on a person's numbers. It is played as production plays: the
core decides under a compiled catalog, lessons teach the fleet, and arrays are exported, serialised and aligned again.
Seeds are fixed. Where a bound is statistical, its false alarm over random seeds is FALSE_ALARM; where it is a matter of
how well we learn, it leaves room for seeds that were not looked at: the note beside it says what came of ten others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from scipy import stats

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.decisioning.decide import EXPLORE, Decisions, Questions, Scratch, decide
from server.decisioning.models import Models, align, no_champion
from training import goal_fleet
from training.export import Exporter
from training.fleet import Fleet
from training.goal_fleet import GoalFleet
from training.learners.base import Row
from training.learners.logistic import LogisticCorrection
from training.rewards import Lesson
from training.space import Space
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.v1 import catalog_pb2

Doubles = NDArray[np.float64]

FALSE_ALARM: Final = 1e-4
N_ACTIONS, N_NUMBERS = 5, 6
RENEWAL_ROWS: Final = 20  # between two renewals of the arrays


class World:
    """Chances of success that are known: log-odds linear in a person's numbers, which are standard normal."""

    def __init__(self, rate: float, effect: float, seed: int, n_actions: int = N_ACTIONS) -> None:
        self.rate = rate
        self._effect = effect
        self._rng = np.random.default_rng([seed, n_actions])
        self._shape = (n_actions, N_NUMBERS + 1)
        self.turn()

    def turn(self) -> None:
        """Become another."""
        self._weights = self._rng.normal(0.0, self._effect, self._shape)

    def people(self, n: int) -> Doubles:
        return self._rng.normal(size=(n, N_NUMBERS))

    def chances(self, people: Doubles) -> Doubles:
        """Return float64[people, actions]."""
        log_odds = np.log(self.rate / (1.0 - self.rate)) + self._weights[:, 0] + people @ self._weights[:, 1:].T
        return np.asarray(1.0 / (1.0 + np.exp(-log_odds)))

    def rewards(self, chances: Doubles) -> Doubles:
        return (self._rng.random(chances.shape) < chances).astype(float)


def make_catalog(rate: float, exploration: dict[str, Any], n_actions: int = N_ACTIONS) -> Catalog:
    message = {
        "name": "simulated",
        "currencyCode": "EUR",
        "identityNamespaces": [{"name": "row"}],
        "profileAttributes": [{"name": f"n{j}", "type": "ATTRIBUTE_TYPE_NUMBER"} for j in range(N_NUMBERS)],
        "outcomeTypes": [{"name": "sold"}],
        "goals": [
            {
                "name": "sale",
                "outcomes": [{"type": "sold", "reward": 1}],
                "attributionWindow": "1s",
                "baseRate": rate,
            }
        ],
        "channels": [{"name": "web"}],
        "placements": [{"name": "page", "channel": "web", "goal": "sale", "exploration": exploration}],
        "actions": [
            {"name": f"action_{i}", "treatments": [{"name": "only", "channel": "web"}]} for i in range(n_actions)
        ],
    }
    return compile_catalog(json_format.ParseDict(message, catalog_pb2.Catalog()))


class Core:
    """The deciding core under one catalog and what was last learned."""

    def __init__(self, catalog: Catalog, seed: int) -> None:
        self.catalog = catalog
        self._champion, self._scratch = no_champion(catalog), Scratch()
        self._models: Models = align(catalog, self._champion, LearnerArrays(format_version=1, epoch=1))
        self._places = [catalog.space.index[f"profile.n{j}"] for j in range(N_NUMBERS)]
        self._seeds = np.random.default_rng([seed, 7])

    def renew(self, arrays: bytes) -> None:
        self._models = align(self.catalog, self._champion, LearnerArrays.FromString(arrays))

    def decide(self, people: Doubles) -> Decisions:
        b = people.shape[0]
        facts = np.full((b, len(self.catalog.space.facts)), np.nan)
        facts[:, self._places] = people
        return decide(
            Questions(
                facts=facts,
                now_us=0,
                heads=np.tile(np.array([1, EXPLORE, -1, 0], np.int32), (b, 1)),
                asks=np.tile(np.array([0, 1, 0], np.int32), (b, 1)),
                seeds=self._seeds.integers(0, 1 << 64, b, np.uint64),
                listings=np.empty((0, len(self.catalog.actions.names)), np.uint8),
                holds=np.empty((0, 3), np.int64),
            ),
            self.catalog,
            self._models,
            self._scratch,
        )


class Played(NamedTuple):
    """What came of one run."""

    regrets: Doubles  # float64[rows]: how much likelier a success of the best action was than of the chosen one
    uniform_regrets: Doubles  # float64[rows], of choosing at random
    chosen: NDArray[np.intp]  # of each row
    distributions: Doubles  # float64[rows, actions], as logged


def play(world: World, n_rows: int, seed: int, exploration: dict[str, Any]) -> Played:
    """Play rows through core and fleet, each taught at once."""
    core, fleet = Core(make_catalog(world.rate, exploration), seed), Fleet()
    exporter, goal, names = Exporter(fleet), core.catalog.goals[0], core.catalog.actions.names
    fleet.meet([goal])
    parts: list[tuple[Doubles, Doubles, NDArray[np.intp], Doubles]] = []
    for first in range(0, n_rows, RENEWAL_ROWS):
        exporter.renew()
        core.renew(exporter.message(1, first, first).SerializeToString())
        people = world.people(RENEWAL_ROWS)
        chances, decisions = world.chances(people), core.decide(people)
        chosen = decisions.slot_codes[:, 1].astype(np.intp)
        got = np.take_along_axis(chances, chosen[:, None], 1)[:, 0]
        rewards = world.rewards(got)
        for i in range(RENEWAL_ROWS):
            stated, prior = float(decisions.slot_numbers[i, 0]), float(decisions.slot_numbers[i, 3])
            learned = decisions.learned[i].tobytes()
            name, reward = names[chosen[i]], float(rewards[i])
            fleet.learn(Lesson(goal, name, core.catalog.learned.names, learned, prior, reward, stated))
        best = chances.max(1)
        distributions = decisions.distributions.reshape(RENEWAL_ROWS, -1).copy()
        parts.append((best - got, best - chances.mean(1), chosen, distributions))
    regrets, uniform, chosen, distributions = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Played(regrets, uniform, chosen, distributions)


def slope(regrets: Doubles) -> float:
    """Return the exponent a with which regret so far grows as rows^a, by least squares over the last nine tenths."""
    rows = np.arange(regrets.size // 10, regrets.size)
    return float(np.polyfit(np.log(rows + 1.0), np.log(np.cumsum(regrets)[rows]), 1)[0])


SQUARE_CB: Final[dict[str, Any]] = {"squareCb": {"gamma": 300}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [1, 2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]
)
def test_regret_grows_ever_more_slowly(seed: int) -> None:
    """Of eight other seeds, at most: 0.56 of the first half's regret, slope 0.67, 0.06 of a uniform policy's regret."""
    played = play(World(0.15, 0.7, seed), 8_000, seed, SQUARE_CB)
    first, second = played.regrets[:4_000].sum(), played.regrets[4_000:].sum()
    assert second < 0.7 * first
    assert slope(played.regrets) < 0.8
    assert second < 0.15 * played.uniform_regrets[4_000:].sum()
    assert slope(played.uniform_regrets) > 0.95, "so that the bound can fail"


@pytest.mark.slow
def test_stated_probabilities_are_those_of_the_choices_while_it_learns() -> None:
    """Of each action, and of each tenth of the stated chances, as many choices as stated; martingale bounds."""
    played = play(World(0.2, 0.7, 5), 3_000, 5, {"squareCb": {"gamma": 30}})
    np.testing.assert_allclose(played.distributions.sum(1), 1.0, atol=1e-9)
    was_chosen = np.zeros_like(played.distributions)
    was_chosen[np.arange(played.chosen.size), played.chosen] = 1.0
    limit = stats.norm.isf(FALSE_ALARM / 2.0 / (N_ACTIONS + 10))
    variances = played.distributions * (1.0 - played.distributions)
    gaps = was_chosen - played.distributions
    for action in range(N_ACTIONS):
        assert abs(gaps[:, action].sum()) < limit * np.sqrt(variances[:, action].sum())
    tenths = np.minimum((10.0 * played.distributions).astype(int), 9)
    for tenth in range(10):
        here = tenths == tenth
        assert abs(gaps[here].sum()) <= limit * np.sqrt(variances[here].sum()) + 1.0
    wrong = np.roll(played.distributions, 1, axis=1)
    gaps = (was_chosen - wrong)[:, 0]
    assert abs(gaps.sum()) > limit * np.sqrt((wrong * (1.0 - wrong))[:, 0].sum()), "so that the bounds can fail"


class Logged(NamedTuple):
    """What a log tells somebody who wants to know what another policy would have earned."""

    people: Doubles
    chosen: NDArray[np.intp]
    stated: Doubles  # the logged selection probability of what was chosen
    rewards: Doubles


def other_policy(people: Doubles, n_actions: int) -> Doubles:
    """Return a policy's probabilities, float64[people, actions]: the first number picks, one in five at random."""
    picked = np.floor(stats.norm.cdf(people[:, 0]) * n_actions).astype(int)
    return np.asarray(0.8 * np.eye(n_actions)[picked] + 0.2 / n_actions)


def shares(log: Logged, n_actions: int) -> Doubles:
    """Return how much likelier the other policy was to choose what was chosen."""
    return np.asarray(other_policy(log.people, n_actions)[np.arange(log.chosen.size), log.chosen] / log.stated)


def by_inverse_propensity(log: Logged, n_actions: int) -> tuple[float, float]:
    """Return value and standard error: Horvitz and Thompson, JASA 47, 1952."""
    earned = shares(log, n_actions) * log.rewards
    return float(earned.mean()), float(earned.std(ddof=1) / np.sqrt(earned.size))


def self_normalised(log: Logged, n_actions: int) -> tuple[float, float]:
    """Return value and standard error: Swaminathan and Joachims, NIPS 2015; the error by the delta method."""
    share = shares(log, n_actions)
    value = float((share * log.rewards).sum() / share.sum())
    return value, float(np.sqrt((share**2 * (log.rewards - value) ** 2).sum()) / share.sum())


def doubly_robust(log: Logged, n_actions: int) -> tuple[float, float]:
    """Return value and standard error: Dudík, Langford and Li, ICML 2011, with a poor model: every action's half."""
    modelled = np.full((log.chosen.size, n_actions), 0.5) * (1.0 + 0.3 * np.tanh(log.people[:, :1]))
    taken = modelled[np.arange(log.chosen.size), log.chosen]
    each = (other_policy(log.people, n_actions) * modelled).sum(1) + shares(log, n_actions) * (log.rewards - taken)
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(each.size))


@pytest.mark.slow
def test_value_of_another_policy_is_read_from_what_is_logged() -> None:
    """Of 200 logs of 1,000 rows, the 95% intervals of three estimators hold the truth in 95%, less binomial slack."""
    world, n_logs, n_rows = World(0.3, 0.8, 6), 200, 1_000
    catalog = make_catalog(world.rate, {"squareCb": {"gamma": 30}})
    core = Core(catalog, 6)
    core.renew(learned_a_little(world, catalog))
    people = world.people(1_000_000)
    truth = float((other_policy(people, N_ACTIONS) * world.chances(people)).sum(1).mean())
    held: dict[str, int] = {}
    earned = 0.0
    for _ in range(n_logs):
        people = world.people(n_rows)
        decisions = core.decide(people)
        chosen = decisions.slot_codes[:, 1].astype(np.intp)
        rewards = world.rewards(world.chances(people)[np.arange(n_rows), chosen])
        earned += float(rewards.mean()) / n_logs
        log = Logged(people, chosen, decisions.slot_numbers[:, 0].copy(), rewards)
        unstated = log._replace(stated=np.full(n_rows, 1.0 / N_ACTIONS))
        for name, estimate in {
            "ips": by_inverse_propensity(log, N_ACTIONS),
            "snips": self_normalised(log, N_ACTIONS),
            "dr": doubly_robust(log, N_ACTIONS),
            "as if chosen uniformly": by_inverse_propensity(unstated, N_ACTIONS),
        }.items():
            held[name] = held.get(name, 0) + (abs(estimate[0] - truth) < 1.96 * estimate[1])
    least = int(stats.binom.ppf(FALSE_ALARM, n_logs, 0.95))
    assert abs(earned - truth) > 0.05, "the policy that was logged earns something else"
    assert held["as if chosen uniformly"] < least, "so that the bound can fail"
    assert {name: held[name] for name in ("ips", "snips", "dr") if held[name] < least} == {}


def learned_a_little(world: World, catalog: Catalog) -> bytes:
    """Return the arrays of a fleet that was taught 300 rows chosen at random."""
    fleet = Fleet()
    fleet.meet(catalog.goals)
    core, goal = Core(catalog, 8), catalog.goals[0]
    for _ in range(3):
        people = world.people(100)
        decisions, chances = core.decide(people), world.chances(people)
        for i, action in enumerate(decisions.slot_codes[:, 1].tolist()):
            reward = float(world.rewards(chances[i : i + 1, action])[0])
            name, learned = catalog.actions.names[action], decisions.learned[i].tobytes()
            fleet.learn(Lesson(goal, name, catalog.learned.names, learned, float(decisions.slot_numbers[i, 3]), reward))
    exporter = Exporter(fleet)
    exporter.renew()
    return bytes(exporter.message(1, 300, 300).SerializeToString())


class Taught:
    """A goal's fleet that is taught rows chosen at random, and what the one that serves expects of them."""

    def __init__(self, world: World, n_actions: int) -> None:
        self.world, self._n_actions = world, n_actions
        space = Space()
        space.admit_features(f"n{j}" for j in range(N_NUMBERS))
        for i in range(n_actions):
            space.admit_action(f"action_{i}")
        self.fleet = GoalFleet(space, "sale", world.rate)
        self._prior = float(np.log(world.rate / (1.0 - world.rate)))
        self._rng = np.random.default_rng(9)

    def teach(self, n_rows: int, watched: Callable[[Row, float], None] = lambda _row, _reward: None) -> Doubles:
        """Teach rows, and return by how much the loss of the one that serves exceeds the truth's, of each row."""
        people = self.world.people(n_rows)
        actions = self._rng.integers(0, self._n_actions, n_rows)
        truths = self.world.chances(people)[np.arange(n_rows), actions]
        rewards = self.world.rewards(truths)
        excess = np.empty(n_rows)
        for i, (truth, reward) in enumerate(zip(truths.tolist(), rewards.tolist(), strict=True)):
            row = Row(int(actions[i]), np.append(1.0, people[i]), self._prior)
            learner = self.fleet.serving.learner
            expected = learner.predict_one(row).mean if i % 5 == 0 else np.nan  # River's own is slow
            excess[i] = truth * np.log(truth / expected) + (1.0 - truth) * np.log((1.0 - truth) / (1.0 - expected))
            watched(row, reward)
            self.fleet.learn(row, reward)
        return excess


@pytest.fixture
def only_logistic(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is shown is the choice of settings."""
    choices = [(LogisticCorrection.family, settings) for settings in LogisticCorrection.choices]
    monkeypatch.setattr(goal_fleet, "FIRST", tuple(choices[i] for i in (0, 1, 2, 5)))
    monkeypatch.setattr(goal_fleet, "LATER", tuple(choices))


@pytest.mark.slow
@pytest.mark.usefixtures("only_logistic")
@pytest.mark.parametrize("seed", [1, 2])
def test_where_effects_are_strong_a_weak_prior_comes_to_serve(seed: int) -> None:
    """Of ten other seeds, ten end at a precision of 1 or 10."""
    taught = Taught(World(0.4, 1.5, seed, 3), 3)
    excess = taught.teach(3_000)
    assert taught.fleet.serving.learner.settings["precision"] in {1.0, 10.0}
    assert np.nanmean(excess[2_000:]) < 0.2 * np.nanmean(excess[:500])


@pytest.mark.slow
@pytest.mark.usefixtures("only_logistic")
@pytest.mark.parametrize("seed", [1, 2])
def test_where_effects_are_weak_a_strong_prior_or_none_comes_to_serve(seed: int) -> None:
    """Of ten other seeds, eight end at the baseline and two at a precision of 100."""
    taught = Taught(World(0.3, 0.03, seed, 10), 10)
    taught.teach(8_000)
    learner = taught.fleet.serving.learner
    assert learner.family == "baseline" or learner.settings["precision"] >= 100.0


@pytest.mark.slow
@pytest.mark.usefixtures("only_logistic")
def test_a_world_that_turns_round_is_learned_anew_within_1500_rows() -> None:
    """In five of six at least. Of twelve others, twelve were at most 0.015 above the truth's loss by then."""
    after_all = []
    for seed in range(1, 7):
        taught = Taught(World(0.3, 1.0, seed, 3), 3)
        before = np.nanmean(taught.teach(2_000)[1_500:])
        taught.world.turn()
        after = taught.teach(2_000)
        assert np.nanmean(after[:100]) > 10.0 * before, "it was wrong at first"
        after_all.append(np.nanmean(after[1_500:]))
    assert sorted(after_all)[4] < 0.025


@pytest.mark.slow
@pytest.mark.usefixtures("only_logistic")
def test_in_a_world_that_keeps_turning_the_fleet_does_better_than_a_learner_that_forgets_nothing() -> None:
    taught = Taught(World(0.3, 1.0, 2, 2), 2)
    space = taught.fleet._space
    constant = LogisticCorrection(space, 0.3, LogisticCorrection.choices[4])
    assert constant.settings["memory_rows"] == 100_000
    of_constant: list[float] = []
    of_fleet: list[float] = []

    def watched(row: Row, reward: float) -> None:
        expected = taught.fleet.serving.learner.predict_one(row).mean
        of_fleet.append(-np.log(expected if reward else 1.0 - expected))
        expected = constant.learn_one(row, reward)
        of_constant.append(-np.log(expected if reward else 1.0 - expected))

    for _ in range(6):
        taught.teach(1_200, watched)
        taught.world.turn()
    assert np.mean(of_fleet[2_400:]) < np.mean(of_constant[2_400:])
