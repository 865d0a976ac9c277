"""The paths that people took, from the log: which touchpoints came before each outcome, and which before none.

Handed a log's records and the catalogs they name, it collects who was told something on which channel, and who came to
an outcome of a goal; then it lays the touchpoints of each person in order of time and cuts them into paths. It writes
nothing, and reads no clock.

A touchpoint is a filled slot of a decision, on the channel of its placement, at the time of the decision. Where the
placement activates on impression it is one only when an outcome says that it was seen, at the time of the earliest such
outcome. An outcome counts when the catalog its decision was made under has the goal settle it with a reward above 0;
every one that was reported counts, unless it was taken back, however late. It is never placed before its decision.

The path of an outcome is the person's touchpoints less than a window before it, that of its own decision among them;
one touchpoint may serve several outcomes. Touchpoints that serve none make silent paths, cut where a window passed
without another one.

Cost sketch: some 30 µs a decision and 10 µs an outcome, 400 bytes and 30; the cutting is a few sorts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from server.catalog.catalog import Amounts, Doubles, Mask, Rows
from server.errors import limit_exceeded, not_found
from server.outcomes.attribution import CHANNELS_MAX, Paths, keep_newest
from server.profiles import repository
from server.storage.record import Record
from server.storage.store import Snapshot, Store
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, RecordKind
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_service_pb2 import DecideRequest

TOUCHPOINTS_READ_MAX: Final = 5_000_000
OUTCOMES_READ_MAX: Final = 5_000_000
TOUCHPOINTS_IN_PATHS_MAX: Final = 20_000_000
# Another worker's commit may put a decision after its first outcome; outcomes of decisions that are not read wait too.
PARKED_MAX: Final = 100_000

_DECISION: Final = RecordKind.RECORD_KIND_DECISION
_OUTCOME: Final = RecordKind.RECORD_KIND_OUTCOME
_UNSEEN: Final = -(1 << 63)  # no instant
_RESOLVED_TOGETHER: Final = 4_096  # in one read, of some ten milliseconds


class Meetings(NamedTuple):
    """Touchpoints and outcomes of people, in columns, in any order."""

    channels: tuple[str, ...]
    people: Rows  # int32[t]: whose touchpoint it is
    times_us: Amounts  # int64[t]
    codes: Rows  # int32[t]: index in channels
    outcome_people: Rows  # int32[o]: who came to the outcome
    outcome_times_us: Amounts  # int64[o]
    outcome_values: Doubles  # float64[o]


class Journeys(NamedTuple):
    """Paths, and what is to be known beside them."""

    paths: Paths  # ages in microseconds
    n_people: int  # with a touchpoint
    n_unled: int  # outcomes that no touchpoint within the window led to; in no path
    unled_value: float
    n_open: int  # silent paths whose last touchpoint may still lead to an outcome; among the paths
    n_cut: int  # paths longer than may be; of them the newest touchpoints are there


class _Terms(NamedTuple):
    """What is read of one catalog."""

    channels: dict[str, int]  # by placement, an index of the collector's
    successes: frozenset[str]  # outcome types


class _Decided(NamedTuple):
    """One decision that filled slots."""

    first: int  # index of its first touchpoint
    person: int
    now_us: int
    actions: tuple[str, ...]  # one a touchpoint
    is_seen_by_report: tuple[bool, ...]  # one a touchpoint: it is one when an outcome says so
    successes: frozenset[str]


class Collector:
    """Collects from records in the order of the log.

    Args:
        find_catalog: gives the catalog of a sha256; asked once for each.
        goal: whose outcomes count.
        since_us: decisions before this instant, and their outcomes, are passed over.

    Attributes:
        keys: of each person, what was recorded of who they are, the surest first.
        n_taken_back: outcomes of the goal that were taken back; told by meetings().
        n_unreadable: records that are not what they should be, passed over.
    """

    def __init__(self, find_catalog: Callable[[bytes], Catalog], goal: str, since_us: int = 0) -> None:
        self.keys: list[tuple[bytes, ...]] = []
        self.n_taken_back = 0
        self.n_unreadable = 0
        self._find_catalog = find_catalog
        self._goal = goal
        self._since_us = since_us
        self._has_goal = False
        self._terms: dict[bytes, _Terms] = {}
        self._channels: dict[str, int] = {}
        self._persons: dict[tuple[bytes, ...], int] = {}
        self._decided: dict[bytes, _Decided] = {}
        self._parked: dict[bytes, list[tuple[bytes, OutcomeRecord]]] = {}  # with their own keys
        self._people, self._times_us, self._codes = array("i"), array("q"), array("i")
        self._outcome_people, self._outcome_times_us, self._outcome_values = array("i"), array("q"), array("d")
        # Of each outcome and of each that is taken back its key and action, hashed: 64 bits tell millions apart.
        self._outcome_marks, self._taken_back = array("q"), array("q")

    def apply(self, record: Record) -> None:
        """Take in the next record; kinds that are not needed and tombstones are passed over.

        Raises:
            TsugiError: LIMIT_EXCEEDED: too many channels, touchpoints or outcomes.
            Exception: whatever find_catalog raises.
        """
        if record.is_tombstone or record.kind not in {_DECISION, _OUTCOME}:
            return
        try:
            if record.kind == _DECISION:
                self._decide(DecisionRecord.FromString(record.payload), record.subjects)
            else:
                self._happen(record.key, OutcomeRecord.FromString(record.payload))
        except DecodeError:
            self.n_unreadable += 1

    def meetings(self) -> Meetings:
        """Return what was collected.

        Outcomes whose decision was not, those that were taken back, and slots that nobody saw are left out.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND: no catalog in use has the goal.
        """
        if self._terms and not self._has_goal:
            raise not_found("goal", self._goal, "goal")
        times_us = np.array(self._times_us, np.int64)
        seen: Mask = times_us != _UNSEEN
        left: Mask = ~np.isin(np.array(self._outcome_marks, np.int64), np.array(self._taken_back, np.int64))
        self.n_taken_back = int(left.size - left.sum())
        return Meetings(
            channels=tuple(self._channels),
            people=np.array(self._people, np.int32)[seen],
            times_us=times_us[seen],
            codes=np.array(self._codes, np.int32)[seen],
            outcome_people=np.array(self._outcome_people, np.int32)[left],
            outcome_times_us=np.array(self._outcome_times_us, np.int64)[left],
            outcome_values=np.array(self._outcome_values, np.float64)[left],
        )

    def _decide(self, decision: DecisionRecord, subjects: tuple[bytes, ...]) -> None:
        if decision.now_us < self._since_us:
            return
        terms = self._terms_of(decision.provenance.catalog_sha256)
        placements = DecideRequest.FromString(decision.request).placements
        filled = [slot for slot in decision.slots if slot.action]
        if any(
            slot.placement_index >= len(placements) or placements[slot.placement_index].placement not in terms.channels
            for slot in filled
        ):
            self.n_unreadable += 1
            return
        if not filled:
            return
        person = self._person(decision, subjects)
        decided = _Decided(
            len(self._times_us), person, decision.now_us, tuple([slot.action for slot in filled]),
            tuple([slot.on_impression for slot in filled]), terms.successes,
        )  # fmt: skip
        for slot in filled:
            self._people.append(person)
            self._times_us.append(_UNSEEN if slot.on_impression else decision.now_us)
            self._codes.append(terms.channels[placements[slot.placement_index].placement])
        if len(self._times_us) > TOUCHPOINTS_READ_MAX:
            raise limit_exceeded("since", len(self._times_us), TOUCHPOINTS_READ_MAX, "touchpoints; begin later")
        self._decided[decision.decision_key] = decided
        for key, outcome in self._parked.pop(decision.decision_key, ()):
            self._apply_outcome(decided, key, outcome)

    def _happen(self, key: bytes, outcome: OutcomeRecord) -> None:
        decided = self._decided.get(outcome.decision_key)
        if decided is not None:
            self._apply_outcome(decided, key, outcome)
            return
        self._parked.setdefault(outcome.decision_key, []).append((key, outcome))
        if len(self._parked) > PARKED_MAX:
            del self._parked[next(iter(self._parked))]

    def _apply_outcome(self, decided: _Decided, key: bytes, outcome: OutcomeRecord) -> None:
        if outcome.action not in decided.actions:
            return
        if outcome.revoked_key:  # no outcome itself, whatever type it names; it may come before what it takes back
            self._taken_back.append(hash((outcome.revoked_key, outcome.action)))
            return
        time_us = max(outcome.occurrence_time_us, decided.now_us)
        for i, action in enumerate(decided.actions, decided.first):
            if action == outcome.action and decided.is_seen_by_report[i - decided.first]:
                seen_us = self._times_us[i]
                self._times_us[i] = time_us if seen_us == _UNSEEN else min(seen_us, time_us)
        if outcome.type in decided.successes:
            self._outcome_people.append(decided.person)
            self._outcome_times_us.append(time_us)
            self._outcome_values.append(outcome.value)
            self._outcome_marks.append(hash((key, outcome.action)))
            if len(self._outcome_times_us) > OUTCOMES_READ_MAX:
                raise limit_exceeded("since", len(self._outcome_times_us), OUTCOMES_READ_MAX, "outcomes; begin later")

    def _person(self, decision: DecisionRecord, subjects: tuple[bytes, ...]) -> int:
        """Return a number for whom a decision was about; one about nobody is somebody's of its own."""
        keys: tuple[bytes, ...] = (decision.profile_key,)
        if not decision.profile_key:
            claimed = frozenset(decision.claimed_subjects)
            keys = tuple([key for key in subjects if key not in claimed]) or (decision.decision_key,)
        person = self._persons.setdefault(keys, len(self.keys))
        if person == len(self.keys):
            self.keys.append(keys)
        return person

    def _terms_of(self, sha256: bytes) -> _Terms:
        if sha256 not in self._terms:
            catalog = self._find_catalog(sha256)
            goals = [goal for goal in catalog.goals if goal.name == self._goal]
            self._has_goal = self._has_goal or bool(goals)
            for channel in catalog.channels:
                self._channels.setdefault(channel.name, len(self._channels))
            if len(self._channels) > CHANNELS_MAX:
                raise limit_exceeded("channels", len(self._channels), CHANNELS_MAX)
            self._terms[sha256] = _Terms(
                {each.name: self._channels[each.channel] for each in catalog.placements},
                frozenset(each.type for goal in goals for each in goal.outcomes if each.reward > 0.0),
            )
        return self._terms[sha256]


def with_recorded_keys(meetings: Meetings, keys: list[tuple[bytes, ...]]) -> Meetings:
    """Take for one person whoever has the same surest recorded key: what became of profiles since is not looked at."""
    return _renumbered(meetings, [each[0] for each in keys])


def with_present_profiles(meetings: Meetings, keys: list[tuple[bytes, ...]], store: Store) -> Meetings:
    """Take for one person whoever has one profile now, as the projector has it.

    A recorded profile key leads to the profile it was merged into; strangers are found by the first identity that is
    known by now. After a split what was recorded under a profile stays with the identity that began it.

    Cost: some 3 µs a person, in reads of 4,096 people.
    """
    found: list[bytes] = []
    for first in range(0, len(keys), _RESOLVED_TOGETHER):
        with store.read() as snapshot:
            found += [_present(snapshot, each) for each in keys[first : first + _RESOLVED_TOGETHER]]
    return _renumbered(meetings, found)


def lay_out(meetings: Meetings, window_us: int, now_us: int) -> Journeys:
    """Cut the touchpoints of people into paths, those to outcomes first, then the silent ones.

    Args:
        meetings: in any order; touchpoints of one person and instant keep their order.
        window_us: above 0; a touchpoint exactly so much before an outcome does not count.
        now_us: log time at the end.

    Raises:
        TsugiError: LIMIT_EXCEEDED: the paths have too many touchpoints together.
    """
    order = np.lexsort((meetings.times_us, meetings.people))
    people, times_us, codes = meetings.people[order], meetings.times_us[order], meetings.codes[order]
    begins_us, ends_us = meetings.outcome_times_us - window_us, meetings.outcome_times_us
    # One number for person and instant, so that one search finds a span of a person's touchpoints.
    instants = np.unique(np.concatenate((times_us, begins_us, ends_us)))
    places = people.astype(np.int64) * instants.size + np.searchsorted(instants, times_us)
    persons = meetings.outcome_people.astype(np.int64) * instants.size
    lows = np.searchsorted(places, persons + np.searchsorted(instants, begins_us), side="right")
    highs = np.searchsorted(places, persons + np.searchsorted(instants, ends_us), side="right")
    led: Mask = highs > lows
    silent_lows, silent_highs = _silent(people, times_us, lows, highs, window_us)
    all_lows, all_highs = np.concatenate((lows[led], silent_lows)), np.concatenate((highs[led], silent_highs))
    lengths = all_highs - all_lows
    if (together := int(lengths.sum())) > TOUCHPOINTS_IN_PATHS_MAX:
        raise limit_exceeded("window", together, TOUCHPOINTS_IN_PATHS_MAX, "touchpoints in all paths; take less time")
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    rows = np.arange(together) - np.repeat(starts[:-1] - all_lows, lengths)
    path_ends_us = np.concatenate((ends_us[led], times_us[silent_highs - 1]))
    n_led, n_silent = int(led.sum()), silent_lows.size
    paths, n_cut = keep_newest(
        Paths(
            codes=codes[rows],
            starts=starts,
            outcomes=np.repeat(np.array([1, 0], np.int64), (n_led, n_silent)),
            values=np.concatenate((meetings.outcome_values[led], np.zeros(n_silent))),
            silences=np.repeat(np.array([0, 1], np.int64), (n_led, n_silent)),
            ages=(np.repeat(path_ends_us, lengths) - times_us[rows]).astype(np.float64),
        )
    )
    return Journeys(
        paths=paths,
        n_people=np.unique(people).size,
        n_unled=led.size - n_led,
        unled_value=float(meetings.outcome_values[~led].sum()),
        n_open=int((path_ends_us[n_led:] + window_us > now_us).sum()),
        n_cut=n_cut,
    )


def _silent(people: Rows, times_us: Amounts, lows: Amounts, highs: Amounts, window_us: int) -> tuple[Amounts, Amounts]:
    """Return the spans of neighbouring touchpoints that are in no path to an outcome."""
    changes = np.bincount(lows, minlength=people.size + 1) - np.bincount(highs, minlength=people.size + 1)
    rows = np.flatnonzero(np.cumsum(changes[:-1]) == 0)
    begins: Mask = np.ones(rows.size, np.bool_)
    before, after = rows[:-1], rows[1:]
    begins[1:] = (
        (after != before + 1)
        | (people[after] != people[before])
        | (times_us[after] - times_us[before] >= window_us)
    )  # fmt: skip
    ends = np.concatenate((begins[1:], np.ones(min(rows.size, 1), np.bool_)))
    return rows[begins], rows[ends] + 1


def _present(snapshot: Snapshot, keys: tuple[bytes, ...]) -> bytes:
    """Return the key of a person's profile, or what was recorded first where the state knows of none."""
    return repository.present_key(snapshot, keys[0]) or repository.find(snapshot, keys) or keys[0]


def _renumbered(meetings: Meetings, keys: list[bytes]) -> Meetings:
    numbers: dict[bytes, int] = {}
    person_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
    return meetings._replace(people=person_of[meetings.people], outcome_people=person_of[meetings.outcome_people])
