"""How far a projected state has come; kept in the state itself, so that the two are committed together."""

from __future__ import annotations

import struct
from typing import NamedTuple

from server.storage.store import Snapshot, Table, Transaction

_APPLIED = struct.Struct("<QqQ")
_KEY = b"applied"


class Applied(NamedTuple):
    """How far a state has come."""

    lsn: int  # the last one whose effects the state holds
    time_us: int  # that record's log time
    configuration_lsn: int  # the last change of catalog or model role among them


def read_applied(snapshot: Snapshot) -> Applied:
    """Return how far a state has come; zeros for an empty one. Cost: one get."""
    value = snapshot.get(Table.META, _KEY)
    return Applied(*_APPLIED.unpack(value)) if value is not None else Applied(0, 0, 0)


def write_applied(txn: Transaction, applied: Applied) -> None:
    """State how far the state will have come with this commit."""
    txn.put(Table.META, _KEY, _APPLIED.pack(*applied))
