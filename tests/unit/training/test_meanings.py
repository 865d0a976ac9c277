"""A goal that means something else is learned anew from the log, and nothing else begins learning anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.catalog.catalog import Catalog
from server.storage.memory import MemoryLog
from tests.support.learning import (
    EXPLORING,
    FIRST,
    SECOND,
    SUMMED,
    VISIT_WINDOW_US,
    Writer,
    load_catalog,
    write_history,
)
from training import learn
from training.learn import Learner
from training.meanings import Meanings
from training.snapshots import state_hash


def meanings_of(log: MemoryLog) -> Meanings:
    meanings = Meanings(log, lambda sha256: load_catalog(sha256).message)
    meanings.renew()
    return meanings


def start(log: MemoryLog, folder: Path) -> Learner:
    return Learner(log, folder, load_catalog, lambda: 0.0)


def caught_up(learner: Learner) -> Learner:
    while learner.step():
        pass
    return learner


def fresh_hash(log: MemoryLog, folder: Path) -> bytes:
    learner = caught_up(start(log, folder))
    learner.close()
    return state_hash(learner.state())


@pytest.mark.parametrize(
    ("catalogs", "altered"),
    [
        ([], 0),
        ([FIRST], 0),
        ([FIRST, EXPLORING, FIRST], 0),
        ([FIRST, SECOND], 2),
        ([FIRST, SUMMED, EXPLORING], 3),
        ([FIRST, SUMMED, SUMMED], 2),
    ],
)
def test_last_change_that_altered_a_goal_is_found(catalogs: list[Catalog], altered: int) -> None:
    log = MemoryLog()
    writer = Writer(log)
    for catalog in catalogs:
        writer.put_in_force(catalog)
    meanings = meanings_of(log)
    assert meanings.lsn == altered
    assert meanings.goals == ({goal.name: goal for goal in catalogs[altered - 1].goals} if altered else {})
    resumed = Meanings(log, lambda sha256: load_catalog(sha256).message)
    resumed.begin(meanings.lsn, meanings.messages.values())
    resumed.renew()
    assert (resumed.lsn, resumed.goals) == (meanings.lsn, meanings.goals)


def test_altered_goal_is_learned_anew_from_all_there_ever_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog()
    write_history(log, seed=8, n_steps=150)
    writer = Writer(log)
    writer.now_us = log.tail().time_us
    writer._n_keys = 1_000_000
    writer.put_in_force(FIRST)
    learner = caught_up(start(log, tmp_path / "one"))
    before = learner.state().terms_lsn
    key = writer.decide([("book", "visit")])
    for _ in range(4):
        writer.report(key, "book", "peek")
    writer.put_in_force(EXPLORING)
    caught_up(learner)
    assert learner.state().terms_lsn == before, "nothing else begins anew"
    learned_rewards = learner.counts.corrected

    writer.put_in_force(SUMMED)
    monkeypatch.setattr(learn, "BATCH_RECORDS_MAX", 16)
    served_lsn = log.tail().lsn
    learner.step()
    assert learner.learned_lsn == served_lsn, "what serves meanwhile goes on"
    assert learner.state().terms_lsn == before
    caught_up(learner)
    assert learner.state().terms_lsn == served_lsn
    assert learner.counts.corrected > learned_rewards
    learner.close()
    assert state_hash(learner.state()) == fresh_hash(log, tmp_path / "fresh")


def test_several_alterations_in_a_row_and_a_restart_between_come_to_the_state_of_a_fresh_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    write_history(log, seed=9, n_steps=100)
    learner = caught_up(start(log, tmp_path / "one"))
    writer = Writer(log)
    writer.now_us, writer._n_keys = log.tail().time_us, 1_000_000
    monkeypatch.setattr(learn, "BATCH_RECORDS_MAX", 16)
    for catalog in (FIRST, SECOND, SUMMED, FIRST):
        writer.put_in_force(catalog)
        writer.report(writer.decide([("lamp", "visit")], catalog=catalog), "lamp", "click")
        for _ in range(3):  # the new course has begun, and not caught up
            learner.step()
        learner.flush()
        if catalog is SECOND:
            learner.close()
            learner = start(log, tmp_path / "one")
            assert learner.learned_lsn == log.tail().lsn
    writer.now_us += VISIT_WINDOW_US
    writer.tick()
    caught_up(learner).flush()
    learner.close()
    assert state_hash(learner.state()) == fresh_hash(log, tmp_path / "fresh")
    restarted = start(log, tmp_path / "one")
    assert state_hash(restarted.state()) == state_hash(learner.state())
    restarted.close()
