"""Every case in cases/: a catalog, a person, a request, given propensities, and the decision that follows from them.

``make golden`` rewrites what the cases want; the diff is the review.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from ruamel.yaml import YAML

from server.catalog.catalog import Catalog as CompiledCatalog
from server.catalog.compile import compile_catalog
from server.profiles import holds, repository
from tests.support.deciding import Answer, Desk, given_champion
from tests.support.populating import Person
from tsugi.log.v1.state_pb2 import StoredContact, StoredReaction, StoredTouch
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_pb2 import ChoiceReason, Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.profile_pb2 import Consent

FOLDER = Path(__file__).parent
REWRITE = bool(os.environ.get("TSUGI_REWRITE_GOLDEN"))


def case_paths() -> list[Path]:
    return sorted((FOLDER / "cases").glob("*.yaml"))


@pytest.mark.parametrize("path", case_paths(), ids=lambda path: path.stem)
def test_case_decides_as_wanted(path: Path) -> None:
    text = path.read_text()
    case = YAML(typ="safe", pure=True).load(text)
    got = plain(decide_case(case))
    if REWRITE:
        head = text[: text.index("\nwant:") + 1]
        path.write_text(head + dump({"want": got}))
    assert got == case["want"]


def decide_case(case: dict[str, Any]) -> Answer:
    parts = YAML(typ="safe", pure=True).load((FOLDER / case.get("catalog", "fragments/retail.yaml")).read_text())
    catalog = compile_catalog(json_format.ParseDict(parts | case.get("with", {}), Catalog()))
    desk = Desk(catalog, champion=given_champion(catalog, case.get("propensities", {}), "click"))
    now_us = instant_us(case.get("now", "2026-03-03T09:00:00Z"))
    if "profile" in case:
        consents = [json_format.ParseDict(each, Consent()) for each in case.get("consents", [])]
        contacts = told(case.get("told", []), catalog)
        desk.meet(Person(case["profile"], {"customer_number": "c-1"}, consents, contacts), now_us=now_us)
    for budget, spent in case.get("spent", {}).items():
        amount, at = (spent["amount"], instant_us(spent["at"])) if isinstance(spent, dict) else (spent, now_us)
        desk.spend(budget, amount, at)
    request = json_format.ParseDict(
        {"identities": [{"namespace": "customer_number", "value": "c-1"}]} | case["request"], DecideRequest()
    )
    return desk.ask(request, now_us, case["decision_id"])


def told(lines: list[dict[str, Any]], catalog: CompiledCatalog) -> list[StoredContact]:
    """Read what the person was told before: an action, when, on which channel, and what came of it."""
    contacts: dict[str, StoredContact] = {}
    for number, line in enumerate(lines, start=1):
        at_us = instant_us(line["at"])
        touch = StoredTouch(
            time_us=at_us, channel=line.get("channel", "web"), decision_lsn=number,
            ignored_us=at_us + catalog.goals[0].window_us,
        )  # fmt: skip
        contact = contacts.setdefault(line["action"], StoredContact(action=line["action"]))
        holds.add_touch(contact, touch)
        if "came" in line:
            reaction = StoredReaction(type=line["came"], time_us=at_us + 1_000_000, is_response=True)
            holds.add_reaction(contact, number, reaction)
    return list(contacts.values())


def instant_us(text: str | datetime) -> int:
    instant = text if isinstance(text, datetime) else datetime.fromisoformat(text)
    assert instant.tzinfo is not None, "cases state the zone of now"
    return int(instant.timestamp() * 1e6)


def plain(answer: Answer) -> dict[str, Any]:
    """Say a decision in the words of a case; a slot reads as one line."""
    slots = []
    for slot in answer.reply.slots:
        entry: dict[str, Any] = {"placement": slot.placement, "position": slot.position}
        if slot.action:
            entry |= {
                "action": slot.action,
                "treatment": slot.treatment,
                "priority": round(slot.priority, 6),
                "selection_probability": round(slot.selection_probability, 6),
            }
        entry["reasons"] = [ChoiceReason.Name(reason).removeprefix("CHOICE_REASON_") for reason in slot.reasons]
        slots.append(entry)
    said: dict[str, Any] = {"slots": slots}
    if answer.refused:
        said["refused"] = {
            action: reason.removeprefix("REFUSAL_REASON_") for action, reason in sorted(answer.refused.items())
        }
    if answer.reply.assignments:
        said["assignments"] = {each.experiment: each.branch for each in answer.reply.assignments}
    degraded = [Degradation.Name(number).removeprefix("DEGRADATION_") for number in answer.reply.degradations]
    if degraded:
        said["degradations"] = degraded
    return said


def dump(want: dict[str, Any]) -> str:
    lines = ["want:", "  slots:"]
    lines += [f"    - {flow(slot)}" for slot in want["want"]["slots"]]
    for name in ("refused", "assignments", "degradations"):
        if name in want["want"]:
            lines.append(f"  {name}: {flow(want['want'][name])}")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return str(value)


def test_there_are_cases() -> None:
    assert len(case_paths()) >= 12, "a folder that was not found must not pass"


def test_every_case_says_in_english_what_it_shows() -> None:
    for path in case_paths():
        assert path.read_text().startswith("# "), f"{path.name} does not begin with a sentence"


def test_facts_of_a_person_are_those_of_the_repository() -> None:
    catalog = compile_catalog(
        json_format.ParseDict(
            YAML(typ="safe", pure=True).load((FOLDER / "fragments/retail.yaml").read_text()), Catalog()
        )
    )
    desk = Desk(catalog)
    key = desk.meet(Person({"age": 30.0, "tier": "gold"}, {}))
    with desk.store.read() as snapshot:
        stored = repository.load(snapshot, key)
    assert stored is not None
    assert (stored.facts[0], stored.facts[2]) == (30.0, 2.0)
