"""How far do the values of each feature lie apart? Found out from the stream, so that nobody need declare it.

Handed rows in order, it keeps the mean and the variance of every column and gives each row back in those units:
(value - center) / spread. Learners weigh all features alike, so a number in thousands and one in hundredths must come
to them in the same size. The columns of a category are left as they are: they are 0 or 1, and blowing up the rare
ones would call their effect large before anything is known of it. It never reads a clock, a log or a disk.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from training.learners.base import FEATURE_MAX, Doubles
from tsugi.log.v1.learner_pb2 import FeatureScales

# From so many values on, one that is further out than FEATURE_MAX spreads counts as if it lay there: one dirty record
# would otherwise flatten everybody else's value for good.
SETTLED_ROWS: Final = 16

Columns = NDArray[np.intp]


class Scaling:
    """Running mean and variance of each column, by Welford's recurrence (Technometrics 4, 1962).

    Attributes:
        centers: float64[columns]; 0 for what is left as it is.
        spreads: float64[columns], above 0; 1 for what is left as it is, or was always the same.
    """

    def __init__(self) -> None:
        self.centers = np.zeros(0)
        self.spreads = np.ones(0)
        self._counts = np.zeros(0)
        self._squares = np.zeros(0)

    def grow(self, n_columns: int) -> None:
        """Have this many columns, the new ones without a value yet."""
        n_new = n_columns - self.centers.size
        self.centers = np.append(self.centers, np.zeros(n_new))
        self.spreads = np.append(self.spreads, np.ones(n_new))
        self._counts = np.append(self._counts, np.zeros(n_new))
        self._squares = np.append(self._squares, np.zeros(n_new))

    def take(self, columns: Columns, values: Doubles) -> Doubles:
        """Take note of one row's values, finite, and return them in the units that are then in force.

        Args:
            columns: intp[d], none twice.
            values: float64[d].

        Cost: some 15 µs, hardly more for a hundred columns.
        """
        counts, centers, squares = self._counts[columns], self.centers[columns], self._squares[columns]
        distances = values - centers
        far = np.abs(distances) > FEATURE_MAX * self.spreads[columns]
        if far.any():
            reach = FEATURE_MAX * self.spreads[columns]
            cut = np.minimum(np.maximum(distances, -reach), reach)
            distances = np.where(far & (counts >= SETTLED_ROWS) & (squares > 0.0), cut, distances)
        counts += 1.0
        steps = distances / counts
        centers += steps
        squares += distances * (distances - steps)
        spreads = np.sqrt(squares / counts)
        spreads[spreads == 0.0] = 1.0
        self._counts[columns], self.centers[columns], self.spreads[columns] = counts, centers, spreads
        self._squares[columns] = squares
        units: Doubles = (values - centers) / spreads
        return units

    def save(self) -> FeatureScales:
        """Return the state for a snapshot."""
        return FeatureScales(
            counts=self._counts.tobytes(), means=self.centers.tobytes(), squares=self._squares.tobytes()
        )

    def load(self, saved: FeatureScales) -> None:
        """Take over a saved state, to the bit."""
        self._counts = np.frombuffer(saved.counts).copy()
        self.centers = np.frombuffer(saved.means).copy()
        self._squares = np.frombuffer(saved.squares).copy()
        self.spreads = np.sqrt(self._squares / np.maximum(self._counts, 1.0))
        self.spreads[self.spreads == 0.0] = 1.0


def is_scaled(name: str) -> bool:
    """Whether a feature is put into units of its own; the columns of a category, "profile.channel=web", are not."""
    return "=" not in name
