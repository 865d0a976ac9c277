"""What trees add to the prior's log-odds: a goal's published graph, aligned with one catalog.

Made by ``models.align`` off the event loop, immutable afterwards. The graph reads features in learners' units and in
single precision, as the trees were grown on, so that every comparison comes out as it did there.

Cost sketch: nothing where no goal is served by trees; else, for 6 trees of 36 leaves, 25 µs a call and 0.05 a survivor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from server.catalog.catalog import Doubles, Floats, Mask, Rows
from server.catalog.declared import LEARNED_LIMIT_UNSTATED
from server.registry.scorers import LOG_ODDS_MAX, ScoringError, open_session
from tsugi.log.v1.learner_pb2 import GoalArrays

FEATURE_MAX: Final = 8.0  # in spreads; as learners cut it, see training.scaling

_INPUT: Final = "inputs"
_OUTPUT: Final = "correction"
_NO_OFFSETS: Final[Doubles] = np.empty((0, 0))  # writable, as the kernels are compiled for


@dataclass(frozen=True, slots=True)
class Units:
    """Where the catalog's learned columns stand in a graph's input, and in what units."""

    columns: Rows  # int32[j], of the catalog's
    places: Rows  # int32[j], in the input
    centers: Doubles  # float64[j]
    spreads: Doubles  # float64[j]


class Forest:
    """One goal's trees.

    Args:
        goal_row: the catalog's.
        model: the graph.
        template: float32[n, inputs], what is said of each action; the columns of features are 0.
        is_known: bool[n], false where nothing is said of an action: then nothing is added.
        units: of the features.

    Raises:
        ValueError: onnxruntime does not run the graph on such inputs.
    """

    def __init__(self, goal_row: int, model: bytes, template: Floats, is_known: Mask, units: Units) -> None:
        self.goal_row = goal_row
        self._template = template
        self._is_known = is_known
        self._units = units
        try:
            self._session = open_session(model)
            self._run(template[:1])
        except Exception as error:
            raise ValueError(f"the trees cannot be run: {error}") from error

    def score(self, learned: Floats, counts: Rows, rows: Rows) -> Doubles:
        """Return what to add to the log-odds of each survivor, float64[survivors].

        Args:
            learned: see decide.Decisions.
            counts: int32[b], how many survivors each request has.
            rows: see Decisions.

        Raises:
            ScoringError: the graph failed.
        """
        units = self._units
        values = np.clip(
            np.nan_to_num(learned[:, units.columns].astype(np.float64)), -LEARNED_LIMIT_UNSTATED, LEARNED_LIMIT_UNSTATED
        )
        values = np.clip((values - units.centers) / units.spreads, -FEATURE_MAX, FEATURE_MAX)
        inputs = self._template[rows]
        inputs[:, units.places] = np.repeat(values.astype(np.float32), counts, axis=0)
        try:
            said = self._run(inputs)
        except Exception as error:
            raise ScoringError("onnxruntime fails on these rows") from error
        if not np.isfinite(said).all():
            raise ScoringError("the trees give no number for these rows")
        corrections: Doubles = np.clip(said, -LOG_ODDS_MAX, LOG_ODDS_MAX) * self._is_known[rows]
        return corrections

    def _run(self, inputs: Floats) -> Doubles:
        (said,) = self._session.run([_OUTPUT], {_INPUT: inputs})
        if said.shape != (inputs.shape[0], 1):
            raise ValueError("it gives other than one number a row")
        result: Doubles = said[:, 0].astype(np.float64)
        return result


def forest_of(
    block: GoalArrays, goal_row: int, n: int, picked: Rows, rows: Rows, n_features: int, units: Units
) -> Forest:
    """Align a goal's trees with a catalog.

    Args:
        block: as published, with a graph.
        goal_row: the catalog's row of the goal.
        n: actions of the catalog.
        picked: places among block.actions of those the catalog has.
        rows: their catalog rows.
        n_features: as published; they come first in the input.
        units: of those the catalog has.

    Raises:
        ValueError: the graph does not run, or the inputs are of another size than the names say.
    """
    said = np.frombuffer(block.correction_forest_inputs, np.float64).reshape(len(block.actions), -1)
    template = np.zeros((n, n_features + said.shape[1]), np.float32)
    template[rows, n_features:] = said[picked]
    is_known = np.zeros(n, np.bool_)
    is_known[rows] = True
    template.flags.writeable = is_known.flags.writeable = False
    return Forest(goal_row, block.correction_forest, template, is_known, units)


def offsets_of(
    forests: Sequence[Forest], n_goals: int, learned: Floats, starts: Rows, rows: Rows
) -> tuple[Doubles, bool]:
    """Return what trees add, float64[goals, survivors], none of either where no goal has trees; and whether one failed.

    Trees that failed add nothing.
    """
    if not forests or not rows.size:
        return _NO_OFFSETS, False
    added = np.zeros((n_goals, rows.size))
    has_failed = False
    counts = np.diff(starts)
    for forest in forests:
        try:
            added[forest.goal_row] = forest.score(learned, counts, rows)
        except ScoringError:
            has_failed = True
    return added, has_failed
