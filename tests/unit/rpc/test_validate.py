"""What can be said about a request without the catalog: bounds are exact, paths are right, nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from server.errors import TsugiError
from server.rpc import validate
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_pb2 import ConsentDecision
from tsugi.v1.profile_service_pb2 import (
    LinkIdentitiesRequest,
    LinkVerdict,
    SourceRecord,
    SplitProfileRequest,
)
from tsugi.v1.value_pb2 import Value

NOW_US = 1_760_000_000_000_000
AHEAD_US = 5 * 60 * 1_000_000


def refused(call: Callable[[], object], path: str, reason: str = "FIELD_INVALID") -> TsugiError:
    with pytest.raises(TsugiError) as refusal:
        call()
    assert ErrorReason.Name(refusal.value.reason) == f"ERROR_REASON_{reason}"
    assert refusal.value.metadata["field"] == path
    return refusal.value


def usual_decide() -> DecideRequest:
    return json_format.ParseDict(
        {
            "profileId": "0f" * 16,
            "identities": [{"namespace": "customer_number", "value": "1"}],
            "placements": [{"placement": "home_banner", "count": 2}],
            "context": {
                "hour": {"numberValue": 5},
                "note": {"textValue": "ça va 🏃"},
                "since": {"timeValue": "2026-01-01T00:00:00Z"},
            },
            "requestId": "r",
            "decisionAck": "DECISION_ACK_DURABLE",
        },
        DecideRequest(),
    )


def usual_record() -> SourceRecord:
    return SourceRecord(record_id="r", source="crm", identities=[Identity(namespace="n", value="v")])


def test_usual_requests_pass_unchanged() -> None:
    request, before = usual_decide(), usual_decide()
    validate.decide_request(request)
    assert request == before
    validate.source_record(usual_record(), NOW_US)
    validate.report_outcome(ReportOutcomeRequest(action="a", outcome_id="o", type="t"), NOW_US)


@pytest.mark.parametrize(
    ("check", "most"),
    [
        (partial(validate.caller_id, "id"), 128),
        (lambda text: validate.identity("id", Identity(namespace="n", value=text)), 256),
    ],
)
@pytest.mark.parametrize("letter", ["x", "é", "漢"])
def test_length_is_counted_in_bytes(check: Callable[[str], None], most: int, letter: str) -> None:
    n_bytes = len(letter.encode())
    check(letter * (most // n_bytes))
    with pytest.raises(TsugiError):
        check(letter * (most // n_bytes + 1))


@pytest.mark.parametrize("text", ["a\x00b", "\n", "\x7f", "\x9f", "\u202e", "\u200b", "\ufeff", "\ue000", "\U000e0001"])
def test_control_and_format_characters_are_in_no_id(text: str) -> None:
    refused(lambda: validate.plain("id", text), "id")


@pytest.mark.parametrize("text", ["O'Neill", "Zoë", "漢字", "a b", "%s", "../x", "🏃", "<b>"])
def test_readable_text_is_an_id(text: str) -> None:
    validate.plain("id", text)


def test_values_of_records_are_checked_where_they_stand() -> None:
    record = usual_record()
    record.attributes["x" * 1_000].text_value = "\0"
    error = refused(lambda: validate.source_record(record, NOW_US), f"attributes.{'x' * 64}")
    assert len(error.message) < 200, "the path is cut with its name"
    record = usual_record()
    record.event.properties["since"].time_value.nanos = -1
    refused(lambda: validate.source_record(record, NOW_US), "event.properties.since")


def test_instant_may_lie_five_minutes_ahead_and_no_longer() -> None:
    request = ReportOutcomeRequest(action="a", outcome_id="o", type="t")
    request.occurrence_time.FromMicroseconds(NOW_US + AHEAD_US)
    validate.report_outcome(request, NOW_US)
    request.occurrence_time.FromMicroseconds(NOW_US + AHEAD_US + 1)
    refused(lambda: validate.report_outcome(request, NOW_US), "occurrence_time", "TIME_OUT_OF_RANGE")


def test_action_is_no_longer_than_any_that_was_ever_chosen() -> None:
    """Of a decision that is not known yet nothing else bounds it, and all that waits is kept."""
    request = ReportOutcomeRequest(action="a" * 64, outcome_id="o", type="t")
    validate.report_outcome(request, NOW_US)
    request.action += "a"
    refused(lambda: validate.report_outcome(request, NOW_US), "action")
    refused(lambda: validate.report_outcome(request, NOW_US, "outcomes[3]."), "outcomes[3].action")


@pytest.mark.parametrize("given", [{}, {"type": "return"}, {"type": "return", "value": 3.5}])
def test_revocation_needs_no_type(given: dict[str, Any]) -> None:
    validate.report_outcome(ReportOutcomeRequest(action="a", outcome_id="o", revokes="x" * 128, **given), NOW_US)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"revokes": "x" * 129}, "revokes"),
        ({"revokes": "a\nb"}, "revokes"),
        ({"revokes": "o"}, "revokes"),
        ({"revokes": "x", "reporter": "x" * 65}, "reporter"),
        ({"revokes": "x", "reporter": "Shop One"}, "reporter"),
        ({"revokes": "x", "value": 1.0}, "value"),
        ({"revokes": "x", "value": math.nan}, "value"),
        ({"revokes": "x", "action": ""}, "action"),
        ({"revokes": "x", "action": "a" * 65}, "action"),
        ({"revokes": "x", "outcome_id": ""}, "outcome_id"),
        ({}, "type"),
    ],
)
def test_bad_revocation_is_refused_at_its_path(given: dict[str, Any], path: str) -> None:
    request = ReportOutcomeRequest(**({"action": "a", "outcome_id": "o"} | given))
    refused(lambda: validate.report_outcome(request, NOW_US), path)


def test_observation_and_consents_may_lie_five_minutes_ahead_and_no_longer() -> None:
    record = usual_record()
    record.observation_time.FromMicroseconds(NOW_US + AHEAD_US)
    consent = record.consents.add(purpose="marketing", state=ConsentDecision.CONSENT_DECISION_WITHDRAWN)
    consent.effective_time.FromMicroseconds(NOW_US + AHEAD_US)
    validate.source_record(record, NOW_US)
    refused(lambda: validate.source_record(record, NOW_US - 1), "consents[0].effective_time", "TIME_OUT_OF_RANGE")
    consent.ClearField("effective_time")
    refused(lambda: validate.source_record(record, NOW_US - 1), "observation_time", "TIME_OUT_OF_RANGE")


def test_decide_reports_sixteen_outcomes_at_most_and_each_is_checked_where_it_stands() -> None:
    request = usual_decide()
    for i in range(16):
        request.outcomes.add(action="a", outcome_id=f"o{i}", type="t")
    validate.reported_outcomes(request, NOW_US)
    request.outcomes[15].type = ""
    refused(lambda: validate.reported_outcomes(request, NOW_US), "outcomes[15].type")
    request.outcomes.add()
    refused(lambda: validate.reported_outcomes(request, NOW_US), "outcomes", "LIMIT_EXCEEDED")


def test_requests_without_an_id_are_all_distinct() -> None:
    requests = [DecideRequest(), DecideRequest(request_id="r"), DecideRequest(), DecideRequest(request_id="s")]
    assert validate.distinct_request_ids(requests) == requests


@pytest.mark.parametrize("state", [0, 3, -1])
def test_consent_allows_or_forbids(state: int) -> None:
    record = usual_record()
    record.consents.add(state=ConsentDecision.CONSENT_DECISION_GRANTED)
    record.consents.add(state=state)
    refused(lambda: validate.source_record(record, NOW_US), "consents[1].state")


def test_record_holds_64_consents_at_most() -> None:
    record = usual_record()
    for _ in range(64):
        record.consents.add(state=ConsentDecision.CONSENT_DECISION_GRANTED)
    validate.source_record(record, NOW_US)
    record.consents.add(state=ConsentDecision.CONSENT_DECISION_GRANTED)
    refused(lambda: validate.source_record(record, NOW_US), "consents", "LIMIT_EXCEEDED")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"setValue": {"values": [f"x{i}" for i in range(53)]}}, "LIMIT_EXCEEDED"),
        ({"setValue": {"values": ["a", "x" * 1_025]}}, "LIMIT_EXCEEDED"),
        ({"setValue": {"values": ["a", "b\n"]}}, "FIELD_INVALID"),
        ({"moneyValue": {"currencyCode": "", "amountMicros": 1}}, "FIELD_INVALID"),
        ({"moneyValue": {"currencyCode": "EURO", "amountMicros": 1}}, "FIELD_INVALID"),
        ({"moneyValue": {"currencyCode": "EUR\n", "amountMicros": 1}}, "FIELD_INVALID"),
        ({"vectorValue": {"numbers": [0.0] * 257}}, "LIMIT_EXCEEDED"),
        ({"vectorValue": {"numbers": [0.0, "NaN"]}}, "FIELD_INVALID"),
        ({"vectorValue": {"numbers": ["-Infinity"]}}, "FIELD_INVALID"),
    ],
)
def test_sets_amounts_and_vectors_are_bounded_whatever_is_declared(value: dict[str, object], reason: str) -> None:
    record = usual_record()
    record.attributes["fine"].CopyFrom(Value(text_value="x" * 1_024))
    json_format.ParseDict(value, record.attributes["odd"])
    refused(lambda: validate.source_record(record, NOW_US), "attributes.odd", reason)


def usual_link() -> LinkIdentitiesRequest:
    return LinkIdentitiesRequest(
        identity=Identity(namespace="n", value="v"),
        other_identity=Identity(namespace="n", value="w"),
        verdict=LinkVerdict.LINK_VERDICT_PROPOSED,
        weight=-3.5,
        stated_by="a-matcher_2",
        request_id="r",
    )


def usual_split() -> SplitProfileRequest:
    return SplitProfileRequest(
        profile_id="0f" * 16, identities=[Identity(namespace="n", value="v")] * 63, stated_by="clerk", request_id="r"
    )


def test_usual_statements_pass_unchanged() -> None:
    link, split = usual_link(), usual_split()
    validate.link_identities(link)
    validate.split_profile(split)
    assert (link, split) == (usual_link(), usual_split())


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"identity": {"namespace": "n"}}, "identity.value", "FIELD_INVALID"),
        ({"otherIdentity": {"value": "w"}}, "other_identity.namespace", "FIELD_INVALID"),
        ({"verdict": 0}, "verdict", "FIELD_INVALID"),
        ({"verdict": 4}, "verdict", "FIELD_INVALID"),
        ({"weight": "Infinity"}, "weight", "FIELD_INVALID"),
        ({"statedBy": "Anybody"}, "stated_by", "FIELD_INVALID"),
        ({"statedBy": "clerk\n"}, "stated_by", "FIELD_INVALID"),
        ({"requestId": ""}, "request_id", "FIELD_INVALID"),
    ],
)
def test_link_says_who_says_what_of_whom(change: dict[str, object], path: str, reason: str) -> None:
    whole = json_format.MessageToDict(usual_link()) | change
    request = json_format.ParseDict(whole, LinkIdentitiesRequest())
    refused(lambda: validate.link_identities(request), path, reason)


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"profileId": ""}, "profile_id", "FIELD_INVALID"),
        ({"profileId": "0F" * 16}, "profile_id", "FIELD_INVALID"),
        ({"identities": []}, "identities", "FIELD_INVALID"),
        ({"identities": [{"namespace": "n", "value": "v"}] * 64}, "identities", "LIMIT_EXCEEDED"),
        (
            {"identities": [{"namespace": "n", "value": "v"}, {"namespace": "n"}]},
            "identities[1].value",
            "FIELD_INVALID",
        ),
        ({"statedBy": ""}, "stated_by", "FIELD_INVALID"),
        ({"requestId": "x" * 129}, "request_id", "FIELD_INVALID"),
    ],
)
def test_split_says_who_takes_what_out_of_which_profile(change: dict[str, object], path: str, reason: str) -> None:
    whole = json_format.MessageToDict(usual_split()) | change
    request = json_format.ParseDict(whole, SplitProfileRequest())
    refused(lambda: validate.split_profile(request), path, reason)


def test_person_is_named_by_profile_id_or_else_by_one_identity() -> None:
    validate.person("0f" * 16, Identity(value="is not looked at"))
    validate.person("", Identity(namespace="n", value="v"))
    refused(lambda: validate.person("", Identity()), "profile_id")
    refused(lambda: validate.person("x", Identity(namespace="n", value="v")), "profile_id")
    refused(lambda: validate.person("", Identity(namespace="n")), "identity.value")


@given(st.integers(0, (1 << 64) - 1))
def test_etag_and_page_token_of_any_lsn_pass(lsn: int) -> None:
    assert validate.etag(str(lsn)) == lsn
    assert validate.page(0, str(lsn)) == (50, lsn)


@given(st.one_of(st.integers(1 << 64), st.integers(max_value=-1), st.text(min_size=1)).map(str))
def test_nothing_else_is_an_etag_or_a_page_token(text: str) -> None:
    if text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) < 1 << 64:
        return
    refused(lambda: validate.etag(text), "etag")
    refused(lambda: validate.page(0, text), "page_token")


def test_page_holds_50_by_default_and_500_at_most() -> None:
    assert [validate.page(size, "")[0] for size in (0, 1, 500, 501, 1 << 31)] == [50, 1, 500, 500, 500]
    assert validate.page(0, "")[1] is None
    assert validate.etag("") is None


def test_revision_is_a_sha256_in_small_letters() -> None:
    assert validate.revision("ab" * 32) == bytes.fromhex("ab" * 32)
    for text in ("", "AB" * 32, "ab" * 31, "ab" * 33, "zz" * 32, "ab" * 32 + "\n"):
        refused(partial(validate.revision, text), "revision")


def test_item_of_a_batch_is_itself_or_its_error() -> None:
    good, bad = usual_record(), SourceRecord()
    check = partial(validate.source_record, now_us=NOW_US)
    assert validate.checked(good, check) is good
    assert isinstance(validate.checked(bad, check), TsugiError)


def test_unknown_acknowledgement_is_refused() -> None:
    request = usual_decide()
    request.decision_ack = 3  # type: ignore[assignment]  # what a later caller may send
    refused(lambda: validate.decide_request(request), "decision_ack")


def test_waiting_for_learning_needs_something_to_wait_for() -> None:
    request = usual_decide()
    request.wait_for_learning = True
    refused(lambda: validate.decide_request(request), "wait_for_learning")
    request.at_least_lsn = 1
    validate.decide_request(request)
    request.at_least_lsn = 0
    request.outcomes.add()
    validate.decide_request(request)
