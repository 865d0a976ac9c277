"""Corrects the prior by what few factors say about features and actions: actions of a kind are told apart by few rows.

A factorisation machine (Rendle, ICDM 2010) with the prior log-odds as a fixed term, between features on one side and
the action and its tokens on the other:

    log-odds = prior + w_0 + b_a + Σ_t b_t + Σ_j x_j (w_j + <v_j, u_a + Σ_t u_t>)

Pairs of features, and of action and token, are left out: the former cannot change the order of actions, the latter
are part of b_a. An action's u has as many numbers as the rank, not as there are features, and what they mean is learned
from all actions. Given the action it is linear, so that workers read one row of weights.

It is two linear models in turn: given v, the log-odds are linear in all else, and given that, in v. A row moves one
half, then the other by what is left of the surprise. Each number has a variance of its own, a Laplace approximation of
which only the diagonal is kept, and each step is solved for, so that neither passes the mark, however long the row is.
u begins at 0, so that nothing but the prior is expected at first and of an action without a row what its tokens say;
v begins with small numbers that follow from the names of features, as all factors would learn the same otherwise.

Mean progressive log loss in thousandths, by rank and precision: of public sets played as bandits, up to 5,000 rows
chosen at random, and of 20,000 simulated rows: 200 actions and 24 features whose effects are mixtures of three, then
300 and 2,000 actions of 10 groups of which more and more come, as in ``hashed``::

                      baseline  logistic    hashed     8, 30     8, 10      8, 3    16, 10     4, 10
    mushroom, 2            693       106        88        73        51        38        48        55
    penbased, 10           324       171       173       234       203       180       199       229
    satimage, 6            461       202       202       224       209       200       209       215
    splice, 3              641       238       244       276       246       235       221       288
    contraceptive, 3       630       577       585       595       585       585       585       588
    german, 2              693       536       543       575       556       550       558       556
    200 of three           565       468       438       430       430       454       430       442
    300 actions            593       503       454       463       484       519       506       485
    2,000 actions          468       449       338       342       370       427       373       374

The same with AdaGrad's steps, at one rate, lost a quarter more over the first six.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import product
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray
from river import facto

from server.kernel import kernel
from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.learners.regression import INTERCEPT, chance_of, surprise
from training.learners.sources import TOKENS_MAX, Sources
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

RANK_MAX: Final = 16
SPREAD: Final = 0.3  # of a feature's factors to begin with, all of them together
WEIGHT_PRECISION: Final = 100.0  # of the prior of what a feature does for all actions
FACTOR_PRECISION: Final = 30.0  # of the prior of a feature's factors, around what they begin with
CURVATURE_MIN: Final = 1e-6  # of a row that is certain

_VALUES, _PRECISIONS = 0, 1  # of a place; precisions beyond the prior's
_WEIGHT: Final = 0  # then the factors

Places = NDArray[np.int64]


class FactorisedCorrection:
    """See Learner. A row costs some 3 µs at 40 features and rank 8, 5 µs at 16.

    Memory is 16 (rank + 1) bytes a feature, and for each action twice that, for room to grow, and 600 for its names.

    Settings:
        rank: how many factors, at most RANK_MAX.
        precision: of the prior of what actions and tokens have.
        memory_rows: after so many rows that touched a number half of what it was told is forgotten, and so on.
    """

    family: ClassVar[str] = "factorised"
    choices: ClassVar[tuple[Settings, ...]] = (
        {"rank": 8, "precision": 30.0, "memory_rows": 10_000},
        {"rank": 8, "precision": 10.0, "memory_rows": 10_000},
        {"rank": 8, "precision": 3.0, "memory_rows": 10_000},
        {"rank": 16, "precision": 10.0, "memory_rows": 10_000},
        {"rank": 4, "precision": 10.0, "memory_rows": 10_000},
        {"rank": 8, "precision": 10.0, "memory_rows": 1_000},
    )
    arithmetic: ClassVar[str] = (
        f"rank_max={RANK_MAX} spread={SPREAD} weight_precision={WEIGHT_PRECISION} "
        f"factor_precision={FACTOR_PRECISION} curvature_min={CURVATURE_MIN} tokens_max={TOKENS_MAX}"
    )
    is_posterior: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner; the prior log-odds already hold the base rate."""
        self.settings = settings
        self._base_rate = base_rate
        self._space = space
        self._rank = int(settings["rank"])
        self._precision = float(settings["precision"])
        self._keep = 0.5 ** (1.0 / settings["memory_rows"])
        self._columns = np.zeros((0, 2, 1 + self._rank))  # the intercept, then the features
        self._array = np.zeros((8, 2, 1 + self._rank))  # of sources, with room to grow
        self._known: dict[str, int] = {}  # places of sources
        self._sources = Sources(space)
        self._places: dict[int, tuple[tuple[str, ...], Places]] = {}

    @property
    def seen(self) -> Sequence[int]:
        """See Learner: every action of the space."""
        return range(len(self._space.rows))

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner. A reward between 0 and 1 is learned as a success and a failure with those weights."""
        places = self._places_of(row.action)
        self._widen()
        return _learn(
            row.x, places, self._precision, row.prior_log_odds, reward, self._keep, self._columns, self._array
        )

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner: the gradient of a row's log-likelihood is linear in its reward, its curvature free of it.

        So its gradient is changed by as much, at the numbers of now, and the steps are solved for as with a row. The
        curvature where the chance stands now is added, see ``hashed``.
        """
        places = self._places_of(row.action)
        self._widen()
        return _correct(row.x, places, self._precision, row.prior_log_odds, change, self._columns, self._array)

    def predict_one(self, row: Row) -> Prediction:
        """See Learner: River's factorisation machine over features, action and tokens by name."""
        columns, names = self._present_columns()[:, _VALUES], [INTERCEPT, *self._space.columns]
        features = {name: value for name, value in zip(names, row.x.tolist(), strict=False) if value}
        sources = {name: self._source(name) for name in self._sources.names(row.action)}
        river = _Machine([name for name in features if name != INTERCEPT], list(sources), row.prior_log_odds)
        river.weights.update({name: column[_WEIGHT] for name, column in zip(names, columns, strict=True)})
        river.weights.update({name: source[_WEIGHT] for name, source in sources.items()})
        river.latents.update({name: column[1:] for name, column in zip(names, columns, strict=True)})
        river.latents.update({name: source[1:] for name, source in sources.items()})
        chances = river.predict_proba_one({**features, **dict.fromkeys(sources, 1.0)})  # type: ignore[no-untyped-call]
        return Prediction(float(chances[True]), 0.0)

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner. Cost: some 2 µs an action, and a product of matrices, float64[actions, rank] and [rank, d]."""
        columns = self._present_columns()[:, _VALUES]
        of_sources = np.vstack([self._array[: len(self._known), _VALUES], np.zeros(1 + self._rank)])
        names = [self._sources.names(action) for action in actions]
        places = np.array([self._known.get(name, -1) for each in names for name in each], np.int64)
        starts = np.cumsum([0, *map(len, names)])[:-1]
        of_actions = np.add.reduceat(of_sources[places], starts)
        weights = columns[1:, _WEIGHT] + of_actions[:, 1:] @ columns[1:, 1:].T
        return {
            "correction_weights": weights,
            "correction_intercepts": columns[0, _WEIGHT] + of_actions[:, _WEIGHT],
        }

    def heir(self, settings: Settings) -> Self:
        """See Learner. Of fewer factors the strongest remain; further ones begin as always, and change nothing yet."""
        successor = type(self)(self._space, self._base_rate, settings)
        successor._known = dict(self._known)
        successor._array = np.zeros((self._array.shape[0], 2, 1 + successor._rank))
        successor._columns = successor._begun(0, self._columns.shape[0])
        strengths = (self._columns[:, _VALUES, 1:] ** 2).sum(axis=0) * (self._array[:, _VALUES, 1:] ** 2).sum(axis=0)
        strongest = np.sort(np.argsort(-strengths, kind="stable")[: successor._rank])
        kept = [_WEIGHT, *(1 + strongest)]
        successor._array[:, :, : len(kept)] = self._array[:, :, kept]
        successor._columns[:, :, : len(kept)] = self._columns[:, :, kept]
        return successor

    def save(self, state: MemberState) -> None:
        """See Learner."""
        state.factorised.columns = self._columns.tobytes()
        state.factorised.sources = self._array[: len(self._known)].tobytes()
        state.factorised.source_names.extend(self._known)

    def load(self, state: MemberState) -> None:
        """See Learner."""
        shape = (-1, 2, 1 + self._rank)
        self._columns = np.frombuffer(state.factorised.columns).reshape(shape).copy()
        self._array = np.frombuffer(state.factorised.sources).reshape(shape).copy()
        self._known = {name: place for place, name in enumerate(state.factorised.source_names)}
        self._places = {}

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        del base_rate
        return {}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner: at the highest rank, with room to grow, and with the names of actions and of their tokens."""
        return 16 * (1 + RANK_MAX) * (1 + width + 2 * n_actions) + 600 * n_actions

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner: sigmoid(prior + w·x + b)."""
        del constants
        correction = float(arrays["correction_weights"] @ features + arrays["correction_intercepts"])
        return Prediction(sigmoid(prior_log_odds + correction), 0.0)

    def _places_of(self, action: int) -> Places:
        """Return where the sources of an action are; new ones get a place."""
        names = self._sources.names(action)
        placed = self._places.get(action)
        if placed is None or placed[0] is not names:
            for name in names:
                self._known.setdefault(name, len(self._known))
            placed = self._places[action] = names, np.array([self._known[name] for name in names], np.int64)
            n_missing = len(self._known) - self._array.shape[0]
            if n_missing > 0:
                room = np.zeros((max(n_missing, self._array.shape[0]), *self._array.shape[1:]))
                self._array = np.concatenate([self._array, room])
        return placed[1]

    def _source(self, name: str) -> Doubles:
        """Return weight and factors of a source, float64[1 + rank]; 0 of one without a row."""
        place = self._known.get(name)
        return np.zeros(1 + self._rank) if place is None else self._array[place, _VALUES]

    def _widen(self) -> None:
        """Have a place for every column of the space."""
        if self._columns.shape[0] != 1 + len(self._space.columns):
            self._columns = self._present_columns()

    def _present_columns(self) -> Doubles:
        """Return the intercept and every column of the space, those not yet learned as they begin."""
        begun = self._begun(self._columns.shape[0], 1 + len(self._space.columns))
        return np.concatenate([self._columns, begun]) if begun.size else self._columns

    def _begun(self, start: int, end: int) -> Doubles:
        """Return some columns as they begin."""
        array = np.zeros((end - start, 2, 1 + self._rank))
        for i, name in enumerate([INTERCEPT, *self._space.columns][start:end]):
            if start + i > 0:  # b_a is all that an action has beside the intercept
                array[i, _VALUES, 1:] = first_factors(name, self._rank)
        return array


class _Machine(facto.FMClassifier):
    """River's factorisation machine, of which only the pairs of a feature and a source are looked at."""

    def __init__(self, features: Sequence[str], sources: Sequence[str], intercept: float) -> None:
        super().__init__(intercept=intercept)
        self._pairs = list(product(features, sources))

    def _interaction_combination_keys(self, x: dict[str, float]) -> Iterator[tuple[str, str]]:
        del x
        return iter(self._pairs)


def first_factors(name: str, rank: int) -> Doubles:
    """Return the factors that a feature begins with: float64[rank], uniform, follow from its name alone."""
    words = np.frombuffer(blake2b(name.encode(), digest_size=4 * RANK_MAX).digest(), "<u4")[:rank]
    return (words / 2.0**31 - 1.0) * (SPREAD * math.sqrt(3.0 / rank))


@kernel
def _learn(
    x: Doubles,
    places: Places,
    precision: float,
    prior_log_odds: float,
    reward: float,
    keep: float,
    columns: Doubles,
    sources: Doubles,
) -> float:
    """Learn one row, and return the chance expected before."""
    mixed, before = _expect(x, places, prior_log_odds, columns, sources)
    expected = chance_of(before)
    _move(x, places, precision, mixed, before, reward - expected, keep, columns, sources)
    return expected


@kernel
def _correct(
    x: Doubles,
    places: Places,
    precision: float,
    prior_log_odds: float,
    change: float,
    columns: Doubles,
    sources: Doubles,
) -> float:
    """Change the gradient of a row by this much, and return the chance expected before."""
    mixed, before = _expect(x, places, prior_log_odds, columns, sources)
    _move(x, places, precision, mixed, before, change, 1.0, columns, sources)
    return chance_of(before)


@kernel
def _expect(
    x: Doubles, places: Places, prior_log_odds: float, columns: Doubles, sources: Doubles
) -> tuple[Doubles, float]:
    """Return what each place of a source is multiplied by, 1 and then Σ x_j v_j, float64[1 + rank]; and log-odds."""
    mixed = np.zeros(columns.shape[2])
    log_odds = prior_log_odds
    for j in range(x.size):
        if x[j] != 0.0:
            for f in range(mixed.size):
                mixed[f] += x[j] * columns[j, _VALUES, f]
    log_odds += mixed[_WEIGHT]
    mixed[_WEIGHT] = 1.0
    for i in range(places.size):
        for f in range(mixed.size):
            log_odds += mixed[f] * sources[places[i], _VALUES, f]
    return mixed, log_odds


@kernel
def _move(
    x: Doubles,
    places: Places,
    precision: float,
    mixed: Doubles,
    before: float,
    change: float,
    keep: float,
    columns: Doubles,
    sources: Doubles,
) -> None:
    """Move all numbers so that a row's gradient is changed.

    Args:
        x: see Row.
        places: of the sources.
        precision: of the prior of what they have.
        mixed: see _expect.
        before: log-odds of the row.
        change: of the gradient with respect to them.
        keep: share of the precisions that is not forgotten.
        columns: float64[d + 1, 2, 1 + rank], written.
        sources: float64[sources, 2, 1 + rank], written.
    """
    variance = 0.0
    for j in range(x.size):
        variance += x[j] ** 2 / (WEIGHT_PRECISION + columns[j, _PRECISIONS, _WEIGHT])
    for i in range(places.size):
        for f in range(mixed.size):
            variance += mixed[f] ** 2 / (precision + sources[places[i], _PRECISIONS, f])
    step = surprise(before, variance, change)
    between = before + variance * step
    curvature = _curvature(between)
    total = np.zeros(mixed.size)
    for j in range(x.size):
        if x[j] != 0.0:
            _add(columns, j, _WEIGHT, x[j], WEIGHT_PRECISION, step, curvature, keep)
    for i in range(places.size):
        for f in range(mixed.size):
            _add(sources, places[i], f, mixed[f], precision, step, curvature, keep)
            total[f] += sources[places[i], _VALUES, f]
    total[_WEIGHT] = 0.0
    _move_factors(x, total, between, step, keep, columns)


@kernel
def _move_factors(x: Doubles, total: Doubles, before: float, change: float, keep: float, columns: Doubles) -> None:
    """See _move: the half of features' factors, given the sum of the sources'."""
    variance = 0.0
    for j in range(1, x.size):
        if x[j] != 0.0:
            for f in range(1, total.size):
                variance += (x[j] * total[f]) ** 2 / (FACTOR_PRECISION + columns[j, _PRECISIONS, f])
    step = surprise(before, variance, change)
    curvature = _curvature(before + variance * step)
    for j in range(1, x.size):
        if x[j] != 0.0:
            for f in range(1, total.size):
                _add(columns, j, f, x[j] * total[f], FACTOR_PRECISION, step, curvature, keep)


@kernel
def _add(
    array: Doubles, place: int, f: int, slope: float, prior: float, step: float, curvature: float, keep: float
) -> None:
    """Move a number by its variance times the step, and add the row's curvature to its precision.

    Args:
        array: float64[places, 2, 1 + rank], written.
        place: of the number.
        f: likewise.
        slope: what it is multiplied by.
        prior: the precision of its prior.
        step: see surprise.
        curvature: of the row's loss.
        keep: share of the precision that is not forgotten.
    """
    precision = array[place, _PRECISIONS, f]
    array[place, _VALUES, f] += step * slope / (prior + precision)
    array[place, _PRECISIONS, f] = keep * (precision + curvature * slope * slope)


@kernel
def _curvature(log_odds: float) -> float:
    chance = chance_of(log_odds)
    return max(chance * (1.0 - chance), CURVATURE_MIN)
