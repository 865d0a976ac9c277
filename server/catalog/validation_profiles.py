"""Whether what a catalog says about profiles is good: who may tell what, what it means, and what follows from it.

The part of ``validation.py`` that knows identities, sources, attributes, events, windows, segments, journey and
matching. Handed the message, it gives every fault; filters and segments are rules, and checked where they are compiled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration

from server.catalog.faults import DAY_US, HOUR_US, MINUTE_US, YEAR_US, Faults, duration_us, in_words
from server.catalog.values import SET_VALUES_MAX, VECTOR_NUMBERS_MAX
from tsugi.v1 import catalog_pb2

CATEGORY_VALUES_MAX: Final = 64
MATCH_LEVELS_MAX: Final = 16
RETENTION_DEFAULT_US: Final = 400 * DAY_US
SESSION_REACH_US: Final = 24 * HOUR_US
VALID_FOR_US_MAX: Final = 10 * YEAR_US
WINDOW_SPAN_US_MAX: Final = 366 * DAY_US
LINK_WEIGHT_DEFAULT: Final = 12.0
REVIEW_WEIGHT_DEFAULT: Final = 6.0
JOURNEY_STAGE: Final = "journey_stage"
RFM_ENDINGS: Final = ("recency", "frequency", "monetary")

_COUNTRY: Final = re.compile(r"[A-Z]{2}\Z")
_DECADE_US: Final = 10 * YEAR_US

_NUMBER: Final = catalog_pb2.ATTRIBUTE_TYPE_NUMBER
_CATEGORY: Final = catalog_pb2.ATTRIBUTE_TYPE_CATEGORY
_TEXT: Final = catalog_pb2.ATTRIBUTE_TYPE_TEXT
_TIME: Final = catalog_pb2.ATTRIBUTE_TYPE_TIME
_SET: Final = catalog_pb2.ATTRIBUTE_TYPE_SET
_MONEY: Final = catalog_pb2.ATTRIBUTE_TYPE_MONEY
_VECTOR: Final = catalog_pb2.ATTRIBUTE_TYPE_VECTOR
_NUMERIC: Final = (_NUMBER, _MONEY)
_PLAIN: Final = (_NUMBER, catalog_pb2.ATTRIBUTE_TYPE_BOOL, _CATEGORY, _TEXT, _TIME)
_TYPES: Final = {
    "profile": (*_PLAIN, _SET, _MONEY, _VECTOR),
    "event": (*_PLAIN, _SET, _MONEY),
    "context": _PLAIN,
    "action": _PLAIN,
}
_SURVIVES: Final[dict[int, tuple[Sequence[int], str]]] = {
    catalog_pb2.SURVIVORSHIP_LONGEST: ((_TEXT,), "only a text can be the longest"),
    catalog_pb2.SURVIVORSHIP_MINIMUM: ((_NUMBER, _MONEY, _TIME), "only a number, amount or time can be the least"),
    catalog_pb2.SURVIVORSHIP_MAXIMUM: ((_NUMBER, _MONEY, _TIME), "only a number, amount or time can be the greatest"),
}
# What a window of each kind takes of a property; a kind that is absent reads none.
_READS: Final[dict[int, tuple[Sequence[int], str]]] = {
    catalog_pb2.WINDOW_KIND_SUM: (_NUMERIC, "a sum takes a number or an amount"),
    catalog_pb2.WINDOW_KIND_DISTINCT: ((*_PLAIN, _MONEY), "a set cannot be counted by its different values"),
    catalog_pb2.WINDOW_KIND_LAST: (_TYPES["event"], "a declared property is required"),
    catalog_pb2.WINDOW_KIND_OPEN: ((_TEXT, _CATEGORY), "what is open is told apart by a text or a category"),
}


def check_profiles(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note every fault of what a catalog says about profiles. The names of its lists are checked by the caller."""
    _namespaces(catalog, faults)
    check_attributes("profile_attributes", catalog.profile_attributes, catalog, faults)
    _event_types(catalog, faults)
    _sources(catalog, faults)
    _windows(catalog, faults)
    _recency_frequency_monetary(catalog, faults)
    if catalog.HasField("session_gap"):
        faults.span("session_gap", catalog.session_gap, MINUTE_US, SESSION_REACH_US)
    for i, segment in enumerate(catalog.segments):
        faults.check(bool(segment.expression), f"segments[{i}].expression", "an expression is required")
    if catalog.HasField("journey"):
        _journey(catalog, faults)
    _matching(catalog, faults)
    _one_name_space(catalog, faults)


def check_attributes(
    path: str, attributes: Sequence[catalog_pb2.Attribute], catalog: catalog_pb2.Catalog, faults: Faults
) -> None:
    """Note every fault of one list of attributes, except those of their names.

    Args:
        path: of the list; its first word says whose attributes they are: profile, event, context or action.
        attributes: the list.
        catalog: for the consent purposes it declares.
        faults: gets them.
    """
    owner = path.partition("_")[0]
    purposes = {purpose.name for purpose in catalog.consent_purposes}
    for i, attribute in enumerate(attributes):
        at = f"{path}[{i}]"
        _type(at, attribute, owner, faults)
        _bounds(at, attribute, faults)
        faults.check(len(attribute.unit.encode()) <= 32, f"{at}.unit", "at most 32 bytes")
        faults.check(not attribute.unit or attribute.type == _NUMBER, f"{at}.unit", "only a number has a unit")
        faults.count(f"{at}.purposes", len(attribute.purposes), 0, 64)
        faults.refer(f"{at}.purposes", attribute.purposes, purposes, "consent purpose")
        _profile_terms(at, attribute, owner, faults)


def _type(path: str, attribute: catalog_pb2.Attribute, owner: str, faults: Faults) -> None:
    kind = attribute.type
    if not kind or kind not in catalog_pb2.AttributeType.values():
        faults.add(f"{path}.type", "a type is required, such as ATTRIBUTE_TYPE_NUMBER")
    elif kind not in _TYPES[owner]:
        allowed = ", ".join(_type_name(each) for each in _TYPES[owner])
        of_whom = {"event": "an event", "context": "a request", "action": "an action"}[owner]
        faults.add(f"{path}.type", f"a fact of {of_whom} is no {_type_name(kind)}; one of {allowed} is expected")
    values = attribute.allowed_values
    if kind in (_CATEGORY, _SET):
        what, most = ("category", CATEGORY_VALUES_MAX) if kind == _CATEGORY else ("set", SET_VALUES_MAX)
        n_values_fits = 1 <= len(values) <= most
        faults.check(n_values_fits, f"{path}.allowed_values", f"a {what} has 1 to {most} values, got {len(values)}")
        faults.check(
            len(set(values)) == len(values), f"{path}.allowed_values", "the same value stands twice; state it once"
        )
        sizes_fit = all(1 <= len(value.encode()) <= 64 for value in values)
        faults.check(sizes_fit, f"{path}.allowed_values", "each value is 1 to 64 bytes")
    else:
        faults.check(not values, f"{path}.allowed_values", "only a category or a set has allowed values")
    if kind == _VECTOR:
        fits = 1 <= attribute.dimensions <= VECTOR_NUMBERS_MAX
        faults.check(fits, f"{path}.dimensions", f"a vector has 1 to {VECTOR_NUMBERS_MAX}, got {attribute.dimensions}")
    else:
        faults.check(not attribute.dimensions, f"{path}.dimensions", "only a vector has dimensions")


def _bounds(path: str, attribute: catalog_pb2.Attribute, faults: Faults) -> None:
    for field in ("minimum", "maximum", "center", "spread"):
        if attribute.HasField(field) and attribute.type not in _NUMERIC:
            faults.add(f"{path}.{field}", "only a number or an amount has it")
        elif attribute.HasField(field):
            faults.finite(f"{path}.{field}", getattr(attribute, field))
    _spread(path, attribute, faults)
    if attribute.HasField("minimum") and attribute.HasField("maximum"):
        faults.check(not attribute.minimum > attribute.maximum, f"{path}.minimum", "not above the maximum")


def _spread(path: str, message: catalog_pb2.Attribute | catalog_pb2.Window, faults: Faults) -> None:
    if message.HasField("spread"):
        faults.check(message.spread > 0.0, f"{path}.spread", f"above 0, got {message.spread}")


def _profile_terms(path: str, attribute: catalog_pb2.Attribute, owner: str, faults: Faults) -> None:
    """Check what only an attribute of a profile can have."""
    stated = {
        "time_to_live": attribute.HasField("time_to_live"),
        "survivorship": attribute.survivorship,
        "meaning": attribute.meaning,
    }
    if owner != "profile":
        for field in (field for field, is_stated in stated.items() if is_stated):
            faults.add(f"{path}.{field}", "only a profile attribute has it")
        return
    if attribute.HasField("time_to_live"):
        faults.span(f"{path}.time_to_live", attribute.time_to_live, MINUTE_US, _DECADE_US)
    faults.enum(f"{path}.survivorship", attribute.survivorship, catalog_pb2.Survivorship)
    types, fault = _SURVIVES.get(attribute.survivorship, (_TYPES["profile"], ""))
    faults.check(not fault or attribute.type in types, f"{path}.survivorship", fault)
    faults.enum(f"{path}.meaning", attribute.meaning, catalog_pb2.Meaning)
    faults.check(not attribute.meaning or attribute.type == _TEXT, f"{path}.meaning", "only a text has a meaning")


def _namespaces(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    for i, namespace in enumerate(catalog.identity_namespaces):
        path = f"identity_namespaces[{i}]"
        faults.enum(f"{path}.link_rule", namespace.link_rule, catalog_pb2.LinkRule)
        n_values, shared = namespace.values_per_profile_max, namespace.shared_max
        faults.check(n_values <= 64, f"{path}.values_per_profile_max", f"at most 64, got {n_values}")
        faults.check(shared == 0 or 2 <= shared <= 1_000, f"{path}.shared_max", f"2 to 1000, got {shared}")
        cleansed = (catalog_pb2.MEANING_UNSPECIFIED, catalog_pb2.MEANING_EMAIL, catalog_pb2.MEANING_PHONE)
        hint = "an identity is cleansed as MEANING_EMAIL, as MEANING_PHONE, or not at all"
        faults.check(namespace.meaning in cleansed, f"{path}.meaning", hint)
        if namespace.default_country_code and namespace.meaning != catalog_pb2.MEANING_PHONE:
            faults.add(f"{path}.default_country_code", "only a namespace with MEANING_PHONE has it")
        _country(f"{path}.default_country_code", namespace.default_country_code, faults)


def _country(path: str, code: str, faults: Faults) -> None:
    is_code = not code or _COUNTRY.match(code) is not None
    faults.check(is_code, path, f"an ISO 3166-1 alpha-2 code such as JP, got {code[:16]!r}")


def _event_types(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    channels = {channel.name for channel in catalog.channels}
    for i, event_type in enumerate(catalog.event_types):
        path = f"event_types[{i}]"
        faults.count(f"{path}.properties", len(event_type.properties), 0, 64)
        faults.names(f"{path}.properties", [attribute.name for attribute in event_type.properties])
        check_attributes(f"{path}.properties", event_type.properties, catalog, faults)
        if event_type.HasField("retention"):
            faults.span(f"{path}.retention", event_type.retention, HOUR_US, _DECADE_US)
        if event_type.channel:
            faults.refers(f"{path}.channel", event_type.channel, channels, "channel")


def _sources(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    lists = {
        "attributes": ({each.name for each in catalog.profile_attributes}, "profile attribute"),
        "event_types": ({each.name for each in catalog.event_types}, "event type"),
        "identity_namespaces": ({each.name for each in catalog.identity_namespaces}, "identity namespace"),
    }
    channels = {channel.name for channel in catalog.channels}
    for i, source in enumerate(catalog.sources):
        path = f"sources[{i}]"
        faults.check(len(source.owner.encode()) <= 128, f"{path}.owner", "at most 128 bytes")
        is_party = source.party in (catalog_pb2.PARTY_FIRST, catalog_pb2.PARTY_SECOND, catalog_pb2.PARTY_THIRD)
        faults.check(is_party, f"{path}.party", "a party is required, such as PARTY_FIRST")
        is_delivery = source.delivery in (catalog_pb2.DELIVERY_BATCH, catalog_pb2.DELIVERY_STREAM)
        faults.check(is_delivery, f"{path}.delivery", "a delivery is required: DELIVERY_BATCH or DELIVERY_STREAM")
        faults.check(source.trust <= 100, f"{path}.trust", f"0 to 100, got {source.trust}")
        for field, (known, what) in lists.items():
            faults.refer(f"{path}.{field}", getattr(source, field), known, what)
        _country(f"{path}.default_country_code", source.default_country_code, faults)
        if source.channel:
            faults.refers(f"{path}.channel", source.channel, channels, "channel")
        if source.HasField("silence_max"):
            faults.span(f"{path}.silence_max", source.silence_max, MINUTE_US, _DECADE_US)


def _windows(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    event_types = {event_type.name: event_type for event_type in catalog.event_types}
    for i, window in enumerate(catalog.windows):
        path = f"windows[{i}]"
        if not window.kind or window.kind not in catalog_pb2.WindowKind.values():
            faults.add(f"{path}.kind", "a kind is required, such as WINDOW_KIND_COUNT")
            continue
        if not faults.refers(f"{path}.event_type", window.event_type, event_types, "event type"):
            continue
        found = _property(path, window, event_types[window.event_type], faults)
        _closing(path, window, event_types, found, faults)
        _reach(path, window, event_types, faults)
        is_number = window.kind != catalog_pb2.WINDOW_KIND_LAST or found is None or found.type in _NUMERIC
        for field in ("center", "spread"):
            if window.HasField(field):
                faults.check(is_number, f"{path}.{field}", "only a window that is a number or an amount has it")
                faults.finite(f"{path}.{field}", getattr(window, field))
        _spread(path, window, faults)


def _property(
    path: str, window: catalog_pb2.Window, event_type: catalog_pb2.EventType, faults: Faults
) -> catalog_pb2.Attribute | None:
    """Check the property of a window, and return it where there is a good one."""
    if window.kind not in _READS:
        faults.check(not window.property, f"{path}.property", f"a {_kind_name(window)} reads no property")
        return None
    properties = {attribute.name: attribute for attribute in event_type.properties}
    if not faults.refers(f"{path}.property", window.property, properties, f"property of {event_type.name}"):
        return None
    found = properties[window.property]
    types, fault = _READS[window.kind]
    return found if faults.check(found.type in types, f"{path}.property", fault) else None


def _closing(
    path: str,
    window: catalog_pb2.Window,
    event_types: Mapping[str, catalog_pb2.EventType],
    found: catalog_pb2.Attribute | None,
    faults: Faults,
) -> None:
    path, closing = f"{path}.closing_event_type", window.closing_event_type
    if window.kind != catalog_pb2.WINDOW_KIND_OPEN:
        faults.check(not closing, path, "only a window of kind WINDOW_KIND_OPEN has it")
    elif closing == window.event_type:
        faults.add(path, "another event type than the one that opens is required")
    elif faults.refers(path, closing, event_types, "event type") and found is not None:
        kinds = {attribute.name: attribute.type for attribute in event_types[closing].properties}
        has_property = kinds.get(found.name) == found.type
        faults.check(has_property, path, f"{closing} needs a property {found.name!r} of type {_type_name(found.type)}")


def _reach(
    path: str, window: catalog_pb2.Window, event_types: Mapping[str, catalog_pb2.EventType], faults: Faults
) -> None:
    reach = window.WhichOneof("reach")
    if reach == "span":
        reach_us = duration_us(window.span)
        faults.span(f"{path}.span", window.span, MINUTE_US, WINDOW_SPAN_US_MAX)
    elif reach is None or not window.session:
        faults.add(path, "how far it reaches back is required: a span such as 86400s, or session: true")
        return
    else:
        reach_us = SESSION_REACH_US
    for name in (window.event_type, window.closing_event_type):
        if name in event_types:
            _kept(f"{path}.{reach}", reach_us, event_types[name], faults)


def _kept(path: str, reach_us: int, event_type: catalog_pb2.EventType, faults: Faults) -> None:
    kept_us = retention_us(event_type)
    faults.check(
        reach_us <= kept_us, path, f"{event_type.name} is kept for {in_words(kept_us)} only; lengthen its retention"
    )


def retention_us(event_type: catalog_pb2.EventType) -> int:
    """Return for how long events of a type are kept."""
    return _or(event_type.retention, RETENTION_DEFAULT_US, event_type.HasField("retention"))


def rfm_span_us(rfm: catalog_pb2.RecencyFrequencyMonetary) -> int:
    """Return how far recency, frequency and monetary value reach back."""
    return _or(rfm.span, WINDOW_SPAN_US_MAX, rfm.HasField("span"))


def _or(stated: Duration, default_us: int, is_stated: bool) -> int:
    return duration_us(stated) if is_stated else default_us


def _recency_frequency_monetary(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    event_types = {event_type.name: event_type for event_type in catalog.event_types}
    for i, rfm in enumerate(catalog.recency_frequency_monetary):
        path = f"recency_frequency_monetary[{i}]"
        longest = 64 - max(len(f"_{ending}") for ending in RFM_ENDINGS)
        faults.check(len(rfm.name) <= longest, f"{path}.name", f"at most {longest} bytes, for its windows' endings")
        if rfm.HasField("span"):
            faults.span(f"{path}.span", rfm.span, MINUTE_US, WINDOW_SPAN_US_MAX)
        if faults.refers(f"{path}.event_type", rfm.event_type, event_types, "event type"):
            event_type = event_types[rfm.event_type]
            window = catalog_pb2.Window(kind=catalog_pb2.WINDOW_KIND_SUM, property=rfm.property)
            _property(path, window, event_type, faults)
            _kept(f"{path}.span", rfm_span_us(rfm), event_type, faults)


def _journey(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    journey = catalog.journey
    stages = [stage.name for stage in journey.stages]
    faults.count("journey.stages", len(stages), 1, 32)
    faults.names("journey.stages", stages)
    faults.count("journey.transitions", len(journey.transitions), 0, 256)
    event_types = {event_type.name for event_type in catalog.event_types}
    outcome_types = {outcome_type.name for outcome_type in catalog.outcome_types}
    for i, transition in enumerate(journey.transitions):
        path = f"journey.transitions[{i}]"
        faults.refer(f"{path}.from_stages", transition.from_stages, stages, "stage")
        faults.refers(f"{path}.to_stage", transition.to_stage, stages, "stage")
        touchpoint = transition.WhichOneof("touchpoint")
        if touchpoint == "event_type":
            faults.refers(f"{path}.event_type", transition.event_type, event_types, "event type")
        elif touchpoint == "outcome_type":
            faults.refers(f"{path}.outcome_type", transition.outcome_type, outcome_types, "outcome type")
        else:
            faults.add(path, "what leads there is required: event_type or outcome_type")


def check_purposes(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Note every fault of the consent purposes and of what placements say they are for."""
    purposes = {purpose.name for purpose in catalog.consent_purposes}
    for i, purpose in enumerate(catalog.consent_purposes):
        if purpose.HasField("valid_for"):
            faults.span(f"consent_purposes[{i}].valid_for", purpose.valid_for, DAY_US, VALID_FOR_US_MAX)
        faults.check(
            not (purpose.consent_exempt and purpose.HasField("valid_for")),
            f"consent_purposes[{i}].valid_for",
            "nothing expires where no consent is asked for",
        )
    for i, placement in enumerate(catalog.placements):
        path = f"placements[{i}].purpose"
        if placement.purpose or purposes:
            faults.refers(path, placement.purpose, purposes, "consent purpose")


def _matching(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    matching = catalog.matching
    attributes = {attribute.name: attribute for attribute in catalog.profile_attributes}
    faults.count("matching.fields", len(matching.fields), 0, 64)
    for i, field in enumerate(matching.fields):
        path = f"matching.fields[{i}]"
        if faults.refers(f"{path}.attribute", field.attribute, attributes, "profile attribute"):
            has_meaning = bool(attributes[field.attribute].meaning)
            faults.check(has_meaning, f"{path}.attribute", "an attribute with a meaning is required")
        faults.count(f"{path}.weights", len(field.weights), 2, MATCH_LEVELS_MAX)
        for j, weight in enumerate(field.weights):
            faults.finite(f"{path}.weights[{j}]", weight)
    names = [field.attribute for field in matching.fields]
    faults.check(len(set(names)) == len(names), "matching.fields", "the same attribute stands twice; name it once")
    link, review = weights_min(matching)
    if faults.finite("matching.link_weight_min", link) and faults.finite("matching.review_weight_min", review):
        faults.check(
            review <= link, "matching.review_weight_min", f"not above link_weight_min ({link:g}), got {review:g}"
        )


def weights_min(matching: catalog_pb2.Matching) -> tuple[float, float]:
    """Return the weights from which on records are linked, and from which on they are put up for review."""
    link = matching.link_weight_min if matching.HasField("link_weight_min") else LINK_WEIGHT_DEFAULT
    review = matching.review_weight_min if matching.HasField("review_weight_min") else REVIEW_WEIGHT_DEFAULT
    return link, review


def _one_name_space(catalog: catalog_pb2.Catalog, faults: Faults) -> None:
    """Check that what rules call profile.<name> is one thing. Names that stand twice in one list are found before."""
    places = [(attribute.name, "profile_attributes", i) for i, attribute in enumerate(catalog.profile_attributes)]
    places += [(window.name, "windows", i) for i, window in enumerate(catalog.windows)]
    for i, rfm in enumerate(catalog.recency_frequency_monetary):
        places += [(f"{rfm.name}_{ending}", "recency_frequency_monetary", i) for ending in RFM_ENDINGS]
    places += [(segment.name, "segments", i) for i, segment in enumerate(catalog.segments)]
    seen: dict[str, tuple[str, int]] = {}
    for name, field, i in places:
        path = f"{field}[{i}].name"
        if name == JOURNEY_STAGE and catalog.HasField("journey"):
            faults.add(path, f"profile.{JOURNEY_STAGE} is the stage of the journey; choose another name")
        other, row = seen.setdefault(name, (field, i))
        if other != field:
            faults.add(path, f"profile.{name} is declared at {other}[{row}] already")


def _type_name(kind: catalog_pb2.AttributeType) -> str:
    return catalog_pb2.AttributeType.Name(kind).removeprefix("ATTRIBUTE_TYPE_")


def _kind_name(window: catalog_pb2.Window) -> str:
    return catalog_pb2.WindowKind.Name(window.kind).removeprefix("WINDOW_KIND_").lower()
