"""Outcomes that stop: noticed on evidence, never of what is rare, and never for less than a whole window."""

from __future__ import annotations

import math
import random

from training.flow import MISSED_MAX, Flow
from tsugi.log.v1.learner_pb2 import GoalFlow


def told(n_settled: int, n_closed: int) -> Flow:
    """Return a flow with a past."""
    flow = Flow()
    for i in range(n_closed):
        if i < n_settled:
            flow.arrive(0)
            flow.settle()
        flow.close(0, is_silent=i >= n_settled)
    flow.arrive(0)
    return flow


def n_until_stopped(flow: Flow, n_max: int = 1_000_000) -> int:
    """Return how many silent windows it takes."""
    for n in range(n_max):
        if flow.is_stopped:
            return n
        flow.close(1, is_silent=True)
    return n_max


def test_evidence_is_the_probability_of_so_long_a_silence_given_the_past() -> None:
    flow = told(100, 1_000)
    n = n_until_stopped(flow)
    log_chance = -100 * math.log((1_000 + n) / 1_000)  # of Gamma(100, 1,000), n more without any
    assert math.isclose(log_chance, -MISSED_MAX, rel_tol=0.02)


def test_goal_that_was_settled_too_rarely_is_never_held_to_be_stopped() -> None:
    assert n_until_stopped(told(10, 100_000), 300_000) == 300_000
    assert n_until_stopped(told(0, 1_000), 10_000) == 10_000


def test_windows_that_began_before_the_last_outcome_are_no_evidence() -> None:
    flow = told(500, 1_000)
    flow.arrive(10)
    for _ in range(10_000):
        flow.close(9, is_silent=True)
    assert not flow.is_stopped
    assert flow.n_missed == 0.0


def test_the_first_outcomes_do_not_make_a_rate_above_one() -> None:
    flow = Flow()
    for _ in range(1_000):
        flow.settle()
    flow.close(1, is_silent=True)
    assert flow.n_missed == 1.0


def test_steady_outcomes_of_any_rate_raise_no_alarm() -> None:
    """With a chance of 2e-9 an outcome of doing so: 4e-5 here."""
    rng = random.Random(1)
    for rate in (0.5, 0.05, 0.002):
        flow = Flow()
        for now_us in range(100_000):
            is_silent = rng.random() >= rate
            if not is_silent:
                flow.arrive(now_us)
                flow.settle()
            flow.close(now_us, is_silent=is_silent)
            assert not flow.is_stopped


def test_what_began_before_outcomes_returned_is_not_trusted() -> None:
    flow = told(500, 1_000)
    assert flow.is_trusted(0)
    n_until_stopped(flow)
    assert not flow.is_trusted(1_000)
    flow.arrive(50)
    assert (flow.is_trusted(49), flow.is_trusted(50)) == (False, True)
    assert flow.n_missed == 0.0


def test_what_was_saved_comes_back() -> None:
    flow = told(30, 100)
    n_until_stopped(flow)
    flow.arrive(77)
    saved = flow.save("visit")
    again = Flow()
    again.load(GoalFlow.FromString(saved.SerializeToString()))
    assert again.save("visit") == saved
