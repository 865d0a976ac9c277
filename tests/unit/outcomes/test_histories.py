"""What came of what a person was shown, as the projector keeps it: counted as the learner counts, moved with parts."""

from __future__ import annotations

from itertools import permutations

import pytest

from server.catalog.catalog import Catalog
from server.storage.memory import MemoryLog
from tests.support.catalogs import compiled
from tests.support.histories import SECOND_US, decision_key, erase
from tests.support.people import People

ANNA, PHONE = ("customer_number", "1"), ("browser_id", "b")
WINDOW_US = 2 * SECOND_US
GOAL = {
    "name": "click",
    "outcomes": [{"type": "click", "reward": 1}, {"type": "order", "reward": 0.5}, {"type": "dismiss"}],
    "attributionWindow": "2s",
    "baseRate": 0.1,
}
CATALOG = compiled(goals=[GOAL])
WITH_SILENCE = compiled(goals=[GOAL | {"defaultReward": 0.25}])
SWITCHED_OFF = compiled(goals=[GOAL | {"personalHistory": False}])


def people(catalog: Catalog = CATALOG) -> People:
    here = People(catalog, CATALOG, WITH_SILENCE, SWITCHED_OFF)
    here.history.know(dict([ANNA]))
    return here


def show(
    here: People, number: int, action: str = "action_1", *, whom: tuple[str, str] = ANNA, seen: bool = True
) -> None:
    here.history.decide(
        decision_key(number), [action], identities=dict([whom]), propensity=0.25, on_impression=not seen
    )


def told(here: People, whom: tuple[str, str] = ANNA, later_us: int = 0) -> dict[str, tuple[float, float, int]]:
    here.project()
    profile = here.profile(*whom, now_us=here.history.now_us + later_us)
    return {each.action: (each.expected, each.observed, each.open) for each in profile.histories}


def test_what_was_shown_counts_when_its_window_closes() -> None:
    here = people()
    show(here, 1)
    assert told(here) == {"action_1": (0.0, 0.0, 1)}
    assert told(here, later_us=WINDOW_US - 1) == {"action_1": (0.0, 0.0, 1)}
    assert told(here, later_us=WINDOW_US) == {"action_1": (0.25, 0.0, 0)}


def test_first_settling_outcome_counts_at_once_and_no_other_does() -> None:
    here = people()
    show(here, 1)
    here.history.report(decision_key(1), "action_1", "impression")
    assert told(here) == {"action_1": (0.0, 0.0, 1)}
    here.history.report(decision_key(1), "action_1", "order")
    here.history.report(decision_key(1), "action_1", "click")
    assert told(here) == {"action_1": (0.25, 0.5, 0)}


def test_outcome_after_the_window_is_late() -> None:
    here = people()
    show(here, 1)
    here.history.now_us += WINDOW_US
    here.history.report(decision_key(1), "action_1")
    assert told(here) == {"action_1": (0.25, 0.0, 0)}


def test_silence_earns_the_goals_default_reward() -> None:
    here = people(WITH_SILENCE)
    show(here, 1)
    show(here, 2)
    here.history.report(decision_key(2), "action_1", "dismiss")
    assert told(here, later_us=WINDOW_US) == {"action_1": (0.5, 0.25, 0)}


def test_on_impression_counting_begins_with_the_first_outcome_unless_it_was_given_up() -> None:
    here = people()
    show(here, 1, seen=False)
    show(here, 2, "action_2", seen=False)
    assert told(here, later_us=100 * WINDOW_US) == {}
    here.history.now_us += 500 * SECOND_US
    here.history.report(decision_key(1), "action_1", "impression")
    assert told(here) == {"action_1": (0.0, 0.0, 1)}
    here.history.report(decision_key(1), "action_1", "click")
    assert told(here) == {"action_1": (0.25, 1.0, 0)}
    here.history.now_us += 100 * SECOND_US
    here.history.report(decision_key(2), "action_2", "click")
    assert told(here) == {"action_1": (0.25, 1.0, 0)}, "given up, as the learner does"


def test_outcome_before_its_decision_counts_when_the_decision_comes() -> None:
    here = people()
    here.history.report(decision_key(1), "action_1")
    here.project()
    show(here, 1)
    assert told(here) == {"action_1": (0.25, 1.0, 0)}


def test_everything_about_a_person_is_the_same_in_whatever_order_impression_and_click_came() -> None:
    def seen_of(order: tuple[int, ...]) -> tuple[object, object]:
        here = people()
        steps = (
            lambda: show(here, 1, seen=False),
            lambda: here.history.report(decision_key(1), "action_1", "impression"),
            lambda: here.history.report(decision_key(1), "action_1", "click"),
            lambda: here.history.report(decision_key(1), "action_1", "impression"),
        )
        for step in order:
            steps[step]()
        shown = told(here)
        return shown, here.views()

    first, *others = map(seen_of, permutations(range(4)))
    assert first[0] == {"action_1": (0.25, 1.0, 0)}
    assert all(other == first for other in others)


def test_outcome_finds_what_was_shown_to_who_was_known_then_by_another_identity() -> None:
    here = people()
    both = dict([PHONE, ANNA])
    here.history.know(dict([PHONE]))
    here.history.forget(bytes(16), [ANNA])  # only the phone is known when it is shown
    here.history.decide(decision_key(1), ["action_1"], identities=both, propensity=0.25)
    here.history.know(dict([ANNA]))
    here.history.report(decision_key(1), "action_1")
    assert told(here, PHONE) == {"action_1": (0.25, 1.0, 0)}
    assert told(here, ANNA) == {}


def test_decisions_from_before_history_was_kept_and_goals_that_keep_none_count_for_nothing() -> None:
    here = people()
    here.history.decide(decision_key(1), ["action_1"], identities=dict([ANNA]))
    here.history.report(decision_key(1), "action_1")
    assert told(here) == {}
    here = people(SWITCHED_OFF)
    show(here, 2)
    here.history.report(decision_key(2), "action_1")
    assert told(here) == {}


def test_what_is_kept_outlives_a_change_of_catalog() -> None:
    here = people()
    show(here, 1)
    here.history.report(decision_key(1), "action_1")
    here.history.put_in_force(SWITCHED_OFF)
    show(here, 2)
    here.history.put_in_force(WITH_SILENCE)
    show(here, 3)
    assert told(here, later_us=WINDOW_US) == {"action_1": (0.5, 1.25, 0)}


def test_merged_people_have_one_history_and_each_their_own_after_a_split() -> None:
    here = people()
    here.history.know(dict([PHONE]))
    for number in range(6):
        whom = ANNA if number % 2 else PHONE
        show(here, number, f"action_{number % 3}", whom=whom)
        here.history.report(decision_key(number), f"action_{number % 3}", "click" if number < 3 else "dismiss")
    annas, phones = told(here, ANNA), told(here, PHONE)
    assert annas == {"action_1": (0.25, 1.0, 0), "action_0": (0.25, 0.0, 0), "action_2": (0.25, 0.0, 0)}
    here.history.link(ANNA, PHONE)
    assert told(here, ANNA) == told(here, PHONE) == {f"action_{i}": (0.5, 1.0, 0) for i in range(3)}
    here.history.split([PHONE], [ANNA])
    assert (told(here, ANNA), told(here, PHONE)) == (annas, phones)


def test_nothing_is_left_of_who_is_forgotten_and_later_outcomes_bring_nothing_back() -> None:
    here = people()
    show(here, 1)
    here.history.forget(bytes(16), [ANNA])
    here.history.know(dict([ANNA]))
    here.history.report(decision_key(1), "action_1")
    assert told(here) == {}


@pytest.mark.parametrize("n_tombstones", [1, 2])
def test_tombstones_count_for_nothing(n_tombstones: int) -> None:
    here = people()
    show(here, 1)
    show(here, 2)
    assert isinstance(here.log, MemoryLog)
    first = here.log.tail().lsn - 1
    for lsn in range(first, first + n_tombstones):
        erase(here.log, lsn)
    here.history.report(decision_key(1), "action_1")
    here.history.report(decision_key(2), "action_1")
    assert told(here) == ({"action_1": (0.25, 1.0, 0)} if n_tombstones == 1 else {})
