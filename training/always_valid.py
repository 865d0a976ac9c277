"""Is a mean above 0? Told after every row for as long as one likes, without ever being fooled by having looked often.

Sums in, a bound out; nothing is kept here.
"""

from __future__ import annotations

import math
from typing import Final

ROWS_TUNED_FOR: Final = 2_000.0  # where the bound is tightest; it holds everywhere
ROWS_MIN: Final = 200  # below, the spread of the differences is not known well enough


def radius(n_rows: float, total: float, total_squares: float, alpha: float) -> float:
    """Return how far the mean of n_rows independent numbers may lie from their expectation.

    With a chance of at least 1 - alpha, the expectation lies within mean ± radius at every n_rows at once: the
    asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (Annals of Statistics 52, 2024,
    theorem 2.2), Robbins' normal mixture with the observed spread. Infinite below ROWS_MIN rows.

    Args:
        n_rows: how many.
        total: their sum.
        total_squares: the sum of their squares.
        alpha: the error allowed, above 0, below 1.
    """
    if n_rows < ROWS_MIN:
        return math.inf
    mean = total / n_rows
    variance = max(total_squares / n_rows - mean * mean, 0.0)
    # Its equation for the rho that is best at ROWS_TUNED_FOR.
    doubled = -2.0 * math.log(alpha)
    scaled = n_rows * (doubled + math.log(doubled + 1.0)) / ROWS_TUNED_FOR
    return math.sqrt(variance * 2.0 * (scaled + 1.0) / (n_rows * scaled) * math.log(math.sqrt(scaled + 1.0) / alpha))
