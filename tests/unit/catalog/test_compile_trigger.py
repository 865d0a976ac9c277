"""The filter of a subscription: what it may read, what lets an event through, and that the catalog stays what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.catalog.compile_trigger import TriggerFilter, compile_filter
from server.errors import TsugiError
from tests.support import catalogs
from tsugi.requests import PyValue, to_value
from tsugi.v1.error_reason_pb2 import ErrorReason

NOW_US = 1_772_000_000_000_000
NUMBER, TEXT = "ATTRIBUTE_TYPE_NUMBER", "ATTRIBUTE_TYPE_TEXT"
CATALOG = catalogs.compiled(
    profileAttributes=[
        {"name": "age", "type": NUMBER},
        {"name": "city", "type": TEXT},
        {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["bronze", "gold"]},
    ],
    eventTypes=[
        {
            "name": "cart",
            "properties": [
                {"name": "total", "type": NUMBER, "maximum": 1000},
                {"name": "shop", "type": TEXT},
                {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["bronze", "gold"]},
                {"name": "at", "type": "ATTRIBUTE_TYPE_TIME"},
            ],
        },
        {"name": "visit"},
    ],
    segments=[{"name": "local", "expression": "profile.city == 'Kyoto'"}],
)


def compiled(text: str) -> TriggerFilter:
    found = compile_filter(text, "cart", CATALOG)
    assert found is not None
    return found


def passes(text: str, properties: dict[str, PyValue] | None = None, **profile: float) -> bool:
    """Say whether an event passes a filter, of a person with these encoded facts."""
    found = compiled(text)
    facts = found.facts()
    facts[0] = NOW_US
    for name, number in profile.items():
        facts[CATALOG.space.index[f"profile.{name}"]] = number
    return found.passes(facts, {name: to_value(value) for name, value in (properties or {}).items()})


def refusal(text: str, event_type: str = "cart") -> TsugiError:
    with pytest.raises(TsugiError) as refused:
        compile_filter(text, event_type, CATALOG)
    return refused.value


def test_no_filter_lets_everything_through() -> None:
    assert compile_filter("", "cart", CATALOG) is None


@pytest.mark.parametrize(
    ("text", "properties", "profile", "does_pass"),
    [
        ("event.total > 50.0", {"total": 51}, {}, True),
        ("event.total > 50.0", {"total": 50}, {}, False),
        ("event.total > 50.0", {}, {}, False),
        ("event.total > 50.0", {"total": 5_000}, {}, False),
        ("event.total > 50.0", {"total": "much"}, {}, False),
        ("!(event.total > 50.0)", {}, {}, False),
        ("!has(event.total) || event.total > 50.0", {}, {}, True),
        ("event.shop == 'north'", {"shop": "north"}, {}, True),
        ("event.shop != 'north'", {"shop": "south"}, {}, True),
        ("event.shop in ['north', 'south']", {"shop": "west"}, {}, False),
        ("profile.age >= 18.0", {}, {"age": 18}, True),
        ("profile.age >= 18.0", {}, {}, False),
        ("event.total > profile.age", {"total": 40}, {"age": 39}, True),
        ("event.tier == profile.tier", {"tier": "gold"}, {"tier": 1}, True),
        ("event.tier == profile.tier", {"tier": "gold"}, {"tier": 0}, False),
        ("profile.local", {}, {"local": 1}, True),
        ("now > timestamp('2026-01-01T00:00:00Z')", {}, {}, True),
        ("true", {}, {}, True),
        ("false", {}, {}, False),
    ],
)
def test_event_passes_when_the_rule_is_surely_true(
    text: str, properties: dict[str, PyValue], profile: dict[str, float], does_pass: bool
) -> None:
    assert passes(text, properties, **profile) is does_pass


def test_property_that_is_not_declared_is_passed_over() -> None:
    assert passes("event.total > 1.0", {"total": 2, "colour": "red"})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("context.hour > 5.0", "context.hour cannot be read here; the filter of a subscription reads event"),
        ("action.price > 5.0", "action.price cannot be read here"),
        ("event.totl > 5.0", "event.totl is not declared; did you mean event.total?"),
        ("event.total > 5", "write 5.0"),
        ("event.total", "a rule is true or false"),
        ("event.total >", "ends too early"),
        ("event.tier == 'iron'", "no allowed value"),
        ("event.shop == profile.city", "cannot be compared"),
        ("profile.city == 'Osaka'", "'Osaka', which no rule of the catalog names; declare a segment for it"),
        ("true" + " && event.total != 1.0" * 200, "at most 2048 bytes"),
    ],
)
def test_filter_that_cannot_be_evaluated_is_refused_at_its_path(text: str, fault: str) -> None:
    error = refusal(text)
    assert error.reason == ErrorReason.ERROR_REASON_FIELD_INVALID
    assert {violation.path for violation in error.violations} == {"filter"}
    assert fault in error.violations[0].description
    assert error.metadata["field"] == "filter"


def test_every_fault_is_told() -> None:
    assert len(refusal("event.totl > 1.0 && profile.agee > 1.0").violations) == 2


def test_event_type_that_is_not_declared_is_refused_at_its_path() -> None:
    error = refusal("", "wedding")
    assert (error.reason, error.metadata["field"]) == (ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND, "event_type")


def test_property_of_another_event_type_is_not_declared() -> None:
    assert "event.total" in refusal("event.total > 1.0", "visit").message


def test_text_that_the_catalog_names_is_compared_as_profiles_are_encoded() -> None:
    code = CATALOG.space.facts[CATALOG.space.index["profile.city"]].codes["Kyoto"]
    assert passes("profile.city == 'Kyoto'", city=code)
    assert not passes("profile.city == 'Kyoto'", city=-1)


def test_catalog_is_not_changed_by_the_texts_of_filters() -> None:
    def codes() -> list[Any]:
        facts = [*CATALOG.space.facts, *CATALOG.event_properties["cart"].values()]
        return [dict(fact.codes) for fact in facts]

    before = codes()
    compiled("event.shop == 'nowhere else'")
    refusal("profile.city == 'nowhere else'")
    assert codes() == before


def test_nothing_of_one_event_is_left_for_the_next() -> None:
    found = compiled("event.total > 1.0")
    assert found.passes(found.facts(), {"total": to_value(2)})
    assert np.isnan(found.facts()).all()
    assert not found.passes(found.facts(), {})
