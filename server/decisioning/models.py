"""What decisions are scored with: the champion and the learners' published arrays, aligned with one catalog.

Made by ``live.py`` off the event loop whenever catalog, role or arrays change; immutable afterwards. Rows and columns
of the learner's arrays are matched to the catalog by name, so that either side may change first: an action nothing
was learned about gets no correction and the widest posterior. Learners read each feature in units of its spread, and
workers as it was recorded: what turns one into the other is folded into the weights here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import POSTERIOR_POLICIES, Catalog, Doubles, FeatureColumns, Floats, Rows
from server.decisioning.bundle_columns import ModelColumns
from server.decisioning.features import encode_rows
from server.decisioning.forests import Forest, Units, forest_of
from server.registry.scorers import ScoringError
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays

NO_GOAL = -1

_Array = TypeVar("_Array", bound=NDArray[Any])


class Scorer(Protocol):
    """What gives prior log-odds for model inputs."""

    def score(self, inputs: Floats, /) -> Floats:
        """Return log-odds float32[m] for inputs float32[m, d].

        Raises:
            ScoringError: the model failed.
        """


@dataclass(frozen=True, slots=True)
class Champion:
    """The model whose output is the prior; without one, the goals' base rates are."""

    sha256: bytes  # of its bundle; empty: no champion
    goal_row: int  # NO_GOAL: no champion
    shared: FeatureColumns  # columns that read person and context
    shared_positions: Rows  # int32[shared], where they stand in the input
    template: Floats  # float32[n, d], the action's columns of each row; the shared ones are written over it
    scorer: Scorer | None
    is_unavailable: bool = False  # there should be one, and it does not fit the catalog in force
    facts: tuple[str, ...] = ()  # [d], the name of the fact that each column of the input reads

    def score(self, inputs: Floats) -> tuple[Floats, bool]:
        """Return prior log-odds float32[m], or none and whether that is because the model failed.

        Cost: one call into onnxruntime for all rows.
        """
        if self.scorer is None:
            return _NO_PRIOR, self.is_unavailable
        try:
            return self.scorer.score(inputs), False
        except ScoringError:
            return _NO_PRIOR, True


@dataclass(frozen=True, slots=True)
class Models:
    """One consistent set: champion and learner arrays under one catalog."""

    champion: Champion
    correction_weights: Doubles  # float64[goals, n, d]
    correction_intercepts: Doubles  # float64[goals, n]
    prior_slopes: Doubles  # float64[goals]: factor on the prior log-odds, 1 unless estimates are mended
    posterior_rows: Rows  # int32[goals, n]: row in the posteriors; 0 is the prior
    posterior_means: Doubles  # float64[r, d + 1]
    posterior_covariances: Doubles  # float64[r, d + 1, d + 1]
    posterior_scales: Doubles  # float64[goals]: factor on the learned features, the width of the goal's prior
    history_spreads: Doubles  # float64[goals, 2]: of groups and of actions, see personal.factors; 0: history has no say
    learner_epoch: int
    learned_lsn: int
    learned_time_us: int
    arrays_sha256: bytes
    erased_lsn: int  # the last LogErased record that nothing in the arrays was learned before
    new_outcome_lsn: int  # the oldest outcome that the arrays published before did not include; 0: none
    new_outcome_time_us: int  # its log time
    forests: tuple[Forest, ...] = ()  # of the goals that trees serve


_NO_PRIOR: Floats = np.empty(0, np.float32)


def no_champion(catalog: Catalog, *, is_unavailable: bool = False) -> Champion:
    """Return the absence of a champion, as columns; is_unavailable when there should be one."""
    return Champion(
        sha256=b"",
        goal_row=NO_GOAL,
        shared=_no_columns(),
        shared_positions=_frozen(np.empty(0, np.int32)),
        template=_frozen(np.empty((len(catalog.actions.names), 0), np.float32)),
        scorer=None,
        is_unavailable=is_unavailable,
    )


def make_champion(catalog: Catalog, sha256: bytes, goal: str, columns: ModelColumns, scorer: Scorer) -> Champion:
    """Precompute what a bundle reads of the catalog's actions. Cost: O(n × d)."""
    width = columns.shared_positions.size + columns.action_positions.size
    template = np.zeros((len(catalog.actions.names), width), np.float32)
    template[:, columns.action_positions] = encode_rows(catalog.actions.facts, columns.action)
    facts = [""] * width
    for positions, sources, declared in (
        (columns.shared_positions, columns.shared.sources, catalog.space.facts),
        (columns.action_positions, columns.action.sources, catalog.action_facts),
    ):
        for position, source in zip(positions.tolist(), sources.tolist(), strict=True):
            facts[position] = declared[source].name
    return Champion(
        sha256=sha256,
        goal_row=catalog.goal_rows[goal],
        shared=columns.shared,
        shared_positions=columns.shared_positions,
        template=_frozen(template),
        scorer=scorer,
        facts=tuple(facts),
    )


def align(catalog: Catalog, champion: Champion, arrays: LearnerArrays | None, arrays_sha256: bytes = b"") -> Models:
    """Match the learner's rows and columns to the catalog's by name.

    Args:
        catalog: the revision in force.
        champion: made for the same revision.
        arrays: as published; None before the first.
        arrays_sha256: of the published bytes.

    Raises:
        ValueError, IndexError: the arrays are of another size than their names say, or trees cannot be run.

    Cost: O(goals × n × d), off the event loop.
    """
    n, d, n_goals = len(catalog.actions.names), len(catalog.learned.names), len(catalog.goals)
    weights = np.zeros((n_goals, n, d))
    intercepts, slopes = np.zeros((n_goals, n)), np.ones(n_goals)
    posterior_rows = np.zeros((n_goals, n), np.int32)
    units = _Units(catalog, arrays)
    means, covariances = [np.zeros((1, d + 1))], [units.covariances(np.eye(d + 1)[np.newaxis])]
    scales = np.ones(n_goals)
    spreads = np.zeros((n_goals, 2))
    forests: list[Forest] = []
    is_asked = np.isin(catalog.blends.codes[:, :, 2], POSTERIOR_POLICIES).any(axis=0)
    posterior_goals = set(np.flatnonzero(catalog.placement_columns.goal_weights[is_asked].any(axis=0)).tolist())
    for block in arrays.goals if arrays is not None else ():
        goal_row = catalog.goal_rows.get(block.goal)
        if goal_row is None:
            continue
        learned = _Block(block, list(arrays.features) if arrays is not None else [], catalog)
        corrections = units.means(learned.corrections(d))
        # What is stated is sigmoid(slope × (prior + correction) + intercept), also where nothing was learned.
        slope = block.calibration_slope if block.HasField("calibration_slope") else 1.0
        slopes[goal_row], intercepts[goal_row] = slope, block.calibration_intercept
        weights[goal_row, learned.rows] = slope * corrections[:, :d]
        intercepts[goal_row, learned.rows] += slope * corrections[:, d]
        scales[goal_row] = block.posterior_scale
        spreads[goal_row] = _inverse(block.group_strength), _inverse(block.personal_strength)
        if block.correction_forest:
            forests.append(learned.forest(goal_row, n, units))
        if goal_row in posterior_goals:
            learned = learned.with_posterior()
        if goal_row in posterior_goals and learned.rows.size:
            first = sum(part.shape[0] for part in means)
            posterior_rows[goal_row, learned.rows] = np.arange(first, first + learned.rows.size)
            means.append(units.means(learned.posterior_means(d)))
            covariances.append(units.covariances(learned.posterior_covariances(d)))
    return Models(
        champion=champion,
        correction_weights=_frozen(weights),
        correction_intercepts=_frozen(intercepts),
        prior_slopes=_frozen(slopes),
        posterior_rows=_frozen(posterior_rows),
        posterior_means=_frozen(np.concatenate(means)),
        posterior_covariances=_frozen(np.concatenate(covariances)),
        posterior_scales=_frozen(scales),
        history_spreads=_frozen(spreads),
        learner_epoch=arrays.epoch if arrays is not None else 0,
        learned_lsn=arrays.learned_lsn if arrays is not None else 0,
        learned_time_us=arrays.learned_time_us if arrays is not None else 0,
        arrays_sha256=arrays_sha256,
        erased_lsn=arrays.erased_lsn if arrays is not None else 0,
        new_outcome_lsn=arrays.new_outcome_lsn if arrays is not None else 0,
        new_outcome_time_us=arrays.new_outcome_time_us if arrays is not None else 0,
        forests=tuple(forests),
    )


class _Units:
    """From what learners read to what is recorded: z = (x - center) / spread of each of the catalog's d features.

    With (z, 1) = A (x, 1), a mean m·(z, 1) is (A'm)·(x, 1), and a variance (z, 1)'Σ(z, 1) is (x, 1)'A'ΣA(x, 1).
    """

    def __init__(self, catalog: Catalog, arrays: LearnerArrays | None) -> None:
        d = len(catalog.learned.names)
        self._map = np.eye(d + 1)
        self.centers, self.spreads = np.zeros(d), np.ones(d)
        if arrays is None or not arrays.spreads:
            return
        positions = {name: j for j, name in enumerate(catalog.learned.names)}
        centers, spreads = (_doubles(data, len(arrays.features)) for data in (arrays.centers, arrays.spreads))
        for name, center, spread in zip(arrays.features, centers.tolist(), spreads.tolist(), strict=True):
            if (j := positions.get(name)) is not None:
                self._map[j, j], self._map[j, d] = 1.0 / spread, -center / spread
                self.centers[j], self.spreads[j] = center, spread

    def means(self, means: Doubles) -> Doubles:
        """Turn float64[m, d + 1], the intercept last."""
        turned: Doubles = means @ self._map
        return turned

    def covariances(self, covariances: Doubles) -> Doubles:
        """Turn float64[m, d + 1, d + 1]."""
        turned: Doubles = self._map.T @ covariances @ self._map
        return turned


class _Block:
    """One goal's arrays, cut to the actions and features the catalog has."""

    def __init__(self, block: GoalArrays, features: list[str], catalog: Catalog) -> None:
        self._width = len(features)
        self._catalog = catalog
        positions = {name: j for j, name in enumerate(catalog.learned.names)}
        self._kept = np.array([j for j, name in enumerate(features) if name in positions], np.intp)
        self.columns = np.array([positions[features[j]] for j in self._kept], np.intp)
        self._block = block
        self._pick(block.actions)

    def corrections(self, d: int) -> Doubles:
        corrections = np.zeros((self._picked.size, d + 1))
        if not self._block.correction_intercepts:
            return corrections
        weights = _doubles(self._block.correction_weights, self._height, self._width)
        corrections[:, self.columns] = weights[np.ix_(self._picked, self._kept)]
        corrections[:, d] = _doubles(self._block.correction_intercepts, self._height)[self._picked]
        return corrections

    def with_posterior(self) -> _Block:
        """Return the block without actions whose posterior is the prior: each would take (d + 1)² numbers to say so."""
        width, block = self._width + 1, copy.copy(self)
        block._pick(self._block.posterior_actions or self._block.actions)
        if not self._block.posterior_means:
            block._pick(())
            return block
        means = _doubles(self._block.posterior_means, block._height, width)[block._picked]
        if self._block.posterior_variances:
            variances = _doubles(self._block.posterior_variances, block._height, width)[block._picked]
        else:
            source = _doubles(self._block.posterior_covariances, block._height, width, width)
            variances = np.diagonal(source, axis1=1, axis2=2)[block._picked]
        # Every row that was learned moves the intercept's variance, and every one that was corrected the means.
        is_known = (means != 0.0).any(axis=1) | (variances != 1.0).any(axis=1)
        block._picked, block.rows = block._picked[is_known], block.rows[is_known]
        return block

    def posterior_means(self, d: int) -> Doubles:
        kept, columns = np.append(self._kept, self._width), np.append(self.columns, d)
        means = np.zeros((self._picked.size, d + 1))
        source = _doubles(self._block.posterior_means, self._height, self._width + 1)
        means[:, columns] = source[np.ix_(self._picked, kept)]
        return means

    def posterior_covariances(self, d: int) -> Doubles:
        kept, columns = np.append(self._kept, self._width), np.append(self.columns, d)
        covariances = np.broadcast_to(np.eye(d + 1), (self._picked.size, d + 1, d + 1)).copy()
        everything = np.arange(self._picked.size)
        if self._block.posterior_variances:
            variances = _doubles(self._block.posterior_variances, self._height, self._width + 1)
            covariances[everything[:, None], columns, columns] = variances[np.ix_(self._picked, kept)]
            return covariances
        source = _doubles(self._block.posterior_covariances, self._height, self._width + 1, self._width + 1)
        covariances[np.ix_(everything, columns, columns)] = source[np.ix_(self._picked, kept, kept)]
        return covariances

    def _pick(self, names: Sequence[str]) -> None:
        """Be about the actions of these names that the catalog has."""
        known = self._catalog.actions.rows
        self._height = len(names)
        self._picked = np.array([i for i, name in enumerate(names) if name in known], np.intp)
        self.rows = np.array([known[names[i]] for i in self._picked], np.intp)

    def forest(self, goal_row: int, n: int, units: _Units) -> Forest:
        places = Units(
            self.columns.astype(np.int32),
            self._kept.astype(np.int32),
            units.centers[self.columns],
            units.spreads[self.columns],
        )
        picked, rows = self._picked.astype(np.int32), self.rows.astype(np.int32)
        return forest_of(self._block, goal_row, n, picked, rows, self._width, places)


def _inverse(strength: float) -> float:
    """Return the inverse of a strength; 0, an infinite one, where none is stated."""
    return 1.0 / strength if strength > 0.0 else 0.0


def _doubles(data: bytes, *shape: int) -> Doubles:
    return np.frombuffer(data, np.float64).reshape(shape)


def _no_columns() -> FeatureColumns:
    return FeatureColumns(
        (), _frozen(np.empty(0, np.int32)), _frozen(np.empty(0, np.uint8)), _frozen(np.empty((0, 4), np.float64))
    )


def _frozen(array: _Array) -> _Array:
    array.flags.writeable = False
    return array
