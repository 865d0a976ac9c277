"""Windows are exact at any instant, whatever came in which order: held against a recount in plain Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import Catalog
from server.catalog.profile_terms import ProfileTerms
from server.profiles import derived
from server.profiles.derived import NEVER_US, Derived
from server.profiles.series import SeriesSet, entries_of
from tests.support.histories import START_US
from tests.support.people import people_catalog
from tests.support.rules import YES, evaluate
from tsugi.requests import to_value

MINUTE_US = 60_000_000
HOUR_US, DAY_US = 60 * MINUTE_US, 1440 * MINUTE_US
GAP_US = 30 * MINUTE_US
SPANS_US = {"short": MINUTE_US, "long": 7 * MINUTE_US}


def span(name: str, kind: str, reach: str, **more: Any) -> dict[str, Any]:
    reaches = {"span": f"{SPANS_US[reach] // 1_000_000}s"} if reach in SPANS_US else {"session": True}
    return {"name": f"{name}_{reach}", "kind": f"WINDOW_KIND_{kind}", "eventType": "purchase"} | reaches | more


WINDOWS = [
    window
    for reach in ("short", "long", "visit")
    for window in (
        span("count", "COUNT", reach),
        span("sum", "SUM", reach, property="total"),
        span("distinct", "DISTINCT", reach, property="item"),
        span("recency", "RECENCY", reach),
        span("last", "LAST", reach, property="total"),
        span("large", "COUNT", reach, filter="event.total >= 50.0"),
        span("open", "OPEN", reach, eventType="complaint", closingEventType="solved", property="ticket"),
    )
]
SEGMENTS = [
    {"name": "buyer", "expression": "profile.count_short > 1.0"},
    {"name": "lately", "expression": "profile.recency_long <= 100.0"},
    {"name": "quiet", "expression": "!has(profile.recency_short) || profile.open_long > 0.0"},
    {"name": "moody", "expression": "has(profile.mood)"},
]
# Thresholds of a few microseconds, so that every instant up to a change can be looked at.
CLOSE_SEGMENTS = [
    {"name": name, "expression": expression}
    for name, expression in (
        ("fresh", "profile.recency_short < 0.00001"),
        ("stale", "profile.recency_short > 0.00002"),
        ("just_now", "profile.recency_short == 0.000015"),
        ("visited_before", "profile.recency_visit >= profile.since_complaint"),
        ("near", "profile.recency_short - profile.since_complaint <= 0.000007"),
        ("calm", "!(profile.since_complaint <= 0.000012)"),
    )
]
CATALOG = people_catalog(windows=WINDOWS, recencyFrequencyMonetary=[], segments=SEGMENTS)
CLOSE = people_catalog(
    windows=[*WINDOWS, span("since_complaint", "RECENCY", "long", eventType="complaint") | {"name": "since_complaint"}],
    recencyFrequencyMonetary=[],
    segments=CLOSE_SEGMENTS,
)
TERMS = CATALOG.profiles
FACTS = CATALOG.space.index


class Happening(NamedTuple):
    """One event of a person."""

    kind: str
    time_us: int
    total: float
    item: str

    def entries(self, terms: ProfileTerms = TERMS) -> list[tuple[int, int, float]]:
        properties = {
            "view": {},
            "purchase": {"total": to_value(self.total), "item": to_value(self.item)},
            "complaint": {"ticket": to_value(self.item)},
            "solved": {"ticket": to_value(self.item)},
        }[self.kind]
        return entries_of(self.kind, self.time_us, properties, terms)


# Few instants, so that many events share one, and boundaries are met exactly.
INSTANTS = st.integers(-40, 2).map(lambda minutes: START_US + minutes * MINUTE_US) | st.integers(
    START_US - 50 * MINUTE_US, START_US + 3 * MINUTE_US
)


def happenings_at(instants: st.SearchStrategy[int], n_max: int = 16) -> st.SearchStrategy[list[Happening]]:
    return st.lists(
        st.builds(
            Happening,
            st.sampled_from(["view", "purchase", "purchase", "complaint", "solved"]),
            instants,
            st.sampled_from([10.0, 49.5, 50.0, 75.25]),
            st.sampled_from(["a", "b", "c"]),
        ),
        max_size=n_max,
    )


HAPPENINGS = happenings_at(INSTANTS)
HOURS = st.integers(-80, 2).map(lambda hours: START_US + hours * HOUR_US)
CLOSE_INSTANTS = st.integers(0, 40).map(lambda more: START_US + more)


def series_of(happenings: Sequence[Happening], terms: ProfileTerms = TERMS) -> SeriesSet:
    entries = [entry for happening in happenings for entry in happening.entries(terms)]
    return SeriesSet.empty(len(terms.series)).insert(entries)


def evaluated(
    series: SeriesSet,
    now_us: int,
    catalog: Catalog = CATALOG,
    columns: Derived | None = None,
) -> tuple[np.ndarray[Any, Any], int, int]:
    facts = np.full(len(catalog.space.facts), math.nan)
    facts[catalog.space.index["profile.mood"]] = 1.0
    return facts, *(columns or derived.of(catalog)).evaluate(now_us, facts, series)


def recounted(
    happenings: Sequence[Happening], now_us: int, spans_us: Mapping[str, int] = SPANS_US, gap_us: int = GAP_US
) -> dict[str, float]:
    """Count everything again, from the definition."""
    past = sorted(each for each in happenings if each.time_us <= now_us)
    past.sort(key=lambda each: each.time_us)
    begin_us: float = math.inf
    if past and now_us - past[-1].time_us < gap_us:
        begin_us = past[-1].time_us
        for each in reversed(past):
            if begin_us - each.time_us >= gap_us or now_us - each.time_us >= DAY_US:
                break
            begin_us = each.time_us
    counted: dict[str, float] = {}
    for reach in ("short", "long", "visit"):
        inside = [
            each
            for each in past
            if (now_us - each.time_us < spans_us[reach] if reach in spans_us else each.time_us >= begin_us)
        ]
        bought = sorted((each.time_us, each.total, each.item) for each in inside if each.kind == "purchase")
        tickets: dict[str, list[tuple[int, bool]]] = {}
        for each in inside:
            if each.kind in {"complaint", "solved"}:
                tickets.setdefault(each.item, []).append((each.time_us, each.kind == "solved"))
        counted |= {
            f"count_{reach}": len(bought),
            f"sum_{reach}": sum(total for _, total, _ in bought),
            f"distinct_{reach}": len({item for *_, item in bought}),
            f"recency_{reach}": (now_us - bought[-1][0]) / 1e6 if bought else math.nan,
            f"last_{reach}": bought[-1][1] if bought else math.nan,
            f"large_{reach}": sum(total >= 50.0 for _, total, _ in bought),
            f"open_{reach}": sum(not max(told)[1] for told in tickets.values()),
        }
    return counted


def assert_recounted(facts: np.ndarray[Any, Any], counted: Mapping[str, float]) -> None:
    for name, wanted in counted.items():
        np.testing.assert_allclose(facts[FACTS[f"profile.{name}"]], wanted, rtol=1e-12, err_msg=name)


@pytest.mark.slow
@settings(max_examples=300)
@given(HAPPENINGS, INSTANTS)
def test_windows_equal_a_recount_at_any_instant(happenings: list[Happening], now_us: int) -> None:
    facts, _, _ = evaluated(series_of(happenings), now_us)
    assert_recounted(facts, recounted(happenings, now_us))


@pytest.mark.slow
@settings(max_examples=200)
@given(happenings_at(HOURS, n_max=40), HOURS, st.data())
def test_windows_of_any_span_and_visits_of_any_gap_equal_a_recount(
    happenings: list[Happening], now_us: int, data: st.DataObject
) -> None:
    """Hours apart: spans and gaps end exactly upon events, and visits go on for more than a day."""
    spans_us = {name: data.draw(st.integers(1, 90)) * HOUR_US - data.draw(st.integers(0, 1)) for name in SPANS_US}
    gap_us = data.draw(st.integers(1, 24)) * HOUR_US - data.draw(st.integers(0, 1))
    reaches = [name.rpartition("_")[2] for name in TERMS.windows.names]
    windows = dataclasses.replace(
        TERMS.windows,
        spans_us=_frozen([spans_us.get(reach, 0) for reach in reaches]),
        session_gap_us=gap_us,
    )
    columns = Derived(dataclasses.replace(CATALOG, profiles=dataclasses.replace(TERMS, windows=windows)))
    series = series_of(happenings)
    facts, until_us, standing_until_us = evaluated(series, now_us, columns=columns)
    assert_recounted(facts, recounted(happenings, now_us, spans_us, gap_us))
    ends = [end for end in (until_us, standing_until_us) if now_us < end < NEVER_US]
    for instant_us in [*ends, *(end - 1 for end in ends)]:
        later, _, _ = evaluated(series, instant_us, columns=columns)
        assert_recounted(later, recounted(happenings, instant_us, spans_us, gap_us))
        if instant_us < until_us:
            np.testing.assert_array_equal(later[1:], facts[1:])


def _frozen(numbers: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = np.array(numbers, np.int64)
    array.flags.writeable = False
    return array


@pytest.mark.slow
@settings(max_examples=200)
@given(HAPPENINGS, st.sampled_from([0, MINUTE_US, 7 * MINUTE_US, GAP_US]), st.integers(-1, 1))
def test_window_holds_an_event_until_the_very_microsecond(happenings: list[Happening], reach: int, more: int) -> None:
    for happening in happenings:
        now_us = happening.time_us + reach + more
        facts, _, _ = evaluated(series_of(happenings), now_us)
        assert_recounted(facts, recounted(happenings, now_us))


@given(HAPPENINGS, st.data())
def test_series_do_not_depend_on_the_order_in_which_events_came(
    happenings: list[Happening], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(happenings))
    whole = series_of(happenings)
    one_by_one = SeriesSet.empty(len(TERMS.series))
    for happening in shuffled:
        one_by_one = one_by_one.insert(happening.entries())
    assert one_by_one == whole
    assert SeriesSet.from_bytes(b"head" * 2 + whole.to_bytes(), 8) == whole


@given(HAPPENINGS, HAPPENINGS, HAPPENINGS)
def test_merge_is_a_union_associative_and_commutative(
    one: list[Happening], two: list[Happening], three: list[Happening]
) -> None:
    a, b, c = map(series_of, (one, two, three))
    whole = series_of([*one, *two, *three])
    assert a.merge([b, c]) == c.merge([a]).merge([b]) == b.merge([a.merge([c])]) == whole


@given(HAPPENINGS, INSTANTS)
def test_what_is_pruned_is_read_by_nothing_any_more(happenings: list[Happening], now_us: int) -> None:
    series = series_of(happenings)
    np.testing.assert_array_equal(
        evaluated(series.prune(TERMS.series, now_us), now_us)[0], evaluated(series, now_us)[0]
    )


@pytest.mark.slow
@settings(max_examples=200)
@given(HAPPENINGS, INSTANTS)
def test_nothing_changes_before_the_stated_instants(happenings: list[Happening], now_us: int) -> None:
    series = series_of(happenings)
    facts, until_us, standing_until_us = evaluated(series, now_us)
    first_segment = CATALOG.space.profile_slice.stop - len(TERMS.segments.names)
    assert standing_until_us > now_us
    samples = [each.time_us + reach + more for each in happenings for reach in (0, MINUTE_US, 7 * MINUTE_US, GAP_US)
               for more in (-1, 0)]  # fmt: skip
    samples += [standing_until_us - 1, until_us - 1, now_us + 1, now_us + 100_000_000]
    for instant_us in samples:
        if now_us < instant_us < standing_until_us:
            later, _, _ = evaluated(series, instant_us)
            np.testing.assert_array_equal(later[first_segment - 1 :], facts[first_segment - 1 :])
        if now_us < instant_us < until_us:
            later, _, _ = evaluated(series, instant_us)
            np.testing.assert_array_equal(later[1:], facts[1:])


@given(happenings_at(CLOSE_INSTANTS, n_max=6), CLOSE_INSTANTS)
def test_segments_hold_at_every_microsecond_until_the_stated_instant(happenings: list[Happening], now_us: int) -> None:
    segments = CLOSE.profiles.segments
    first = CLOSE.space.profile_slice.stop - len(segments.names)
    series = series_of(happenings, CLOSE.profiles)
    recent = CLOSE.space.index["profile.recency_short"]
    facts, _, until_us = evaluated(series, now_us, catalog=CLOSE)
    for instant_us in range(now_us, min(until_us, now_us + 50)):
        later, _, _ = evaluated(series, instant_us, catalog=CLOSE)
        np.testing.assert_array_equal(later[first - 1 :], facts[first - 1 :])
        verdicts = [evaluate(segments.rules, row, later) == YES for row in segments.rows]
        # Two recencies are as far apart as they are, to the microsecond; the difference of two numbers is rounded.
        apart = later[recent] - later[CLOSE.space.index["profile.since_complaint"]]
        verdicts[segments.names.index("near")] = bool(np.round(apart, 6) <= 0.000007)
        assert later[first : first + len(verdicts)].tolist() == verdicts


@given(HAPPENINGS, INSTANTS)
def test_stored_facts_are_never_relied_on_while_a_recency_runs(happenings: list[Happening], now_us: int) -> None:
    facts, until_us, _ = evaluated(series_of(happenings), now_us)
    is_running = any(not math.isnan(facts[FACTS[f"profile.recency_{reach}"]]) for reach in ("short", "long", "visit"))
    assert (until_us == 0) == is_running


def test_series_keep_the_newest_of_too_many() -> None:
    times = [START_US + i for i in range(5_000)]
    rows = [0] * 5_000
    series = SeriesSet.empty(len(TERMS.series)).insert(list(zip(rows, times, [1.0] * 5_000, strict=True)))
    assert series.times.tolist() == times[-4_096:]
