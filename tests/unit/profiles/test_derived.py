"""What is true of a person at an instant, to the microsecond, and until when it stays so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from server.catalog.catalog import Catalog, Doubles
from server.catalog.compile import compile_catalog
from server.catalog.evaluation import compare, evaluate
from server.profiles import derived
from server.profiles.derived import ALWAYS_US, DERIVED_KEPT, NEVER_US, Derived
from server.profiles.series import ENTRIES_MAX, SeriesSet, entries_of, outcome_entries
from tests.support.catalogs import compiled, message, whole
from tsugi.requests import PyValue, to_value

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
GAP_US = 30 * MINUTE_US
NOON_US = 1_790_000_000 * SECOND_US

TEXT, NUMBER = "ATTRIBUTE_TYPE_TEXT", "ATTRIBUTE_TYPE_NUMBER"


def window(name: str, kind: str, event_type: str, **more: Any) -> dict[str, Any]:
    """Declare a window of ten minutes, or another reach."""
    reach = {} if "session" in more else {"span": "600s"}
    return {"name": name, "kind": f"WINDOW_KIND_{kind}", "eventType": event_type} | reach | more


def shop(*segments: tuple[str, str], **parts: Any) -> Catalog:
    """Compile a shop that sees carts filled and abandoned."""
    everything: dict[str, Any] = {
        "profileAttributes": [
            {"name": "age", "type": NUMBER},
            {"name": "mood", "type": TEXT, "timeToLive": "3600s"},
            {"name": "born", "type": "ATTRIBUTE_TYPE_TIME"},
        ],
        "eventTypes": [
            {"name": "view"},
            {"name": "cart", "properties": [{"name": "item", "type": TEXT}, {"name": "price", "type": NUMBER}]},
            {"name": "checkout", "properties": [{"name": "item", "type": TEXT}]},
        ],
        "windows": [
            window("n_carts", "COUNT", "cart"),
            window("price", "SUM", "cart", property="price"),
            window("n_items", "DISTINCT", "cart", property="item"),
            window("since_cart", "RECENCY", "cart"),
            window("since_view", "RECENCY", "view"),
            window("last_price", "LAST", "cart", property="price"),
            window("n_open", "OPEN", "cart", property="item", closingEventType="checkout"),
            window("n_visit_carts", "COUNT", "cart", session=True),
            window("n_visit_open", "OPEN", "cart", property="item", closingEventType="checkout", session=True),
        ],
        "segments": [{"name": name, "expression": expression} for name, expression in segments],
        "journey": {
            "stages": [{"name": name} for name in ("new", "keen", "buyer")],
            "transitions": [
                {"fromStages": ["new"], "eventType": "cart", "toStage": "keen"},
                {"fromStages": ["keen"], "eventType": "checkout", "toStage": "buyer"},
                {"outcomeType": "dismiss", "toStage": "new"},
            ],
        },
    }
    return compiled(**(everything | parts))


PLAIN = shop()


@dataclass(frozen=True)
class Seen:
    """What evaluate said."""

    facts: Doubles
    until_us: int
    standing_until_us: int
    catalog: Catalog

    def __getitem__(self, name: str) -> float:
        return float(self.facts[self.catalog.space.index[f"profile.{name}"]])


def look(now_us: int, series: SeriesSet, catalog: Catalog = PLAIN, **attributes: float) -> Seen:
    """Evaluate; attributes are given as their number."""
    facts = np.full(len(catalog.space.facts), math.nan)
    for name, number in attributes.items():
        facts[catalog.space.index[f"profile.{name}"]] = number
    return Seen(facts, *derived.of(catalog).evaluate(now_us, facts, series), catalog)


def history(*events: tuple[int, str, dict[str, PyValue]], catalog: Catalog = PLAIN) -> SeriesSet:
    entries = [
        entry
        for time_us, kind, properties in events
        for entry in entries_of(kind, time_us, {n: to_value(v) for n, v in properties.items()}, catalog.profiles)
    ]
    return SeriesSet.empty(len(catalog.profiles.series)).insert(entries)


def cart(time_us: int, item: str = "boots", price: float = 10.0) -> tuple[int, str, dict[str, PyValue]]:
    return time_us, "cart", {"item": item, "price": price}


def checkout(time_us: int, item: str = "boots") -> tuple[int, str, dict[str, PyValue]]:
    return time_us, "checkout", {"item": item}


def view(time_us: int) -> tuple[int, str, dict[str, PyValue]]:
    return time_us, "view", {}


EMPTY = history()


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    derived.warm(PLAIN)


def test_nothing_happened_counts_nothing_and_knows_nothing() -> None:
    seen = look(NOON_US, EMPTY)
    assert [seen[name] for name in ("n_carts", "price", "n_items", "n_open", "n_visit_carts", "n_visit_open")] == [
        0
    ] * 6
    assert all(math.isnan(seen[name]) for name in ("since_cart", "last_price"))
    assert seen["journey_stage"] == 0.0
    assert seen.facts[0] == NOON_US
    assert (seen.until_us, seen.standing_until_us) == (NEVER_US, NEVER_US)


def test_context_is_left_alone() -> None:
    facts = np.full(len(PLAIN.space.facts), 7.0)
    derived.of(PLAIN).evaluate(NOON_US, facts, EMPTY)
    assert facts[PLAIN.space.profile_slice.stop :].tolist() == [7.0]
    assert facts[1:4].tolist() == [7.0] * 3


def test_windows_tell_what_they_are_declared_to() -> None:
    seen = look(
        NOON_US + MINUTE_US,
        history(
            cart(NOON_US, price=5.0),
            cart(NOON_US + SECOND_US, price=2.5),
            cart(NOON_US + 2 * SECOND_US, "skis", price=1.0),
            checkout(NOON_US + 3 * SECOND_US),
            view(NOON_US + 4 * SECOND_US),
        ),
    )
    assert [seen[name] for name in ("n_carts", "price", "n_items", "last_price", "n_open")] == [3.0, 8.5, 2.0, 1.0, 1.0]
    assert [seen[name] for name in ("since_cart", "since_view")] == [58.0, 56.0]


@pytest.mark.parametrize(("after_us", "n"), [(-1, 0), (0, 1), (1, 1), (600 * SECOND_US - 1, 1), (600 * SECOND_US, 0)])
def test_window_is_exact_to_the_microsecond(after_us: int, n: int) -> None:
    seen = look(NOON_US + after_us, history(cart(NOON_US)))
    assert [seen[name] for name in ("n_carts", "price", "n_items", "n_open")] == [n, 10.0 * n, n, n]
    assert math.isnan(seen["since_cart"]) == (n == 0)
    assert seen["last_price"] == 10.0 or n == 0


def test_late_event_counts_at_its_own_time() -> None:
    late = history(cart(NOON_US, price=3.0)).insert(
        entries_of("cart", NOON_US - MINUTE_US, {"price": to_value(9.0)}, PLAIN.profiles)
    )
    seen = look(NOON_US, late)
    assert (seen["n_carts"], seen["last_price"], seen["price"]) == (2.0, 3.0, 12.0)


class TestVisit:
    def test_cart_of_this_visit_counts_at_once_and_not_in_the_next(self) -> None:
        visit = history(view(NOON_US), cart(NOON_US + MINUTE_US))
        assert look(NOON_US + MINUTE_US, visit)["n_visit_open"] == 1.0
        last_us = NOON_US + MINUTE_US + GAP_US
        assert look(last_us - 1, visit)["n_visit_carts"] == 1.0
        assert look(last_us, visit)["n_visit_carts"] == 0.0

    @pytest.mark.parametrize(("wait_us", "n"), [(GAP_US - 1, 2.0), (GAP_US, 1.0)])
    def test_pause_of_the_gap_begins_another_visit(self, wait_us: int, n: float) -> None:
        second_us = NOON_US + wait_us
        assert look(second_us, history(cart(NOON_US), cart(second_us)))["n_visit_carts"] == n

    def test_events_of_every_type_keep_a_visit_going(self) -> None:
        steps = [view(NOON_US + i * 20 * MINUTE_US) for i in range(1, 4)]
        assert look(NOON_US + 60 * MINUTE_US, history(cart(NOON_US), *steps))["n_visit_carts"] == 1.0
        assert look(NOON_US + 60 * MINUTE_US, history(cart(NOON_US), steps[-1]))["n_visit_carts"] == 0.0

    def test_late_event_joins_what_were_two_visits(self) -> None:
        apart = [cart(NOON_US), cart(NOON_US + 50 * MINUTE_US)]
        now_us = NOON_US + 51 * MINUTE_US
        assert look(now_us, history(*apart))["n_visit_carts"] == 1.0
        assert look(now_us, history(*apart, view(NOON_US + 25 * MINUTE_US)))["n_visit_carts"] == 2.0

    def test_visit_reaches_back_a_day_at_most(self) -> None:
        catalog = shop(("busy", "profile.n_visit_carts >= 72.0"))
        endless = history(*(cart(NOON_US + i * 20 * MINUTE_US) for i in range(100)), catalog=catalog)
        now_us = NOON_US + 99 * 20 * MINUTE_US
        seen = look(now_us, endless, catalog)
        assert (seen["n_visit_carts"], seen["busy"]) == (72.0, 1.0)
        assert seen.standing_until_us == now_us + 20 * MINUTE_US
        assert look(seen.standing_until_us - 1, endless, catalog)["n_visit_carts"] == 72.0
        assert look(seen.standing_until_us, endless, catalog)["n_visit_carts"] == 71.0

    def test_visit_ends_when_stated(self) -> None:
        catalog = shop(("filling", "profile.n_visit_carts > 0.0"))
        visit = history(cart(NOON_US), view(NOON_US + MINUTE_US), catalog=catalog)
        seen = look(NOON_US + 2 * MINUTE_US, visit, catalog)
        assert seen["filling"] == 1.0
        assert seen.standing_until_us == NOON_US + MINUTE_US + GAP_US
        assert look(seen.standing_until_us - 1, visit, catalog)["filling"] == 1.0
        assert look(seen.standing_until_us, visit, catalog)["filling"] == 0.0


class TestOpen:
    def test_matter_is_open_until_it_is_closed_and_again_when_reopened(self) -> None:
        told = history(cart(NOON_US), checkout(NOON_US + 1), cart(NOON_US + 2))
        assert [look(NOON_US + i, told)["n_open"] for i in range(3)] == [1.0, 0.0, 1.0]

    def test_of_equal_instants_closing_is_the_later(self) -> None:
        assert look(NOON_US, history(cart(NOON_US), checkout(NOON_US)))["n_open"] == 0.0
        assert look(NOON_US, history(checkout(NOON_US), cart(NOON_US)))["n_open"] == 0.0

    def test_matter_that_was_opened_before_the_window_is_forgotten(self) -> None:
        told = history(cart(NOON_US), cart(NOON_US + MINUTE_US, "skis"))
        assert look(NOON_US + 10 * MINUTE_US - 1, told)["n_open"] == 2.0
        assert look(NOON_US + 10 * MINUTE_US, told)["n_open"] == 1.0

    def test_closing_alone_opens_nothing(self) -> None:
        assert look(NOON_US, history(checkout(NOON_US)))["n_open"] == 0.0


class TestJourney:
    def test_stage_follows_touchpoints_in_the_order_of_their_time(self) -> None:
        terms = PLAIN.profiles
        told = history(checkout(NOON_US + 1), cart(NOON_US)).insert(outcome_entries("dismiss", NOON_US + 2, terms))
        assert [look(NOON_US + i, told)["journey_stage"] for i in range(-1, 3)] == [0.0, 1.0, 2.0, 0.0]

    def test_touchpoint_that_fits_no_transition_leaves_the_stage(self) -> None:
        assert look(NOON_US, history(checkout(NOON_US)))["journey_stage"] == 0.0

    def test_stage_changes_when_what_lies_ahead_happens(self) -> None:
        seen = look(NOON_US, history(cart(NOON_US + 50)))
        assert (seen["journey_stage"], seen.until_us, seen.standing_until_us) == (0.0, NOON_US + 50, NOON_US + 50)

    def test_catalog_without_a_journey_has_no_stage(self) -> None:
        catalog = compiled()
        assert "profile.journey_stage" not in catalog.space.index
        seen = look(NOON_US, SeriesSet.empty(0), catalog)
        assert (seen.until_us, seen.standing_until_us) == (NEVER_US, NEVER_US)


class TestSegments:
    def test_segment_is_never_unknown(self) -> None:
        catalog = shop(("adult", "profile.age >= 18.0"), ("child", "!(profile.age >= 18.0)"))
        empty = history(catalog=catalog)
        for number, wanted in ((math.nan, [0.0, 0.0]), (18.0, [1.0, 0.0]), (17.0, [0.0, 1.0])):
            seen = look(NOON_US, empty, catalog, age=number)
            assert [seen["adult"], seen["child"]] == wanted

    def test_segment_reads_windows_and_stage_of_the_same_instant(self) -> None:
        catalog = shop(("keen", "profile.n_carts >= 1.0 && profile.journey_stage == 'keen'"))
        told = history(cart(NOON_US), catalog=catalog)
        assert [look(NOON_US + i, told, catalog)["keen"] for i in (-1, 0, 600 * SECOND_US)] == [0.0, 1.0, 0.0]

    @pytest.mark.parametrize(
        ("expression", "before", "crossing_us"),
        [
            ("profile.since_cart < 60.0", 1.0, MINUTE_US),
            ("profile.since_cart <= 60.0", 1.0, MINUTE_US + 1),
            ("profile.since_cart >= 60.0", 0.0, MINUTE_US),
            ("profile.since_cart > 60.0", 0.0, MINUTE_US + 1),
            ("profile.since_cart == 60.0", 0.0, MINUTE_US),
            ("profile.since_cart != 60.0", 1.0, MINUTE_US),
            ("profile.since_cart > profile.age", 0.0, 30 * SECOND_US + 1),
            ("now - profile.born < duration('60s')", 1.0, MINUTE_US),
            ("profile.born + duration('60s') >= now", 1.0, MINUTE_US + 1),
            ("now > timestamp('2026-09-21T14:14:20Z')", 0.0, MINUTE_US + 1),
        ],
    )
    def test_segment_is_looked_at_when_what_grows_with_time_crosses(
        self, expression: str, before: float, crossing_us: int
    ) -> None:
        catalog = shop(("it", expression))
        told = history(cart(NOON_US), catalog=catalog)

        def at(instant_us: int) -> Seen:
            return look(instant_us, told, catalog, born=float(NOON_US), age=30.0)

        instant_us, looks = NOON_US + SECOND_US, 0
        assert at(instant_us)["it"] == before
        while at(instant_us)["it"] == before:
            following_us = at(instant_us).standing_until_us
            assert instant_us < following_us <= NOON_US + crossing_us
            assert at(following_us - 1)["it"] == before
            instant_us, looks = following_us, looks + 1
        assert instant_us == NOON_US + crossing_us
        assert looks <= 4, "time is not spent looking at every microsecond"

    def test_what_no_segment_reads_does_not_change_one(self) -> None:
        catalog = shop(("carts", "profile.n_carts > 1.0"))
        told = history(view(NOON_US), view(NOON_US + MINUTE_US), catalog=catalog)
        seen = look(NOON_US, told, catalog)
        assert seen.standing_until_us == NEVER_US
        assert seen.until_us == ALWAYS_US

    @pytest.mark.parametrize(("operator", "holds"), [("<=", 1.0), ("==", 1.0), ("<", 0.0), ("!=", 0.0)])
    def test_recencies_whose_distance_is_that_of_the_rule_never_waver(self, operator: str, holds: float) -> None:
        """Their difference is the same at all times but for its last bit; time is not spent looking at that."""
        catalog = shop(("close", f"profile.since_view - profile.since_cart {operator} 0.7"))
        told = history(view(NOON_US), cart(NOON_US + 700_000), catalog=catalog)
        for instant_us in range(NOON_US + 700_000, NOON_US + 500 * SECOND_US, 1_234_567):
            seen = look(instant_us, told, catalog)
            assert (seen["close"], seen.standing_until_us) == (holds, NOON_US + 600 * SECOND_US)

    def test_recencies_of_one_instant_are_equal_for_good(self) -> None:
        catalog = shop(("both", "profile.since_view == profile.since_cart"))
        told = history(view(NOON_US), cart(NOON_US), catalog=catalog)
        seen = look(NOON_US + SECOND_US, told, catalog)
        assert (seen["both"], seen.standing_until_us) == (1.0, NOON_US + 600 * SECOND_US)


class TestUntil:
    def test_stored_facts_hold_until_the_first_event_leaves_a_window(self) -> None:
        catalog = shop(windows=[window("n_carts", "COUNT", "cart"), window("last", "LAST", "cart", property="price")])
        told = history(cart(NOON_US), cart(NOON_US + 7), catalog=catalog)
        assert look(NOON_US + 7, told, catalog).until_us == NOON_US + 600 * SECOND_US
        assert look(NOON_US + 600 * SECOND_US, told, catalog).until_us == NOON_US + 600 * SECOND_US + 7
        assert look(NOON_US, told, catalog).until_us == NOON_US + 7
        assert look(NOON_US + 601 * SECOND_US, told, catalog).until_us == NEVER_US

    def test_nothing_stored_holds_while_a_recency_runs(self) -> None:
        told = history(cart(NOON_US))
        assert look(NOON_US + 600 * SECOND_US - 1, told).until_us == ALWAYS_US
        visit_end_us = NOON_US + GAP_US
        assert look(NOON_US + 600 * SECOND_US, told).until_us == visit_end_us
        assert look(visit_end_us, told).until_us == NEVER_US


def test_full_series_are_counted_as_they_should_be() -> None:
    n_closed = 300
    items = [f"item {i}" for i in np.random.default_rng(7).integers(900, size=ENTRIES_MAX - n_closed)]
    closed = [f"item {i}" for i in range(n_closed)]
    told = history(
        *(cart(NOON_US + i, item) for i, item in enumerate(items)),
        *(checkout(NOON_US + len(items), item) for item in closed),
    )
    assert told.is_full
    seen = look(NOON_US + len(items), told)
    assert (seen["n_carts"], seen["n_items"]) == (len(items), len({*items}))
    assert seen["n_open"] == len({*items} - {*closed})


def test_columns_are_made_once_a_catalog_and_not_for_ever() -> None:
    assert derived.of(PLAIN) is derived.of(PLAIN)
    catalogs: Sequence[Catalog] = [compiled(currencyCode=code) for code in _codes(DERIVED_KEPT + 1)]
    kept: list[Derived] = [derived.of(catalog) for catalog in catalogs]
    assert len({id(each) for each in kept}) == len(kept)
    assert derived.of(catalogs[-1]) is kept[-1]


def _codes(n: int) -> list[str]:
    return [f"AA{chr(ord('A') + i)}" for i in range(n)]


def test_warm_kernels_are_those_that_service_calls() -> None:
    """Compiling takes seconds, which no decision may wait for."""
    dispatchers: list[Any] = [compare, evaluate, derived._derive]
    known = [len(each.signatures) for each in dispatchers]
    catalog = compile_catalog(whole())
    told = SeriesSet.from_bytes(SeriesSet.empty(len(catalog.profiles.series)).to_bytes())
    entries = entries_of("purchase", NOON_US, {"sport": to_value("ski")}, catalog.profiles)
    look(NOON_US, told, catalog)
    look(NOON_US, told.insert(entries), catalog)
    look(NOON_US, SeriesSet.empty(0), compile_catalog(message()))
    assert [len(each.signatures) for each in dispatchers] == known
    assert len(dispatchers[-1].signatures) == 1, "with a journey and without"
