"""What a slot earns stays exact and small, however many outcomes there are."""

from __future__ import annotations

import random

import pytest

from server.catalog.catalog import Goal
from training.earning import OUTCOMES_MAX, Earning
from tsugi.log.v1.record_pb2 import SlotRecord
from tsugi.v1 import catalog_pb2

SETTLINGS = [number for number in catalog_pb2.Settling.values() if number]


def earning(settling: catalog_pb2.Settling) -> Earning:
    return Earning(SlotRecord(action="book"), Goal("visit", {}, 1, 0.25, -1.0, settling), -1.0)


def plain(settling: catalog_pb2.Settling, rewards: list[float]) -> float:
    """Return what rewards come to, from the words of the catalog's documentation."""
    if not rewards:
        return 0.25
    return {
        catalog_pb2.SETTLING_FIRST: rewards[0],
        catalog_pb2.SETTLING_LAST: rewards[-1],
        catalog_pb2.SETTLING_SUM: min(1.0, sum(rewards)),
        catalog_pb2.SETTLING_MAX: max(rewards),
    }[settling]


@pytest.mark.parametrize("settling", SETTLINGS)
def test_any_number_of_outcomes_come_to_what_they_should_and_sixteen_are_kept(settling: catalog_pb2.Settling) -> None:
    rng = random.Random(settling)
    earned, rewards = earning(settling), []
    for lsn in range(1, 60):
        rewards.append(rng.choice((0.0, 1 / 64, 1 / 32)))  # sums without rounding
        earned.count(lsn, rewards[-1])
        assert earned.reward() == plain(settling, rewards)
        assert len(earned.counted) == min(len(rewards), OUTCOMES_MAX)
        assert [each.lsn for each in earned.counted] == sorted(each.lsn for each in earned.counted)


@pytest.mark.parametrize("settling", SETTLINGS)
def test_taking_back_in_any_order_leaves_what_the_others_come_to(settling: catalog_pb2.Settling) -> None:
    rng = random.Random(settling)
    earned = earning(settling)
    left = {lsn: rng.randrange(65) / 64 for lsn in range(1, OUTCOMES_MAX + 1)}
    for lsn, reward in left.items():
        earned.count(lsn, reward)
    for lsn in rng.sample(sorted(left), OUTCOMES_MAX):
        assert earned.take_back(lsn)
        assert not earned.take_back(lsn)
        del left[lsn]
        assert earned.reward() == plain(settling, list(left.values()))


def test_sum_that_became_one_cannot_be_taken_back() -> None:
    earned = earning(catalog_pb2.SETTLING_SUM)
    for lsn in range(1, OUTCOMES_MAX + 2):
        earned.count(lsn, 1 / 64)
    assert not earned.take_back(1)
    assert earned.take_back(3)
    assert earned.reward() == OUTCOMES_MAX / 64
