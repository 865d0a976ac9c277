"""The README's chapter on the policy language: its fragments are one catalog, and it decides as the chapter says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from ruamel.yaml import YAML

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from tests.support.deciding import Answer, Desk, given_champion
from tests.support.populating import Person
from tsugi.requests import consent, decide_request
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_pb2 import Consent

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "README.md").read_text().split("## The policy language by example\n")[1].split("\n## ")[0]
ELSEWHERE: dict[str, Any] = {  # what the chapter takes for granted
    "outcomeTypes": [{"name": "click"}, {"name": "dismiss"}],
    "eventTypes": [
        {"name": each, "properties": [{"name": "ticket", "type": "ATTRIBUTE_TYPE_TEXT"}]}
        for each in ("complaint", "solved")
    ],
    "windows": [
        {"name": "open_complaints", "kind": "WINDOW_KIND_OPEN", "eventType": "complaint", "property": "ticket",
         "closingEventType": "solved", "span": "2592000s"}
    ],
}  # fmt: skip


NOON_US = 43_200_000_000  # of the first day


def yaml(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return parsed


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    parts = yaml((ROOT / "tests/golden/fragments/retail.yaml").read_text()) | ELSEWHERE
    blocks = re.findall(r"^```yaml\n(.*?)^```", CHAPTER, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        parts |= yaml(block)
    return compile_catalog(json_format.ParseDict(parts, catalog_pb2.Catalog()))


def ask(
    catalog: Catalog,
    age: float,
    tier: str,
    basket: float,
    consents: tuple[Consent, ...] = (),
    *,
    number: str = "1",
    spent: int = 0,
) -> Answer:
    desk = Desk(catalog, champion=given_champion(catalog, {"travel_cover": 0.5, "voucher": 0.2}, "click"))
    desk.meet(Person({"age": age, "tier": tier}, {"customer_number": number}, consents))
    desk.spend("vouchers", spent, NOON_US)
    request = decide_request(
        {"home": 3, "agent": 1}, identities=[("customer_number", number)], context={"basket_total": basket}
    )
    return desk.ask(request, NOON_US)


def told(answer: Answer) -> list[str]:
    return [slot.action for slot in answer.reply.slots if slot.action]


def test_companion_comes_after_what_it_requires_and_consent_opens_the_telephone(catalog: Catalog) -> None:
    answer = ask(catalog, 34, "gold", 30.0)
    assert told(answer) == ["voucher", "travel_cover"], "the cover weighs more, and waits for the voucher"
    allowed = ask(catalog, 34, "gold", 30.0, (consent("marketing", granted=True),))
    assert [slot.action for slot in allowed.reply.slots][-1] == "", "the cover is told already"


@pytest.mark.parametrize(
    ("age", "tier", "basket", "reason"),
    [(16, "gold", 30.0, "NOT_ELIGIBLE"), (34, "gold", 10.0, "NOT_APPLICABLE"), (34, "bronze", 30.0, "NOT_SUITABLE")],
)
def test_each_layer_names_its_reason(catalog: Catalog, age: float, tier: str, basket: float, reason: str) -> None:
    answer = ask(catalog, age, tier, basket)
    assert answer.refused == {"travel_cover": f"REFUSAL_REASON_{reason}"}
    assert told(answer) == ["voucher"]


def test_value_follows_the_basket_and_the_tier(catalog: Catalog) -> None:
    slots = {slot.action: slot for slot in ask(catalog, 34, "gold", 30.0).reply.slots if slot.action}
    assert (slots["voucher"].value, slots["travel_cover"].value) == (3.0, 40.0)
    assert ask(catalog, 34, "silver", 30.0).reply.slots[1].value == 20.0


def test_paced_budget_is_half_released_at_noon(catalog: Catalog) -> None:
    assert told(ask(catalog, 34, "gold", 30.0, spent=499)) == ["voucher", "travel_cover"]
    answer = ask(catalog, 34, "gold", 30.0, spent=500)
    assert answer.refused["voucher"] == "REFUSAL_REASON_BUDGET_SPENT"
    assert told(answer) == [], "and what requires the voucher is not said either"


def test_people_are_in_the_branches_they_are_said_to_be_in(catalog: Catalog) -> None:
    answers = [ask(catalog, 34, "gold", 30.0, number=str(number)) for number in range(150)]
    held_out = [answer for answer in answers if answer.record.holdouts]
    assert 0 < len(held_out) < 25
    assert all(told(answer) == [] for answer in held_out)
    branches = {branch.name: 0 for branch in catalog.message.experiments[0].branches}
    for answer in answers:
        for assignment in answer.reply.assignments:
            branches[assignment.branch] += 1
        lever = 2.0 if any(each.branch == "loud" for each in answer.reply.assignments) else 1.0
        for slot in answer.reply.slots:
            if slot.action == "travel_cover":
                assert slot.priority == pytest.approx(0.5 * 40.0 * lever)
    assert all(0 < n < 40 for n in branches.values())
