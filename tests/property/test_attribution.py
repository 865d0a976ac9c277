"""Any paths: nothing is made or lost, order is without effect, and every model is what its definition says."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.outcomes.attribution import Model, Terms, attribute, weigh
from server.outcomes.journeys import Meetings, lay_out
from server.outcomes.removal import removal_effects
from tests.support.attributing import Path, Row, attribute_slowly, effects_by_walking, paths_of, told

N_CHANNELS = 4
VALUES = st.floats(-1e6, 1e6)


@st.composite
def a_row(draw: st.DrawFn, length_max: int = 5) -> Row:
    codes = draw(st.lists(st.integers(0, N_CHANNELS - 1), min_size=1, max_size=length_max))
    outcomes = draw(st.integers(0, 5))
    gaps = draw(st.lists(st.floats(0.0, 50.0), min_size=len(codes), max_size=len(codes)))
    ages = np.cumsum(gaps)[::-1].tolist()
    return Row(codes, outcomes, draw(VALUES) if outcomes else 0.0, draw(st.integers(0, 5)), ages)


ROWS = st.lists(a_row(), max_size=8)
TERMS = st.builds(
    lambda half_life, shares, order: Terms(half_life, shares[0], shares[1], order),
    st.floats(0.5, 100.0),
    st.sampled_from([(0.4, 0.4), (0.0, 0.0), (1.0, 0.0), (0.0, 0.3), (0.5, 0.5)]),
    st.integers(1, 3),
)


@given(rows=ROWS, terms=TERMS)
def test_columns_are_what_path_after_path_gives(rows: list[Row], terms: Terms) -> None:
    scale = 1.0 + sum(abs(row.value) for row in rows)
    for model in Model:
        earned = attribute(paths_of(rows), N_CHANNELS, model, terms)
        slow = np.array(attribute_slowly(rows, N_CHANNELS, model, terms))
        assert earned.outcomes == pytest.approx(slow[:, 0], rel=1e-9, abs=1e-9), model
        assert earned.values == pytest.approx(slow[:, 1], rel=1e-9, abs=1e-9 * scale), model


@given(rows=ROWS, terms=TERMS)
def test_nothing_is_made_or_lost(rows: list[Row], terms: Terms) -> None:
    outcomes, value = sum(row.outcomes for row in rows), sum(row.value for row in rows)
    magnitude = sum(abs(row.value) for row in rows)
    for model in Model:
        earned = attribute(paths_of(rows), N_CHANNELS, model, terms)
        assert earned.outcomes.min() >= 0.0, model
        assert abs(earned.outcomes.sum() - outcomes) <= 1e-12 * outcomes, model
        assert abs(earned.values.sum() - value) <= 1e-12 * magnitude, model


@given(rows=ROWS, terms=TERMS, random=st.randoms(use_true_random=False))
def test_order_of_paths_and_names_of_channels_are_without_effect(rows: list[Row], terms: Terms, random: Random) -> None:
    shuffled, names = list(rows), list(range(N_CHANNELS))
    random.shuffle(shuffled)
    random.shuffle(names)
    renamed = [row._replace(codes=[names[code] for code in row.codes]) for row in shuffled]
    scale = 1.0 + sum(abs(row.value) for row in rows)
    for model in Model:
        before = attribute(paths_of(rows), N_CHANNELS, model, terms)
        after = attribute(paths_of(renamed), N_CHANNELS, model, terms)
        assert after.outcomes[names] == pytest.approx(before.outcomes, rel=1e-9, abs=1e-9), model
        assert after.values[names] == pytest.approx(before.values, rel=1e-9, abs=1e-9 * scale), model


@given(rows=ROWS, terms=TERMS)
def test_a_path_with_counts_is_the_path_as_often(rows: list[Row], terms: Terms) -> None:
    one_by_one = [
        row._replace(
            outcomes=is_outcome, value=row.value / row.outcomes if is_outcome else 0.0, silences=1 - is_outcome
        )
        for row in rows
        for is_outcome, count in ((1, row.outcomes), (0, row.silences))
        for _ in range(count)
    ]
    scale = 1.0 + sum(abs(row.value) for row in rows)
    for model in Model:
        together = attribute(paths_of(rows), N_CHANNELS, model, terms)
        apart = attribute(paths_of(one_by_one), N_CHANNELS, model, terms)
        assert apart.outcomes == pytest.approx(together.outcomes, rel=1e-9, abs=1e-9), model
        assert apart.values == pytest.approx(together.values, rel=1e-9, abs=1e-9 * scale), model


@given(rows=ROWS, order=st.integers(1, 3))
def test_removal_effects_are_what_walking_the_chain_gives(rows: list[Row], order: int) -> None:
    effects = removal_effects(paths_of(rows), N_CHANNELS, order)
    assert effects == pytest.approx(effects_by_walking(rows, N_CHANNELS, order), abs=1e-9)
    assert effects.min() >= 0.0
    assert effects.max() <= 1.0


@given(rows=st.lists(a_row(length_max=3), max_size=8))
def test_chain_that_remembers_whole_paths_loses_the_outcomes_that_passed(rows: list[Row]) -> None:
    together = sum(row.outcomes for row in rows)
    passed = [sum(row.outcomes for row in rows if code in row.codes) for code in range(N_CHANNELS)]
    wanted = [each / together if together else 0.0 for each in passed]
    assert removal_effects(paths_of(rows), N_CHANNELS, 3) == pytest.approx(wanted, abs=1e-12)


@given(row=a_row(length_max=30), terms=TERMS)
def test_one_outcome_is_shared_as_a_path_of_its_own(row: Row, terms: Terms) -> None:
    assert row.ages is not None
    times_us = (-np.round(np.array(row.ages) * 1e6)).astype(np.int64)
    terms_us = terms._replace(half_life=terms.half_life * 1e6)
    effects = np.linspace(0.0, 1.0, N_CHANNELS)
    codes = np.array(row.codes, np.int32)
    for model in Model:
        weights = weigh(model, codes, times_us, 0, terms_us, effects)
        assert weights.min() >= 0.0, model
        assert abs(weights.sum() - 1.0) < 1e-12, model
        if model is not Model.MARKOV:
            earned = attribute(paths_of([row._replace(outcomes=1, value=1.0)]), N_CHANNELS, model, terms)
            assert np.bincount(codes, weights, N_CHANNELS) == pytest.approx(earned.outcomes, abs=1e-6), model


INSTANTS = st.integers(0, 60)
PEOPLE = st.integers(0, 2)


@given(
    touchpoints=st.lists(st.tuples(PEOPLE, INSTANTS, st.integers(0, 3)), max_size=25),
    outcomes=st.lists(st.tuples(PEOPLE, INSTANTS, st.floats(-10, 10)), max_size=8),
    window=st.integers(1, 40),
)
def test_paths_are_those_that_looking_person_by_person_finds(
    touchpoints: list[tuple[int, int, int]], outcomes: list[tuple[int, int, float]], window: int
) -> None:
    def column(rows: Sequence[tuple[int, int, float]], i: int) -> list[float]:
        return [row[i] for row in rows]

    meetings = Meetings(
        tuple("wxyz"),
        np.array(column(touchpoints, 0), np.int32), np.array(column(touchpoints, 1), np.int64),
        np.array(column(touchpoints, 2), np.int32),
        np.array(column(outcomes, 0), np.int32), np.array(column(outcomes, 1), np.int64),
        np.array(column(outcomes, 2), np.float64),
    )  # fmt: skip
    laid = lay_out(meetings, window, 60)
    ordered = sorted(touchpoints, key=lambda each: each[:2])
    wanted: list[Path] = []
    unled, led = [], set()
    for person, time, value in outcomes:
        before = [i for i, each in enumerate(ordered) if each[0] == person and time - window < each[1] <= time]
        led.update(before)
        if before:
            wanted.append((["wxyz"[ordered[i][2]] for i in before], 1, value))
        else:
            unled.append(value)
    run: list[int] = []
    for i in [*(i for i in range(len(ordered)) if i not in led), -1]:
        goes_on = i >= 0 and run and i == run[-1] + 1 and ordered[i][0] == ordered[run[-1]][0]
        if run and not (goes_on and ordered[i][1] - ordered[run[-1]][1] < window):
            wanted.append((["wxyz"[ordered[j][2]] for j in run], 0, 0.0))
            run = []
        run.append(i)
    assert told(laid, meetings.channels) == wanted
    assert laid.n_unled == len(unled)
    assert laid.unled_value == pytest.approx(sum(unled))
    assert laid.n_people == len({each[0] for each in touchpoints})
    lasts = laid.paths.ages[laid.paths.starts[1:] - 1]
    assert (laid.paths.ages >= 0).all()
    assert (lasts < window).all()
