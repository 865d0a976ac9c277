"""River's trees as one ONNX graph, for workers.

A tree's comparison is made in double precision, a graph's in single: a threshold is cut to the largest single number
that is not above it, which compares alike with everything that is single itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper
from river.tree.nodes.branch import NumericBinaryBranch

from server.registry.scorers import open_session
from training.learners.trees import ACTION, Leaf, Node

INPUT: Final = "inputs"
OUTPUT: Final = "correction"

_OPSETS: Final = {"": 17, "ai.onnx.ml": 3}
_IR_VERSION: Final = 8
_SESSIONS_KEPT: Final = 4


class _Node(NamedTuple):
    tree: int
    number: int
    mode: str
    input: int
    value: float  # the threshold, or what a leaf gives
    left: int
    right: int


def graph_of(roots: Sequence[Node | None], n_columns: int, n_action_inputs: int) -> bytes:
    """Return a graph whose output is the mean of the trees.

    Args:
        roots: of the trees; None: it says 0.
        n_columns: of the space.
        n_action_inputs: the action, then its token slots.

    Returns:
        The model: float32[m, n_columns + n_action_inputs] to float32[m, 1].

    Raises:
        ArithmeticError: what a leaf says is not finite.
    """
    nodes = [node for number, root in enumerate(roots) for node in _nodes(number, root, n_columns)]
    leaves = [node for node in nodes if node.mode == "LEAF"]
    if not all(math.isfinite(node.value) for node in leaves):
        raise ArithmeticError("a leaf says nothing finite")
    ensemble = helper.make_node(
        "TreeEnsembleRegressor",
        [INPUT],
        [OUTPUT],
        domain="ai.onnx.ml",
        aggregate_function="SUM",
        n_targets=1,
        nodes_treeids=[node.tree for node in nodes],
        nodes_nodeids=[node.number for node in nodes],
        nodes_modes=[node.mode for node in nodes],
        nodes_featureids=[node.input for node in nodes],
        nodes_values=[0.0 if node.mode == "LEAF" else node.value for node in nodes],
        nodes_truenodeids=[node.left for node in nodes],
        nodes_falsenodeids=[node.right for node in nodes],
        target_ids=[0] * len(leaves),
        target_treeids=[node.tree for node in leaves],
        target_nodeids=[node.number for node in leaves],
        target_weights=[node.value / len(roots) for node in leaves],
    )
    graph = helper.make_graph(
        [ensemble],
        "forest",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [None, n_columns + n_action_inputs])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None, 1])],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="tsugi")
    return bytes(model.SerializeToString(deterministic=True))


def run(model: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what a graph says of each row, float32[m]; for comparing, workers keep a session open."""
    (said,) = _session(model).run([OUTPUT], {INPUT: inputs})
    result: NDArray[np.float32] = said.reshape(-1)
    return result


_session = functools.lru_cache(_SESSIONS_KEPT)(open_session)


def _nodes(tree: int, root: Node | None, n_columns: int) -> Iterator[_Node]:
    """Yield a tree's nodes, numbered in this order: what is to the left follows a branch at once."""
    number = 0

    def below(node: Node | None) -> Iterator[_Node]:
        nonlocal number
        own, number = number, number + 1
        if node is None or isinstance(node, Leaf):
            yield _Node(tree, own, "LEAF", 0, 0.0 if node is None else node.stats.mean.get(), 0, 0)
            return
        left = list(below(node.children[0]))
        right = list(below(node.children[1]))
        if isinstance(node, NumericBinaryBranch):
            mode, place, value = "BRANCH_LEQ", node.feature, single_below(node.threshold)
        else:
            mode, place, value = "BRANCH_EQ", n_columns + ACTION - node.feature, node.value
        yield _Node(tree, own, mode, place, value, left[0].number, right[0].number)
        yield from left
        yield from right

    return below(root)


def single_below(threshold: float) -> float:
    """Return the largest single-precision number that is not above a threshold."""
    single = np.float32(threshold)
    is_above = float(single) > threshold  # as numpy's number, the threshold would be rounded before it is compared
    return float(np.nextafter(single, np.float32(-np.inf)) if is_above else single)
