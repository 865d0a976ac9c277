"""Records that were accepted while the catalog had a name, and come to be projected when it has it no more."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from server.catalog.catalog import Catalog
from server.outcomes.projector import Projector, state_hash
from server.storage.memory import MemoryStore
from tests.support.catalogs import compiled
from tests.support.histories import SECOND_US, decision_key
from tests.support.people import CATALOG, People, at
from tsugi.log.v1.record_pb2 import DecisionRecord, OutcomeRecord, RecordKind, SlotRecord
from tsugi.requests import PyValue, consent, decide_request, event, money, source_record

WHOLE: dict[str, Any] = MessageToDict(CATALOG.message)
DERIVED = ("windows", "recencyFrequencyMonetary", "segments")  # what follows from the rest
GROUPS = (
    "sources", "profileAttributes", "eventTypes", "identityNamespaces", "consentPurposes", "outcomeTypes", "goals",
    "channels", "placements", "actions", *DERIVED,
)  # fmt: skip
NAMES = [(group, each["name"]) for group in GROUPS for each in WHOLE[group]]


def without(group: str, name: str) -> Catalog:
    """Compile the catalog without one name; what follows from it goes too, and what needs one gets another."""
    left = {each: [one for one in WHOLE[each] if (each, one["name"]) != (group, name)] for each in GROUPS}
    if group in {"profileAttributes", "eventTypes", "outcomeTypes", *DERIVED}:
        left |= {"windows": [], "recencyFrequencyMonetary": [], "segments": [], "journey": []}
    if group == "profileAttributes":
        left["sources"] = [{**each, "attributes": []} for each in left["sources"]]
    if group == "outcomeTypes":
        kept = [[one for one in goal["outcomes"] if one["type"] != name] for goal in left["goals"]]
        left["goals"] = [{**goal, "outcomes": outcomes} for goal, outcomes in zip(left["goals"], kept, strict=True)]
    if group == "goals":
        left["goals"] = [{**WHOLE["goals"][0], "name": "other"}]
        left["placements"] = [{**each, "goal": "other"} for each in left["placements"]]
    if group == "consentPurposes":
        left["placements"] = [{**each, "purpose": left["consentPurposes"][0]["name"]} for each in left["placements"]]
    if group == "channels":
        left["sources"] = [{**each, "channel": ""} for each in left["sources"]]
        left["placements"] = [{**each, "channel": left["channels"][0]["name"]} for each in left["placements"]]
        treatments = [{"name": "only", "channel": left["channels"][0]["name"]}]
        left["actions"] = [{**each, "treatments": treatments} for each in left["actions"]]
    journey = None if "journey" in left else WHOLE["journey"]
    return compiled(**(left | {"journey": journey}))


def tell(people: People, name: str) -> None:
    """Record everything there is to record, of three people."""
    history = people.history
    for number, source in enumerate(("crm", "shop", "bought", "shop")):
        one = [("customer_number", str(number % 3)), ("email", f"p{number % 3}@shop.example")]
        beside = [("browser_id", "b"), ("family_account", "f"), ("order_number", name)]
        said: dict[str, PyValue] = {
            "age": 30.0 + number, "tier": "gold", "nickname": name, "city": "Berlin", "spend": money(number, "EUR"),
            "tags": {"a"}, "mood": name, "phone": f"+49 30 12345{number}",
        }  # fmt: skip
        for kind in ("view", "purchase", "complaint", "solved"):
            happened = event(kind, {"total": 5.0, "item": "ski", "ticket": "t"}, occurrence_time=at(-number))
            consents = [consent("marketing", granted=False, channel="web"), consent("service", granted=True)]
            people.say(
                source_record(
                    f"{name} {number} {kind}", source, [*one, *beside], attributes=said, event=happened,
                    consents=consents,
                )
            )  # fmt: skip
        history.now_us += SECOND_US
    request = decide_request([("greedy", 1), ("mail", 1)], identities=[("customer_number", "1")])
    slots = [SlotRecord(action="action_0"), SlotRecord(action="action_1", placement_index=1, on_impression=True)]
    key = decision_key(len(name))
    decision = DecisionRecord(decision_key=key, request=request.SerializeToString(), now_us=history.now_us, slots=slots)
    history.record(RecordKind.RECORD_KIND_DECISION, decision, key)
    for action, kind in (("action_0", "click"), ("action_1", "order")):
        outcome = OutcomeRecord(decision_key=key, action=action, type=kind, occurrence_time_us=history.now_us)
        history.record(RecordKind.RECORD_KIND_OUTCOME, outcome)
    history.link(("customer_number", "0"), ("email", "p2@shop.example"))
    history.link(("customer_number", "0"), ("customer_number", "1"), "PROPOSED", weight=8.0)
    history.split([("customer_number", "0")], [("email", "p0@shop.example")])


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_what_a_record_names_may_be_gone_when_it_is_projected(group: str, name: str) -> None:
    lacking = without(group, name)
    people = People(CATALOG, lacking)
    tell(people, "a")
    people.history.put_in_force(lacking)
    tell(people, "ab")
    people.history.now_us += 3_600 * SECOND_US
    people.history.tick()
    people.history.forget(b"e" * 16, [("customer_number", "1")])
    people.history.put_in_force(CATALOG)
    tell(people, "abc")
    people.project()
    assert people.projector.applied.lsn == people.log.tail().lsn
    again = MemoryStore()
    projector = Projector(people.log, again, {each.sha256: each for each in (CATALOG, lacking)}.__getitem__)
    for record in people.log.read(1, 1_000):
        projector.apply([record])
    assert state_hash(again) == state_hash(people.store)
