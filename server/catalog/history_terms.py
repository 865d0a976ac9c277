"""Whose history a decision may read, ready to use: goals and actions by the keys under which profiles keep it.

Profiles outlive catalogs, so they name goals and actions by hashes of their names, which mean the same whatever else a
catalog declares. What a catalog does not declare any more says nothing while it does not.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from server.catalog.catalog import Amounts, Mask, Rows
from server.catalog.declared import frozen
from tsugi.v1 import catalog_pb2

NAMES_KEPT: Final = 16_384  # whose keys are at hand: hashing costs 1 µs
UNITS: Final = 1_000_000_000  # history is kept in billionths: sums of whole numbers are exact in any order


@dataclass(frozen=True, slots=True)
class HistoryTerms:
    """What the core needs to read a person's history."""

    goal_keys: Amounts  # int64[goals]
    is_kept: Mask  # bool[goals]: the goal keeps a history, and reads it
    action_keys: Amounts  # int64[n], ascending
    action_rows: Rows  # int32[n]: whose key that is
    groups: Rows  # int32[n], of each action row: its group; those without one share the last

    def columns(self) -> tuple[Amounts, Mask, Amounts, Rows, Rows]:
        """Return the arrays in the order kernels take them."""
        return self.goal_keys, self.is_kept, self.action_keys, self.action_rows, self.groups


@functools.lru_cache(NAMES_KEPT)
def name_key(name: str) -> int:
    """Return the number that names a goal or an action for ever, within int64."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8, person=b"tsugi.history").digest(), "little", signed=True
    )


def compile_history(message: catalog_pb2.Catalog, actions: Sequence[catalog_pb2.Action]) -> HistoryTerms:
    """Compile what reading history needs.

    Args:
        message: the catalog.
        actions: its actions, in the order of their rows.

    Cost: 1 µs an action.
    """
    keys = np.array([name_key(action.name) for action in actions], np.int64)
    order = np.argsort(keys, kind="stable")
    groups = {group.name: row for row, group in enumerate(message.action_groups)}
    return HistoryTerms(
        goal_keys=frozen(np.array([name_key(goal.name) for goal in message.goals], np.int64)),
        is_kept=frozen(np.array([keeps_history(goal) for goal in message.goals], np.bool_)),
        action_keys=frozen(keys[order]),
        action_rows=frozen(order.astype(np.int32)),
        groups=frozen(np.array([groups.get(action.group, len(groups)) for action in actions], np.int32)),
    )


def keeps_history(goal: catalog_pb2.Goal) -> bool:
    """Say whether a goal keeps a history of each person."""
    return goal.personal_history if goal.HasField("personal_history") else True
