"""What a reported rejection takes out of a decision before the projector knows of it."""

from __future__ import annotations

from typing import Any

import pytest

from server.catalog.catalog import Catalog
from server.decisioning.rejections import rejected_rows, silenced_targets
from tests.support.catalogs import compiled
from tsugi.requests import outcome
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest

NOW_US = 1_760_000_000_000_000
HOUR_US = 3_600_000_000


def catalog(**cool_off: Any) -> Catalog:
    policy = {key: cool_off.pop(key) for key in ("scope", "channels", "groups", "actions") if key in cool_off}
    return compiled(
        channels=[{"name": "web"}, {"name": "call"}],
        actionGroups=[{"name": "money"}],
        actions=[
            {"name": name, "group": group, "treatments": [{"name": "only", "channel": "web"}]}
            for name, group in (("loan", "money"), ("card", "money"), ("weather", ""))
        ],
        contactPolicies=[
            {"name": "no", "coolOff": {"outcomeTypes": ["dismiss"], "span": "3600s"} | cool_off} | policy,
            {"name": "cap", "scope": "CONTACT_SCOPE_EACH_ACTION", "cap": {"countMax": 1, "span": "3600s"}},
        ],
    )


def said(action: str, type_: str = "dismiss", occurred_us: int = 0) -> list[ReportOutcomeRequest]:
    report = outcome("d", action, "o", type_)
    if occurred_us:
        report.occurrence_time.FromMicroseconds(occurred_us)
    return [report]


def silenced(known: Catalog, outcomes: list[ReportOutcomeRequest]) -> list[str]:
    names = known.profiles.contacts.target_names
    return [names[target] for target, _ in silenced_targets(outcomes, known, NOW_US)]


def test_rejected_action_is_out_and_no_other() -> None:
    known = catalog(scope="CONTACT_SCOPE_EACH_GROUP")
    assert rejected_rows(said("loan"), known) == [known.actions.rows["loan"]]


def test_outcome_that_no_cool_off_names_takes_nothing_out() -> None:
    known = catalog(scope="CONTACT_SCOPE_EACH_GROUP")
    assert rejected_rows(said("loan", "click"), known) == []
    assert silenced(known, said("loan", "click")) == []


def test_action_that_the_catalog_knows_no_more_takes_nothing_out() -> None:
    known = catalog(scope="CONTACT_SCOPE_EACH_GROUP")
    assert rejected_rows(said("former"), known) == []
    assert silenced(known, said("former")) == []


@pytest.mark.parametrize(
    ("policy", "targets"),
    [
        ({"scope": "CONTACT_SCOPE_EACH_GROUP"}, ["no: money"]),
        ({"scope": "CONTACT_SCOPE_EACH_ACTION"}, ["no: loan"]),
        ({}, ["no"]),
        ({"scope": "CONTACT_SCOPE_EACH_CHANNEL"}, []),
        ({"scope": "CONTACT_SCOPE_EACH_GROUP", "channels": ["web"]}, []),
        ({"scope": "CONTACT_SCOPE_EACH_GROUP", "count": 2, "within": "3600s"}, []),
        ({"actions": ["card"]}, []),
    ],
)
def test_what_is_certain_without_history_is_silenced_at_once(policy: dict[str, Any], targets: list[str]) -> None:
    known = catalog(**policy)
    assert silenced(known, said("loan")) == targets
    assert rejected_rows(said("loan"), known) == [known.actions.rows["loan"]]


def test_rejection_of_long_ago_silences_nothing_any_more() -> None:
    known = catalog(scope="CONTACT_SCOPE_EACH_GROUP")
    assert silenced(known, said("loan", occurred_us=NOW_US - HOUR_US + 1)) == ["no: money"]
    assert silenced(known, said("loan", occurred_us=NOW_US - HOUR_US)) == []
