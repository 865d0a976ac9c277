"""Trees: what they find, that they are saved to the bit, and that the graph says what River says."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st
from river.tree.nodes.branch import NumericBinaryBranch

from server.catalog.catalog import Doubles
from server.registry.operators import IR_VERSION_MAX, OPERATORS, OPSETS_MAX
from training.learners import forest_graph, trees
from training.learners.base import Learner, Row, Settings, sigmoid
from training.learners.baseline import Baseline
from training.learners.forest import Forest
from training.learners.logistic import LogisticCorrection
from training.learners.trees import ACTION, ACTIONS_TOLD_APART, TOKEN_SLOTS, Branch, Leaf, Node
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

D = 6
ALONE, ON_TOP = Forest.choices[:2]
TOKENS = {"a": ("group=even",), "b": ("group=odd",), "c": ("group=even", "new"), "d": ("group=odd",)}


def space_of() -> Space:
    space = Space()
    space.admit_features(f"profile.f{i}" for i in range(D))
    for action, tokens in TOKENS.items():
        space.admit_action(action, tokens)
    return space


def rows(n: int, seed: int, other_fact: str = "column") -> Iterator[tuple[Row, float]]:
    """Yield rows where two facts, one of them a column, mean something together and hardly anything alone."""
    rng = random.Random(seed)
    for _ in range(n):
        x = np.array([1.0, *(rng.gauss(0.0, 1.0) for _ in range(D))])
        action = rng.randrange(len(TOKENS))
        other = {"group": action % 2 == 0, "action": action == 2}.get(other_fact, x[2] > 0.4)
        chance = 0.7 if (x[1] > 0.4) != other else 0.1
        if other_fact == "column, and a weighted sum":
            chance = sigmoid(x[3] - x[4] - (0.0 if (x[1] > 0.4) != other else 2.0))
        yield Row(action, x, -1.0), float(rng.random() < chance)


def grown(other_fact: str) -> Forest:
    learner = Forest(space_of(), 0.3, ALONE)
    for row, reward in rows(2_000, 1, other_fact):
        learner.learn_one(row, reward)
    return learner


@pytest.fixture(scope="module")
def forest() -> Forest:
    return grown("column")


@pytest.fixture(scope="module")
def others(forest: Forest) -> list[Forest]:
    """Return forests of all kinds."""
    return [forest, grown("group"), grown("action")]


def state_of(learner: Forest) -> bytes:
    state = MemberState()
    learner.save(state)
    return bytes(state.SerializeToString(deterministic=True))


def restored(learner: Forest) -> Forest:
    successor = Forest(space_of(), 0.3, learner.settings)
    successor.load(MemberState.FromString(state_of(learner)))
    return successor


def branches(learner: Forest) -> list[Branch]:
    def below(node: Node | None) -> Iterator[Branch]:
        if node is not None and not isinstance(node, Leaf):
            yield node
            for child in node.children:
                yield from below(child)

    return [branch for tree in learner.trees for branch in below(tree.root)]


def said_by_graph(learner: Forest, asked: list[Row]) -> Doubles:
    """Return what workers expect."""
    inputs = learner.export([row.action for row in asked])["correction_forest_inputs"]
    features = np.array([row.x[1:] for row in asked])
    corrections = forest_graph.run(learner.model(), np.hstack([features, inputs]).astype(np.float32))
    return np.array([sigmoid(row.prior_log_odds + float(c)) for row, c in zip(asked, corrections, strict=True)])


def loss(learner: Learner, other_fact: str, n: int = 3_000) -> float:
    """Return the mean log loss of the later half of rows, each judged before it is learned."""
    total = 0.0
    for i, (row, reward) in enumerate(rows(n, 2, other_fact)):
        chance = min(max(learner.learn_one(row, reward), 1e-4), 1.0 - 1e-4)
        if 2 * i >= n:
            total -= reward * math.log(chance) + (1.0 - reward) * math.log(1.0 - chance)
    return 2.0 * total / n


def losses(other_fact: str) -> list[float]:
    """Return those of trees alone, trees on top of a weighted sum, that sum, and the prior."""
    space = space_of()
    return [
        loss(learner, other_fact)
        for learner in (
            Forest(space, 0.3, ALONE),
            Forest(space, 0.3, ON_TOP),
            LogisticCorrection(space, 0.3, LogisticCorrection.choices[0]),
            Baseline(space, 0.3, {}),
        )
    ]


def test_it_finds_what_facts_mean_together() -> None:
    alone, on_top, linear, baseline = losses("column")
    assert alone < on_top - 0.03 < linear - 0.05 < baseline - 0.05


def test_on_top_of_a_weighted_sum_it_finds_what_either_alone_does_not() -> None:
    alone, on_top, linear, baseline = losses("column, and a weighted sum")
    assert on_top < linear - 0.01 < alone < baseline - 0.05


def test_trees_are_unlike_and_split_by_columns_and_by_what_actions_share(forest: Forest, others: list[Forest]) -> None:
    assert len({tuple((b.feature, b.depth) for b in branches_of) for branches_of in _by_tree(forest)}) > 1
    kinds = {type(branch).__name__ for branch in branches(forest) + branches(others[1])}
    assert kinds == {"NumericBinaryBranch", "NominalBinaryBranch"}
    assert any(branch.feature < ACTION for branch in branches(others[1]))
    assert any(branch.feature == ACTION for branch in branches(others[2]))


def _by_tree(forest: Forest) -> list[list[Branch]]:
    found: list[list[Branch]] = []
    for tree in forest.trees:
        only = Forest(space_of(), 0.3, forest.settings)
        only.trees = [tree]
        found.append(branches(only))
    return found


@pytest.mark.parametrize("choice", Forest.choices[:2])
def test_a_restart_goes_on_to_the_bit_through_splits(choice: Settings) -> None:
    uninterrupted = restarted = Forest(space_of(), 0.3, choice)
    restarted = restored(uninterrupted)
    for i, (row, reward) in enumerate(rows(1_500, 3)):
        assert uninterrupted.learn_one(row, reward) == restarted.learn_one(row, reward)
        if i % 11 == 0:
            uninterrupted.correct_one(row, 0.5 - reward)
            restarted.correct_one(row, 0.5 - reward)
        if i % 150 == 7:
            restarted = restored(restarted)
            assert state_of(restarted) == state_of(uninterrupted)
    assert state_of(restarted) == state_of(uninterrupted)
    assert len(branches(restarted)) > 20


@given(seed=st.integers(0, 2**32 - 1))
@tried(max_examples=60, deadline=None)
def test_the_graph_says_what_river_says_even_at_thresholds(others: list[Forest], seed: int) -> None:
    rng = random.Random(seed)
    learner = rng.choice(others)
    thresholds = [branch for branch in branches(learner) if isinstance(branch, NumericBinaryBranch)]
    asked = []
    for _ in range(8):
        x = np.array([1.0, *(rng.uniform(-8.0, 8.0) for _ in range(D))])
        for branch in rng.sample(thresholds, 4):
            nearest = np.float32(branch.threshold)
            around = [np.nextafter(nearest, np.float32(end)) for end in (-9.0, 9.0)]
            x[1 + branch.feature] = rng.choice([branch.threshold, nearest, *around])
        asked.append(Row(rng.randrange(len(TOKENS)), x, rng.uniform(-3.0, 3.0)))
    rivers = [learner.predict_one(row).mean for row in asked]
    np.testing.assert_allclose(said_by_graph(learner, asked), rivers, rtol=0.0, atol=1e-6)


def test_a_new_forest_says_nothing() -> None:
    new = Forest(space_of(), 0.3, ALONE)
    row, _ = next(rows(1, 4))
    assert said_by_graph(new, [row]).tolist() == [sigmoid(row.prior_log_odds)]


@pytest.mark.parametrize(
    ("threshold", "single"),
    [(0.5, 0.5), (0.1, float(np.nextafter(np.float32(0.1), np.float32(-1)))), (-0.1, float(np.float32(-0.1)))],
)
def test_thresholds_are_cut_to_single_precision_downwards(threshold: float, single: float) -> None:
    assert forest_graph.single_below(threshold) == single


def test_actions_beyond_those_told_apart_and_many_tokens_are_bounded() -> None:
    space = Space()
    space.admit_features(["profile.f0"])
    for i in range(ACTIONS_TOLD_APART + 40):
        space.admit_action(f"action-{i}", (f"sku={i}",))
    learner = Forest(space, 0.3, ALONE)
    rng = random.Random(5)
    for i in range(2_000):
        learner.learn_one(Row(i % len(space.rows), np.array([1.0, rng.gauss(0.0, 1.0)]), -1.0), float(i % 3 == 0))
    inputs = learner.export(range(len(space.rows)))["correction_forest_inputs"]
    assert inputs.shape == (len(space.rows), 1 + TOKEN_SLOTS)
    assert inputs[:, 0].max() == ACTIONS_TOLD_APART and (inputs[:, 1:].sum(axis=1) == 1.0).all()
    assert len(state_of(learner)) < Forest.size_bytes(len(space.rows), 1)
    last = len(space.rows) - 1
    asked = Row(last, np.array([1.0, 0.2]), -1.0)
    assert said_by_graph(learner, [asked])[0] == pytest.approx(learner.predict_one(asked).mean, abs=1e-6)


def test_order_of_first_sight_changes_nothing_but_places_even_where_trees_have_split() -> None:
    turned = Space()
    turned.admit_features(f"profile.f{i}" for i in reversed(range(D)))
    for action, tokens in reversed(TOKENS.items()):
        turned.admit_action(action, tokens)
    one, other = (Forest(space, 0.3, ALONE) for space in (space_of(), turned))
    for row, reward in rows(1_000, 6, "group"):
        same = Row(len(TOKENS) - 1 - row.action, np.append(1.0, row.x[:0:-1]), row.prior_log_odds)
        assert other.learn_one(same, reward) == pytest.approx(one.learn_one(row, reward), abs=1e-9)
    assert len(branches(one)) == len(branches(other)) > 10


def test_leaves_forget_so_that_they_can_follow_a_world_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    row, expected = Row(0, np.array([1.0, *np.zeros(D)]), 0.0), []
    for remembered in (50.0, math.inf):
        monkeypatch.setattr(trees, "REMEMBERED", remembered)
        learner = Forest(space_of(), 0.5, ALONE)
        for i in range(2_000):
            learner.learn_one(row, float(i % 2) if i < 1_600 else 0.0)
        expected.append(learner.predict_one(row).mean)
    assert expected[0] < 0.1
    assert expected[1] > 0.2


def test_the_graph_is_made_of_what_a_pushed_one_may_be_made_of(forest: Forest) -> None:
    model = onnx.load_from_string(forest.model())
    onnx.checker.check_model(model, full_check=True)
    assert all(node.op_type in OPERATORS[node.domain] for node in model.graph.node)
    assert all(each.version <= OPSETS_MAX[each.domain] for each in model.opset_import)
    assert model.ir_version <= IR_VERSION_MAX


def test_depth_is_bounded(forest: Forest) -> None:
    assert max(branch.depth for branch in branches(forest)) < forest.settings["depth"]
