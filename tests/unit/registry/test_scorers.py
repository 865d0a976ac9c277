"""What a checked bundle scores, against plain numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from server.registry.scorers import LOG_ODDS_MAX, OnnxScorer, ScoringError, open_session
from tests.support.bundles import INPUT, OUTPUT, Floats, bundle, good_bundle, inputs, mlp, model, node, value


def log_odds_of(propensities: Floats) -> Floats:
    return np.asarray(np.log(propensities) - np.log1p(-propensities), np.float32)


def identity(rows: Floats, *, is_probability: bool) -> Floats:
    """Score rows with a model whose output is its only input."""
    graph = model([node("Identity", [INPUT])], d=1)
    one = bundle(graph, features=good_bundle().manifest.features[:1], is_probability=is_probability)
    return OnnxScorer(one).score(rows.reshape(-1, 1))


def test_probabilities_come_out_as_log_odds() -> None:
    rows = inputs(100)
    log_odds = OnnxScorer(good_bundle()).score(rows)
    assert log_odds.dtype == np.float32
    assert log_odds.shape == (100,)
    np.testing.assert_allclose(log_odds, log_odds_of(mlp().score(rows)), atol=1e-5)


def test_log_odds_come_out_as_they_are() -> None:
    rows = inputs(100)
    scorer = OnnxScorer(good_bundle(is_probability=False))
    np.testing.assert_allclose(scorer.score(rows), mlp(is_probability=False).score(rows), atol=1e-5)


@pytest.mark.parametrize("is_probability", [True, False])
def test_certainty_is_cut_to_finite_log_odds(is_probability: bool) -> None:
    rows = np.array([0.0, 1.0] if is_probability else [-1e30, np.inf], np.float32)
    np.testing.assert_allclose(identity(rows, is_probability=is_probability), [-LOG_ODDS_MAX, LOG_ODDS_MAX], rtol=2e-3)


def test_output_of_rank_one_is_taken_too() -> None:
    graph = model(
        [node("ReduceMean", [INPUT, "axis"], keepdims=0)], {"axis": np.array([1])}, wanted=[value(OUTPUT, "n")]
    )
    log_odds = OnnxScorer(bundle(graph, is_probability=False)).score(inputs())
    np.testing.assert_allclose(log_odds, inputs().mean(axis=1), atol=1e-6)


def test_no_rows_give_no_scores() -> None:
    log_odds = OnnxScorer(good_bundle()).score(np.empty((0, 5), np.float32))
    assert log_odds.shape == (0,)
    assert log_odds.dtype == np.float32


def test_rows_alone_score_as_they_do_together() -> None:
    scorer, rows = OnnxScorer(good_bundle(hidden=(64, 64, 64))), inputs(50)
    alone = np.concatenate([scorer.score(rows[i : i + 1]) for i in range(50)])
    np.testing.assert_allclose(alone, scorer.score(rows), atol=1e-5)


@pytest.mark.parametrize("is_probability", [True, False])
def test_not_a_number_is_an_error_and_no_score(is_probability: bool) -> None:
    with pytest.raises(ScoringError):
        identity(np.array([0.5, np.nan], np.float32), is_probability=is_probability)


def test_graph_that_does_not_load_is_an_error_of_ours() -> None:
    with pytest.raises(ScoringError):
        OnnxScorer(bundle(b"\x00"))


def test_bytes_that_are_also_marked_as_the_other_format_are_read_as_onnx() -> None:
    onnx_model = mlp().model()
    onnx_model.ClearField("producer_name")
    marked = b"\x12\x06..ORTM" + onnx_model.SerializeToString()  # a producer's name that puts the tag at offset 4
    assert marked[4:8] == b"ORTM"
    assert onnx.ModelProto.FromString(marked).producer_name == "..ORTM"
    (outputs,) = open_session(marked).run([OUTPUT], {INPUT: inputs()})
    np.testing.assert_allclose(outputs[:, 0], mlp().score(inputs()), atol=1e-6)
