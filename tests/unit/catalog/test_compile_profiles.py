"""What a catalog's words about profiles become: names, series, windows, segments, a table, and stamps of it all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
    ProfileTerms,
    Series,
)
from server.errors import TsugiError
from tests.support.catalogs import message, whole
from tests.support.rules import CATEGORY, NUMBER, TEXT, YES, evaluate
from tsugi.v1 import catalog_pb2
from tsugi.v1.value_pb2 import Value

DAY_US = 86_400_000_000
WHOLE = compile_catalog(whole())
TERMS = WHOLE.profiles


def series_of(terms: ProfileTerms, window: str) -> Series:
    return terms.series[int(terms.windows.series[terms.windows.names.index(window)])]


def with_rule(rule: str) -> catalog_pb2.Catalog:
    return whole(actions=[{"name": "a", "eligibility": rule, "treatments": [{"name": "t", "channel": "web"}]}])


def test_defaults_are_filled_in() -> None:
    terms = compile_catalog(message()).profiles
    number = terms.namespaces["customer_number"]
    assert (number.link_rule, number.values_per_profile_max, number.shared_max) == (catalog_pb2.LINK_RULE_UNIQUE, 0, 16)
    crm = terms.sources["crm"]
    assert (crm.row, crm.trust, crm.channel, crm.silence_us_max) == (0, 50, "", 0)
    assert [*map(sorted, (crm.attributes, crm.event_types))] == [["age", "member", "tier"], ["visit"]]
    assert crm.namespaces == {"customer_number", "browser_id"}
    assert [each.survivorship for each in terms.attributes] == [catalog_pb2.SURVIVORSHIP_MOST_RECENT] * 3
    assert terms.events["visit"].retention_us == 400 * DAY_US
    assert terms.windows.session_gap_us == 1_800_000_000
    assert (terms.matching.link_weight_min, terms.matching.review_weight_min) == (12.0, 6.0)
    assert (terms.series, terms.windows.names, terms.segments.names, terms.journey) == ((), (), (), None)
    assert terms.windows.session_series == NO_ROW


def test_what_is_stated_stands() -> None:
    device, phone = TERMS.namespaces["browser_id"], TERMS.namespaces["phone"]
    assert (device.link_rule, device.shared_max) == (catalog_pb2.LINK_RULE_SHARED_DEVICE, 4)
    assert (phone.meaning, phone.default_country_code) == (catalog_pb2.MEANING_PHONE, "JP")
    crm = TERMS.sources["crm"]
    assert (crm.trust, crm.channel, crm.default_country_code, crm.silence_us_max) == (0, "web", "DE", DAY_US)
    assert [*map(list, (crm.attributes, crm.event_types, crm.namespaces))] == [["age"], ["purchase"], ["phone"]]
    email = TERMS.attributes[TERMS.attribute_rows["email"]]
    assert (email.name, email.meaning, email.time_to_live_us) == ("email", catalog_pb2.MEANING_EMAIL, 3_600_000_000)
    assert email.survivorship == catalog_pb2.SURVIVORSHIP_LONGEST
    assert (TERMS.events["complaint"].retention_us, TERMS.events["complaint"].channel) == (10 * DAY_US, "web")
    assert TERMS.consent_purposes == {"marketing", "profiling", "service"}
    assert TERMS.matching.is_on
    assert TERMS.matching.weights == {"email": (9.0, 0.0, -4.0)}
    assert TERMS.windows.session_gap_us == 600_000_000


@pytest.mark.parametrize("catalog", [whole(matching={"off": True}), message()])
def test_matching_is_off_when_stated_or_when_nothing_has_a_meaning(catalog: catalog_pb2.Catalog) -> None:
    assert not compile_catalog(catalog).profiles.matching.is_on


def test_profile_part_holds_attributes_windows_stage_and_segments_in_this_order() -> None:
    names = [fact.name.removeprefix("profile.") for fact in WHOLE.space.facts[WHOLE.space.profile_slice]]
    assert names == [
        *("age", "sports", "worth", "taste", "email"),
        *("buys_7d", "buys_30d", "visits_now", "ski_spend", "last_sport", "last_code", "n_sports", "since_visit"),
        *("n_open", "worth_recency", "worth_frequency", "worth_monetary"),
        *("journey_stage", "skier", "angry"),
    ]
    assert WHOLE.space.facts[WHOLE.space.n_profile + 1].name == "context.hour"
    assert tuple(each.fact for each in TERMS.attributes) == WHOLE.space.facts[1 : 1 + len(TERMS.attributes)]
    assert TERMS.windows.names == tuple(names[5:17])


def test_window_for_the_last_value_has_the_codes_of_its_property() -> None:
    facts = {fact.name: fact for fact in WHOLE.space.facts}
    properties = TERMS.events["purchase"].properties
    for name, kind in (("sport", CATEGORY), ("code", TEXT)):
        fact = facts[f"profile.last_{name}"]
        assert fact.type == kind
        assert fact.codes is properties[name].codes
    assert {facts[f"profile.{name}"].type for name in ("buys_7d", "ski_spend", "n_open", "since_visit")} == {NUMBER}
    rule = [{"name": "a", "expression": "profile.last_code == 'SALE' && profile.last_code != 'GIFT'"}]
    code = compile_catalog(whole(segments=rule)).profiles.events["purchase"].properties["code"]
    assert [code.encode(Value(text_value=text)) for text in ("SALE", "GIFT", "other")] == [0.0, 1.0, -1.0]


def test_windows_that_need_the_same_share_a_series_as_long_as_the_longest() -> None:
    shared = {series_of(TERMS, name) for name in ("buys_7d", "buys_30d", "worth_recency", "worth_frequency")}
    assert shared == {Series(MARKS, "purchase", "", "", NO_ROW, 366 * DAY_US)}
    visits = {series_of(TERMS, name) for name in ("visits_now", "since_visit")}
    assert visits == {Series(MARKS, "visit", "", "", NO_ROW, 7 * DAY_US)}
    assert series_of(TERMS, "ski_spend") == Series(VALUES, "purchase", "", "total", 0, DAY_US)
    assert series_of(TERMS, "worth_monetary") == Series(VALUES, "purchase", "", "total", NO_ROW, 366 * DAY_US)
    assert series_of(TERMS, "last_sport") == Series(VALUES, "purchase", "", "sport", NO_ROW, DAY_US)
    assert series_of(TERMS, "n_sports") == Series(KEYS, "purchase", "", "sport", NO_ROW, DAY_US)
    assert series_of(TERMS, "n_open") == Series(OPENINGS, "complaint", "settlement", "ticket", NO_ROW, 10 * DAY_US)
    assert len(set(TERMS.series)) == len(TERMS.series) == 10


def test_visit_needs_a_day_of_all_events_beside_its_own() -> None:
    assert TERMS.series[TERMS.windows.session_series] == Series(MARKS, ANY_EVENT, "", "", NO_ROW, DAY_US)
    spans_us = dict(zip(TERMS.windows.names, TERMS.windows.spans_us.tolist(), strict=True))
    assert (spans_us["visits_now"], spans_us["buys_7d"]) == (0, 7 * DAY_US)
    alone = message(windows=[{"name": "n", "kind": "WINDOW_KIND_COUNT", "eventType": "visit", "session": True}])
    assert [each.span_us for each in compile_catalog(alone).profiles.series] == [DAY_US, DAY_US]


def test_recency_frequency_and_monetary_value_are_three_windows_that_learners_do_not_read() -> None:
    kinds = dict(zip(TERMS.windows.names, TERMS.windows.kinds.tolist(), strict=True))
    assert kinds["worth_recency"] == catalog_pb2.WINDOW_KIND_RECENCY
    assert kinds["worth_frequency"] == catalog_pb2.WINDOW_KIND_COUNT
    assert kinds["worth_monetary"] == catalog_pb2.WINDOW_KIND_SUM
    assert not [name for name in WHOLE.learned.names if name.startswith("profile.worth_")]


def test_event_type_knows_every_series_that_takes_its_events() -> None:
    def kinds(event_type: str) -> list[tuple[int, str]]:
        rows = TERMS.events[event_type].series
        assert list(rows) == sorted(rows)
        return [(TERMS.series[row].kind, TERMS.series[row].event_type) for row in rows]

    assert kinds("visit") == [(MARKS, "visit"), (MARKS, ANY_EVENT)]
    assert kinds("complaint") == kinds("settlement") == [(OPENINGS, "complaint"), (MARKS, ANY_EVENT)]
    assert (STAGES, ANY_EVENT) in kinds("purchase")
    assert (OPENINGS, "complaint") not in kinds("purchase")


def test_filter_is_lowered_over_the_properties_after_now() -> None:
    terms = TERMS.events["purchase"]
    assert [fact.name for fact in terms.property_facts] == ["event.total", "event.pieces", "event.sport", "event.code"]
    for total, sport, passes in ((2.0, 0.0, True), (1.5, 0.0, False), (2.0, 1.0, False)):
        facts = np.array([math.nan, total, math.nan, sport, math.nan])
        assert (evaluate(terms.filters, 0, facts) == YES) == passes
    assert TERMS.events["visit"].filters.starts.tolist() == [0]


def test_equal_filters_make_equal_series() -> None:
    windows = [
        {"name": f"w{i}", "kind": "WINDOW_KIND_COUNT", "eventType": "visit", "filter": text, "span": f"{60 + i}s"}
        for i, text in enumerate(("event.pages > 1.0", "1.0 < event.pages", "event.pages > 2.0"))
    ]
    terms = compile_catalog(message(windows=windows)).profiles
    assert terms.windows.series.tolist() == [0, 0, 1]
    assert [(each.filter_row, each.span_us) for each in terms.series] == [(0, 61_000_000), (1, 62_000_000)]


def test_journey_is_a_table_in_which_the_first_listed_transition_wins() -> None:
    journey = TERMS.journey
    assert journey is not None
    assert journey.stages == ("awareness", "engagement", "retention")
    assert journey.symbols == {("event", "purchase"): 0, ("outcome", "dismiss"): 1}
    assert journey.steps.tolist() == [[1, 0], [2, 0], [2, 0]]
    assert TERMS.series[journey.series] == Series(STAGES, ANY_EVENT, "", "", NO_ROW, 3_650 * DAY_US)
    stage = WHOLE.space.facts[WHOLE.space.index["profile.journey_stage"]]
    assert stage.codes == {"awareness": 0, "engagement": 1, "retention": 2}


def test_journey_without_transitions_stays_where_it_begins() -> None:
    journey = compile_catalog(message(journey={"stages": [{"name": "only"}]})).profiles.journey
    assert journey is not None
    assert journey.steps.shape == (1, 0)


def test_segments_are_rules_over_the_whole_fact_vector() -> None:
    assert TERMS.segments.names == ("skier", "angry")
    facts = np.full(len(WHOLE.space.facts), math.nan)
    facts[WHOLE.space.index["profile.sports"]] = 0b001
    assert evaluate(TERMS.segments.rules, int(TERMS.segments.rows[0]), facts) == YES


def test_eligibility_reads_windows_stage_segments_and_sets() -> None:
    catalog = compile_catalog(
        with_rule(
            "profile.skier && profile.buys_7d > 1.0 && profile.journey_stage == 'retention' && 'run' in profile.sports"
        )
    )
    known = {"profile.skier": 1, "profile.buys_7d": 2, "profile.journey_stage": 2, "profile.sports": 0b100}
    facts = np.full(len(catalog.space.facts), math.nan)
    for name, number in known.items():
        facts[catalog.space.index[name]] = number
    assert evaluate(catalog.rules, 0, facts) == YES


def test_facts_that_time_alone_changes_have_a_slope() -> None:
    slopes = dict(zip((fact.name for fact in WHOLE.space.facts), TERMS.slopes.tolist(), strict=True))
    assert {name: slope for name, slope in slopes.items() if slope} == {
        "now": 1.0,
        "profile.since_visit": 1e-6,
        "profile.worth_recency": 1e-6,
    }


def test_learners_read_windows_segments_and_the_stage_unless_they_are_kept_out() -> None:
    assert WHOLE.learned.names == (
        *("profile.age", "profile.worth"),
        *("profile.buys_7d", "profile.buys_30d", "profile.visits_now", "profile.ski_spend"),
        *("profile.last_sport=ski", "profile.last_sport=bike", "profile.last_sport=run"),
        *("profile.n_sports", "profile.since_visit"),
        *("profile.journey_stage=awareness", "profile.journey_stage=engagement", "profile.journey_stage=retention"),
        *("profile.skier", "context.hour"),
    )
    assert WHOLE.learned.parameters[WHOLE.learned.names.index("profile.buys_7d"), 1] == 2.0


def many_actions(n: int) -> list[dict[str, Any]]:
    return [{"name": f"a{i}", "treatments": [{"name": "t", "channel": "web"}]} for i in range(n)]


def test_windows_and_segments_count_towards_what_learners_may_read() -> None:
    segments = [{"name": f"s{i}", "expression": "profile.member"} for i in range(59)]
    actions = many_actions(100)
    assert len(compile_catalog(message(segments=segments[:58], actions=actions)).learned.names) == 64
    with pytest.raises(TsugiError, match=r"learners read at most 64 columns .* got 65; set excluded_from_learning"):
        compile_catalog(message(segments=segments, actions=actions))


@pytest.mark.parametrize(("n_actions", "n_columns"), [(3, 320), (25, 129), (101, 64)])
def test_learners_may_read_more_of_a_person_where_there_are_few_actions(n_actions: int, n_columns: int) -> None:
    values = [f"v{i}" for i in range(64)]

    def of(n: int) -> catalog_pb2.Catalog:
        n_left = n - 5  # five are those of the small catalog's people
        context = [
            {"name": f"c{first}", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": values[: n_left - first]}
            for first in range(0, n_left, len(values))
        ]
        return message(contextAttributes=context, actions=many_actions(n_actions))

    assert len(compile_catalog(of(n_columns)).learned.names) == n_columns
    with pytest.raises(TsugiError, match=f"learners read at most {n_columns} columns"):
        compile_catalog(of(n_columns + 1))


def test_attribute_that_no_rule_segment_learner_or_matching_reads_is_known_as_such() -> None:
    assert TERMS.unread_attributes == {"taste"}
    assert compile_catalog(whole(matching={"off": True})).profiles.unread_attributes == {"taste", "email"}
    by_segment = whole(matching={"off": True}, segments=[{"name": "known", "expression": "has(profile.email)"}])
    assert compile_catalog(by_segment).profiles.unread_attributes == {"sports", "taste"}
    assert compile_catalog(with_rule("has(profile.taste)")).profiles.unread_attributes == frozenset()


EDITS: dict[str, tuple[Callable[[catalog_pb2.Catalog], Any], bool, bool]] = {
    "span of a shared series": (lambda c: c.windows[0].span.FromSeconds(3_600), True, False),
    "span of a series": (lambda c: c.windows[4].span.FromSeconds(3_600), True, True),
    "filter": (lambda c: setattr(c.windows[3], "filter", "event.total > 2.5"), True, True),
    "session gap": (lambda c: c.session_gap.FromSeconds(601), True, False),
    "rule of a segment": (lambda c: setattr(c.segments[0], "expression", "'run' in profile.sports"), True, False),
    "name of a segment": (lambda c: setattr(c.segments[0], "name", "runner"), True, False),
    "transition": (lambda c: c.journey.transitions.pop(0), True, False),
    "touchpoint": (lambda c: c.journey.transitions.pop(2), True, True),
    "time to live": (lambda c: c.profile_attributes[4].time_to_live.FromSeconds(60), True, False),
    "survivorship": (lambda c: setattr(c.profile_attributes[2], "survivorship", 1), True, False),
    "trust": (lambda c: setattr(c.sources[0], "trust", 1), True, False),
    "dimensions": (lambda c: setattr(c.profile_attributes[3], "dimensions", 3), True, False),
    "bounds": (lambda c: setattr(c.profile_attributes[2], "maximum", 999), True, False),
    "currency": (lambda c: setattr(c, "currency_code", "USD"), True, True),
    "values of a property": (lambda c: c.event_types[0].properties[2].allowed_values.append("golf"), True, True),
    "text compared": (lambda c: setattr(c.segments[0], "expression", "profile.last_code == 'SALE'"), True, True),
    "property that nothing reads": (lambda c: setattr(c.event_types[0].properties[1], "maximum", 9), False, False),
    "name": (lambda c: setattr(c, "name", "another"), False, False),
    "spread": (lambda c: setattr(c.windows[0], "spread", 3), False, False),
    "retention": (lambda c: c.event_types[0].retention.FromSeconds(500 * 86_400), False, False),
    "matching": (lambda c: setattr(c.matching, "off", True), False, False),
    "purpose": (lambda c: c.consent_purposes.add(name="research"), False, False),
}


@pytest.mark.parametrize("changed", EDITS)
def test_layouts_change_when_what_they_stand_for_does(changed: str) -> None:
    edit, profile_changes, series_change = EDITS[changed]
    catalog = whole()
    edit(catalog)
    compiled = compile_catalog(catalog)
    assert (compiled.space.profile_layout != WHOLE.space.profile_layout) == profile_changes
    assert (compiled.profiles.series_layout != TERMS.series_layout) == series_change


def test_everything_compiled_is_read_only() -> None:
    assert TERMS.journey is not None
    windows, segments = TERMS.windows, TERMS.segments
    names = [array.dtype.name for array in (windows.series, TERMS.journey.steps, segments.rows)]
    assert names == ["int32"] * 3
    assert [windows.kinds.dtype.name, windows.spans_us.dtype.name, TERMS.slopes.dtype.name] == [
        "uint8",
        "int64",
        "float64",
    ]
    assert not any(array.flags.writeable for array in (windows.series, windows.kinds, windows.spans_us))
    assert not any(array.flags.writeable for array in (TERMS.journey.steps, segments.rows, TERMS.slopes))
    assert not any(array.flags.writeable for array in segments.rules.columns())
