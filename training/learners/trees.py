"""One of River's Hoeffding tree regressors, made to learn what to add to a prior's log-odds.

What a forest is made of. Each leaf gives one number, the mean of River's running statistics in it; their target is the
working response of a logistic regression with the prior as a fixed term, weighted by its curvature, as in LogitBoost
(Friedman, Hastie and Tibshirani, Annals of Statistics 28, 2000), so that a leaf's mean goes Newton's way to the
likeliest correction. River decides when a leaf splits, by the Hoeffding bound (Domingos and Hulten, KDD 2000).

What is ours: no random number is drawn. Which columns a leaf watches follows from their names and the leaf's number,
so that a replay grows the same trees. A leaf splits by what came since it began, not by what it was handed at birth,
and begins near its parent. Columns are watched in intervals of fixed width, all in one compiled step (River's own
quantising splitter costs a microsecond a column, and hands the left child the statistics of both).
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from river import stats, tree
from river.tree.nodes.branch import NominalBinaryBranch, NumericBinaryBranch
from river.tree.nodes.htr_nodes import LeafMean
from river.tree.splitter.nominal_splitter_reg import NominalSplitterReg
from river.tree.utils import BranchFactory

from server.kernel import kernel
from training.learners.base import Doubles, Settings, sigmoid
from training.space import Space

ACTION: Final = -1  # the input that is the action's row; those below it are token slots
TOKEN_SLOTS: Final = 64  # tokens share them by hash
ACTIONS_TOLD_APART: Final = 256  # the first of the space; the others by their tokens alone
INTERVAL: Final = 0.5  # spreads
INTERVALS: Final = 33  # of a column: 2 × FEATURE_MAX / INTERVAL, and one for those at the limit
COLUMNS_WATCHED: Final = 64  # by one leaf, at most
COLUMNS_SHARE: Final = 0.7  # of all, where they are few
REMEMBERED: Final = 1_000.0  # weight of a leaf at which half is forgotten: some 11,000 rows at a chance of 0.1
CURVATURE_MIN: Final = 1e-3

_OWN: Final = 4.0  # weight of what a leaf begins with: its parent's mean, the root's 0
_HANDED: Final = 8.0  # weight, at most, of what a split hands a leaf
_STEP_MAX: Final = 2.0  # log-odds that a leaf may begin away from its parent: one step of Newton's may lead too far
SIDE_MIN: Final = 1.0  # weight of each side of a split
_ERROR: Final = 0.05  # of the Hoeffding bound
ARITHMETIC: Final = (
    f"slots={TOKEN_SLOTS},{ACTIONS_TOLD_APART} intervals={INTERVAL},{INTERVALS} "
    f"watched={COLUMNS_WATCHED},{COLUMNS_SHARE} remembered={REMEMBERED} curvature_min={CURVATURE_MIN} "
    f"own={_OWN},{_HANDED},{_STEP_MAX},{SIDE_MIN} error={_ERROR}"
)


class Inputs(dict[int, float]):
    """One row as a tree reads it: columns, the action, and its tokens as 1; whatever is not in it is 0.

    Attributes:
        columns: float64[d], the columns once more.
    """

    def __init__(self, columns: Doubles, action: int, token_keys: Sequence[int]) -> None:
        super().__init__(enumerate(columns.tolist()))
        self.columns = columns
        self[ACTION] = float(action)
        for key in token_keys:
            self[key] = 1.0

    def __missing__(self, key: int) -> float:
        """Return 0."""
        return 0.0


def token_inputs(tokens: tuple[str, ...]) -> list[int]:
    """Return the inputs that are 1 for an action with these tokens, ascending."""
    return sorted({ACTION - 1 - int.from_bytes(_hash(token), "little") % TOKEN_SLOTS for token in tokens})


class Leaf(LeafMean):
    """A leaf that may watch some columns, in intervals, beside the action and its tokens, by River's own observers.

    Attributes:
        number: it has within its tree.
        fresh: statistics of what came since it began; ``stats`` also hold what it began with.
        watched: int64[k], the columns.
        cells: float64[k, INTERVALS, 4]: what came into each interval: its weight, and the mean of the column, the mean
            of the target, and the sum of squared distances from that.
        width: of the space when the columns were chosen.
    """

    def __init__(self, beginning: stats.Var, depth: int, number: int) -> None:
        self.number = number
        self.fresh = stats.Var()
        super().__init__(beginning, depth, None)  # type: ignore[no-untyped-call]  # untyped in River
        self.watched = np.empty(0, np.int64)
        self.cells = np.empty((0, INTERVALS, 4))
        self.width = 0

    @property
    def total_weight(self) -> float:
        """See HTLeaf: of what it may split by."""
        return float(self.fresh.n)

    def update_stats(self, y: float, w: float) -> None:
        """See HTLeaf."""
        self.stats.update(y, w)
        self.fresh.update(y, w)
        if self.stats.mean.n > REMEMBERED:
            self.stats.mean.n *= 0.5
            self.stats._S *= 0.5

    def learn_one(self, x: Inputs, y: float, *, w: float = 1.0, tree: Any = None) -> None:
        """See HTLeaf."""
        self.update_stats(y, w)
        if self.is_active():  # type: ignore[no-untyped-call]  # untyped in River
            self._watch(x, y, w, tree.space, tree.salt)

    def _watch(self, x: Inputs, y: float, w: float, space: Space, salt: int) -> None:
        if self.width != len(space.columns):
            self._choose(space, salt)
        _watch(x.columns, self.watched, y, w, self.cells)
        for key in itertools.takewhile(lambda each: each < 0, reversed(x)):
            if key == ACTION and x[ACTION] >= ACTIONS_TOLD_APART:
                continue
            observer = self.splitters.get(key)
            if observer is None:
                observer = self.splitters[key] = new_observer()
            observer.update(x[key], y, w)

    def best_split_suggestions(self, criterion: Any, tree: Any) -> list[BranchFactory]:
        """See HTLeaf. Splitting not at all is worth nothing. Cost: some 10 µs a column, 20 an action."""
        del tree
        found = []
        for column, sides in zip(self.watched.tolist(), _best_sides(self.cells).tolist(), strict=True):
            if sides[0] > 0.0:
                whole, left = variance_of(sides[2:5]), variance_of(sides[5:])
                parts = [left, _without(whole, left)]
                found.append(BranchFactory(criterion.merit_of_split(whole, parts), column, sides[1], parts))
        for key, observer in self.splitters.items():
            found.append(observer.best_evaluated_split_suggestion(criterion, self.fresh, key, True))
        return [BranchFactory(0.0), BranchFactory(0.0), *(each for each in found if each.merit > 0.0)]

    def _choose(self, space: Space, salt: int) -> None:
        """Watch the columns whose names hash lowest with this leaf's number; with new ones, those may be others."""
        self.width = len(space.columns)
        key = salt.to_bytes(8, "little") + self.number.to_bytes(8, "little")
        n_watched = min(COLUMNS_WATCHED, math.ceil(COLUMNS_SHARE * self.width))
        lowest = heapq.nsmallest(n_watched, ((_hash(name, key), column) for name, column in space.columns.items()))
        before = dict(zip(self.watched.tolist(), self.cells, strict=True))
        nothing = np.zeros((INTERVALS, 4))
        self.watched = np.array([column for _, column in lowest], np.int64)
        self.cells = np.array([before.get(column, nothing) for _, column in lowest]).reshape(-1, INTERVALS, 4)


Branch = NumericBinaryBranch | NominalBinaryBranch
Node = Branch | Leaf


class CorrectionTree(tree.HoeffdingTreeRegressor):
    """River's tree, over the columns of a space.

    Args:
        space: names of the columns.
        salt: unlike for each tree of a forest.
        settings: see forest.Forest.

    Attributes:
        root: None before the first row.
        leaves_made: see Leaf.number.
    """

    def __init__(self, space: Space, salt: int, settings: Settings) -> None:
        super().__init__(
            grace_period=settings["grace"],  # type: ignore[arg-type]  # a weight, of which River speaks as rows
            max_depth=int(settings["depth"]),
            delta=_ERROR,
            tau=settings["tie"],
            leaf_prediction="mean",
            min_samples_split=SIDE_MIN,  # type: ignore[arg-type]  # a weight, too
            binary_split=True,
            memory_estimate_period=math.inf,  # type: ignore[arg-type]  # never
        )
        self.space = space
        self.salt = salt
        self.leaves_made = 0

    @property
    def root(self) -> Node | None:
        """See Attributes."""
        return cast(Node | None, self._root)

    def learn_row(self, x: Inputs, prior_log_odds: float, reward: float, weight: float) -> float:
        """Learn from one row, and return the correction expected before."""
        expected = leaf_of(self.root, x).stats.mean.get() if self.root is not None else 0.0
        chance = sigmoid(prior_log_odds + expected)
        curvature = max(chance * (1.0 - chance), CURVATURE_MIN)
        target = expected + (reward - chance) / curvature
        self.learn_one(x, target, w=weight * curvature)  # type: ignore[no-untyped-call]  # untyped in River
        return expected

    def _new_leaf(self, initial_stats: Any = None, parent: Any = None) -> Leaf:
        """See HoeffdingTree."""
        self.leaves_made += 1
        beginning = stats.Var()
        beginning.update(parent.stats.mean.get() if parent is not None else 0.0, _OWN)
        depth = parent.depth + 1 if parent is not None else 0
        if parent is not None and initial_stats is not None and initial_stats.n > 0.0:
            mean, own = beginning.mean.get(), initial_stats.mean.get()
            near = min(max(own, mean - _STEP_MAX), mean + _STEP_MAX)
            beginning.update(near, min(initial_stats.n, _HANDED))
        leaf = Leaf(beginning, depth, self.leaves_made)
        if depth >= self.max_depth:
            leaf.deactivate()  # type: ignore[no-untyped-call]  # untyped in River
        return leaf

    def _enforce_size_limit(self) -> None:
        """See HoeffdingTree: depth bounds the size, and River's way measures Python's objects."""


def variance_of(sums: list[float]) -> stats.Var:
    """Return River's statistics that have this weight, mean and sum of squares."""
    made = stats.Var()
    made.mean.n, made.mean._mean, made._S = sums
    return made


def sums_of(variance: stats.Var) -> list[float]:
    """Return the weight, mean and sum of squares of River's statistics."""
    return [variance.mean.n, variance.mean._mean, variance._S]


@kernel
def _watch(columns: Doubles, watched: NDArray[np.int64], y: float, w: float, cells: Doubles) -> None:
    """Add one row to the cells. The recurrences are those of River's Mean and Var."""
    for i in range(watched.size):
        value = columns[watched[i]]
        place = math.floor(value / INTERVAL) + INTERVALS // 2
        cell = cells[i, min(max(place, 0), INTERVALS - 1)]
        cell[0] += w
        share = w / cell[0]
        cell[1] += share * (value - cell[1])
        distance = y - cell[2]
        cell[2] += share * distance
        cell[3] += w * distance * (y - cell[2])


@kernel
def _best_sides(cells: Doubles) -> Doubles:
    """Return of each column the split between two intervals that leaves least variance within both sides.

    Returns:
        float64[k, 8]: by how much the sum of squares falls, 0 where there is none; the threshold; weight, mean and sum
        of squares of the whole, and of the left side.
    """
    best = np.zeros((cells.shape[0], 8))
    for i in range(cells.shape[0]):
        n, mean, squares = 0.0, 0.0, 0.0
        for j in range(INTERVALS):
            weight = cells[i, j, 0]
            if weight > 0.0:
                distance = cells[i, j, 2] - mean
                n += weight
                mean += distance * weight / n
                squares += cells[i, j, 3] + weight * distance * (cells[i, j, 2] - mean)
        left_n, left_mean, left_squares, left_end = 0.0, 0.0, 0.0, 0.0
        for j in range(INTERVALS):
            weight = cells[i, j, 0]
            if weight <= 0.0:
                continue
            right_n = n - left_n
            if left_n >= SIDE_MIN and right_n >= SIDE_MIN:
                gain = left_n * (left_mean - mean) ** 2 * n / right_n
                if gain > best[i, 0]:
                    best[i, 0], best[i, 1] = gain, 0.5 * (left_end + cells[i, j, 1])
                    best[i, 2], best[i, 3], best[i, 4] = n, mean, squares
                    best[i, 5], best[i, 6], best[i, 7] = left_n, left_mean, left_squares
            distance = cells[i, j, 2] - left_mean
            left_n += weight
            left_mean += distance * weight / left_n
            left_squares += cells[i, j, 3] + weight * distance * (cells[i, j, 2] - left_mean)
            left_end = cells[i, j, 1]
    return best


def new_observer() -> NominalSplitterReg:
    """Return River's own, which keeps statistics of each value of the action, or of a token."""
    return NominalSplitterReg()  # type: ignore[no-untyped-call]  # untyped in River


def leaf_of(node: Node, x: Inputs) -> Leaf:
    """Return where a row comes to: what River's traverse does, at a third of its cost."""
    while not isinstance(node, Leaf):
        node = node.children[node.branch_no(x)]  # type: ignore[no-untyped-call]  # untyped in River
    return node


def _without(whole: stats.Var, part: stats.Var) -> stats.Var:
    """Return the statistics of the rest; never of less than nothing, which rounding may leave."""
    n = whole.n - part.n
    mean = (whole.n * whole.mean.get() - part.n * part.mean.get()) / n
    apart = (mean - part.mean.get()) ** 2 * n * part.n / whole.n
    return variance_of([n, mean, max(whole._S - part._S - apart, 0.0)])


def _hash(name: str, key: bytes = b"") -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8, key=key).digest()
