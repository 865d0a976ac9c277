"""What is left of a decision: the reply its caller gets and the record the log keeps, two views of the same columns.

Columns are converted once for all decisions of a batch and sliced per decision, so that a decision costs a handful of
small allocations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import THOMPSON
from server.decisioning import reply
from server.decisioning.decide import RANDOM_CONTROL, Decisions
from server.decisioning.gather import Asked, Batch
from server.decisioning.live import Live
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import DecisionRecord, SlotRecord
from tsugi.v1.decision_pb2 import Degradation

DISTRIBUTION_ROWS_MAX: Final = 256
_WIDE_ROWS: Final = 65_536


class Remembered(NamedTuple):
    """One decision as bytes."""

    reply: bytes  # a serialised DecideResponse, without LSN
    record: bytes  # a serialised DecisionRecord; empty for a preview


def remember(batch: Batch, decisions: Decisions, live: Live, token_key: TokenKey) -> Iterator[Remembered]:
    """Yield reply and record of each decision, in the batch's order."""
    columns = _Columns(batch, decisions)
    first_slot = 0
    for q, asked in enumerate(batch.asked):
        if decisions.is_model_unavailable:
            asked.degradations.append(Degradation.DEGRADATION_MODEL_UNAVAILABLE)
        n_slots = sum(count for _, count in asked.asks)
        slots = range(first_slot, first_slot + n_slots)
        yield _remember_one(q, asked, slots, columns, live, token_key)
        first_slot += n_slots


class _Columns:
    """A batch's columns in the form that is cheap to slice."""

    def __init__(self, batch: Batch, decisions: Decisions) -> None:
        catalog = batch.catalog
        self.batch = batch
        self.decisions = decisions
        n = len(catalog.actions.names)
        self.row_bytes = 2 if n <= _WIDE_ROWS else 4
        self.starts = decisions.starts.tolist()
        self.ask_blocks = decisions.ask_blocks.tolist()
        self.slot_asks = decisions.slot_asks.tolist()
        self.slot_blocks = decisions.slot_blocks.tolist()
        self.chosen = decisions.chosen.tolist()
        self.chances = decisions.selection_probabilities.tolist()
        self.choice_reasons = decisions.choice_reasons.tolist()
        self.rows = decisions.rows.astype(np.uint16 if self.row_bytes == 2 else np.uint32).tobytes()
        self.priors = decisions.prior_log_odds.tobytes()
        self.propensities = decisions.propensities.tobytes()
        self.means = decisions.means.tobytes()
        self.deviations = decisions.deviations.tobytes()
        self.distributions = decisions.distributions.astype(np.float32).tobytes()
        self.reasons = decisions.reasons.tobytes()
        self.n = n
        self.learned = decisions.learned.tobytes()
        self.learned_bytes = 4 * decisions.learned.shape[1]
        self.facts = batch.facts.tobytes()
        self.facts_bytes = 8 * batch.facts.shape[1]


def _remember_one(q: int, asked: Asked, slots: range, columns: _Columns, live: Live, token_key: TokenKey) -> Remembered:
    request, catalog = asked.request, live.catalog
    parts: list[bytes] = []
    is_recorded = not request.preview
    if is_recorded:
        parts.append(reply.decision_id(token_key.mint(asked.decision_key, asked.profile_key)))
    records: list[SlotRecord] = []
    window_us = 0
    ask, position = -1, 0
    first_ask = columns.slot_asks[slots[0]]
    for s in slots:
        position = position + 1 if columns.slot_asks[s] == ask else 0
        ask = columns.slot_asks[s]
        placement = catalog.placements[asked.asks[ask - first_ask][0]]
        goal = catalog.goals[placement.goal_row]
        window_us = max(window_us, goal.window_us)
        pick, choice_reason = columns.chosen[s], columns.choice_reasons[s]
        if pick < 0:
            parts.append(reply.empty_slot(placement.slot_bytes[position], choice_reason))
            records.append(SlotRecord(placement_index=ask - first_ask, position=position, choice_reason=choice_reason))
            continue
        row = columns.decisions.rows.item(columns.starts[q] + pick)
        entry = columns.ask_blocks[ask] + pick
        parts.append(
            reply.slot(
                placement.slot_bytes[position],
                catalog.actions.slot_bytes[row][placement.channel_row],
                columns.decisions.propensities.item(entry),
                catalog.actions.worth.item(row, 0),
                columns.decisions.priorities.item(entry),
                columns.chances[s],
                choice_reason,
            )
        )
        if is_recorded:
            distribution, distribution_rows = _distribution(q, s, ask, pick, columns)
            records.append(
                SlotRecord(
                    placement_index=ask - first_ask,
                    position=position,
                    row=row,
                    selection_probability=columns.chances[s],
                    distribution=distribution,
                    distribution_rows=distribution_rows,
                    choice_reason=choice_reason,
                    action=catalog.actions.names[row],
                    goal=goal.name,
                    prior_log_odds=columns.decisions.prior_log_odds.item(entry),
                    on_impression=placement.on_impression,
                )
            )
    parts.append(reply.degradations(asked.degradations))
    parts.append(live.reply_bytes)
    if not is_recorded:
        return Remembered(b"".join(parts), b"")
    parts.append(reply.expire_time(columns.batch.now_us + window_us))
    reply_bytes = b"".join(parts)
    return Remembered(reply_bytes, _record(q, asked, first_ask, records, columns, live, reply_bytes))


def _record(
    q: int, asked: Asked, first_ask: int, slots: list[SlotRecord], columns: _Columns, live: Live, reply_bytes: bytes
) -> bytes:
    n_asks = len(asked.asks)
    first, last = columns.starts[q], columns.starts[q + 1]
    block = slice(4 * columns.ask_blocks[first_ask], 4 * columns.ask_blocks[first_ask + n_asks])
    is_thompson = any(live.catalog.placements[row].policy == THOMPSON for row, _ in asked.asks)
    record = DecisionRecord(
        decision_key=asked.decision_key,
        profile_key=asked.profile_key,
        request=asked.raw,
        now_us=columns.batch.now_us,
        state_lsn=asked.state_lsn,
        facts=columns.facts[columns.facts_bytes * q : columns.facts_bytes * (q + 1)],
        learned_features=columns.learned[columns.learned_bytes * q : columns.learned_bytes * (q + 1)],
        refusal_reasons=columns.reasons[columns.n * q : columns.n * (q + 1)],
        rows=columns.rows[columns.row_bytes * first : columns.row_bytes * last],
        prior_log_odds=columns.priors[block],
        propensities=columns.propensities[block],
        posterior_means=columns.means[block] if is_thompson else b"",
        posterior_deviations=columns.deviations[block] if is_thompson else b"",
        slots=slots,
        seed=asked.seed,
        degradations=asked.degradations,
        random_control=asked.mode == RANDOM_CONTROL,
        reply=reply_bytes if asked.request.request_id else b"",
    )
    return record.SerializeToString() + live.provenance_bytes


def _distribution(q: int, s: int, ask: int, pick: int, columns: _Columns) -> tuple[bytes, bytes]:
    """Return what slot s was drawn from, cut to the best 256 and the chosen one where there are more."""
    first, last = columns.slot_blocks[s], columns.slot_blocks[s + 1]
    if last - first <= DISTRIBUTION_ROWS_MAX:
        return columns.distributions[4 * first : 4 * last], b""
    decisions = columns.decisions
    priorities = decisions.priorities[columns.ask_blocks[ask] : columns.ask_blocks[ask + 1]]
    best = np.argpartition(-np.nan_to_num(priorities, nan=-1.0), DISTRIBUTION_ROWS_MAX)[:DISTRIBUTION_ROWS_MAX]
    kept = np.union1d(best, [pick])
    rows = decisions.rows[columns.starts[q] : columns.starts[q + 1]][kept]
    distribution = decisions.distributions[first:last][kept].astype(np.float32)
    return distribution.tobytes(), rows.astype(np.uint16 if columns.row_bytes == 2 else np.uint32).tobytes()
