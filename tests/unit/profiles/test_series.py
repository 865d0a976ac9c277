"""What one event leaves behind for windows and the journey, and how it is kept."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from server.catalog.compile import compile_catalog
from server.catalog.profile_terms import (
    ANY_EVENT,
    KEYS,
    MARKS,
    NO_ROW,
    OPENINGS,
    STAGES,
    VALUES,
    JourneyColumns,
    Series,
)
from server.profiles.series import ENTRIES_MAX, Entry, SeriesSet, entries_of, outcome_entries, warm
from tests.support.catalogs import message, whole
from tsugi.requests import PyValue, to_value
from tsugi.v1.value_pb2 import Money, Value

TERMS = compile_catalog(whole()).profiles
NOON_US = 1_790_000_000_000_000
DAY_US = 86_400_000_000


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    warm()


def row(kind: int, event_type: str, property_name: str = "", filter_row: int = NO_ROW) -> int:
    found = [
        place
        for place, each in enumerate(TERMS.series)
        if (each.kind, each.event_type, each.property, each.filter_row) == (kind, event_type, property_name, filter_row)
    ]
    (place,) = found
    return place


def euros(amount: float) -> Value:
    return Value(money_value=Money(amount_micros=round(amount * 1e6), currency_code="EUR"))


def made(event_type: str, properties: Mapping[str, PyValue | Value] | None = None) -> dict[int, float]:
    """Return what one event at noon writes, by series."""
    values = {
        name: value if isinstance(value, Value) else to_value(value) for name, value in (properties or {}).items()
    }
    entries = entries_of(event_type, NOON_US, values, TERMS)
    assert all(time_us == NOON_US for _, time_us, _ in entries)
    assert len({place for place, _, _ in entries}) == len(entries)
    return {place: number for place, _, number in entries}


def put(*entries: Entry, n_series: int = 3) -> SeriesSet:
    return SeriesSet.empty(n_series).insert(entries)


def read(series: SeriesSet, place: int) -> list[tuple[int, float]]:
    inside = slice(series.starts[place], series.starts[place + 1])
    return list(zip(series.times[inside].tolist(), series.values[inside].tolist(), strict=True))


class TestEntries:
    def test_every_event_is_part_of_the_visit(self) -> None:
        visit = row(MARKS, ANY_EVENT)
        assert all(made(event_type)[visit] == 1.0 for event_type in ("purchase", "complaint", "settlement", "visit"))

    def test_event_is_counted_among_those_of_its_type_only(self) -> None:
        assert made("visit") == {row(MARKS, ANY_EVENT): 1.0, row(MARKS, "visit"): 1.0}
        assert row(MARKS, "visit") not in made("purchase")

    def test_value_is_the_encoded_property(self) -> None:
        numbers = made("purchase", {"total": euros(12.5), "sport": "bike", "code": "no rule speaks of it"})
        assert numbers[row(VALUES, "purchase", "total")] == 12.5
        assert numbers[row(VALUES, "purchase", "sport")] == 1.0
        assert numbers[row(VALUES, "purchase", "code")] == -1.0

    @pytest.mark.parametrize("properties", [{}, {"sport": "chess"}, {"sport": 3.0}])
    def test_value_that_is_not_known_makes_no_entry(self, properties: dict[str, PyValue]) -> None:
        numbers = made("purchase", properties)
        assert not numbers.keys() & {row(VALUES, "purchase", "sport"), row(KEYS, "purchase", "sport")}
        assert numbers[row(MARKS, "purchase")] == 1.0

    def test_key_is_a_whole_number_that_a_float_holds(self) -> None:
        keys = {made("purchase", {"sport": sport})[row(KEYS, "purchase", "sport")] for sport in ("ski", "bike", "run")}
        assert len(keys) == 3
        assert all(key.is_integer() and 1.0 <= key < 2.0**48 for key in keys)

    def test_key_is_of_the_text_whatever_its_code(self) -> None:
        """Stored keys outlive a catalog in which the allowed values stand in another order."""
        kind, series = "WINDOW_KIND_DISTINCT", []
        for values in (["ski", "bike"], ["run", "bike", "ski"]):
            properties = [{"name": "sport", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": values}]
            terms = compile_catalog(
                message(
                    eventTypes=[{"name": "ride", "properties": properties}],
                    windows=[{"name": "n", "kind": kind, "eventType": "ride", "property": "sport", "span": "60s"}],
                )
            ).profiles
            series.append(entries_of("ride", NOON_US, {"sport": to_value("ski")}, terms))
        assert series[0] == series[1]

    def test_key_of_a_number_does_not_depend_on_the_sign_of_zero(self) -> None:
        window = {"name": "n", "kind": "WINDOW_KIND_DISTINCT", "eventType": "visit", "property": "pages", "span": "60s"}
        terms = compile_catalog(message(windows=[window])).profiles
        zero, minus_zero, one = (entries_of("visit", 0, {"pages": to_value(n)}, terms) for n in (0.0, -0.0, 1.0))
        assert zero == minus_zero != one

    def test_closing_event_has_the_opening_ones_key_with_the_sign_turned(self) -> None:
        place = row(OPENINGS, "complaint", "ticket")
        opened, closed = (made(kind, {"ticket": "T-1"})[place] for kind in ("complaint", "settlement"))
        assert opened == -closed > 0.0
        assert made("complaint", {"ticket": "T-2"})[place] != opened

    @pytest.mark.parametrize(
        ("properties", "passes"),
        [
            ({"sport": "ski", "total": euros(1.51)}, True),
            ({"sport": "ski", "total": euros(1.5)}, False),
            ({"sport": "run", "total": euros(9.0)}, False),
            ({"total": euros(9.0)}, False),  # not known is not enough
        ],
    )
    def test_only_a_filter_that_is_true_passes(self, properties: dict[str, PyValue], passes: bool) -> None:
        assert (row(VALUES, "purchase", "total", 0) in made("purchase", properties)) == passes

    def test_filter_is_of_the_events_that_open_and_not_of_those_that_close(self) -> None:
        ticket = {"name": "ticket", "type": "ATTRIBUTE_TYPE_TEXT"}
        window = {
            "name": "urgent", "kind": "WINDOW_KIND_OPEN", "eventType": "opened", "closingEventType": "closed",
            "property": "ticket", "filter": "event.urgent", "span": "60s",
        }  # fmt: skip
        terms = compile_catalog(
            message(
                windows=[window],
                eventTypes=[
                    {"name": "opened", "properties": [ticket, {"name": "urgent", "type": "ATTRIBUTE_TYPE_BOOL"}]},
                    {"name": "closed", "properties": [ticket]},
                ],
            )
        ).profiles
        known = {"ticket": to_value("T-1")}
        assert [len(entries_of("opened", 0, known | {"urgent": to_value(it)}, terms)) for it in (True, False)] == [1, 0]
        assert len(entries_of("closed", 0, known, terms)) == 1

    def test_touchpoints_of_the_journey_leave_their_symbol(self) -> None:
        assert TERMS.journey is not None
        place = row(STAGES, ANY_EVENT)
        assert made("purchase")[place] == TERMS.journey.symbols["event", "purchase"]
        assert place not in made("visit")
        symbol = TERMS.journey.symbols["outcome", "dismiss"]
        assert outcome_entries("dismiss", NOON_US, TERMS) == [(place, NOON_US, float(symbol))]

    def test_what_is_not_declared_leaves_nothing(self) -> None:
        assert entries_of("never_heard_of", NOON_US, {}, TERMS) == []
        assert outcome_entries("click", NOON_US, TERMS) == []
        assert outcome_entries("dismiss", NOON_US, compile_catalog(message()).profiles) == []


class TestSet:
    def test_entries_lie_in_order_however_they_came(self) -> None:
        series = put((2, 5, 1.0), (0, 9, 2.0)).insert([(0, 3, 7.0), (0, 9, 1.0)])
        assert [read(series, place) for place in range(3)] == [[(3, 7.0), (9, 1.0), (9, 2.0)], [], [(5, 1.0)]]

    def test_equal_entries_all_count(self) -> None:
        assert read(put((0, 1, 1.0)).insert([(0, 1, 1.0)]), 0) == [(1, 1.0)] * 2

    def test_minus_zero_is_zero(self) -> None:
        one, other = put((0, 1, 0.0), (0, 1, -0.0)), put((0, 1, -0.0), (0, 1, 0.0))
        assert one.to_bytes() == other.to_bytes()
        assert [math.copysign(1.0, value) for value in one.values] == [1.0, 1.0]

    def test_nothing_new_leaves_the_set_as_it_is(self) -> None:
        series = put((0, 1, 1.0))
        assert series.insert([]) is series.merge([SeriesSet.empty(3)]) is series

    def test_sets_never_change(self) -> None:
        series = put((0, 1, 1.0))
        before = series.to_bytes()
        series.insert([(0, 2, 2.0)])
        series.merge([put((1, 1, 1.0))])
        assert series.to_bytes() == before
        for array in (series.times, series.values, series.starts):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1

    @pytest.mark.parametrize("n_series", range(4))
    def test_bytes_are_laid_out_as_stated(self, n_series: int) -> None:
        entries = [(place, 7 + place, 0.5) for place in range(n_series)]
        n_starts = n_series + 1
        starts = struct.pack(f"<{n_starts}I", *range(n_starts)) + bytes(4 * (n_starts % 2))
        times = struct.pack(f"<{n_series}q", *(7 + place for place in range(n_series)))
        wanted = struct.pack("<II", n_series, n_series) + starts + times + struct.pack("<d", 0.5) * n_series
        data = put(*entries, n_series=n_series).to_bytes()
        assert data == wanted
        assert len(data) % 8 == 0

    def test_set_is_read_from_the_middle_of_a_buffer_without_a_copy(self) -> None:
        series = put((0, 1, 1.0), (2, 2, 2.0))
        data = bytes(16) + series.to_bytes() + b"what follows"
        found = SeriesSet.from_bytes(data, 16)
        assert found == series
        assert hash(found) == hash(series)
        buffer = np.frombuffer(data, np.uint8)
        arrays: tuple[np.ndarray[tuple[int], np.dtype[np.generic]], ...] = (found.times, found.values, found.starts)
        assert all(np.shares_memory(buffer, array) and array.flags.aligned for array in arrays)

    def test_sets_differ_by_series_instant_and_number(self) -> None:
        series = put((0, 1, 1.0))
        assert all(series != other for other in (put((1, 1, 1.0)), put((0, 2, 1.0)), put((0, 1, 2.0)), "a set"))

    def test_too_many_entries_of_one_series_leave_the_newest_and_the_other_series(self) -> None:
        full = put(*((1, time_us, 1.0) for time_us in range(ENTRIES_MAX)), (0, 0, 5.0))
        assert full.is_full
        over = full.insert([(1, -1, 1.0), (1, ENTRIES_MAX, 1.0)])
        assert [time_us for time_us, _ in read(over, 1)] == list(range(1, ENTRIES_MAX + 1))
        assert read(over, 0) == [(0, 5.0)]

    def test_set_is_full_only_when_something_may_be_missing(self) -> None:
        almost = put(*((1, time_us, 1.0) for time_us in range(ENTRIES_MAX - 1)), (0, 0, 1.0), (2, 0, 1.0))
        assert not almost.is_full
        assert not SeriesSet.empty(0).is_full
        assert almost.insert([(1, 0, 1.0)]).is_full

    @pytest.mark.slow  # sets of the largest size, sorted a dozen times
    def test_bound_does_not_depend_on_who_merged_first(self) -> None:
        parts = [put(*((0, 3 * i + part, 1.0) for i in range(2_000)), (1, part, 1.0)) for part in range(3)]
        a, b, c = parts
        together = a.merge([b, c])
        assert together == c.merge([b]).merge([a]) == b.merge([c.merge([a])])
        assert [time_us for time_us, _ in read(together, 0)] == list(range(6_000 - ENTRIES_MAX, 6_000))
        assert len(read(together, 1)) == 3

    def test_too_many_entries_of_a_journey_lose_those_that_led_nowhere(self) -> None:
        a, b = 0.0, 1.0  # from the first stage to the second or the last, from the last back, or nowhere
        journey = JourneyColumns(("x", "y", "z"), {}, np.array([[1, 2], [1, 2], [0, 2]], np.int32), 0)
        entries = [(0, i, symbol) for i, symbol in enumerate([a, a, b, b, a, a, a, *[b] * ENTRIES_MAX])]
        kept = SeriesSet.empty(1).insert(entries[:ENTRIES_MAX], journey)
        for entry in entries[ENTRIES_MAX:]:
            kept = kept.insert([entry], journey)
            assert kept.times.size <= ENTRIES_MAX
        assert read(kept, 0)[:2] == [(5, a), (7, b)], "the way round to where it began is gone as well"
        odd, even = (put(*entries[first::2], n_series=1) for first in (1, 0))
        assert odd.merge([even], journey) == even.merge([odd], journey) == SeriesSet.empty(1).insert(entries, journey)

    def test_rearranged_series_keep_their_entries(self) -> None:
        series = put((0, 1, 5.0), (1, 2, 6.0), (1, 3, 7.0))
        other = series.rearranged([1, NO_ROW, 2, 0])
        assert [read(other, place) for place in range(4)] == [[(2, 6.0), (3, 7.0)], [], [], [(1, 5.0)]]
        assert series.rearranged([]) == SeriesSet.empty(0)

    def test_pruning_keeps_an_entry_until_its_span_has_passed(self) -> None:
        layout = [Series(MARKS, "visit", "", "", NO_ROW, span_us) for span_us in (10, DAY_US)]
        series = put((0, 100, 1.0), (0, 101, 2.0), (0, 500, 3.0), (1, 100, 4.0), n_series=2)

        def kept(log_time_us: int) -> Sequence[float]:
            pruned = series.prune(layout, log_time_us)
            return [value for place in range(2) for _, value in read(pruned, place)]

        assert kept(109) == [1.0, 2.0, 3.0, 4.0]
        assert kept(110) == [2.0, 3.0, 4.0]
        assert kept(111) == [3.0, 4.0]
        assert series.prune(layout, 109) is series
        assert read(series.prune(layout, DAY_US + 100), 1) == []
        empty = SeriesSet.empty(2)
        assert empty.prune(layout, 0) is empty
