"""The join: each slot's reward is taught exactly once, at the right record, whatever arrives when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.storage.memory import MemoryLog
from tests.support.learning import (
    FIRST,
    SALE_WINDOW_US,
    SECOND,
    SECOND_US,
    VISIT_WINDOW_US,
    Writer,
    load_catalog,
    make_catalog,
)
from training import rewards
from training.rewards import Lesson, Rewards, TooManyQuarantinedError, terms_of
from tsugi.log.v1.learner_pb2 import GoalFlow, InfluenceState, OpenRewards
from tsugi.log.v1.record_pb2 import RecordKind

LATE_US = 100 * SECOND_US


class Join:
    """A log, its writer, and what the join taught of it."""

    def __init__(self, open_decisions_max: int = rewards.OPEN_DECISIONS_MAX) -> None:
        self.log = MemoryLog()
        self.writer = Writer(self.log)
        self.lessons: list[Lesson] = []
        self.rewards = Rewards(
            self.log, lambda sha256: terms_of(load_catalog(sha256)), self.lessons.append, open_decisions_max
        )
        self._applied_lsn = 0

    def taught(self) -> list[tuple[str, str, float]]:
        """Apply what was written since, and return (goal, action, reward) of what that taught."""
        n_before = len(self.lessons)
        for record in self.log.read(self._applied_lsn + 1):
            self.rewards.apply(record)
            self._applied_lsn = record.lsn
        return [(lesson.goal.name, lesson.action, lesson.reward) for lesson in self.lessons[n_before:]]

    def taught_after(self, elapsed_us: int) -> list[tuple[str, str, float]]:
        """Let log time pass, and return what that taught."""
        self.writer.now_us += elapsed_us
        self.writer.tick()
        return self.taught()


@pytest.fixture
def join() -> Join:
    return Join()


def test_first_settling_outcome_is_taught_at_once_and_only_once(join: Join) -> None:
    key = join.writer.decide([("book", "visit")])
    join.writer.report(key, "book", "peek")
    assert join.taught() == [("visit", "book", 0.3)]
    join.writer.report(key, "book", "click")
    assert join.taught() == []
    assert join.taught_after(VISIT_WINDOW_US) == []


def test_silence_teaches_the_default_reward_once_when_log_time_reaches_the_close(join: Join) -> None:
    join.writer.decide([("book", "sale")])
    assert join.taught_after(SALE_WINDOW_US - 1) == []
    assert join.taught_after(1) == [("sale", "book", 0.1)]
    assert join.taught_after(SALE_WINDOW_US) == []
    assert join.rewards.n_open == 0


def test_outcome_at_the_close_is_late_because_the_window_closes_before_it(join: Join) -> None:
    key = join.writer.decide([("book", "visit")])
    join.writer.now_us += VISIT_WINDOW_US
    join.writer.report(key, "book", "click")
    assert join.taught() == [("visit", "book", 0.0)]
    assert join.rewards.counts.late == 1


def test_outcome_of_a_closed_slot_is_late_while_another_slot_is_open(join: Join) -> None:
    key = join.writer.decide([("book", "visit"), ("lamp", "sale")])
    assert join.taught_after(VISIT_WINDOW_US) == [("visit", "book", 0.0)]
    join.writer.report(key, "book", "click")
    join.writer.report(key, "lamp", "buy")
    assert join.taught() == [("sale", "lamp", 1.0)]
    assert join.rewards.counts.late == 1


def test_outcome_that_settles_nothing_leaves_silence_to_come(join: Join) -> None:
    key = join.writer.decide([("book", "visit")])
    join.writer.report(key, "book", "buy")
    assert join.taught_after(VISIT_WINDOW_US) == [("visit", "book", 0.0)]


def test_each_slot_earns_its_own_reward(join: Join) -> None:
    key = join.writer.decide([("book", "visit"), ("", ""), ("lamp", "sale"), ("rope", "visit")])
    join.writer.report(key, "lamp", "refuse")
    join.writer.report(key, "rope", "click")
    assert join.taught() == [("sale", "lamp", 0.0), ("visit", "rope", 1.0)]
    assert join.taught_after(SALE_WINDOW_US) == [("visit", "book", 0.0)]


def test_windows_close_in_order_of_close_time_then_lsn_then_slot(join: Join) -> None:
    join.writer.decide([("book", "sale")])
    join.writer.now_us += SALE_WINDOW_US - VISIT_WINDOW_US
    join.writer.decide([("rope", "visit"), ("lamp", "visit")])
    join.writer.decide([("book", "visit")])
    assert join.taught_after(SALE_WINDOW_US) == [
        ("sale", "book", 0.1),
        ("visit", "rope", 0.0),
        ("visit", "lamp", 0.0),
        ("visit", "book", 0.0),
    ]


def test_decision_never_seen_teaches_nothing_and_is_given_up(join: Join) -> None:
    join.writer.decide([("book", "visit")], on_impression=True)
    assert join.taught_after(rewards.UNSEEN_WAIT_US_MIN - 1) == []
    assert join.rewards.n_open == 1
    assert join.taught_after(1) == []
    assert join.rewards.n_open == 0
    assert join.rewards.counts.unseen == 1


def test_window_of_a_seen_decision_begins_with_the_impression(join: Join) -> None:
    key = join.writer.decide([("book", "visit")], on_impression=True)
    join.writer.now_us += 100 * SECOND_US
    join.writer.report(key, "book", "seen")
    assert join.taught_after(VISIT_WINDOW_US - 1) == []
    join.writer.report(key, "book", "seen")  # a second impression moves nothing
    assert join.taught_after(1) == [("visit", "book", 0.0)]


def test_impression_at_the_instant_that_keeps_the_close_time_closes_once(join: Join) -> None:
    key = join.writer.decide([("book", "visit")], on_impression=True)
    join.writer.now_us += rewards.UNSEEN_WAIT_US_MIN - VISIT_WINDOW_US
    join.writer.report(key, "book", "seen")
    assert join.taught_after(VISIT_WINDOW_US) == [("visit", "book", 0.0)]
    assert join.rewards.n_open == 0


def test_response_without_impression_proves_that_it_was_seen(join: Join) -> None:
    key = join.writer.decide([("book", "visit"), ("lamp", "visit")], on_impression=True)
    join.writer.report(key, "book", "click")
    assert join.taught() == [("visit", "book", 1.0)]
    assert join.taught_after(rewards.UNSEEN_WAIT_US_MIN) == []
    assert join.rewards.counts.unseen == 1


def test_outcome_before_its_decision_waits_for_it(join: Join) -> None:
    key = join.writer.new_key()
    join.writer.report(key, "book", "click")
    join.writer.report(key, "lamp", "click")
    assert join.taught() == []
    join.writer.now_us += SECOND_US
    join.writer.decide([("lamp", "visit"), ("book", "visit")], key=key)
    assert join.taught() == [("visit", "book", 1.0), ("visit", "lamp", 1.0)]
    assert join.rewards.n_parked == 0


def test_outcome_whose_decision_never_comes_is_an_orphan(join: Join) -> None:
    key = join.writer.new_key()
    join.writer.report(key, "book", "click")
    join.writer.now_us += SECOND_US
    join.writer.report(key, "book", "peek")
    join.taught_after(rewards.PARKED_WAIT_US - SECOND_US)
    assert (join.rewards.counts.orphaned, join.rewards.n_parked) == (1, 1)
    join.writer.decide([("book", "visit")], key=key)
    assert join.taught() == [("visit", "book", 0.3)]


def test_outcome_for_an_action_the_decision_did_not_choose_is_an_orphan(join: Join) -> None:
    key = join.writer.decide([("book", "visit")])
    join.writer.report(key, "lamp", "click")
    assert join.taught() == []
    assert join.rewards.counts.orphaned == 1


def test_decision_read_ahead_does_not_make_an_early_outcome_late(join: Join) -> None:
    key = join.writer.new_key()
    join.writer.report(key, "book", "click")
    join.writer.decide([("book", "visit")], key=key)  # in the log before the outcome is applied
    assert join.taught() == [("visit", "book", 1.0)]
    assert join.rewards.counts.late == 0


def test_row_carries_what_the_decision_recorded(join: Join) -> None:
    key = join.writer.decide([("tent", "visit")], catalog=SECOND, features=[1.0, 2.0, 3.0], prior_log_odds=-0.5)
    join.writer.report(key, "tent", "click")
    join.taught()
    (lesson,) = join.lessons
    assert lesson.names == SECOND.learned.names
    assert np.frombuffer(lesson.features, "<f4").tolist() == [1.0, 2.0, 3.0]
    assert lesson.prior_log_odds == -0.5
    assert lesson.goal is SECOND.goals[0]


def test_more_open_decisions_than_allowed_are_counted_and_not_taught() -> None:
    join = Join(open_decisions_max=2)
    keys = [join.writer.decide([("book", "visit")]) for _ in range(3)]
    join.writer.report(keys[2], "book", "click")
    assert join.taught() == []
    assert join.rewards.counts.overflowed == 1
    assert join.taught_after(VISIT_WINDOW_US) == [("visit", "book", 0.0)] * 2
    join.writer.decide([("book", "visit")])
    assert join.taught_after(VISIT_WINDOW_US) == [("visit", "book", 0.0)]


def test_parked_outcomes_are_bounded(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "PARKED_MAX", 2)
    for _ in range(3):
        join.writer.report(join.writer.new_key(), "book", "click")
    join.taught()
    assert (join.rewards.n_parked, join.rewards.counts.orphaned) == (2, 1)


@pytest.mark.parametrize("kind", [RecordKind.RECORD_KIND_DECISION, RecordKind.RECORD_KIND_OUTCOME])
def test_record_that_is_not_what_it_should_be_is_set_aside(join: Join, kind: RecordKind) -> None:
    join.writer.raw(kind, b"\xff\xff\xff")
    key = join.writer.decide([("book", "visit")])
    join.writer.report(key, "book", "click")
    assert join.taught() == [("visit", "book", 1.0)]
    assert join.rewards.counts.quarantined == 1


def test_decision_with_other_features_than_its_catalog_is_set_aside(join: Join) -> None:
    join.writer.decide([("book", "visit")], features=[1.0] * (len(FIRST.learned.names) + 1))
    join.writer.decide([("book", "no_such_goal")])
    assert join.taught_after(SALE_WINDOW_US) == []
    assert join.rewards.counts.quarantined == 2


def test_too_many_records_set_aside_stop_learning(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "QUARANTINED_MAX", 1)
    for _ in range(2):
        join.writer.raw(RecordKind.RECORD_KIND_OUTCOME, b"\xff\xff\xff")
    with pytest.raises(TooManyQuarantinedError):
        join.taught()


class Settling(Join):
    """A join under one goal, visit, with its fields changed; and what the lessons of its only slot were."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.catalog = make_catalog(("book", "lamp"), ("age", "spend"), changes={"visit": changes})
        self.rewards = self.resumed(None)

    def resumed(self, saved: Rewards | None) -> Rewards:
        successor = Rewards(self.log, lambda _sha256: terms_of(self.catalog), self.lessons.append)
        if saved is not None:
            columns, parked, counts, flows = saved.save()
            again = OpenRewards.FromString(columns.SerializeToString())
            successor.load(again, parked, counts, [GoalFlow.FromString(flow.SerializeToString()) for flow in flows])
            successor.load_influences(
                InfluenceState.FromString(each.SerializeToString()) for each in saved.save_influences()
            )
            assert successor.save() == saved.save()
            assert successor.save_influences() == saved.save_influences()
        return successor

    def restart(self) -> None:
        self.taught()
        self.rewards = self.resumed(self.rewards)

    def decide(self, **more: Any) -> bytes:
        return self.writer.decide([("book", "visit")], catalog=self.catalog, **more)

    def steps(self) -> list[tuple[float | None, float]]:
        """Return (taught before, reward) of each new lesson, restarting afterwards."""
        n_before = len(self.lessons)
        self.restart()
        return [(lesson.taught, lesson.reward) for lesson in self.lessons[n_before:]]

    def steps_after(self, elapsed_us: int) -> list[tuple[float | None, float]]:
        self.writer.now_us += elapsed_us
        self.writer.tick()
        return self.steps()


@pytest.mark.parametrize(
    ("settling", "rewards"),
    [
        ("SETTLING_UNSPECIFIED", [0.3]),
        ("SETTLING_FIRST", [0.3]),
        ("SETTLING_LAST", [0.3, 1.0, 0.3]),
        ("SETTLING_SUM", [0.3, 1.0]),
        ("SETTLING_MAX", [0.3, 1.0]),
    ],
)
def test_several_outcomes_settle_as_the_goal_says(settling: str, rewards: list[float]) -> None:
    join = Settling(settling=settling)
    key = join.decide()
    steps = []
    for outcome_type in ("peek", "click", "peek"):
        join.writer.report(key, "book", outcome_type)
        steps += join.steps()
    assert steps == list(zip([None, *rewards], rewards, strict=False))
    assert join.steps_after(VISIT_WINDOW_US) == []
    assert join.rewards.counts.learned == 1


@pytest.mark.parametrize("wait_us", [0, VISIT_WINDOW_US])
@pytest.mark.parametrize(
    ("settling", "left"),
    [("SETTLING_FIRST", 0.3), ("SETTLING_LAST", 0.3), ("SETTLING_SUM", 0.6), ("SETTLING_MAX", 0.3)],
)
def test_what_is_taken_back_leaves_what_the_others_come_to(settling: str, left: float, wait_us: int) -> None:
    join = Settling(settling=settling, lateLimit="100s")
    key = join.decide()
    taken = join.writer.report(key, "book", "click")
    join.writer.report(key, "book", "peek")
    join.writer.report(key, "book", "peek")
    join.steps()
    join.writer.now_us += wait_us
    join.writer.take_back(key, "book", taken)
    assert join.steps() in ([(1.0, left)], [])
    assert join.lessons[-1].reward == left


def test_nothing_left_becomes_silence_when_the_window_closes() -> None:
    join = Settling(defaultReward=0.2)
    key = join.decide()
    taken = join.writer.report(key, "book", "click")
    join.writer.take_back(key, "book", taken)
    assert join.steps() == [(None, 1.0)]
    assert join.steps_after(VISIT_WINDOW_US) == [(1.0, 0.2)]
    assert (join.rewards.counts.silent, join.rewards.counts.corrected, join.rewards.n_open) == (0, 1, 0)


def test_nothing_left_becomes_silence_at_once_when_the_window_has_closed() -> None:
    join = Settling(defaultReward=0.2, lateLimit="100s")
    key = join.decide()
    taken = join.writer.report(key, "book", "click")
    assert join.steps() == [(None, 1.0)]
    assert join.steps_after(VISIT_WINDOW_US + LATE_US - 1) == []
    join.writer.take_back(key, "book", taken)
    assert join.steps() == [(1.0, 0.2)]
    join.writer.take_back(key, "book", taken)
    assert join.steps() == []
    assert join.steps_after(1) == []
    assert (join.rewards.counts.moot, join.rewards.n_open) == (1, 0)


def test_what_is_taken_back_after_the_late_limit_is_late() -> None:
    join = Settling(lateLimit="100s")
    key = join.decide()
    taken = join.writer.report(key, "book", "click")
    join.steps()
    assert join.steps_after(VISIT_WINDOW_US + LATE_US) == []
    join.writer.take_back(key, "book", taken)
    assert join.steps() == []
    assert (join.rewards.counts.late, join.rewards.counts.revoked) == (1, 0)


def test_late_limit_is_not_for_outcomes_and_not_for_silence() -> None:
    join = Settling(settling="SETTLING_LAST", lateLimit="100s")
    key, silent = join.decide(), join.decide()
    join.writer.report(key, "book", "click")
    join.steps()
    assert join.steps_after(VISIT_WINDOW_US) == [(None, 0.0)]
    join.writer.report(key, "book", "peek")
    join.writer.report(silent, "book", "click")
    assert join.steps() == []
    assert (join.rewards.counts.late, join.rewards.n_open) == (2, 1)


def test_revocation_before_its_outcome_waits_for_it() -> None:
    join = Settling()
    key, outcome_key = join.decide(), join.writer.new_key()
    join.writer.take_back(key, "book", outcome_key)
    join.writer.take_back(key, "book", outcome_key)
    join.restart()
    assert join.rewards.n_parked == 1
    join.writer.report(key, "book", "click", outcome_key)
    assert join.steps() == []
    assert join.rewards.n_parked == 0
    assert join.steps_after(VISIT_WINDOW_US) == [(None, 0.0)]
    assert (join.rewards.counts.revoked, join.rewards.counts.moot) == (1, 1)


def test_revocations_that_wait_outlive_a_restart_in_whatever_order_their_decisions_came() -> None:
    join = Settling()
    first, second, of_first, of_second = (join.writer.new_key() for _ in range(4))
    join.writer.take_back(second, "book", of_second)  # waits for its decision, then for its outcome
    join.decide(key=first)
    join.decide(key=second)
    join.writer.take_back(first, "book", of_first)  # of the earlier decision the later record
    join.restart()
    join.writer.report(first, "book", "click", of_first)
    join.writer.report(second, "book", "click", of_second)
    assert join.steps() == []
    assert join.rewards.counts.revoked == 2


def test_revocation_of_what_never_comes_is_an_orphan_once_nothing_can_come() -> None:
    join = Settling()
    key = join.decide()
    join.writer.take_back(key, "book", join.writer.new_key())
    join.writer.take_back(key, "lamp", join.writer.new_key())  # an action that was not chosen
    join.restart()
    assert (join.rewards.n_parked, join.rewards.counts.orphaned) == (1, 1)
    assert join.steps_after(VISIT_WINDOW_US) == [(None, 0.0)]
    assert (join.rewards.n_parked, join.rewards.counts.orphaned) == (0, 2)


def test_outcome_and_revocation_before_their_decision_wait_for_it_in_any_order() -> None:
    join = Settling()
    key, first, second = (join.writer.new_key() for _ in range(3))
    join.writer.report(key, "book", "click", first)
    join.writer.take_back(key, "book", first)
    join.writer.take_back(key, "book", second)
    join.writer.report(key, "book", "click", second)
    join.restart()
    assert join.rewards.n_parked == 4
    join.decide(key=key)
    assert join.steps() == [(None, 1.0)]
    assert join.steps_after(VISIT_WINDOW_US) == [(1.0, 0.0)]
    assert join.rewards.counts.revoked == 2


def test_revocation_cannot_be_taken_back() -> None:
    join = Settling()
    key = join.decide()
    taken = join.writer.report(key, "book", "click")
    revocation = join.writer.take_back(key, "book", taken)
    join.writer.take_back(key, "book", revocation)
    join.steps()
    assert join.steps_after(VISIT_WINDOW_US) == [(1.0, 0.0)]
    assert join.rewards.counts.moot == 1


def test_impression_that_is_taken_back_was_seen_all_the_same() -> None:
    join = Settling()
    key = join.decide(on_impression=True)
    join.writer.take_back(key, "book", join.writer.report(key, "book", "seen"))
    assert join.steps_after(VISIT_WINDOW_US) == [(None, 0.0)]


def test_revocations_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "PARKED_MAX", 2)
    join = Settling()
    key = join.decide()
    for _ in range(3):
        join.writer.take_back(key, "book", join.writer.new_key())
    join.restart()
    assert (join.rewards.n_parked, join.rewards.counts.orphaned) == (2, 1)


def test_revocation_without_a_whole_key_is_set_aside(join: Join) -> None:
    key = join.writer.decide([("book", "visit")])
    join.writer.take_back(key, "book", b"short")
    join.taught()
    assert join.rewards.counts.quarantined == 1


def test_every_goal_of_a_slot_is_taught_with_its_own_window_prior_and_silence(join: Join) -> None:
    key = join.writer.decide([("book", "visit")], prior_log_odds=-1.5, other_goals={"sale": -3.0})
    join.writer.report(key, "book", "click")
    assert join.taught() == [("visit", "book", 1.0)]
    assert join.taught_after(VISIT_WINDOW_US) == []
    join.writer.report(key, "book", "buy")
    assert join.taught() == [("sale", "book", 1.0)]
    join.writer.decide([("book", "visit")], other_goals={"sale": -3.0})
    assert join.taught_after(VISIT_WINDOW_US) == [("visit", "book", 0.0)]
    assert join.taught_after(SALE_WINDOW_US) == [("sale", "book", 0.1)]
    assert [lesson.prior_log_odds for lesson in join.lessons] == [-1.5, -3.0, -1.0, -3.0]
    assert {lesson.selection_probability for lesson in join.lessons} == {0.5}
    assert join.rewards.n_open == 0


def test_goals_mean_what_they_were_given_to_mean_and_others_what_their_catalog_says() -> None:
    join = Join()
    visit = make_catalog(("book",), ("age",), 0.5, {"visit": {"outcomes": [{"type": "peek", "reward": 0.7}]}}).goals[0]
    join.rewards = Rewards(
        join.log, lambda sha256: terms_of(load_catalog(sha256)), join.lessons.append, goals={"visit": visit}
    )
    base_rate = float(np.float32(FIRST.goals[0].base_log_odds))
    key = join.writer.decide([("book", "visit")], prior_log_odds=base_rate, other_goals={"sale": -2.0})
    for outcome_type in ("click", "peek", "buy"):
        join.writer.report(key, "book", outcome_type)
    assert join.taught() == [("visit", "book", 0.7), ("sale", "book", 1.0)]
    join.writer.report(join.writer.decide([("book", "visit")], prior_log_odds=-2.5), "book", "peek")
    join.taught()
    assert [lesson.prior_log_odds for lesson in join.lessons] == [0.0, -2.0, -2.5], "a champion's prior stays"


def _one_a_second(join: Settling, n: int, answered: Callable[[int], bool]) -> None:
    """Decide once a second, and have some answered half a second later."""
    for i in range(n):
        key = join.decide()
        join.writer.now_us += SECOND_US // 2
        if answered(i):
            join.writer.report(key, "book", "click")
        join.writer.now_us += SECOND_US // 2
        join.writer.tick()
    join.restart()


def test_silence_is_not_learned_while_outcomes_have_stopped_and_again_when_they_return() -> None:
    join = Settling()
    _one_a_second(join, 400, lambda i: i % 4 == 0)
    before = (join.rewards.counts.learned, join.rewards.counts.silent)
    assert before == (100, 299)
    _one_a_second(join, 1_000, lambda _: False)
    silent = join.rewards.counts.silent
    assert 80 < silent - before[1] < 110, "twenty missing ones are the evidence"
    assert join.rewards.stopped == ["visit"]
    assert join.rewards.counts.withheld > 880
    key = join.decide()
    join.writer.now_us += 1
    join.writer.report(key, "book", "click")  # of a time in which others may have been lost
    withheld = join.rewards.counts.withheld
    assert join.steps_after(VISIT_WINDOW_US) == []
    assert join.rewards.counts.withheld == withheld + 2
    _one_a_second(join, 100, lambda i: i % 4 == 0)
    assert join.rewards.counts.learned == before[0] + 25
    assert join.rewards.counts.silent == silent + 74
    assert join.rewards.stopped == []


def test_slots_settled_before_the_outcomes_stopped_can_still_be_corrected() -> None:
    join = Settling(lateLimit="2000s")
    _one_a_second(join, 100, lambda _: True)
    key = join.decide()
    taken = join.writer.report(key, "book", "click")
    _one_a_second(join, 100, lambda _: False)
    assert join.rewards.counts.withheld > 0
    join.writer.take_back(key, "book", taken)
    assert join.steps() == [(1.0, 0.0)]


def test_no_reporter_teaches_more_than_its_share_of_an_action_and_its_slots_teach_nothing_then() -> None:
    """Two shops report clicks by turns; then somebody reports a click for each of two thousand decisions."""
    join = Settling(influenceMax=0.6)
    for i in range(200):
        join.writer.report(join.decide(), "book", "click", reporter="north" if i % 2 else "south")
    join.taught()
    before = len(join.lessons)
    assert join.rewards.counts.capped == 0
    for i in range(2_000):
        join.writer.report(join.decide(), "book", "click", reporter="fraud")
        if i % 500 == 499:
            join.restart()
    assert 20 < len(join.lessons) - before <= 0.6 / 0.4 * 200 + 1, "what it taught is its share of all"
    assert join.rewards.counts.capped == 2_000 - (len(join.lessons) - before)
    n_lessons = len(join.lessons)
    assert join.steps_after(VISIT_WINDOW_US) == [], "nor is silence what it was"
    join.writer.report(join.decide(), "book", "click", reporter="north")
    assert join.steps() == [(None, 1.0)]
    assert len(join.lessons) == n_lessons + 1


def test_a_reporter_alone_is_held_to_its_share_only_where_the_goal_says_so() -> None:
    free, held = Settling(), Settling(influenceMax=0.5)
    for join in (free, held):
        for _ in range(100):
            join.writer.report(join.decide(), "book", "click", reporter="only")
        join.taught()
    assert (len(free.lessons), free.rewards.counts.capped) == (100, 0)
    assert (len(held.lessons), held.rewards.counts.capped) == (21, 79)
