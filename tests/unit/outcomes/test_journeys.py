"""Paths from a log: what is a touchpoint, what an outcome, and where a path begins and ends."""

from __future__ import annotations

import pytest

from server.errors import TsugiError
from server.outcomes import journeys
from server.outcomes.journeys import Collector, Journeys, lay_out, with_present_profiles, with_recorded_keys
from server.outcomes.projector import Projector, is_of
from server.storage.log import follow
from server.storage.memory import MemoryLog, MemoryStore
from tests.support.attributing import CATALOG, HOUR_US, Path, Story, at, told
from tests.support.histories import decision_key, erase
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.v1.error_reason_pb2 import ErrorReason

WINDOW_US = 24 * HOUR_US
ANNA, BERTA = b"a" * 16, b"b" * 16


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
def story(log: MemoryLog) -> Story:
    return Story(log)


def collected(log: MemoryLog, goal: str = "click", since_us: int = 0) -> Collector:
    collector = Collector({CATALOG.sha256: CATALOG.message}.__getitem__, goal, since_us)
    for record in follow(log, 1):
        collector.apply(record)
    return collector


def journeys_of(log: MemoryLog, window_us: int = WINDOW_US, since_us: int = 0) -> tuple[Journeys, list[Path]]:
    collector = collected(log, since_us=since_us)
    meetings = with_recorded_keys(collector.meetings(), collector.keys)
    laid = lay_out(meetings, window_us, log.tail().time_us)
    return laid, told(laid, meetings.channels)


def test_touchpoints_of_a_person_lead_to_the_outcome_in_order_of_time(log: MemoryLog, story: Story) -> None:
    story.tell("letter", "lamp", hour=2, profile_key=ANNA)
    story.tell("letter", "rope", hour=3, profile_key=BERTA)
    key = story.tell("home", "book", "", "lamp", hour=1, profile_key=ANNA)  # the log is not in order of time
    story.come_to(key, "book", "order", hour=4, value=25.0)
    laid, paths = journeys_of(log)
    assert paths == [(["web", "web", "mail"], 1, 25.0), (["mail"], 0, 0.0)]
    assert (laid.paths.ages / HOUR_US).tolist() == [3.0, 3.0, 2.0, 0.0]
    assert (laid.n_people, laid.n_unled, laid.n_cut) == (2, 0, 0)


def test_only_what_the_goal_counts_as_a_success_is_an_outcome(log: MemoryLog, story: Story) -> None:
    key = story.tell("home", "book", hour=0, profile_key=ANNA)
    for outcome_type in ("impression", "dismiss", "never declared"):
        story.come_to(key, "book", outcome_type, hour=1)
    story.come_to(key, "lamp", "click", hour=1)  # the decision did not choose it
    story.come_to(decision_key(99), "book", "click", hour=1)  # was never decided
    _, paths = journeys_of(log)
    assert paths == [(["web"], 0, 0.0)]


def test_every_outcome_that_was_reported_counts(log: MemoryLog, story: Story) -> None:
    key = story.tell("home", "book", hour=0, profile_key=ANNA)
    story.come_to(key, "book", "order", hour=1, value=3.0)
    story.come_to(key, "book", "order", hour=2, value=4.0)
    _, paths = journeys_of(log)
    assert paths == [(["web"], 1, 3.0), (["web"], 1, 4.0)]


def test_outcome_that_was_taken_back_does_not_count_whenever_that_was_told(log: MemoryLog, story: Story) -> None:
    first, second, third, early = (decision_key(number) for number in range(50, 54))
    key = story.tell("home", "book", "lamp", hour=0, profile_key=ANNA)
    story.come_to(key, "book", "order", hour=1, value=3.0, outcome_key=first)
    story.come_to(key, "book", "order", hour=2, value=4.0, outcome_key=second)
    story.come_to(key, "lamp", "order", hour=3, value=5.0, outcome_key=third)
    story.come_to(key, "book", "order", hour=4, value=3.0, revoked_key=first, outcome_key=decision_key(60))
    story.come_to(key, "book", "", hour=5, revoked_key=first)  # again, by another id
    story.come_to(key, "book", "", hour=5, revoked_key=third)  # of another action: takes nothing back
    story.come_to(key, "book", "", hour=5, revoked_key=decision_key(60))  # a revocation: neither
    story.come_to(key, "book", "", hour=5, revoked_key=early)
    story.come_to(key, "book", "order", hour=6, value=7.0, outcome_key=early)
    collector = collected(log)
    assert collector.meetings().outcome_values.tolist() == [4.0, 5.0]
    assert collector.n_taken_back == 2


def test_decision_joins_what_was_reported_and_taken_back_before_it(log: MemoryLog, story: Story) -> None:
    key = decision_key(7)
    story.come_to(key, "book", "order", hour=1, value=5.0, revoked_key=decision_key(8))
    story.come_to(key, "book", "order", hour=1, value=5.0, outcome_key=decision_key(8))
    story.tell("home", "book", hour=0.5, profile_key=ANNA, key=key)
    assert journeys_of(log)[1] == [(["web"], 0, 0.0)]


def test_to_take_something_back_is_not_to_have_seen_it(log: MemoryLog, story: Story) -> None:
    key = story.tell("desk", "call", hour=0, profile_key=ANNA)
    story.come_to(key, "call", "impression", hour=1, revoked_key=decision_key(50))
    assert journeys_of(log)[1] == []


def test_touchpoint_counts_less_than_a_window_before(log: MemoryLog, story: Story) -> None:
    story.tell("letter", "lamp", hour=0, profile_key=ANNA)
    key = story.tell("home", "book", hour=20, profile_key=ANNA)
    story.come_to(key, "book", "click", hour=24 - 1e-6)
    story.come_to(key, "book", "click", hour=24)
    _, paths = journeys_of(log)
    assert paths == [(["mail", "web"], 1, 0.0), (["web"], 1, 0.0)]


def test_outcome_after_every_window_is_counted_apart(log: MemoryLog, story: Story) -> None:
    key = story.tell("home", "book", hour=0, profile_key=ANNA)
    story.come_to(key, "book", "order", hour=30, value=9.0)
    laid, paths = journeys_of(log)
    assert paths == [(["web"], 0, 0.0)]
    assert (laid.n_unled, laid.unled_value, laid.n_open) == (1, 9.0, 0)


def test_outcome_is_never_before_its_decision(log: MemoryLog, story: Story) -> None:
    """Clocks of callers differ."""
    key = story.tell("home", "book", hour=1, profile_key=ANNA)
    story.come_to(key, "book", "click", hour=0.95)
    laid, paths = journeys_of(log)
    assert paths == [(["web"], 1, 0.0)]
    assert laid.paths.ages.tolist() == [0.0]


def test_what_nobody_saw_is_no_touchpoint(log: MemoryLog, story: Story) -> None:
    story.tell("desk", "call", hour=0, profile_key=ANNA)
    key = story.tell("home", "book", hour=1, profile_key=ANNA)
    story.come_to(key, "book", "click", hour=2)
    assert journeys_of(log)[1] == [(["web"], 1, 0.0)]


def test_impression_makes_the_touchpoint_when_it_was(log: MemoryLog, story: Story) -> None:
    key = story.tell("desk", "call", hour=0, profile_key=ANNA)
    home = story.tell("home", "book", hour=2, profile_key=ANNA)
    story.come_to(key, "call", "dismiss", hour=4)
    story.come_to(key, "call", "impression", hour=3)  # told later, happened earlier
    story.come_to(key, "call", "dismiss", hour=5)
    story.come_to(home, "book", "click", hour=3.5)
    laid, paths = journeys_of(log)
    assert paths == [(["web", "call"], 1, 0.0)]
    assert (laid.paths.ages / HOUR_US).tolist() == [1.5, 0.5]


def test_outcome_itself_says_that_its_action_was_seen(log: MemoryLog, story: Story) -> None:
    key = story.tell("desk", "call", hour=0, profile_key=ANNA)
    story.come_to(key, "call", "order", hour=1, value=2.0)
    assert journeys_of(log)[1] == [(["call"], 1, 2.0)]


def test_outcome_recorded_before_its_decision_is_joined(log: MemoryLog, story: Story) -> None:
    key = decision_key(7)
    story.come_to(key, "book", "order", hour=1, value=5.0)
    story.tell("home", "book", hour=0.5, profile_key=ANNA, key=key)
    assert journeys_of(log)[1] == [(["web"], 1, 5.0)]


def test_outcomes_wait_for_so_many_decisions_at_most(
    log: MemoryLog, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journeys, "PARKED_MAX", 2)
    keys = [decision_key(number) for number in (7, 8, 9)]
    for key in keys:
        story.come_to(key, "book", "click", hour=1)
    for key in keys:
        story.tell("home", "book", hour=0.5, profile_key=key, key=key)
    assert [outcomes for _, outcomes, _ in journeys_of(log)[1]] == [1, 1, 0], "the first had to go"


def test_silence_is_cut_where_a_window_passed_and_where_an_outcome_lies(log: MemoryLog, story: Story) -> None:
    for hour in (0, 10, 34):
        story.tell("letter", "lamp", hour=hour, profile_key=ANNA)
    key = story.tell("home", "book", hour=70, profile_key=ANNA)
    story.come_to(key, "book", "click", hour=71)
    story.tell("letter", "lamp", hour=72, profile_key=ANNA)
    story.tell("letter", "lamp", hour=73, profile_key=BERTA)
    laid, paths = journeys_of(log)
    assert paths == [
        (["web"], 1, 0.0),
        (["mail", "mail"], 0, 0.0),
        (["mail"], 0, 0.0),
        (["mail"], 0, 0.0),
        (["mail"], 0, 0.0),
    ]
    assert laid.n_open == 2, "those after the outcome may still come to one"


def test_decisions_about_nobody_are_nobodys_path(log: MemoryLog, story: Story) -> None:
    for hour in (0, 1):
        story.tell("home", "book", hour=hour)
    laid, paths = journeys_of(log)
    assert paths == [(["web"], 0, 0.0)] * 2
    assert laid.n_people == 2


def test_decisions_before_an_instant_are_passed_over_with_their_outcomes(log: MemoryLog, story: Story) -> None:
    early = story.tell("letter", "lamp", hour=0, profile_key=ANNA)
    late = story.tell("home", "book", hour=2, profile_key=ANNA)
    story.come_to(early, "lamp", "click", hour=3)
    story.come_to(late, "book", "click", hour=3)
    assert journeys_of(log, since_us=at(1))[1] == [(["web"], 1, 0.0)]


def test_erased_and_unreadable_records_are_passed_over(log: MemoryLog, story: Story) -> None:
    story.tell("letter", "lamp", hour=0, profile_key=ANNA)
    erase(log, log.tail().lsn)
    story.record(RecordKind.RECORD_KIND_OUTCOME, b"\xff\xff\xff")
    story.tell("no such placement", "lamp", hour=1, profile_key=ANNA)
    story.tell("home", "book", hour=2, profile_key=ANNA)
    assert journeys_of(log)[1] == [(["web"], 0, 0.0)]
    assert collected(log).n_unreadable == 2


def test_strangers_and_merged_profiles_are_the_person_they_are_now(log: MemoryLog, story: Story) -> None:
    """Told something as a stranger on a device, then known by a number, then found to be one more profile."""
    story.put_in_force(CATALOG)
    store = MemoryStore()
    projector = Projector(log, store, {CATALOG.sha256: CATALOG}.__getitem__)
    device, number = {"browser_id": "b-1"}, {"customer_number": "1"}
    phone = {"browser_id": "b-2"}
    first, second = story.know(number), story.know(phone)
    story.tell("letter", "lamp", hour=0, profile_key=story.profile_key(first))
    story.tell("letter", "rope", hour=0.5, profile_key=story.profile_key(second))
    story.tell("home", "book", hour=1, identities=device)
    key = story.tell("home", "rope", hour=2, identities=device)
    story.come_to(key, "rope", "order", hour=3, value=8.0)
    story.know(device | number)
    story.know(phone | number)
    while projector.step():
        pass
    collector = collected(log)
    meetings = collector.meetings()
    apart = lay_out(with_recorded_keys(meetings, collector.keys), WINDOW_US, at(4))
    assert told(apart, meetings.channels) == [(["web", "web"], 1, 8.0), (["mail"], 0, 0.0), (["mail"], 0, 0.0)]
    one = lay_out(with_present_profiles(meetings, collector.keys, store), WINDOW_US, at(4))
    assert told(one, meetings.channels) == [(["mail", "mail", "web", "web"], 1, 8.0)]
    assert (apart.n_people, one.n_people) == (3, 1)


def test_state_of_another_log_is_known_as_such(log: MemoryLog) -> None:
    store = MemoryStore()
    assert not is_of(store, log.log_id)
    Projector(log, store, {CATALOG.sha256: CATALOG}.__getitem__)
    assert is_of(store, log.log_id)
    assert not is_of(store, b"another log, yes")


def test_unknown_goal_is_refused(log: MemoryLog, story: Story) -> None:
    assert collected(log, "sale").meetings().channels == (), "nothing was decided, nothing is known"
    story.tell("home", "book")
    with pytest.raises(TsugiError, match="no goal is named 'sale'") as refused:
        collected(log, "sale").meetings()
    assert refused.value.reason == ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("TOUCHPOINTS_READ_MAX", "since: at most 1 touchpoints"),
        ("OUTCOMES_READ_MAX", "since: at most 1 outcomes"),
        ("TOUCHPOINTS_IN_PATHS_MAX", "window: at most 1 touchpoints"),
        ("CHANNELS_MAX", "channels: at most 1 entries"),
    ],
)
def test_limits_are_told(log: MemoryLog, story: Story, monkeypatch: pytest.MonkeyPatch, limit: str, said: str) -> None:
    key = story.tell("home", "book", "lamp", profile_key=ANNA)
    story.come_to(key, "book", "click", hour=1)
    story.come_to(key, "book", "click", hour=2)
    monkeypatch.setattr(journeys, limit, 1)
    with pytest.raises(TsugiError, match=said) as refused:
        journeys_of(log)
    assert refused.value.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
