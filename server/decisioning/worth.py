"""The value gate: can it be told what success with this action is worth to this person?

Handed the catalog's value expressions, lowered, and one request's facts. What cannot be told, is negative or above the
largest value there is refuses: nothing is ever ranked by a number that means nothing.
"""

from __future__ import annotations

import numpy as np

from server.catalog.catalog import Bytes, Doubles, Mask, Rows
from server.catalog.evaluation import compare, compute
from server.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

_VALUE_UNKNOWN = int(RefusalReason.REFUSAL_REASON_VALUE_UNKNOWN)


@kernel
def evaluate(
    facts: Doubles,
    left: Rows,
    right: Rows,
    comparisons: Bytes,
    constants: Doubles,
    steps: Rows,
    rule_starts: Rows,
    operators: Bytes,
    operands: Doubles,
    starts: Rows,
    out: Doubles,
) -> None:
    """Write what each value expression comes to for one request.

    Args:
        facts: float64[m], one request's fact vector.
        left: see server.catalog.catalog.Rules, as are the arguments up to rule_starts.
        right: see Rules.
        comparisons: see Rules.
        constants: see Rules.
        steps: see Rules.
        rule_starts: see Rules.
        operators: see server.catalog.catalog.Values, as are the arguments up to starts.
        operands: see Values.
        starts: see Values.
        out: float64[v], written; NaN where it cannot be told.

    Cost: nothing without expressions; otherwise O(atoms + steps).
    """
    if out.size:
        atoms = compare(facts, left, right, comparisons, constants)
        compute(facts, atoms, steps, rule_starts, operators, operands, starts, out)


@kernel
def gate(programs: Rows, computed: Doubles) -> tuple[Mask, Bytes]:
    """Pass the actions whose value is known.

    Args:
        programs: int32[n], see ActionColumns.value_programs.
        computed: float64[v], see evaluate.

    Returns:
        Who passes, and the refusal reason of who does not. Cost: O(n), nothing without expressions.
    """
    n = programs.size
    passed = np.ones(n, np.bool_)
    reasons = np.zeros(n, np.uint8)
    if computed.size:
        for row in range(n):
            if programs[row] >= 0 and np.isnan(computed[programs[row]]):
                passed[row] = False
                reasons[row] = _VALUE_UNKNOWN
    return passed, reasons
