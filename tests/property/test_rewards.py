"""Whatever arrives in whatever order, and whenever the learner restarts: what was taught last is what was earned."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import Goal
from server.storage.memory import MemoryLog
from tests.support.learning import SECOND_US, Writer, make_catalog
from training.rewards import PARKED_WAIT_US, UNSEEN_WAIT_US_MIN, Lesson, Rewards, terms_of
from tsugi.log.v1.learner_pb2 import GoalFlow, OpenRewards
from tsugi.v1 import catalog_pb2

GOALS: dict[str, dict[str, Any]] = {
    f"{settling.lower()}_{late_s}": {
        "outcomes": [{"type": "click", "reward": 0.5}, {"type": "peek", "reward": 0.25}, {"type": "refuse"}],
        "attributionWindow": f"{window_s}s",
        "baseRate": 0.1,
        "defaultReward": 0.125,
        "settling": f"SETTLING_{settling}",
        "lateLimit": f"{late_s}s",
    }
    for settling, window_s, late_s in (
        ("FIRST", 30, 0), ("FIRST", 20, 40), ("LAST", 30, 0), ("LAST", 10, 40), ("SUM", 20, 30), ("MAX", 30, 10),
    )
}  # fmt: skip
CATALOG = make_catalog(("book", "lamp"), ("age", "spend"), more_goals=[{"name": name} | GOALS[name] for name in GOALS])
BY_NAME = {goal.name: goal for goal in CATALOG.goals}
TERMS = terms_of(CATALOG)
ACTIONS = ("book", "lamp")
N_KEYS = 2
LONG_US = 10 * UNSEEN_WAIT_US_MIN


class Step(NamedTuple):
    """Something is recorded after some time."""

    wait_us: int
    decision: int
    is_swapped: bool  # now and then it is about another action than the outcome of this number was
    what: str  # decide, decide_on_impression, or an outcome type, or revoke
    outcome: int  # which of the decision's outcomes: its own id, or that which is taken back
    goals: tuple[str, ...]


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from([0, 0, 0, 1, SECOND_US, SECOND_US, 5 * SECOND_US, 9 * SECOND_US, 25 * SECOND_US]),
        st.integers(0, N_KEYS - 1),
        st.booleans(),
        st.sampled_from(["decide", "decide_on_impression", *("click", "peek", "refuse") * 2, "seen", *["revoke"] * 5]),
        st.integers(0, 3),
        st.lists(st.sampled_from(sorted(GOALS)), min_size=2, max_size=4, unique=True).map(tuple),
    ),
    min_size=5,
    max_size=40,
)


class Told(NamedTuple):
    """An outcome or revocation as recorded."""

    lsn: int
    time_us: int
    action: str
    type: str  # "": a revocation
    key: bytes  # its own, or of what it takes back


class Made(NamedTuple):
    """A decision as recorded."""

    lsn: int
    time_us: int
    on_impression: bool
    goals: tuple[str, ...]


def write(log: MemoryLog, all_steps: list[Step]) -> tuple[dict[int, Made], dict[int, list[Told]]]:
    """Write a log; return its decisions and what was told of each."""
    writer = Writer(log)
    made: dict[int, Made] = {}
    told: dict[int, list[Told]] = defaultdict(list)
    used: set[bytes] = set()
    for step in all_steps:
        writer.now_us += step.wait_us
        key = bytes([1, step.decision] * 8)
        outcome_key = bytes([2, step.decision, step.outcome, 0] * 4)
        action = ACTIONS[(step.outcome + (step.is_swapped and step.outcome == 3)) % 2]
        if step.what.startswith("decide"):
            if step.decision in made:
                continue
            on_impression = step.what == "decide_on_impression"
            first, *others = step.goals
            writer.decide(
                [(action, first) for action in ACTIONS], key=key, catalog=CATALOG, on_impression=on_impression,
                features=[step.decision] * len(TERMS.names), other_goals=dict.fromkeys(others, -2.0),
            )  # fmt: skip
            made[step.decision] = Made(log.tail().lsn, writer.now_us, on_impression, step.goals)
        elif step.what == "revoke":
            writer.take_back(key, action, outcome_key)
            told[step.decision].append(Told(log.tail().lsn, writer.now_us, action, "", outcome_key))
        elif outcome_key not in used:
            used.add(outcome_key)
            writer.report(key, action, step.what, outcome_key)
            told[step.decision].append(Told(log.tail().lsn, writer.now_us, action, step.what, outcome_key))
    writer.now_us += LONG_US
    writer.tick()
    writer.now_us += LONG_US
    writer.tick()
    return made, told


def earned(made: Made, told: list[Told], goal: Goal, action: str) -> float | None:
    """Return what a slot earned for a goal when all is over; None: it was never seen. Slow, and by the words alone."""
    known = []
    for each in told:
        if each.action != action or (each.lsn < made.lsn and each.time_us + PARKED_WAIT_US <= made.time_us):
            continue
        known.append(each._replace(time_us=max(each.time_us, made.time_us) if each.lsn < made.lsn else each.time_us))
    outcomes = [each for each in known if each.type]
    began_us = made.time_us
    if made.on_impression:
        if not outcomes or outcomes[0].time_us >= made.time_us + max(goal.window_us, UNSEEN_WAIT_US_MIN):
            return None
        began_us = outcomes[0].time_us
    close_us = began_us + goal.window_us
    counted = [each for each in outcomes if each.type in goal.rewards and each.time_us < close_us]
    revoked_in_time = [each for each in known if not each.type and each.time_us < close_us]
    left_at_close = [each for each in counted if each.key not in {other.key for other in revoked_in_time}]
    last_us = close_us + goal.late_limit_us if left_at_close else close_us
    taken_back = {each.key for each in known if not each.type and each.time_us < last_us}
    rewards = [goal.rewards[each.type] for each in counted if each.key not in taken_back]
    if not rewards:
        return goal.default_reward
    return {
        catalog_pb2.SETTLING_FIRST: rewards[0],
        catalog_pb2.SETTLING_LAST: rewards[-1],
        catalog_pb2.SETTLING_SUM: min(1.0, sum(rewards)),
        catalog_pb2.SETTLING_MAX: max(rewards),
    }[goal.settling]


def lessons_of(log: MemoryLog, restarts: set[int]) -> tuple[list[Lesson], Rewards]:
    """Learn a log, restarting before some records."""
    lessons: list[Lesson] = []

    def learn(lesson: Lesson) -> int:
        lessons.append(lesson)
        return len(lessons)

    rewards = Rewards(log, lambda _sha256: TERMS, learn)
    for record in log.read(1):
        if record.lsn in restarts:
            columns, parked, counts, flows = rewards.save()
            rewards = Rewards(log, lambda _sha256: TERMS, learn)
            rewards.load(
                OpenRewards.FromString(columns.SerializeToString()), parked, counts,
                [GoalFlow.FromString(flow.SerializeToString()) for flow in flows],
            )  # fmt: skip
        rewards.apply(record)
    return lessons, rewards


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(steps, st.sets(st.integers(1, 42), max_size=6))
def test_last_lesson_is_what_was_earned_and_the_first_is_taught_once(all_steps: list[Step], restarts: set[int]) -> None:
    log = MemoryLog()
    made, told = write(log, all_steps)
    lessons, rewards = lessons_of(log, restarts)
    taught: dict[tuple[int, str, str], float] = {}
    numbers: dict[tuple[int, str, str], int] = {}
    for i, lesson in enumerate(lessons):
        slot = (int(np.frombuffer(lesson.features, "<f4")[0]), lesson.goal.name, lesson.action)
        assert lesson.taught == taught.get(slot), "a lesson says what it replaces, and the first that there was none"
        assert lesson.row == numbers.get(slot, 0), "and by which number it was learned"
        numbers.setdefault(slot, i + 1)
        assert lesson.taught != lesson.reward
        taught[slot] = lesson.reward
    expected = {
        (number, name, action): earned(decision, told[number], BY_NAME[name], action)
        for number, decision in made.items()
        for name in decision.goals
        for action in ACTIONS
    }
    assert taught == {slot: reward for slot, reward in expected.items() if reward is not None}
    counts = rewards.counts
    assert counts.learned + counts.silent + counts.unseen == len(expected)
    assert counts.corrected == len(lessons) - len(taught)
    assert (counts.withheld, counts.quarantined, rewards.n_open, rewards.n_parked) == (0, 0, 0, 0)
    if restarts:
        uninterrupted, again = lessons_of(log, set())
        assert lessons == uninterrupted
        assert again.save() == rewards.save()
