"""Bad requests of every method: each is refused with a code, a reason and the field's path, and nothing dies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from server.rpc.status import CODES
from tests.support.protos import stated_maxima
from tests.support.refusing import (
    N_SHARING,
    OTHER_BROWSER,
    OTHER_PERSON,
    PERSON,
    SHARED,
    STRANGER,
    World,
    make_world,
    outcome,
    request,
    source,
    valid,
)
from tests.support.running import Server, serving, told
from tests.support.wire import ITEM_STREAMS, METHODS, Refusal, Wire
from tests.unit.rpc.test_status import UNRAISED
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.outcome_service_pb2 import StreamReportOutcomesResponse

pytestmark = pytest.mark.slow

INVALID, NOT_FOUND, LIMIT = "FIELD_INVALID", "RESOURCE_NOT_FOUND", "LIMIT_EXCEEDED"
TOKEN, TIME = "DECISION_ID_INVALID", "TIME_OUT_OF_RANGE"
CONFLICT, SOURCE, REUSED = "IDENTITIES_CONFLICT", "SOURCE_NOT_ALLOWED", "IDEMPOTENCY_KEY_REUSED"
CONTROL, BIDI = "a\nb", "a\u202eb"
UPLOADS: Final = {"PushCatalog", "PushModel"}  # have a table of their own
ASKED: Final = [name for name in METHODS if name not in UPLOADS]

Changes = Callable[[World], dict[str, Any]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        yield server
        assert server.roles() == roles, "a role died of a bad request"


@pytest.fixture(scope="module")
def world(running: Server) -> World:
    with running.client() as client:
        return make_world(client)


@pytest.fixture
def wire(running: Server) -> Iterator[Wire]:
    for server in told(running):
        with Wire(server.address) as wire:
            yield wire


def number(value: object) -> dict[str, Any]:
    return {"context": {"hour": {"numberValue": value}}}


def identity(**changes: str) -> dict[str, Any]:
    return {"identities": [PERSON | changes]}


def slots(*placements: tuple[str, int]) -> dict[str, Any]:
    return {"placements": [{"placement": name, "count": count} for name, count in placements]}


def attribute(name: str, **value: Any) -> dict[str, Any]:
    return {"attributes": {name: value}}


def consent(**changes: Any) -> dict[str, Any]:
    return {"consents": [{"purpose": "marketing", "state": "CONSENT_DECISION_GRANTED"} | changes]}


def money(micros: int, currency_code: str = "EUR") -> dict[str, Any]:
    return {"moneyValue": {"currencyCode": currency_code, "amountMicros": micros}}


def later(**span: float) -> str:
    return (datetime.now(UTC) + timedelta(**span)).isoformat()


def consents(**changes: object) -> dict[str, Any]:
    return {"consents": [{"purpose": "marketing", "state": "CONSENT_DECISION_GRANTED"} | changes]}


DECIDE: list[tuple[str, dict[str, Any], str, str]] = [
    ("no placement", {"placements": []}, INVALID, "placements"),
    ("unknown placement", slots(("greedy", 1), ("nowhere", 1)), NOT_FOUND, "placements[1].placement"),
    ("unnamed placement", slots(("", 1)), NOT_FOUND, "placements[0].placement"),
    ("placement twice", slots(("greedy", 1), ("greedy", 1)), INVALID, "placements[1].placement"),
    ("too many slots", slots(("greedy", 5)), LIMIT, "placements[0].count"),
    ("most slots of all", slots(("greedy", 2**32 - 1)), LIMIT, "placements[0].count"),
    ("unknown candidate", {"candidateActions": ["action_0", "nothing"]}, NOT_FOUND, "candidate_actions[1]"),
    ("unknown exclusion", {"excludedActions": ["nothing"]}, NOT_FOUND, "excluded_actions[0]"),
    ("unknown fact", {"context": {"weather": {"textValue": "rain"}}}, NOT_FOUND, "context.weather"),
    ("fact of another type", {"context": {"hour": {"textValue": "noon"}}}, INVALID, "context.hour"),
    ("fact without a value", {"context": {"member": {}}}, INVALID, "context.member"),
    ("not a number", number("NaN"), INVALID, "context.hour"),
    ("infinite number", number("Infinity"), INVALID, "context.hour"),
    ("infinitely small number", number("-Infinity"), INVALID, "context.hour"),
    ("number out of range", number(24), INVALID, "context.hour"),
    ("huge number", number(1e308), INVALID, "context.hour"),
    ("value of no category", {"context": {"device": {"textValue": "fridge"}}}, INVALID, "context.device"),
    ("long text", {"context": {"note": {"textValue": "ä" * 513}}}, LIMIT, "context.note"),
    ("control character in a text", {"context": {"note": {"textValue": CONTROL}}}, INVALID, "context.note"),
    ("unknown namespace", identity(namespace="badge"), NOT_FOUND, "identities[0].namespace"),
    ("no namespace", identity(namespace=""), INVALID, "identities[0].namespace"),
    ("empty identity", identity(value=""), INVALID, "identities[0].value"),
    ("long identity", identity(value="x" * 257), INVALID, "identities[0].value"),
    ("identity with a control character", identity(value=CONTROL), INVALID, "identities[0].value"),
    ("identity that turns the writing", identity(value=BIDI), INVALID, "identities[0].value"),
    ("profile id of another form", {"profileId": "0" * 31 + "G"}, INVALID, "profile_id"),
    ("long request id", {"requestId": "x" * 129}, INVALID, "request_id"),
    ("request id of a subscription", {"requestId": "trigger/carts/5"}, INVALID, "request_id"),
    ("request id with a control character", {"requestId": CONTROL}, INVALID, "request_id"),
    ("unknown acknowledgement", {"decisionAck": 7}, INVALID, "decision_ack"),
    ("outcomes in a preview", {"preview": True}, INVALID, "outcomes"),
]
OUTCOME: list[tuple[str, Changes, str, str]] = [
    ("no decision id", lambda w: {"decisionId": ""}, TOKEN, "decision_id"),
    ("forged decision id", lambda w: {"decisionId": "A" * 56}, TOKEN, "decision_id"),
    ("altered decision id", lambda w: {"decisionId": w.decision_id[:-1] + "-"}, TOKEN, "decision_id"),
    ("decision id cut short", lambda w: {"decisionId": w.decision_id[:-4]}, TOKEN, "decision_id"),
    ("decision id that is no text of ours", lambda w: {"decisionId": "ü" * 56}, TOKEN, "decision_id"),
    ("no action", lambda w: {"action": ""}, INVALID, "action"),
    ("long action", lambda w: {"action": "a" * 65}, INVALID, "action"),
    ("no outcome id", lambda w: {"outcomeId": ""}, INVALID, "outcome_id"),
    ("long outcome id", lambda w: {"outcomeId": "x" * 129}, INVALID, "outcome_id"),
    ("outcome id that turns the writing", lambda w: {"outcomeId": BIDI}, INVALID, "outcome_id"),
    ("no type", lambda w: {"type": ""}, INVALID, "type"),
    ("unknown type", lambda w: {"type": "applause"}, NOT_FOUND, "type"),
    ("value out of range", lambda w: {"value": 1000.1}, INVALID, "value"),
    ("value below its range", lambda w: {"value": -1e-9}, INVALID, "value"),
    ("value where none belongs", lambda w: {"type": "click", "value": 1}, INVALID, "value"),
    ("value that is not a number", lambda w: {"value": "NaN"}, INVALID, "value"),
    ("infinite value", lambda w: {"value": "Infinity"}, INVALID, "value"),
    ("takes back itself", lambda w: {"outcomeId": "o", "revokes": "o"}, INVALID, "revokes"),
    ("takes back by a long id", lambda w: {"revokes": "x" * 129}, INVALID, "revokes"),
    ("takes back by what turns the writing", lambda w: {"revokes": BIDI}, INVALID, "revokes"),
    ("takes back with a value of nothing", lambda w: {"type": "", "revokes": "u", "value": 1}, INVALID, "value"),
    ("takes back as an unknown type", lambda w: {"type": "applause", "revokes": "u"}, NOT_FOUND, "type"),
    ("time ahead", lambda w: {"occurrenceTime": later(minutes=6)}, TIME, "occurrence_time"),
    ("time before the decision", lambda w: {"occurrenceTime": later(minutes=-6)}, TIME, "occurrence_time"),
]
RECORD: list[tuple[str, dict[str, Any], str, str]] = [
    ("no record id", {"recordId": ""}, INVALID, "record_id"),
    ("long record id", {"recordId": "x" * 129}, INVALID, "record_id"),
    ("no source", {"source": ""}, INVALID, "source"),
    ("source of another form", {"source": "The CRM"}, INVALID, "source"),
    ("source that is not declared", {"source": "rumours"}, SOURCE, "source"),
    ("attribute not of its source", {"source": "narrow"} | attribute("member", boolValue=True), SOURCE,
     "attributes.member"),
    ("event not of its source", {"source": "narrow", "event": {"type": "call"}}, SOURCE, "event.type"),
    ("namespace not of its source", {"source": "narrow", "identities": [OTHER_BROWSER]}, SOURCE,
     "identities[0].namespace"),
    ("nobody", {"identities": []}, INVALID, "identities"),
    ("unknown namespace", identity(namespace="badge"), NOT_FOUND, "identities[0].namespace"),
    ("empty identity", identity(value=""), INVALID, "identities[0].value"),
    ("nobody but too many", {"identities": [SHARED]}, "IDENTITY_TOO_SHARED", "identities"),
    ("set of another type", attribute("sports", textValue="ski"), INVALID, "attributes.sports"),
    ("set with what is not allowed", attribute("sports", setValue={"values": ["ski", "chess"]}), INVALID,
     "attributes.sports"),
    ("set with a value twice", attribute("sports", setValue={"values": ["ski", "ski"]}), INVALID, "attributes.sports"),
    ("large set", attribute("sports", setValue={"values": [f"x{i}" for i in range(53)]}), LIMIT, "attributes.sports"),
    ("set with a long text", attribute("sports", setValue={"values": ["x" * 1025]}), LIMIT, "attributes.sports"),
    ("set with a control character", attribute("sports", setValue={"values": [CONTROL]}), INVALID,
     "attributes.sports"),
    ("set for a category", attribute("device", setValue={"values": ["phone"]}), INVALID, "attributes.device"),
    ("money as a number", attribute("spend", numberValue=5), INVALID, "attributes.spend"),
    ("money without a currency", attribute("spend", moneyValue={}), INVALID, "attributes.spend"),
    ("money of another form", attribute("spend", **money(5, "eur")), INVALID, "attributes.spend"),
    ("money of another country", attribute("spend", **money(5, "USD")), INVALID, "attributes.spend"),
    ("too much money", attribute("spend", **money(100_000_001)), INVALID, "attributes.spend"),
    ("less than no money", attribute("spend", **money(-1)), INVALID, "attributes.spend"),
    ("vector of another length", attribute("taste", vectorValue={"numbers": [1, 2, 3]}), INVALID, "attributes.taste"),
    ("vector of nothing", attribute("taste", vectorValue={}), INVALID, "attributes.taste"),
    ("vector not of numbers", attribute("taste", vectorValue={"numbers": [1, "NaN"]}), INVALID, "attributes.taste"),
    ("infinite vector", attribute("taste", vectorValue={"numbers": [1, "Infinity"]}), INVALID, "attributes.taste"),
    ("long vector", attribute("taste", vectorValue={"numbers": [0] * 257}), LIMIT, "attributes.taste"),
    ("vector for a number", attribute("hour", vectorValue={"numbers": [1]}), INVALID, "attributes.hour"),
    ("consent for nothing", consent(purpose=""), NOT_FOUND, "consents[0].purpose"),
    ("consent for another purpose", consent(purpose="resale"), NOT_FOUND, "consents[0].purpose"),
    ("consent on another channel", consent(channel="pigeon"), NOT_FOUND, "consents[0].channel"),
    ("consent that says nothing", consent(state=0), INVALID, "consents[0].state"),
    ("consent of a third kind", consent(state=7), INVALID, "consents[0].state"),
    ("consent ahead", consent(effectiveTime=later(hours=2)), TIME, "consents[0].effective_time"),
    ("observed ahead", {"observationTime": later(hours=2)}, TIME, "observation_time"),
    ("unknown attribute", {"attributes": {"mood": {"textValue": "good"}}}, NOT_FOUND, "attributes.mood"),
    ("attribute of another type", {"attributes": {"hour": {"boolValue": True}}}, INVALID, "attributes.hour"),
    ("attribute without a value", {"attributes": {"hour": {}}}, INVALID, "attributes.hour"),
    ("attribute not a number", {"attributes": {"hour": {"numberValue": "NaN"}}}, INVALID, "attributes.hour"),
    ("attribute out of range", {"attributes": {"hour": {"numberValue": -1}}}, INVALID, "attributes.hour"),
    ("value of no category", {"attributes": {"device": {"textValue": "fridge"}}}, INVALID, "attributes.device"),
    ("long text", {"attributes": {"note": {"textValue": "x" * 1025}}}, LIMIT, "attributes.note"),
    ("control character", {"attributes": {"note": {"textValue": CONTROL}}}, INVALID, "attributes.note"),
    ("unknown event", {"event": {"type": "wedding"}}, NOT_FOUND, "event.type"),
    ("event without a type", {"event": {}}, NOT_FOUND, "event.type"),
    (
        "unknown property",
        {"event": {"type": "visit", "properties": {"mood": {"boolValue": True}}}},
        NOT_FOUND,
        "event.properties.mood",
    ),
    (
        "property of another type",
        {"event": {"type": "visit", "properties": {"since": {"textValue": "ever"}}}},
        INVALID,
        "event.properties.since",
    ),
    (
        "event ahead",
        {"event": {"type": "visit", "occurrenceTime": "9999-01-01T00:00:00Z"}},
        TIME,
        "event.occurrence_time",
    ),
]  # fmt: skip
READS: list[tuple[str, str, Changes, str, str]] = [
    ("nobody", "GetProfile", lambda w: {"identity": None}, INVALID, "profile_id"),
    ("id of another form", "GetProfile", lambda w: {"profileId": "x"}, INVALID, "profile_id"),
    ("unknown id", "GetProfile", lambda w: {"profileId": "0" * 32}, NOT_FOUND, ""),
    ("empty identity", "GetProfile", lambda w: {"identity": PERSON | {"value": ""}}, INVALID, "identity.value"),
    ("no namespace", "GetProfile", lambda w: {"identity": PERSON | {"namespace": ""}}, INVALID, "identity.namespace"),
    ("unknown identity", "GetProfile", lambda w: {"identity": PERSON | {"value": "x"}}, NOT_FOUND, ""),
    ("revision of another form", "GetCatalog", lambda w: {"revision": "newest"}, INVALID, "revision"),
    ("unknown revision", "GetCatalog", lambda w: {"revision": "0" * 64}, NOT_FOUND, "revision"),
    *(
        (f"token {t!r}", method, lambda w, t=t: {"pageToken": t or str(w.record_lsn)}, INVALID, "page_token")
        for method in ("ListCatalogRevisions", "ListModelRevisions", "ListLearners")
        for t in ("abc", "0", "-1", "٣", "9" * 19, "9" * 20, "9" * 21, "")
    ),
    ("large page", "GetProfile", lambda w: {"timelinePageSize": 501}, LIMIT, "timeline_page_size"),
    ("large page", "ListMatchReviews", lambda w: {"pageSize": 501}, LIMIT, "page_size"),
    ("no segment", "ListProfiles", lambda w: {"segment": ""}, INVALID, "segment"),
    ("segment of no form", "ListProfiles", lambda w: {"segment": "Ä" * 100}, INVALID, "segment"),
    ("unknown segment", "ListProfiles", lambda w: {"segment": "nobody"}, NOT_FOUND, "segment"),
    *(
        (f"token {t!r}", method, lambda w, path=path, t=t: {path: t}, INVALID, path)
        for method, path, n_bytes in (
            ("GetProfile", "timeline_page_token", 18), ("ListMatchReviews", "page_token", 36),
            ("ListProfiles", "page_token", 16),
        )
        for t in ("abc", "00", "é", "0" * 2 * n_bytes + "00", "0 " * n_bytes, "A" * 2 * n_bytes, "٣" * 2 * n_bytes)
    ),
    ("unknown goal", "ListLearners", lambda w: {"goal": "wealth"}, NOT_FOUND, "goal"),
    ("nobody", "ResolveIdentity", lambda w: {"identities": []}, INVALID, "identities"),
    ("empty identity", "ResolveIdentity", lambda w: identity(value=""), INVALID, "identities[0].value"),
    ("no namespace", "ResolveIdentity", lambda w: identity(namespace=""), INVALID, "identities[0].namespace"),
    ("unknown namespace", "ResolveIdentity", lambda w: {"identities": [PERSON, PERSON | {"namespace": "badge"}]},
     NOT_FOUND, "identities[1].namespace"),
    ("nobody", "ExportProfile", lambda w: {"identity": None}, INVALID, "profile_id"),
    ("id of another form", "ExportProfile", lambda w: {"profileId": "0" * 33}, INVALID, "profile_id"),
    ("unknown id", "ExportProfile", lambda w: {"profileId": "0" * 32}, NOT_FOUND, ""),
    ("empty identity", "ExportProfile", lambda w: {"identity": PERSON | {"value": ""}}, INVALID, "identity.value"),
    ("unknown identity", "ExportProfile", lambda w: {"identity": STRANGER}, NOT_FOUND, ""),
    ("no id", "GetDecision", lambda w: {"decisionId": ""}, "DECISION_ID_INVALID", ""),
    ("id that is not ours", "GetDecision", lambda w: {"decisionId": "A" * 56}, "DECISION_ID_INVALID", ""),
    ("unknown view", "GetDecision", lambda w: {"view": 9}, INVALID, "view"),
    ("no id", "GetErasure", lambda w: {"erasureId": ""}, INVALID, "erasure_id"),
    ("id of another form", "GetErasure", lambda w: {"erasureId": w.erasure_id.upper() + "0"}, INVALID, "erasure_id"),
    ("unknown id", "GetErasure", lambda w: {"erasureId": "0" * 32}, NOT_FOUND, "erasure_id"),
    *(
        (f"name {name[:9]!r}", "SubscribeTriggers", lambda w, name=name: {"name": name}, INVALID, "name")
        for name in ("", "Carts", "7up", "a/b", "cart\n", "x" * 65)
    ),
    ("no event type", "SubscribeTriggers", lambda w: {"eventType": ""}, INVALID, "event_type"),
    ("unknown event type", "SubscribeTriggers", lambda w: {"eventType": "wedding"}, NOT_FOUND, "event_type"),
    ("filter that is none", "SubscribeTriggers", lambda w: {"filter": "event.hour >"}, INVALID, "filter"),
    ("filter of an unknown fact", "SubscribeTriggers", lambda w: {"filter": "event.mood"}, INVALID, "filter"),
    ("filter of the context", "SubscribeTriggers", lambda w: {"filter": "context.member"}, INVALID, "filter"),
    ("filter of a text nobody names", "SubscribeTriggers", lambda w: {"filter": "profile.note == 'x'"}, INVALID,
     "filter"),
    ("long filter", "SubscribeTriggers", lambda w: {"filter": "true" + " " * 2_045}, LIMIT, "filter"),
    ("delay backwards", "SubscribeTriggers", lambda w: {"delay": "-0.001s"}, INVALID, "delay"),
    ("long delay", "SubscribeTriggers", lambda w: {"delay": "86400.000000001s"}, INVALID, "delay"),
    ("no placement", "SubscribeTriggers", lambda w: {"placements": []}, INVALID, "placements"),
    ("unknown placement", "SubscribeTriggers", lambda w: slots(("nowhere", 1)), NOT_FOUND, "placements[0].placement"),
    ("placement twice", "SubscribeTriggers", lambda w: slots(("greedy", 1), ("greedy", 1)), INVALID,
     "placements[1].placement"),
    ("too many slots", "SubscribeTriggers", lambda w: slots(("greedy", 5)), LIMIT, "placements[0].count"),
    ("fact out of range", "SubscribeTriggers", lambda w: number(24), INVALID, "context.hour"),
    ("lsn beyond the log", "SubscribeTriggers", lambda w: {"afterLsn": 2**64 - 1}, INVALID, "after_lsn"),
]  # fmt: skip
WRITES: list[tuple[str, str, Changes, str, str]] = [
    *(
        (name, method, lambda w, changes=changes: changes, reason, path)
        for method in ("RollbackCatalog", "AssignModelRole", "RollbackModel", "ResetLearner")
        for name, changes, reason, path in (
            ("long request id", {"requestId": "x" * 129}, INVALID, "request_id"),
            ("etag of another form", {"etag": "W/5"}, INVALID, "etag"),
            ("etag too large", {"etag": "9" * 20}, INVALID, "etag"),
        )
    ),
    ("unknown revision", "RollbackCatalog", lambda w: {"revision": "0" * 64}, NOT_FOUND, "revision"),
    ("revision of another form", "RollbackCatalog", lambda w: {"revision": "0" * 63}, INVALID, "revision"),
    ("nothing before", "RollbackCatalog", lambda w: {}, "NO_PREVIOUS_REVISION", ""),
    ("no role", "AssignModelRole", lambda w: {"role": 0}, INVALID, "role"),
    ("role of the learners to nobody", "AssignModelRole", lambda w: {"role": 2}, INVALID, "revision"),
    ("role of the learners to a bundle", "AssignModelRole", lambda w: {"role": 2, "revision": "0" * 64}, INVALID,
     "revision"),
    ("role of a bundle to the fleet", "AssignModelRole", lambda w: {"revision": "fleet"}, INVALID, "revision"),
    ("role of nobody", "AssignModelRole", lambda w: {"role": 99}, INVALID, "role"),
    ("unknown revision", "AssignModelRole", lambda w: {"revision": "0" * 64}, NOT_FOUND, "revision"),
    ("revision of another form", "AssignModelRole", lambda w: {"revision": "x"}, INVALID, "revision"),
    ("old etag", "AssignModelRole", lambda w: {"etag": "1", "validateOnly": True}, "ETAG_MISMATCH", ""),
    *(
        (name, method, lambda w, changes=changes: changes, INVALID, path)
        for method in ("LinkIdentities", "SplitProfile")
        for name, changes, path in (
            ("no request id", {"requestId": ""}, "request_id"),
            ("long request id", {"requestId": "x" * 129}, "request_id"),
            ("request id with a control character", {"requestId": CONTROL}, "request_id"),
            ("stated by nobody", {"statedBy": ""}, "stated_by"),
            ("stated by a sentence", {"statedBy": "Customer care"}, "stated_by"),
            ("stated at length", {"statedBy": "x" * 65}, "stated_by"),
        )
    ),
    ("no identity", "LinkIdentities", lambda w: {"identity": None}, INVALID, "identity.namespace"),
    ("no other", "LinkIdentities", lambda w: {"otherIdentity": None}, INVALID, "other_identity.namespace"),
    ("empty identity", "LinkIdentities", lambda w: {"identity": PERSON | {"value": ""}}, INVALID, "identity.value"),
    ("unknown namespace", "LinkIdentities", lambda w: {"otherIdentity": PERSON | {"namespace": "badge"}}, NOT_FOUND,
     "other_identity.namespace"),
    ("unknown identity", "LinkIdentities", lambda w: {"otherIdentity": STRANGER}, NOT_FOUND, "other_identity"),
    ("one identity twice", "LinkIdentities", lambda w: {"otherIdentity": PERSON}, INVALID, "other_identity"),
    ("no verdict", "LinkIdentities", lambda w: {"verdict": 0}, INVALID, "verdict"),
    ("verdict of a later time", "LinkIdentities", lambda w: {"verdict": 99}, INVALID, "verdict"),
    ("weight that is none", "LinkIdentities", lambda w: {"weight": "NaN"}, INVALID, "weight"),
    ("infinite weight", "LinkIdentities", lambda w: {"weight": "-Infinity"}, INVALID, "weight"),
    ("two customers in one", "LinkIdentities", lambda w: {"otherIdentity": OTHER_PERSON, "verdict": 1}, CONFLICT,
     "identity"),
    ("by what too many share", "LinkIdentities", lambda w: {"otherIdentity": SHARED, "verdict": 1}, CONFLICT,
     "other_identity"),
    ("no profile", "SplitProfile", lambda w: {"profileId": ""}, INVALID, "profile_id"),
    ("profile of another form", "SplitProfile", lambda w: {"profileId": "x" * 32}, INVALID, "profile_id"),
    ("unknown profile", "SplitProfile", lambda w: {"profileId": "0" * 32}, NOT_FOUND, "profile_id"),
    ("nothing leaves", "SplitProfile", lambda w: {"identities": []}, INVALID, "identities"),
    ("all leave", "SplitProfile", lambda w: {"identities": [OTHER_PERSON, OTHER_BROWSER]}, INVALID, "identities"),
    ("somebody else leaves", "SplitProfile", lambda w: {"identities": [OTHER_BROWSER, PERSON]}, NOT_FOUND,
     "identities[1]"),
    ("empty identity leaves", "SplitProfile", lambda w: identity(value=""), INVALID, "identities[0].value"),
    ("nobody", "EraseProfile", lambda w: {"identity": None}, INVALID, "profile_id"),
    ("id of another form", "EraseProfile", lambda w: {"profileId": "x"}, INVALID, "profile_id"),
    ("empty identity", "EraseProfile", lambda w: {"identity": PERSON | {"value": ""}}, INVALID, "identity.value"),
    ("no request id", "EraseProfile", lambda w: {"requestId": ""}, INVALID, "request_id"),
    ("long request id", "EraseProfile", lambda w: {"requestId": "x" * 129}, INVALID, "request_id"),
    ("request id of another wish", "EraseProfile", lambda w: {"identity": PERSON}, REUSED, ""),
    ("no role", "RollbackModel", lambda w: {"role": 0}, INVALID, "role"),
    ("role of nobody", "RollbackModel", lambda w: {"role": 99}, INVALID, "role"),
    ("nothing before", "RollbackModel", lambda w: {}, "NO_PREVIOUS_REVISION", ""),
    ("no challenger before", "RollbackModel", lambda w: {"role": 3}, "NO_PREVIOUS_REVISION", ""),
    ("no learner before", "RollbackModel", lambda w: {"role": 2}, "NO_PREVIOUS_REVISION", ""),
    *(
        (f"role {role} to be reset", "ResetLearner", lambda w, role=role: {"role": role}, INVALID, "role")
        for role in (0, 3, 4, 99)
    ),
    ("unknown goal", "ResetLearner", lambda w: {"goals": ["click", "wealth"]}, NOT_FOUND, "goals[1]"),
    ("goal without a name", "ResetLearner", lambda w: {"goals": [""]}, NOT_FOUND, "goals[0]"),
    ("goal twice", "ResetLearner", lambda w: {"goals": ["click", "click"]}, INVALID, "goals[1]"),
    ("old etag", "ResetLearner", lambda w: {"etag": "1"}, "ETAG_MISMATCH", ""),
]  # fmt: skip


def check(refusal: object, reason: str, path: str) -> None:
    """Hold a refusal to what is promised of every one."""
    assert isinstance(refusal, Refusal), "it was let through"
    assert (refusal.reason, refusal.domain) == (f"ERROR_REASON_{reason}", "tsugi"), refusal.message
    assert refusal.code is CODES[ErrorReason.Value(refusal.reason)]  # type: ignore[index]  # its stub gives an int
    assert path == "" or path in refusal.paths, refusal.fields
    assert refusal.message
    assert len(json.dumps(refusal.metadata)) < 1_000


def cases(table: list[Any]) -> pytest.MarkDecorator:
    names = [" ".join(part for part in case[:2] if isinstance(part, str)) for case in table]
    return pytest.mark.parametrize("case", table, ids=names)


@cases(DECIDE)
def test_bad_decide_is_refused(wire: Wire, world: World, case: tuple[str, dict[str, Any], str, str]) -> None:
    _, changes, reason, path = case
    check(wire.ask("Decide", request("Decide", world, **changes)), reason, path)
    good, bad = results(wire, request("BatchDecide", world, requests=[decide(world), decide(world) | changes]))
    assert good.decision.decision_id
    for error in (bad.error, streamed(wire, world, **changes)):
        assert ErrorReason.Name(error.reason) == f"ERROR_REASON_{reason}"
        assert error.metadata["field"] == path


def test_large_decide_is_refused_by_its_size(wire: Wire, world: World) -> None:
    large = {"candidateActions": ["x" * 300_000]}
    check(wire.ask("Decide", request("Decide", world, **large)), LIMIT, "request")
    check(wire.ask("StreamDecide", request("StreamDecide", world, request=decide(world) | large)), LIMIT, "request")


def test_request_id_twice_in_a_batch_is_refused_alone(wire: Wire, world: World) -> None:
    twice = [decide(world) | {"requestId": "twice"}] * 2
    good, bad = results(wire, request("BatchDecide", world, requests=twice))
    assert good.decision.decision_id
    assert (bad.error.reason, bad.error.metadata["field"]) == (ErrorReason.ERROR_REASON_FIELD_INVALID, "request_id")


def decide(world: World) -> dict[str, Any]:
    return valid("Decide", world)


def streamed(wire: Wire, world: World, **changes: Any) -> Any:
    """Return the error of a request in a stream."""
    reply = wire.ask("StreamDecide", request("StreamDecide", world, request=decide(world) | changes))
    assert isinstance(reply, Message), reply
    return reply.error  # type: ignore[attr-defined]  # a StreamDecideResponse has one


@cases(OUTCOME)
def test_bad_outcome_refuses_the_decide_it_is_reported_with(
    wire: Wire, world: World, case: tuple[str, Changes, str, str]
) -> None:
    name, changes, reason, path = case
    outcomes = [outcome(world, outcomeId=f"with {name}"), outcome(world, **changes(world))]
    check(wire.ask("Decide", request("Decide", world, outcomes=outcomes)), reason, f"outcomes[1].{path}")
    accepted = wire.ask("ReportOutcome", request("ReportOutcome", world, outcomeId=f"with {name}"))
    assert isinstance(accepted, Message)
    assert not accepted.duplicate, "the good one beside it was not recorded"  # type: ignore[attr-defined]


@cases(OUTCOME)
def test_bad_outcome_is_refused_alone_in_a_batch_and_in_a_stream(
    wire: Wire, world: World, case: tuple[str, Changes, str, str]
) -> None:
    _, changes, reason, path = case
    check(wire.ask("ReportOutcome", request("ReportOutcome", world, **changes(world))), reason, path)
    items = [outcome(world, outcomeId=f"beside {case[0]}"), outcome(world, **changes(world))]
    good, bad = results(wire, request("BatchReportOutcomes", world, outcomes=items))
    assert good.accepted.lsn
    assert ErrorReason.Name(bad.error.reason) == f"ERROR_REASON_{reason}"
    parts = [request("StreamReportOutcomes", world, outcome=each).SerializeToString() for each in (*items, items[0])]
    replies, refusal = wire.exchange("StreamReportOutcomes", parts)
    assert refusal is None
    before, streamed_bad, behind = map(StreamReportOutcomesResponse.FromString, replies)
    assert before.accepted.lsn == behind.accepted.lsn == good.accepted.lsn
    assert streamed_bad.error == bad.error


def test_outcome_of_an_action_that_was_not_chosen_is_refused(wire: Wire, world: World) -> None:
    other = "action_1" if world.action == "action_0" else "action_0"
    check(wire.ask("ReportOutcome", request("ReportOutcome", world, action=other)), "ACTION_NOT_IN_DECISION", "action")


@cases(RECORD)
def test_bad_record_is_refused_alone(wire: Wire, world: World, case: tuple[str, dict[str, Any], str, str]) -> None:
    name, changes, reason, path = case
    records = [source(recordId=f"beside {name}"), source(recordId=f"bad {name}") | changes]
    for method in ("IngestRecords", "StreamIngestRecords"):
        good, bad = results(wire, request(method, world, records=records))
        assert good.accepted.lsn
        assert ErrorReason.Name(bad.error.reason) == f"ERROR_REASON_{reason}", bad
        assert path == "" or path == bad.error.metadata["field"]


def test_record_that_names_too_many_says_how_many_there_may_be(wire: Wire, world: World) -> None:
    (refused,) = results(
        wire, request("IngestRecords", world, records=[source(recordId="shared", identities=[SHARED])])
    )
    assert refused.error.metadata["limit"] == str(N_SHARING - 1)


def test_record_id_of_another_record_is_refused_alone(wire: Wire, world: World) -> None:
    first = source(recordId="first of two")
    results(wire, request("IngestRecords", world, records=[first]))
    same, other = results(wire, request("IngestRecords", world, records=[first, first | {"event": None}]))
    assert same.accepted.duplicate
    assert ErrorReason.Name(other.error.reason) == f"ERROR_REASON_{REUSED}"


@cases([*READS, *WRITES])
def test_bad_read_or_write_is_refused(wire: Wire, world: World, case: tuple[str, str, Changes, str, str]) -> None:
    _, method, changes, reason, path = case
    check(wire.ask(method, request(method, world, **changes(world))), reason, path)


NO_MESSAGE: Final = {
    "no tag": b"\xff\xff\xff\xff",
    "cut short": b"\x0a\x05ab",
    "field zero": b"\x00",
    "10,000 groups deep": b"\x0b" * 10_000,
    "text that is none": b"\x0a\x02\xff\xfe",  # in the first field, where that is text
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_bytes_that_are_no_message_are_refused(wire: Wire, method: str) -> None:
    has_text = METHODS[method].input_type.fields_by_number[1].type == FieldDescriptor.TYPE_STRING
    for name, data in NO_MESSAGE.items():
        if has_text or name != "text that is none":
            check(wire.send(method, [data]), "REQUEST_MALFORMED", "")


def repeated_fields() -> list[tuple[str, str, str, int]]:
    """Walk a valid request of every method: method, path in it, path that the refusal names, stated maximum."""
    maxima = stated_maxima()
    found: list[tuple[str, str, str, int]] = []

    def walk(method: str, message: Message, path: str, named: str) -> None:
        for field in message.DESCRIPTOR.fields:
            below = f"{path}.{field.name}".lstrip(".")
            below_named = f"{named}.{field.name}".lstrip(".")
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            if field.is_repeated:
                maximum = maxima[field.full_name]
                assert maximum is not None, f"{field.full_name} states no maximum"
                found.append((method, below, below_named, maximum))
            entries = getattr(message, field.name) if field.is_repeated else None
            if is_map or (field.is_repeated and not entries):
                continue
            if field.message_type is not None and field.message_type.file.package == "tsugi.v1":
                inner = entries[0] if entries is not None else getattr(message, field.name)
                # Items of a batch and of a stream are refused alone, by their own paths.
                is_item = entries is not None or method in ITEM_STREAMS
                walk(method, inner, f"{below}[0]" if entries is not None else below, "" if is_item else below_named)

    for method in ASKED:
        walk(method, request(method, World("x", "x", 0, "x")), "", "")
    return found


@pytest.mark.parametrize("case", repeated_fields(), ids=lambda case: f"{case[0]} {case[1]}")
def test_one_more_than_a_stated_maximum_is_refused(wire: Wire, world: World, case: tuple[str, str, str, int]) -> None:
    method, path, named, maximum = case
    message = request(method, world)
    overfill(message, path, maximum + 1)
    answer = wire.ask(method, message)
    if "[0]" in path or method in ITEM_STREAMS:
        assert isinstance(answer, Message)
        result: Any = answer if method in ITEM_STREAMS else answer.results[0]  # type: ignore[attr-defined]
        error = result.error
        assert error.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
        assert error.metadata["field"] == named
        assert error.metadata["limit"] == str(maximum)
    else:
        check(answer, LIMIT, named)


def overfill(message: Any, path: str, n: int) -> None:
    """Make the repeated field at a path hold n entries."""
    *way, last = path.replace("[0]", "").split(".")
    for name in way:
        inner = getattr(message, name)
        message = inner[0] if message.DESCRIPTOR.fields_by_name[name].is_repeated else inner
    entries = getattr(message, last)
    field = message.DESCRIPTOR.fields_by_name[last]
    if field.message_type is None:
        entries.extend([f"x{i}" for i in range(n - len(entries))])
    elif field.message_type.GetOptions().map_entry:
        for i in range(n - len(entries)):
            entries[f"x{i}"].number_value = 1.0
    else:
        entries.extend([entries[0]] * (n - len(entries)))


def results(wire: Wire, batch: Message) -> Any:
    reply = wire.ask(type(batch).__name__.removesuffix("Request"), batch)
    assert isinstance(reply, Message), reply
    return reply.results  # type: ignore[attr-defined]  # both batches have them


def test_everything_needs_a_catalog_first(tmp_path_factory: pytest.TempPathFactory, world: World) -> None:
    without = {"ListCatalogRevisions", "ListModelRevisions", "ListLearners", "ListMatchReviews"}
    others = {
        "RollbackCatalog": "NO_PREVIOUS_REVISION",
        "RollbackModel": "NO_PREVIOUS_REVISION",
        "GetErasure": NOT_FOUND,
        "GetDecision": "DECISION_ID_INVALID",  # of another installation
    }
    with serving(tmp_path_factory.mktemp("empty"), serve_workers=1) as server, Wire(server.address) as wire:
        for method in ASKED:
            answer = wire.ask(method, request(method, world))
            if method in without:
                assert isinstance(answer, Message)
            else:
                check(answer, others.get(method, "CATALOG_MISSING"), "")


def test_what_grpc_itself_refuses_keeps_its_own_codes(wire: Wire, world: World) -> None:
    decide = request("Decide", world).SerializeToString()
    too_large = wire.send("IngestRecords", [bytes(4 * 1024 * 1024 + 1)])
    much_metadata = wire.send("Decide", [decide], metadata=[("x-notes", "x" * 20_000)])
    bomb = wire.send("IngestRecords", [bytes(100_000_000)], compression=grpc.Compression.Gzip)
    unknown: grpc.UnaryUnaryMultiCallable[bytes, bytes] = wire.channel.unary_unary("/tsugi.v1.DecisionService/Guess")
    with pytest.raises(grpc.RpcError) as refusal:
        unknown(decide, timeout=10)
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for answer, codes in (
        (too_large, {"RESOURCE_EXHAUSTED"}),
        (much_metadata, {"RESOURCE_EXHAUSTED"}),
        (bomb, {"RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}),
    ):
        assert isinstance(answer, Refusal)
        assert answer.code.name in codes
        assert answer.domain == ""


def test_every_method_is_walked() -> None:
    batches = {"BatchDecide", "BatchReportOutcomes", "IngestRecords", "StreamIngestRecords"} | ITEM_STREAMS
    no_field_can_be_wrong = {"AuditSources", "CountPeople"}
    walked = {case[1] for case in (*READS, *WRITES)} | {"Decide", "ReportOutcome"} | batches | no_field_can_be_wrong
    assert walked == set(ASKED)


def test_every_reason_that_may_be_raised_is_met_by_a_test() -> None:
    """Read in the tests themselves: each reason stands in some, and not only in the table of all of them."""
    folder = Path(__file__).parents[1]
    files = [*folder.rglob("test_*.py"), *(folder / "support").glob("*.py")]
    texts = [path.read_text() for path in files if path.name != "test_status.py"]
    words = {word.removeprefix("ERROR_REASON_") for text in texts for word in re.findall(r"[A-Z_]{5,}", text)}
    names = {name for name in ErrorReason.DESCRIPTOR.values_by_name if ErrorReason.Value(name)}
    assert {name.removeprefix("ERROR_REASON_") for name in names - set(UNRAISED)} - words == set()
