"""Drawn frequencies equal the stated selection probabilities, slot by slot.

Each case draws at least 100,000 decisions of one fixed context, all through the core, and compares counts with the
logged distribution by Pearson's chi-square. The seeds are fixed, so the tests are deterministic; over random seeds each
comparison would fail in one of ten thousand (FALSE_ALARM). The same test must fail when one probability is 2% off.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from server.decisioning.decide import EXPLORE, RANDOM_CONTROL, Scratch, decide
from tests.support.catalogs import compiled
from tests.support.deciding import TOKEN_KEY, Desk, given_champion
from tests.support.populating import Person
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.v1.decision_service_pb2 import DecideRequest

FALSE_ALARM = 1e-4
N_DRAWS = 120_000
TOGETHER = 2_000
BY_SEED = {"thompson", "bounded"}  # their stated chances differ from seed to seed
PROPENSITIES = {"action_0": 0.30, "action_1": 0.24, "action_2": 0.15, "action_3": 0.05}


def desk() -> Desk:
    catalog = compiled()
    d = len(catalog.learned.names) + 1
    arrays = LearnerArrays(format_version=1, epoch=1, features=catalog.learned.names)
    arrays.goals.add(
        goal="click",
        actions=catalog.actions.names,
        correction_weights=np.zeros((4, d - 1)).tobytes(),
        correction_intercepts=np.zeros(4).tobytes(),
        posterior_means=np.zeros((4, d)).tobytes(),
        posterior_covariances=np.tile(np.eye(d) * 0.003, (4, 1, 1)).tobytes(),
        posterior_scale=1.0,
    )
    here = Desk(catalog, champion=given_champion(catalog, PROPENSITIES, "click"), arrays=arrays)
    here.meet(Person({"age": 40.0}, {}))
    return here


def keys(n: int) -> list[bytes]:
    rng = np.random.default_rng(11)
    return [bytes(row) for row in rng.integers(0, 256, (n, 16), dtype=np.uint8)]


def drawn(
    here: Desk, placement: str, n_slots: int, mode: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Return the chosen rows [draws, slots], their stated chances, and the distributions [draws, slots, actions].

    What is gathered is the same for every draw, so it is gathered once; only the seeds differ.
    """
    request = DecideRequest(profile_id="00" * 16)
    request.placements.add(placement=placement, count=n_slots)
    chosen, chances, distributions = [], [], []
    seeds = np.array([TOKEN_KEY.seed(key) for key in keys(N_DRAWS)], np.uint64)
    gathered, _ = here.decisions([request] * TOGETHER, 0, [bytes(16)] * TOGETHER, mode)
    for some in seeds.reshape(-1, TOGETHER):
        decisions = decide(gathered.questions()._replace(seeds=some), here.catalog, here.models, Scratch())
        chosen.append(decisions.slot_codes[:, 1].reshape(-1, n_slots))
        chances.append(decisions.slot_numbers[:, 0].reshape(-1, n_slots))
        distributions.append(decisions.distributions.reshape(-1, n_slots, 4))
    return np.concatenate(chosen), np.concatenate(chances), np.concatenate(distributions)


def p_value(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    possible = expected > 0
    assert not counts[~possible].any(), "something impossible was drawn"
    if possible.sum() == 1:
        return 1.0
    return float(stats.chisquare(counts[possible], expected[possible] * counts.sum() / expected.sum()).pvalue)


CASES = [
    ("greedy", 2, EXPLORE),
    ("epsilon_greedy", 1, EXPLORE),
    ("epsilon_greedy", 3, EXPLORE),
    ("square_cb", 1, EXPLORE),
    ("square_cb", 3, EXPLORE),
    ("thompson", 1, EXPLORE),
    ("thompson", 3, EXPLORE),
    ("softmax", 1, EXPLORE),
    ("softmax", 3, EXPLORE),
    ("capped", 2, EXPLORE),
    ("floored", 3, EXPLORE),
    ("bounded", 3, EXPLORE),
    ("upper", 2, EXPLORE),
    ("upper_bounded", 2, EXPLORE),
    ("square_cb", 2, RANDOM_CONTROL),
]


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "n_slots", "mode"), CASES)
def test_frequencies_equal_stated_probabilities(placement: str, n_slots: int, mode: int) -> None:
    chosen, chances, distributions = drawn(desk(), placement, n_slots, mode)
    np.testing.assert_allclose(distributions.sum(2), 1.0, atol=1e-9)
    stated = np.take_along_axis(distributions, chosen[:, :, np.newaxis].astype(np.intp), 2)[:, :, 0]
    np.testing.assert_array_equal(stated, chances)
    for slot in range(n_slots):
        # Where earlier slots (or, for Thompson, the seed) change the distribution, the expected count of each action
        # is the sum of its stated chances; given the history, draws are independent.
        counts = np.bincount(chosen[:, slot], minlength=4)
        assert p_value(counts, distributions[:, slot].sum(0)) > FALSE_ALARM
        history = chosen[:, :slot].astype(np.int64) @ (4 ** np.arange(slot))
        for path in np.unique(history) if slot and placement not in BY_SEED else ():
            same = history == path
            if same.sum() > 2_000:
                counts = np.bincount(chosen[same, slot], minlength=4)
                assert p_value(counts, distributions[same, slot].sum(0)) > FALSE_ALARM / 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "n_slots", "mode"),
    [case for case in CASES if case[0] not in {"greedy", "upper"}],
)
def test_a_probability_that_is_two_percent_off_is_noticed(placement: str, n_slots: int, mode: int) -> None:
    chosen, _, distributions = drawn(desk(), placement, n_slots, mode)
    expected = distributions[:, 0].sum(0)
    most = int(expected.argmax())
    other = int(expected.argsort()[-2])
    expected[most] -= 0.02 * N_DRAWS
    expected[other] += 0.02 * N_DRAWS
    assert p_value(np.bincount(chosen[:, 0], minlength=4), expected) < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "least"), [("floored", 0.04), ("bounded", 0.1), ("capped", 0.2 / 3), ("upper_bounded", 0.05)]
)
def test_nobody_has_less_than_the_bounds_leave(placement: str, least: float) -> None:
    chosen, _, distributions = drawn(desk(), placement, 1, EXPLORE)
    assert distributions.min() == pytest.approx(least, abs=1e-9)
    counts = np.bincount(chosen[:, 0], minlength=4)
    assert stats.binom.sf(counts.min(), N_DRAWS, least) < 1.0 - FALSE_ALARM, "as often as the least allows"
