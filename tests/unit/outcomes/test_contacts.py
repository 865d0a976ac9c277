from __future__ import annotations

from itertools import permutations

import pytest

from tests.support.deciding import Desk, key_of
from tests.support.histories import SECOND_US, START_US, decision_key, erase
from tests.support.projecting import ANNA, CATALOG, ONE, TWO, World
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.requests import decide_request


@pytest.fixture
def world() -> World:
    world = World()
    world.history.put_in_force(CATALOG)
    return world


@pytest.fixture
def anna(world: World) -> bytes:
    """Gives the profile key of somebody known."""
    key = world.history.profile_key(world.history.know(ANNA))
    world.project()
    return key


def test_decision_counts_its_contacts_at_once(world: World, anna: bytes) -> None:
    world.history.now_us += SECOND_US
    world.history.decide(ONE, ["action_1", "", "action_2"], profile_key=anna)
    world.history.now_us += SECOND_US
    world.history.decide(TWO, ["action_1"], profile_key=anna)
    world.history.decide(decision_key(3), ["action_1"])  # for somebody not known
    world.history.report(ONE, "action_1")
    world.project()
    assert world.contacts(anna) == {
        "action_1": (2, START_US + 2 * SECOND_US),
        "action_2": (1, START_US + SECOND_US),
    }
    assert world.quarantined() == {}


@pytest.mark.slow  # the kernels are loaded
def test_decision_of_the_core_over_the_projected_state_counts_its_contacts(world: World, anna: bytes) -> None:
    desk = Desk(CATALOG)
    desk.store = world.store
    request = decide_request({"greedy": 2, "mail": 1}, identities=ANNA)
    answer = desk.ask(request, now_us=START_US)
    assert answer.record.profile_key == anna
    world.history.record(RecordKind.RECORD_KIND_DECISION, answer.record, key_of("d"))
    world.project()
    chosen = [slot.action for slot in answer.reply.slots]
    assert set(world.contacts(anna)) == set(chosen[:2])
    world.history.report(key_of("d"), chosen[2], "impression")
    world.project()
    assert set(world.contacts(anna)) == set(chosen)


def test_on_impression_the_first_outcome_counts_the_contact_and_no_other_does(world: World, anna: bytes) -> None:
    world.history.decide(ONE, ["action_1", "action_2"], profile_key=anna, on_impression=True)
    world.project()
    assert world.contacts(anna) == {}
    world.history.now_us += SECOND_US
    world.history.report(ONE, "action_1", "impression")
    world.project()
    assert world.contacts(anna) == {"action_1": (1, START_US + SECOND_US)}
    world.history.now_us += SECOND_US
    world.history.report(ONE, "action_1", "click")
    world.history.report(ONE, "action_1", "impression")
    world.history.report(ONE, "action_2", "click")
    world.project()
    assert world.contacts(anna) == {
        "action_1": (1, START_US + SECOND_US),
        "action_2": (1, START_US + 2 * SECOND_US),
    }


def test_outcome_before_its_decision_is_parked_and_counts_when_the_decision_comes(world: World, anna: bytes) -> None:
    early = world.history.report(ONE, "action_1")
    also_early = world.history.report(ONE, "action_1", "impression")
    other = world.history.report(TWO, "action_1")
    world.project()
    assert world.parked() == [early, also_early, other]
    world.history.now_us += SECOND_US
    world.history.decide(ONE, ["action_1"], profile_key=anna, on_impression=True)
    world.project()
    assert world.contacts(anna) == {"action_1": (1, START_US)}  # the instant is that of the outcome
    assert world.parked() == [other]
    world.history.report(ONE, "action_1")
    world.project()
    assert world.contacts(anna) == {"action_1": (1, START_US)}


def test_contacts_do_not_depend_on_the_order_of_decision_and_outcomes() -> None:
    for order in permutations(range(4)):
        world = World()
        world.history.put_in_force(CATALOG)
        anna = world.history.profile_key(world.history.know(ANNA))
        for step in order:
            if step == 0:
                world.history.decide(ONE, ["action_1", "action_2"], profile_key=anna, on_impression=True)
            else:
                world.history.report(
                    ONE, *[("action_1", "impression"), ("action_1", "click"), ("action_2", "click")][step - 1]
                )
        world.project()
        assert world.parked() == []
        assert world.contacts(anna) == {"action_1": (1, START_US), "action_2": (1, START_US)}


def test_outcome_for_an_action_the_decision_did_not_choose_is_set_aside(world: World, anna: bytes) -> None:
    world.history.decide(ONE, ["action_1"], profile_key=anna)
    wrong = world.history.report(ONE, "action_2")
    world.project()
    assert world.quarantined() == {wrong: "the decision did not choose the outcome's action"}


def test_parked_outcome_that_does_not_fit_is_set_aside_alone(world: World, anna: bytes) -> None:
    wrong = world.history.report(ONE, "action_3")
    right = world.history.report(ONE, "action_1")
    decided = world.history.decide(ONE, ["action_1"], profile_key=anna, on_impression=True)
    world.project()
    assert world.quarantined() == {wrong: "the decision did not choose the outcome's action"}
    assert world.contacts(anna) == {"action_1": (1, START_US)}
    assert world.parked() == []
    assert wrong < right < decided


def test_erased_parked_outcome_is_let_go_when_its_decision_comes(world: World, anna: bytes) -> None:
    outcome = world.history.report(ONE, "action_1")
    world.project()
    erase(world.log, outcome)
    world.history.decide(ONE, ["action_1"], profile_key=anna, on_impression=True)
    world.project()
    assert world.parked() == []
    assert world.contacts(anna) == {}
