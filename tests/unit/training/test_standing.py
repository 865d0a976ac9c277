"""What is kept of each learner, held against the same sums in plain Python."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from training import standing
from training.always_valid import radius
from training.learners.base import Doubles
from training.standing import CHANCE_MIN, WEIGHT_MAX

ALPHA = 0.05


def begun(n_learners: int) -> Doubles:
    sums = np.zeros((n_learners, standing.COLUMNS))
    for i in range(n_learners):
        standing.begin(sums[i], i + 1)
    return sums


def loss(chance: float, reward: float) -> float:
    chance = min(max(chance, CHANCE_MIN), 1.0 - CHANCE_MIN)
    return -reward * math.log(chance) - (1.0 - reward) * math.log(1.0 - chance)


def spread(serving: float, other: float) -> float:
    """Return the variance of the lead at the rate where its mean is 0."""
    up, down = (loss(serving, reward) - loss(other, reward) for reward in (1.0, 0.0))
    if up == down:
        return 0.0
    rate = -down / (up - down)
    return rate * up**2 + (1.0 - rate) * down**2


@pytest.mark.parametrize(
    ("selection_probability", "weight"),
    [
        (1.0, 1.0),
        (0.5, 2.0),
        (0.05, 20.0),
        (0.049, WEIGHT_MAX),
        (1e-300, WEIGHT_MAX),
        (0.0, 1.0),  # not known, as in records from before it was logged
        (-0.1, 1.0),
        (1.1, 1.0),
        (math.nan, 1.0),
    ],
)
def test_a_row_weighs_one_by_its_chance_and_never_more_than_the_limit(
    selection_probability: float, weight: float
) -> None:
    assert standing.weight_of(selection_probability) == pytest.approx(weight)


@pytest.mark.parametrize("serving", [0, 2])
def test_sums_are_those_of_plain_python(serving: int) -> None:
    rng, n_learners, n_rows, n_early = random.Random(serving), 4, 300, 140
    sums = begun(n_learners)
    rows = [
        (
            [rng.choice((rng.random(), 0.0, 1.0)) for _ in range(n_learners)],
            rng.choice((0.0, 1.0, 0.3)),
            rng.uniform(1.0, WEIGHT_MAX),
        )
        for _ in range(n_rows)
    ]
    for i, (chances, reward, weight) in enumerate(rows):
        standing.tally(np.array(chances), reward, weight, serving, i >= n_early, sums)
    for i in range(n_learners):
        losses = [w * loss(chances[i], reward) for chances, reward, w in rows]
        leads = [w * (loss(chances[serving], reward) - loss(chances[i], reward)) for chances, reward, w in rows]
        spreads = [w**2 * spread(chances[serving], chances[i]) for chances, _, w in rows]
        want = {
            standing.ROWS: n_rows,
            standing.WEIGHT: sum(w for _, _, w in rows),
            standing.LOSS: sum(losses),
            standing.LOSS_SQUARES: sum(x * x for x in losses),
            standing.EXPECTED: sum(chances[i] for chances, _, _ in rows),
            standing.OBSERVED: sum(reward for _, reward, _ in rows),
            standing.LEAD_ROWS: n_rows,
            standing.LEAD: sum(leads),
            standing.LEAD_SQUARES: sum(x * x for x in leads),
            standing.LATE_ROWS: n_rows - n_early,
            standing.LATE_LEAD: sum(leads[n_early:]),
            standing.BLOCK_LOSS: sum(loss(chances[i], reward) for chances, reward, _ in rows),
            standing.TEST: i + 1,
            standing.LEAD_SPREAD: sum(spreads),
        }
        assert sorted(want) == list(range(standing.COLUMNS)), "every column is held against something"
        np.testing.assert_allclose(sums[i], [want[column] for column in sorted(want)], rtol=1e-9, atol=1e-9)
    assert sums[serving, standing.LEAD] == 0.0, "nobody leads himself"


def test_one_row_costs_no_more_than_its_limit() -> None:
    sums = begun(2)
    standing.tally(np.array([0.0, 1.0]), 1.0, WEIGHT_MAX, 1, True, sums)
    assert sums[0, standing.LOSS] == pytest.approx(-WEIGHT_MAX * math.log(CHANCE_MIN))
    assert sums[1, standing.LOSS] == pytest.approx(WEIGHT_MAX * CHANCE_MIN, rel=1e-3)


def test_estimates_are_means_with_the_bound_of_their_sums() -> None:
    rng = np.random.default_rng(3)
    sums = begun(2)
    for _ in range(400):
        standing.tally(rng.uniform(0.1, 0.9, 2), float(rng.random() < 0.4), rng.uniform(1, 20), 0, True, sums)
    of_loss, of_lead = standing.loss_of(sums[1], ALPHA), standing.lead_of(sums[1], ALPHA)
    wide = radius(400, sums[1, standing.LOSS], sums[1, standing.LOSS_SQUARES], ALPHA)
    assert of_loss.mean == pytest.approx(sums[1, standing.LOSS] / sums[1, standing.WEIGHT])
    assert of_loss.radius == pytest.approx(wide * 400 / sums[1, standing.WEIGHT])
    assert of_lead.mean == pytest.approx(sums[1, standing.LEAD] / 400)
    wide = radius(400, sums[1, standing.LEAD], sums[1, standing.LEAD_SQUARES], ALPHA / 6.0)
    assert of_lead.radius >= wide * (1.0 - 1e-12), "the second test has alpha / (2 · 3)"
    assert standing.late_lead_of(sums[1]) == pytest.approx(of_lead.mean)


def test_nothing_is_known_of_one_that_has_just_begun() -> None:
    sums = begun(1)[0]
    assert standing.loss_of(sums, ALPHA) == standing.lead_of(sums, ALPHA) == (0.0, math.inf)
    assert standing.late_lead_of(sums) == -math.inf
    assert standing.is_calibrated(sums)
    assert not standing.lead_of(sums, ALPHA).is_above_zero


def test_all_tests_of_a_goal_share_one_alpha() -> None:
    shares = [ALPHA / (k * (k + 1.0)) for k in range(1, 100_000)]
    assert sum(shares) == pytest.approx(ALPHA, rel=1e-4)
    assert sum(shares) < ALPHA
    sums = begun(2)
    for _ in range(300):
        standing.tally(np.array([0.4, 0.6]), 1.0, 1.0, 0, True, sums)
        standing.tally(np.array([0.4, 0.6]), 0.0, 1.0, 0, True, sums)
    radii = []
    for test in (1, 2, 50, 5_000):
        sums[1, standing.TEST] = test
        radii.append(standing.lead_of(sums[1], ALPHA).radius)
    assert radii == sorted(radii) and radii[-1] < 3.0 * radii[0], "many tests cost little"


def test_a_new_test_forgets_the_lead_and_a_new_round_its_half_and_both_keep_the_losses() -> None:
    sums = begun(2)
    for _ in range(10):
        standing.tally(np.array([0.4, 0.6]), 1.0, 2.0, 0, True, sums)
    before = sums.copy()
    of_lead = [standing.LEAD_ROWS, standing.LEAD, standing.LEAD_SQUARES, standing.LEAD_SPREAD]
    of_round = [standing.LATE_ROWS, standing.LATE_LEAD]
    standing.begin_round(sums)
    assert not sums[:, of_round].any()
    rest = [column for column in range(standing.COLUMNS) if column not in of_round]
    np.testing.assert_array_equal(sums[:, rest], before[:, rest])
    sums[:] = before
    standing.begin_test(sums[1], 9)
    assert not sums[1, of_lead + of_round].any() and sums[1, standing.TEST] == 9
    rest = [column for column in rest if column not in {*of_lead, standing.TEST}]
    np.testing.assert_array_equal(sums[1, rest], before[1, rest])
    np.testing.assert_array_equal(sums[0], before[0])


@pytest.mark.parametrize(
    ("expected", "observed", "is_calibrated"),
    [(100.0, 100.0, True), (201.0, 100.0, True), (204.0, 100.0, False), (48.0, 100.0, False), (50.0, 100.0, True),
     (0.9, 0.0, True), (1.1, 0.0, False)],
)  # fmt: skip
def test_calibrated_means_within_a_factor_of_two(expected: float, observed: float, is_calibrated: bool) -> None:
    sums = begun(1)[0]
    sums[standing.EXPECTED], sums[standing.OBSERVED] = expected, observed
    assert standing.is_calibrated(sums) is is_calibrated


def test_weighted_losses_are_those_of_choosing_all_actions_alike() -> None:
    """The mean by weight, of rows chosen unevenly, comes to the mean over actions."""
    rng = np.random.default_rng(4)
    chosen_with, rates, expected = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.5, 0.8]), np.array([0.2, 0.3, 0.9])
    sums = begun(1)
    for action in rng.choice(3, 20_000, p=chosen_with):
        reward = float(rng.random() < rates[action])
        standing.tally(expected[[action]], reward, standing.weight_of(chosen_with[action]), 0, True, sums)
    truth = float(np.mean(-rates * np.log(expected) - (1.0 - rates) * np.log(1.0 - expected)))
    estimate = standing.loss_of(sums[0], 1e-4)
    assert abs(estimate.mean - truth) < estimate.radius < 0.1


def test_rounding_proves_nothing() -> None:
    """Two learners that expect the same by other ways of computing differ by the last bit, in every row alike."""
    sums, chance = begun(2), 0.999
    for i in range(400):
        standing.tally(np.array([chance, np.nextafter(chance, 0.0)]), float(i % 3 == 0), 1.0, 0, True, sums)
    assert sums[1, standing.LEAD] > 0.0
    assert not standing.lead_of(sums[1], ALPHA).is_above_zero


@pytest.mark.slow
@pytest.mark.parametrize(
    ("serving", "other"), [(0.001, 0.0001), (0.001, 0.0005), (0.01, 0.005), (0.01, 0.02), (0.05, 0.03), (0.05, 0.07)]
)
@pytest.mark.parametrize("chances", [(1.0,), (0.95, 0.04, 0.01)])
def test_rare_rewards_make_nobody_lead_who_expects_none(
    serving: float, other: float, chances: tuple[float, ...]
) -> None:
    """Where two learners are equally wrong, no more than alpha of 100 runs prove a lead, looked at every 32 rows.

    The rate is the one at which the mean lead is 0. With the spread of the rows so far alone, nine of ten runs would
    prove one: before the first reward comes, the lead is the same in every row. False alarms: see FALSE_ALARM there.
    """
    up, down = math.log(other / serving), math.log((1.0 - other) / (1.0 - serving))
    rate = -down / (up - down)
    rng, runs, rows = np.random.default_rng(5), 100, 8_192
    n_proven = 0
    for _ in range(runs):
        weights = np.minimum(1.0 / rng.choice(chances, rows, p=chances), WEIGHT_MAX)
        leads = weights * np.where(rng.random(rows) < rate, up, down)
        spreads = weights**2 * spread(serving, other)
        totals = np.cumsum(np.column_stack([np.ones(rows), leads, leads**2, spreads]), axis=0)[31::32]
        sums = begun(1)[0]
        for looked_at in totals:
            sums[[standing.LEAD_ROWS, standing.LEAD, standing.LEAD_SQUARES, standing.LEAD_SPREAD]] = looked_at
            if standing.lead_of(sums, 2.0 * ALPHA).is_above_zero:  # the first test has half
                n_proven += 1
                break
    assert n_proven <= stats.binom.isf(1e-4, runs, ALPHA)


def test_a_true_lead_at_rare_rewards_is_found() -> None:
    rng = np.random.default_rng(6)
    sums = begun(2)
    for _ in range(8_000):
        is_hot = rng.random() < 0.5
        rate = 0.05 if is_hot else 0.001
        reward = float(rng.random() < rate)
        standing.tally(np.array([0.0255, rate]), reward, 1.0, 0, True, sums)
    assert standing.lead_of(sums[1], ALPHA).is_above_zero
