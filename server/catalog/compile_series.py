"""How a catalog's windows and journey are kept: the series they read, who writes to which, and how it is stamped.

Handed declared windows and the filters' texts, it gives columns. Windows that need the same series share one, which is
as long as the longest of them; a window over the present visit needs that of all events beside its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import NOW_FACT, Fact, Rules
from server.catalog.declared import NOW, Declared, frozen
from server.catalog.expressions import NO_RULES, RuleCompiler
from server.catalog.faults import MINUTE_US, YEAR_US, duration_us
from server.catalog.profile_terms import (
    ANY_EVENT,
    KEYS,
    MARKS,
    NO_ROW,
    OPENINGS,
    STAGES,
    STAMP_BYTES,
    VALUES,
    EventTerms,
    JourneyColumns,
    Series,
    WindowColumns,
)
from server.catalog.scopes import FILTER
from server.catalog.validation_profiles import SESSION_REACH_US, retention_us
from server.errors import Violation
from tsugi.v1 import catalog_pb2

SESSION_GAP_DEFAULT_US: Final = 30 * MINUTE_US
JOURNEY_SPAN_US: Final = 10 * YEAR_US

_SERIES_KINDS: Final[dict[int, int]] = {
    catalog_pb2.WINDOW_KIND_COUNT: MARKS,
    catalog_pb2.WINDOW_KIND_SUM: VALUES,
    catalog_pb2.WINDOW_KIND_DISTINCT: KEYS,
    catalog_pb2.WINDOW_KIND_RECENCY: MARKS,
    catalog_pb2.WINDOW_KIND_LAST: VALUES,
    catalog_pb2.WINDOW_KIND_OPEN: OPENINGS,
}
_SECONDS_A_MICROSECOND: Final = 1e-6
_SeriesKey = tuple[int, str, str, str, int]  # all of a series but its span


def compile_filters(declared: Declared, violations: list[Violation]) -> tuple[dict[str, Rules], list[int]]:
    """Lower the filters: the rules of every event type that has some, and the row of each window's."""
    compilers: dict[str, RuleCompiler] = {}
    rows = []
    for window, path in zip(declared.windows, declared.paths, strict=True):
        if not window.filter:
            rows.append(NO_ROW)
            continue
        properties = declared.properties[window.event_type]
        if window.event_type not in compilers:
            compilers[window.event_type] = RuleCompiler((NOW, *properties.values()), scope=FILTER)
        rows.append(compilers[window.event_type].add(window.filter, {}, path, violations))
    return {event_type: compiler.freeze() for event_type, compiler in compilers.items()}, rows


class SeriesLayout:
    """Gives series their rows; windows that need the same share one, as long as the longest of them."""

    def __init__(self) -> None:
        self._rows: dict[_SeriesKey, int] = {}
        self._spans_us: list[int] = []

    def row(
        self,
        kind: int,
        event_type: str,
        span_us: int,
        *,
        closing_event_type: str = "",
        property_name: str = "",
        filter_row: int = NO_ROW,
    ) -> int:
        """Return the row of a series, which now reaches back at least this span."""
        key = (kind, event_type, closing_event_type, property_name, filter_row)
        row = self._rows.setdefault(key, len(self._rows))
        if row == len(self._spans_us):
            self._spans_us.append(0)
        self._spans_us[row] = max(self._spans_us[row], span_us)
        return row

    def freeze(self) -> tuple[Series, ...]:
        """Return the series in the order of their rows."""
        return tuple(Series(*key, span_us) for key, span_us in zip(self._rows, self._spans_us, strict=True))


def compile_windows(
    message: catalog_pb2.Catalog, declared: Declared, filter_rows: Sequence[int], layout: SeriesLayout
) -> WindowColumns:
    """Lay out the windows, each with the row of its filter."""
    rows = [
        layout.row(
            _SERIES_KINDS[window.kind],
            window.event_type,
            SESSION_REACH_US if window.session else duration_us(window.span),
            closing_event_type=window.closing_event_type,
            property_name=window.property,
            filter_row=filter_row,
        )
        for window, filter_row in zip(declared.windows, filter_rows, strict=True)
    ]
    has_session = any(window.session for window in declared.windows)
    gap_us = duration_us(message.session_gap) if message.HasField("session_gap") else SESSION_GAP_DEFAULT_US
    return WindowColumns(
        names=tuple(window.name for window in declared.windows),
        series=frozen(np.array(rows, np.int32)),
        kinds=frozen(np.array([window.kind for window in declared.windows], np.uint8)),
        spans_us=frozen(
            np.array([0 if window.session else duration_us(window.span) for window in declared.windows], np.int64)
        ),
        session_series=layout.row(MARKS, ANY_EVENT, SESSION_REACH_US) if has_session else NO_ROW,
        session_gap_us=gap_us,
    )


def compile_journey(journey: catalog_pb2.Journey, layout: SeriesLayout) -> JourneyColumns:
    """Make the journey a table; of transitions that fit the first listed is taken."""
    stages = {stage.name: row for row, stage in enumerate(journey.stages)}
    symbols: dict[tuple[str, str], int] = {}
    for transition in journey.transitions:
        symbols.setdefault(_touchpoint(transition), len(symbols))
    steps = np.repeat(np.arange(len(stages), dtype=np.int32)[:, None], len(symbols), axis=1)
    settled = np.zeros(steps.shape, np.bool_)
    for transition in journey.transitions:
        symbol = symbols[_touchpoint(transition)]
        for stage in transition.from_stages or stages:
            if not settled[stages[stage], symbol]:
                steps[stages[stage], symbol] = stages[transition.to_stage]
                settled[stages[stage], symbol] = True
    series = layout.row(STAGES, ANY_EVENT, JOURNEY_SPAN_US)
    return JourneyColumns(tuple(stages), symbols, frozen(steps), series)


def _touchpoint(transition: catalog_pb2.JourneyTransition) -> tuple[str, str]:
    if transition.WhichOneof("touchpoint") == "event_type":
        return "event", transition.event_type
    return "outcome", transition.outcome_type


def compile_event(
    event_type: catalog_pb2.EventType,
    properties: dict[str, Fact],
    filters: Mapping[str, Rules],
    series: Sequence[Series],
    journey: JourneyColumns | None,
) -> EventTerms:
    """Return the terms of one event type, once all series have their rows."""
    name = event_type.name
    moves = journey is not None and ("event", name) in journey.symbols
    return EventTerms(
        properties=properties,
        property_facts=tuple(properties.values()),
        filters=filters.get(name, NO_RULES),
        retention_us=retention_us(event_type),
        channel=event_type.channel,
        series=tuple(
            row
            for row, each in enumerate(series)
            if (moves if each.kind == STAGES else each.event_type in (name, ANY_EVENT))
            or each.closing_event_type == name
        ),
    )


def slopes_of(facts: Sequence[Fact], declared: Declared) -> NDArray[np.float64]:
    """Return by how much each fact grows in a microsecond: now by 1, a recency by that in seconds, others not."""
    slopes = np.zeros(len(facts))
    slopes[NOW_FACT] = 1.0
    for position, window in enumerate(declared.windows, start=1 + len(declared.attributes) + len(declared.consents)):
        if window.kind == catalog_pb2.WINDOW_KIND_RECENCY:
            slopes[position] = _SECONDS_A_MICROSECOND
    return frozen(slopes)


def series_stamps(
    series: Sequence[Series], events: Mapping[str, EventTerms], journey: JourneyColumns | None
) -> tuple[bytes, ...]:
    """Return for each series 8 bytes that change whenever an entry of it would be made differently."""
    stamps = []
    for each in series:
        said: list[object] = [each.kind, each.event_type, each.closing_event_type, each.property, each.span_us]
        if each.kind == STAGES and journey is not None:
            said.append(sorted(journey.symbols.items()))
        if each.kind == VALUES:
            said.append(encoding_of(events[each.event_type].properties[each.property]))
        if each.filter_row != NO_ROW:
            terms = events[each.event_type]
            facts = (NOW, *terms.property_facts)
            steps = steps_of(terms.filters, each.filter_row)
            read = {step[column] for step in steps if isinstance(step, tuple) for column in (0, 1)}
            said += [steps, [encoding_of(facts[int(position)]) for position in sorted(read) if position > NOW_FACT]]
        stamps.append(stamp(said))
    return tuple(stamps)


def encoding_of(fact: Fact) -> tuple[object, ...]:
    """Return all that decides what number stands for a value."""
    codes = sorted(fact.codes.items())
    return fact.name, fact.type, codes, fact.minimum, fact.maximum, fact.currency_code, fact.dimensions


def steps_of(rules: Rules, row: int) -> list[tuple[float, ...] | int]:
    """Spell one rule out, whatever other rules stand beside it."""
    atoms = np.stack([column.astype(np.float64) for column in rules.columns()[:4]], axis=1)
    steps = rules.steps[rules.starts[row] : rules.starts[row + 1]].tolist()
    # NaN is written as text by stamp, so that it equals itself there.
    return [tuple(atoms[step].tolist()) if step >= 0 else step for step in steps]


def stamp(said: Sequence[object]) -> bytes:
    """Return 8 bytes that stand for what is said, in its order."""
    return hashlib.blake2b(repr(said).encode(), digest_size=STAMP_BYTES).digest()
