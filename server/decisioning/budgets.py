"""What is left of the budgets, as one worker knows it, and what a decision spends of them.

The truth is a counter in the log, changed together with the record that spends. A worker knows it as of its last look,
and beside it what it has itself promised since. It answers at once as long as all it has promised is within its part of
a budget's slack; a decision that would go beyond waits for the log, which takes its record only within the limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from server.catalog.budget_terms import BudgetLimit
from server.catalog.catalog import Catalog
from server.decisioning.claims import Chosen, Spent
from server.decisioning.decide import BUDGET_SPENT, EXPLORE
from server.decisioning.gather import Asked
from server.storage.log import Log
from server.storage.record import AMOUNT_MAX, Spend

SLOTS_MAX: Final = 256  # of a request


class Budgets:
    """The budgets of the catalog in force. All methods are called on the event loop.

    Args:
        log: has the counters.
        n_workers: how many share the slack.
    """

    def __init__(self, log: Log, n_workers: int) -> None:
        self._log = log
        self._n_workers = n_workers
        self._promised: Counter[bytes] = Counter()  # by counter: spent by decisions whose records are not on disk yet
        self._counters: list[bytes] = []
        self._limits: list[BudgetLimit] = []
        self._released: list[int] = []
        self._known: list[int] = []  # what each counter stands at, with what is promised
        self._exploring: dict[int, int] = {}  # placement row → its place in the lists

    @property
    def are_any(self) -> bool:
        """Whether the catalog last looked at has budgets."""
        return bool(self._limits)

    def look(self, catalog: Catalog, now_us: int) -> None:
        """Read what is spent, once for the decisions of a flush. Cost: nothing without budgets; some 3 µs otherwise."""
        terms = catalog.budgets
        if not terms.limits and not terms.exploration:
            self._limits = []
            return
        self._limits = [*terms.limits, *terms.exploration.values()]
        self._exploring = {row: place for place, row in enumerate(terms.exploration, start=len(terms.limits))}
        self._counters = [limit.counter(now_us) for limit in self._limits]
        self._released = [limit.released(now_us) for limit in self._limits]
        # Promises after the log: what was committed in between counts twice for a moment, never not at all.
        spent = self._log.spent(self._counters)
        self._known = [n + self._promised[counter] for n, counter in zip(spent, self._counters, strict=True)]

    def constrain(self, asked: Asked, catalog: Catalog) -> None:
        """Say of a request which budgets are near their end, and where exploring has cost what it may."""
        asked.budgets = []
        if not self._limits:
            return
        terms = catalog.budgets
        for b, target in enumerate(terms.targets):
            left = self._released[b] - self._known[b]
            if target >= 0 and left < asked.n_slots * terms.amount_max[b]:
                asked.budgets.append((target, max(left, 0)))
        for i, (row, _) in enumerate(asked.asks):
            place = self._exploring.get(row)
            if place is not None and self._known[place] >= self._released[place]:
                asked.marks[i] |= BUDGET_SPENT

    def spend(self, asked: Asked, chosen: Iterable[Chosen], catalog: Catalog) -> Spent | None:
        """Return what a decision spends, and count it as promised; None where that is nothing."""
        if not self._limits:
            return None
        terms = catalog.budgets
        amounts: dict[int, int] = {}  # a Counter would cost twice as much
        for slot in chosen:
            if slot.row < 0:
                continue
            for b, amount in terms.amounts[slot.row]:
                amounts[b] = amounts.get(b, 0) + amount
            place = self._exploring.get(slot.placement_row)
            if place is not None and asked.mode == EXPLORE:
                # In this order: what is no number, or infinite, costs the most there is.
                cost = round(min(AMOUNT_MAX // SLOTS_MAX, slot.forgone * 1e6))
                amounts[place] = amounts.get(place, 0) + cost
        amounts = {b: amount for b, amount in amounts.items() if amount > 0}
        if not amounts:
            return None
        waits = any(not self._may_promise(b, amount) for b, amount in amounts.items() if b < len(terms.limits))
        spends, keys = [], []
        for b, amount in amounts.items():
            is_checked = waits and b < len(terms.limits)
            spends.append(Spend(self._counters[b], amount, self._released[b] if is_checked else None))
            keys.append(terms.keys[b] if b < len(terms.limits) else 0)
            self._known[b] += amount
            self._promised[self._counters[b]] += amount
        return Spent(tuple(spends), tuple(keys), waits)

    def settle(self, spends: Sequence[Spend]) -> None:
        """Forget a promise: its record is on disk and the log counts it, or nobody was told."""
        for spend in spends:
            self._promised[spend.counter] -= spend.amount
            if not self._promised[spend.counter]:
                del self._promised[spend.counter]

    def _may_promise(self, b: int, amount: int) -> bool:
        """Say whether an amount may be spent before the log has agreed."""
        share = self._limits[b].slack // self._n_workers
        return self._known[b] + amount <= self._released[b] and self._promised[self._counters[b]] + amount <= share
