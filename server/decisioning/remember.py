"""What is left of a decision: the reply its caller gets and the record the log keeps, two views of the same columns.

The reply comes first and alone, because somebody waits for it. Columns are turned into bytes once for all decisions of
a batch and sliced; what depends on catalog and live set was serialised with them. A property test parses both views and
holds them against each other and against the columns.

Cost sketch at 100 candidates and three slots, 16 together: a reply 15 µs with its token, a record 14 and its share of
turning the columns into bytes 3; alone twice that.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from server.catalog.catalog import Catalog, Placement
from server.catalog.compile import other_goal_bytes
from server.catalog.contact_terms import UNLIMITED
from server.decisioning import reply
from server.decisioning.claims import Chosen
from server.decisioning.decide import BUDGET_SPENT, RANDOM_CONTROL, Decisions
from server.decisioning.gather import Asked, Batch
from server.decisioning.live import Served
from server.tokens import TokenKey
from server.wire import head
from tsugi.log.v1.record_pb2 import BudgetReading, DecisionRecord, SlotHistory, SlotRecord

DISTRIBUTION_ROWS_MAX: Final = 256

_WIDE_ROWS: Final = 65_536
# Fields of tsugi.log.v1.DecisionRecord that hold bytes, and of SlotRecord: placement_index = 1, position = 2,
# selection_probability = 4, distribution = 5, distribution_rows = 6, choice_reason = 7, prior_log_odds = 10.
_FACTS, _LEARNED, _REASONS, _ROWS, _PRIORS, _PROPENSITIES, _MEANS, _DEVIATIONS, _SLOTS = 7, 8, 9, 10, 11, 12, 13, 14, 15
_OTHER_PROPENSITIES = 22
_GENERAL_PROPENSITIES = 30
_SLOT = struct.Struct("<BBBBBdBBBf")
_GENERAL_PROPENSITY = struct.Struct("<BBf")
_EMPTY_SLOT = struct.Struct("<BBBBBB")
_DISTRIBUTION, _DISTRIBUTION_ROWS = 5, 6


class Views:
    """Replies and records of one batch of decisions.

    Args:
        batch: what was asked.
        decisions: what was decided.
        catalog: the revision it was decided under.
        served: what it was scored with.
    """

    def __init__(self, batch: Batch, decisions: Decisions, catalog: Catalog, served: Served) -> None:
        self._batch = batch
        self._decisions = decisions
        self._catalog = catalog
        self._served = served
        self._slot_codes: list[list[int]] = decisions.slot_codes.tolist()
        self._slot_numbers: list[list[float]] = decisions.slot_numbers.tolist()
        self._slot_histories: list[list[float]] = decisions.slot_histories.tolist()
        self._columns: _Columns | None = None  # made for the first record
        self._firsts: list[tuple[int, int]] = []  # each request's first ask and slot
        ask, slot = 0, 0
        for asked in batch.asked:
            self._firsts.append((ask, slot))
            ask += len(asked.asks)
            slot += asked.n_slots

    def reply(self, q: int, token_key: TokenKey) -> bytes:
        """Return the serialised DecideResponse of request q, without LSN."""
        asked, (_, slot) = self._batch.asked[q], self._firsts[q]
        catalog = self._catalog
        is_recorded = not asked.request.preview
        parts = [reply.decision_id(token_key.mint(asked.decision_key, asked.profile_key))] if is_recorded else []
        window_us = 0
        for placement_row, count in asked.asks:
            placement = catalog.placements[placement_row]
            window_us = max(window_us, placement.window_us)
            for position in range(count):
                _, _, row, choice_reason = self._slot_codes[slot]
                chance, propensity, priority, _, value, _ = self._slot_numbers[slot]
                slot += 1
                if row < 0:
                    parts.append(reply.empty_slot(placement.slot_bytes[position], choice_reason))
                    continue
                parts.append(
                    reply.slot(
                        placement.slot_bytes[position],
                        catalog.actions.slot_bytes[row][placement.channel_row],
                        propensity,
                        value,
                        priority,
                        chance,
                        choice_reason,
                    )
                )
        if asked.degradations:
            parts.append(reply.degradations(asked.degradations))
        parts.append(self._served.reply_bytes)
        if asked.blend:
            parts.append(catalog.blends.reply_bytes[asked.blend])
        if is_recorded:
            parts.append(reply.expire_time(self._batch.now_us + window_us))
        return b"".join(parts)

    def chosen(self, q: int) -> list[Chosen]:
        """Return what was chosen for each slot of request q."""
        _, slot = self._firsts[q]
        placements = [row for row, count in self._batch.asked[q].asks for _ in range(count)]
        return [
            Chosen(placement, self._slot_codes[slot + i][2], self._slot_numbers[slot + i][5])
            for i, placement in enumerate(placements)
        ]

    def record(self, q: int, reply_bytes: bytes) -> bytes:
        """Return the serialised DecisionRecord of request q.

        Args:
            q: which.
            reply_bytes: as given to the caller; kept where the request may be repeated.
        """
        if self._columns is None:
            self._columns = _Columns(self._decisions, self._batch)
        columns = self._columns
        asked, (ask, slot) = self._batch.asked[q], self._firsts[q]
        catalog = self._catalog
        plain = DecisionRecord(
            decision_key=asked.decision_key,
            profile_key=asked.profile_key,
            request=asked.raw,
            now_us=self._batch.now_us,
            state_lsn=asked.state_lsn,
            seed=asked.seed,
            degradations=asked.degradations,
            random_control=asked.mode == RANDOM_CONTROL,
            reply=reply_bytes if asked.request.request_id else b"",
            held_targets=_held(asked, catalog),
            claimed_subjects=asked.claimed.subjects if asked.claimed is not None else (),
        )
        if asked.holdouts or asked.budgets or any(asked.marks):
            plain.holdouts.extend(asked.holdouts)
            plain.budgets.extend(_budgets(asked, catalog))
            plain.exploration_spent.extend(i for i, mark in enumerate(asked.marks) if mark & BUDGET_SPENT)
        first_slot = slot
        parts = [plain.SerializeToString(), self._served.provenance_bytes, catalog.blends.record_bytes[asked.blend]]
        columns.splice(parts, q, ask, len(asked.asks), asked.explores_by_posterior(catalog))
        for placement_index, (placement_row, count) in enumerate(asked.asks):
            placement = catalog.placements[placement_row]
            for position in range(count):
                _, pick, row, choice_reason = self._slot_codes[slot]
                if row < 0:
                    body = _EMPTY_SLOT.pack(0x08, placement_index, 0x10, position, 0x38, choice_reason)
                    parts += (head(_SLOTS, len(body)), body)
                else:
                    chance, _, _, prior, _, _ = self._slot_numbers[slot]
                    numbers = _SLOT.pack(
                        0x08, placement_index, 0x10, position, 0x21, chance, 0x38, choice_reason, 0x55, prior
                    )
                    distribution = columns.distribution(q, slot, ask + placement_index, pick)
                    fixed = catalog.actions.record_bytes[row] + placement.record_bytes
                    if placement.other_goals:
                        fixed += self._other_goals(placement, int(self._decisions.starts[q]) + pick)
                    fixed += _history(*self._slot_histories[slot])
                    if asked.claimed is not None:
                        confirming = SlotRecord(confirming_subjects=asked.claimed.confirming[slot - first_slot])
                        fixed += confirming.SerializeToString()
                    length = len(numbers) + len(distribution) + len(fixed)
                    parts += (head(_SLOTS, length), numbers, fixed, distribution)
                slot += 1
        return b"".join(parts)

    def _other_goals(self, placement: Placement, survivor: int) -> bytes:
        """Return the goals after the first with the priors that a chosen survivor was scored with, as fields."""
        champion_goal, goals = self._decisions.champion_goal, self._catalog.goals
        return b"".join(
            at_base_rate
            if goal != champion_goal
            else other_goal_bytes(goals[goal], float(self._decisions.champion_log_odds[survivor]))
            for goal, at_base_rate in placement.other_goals
        )


def _history(general: float, *sums: float) -> bytes:
    """Return what a slot's record keeps of the person's history, serialised, see Decisions.slot_histories."""
    if not general:
        return b""
    told = _GENERAL_PROPENSITY.pack(0xA5, 0x01, general)  # field 20 of SlotRecord
    if any(sums):
        expected, observed, group_expected, group_observed = sums
        history = SlotHistory(
            expected=expected, observed=observed, group_expected=group_expected, group_observed=group_observed
        )
        told += SlotRecord(history=history).SerializeToString()
    return told


def _held(asked: Asked, catalog: Catalog) -> list[int]:
    """Return the keys of held targets, each as often as it is held."""
    contacts = catalog.profiles.contacts
    keys, limits = contacts.target_keys, contacts.targets.limits
    held: list[int] = []
    for target, n in asked.holds:
        if n == UNLIMITED > limits[target]:  # all of a cap is held as often as it may be spoken of
            held += [keys[target]] * int(limits[target])
        else:
            held.append(keys[target])
    return held


def _budgets(asked: Asked, catalog: Catalog) -> list[BudgetReading]:
    keys = catalog.profiles.contacts.target_keys
    return [BudgetReading(target=keys[target], left=left) for target, left in asked.budgets]


class _Columns:
    """A batch's columns as bytes, cheap to slice."""

    def __init__(self, decisions: Decisions, batch: Batch) -> None:
        self._decisions = decisions
        n, d = decisions.reasons.shape[1], decisions.learned.shape[1]
        self._row_type = np.uint16 if n <= _WIDE_ROWS else np.uint32
        self._row_bytes = 2 if n <= _WIDE_ROWS else 4
        self._starts = decisions.starts.tolist()
        self._ask_blocks = decisions.ask_blocks.tolist()
        self._other_blocks = decisions.other_blocks.tolist()
        self._slot_blocks = decisions.slot_blocks.tolist()
        self._rows = decisions.rows.astype(self._row_type).tobytes()
        self._priors = decisions.prior_log_odds.tobytes()
        self._propensities = decisions.propensities.tobytes()
        self._general = decisions.general_propensities.tobytes()
        self._distributions = decisions.distributions.astype(np.float32).tobytes()
        self._each = (
            (head(_REASONS, n), n, decisions.reasons.tobytes()),
            (head(_LEARNED, 4 * d), 4 * d, decisions.learned.tobytes()),
            (head(_FACTS, 8 * batch.facts.shape[1]), 8 * batch.facts.shape[1], batch.facts.tobytes()),
        )

    def splice(self, parts: list[bytes], q: int, ask: int, n_asks: int, has_posterior: bool) -> None:
        """Append the column fields of request q, whose asks begin at ask."""
        for field_head, size, data in self._each:
            parts += (field_head, data[size * q : size * (q + 1)])
        rows = self._rows[self._row_bytes * self._starts[q] : self._row_bytes * self._starts[q + 1]]
        block = slice(4 * self._ask_blocks[ask], 4 * self._ask_blocks[ask + n_asks])
        size = block.stop - block.start
        parts += (head(_ROWS, len(rows)), rows, head(_PRIORS, size), self._priors[block])
        parts += (head(_PROPENSITIES, size), self._propensities[block])
        if self._general:
            general = self._general[block]
            if general != self._propensities[block]:
                parts += (head(_GENERAL_PROPENSITIES, size), general)
        first, last = self._other_blocks[ask], self._other_blocks[ask + n_asks]
        if last > first:
            others = self._decisions.other_propensities[first:last].tobytes()
            parts += (head(_OTHER_PROPENSITIES, len(others)), others)
        if has_posterior:
            columns = slice(block.start // 4, block.stop // 4)
            parts += (head(_MEANS, size), self._decisions.means[columns].tobytes())
            parts += (head(_DEVIATIONS, size), self._decisions.deviations[columns].tobytes())

    def distribution(self, q: int, slot: int, ask: int, pick: int) -> bytes:
        """Return what a slot was drawn from, as fields, cut to the best 256 and the chosen one where there are more."""
        first, last = self._slot_blocks[slot], self._slot_blocks[slot + 1]
        if last - first <= DISTRIBUTION_ROWS_MAX:
            return head(_DISTRIBUTION, 4 * (last - first)) + self._distributions[4 * first : 4 * last]
        decisions = self._decisions
        priorities = decisions.priorities[self._ask_blocks[ask] : self._ask_blocks[ask + 1]]
        best = np.argpartition(-np.nan_to_num(priorities, nan=-1.0), DISTRIBUTION_ROWS_MAX)[:DISTRIBUTION_ROWS_MAX]
        kept = np.union1d(best, [pick])
        shares = decisions.distributions[first:last][kept].astype(np.float32).tobytes()
        rows = decisions.rows[self._starts[q] : self._starts[q + 1]][kept].astype(self._row_type).tobytes()
        return b"".join((head(_DISTRIBUTION, len(shares)), shares, head(_DISTRIBUTION_ROWS, len(rows)), rows))
