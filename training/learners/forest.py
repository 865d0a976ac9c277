"""Corrects the prior by trees: finds what only certain facts together mean, which a weighted sum of them cannot say.

A few Hoeffding trees (``trees.py``) learn the same rows, each leaf watching other columns, and the mean of what they
say is added to the prior's log-odds: alone, or on top of a weighted sum that learns beside them. One forest learns all
actions of a goal: a split may ask for a column, for the action, or for a token that actions share. Workers run it as
one ONNX graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Self

import numpy as np

from training.learners import forest_graph, tree_state
from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.learners.logistic import LogisticCorrection
from training.learners.trees import (
    ACTION,
    ACTIONS_TOLD_APART,
    ARITHMETIC,
    COLUMNS_WATCHED,
    INTERVALS,
    TOKEN_SLOTS,
    CorrectionTree,
    Inputs,
    token_inputs,
)
from training.space import Space
from tsugi.log.v1.learner_pb2 import ForestState, MemberState

TREES: Final = 6
CHANGE_MIN: Final = 1e-6  # of a reward; whatever weighs less might weigh nothing

_CELL_BYTES: Final = 32
_VALUE_BYTES: Final = 500  # of one action or token, as River keeps it


class Forest:
    """See Learner. A row costs some 70 µs at 20 to 40 features, so it takes part only where a goal asks for it.

    A reward that is corrected is taught once more, as the success or failure it turned towards, with the size of the
    change for its weight: what trees have split by cannot be taken back.

    What is left of the prior's excess log loss in the last fifth of 6,000 rows with 20 features, simulated, one seed::

                                       weighted sum   trees on top   trees alone
        two facts, neither alone               0.99           0.72          0.51
        two facts, a little alone              0.82           0.19          0.09
        one fact and the action                0.37           0.32          0.56
        a weighted sum is the truth            0.23           0.23          0.71

    Settings:
        linear: 1 on top of a logistic correction with its first choice of settings, 0 alone.
        depth: branches above a leaf, at most.
        grace: curvature, chance × (1 - chance) summed over rows, between two looks at whether to split a leaf.
        tie: Hoeffding bound below which the best split is taken although another is as good: what finds facts that
            mean nothing alone.

    Attributes:
        trees: all of them.
    """

    family: ClassVar[str] = "forest"
    choices: ClassVar[tuple[Settings, ...]] = (
        {"linear": 0.0, "depth": 6.0, "grace": 10.0, "tie": 0.2},
        {"linear": 1.0, "depth": 6.0, "grace": 10.0, "tie": 0.2},
        {"linear": 0.0, "depth": 6.0, "grace": 20.0, "tie": 0.1},
        {"linear": 1.0, "depth": 6.0, "grace": 20.0, "tie": 0.1},
        {"linear": 0.0, "depth": 4.0, "grace": 10.0, "tie": 0.2},
    )
    arithmetic: ClassVar[str] = f"trees={TREES} {ARITHMETIC}"
    is_posterior: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner; the prior log-odds already hold the base rate."""
        self.settings = settings
        self._space = space
        self._base_rate = base_rate
        self.trees = [CorrectionTree(space, salt, settings) for salt in range(TREES)]
        self._linear = (
            LogisticCorrection(space, base_rate, LogisticCorrection.choices[0]) if settings["linear"] else None
        )
        self._token_inputs: dict[tuple[str, ...], list[int]] = {}

    @property
    def seen(self) -> Sequence[int]:
        """See Learner: something was learned about all."""
        return range(len(self._space.rows))

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner."""
        x, before = self._inputs(row), self._before(row)
        if self._linear is not None:
            self._linear.learn_one(row, reward)
        total = 0.0
        for tree in self.trees:
            total += tree.learn_row(x, before, reward, 1.0)
        return sigmoid(before + total / TREES)

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner, and the class."""
        x, before = self._inputs(row), self._before(row)
        if abs(change) < CHANGE_MIN:
            return self._chance(x, before)
        if self._linear is not None:
            self._linear.correct_one(row, change)
        total = 0.0
        for tree in self.trees:
            total += tree.learn_row(x, before, 1.0 if change > 0.0 else 0.0, abs(change))
        return sigmoid(before + total / TREES)

    def predict_one(self, row: Row) -> Prediction:
        """See Learner."""
        return Prediction(self._chance(self._inputs(row), self._before(row)), 0.0)

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner; the graph is apart, see model."""
        inputs = np.zeros((len(actions), 1 + TOKEN_SLOTS))
        for i, action in enumerate(actions):
            inputs[i, 0] = min(action, ACTIONS_TOLD_APART)
            for key in self._inputs_of_tokens(action):
                inputs[i, ACTION - key] = 1.0
        linear = self._linear.export(actions) if self._linear is not None else {}
        return linear | {"correction_forest_inputs": inputs}

    def model(self) -> bytes:
        """Return the ONNX graph, see GoalArrays.correction_forest. Cost: some 1 ms."""
        return forest_graph.graph_of([tree.root for tree in self.trees], len(self._space.columns), 1 + TOKEN_SLOTS)

    def heir(self, settings: Settings) -> Self:
        """See Learner: it grows on from the same trees; those deeper than it may be stay so.

        Trees that stood on a weighted sum cannot stand alone, nor the reverse: then it begins anew.
        """
        successor = type(self)(self._space, self._base_rate, settings)
        if settings["linear"] != self.settings["linear"]:
            return successor
        state = MemberState()
        self.save(state)
        successor.load(state)
        return successor

    def save(self, state: MemberState) -> None:
        """See Learner."""
        state.forest.CopyFrom(ForestState(trees=[tree_state.saved(tree) for tree in self.trees]))
        if self._linear is not None:
            linear = MemberState()
            self._linear.save(linear)
            state.forest.linear.CopyFrom(linear.logistic)

    def load(self, state: MemberState) -> None:
        """See Learner."""
        for tree, saved in zip(self.trees, state.forest.trees, strict=True):
            tree_state.load(tree, saved)
        if self._linear is not None:
            self._linear.load(MemberState(logistic=state.forest.linear))

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        del base_rate
        return {}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner: leaves at full depth watch nothing."""
        values = min(n_actions, ACTIONS_TOLD_APART) + TOKEN_SLOTS
        leaf = min(width, COLUMNS_WATCHED) * INTERVALS * _CELL_BYTES + values * _VALUE_BYTES
        leaves = int(2.0 ** (max(choice["depth"] for choice in cls.choices) - 1.0))
        return TREES * leaves * leaf + LogisticCorrection.size_bytes(n_actions, width)

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner: sigmoid(prior + w·x + b + what the graph among the arrays says)."""
        before = prior_log_odds
        if "correction_weights" in arrays:
            before += float(arrays["correction_weights"] @ features + arrays["correction_intercepts"])
        del constants
        inputs = np.concatenate([features, arrays["correction_forest_inputs"]]).astype(np.float32)
        correction = forest_graph.run(arrays["correction_forest"].astype(np.uint8).tobytes(), inputs[np.newaxis])
        return Prediction(sigmoid(before + float(correction[0])), 0.0)

    def _chance(self, x: Inputs, before: float) -> float:
        total = 0.0
        for tree in self.trees:
            total += float(tree.predict_one(x))  # type: ignore[no-untyped-call]  # untyped in River
        return sigmoid(before + total / TREES)

    def _before(self, row: Row) -> float:
        """Return the log-odds that the trees add to."""
        return row.prior_log_odds + (self._linear.correction_of(row) if self._linear is not None else 0.0)

    def _inputs(self, row: Row) -> Inputs:
        """Return a row as trees read it: in single precision, as workers do, so that all comparisons come out alike."""
        columns = np.zeros(len(self._space.columns))
        columns[: row.x.size - 1] = row.x[1:].astype(np.float32)
        return Inputs(columns, min(row.action, ACTIONS_TOLD_APART), self._inputs_of_tokens(row.action))

    def _inputs_of_tokens(self, action: int) -> list[int]:
        tokens = self._space.tokens[action]
        inputs = self._token_inputs.get(tokens)
        if inputs is None:
            if len(self._token_inputs) > 2 * len(self._space.rows):  # of actions whose facts have changed since
                self._token_inputs.clear()
            inputs = self._token_inputs[tokens] = token_inputs(tokens)
        return inputs
