"""Which reward did each decision earn? Joins decisions with their outcomes, and with silence, into rows to learn from.

Handed log records in LSN order, it teaches what each filled slot earns for each of its goals: the reward of the
outcomes that arrive within the goal's window, at once, or the goal's default reward when the window closes without one.
Each is taught for the first time exactly once; when a later outcome, or one that is taken back, changes the reward, a
lesson says what was taught before, and replaces it. Time is log time, so a replay closes every window between the same
two records. Windows that a record's time closes are closed before the record takes effect, in the order of close time,
LSN, slot. It never reads a clock, and of the log only what lies before the record at hand.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from server.catalog.catalog import Catalog, Goal
from server.storage.log import Log
from server.storage.record import Record
from training.earning import CLOSED, OPEN, OVER, UNSEEN, Earning, OpenDecision, State, columns_of, states_of
from training.flow import Flow
from training.influence import Influence
from training.pending import Pending
from tsugi.log.v1.learner_pb2 import GoalFlow, InfluenceState, OpenRewards
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, RecordKind
from tsugi.v1.catalog_pb2 import Action as ActionMessage

# Some 0.8 kB each. When full, new decisions are not learned from: those already open run their whole window, so that
# what is learned stays a fair sample; giving up the oldest would forget silence and keep success.
OPEN_DECISIONS_MAX: Final = 1_000_000
# Another worker's commit may put a decision after its first outcome, by milliseconds, or seconds when a disk stalls.
PARKED_WAIT_US: Final = 60_000_000
PARKED_MAX: Final = 100_000  # also of revocations that wait for their outcome
# A slot that counts from its first outcome is given up after its goal's window without one, but not before this.
UNSEEN_WAIT_US_MIN: Final = 600_000_000
QUARANTINED_MAX: Final = 10_000

# An enum's member is looked up by a slow path at each use, and this is for every record.
_DECISION: Final = RecordKind.RECORD_KIND_DECISION
_OUTCOME: Final = RecordKind.RECORD_KIND_OUTCOME
_READ_TOGETHER = 128
_KEY_BYTES = 16


class TooManyQuarantinedError(Exception):
    """More records could not be learned from than can be an accident; somebody must look."""


@dataclass(slots=True)
class Counts:
    """What became of everything, since the log began. What a slot earns is counted once for each of its goals."""

    learned: int = 0  # settled by an outcome
    silent: int = 0  # windows closed without one: the default reward was learned
    late: int = 0  # outcomes and revocations that came when nothing of their slot was open to them; not learned
    orphaned: int = 0  # outcomes whose decision or action, revocations whose outcome was never recorded; not learned
    unseen: int = 0  # given up because no outcome said that the slot was seen; not learned
    overflowed: int = 0  # decisions not opened because too many were open; not learned
    quarantined: int = 0  # records that are not what they should be; not learned
    revoked: int = 0  # outcomes that were taken back
    corrected: int = 0  # times that something taught was replaced
    moot: int = 0  # revocations of what did not count, or no longer
    withheld: int = 0  # windows that overlap a time in which outcomes were held to be stopped; not learned
    capped: int = 0  # slots whose reporter had its share of influence; not learned


class Lesson(NamedTuple):
    """One row to learn from."""

    goal: Goal  # as now defined
    action: str
    names: tuple[str, ...]  # of the features
    features: bytes  # float32[d], as the decision recorded them
    prior_log_odds: float
    reward: float  # 0..1
    selection_probability: float = 1.0  # of the choice, as the decision recorded it
    taught: float | None = None  # the reward that was taught for it before, and that this one replaces; None: none
    general_propensity: float = 0.0  # before the person's own history counted; 0: not recorded
    # Of the person: expected and observed with the action, and with its group.
    history: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    row: int = 0  # of what was taught: the number that whoever learned it gave it; 0: none


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


class _Parked(NamedTuple):
    """An outcome that came before its decision."""

    time_us: int
    key: bytes
    outcome: OutcomeRecord


class _NotApplicableError(Exception):
    """One record cannot be learned from; the others can."""


class Rewards:
    """The join's whole state.

    Args:
        log: a decision's record is found by its decision key, a revoked outcome's by its own.
        find_terms: gives the terms of the catalog with a sha256; called for every decision.
        learn: told of each row, in order; gives a row that is new a number, and is told of it with what replaces it.
        goals: what goals mean, by name, whatever the decision's own catalog said; of others, that one says it.
        open_decisions_max: see OPEN_DECISIONS_MAX.

    Attributes:
        counts: what became of everything.
        pending: of each goal what silences are still to come.
    """

    def __init__(
        self,
        log: Log,
        find_terms: Callable[[bytes], Terms],
        learn: Callable[[Lesson], int | None],
        open_decisions_max: int = OPEN_DECISIONS_MAX,
        goals: Mapping[str, Goal] | None = None,
    ) -> None:
        self.counts = Counts()
        self.pending: dict[str, Pending] = {}
        self._log = log
        self._find_terms = find_terms
        self._learn = learn
        self._open_decisions_max = open_decisions_max
        self._goals = goals if goals is not None else {}
        self._open: dict[bytes, OpenDecision] = {}  # by decision key, in order of LSN
        self._endings: list[tuple[int, int, int, bytes]] = []  # heap of until_us, LSN, earning; decision key
        self._parked: OrderedDict[int, _Parked] = OrderedDict()  # by LSN
        self._parked_by_key: dict[bytes, list[int]] = {}
        self._n_waiting = 0  # revocations, in all decisions
        self._flows: dict[str, Flow] = {}  # by goal
        self._influences: dict[tuple[str, str], Influence] = {}  # by goal and action, of goals that bound it

    def apply(self, record: Record) -> None:
        """Take in the next record of the log.

        Raises:
            TooManyQuarantinedError: see there.
            BlobError: the catalog that a decision names cannot be had.

        Cost: about 10 µs beyond what is learned; none to speak of for kinds that are not needed.
        """
        self._pass_time(record.time_us)
        if record.is_tombstone:
            return
        try:
            if record.kind == _DECISION:
                self._decided(record)
            elif record.kind == _OUTCOME:
                self._happened(record)
        except (DecodeError, _NotApplicableError) as error:
            self.set_aside(error)

    def set_aside(self, error: Exception) -> None:
        """Count a record that nothing can be made of, of whatever kind.

        Raises:
            TooManyQuarantinedError: see there.
        """
        self.counts.quarantined += 1
        if self.counts.quarantined > QUARANTINED_MAX:
            raise TooManyQuarantinedError(f"{QUARANTINED_MAX} records set aside, the last: {error}") from error

    @property
    def stopped(self) -> list[str]:
        """Goals whose outcomes are held to have stopped arriving."""
        return [goal for goal, flow in self._flows.items() if flow.is_stopped]

    @property
    def n_open(self) -> int:
        """Number of decisions that outcomes, or revocations of them, may still reach."""
        return len(self._open)

    @property
    def n_parked(self) -> int:
        """Number of outcomes that wait for their decision, and of revocations that wait for their outcome."""
        return len(self._parked) + self._n_waiting

    def save(self) -> tuple[OpenRewards, list[int], list[int], list[GoalFlow]]:
        """Return the state for a snapshot: open rewards, LSNs of parked outcomes, counts, flows.

        Cost: 0.6 µs a decision.
        """
        flows = [flow.save(goal) for goal, flow in sorted(self._flows.items())]
        return columns_of(self._open.values()), list(self._parked), list(astuple(self.counts)), flows

    def load(
        self,
        columns: OpenRewards,
        parked_lsns: Sequence[int],
        counts: Sequence[int],
        flows: Iterable[GoalFlow],
    ) -> None:
        """Take over a saved state; all else about a decision is read from its log record again.

        Args:
            columns: as saved.
            parked_lsns: as saved.
            counts: as saved.
            flows: as saved.

        Cost: about 15 µs a decision where many lie close together in the log, some 50 µs where they do not.
        """
        self.counts = Counts(*counts)
        for saved in flows:
            self._flow(saved.goal).load(saved)
        earning_counts = np.frombuffer(columns.slot_counts, "<u2").tolist()
        states = states_of(columns)
        records = self._read_again(np.frombuffer(columns.decision_lsns, "<u8").tolist())
        for record, n_earnings in zip(records, earning_counts, strict=True):
            own = [next(states) for _ in range(n_earnings)]
            if not record.is_tombstone:
                self._reopen(record, own)
        heapq.heapify(self._endings)
        for record in self._read_again(np.frombuffer(columns.revocation_lsns, "<u8").tolist()):
            if not record.is_tombstone:
                revocation = OutcomeRecord.FromString(record.payload)
                decision = self._open.get(revocation.decision_key)
                if decision is not None:
                    self._wait(decision, record.lsn, revocation)
        for record in self._read_again(parked_lsns):
            if not record.is_tombstone:
                self._park(record, OutcomeRecord.FromString(record.payload))

    def save_influences(self) -> list[InfluenceState]:
        """Return who had how much influence, for a snapshot."""
        return [influence.save(*key) for key, influence in sorted(self._influences.items(), key=lambda each: each[0])]

    def load_influences(self, states: Iterable[InfluenceState]) -> None:
        """Take that over from a snapshot."""
        for state in states:
            influence = self._influences[state.goal, state.action] = Influence()
            influence.load(state)

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
        for place, earning in enumerate(opened.earnings):
            heapq.heappush(self._endings, (earning.until_us, opened.lsn, place, opened.key))
            if earning.phase == OPEN:
                self._pending(earning).open()
        for lsn in self._parked_by_key.pop(opened.key, ()):
            parked = self._parked.pop(lsn)
            self._apply_outcome(opened, lsn, parked.key, parked.outcome, record.time_us)

    def _happened(self, record: Record) -> None:
        outcome = OutcomeRecord.FromString(record.payload)
        if len(outcome.revoked_key) not in (0, _KEY_BYTES):
            raise _NotApplicableError(f"outcome {record.lsn} takes back what has no key")
        decision = self._open.get(outcome.decision_key)
        if decision is not None:
            self._apply_outcome(decision, record.lsn, record.key, outcome, record.time_us)
            return
        # The log read now may hold more than it did when a first run stood here: LSNs decide, not what is there by now.
        entry = self._log.find(outcome.decision_key)
        if entry is not None and entry.lsn < record.lsn:
            self.counts.late += 1
        elif len(self._parked) >= PARKED_MAX:
            self.counts.orphaned += 1
        else:
            self._park(record, outcome)

    def _apply_outcome(
        self, decision: OpenDecision, lsn: int, key: bytes, outcome: OutcomeRecord, time_us: int
    ) -> None:
        """Let an outcome take effect on what its slot earns."""
        if outcome.revoked_key:
            self._take_back(decision, lsn, outcome)
            return
        action, is_known, is_late = outcome.action, False, True
        is_taken_back = bool(decision.waiting) and self._was_taken_back(decision, key, action)
        for place, earning in enumerate(decision.earnings):
            if earning.action != action:
                continue
            is_known = True
            if earning.phase > OPEN:
                continue
            is_late = False
            if earning.phase == UNSEEN:
                earning.phase = OPEN
                self._pending(earning).open()
                self._end_at(time_us + earning.goal.window_us, decision, place)
            reward = earning.goal.rewards.get(outcome.type)
            if reward is not None:
                if not is_taken_back and not self._may_teach(earning, outcome.reporter):
                    self._give_up(decision, earning, time_us)
                    continue
                self._count(decision, earning, lsn, None if is_taken_back else reward, time_us)
        if not is_known:
            self.counts.orphaned += 1
        elif is_late:
            self.counts.late += 1

    def _count(self, decision: OpenDecision, earning: Earning, lsn: int, reward: float | None, time_us: int) -> None:
        """Let a settling outcome count, or only show that outcomes arrive when it was taken back before (None)."""
        flow = self._flow(earning.goal.name)
        flow.arrive(time_us)
        if reward is None:
            return
        is_first = earning.taught is None and not earning.counted
        earning.count(lsn, reward)
        if earning.taught is not None:
            self._correct(decision, earning)
        elif is_first and flow.is_trusted(earning.until_us - earning.goal.window_us):
            flow.settle()
            self.counts.learned += 1
            self._teach(decision, earning)

    def _may_teach(self, earning: Earning, reporter: str) -> bool:
        """Say whether a reporter's outcome still counts; only a slot's first one is asked about."""
        goal = earning.goal
        if goal.influence_max >= 1.0 or earning.taught is not None:
            return True
        influence = self._influences.setdefault((goal.name, earning.action), Influence())
        return influence.admit(reporter, goal.influence_max)

    def _give_up(self, decision: OpenDecision, earning: Earning, time_us: int) -> None:
        """Learn nothing from a slot: neither what was reported, which counts no more, nor silence, which it was not."""
        self.counts.capped += 1
        self._pending(earning).close(None)
        earning.phase, earning.until_us, earning.counted = OVER, time_us, ()
        decision.n_open -= 1
        if decision.n_open == 0:
            self._forget(decision)

    def _take_back(self, decision: OpenDecision, lsn: int, revocation: OutcomeRecord) -> None:
        """Let an outcome count no longer; wait for it when it is not there yet."""
        earnings = [earning for earning in decision.earnings if earning.action == revocation.action]
        if not earnings:
            self.counts.orphaned += 1
            return
        if all(earning.phase == OVER for earning in earnings):
            self.counts.late += 1
            return
        entry = self._log.find(revocation.revoked_key)
        if entry is None or entry.lsn >= lsn:
            self._wait(decision, lsn, revocation)
            return
        taken = [earning for earning in earnings if earning.take_back(entry.lsn)]
        if taken:
            self.counts.revoked += 1
        elif any(earning.phase == OVER for earning in earnings):
            self.counts.late += 1
        else:
            self.counts.moot += 1
        for earning in taken:
            # While the window is open, another outcome or its close says what comes in the place of nothing.
            if earning.taught is not None and (earning.counted or earning.phase == CLOSED):
                self._correct(decision, earning)

    def _wait(self, decision: OpenDecision, lsn: int, revocation: OutcomeRecord) -> None:
        """Keep a revocation until its outcome comes, or nothing can reach the decision any more."""
        if decision.waiting is None:
            decision.waiting = {}
        revoked = (revocation.revoked_key, revocation.action)
        if revoked in decision.waiting:
            self.counts.moot += 1
        elif self._n_waiting >= PARKED_MAX:
            self.counts.orphaned += 1
        else:
            decision.waiting[revoked] = lsn
            self._n_waiting += 1

    def _was_taken_back(self, decision: OpenDecision, key: bytes, action: str) -> bool:
        """Say whether an outcome that comes now was taken back before."""
        if not decision.waiting or decision.waiting.pop((key, action), None) is None:
            return False
        self._n_waiting -= 1
        self.counts.revoked += 1
        return True

    def _pass_time(self, time_us: int) -> None:
        endings = self._endings
        while endings and endings[0][0] <= time_us:
            until_us, _, place, key = heapq.heappop(endings)
            decision = self._open.get(key)
            if decision is None or decision.earnings[place].until_us != until_us:
                continue  # the slot began to count meanwhile, and its phase ends at another time
            earning = decision.earnings[place]
            if earning.phase == OPEN:
                self._close(decision, earning, place)
            elif earning.phase < OVER:
                self.counts.unseen += earning.phase == UNSEEN
                earning.phase = OVER
            if earning.phase == OVER:
                earning.counted = ()
                decision.n_open -= 1
                if decision.n_open == 0:
                    self._forget(decision)
        while self._parked:
            lsn, parked = next(iter(self._parked.items()))
            if parked.time_us + PARKED_WAIT_US > time_us:
                break
            del self._parked[lsn]
            waiting = self._parked_by_key[parked.outcome.decision_key]
            waiting.remove(lsn)
            if not waiting:
                del self._parked_by_key[parked.outcome.decision_key]
            self.counts.orphaned += 1

    def _close(self, decision: OpenDecision, earning: Earning, place: int) -> None:
        """End a window: without an outcome, silence is what is learned."""
        goal, is_silent = earning.goal, not earning.counted
        began_us = earning.until_us - goal.window_us
        flow = self._flow(goal.name)
        if flow.is_trusted(began_us):
            flow.close(began_us, is_silent=earning.taught is None)
        self._pending(earning).close(earning.taught)
        earning.phase = OVER  # of silence there is nothing to take back
        if earning.taught is not None:
            if is_silent:
                self._correct(decision, earning)
        elif not is_silent or not flow.is_trusted(began_us):
            self.counts.withheld += 1
            return
        else:
            self.counts.silent += 1
            self._teach(decision, earning)
        if not is_silent and goal.late_limit_us:
            earning.phase = CLOSED
            self._end_at(earning.until_us + goal.late_limit_us, decision, place)

    def _forget(self, decision: OpenDecision) -> None:
        del self._open[decision.key]
        if decision.waiting:
            self.counts.orphaned += len(decision.waiting)
            self._n_waiting -= len(decision.waiting)

    def _end_at(self, until_us: int, decision: OpenDecision, place: int) -> None:
        """Move the end of a phase; its old entry in the heap is passed over when it comes up."""
        earning = decision.earnings[place]
        if until_us != earning.until_us:
            earning.until_us = until_us
            heapq.heappush(self._endings, (until_us, decision.lsn, place, decision.key))

    def _correct(self, decision: OpenDecision, earning: Earning) -> None:
        if earning.reward() != earning.taught:
            self.counts.corrected += 1
            self._teach(decision, earning)

    def _teach(self, decision: OpenDecision, earning: Earning) -> None:
        reward = earning.reward()
        if earning.phase == OPEN:
            self._pending(earning).settle(reward, earning.taught)
        row = self._learn(
            Lesson(
                earning.goal,
                earning.action,
                decision.names,
                decision.features,
                earning.prior_log_odds,
                reward,
                earning.selection_probability,
                earning.taught,
                earning.general_propensity,
                earning.history,
                earning.row,
            )
        )
        if earning.taught is None:
            earning.row = row or 0
        earning.taught = reward

    def _pending(self, earning: Earning) -> Pending:
        pending = self.pending.get(earning.goal.name)
        if pending is None:
            pending = self.pending[earning.goal.name] = Pending()
        return pending

    def _flow(self, goal: str) -> Flow:
        flow = self._flows.get(goal)
        if flow is None:
            flow = self._flows[goal] = Flow()
        return flow

    def _make(self, record: Record, decision: DecisionRecord) -> OpenDecision | None:
        """Build a decision's open form, None when it filled no slot."""
        terms = self._find_terms(decision.provenance.catalog_sha256)
        if len(decision.learned_features) != 4 * len(terms.names):
            raise _NotApplicableError(f"decision {record.lsn} has not the features its catalog names")
        earnings = []
        for slot in decision.slots:
            if slot.action:
                priors = [(slot.goal, slot.prior_log_odds)]
                if slot.other_goals:
                    priors += [(other.goal, other.prior_log_odds) for other in slot.other_goals]
                for name, prior_log_odds in priors:
                    own = terms.goals.get(name)
                    if own is None:
                        raise _NotApplicableError(f"decision {record.lsn} is for a goal its catalog does not name")
                    goal = self._goals.get(name, own)
                    earning = Earning(slot, goal, _as_now(prior_log_odds, own, goal))
                    is_seen = earning.phase == OPEN
                    wait_us = goal.window_us if is_seen else max(goal.window_us, UNSEEN_WAIT_US_MIN)
                    earning.until_us = record.time_us + wait_us
                    earnings.append(earning)
        return OpenDecision(record.lsn, decision, terms.names, earnings) if earnings else None

    def _reopen(self, record: Record, states: list[State]) -> None:
        opened = self._make(record, DecisionRecord.FromString(record.payload))
        assert opened is not None, "only decisions with slots are saved"
        for place, (earning, state) in enumerate(zip(opened.earnings, states, strict=True)):
            earning.phase, earning.until_us, earning.taught, earning.row, earning.counted = state
            if earning.phase == OPEN:
                self._pending(earning).open(earning.taught)
            if earning.phase == OVER:
                opened.n_open -= 1
            else:
                self._endings.append((earning.until_us, opened.lsn, place, opened.key))
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
        self._parked[record.lsn] = _Parked(record.time_us, record.key, outcome)
        self._parked_by_key.setdefault(outcome.decision_key, []).append(record.lsn)


def _as_now(prior_log_odds: float, then: Goal, now: Goal) -> float:
    """Return a recorded prior; where it was the base rate, that of now, which decisions are scored with from now on."""
    if then.base_log_odds != now.base_log_odds and prior_log_odds == np.float32(then.base_log_odds):
        return float(np.float32(now.base_log_odds))
    return prior_log_odds
