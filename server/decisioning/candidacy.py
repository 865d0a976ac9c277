"""The first gate: is the action asked for at all?

Handed the caller's candidate list and exclusions and the channels of the placements asked for; knows nothing of the
person.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import Bytes, Doubles, Mask, Rows
from server.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

LISTED, NOT_LISTED, EXCLUDED = 0, 1, 2

_NOT_CANDIDATE = int(RefusalReason.REFUSAL_REASON_NOT_CANDIDATE)
_EXCLUDED = int(RefusalReason.REFUSAL_REASON_EXCLUDED)
_NO_TREATMENT = int(RefusalReason.REFUSAL_REASON_NO_TREATMENT)


@kernel
def gate(listing: Bytes, channels: Rows, weights: Doubles) -> tuple[Mask, Bytes]:
    """Pass the actions the caller wants and that can be said on a channel asked for.

    Args:
        listing: uint8[n], LISTED, NOT_LISTED or EXCLUDED; empty when the caller names no actions.
        channels: int32[asks], the channel row of each placement asked for.
        weights: float64[n, channels], NaN where the action has no treatment for the channel.

    Returns:
        Who passes, and the refusal reason of who does not. Cost: O(n × asks).
    """
    n = weights.shape[0]
    passed = np.ones(n, np.bool_)
    reasons = np.zeros(n, np.uint8)
    for row in range(n):
        if listing.size > 0 and listing[row] != LISTED:
            passed[row] = False
            reasons[row] = _EXCLUDED if listing[row] == EXCLUDED else _NOT_CANDIDATE
            continue
        treated = False
        for ask in range(channels.size):
            treated |= not np.isnan(weights[row, channels[ask]])
        if not treated:
            passed[row] = False
            reasons[row] = _NO_TREATMENT
    return passed, reasons
