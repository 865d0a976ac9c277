"""What came of what a person was shown: how many successes were expected, and how many were observed.

Kept in the parts of a person, of each goal and action, in whole billionths, so that the sums over parts are the same
whatever merged and split before. A *chance* is one time that an action was shown; while neither an outcome settled it
nor its goal's window closed it counts for nothing, because it may still succeed. From when on silence counts is kept
with it, so that whoever reads at an instant sees every window that closed before, and no timer is needed.

Expected is the sum of the propensities *before* the person's own history counted. Were it of those after, a factor
would be measured against itself, and settle at its own square root.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Final, NamedTuple

import numpy as np

from server.catalog.history_terms import UNITS, name_key
from server.catalog.profile_terms import Instants
from tsugi.log.v1.state_pb2 import StoredChance, StoredHistory, StoredPart

HISTORIES_MAX: Final = 64  # goals with actions in a part, and in a person; the longest untouched goes first
OPEN_MAX: Final = 256  # chances in a part; while there are as many, new ones count for nothing, as with the learner
ROWS_MAX: Final = 1_024  # of a person; of open chances those that close last are left out
# A slot that counts from its first outcome is given up after its goal's window without one, but not before this; the
# same as in training.rewards, so that what counts here is what is learned from.
UNSEEN_WAIT_US_MIN: Final = 600_000_000

NO_HISTORY: Final[Instants] = np.zeros((0, 5), np.int64)
NO_HISTORY.flags.writeable = False
ROW_BYTES: Final = 40


class Sums(NamedTuple):
    """What came of one action, of one goal, at an instant; billionths."""

    goal: str
    action: str
    expected: int
    observed: int
    n_open: int


def begin(part: StoredPart, goal: str, action: str, chance: StoredChance, lsn: int, now_us: int) -> bool:
    """Note that an action was shown; say whether that changed anything.

    Args:
        part: changed.
        goal: whose propensity it had.
        action: which.
        chance: the decision's; its expected is above 0.
        lsn: of the log record by which it counts.
        now_us: its log time.
    """
    if sum(len(each.open) for each in part.histories) >= OPEN_MAX:
        for each in part.histories:
            _close(each, now_us)
        if sum(len(each.open) for each in part.histories) >= OPEN_MAX:
            return False
    place = _place(part, goal, action)
    if place == len(part.histories) or not _is_of(part.histories[place], goal, action):
        part.histories.insert(place, StoredHistory(goal=goal, action=action))
    history = part.histories[place]
    _close(history, now_us)
    history.open.append(chance)
    history.lsn = max(history.lsn, lsn)
    if len(part.histories) > HISTORIES_MAX:
        part.histories.remove(min(part.histories, key=_touched))
    return True


def settle(part: StoredPart, goal: str, action: str, decision_lsn: int, reward: float, lsn: int, now_us: int) -> bool:
    """Credit a reward to a chance that is open; say whether there was one.

    Args:
        part: changed.
        goal: whose reward.
        action: which.
        decision_lsn: of the chance.
        reward: 0..1.
        lsn: of the outcome.
        now_us: its log time; from the chance's close_us on it is late.
    """
    place = _place(part, goal, action)
    if place == len(part.histories) or not _is_of(part.histories[place], goal, action):
        return False
    history = part.histories[place]
    for chance in history.open:
        if chance.decision_lsn == decision_lsn and now_us < chance.close_us:
            history.expected += chance.expected
            history.observed += round(reward * UNITS)
            history.lsn = max(history.lsn, lsn)
            history.open.remove(chance)
            _close(history, now_us)
            return True
    return False


def fold(parts: Iterable[StoredPart]) -> Instants:
    """Return what a person's history says, over all parts in any order.

    Returns:
        int64[h, 5]: key of the goal, of the action, from when on the row counts, expected and observed, to be added up;
        ascending, read-only.

    Cost: some 2 µs a goal and action.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    for entries in _gathered(parts):
        goal_key, action_key = name_key(entries[0].goal), name_key(entries[0].action)
        expected, observed = 0, 0
        for entry in entries:
            expected += entry.expected
            observed += entry.observed
            rows += [(goal_key, action_key, each.close_us, each.expected, each.silence) for each in entry.open]
        if expected or observed:
            rows.append((goal_key, action_key, 0, expected, observed))
    if not rows:
        return NO_HISTORY
    if len(rows) > ROWS_MAX:
        rows = sorted(rows, key=lambda row: (row[2], row))[:ROWS_MAX]
    rows.sort()
    # Flat: rows of tuples would cost an array several times as much.
    history = np.array(list(chain.from_iterable(rows)), np.int64).reshape(len(rows), 5)
    history.flags.writeable = False
    return history


def describe(parts: Iterable[StoredPart], now_us: int) -> list[Sums]:
    """Return what a person's history says at an instant, by goal, then action."""
    told = []
    for entries in _gathered(parts):
        closed = [each for entry in entries for each in entry.open if each.close_us <= now_us]
        expected = sum(each.expected for each in entries) + sum(each.expected for each in closed)
        observed = sum(each.observed for each in entries) + sum(each.silence for each in closed)
        n_open = sum(len(each.open) for each in entries) - len(closed)
        told.append(Sums(entries[0].goal, entries[0].action, expected, observed, n_open))
    return told


def _gathered(parts: Iterable[StoredPart]) -> list[list[StoredHistory]]:
    """Bring together what all parts say of the same goal and action: those touched last, by goal, then action."""
    filled = [part for part in parts if part.histories]
    if len(filled) == 1:
        return [[each] for each in filled[0].histories]
    found: dict[tuple[str, str], list[StoredHistory]] = {}
    for part in filled:
        for each in part.histories:
            found.setdefault((each.goal, each.action), []).append(each)
    newest = sorted(found.values(), key=lambda entries: max(map(_touched, entries)))[-HISTORIES_MAX:]
    return sorted(newest, key=lambda entries: (entries[0].goal, entries[0].action))


def _close(history: StoredHistory, now_us: int) -> None:
    """Add up the chances whose windows have closed; nobody who reads later can tell."""
    closed = [each for each in history.open if each.close_us <= now_us]
    for chance in closed:
        history.expected += chance.expected
        history.observed += chance.silence
        history.open.remove(chance)


def _place(part: StoredPart, goal: str, action: str) -> int:
    """Return where the history of a goal and action stands, or would."""
    return next(
        (i for i, each in enumerate(part.histories) if (each.goal, each.action) >= (goal, action)), len(part.histories)
    )


def _is_of(history: StoredHistory, goal: str, action: str) -> bool:
    return (history.goal, history.action) == (goal, action)


def _touched(history: StoredHistory) -> tuple[int, str, str]:
    return history.lsn, history.goal, history.action
