"""Which reward did each decision earn? Joins decisions with their outcomes, and with silence, into rows to learn from.

Handed log records in LSN order, it teaches each filled slot's reward exactly once: the first outcome that settles the
slot's goal within its window, or the goal's default reward when the window closes without one. Time is log time, so a
replay closes every window between the same two records. Windows that a record's time closes are closed before the
record takes effect, in the order of close time, LSN, slot. It never reads a clock, and of the log only what lies before
the record at hand.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from server.catalog.catalog import Catalog, Goal
from server.storage.log import Log
from server.storage.record import Record
from tsugi.log.v1.learner_pb2 import OpenRewards
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, RecordKind, SlotRecord
from tsugi.v1.catalog_pb2 import Action as ActionMessage

# Some 0.8 kB each. When full, new decisions are not learned from: those already open run their whole window, so that
# what is learned stays a fair sample; giving up the oldest would forget silence and keep success.
OPEN_DECISIONS_MAX: Final = 1_000_000
# Another worker's commit may put a decision after its first outcome, by milliseconds, or seconds when a disk stalls.
PARKED_WAIT_US: Final = 60_000_000
PARKED_MAX: Final = 100_000
# A slot that counts from its first outcome is given up after its goal's window without one, but not before this.
UNSEEN_WAIT_US_MIN: Final = 600_000_000
QUARANTINED_MAX: Final = 10_000

# An enum's member is looked up by a slow path at each use, and this is for every record.
_DECISION: Final = RecordKind.RECORD_KIND_DECISION
_OUTCOME: Final = RecordKind.RECORD_KIND_OUTCOME
_READ_TOGETHER = 128
_COUNTS = 1  # the bits of OpenRewards.slot_flags
_SETTLED = 2


class TooManyQuarantinedError(Exception):
    """More records could not be learned from than can be an accident; somebody must look."""


@dataclass(slots=True)
class Counts:
    """What became of everything, since the log began."""

    learned: int = 0  # slots settled by an outcome
    silent: int = 0  # slots whose window closed: the default reward was learned
    late: int = 0  # outcomes whose slot was closed or given up; not learned
    orphaned: int = 0  # outcomes whose decision, or whose action in it, was never recorded; not learned
    unseen: int = 0  # slots given up because no outcome said that they were seen; not learned
    overflowed: int = 0  # decisions not opened because too many were open; not learned
    quarantined: int = 0  # records that are not what they should be; not learned


class Lesson(NamedTuple):
    """One row to learn from."""

    goal: Goal  # under the catalog the decision was made with
    action: str
    names: tuple[str, ...]  # of the features
    features: bytes  # float32[d], as the decision recorded them
    prior_log_odds: float
    reward: float  # 0..1
    selection_probability: float = 1.0  # of the choice, as the decision recorded it
    taught: float | None = None  # the reward that was taught for it before, and that this one replaces; None: none


class Terms(NamedTuple):
    """What a catalog says about rewards; little, so that large catalogs need not stay in memory."""

    goals: dict[str, Goal]  # by name
    names: tuple[str, ...]  # of the learned features
    actions: dict[str, tuple[str, ...]]  # what each has in common with others, see Space


def terms_of(catalog: Catalog) -> Terms:
    """Return what a catalog says about rewards."""
    goals = {goal.name: goal for goal in catalog.goals}
    return Terms(goals, catalog.learned.names, {action.name: _tokens(action) for action in catalog.message.actions})


def _tokens(action: ActionMessage) -> tuple[str, ...]:
    """Return the group of an action, and its facts that are texts or true."""
    facts = sorted(action.attributes.items())
    return (
        *([f"group={action.group}"] if action.group else []),
        *(f"{name}={value}" for name, value in facts if isinstance(value, str)),
        *(name for name, value in facts if value is True),
    )


class _Slot:
    """One filled slot of an open decision."""

    __slots__ = ("action", "close_us", "goal", "is_counting", "is_settled", "prior_log_odds", "selection_probability")

    def __init__(self, slot: SlotRecord, goal: Goal, time_us: int) -> None:
        self.action = slot.action
        self.goal = goal
        self.prior_log_odds = slot.prior_log_odds
        self.selection_probability = slot.selection_probability
        self.is_counting = not slot.on_impression
        self.is_settled = False
        # While the slot does not count: when it is given up.
        self.close_us = time_us + (goal.window_us if self.is_counting else max(goal.window_us, UNSEEN_WAIT_US_MIN))


class _Decision:
    """One decision with a slot whose close time has not come."""

    __slots__ = ("features", "key", "lsn", "n_open", "slots", "terms")

    def __init__(self, lsn: int, decision: DecisionRecord, terms: Terms, slots: list[_Slot]) -> None:
        self.lsn = lsn
        self.key = decision.decision_key
        self.features = decision.learned_features
        self.terms = terms
        self.slots = slots
        self.n_open = len(slots)


class _NotApplicableError(Exception):
    """One record cannot be learned from; the others can."""


class Rewards:
    """The join's whole state.

    Args:
        log: a decision's record is found by its decision key.
        find_terms: gives the terms of the catalog with a sha256; called for every decision.
        learn: told of each row, once, in order.
        open_decisions_max: see OPEN_DECISIONS_MAX.
    """

    def __init__(
        self,
        log: Log,
        find_terms: Callable[[bytes], Terms],
        learn: Callable[[Lesson], None],
        open_decisions_max: int = OPEN_DECISIONS_MAX,
    ) -> None:
        self.counts = Counts()
        self._log = log
        self._find_terms = find_terms
        self._learn = learn
        self._open_decisions_max = open_decisions_max
        self._open: dict[bytes, _Decision] = {}  # by decision key, in order of LSN
        self._closings: list[tuple[int, int, int, bytes]] = []  # heap of close time, LSN, slot; decision key
        self._parked: OrderedDict[int, tuple[int, OutcomeRecord]] = OrderedDict()  # by LSN: log time, outcome
        self._parked_by_key: dict[bytes, list[int]] = {}

    def apply(self, record: Record) -> None:
        """Take in the next record of the log.

        Raises:
            TooManyQuarantinedError: see there.
            BlobError: the catalog that a decision names cannot be had.

        Cost: about 10 µs beyond what is learned; none to speak of for kinds that are not needed.
        """
        self._close_until(record.time_us)
        if record.is_tombstone:
            return
        try:
            if record.kind == _DECISION:
                self._decided(record)
            elif record.kind == _OUTCOME:
                self._happened(record)
        except (DecodeError, _NotApplicableError) as error:
            self.counts.quarantined += 1
            if self.counts.quarantined > QUARANTINED_MAX:
                raise TooManyQuarantinedError(f"{QUARANTINED_MAX} records set aside, the last: {error}") from error

    @property
    def n_open(self) -> int:
        """Number of decisions that outcomes may still reach."""
        return len(self._open)

    @property
    def n_parked(self) -> int:
        """Number of outcomes that wait for their decision."""
        return len(self._parked)

    def save(self) -> tuple[OpenRewards, list[int], list[int]]:
        """Return the state for a snapshot: open rewards, LSNs of parked outcomes, counts. Cost: 0.3 µs a decision."""
        decisions = list(self._open.values())
        slots = [slot for decision in decisions for slot in decision.slots]
        flags = [_COUNTS * slot.is_counting + _SETTLED * slot.is_settled for slot in slots]
        columns = OpenRewards(
            decision_lsns=np.array([decision.lsn for decision in decisions], "<u8").tobytes(),
            slot_counts=np.array([len(decision.slots) for decision in decisions], "<u2").tobytes(),
            slot_flags=bytes(flags),
            slot_close_times_us=np.array([slot.close_us for slot in slots], "<i8").tobytes(),
        )
        return columns, list(self._parked), list(astuple(self.counts))

    def load(self, columns: OpenRewards, parked_lsns: Sequence[int], counts: Sequence[int], time_us: int) -> None:
        """Take over a saved state; all else about a decision is read from its log record again.

        Args:
            columns: as saved.
            parked_lsns: as saved.
            counts: as saved.
            time_us: log time of the last record the state includes.

        Cost: about 15 µs a decision where many lie close together in the log, some 50 µs where they do not.
        """
        self.counts = Counts(*counts)
        slot_counts = np.frombuffer(columns.slot_counts, "<u2").tolist()
        flags = iter(columns.slot_flags)
        close_times_us = iter(np.frombuffer(columns.slot_close_times_us, "<i8").tolist())
        records = self._read_again(np.frombuffer(columns.decision_lsns, "<u8").tolist())
        for record, n_slots in zip(records, slot_counts, strict=True):
            states = [(next(flags), next(close_times_us)) for _ in range(n_slots)]
            if not record.is_tombstone:
                self._reopen(record, states, time_us)
        heapq.heapify(self._closings)
        for record in self._read_again(parked_lsns):
            if not record.is_tombstone:
                self._park(record, OutcomeRecord.FromString(record.payload))

    def _decided(self, record: Record) -> None:
        decision = DecisionRecord.FromString(record.payload)
        if len(self._open) >= self._open_decisions_max:
            self.counts.overflowed += 1
            return
        if decision.decision_key in self._open:
            raise _NotApplicableError(f"decision {record.lsn} has the key of an earlier one")
        opened = self._make(record, decision)
        if opened is None:
            return
        self._open[opened.key] = opened
        for position, slot in enumerate(opened.slots):
            heapq.heappush(self._closings, (slot.close_us, opened.lsn, position, opened.key))
        for lsn in self._parked_by_key.pop(opened.key, ()):
            _, outcome = self._parked.pop(lsn)
            self._apply_outcome(opened, outcome, record.time_us)

    def _happened(self, record: Record) -> None:
        outcome = OutcomeRecord.FromString(record.payload)
        decision = self._open.get(outcome.decision_key)
        if decision is not None:
            self._apply_outcome(decision, outcome, record.time_us)
            return
        # The log read now may hold more than it did when a first run stood here: LSNs decide, not what is there by now.
        entry = self._log.find(outcome.decision_key)
        if entry is not None and entry.lsn < record.lsn:
            self.counts.late += 1
        elif len(self._parked) >= PARKED_MAX:
            self.counts.orphaned += 1
        else:
            self._park(record, outcome)

    def _apply_outcome(self, decision: _Decision, outcome: OutcomeRecord, time_us: int) -> None:
        is_known = False
        for position, slot in enumerate(decision.slots):
            if slot.action != outcome.action:
                continue
            is_known = True
            if slot.close_us <= time_us:
                self.counts.late += 1
                continue
            reward = slot.goal.rewards.get(outcome.type)
            if reward is None:
                if not slot.is_counting:
                    slot.is_counting = True
                    self._close_at(time_us + slot.goal.window_us, decision, position)
            elif not slot.is_settled:
                slot.is_counting = slot.is_settled = True
                self.counts.learned += 1
                self._teach(decision, slot, reward)
        if not is_known:
            self.counts.orphaned += 1

    def _close_until(self, time_us: int) -> None:
        closings = self._closings
        while closings and closings[0][0] <= time_us:
            close_us, _, position, key = heapq.heappop(closings)
            decision = self._open.get(key)
            if decision is None or decision.slots[position].close_us != close_us:
                continue  # the slot began to count meanwhile, and has another close time
            slot = decision.slots[position]
            decision.n_open -= 1
            if decision.n_open == 0:
                del self._open[key]
            if slot.is_settled:
                continue
            if slot.is_counting:
                self.counts.silent += 1
                self._teach(decision, slot, slot.goal.default_reward)
            else:
                self.counts.unseen += 1
        while self._parked:
            lsn, (parked_us, outcome) = next(iter(self._parked.items()))
            if parked_us + PARKED_WAIT_US > time_us:
                break
            del self._parked[lsn]
            waiting = self._parked_by_key[outcome.decision_key]
            waiting.remove(lsn)
            if not waiting:
                del self._parked_by_key[outcome.decision_key]
            self.counts.orphaned += 1

    def _close_at(self, close_us: int, decision: _Decision, position: int) -> None:
        """Move a slot's close time; its old entry in the heap is passed over when it comes up."""
        slot = decision.slots[position]
        if close_us != slot.close_us:
            slot.close_us = close_us
            heapq.heappush(self._closings, (close_us, decision.lsn, position, decision.key))

    def _teach(self, decision: _Decision, slot: _Slot, reward: float) -> None:
        names, prior, chance = decision.terms.names, slot.prior_log_odds, slot.selection_probability
        self._learn(Lesson(slot.goal, slot.action, names, decision.features, prior, reward, chance))

    def _make(self, record: Record, decision: DecisionRecord) -> _Decision | None:
        """Build a decision's open form, None when it filled no slot."""
        terms = self._find_terms(decision.provenance.catalog_sha256)
        if len(decision.learned_features) != 4 * len(terms.names):
            raise _NotApplicableError(f"decision {record.lsn} has not the features its catalog names")
        slots = []
        for slot in decision.slots:
            if slot.action:
                goal = terms.goals.get(slot.goal)
                if goal is None:
                    raise _NotApplicableError(f"decision {record.lsn} is for a goal its catalog does not name")
                slots.append(_Slot(slot, goal, record.time_us))
        return _Decision(record.lsn, decision, terms, slots) if slots else None

    def _reopen(self, record: Record, states: list[tuple[int, int]], time_us: int) -> None:
        opened = self._make(record, DecisionRecord.FromString(record.payload))
        assert opened is not None, "only decisions with slots are saved"
        for position, (slot, (flags, close_us)) in enumerate(zip(opened.slots, states, strict=True)):
            slot.is_counting = bool(flags & _COUNTS)
            slot.is_settled = bool(flags & _SETTLED)
            slot.close_us = close_us
            if close_us <= time_us:
                opened.n_open -= 1
            else:
                self._closings.append((close_us, opened.lsn, position, opened.key))
        self._open[opened.key] = opened

    def _read_again(self, lsns: Sequence[int]) -> Iterator[Record]:
        """Yield the records with these LSNs, ascending; neighbours are read together."""
        for first in range(0, len(lsns), _READ_TOGETHER):
            group = lsns[first : first + _READ_TOGETHER]
            span = group[-1] - group[0] + 1
            if span <= 4 * len(group):
                wanted = set(group)
                yield from (record for record in self._log.read(group[0], span) if record.lsn in wanted)
            else:
                for lsn in group:
                    record = self._log.get(lsn)
                    assert record is not None, "the snapshot's chain proves that the log holds all before it"
                    yield record

    def _park(self, record: Record, outcome: OutcomeRecord) -> None:
        self._parked[record.lsn] = (record.time_us, outcome)
        self._parked_by_key.setdefault(outcome.decision_key, []).append(record.lsn)
