"""The invented world is the one the benchmark says it is."""

from __future__ import annotations

import statistics

import pytest

from server.catalog.compile import compile_catalog
from tests.benchmark import world
from tsugi.v1.decision_service_pb2 import DecideRequest


@pytest.mark.slow
def test_people_have_between_two_and_all_actions_eligible_and_half_of_them_fewer_than_about_47() -> None:
    counts = world.eligible_counts(world.people())
    assert (min(counts), max(counts)) == (world._ALWAYS_ELIGIBLE, world.N_ACTIONS)
    assert 44 <= statistics.median(counts) <= 50


def test_learners_read_some_twenty_columns_and_the_champion_forty() -> None:
    catalog = compile_catalog(world.catalog_message())
    assert len(catalog.actions.names) == world.N_ACTIONS
    assert len(catalog.learned.names) == 23
    assert len(world.make_bundle(catalog).manifest.features) == 40


def test_everybody_is_asked_about_once_without_a_request_id() -> None:
    requests = [DecideRequest.FromString(message) for message in world.decide_messages(50)]
    assert {request.identities[0].value for request in requests} == {world.account(i) for i in range(50)}
    assert all(not request.request_id and request.placements[0].count == world.N_SLOTS for request in requests)
    assert len({str(request.context) for request in requests}) > 40


def test_the_same_seed_asks_the_same() -> None:
    assert world.decide_messages(20) == world.decide_messages(20)
    assert world.people(20) == world.people(20)
