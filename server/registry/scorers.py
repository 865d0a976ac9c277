"""How a champion scores: a checked bundle as an object that gives prior log-odds for many rows in one call.

The gate opens a pushed graph with the same session options, so that what was checked is what serves. Handed a bundle
that passed the gate, it makes a scorer; it never checks a graph itself and decides nothing about roles.
"""

from __future__ import annotations

import math
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.registry.bundle import golden_rows
from tsugi.log.v1.bundle_pb2 import Bundle, OutputKind

# The official builds of onnxruntime send events about models to their maker, from the first import on, unless told not
# to before that. What our models are is nobody else's business, and serving opens no connection of its own.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

Floats = NDArray[np.float32]

# A propensity outside these is nothing a model can know from finite data, and would leave the learners powerless.
PROPENSITY_MIN: Final = 1e-6
LOG_ODDS_MAX: Final = math.log((1.0 - PROPENSITY_MIN) / PROPENSITY_MIN)  # 13.8155

_FATAL: Final = 4  # onnxruntime's log severities; its errors come as exceptions anyway


class ScoringError(Exception):
    """The model did not give finite numbers for these rows: a degradation of the decision, not the caller's fault."""


class OnnxScorer:
    """The ONNX graph of one checked bundle, loaded and warm. Threads may share it.

    Cost sketch: a call costs 7 µs and 0.25 µs a row for an MLP 64-64-64-1, so 31 µs for 100 candidates; clipping and
    the look for NaN add 3, the turn from probability to log-odds some 4.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the graph and run it once on the golden rows, so that no decision pays for the first run.

        Cost: tens of milliseconds for a small graph; to be made off the event loop.

        Raises:
            ScoringError: the graph does not load or does not score its golden rows, which the gate had seen it do.
        """
        manifest = bundle.manifest
        self.n_features = len(manifest.features)
        self._is_probability = manifest.output_kind == OutputKind.OUTPUT_KIND_PROBABILITY
        self._input, self._outputs = manifest.input_name, [manifest.output_name]
        try:
            self._session = open_session(bundle.onnx_model)
        except Exception as error:
            raise ScoringError("onnxruntime does not load the model") from error
        self.score(golden_rows(bundle)[0])

    def score(self, X: Floats) -> Floats:  # noqa: N803 - matrices are capital letters, as in formulas
        """Return the prior log-odds of each row.

        Args:
            X: float32[m, d], C-contiguous; d is n_features.

        Returns:
            float32[m], finite, within ±LOG_ODDS_MAX; a new array.

        Raises:
            ScoringError: onnxruntime fails on these rows, or an output is not a number.
        """
        assert X.dtype == np.float32 and X.flags.c_contiguous, "anything else would be copied on every call"
        assert X.ndim == 2 and X.shape[1] == self.n_features, "the encoder fills one column a feature"
        if not X.size:
            return np.empty(0, np.float32)
        try:
            (outputs,) = self._session.run(self._outputs, {self._input: X})
        except Exception as error:
            raise ScoringError("onnxruntime fails on these rows") from error
        log_odds: Floats = outputs.reshape(-1)
        if self._is_probability:
            _clip(log_odds, PROPENSITY_MIN, 1.0 - PROPENSITY_MIN)
            log_odds = np.log(log_odds) - np.log1p(-log_odds)
        _clip(log_odds, -LOG_ODDS_MAX, LOG_ODDS_MAX)
        # Squares of clipped numbers cannot cancel to NaN, so the sum is NaN exactly when one of them is.
        if math.isnan(log_odds @ log_odds):
            raise ScoringError("the model gives NaN for these rows")
        return log_odds


def _clip(numbers: Floats, low: float, high: float) -> None:
    """Clip in place; NaN stays. The library's own costs five times as much on a hundred numbers."""
    np.maximum(numbers, low, out=numbers)
    np.minimum(numbers, high, out=numbers)


def open_session(model: bytes) -> onnxruntime.InferenceSession:
    """Open a graph as it is always opened here: on one thread, on the processor, silent.

    Raises:
        Exception: whatever onnxruntime raises; it has no common ancestor of its own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Bytes that are both a readable ONNX message and, by a tag at offset 4, onnxruntime's own format would otherwise
    # be loaded as the latter, which no check has seen.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # A memory plan is kept for every distinct number of rows, for ever; without one a run is no slower.
    options.enable_mem_pattern = False
    options.log_severity_level = _FATAL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
