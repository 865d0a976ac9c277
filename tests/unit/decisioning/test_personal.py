"""A person's own history in a decision: the formula, its bounds, what is recorded of it, and nothing for strangers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from server.catalog.history_terms import UNITS
from server.decisioning.contributions import HISTORY, contribute
from server.decisioning.personal import PROPENSITY_MAX, shrunk
from server.decisioning.recall import differences
from tests.support.catalogs import compiled
from tests.support.deciding import Answer, Desk, given_champion
from tests.support.histories import START_US
from tests.support.populating import Person
from tests.support.projecting import World
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.log.v1.state_pb2 import StoredChance, StoredHistory
from tsugi.requests import decide_request

ANNA = ("customer_number", "1")
GROUPED = {"action_0": "shoes", "action_1": "shoes", "action_2": "", "action_3": ""}
CATALOG = compiled(
    actionGroups=[{"name": "shoes"}],
    actions=[
        {"name": name, "treatments": [{"name": "only", "channel": "web"}]} | ({"group": group} if group else {})
        for name, group in GROUPED.items()
    ],
)
OFF = compiled(goals=[{**_goal, "personalHistory": False} for _goal in [
    {"name": "click", "outcomes": [{"type": "click", "reward": 1}], "attributionWindow": "2s", "baseRate": 0.1}
]])  # fmt: skip
GIVEN = {"action_0": 0.2, "action_1": 0.3, "action_2": 0.1, "action_3": 0.4}
Seen = Mapping[str, tuple[float, float]]  # expected and observed by action


def arrays(group: float = 0.0, action: float = 0.0) -> LearnerArrays:
    published = LearnerArrays(format_version=1, epoch=1, features=CATALOG.learned.names)
    d, names = len(CATALOG.learned.names), CATALOG.actions.names
    published.goals.add(
        goal="click",
        actions=names,
        correction_weights=np.zeros((4, d)).tobytes(),
        correction_intercepts=np.zeros(4).tobytes(),
        posterior_means=np.zeros((4, d + 1)).tobytes(),
        posterior_covariances=np.tile(np.eye(d + 1) * 0.01, (4, 1, 1)).tobytes(),
        posterior_scale=1.0,
        group_strength=group,
        personal_strength=action,
    )
    return published


def histories(seen: Seen, goal: str = "click") -> list[StoredHistory]:
    return [
        StoredHistory(goal=goal, action=name, expected=round(e * UNITS), observed=round(o * UNITS), lsn=1)
        for name, (e, o) in sorted(seen.items())
    ]


def answer(
    seen: Seen | list[StoredHistory],
    *,
    group: float = 4.0,
    action: float = 2.0,
    placement: str = "greedy",
    given: Mapping[str, float] = GIVEN,
    now_us: int = START_US,
) -> Answer:
    kept = seen if isinstance(seen, list) else histories(seen)
    desk = Desk(CATALOG, champion=given_champion(CATALOG, given, "click"), arrays=arrays(group, action))
    desk.meet(Person({}, dict([ANNA]), histories=kept))
    return desk.ask(decide_request({placement: 1}, identities=[ANNA]), now_us=now_us)


def propensities(answered: Answer) -> list[float]:
    return [float(p) for p in np.frombuffer(answered.record.propensities, np.float32)]


def test_propensity_is_shrunk_from_all_to_the_group_to_the_action() -> None:
    shoes, others = (1.5 + 4.0) / (0.7 + 4.0), (0.0 + 4.0) / (0.5 + 4.0)
    answered = answer({"action_0": (0.2, 1.5), "action_1": (0.5, 0.0), "action_2": (0.5, 0.0)})
    assert propensities(answered) == pytest.approx(
        [
            0.2 * (1.5 + 2.0 * shoes) / (0.2 + 2.0),
            0.3 * (0.0 + 2.0 * shoes) / (0.5 + 2.0),
            0.1 * (0.0 + 2.0 * others) / (0.5 + 2.0),
            0.4 * others,
        ],
        rel=1e-6,
    )


@pytest.mark.parametrize(("group", "action"), [(0.0, 2.0), (4.0, 0.0), (0.0, 0.0)])
def test_infinite_strength_has_no_say(group: float, action: float) -> None:
    answered = answer({"action_0": (0.5, 2.0)}, group=group, action=action)
    factor_of_group = (2.0 + group) / (0.5 + group) if group else 1.0
    factor = (2.0 + action * factor_of_group) / (0.5 + action) if action else factor_of_group
    assert propensities(answered) == pytest.approx([0.2 * factor, 0.3 * factor_of_group, 0.1, 0.4], rel=1e-6)


def test_with_much_seen_it_is_the_persons_own_rate_and_with_little_that_of_all() -> None:
    assert shrunk(1000.0, 2500.0, 1.0, 0.5) == pytest.approx(2.5, rel=1e-2)
    assert shrunk(0.001, 0.0, 1.0, 0.5) == pytest.approx(1.0, rel=1e-3)
    assert shrunk(0.0, 0.0, 0.7, 0.5) == 0.7
    assert shrunk(3.0, 9.0, 0.7, 0.0) == 0.7


def test_nothing_makes_certain() -> None:
    for given in (0.3, 0.999999, 1.0 - 1e-7):
        answered = answer({"action_0": (0.001, 64.0)}, group=0.5, action=0.5, given={"action_0": given})
        top = propensities(answered)[0]
        assert np.float32(min(given, PROPENSITY_MAX)) <= top < 1.0


def test_open_chances_count_from_their_closing_on() -> None:
    (kept,) = histories({"action_0": (0.5, 2.0)})
    kept.open.append(StoredChance(decision_lsn=1, close_us=START_US, expected=UNITS // 2, silence=UNITS // 4))
    before, after = answer([kept], now_us=START_US - 1), answer([kept], now_us=START_US)
    assert propensities(before)[1] == pytest.approx(0.3 * (2.0 + 4.0) / (0.5 + 4.0), rel=1e-6)
    assert propensities(after)[1] == pytest.approx(0.3 * (2.25 + 4.0) / (1.0 + 4.0), rel=1e-6)


def test_history_of_other_goals_and_of_actions_that_are_gone_says_nothing() -> None:
    kept = histories({"action_0": (0.5, 2.0)}, goal="sale") + histories({"gone": (0.5, 2.0)})
    assert propensities(answer(kept)) == pytest.approx(list(GIVEN.values()), rel=1e-6)


def test_who_has_no_history_is_decided_for_to_the_last_bit_as_if_there_were_none() -> None:
    for placement in ("greedy", "square_cb", "thompson"):
        without, strengths = answer([], placement=placement, group=0.0, action=0.0), answer([], placement=placement)
        strengths.record.provenance.Clear()
        without.record.provenance.Clear()
        assert strengths.record == without.record
        assert not strengths.record.general_propensities


def test_of_thompson_mean_and_deviation_are_multiplied_alike() -> None:
    seen = {"action_0": (0.5, 2.0), "action_3": (1.0, 0.0)}
    plain, told = answer([], placement="thompson"), answer(seen, placement="thompson")
    factors = np.array(propensities(told)) / np.array(propensities(plain))
    for name in ("posterior_means", "posterior_deviations"):
        before, after = (np.frombuffer(getattr(each.record, name), np.float32) for each in (plain, told))
        np.testing.assert_allclose(after, before * factors, rtol=1e-5)
    assert factors[0] > 1.0 > factors[3]


@pytest.mark.parametrize("placement", ["greedy", "square_cb", "thompson", "softmax"])
def test_record_says_what_was_known_and_is_decided_again_to_the_last_bit(placement: str) -> None:
    answered = answer({name: (0.5, 2.0 * i) for i, name in enumerate(GIVEN)}, placement=placement)
    (slot,) = answered.record.slots
    general = np.frombuffer(answered.record.general_propensities, np.float32)
    assert general.tolist() == pytest.approx(list(GIVEN.values()), rel=1e-6)
    assert slot.general_propensity == general[slot.row]
    assert slot.history.expected == pytest.approx(0.5)
    assert slot.history.observed == pytest.approx(2.0 * slot.row)
    assert slot.history.group_expected == pytest.approx(1.0)
    assert slot.history.group_observed == pytest.approx(2.0 if slot.row < 2 else 10.0)
    assert answered.reply.slots[0].propensity == pytest.approx(propensities(answered)[slot.row])
    assert differences(answered.record, CATALOG) == []


def test_while_strengths_are_infinite_histories_are_recorded_to_learn_from() -> None:
    (slot,) = answer({"action_3": (0.5, 2.0)}, group=0.0, action=0.0).record.slots
    assert (slot.action, slot.history.expected, slot.history.group_observed) == ("action_3", 0.5, 2.0)


def test_goal_that_keeps_no_history_reads_and_records_none() -> None:
    desk = Desk(OFF, champion=given_champion(OFF, GIVEN, "click"), arrays=arrays(4.0, 2.0))
    desk.meet(Person({}, dict([ANNA]), histories=histories({"action_0": (0.5, 2.0)})))
    answered = desk.ask(decide_request({"greedy": 1}, identities=[ANNA]))
    assert propensities(answered) == pytest.approx(list(GIVEN.values()), rel=1e-6)
    assert not answered.record.slots[0].general_propensity
    assert not answered.record.slots[0].HasField("history")


def test_in_a_batch_each_has_their_own_history() -> None:
    desk = Desk(CATALOG, champion=given_champion(CATALOG, GIVEN, "click"), arrays=arrays(4.0, 2.0))
    seen: list[Seen] = [{}, {"action_0": (0.5, 2.0)}, {}, {"action_0": (2.0, 0.0), "action_2": (0.1, 1.0)}, {}]
    requests = []
    for i, each in enumerate(seen):
        desk.meet(Person({}, {"customer_number": str(i)}, histories=histories(each)), profile_key=bytes([i]) * 16)
        requests.append(decide_request({"greedy": 1 + i % 2, "square_cb": 1}, identities=[("customer_number", str(i))]))
    keys = [bytes([i]) * 16 for i in range(len(seen))]
    together = desk.ask_all(requests, START_US, keys)
    for request, key, one in zip(requests, keys, together, strict=True):
        (alone,) = desk.ask_all([request], START_US, [key])
        assert one.record == alone.record


def test_explanation_tells_what_history_did_beside_what_was_learned() -> None:
    record = answer({"action_0": (0.5, 2.0), "action_2": (2.0, 0.0)}).record
    told = contribute(record, CATALOG, None, None, range(4))
    general = np.frombuffer(record.general_propensities, np.float32).astype(np.float64)
    shown = np.frombuffer(record.propensities, np.float32).astype(np.float64)
    for place in range(4):
        by_name = {each.feature: each for each in told[0, place]}
        wanted = np.log(shown[place] / (1 - shown[place]) * (1 - general[place]) / general[place])
        assert by_name[HISTORY].log_odds == pytest.approx(wanted, abs=1e-6)
        assert not by_name[HISTORY].learned


def test_outcome_is_in_the_next_decision_as_soon_as_it_is_projected() -> None:
    world = World()
    world.history.put_in_force(CATALOG_OF_WORLD)
    world.history.know(dict([ANNA]))
    world.project()
    desk = Desk(CATALOG_OF_WORLD, arrays=arrays(1.0, 1.0))
    desk.store = world.store
    request = decide_request({"greedy": 1}, identities=[ANNA], candidate_actions=["action_1"])
    first = desk.ask(request, now_us=START_US, decision_id="first")
    world.history.record(RecordKind.RECORD_KIND_DECISION, first.record, first.record.decision_key)
    world.project()
    assert desk.ask(request, now_us=START_US, decision_id="x").reply.slots[0].propensity == pytest.approx(0.1)
    world.history.report(first.record.decision_key, "action_1", "click")
    world.project()
    after = desk.ask(request, now_us=START_US, decision_id="after")
    group = (1.0 + 1.0) / (0.1 + 1.0)
    assert after.reply.slots[0].propensity == pytest.approx(0.1 * (1.0 + group) / (0.1 + 1.0), rel=1e-6)


CATALOG_OF_WORLD = compiled()
