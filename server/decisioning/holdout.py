"""The holdout gate: is this person one of those who are told nothing here, so that telling can be measured?

Handed the marks of the placements asked for, which the shell makes from holdouts and person; whom it shuts out of every
placement an action can be said in, ``consent.gate`` refuses with the reason given here.
"""

from __future__ import annotations

from server.catalog.catalog import Bytes, Rows
from server.kernel import kernel
from tsugi.v1.decision_pb2 import RefusalReason

MARK = 1  # of an ask, see decide.Questions
HELD_OUT = int(RefusalReason.REFUSAL_REASON_HELD_OUT)


@kernel
def verdicts(marks: Rows, verdict: Bytes) -> None:
    """Shut the placements that a person is held out of.

    Args:
        marks: int32[asks], bits; see MARK.
        verdict: uint8[asks], changed: the refusal reason where it was open, see consent.verdicts.
    """
    for ask in range(marks.size):
        if marks[ask] & MARK and verdict[ask] == 0:
            verdict[ask] = HELD_OUT
