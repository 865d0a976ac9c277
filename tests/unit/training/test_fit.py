"""The seed bundle: reproducible, complete, as good as it says and no better."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from server.decisioning.bundle_columns import bundle_columns
from server.decisioning.features import encode_rows
from server.registry.bundle import golden_rows, parse
from server.registry.scorers import OnnxScorer
from tests.support.sports_retail import bundle, catalog
from training.fit import (
    CHANNEL,
    GOAL,
    Layer,
    Rows,
    compare,
    draw_facts,
    draw_log,
    encode,
    fit_command,
    fit_network,
    fit_seed_bundle,
    log_odds,
    make_manifest,
    measure,
    score_all,
    to_onnx,
)
from training.learners.base import Row
from training.learners.logistic import LogisticCorrection
from training.simulate import Era, World
from training.space import Space

SEED = 1


def small_bundle(seed: int) -> bytes:
    return fit_seed_bundle(catalog(), seed, n_rows=2_000, n_passes=1)


def test_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    digests = [hashlib.sha256(small_bundle(seed)).hexdigest() for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_bundle_is_complete_and_its_golden_rows_come_out_again() -> None:
    parsed = parse(small_bundle(SEED))  # refuses what is incomplete
    inputs, outputs = golden_rows(parsed)
    np.testing.assert_allclose(OnnxScorer(parsed).score(inputs), outputs, atol=1e-5)


def test_graph_is_of_the_opset_and_format_that_every_supported_runtime_reads() -> None:
    model = onnx.load_from_string(parse(small_bundle(SEED)).onnx_model)
    assert (model.ir_version, [(opset.domain, opset.version) for opset in model.opset_import]) == (10, [("", 18)])
    assert {node.op_type for node in model.graph.node} == {"Gemm", "Relu"}


def test_graph_scores_as_the_network_does() -> None:
    manifest = make_manifest(catalog())
    rng = np.random.default_rng(3)
    sizes = (len(manifest.features), 8, 1)
    network = [
        Layer(
            rng.normal(size=(n_in, n_out)).astype(np.float32),
            rng.normal(size=n_out).astype(np.float32),
        )
        for n_in, n_out in itertools.pairwise(sizes)
    ]
    inputs = rng.normal(size=(50, sizes[0])).astype(np.float32)
    parsed = parse(small_bundle(SEED))
    parsed.onnx_model = to_onnx(network, manifest).SerializeToString()
    np.testing.assert_allclose(
        OnnxScorer(parsed).score(inputs), np.clip(log_odds(network, inputs), -13.8155, 13.8155), rtol=1e-4, atol=1e-4
    )


def test_every_declared_attribute_has_its_columns() -> None:
    manifest = make_manifest(catalog())
    facts = (attribute.fact for attribute in catalog().profiles.attributes)
    declared = {fact.name for fact in (*facts, *catalog().action_facts)}
    declared |= {f"context.{name}" for name in catalog().space.context}
    assert {feature.fact for feature in manifest.features} == declared
    unknown = {feature.fact for feature in manifest.features if feature.WhichOneof("encoding") == "is_unknown"}
    assert unknown == {fact for fact in declared if fact.startswith("profile.")}


def test_network_learns_a_rule_that_no_linear_model_can() -> None:
    rng = np.random.default_rng(4)
    inputs = np.sign(rng.normal(size=(6_000, 4))).astype(np.float32)
    are_alike = inputs[:, 0] == inputs[:, 1]
    network = fit_network(Rows(inputs, are_alike.astype(np.float32)), rng, n_passes=8)
    assert np.mean((log_odds(network, inputs) > 0.0) == are_alike) > 0.95


def test_drawn_log_shows_eligible_actions_evenly() -> None:
    world = World(catalog(), SEED, era=Era.PAST)
    columns = bundle_columns(make_manifest(catalog()), catalog())
    rows = draw_log(world, columns, np.random.default_rng(4), 8_000)
    positions = dict(zip(columns.action.names, columns.action_positions, strict=True))
    # Four actions are for running, all without a rule, among about sixteen eligible ones.
    assert rows.inputs[:, positions["action.sport=running"]].mean() == pytest.approx(0.25, abs=0.025)
    assert set(np.unique(rows.rewards)) == {0.0, 1.0}


@pytest.mark.slow
def test_command_writes_the_bundle_and_says_what_it_is_worth(tmp_path: Path) -> None:
    out = tmp_path / "bundle.binpb"
    result = CliRunner().invoke(fit_command, ["--out", str(out), "--seed", "1", "--rows", "2000"])
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == fit_seed_bundle(catalog(), 1, n_rows=2_000)
    assert "simulated world, today" in result.output


@pytest.mark.long
def test_shipped_bundle_is_what_the_fit_makes() -> None:
    shipped, fitted = parse(bundle()), parse(fit_seed_bundle(catalog(), SEED))
    assert fitted.manifest == shipped.manifest
    inputs, _ = golden_rows(shipped)
    # Another type of processor may round otherwise on the way, so the graphs are compared by what they say: apart by
    # 0.06 in the mean and 0.24 at most on one, where fits with another seed are by 0.56 and 1.8 at least.
    differences = np.abs(OnnxScorer(fitted).score(inputs) - OnnxScorer(shipped).score(inputs))
    assert differences.mean() < 0.15
    assert differences.max() < 0.6


def test_shipped_bundle_is_small_and_fits_the_shipped_catalog() -> None:
    assert len(bundle()) < 200_000
    parsed = parse(bundle())
    assert parsed.manifest == make_manifest(catalog())
    assert parsed.manifest.goal in catalog().goal_rows
    assert len([node for node in onnx.load_from_string(parsed.onnx_model).graph.node if node.op_type == "Relu"]) == 3


def test_shipped_bundle_helps_today_and_leaves_a_clear_gap() -> None:
    past = compare(World(catalog(), SEED, era=Era.PAST), bundle(), n_page_views=1_500)
    today = compare(World(catalog(), SEED), bundle(), n_page_views=1_500)
    assert past.gap_closed_share > 0.9
    assert 0.3 < today.gap_closed_share < 0.65
    assert today.best > 3.0 * today.uniform


@pytest.mark.slow
def test_online_correction_closes_most_of_the_gap_the_shipped_bundle_leaves() -> None:
    """Thirty thousand slot rewards, a fraction of what the demonstration sees, shown at random, learned in order."""
    world, rng, parsed = World(catalog(), SEED), np.random.default_rng(8), parse(bundle())
    space = Space()
    space.admit_features(catalog().learned.names)
    names = catalog().actions.names
    learner = LogisticCorrection(space, 0.1, LogisticCorrection.choices[0])

    facts = draw_facts(world, rng, 30_000)
    shown = np.where(world.eligible(facts, CHANNEL), rng.random((len(facts), len(names))), -1.0).argmax(axis=1)
    inputs = encode(catalog(), bundle_columns(parsed.manifest, catalog()), facts, shown)
    priors = OnnxScorer(parsed).score(inputs)
    rewards = rng.random(len(facts)) < world.propensities(facts, GOAL)[np.arange(len(facts)), shown]
    rows = encode_rows(facts, catalog().learned)
    for x, action, prior, reward in zip(rows, shown.tolist(), priors.tolist(), rewards.tolist(), strict=True):
        learner.learn_one(Row(action, np.append(1.0, x), prior), float(reward))

    facts = draw_facts(world, rng, 2_000)
    arrays = learner.export(range(len(names)))
    corrections = encode_rows(facts, catalog().learned) @ arrays["correction_weights"].T
    corrections += arrays["correction_intercepts"]
    assert measure(world, facts, score_all(catalog(), parsed, facts) + corrections).gap_closed_share > 0.75
