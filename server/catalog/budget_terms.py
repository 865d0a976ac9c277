"""Budgets, ready to use: how much may be said to all people together, and how much exploring may cost.

A budget is a contact target of all people: what is left of it comes from a counter in the log. A counter is named by
budget and period, so that each period begins with an empty one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.catalog.contact_terms import Named, target_key
from server.catalog.faults import duration_us
from tsugi.v1 import catalog_pb2


@dataclass(frozen=True, slots=True)
class BudgetLimit:
    """How much, of what, until when."""

    name: str  # of its counters
    limit: int  # units or micros
    period_us: int  # 0: in all
    is_paced: bool = False
    slack: int = 0

    def counter(self, now_us: int) -> bytes:
        """Return the 16 bytes that name what counts at an instant. Cost: some 1 µs."""
        period = now_us // self.period_us if self.period_us else 0
        # The period's length too: where it changes, counting begins anew instead of meeting an old period's number.
        named = f"{self.name}\0{self.period_us}\0{period}".encode()
        return hashlib.blake2b(named, digest_size=16, person=b"tsugi.budget").digest()

    def released(self, now_us: int) -> int:
        """Return how much may have been spent by an instant."""
        if not self.is_paced or not self.period_us:
            return self.limit
        return self.limit * (now_us % self.period_us) // self.period_us


@dataclass(frozen=True, slots=True)
class BudgetTerms:
    """All budgets of a catalog."""

    limits: tuple[BudgetLimit, ...]
    targets: tuple[int, ...]  # row of each one's contact target; -1: it means no action
    keys: tuple[int, ...]  # of the contact targets
    amount_max: tuple[int, ...]  # the most that saying one action takes of it
    amounts: tuple[
        tuple[tuple[int, int], ...], ...
    ]  # [n]: of each action the budgets, and what saying it takes of each
    exploration: Mapping[int, BudgetLimit]  # by placement row


def budget_target(name: str) -> int:
    """Return the key of a budget's contact target."""
    return target_key(f"budget {name}", "")  # no policy's name has a blank


def compile_budgets(
    message: catalog_pb2.Catalog, actions: Sequence[catalog_pb2.Action], target_rows: Mapping[int, int]
) -> BudgetTerms:
    """Compile the budgets of a catalog.

    Args:
        message: a catalog without faults.
        actions: its actions in the order of the columns.
        target_rows: the rows of its contact targets.

    Cost: O(budgets × actions).
    """
    dearest = max((action.cost_micros for action in message.actions), default=0)
    meant = [Named.by(budget) for budget in message.budgets]
    amounts = [
        tuple(
            (b, action.cost_micros if budget.HasField("cost_micros_max") else 1)
            for b, budget in enumerate(message.budgets)
            if meant[b].has(action)
        )
        for action in actions
    ]
    keys = tuple(budget_target(budget.name) for budget in message.budgets)
    return BudgetTerms(
        limits=tuple(map(_limit, message.budgets)),
        targets=tuple(target_rows.get(key, -1) for key in keys),
        keys=keys,
        amounts=tuple(amounts),
        amount_max=tuple(dearest if budget.HasField("cost_micros_max") else 1 for budget in message.budgets),
        exploration={
            row: BudgetLimit(
                f"exploring {placement.name}",
                placement.exploration.budget.cost_micros_max,
                duration_us(placement.exploration.budget.period),
            )
            for row, placement in enumerate(message.placements)
            if placement.exploration.HasField("budget")
        },
    )


def _limit(budget: catalog_pb2.Budget) -> BudgetLimit:
    is_money = budget.HasField("cost_micros_max")
    return BudgetLimit(
        name=f"{'money' if is_money else 'units'} {budget.name}",
        limit=budget.cost_micros_max if is_money else budget.units_max,
        period_us=duration_us(budget.period) if budget.HasField("period") else 0,
        is_paced=budget.paced,
        slack=budget.slack,
    )
