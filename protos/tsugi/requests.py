"""Build the requests of tsugi.v1 from plain Python values, exactly and without asking anybody.

Handed text, numbers, booleans, instants, mappings and pairs, it returns generated messages. It checks only what has no
form in a message, such as an instant without a time zone; everything else is the server's to judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TypedDict, TypeVar, Unpack

from google.protobuf.timestamp_pb2 import Timestamp

from tsugi.v1 import (
    catalog_pb2,
    catalog_service_pb2,
    decision_service_pb2,
    identity_pb2,
    model_service_pb2,
    outcome_service_pb2,
    profile_pb2,
    profile_service_pb2,
    value_pb2,
)

CHUNK_BYTES_MAX = 64 * 1024

PyValue = str | float | int | bool | datetime | frozenset[str] | set[str] | list[float] | value_pb2.Value
Placements = Mapping[str, int] | Iterable[tuple[str, int]]
Identities = Mapping[str, str] | Iterable[tuple[str, str]]

_Item = TypeVar("_Item")


def to_value(value: PyValue) -> value_pb2.Value:
    """Build the typed value of a Python value; an instant must state its time zone.

    A set of texts is a set, a list of numbers a vector; what has no form in Python, such as money, is handed over as a
    Value (see money).

    Raises:
        TypeError: the value has no typed form.
        ValueError: a datetime without a time zone.
    """
    match value:
        case value_pb2.Value():
            typed = value
        case bool():  # before int: True is an int to Python
            typed = value_pb2.Value(bool_value=value)
        case int() | float():
            typed = value_pb2.Value(number_value=value)
        case str():
            typed = value_pb2.Value(text_value=value)
        case datetime():
            typed = value_pb2.Value(time_value=_timestamp(value))
        case set() | frozenset():
            typed = value_pb2.Value(set_value=value_pb2.TextSet(values=sorted(value)))
        case list():
            typed = value_pb2.Value(vector_value=value_pb2.Vector(numbers=value))
        case _:
            raise TypeError(
                f"a value is text, a number, a boolean, an instant, a set or a list, got {type(value).__name__}"
            )
    return typed


def money(amount: Decimal | int, currency_code: str) -> value_pb2.Value:
    """Build an amount of money.

    Raises:
        ValueError: it is finer than a millionth of the currency unit.
    """
    micros = Decimal(amount) * 1_000_000
    if micros != int(micros):
        raise ValueError(f"an amount has at most six decimal places, got {amount}")
    return value_pb2.Value(money_value=value_pb2.Money(currency_code=currency_code, amount_micros=int(micros)))


class DecideOptions(TypedDict, total=False):
    """What a Decide may carry besides its placements; the fields of tsugi.v1.DecideRequest in Python values."""

    profile_id: str
    identities: Identities
    context: Mapping[str, PyValue]
    candidate_actions: Iterable[str]
    excluded_actions: Iterable[str]
    at_least_lsn: int
    wait_for_learning: bool  # the learners have learned from at_least_lsn, too
    request_id: str
    preview: bool
    durable: bool  # the reply waits until the record is on disk
    outcomes: Iterable[outcome_service_pb2.ReportOutcomeRequest]  # reported before it is decided, see outcome


def decide_request(placements: Placements, **options: Unpack[DecideOptions]) -> decision_service_pb2.DecideRequest:
    """Build a Decide request; placements are {"home_banner": 3} or pairs, in the order to be filled."""
    return decision_service_pb2.DecideRequest(
        profile_id=options.get("profile_id", ""),
        identities=_identities(options.get("identities", ())),
        placements=_placements(placements),
        context=_values(options.get("context", {})),
        candidate_actions=options.get("candidate_actions", ()),
        excluded_actions=options.get("excluded_actions", ()),
        at_least_lsn=options.get("at_least_lsn", 0),
        wait_for_learning=options.get("wait_for_learning", False),
        request_id=options.get("request_id", ""),
        preview=options.get("preview", False),
        decision_ack=decision_service_pb2.DECISION_ACK_DURABLE
        if options.get("durable", False)
        else decision_service_pb2.DECISION_ACK_UNSPECIFIED,
        outcomes=options.get("outcomes", ()),
    )


class TriggerOptions(TypedDict, total=False):
    """What a subscription may carry besides name, event type and placements."""

    filter: str
    delay: timedelta
    context: Mapping[str, PyValue]
    after_lsn: int


def subscribe_triggers_request(
    name: str, event_type: str, placements: Placements, **options: Unpack[TriggerOptions]
) -> decision_service_pb2.SubscribeTriggersRequest:
    """Build the request for the decisions that events of one type cause."""
    return decision_service_pb2.SubscribeTriggersRequest(
        name=name,
        event_type=event_type,
        filter=options.get("filter", ""),
        delay=options.get("delay"),
        placements=_placements(placements),
        context=_values(options.get("context", {})),
        after_lsn=options.get("after_lsn", 0),
    )


def outcome(
    decision_id: str,
    action: str,
    outcome_id: str,
    type: str = "",  # noqa: A002  # the field's name in the API
    *,
    value: float = 0.0,
    occurrence_time: datetime | None = None,
    revokes: str = "",
    reporter: str = "",
) -> outcome_service_pb2.ReportOutcomeRequest:
    """Build the report of one outcome; with revokes, of one that takes back the outcome of that outcome_id."""
    return outcome_service_pb2.ReportOutcomeRequest(
        decision_id=decision_id,
        action=action,
        outcome_id=outcome_id,
        type=type,
        value=value,
        occurrence_time=None if occurrence_time is None else _timestamp(occurrence_time),
        revokes=revokes,
        reporter=reporter,
    )


def event(
    type: str,  # noqa: A002  # the field's name in the API
    properties: Mapping[str, PyValue] | None = None,
    *,
    occurrence_time: datetime | None = None,
) -> profile_pb2.Event:
    """Build an event for a source record."""
    return profile_pb2.Event(
        type=type,
        occurrence_time=None if occurrence_time is None else _timestamp(occurrence_time),
        properties=_values(properties or {}),
    )


def consent(
    purpose: str, *, granted: bool, channel: str = "", effective_time: datetime | None = None
) -> profile_pb2.Consent:
    """Build what a person allows or forbids; without a channel, on all of them."""
    return profile_pb2.Consent(
        purpose=purpose,
        channel=channel,
        state=profile_pb2.CONSENT_DECISION_GRANTED if granted else profile_pb2.CONSENT_DECISION_WITHDRAWN,
        effective_time=None if effective_time is None else _timestamp(effective_time),
    )


def source_record(
    record_id: str,
    source: str,
    identities: Identities,
    *,
    attributes: Mapping[str, PyValue] | None = None,
    event: profile_pb2.Event | None = None,
    consents: Iterable[profile_pb2.Consent] = (),
    observation_time: datetime | None = None,
) -> profile_service_pb2.SourceRecord:
    """Build what one source says about one person."""
    return profile_service_pb2.SourceRecord(
        record_id=record_id,
        source=source,
        identities=_identities(identities),
        attributes=_values(attributes or {}),
        event=event,
        consents=consents,
        observation_time=None if observation_time is None else _timestamp(observation_time),
    )


def catalog_upload(
    catalog: catalog_pb2.Catalog, *, etag: str = "", request_id: str = "", validate_only: bool = False
) -> list[catalog_service_pb2.PushCatalogRequest]:
    """Build the messages of a catalog push: the header, then the chunks."""
    data = catalog.SerializeToString(deterministic=True)
    header = catalog_service_pb2.CatalogUploadHeader(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        etag=etag,
        request_id=request_id,
        validate_only=validate_only,
    )
    chunks = (catalog_service_pb2.PushCatalogRequest(chunk=chunk) for chunk in _chunks(data))
    return [catalog_service_pb2.PushCatalogRequest(header=header), *chunks]


def model_upload(bundle: bytes, label: str, *, validate_only: bool = False) -> list[model_service_pb2.PushModelRequest]:
    """Build the messages of a model push: the header, then the chunks."""
    header = model_service_pb2.ModelUploadHeader(
        label=label,
        sha256=hashlib.sha256(bundle).hexdigest(),
        size_bytes=len(bundle),
        validate_only=validate_only,
    )
    chunks = (model_service_pb2.PushModelRequest(chunk=chunk) for chunk in _chunks(bundle))
    return [model_service_pb2.PushModelRequest(header=header), *chunks]


def _pairs(pairs: Mapping[str, _Item] | Iterable[tuple[str, _Item]]) -> Iterable[tuple[str, _Item]]:
    return pairs.items() if isinstance(pairs, Mapping) else pairs


def _placements(placements: Placements) -> list[decision_service_pb2.PlacementRequest]:
    return [
        decision_service_pb2.PlacementRequest(placement=placement, count=count)
        for placement, count in _pairs(placements)
    ]


def _identities(identities: Identities) -> list[identity_pb2.Identity]:
    return [identity_pb2.Identity(namespace=namespace, value=value) for namespace, value in _pairs(identities)]


def _values(facts: Mapping[str, PyValue]) -> dict[str, value_pb2.Value]:
    return {name: to_value(fact) for name, fact in facts.items()}


def _timestamp(instant: datetime) -> Timestamp:
    if instant.tzinfo is None:
        raise ValueError("an instant needs a time zone; use datetime.now(UTC), for example")
    timestamp = Timestamp()
    timestamp.FromDatetime(instant)
    return timestamp


def _chunks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + CHUNK_BYTES_MAX] for start in range(0, len(data), CHUNK_BYTES_MAX))
