"""River's Bayesian linear regression with its numbers laid open: what the families here are made of.

Both read their features scaled, because the prior of River's regression is only consistent at alpha = 1 (``_grow``
sets precision *and* covariance to 1 / alpha).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from river import linear_model

from training.learners.base import Doubles, Features
from tsugi.log.v1.learner_pb2 import BayesianState

INTERCEPT: Final = "1"  # features are named "profile.…" and "context.…"


class RestorableRegression(linear_model.BayesianLinearRegression):
    """River's regression, with what it keeps to be read, saved and restored."""

    @property
    def index(self) -> dict[str, int]:
        """Where each feature stands in the arrays."""
        return {str(name): row for name, row in self._idx.items()}

    @property
    def precision(self) -> Doubles:
        """float64[capacity, capacity]."""
        return _doubles(self._ss_arr)

    @property
    def covariance(self) -> Doubles:
        """float64[capacity, capacity], its inverse."""
        return _doubles(self._ss_inv_arr)

    @property
    def mean(self) -> Doubles:
        """float64[capacity]."""
        self._ensure_m()
        return _doubles(self._m_arr)

    def expect(self, row: Features) -> tuple[float, float]:
        """Return mean and variance of what a row comes to, without the noise of one observation.

        River's own prediction says the same, at twice the time; see its equations 3.58 and 3.59. All the row's
        features have a place afterwards.
        """
        if not row.keys() <= self._idx.keys():
            self._ensure_features(row)
            self._m_dirty = True
        index = self._idx
        x = np.zeros(self._cap)
        x[[index[name] for name in row]] = list(row.values())
        return float(self.mean @ x), float(x @ self._ss_inv_arr @ x)

    def mean_by_column(self, columns: Mapping[str, int]) -> Doubles:
        """Return the mean in column order, the intercept last; what was never seen has that of its prior, 0.

        Args:
            columns: feature name to column, 0..d-1, holding at least every feature learned from.
        """
        mean, rows = np.zeros(len(columns) + 1), self._rows(columns)
        mean[rows] = self.mean[: len(rows)]
        return mean

    def covariance_by_column(self, columns: Mapping[str, int]) -> Doubles:
        """Return the covariance in column order likewise; what was never seen has that of its prior, 1."""
        covariance, rows = np.eye(len(columns) + 1), self._rows(columns)
        covariance[np.ix_(rows, rows)] = self.covariance[: len(rows), : len(rows)]
        return covariance

    def forget_half(self) -> None:
        """Halve what rows have told beyond the prior, and expect the same as before. Cost: O(capacity³)."""
        mean = self.mean.copy()
        self._ss_arr = (self._ss_arr + np.eye(self._cap)) / 2.0
        self._ss_inv_arr = np.asfortranarray(np.linalg.inv(self._ss_arr))
        self._eta_arr = self._ss_arr @ mean
        self._m_dirty = True

    def save(self, state: BayesianState) -> None:
        """Write every number; matrices whole, with the capacity River has grown them to."""
        state.features.extend(self.index)
        state.precision = self.precision.tobytes()
        state.covariance = self.covariance.tobytes()
        state.natural_mean = _doubles(self._eta_arr).tobytes()

    def load(self, saved: BayesianState) -> None:
        """Take over a saved state; afterwards nothing tells this regression from the saved one, to the bit."""
        natural_mean = np.frombuffer(saved.natural_mean)
        shape = (natural_mean.size, natural_mean.size)
        self._idx = {name: row for row, name in enumerate(saved.features)}
        self._ss_arr = np.frombuffer(saved.precision).reshape(shape).copy()
        # River keeps it in column order, and a product in another order rounds differently.
        self._ss_inv_arr = np.array(np.frombuffer(saved.covariance).reshape(shape), order="F")
        self._eta_arr = natural_mean.copy()
        self._cap = natural_mean.size
        self._m_dirty = True

    def _rows(self, columns: Mapping[str, int]) -> list[int]:
        return [len(columns) if name == INTERCEPT else columns[name] for name in self.index]


def scaled(features: Features, scale: float) -> Features:
    """Return the features and the constant 1 of the intercept, times a factor."""
    result = {name: value * scale for name, value in features.items()}
    result[INTERCEPT] = scale
    return result


def _doubles(array: Any) -> Doubles:
    """Say of one of River's arrays what it is."""
    return np.asarray(array, np.float64)
