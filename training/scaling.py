"""How far do the values of each feature lie apart? Found out from the stream, so that nobody need declare it.

Handed rows in order, it keeps the mean and the variance of every column and gives each row back in those units:
(value - center) / spread. Learners weigh all features alike, so a number in thousands and one in hundredths must come
to them in the same size. The columns of a category are left as they are: they are 0 or 1, and blowing up the rare
ones would call their effect large before anything is known of it. It never reads a clock, a log or a disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import Floats
from server.catalog.declared import LEARNED_LIMIT_UNSTATED
from server.kernel import kernel
from training.learners.base import FEATURE_MAX, Doubles
from tsugi.log.v1.learner_pb2 import FeatureScales

# From so many values on, one that is further out than FEATURE_MAX spreads counts as if it lay there: one dirty record
# would otherwise flatten everybody else's value for good.
SETTLED_ROWS: Final = 16
VALUE_MAX: Final = LEARNED_LIMIT_UNSTATED  # of a recorded number; whatever lies further out came from elsewhere


class Reading(NamedTuple):
    """How rows with the same names are read."""

    places: NDArray[np.intp]  # of the names that have a column, within a recorded row
    columns: NDArray[np.intp]  # theirs
    scaled: NDArray[np.bool_]  # which of them are put into units of their own


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

    def take(self, recorded: Floats, reading: Reading, *, is_new: bool = True) -> Doubles:
        """Take note of one row's values, and return it as learners read it, in the units that are then in force.

        Args:
            recorded: float32[names], whatever came; what is no number counts as 0.
            reading: of its names.
            is_new: false: it was taken note of before, and is only returned.

        Returns:
            float64[columns + 1]: 1 for the intercept, then the columns, within ±FEATURE_MAX; 0 where it has no value.

        Cost: some 3 µs.
        """
        x = np.zeros(1 + self.centers.size)
        _take(recorded, *reading, is_new, self._counts, self.centers, self._squares, self.spreads, x)
        return x

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


def reading_of(names: Sequence[str], columns: dict[str, int]) -> Reading:
    """Return how rows with these names are read."""
    kept = [place for place, name in enumerate(names) if name in columns]
    return Reading(
        np.array(kept, np.intp),
        np.array([columns[names[place]] for place in kept], np.intp),
        np.array([is_scaled(names[place]) for place in kept], np.bool_),
    )


@kernel
def _take(
    recorded: Floats,
    places: NDArray[np.intp],
    columns: NDArray[np.intp],
    scaled: NDArray[np.bool_],
    is_new: bool,
    counts: Doubles,
    centers: Doubles,
    squares: Doubles,
    spreads: Doubles,
    x: Doubles,
) -> None:
    """See Scaling.take; the last five are written."""
    x[0] = 1.0
    for i in range(places.size):
        value = float(recorded[places[i]])
        if math.isnan(value):
            value = 0.0
        value = min(max(value, -VALUE_MAX), VALUE_MAX)
        column = columns[i]
        if scaled[i]:
            if is_new:
                distance = value - centers[column]
                if counts[column] >= SETTLED_ROWS and squares[column] > 0.0:
                    reach = FEATURE_MAX * spreads[column]
                    distance = min(max(distance, -reach), reach)
                counts[column] += 1.0
                step = distance / counts[column]
                centers[column] += step
                squares[column] += distance * (distance - step)
                spread = math.sqrt(squares[column] / counts[column])
                spreads[column] = spread if spread > 0.0 else 1.0
            value = (value - centers[column]) / spreads[column]
        x[1 + column] = min(max(value, -FEATURE_MAX), FEATURE_MAX)
