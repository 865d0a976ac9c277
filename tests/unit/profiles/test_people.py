"""What becomes of people: stitching, merging, splitting, forgetting, told as short stories over the real projector."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from server.profiles import describe, repository
from server.profiles.identity import identity_key
from server.storage.store import Table
from tests.support.histories import SECOND_US, START_US, decision_key
from tests.support.people import People, at, people_catalog
from tsugi.log.v1.record_pb2 import DecisionRecord, ErasureAccepted, OutcomeRecord, RecordKind, SlotRecord
from tsugi.log.v1.state_pb2 import StoredErasure
from tsugi.requests import PyValue, consent, decide_request, event, source_record
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import ConsentDecision, Event, Touchpoint
from tsugi.v1.value_pb2 import Money

ANNA, BERTA = ("customer_number", "1"), ("customer_number", "2")
EMAIL = ("email", "anna@shop.example")
LAPTOP, KIOSK = ("browser_id", "laptop"), ("browser_id", "kiosk")
DAY_US = 86_400 * SECOND_US


def view(seconds: float = 0.0) -> Event:
    return event("view", occurrence_time=at(seconds))


def purchase(total: float, seconds: float, item: str = "shoe") -> Event:
    return event("purchase", {"total": total, "item": item}, occurrence_time=at(seconds))


def test_nameless_history_is_the_persons_own_from_the_log_in_on() -> None:
    people = People()
    people.say(
        source_record("1", "shop", [LAPTOP], event=purchase(60.0, -30)),
        source_record("2", "shop", [LAPTOP, ANNA], attributes={"tier": "gold"}),
    )
    people.project()
    assert people.profile(*ANNA).windows["spent_day"].number_value == 60.0
    assert people.key_of(*LAPTOP) == people.key_of(*ANNA)


def test_profile_of_a_merge_has_the_oldest_id_and_the_other_leads_there() -> None:
    people = People()
    people.say(source_record("1", "shop", [EMAIL]), source_record("2", "crm", [ANNA]))
    people.project()
    email_id, anna_id = people.profile(*EMAIL).profile_id, people.profile(*ANNA).profile_id
    people.say(source_record("3", "crm", [ANNA, EMAIL]))
    people.project()
    merged = people.profile(*ANNA)
    assert merged.profile_id == email_id != anna_id
    assert list(merged.former_profile_ids) == [anna_id]
    with people.store.read() as snapshot:
        assert repository.present_key(snapshot, bytes.fromhex(anna_id)) == bytes.fromhex(email_id)


def test_device_goes_back_to_nobody_when_a_second_person_is_known_on_it() -> None:
    people = People()
    people.say(
        source_record("1", "shop", [KIOSK], event=purchase(60.0, -30)),
        source_record("2", "shop", [KIOSK, ANNA]),
        source_record("3", "shop", [KIOSK, BERTA]),
    )
    people.project()
    assert len({people.key_of(*one) for one in (KIOSK, ANNA, BERTA)}) == 3
    assert people.profile(*ANNA).windows["spent_day"].number_value == 0.0
    assert people.profile(*KIOSK).windows["spent_day"].number_value == 60.0


def test_device_stays_with_a_person_of_two_numbers() -> None:
    people = People()
    people.say(
        source_record("1", "shop", [KIOSK, ANNA]),
        source_record("2", "shop", [KIOSK, BERTA]),
        source_record("3", "crm", [ANNA, BERTA]),
    )
    people.project()
    assert len({people.key_of(*one) for one in (KIOSK, ANNA, BERTA)}) == 1


def test_email_of_a_whole_town_joins_nobody() -> None:
    people = People()
    people.say(*(source_record(f"{i}", "crm", [("customer_number", str(i)), EMAIL]) for i in range(200)))
    people.project()
    assert {len(group) for group in people.groups()} == {1}
    node = people.nodes()[identity_key(Identity(namespace=EMAIL[0], value=EMAIL[1]))]
    assert node.too_shared
    assert len(node.edges) == 200, "who else it stands beside is noted: each of them counts it"
    assert people.key_of(*EMAIL) is None


def test_family_account_is_on_every_profile_and_joins_none() -> None:
    people = People()
    account = ("family_account", "f")
    people.say(source_record("1", "crm", [ANNA, account]), source_record("2", "crm", [BERTA, account]))
    people.project()
    assert people.key_of(*ANNA) != people.key_of(*BERTA)
    for one in (ANNA, BERTA):
        assert account in [(each.namespace, each.value) for each in people.profile(*one).identities]


def test_order_number_stays_with_its_record() -> None:
    people = People()
    order = ("order_number", "o")
    people.say(source_record("1", "crm", [ANNA, order]), source_record("2", "crm", [BERTA, order]))
    people.project()
    assert people.key_of(*ANNA) != people.key_of(*BERTA)
    assert people.key_of(*order) is None


def test_addresses_are_compared_clean_and_what_is_none_joins_nobody() -> None:
    people = People()
    people.say(
        source_record("1", "crm", [ANNA, ("email", " Anna@Shop.Example ")]),
        source_record("2", "shop", [EMAIL], attributes={"tier": "gold"}),
        source_record("3", "crm", [ANNA, ("email", "none")]),
        source_record("4", "crm", [BERTA, ("email", "none")]),
    )
    people.project()
    assert people.profile(*ANNA).attributes["tier"].value.text_value == "gold"
    assert people.key_of(*ANNA) != people.key_of(*BERTA)


def test_more_values_than_one_person_may_have_keep_people_apart() -> None:
    people = People(people_catalog(identityNamespaces=[
        {"name": "customer_number", "valuesPerProfileMax": 1},
        {"name": "email", "meaning": "MEANING_EMAIL"},
    ]))  # fmt: skip
    people.say(source_record("1", "crm", [ANNA, EMAIL]), source_record("2", "crm", [BERTA, EMAIL]))
    people.project()
    assert people.key_of(*ANNA) != people.key_of(*BERTA)
    assert people.key_of(*EMAIL) in {people.key_of(*ANNA), people.key_of(*BERTA)}


def test_split_keeps_people_apart_until_somebody_says_they_are_one() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA, EMAIL], attributes={"age": 30.0}),
               source_record("2", "shop", [EMAIL], event=purchase(60.0, -5)))  # fmt: skip
    people.project()
    people.history.split([EMAIL], [ANNA])
    people.say(source_record("3", "crm", [ANNA, EMAIL]))
    people.project()
    assert people.key_of(*ANNA) != people.key_of(*EMAIL)
    assert people.profile(*ANNA).windows["spent_day"].number_value == 0.0
    people.history.link(ANNA, EMAIL)
    people.project()
    assert people.profile(*EMAIL).windows["spent_day"].number_value == 60.0
    assert people.profile(*EMAIL).attributes["age"].value.number_value == 30.0
    people.history.link(ANNA, EMAIL, "DIFFERENT")
    people.project()
    assert people.key_of(*ANNA) != people.key_of(*EMAIL)


def test_links_in_a_circle_are_one_person() -> None:
    people = People()
    third = ("email", "c@shop.example")
    people.say(*(source_record(f"{i}", "crm", [one]) for i, one in enumerate((ANNA, EMAIL, third))))
    people.history.link(ANNA, EMAIL)
    people.history.link(EMAIL, third)
    people.history.link(third, ANNA)
    people.project()
    assert len(people.groups()) == 1
    assert [each.source for each in people.profile(*ANNA).links] == ["test"] * 3


def test_link_to_somebody_unknown_is_set_aside() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA]))
    people.history.link(ANNA, BERTA)
    people.project()
    with people.store.read() as snapshot:
        assert [why for _, why in snapshot.scan(Table.QUARANTINE)] == [b"an identity of the link is not known"]


def test_latest_consent_stands_and_of_two_at_once_the_withdrawal() -> None:
    people = People()
    for granted, seconds, record_id in ((True, -5, "1"), (False, -5, "2"), (True, -9, "3")):
        said = consent("marketing", granted=granted, effective_time=at(seconds))
        people.say(source_record(record_id, "crm", [ANNA], consents=[said]))
    people.say(source_record("4", "shop", [ANNA], consents=[consent("service", granted=True, channel="web")]))
    people.project()
    states = {(each.consent.purpose, each.consent.channel): each for each in people.profile(*ANNA).consents}
    assert states["marketing", ""].consent.state == ConsentDecision.CONSENT_DECISION_WITHDRAWN
    assert states["marketing", ""].lsn == 3
    assert states["service", "web"].source == "shop"


def test_every_rule_of_survivorship_chooses_and_shows_who_lost() -> None:
    people = People()
    told: list[tuple[str, int, dict[str, PyValue]]] = [
        ("crm", -9, {"age": 40.0, "nickname": "Al", "city": "Berlin", "tier": "silver", "tags": {"a"}}),
        ("shop", -5, {"age": 41.0, "nickname": "Alexandra", "city": "Köln", "tier": "gold", "tags": {"b"}}),
        ("shop", -4, {"city": "Berlin"}),
    ]
    for i, (source, seconds, stated) in enumerate(told):
        people.say(source_record(f"{i}", source, [ANNA], attributes=stated, observation_time=at(seconds)))
    people.project()
    attributes = people.profile(*ANNA).attributes
    assert attributes["age"].value.number_value == 40.0, "the more trusted source"
    assert (attributes["age"].other_claims[0].source, attributes["age"].other_claims[0].value.number_value) == (
        "shop",
        41.0,
    )
    assert attributes["nickname"].value.text_value == "Alexandra", "the longest"
    assert attributes["city"].value.text_value == "Berlin", "the most frequent"
    assert attributes["tier"].value.text_value == "gold", "the most recent"
    assert list(attributes["tags"].value.set_value.values) == ["a", "b"], "all of them"


def test_texts_are_cleansed_with_the_raw_one_beside_and_what_cannot_be_is_flagged() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA], attributes={"city": "  BERLIN "}))
    people.say(source_record("2", "crm", [ANNA], attributes={"phone": "call me"}))
    people.project()
    attributes = people.profile(*ANNA).attributes
    assert (attributes["city"].value.text_value, attributes["city"].raw_text) == ("Berlin", "  BERLIN ")
    assert attributes["phone"].uncleansed


def test_attribute_is_forgotten_when_its_time_is_over() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA], attributes={"mood": "fine"}))
    people.project()
    assert "mood" in people.profile(*ANNA).attributes
    people.project(START_US + 3_600 * SECOND_US)
    assert "mood" not in people.profile(*ANNA).attributes
    with people.store.read() as snapshot:
        assert all(b"fine" not in value for _, value in snapshot.scan(Table.PARTS))


def test_events_are_forgotten_after_their_retention() -> None:
    people = People()
    people.say(source_record("1", "shop", [ANNA], event=purchase(60.0, -5, "umbrella")))
    people.project(START_US + 399 * DAY_US)
    assert len(timeline(people, ANNA)) >= 1
    people.project(START_US + 402 * DAY_US)
    assert not [each for each in timeline(people, ANNA) if each.HasField("event")]
    with people.store.read() as snapshot:
        assert all(b"umbrella" not in value for table in Table for _, value in snapshot.scan(table))


def timeline(people: People, one: tuple[str, str]) -> list[Touchpoint]:
    key = people.key_of(*one)
    assert key is not None
    with people.store.read() as snapshot:
        return describe.timeline(snapshot, repository.members(snapshot, key), 100).touchpoints


def test_segments_are_entered_by_what_happens_and_left_by_the_passing_of_time() -> None:
    people = People()
    people.say(source_record("1", "shop", [ANNA], event=purchase(150.0, 0)))
    people.project(START_US + SECOND_US)
    assert {each.segment for each in people.profile(*ANNA).segments} == {"spender", "just_bought"}
    people.project(START_US + 601 * SECOND_US)
    assert {each.segment for each in people.profile(*ANNA).segments} == {"spender"}
    people.project(START_US + 2 * DAY_US)
    changes = [
        (each.segment_change.segment, each.segment_change.entered)
        for each in timeline(people, ANNA)
        if each.HasField("segment_change")
    ]
    assert changes == [("spender", False), ("just_bought", False), ("just_bought", True), ("spender", True)]


def test_journey_follows_touchpoints_in_the_order_they_happened_not_in_which_they_came() -> None:
    people = People()
    people.say(source_record("1", "shop", [ANNA], event=purchase(10.0, -10)))
    people.say(source_record("2", "crm", [ANNA], event=event("complaint", {"ticket": "t"}, occurrence_time=at(-20))))
    people.project()
    assert people.profile(*ANNA).journey_stage == "acquisition"
    assert [each.stage_change.to_stage for each in timeline(people, ANNA) if each.HasField("stage_change")] == [
        "acquisition"
    ]


def test_open_complaint_is_shown_until_it_is_solved() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA], event=event("complaint", {"ticket": "t-1"}, occurrence_time=at(-20))))
    people.project()
    (matter,) = people.profile(*ANNA).open_matters
    assert (matter.window, matter.event.properties["ticket"].text_value) == ("open_complaints", "t-1")
    people.say(source_record("2", "crm", [ANNA], event=event("solved", {"ticket": "t-1"}, occurrence_time=at(-10))))
    people.project()
    assert not people.profile(*ANNA).open_matters


def complained(ticket: str, seconds: float, **properties: PyValue) -> Event:
    return event("complaint", {"ticket": ticket} | properties, occurrence_time=at(seconds))


def test_matters_shown_are_those_that_the_windows_count() -> None:
    window = {"kind": "WINDOW_KIND_OPEN", "eventType": "complaint", "property": "ticket", "closingEventType": "solved"}
    properties = [
        {"name": "ticket", "type": "ATTRIBUTE_TYPE_TEXT"},
        {"name": "urgent", "type": "ATTRIBUTE_TYPE_BOOL"},
    ]
    people = People(
        people_catalog(
            eventTypes=[
                {"name": "purchase", "properties": [{"name": "total", "type": "ATTRIBUTE_TYPE_NUMBER"}]},
                {"name": "complaint", "properties": properties},
                {"name": "solved", "properties": properties},
            ],
            windows=[
                window | {"name": "day", "span": "86400s"},
                window | {"name": "hour", "span": "3600s"},
                window | {"name": "urgent", "span": "86400s", "filter": "event.urgent"},
                window | {"name": "visit", "session": True},
            ],
            segments=[],
        )
    )
    events = [
        complained("of yesterday", -DAY_US / SECOND_US),
        complained("of last visit", -7_200, urgent=True),
        complained("solved", -60, urgent=True),
        event("solved", {"ticket": "solved"}, occurrence_time=at(-30)),
        complained("now", -20, urgent=False),
        complained("later", 20),
    ]
    people.say(*(source_record(str(i), "crm", [ANNA], event=each) for i, each in enumerate(events)))
    people.project()
    profile = people.profile(*ANNA)
    assert [(each.window, each.event.properties["ticket"].text_value) for each in profile.open_matters] == [
        ("day", "now"), ("hour", "now"), ("visit", "now"), ("day", "of last visit"), ("urgent", "of last visit"),
    ]  # fmt: skip


def test_last_amount_and_last_instant_of_all_are_told() -> None:
    properties = [
        {"name": "paid", "type": "ATTRIBUTE_TYPE_MONEY"},
        {"name": "due", "type": "ATTRIBUTE_TYPE_TIME"},
    ]
    window = {"kind": "WINDOW_KIND_LAST", "eventType": "purchase", "span": "86400s"}
    people = People(
        people_catalog(
            currencyCode="EUR",
            eventTypes=[{"name": "purchase", "properties": properties}],
            windows=[window | {"name": f"last_{each['name']}", "property": each["name"]} for each in properties],
            recencyFrequencyMonetary=[],
            segments=[],
            journey=None,
        )
    )
    most = Money(currency_code="EUR", amount_micros=(1 << 63) - 1)
    bought = event("purchase", {"due": datetime.max.replace(tzinfo=UTC)}, occurrence_time=at(-1))
    bought.properties["paid"].money_value.CopyFrom(most)
    people.say(source_record("1", "shop", [ANNA], event=bought))
    people.project()
    windows = people.profile(*ANNA).windows
    assert windows["last_paid"].money_value == most
    assert windows["last_due"].time_value == bought.properties["due"].time_value


def decided(
    people: People,
    number: int,
    one: tuple[str, str],
    actions: list[str],
    profile_key: bytes = b"",
    *,
    on_impression: bool = False,
) -> int:
    request = decide_request([("greedy", len(actions))], identities=[one])
    record = DecisionRecord(
        decision_key=decision_key(number),
        profile_key=profile_key,
        request=request.SerializeToString(),
        now_us=people.history.now_us,
        slots=[SlotRecord(action=action, on_impression=on_impression) for action in actions],
    )
    subjects = (profile_key,) if profile_key else (identity_key(request.identities[0]),)
    return people.history.record(RecordKind.RECORD_KIND_DECISION, record, decision_key(number), subjects)


def test_what_a_stranger_was_told_is_known_when_they_say_who_they_are() -> None:
    people = People()
    decided(people, 1, LAPTOP, ["action_1"])
    people.history.record(
        RecordKind.RECORD_KIND_OUTCOME,
        OutcomeRecord(
            decision_key=decision_key(1), action="action_1", type="dismiss", occurrence_time_us=people.history.now_us
        ),
    )
    people.say(source_record("1", "shop", [LAPTOP, ANNA]))
    people.project()
    assert [(each.action, each.count) for each in people.profile(*ANNA).contacts] == [("action_1", 1)]
    kinds = [each.WhichOneof("kind") for each in timeline(people, ANNA)]
    assert kinds == ["outcome", "decision"]


def test_outcome_that_is_taken_back_is_noted_and_confirms_nothing() -> None:
    people = People()
    people.say(source_record("1", "shop", [ANNA]))
    people.project()
    decided(people, 1, ANNA, ["action_1"], on_impression=True)
    told = OutcomeRecord(decision_key=decision_key(1), action="action_1", occurrence_time_us=people.history.now_us)
    for outcome_type in ("", "dismiss"):
        told.type, told.revoked_key = outcome_type, decision_key(9)
        people.history.record(RecordKind.RECORD_KIND_OUTCOME, told)
    people.project()
    assert people.profile(*ANNA).contacts == []
    touchpoints = [each.outcome for each in timeline(people, ANNA) if each.WhichOneof("kind") == "outcome"]
    assert sorted((each.type, each.revokes) for each in touchpoints) == [("", True), ("dismiss", True)]
    told.ClearField("revoked_key")
    people.history.record(RecordKind.RECORD_KIND_OUTCOME, told)
    people.project()
    assert [(each.action, each.count) for each in people.profile(*ANNA).contacts] == [("action_1", 1)]


def test_what_was_told_goes_with_the_identity_it_was_told_to_when_a_profile_is_split() -> None:
    people = People()
    people.say(source_record("1", "crm", [ANNA, EMAIL]))
    people.project()
    key = people.key_of(*ANNA)
    assert key is not None
    decided(people, 1, EMAIL, ["action_1"], key)
    decided(people, 2, ANNA, ["action_2"], key)
    people.history.split([EMAIL], [ANNA])
    people.project()
    assert [each.action for each in people.profile(*EMAIL).contacts] == ["action_1"]
    assert [each.action for each in people.profile(*ANNA).contacts] == ["action_2"]


def erased(people: People, one: tuple[str, str]) -> int:
    accepted = ErasureAccepted(
        erasure_key=b"e" * 16, identity_keys=[identity_key(Identity(namespace=one[0], value=one[1]))]
    )
    return people.history.record(RecordKind.RECORD_KIND_ERASURE_ACCEPTED, accepted)


def test_nothing_in_the_state_tells_of_somebody_erased_and_others_stay() -> None:
    people = People()
    people.say(
        source_record("1", "crm", [ANNA, ("email", "canary@shop.example")], attributes={"nickname": "canary"}),
        source_record("2", "shop", [("browser_id", "canary"), ANNA], event=purchase(5.0, -3, "canary")),
        source_record("3", "crm", [BERTA], attributes={"tier": "gold"}),
    )
    people.project()
    assert holding(people, b"canary"), "the search can fail"
    berta = people.profile(*BERTA)
    key = people.key_of(*ANNA)
    erased(people, ANNA)
    people.project()
    assert key is not None
    assert not holding(people, b"canary")
    assert not holding(people, key)
    assert people.key_of(*ANNA) is None
    assert people.profile(*BERTA) == berta


def holding(people: People, canary: bytes) -> list[tuple[Table, bytes]]:
    with people.store.read() as snapshot:
        return [
            (table, key) for table in Table for key, value in snapshot.scan(table) if canary in key or canary in value
        ]


def test_erasure_names_the_records_about_a_person_and_no_others() -> None:
    people = People()
    mine = [people.say(source_record("1", "crm", [ANNA, EMAIL]))]
    people.project()
    key = people.key_of(*ANNA)
    assert key is not None
    mine.append(decided(people, 1, ANNA, ["action_1"], key))
    others = decided(people, 2, EMAIL, ["action_1"], key)
    people.say(source_record("2", "crm", [BERTA]))
    split = people.history.split([EMAIL], [ANNA])
    people.project()
    lsn = erased(people, ANNA)
    people.project()
    with people.store.read() as snapshot:
        ((_, value),) = snapshot.scan(Table.ERASURES)
    stored = StoredErasure.FromString(value)
    assert stored.lsn == lsn
    assert others not in stored.lsns
    assert set(mine) - {2} <= set(stored.lsns)
    assert split > 0


@pytest.mark.parametrize("one", [ANNA, ("customer_number", "nobody")])
def test_erasing_twice_and_erasing_a_stranger_change_nothing_more(one: tuple[str, str]) -> None:
    people = People()
    people.say(source_record("1", "crm", [BERTA], attributes={"tier": "gold"}))
    people.project()
    before = people.views()
    erased(people, one)
    erased(people, one)
    people.project()
    assert people.views() == before


def test_catalog_with_another_window_is_swept_in_record_by_record() -> None:
    more = people_catalog(
        windows=[{"name": "views_ever", "kind": "WINDOW_KIND_COUNT", "eventType": "view", "span": "86400s"}],
        segments=[],
        recencyFrequencyMonetary=[],
    )
    people = People(people_catalog(), more)
    people.say(*(source_record(f"{i}", "shop", [("customer_number", str(i))], event=view(-5)) for i in range(5)))
    people.project()
    people.history.put_in_force(more)
    people.catalog = more
    people.project()
    assert people.profile("customer_number", "3").windows["views_ever"].number_value == 1.0, "folded when asked"
    people.project(START_US + 10 * SECOND_US)
    with people.store.read() as snapshot:
        layouts = {
            stored.layout
            for key, _ in snapshot.scan(Table.PROFILES)
            if (stored := repository.load(snapshot, key)) is not None
        }
    assert layouts == {more.space.profile_layout}
