"""What came of what was shown: open chances count for nothing, limits hold, and no order of parts shows."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from server.catalog.history_terms import UNITS, name_key
from server.profiles import history
from server.profiles.history import HISTORIES_MAX, OPEN_MAX, ROWS_MAX, Sums
from tsugi.log.v1.state_pb2 import StoredChance, StoredPart

SECOND_US = 1_000_000


def shown(
    part: StoredPart, lsn: int, action: str = "a", *, now_us: int = 0, propensity: float = 0.25, silence: float = 0.0
) -> bool:
    chance = StoredChance(
        decision_lsn=lsn,
        close_us=now_us + SECOND_US,
        expected=round(propensity * UNITS),
        silence=round(silence * UNITS),
    )
    return history.begin(part, "g", action, chance, lsn, now_us)


def sums(now_us: int, *parts: StoredPart) -> dict[str, tuple[float, float, int]]:
    told = history.describe(parts, now_us)
    return {each.action: (each.expected / UNITS, each.observed / UNITS, each.n_open) for each in told}


def rows_at(now_us: int, *parts: StoredPart) -> dict[int, tuple[int, int]]:
    """Add up, by key of the action, the rows that count at an instant."""
    found: dict[int, tuple[int, int]] = {}
    for _, action, from_us, expected, observed in history.fold(parts).tolist():
        before = found.setdefault(action, (0, 0))
        if from_us <= now_us:
            found[action] = before[0] + expected, before[1] + observed
    return found


def test_chance_counts_when_its_window_closes_or_an_outcome_settles_it() -> None:
    part = StoredPart()
    assert shown(part, 1)
    assert shown(part, 2, now_us=10)
    assert sums(SECOND_US - 1, part) == {"a": (0.0, 0.0, 2)}
    assert sums(SECOND_US, part) == {"a": (0.25, 0.0, 1)}
    assert history.settle(part, "g", "a", 2, 1.0, 3, 20)
    assert sums(20, part) == {"a": (0.25, 1.0, 1)}
    assert sums(SECOND_US, part) == {"a": (0.5, 1.0, 0)}


def test_only_the_first_outcome_within_the_window_settles() -> None:
    part = StoredPart()
    shown(part, 1)
    assert not history.settle(part, "g", "a", 9, 1.0, 2, 0), "of another decision"
    assert not history.settle(part, "h", "a", 1, 1.0, 2, 0), "of another goal"
    assert not history.settle(part, "g", "b", 1, 1.0, 2, 0), "of another action"
    assert not history.settle(part, "g", "a", 1, 1.0, 2, SECOND_US), "too late by nothing"
    assert history.settle(part, "g", "a", 1, 0.5, 3, SECOND_US - 1)
    assert not history.settle(part, "g", "a", 1, 1.0, 4, SECOND_US - 1), "settled already"
    assert sums(SECOND_US, part) == {"a": (0.25, 0.5, 0)}


def test_silence_earns_its_reward_once_nothing_can_come_any_more() -> None:
    part = StoredPart()
    shown(part, 1, silence=0.1)
    assert sums(SECOND_US - 1, part) == {"a": (0.0, 0.0, 1)}
    assert sums(SECOND_US, part) == {"a": (0.25, 0.1, 0)}
    shown(part, 2, now_us=SECOND_US)  # adds up what has closed
    assert part.histories[0].observed == round(0.1 * UNITS)
    assert sums(SECOND_US, part) == {"a": (0.25, 0.1, 1)}


def test_adding_up_what_has_closed_changes_nothing_that_is_read_from_then_on() -> None:
    part = StoredPart()
    for lsn in range(1, 9):
        shown(part, lsn, now_us=lsn * 100_000, propensity=lsn / 10)
    instants = [SECOND_US * k // 10 for k in range(15, 30)]
    before = [sums(instant, part) for instant in instants]
    assert not history.settle(part, "g", "a", 1, 1.0, 9, 15 * SECOND_US // 10)
    history._close(part.histories[0], 15 * SECOND_US // 10)
    assert len(part.histories[0].open) < 8
    assert [sums(instant, part) for instant in instants] == before


def test_rows_say_at_every_instant_what_is_described() -> None:
    one, other = StoredPart(), StoredPart()
    for lsn in range(1, 7):
        shown(one if lsn % 2 else other, lsn, "ab"[lsn % 3 == 0], now_us=lsn * 1000, silence=0.25)
    history.settle(one, "g", "b", 3, 1.0, 7, 8000)
    for now_us in (8000, SECOND_US + 1000, SECOND_US + 3500, 2 * SECOND_US):
        told = history.describe([one, other], now_us)
        assert rows_at(now_us, one, other) == {name_key(each.action): (each.expected, each.observed) for each in told}
    assert history.fold([one, other]).tolist() == sorted(history.fold([one, other]).tolist())


def test_order_of_parts_does_not_show() -> None:
    parts = [StoredPart() for _ in range(3)]
    for lsn in range(1, 40):
        shown(parts[lsn % 3], lsn, "abcd"[lsn % 4], now_us=lsn, propensity=0.1 + lsn / 97)
    wanted = history.fold(parts)
    assert len(wanted)
    for order in permutations(parts):
        np.testing.assert_array_equal(history.fold(order), wanted)


def test_longest_untouched_goes_first_in_a_part_and_in_a_person() -> None:
    one, other = StoredPart(), StoredPart()
    for lsn in range(1, HISTORIES_MAX + 1):
        shown(one, lsn, f"a{lsn:03}")
    history.settle(one, "g", "a001", 1, 1.0, HISTORIES_MAX + 1, 0)
    shown(one, HISTORIES_MAX + 2, "new")
    assert len(one.histories) == HISTORIES_MAX
    assert {each.action for each in one.histories}.isdisjoint({"a002"}), "a001 was touched since"
    assert {"a001", "new"} <= {each.action for each in one.histories}
    assert [each.action for each in one.histories] == sorted(each.action for each in one.histories)
    for lsn in range(100, 110):
        shown(other, lsn, f"b{lsn}")
    told = [each.action for each in history.describe([one, other], 0)]
    assert len(told) == HISTORIES_MAX
    assert {f"b{lsn}" for lsn in range(100, 110)} <= set(told)
    assert not {f"a{lsn:03}" for lsn in range(3, 13)} & set(told)


def test_while_too_many_are_open_new_ones_count_for_nothing() -> None:
    part = StoredPart()
    for lsn in range(1, OPEN_MAX + 1):
        assert shown(part, lsn, "ab"[lsn % 2])
    assert not shown(part, 1000)
    assert not history.settle(part, "g", "a", 1000, 1.0, 1001, 0)
    assert shown(part, 1002, now_us=SECOND_US), "those before have closed"
    assert sum(each.n_open for each in history.describe([part], SECOND_US)) == 1
    assert sum(each.expected for each in history.describe([part], SECOND_US)) == OPEN_MAX * UNITS // 4


def test_rows_of_a_person_are_bounded_and_those_that_close_last_go() -> None:
    parts = [StoredPart() for _ in range(5)]
    for i, part in enumerate(parts):
        for lsn in range(OPEN_MAX):
            shown(part, 1 + lsn, now_us=i * 1000 + lsn)
    rows = history.fold(parts)
    assert len(rows) == ROWS_MAX
    assert rows[:, 2].max() < 4 * 1000 + SECOND_US


@pytest.mark.parametrize("parts", [[], [StoredPart()], [StoredPart(), StoredPart(lsn=3)]])
def test_who_was_shown_nothing_has_no_history(parts: list[StoredPart]) -> None:
    assert history.fold(parts).shape == (0, 5)
    assert history.describe(parts, 0) == []


def test_sums_are_whole_billionths() -> None:
    part = StoredPart()
    shown(part, 1, propensity=1 / 3)
    assert history.describe([part], SECOND_US) == [Sums("g", "a", 333_333_333, 0, 0)]
