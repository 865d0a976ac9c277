from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor

from server.catalog import loading
from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from server.errors import TsugiError
from tsugi.v1 import catalog_pb2
from tsugi.v1.error_reason_pb2 import ErrorReason

BOOTS = """\
name: Winter sports
currencyCode: EUR
identityNamespaces:
- name: customer_number
- name: phone
  linkRule: LINK_RULE_SHARED_DEVICE
  valuesPerProfileMax: 2
  sharedMax: 8
  meaning: MEANING_PHONE
profileAttributes:
- {name: age, type: ATTRIBUTE_TYPE_NUMBER, minimum: 0, maximum: 120, center: 40, spread: 1.5e1, unit: years}
- name: tier
  type: ATTRIBUTE_TYPE_CATEGORY
  allowedValues: [gold, silver, "2026", 2026-01-01]
  excludedFromLearning: true
- name: email
  type: ATTRIBUTE_TYPE_TEXT
  personalData: true
  purposes: [marketing]
  timeToLive: 31536000s
  survivorship: SURVIVORSHIP_MOST_TRUSTED
  meaning: MEANING_EMAIL
- {name: taste, type: ATTRIBUTE_TYPE_VECTOR, dimensions: 3}
contextAttributes:
actionAttributes:
- {name: price, type: ATTRIBUTE_TYPE_NUMBER}
eventTypes:
- name: purchase
  properties:
  - {name: total, type: ATTRIBUTE_TYPE_MONEY}
  retention: 34560000s
  channel: web
- name: complaint
  properties: &ticket [{name: ticket, type: ATTRIBUTE_TYPE_TEXT}]
- {name: settlement, properties: *ticket}
outcomeTypes:
- {name: click}
- {name: seen, kind: OUTCOME_KIND_IMPRESSION, valueMinimum: -1, valueMaximum: "2.5"}
goals:
- name: visit
  outcomes: [{type: click, reward: 1}]
  attributionWindow: 3600s
  defaultReward: 0
  baseRate: 0.05
  settling: SETTLING_LAST
  lateLimit: 86400s
  personalHistory: true
  influenceMax: 0.5
  learners: [LEARNER_FAMILY_FOREST]
channels:
- name: web
placements:
- name: home
  channel: web
  purpose: marketing
  goal: visit
  count_max: 3            # protobuf's own name
  activation: ACTIVATION_ON_IMPRESSION
  exploration:
    squareCb: {gamma: 1000}
- {name: foot, channel: web, purpose: marketing, goal: visit, exploration: {greedy: {}}}
- {name: side, channel: web, purpose: marketing, goal: visit, exploration: {thompson: {draws: 64, floorShare: 0.02}}}
- {name: top, channel: web, purpose: marketing, goal: visit, exploration: {epsilonGreedy: {epsilon: 0.1}}}
- {name: rail, channel: web, purpose: marketing, goal: visit, exploration: {upperConfidence: {width: 2}}}
- name: wing
  channel: web
  purpose: marketing
  goals: [{goal: visit, weight: 2}]
  exploration:
    softmax: {temperature: 0.3}
    shareMax: 0.2
    probabilityMin: 0.01
    neverOn: profile.n_open > 0.0
    budget: {costMicrosMax: 50000000, period: 86400s}
  holdoutExempt: true
actions:
- name: boots
  validFromTime: 2026-01-01T00:00:00Z
  validUntilTime: "2026-03-01T00:00:00+01:00"
  eligibility: >-
    profile.age >= 18.0 &&
    profile.tier in ['gold', 'silver']
  applicability: profile.n_open == 0.0
  suitability: profile.tier == 'gold'
  group: shoes
  valueMicros: 25000000
  lever: 1.5
  attributes: {price: 89.9}
  treatments:
  - name: banner
    channel: web
    weight: 2
    content: {title: Warm feet, count: 3, since: 2026-01-01, deep: [1, {a: null, b: false}], "yes": no}
- name: dear_boots
  value: action.price * 0.2
  costMicros: 500000
  attributes: {price: 289.9}
  treatments: [{name: banner, channel: web}]
actionGroups:
- name: shoes
  eligibility: has(profile.age)
  applicability: now > timestamp('2026-01-01T00:00:00Z')
  suitability: "true"
- {name: laces}
contactPolicies:
- name: weekly
  scope: CONTACT_SCOPE_EACH_ACTION
  actions: [boots]
  groups: [shoes]
  channels: [web]
  cap: {countMax: 2, span: 604800s, strict: true}
- name: fatigue
  coolOff: {outcomeTypes: [click], ignored: true, count: 2, within: 2592000s, span: 5184000s}
- name: complaints
  suppression: {expression: profile.n_open > 0.0}
compositions:
- {name: variety, atMost: {countMax: 1, eachGroup: true, eachPlacement: true}}
- {name: extras, groups: [laces], requires: {actions: [boots], groups: [shoes]}}
randomControl: {share: 0.05, salt: s}
experiments:
- name: louder
  salt: s
  branches:
  - name: loud
    share: 0.1
    actions: [{actions: [boots], groups: [laces], lever: 2, applicability: "", suitability: profile.age > 20.0}]
    placements: [{placement: foot, exploration: {epsilonGreedy: {epsilon: 0.2}}}]
    modelRole: MODEL_ROLE_CHALLENGER
holdouts:
- {name: quiet, share: 0.02, salt: q, goals: [visit]}
budgets:
- {name: daily, actions: [boots], groups: [laces], unitsMax: 1000, period: 86400s, paced: true, slack: 20}
- {name: money, costMicrosMax: 900000000}
sources:
- name: crm
  owner: customer care
  party: PARTY_FIRST
  delivery: DELIVERY_BATCH
  trust: 0
  attributes: [age]
  eventTypes: [purchase]
  identityNamespaces: [customer_number, phone]
  defaultCountryCode: DE
  channel: web
  silenceMax: 86400s
consentPurposes:
- {name: marketing, validFor: 63072000s}
- {name: service, consentExempt: true}
windows:
- {name: purchases_visit, kind: WINDOW_KIND_COUNT, eventType: purchase, session: true}
- name: spend_30d
  kind: WINDOW_KIND_SUM
  eventType: purchase
  property: total
  filter: event.total > 0.0
  span: 2592000s
  center: 0
- name: n_open
  kind: WINDOW_KIND_OPEN
  eventType: complaint
  property: ticket
  closingEventType: settlement
  span: 86400s
recencyFrequencyMonetary:
- {name: spend, eventType: purchase, property: total}
sessionGap: 1800s
segments:
- {name: angry, expression: profile.n_open > 0.0}
journey:
  stages: [{name: awareness}, {name: engagement}]
  transitions:
  - {fromStages: [awareness], eventType: purchase, toStage: engagement}
  - {outcomeType: click, toStage: engagement}
matching:
  off: false
  fields: [{attribute: email, weights: [9, 0.5, -4]}]
  linkWeightMin: 10
  reviewWeightMin: 5
"""


def faults(text: str) -> list[tuple[str, str]]:
    with pytest.raises(TsugiError) as caught:
        load_catalog(text)
    assert caught.value.reason == ErrorReason.ERROR_REASON_CATALOG_INVALID
    assert caught.value.metadata["faults"] == str(len(caught.value.violations))
    return [(violation.path, violation.description) for violation in caught.value.violations]


def test_yaml_is_read_as_the_json_mapping() -> None:
    catalog = load_catalog(BOOTS)
    age, tier, *_ = catalog.profile_attributes
    assert (age.maximum, age.spread, age.HasField("center"), tier.HasField("center")) == (120.0, 15.0, True, False)
    assert list(tier.allowed_values) == ["gold", "silver", "2026", "2026-01-01"]
    assert tier.type == catalog_pb2.ATTRIBUTE_TYPE_CATEGORY
    assert catalog.outcome_types[1].value_maximum == 2.5
    assert catalog.goals[0].attribution_window.seconds == 3600
    home, foot, *_ = catalog.placements
    assert (home.count_max, home.exploration.square_cb.gamma) == (3, 1000.0)
    assert foot.exploration.WhichOneof("policy") == "greedy"
    boots, dear_boots = catalog.actions
    assert (dear_boots.value, dear_boots.cost_micros) == ("action.price * 0.2", 500_000)
    assert boots.valid_from_time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert boots.valid_until_time.ToJsonString() == "2026-02-28T23:00:00Z"
    assert boots.eligibility == "profile.age >= 18.0 && profile.tier in ['gold', 'silver']"
    assert json_format.MessageToDict(boots.treatments[0].content) == {
        "title": "Warm feet",
        "count": 3.0,
        "since": "2026-01-01",
        "deep": [1.0, {"a": None, "b": False}],
        "yes": "no",
    }


def test_what_is_said_about_profiles_is_read_too() -> None:
    catalog = load_catalog(BOOTS)
    crm, visit, spend = catalog.sources[0], catalog.windows[0], catalog.windows[1]
    assert (crm.trust, crm.HasField("trust"), crm.silence_max.seconds) == (0, True, 86_400)
    assert (crm.party, crm.delivery) == (catalog_pb2.PARTY_FIRST, catalog_pb2.DELIVERY_BATCH)
    assert (visit.WhichOneof("reach"), spend.WhichOneof("reach")) == ("session", "span")
    assert (spend.HasField("center"), spend.HasField("spread")) == (True, False)
    assert [each.WhichOneof("touchpoint") for each in catalog.journey.transitions] == ["event_type", "outcome_type"]
    assert list(catalog.matching.fields[0].weights) == [9.0, 0.5, -4.0]


def test_example_compiles() -> None:
    assert compile_catalog(load_catalog(BOOTS)).profiles.windows.names[0] == "purchases_visit"


@pytest.mark.parametrize("preserving_proto_field_name", [False, True])
def test_what_protobuf_writes_as_json_is_read_back_the_same(preserving_proto_field_name: bool) -> None:
    catalog = load_catalog(BOOTS)
    text = json_format.MessageToJson(catalog, preserving_proto_field_name=preserving_proto_field_name)
    assert load_catalog(text) == catalog


def test_example_sets_every_field_a_catalog_has() -> None:
    def names(descriptor: Descriptor) -> set[str]:
        found: set[str] = set()
        for field in descriptor.fields:
            found.add(field.json_name)
            if field.message_type is not None and field.message_type.full_name.startswith("tsugi."):
                found |= names(field.message_type)
        return found

    text = BOOTS.replace("count_max", "countMax")
    assert {
        name for name in names(catalog_pb2.DESCRIPTOR.message_types_by_name["Catalog"]) if name not in text
    } == set()


def test_all_faults_are_listed_at_once_with_path_line_and_suggestion() -> None:
    text = BOOTS.replace("    channel: web\n    weight", "    chanel: web\n    weight").replace(
        "ATTRIBUTE_TYPE_CATEGORY", "CATEGORY"
    )
    text = text.replace("spread: 1.5e1", "spread: wide").replace("- name: customer_number", "- customer_number")
    assert faults(text) == [
        ("identityNamespaces[0]", "names with values are expected here, such as name: … (line 4)"),
        ("profileAttributes[0].spread", "a number is expected, got 'wide' (line 11)"),
        (
            "profileAttributes[1].type",
            "'CATEGORY' is no AttributeType; did you mean ATTRIBUTE_TYPE_CATEGORY? (line 13)",
        ),
        ("actions[0].treatments[0].chanel", "no such field; did you mean channel? (line 91)"),
    ]


@pytest.mark.parametrize(
    ("text", "path", "description"),
    [
        ("actoins: []", "actoins", "no such field; did you mean actions? (line 1)"),
        ("zzz: 1", "zzz", "no such field (line 1)"),
        ('"a b\\n": 1', "'a b\\n'", "no such field (line 1)"),
        ("name: 12", "name", "text is expected, got '12'; quote it (line 1)"),
        ("name: true", "name", "text is expected, got 'true'; quote it (line 1)"),
        ("name: [a]", "name", "a single value is expected here (line 1)"),
        ("name: x\nname: y", "name", "stands here twice (line 2)"),
        ("randomControl: {share: .nan}", "randomControl.share", "'.nan' is no number or boolean of JSON"),
        ("randomControl: {share: .5}", "randomControl.share", "'.5' is no number or boolean of JSON"),
        ("randomControl: {share: 1e999}", "randomControl.share", "'1e999' is no number or boolean of JSON"),
        ('randomControl: {share: "1e999"}', "randomControl.share", "a number is expected, got '1e999' (line 1)"),
        ('randomControl: {share: "NaN"}', "randomControl.share", "a number is expected, got 'NaN' (line 1)"),
        ("randomControl: {share: yes}", "randomControl.share", "a number is expected, got 'yes' (line 1)"),
        ("randomControl: 3", "randomControl", "names with values are expected here, such as name: … (line 1)"),
        ("randomControl: [3]", "randomControl", "names with values are expected here, such as name: … (line 1)"),
        ("actions: {}", "actions", "a list is expected, each entry after a dash (line 1)"),
        ("actions: [~]", "actions[0]", "names with values are expected here, such as name: … (line 1)"),
        ("actions: [{valueMicros: 1.5}]", "actions[0].valueMicros", "a whole number from -9223372036854775808"),
        ("actions: [{valueMicros: 9223372036854775808}]", "actions[0].valueMicros", "a whole number from -92233"),
        ("placements: [{countMax: -1}]", "placements[0].countMax", "a whole number from 0 to 4294967295 is expected"),
        ("placements: [{countMax: true}]", "placements[0].countMax", "a number is expected, got 'true' (line 1)"),
        (
            "placements: [{countMax: 1, count_max: 1}]",
            "placements[0].count_max",
            "the field stands here under both its names (line 1)",
        ),
        (
            "placements: [{activation: ON_IMPRESSION}]",
            "placements[0].activation",
            "'ON_IMPRESSION' is no Activation; did you mean ACTIVATION_ON_IMPRESSION? (line 1)",
        ),
        (
            "placements: [{activation: ACTIVATION_ON_IMPRESION}]",
            "placements[0].activation",
            "'ACTIVATION_ON_IMPRESION' is no Activation; did you mean ACTIVATION_ON_IMPRESSION? (line 1)",
        ),
        (
            "placements: [{activation: 2}]",
            "placements[0].activation",
            "'2' is no Activation; one of ACTIVATION_ON_DECISION, ACTIVATION_ON_IMPRESSION is expected (line 1)",
        ),
        (
            "placements: [{exploration: {greedy: {}, squareCb: {}}}]",
            "placements[0].exploration.squareCb",
            "not beside greedy; only one may be set (line 1)",
        ),
        (
            "windows: [{span: 60s, session: true}]",
            "windows[0].session",
            "not beside span; only one may be set (line 1)",
        ),
        (
            "journey: {transitions: [{outcomeType: a, eventType: b}]}",
            "journey.transitions[0].eventType",
            "not beside outcomeType; only one may be set (line 1)",
        ),
        ("windows: [{spam: 60s}]", "windows[0].spam", "no such field; did you mean span? (line 1)"),
        ("segment: []", "segment", "no such field; did you mean segments? (line 1)"),
        ("sources: [{silenceMaximum: 60s}]", "sources[0].silenceMaximum", "no such field; did you mean silenceMax?"),
        (
            "windows: [{kind: COUNT}]",
            "windows[0].kind",
            "'COUNT' is no WindowKind; did you mean WINDOW_KIND_COUNT? (line 1)",
        ),
        (
            "sources: [{party: THIRD_PARTY}]",
            "sources[0].party",
            "'THIRD_PARTY' is no Party; one of PARTY_FIRST, PARTY_SECOND, PARTY_THIRD is expected (line 1)",
        ),
        (
            "profileAttributes: [{survivorship: MOST_RECENT}]",
            "profileAttributes[0].survivorship",
            "'MOST_RECENT' is no Survivorship; did you mean SURVIVORSHIP_MOST_RECENT? (line 1)",
        ),
        (
            "identityNamespaces: [{linkRule: HOUSEHOLD}]",
            "identityNamespaces[0].linkRule",
            "'HOUSEHOLD' is no LinkRule; did you mean LINK_RULE_HOUSEHOLD? (line 1)",
        ),
        ("sources: [{trust: 0.5}]", "sources[0].trust", "a whole number from 0 to 4294967295 is expected, got '0.5'"),
        ("sessionGap: 30m", "sessionGap", "a span in seconds, such as 3600s, is expected, got '30m' (line 1)"),
        (
            "matching: {fields: [{weights: [high]}]}",
            "matching.fields[0].weights[0]",
            "a number is expected, got 'high'",
        ),
        (
            "profileAttributes: [{excludedFromLearning: 1}]",
            "profileAttributes[0].excludedFromLearning",
            "true or false is expected, got '1' (line 1)",
        ),
        (
            "goals: [{attributionWindow: 7d}]",
            "goals[0].attributionWindow",
            "a span in seconds, such as 3600s, is expected, got '7d' (line 1)",
        ),
        (
            "goals: [{attributionWindow: 3600}]",
            "goals[0].attributionWindow",
            "a span in seconds, such as 3600s, is exp",
        ),
        ("goals: [{attributionWindow: 3.1E9999s}]", "goals[0].attributionWindow", "a span in seconds, such as 3600s"),
        (
            "actions: [{validFromTime: 2026-03-01}]",
            "actions[0].validFromTime",
            "an instant with its zone, such as 2026-03-01T00:00:00Z, is expected, got '2026-03-01' (line 1)",
        ),
        ("actions: [{validFromTime: 2026-03-01 10:00:00}]", "actions[0].validFromTime", "an instant with its zone"),
        ("actions: [{validFromTime: [1]}]", "actions[0].validFromTime", "a single value is expected here (line 1)"),
        (
            "actions: [{attributes: {code: 007}}]",
            "actions[0].attributes.code",
            "'007' is no number or boolean of JSON; quote it if it is text (line 1)",
        ),
        (
            "actions: [{attributes: {code: 12345678901234567}}]",
            "actions[0].attributes.code",
            "'12345678901234567' has more digits than a number keeps; quote it (line 1)",
        ),
        ("actions: [{attributes: {a: {b: [1, 0x1F]}}}]", "actions[0].attributes.a.b[1]", "'0x1F' is no number or bool"),
        ("actions: [{attributes: {a: 1, a: 2}}]", "actions[0].attributes.a", "stands here twice (line 1)"),
        ("actions: [{attributes: [1]}]", "actions[0].attributes", "names with values are expected here"),
        (
            "actions: [{attributes: {1: x}}]",
            "actions[0].attributes",
            "'1' is no name; quote it if it is meant to be one",
        ),
        ("actions: [{attributes: {[1]: x}}]", "actions[0].attributes", "a single value is expected here (line 1)"),
        ("name: !secret x", "name", "tags (!) are not taken (line 1)"),
        ("name: !!binary aGVsbG8=", "name", "tags (!) are not taken (line 1)"),
        ("name: !!python/object/apply:os.system [id]", "name", "tags (!) are not taken (line 1)"),
        ("actions: !!set {a, b}", "actions", "a list is expected, each entry after a dash (line 1)"),
        ("actions: [{attributes: !thing {a: 1}}]", "actions[0].attributes", "tags (!) are not taken (line 1)"),
        ("actions: [{attributes: {a: !thing [1]}}]", "actions[0].attributes.a", "tags (!) are not taken (line 1)"),
        (
            "randomControl: {<<: {share: 1}}",
            "randomControl",
            "merging (<<) is not taken; write the fields out (line 1)",
        ),
        ('name: "\\ud800"', "name", "half a surrogate pair is no character (line 1)"),
        ('"\\ud800": 1', "", "half a surrogate pair is no character (line 1)"),
        ("", "", "the document is empty"),
        ("# nothing yet", "", "the document is empty"),
        ("- name: x", "", "names with values are expected here, such as name: … (line 1)"),
        ("null", "", "names with values are expected here, such as name: … (line 1)"),
        ("name: a: b", "", "not YAML: line 1, column 8: mapping values are not allowed here"),
        ("name: x\n---\nname: y", "", "not YAML: line 2, column 1: but found another document"),
        ("name: *other", "", "not YAML: line 1, column 7: found undefined alias 'other'"),
        ("name: 'x", "", "not YAML: line 1, column 9: found unexpected end of stream"),
        ("name: \x00", "", "not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("name: \ud800", "", "not YAML: unacceptable character #xd800: special characters are not allowed"),
        ('name: "\\UFFFFFFFF"', "", "not YAML: an escape sequence names no character"),
        ('name: "\\U00110000"', "", "not YAML: an escape sequence names no character"),
        ("%YAML 1.1\n---\nname: no", "name", "'no' is no number or boolean of JSON; quote it if it is text (line 3)"),
        pytest.param("[" * 5_000, "", "nested deeper than 64 levels", marks=pytest.mark.slow),
    ],
)
def test_fault_has_its_path_and_what_is_expected(text: str, path: str, description: str) -> None:
    ((found_path, found),) = faults(text)
    assert found_path == path
    assert found.startswith(description)
    if description.endswith(")"):
        assert found == description


def test_characters_that_json_escapes_in_two_halves_are_whole_again() -> None:
    assert load_catalog(json.dumps({"name": "Ski 🎿"})).name == "Ski 🎿"
    assert load_catalog("name: Ski 🎿").name == "Ski 🎿"


def test_aliases_may_repeat_a_little() -> None:
    text = "actions:\n- &first {name: a, attributes: {x: [1, 2]}}\n- *first\n"
    first, second = load_catalog(text).actions
    assert first == second


@pytest.mark.parametrize(
    "text",
    [
        "actions: [{attributes: {"
        + ", ".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '1'] * 9)}]" for n in range(9))
        + "}}]",
        "actions:\n- &a {attributes: {" + ", ".join(f"k{n}: 1" for n in range(500)) + "}}\n" + "- *a\n" * 200,
        "actions:\n- &a {" + ", ".join(f"k{n}: ~" for n in range(500)) + "}\n" + "- *a\n" * 200,
    ],
)
def test_alias_bomb_is_refused_before_it_unfolds(text: str) -> None:
    assert len(faults(text)) <= loading.VIOLATIONS_MAX


def test_values_may_be_nested_as_deep_as_protobuf_reads_back() -> None:
    def nested(depth: int) -> str:
        return "actions: [{treatments: [{content: " + '{"a": ' * depth + "1" + "}" * depth + "}]}]"

    catalog = load_catalog(nested(loading.CONTENT_DEPTH_MAX))
    assert catalog_pb2.Catalog.FromString(catalog.SerializeToString()) == catalog
    ((path, description),) = faults(nested(loading.CONTENT_DEPTH_MAX + 1))
    assert path.startswith("actions[0].treatments[0].content.a.a")
    assert description == f"nested deeper than {loading.CONTENT_DEPTH_MAX} levels (line 1)"
    chain = "".join(f"k{n}: &k{n} {{a: *k{n - 1}}}, " if n else "k0: &k0 {a: 1}, " for n in range(40))
    assert any(
        f"nested deeper than {loading.CONTENT_DEPTH_MAX}" in found
        for _, found in faults(f"actions: [{{attributes: {{{chain}}}}}]")
    )


def test_document_beyond_its_size_is_refused_unread() -> None:
    assert faults("#" * (loading.DOCUMENT_BYTES_MAX + 1)) == [("", f"at most {loading.DOCUMENT_BYTES_MAX} bytes")]


def test_faults_beyond_the_first_thousand_are_not_looked_for() -> None:
    text = "\n".join(f"a{n}: 1" for n in range(1_500))
    assert len(faults(text)) == loading.VIOLATIONS_MAX
