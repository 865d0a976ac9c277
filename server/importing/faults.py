"""Why a row is not sent, or was not taken: one small value for both, with the column where there is one.

Messages hold no value of a row: the rejects file has the row itself, and what is printed may end up in a log.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from server.errors import TsugiError, Violation
from tsugi.v1.error_reason_pb2 import ErrorReason


class RejectReason(StrEnum):
    """Why the importer itself rejects a row; the server's own error reasons stand beside these."""

    ROW_MALFORMED = "ROW_MALFORMED"  # quotes, cells, JSON: it cannot be read
    ROW_TOO_LONG = "ROW_TOO_LONG"  # or one of its cells is
    ENCODING_INVALID = "ENCODING_INVALID"
    VALUE_INVALID = "VALUE_INVALID"  # it can be read, and a cell is not what the mapping makes of it
    IDENTITY_MISSING = "IDENTITY_MISSING"
    RECORD_ID_INVALID = "RECORD_ID_INVALID"


class Fault(NamedTuple):
    """One row that does not go in, and why."""

    reason: str  # a RejectReason, or an ErrorReason of the server without its prefix
    column: str  # empty: the row as a whole
    message: str  # what would be right; for people
    further: tuple[Fault, ...] = ()  # what else is wrong with the row; it is counted under the first

    def columns(self) -> str:
        """Return every column at fault, each once."""
        return ", ".join(dict.fromkeys(each.column for each in (self, *self.further) if each.column))

    def told(self) -> str:
        """Return what would be right, of every fault."""
        if not self.further:
            return self.message
        each = [
            f"{fault.column}: {fault.message}" if fault.column else fault.message for fault in (self, *self.further)
        ]
        return "; ".join(each)


class RowFault(Exception):  # noqa: N818  # not an error of the program: caught beside its row and told as a Fault
    """A row or one of its cells is not what it should be; the text says what would be right.

    Attributes:
        column: the cell's; set where the column is known, which is outside the function that looks at the cell.
        reason: why the row is rejected.
    """

    def __init__(self, message: str, column: str = "", reason: RejectReason = RejectReason.VALUE_INVALID) -> None:
        super().__init__(message)
        self.column = column
        self.reason = reason

    def told(self, column: str = "") -> Fault:
        """Return it as a fault of its row, and of a column where it knows of none itself."""
        return Fault(self.reason, self.column or column, str(self))


class ImportStopped(Exception):  # noqa: N818  # a state an import comes to, mended from outside
    """The import cannot go on, and nothing is wrong with its rows; the same command goes on where it stood.

    Attributes:
        is_unanswered: because no server answers.
    """

    def __init__(self, message: str, *, is_unanswered: bool = False) -> None:
        super().__init__(message)
        self.is_unanswered = is_unanswered


class ImportRunning(ImportStopped):
    """Another import of the same file is under way; nothing was begun."""


def refused(subject: str, violations: list[Violation]) -> TsugiError:
    """Build the refusal of a mapping or file before its first row is read; every fault is one of its violations."""
    return TsugiError(
        ErrorReason.ERROR_REASON_FIELD_INVALID,
        f"{subject} is refused{f' for {len(violations)} faults' if len(violations) > 1 else ''}",
        violations=violations,
        faults=len(violations),
    )
