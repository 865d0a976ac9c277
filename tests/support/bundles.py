"""Bundles for tests, made from seeds with the onnx package, beside plain numpy that says what they must score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tsugi.log.v1.bundle_pb2 import Bundle, Feature, GoldenRows, Manifest, OutputKind, Scaled

Floats = NDArray[np.float32]

INPUT, OUTPUT, GOAL = "features", "propensity", "purchase"

FEATURES: Final = (
    Feature(fact="profile.age", scaled=Scaled(center=40.0, spread=15.0, limit=4.0, when_unknown=-0.5)),
    Feature(fact="profile.age", is_unknown=True),
    Feature(fact="context.device", equals="phone"),
    Feature(fact="action.price", scaled=Scaled(center=10.0, spread=5.0, limit=3.0)),
    Feature(fact="profile.member", equals="true"),
)


def inputs(n: int = 12, d: int = len(FEATURES)) -> Floats:
    """Return n rows of input, the same on every call."""
    return np.random.default_rng(7).uniform(-2.0, 2.0, (n, d)).astype(np.float32)


@dataclass(frozen=True)
class Mlp:
    """A multi-layer perceptron with ReLU, as a graph and as plain numpy."""

    weights: tuple[tuple[Floats, Floats], ...]
    is_probability: bool = True

    def score(self, rows: Floats) -> Floats:
        """The oracle."""
        for i, (weight, bias) in enumerate(self.weights):
            rows = rows @ weight + bias
            if i + 1 < len(self.weights):
                rows = np.maximum(rows, np.float32(0.0))
        rows = rows[:, 0]
        return (1.0 / (1.0 + np.exp(-rows))).astype(np.float32) if self.is_probability else rows

    def model(self) -> onnx.ModelProto:
        """The graph."""
        nodes, last = [], INPUT
        for i in range(len(self.weights)):
            nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [f"h{i}"]))
            nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
            last = f"r{i}"
        nodes[-1] = helper.make_node("Sigmoid" if self.is_probability else "Identity", nodes[-1].input, [OUTPUT])
        tensors = {
            f"{letter}{i}": array
            for i, pair in enumerate(self.weights)
            for letter, array in zip("wb", pair, strict=True)
        }
        return model(nodes, tensors, d=self.weights[0][0].shape[0])


def mlp(d: int = len(FEATURES), hidden: Sequence[int] = (8,), *, is_probability: bool = True) -> Mlp:
    """Return a small perceptron, the same on every call."""
    random = np.random.default_rng(11)
    sizes = [d, *hidden, 1]
    weights = [
        (random.normal(0.0, pair[0] ** -0.5, pair), random.normal(0.0, 0.1, pair[1])) for pair in pairwise(sizes)
    ]
    return Mlp(tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in weights), is_probability)


def good_bundle(*, is_probability: bool = True, hidden: Sequence[int] = (8,)) -> Bundle:
    """Return a bundle that passes the gate and whose features the catalog of the tests declares."""
    net = mlp(hidden=hidden, is_probability=is_probability)
    return bundle(net.model(), outputs=net.score(inputs()), is_probability=is_probability)


def bundle(
    graph: onnx.ModelProto | bytes,
    *,
    features: Sequence[Feature] = FEATURES,
    rows: Floats | None = None,
    outputs: Floats | None = None,
    is_probability: bool = True,
) -> Bundle:
    """Return a bundle around any graph; golden outputs default to a half."""
    rows = inputs(d=len(features)) if rows is None else rows
    outputs = np.full(len(rows), 0.5) if outputs is None else outputs
    return Bundle(
        manifest=Manifest(
            format_version=1,
            goal=GOAL,
            output_kind=OutputKind.OUTPUT_KIND_PROBABILITY if is_probability else OutputKind.OUTPUT_KIND_LOG_ODDS,
            input_name=INPUT,
            output_name=OUTPUT,
            features=features,
        ),
        onnx_model=graph if isinstance(graph, bytes) else graph.SerializeToString(),
        golden_rows=GoldenRows(inputs=rows.astype("<f4").tobytes(), outputs=outputs.astype("<f4").tobytes()),
    )


def model(
    nodes: Sequence[onnx.NodeProto],
    tensors: dict[str, NDArray[Any]] | None = None,
    *,
    d: int = len(FEATURES),
    given: Sequence[onnx.ValueInfoProto] | None = None,
    wanted: Sequence[onnx.ValueInfoProto] | None = None,
    opset: int = 18,
    ir_version: int = 10,
    **more: Any,
) -> onnx.ModelProto:
    """Return a model of nodes over float32[n, d], with the output float32[n, 1] unless said otherwise."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [value(INPUT, "n", d)] if given is None else given,
        [value(OUTPUT, "n", 1)] if wanted is None else wanted,
        [numpy_helper.from_array(array, name) for name, array in (tensors or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **more)


def value(name: str, *shape: str | int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Declare an input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def node(operator: str, given: Sequence[str], wanted: Sequence[str] = (OUTPUT,), **attributes: Any) -> onnx.NodeProto:
    """Return one node."""
    return helper.make_node(operator, list(given), list(wanted), **attributes)


def tree(true_branch: int = 1) -> onnx.NodeProto:
    """Return a decision tree of one split of the first column at 0: 0.1 up to it, 0.9 above."""
    return node(
        "TreeEnsembleRegressor",
        [INPUT],
        domain="ai.onnx.ml",
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[0, 0, 0],
        nodes_values=[0.0, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_truenodeids=[true_branch, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        target_treeids=[0, 0],
        target_nodeids=[1, 2],
        target_ids=[0, 0],
        target_weights=[0.1, 0.9],
        n_targets=1,
    )


CATALOG: Final = """
name: bundles
currency_code: EUR
identity_namespaces: [{name: email}]
profile_attributes:
  - {name: age, type: ATTRIBUTE_TYPE_NUMBER, minimum: 0, maximum: 120, center: 40, spread: 15}
  - {name: member, type: ATTRIBUTE_TYPE_BOOL}
  - {name: note, type: ATTRIBUTE_TYPE_TEXT}
context_attributes:
  - {name: device, type: ATTRIBUTE_TYPE_CATEGORY, allowed_values: [desktop, phone]}
action_attributes:
  - {name: discount, type: ATTRIBUTE_TYPE_NUMBER}
  - {name: price, type: ATTRIBUTE_TYPE_NUMBER}
outcome_types: [{name: order}]
goals:
  - {name: purchase, outcomes: [{type: order, reward: 1}], attribution_window: 3600s, base_rate: 0.05}
channels: [{name: web}]
placements: [{name: home, channel: web, goal: purchase}]
actions:
  - {name: tea, attributes: {price: 4}, treatments: [{name: banner, channel: web}]}
"""
