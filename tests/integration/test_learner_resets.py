"""A reset is a record: learners begin anew at it, whenever they read it, and a restart around it changes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.profiles.erased import ERASED_HEAD
from server.storage.memory import MemoryLog
from server.storage.record import Draft, Record
from tests.support.learning import FIRST, SECOND_US, Writer, load_catalog
from training.learn import ARRAYS_FILE, Learner
from training.snapshots import state_hash
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import LogErased, RecordKind
from tsugi.v1.learner_pb2 import GoalLearners
from tsugi.v1.model_pb2 import LearnerRole

SERVING, CHALLENGER = LearnerRole.LEARNER_ROLE_SERVING, LearnerRole.LEARNER_ROLE_CHALLENGER
ALL = LearnerRole.LEARNER_ROLE_ALL


class PartOf(MemoryLog):
    """A log of which only the first records can be read on from: as when a learner catches up."""

    def __init__(self) -> None:
        super().__init__(b"log-id-16-bytes.")
        self.read_lsn_max = 1 << 62

    def read(self, from_lsn: int, records_max: int = 4_096) -> list[Record]:
        return super().read(from_lsn, max(0, min(records_max, self.read_lsn_max + 1 - from_lsn)))


def serve(writer: Writer, n_decisions: int, seed: int) -> None:
    """Write decisions and what came of them, in time for every review of a fleet."""
    rng = random.Random(seed)
    for _ in range(n_decisions):
        writer.now_us += SECOND_US // 10
        action, goal = rng.choice(("book", "lamp")), rng.choice(("visit", "sale"))
        key = writer.decide([(action, goal)], features=[rng.gauss(0.0, 1.0) for _ in FIRST.learned.names])
        if rng.random() < 0.6:
            writer.report(key, action, "click" if goal == "visit" else "buy")


def start(log: MemoryLog, folder: Path) -> Learner:
    return Learner(log, folder, load_catalog, lambda: 0.0)


def learn_all(learner: Learner) -> Learner:
    while learner.step():
        pass
    return learner


def final_hash(log: MemoryLog, folder: Path) -> bytes:
    learner = learn_all(start(log, folder))
    learner.close()
    return state_hash(learner.state())


def told(learner: Learner, folder: Path) -> dict[str, GoalLearners]:
    """Publish, and return what is told of each goal."""
    learner.flush()
    return {each.goal: each for each in LearnerArrays.FromString((folder / ARRAYS_FILE).read_bytes()[32:]).learners}


def rows_by_number(goal: GoalLearners) -> dict[int, int]:
    return {each.number: each.rows for each in goal.learners}


@pytest.fixture
def log() -> PartOf:
    return PartOf()


@pytest.fixture
def writer(log: PartOf) -> Writer:
    writer = Writer(log)
    writer.put_in_force(FIRST)
    return writer


def test_reset_takes_what_was_learned_before_it_of_the_goals_it_names(
    log: PartOf, writer: Writer, tmp_path: Path
) -> None:
    serve(writer, 120, seed=1)
    before = told(learn_all(start(log, tmp_path / "before")), tmp_path / "before")
    reset_lsn = writer.reset(ALL, ["sale", "one that nobody met"])
    after = told(learn_all(start(log, tmp_path / "after")), tmp_path / "after")
    assert after["visit"] == before["visit"]
    assert before["sale"].rows == after["sale"].rows > 0, "it tells of the goal, not of the learners"
    assert set(rows_by_number(after["sale"]).values()) == {0}
    for each in after["sale"].learners:
        assert each.begun_lsn == reset_lsn
        assert each.begin_time.ToMicroseconds() == writer.now_us
    arrays = LearnerArrays.FromString((tmp_path / "after" / ARRAYS_FILE).read_bytes()[32:])
    assert {block.goal: not any(block.correction_intercepts) for block in arrays.goals} == {
        "visit": False, "sale": True
    }  # fmt: skip


def test_reset_of_a_role_reaches_that_role_of_every_goal(log: PartOf, writer: Writer, tmp_path: Path) -> None:
    serve(writer, 120, seed=2)
    writer.reset(CHALLENGER)
    writer.reset(SERVING)
    for goal in told(learn_all(start(log, tmp_path)), tmp_path).values():
        rows = rows_by_number(goal)
        assert rows[0] == rows[1] == goal.rows, "baseline and posterior learned on"
        assert {rows[number] for number in rows if number > 1} == {0}
        (serving,) = (each.number for each in goal.learners if SERVING in each.roles)
        assert serving == 0


@pytest.mark.parametrize("role", [SERVING, CHALLENGER, ALL])
def test_restart_before_at_and_after_a_reset_comes_to_the_state_of_an_uninterrupted_run(
    log: PartOf, writer: Writer, tmp_path: Path, role: LearnerRole
) -> None:
    serve(writer, 80, seed=3)
    lsn = writer.reset(role)
    serve(writer, 80, seed=4)
    writer.reset(role, ["visit"])
    serve(writer, 40, seed=5)
    expected = final_hash(log, tmp_path / "uninterrupted")
    for stop_lsn in (lsn - 1, lsn, lsn + 1, log.tail().lsn):
        folder = tmp_path / str(stop_lsn)
        log.read_lsn_max = stop_lsn
        learner = learn_all(start(log, folder))
        learner.flush()
        learner.close()
        log.read_lsn_max = 1 << 62
        restarted = start(log, folder)
        assert restarted.learned_lsn == stop_lsn
        learn_all(restarted)
        restarted.close()
        assert state_hash(restarted.state()) == expected, stop_lsn


def test_reset_during_catching_up_is_applied_at_its_record(log: PartOf, writer: Writer, tmp_path: Path) -> None:
    serve(writer, 100, seed=6)
    behind = start(log, tmp_path / "behind")
    log.read_lsn_max = 50
    learn_all(behind)
    writer.reset(ALL)  # while the learner is far behind
    assert behind.learned_lsn == 50
    serve(writer, 100, seed=7)
    log.read_lsn_max = 1 << 62
    learn_all(behind)
    behind.close()
    assert state_hash(behind.state()) == final_hash(log, tmp_path / "anew")


def test_reset_is_replayed_when_everything_is_learned_anew_after_an_erasure(
    log: PartOf, writer: Writer, tmp_path: Path
) -> None:
    serve(writer, 60, seed=8)
    writer.reset(SERVING, ["visit"])
    serve(writer, 60, seed=9)
    learner = learn_all(start(log, tmp_path / "served"))
    before = told(learner, tmp_path / "served")
    log.erase(range(2, 20))
    erased = LogErased(erased_records=18).SerializeToString()
    log.append([Draft(RecordKind.RECORD_KIND_LOG_ERASED, erased, head=ERASED_HEAD)], writer.now_us)
    learn_all(learner)
    after = told(learner, tmp_path / "served")
    learner.close()
    assert rows_by_number(after["visit"])[0] < rows_by_number(before["visit"])[0], "the erased are not learned from"
    assert after["visit"].serving_since.lsn == before["visit"].serving_since.lsn
    assert state_hash(learner.state()) == final_hash(log, tmp_path / "anew")


def test_reset_of_a_later_kind_changes_nothing(log: PartOf, writer: Writer, tmp_path: Path) -> None:
    serve(writer, 60, seed=10)
    before = told(learn_all(start(log, tmp_path / "before")), tmp_path / "before")
    writer.reset(99)  # type: ignore[arg-type]  # a role that this build does not know
    assert told(learn_all(start(log, tmp_path / "after")), tmp_path / "after") == before


def test_a_reset_that_nothing_can_be_made_of_is_set_aside_and_learning_goes_on(log: PartOf, tmp_path: Path) -> None:
    writer = Writer(log)
    writer.put_in_force(FIRST)
    serve(writer, 50, seed=1)
    writer.raw(RecordKind.RECORD_KIND_LEARNER_RESET, b"\xff\xff\xff")
    serve(writer, 50, seed=2)
    learner = learn_all(start(log, tmp_path))
    assert learner.learned_lsn == log.tail().lsn
    assert learner.counts.quarantined == 1
    assert not any(goal.changes for goal in told(learner, tmp_path).values()), "nobody began anew"
    learner.close()
