"""What models read: declared facts turned into feature columns.

The same code online and offline: serving, the learner's rows, fitting and off-policy estimation all encode here. Never
looks anything up; handed facts and the columns' definition.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import EQUALS, SCALED, Bytes, Doubles, FeatureColumns, Floats, Rows
from server.kernel import kernel


@kernel
def encode(facts: Doubles, sources: Rows, kinds: Bytes, parameters: Doubles, out: Floats) -> None:
    """Write d feature columns of one fact vector.

    Args:
        facts: float64[m], NaN where unknown.
        sources: int32[d], the fact each column reads.
        kinds: uint8[d], SCALED, EQUALS or UNKNOWN.
        parameters: float64[d, 4], see FeatureColumns.
        out: float32[d], written.

    Cost: O(d), some 2 ns a column.
    """
    for j in range(sources.size):
        fact = facts[sources[j]]
        unknown = np.isnan(fact)
        if kinds[j] == SCALED:
            if unknown:
                out[j] = parameters[j, 3]
            else:
                limit = parameters[j, 2]
                out[j] = min(max((fact - parameters[j, 0]) / parameters[j, 1], -limit), limit)
        elif kinds[j] == EQUALS:
            out[j] = 1.0 if fact == parameters[j, 0] else 0.0
        else:
            out[j] = 1.0 if unknown else 0.0


def encode_rows(facts: Doubles, columns: FeatureColumns) -> Floats:
    """Encode many fact vectors: float64[r, m] to float32[r, d], a new array."""
    out = np.empty((facts.shape[0], columns.sources.size), np.float32)
    for row in range(facts.shape[0]):
        encode(facts[row], columns.sources, columns.kinds, columns.parameters, out[row])
    return out
