"""The consent gate: does this person allow what the placement is for, on its channel?

Handed the facts that say what a person allows. What was never said, has expired or is of a person nobody knows is not
allowed; a purpose for which no consent is asked always is. Nothing opens this gate but the person's own word.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import Bytes, Doubles, Mask, Rows
from server.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

ALLOWED = 0

_ABSENT = int(RefusalReason.REFUSAL_REASON_CONSENT_ABSENT)
_WITHDRAWN = int(RefusalReason.REFUSAL_REASON_CONSENT_WITHDRAWN)


@kernel
def verdicts(facts: Doubles, positions: Rows) -> Bytes:
    """Say of each placement asked for whether it may be filled.

    Args:
        facts: float64[m], one request's fact vector.
        positions: int32[asks], where the fact stands that has to be true; -1: none has to.

    Returns:
        uint8[asks]: ALLOWED, or the refusal reason.
    """
    found = np.zeros(positions.size, np.uint8)
    for ask in range(positions.size):
        if positions[ask] < 0:
            continue
        fact = facts[positions[ask]]
        if np.isnan(fact):
            found[ask] = _ABSENT
        elif fact != 1.0:
            found[ask] = _WITHDRAWN
    return found


@kernel
def gate(verdict: Bytes, channels: Rows, weights: Doubles) -> tuple[Mask, Bytes]:
    """Pass the actions that can be said in some placement which may be filled.

    Args:
        verdict: uint8[asks], see verdicts.
        channels: int32[asks], the channel row of each placement asked for.
        weights: float64[n, channels], NaN where the action has no treatment for the channel.

    Returns:
        Who passes, and the refusal reason of who does not. Cost: O(n × asks), nothing where all may be filled.
    """
    n = weights.shape[0]
    passed = np.ones(n, np.bool_)
    reasons = np.zeros(n, np.uint8)
    if not np.any(verdict):
        return passed, reasons
    for row in range(n):
        for ask in range(channels.size):
            if np.isnan(weights[row, channels[ask]]):
                continue
            if verdict[ask] == ALLOWED:
                reasons[row] = 0
                break
            reasons[row] = max(reasons[row], verdict[ask])
        passed[row] = reasons[row] == 0
    return passed, reasons
