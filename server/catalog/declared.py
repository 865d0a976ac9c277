"""What a catalog declares, before any rule is read: the profile's part of the fact space, and how learners read it.

Handed a message without faults but those of its rules, it gives facts, in the order of the fact space. A window for
the last value of a property has the property's own codes, because entries of its series are encoded by them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

from numpy.typing import NDArray

from server.catalog.catalog import UNBOUNDED, Fact
from server.catalog.faults import duration_us
from server.catalog.profile_terms import AttributeTerms, ConsentTerms
from server.catalog.validation_profiles import JOURNEY_STAGE, RFM_ENDINGS, rfm_span_us
from tsugi.v1 import catalog_pb2

NOW: Final = Fact("now", catalog_pb2.ATTRIBUTE_TYPE_TIME, {}, -UNBOUNDED, UNBOUNDED)

_Array = TypeVar("_Array", bound=NDArray[Any])


LEARNED_LIMIT: Final = 5.0  # learners read numbers within ± this many stated spreads
# Where none is stated, numbers are recorded as they are, and the learner process finds out how far they lie apart.
LEARNED_LIMIT_UNSTATED: Final = 2.0**40  # exact as float32


class Reading(NamedTuple):
    """How learners read a fact that is a number: (fact - center) / spread, cut to ±limit."""

    center: float = 0.0
    spread: float = 1.0
    limit: float = LEARNED_LIMIT


class Declared(NamedTuple):
    """What a catalog declares of profiles, before any rule is read.

    Attributes:
        facts: the profile's part of the fact space.
        readings: of each of them, how learners read it; None where they do not.
        attributes: the first of the facts, with their terms.
        consents: the facts after them, with their terms.
        properties: of every event type, in declared order.
        windows: those that recency, frequency and monetary value stand for at the end.
        paths: where the filter of each window stands.
    """

    facts: tuple[Fact, ...]
    readings: tuple[Reading | None, ...]
    attributes: tuple[AttributeTerms, ...]
    consents: tuple[ConsentTerms, ...]
    properties: dict[str, dict[str, Fact]]
    windows: tuple[catalog_pb2.Window, ...]
    paths: tuple[str, ...]


def frozen(array: _Array) -> _Array:
    """Make an array read-only and return it."""
    array.flags.writeable = False
    return array


def make_fact(prefix: str, attribute: catalog_pb2.Attribute, currency_code: str) -> Fact:
    """Return the fact that an attribute declares."""
    return Fact(
        name=f"{prefix}.{attribute.name}",
        type=attribute.type,
        codes={value: code for code, value in enumerate(attribute.allowed_values)},
        minimum=attribute.minimum if attribute.HasField("minimum") else -UNBOUNDED,
        maximum=attribute.maximum if attribute.HasField("maximum") else UNBOUNDED,
        currency_code=currency_code if attribute.type == catalog_pb2.ATTRIBUTE_TYPE_MONEY else "",
        dimensions=attribute.dimensions,
    )


def reading(message: catalog_pb2.Attribute | catalog_pb2.Window) -> Reading | None:
    """Return how learners read an attribute or window; None when it is kept from them."""
    if message.excluded_from_learning:
        return None
    if not message.HasField("center") and not message.HasField("spread"):
        return Reading(limit=LEARNED_LIMIT_UNSTATED)
    return Reading(message.center, message.spread if message.HasField("spread") else 1.0)


def declare(message: catalog_pb2.Catalog) -> Declared:
    """Lay out the profile's part of the fact space.

    Args:
        message: a catalog without faults but those of its rules.
    """
    currency_code = message.currency_code
    attributes = tuple(_attribute(attribute, currency_code) for attribute in message.profile_attributes)
    properties = {
        event_type.name: {each.name: make_fact("event", each, currency_code) for each in event_type.properties}
        for event_type in message.event_types
    }
    windows = [*message.windows, *(window for rfm in message.recency_frequency_monetary for window in _expanded(rfm))]
    facts = [attribute.fact for attribute in attributes]
    readings = [reading(attribute) for attribute in message.profile_attributes]
    consents = _consents(message)
    facts += [consent.fact for consent in consents]
    readings += [None for _ in consents]
    facts += [_window_fact(window, properties[window.event_type]) for window in windows]
    readings += [reading(window) for window in windows]
    if message.HasField("journey"):
        stages = {stage.name: code for code, stage in enumerate(message.journey.stages)}
        facts.append(_fact(JOURNEY_STAGE, catalog_pb2.ATTRIBUTE_TYPE_CATEGORY, stages))
        readings.append(None if message.journey.excluded_from_learning else Reading())
    facts += [_fact(segment.name, catalog_pb2.ATTRIBUTE_TYPE_BOOL, {}) for segment in message.segments]
    readings += [None if segment.excluded_from_learning else Reading() for segment in message.segments]
    paths = tuple(f"windows[{i}].filter" for i in range(len(windows)))
    return Declared(tuple(facts), tuple(readings), attributes, consents, properties, tuple(windows), paths)


def _consents(message: catalog_pb2.Catalog) -> tuple[ConsentTerms, ...]:
    """Return what placements ask people to allow: each purpose on each channel once."""
    purposes = {purpose.name: purpose for purpose in message.consent_purposes if not purpose.consent_exempt}
    asked = dict.fromkeys(
        (placement.purpose, placement.channel) for placement in message.placements if placement.purpose in purposes
    )
    return tuple(
        ConsentTerms(
            purpose=purpose,
            channel=channel,
            # No rule reads it: what a person allows is asked by the consent gate alone.
            fact=Fact(f"consent.{purpose}.{channel}", catalog_pb2.ATTRIBUTE_TYPE_BOOL, {}, -UNBOUNDED, UNBOUNDED),
            valid_for_us=duration_us(purposes[purpose].valid_for),
        )
        for purpose, channel in asked
    )


def _fact(name: str, kind: catalog_pb2.AttributeType, codes: dict[str, int]) -> Fact:
    return Fact(f"profile.{name}", kind, codes, -UNBOUNDED, UNBOUNDED)


def _attribute(attribute: catalog_pb2.Attribute, currency_code: str) -> AttributeTerms:
    return AttributeTerms(
        name=attribute.name,
        fact=make_fact("profile", attribute, currency_code),
        survivorship=attribute.survivorship or catalog_pb2.SURVIVORSHIP_MOST_RECENT,
        meaning=attribute.meaning,
        time_to_live_us=duration_us(attribute.time_to_live),
    )


def _window_fact(window: catalog_pb2.Window, properties: Mapping[str, Fact]) -> Fact:
    if window.kind == catalog_pb2.WINDOW_KIND_LAST:
        # The codes are the property's own: entries of its series are encoded by them before any rule reads the window.
        return dataclasses.replace(properties[window.property], name=f"profile.{window.name}")
    return _fact(window.name, catalog_pb2.ATTRIBUTE_TYPE_NUMBER, {})


def _expanded(rfm: catalog_pb2.RecencyFrequencyMonetary) -> list[catalog_pb2.Window]:
    kinds = (catalog_pb2.WINDOW_KIND_RECENCY, catalog_pb2.WINDOW_KIND_COUNT, catalog_pb2.WINDOW_KIND_SUM)
    windows = [
        catalog_pb2.Window(
            name=f"{rfm.name}_{ending}", kind=kind, event_type=rfm.event_type, excluded_from_learning=True
        )
        for ending, kind in zip(RFM_ENDINGS, kinds, strict=True)
    ]
    for window in windows:
        window.span.FromMicroseconds(rfm_span_us(rfm))
    windows[-1].property = rfm.property
    return windows
