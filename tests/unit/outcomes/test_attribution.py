"""What each channel earns, by each model: small paths whose answers are known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from server.errors import TsugiError
from server.outcomes import removal
from server.outcomes.attribution import (
    Model,
    Terms,
    attribute,
    keep_newest,
    weigh,
)
from tests.support.attributing import HOUR_US, Row, equal, paths_of
from tsugi.v1.error_reason_pb2 import ErrorReason

A, B, C, D = range(4)
ONE_PATH = [Row([A, B, C, D], outcomes=10, value=50.0)]


@pytest.mark.parametrize(
    ("model", "outcomes"),
    [
        (Model.LAST, [0.0, 0.0, 0.0, 10.0]),
        (Model.FIRST, [10.0, 0.0, 0.0, 0.0]),
        (Model.LINEAR, [2.5, 2.5, 2.5, 2.5]),
        (Model.TIME_DECAY, [10 / 15, 20 / 15, 40 / 15, 80 / 15]),
        (Model.POSITION, [4.0, 1.0, 1.0, 4.0]),
        (Model.MARKOV, [2.5, 2.5, 2.5, 2.5]),  # without any of them nobody arrives
    ],
)
def test_one_path_is_shared_as_its_model_says(model: Model, outcomes: list[float]) -> None:
    earned = attribute(paths_of(ONE_PATH), 4, model, Terms(half_life=1.0))
    assert earned.outcomes == pytest.approx(outcomes, abs=1e-12)
    assert earned.values == pytest.approx([5.0 * each for each in outcomes], abs=1e-12)


@pytest.mark.parametrize("model", list(Model))
def test_single_touchpoint_earns_everything(model: Model) -> None:
    earned = attribute(paths_of([Row([B], outcomes=3, value=7.0, silences=2)]), 3, model, Terms())
    assert earned.outcomes.tolist() == [0.0, 3.0, 0.0]
    assert earned.values.tolist() == [0.0, 7.0, 0.0]


@pytest.mark.parametrize("model", list(Model))
def test_nothing_is_earned_where_nothing_happened(model: Model) -> None:
    for rows in ([], [Row([A, B], outcomes=0, silences=4)], [Row([A], outcomes=0)]):
        earned = attribute(paths_of(rows), 2, model, Terms())
        assert earned.outcomes.tolist() == earned.values.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("terms", "pair", "three"),
    [
        (Terms(), [0.5, 0.5], [0.4, 0.2, 0.4]),
        (Terms(first_share=0.6, last_share=0.2), [0.75, 0.25], [0.6, 0.2, 0.2]),
        (Terms(first_share=0.0, last_share=0.0), [0.5, 0.5], [0.0, 1.0, 0.0]),
        (Terms(first_share=1.0, last_share=0.0), [1.0, 0.0], [1.0, 0.0, 0.0]),
    ],
)
def test_shares_of_position_are_those_stated(terms: Terms, pair: list[float], three: list[float]) -> None:
    assert attribute(paths_of([Row([A, B])]), 2, Model.POSITION, terms).outcomes == pytest.approx(pair)
    assert attribute(paths_of([Row([A, B, C])]), 3, Model.POSITION, terms).outcomes == pytest.approx(three)


def test_however_old_a_path_is_it_is_shared_by_the_distances_within() -> None:
    old = [Row([A, B], ages=[1e9 + 7.0, 1e9])]
    assert attribute(paths_of(old), 2, Model.TIME_DECAY, Terms()).outcomes == pytest.approx([1 / 3, 2 / 3])


def test_removal_effects_of_the_textbook_are_found() -> None:
    """Paths a>b to an outcome, a to silence, b>a to an outcome, b to silence: one of each.

    From the start a and b by halves; from a: b, outcome, silence by 1/3 each; from b: a, outcome, silence likewise.
    So v = 1/3 + v/3 = 1/2 from both. Without b: 1/2 × 1/3 = 1/6, an effect of 2/3.
    """
    rows = [Row([A, B]), Row([A], 0, silences=1), Row([B, A]), Row([B], 0, silences=1)]
    assert removal.removal_effects(paths_of(rows), 2, 1) == pytest.approx([2 / 3, 2 / 3], abs=1e-15)


def test_channel_that_leads_to_no_outcome_has_exactly_no_effect() -> None:
    rows = [Row([A, B], 3), Row([A, C, D], 0, silences=9), Row([C], 0, silences=5)]
    effects = removal.removal_effects(paths_of(rows), 5, 1)
    assert effects[[C, D, 4]].tolist() == [0.0, 0.0, 0.0]
    assert effects[[A, B]] == pytest.approx([1.0, 1.0])


def test_where_everybody_arrives_an_effect_is_the_share_that_passes() -> None:
    rows = [Row([A], 6), Row([B], 2), Row([B, B, B], 2)]
    assert removal.removal_effects(paths_of(rows), 2, 1) == pytest.approx([0.6, 0.4])


def test_loops_are_walked_as_often_as_they_are() -> None:
    """Nine in ten stay on a, the tenth goes on to b."""
    rows = [Row([A] * 10 + [B], 1)]
    assert removal.removal_effects(paths_of(rows), 2, 1) == pytest.approx([1.0, 1.0])
    rows.append(Row([B], 0, silences=1))
    # Half of those from the start come to a, and b is left by one outcome in two.
    assert removal.removal_effects(paths_of(rows), 2, 1) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_tells_apart_what_came_before(order: int) -> None:
    """Whoever comes to c by a arrives, by b never does; a chain that remembers one touchpoint cannot know."""
    rows = [Row([A, C], 1), Row([B, C], 0, silences=1)]
    effects = removal.removal_effects(paths_of(rows), 3, order)
    assert effects == pytest.approx([0.5, 0.5, 1.0] if order == 1 else [1.0, 0.0, 1.0])


def test_too_many_states_are_refused_and_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "STATES_MAX", 5)
    rows = paths_of([Row([A, B, C, D])])
    assert removal.removal_effects(rows, 4, 1).all(), "four and the start"
    with pytest.raises(TsugiError, match="at most 5 Markov states of order 2") as refused:
        removal.removal_effects(paths_of([Row([A, B, A, C, D])]), 4, 2)
    assert refused.value.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED


def test_twelve_channels_of_order_three_are_within_the_limit() -> None:
    assert 1 + 12 + 12**2 + 12**3 == 1_885 <= removal.STATES_MAX


def test_of_a_longer_path_the_newest_touchpoints_are_kept() -> None:
    rows = [Row([A, B, C, D], 2, 8.0), Row([A], 1), Row([C, B], 0, silences=3)]
    paths, n_cut = keep_newest(paths_of(rows), 2)
    wanted = paths_of([Row([C, D], 2, 8.0), Row([A], 1), Row([C, B], 0, silences=3)])
    assert n_cut == 1
    assert equal(paths, wanted)
    untouched = paths_of(rows)
    assert keep_newest(untouched, 4) == (untouched, 0)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (Model.LAST, [0.0, 0.0, 1.0]),
        (Model.FIRST, [1.0, 0.0, 0.0]),
        (Model.LINEAR, [1 / 3, 1 / 3, 1 / 3]),
        (Model.TIME_DECAY, [1 / 7, 2 / 7, 4 / 7]),
        (Model.POSITION, [0.4, 0.2, 0.4]),
        (Model.MARKOV, [0.25, 0.5, 0.25]),
    ],
)
def test_one_outcome_is_shared_over_the_touchpoints_before_it(model: Model, weights: list[float]) -> None:
    channels = np.array([A, B, A], np.int32)
    times_us = np.array([HOUR_US, 2 * HOUR_US, 3 * HOUR_US], np.int64)
    shared = weigh(model, channels, times_us, 9 * HOUR_US, Terms(half_life=HOUR_US), np.array([0.3, 0.6]))
    assert shared == pytest.approx(weights, abs=1e-12)


def test_channels_without_an_effect_are_weighed_alike() -> None:
    channels, times_us = np.array([A, B], np.int32), np.zeros(2, np.int64)
    assert weigh(Model.MARKOV, channels, times_us, 0, Terms(), np.zeros(2)).tolist() == [0.5, 0.5]
