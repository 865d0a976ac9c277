"""What one slot earns for one goal: the outcomes that count, and the reward they come to.

Told of outcomes in the order of the log, it keeps those that count and gives the reward by the goal's settling. An
outcome that was taken back leaves as if it had never been. Beside it the decisions that have such slots, and how they
are kept in a snapshot. It teaches nothing and knows no time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import Goal
from tsugi.log.v1.learner_pb2 import OpenRewards
from tsugi.log.v1.record_pb2 import DecisionRecord, SlotRecord
from tsugi.v1 import catalog_pb2

# Enough for what one person does after one decision; ten times as many would make a snapshot slow.
OUTCOMES_MAX: Final = 16
SEVERAL_LSN: Final = 0  # of the sum of several outcomes, which cannot be told apart any more

# The phases of an earning. Numbers, because snapshots hold them and enums are slow.
UNSEEN: Final = 0  # it counts from its first outcome on
OPEN: Final = 1  # outcomes count
CLOSED: Final = 2  # those that counted can be taken back
OVER: Final = 3


class Counted(NamedTuple):
    """An outcome that counts."""

    lsn: int
    reward: float


NO_HISTORY: Final = (0.0, 0.0, 0.0, 0.0)


def history_of(slot: SlotRecord) -> tuple[float, float, float, float]:
    """Return what a slot's record says of the person's own history, see Lesson."""
    said = slot.history
    return said.expected, said.observed, said.group_expected, said.group_observed


class Earning:
    """What one slot earns for one goal.

    Attributes:
        action: of the slot.
        goal: as now defined.
        prior_log_odds: of the action for that goal.
        selection_probability: of the action.
        general_propensity: see Lesson; of the slot's first goal alone, as is the next.
        history: see Lesson.
        phase: UNSEEN, OPEN, CLOSED or OVER.
        until_us: log time at which the phase ends, or ended when OVER.
        taught: the reward that was taught last; None: none yet.
        row: which one of its goal it was when it was taught first, from 1; 0: it was not, or nobody learned it.
        counted: outcomes that count, by LSN ascending, at most OUTCOMES_MAX.
    """

    __slots__ = (
        "action", "counted", "general_propensity", "goal", "history", "phase", "prior_log_odds", "row",
        "selection_probability", "taught", "until_us",
    )  # fmt: skip

    def __init__(self, slot: SlotRecord, goal: Goal, prior_log_odds: float) -> None:
        self.action = slot.action
        self.goal = goal
        self.prior_log_odds = prior_log_odds
        self.selection_probability = slot.selection_probability
        is_first = slot.goal == goal.name
        self.general_propensity = slot.general_propensity if is_first else 0.0
        self.history = history_of(slot) if is_first and slot.HasField("history") else NO_HISTORY
        self.phase = UNSEEN if slot.on_impression else OPEN
        self.until_us = 0
        self.taught: float | None = None
        self.row = 0
        self.counted: Sequence[Counted] = ()

    def count(self, lsn: int, reward: float) -> None:
        """Let an outcome count that is later than all before.

        When there are OUTCOMES_MAX already, the first ones stand where the first counts, the last ones where the last,
        the greatest where the greatest; of a sum the two oldest become one, which cannot be taken back. So the reward
        is exact unless that many are taken back.
        """
        counted = [*self.counted, Counted(lsn, reward)]
        if len(counted) > OUTCOMES_MAX:
            match self.goal.settling:
                case catalog_pb2.SETTLING_LAST:
                    del counted[0]
                case catalog_pb2.SETTLING_SUM:
                    counted[:2] = [Counted(SEVERAL_LSN, counted[0].reward + counted[1].reward)]
                case catalog_pb2.SETTLING_MAX:
                    counted.remove(min(counted, key=lambda each: (each.reward, -each.lsn)))
                case _:
                    del counted[-1]
        self.counted = counted

    def take_back(self, lsn: int) -> bool:
        """Let an outcome count no longer; say whether it did."""
        left = [each for each in self.counted if each.lsn != lsn]
        is_counted = len(left) < len(self.counted)
        self.counted = left
        return is_counted

    def reward(self) -> float:
        """Return what the outcomes that count come to, or the default reward when there are none. 0..1."""
        counted = self.counted
        if not counted:
            return self.goal.default_reward
        match self.goal.settling:
            case catalog_pb2.SETTLING_LAST:
                return counted[-1].reward
            case catalog_pb2.SETTLING_SUM:
                return min(1.0, sum(each.reward for each in counted))
            case catalog_pb2.SETTLING_MAX:
                return max(each.reward for each in counted)
            case _:
                return counted[0].reward


class OpenDecision:
    """One decision that something may still reach.

    Attributes:
        lsn: its place in the log.
        key: its decision key.
        features: float32[d], as it recorded them.
        names: of the features.
        earnings: of each filled slot one for each goal, in the order of slots.
        n_open: number of those that are not OVER.
        waiting: LSNs of revocations, by the key and action of the outcome they take back; None: none.
    """

    __slots__ = ("earnings", "features", "key", "lsn", "n_open", "names", "waiting")

    def __init__(self, lsn: int, decision: DecisionRecord, names: tuple[str, ...], earnings: list[Earning]) -> None:
        self.lsn = lsn
        self.key = decision.decision_key
        self.features = decision.learned_features
        self.names = names
        self.earnings = earnings
        self.n_open = len(earnings)
        self.waiting: dict[tuple[bytes, str], int] | None = None


class State(NamedTuple):
    """What a snapshot says about an earning."""

    phase: int
    until_us: int
    taught: float | None
    row: int
    counted: Sequence[Counted]


def columns_of(decisions: Collection[OpenDecision]) -> OpenRewards:
    """Return decisions as a snapshot keeps them. Cost: 0.6 µs a decision."""
    earnings = [earning for decision in decisions for earning in decision.earnings]
    counted = [each for earning in earnings for each in earning.counted]
    taught = [math.nan if earning.taught is None else earning.taught for earning in earnings]
    waiting = sorted(lsn for decision in decisions if decision.waiting for lsn in decision.waiting.values())
    return OpenRewards(
        decision_lsns=np.array([decision.lsn for decision in decisions], "<u8").tobytes(),
        slot_counts=np.array([len(decision.earnings) for decision in decisions], "<u2").tobytes(),
        slot_flags=bytes([earning.phase for earning in earnings]),
        slot_close_times_us=np.array([earning.until_us for earning in earnings], "<i8").tobytes(),
        taught=np.array(taught, "<f8").tobytes(),
        outcome_counts=bytes([len(earning.counted) for earning in earnings]),
        outcome_lsns=np.array([each.lsn for each in counted], "<u8").tobytes(),
        outcome_rewards=np.array([each.reward for each in counted], "<f8").tobytes(),
        revocation_lsns=np.array(waiting, "<u8").tobytes(),
        rows=np.array([earning.row for earning in earnings], "<u8").tobytes(),
    )


def states_of(columns: OpenRewards) -> Iterator[State]:
    """Yield the state of each earning in saved columns, in order."""
    lsns = np.frombuffer(columns.outcome_lsns, "<u8").tolist()
    rewards = np.frombuffer(columns.outcome_rewards, "<f8").tolist()
    counted = map(Counted, lsns, rewards)
    untils_us = np.frombuffer(columns.slot_close_times_us, "<i8").tolist()
    taught = np.frombuffer(columns.taught, "<f8").tolist()
    rows = np.frombuffer(columns.rows, "<u8").tolist()
    told = zip(columns.slot_flags, untils_us, taught, rows, columns.outcome_counts, strict=True)
    for phase, until_us, reward, row, n in told:
        own = [next(counted) for _ in range(n)] if n else ()
        yield State(phase, until_us, None if math.isnan(reward) else reward, row, own)
