"""What a part keeps when it is full does not depend on what came first."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from server.profiles.parts import CLAIMS_MAX, CONSENTS_MAX
from tests.support.people import People, at, people_catalog
from tsugi.requests import consent, source_record
from tsugi.v1.profile_pb2 import ConsentDecision

ANNA = ("customer_number", "1")


def named(order: Iterable[int]) -> list[str]:
    people = People()
    for i in order:
        said = {"nickname": f"n{i}"}
        people.say(source_record(str(i), "crm", [ANNA], attributes=said, observation_time=at(-100 + i)))
    people.project()
    nickname = people.profile(*ANNA).attributes["nickname"]
    return [nickname.value.text_value, *(claim.value.text_value for claim in nickname.other_claims)]


def test_values_last_heard_of_are_kept_in_whatever_order_they_came() -> None:
    ages = range(CLAIMS_MAX + 1)
    assert sorted(named(ages)) == sorted(named(reversed(ages))) == sorted(f"n{i}" for i in ages[1:])


@pytest.mark.parametrize("comes_first", [True, False])
def test_withdrawal_that_stands_outlives_every_grant_in_a_full_ledger(comes_first: bool) -> None:
    purposes = [f"p{i}" for i in range(CONSENTS_MAX // 8 + 1)]
    channels = [f"c{i}" for i in range(8)]
    people = People(
        people_catalog(
            consentPurposes=[{"name": name} for name in purposes],
            channels=[{"name": "web"}, *({"name": name} for name in channels)],
        )
    )
    withdrawal = source_record(
        "old", "crm", [ANNA], consents=[consent("p0", granted=False, channel="c0", effective_time=at(-10_000))]
    )
    grants = [
        source_record(
            purpose, "crm", [ANNA],
            consents=[
                consent(purpose, granted=True, channel=channel, effective_time=at(-100))
                for channel in channels
                if (purpose, channel) != ("p0", "c0")
            ],
        )
        for purpose in purposes
    ]  # fmt: skip
    people.say(*([withdrawal, *grants] if comes_first else [*grants, withdrawal]))
    people.project()
    kept = people.profile(*ANNA).consents
    assert len(kept) == CONSENTS_MAX
    assert [each.consent.purpose for each in kept if each.consent.state == ConsentDecision.CONSENT_DECISION_WITHDRAWN]
