"""How evenly a worker's choices lie over actions, and the alarm when exploring has collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf import json_format
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from structlog.typing import EventDict

from server.catalog.catalog import Catalog
from server.decisioning.choices import DECISIONS_MIN, ENTROPY_MIN, Choices, _Tally
from server.decisioning.decide import NO_EXPLORATION, RANDOM_CONTROL
from tests.support import catalogs
from tests.support.deciding import Desk, given_champion, key_of
from tsugi.v1.decision_service_pb2 import DecideRequest

SOFT = {"softmax": {"temperature": 0.05}}


@pytest.fixture
def logs() -> Iterator[list[EventDict]]:
    with capture_logs() as logs:
        yield logs


def world(**best: float) -> Catalog:
    placements: list[dict[str, Any]] = [
        {"name": name, "channel": "web", "goal": "click", "countMax": 4, "exploration": exploration}
        for name, exploration in (
            ("soft", SOFT), ("even", {"epsilonGreedy": {"epsilon": 1.0}}), ("never", {"epsilonGreedy": {}}),
            ("floored", {"greedy": {}, "probabilityMin": 0.05}), ("plain", {"greedy": {}}),
        )
    ]  # fmt: skip
    return catalogs.compiled(placements=placements, **best)


def entropy_of(placement: str) -> float | None:
    return REGISTRY.get_sample_value("tsugi_choice_entropy", {"placement": placement})


def choose(choices: Choices, desk: Desk, placement: str, n: int, mode: int | None = None, **request: Any) -> None:
    """Have n choices counted, 100 of them different."""
    message = json_format.ParseDict({"placements": [{"placement": placement, "count": 2}]} | request, DecideRequest())
    for size in (100, n % 100):
        keys = [key_of(f"{placement} {i}") for i in range(size)]
        n_times = n // 100 if size == 100 else 1
        if keys and n_times:
            batch, decisions = desk.decisions([message] * size, 0, keys, mode)
            for _ in range(n_times):
                choices.note(batch, decisions)
    choices.tell()


def test_tally_is_the_entropy_of_what_was_chosen_over_that_of_choosing_evenly() -> None:
    tally = _Tally()
    for i in range(200_000):  # more than the weights' room
        tally.add(i % 4, 4)
    assert tally.entropy() == pytest.approx(1.0, abs=1e-4)
    for _ in range(20_000):
        tally.add(0, 4)
    assert tally.entropy() < 1e-6, "what was chosen long ago is forgotten"
    for i in range(20_000):
        tally.add(i % 10 == 0, 2)
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    assert tally.entropy() == pytest.approx(expected, rel=0.02)


def test_even_choices_are_told_as_even_and_collapsed_ones_warned_of_once(logs: list[EventDict]) -> None:
    catalog = world()
    even, choices = Desk(catalog), Choices()
    choose(choices, even, "even", DECISIONS_MIN)
    assert entropy_of("even") == pytest.approx(1.0, abs=0.05)
    assert not logs
    # One action is so far ahead that a softmax gives the others less than one in ten million.
    ahead = Desk(catalog, champion=given_champion(catalog, {"action_1": 0.9}, "click"))
    alarms = REGISTRY.get_sample_value("tsugi_alarms_total", {"alarm": "choices"}) or 0.0
    choose(choices, ahead, "soft", DECISIONS_MIN - 1)
    assert not logs, "too few to judge"
    for _ in range(2):
        choose(choices, ahead, "soft", 10)
    collapsed = entropy_of("soft")
    assert collapsed is not None and collapsed < ENTROPY_MIN
    (warning,) = logs
    assert (warning["event"], warning["placement"]) == ("choices_collapsed", "soft")
    assert REGISTRY.get_sample_value("tsugi_alarms_total", {"alarm": "choices"}) == alarms + 1
    choose(choices, even, "soft", 300)
    choose(choices, ahead, "soft", 6_000)
    assert [entry["event"] for entry in logs] == ["choices_collapsed"] * 2, "each crossing is one"


@pytest.mark.parametrize("mode", [NO_EXPLORATION, RANDOM_CONTROL])
def test_decisions_that_do_not_explore_are_not_counted(mode: int) -> None:
    catalog, choices = world(), Choices()
    desk = Desk(catalog)
    choose(choices, desk, "soft", 3, mode=mode)
    choose(choices, desk, "soft", 3, preview=True)
    choose(choices, desk, "soft", 3, candidateActions=["action_2"])
    for placement in ("plain", "never"):
        choose(choices, desk, placement, 3)
    assert not choices._tallies
    choose(choices, desk, "floored", 3)
    assert [tally.n for tally in choices._tallies.values()] == [3], "the first slot of each"


def test_another_catalog_begins_anew_and_leaves_no_alarming_number(logs: list[EventDict]) -> None:
    catalog, choices = world(), Choices()
    choose(choices, Desk(catalog, champion=given_champion(catalog, {"action_1": 0.9}, "click")), "soft", DECISIONS_MIN)
    assert [entry["event"] for entry in logs] == ["choices_collapsed"]
    choose(choices, Desk(world()), "even", 1)
    assert entropy_of("soft") == 1.0
