"""Message limits: everything that can be said about a request without the catalog.

Each function raises TsugiError with the field's path; none changes the request. What the catalog must know (names,
types, ranges) is checked where the catalog is at hand.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.conditions import EXPRESSION_BYTES_MAX
from server.catalog.values import check_instant, check_value
from server.decisioning.triggers import REQUEST_PREFIX
from server.errors import TsugiError, field_invalid, limit_exceeded
from tsugi.v1.decision_service_pb2 import (
    DecideRequest,
    DecisionAck,
    DecisionView,
    GetDecisionRequest,
    SubscribeTriggersRequest,
)
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_pb2 import ConsentDecision
from tsugi.v1.profile_service_pb2 import LinkIdentitiesRequest, LinkVerdict, SourceRecord, SplitProfileRequest

CALLER_ID_BYTES_MAX: Final = 128
IDENTITY_VALUE_BYTES_MAX: Final = 256
IDENTITIES_MAX: Final = 16
PLACEMENTS_MAX: Final = 16
ACTION_LENGTH_MAX: Final = 64  # no catalog has a longer name
CONTEXT_MAX: Final = 64
ACTION_NAMES_MAX: Final = 10_000
OUTCOMES_MAX: Final = 16
ATTRIBUTES_MAX: Final = 256
PROPERTIES_MAX: Final = 64
BATCH_MAX: Final = 500
CONSENTS_MAX: Final = 64
SPLIT_IDENTITIES_MAX: Final = 63
DELAY_S_MAX: Final = 24 * 60 * 60
TIME_AHEAD_US_MAX: Final = 5 * 60 * 1_000_000
PAGE_SIZE_DEFAULT: Final = 50
PAGE_SIZE_MAX: Final = 500

_Item = TypeVar("_Item")

_LSN_MAX = (1 << 64) - 1
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_SLUG = re.compile(r"[a-z0-9_-]{1,64}\Z")
_PROFILE_ID = re.compile(r"[0-9a-f]{32}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def decide_request(request: DecideRequest) -> None:
    """Check a DecideRequest. Cost: about 4 µs for a usual one."""
    if request.profile_id:
        profile_id(request.profile_id)
    given = request.identities
    if len(given) > IDENTITIES_MAX or not all(
        identity.namespace and _is_usual(identity.value, IDENTITY_VALUE_BYTES_MAX) for identity in given
    ):
        identities("identities", given, at_least=0)
    placements_and_context(request)
    at_most("candidate_actions", len(request.candidate_actions), ACTION_NAMES_MAX)
    at_most("excluded_actions", len(request.excluded_actions), ACTION_NAMES_MAX)
    if request.request_id and not _is_usual(request.request_id, CALLER_ID_BYTES_MAX):
        caller_id("request_id", request.request_id)
    if request.request_id.startswith(REQUEST_PREFIX):
        raise field_invalid("request_id", f"{REQUEST_PREFIX} begins the server's own; choose another")
    if request.wait_for_learning and not request.at_least_lsn and not request.outcomes:
        raise field_invalid("wait_for_learning", "at_least_lsn or outcomes are required, which say what to wait for")
    if request.decision_ack not in _ACKS:
        raise field_invalid("decision_ack", f"{request.decision_ack} is no value of DecisionAck")


_ACKS = frozenset(DecisionAck.values())


def placements_and_context(request: DecideRequest | SubscribeTriggersRequest) -> None:
    """Check what is to be filled, and how many facts of the request there are."""
    if not request.placements:
        raise field_invalid("placements", "at least one placement is required")
    at_most("placements", len(request.placements), PLACEMENTS_MAX)
    at_most("context", len(request.context), CONTEXT_MAX)


def subscribe_triggers(request: SubscribeTriggersRequest) -> None:
    """Check a SubscribeTriggersRequest."""
    if not _NAME.match(request.name):
        raise field_invalid("name", "a name matching [a-z][a-z0-9_]{0,63} is required")
    if not request.event_type:
        raise field_invalid("event_type", "an event type is required")
    filter_bytes = len(request.filter.encode())
    if filter_bytes > EXPRESSION_BYTES_MAX:
        raise limit_exceeded("filter", filter_bytes, EXPRESSION_BYTES_MAX, "bytes")
    if request.HasField("delay"):
        span("delay", request.delay, DELAY_S_MAX)
    placements_and_context(request)


def span(path: str, given: Duration, seconds_max: int) -> None:
    """Check a span from nothing to so many seconds."""
    is_one = 0 <= given.seconds <= seconds_max and 0 <= given.nanos < 1_000_000_000
    if not is_one or (given.seconds == seconds_max and given.nanos):
        raise field_invalid(path, f"a span of 0 to {seconds_max} seconds is required")


def reported_outcomes(request: DecideRequest, now_us: int) -> None:
    """Check the outcomes that a DecideRequest reports."""
    at_most("outcomes", len(request.outcomes), OUTCOMES_MAX)
    if request.preview:
        raise field_invalid("outcomes", "a preview records nothing; report them without it")
    for i, outcome in enumerate(request.outcomes):
        report_outcome(outcome, now_us, f"outcomes[{i}].")


def distinct_request_ids(requests: Iterable[DecideRequest]) -> list[DecideRequest | TsugiError]:
    """Return the requests of a batch, and in place of one that takes the request id of an earlier one its error."""
    used: set[str] = set()
    checked_requests: list[DecideRequest | TsugiError] = []
    for request in requests:
        if request.request_id in used:
            checked_requests.append(field_invalid("request_id", "an earlier request of the batch has the same"))
            continue
        if request.request_id:
            used.add(request.request_id)
        checked_requests.append(request)
    return checked_requests


def report_outcome(request: ReportOutcomeRequest, now_us: int, path: str = "") -> None:
    """Check a ReportOutcomeRequest, except its decision id."""
    # An outcome may come before its decision: then this alone bounds what the log and the learner keep of it.
    if not 1 <= len(request.action) <= ACTION_LENGTH_MAX:
        raise field_invalid(f"{path}action", f"an action is required, at most {ACTION_LENGTH_MAX} characters")
    caller_id(f"{path}outcome_id", request.outcome_id)
    if request.revokes:
        caller_id(f"{path}revokes", request.revokes)
        if request.revokes == request.outcome_id:
            raise field_invalid(f"{path}revokes", "an outcome cannot take itself back; give the id of another")
        if not request.type and request.value != 0.0:  # NaN too
            raise field_invalid(f"{path}value", "a value belongs to a type; leave both out, or give both")
    elif not request.type:
        raise field_invalid(f"{path}type", "an outcome type is required, or the outcome it revokes")
    if request.reporter and not _SLUG.match(request.reporter):
        raise field_invalid(f"{path}reporter", "a name of [a-z0-9_-], at most 64 characters, or none")
    if request.HasField("occurrence_time"):
        not_ahead(f"{path}occurrence_time", request.occurrence_time, now_us)


def source_record(record: SourceRecord, now_us: int) -> None:
    """Check one SourceRecord."""
    caller_id("record_id", record.record_id)
    if not _SLUG.match(record.source):
        raise field_invalid("source", "the name of a declared source is required")
    identities("identities", record.identities, at_least=1)
    at_most("attributes", len(record.attributes), ATTRIBUTES_MAX)
    for name, value in record.attributes.items():
        check_value(f"attributes.{name[:64]}", value)
    if record.HasField("event"):
        at_most("event.properties", len(record.event.properties), PROPERTIES_MAX)
        for name, value in record.event.properties.items():
            check_value(f"event.properties.{name[:64]}", value)
        if record.event.HasField("occurrence_time"):
            not_ahead("event.occurrence_time", record.event.occurrence_time, now_us)
    at_most("consents", len(record.consents), CONSENTS_MAX)
    for i, consent in enumerate(record.consents):
        if consent.state not in _CONSENT_DECISIONS:
            raise field_invalid(f"consents[{i}].state", "CONSENT_DECISION_GRANTED or _WITHDRAWN is required")
        if consent.HasField("effective_time"):
            not_ahead(f"consents[{i}].effective_time", consent.effective_time, now_us)
    if record.HasField("observation_time"):
        not_ahead("observation_time", record.observation_time, now_us)


_CONSENT_DECISIONS = frozenset({ConsentDecision.CONSENT_DECISION_GRANTED, ConsentDecision.CONSENT_DECISION_WITHDRAWN})


def person(given_id: str, given: Identity) -> None:
    """Check how a person is named: by profile id, or else by one identity."""
    if given_id:
        profile_id(given_id)
    elif not given.namespace and not given.value:
        raise field_invalid("profile_id", "a profile_id or an identity is required")
    else:
        identity("identity", given)


def link_identities(request: LinkIdentitiesRequest) -> None:
    """Check a LinkIdentitiesRequest."""
    identity("identity", request.identity)
    identity("other_identity", request.other_identity)
    if request.verdict not in _VERDICTS:
        raise field_invalid("verdict", "LINK_VERDICT_SAME, _DIFFERENT or _PROPOSED is required")
    if not math.isfinite(request.weight):
        raise field_invalid("weight", "a finite number of bits is required")
    stated_by(request.stated_by)
    caller_id("request_id", request.request_id)


_VERDICTS = frozenset(LinkVerdict.values()) - {LinkVerdict.LINK_VERDICT_UNSPECIFIED}


def split_profile(request: SplitProfileRequest) -> None:
    """Check a SplitProfileRequest."""
    profile_id(request.profile_id)
    if not request.identities:
        raise field_invalid("identities", "at least one identity is required")
    at_most("identities", len(request.identities), SPLIT_IDENTITIES_MAX)
    for i, entry in enumerate(request.identities):
        identity(f"identities[{i}]", entry)
    stated_by(request.stated_by)
    caller_id("request_id", request.request_id)


def stated_by(value: str) -> None:
    """Check the name of who states something."""
    if not _SLUG.match(value):
        raise field_invalid("stated_by", "a name matching [a-z0-9_-]{1,64} is required")


def segment(value: str) -> None:
    """Check the name of a segment."""
    if not _SLUG.match(value):
        raise field_invalid("segment", "the name of a declared segment is required")


def profile_id(value: str, path: str = "profile_id") -> bytes:
    """Return the profile key of a profile id."""
    if not _PROFILE_ID.match(value):
        raise field_invalid(path, "32 hexadecimal digits, as the server gave them")
    return bytes.fromhex(value)


def revision(value: str, path: str = "revision") -> bytes:
    """Return the sha256 a revision names."""
    if not _SHA256.match(value):
        raise field_invalid(path, "64 lower-case hexadecimal digits, as the server gave them")
    return bytes.fromhex(value)


def etag(value: str) -> int | None:
    """Return the LSN an etag stands for; None when the caller does not care."""
    if not value:
        return None
    return _lsn("etag", value)


def page(size: int, token: str) -> tuple[int, int | None]:
    """Return how many entries a page holds and the LSN it starts at; None for the first page."""
    return min(size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX), _lsn("page_token", token) if token else None


def label(value: str) -> None:
    """Check a label."""
    if not _SLUG.match(value):
        raise field_invalid("header.label", "a name matching [a-z0-9_-]{1,64} is required")


def caller_id(path: str, value: str) -> None:
    """Check an id that a caller chose."""
    if not 1 <= len(value.encode()) <= CALLER_ID_BYTES_MAX:
        raise field_invalid(path, f"1 to {CALLER_ID_BYTES_MAX} bytes are required")
    plain(path, value)


def identities(path: str, given: Iterable[Identity], *, at_least: int) -> None:
    """Check a list of identities."""
    listed = list(given)
    if len(listed) < at_least:
        raise field_invalid(path, "at least one identity is required")
    at_most(path, len(listed), IDENTITIES_MAX)
    for i, entry in enumerate(listed):
        identity(f"{path}[{i}]", entry)


def identity(path: str, given: Identity) -> None:
    """Check one identity; whether its namespace is declared is the catalog's to say."""
    if not given.namespace:
        raise field_invalid(f"{path}.namespace", "a namespace is required")
    if not 1 <= len(given.value.encode()) <= IDENTITY_VALUE_BYTES_MAX:
        raise field_invalid(f"{path}.value", f"1 to {IDENTITY_VALUE_BYTES_MAX} bytes are required")
    plain(f"{path}.value", given.value)


def _is_usual(text: str, bytes_max: int) -> bool:
    """Say quickly that a text is fine; what this denies may still be, and is looked at closely."""
    return 0 < len(text) <= bytes_max and text.isascii() and text.isprintable()


def plain(path: str, text: str) -> None:
    """Refuse control characters and marks that turn the direction of writing."""
    if text.isascii() and text.isprintable():
        return
    if any(unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn"} for character in set(text)):
        raise field_invalid(path, "control and format characters are not allowed")


def not_ahead(path: str, instant: Timestamp, now_us: int) -> None:
    """Refuse an instant that is no instant, or lies more than five minutes ahead."""
    check_instant(path, instant)
    if instant.seconds * 1_000_000 + instant.nanos // 1_000 > now_us + TIME_AHEAD_US_MAX:
        raise TsugiError(
            ErrorReason.ERROR_REASON_TIME_OUT_OF_RANGE,
            f"{path}: more than 5 minutes ahead of the server's clock",
            field=path,
        )


def at_most(path: str, got: int, limit: int) -> None:
    """Refuse more entries than a stated maximum."""
    if got > limit:
        raise limit_exceeded(path, got, limit)


def _lsn(path: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 20 or int(text) > _LSN_MAX:
        raise field_invalid(path, "pass it exactly as received")
    return int(text)


def checked(item: _Item, check: Callable[[_Item], None]) -> _Item | TsugiError:
    """Return one item of a batch, or what is wrong with it."""
    try:
        check(item)
    except TsugiError as error:
        return error
    return item


def decision_view(request: GetDecisionRequest) -> None:
    """Check what GetDecision is asked to tell.

    Raises:
        TsugiError: FIELD_INVALID.
    """
    if request.view not in DecisionView.values():
        raise field_invalid("view", "DECISION_VIEW_BASIC or DECISION_VIEW_EXPLAINED is required")
