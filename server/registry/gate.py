"""Whether the graph of a pushed bundle may serve: the disposable process that reads, checks and runs it.

Started as ``python -I -m server.registry.gate`` by ``check_in_sandbox`` for one bundle, which it reads from standard
input once it has confined itself. It answers with one JSON line on standard output and ends; if it dies instead, that
is a verdict too. The only place where the onnx package is imported. Nothing that it loads ever serves.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Final, NoReturn

import numpy as np
import onnx
import onnx.checker
from google.protobuf.message import DecodeError
from numpy.random import default_rng
from numpy.typing import NDArray

from server.errors import TsugiError, Violation
from server.registry.bundle import (
    BUNDLE_BYTES_MAX,
    GateLimits,
    contract_mismatch,
    crashed,
    golden_rows,
    parse,
)
from server.registry.operators import INITIALIZERS_MAX, IR_VERSION_MAX, NODES_MAX, OPERATORS, OPSETS_MAX
from server.registry.sandbox import NoSandboxError, confine
from server.registry.scorers import open_session
from tsugi.log.v1.bundle_pb2 import Bundle, Manifest, OutputKind
from tsugi.v1.error_reason_pb2 import ErrorReason

Floats = NDArray[np.float32]
Run = Callable[[Floats], Floats]  # float32[m, d] to float32[m]

ELEMENTS_MAX: Final = 4 * BUNDLE_BYTES_MAX  # the smallest number ONNX knows has two bits
GOLDEN_TOLERANCE: Final = 1e-4
BATCH_TOLERANCE: Final = 1e-5
PROPENSITY_TOLERANCE: Final = 1e-6  # by which rounding may leave 0..1
ROWS_ALONE_MAX: Final = 16
RANDOM_ROWS: Final = 256
RANDOM_LIMIT: Final = 5.0
TIMED_ROWS: Final = 100
TIMED_RUNS: Final = 11


def check(data: bytes, score_us_max: int) -> None:
    """Return when the serialised bundle may serve.

    Raises:
        TsugiError: one of the BUNDLE_* reasons.
        MemoryError: the graph wants more than this process may take.
    """
    bundle = parse(data)
    try:
        graph = _check_graph(bundle.onnx_model)
    except (DecodeError, UnicodeDecodeError):
        _refuse(ErrorReason.ERROR_REASON_BUNDLE_MALFORMED, "onnx_model is not a readable ONNX graph")
    _check_contract(graph, bundle.manifest)
    _check_behaviour(_load(bundle), bundle, score_us_max)


def _refuse(reason: ErrorReason, message: str, **metadata: object) -> NoReturn:
    raise TsugiError(reason, message, violations=(), **metadata)


def _check_graph(data: bytes) -> onnx.GraphProto:
    """Look through everything in the model before any library resolves anything in it."""
    model = onnx.ModelProto.FromString(data)
    for tensor in _tensors(model):
        _check_tensor(tensor)
    _check_operators(model)
    _check_version("IR version", model.ir_version, IR_VERSION_MAX)
    for entry in model.opset_import:
        domain = _domain(entry.domain)
        if domain in OPSETS_MAX:  # others may be declared; no node uses one
            _check_version(f"opset {domain}".rstrip(), entry.version, OPSETS_MAX[domain])
    try:
        onnx.checker.check_model(data)
    except Exception as error:  # whatever the checker raises: its text is about its own insides
        _raise_if_memory(error)
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_MALFORMED,
            "onnx.checker.check_model refuses onnx_model; run it where the model was made to see why",
        )
    return model.graph


def _check_tensor(tensor: onnx.TensorProto) -> None:
    name = tensor.name[:64]
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_EXTERNAL_DATA,
            f"tensor {name!r} refers to data outside the model; store all weights in it",
            tensor=name,
        )
    elements = 1
    for dimension in tensor.dims:
        elements *= dimension
        if not 0 <= elements <= ELEMENTS_MAX:
            _refuse(
                ErrorReason.ERROR_REASON_BUNDLE_MALFORMED,
                f"tensor {name!r} has dimensions that no data in the model can fill",
                tensor=name,
            )


def _check_version(name: str, got: int, most: int) -> None:
    if got > most:
        _refuse(ErrorReason.ERROR_REASON_BUNDLE_MALFORMED, f"onnx_model has {name} {got}, at most {most} is read")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor at any depth, counting nodes and initializers on the way.

    Raises:
        TsugiError: BUNDLE_TOO_COMPLEX.
    """
    n_nodes = n_initializers = 0
    graphs = [model.graph]
    attributes: list[onnx.AttributeProto] = []
    for training in model.training_info:
        graphs += training.initialization, training.algorithm
    bodies = [function.node for function in model.functions]
    for function in model.functions:
        attributes += function.attribute_proto
    while graphs or bodies or attributes:
        if graphs:
            graph = graphs.pop()
            n_initializers += len(graph.initializer) + len(graph.sparse_initializer)
            if n_initializers > INITIALIZERS_MAX:
                _too_complex("initializers", n_initializers, INITIALIZERS_MAX)
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            bodies.append(graph.node)
        elif bodies:
            nodes = bodies.pop()
            n_nodes += len(nodes)
            if n_nodes > NODES_MAX:
                _too_complex("nodes", n_nodes, NODES_MAX)
            for node in nodes:
                attributes += node.attribute
        else:
            attribute = attributes.pop()
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs


def _too_complex(what: str, got: int, limit: int) -> NoReturn:
    message = f"onnx_model has {got} {what}, at most {limit} are taken"
    _refuse(ErrorReason.ERROR_REASON_BUNDLE_TOO_COMPLEX, message, limit=limit, got=got)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _check_operators(model: onnx.ModelProto) -> None:
    if model.functions:
        _refuse_operator(f"function {model.functions[0].name[:64]}")
    if model.training_info:
        _refuse_operator("training graph")
    if model.graph.sparse_initializer:
        _refuse_operator("sparse initializer")
    for node in model.graph.node:
        domain = _domain(node.domain)
        if node.op_type not in OPERATORS.get(domain, ()):
            _refuse_operator(f"{domain[:64]}::{node.op_type[:64]}" if domain else node.op_type[:64])
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                _refuse_operator(f"{node.op_type} with a graph inside")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                _refuse_operator(f"{node.op_type} with a sparse tensor")


def _refuse_operator(operator: str) -> NoReturn:
    _refuse(
        ErrorReason.ERROR_REASON_BUNDLE_OPERATOR_REFUSED,
        f"onnx_model uses {operator!r}, which is not among the allowed operators",
        operator=operator,
    )


def _check_contract(graph: onnx.GraphProto, manifest: Manifest) -> None:
    d = len(manifest.features)
    filled = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value.type for value in graph.input if value.name not in filled}
    outputs = {value.name: value.type for value in graph.output}
    faults = []
    if list(inputs) != [manifest.input_name] or _shape(inputs[manifest.input_name]) != [None, d]:
        shown = ", ".join(f"{name[:64]!r} {_described(kind)}" for name, kind in list(inputs.items())[:4]) or "none"
        faults.append(
            Violation("onnx_model.graph.input", f"must be only {manifest.input_name!r} float32[n, {d}], is {shown}")
        )
    if manifest.output_name not in outputs or _shape(outputs[manifest.output_name]) not in ([None], [None, 1]):
        shown = _described(outputs[manifest.output_name]) if manifest.output_name in outputs else "absent"
        faults.append(
            Violation(
                "onnx_model.graph.output", f"{manifest.output_name!r} must be float32[n] or float32[n, 1], is {shown}"
            )
        )
    if faults:
        raise contract_mismatch(faults)


def _shape(kind: onnx.TypeProto) -> list[int | None] | None:
    """Return the declared shape of a float32 tensor, None for a symbolic dimension; None for any other type."""
    tensor = kind.tensor_type
    if (
        kind.WhichOneof("value") != "tensor_type"
        or tensor.elem_type != onnx.TensorProto.FLOAT
        or not tensor.HasField("shape")
    ):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def _described(kind: onnx.TypeProto) -> str:
    tensor = kind.tensor_type
    if kind.WhichOneof("value") != "tensor_type":
        return "no tensor"
    known = tensor.elem_type in onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else "of an unknown type"
    sizes = (str(dim.dim_value) if dim.HasField("dim_value") else "?" for dim in tensor.shape.dim[:8])
    return f"{name}[{', '.join(sizes)}]"


def _load(bundle: Bundle) -> Run:
    """Load the graph as serving would and return how it is run."""
    manifest = bundle.manifest
    try:
        session = open_session(bundle.onnx_model)
    except Exception as error:
        _raise_if_memory(error)
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_MALFORMED,
            "onnxruntime does not load onnx_model; load it where the model was made to see why",
        )

    def run(rows: Floats) -> Floats:
        try:
            (outputs,) = session.run([manifest.output_name], {manifest.input_name: rows})
        except Exception as error:
            _raise_if_memory(error)
            _refuse(ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID, f"onnx_model fails on {len(rows)} rows")
        if outputs.dtype != np.float32 or outputs.shape not in ((len(rows),), (len(rows), 1)):
            must = f"must be float32[{len(rows)}] for as many rows, is {outputs.dtype}{list(outputs.shape)}"
            raise contract_mismatch([Violation("onnx_model.graph.output", must)])
        return np.array(outputs.reshape(-1))

    return run


def _raise_if_memory(error: Exception) -> None:
    """Tell a failed allocation, which onnxruntime reports as any other exception, from other faults."""
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        raise MemoryError from error


def _check_behaviour(run: Run, bundle: Bundle, score_us_max: int) -> None:
    inputs, stated = golden_rows(bundle)
    is_probability = bundle.manifest.output_kind == OutputKind.OUTPUT_KIND_PROBABILITY
    _check_time(run, inputs, score_us_max)
    outputs = run(inputs)
    _check_range(outputs, "golden rows", is_probability)
    if not np.allclose(outputs, stated, rtol=0.0, atol=GOLDEN_TOLERANCE):
        row = int(np.abs(outputs - stated).argmax())
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID,
            f"golden_rows.outputs[{row}] is {stated[row]:.6g}, the model gives {outputs[row]:.6g}",
            row=row,
        )
    alone = np.concatenate([run(inputs[row : row + 1]) for row in range(min(len(inputs), ROWS_ALONE_MAX))])
    # Relative above 1, because a larger matrix product rounds differently by a share of its result.
    if not np.allclose(alone, outputs[: alone.size], rtol=BATCH_TOLERANCE, atol=BATCH_TOLERANCE):
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID,
            f"a row scored alone and among others differs by more than {BATCH_TOLERANCE}",
        )
    for name, rows in _probes(bundle.manifest):
        _check_range(run(rows), name, is_probability)


def _check_time(run: Run, inputs: Floats, score_us_max: int) -> None:
    """Time runs by processor time, so that a busy machine refuses nothing."""
    rows = np.resize(inputs, (TIMED_ROWS, inputs.shape[1]))
    elapsed_us: list[float] = []
    while len(elapsed_us) < TIMED_RUNS and sum(elapsed_us) < TIMED_RUNS * 10 * score_us_max:
        start_ns = time.process_time_ns()
        run(rows)
        elapsed_us.append((time.process_time_ns() - start_ns) / 1_000)
    if (got_us := int(median(elapsed_us))) > score_us_max:
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_TOO_SLOW,
            f"scoring {TIMED_ROWS} rows takes {got_us} µs, at most {score_us_max} are allowed",
            elapsed_us=got_us,
            limit_us=score_us_max,
        )


def _check_range(outputs: Floats, rows: str, is_probability: bool) -> None:
    if not np.isfinite(outputs).all():
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID, f"the model gives numbers that are not finite on {rows}"
        )
    least, most = float(outputs.min()), float(outputs.max())
    if is_probability and not -PROPENSITY_TOLERANCE <= least <= most <= 1.0 + PROPENSITY_TOLERANCE:
        _refuse(
            ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID,
            f"the output is stated to be a probability and gives {least:.6g} to {most:.6g} on {rows}",
        )


def _probes(manifest: Manifest) -> Iterator[tuple[str, Floats]]:
    """Yield rows that the encoder could make: random ones, and ones at the ends of what each column can hold."""
    scaled = np.array([feature.WhichOneof("encoding") == "scaled" for feature in manifest.features])
    limits = np.array([feature.scaled.limit for feature in manifest.features])
    unknown = np.array([feature.scaled.when_unknown for feature in manifest.features])
    low = np.where(scaled, np.minimum(-limits, unknown), 0.0)
    high = np.where(scaled, np.maximum(limits, unknown), 1.0)
    random = default_rng(0)  # a fixed seed: the same bundle always gets the same verdict
    shape = (RANDOM_ROWS, scaled.size)
    near = np.minimum(limits, RANDOM_LIMIT)
    bits = random.integers(0, 2, shape)
    yield "random rows", np.where(scaled, random.uniform(-near, near, shape), bits).astype(np.float32)
    corners = np.vstack((low, high, np.where(scaled, unknown, 1.0), np.where(bits == 0, low, high)))
    yield "extreme rows", corners.astype(np.float32)


def main(arguments: list[str]) -> None:
    """Confine the process, judge the bundle on standard input and write the verdict: {} when it may serve."""
    limits = GateLimits(**json.loads(arguments[1]))
    verdict = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not pass for a verdict
    answer: dict[str, object] = {}
    try:
        confine(int(arguments[0]), limits.memory_bytes, limits.cpu_s)
        check(sys.stdin.buffer.read(), limits.score_us_max)
    except TsugiError as refusal:
        answer = _as_answer(refusal)
    except MemoryError:
        answer = _as_answer(crashed("memory limit"))
    except NoSandboxError:
        answer = _as_answer(crashed("no sandbox on this machine"))
    os.write(verdict, json.dumps(answer).encode())


def _as_answer(refusal: TsugiError) -> dict[str, object]:
    return {
        "reason": ErrorReason.Name(refusal.reason),
        "message": refusal.message,
        "violations": refusal.violations,
        "metadata": refusal.metadata,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # freeing what was imported, one by one, would take a fifth of the whole check
