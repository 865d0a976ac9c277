"""What the typed caller puts into its messages: exactly what was said, and nothing else."""

from __future__ import annotations

import ast
import hashlib
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

import tsugi.client
import tsugi.requests
from tsugi.client import consent, event, outcome, source_record, to_value
from tsugi.requests import CHUNK_BYTES_MAX, catalog_upload, decide_request, model_upload, money
from tsugi.v1.catalog_pb2 import Action, Catalog
from tsugi.v1.catalog_service_pb2 import CatalogUploadHeader
from tsugi.v1.decision_service_pb2 import DECISION_ACK_DURABLE, DecideRequest, PlacementRequest
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.model_service_pb2 import ModelUploadHeader
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_pb2 import Consent, ConsentDecision, Event
from tsugi.v1.profile_service_pb2 import SourceRecord
from tsugi.v1.value_pb2 import Money, TextSet, Value, Vector

NOON = datetime(2026, 3, 3, 12, tzinfo=UTC)
NOON_TIMESTAMP = Timestamp(seconds=1_772_539_200)


def test_each_python_type_becomes_its_own_kind_of_value() -> None:
    assert to_value("phone") == Value(text_value="phone")
    assert to_value(2.5) == Value(number_value=2.5)
    assert to_value(7) == Value(number_value=7.0)
    assert to_value(True) == Value(bool_value=True)
    assert to_value(False) == Value(bool_value=False)
    assert to_value(NOON) == Value(time_value=NOON_TIMESTAMP)


def test_several_things_at_once_are_a_set_or_a_vector() -> None:
    assert to_value({"ski", "bike"}) == Value(set_value=TextSet(values=["bike", "ski"]))
    assert to_value(frozenset({"ski"})) == to_value({"ski"})
    assert to_value([0.5, -1.0]) == Value(vector_value=Vector(numbers=[0.5, -1.0]))
    amount = money(5, "EUR")
    assert to_value(amount) is amount


def test_money_is_exact_or_refused() -> None:
    assert money(Decimal("19.99"), "EUR") == Value(money_value=Money(currency_code="EUR", amount_micros=19_990_000))
    assert money(Decimal("-0.000001"), "JPY").money_value.amount_micros == -1
    with pytest.raises(ValueError, match="six decimal places"):
        money(Decimal("0.0000001"), "EUR")


def test_consent_says_what_from_when_on_and_on_which_channel() -> None:
    assert consent("marketing", granted=True) == Consent(
        purpose="marketing", state=ConsentDecision.CONSENT_DECISION_GRANTED
    )
    assert consent("marketing", granted=False, channel="mail", effective_time=NOON) == Consent(
        purpose="marketing",
        channel="mail",
        state=ConsentDecision.CONSENT_DECISION_WITHDRAWN,
        effective_time=NOON_TIMESTAMP,
    )
    assert not consent("marketing", granted=True).HasField("effective_time")


def test_instant_of_another_time_zone_is_the_same_instant() -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))
    assert to_value(elsewhere) == to_value(NOON)


def test_instant_without_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        to_value(NOON.replace(tzinfo=None))
    with pytest.raises(ValueError, match="time zone"):
        outcome("d", "a", "o", "click", occurrence_time=NOON.replace(tzinfo=None))


def test_value_without_typed_form_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        to_value(b"raw")  # type: ignore[arg-type]  # the very mistake under test


def test_bare_decide_request_holds_placements_only() -> None:
    assert decide_request({"home_banner": 3}) == DecideRequest(
        placements=[PlacementRequest(placement="home_banner", count=3)]
    )


def test_full_decide_request_holds_every_option() -> None:
    built = decide_request(
        [("home_banner", 2), ("basket_footer", 1)],
        profile_id="p1",
        identities=[("customer_number", "c1"), ("browser_id", "b1")],
        context={"device": "phone", "hour": 9},
        candidate_actions=["a", "b"],
        excluded_actions=("c",),
        at_least_lsn=7,
        wait_for_learning=True,
        request_id="r1",
        preview=True,
        durable=True,
        outcomes=[outcome("d1", "a", "o1", "dismiss")],
    )
    assert built == DecideRequest(
        profile_id="p1",
        identities=[
            Identity(namespace="customer_number", value="c1"),
            Identity(namespace="browser_id", value="b1"),
        ],
        placements=[
            PlacementRequest(placement="home_banner", count=2),
            PlacementRequest(placement="basket_footer", count=1),
        ],
        context={"device": Value(text_value="phone"), "hour": Value(number_value=9.0)},
        candidate_actions=["a", "b"],
        excluded_actions=["c"],
        at_least_lsn=7,
        wait_for_learning=True,
        request_id="r1",
        preview=True,
        decision_ack=DECISION_ACK_DURABLE,
        outcomes=[outcome("d1", "a", "o1", "dismiss")],
    )


def test_mapping_and_pairs_build_the_same_request() -> None:
    by_mapping = decide_request({"a": 1, "b": 2}, identities={"customer_number": "c1"})
    by_pairs = decide_request([("a", 1), ("b", 2)], identities=[("customer_number", "c1")])
    assert by_mapping == by_pairs


def test_outcome_without_time_leaves_the_time_to_the_server() -> None:
    assert outcome("d1", "gift", "o1", "click") == ReportOutcomeRequest(
        decision_id="d1", action="gift", outcome_id="o1", type="click"
    )
    assert not outcome("d1", "gift", "o1", "click").HasField("occurrence_time")


def test_outcome_with_value_and_time_holds_both() -> None:
    assert outcome("d1", "gift", "o1", "order", value=12.5, occurrence_time=NOON) == ReportOutcomeRequest(
        decision_id="d1",
        action="gift",
        outcome_id="o1",
        type="order",
        value=12.5,
        occurrence_time=NOON_TIMESTAMP,
    )


def test_source_record_holds_attributes_and_event() -> None:
    built = source_record(
        "r1",
        "shop",
        {"customer_number": "c1"},
        attributes={"member": True},
        event=event("purchase", {"total": 30}, occurrence_time=NOON),
    )
    assert built == SourceRecord(
        record_id="r1",
        source="shop",
        identities=[Identity(namespace="customer_number", value="c1")],
        attributes={"member": Value(bool_value=True)},
        event=Event(type="purchase", occurrence_time=NOON_TIMESTAMP, properties={"total": Value(number_value=30.0)}),
    )
    bare = source_record("r1", "shop", {"customer_number": "c1"})
    assert not bare.HasField("event")
    assert not bare.HasField("observation_time")
    assert not bare.consents


def test_source_record_holds_consents_and_when_they_were_known() -> None:
    said = [consent("marketing", granted=False), consent("service", granted=True)]
    built = source_record("r1", "shop", [("email", "a@example.com")], consents=said, observation_time=NOON)
    assert built == SourceRecord(
        record_id="r1",
        source="shop",
        identities=[Identity(namespace="email", value="a@example.com")],
        consents=said,
        observation_time=NOON_TIMESTAMP,
    )


def test_catalog_upload_announces_what_its_chunks_hold() -> None:
    catalog = Catalog(name="large", actions=[Action(name=f"a{i}", eligibility="true" * 200) for i in range(200)])
    data = catalog.SerializeToString(deterministic=True)
    header, *chunks = catalog_upload(catalog, etag="12", request_id="r1", validate_only=True)
    assert header.header == CatalogUploadHeader(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        etag="12",
        request_id="r1",
        validate_only=True,
    )
    assert b"".join(part.chunk for part in chunks) == data
    assert [len(part.chunk) for part in chunks[:-1]] == [CHUNK_BYTES_MAX] * (len(chunks) - 1)
    assert 1 <= len(chunks[-1].chunk) <= CHUNK_BYTES_MAX


def test_model_upload_announces_what_its_chunks_hold() -> None:
    bundle = bytes(range(256)) * 512  # two chunks, the second one full
    header, *chunks = model_upload(bundle, "seed")
    assert header.header == ModelUploadHeader(
        label="seed", sha256=hashlib.sha256(bundle).hexdigest(), size_bytes=len(bundle)
    )
    assert [part.chunk for part in chunks] == [bundle[:CHUNK_BYTES_MAX], bundle[CHUNK_BYTES_MAX:]]


@pytest.mark.parametrize("module", [tsugi.client, tsugi.requests])
def test_caller_imports_generated_code_and_grpc_alone(module: object) -> None:
    source = Path(str(getattr(module, "__file__", ""))).read_text(encoding="utf-8")
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names <= {"google", "grpc", "grpc_health", "grpc_status", "tsugi"}
