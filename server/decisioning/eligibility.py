"""The eligibility gate: may this person ever be shown this, does it make sense now, is it right for them?

Handed validity dates and the catalog's lowered rules in three layers, eligibility, applicability and suitability; the
first to refuse names the reason. Each comparison is made once a decision and each distinct rule
evaluated once, however many actions share it. Three-valued: a fact that is not known makes its comparison unknown,
and what is unknown never lets an action through.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import RULE_STACK_MAX, Bytes, Doubles, Mask, Rows
from server.catalog.evaluation import NO, YES, compare, evaluate
from server.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

_NOT_YET_VALID = int(RefusalReason.REFUSAL_REASON_NOT_YET_VALID)
_NO_LONGER_VALID = int(RefusalReason.REFUSAL_REASON_NO_LONGER_VALID)
_REFUSED_BY = (  # one a column of action_rules: two a layer, the group's rule and the action's
    *2 * (int(RefusalReason.REFUSAL_REASON_NOT_ELIGIBLE),),
    *2 * (int(RefusalReason.REFUSAL_REASON_NOT_APPLICABLE),),
    *2 * (int(RefusalReason.REFUSAL_REASON_NOT_SUITABLE),),
)
_FACT_UNKNOWN = int(RefusalReason.REFUSAL_REASON_FACT_UNKNOWN)
_NOT_EVALUATED = 3


@kernel
def gate(
    facts: Doubles,
    now_us: int,
    valid_from_us: NDArray[np.int64],
    valid_until_us: NDArray[np.int64],
    action_rules: Rows,
    left: Rows,
    right: Rows,
    operators: Bytes,
    constants: Doubles,
    steps: Rows,
    starts: Rows,
) -> tuple[Mask, Bytes]:
    """Pass the actions that are valid now and whose rules are all true for these facts.

    Args:
        facts: float64[m], one request's fact vector.
        now_us: the instant of the decision.
        valid_from_us: int64[n], inclusive.
        valid_until_us: int64[n], exclusive.
        action_rules: int32[n, 6], the rules of each action, see catalog.RULE_LAYERS; -1 for none.
        left: see server.catalog.catalog.Rules, as are the arguments after it.
        right: see Rules.
        operators: see Rules.
        constants: see Rules.
        steps: see Rules.
        starts: see Rules.

    Returns:
        Who passes, and the refusal reason of who does not. Cost: O(n + atoms + steps), some 2 ns each.
    """
    atoms = compare(facts, left, right, operators, constants)
    verdicts = np.full(starts.size - 1, _NOT_EVALUATED, np.uint8)
    n = action_rules.shape[0]
    passed = np.ones(n, np.bool_)
    reasons = np.zeros(n, np.uint8)
    stack = np.empty(RULE_STACK_MAX, np.uint8)
    for row in range(n):
        if now_us < valid_from_us[row]:
            reasons[row] = _NOT_YET_VALID
        elif now_us >= valid_until_us[row]:
            reasons[row] = _NO_LONGER_VALID
        else:
            for column in range(action_rules.shape[1]):
                rule = action_rules[row, column]
                if rule < 0:
                    continue
                if verdicts[rule] == _NOT_EVALUATED:
                    verdicts[rule] = evaluate(atoms, steps[starts[rule] : starts[rule + 1]], stack)
                if verdicts[rule] != YES:
                    reasons[row] = _REFUSED_BY[column] if verdicts[rule] == NO else _FACT_UNKNOWN
                    break
        passed[row] = reasons[row] == 0
    return passed, reasons
