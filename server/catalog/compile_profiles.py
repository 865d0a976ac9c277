"""From what a catalog says about profiles to the terms that ingestion, the projector and decisions go by.

Rules stand between two steps: ``declared.py`` gives the profile's part of the fact space, which eligibility rules
read; here segments and filters are lowered, and series, windows and journey laid out. What the layouts are stamps of
is complete only when the last rule was added, because rules number the texts that facts are encoded by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from server.catalog import compile_series
from server.catalog.catalog import NOW_FACT, Fact, Rules
from server.catalog.compile_series import SeriesLayout, encoding_of, stamp, steps_of
from server.catalog.contact_terms import ContactTerms
from server.catalog.declared import Declared, frozen
from server.catalog.expressions import NO_RULES, RuleCompiler
from server.catalog.faults import duration_us
from server.catalog.profile_terms import SHARED_DEFAULT, MatchTerms, Namespace, ProfileTerms, SegmentColumns, Source
from server.catalog.scopes import segment_scope
from server.catalog.validation_profiles import weights_min
from server.errors import Violation
from tsugi.v1 import catalog_pb2

TRUST_DEFAULT: Final = 50


def compile_profiles(
    message: catalog_pb2.Catalog,
    declared: Declared,
    facts: Sequence[Fact],
    read: Collection[int],
    contacts: ContactTerms,
    violations: list[Violation],
) -> ProfileTerms:
    """Compile all that a catalog says about profiles.

    Args:
        message: a catalog without faults but those of its rules.
        declared: what declare made of it.
        facts: the whole fact vector. Every rule over it but the segments has been added by now.
        read: positions of the facts that eligibility rules and learners read.
        contacts: the compiled contact policies.
        violations: gets every fault of a filter or segment; with one, what is returned is of no use.

    Cost: some 1 ms, and 1 ms for every event type with a filter.
    """
    segments = _segments(message, facts, violations)
    filters, filter_rows = compile_series.compile_filters(declared, violations)
    layout = SeriesLayout()
    windows = compile_series.compile_windows(message, declared, filter_rows, layout)
    journey = compile_series.compile_journey(message.journey, layout) if message.HasField("journey") else None
    series = layout.freeze()
    events = {
        event_type.name: compile_series.compile_event(
            event_type, declared.properties[event_type.name], filters, series, journey
        )
        for event_type in message.event_types
    }
    stamps = compile_series.series_stamps(series, events, journey)
    used = {*read, *positions_read(segments.rules)}
    matching = _matching(message)
    unread = (
        each.name
        for position, each in enumerate(declared.attributes, start=1)
        if position not in used and not (matching.is_on and each.meaning)
    )
    return ProfileTerms(
        namespaces={namespace.name: _namespace(namespace) for namespace in message.identity_namespaces},
        sources={source.name: _source(row, source, message) for row, source in enumerate(message.sources)},
        attributes=declared.attributes,
        attribute_rows={attribute.name: row for row, attribute in enumerate(declared.attributes)},
        events=events,
        consent_purposes=frozenset(purpose.name for purpose in message.consent_purposes),
        consents=declared.consents,
        series=series,
        series_stamps=stamps,
        series_layout=stamp(stamps),
        windows=windows,
        journey=journey,
        segments=segments,
        slopes=compile_series.slopes_of(facts, declared),
        contacts=contacts,
        matching=matching,
        unread_attributes=frozenset(unread),
    )


def profile_layout(declared: Declared, terms: ProfileTerms) -> bytes:
    """Return 8 bytes that change whenever the profile's part would be encoded or evaluated differently.

    Whose value stands, and for how long, is a part of that; who the person is, is not.
    """
    windows, journey, segments = terms.windows, terms.journey, terms.segments
    said: list[object] = [encoding_of(fact) for fact in declared.facts]
    said += [(each.survivorship, each.meaning, each.time_to_live_us) for each in terms.attributes]
    said += [(each.purpose, each.channel, each.valid_for_us) for each in terms.consents]
    said += sorted((source.name, source.trust) for source in terms.sources.values())
    said += [terms.series_layout, windows.names, windows.kinds.tolist(), windows.series.tolist()]
    said += [windows.spans_us.tolist(), windows.session_series, windows.session_gap_us]
    said += [steps_of(segments.rules, row) for row in segments.rows.tolist()]
    said += terms.contacts.layout()
    if journey is not None:
        said += [journey.stages, sorted(journey.symbols.items()), journey.steps.tolist(), journey.series]
    return stamp(said)


def positions_read(rules: Rules) -> set[int]:
    """Return the positions in the fact vector that any of the rules reads."""
    return {int(position) for position in (*rules.left, *rules.right) if position > NOW_FACT}


def _namespace(namespace: catalog_pb2.IdentityNamespace) -> Namespace:
    return Namespace(
        name=namespace.name,
        link_rule=namespace.link_rule or catalog_pb2.LINK_RULE_UNIQUE,
        values_per_profile_max=namespace.values_per_profile_max,
        shared_max=namespace.shared_max or SHARED_DEFAULT,
        meaning=namespace.meaning,
        default_country_code=namespace.default_country_code,
    )


def _source(row: int, source: catalog_pb2.Source, message: catalog_pb2.Catalog) -> Source:
    return Source(
        name=source.name,
        row=row,
        trust=source.trust if source.HasField("trust") else TRUST_DEFAULT,
        attributes=frozenset(source.attributes or (each.name for each in message.profile_attributes)),
        event_types=frozenset(source.event_types or (each.name for each in message.event_types)),
        namespaces=frozenset(source.identity_namespaces or (each.name for each in message.identity_namespaces)),
        default_country_code=source.default_country_code,
        channel=source.channel,
        silence_us_max=duration_us(source.silence_max),
    )


def _segments(message: catalog_pb2.Catalog, facts: Sequence[Fact], violations: list[Violation]) -> SegmentColumns:
    names = tuple(segment.name for segment in message.segments)
    if not names:
        return SegmentColumns((), NO_RULES, frozen(np.zeros(0, np.int32)))
    compiler = RuleCompiler(facts, scope=segment_scope(names))
    rows = [
        compiler.add(segment.expression, {}, f"segments[{i}].expression", violations)
        for i, segment in enumerate(message.segments)
    ]
    return SegmentColumns(names, compiler.freeze(), frozen(np.array(rows, np.int32)))


def _matching(message: catalog_pb2.Catalog) -> MatchTerms:
    link, review = weights_min(message.matching)
    return MatchTerms(
        is_on=not message.matching.off and any(attribute.meaning for attribute in message.profile_attributes),
        weights={each.attribute: tuple(each.weights) for each in message.matching.fields},
        link_weight_min=link,
        review_weight_min=review,
    )
