"""River's Bayesian linear regression, one for each action, with its numbers laid open and its step compiled.

What the families of full covariance are made of, and the step of every logistic one. River's arrays stand in the order
of the space's columns, the intercept first, so that a row needs no names; the step is that of River's ``learn_one`` in
one kernel, and the predictions that exports are held against are River's own. Both families read their rows scaled,
because the prior of River's regression is only consistent at alpha = 1 (``_grow`` sets precision *and* covariance to
1 / alpha).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from river import linear_model

from server.kernel import kernel
from training.learners.base import Doubles
from training.space import Space
from tsugi.log.v1.learner_pb2 import ActionRegression

INTERCEPT: Final = "1"  # features are named "profile.…" and "context.…"

_TURNS_MAX: Final = 40
_GAP: Final = 1e-10


class Regression(linear_model.BayesianLinearRegression):
    """River's regression over the columns of a space; at least one, the intercept.

    Attributes:
        arrays: precision float64[d + 1, d + 1], covariance, its inverse, natural mean float64[d + 1], which is
            precision @ mean, and mean; in the order in which absorb takes them.
    """

    def __init__(self, space: Space, beta: float) -> None:
        """Start from the prior: mean 0, covariance 1."""
        super().__init__(alpha=1, beta=beta)
        self._space = space
        self.widen()

    def widen(self) -> None:
        """Have a place for every column of the space; the new ones have their prior."""
        width, before = 1 + len(self._space.columns), self._cap
        arrays = np.eye(width), np.eye(width), np.zeros(width), np.zeros(width)
        for new, old in zip(arrays, (self._ss_arr, self._ss_inv_arr, self._eta_arr, self._m_arr), strict=True):
            new[(slice(before),) * new.ndim] = old
        self._set(*arrays)

    def mean_of(self, row: Doubles) -> float:
        """Return River's own prediction for a scaled row, float64[at most d + 1], without its noise."""
        return float(self.predict_one(self._named(row)))  # type: ignore[no-untyped-call]  # untyped in River

    def variance_of(self, row: Doubles) -> float:
        """Return the variance of that prediction, as River has it, without the noise of one observation."""
        distribution = self.predict_one(self._named(row), with_dist=True)  # type: ignore[no-untyped-call]
        return float(distribution.sigma**2 - 1.0 / self.beta)

    def correct(self, row: Doubles, change: float) -> None:
        """Take note that what was learned from a scaled row comes to so much more, times its weight.

        A target enters nothing but the natural mean, so what is corrected later is what would have been learned first.
        """
        self._eta_arr[: row.size] += change * row
        _expect(self._ss_inv_arr, self._eta_arr, self._m_arr)

    def renew_prior(self, share: float, keep: float = 1.0) -> None:
        """Keep only a share of what rows have told, and expect the same as before. Cost: O(d³).

        Args:
            share: of the precision beyond the prior's, above 0.
            keep: factor on the mean.
        """
        mean = self._m_arr * keep
        precision = share * self._ss_arr + (1.0 - share) * np.eye(self._cap)
        self._set(precision, np.asarray(np.linalg.inv(precision), np.float64), precision @ mean, mean)

    def save(self, action: int) -> ActionRegression:
        """Return every number."""
        return ActionRegression(
            action=action,
            precision=self._ss_arr.tobytes(),
            covariance=self._ss_inv_arr.tobytes(),
            natural_mean=self._eta_arr.tobytes(),
            mean=self._m_arr.tobytes(),
        )

    def load(self, saved: ActionRegression) -> None:
        """Take over saved numbers; afterwards nothing tells this regression from the saved one, to the bit."""
        natural, mean = (np.frombuffer(data).copy() for data in (saved.natural_mean, saved.mean))
        shape = (natural.size, natural.size)
        precision, covariance = (
            np.frombuffer(data).reshape(shape).copy() for data in (saved.precision, saved.covariance)
        )
        self._set(precision, covariance, natural, mean)

    def _set(self, precision: Doubles, covariance: Doubles, natural: Doubles, mean: Doubles) -> None:
        """Put arrays where River has them."""
        self._ss_arr, self._ss_inv_arr, self._eta_arr, self._m_arr = precision, covariance, natural, mean
        self.arrays = precision, covariance, natural, mean
        if self._cap != natural.size:
            self._cap = natural.size
            names = [INTERCEPT, *self._space.columns]
            self._idx = {name: place for place, name in enumerate(names[: self._cap])}

    def _named(self, row: Doubles) -> dict[str, float]:
        names = [INTERCEPT, *self._space.columns]
        return dict(zip(names, row.tolist(), strict=False))


class Regressions:
    """One regression for each action that has a row.

    Attributes:
        by_action: the regressions, by the action's row in the space.
    """

    def __init__(self, space: Space, beta: float) -> None:
        self.by_action: dict[int, Regression] = {}
        self._space = space
        self._beta = beta

    def of(self, action: int) -> Regression:
        """Return an action's, a new one when there is none yet; as wide as the space."""
        regression = self.by_action.get(action)
        if regression is None:
            regression = self.by_action[action] = Regression(self._space, self._beta)
        elif regression.arrays[3].size != 1 + len(self._space.columns):
            regression.widen()
        return regression

    def known(self, action: int) -> Regression:
        """Return an action's, or what one would begin with; changes nothing."""
        return self.by_action.get(action) or Regression(self._space, self._beta)

    def means(self, actions: Sequence[int]) -> Doubles:
        """Return float64[actions, d + 1], the intercept last; what is not known has its prior."""
        d = len(self._space.columns)
        means = np.zeros((len(actions), d + 1))
        for place, action in enumerate(actions):
            if (regression := self.by_action.get(action)) is not None:
                mean = regression.arrays[3]
                means[place, : mean.size - 1], means[place, d] = mean[1:], mean[0]
        return means

    def covariances(self, actions: Sequence[int]) -> Doubles:
        """Return float64[actions, d + 1, d + 1] likewise."""
        d = len(self._space.columns)
        covariances = np.broadcast_to(np.eye(d + 1), (len(actions), d + 1, d + 1)).copy()
        for place, action in enumerate(actions):
            if (regression := self.by_action.get(action)) is not None:
                covariance, into = regression.arrays[1], covariances[place]
                known = covariance.shape[0] - 1
                into[:known, :known], into[d, d] = covariance[1:, 1:], covariance[0, 0]
                into[:known, d] = into[d, :known] = covariance[0, 1:]
        return covariances

    def save(self) -> list[ActionRegression]:
        """Return every number, ordered by action."""
        return [self.by_action[action].save(action) for action in sorted(self.by_action)]

    def load(self, saved: Iterable[ActionRegression]) -> None:
        """Take over a saved state."""
        for each in saved:
            self.by_action[each.action] = regression = Regression(self._space, self._beta)
            regression.load(each)


@kernel
def sum_of(row: Doubles, mean: Doubles) -> float:
    """Return what a scaled row comes to in the mean; either may be the shorter one."""
    total = 0.0
    for i in range(min(row.size, mean.size)):
        total += mean[i] * row[i]
    return total


@kernel
def expect(row: Doubles, covariance: Doubles, mean: Doubles, spread: Doubles) -> tuple[float, float]:
    """Return mean and variance of what a scaled row comes to; spread, written, is covariance @ row.

    Cost: 1 µs at 41 columns. The sums run over whole rows of the matrix so that the compiler can take four at a time.
    """
    expected, variance = 0.0, 0.0
    spread[:] = 0.0
    for i in range(row.size):
        if row[i] != 0.0:
            expected += mean[i] * row[i]
            for j in range(row.size):
                spread[j] += covariance[i, j] * row[i]
    for i in range(row.size):
        variance += spread[i] * row[i]
    return expected, variance


@kernel
def absorb(
    row: Doubles,
    spread: Doubles,
    variance: float,
    weight: float,
    target: float,
    precision: Doubles,
    covariance: Doubles,
    natural: Doubles,
    mean: Doubles,
) -> None:
    """Learn that a scaled row comes to target, with a precision of weight: River's ``learn_one`` at beta = weight.

    Args:
        row: float64[d + 1].
        spread: see expect.
        variance: see expect.
        weight: above 0.
        target: of the row.
        precision: float64[d + 1, d + 1], written.
        covariance: float64[d + 1, d + 1], written, by Sherman and Morrison's formula.
        natural: float64[d + 1], written.
        mean: float64[d + 1], written, from the two above as River does it.
    """
    gain = weight / (1.0 + weight * variance)
    for i in range(row.size):
        less, more = gain * spread[i], weight * row[i]
        if less != 0.0:
            for j in range(row.size):
                covariance[i, j] -= less * spread[j]
        if more != 0.0:
            for j in range(row.size):
                precision[i, j] += more * row[j]
            natural[i] += more * target
    _expect(covariance, natural, mean)


@kernel
def _expect(covariance: Doubles, natural: Doubles, mean: Doubles) -> None:
    """Write the mean: covariance @ natural, the matrix being symmetric."""
    mean[:] = 0.0
    for i in range(natural.size):
        if natural[i] != 0.0:
            for j in range(natural.size):
                mean[j] += covariance[i, j] * natural[i]


@kernel
def surprise(log_odds: float, variance: float, before: float) -> float:
    """Return the step s that is before - (sigmoid(log_odds + variance · s) - sigmoid(log_odds)).

    With before = reward - sigmoid(log_odds) it is what is left of the surprise once the row is learned. It lies between
    0 and before, and nowhere else: Newton's steps, and the middle where one leaves that span. Cost: mostly 4 turns.
    """
    low, high = min(before, 0.0), max(before, 0.0)
    begun = chance_of(log_odds)
    step = before / (1.0 + 0.25 * variance)
    for _ in range(_TURNS_MAX):
        chance = chance_of(log_odds + variance * step)
        gap = before + begun - chance - step
        if abs(gap) < _GAP:
            break
        if gap > 0.0:
            low = step
        else:
            high = step
        step += gap / (1.0 + variance * chance * (1.0 - chance))
        if not low < step < high:
            step = 0.5 * (low + high)
    return step


@kernel
def chance_of(log_odds: float) -> float:
    """Return the chance that has these log-odds, as ``base.sigmoid`` does."""
    if log_odds >= 0.0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1.0 + odds)
