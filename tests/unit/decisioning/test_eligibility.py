"""The compiled gate on sets: a bit of a float64, as the slow reading of the same rules says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.catalog.catalog import CONTAINS, NOT, Rules
from server.decisioning import eligibility
from tests.support.rules import NO, NOT_KNOWN, YES, evaluate
from tsugi.v1.decision_pb2 import RefusalReason

CODES = (0, 1, 31, 32, 51)
SETS = (0, 1, 2, 3, 1 << 31, 1 << 32, 1 << 51, (1 << 52) - 1, (1 << 52) - 2)
REASONS = {
    YES: 0,
    NO: int(RefusalReason.REFUSAL_REASON_NOT_ELIGIBLE),
    NOT_KNOWN: int(RefusalReason.REFUSAL_REASON_FACT_UNKNOWN),
}


def contains(code: float) -> Rules:
    """Return two rules over fact 1: it has the value, and it has not."""
    return Rules(
        left=np.array([1], np.int32),
        right=np.array([-1], np.int32),
        operators=np.array([CONTAINS], np.uint8),
        constants=np.array([code]),
        steps=np.array([0, 0, NOT], np.int32),
        starts=np.array([0, 1, 3], np.int32),
    )


@pytest.mark.slow  # Numba compiles the gate when the cache is cold
def test_set_passes_whoever_has_the_value_and_refuses_the_unknown() -> None:
    valid = np.zeros(2, np.int64)
    for code in (*CODES, -1):
        for known in (*SETS, math.nan):
            facts = np.array([0.0, float(known)])
            rules = contains(float(code))
            has = NOT_KNOWN if math.isnan(known) else YES if code >= 0 and int(known) >> code & 1 else NO
            hasnt = {YES: NO, NO: YES, NOT_KNOWN: NOT_KNOWN}[has]
            assert [evaluate(rules, rule, facts) for rule in (0, 1)] == [has, hasnt]
            rows = np.array([[0], [1]], np.int32)
            passed, reasons = eligibility.gate(facts, 0, valid, valid + 1, rows, *rules.columns())
            assert reasons.tolist() == [REASONS[has], REASONS[hasnt]]
            assert passed.tolist() == [has == YES, hasnt == YES]
