"""Which turns count: those that nobody disturbed, whatever they measured."""

from __future__ import annotations

from tests.benchmark.closed_loop import undisturbed
from tests.benchmark.stage import Plan

NOISE = ["others used the server's core: 40%"]


def _play(*are_disturbed: bool, n_rounds: int = 3, n_turns_max: int = 6) -> tuple[list[int], list[str], int]:
    """Play turns that measure their own number; return what counts, what makes it void, and how many were played."""
    script = iter(enumerate(are_disturbed))
    played = []

    def turn() -> tuple[int, list[str]]:
        number, is_disturbed = next(script)
        played.append(number)
        return number, NOISE if is_disturbed else []

    plan = Plan(n_profiles=1, n_rounds=n_rounds, n_turns_max=n_turns_max, round_s=1, open_loop_s=1, n_lags=1)
    return *undisturbed(plan, turn), len(played)


def test_no_more_turns_are_played_than_wanted_when_nobody_disturbs() -> None:
    assert _play(False, False, False, False) == ([0, 1, 2], [], 3)


def test_a_disturbed_turn_is_played_again_and_does_not_count() -> None:
    assert _play(False, True, False, False) == ([0, 2, 3], [], 4)


def test_turns_end_and_all_of_them_are_void_when_too_many_are_disturbed() -> None:
    assert _play(True, True, False, True, False, True) == ([0, 1, 2, 3, 4, 5], NOISE * 4, 6)


def test_three_undisturbed_turns_are_enough_when_more_were_wanted() -> None:
    assert _play(False, True, False, True, False, True, n_rounds=5) == ([0, 2, 4], [], 6)


def test_a_quick_run_plays_one_turn_and_keeps_it() -> None:
    assert _play(True, n_rounds=1, n_turns_max=1) == ([0], NOISE, 1)
