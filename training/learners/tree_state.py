"""River's trees as messages and back, to the bit: every node, and all that leaves have seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from river.tree.nodes.branch import NominalBinaryBranch, NumericBinaryBranch

from training.learners.trees import INTERVALS, CorrectionTree, Leaf, Node, new_observer, sums_of, variance_of
from tsugi.log.v1.learner_pb2 import TreeBranch, TreeLeaf, TreeNode, TreeObserver, TreeState


def saved(tree: CorrectionTree) -> TreeState:
    """Return the whole state of a tree."""
    return TreeState(
        nodes=list(_saved_nodes(tree.root)) if tree.root is not None else [],
        leaves_made=tree.leaves_made,
        weight_seen=tree._train_weight_seen_by_model,
    )


def load(tree: CorrectionTree, state: TreeState) -> None:
    """Take over a saved state; the tree must be new."""
    nodes = iter(state.nodes)
    if state.nodes:
        tree._root = _node(nodes, 0)
    tree.leaves_made = state.leaves_made
    tree._train_weight_seen_by_model = state.weight_seen


def _saved_nodes(node: Node) -> Iterator[TreeNode]:
    sums = np.array(sums_of(node.stats)).tobytes()
    if isinstance(node, Leaf):
        yield TreeNode(sums=sums, leaf=_saved_leaf(node))
        return
    value = node.threshold if isinstance(node, NumericBinaryBranch) else node.value
    yield TreeNode(sums=sums, branch=TreeBranch(input=node.feature, value=value))
    for child in node.children:
        yield from _saved_nodes(child)


def _saved_leaf(leaf: Leaf) -> TreeLeaf:
    state = TreeLeaf(
        number=leaf.number,
        attempted_at=leaf.last_split_attempt_at,
        is_active=leaf.is_active(),  # type: ignore[no-untyped-call]  # untyped in River
        fresh=np.array(sums_of(leaf.fresh)).tobytes(),
    )
    if not state.is_active:
        return state
    cells = leaf.cells.reshape(-1, 4)
    used = np.flatnonzero(cells[:, 0])
    state.columns = leaf.watched.astype(np.int32).tobytes()
    state.width = leaf.width
    state.cells = used.astype(np.int32).tobytes()
    state.cell_sums = cells[used].tobytes()
    for key, observer in leaf.splitters.items():
        values = observer._statistics
        state.observers.append(
            TreeObserver(
                input=key,
                values=np.array(list(values)).tobytes(),
                sums=np.array([sums_of(each) for each in values.values()]).tobytes(),
            )
        )
    return state


def _node(nodes: Iterator[TreeNode], depth: int) -> Node:
    state = next(nodes)
    statistics = variance_of(np.frombuffer(state.sums).tolist())
    if state.HasField("leaf"):
        leaf = Leaf(statistics, depth, state.leaf.number)
        leaf.fresh = variance_of(np.frombuffer(state.leaf.fresh).tolist())
        leaf.last_split_attempt_at = state.leaf.attempted_at
        if state.leaf.is_active:
            _watch_again(leaf, state.leaf)
        else:
            leaf.deactivate()  # type: ignore[no-untyped-call]  # untyped in River
        return leaf
    left, right = _node(nodes, depth + 1), _node(nodes, depth + 1)
    kind: Any = NumericBinaryBranch if state.branch.input >= 0 else NominalBinaryBranch
    made: Node = kind(statistics, state.branch.input, state.branch.value, depth, left, right)
    return made


def _watch_again(leaf: Leaf, state: TreeLeaf) -> None:
    leaf.watched = np.frombuffer(state.columns, np.int32).astype(np.int64)
    leaf.width = state.width
    leaf.cells = np.zeros((leaf.watched.size, INTERVALS, 4))
    leaf.cells.reshape(-1, 4)[np.frombuffer(state.cells, np.int32)] = np.frombuffer(state.cell_sums).reshape(-1, 4)
    for saved_observer in state.observers:
        observer = new_observer()
        sums = np.frombuffer(saved_observer.sums).reshape(-1, 3).tolist()
        values = np.frombuffer(saved_observer.values).tolist()
        observer._statistics = dict(zip(values, map(variance_of, sums), strict=True))
        leaf.splitters[saved_observer.input] = observer
