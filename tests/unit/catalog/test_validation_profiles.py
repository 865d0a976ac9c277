"""Faults of what a catalog says about profiles: each with its path, and said so that the author can mend it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from google.protobuf import json_format

from server.catalog.compile import compile_catalog
from server.catalog.validation import check
from server.errors import TsugiError
from tests.support.catalogs import message, whole
from tsugi.v1 import catalog_pb2

WHOLE: dict[str, Any] = json_format.MessageToDict(whole())


PLACEMENTS = [{"name": "home", "channel": "web", "goal": "click", "purpose": "n0"}]


def faults(catalog: catalog_pb2.Catalog) -> list[tuple[str, str]]:
    return [(violation.path, violation.description) for violation in check(catalog)]


def changed(path: str, **fields: Any) -> catalog_pb2.Catalog:
    """Change fields of one place of the whole catalog: windows.0, journey.transitions.1; None removes a field."""
    tree = copy.deepcopy(WHOLE)
    place: Any = tree
    for step in path.split(".") if path else ():
        place = place[int(step)] if step.isdigit() else place[step]
    place.update(fields)
    for field in [field for field, value in fields.items() if value is None]:
        del place[field]
    return json_format.ParseDict(tree, catalog_pb2.Catalog())


def test_catalog_that_says_everything_has_no_fault() -> None:
    assert faults(whole()) == []


AGE, SPORTS, WORTH, TASTE, EMAIL = (f"profileAttributes.{i}" for i in range(5))
BUYS, BUYS_30D, VISITS, SKI, LAST_SPORT, LAST_CODE, N_SPORTS, SINCE, OPEN = (f"windows.{i}" for i in range(9))


@pytest.mark.parametrize(
    ("path", "fields", "fault"),
    [
        ("identityNamespaces.0", {"linkRule": 9}, (
            "identity_namespaces[0].link_rule", f"one of {', '.join(catalog_pb2.LinkRule.keys()[1:])}, got 9"
        )),
        ("identityNamespaces.0", {"valuesPerProfileMax": 65}, (
            "identity_namespaces[0].values_per_profile_max", "at most 64, got 65"
        )),
        ("identityNamespaces.1", {"sharedMax": 1}, ("identity_namespaces[1].shared_max", "2 to 1000, got 1")),
        ("identityNamespaces.1", {"sharedMax": 1001}, ("identity_namespaces[1].shared_max", "2 to 1000, got 1001")),
        ("identityNamespaces.0", {"meaning": "MEANING_CITY"}, (
            "identity_namespaces[0].meaning",
            "an identity is cleansed as MEANING_EMAIL, as MEANING_PHONE, or not at all",
        )),
        ("identityNamespaces.0", {"defaultCountryCode": "JP"}, (
            "identity_namespaces[0].default_country_code", "only a namespace with MEANING_PHONE has it"
        )),
        ("identityNamespaces.2", {"defaultCountryCode": "jp"}, (
            "identity_namespaces[2].default_country_code", "an ISO 3166-1 alpha-2 code such as JP, got 'jp'"
        )),
        ("sources.0", {"owner": "é" * 65}, ("sources[0].owner", "at most 128 bytes")),
        ("sources.0", {"party": None}, ("sources[0].party", "a party is required, such as PARTY_FIRST")),
        ("sources.0", {"party": 4}, ("sources[0].party", "a party is required, such as PARTY_FIRST")),
        ("sources.0", {"delivery": None}, (
            "sources[0].delivery", "a delivery is required: DELIVERY_BATCH or DELIVERY_STREAM"
        )),
        ("sources.0", {"trust": 101}, ("sources[0].trust", "0 to 100, got 101")),
        ("sources.0", {"attributes": ["aeg"]}, (
            "sources[0].attributes[0]", "no profile attribute is named 'aeg'; did you mean 'age'?"
        )),
        ("sources.0", {"attributes": ["age", "age"]}, (
            "sources[0].attributes", "the same profile attribute stands twice; name it once"
        )),
        ("sources.0", {"eventTypes": ["purchases"]}, (
            "sources[0].event_types[0]", "no event type is named 'purchases'; did you mean 'purchase'?"
        )),
        ("sources.0", {"identityNamespaces": ["fax"]}, (
            "sources[0].identity_namespaces[0]", "no identity namespace is named 'fax'"
        )),
        ("sources.0", {"defaultCountryCode": "GER"}, (
            "sources[0].default_country_code", "an ISO 3166-1 alpha-2 code such as JP, got 'GER'"
        )),
        ("sources.0", {"channel": "wbe"}, ("sources[0].channel", "no channel is named 'wbe'; did you mean 'web'?")),
        ("sources.0", {"silenceMax": "1s"}, (
            "sources[0].silence_max", "60s to 315360000s (3650 days), got 1s"
        )),
        ("sources.1", {"name": "crm"}, ("sources[1].name", "'crm' stands at sources[0] already")),
        (AGE, {"allowedValues": ["x"]}, (
            "profile_attributes[0].allowed_values", "only a category or a set has allowed values"
        )),
        (AGE, {"dimensions": 2}, ("profile_attributes[0].dimensions", "only a vector has dimensions")),
        (AGE, {"unit": "é" * 17}, ("profile_attributes[0].unit", "at most 32 bytes")),
        (AGE, {"minimum": 121}, ("profile_attributes[0].minimum", "not above the maximum")),
        (AGE, {"spread": 0}, ("profile_attributes[0].spread", "above 0, got 0.0")),
        (AGE, {"survivorship": "SURVIVORSHIP_LONGEST"}, (
            "profile_attributes[0].survivorship", "only a text can be the longest"
        )),
        (AGE, {"survivorship": 20}, (
            "profile_attributes[0].survivorship", f"one of {', '.join(catalog_pb2.Survivorship.keys()[1:])}, got 20"
        )),
        (AGE, {"meaning": "MEANING_CITY"}, ("profile_attributes[0].meaning", "only a text has a meaning")),
        (AGE, {"purposes": ["marketting"]}, (
            "profile_attributes[0].purposes[0]",
            "no consent purpose is named 'marketting'; did you mean 'marketing'?",
        )),
        (AGE, {"purposes": ["marketing", "marketing"]}, (
            "profile_attributes[0].purposes", "the same consent purpose stands twice; name it once"
        )),
        (SPORTS, {"allowedValues": []}, ("profile_attributes[1].allowed_values", "a set has 1 to 52 values, got 0")),
        (SPORTS, {"allowedValues": [f"ski{i}" for i in range(53)]}, (
            "profile_attributes[1].allowed_values", "a set has 1 to 52 values, got 53"
        )),
        (SPORTS, {"minimum": 1}, ("profile_attributes[1].minimum", "only a number or an amount has it")),
        (SPORTS, {"unit": "kg"}, ("profile_attributes[1].unit", "only a number has a unit")),
        (SPORTS, {"survivorship": "SURVIVORSHIP_MINIMUM"}, (
            "profile_attributes[1].survivorship", "only a number, amount or time can be the least"
        )),
        (TASTE, {"dimensions": 257}, ("profile_attributes[3].dimensions", "a vector has 1 to 256, got 257")),
        (TASTE, {"dimensions": 0}, ("profile_attributes[3].dimensions", "a vector has 1 to 256, got 0")),
        (EMAIL, {"timeToLive": "59s"}, (
            "profile_attributes[4].time_to_live", "60s to 315360000s (3650 days), got 59s"
        )),
        (EMAIL, {"survivorship": "SURVIVORSHIP_MAXIMUM"}, (
            "profile_attributes[4].survivorship", "only a number, amount or time can be the greatest"
        )),
        ("eventTypes.1", {"retention": "315360001s"}, (
            "event_types[1].retention", "3600s to 315360000s (3650 days), got 315360001s"
        )),
        ("eventTypes.1", {"channel": "call"}, ("event_types[1].channel", "no channel is named 'call'")),
        ("eventTypes.0.properties.1", {"type": "ATTRIBUTE_TYPE_VECTOR", "dimensions": 2}, (
            "event_types[0].properties[1].type",
            "a fact of an event is no VECTOR; one of NUMBER, BOOL, CATEGORY, TEXT, TIME, SET, MONEY is expected",
        )),
        ("eventTypes.0.properties.3", {"meaning": "MEANING_CITY"}, (
            "event_types[0].properties[3].meaning", "only a profile attribute has it"
        )),
        ("eventTypes.0.properties.3", {"timeToLive": "3600s"}, (
            "event_types[0].properties[3].time_to_live", "only a profile attribute has it"
        )),
        ("", {"contextAttributes": [{"name": "n", "type": "ATTRIBUTE_TYPE_SET", "allowedValues": ["a"]}]}, (
            "context_attributes[0].type",
            "a fact of a request is no SET; one of NUMBER, BOOL, CATEGORY, TEXT, TIME is expected",
        )),
        ("contextAttributes.0", {"survivorship": "SURVIVORSHIP_MAXIMUM"}, (
            "context_attributes[0].survivorship", "only a profile attribute has it"
        )),
        ("", {"actionAttributes": [{"name": "price", "type": "ATTRIBUTE_TYPE_MONEY"}]}, (
            "action_attributes[0].type",
            "a fact of an action is no MONEY; one of NUMBER, BOOL, CATEGORY, TEXT, TIME is expected",
        )),
        (BUYS, {"name": "Buys"}, (
            "windows[0].name", "a to z, 0 to 9 and _, a letter first, at most 64 of them, got 'Buys'"
        )),
        (BUYS, {"kind": None}, ("windows[0].kind", "a kind is required, such as WINDOW_KIND_COUNT")),
        (BUYS, {"kind": 7}, ("windows[0].kind", "a kind is required, such as WINDOW_KIND_COUNT")),
        (BUYS, {"eventType": "purchas"}, (
            "windows[0].event_type", "no event type is named 'purchas'; did you mean 'purchase'?"
        )),
        (BUYS, {"property": "total"}, ("windows[0].property", "a count reads no property")),
        (SINCE, {"property": "total"}, ("windows[7].property", "a recency reads no property")),
        (SKI, {"property": "totla"}, (
            "windows[3].property", "no property of purchase is named 'totla'; did you mean 'total'?"
        )),
        (SKI, {"property": None}, (
            "windows[3].property", "the name of one property of purchase is required, such as 'code'"
        )),
        (SKI, {"property": "sport"}, ("windows[3].property", "a sum takes a number or an amount")),
        (BUYS, {"span": None}, (
            "windows[0]", "how far it reaches back is required: a span such as 86400s, or session: true"
        )),
        (VISITS, {"session": False}, (
            "windows[2]", "how far it reaches back is required: a span such as 86400s, or session: true"
        )),
        (BUYS, {"span": "59s"}, ("windows[0].span", "60s to 31622400s (366 days), got 59s")),
        (BUYS, {"closingEventType": "visit"}, (
            "windows[0].closing_event_type", "only a window of kind WINDOW_KIND_OPEN has it"
        )),
        (BUYS, {"spread": -1}, ("windows[0].spread", "above 0, got -1.0")),
        (LAST_SPORT, {"center": 1}, (
            "windows[4].center", "only a window that is a number or an amount has it"
        )),
        (OPEN, {"span": "864001s"}, (
            "windows[8].span", "complaint is kept for 864000s (10 days) only; lengthen its retention"
        )),
        (OPEN, {"closingEventType": None}, (
            "windows[8].closing_event_type", "the name of one event type is required, such as 'complaint'"
        )),
        (OPEN, {"closingEventType": "complaint"}, (
            "windows[8].closing_event_type", "another event type than the one that opens is required"
        )),
        (OPEN, {"closingEventType": "visit"}, (
            "windows[8].closing_event_type", "visit needs a property 'ticket' of type TEXT"
        )),
        ("eventTypes.1", {"retention": "7200s"}, (
            "windows[8].span", "complaint is kept for 7200s only; lengthen its retention"
        )),
        ("eventTypes.3", {"retention": "604800s", "properties": []}, None),
        ("eventTypes.3", {"retention": "604799s"}, (
            "windows[7].span", "visit is kept for 604799s only; lengthen its retention"
        )),
        ("recencyFrequencyMonetary.0", {"name": "w" * 55}, (
            "recency_frequency_monetary[0].name", "at most 54 bytes, for its windows' endings"
        )),
        ("recencyFrequencyMonetary.0", {"property": "code"}, (
            "recency_frequency_monetary[0].property", "a sum takes a number or an amount"
        )),
        ("recencyFrequencyMonetary.0", {"span": "31708800s"}, (
            "recency_frequency_monetary[0].span", "60s to 31622400s (366 days), got 31708800s"
        )),
        ("recencyFrequencyMonetary.0", {"eventType": "buy"}, (
            "recency_frequency_monetary[0].event_type", "no event type is named 'buy'"
        )),
        ("eventTypes.0", {"retention": "2678400s"}, (
            "recency_frequency_monetary[0].span", "purchase is kept for 2678400s (31 days) only; lengthen its retention"
        )),
        ("", {"sessionGap": "59s"}, ("session_gap", "60s to 86400s, got 59s")),
        ("segments.0", {"expression": ""}, ("segments[0].expression", "an expression is required")),
        ("journey", {"stages": [], "transitions": []}, ("journey.stages", "1 to 32 entries, got 0")),
        ("journey", {"stages": [{"name": "Engagement"}], "transitions": []}, (
            "journey.stages[0].name", "a to z, 0 to 9 and _, a letter first, at most 64 of them, got 'Engagement'"
        )),
        ("journey.transitions.0", {"fromStages": ["awarenes"]}, (
            "journey.transitions[0].from_stages[0]", "no stage is named 'awarenes'; did you mean 'awareness'?"
        )),
        ("journey.transitions.0", {"fromStages": ["awareness", "awareness"]}, (
            "journey.transitions[0].from_stages", "the same stage stands twice; name it once"
        )),
        ("journey.transitions.0", {"toStage": "love"}, ("journey.transitions[0].to_stage", "no stage is named 'love'")),
        ("journey.transitions.0", {"eventType": None}, (
            "journey.transitions[0]", "what leads there is required: event_type or outcome_type"
        )),
        ("journey.transitions.0", {"eventType": "purchases"}, (
            "journey.transitions[0].event_type", "no event type is named 'purchases'; did you mean 'purchase'?"
        )),
        ("journey.transitions.2", {"outcomeType": "dismis"}, (
            "journey.transitions[2].outcome_type", "no outcome type is named 'dismis'; did you mean 'dismiss'?"
        )),
        ("matching.fields.0", {"attribute": "emial"}, (
            "matching.fields[0].attribute", "no profile attribute is named 'emial'; did you mean 'email'?"
        )),
        ("matching.fields.0", {"attribute": "age"}, (
            "matching.fields[0].attribute", "an attribute with a meaning is required"
        )),
        ("matching.fields.0", {"weights": [1]}, ("matching.fields[0].weights", "2 to 16 entries, got 1")),
        ("matching.fields.0", {"weights": [1, "NaN"]}, (
            "matching.fields[0].weights[1]", "a finite number is required"
        )),
        ("matching", {"reviewWeightMin": 11}, (
            "matching.review_weight_min", "not above link_weight_min (10), got 11"
        )),
        ("matching", {"linkWeightMin": 5}, ("matching.review_weight_min", "not above link_weight_min (5), got 6")),
        ("matching", {"linkWeightMin": "Infinity"}, ("matching.link_weight_min", "a finite number is required")),
        (BUYS, {"name": "age"}, ("windows[0].name", "profile.age is declared at profile_attributes[0] already")),
        (BUYS, {"name": "worth_monetary"}, (
            "recency_frequency_monetary[0].name", "profile.worth_monetary is declared at windows[0] already"
        )),
        ("segments.0", {"name": "n_sports"}, (
            "segments[0].name", "profile.n_sports is declared at windows[6] already"
        )),
        ("segments.0", {"name": "journey_stage"}, (
            "segments[0].name", "profile.journey_stage is the stage of the journey; choose another name"
        )),
        (BUYS_30D, {"name": "buys_7d"}, ("windows[1].name", "'buys_7d' stands at windows[0] already")),
    ],
)  # fmt: skip
def test_fault_has_its_path_and_what_is_wanted(
    path: str, fields: dict[str, Any], fault: tuple[str, str] | None
) -> None:
    assert faults(changed(path, **fields)) == ([fault] if fault else [])


@pytest.mark.parametrize("reach_us", [86_400_000_000, 86_400_000_000 - 1_000_000])
def test_visit_reaches_back_a_day_so_its_events_are_kept_as_long(reach_us: int) -> None:
    catalog = whole(windows=[{"name": "n", "kind": "WINDOW_KIND_COUNT", "eventType": "visit", "session": True}])
    catalog.ClearField("segments")
    catalog.event_types[3].retention.FromMicroseconds(reach_us)
    expected = ("windows[0].session", "visit is kept for 86399s only; lengthen its retention")
    assert faults(catalog) == ([] if reach_us == 86_400_000_000 else [expected])


def test_lists_about_profiles_are_bounded() -> None:
    source = {"party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH"}
    window = {"kind": "WINDOW_KIND_COUNT", "eventType": "visit", "span": "60s"}
    recency = {"eventType": "visit", "property": "pages"}
    parts: dict[str, tuple[str, int, dict[str, Any]]] = {
        "sources": ("sources", 64, source),
        "consentPurposes": ("consent_purposes", 64, {}),
        "windows": ("windows", 128, window),
        "recencyFrequencyMonetary": ("recency_frequency_monetary", 8, recency),
        "segments": ("segments", 128, {"expression": "profile.member"}),
    }
    for part, (path, most, entry) in parts.items():
        entries = [{"name": f"n{i}"} | entry for i in range(most + 1)]
        more = {"placements": PLACEMENTS} if part == "consentPurposes" else {}
        assert faults(message(**{part: entries[:most]}, **more)) == []
        assert faults(message(**{part: entries}, **more)) == [(path, f"0 to {most} entries, got {most + 1}")]
    stages = [{"name": f"s{i}"} for i in range(33)]
    assert faults(message(journey={"stages": stages})) == [("journey.stages", "1 to 32 entries, got 33")]
    moves = [{"eventType": "visit", "toStage": "s0"}] * 257
    journey = {"stages": stages[:1], "transitions": moves}
    assert faults(message(journey=journey)) == [("journey.transitions", "0 to 256 entries, got 257")]


def test_attribute_may_be_called_journey_stage_where_there_is_no_journey() -> None:
    assert faults(message(segments=[{"name": "journey_stage", "expression": "profile.member"}])) == []


def test_catalog_without_sources_is_good_and_lets_nobody_ingest() -> None:
    assert compile_catalog(message(sources=[])).profiles.sources == {}


@pytest.mark.parametrize(
    ("path", "fields", "fault"),
    [
        (SKI, {"filter": "event.sprot == 'ski'"}, (
            "windows[3].filter", "column 6: event.sprot is not declared; did you mean event.sport?"
        )),
        (SKI, {"filter": "profile.age > 3.0"}, (
            "windows[3].filter", "column 8: profile.age cannot be read here; a filter reads the event's own properties"
        )),
        (SKI, {"filter": "now > timestamp('2026-01-01T00:00:00Z')"}, (
            "windows[3].filter", "column 1: now cannot be read here; a filter reads the event's own properties"
        )),
        ("segments.0", {"expression": "profile.angry"}, (
            "segments[0].expression", "column 8: profile.angry is a segment; a segment reads no other segment"
        )),
        ("segments.0", {"expression": "profile.skier"}, (
            "segments[0].expression", "column 8: profile.skier is a segment; a segment reads no other segment"
        )),
        ("segments.0", {"expression": "context.hour > 3.0"}, (
            "segments[0].expression", "column 8: context.hour cannot be read here; a segment reads profile and now"
        )),
        ("segments.0", {"expression": "profile.ski_spent > 1.0"}, (
            "segments[0].expression", "column 8: profile.ski_spent is not declared; did you mean profile.ski_spend?"
        )),
        ("actions.0", {"eligibility": "event.total > 3.0"}, (
            "actions[0].eligibility",
            "column 6: event.total cannot be read here; a rule reads profile, context, action and now",
        )),
        ("segments.0", {"expression": "profile.journey_stage == 'aware'"}, (
            "segments[0].expression",
            "column 26: 'aware' is no allowed value of profile.journey_stage; did you mean awareness?",
        )),
    ],
)  # fmt: skip
def test_faults_of_filters_and_segments_are_told_when_compiled(
    path: str, fields: dict[str, Any], fault: tuple[str, str]
) -> None:
    with pytest.raises(TsugiError) as refusal:
        compile_catalog(changed(path, **fields))
    assert [(each.path, each.description) for each in refusal.value.violations] == [fault]


def test_all_faults_are_found_at_once() -> None:
    catalog = whole()
    catalog.sources[0].trust = 101
    catalog.windows[0].property = "x"
    catalog.segments[1].name = "skier"
    catalog.matching.link_weight_min = math.nan
    assert [path for path, _ in faults(catalog)] == [
        "segments[1].name",
        "sources[0].trust",
        "windows[0].property",
        "matching.link_weight_min",
    ]
