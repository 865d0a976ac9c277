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


def yaml(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return parsed


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    parts = yaml((ROOT / "tests/golden/fragments/retail.yaml").read_text()) | ELSEWHERE
    blocks = re.findall(r"^```yaml\n(.*?)^```", CHAPTER, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        parts |= yaml(block)
    return compile_catalog(json_format.ParseDict(parts, catalog_pb2.Catalog()))


def ask(catalog: Catalog, age: float, tier: str, basket: float, consents: tuple[Consent, ...] = ()) -> Answer:
    desk = Desk(catalog, champion=given_champion(catalog, {"travel_cover": 0.5, "voucher": 0.2}, "click"))
    desk.meet(Person({"age": age, "tier": tier}, {"customer_number": "1"}, consents))
    request = decide_request(
        {"home": 3, "agent": 1}, identities=[("customer_number", "1")], context={"basket_total": basket}
    )
    return desk.ask(request)


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
