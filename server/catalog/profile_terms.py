"""What a compiled catalog says about profiles: who may tell what, what it means, and what follows from it.

Everything here is immutable and belongs to one catalog revision. ``compile_profiles.py`` makes it; ingestion checks
records against it, the projector keeps state by it, and decisions evaluate what depends on the instant with it.

The profile's part of the fact space is laid out as: attributes, windows, the journey stage where there is one,
segments; each group in declared order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import Bytes, Doubles, Fact, Rows, Rules
from server.catalog.contact_terms import ContactTerms
from tsugi.v1 import catalog_pb2

Instants = NDArray[np.int64]  # microseconds since the epoch

NO_ROW: Final = -1
ANY_EVENT: Final = ""
SHARED_DEFAULT: Final = 16
STAMP_BYTES: Final = 8

# What an entry of a series holds beside its instant.
MARKS, VALUES, KEYS, OPENINGS, STAGES = range(5)


@dataclass(frozen=True, slots=True)
class Namespace:
    """One identity namespace, ready to use."""

    name: str
    link_rule: catalog_pb2.LinkRule  # never unspecified
    values_per_profile_max: int  # 0: no rule
    shared_max: int
    meaning: catalog_pb2.Meaning
    default_country_code: str


@dataclass(frozen=True, slots=True)
class Source:
    """One source, ready to use: empty lists are spelt out."""

    name: str
    row: int
    trust: int
    attributes: frozenset[str]
    event_types: frozenset[str]
    namespaces: frozenset[str]
    default_country_code: str
    channel: str
    silence_us_max: int  # 0: never stale


@dataclass(frozen=True, slots=True)
class AttributeTerms:
    """One profile attribute beyond its fact."""

    name: str
    fact: Fact
    survivorship: catalog_pb2.Survivorship  # never unspecified
    meaning: catalog_pb2.Meaning
    time_to_live_us: int  # 0: for ever


@dataclass(frozen=True, slots=True)
class ConsentTerms:
    """What a person has to allow before some placement is filled."""

    purpose: str
    channel: str
    fact: Fact  # true: allowed; false: withdrawn; unknown: never asked, or expired
    valid_for_us: int  # 0: until withdrawn


@dataclass(frozen=True, slots=True)
class EventTerms:
    """One event type, ready to use."""

    properties: dict[str, Fact]
    property_facts: tuple[Fact, ...]  # what filters read, in declared order, after now at position 0
    filters: Rules  # every distinct filter over them
    retention_us: int
    channel: str  # empty: that of the source
    series: tuple[int, ...]  # rows of the series that take entries of this type, ascending


@dataclass(frozen=True, slots=True)
class Series:
    """A sequence of (instant, number) that is kept a person: what windows and the journey read.

    The number is 1 for MARKS; the property's encoded fact for VALUES; for KEYS and OPENINGS a 48-bit hash of the
    property's value, 1 or more, for OPENINGS negative where the event closes; the journey's symbol for STAGES.
    """

    kind: int  # MARKS, VALUES, KEYS, OPENINGS or STAGES
    event_type: str  # ANY_EVENT: all; of STAGES too
    closing_event_type: str  # of OPENINGS
    property: str  # of VALUES, KEYS and OPENINGS
    filter_row: int  # of EventTerms.filters; NO_ROW: all events
    span_us: int  # older entries are of no use


@dataclass(frozen=True, slots=True)
class WindowColumns:
    """What evaluating windows reads, one row a window. All read-only."""

    names: tuple[str, ...]
    series: Rows  # int32[w]: row of its series
    kinds: Bytes  # uint8[w]: tsugi.v1.WindowKind
    spans_us: Instants  # int64[w]; 0: the present visit
    session_series: int  # row of the series of all events; NO_ROW when no window asks for the visit
    session_gap_us: int


@dataclass(frozen=True, slots=True)
class JourneyColumns:
    """The journey as a table: stage after symbol = steps[stage, symbol]."""

    stages: tuple[str, ...]
    symbols: dict[tuple[str, str], int]  # ("event" or "outcome", type) → symbol
    steps: Rows  # int32[stages, symbols], read-only; the same stage where no transition fits
    series: int  # row of its series


@dataclass(frozen=True, slots=True)
class SegmentColumns:
    """Segments as rules over the whole fact vector; of context they read nothing."""

    names: tuple[str, ...]
    rules: Rules
    rows: Rows  # int32[segments]: the rule of each


@dataclass(frozen=True, slots=True)
class MatchTerms:
    """How records without a shared identity are matched."""

    is_on: bool  # some attributes have a meaning, and it is not switched off
    weights: dict[str, tuple[float, ...]]  # by attribute, in place of the built-in ones
    link_weight_min: float
    review_weight_min: float


@dataclass(frozen=True, slots=True)
class ProfileTerms:
    """All that one catalog says about profiles."""

    namespaces: dict[str, Namespace]
    sources: dict[str, Source]
    attributes: tuple[AttributeTerms, ...]  # in the order of the fact space
    attribute_rows: dict[str, int]
    events: dict[str, EventTerms]
    consent_purposes: frozenset[str]
    consents: tuple[ConsentTerms, ...]  # their facts follow those of the attributes
    series: tuple[Series, ...]
    series_stamps: tuple[bytes, ...]  # of each series 8 bytes that change whenever an entry would be made differently
    series_layout: bytes  # 8 bytes that stand for all of these
    windows: WindowColumns
    journey: JourneyColumns | None
    segments: SegmentColumns
    slopes: Doubles  # float64[facts]: by how much a fact grows in a microsecond, 0 for all but now and recency
    contacts: ContactTerms
    matching: MatchTerms
    unread_attributes: frozenset[str]  # that no rule, segment, learner or matching reads

    @property
    def first_window(self) -> int:
        """Where the facts of windows begin: after those of attributes and consents."""
        return 1 + len(self.attributes) + len(self.consents)
