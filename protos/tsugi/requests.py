"""Build the requests of tsugi.v1 from plain Python values, exactly and without asking anybody.

Handed text, numbers, booleans, instants, mappings and pairs, it returns generated messages. It checks only what has no
form in a message, such as an instant without a time zone; everything else is the server's to judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
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

PyValue = str | float | int | bool | datetime
Placements = Mapping[str, int] | Iterable[tuple[str, int]]
Identities = Mapping[str, str] | Iterable[tuple[str, str]]

_Item = TypeVar("_Item")


def to_value(value: PyValue) -> value_pb2.Value:
    """Build the typed value of a Python value; an instant must state its time zone.

    Raises:
        TypeError: the value has no typed form.
        ValueError: a datetime without a time zone.
    """
    if isinstance(value, bool):  # before int: True is an int to Python
        return value_pb2.Value(bool_value=value)
    if isinstance(value, int | float):
        return value_pb2.Value(number_value=value)
    if isinstance(value, str):
        return value_pb2.Value(text_value=value)
    if isinstance(value, datetime):
        return value_pb2.Value(time_value=_timestamp(value))
    raise TypeError(f"a value is text, a number, a boolean or a datetime, got {type(value).__name__}")


class DecideOptions(TypedDict, total=False):
    """What a Decide may carry besides its placements; the fields of tsugi.v1.DecideRequest in Python values."""

    profile_id: str
    identities: Identities
    context: Mapping[str, PyValue]
    candidate_actions: Iterable[str]
    excluded_actions: Iterable[str]
    at_least_lsn: int
    request_id: str
    preview: bool
    durable: bool  # the reply waits until the record is on disk


def decide_request(placements: Placements, **options: Unpack[DecideOptions]) -> decision_service_pb2.DecideRequest:
    """Build a Decide request; placements are {"home_banner": 3} or pairs, in the order to be filled."""
    return decision_service_pb2.DecideRequest(
        profile_id=options.get("profile_id", ""),
        identities=_identities(options.get("identities", ())),
        placements=[
            decision_service_pb2.PlacementRequest(placement=placement, count=count)
            for placement, count in _pairs(placements)
        ],
        context=_values(options.get("context", {})),
        candidate_actions=options.get("candidate_actions", ()),
        excluded_actions=options.get("excluded_actions", ()),
        at_least_lsn=options.get("at_least_lsn", 0),
        request_id=options.get("request_id", ""),
        preview=options.get("preview", False),
        decision_ack=decision_service_pb2.DECISION_ACK_DURABLE
        if options.get("durable", False)
        else decision_service_pb2.DECISION_ACK_UNSPECIFIED,
    )


def outcome(
    decision_id: str,
    action: str,
    outcome_id: str,
    type: str,  # noqa: A002  # the field's name in the API
    *,
    value: float = 0.0,
    occurrence_time: datetime | None = None,
) -> outcome_service_pb2.ReportOutcomeRequest:
    """Build the report of one outcome."""
    return outcome_service_pb2.ReportOutcomeRequest(
        decision_id=decision_id,
        action=action,
        outcome_id=outcome_id,
        type=type,
        value=value,
        occurrence_time=None if occurrence_time is None else _timestamp(occurrence_time),
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


def source_record(
    record_id: str,
    source: str,
    identities: Identities,
    *,
    attributes: Mapping[str, PyValue] | None = None,
    event: profile_pb2.Event | None = None,
) -> profile_service_pb2.SourceRecord:
    """Build what one source says about one person."""
    return profile_service_pb2.SourceRecord(
        record_id=record_id,
        source=source,
        identities=_identities(identities),
        attributes=_values(attributes or {}),
        event=event,
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
