"""Does exploring still reach several actions? How evenly each placement's last choices lie over actions, in one worker.

Handed what was decided, after the replies are on their way, it counts the first choice of each placement that explores
and had at least two candidates; what came MEMORY decisions ago counts for 1/e. The entropy of these shares, divided by
the one of choosing evenly, is 1 where all candidates are chosen alike and 0 where one is always. Where it falls below
ENTROPY_MIN exploring has collapsed, and learning is about to: the log says so once.

Cost sketch: 3 µs for each placement asked for; telling some 10 µs a placement, every few seconds.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import structlog

from server import telemetry
from server.catalog.catalog import EPSILON_GREEDY, GREEDY, Catalog
from server.decisioning.decide import BUDGET_SPENT, EXPLORE, Decisions
from server.decisioning.gather import Batch

MEMORY: Final = 1_000.0  # decisions
DECISIONS_MIN: Final = 1_000  # before a placement is judged
ENTROPY_MIN: Final = 0.02  # about what exploring in one of a hundred decisions gives, the rest going to one action
ENTROPY_CALM: Final = 0.03  # from there on the next crossing is one

_GROWTH: Final = 1.0 / (1.0 - 1.0 / MEMORY)
_WEIGHT_MAX: Final = 1e100


class _Tally:
    """Choices of one placement. Each weighs a little more than the one before, which makes the ones before fade."""

    def __init__(self) -> None:
        self.n = 0
        self.is_collapsed = False
        self._weight = 1.0
        self._weights: dict[int, float] = {}  # by action row
        self._evenly = 0.0  # weighted sum of the entropies of choosing evenly

    def add(self, row: int, n_candidates: int) -> None:
        self.n += 1
        self._weight *= _GROWTH
        self._weights[row] = self._weights.get(row, 0.0) + self._weight
        self._evenly += self._weight * math.log(n_candidates)
        if self._weight > _WEIGHT_MAX:
            self._weights = {row: weight / self._weight for row, weight in self._weights.items()}
            self._evenly /= self._weight
            self._weight = 1.0

    def entropy(self) -> float:
        """Return it, over that of choosing evenly: 0..1."""
        total = math.fsum(self._weights.values())
        shares = (weight / total for weight in self._weights.values())
        entropy = -math.fsum(share * math.log(share) for share in shares if share > 0.0)
        return min(entropy * total / self._evenly, 1.0)


class Choices:
    """The tallies of one worker; with another catalog they begin anew."""

    def __init__(self) -> None:
        self._catalog: Catalog | None = None
        self._explores: list[list[bool]] = []  # by blend and placement row
        self._tallies: dict[int, _Tally] = {}  # by placement row

    def note(self, batch: Batch, decisions: Decisions) -> None:
        """Count the choices of decisions that explore; previews, and who is in the random control, do not count."""
        if batch.catalog is not self._catalog:
            self._begin(batch.catalog)
        rows, blocks = decisions.slot_codes[:, 2].tolist(), decisions.ask_blocks.tolist()
        slot, ask = 0, 0
        for asked in batch.asked:
            is_counted = asked.mode == EXPLORE and not asked.request.preview
            explores = self._explores[asked.blend]
            for (placement, n_slots), mark in zip(asked.asks, asked.marks, strict=True):
                if is_counted and rows[slot] >= 0 and explores[placement] and not mark & BUDGET_SPENT:
                    priorities = decisions.priorities[blocks[ask] : blocks[ask + 1]]
                    n_candidates = int(np.count_nonzero(~np.isnan(priorities)))
                    if n_candidates > 1:
                        self._tallies.setdefault(placement, _Tally()).add(rows[slot], n_candidates)
                slot += n_slots
                ask += 1

    def tell(self) -> None:
        """Tell the metric, and warn of each placement whose choices have collapsed since the last time."""
        for placement, tally in self._tallies.items():
            assert self._catalog is not None, "choices are counted under a catalog"
            name = self._catalog.placements[placement].name
            entropy = tally.entropy()
            telemetry.CHOICE_ENTROPY.labels(name).set(entropy)
            before = tally.is_collapsed
            tally.is_collapsed = tally.n >= DECISIONS_MIN and entropy < (ENTROPY_CALM if before else ENTROPY_MIN)
            if tally.is_collapsed and not before:
                telemetry.ALARMS.labels("choices").inc()
                structlog.get_logger().warning("choices_collapsed", placement=name, entropy=round(entropy, 4))

    def _begin(self, catalog: Catalog) -> None:
        for placement in self._tallies:  # a name that is gone must not alarm for ever
            assert self._catalog is not None, "choices are counted under a catalog"
            telemetry.CHOICE_ENTROPY.labels(self._catalog.placements[placement].name).set(1.0)
        self._catalog, self._tallies = catalog, {}
        policies, parameters = catalog.blends.codes[:, :, 2], catalog.blends.parameters
        is_even = (policies == EPSILON_GREEDY) & (parameters[:, :, 0] == 0.0)
        spreads = (policies != GREEDY) & ~is_even & (parameters[:, :, 1] > 0.0)
        self._explores = (spreads | (parameters[:, :, 2] > 0.0)).tolist()
