"""Influence: shares are held to, old outcomes make room, and a restart forgets nobody."""

from __future__ import annotations

import random

import pytest

from training.influence import OUTCOMES_MIN, REPORTERS_MAX, Influence
from tsugi.log.v1.learner_pb2 import InfluenceState


@pytest.mark.parametrize("share_max", [0.3, 0.4, 0.9])
def test_whoever_reports_most_has_no_more_than_the_share(share_max: float) -> None:
    rng, influence, admitted = random.Random(1), Influence(), dict.fromkeys(("loud", "a", "b", "c"), 0)
    for i in range(8_000):
        reporter = "loud" if rng.random() < 0.95 else rng.choice(["a", "b", "c"])
        if influence.admit(reporter, share_max) and i > 1_000:
            admitted[reporter] += 1
    assert admitted["loud"] / sum(admitted.values()) <= share_max + 0.02


def test_the_first_few_count_whoever_reports_them() -> None:
    influence = Influence()
    assert [influence.admit("only", 0.01) for _ in range(30)].count(True) in (OUTCOMES_MIN, OUTCOMES_MIN + 1)


def test_those_forgotten_are_the_ones_with_the_least() -> None:
    influence = Influence()
    for i in range(REPORTERS_MAX + 5):
        for _ in range(2 if i < REPORTERS_MAX else 1):
            influence.admit(f"r{i}", 1.0)
    saved = influence.save("visit", "book")
    assert len(saved.reporters) == REPORTERS_MAX
    assert saved.reporters[-1] == f"r{REPORTERS_MAX + 4}", "who just reported stays"


def test_a_restored_influence_goes_on_to_the_bit() -> None:
    rng, influence, restored = random.Random(2), Influence(), Influence()
    for _ in range(500):
        influence.admit(rng.choice("abcdef"), 0.3)
    restored.load(InfluenceState.FromString(influence.save("visit", "book").SerializeToString()))
    for _ in range(500):
        reporter = rng.choice("abcdefgh")
        assert influence.admit(reporter, 0.3) == restored.admit(reporter, 0.3)
    assert influence.save("visit", "book") == restored.save("visit", "book")
