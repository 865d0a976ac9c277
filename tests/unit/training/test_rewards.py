"""The join: each slot's reward is taught exactly once, at the right record, whatever arrives when."""

from __future__ import annotations

import numpy as np
import pytest

from server.storage.memory import MemoryLog
from tests.support.learning import FIRST, SALE_WINDOW_US, SECOND, SECOND_US, VISIT_WINDOW_US, Writer, load_catalog
from training import rewards
from training.rewards import Lesson, Rewards, TooManyQuarantinedError, terms_of
from tsugi.log.v1.record_pb2 import RecordKind


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
