"""Hostile bundles for tests: each a function named for what is wrong, beside the reason it must be refused for.

Everything is made here, from seeds; no hostile file lies in the repository.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.support.bundles import INPUT, OUTPUT, bundle, good_bundle, inputs, mlp, model, node, tree, value
from tsugi.log.v1.bundle_pb2 import Bundle, Feature, Scaled
from tsugi.v1.error_reason_pb2 import ErrorReason


@dataclass(frozen=True)
class Hostile:
    """One hostile bundle: what is wrong, how it is made, the reasons it may be refused for."""

    name: str
    make: Callable[[], bytes]
    reason: ErrorReason
    how: str = ""  # where the validator crashes: in which way


HOSTILE: list[Hostile] = []


def _hostile(reason: ErrorReason, how: str = "") -> Callable[[Callable[[], Bundle | bytes]], Callable[[], bytes]]:
    def register(make: Callable[[], Bundle | bytes]) -> Callable[[], bytes]:
        def data() -> bytes:
            made = make()
            return made if isinstance(made, bytes) else made.SerializeToString()

        HOSTILE.append(Hostile(make.__name__, data, reason, how))
        return data

    return register


_MALFORMED = ErrorReason.ERROR_REASON_BUNDLE_MALFORMED
_FORMAT = ErrorReason.ERROR_REASON_BUNDLE_FORMAT_REFUSED
_EXTERNAL = ErrorReason.ERROR_REASON_BUNDLE_EXTERNAL_DATA
_OPERATOR = ErrorReason.ERROR_REASON_BUNDLE_OPERATOR_REFUSED
_COMPLEX = ErrorReason.ERROR_REASON_BUNDLE_TOO_COMPLEX
_CONTRACT = ErrorReason.ERROR_REASON_BUNDLE_CONTRACT_MISMATCH
_OUTPUT = ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID
_SLOW = ErrorReason.ERROR_REASON_BUNDLE_TOO_SLOW
_CRASHED = ErrorReason.ERROR_REASON_BUNDLE_CRASHED_VALIDATOR


@_hostile(_MALFORMED)
def nothing_at_all() -> bytes:
    return b""


@_hostile(_MALFORMED)
def random_bytes() -> bytes:
    return np.random.default_rng(0).bytes(100_000)


@_hostile(_MALFORMED)
def truncated_bundle() -> bytes:
    data = good_bundle().SerializeToString()
    return data[: len(data) // 2]


@_hostile(_MALFORMED)
def truncated_model() -> Bundle:
    return bundle(mlp().model().SerializeToString()[:-100])


@_hostile(_MALFORMED)
def empty_model() -> Bundle:
    return bundle(onnx.ModelProto())


@_hostile(_MALFORMED)
def bare_onnx_model() -> bytes:
    return mlp().model().SerializeToString()


@_hostile(_MALFORMED)
def bundle_with_a_stowaway() -> bytes:
    return good_bundle().SerializeToString() + b"\x22\x04\x00\x00\x00\x00"


@_hostile(_MALFORMED)
def manifest_with_a_stowaway() -> bytes:
    manifest = good_bundle().manifest.SerializeToString() + b"\x7a\x01\x00"
    rest = good_bundle()
    rest.ClearField("manifest")
    return b"\x0a" + _varint(len(manifest)) + manifest + rest.SerializeToString()


@_hostile(_OPERATOR)
def operator_name_that_is_no_text() -> Bundle:
    return bundle(model([node("Sigmoid", [INPUT])]).SerializeToString().replace(b"Sigmoid", b"Sig\xff\xfeid"))


def _external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5, 1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _with_external_initializer(location: str) -> Bundle:
    graph = model([node("MatMul", [INPUT, "w"])])
    graph.graph.initializer.append(_external(location))
    return bundle(graph)


@_hostile(_EXTERNAL)
def weights_at_an_absolute_path() -> Bundle:
    return _with_external_initializer("/etc/passwd")


@_hostile(_EXTERNAL)
def weights_in_a_parent_folder() -> Bundle:
    return _with_external_initializer("../../etc/passwd")


@_hostile(_EXTERNAL)
def weights_in_the_working_folder() -> Bundle:
    return _with_external_initializer("pyproject.toml")


@_hostile(_EXTERNAL)
def weights_at_a_memory_address() -> Bundle:
    return _with_external_initializer("*/_ORT_MEM_ADDR_/*")


@_hostile(_EXTERNAL)
def weights_outside_in_a_constant() -> Bundle:
    return bundle(model([node("Constant", [], ["w"], value=_external("w.bin")), node("MatMul", [INPUT, "w"])]))


@_hostile(_EXTERNAL)
def weights_outside_deep_in_branches() -> Bundle:
    inner = helper.make_graph(
        [node("Constant", [], ["w"], value=_external("w.bin")), node("MatMul", [INPUT, "w"])],
        "b",
        [],
        [value(OUTPUT, "n", 1)],
    )
    return bundle(_nested_ifs(3, inner))


@_hostile(_EXTERNAL)
def weights_outside_in_a_function() -> Bundle:
    body = [node("Constant", [], ["w"], value=_external("w.bin")), node("MatMul", ["x", "w"], ["y"])]
    function = helper.make_function("f", "F", ["x"], ["y"], body, [helper.make_opsetid("", 18)])
    return bundle(model([helper.make_node("F", [INPUT], [OUTPUT], domain="f")], functions=[function]))


@_hostile(_FORMAT)
def zip_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../evil", good_bundle().SerializeToString())
    return file.getvalue()


@_hostile(_FORMAT)
def tar_archive_with_links() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (("hard", tarfile.LNKTYPE), ("soft", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    return file.getvalue()


@_hostile(_FORMAT)
def gzipped_bundle() -> bytes:
    return gzip.compress(good_bundle().SerializeToString(), mtime=0)


@_hostile(_FORMAT)
def deflated_joblib() -> bytes:
    return zlib.compress(pickle.dumps([1.0]))


@_hostile(_FORMAT)
def pickled_object() -> bytes:
    return pickle.dumps({"model": [1.0]}, protocol=4)


@_hostile(_FORMAT)
def pickled_object_of_the_first_protocol() -> bytes:
    return pickle.dumps([1.0, "x"], protocol=0)


@_hostile(_FORMAT)
def npz_with_objects() -> bytes:
    file = io.BytesIO()
    np.savez(file, weights=np.array([{"a": 1}], dtype=object))
    return file.getvalue()


@_hostile(_OPERATOR)
def function_chain_3000_deep() -> Bundle:
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    chain = [
        helper.make_function(
            "f", f"F{i}", ["x"], ["y"], [helper.make_node(f"F{i + 1}", ["x"], ["y"], domain="f")], opset
        )
        for i in range(3_000)
    ]
    chain.append(helper.make_function("f", "F3000", ["x"], ["y"], [node("Relu", ["x"], ["y"])], opset))
    return bundle(model([helper.make_node("F0", [INPUT], [OUTPUT], domain="f")], functions=chain))


@_hostile(_OPERATOR)
def loop_without_end() -> Bundle:
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Identity", ["x"], ["y"])],
        "body",
        [value("i", kind=TensorProto.INT64), value("go", kind=TensorProto.BOOL), value("x", "n", 5)],
        [value("go_on", kind=TensorProto.BOOL), value("y", "n", 5)],
    )
    tensors = {"count": np.array(2**62), "yes": np.array(True)}
    return bundle(model([node("Loop", ["count", "yes", INPUT], body=body)], tensors, wanted=[value(OUTPUT, "n", 5)]))


@_hostile(_OPERATOR)
def scan() -> Bundle:
    body = helper.make_graph([node("Relu", ["x"], ["y"])], "body", [value("x", 5)], [value("y", 5)])
    return bundle(model([node("Scan", [INPUT], body=body, num_scan_inputs=1)], wanted=[value(OUTPUT, "n", 5)]))


def _nested_ifs(depth: int, inner: onnx.GraphProto) -> onnx.ModelProto:
    for _ in range(depth):
        other = helper.make_graph([node("Identity", [INPUT])], "else", [], [value(OUTPUT, "n", 5)])
        branch = node("If", ["yes"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([branch], "then", [], [value(OUTPUT, "n", 5)])
    return model(list(inner.node), {"yes": np.array(True)})


@_hostile(_OPERATOR)
def if_25_deep() -> Bundle:
    return bundle(_nested_ifs(25, helper.make_graph([node("Relu", [INPUT])], "b", [], [value(OUTPUT, "n", 5)])))


@_hostile(_OPERATOR)
def graph_smuggled_into_an_allowed_operator() -> Bundle:
    body = helper.make_graph([node("Relu", [INPUT])], "b", [], [value(OUTPUT, "n", 5)])
    return bundle(model([node("Sigmoid", [INPUT], body=body)]))


@_hostile(_MALFORMED)
def dimensions_whose_product_overflows() -> Bundle:
    graph = model([node("MatMul", [INPUT, "w"])])
    graph.graph.initializer.append(
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**32, 2**32], raw_data=b"")
    )
    return bundle(graph)


@_hostile(_MALFORMED)
def negative_dimension() -> Bundle:
    graph = model([node("MatMul", [INPUT, "w"])])
    graph.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-5, 1], raw_data=b""))
    return bundle(graph)


@_hostile(_OUTPUT)
def run_time_dimensions_that_overflow() -> Bundle:
    nodes = [
        node("ConstantOfShape", ["shape"], ["big"]),
        node("ReduceSum", ["big"], ["s"], keepdims=0),
        node("Add", [INPUT, "s"]),
    ]
    return bundle(model(nodes, {"shape": np.array([2**62, 4])}))


@_hostile(_CRASHED, "memory limit")
def terabyte_of_zeros_when_loaded() -> Bundle:
    nodes = [node("ConstantOfShape", ["shape"], ["big"]), node("ReduceMax", ["big"], ["s"], keepdims=0)]
    nodes += [node("MatMul", [INPUT, "w"], ["h"]), node("Add", ["h", "s"])]
    return bundle(model(nodes, {"shape": np.array([2**38]), "w": np.ones((5, 1), np.float32)}))


@_hostile(_CRASHED, "memory limit")
def terabyte_of_copies_when_run() -> Bundle:
    nodes = [node("MatMul", [INPUT, "w"], ["h"]), node("Expand", ["h", "shape"], ["big"])]
    nodes += [node("ReduceMax", ["big", "axis"], keepdims=1)]
    tensors = {"shape": np.array([1, 2**36]), "axis": np.array([1]), "w": np.ones((5, 1), np.float32)}
    return bundle(model(nodes, tensors))


@_hostile(_CRASHED)
def hours_of_folding_constants() -> Bundle:
    square = np.eye(2048, dtype=np.float32)
    nodes = [node("MatMul", [f"c{i}" if i else "square", "square"], [f"c{i + 1}"]) for i in range(9_000)]
    nodes += [node("ReduceMax", ["c9000"], ["s"], keepdims=0)]
    nodes += [node("MatMul", [INPUT, "w"], ["h"]), node("Add", ["h", "s"])]
    return bundle(model(nodes, {"square": square, "w": np.ones((5, 1), np.float32)}))


@_hostile(_OPERATOR)
def operator_that_does_not_exist() -> Bundle:
    return bundle(model([node("Frobnicate", [INPUT])]))


@_hostile(_OPERATOR)
def operator_of_a_custom_domain() -> Bundle:
    return bundle(model([node("FusedMatMul", [INPUT, INPUT], domain="com.microsoft")]))


@_hostile(_OPERATOR)
def random_normal() -> Bundle:
    return bundle(model([node("RandomNormalLike", [INPUT])]))


@_hostile(_OPERATOR)
def bernoulli() -> Bundle:
    return bundle(model([node("Bernoulli", [INPUT])]))


@_hostile(_OPERATOR)
def multinomial() -> Bundle:
    return bundle(model([node("Multinomial", [INPUT])]))


@_hostile(_OPERATOR)
def dropout_that_is_training() -> Bundle:
    return bundle(
        model([node("Dropout", [INPUT, "half", "yes"])], {"half": np.array(0.5, np.float32), "yes": np.array(True)})
    )


@_hostile(_OPERATOR)
def zip_map() -> Bundle:
    return bundle(model([node("ZipMap", [INPUT], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2, 3, 4])]))


@_hostile(_OPERATOR)
def sparse_initializer() -> Bundle:
    graph = model([node("MatMul", [INPUT, "w"])])
    values, places = numpy_helper.from_array(np.ones(1, np.float32), "w"), numpy_helper.from_array(np.array([0]))
    graph.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5, 1]))
    return bundle(graph)


@_hostile(_OPERATOR)
def sparse_constant() -> Bundle:
    values, places = numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.array([0]))
    sparse = helper.make_sparse_tensor(values, places, [2**40])
    return bundle(model([node("Constant", [], ["w"], sparse_value=sparse), node("Add", [INPUT, "w"])]))


@_hostile(_OPERATOR)
def training_graph() -> Bundle:
    graph = mlp().model()
    graph.training_info.add().algorithm.node.append(node("Relu", [INPUT]))
    return bundle(graph)


@_hostile(_COMPLEX)
def one_node_too_many() -> Bundle:
    nodes = [node("Relu", [f"h{i}" if i else INPUT], [f"h{i + 1}"]) for i in range(10_000)]
    return bundle(model([*nodes, node("Identity", ["h10000"])]))


@_hostile(_COMPLEX)
def million_empty_nodes() -> Bundle:
    graph = b"\x0a\x00" * 1_000_000
    return bundle(b"\x08\x0a\x3a" + _varint(len(graph)) + graph)


@_hostile(_COMPLEX)
def one_initializer_too_many() -> Bundle:
    return bundle(model([node("Relu", [INPUT])], {f"w{i}": np.zeros(1, np.float32) for i in range(1_001)}))


@_hostile(_COMPLEX)
def bundle_one_byte_too_large() -> bytes:
    return bytes(64 * 1024 * 1024 + 1)


@_hostile(_COMPLEX)
def manifest_of_a_million_features() -> bytes:
    manifest = b"\x32\x00" * 1_000_000
    return b"\x0a" + _varint(len(manifest)) + manifest


def _varint(number: int) -> bytes:
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


@_hostile(_CONTRACT)
def other_input_name() -> Bundle:
    return bundle(model([node("Sigmoid", ["X"])], given=[value("X", "n", 5)]))


@_hostile(_CONTRACT)
def other_output_name() -> Bundle:
    return bundle(model([node("Sigmoid", [INPUT], ["y"])], wanted=[value("y", "n", 5)]))


@_hostile(_CONTRACT)
def two_inputs() -> Bundle:
    return bundle(model([node("Sub", [INPUT, "X"])], given=[value(INPUT, "n", 5), value("X", "n", 5)]))


@_hostile(_CONTRACT)
def input_of_doubles() -> Bundle:
    cast = node("Cast", [INPUT], to=TensorProto.FLOAT)
    return bundle(model([cast], given=[value(INPUT, "n", 5, kind=TensorProto.DOUBLE)]))


@_hostile(_CONTRACT)
def input_of_rank_three() -> Bundle:
    return bundle(model([node("Flatten", [INPUT])], given=[value(INPUT, "n", 5, 1)]))


@_hostile(_CONTRACT)
def input_with_a_fixed_number_of_rows() -> Bundle:
    return bundle(model([node("Sigmoid", [INPUT])], given=[value(INPUT, 1, 5)]))


@_hostile(_CONTRACT)
def one_column_more_than_features() -> Bundle:
    return bundle(mlp(d=6).model())


@_hostile(_CONTRACT)
def output_of_two_columns() -> Bundle:
    graph = model([node("MatMul", [INPUT, "w"])], {"w": np.ones((5, 2), np.float32)}, wanted=[value(OUTPUT, "n", 2)])
    return bundle(graph)


@_hostile(_CONTRACT)
def output_of_integers() -> Bundle:
    best = node("ArgMax", [INPUT], axis=1, keepdims=0)
    return bundle(model([best], wanted=[value(OUTPUT, "n", kind=TensorProto.INT64)]))


@_hostile(_CONTRACT)
def no_output() -> Bundle:
    return bundle(model([node("Relu", [INPUT], ["h"])], wanted=[]))


@_hostile(_CONTRACT)
def output_of_one_row_whatever_comes_in() -> Bundle:
    return bundle(model([node("ReduceMean", [INPUT], keepdims=1)], wanted=[value(OUTPUT, "n", "m")]))


@_hostile(_CONTRACT)
def one_output_row_for_many_input_rows() -> Bundle:
    nodes = [node("ReduceMean", [INPUT, "all"], ["h"], keepdims=0), node("Reshape", ["h", "shape"])]
    shape = {"all": np.array([0, 1]), "shape": np.array([-1])}
    return bundle(model(nodes, shape, wanted=[value(OUTPUT, "n")]))


@_hostile(_CONTRACT)
def golden_rows_of_another_width() -> Bundle:
    return bundle(mlp().model(), rows=inputs(d=6))


@_hostile(_CONTRACT)
def spread_of_zero_and_limit_that_is_not_a_number() -> Bundle:
    scaled = Scaled(spread=0.0, limit=float("nan"))
    return bundle(mlp(d=1).model(), features=[Feature(fact="profile.age", scaled=scaled)])


@_hostile(_CONTRACT)
def format_version_of_the_future() -> Bundle:
    later = good_bundle()
    later.manifest.format_version = 2
    return later


@_hostile(_MALFORMED)
def opset_too_new() -> Bundle:
    return bundle(model([node("Sigmoid", [INPUT])], opset=23))


@_hostile(_MALFORMED)
def ir_version_too_new() -> Bundle:
    return bundle(model([node("Sigmoid", [INPUT])], ir_version=11))


def marked_as_the_other_format() -> Bundle:
    """Return a bundle that is not hostile after all: its model has the tag of onnxruntime's own format at offset 4."""
    graph = mlp().model()
    graph.ClearField("producer_name")
    return bundle(b"\x12\x06..ORTM" + graph.SerializeToString(), outputs=mlp().score(inputs()))


@_hostile(_MALFORMED)
def graph_that_runs_in_a_circle() -> Bundle:
    return bundle(model([node("Relu", ["b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["a"])]))


@_hostile(_MALFORMED)
def matrices_that_do_not_fit() -> Bundle:
    return bundle(model([node("MatMul", [INPUT, "w"])], {"w": np.ones((7, 1), np.float32)}))


@_hostile(_MALFORMED)
def weights_shorter_than_their_dimensions() -> Bundle:
    graph = mlp().model()
    graph.graph.initializer[0].raw_data = graph.graph.initializer[0].raw_data[:-4]
    return bundle(graph)


@_hostile(_MALFORMED)
def tree_whose_branches_are_missing() -> Bundle:
    return bundle(model([tree(true_branch=1_000_000)]))


@_hostile(_MALFORMED)
def tree_that_is_its_own_branch() -> Bundle:
    return bundle(model([tree(true_branch=0)]))


def _linear(nodes: Sequence[onnx.NodeProto], **options: Any) -> Bundle:
    """Bundle a graph that goes on from h, the sum of a row."""
    first = node("MatMul", [INPUT, "w"], ["h"])
    return bundle(model([first, *nodes], {"w": np.ones((5, 1), np.float32)}), **options)


@_hostile(_OUTPUT)
def not_a_number_on_golden_rows() -> Bundle:
    return _linear([node("Log", ["h"])])


@_hostile(_OUTPUT)
def infinite_only_on_extreme_rows() -> Bundle:
    nodes = [
        node("Exp", ["h"], ["e1"]),
        node("Exp", ["e1"], ["e2"]),
        node("Exp", ["e2"], ["e3"]),
        node("Reciprocal", ["e3"], ["r"]),
    ]
    nodes += [node("Mul", ["e3", "r"], ["one"]), node("Sub", ["one", "one"])]
    rows = np.zeros((1, 5), np.float32)
    return _linear(nodes, rows=rows, outputs=rows[:, 0])


@_hostile(_OUTPUT)
def probability_above_one() -> Bundle:
    return _linear([node("Exp", ["h"])], outputs=np.exp(inputs().sum(axis=1)))


@_hostile(_OUTPUT)
def golden_outputs_that_differ() -> Bundle:
    return bundle(mlp().model(), outputs=mlp().score(inputs()) + np.float32(0.001))


@_hostile(_OUTPUT)
def rows_that_depend_on_their_neighbours() -> Bundle:
    """Golden outputs are right for the golden rows together, so only scoring them alone can tell."""
    together = inputs().sum(axis=1)
    nodes = [
        node("ReduceMean", ["h", "first"], ["mean"], keepdims=1),
        node("Sub", ["h", "mean"], ["c"]),
        node("Sigmoid", ["c"]),
    ]
    outputs = 1.0 / (1.0 + np.exp(together.mean() - together))
    dependent = _linear([], outputs=outputs)
    tensors = {"w": np.ones((5, 1), np.float32), "first": np.array([0])}
    dependent.onnx_model = model([node("MatMul", [INPUT, "w"], ["h"]), *nodes], tensors).SerializeToString()
    return dependent


@_hostile(_OUTPUT)
def rows_that_only_come_in_pairs() -> Bundle:
    nodes = [node("Reshape", ["h", "pairs"], ["p"]), node("Reshape", ["p", "single"], ["q"]), node("Sigmoid", ["q"])]
    tensors = {"w": np.ones((5, 1), np.float32), "pairs": np.array([-1, 2]), "single": np.array([-1, 1])}
    outputs = 1.0 / (1.0 + np.exp(-inputs().sum(axis=1)))
    return bundle(model([node("MatMul", [INPUT, "w"], ["h"]), *nodes], tensors), outputs=outputs)


@_hostile(_SLOW)
def correct_but_slow() -> Bundle:
    nodes = [node("MatMul", [INPUT, "first"], ["h0"])]
    nodes += [node("MatMul", [f"h{i}", "square"], [f"h{i + 1}"]) for i in range(100)]
    nodes += [node("ReduceMax", ["h100", "axis"], keepdims=1)]
    tensors = {"first": np.zeros((5, 512), np.float32), "square": np.eye(512, dtype=np.float32), "axis": np.array([1])}
    return bundle(model(nodes, tensors))
