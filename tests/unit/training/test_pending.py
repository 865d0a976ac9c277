"""Silences still to come: counted slot by slot, and taken out of what is stated."""

from __future__ import annotations

import math
import random

import pytest

from training.pending import PRIOR_ROWS, Pending


def test_nothing_is_in_excess_without_early_rewards_or_without_anybody_waiting() -> None:
    pending = Pending()
    for _ in range(1_000):
        pending.open()
    assert pending.excess(0.05, 0.0) == 0.0
    alone = Pending()
    alone.open(1.0)
    assert alone.excess(0.05, 0.0) == 0.0


def test_early_rewards_bring_as_many_failures_as_the_base_rate_says_or_as_wait() -> None:
    pending = Pending()
    for _ in range(950):
        pending.open()
    pending.open()
    pending.settle(1.0, None)
    assert pending.excess(0.1, 200.0) == pytest.approx(math.log1p(9.0 / (200.0 + PRIOR_ROWS)))
    for _ in range(200):
        pending.open(1.0)
    assert pending.excess(0.1, 200.0) == pytest.approx(math.log1p(950.0 / (200.0 + PRIOR_ROWS)))


def test_slots_come_and_go_in_any_order() -> None:
    rng, pending = random.Random(1), Pending()
    slots: list[float | None] = []
    for _ in range(3_000):
        if rng.random() < 0.4 or not slots:
            pending.open()
            slots.append(None)
            continue
        place = rng.randrange(len(slots))
        if rng.random() < 0.5:
            reward = rng.choice((0.0, 0.3, 1.0))
            pending.settle(reward, slots[place])
            slots[place] = reward
        else:
            pending.close(slots.pop(place))
        assert pending.waiting == sum(taught is None for taught in slots)
        assert pending.early == sum(round(1e6 * (taught or 0.0)) for taught in slots)


def test_what_is_left_of_a_stream_with_a_window_is_the_rate_itself() -> None:
    """One chance in ten, rewards at once, silence 500 slots late: what is stated comes nearer, on the safe side."""
    rng, pending, failures, rewards = random.Random(2), Pending(), 0.0, 0.0
    waiting: list[float | None] = []
    for _ in range(1_200):
        is_success = rng.random() < 0.1
        pending.open()
        if is_success:
            pending.settle(1.0, None)
            rewards += 1.0
        waiting.append(1.0 if is_success else None)
        if len(waiting) > 500:
            taught = waiting.pop(0)
            pending.close(taught)
            failures += taught is None
    learned = math.log(rewards / (failures + PRIOR_ROWS))
    meant = math.log(0.1 / 0.9)
    assert learned - meant > 0.25
    assert -0.2 < learned - pending.excess(0.1, failures) - meant < 0.0
