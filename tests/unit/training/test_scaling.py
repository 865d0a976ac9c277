"""Units found out from the stream: those of the rows seen, whatever their size, and proof against a dirty record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from server.catalog.catalog import Doubles
from training.learners.base import FEATURE_MAX
from training.scaling import SETTLED_ROWS, Scaling, is_scaled, reading_of


def took(scaling: Scaling, values: Sequence[float]) -> list[float]:
    """Have a row of all columns taken note of, and return it in their units."""
    columns = {f"profile.f{column}": column for column in range(len(values))}
    x = scaling.take(np.array(values, np.float32), reading_of(list(columns), columns))
    assert x[0] == 1.0
    return [float(value) for value in x[1:]]


def scaling_of(rows: Doubles) -> Scaling:
    scaling = Scaling()
    scaling.grow(rows.shape[1])
    for row in rows:
        took(scaling, row.tolist())
    return scaling


def test_centers_and_spreads_are_those_of_the_rows() -> None:
    rows = np.random.default_rng(1).normal((1e3, 0.01), (3.0, 0.002), (500, 2)).astype(np.float32).astype(np.float64)
    scaling = scaling_of(rows)
    np.testing.assert_allclose(scaling.centers, rows.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(scaling.spreads, rows.std(axis=0), rtol=1e-6)


def test_a_row_is_given_back_in_the_units_it_has_helped_to_find() -> None:
    scaling = scaling_of(np.array([[1.0, 7.0]]))
    np.testing.assert_allclose(took(scaling, [3.0, 7.0]), [1.0, 0.0])
    assert scaling.spreads.tolist() == [1.0, 1.0]  # of what was always the same, 1


def test_columns_that_come_later_count_from_their_own_first_row() -> None:
    scaling = scaling_of(np.full((50, 1), 4.0))
    scaling.grow(2)
    took(scaling, [4.0, 9.0])
    assert scaling.centers.tolist() == [4.0, 9.0]


def test_one_dirty_record_does_not_flatten_everybody_else() -> None:
    scaling = scaling_of(np.random.default_rng(2).normal(0.0, 1.0, (10 * SETTLED_ROWS, 1)))
    before = scaling.spreads[0]
    took(scaling, [1e12])
    assert scaling.spreads[0] < before * np.sqrt(1.0 + FEATURE_MAX**2 / (10 * SETTLED_ROWS))


def test_a_restored_scaling_goes_on_to_the_bit() -> None:
    rows = np.random.default_rng(3).normal(5.0, 2.0, (60, 2))
    scaling, restored = scaling_of(rows[:30]), Scaling()
    restored.load(scaling.save())
    for row in rows[30:]:
        assert took(scaling, row.tolist()) == took(restored, row.tolist())
    assert scaling.save() == restored.save()


@pytest.mark.parametrize(("name", "has_unit"), [("profile.age", True), ("profile.channel=web", False)])
def test_columns_of_a_category_are_left_as_they_are(name: str, has_unit: bool) -> None:
    assert is_scaled(name) is has_unit
