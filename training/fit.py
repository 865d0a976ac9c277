"""Fit the seed bundle: what a champion would know from a log of the simulated world's past.

Draws a log of uniformly chosen actions from the past, fits a small network to it with Adam, and wraps the network as
an ONNX graph with its manifest and golden rows in one tsugi.log.v1.Bundle. Features are encoded by the server's own
code. The same seed gives the same bytes on the same build and type of processor; nothing depends on a clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from server.catalog.catalog import Catalog, Doubles, Floats
from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from server.decisioning.bundle_columns import ModelColumns, bundle_columns
from server.decisioning.features import encode_rows
from server.registry.bundle import FORMAT_VERSION, parse
from server.registry.scorers import OnnxScorer
from training.simulate import Era, World
from tsugi.log.v1 import bundle_pb2
from tsugi.v1 import catalog_pb2

MODELS_FOLDER: Final = Path(__file__).resolve().parents[1] / "models" / "sports_retail"
GOAL: Final = "click"
CHANNEL: Final = "web"
N_ROWS: Final = 200_000
N_PASSES: Final = 6
HIDDEN: Final = (64, 64, 64)
GOLDEN_ROWS: Final = 32

_OPSET, _IR_VERSION = 18, 10  # the oldest that every supported onnxruntime reads
_LIMIT: Final = 5.0  # spreads; as the online learners cut
_BATCH_ROWS: Final = 512
_LEARNING_RATE: Final = 2e-3
_Ints = NDArray[np.int64]


class Layer(NamedTuple):
    """One affine step: inputs @ weights + bias."""

    weights: Floats  # float32[inputs, outputs]
    bias: Floats  # float32[outputs]


class Rows(NamedTuple):
    """What a log tells the fit, one row a shown action."""

    inputs: Floats  # float32[r, d]
    rewards: Floats  # float32[r], 0 or 1


class Comparison(NamedTuple):
    """Expected reward a slot on home banners, by who fills them."""

    uniform: float
    model: float
    best: float

    @property
    def gap_closed_share(self) -> float:
        """How far from uniform to the best the model goes: 0 is no help, 1 perfect."""
        return (self.model - self.uniform) / (self.best - self.uniform)


def fit_seed_bundle(
    catalog: Catalog,
    seed: int,
    *,
    n_rows: int = N_ROWS,
    n_passes: int = N_PASSES,
    progress: Callable[[str], None] = lambda _: None,
) -> bytes:
    """Return the serialised bundle fitted on the past of the catalog's simulated world.

    Args:
        catalog: the compiled example catalog.
        seed: of the world, the log, and the network's first weights.
        n_rows: shown actions to draw before those that were not eligible are left out.
        n_passes: passes of the fit over the log.
        progress: told in words what happens.

    Cost: about 3 s of one core at the defaults.
    """
    world = World(catalog, seed, era=Era.PAST)
    rng = np.random.default_rng([seed, 3])
    manifest = make_manifest(catalog)
    rows = draw_log(world, bundle_columns(manifest, catalog), rng, n_rows)
    progress(f"drew {len(rows.rewards):,} shown actions of the past, mean reward {rows.rewards.mean():.4f}")
    network = fit_network(rows, rng, n_passes=n_passes, progress=progress)
    golden = rows.inputs[:GOLDEN_ROWS]
    bundle = bundle_pb2.Bundle(
        manifest=manifest,
        onnx_model=to_onnx(network, manifest).SerializeToString(deterministic=True),
        golden_rows=bundle_pb2.GoldenRows(
            inputs=golden.astype("<f4").tobytes(), outputs=log_odds(network, golden).astype("<f4").tobytes()
        ),
    )
    return bundle.SerializeToString(deterministic=True)


def make_manifest(catalog: Catalog) -> bundle_pb2.Manifest:
    """State the model's columns: every declared fact of profile, context and action that can be a column.

    A profile fact that is not known has a column of its own, because a shop never knows everything about everybody;
    context comes from the caller and is complete.
    """
    message = catalog.message
    features = []
    for prefix, attributes, may_be_unknown in (
        ("profile", message.profile_attributes, True),
        ("context", message.context_attributes, False),
        ("action", message.action_attributes, False),
    ):
        for attribute in attributes:
            columns = _value_columns(f"{prefix}.{attribute.name}", attribute)
            features.extend(columns)
            if columns and may_be_unknown:
                features.append(bundle_pb2.Feature(fact=columns[0].fact, is_unknown=True))
    return bundle_pb2.Manifest(
        format_version=FORMAT_VERSION,
        goal=GOAL,
        output_kind=bundle_pb2.OUTPUT_KIND_LOG_ODDS,
        input_name="features",
        output_name="log_odds",
        features=features,
    )


def draw_log(world: World, columns: ModelColumns, rng: np.random.Generator, n_rows: int) -> Rows:
    """Draw page views of the world, show one eligible action of each at random, and note the rewards.

    Page views with nothing eligible leave no row.
    """
    facts = draw_facts(world, rng, n_rows)
    eligible = world.eligible(facts, CHANNEL)
    shown = np.where(eligible, rng.random(eligible.shape), -1.0).argmax(axis=1)
    some = eligible.any(axis=1)
    facts, shown = facts[some], shown[some]
    propensities = np.take_along_axis(world.propensities(facts, GOAL), shown[:, None], axis=1)[:, 0]
    rewards = (rng.random(len(facts)) < propensities).astype(np.float32)
    return Rows(encode(world.catalog, columns, facts, shown), rewards)


def draw_facts(world: World, rng: np.random.Generator, n: int) -> Doubles:
    """Draw n page views by n people: float64[n, m], in the catalog's fact space."""
    people = world.person_facts(rng, n)
    page_views = world.page_view_facts(rng, n)
    return np.where(np.isnan(page_views), people, page_views)


def encode(catalog: Catalog, columns: ModelColumns, facts: Doubles, actions: _Ints) -> Floats:
    """Encode rows of (facts, catalog row of the action) as a model reads them: float32[r, d]."""
    inputs = np.empty((len(facts), columns.shared_positions.size + columns.action_positions.size), np.float32)
    inputs[:, columns.shared_positions] = encode_rows(facts, columns.shared)
    inputs[:, columns.action_positions] = encode_rows(catalog.actions.facts, columns.action)[actions]
    return inputs


def fit_network(
    rows: Rows, rng: np.random.Generator, *, n_passes: int, progress: Callable[[str], None] = lambda _: None
) -> list[Layer]:
    """Fit a multi-layer perceptron (ReLU, HIDDEN units, log-odds out) to rewards by cross-entropy.

    The step falls linearly to 0, so that the last pass settles what the first ones found.
    Source: Kingma and Ba, "Adam", ICLR 2015, algorithm 1, with its default decay rates.
    """
    sizes = (rows.inputs.shape[1], *HIDDEN, 1)
    parameters = np.zeros(sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes)), np.float32)
    gradient, mean, square = np.zeros_like(parameters), np.zeros_like(parameters), np.zeros_like(parameters)
    layers, gradients = _layers(parameters, sizes), _layers(gradient, sizes)
    for layer in layers:
        layer.weights[:] = rng.normal(0.0, math.sqrt(2.0 / len(layer.weights)), layer.weights.shape)
    base_rate = float(rows.rewards.mean())
    layers[-1].weights[:] *= 0.1  # the first guess is close to the base rate for everybody
    layers[-1].bias[:] = math.log(base_rate / (1.0 - base_rate))

    n_batches, step = len(rows.rewards) // _BATCH_ROWS, 0
    for n_pass in range(n_passes):
        batches = rng.permutation(len(rows.rewards))[: n_batches * _BATCH_ROWS].reshape(n_batches, _BATCH_ROWS)
        loss = 0.0
        for batch in batches:
            loss += _differentiate(layers, rows.inputs[batch], rows.rewards[batch], gradients) / n_batches
            step += 1
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            rate = _LEARNING_RATE * (1.0 - step / (n_passes * n_batches + 1))
            rate *= math.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
            parameters -= rate * mean / (np.sqrt(square) + 1e-8)
        progress(f"pass {n_pass + 1} of {n_passes}: mean cross-entropy {loss:.4f}")
    return layers


def log_odds(layers: list[Layer], inputs: Floats) -> Floats:
    """Return the network's output for each row: float32[r]."""
    return _activations(layers, inputs)[-1][:, 0]


def to_onnx(layers: list[Layer], manifest: bundle_pb2.Manifest) -> onnx.ModelProto:
    """Write the network as a graph of Gemm and Relu with its weights inside."""
    helper, nodes, initializers = onnx.helper, [], []
    last, flowing = len(layers) - 1, manifest.input_name
    for i, layer in enumerate(layers):
        for name, array in ((f"weights_{i}", layer.weights), (f"bias_{i}", layer.bias)):
            initializers.append(onnx.numpy_helper.from_array(array, name))
        affine = manifest.output_name if i == last else f"affine_{i}"
        nodes.append(helper.make_node("Gemm", [flowing, f"weights_{i}", f"bias_{i}"], [affine]))
        if i < last:
            flowing = f"hidden_{i}"
            nodes.append(helper.make_node("Relu", [affine], [flowing]))
    graph = helper.make_graph(
        nodes,
        "seed",
        [helper.make_tensor_value_info(manifest.input_name, onnx.TensorProto.FLOAT, ["n", len(manifest.features)])],
        [helper.make_tensor_value_info(manifest.output_name, onnx.TensorProto.FLOAT, ["n", 1])],
        initializers,
    )
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, producer_name="tsugi", opset_imports=[opset], ir_version=_IR_VERSION)
    onnx.checker.check_model(model)
    return model


def compare(world: World, data: bytes, *, n_page_views: int = 4_000) -> Comparison:
    """Measure what a bundle is worth in a world: it fills many home banners greedily, without learning."""
    bundle = parse(data)
    facts = draw_facts(world, np.random.default_rng([world.seed, 4]), n_page_views)
    return measure(world, facts, score_all(world.catalog, bundle, facts))


def score_all(catalog: Catalog, bundle: bundle_pb2.Bundle, facts: Doubles) -> Doubles:
    """Return a bundle's log-odds for every action at every row of facts: float64[r, n]."""
    n_actions = len(catalog.actions.names)
    actions = np.tile(np.arange(n_actions), len(facts))
    inputs = encode(catalog, bundle_columns(bundle.manifest, catalog), facts.repeat(n_actions, axis=0), actions)
    return OnnxScorer(bundle).score(inputs).reshape(-1, n_actions).astype(np.float64)


def measure(world: World, facts: Doubles, scores: Doubles) -> Comparison:
    """Measure what scores are worth in a world: the eligible actions with the highest ones fill the home banner.

    Args:
        world: where the true propensities come from.
        facts: float64[r, m], page views with something eligible for each slot.
        scores: float64[r, n], any scale.
    """
    n_slots = world.catalog.placements[world.catalog.placement_rows["home_banner"]].count_max
    eligible, propensities = world.eligible(facts, CHANNEL), world.propensities(facts, GOAL)

    def filled_by(values: Doubles) -> float:
        chosen = np.where(eligible, values, -np.inf).argsort(axis=1)[:, -n_slots:]
        return float(np.take_along_axis(propensities, chosen, axis=1).mean())

    uniform = float(((propensities * eligible).sum(axis=1) / eligible.sum(axis=1)).mean())
    return Comparison(uniform, filled_by(scores), filled_by(propensities))


@click.command("fit")
@click.option(
    "--catalog",
    "catalog_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=MODELS_FOLDER / "catalog.yaml",
    show_default="the example catalog",
    help="The catalog of the simulated world.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=MODELS_FOLDER / "bundle.binpb",
    show_default="beside the example catalog",
    help="Where to write the bundle.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of world, log and fit.")
@click.option("--rows", type=click.IntRange(min=1_000), default=N_ROWS, show_default=True, help="Shown actions to log.")
def fit_command(catalog_path: Path, out: Path, seed: int, rows: int) -> None:
    """Fit the seed bundle on the past of the simulated world and say what it is worth today."""
    catalog = compile_catalog(load_catalog(catalog_path.read_text(encoding="utf-8")))
    data = fit_seed_bundle(catalog, seed, n_rows=rows, progress=click.echo)
    out.write_bytes(data)
    click.echo(f"wrote {out}: {len(data):,} bytes")
    for era in Era:
        result = compare(World(catalog, seed, era=era), data)
        click.echo(
            f"simulated world, {era.value}: expected reward a slot at random {result.uniform:.4f}, by this bundle "
            f"{result.model:.4f}, at best {result.best:.4f}; gap closed {result.gap_closed_share:.2f}"
        )


def _value_columns(fact: str, attribute: catalog_pb2.Attribute) -> list[bundle_pb2.Feature]:
    if attribute.type == catalog_pb2.ATTRIBUTE_TYPE_NUMBER:
        spread = attribute.spread if attribute.HasField("spread") else 1.0
        scaled = bundle_pb2.Scaled(center=attribute.center, spread=spread, limit=_LIMIT, when_unknown=0.0)
        return [bundle_pb2.Feature(fact=fact, scaled=scaled)]
    if attribute.type == catalog_pb2.ATTRIBUTE_TYPE_BOOL:
        return [bundle_pb2.Feature(fact=fact, equals="true")]
    return [bundle_pb2.Feature(fact=fact, equals=value) for value in attribute.allowed_values]


def _layers(parameters: Floats, sizes: tuple[int, ...]) -> list[Layer]:
    """Return the layers as views into one vector of all parameters."""
    layers, start = [], 0
    for n_in, n_out in itertools.pairwise(sizes):
        middle, end = start + n_in * n_out, start + (n_in + 1) * n_out
        layers.append(Layer(parameters[start:middle].reshape(n_in, n_out), parameters[middle:end]))
        start = end
    return layers


def _activations(layers: list[Layer], inputs: Floats) -> list[Floats]:
    """Return the inputs of every layer and, last, the output."""
    flowing = [inputs]
    for layer in layers[:-1]:
        flowing.append(np.maximum(flowing[-1] @ layer.weights + layer.bias, 0.0))
    return [*flowing, flowing[-1] @ layers[-1].weights + layers[-1].bias]


def _differentiate(layers: list[Layer], inputs: Floats, rewards: Floats, gradients: list[Layer]) -> float:
    """Return the mean cross-entropy and write its gradient by every parameter (back-propagation)."""
    flowing = _activations(layers, inputs)
    output = flowing[-1][:, 0]
    backwards = ((1.0 / (1.0 + np.exp(-output)) - rewards) / len(rewards))[:, None]
    for i in range(len(layers) - 1, -1, -1):
        gradients[i].weights[:] = flowing[i].T @ backwards
        gradients[i].bias[:] = backwards.sum(axis=0)
        backwards = (backwards @ layers[i].weights.T) * (flowing[i] > 0.0)
    return float(np.mean(np.logaddexp(0.0, output) - rewards * output))
