"""The invariants of a decision, over random catalogs, people, models and requests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import EPSILON_GREEDY, GREEDY, POSTERIOR_POLICIES, THOMPSON, UPPER_CONFIDENCE, Catalog
from server.decisioning import exploration
from server.decisioning.decide import EXPLORE, NO_EXPLORATION, RANDOM_CONTROL
from server.decisioning.gather import Batch
from server.decisioning.models import Models, align, no_champion
from tests.support import oracle
from tests.support.catalogs import BOUNDED, POLICIES, seeded
from tests.support.deciding import Desk, key_of
from tests.support.populating import Person
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.v1.decision_service_pb2 import DecideRequest

NOW_US = 1_767_225_600_000_000 + 86_400_000_000  # one day after some actions have ended
N_ACTIONS = 60


@lru_cache(1)
def desk() -> Desk:
    catalog = seeded(3, N_ACTIONS)
    return Desk(catalog, arrays=arrays(catalog, 4))


def arrays(catalog: Catalog, seed: int) -> LearnerArrays:
    """Publish what a learner might: about two thirds of the actions, with one feature the catalog does not know."""
    rng = np.random.default_rng(seed)
    features = ["profile.shoe_size", *catalog.learned.names[1:]]
    names = [name for name in catalog.actions.names if rng.random() < 0.7] + ["gone_action"]
    d = len(features)
    published = LearnerArrays(format_version=1, epoch=7, learned_lsn=99, learned_time_us=NOW_US, features=features)
    for goal, scale in (("click", 0.5), ("sale", 0.2)):
        roots = rng.normal(size=(len(names), d + 1, d + 1)) * 0.1
        published.goals.add(
            goal=goal,
            actions=names,
            correction_weights=rng.normal(size=(len(names), d)).tobytes(),
            correction_intercepts=rng.normal(size=len(names)).tobytes(),
            posterior_means=(rng.normal(size=(len(names), d + 1)) * 0.1).tobytes(),
            posterior_covariances=(roots @ roots.transpose(0, 2, 1)).tobytes(),
            posterior_scale=scale,
        )
    return published


people = st.fixed_dictionaries(
    {},
    optional={
        "age": st.floats(0, 120),
        "member": st.booleans(),
        "tier": st.sampled_from(["bronze", "silver", "gold"]),
    },
)
PLACEMENTS = [*POLICIES, *BOUNDED, "calm"]
asks = st.lists(
    st.tuples(st.sampled_from(PLACEMENTS), st.integers(1, 4)), min_size=1, max_size=4, unique_by=lambda a: a[0]
)


@st.composite
def requests(draw: st.DrawFn) -> DecideRequest:
    request = DecideRequest(profile_id="00" * 16)
    for placement, count in draw(asks):
        request.placements.add(placement=placement, count=count)
    if draw(st.booleans()):
        request.context["hour"].number_value = draw(st.floats(0, 23))
    names = st.lists(st.sampled_from(desk().catalog.actions.names), max_size=20, unique=True)
    if draw(st.booleans()):
        request.candidate_actions.extend(draw(names))
    if draw(st.booleans()):
        request.excluded_actions.extend(draw(names))
    return request


modes = st.sampled_from([EXPLORE, RANDOM_CONTROL, NO_EXPLORATION])


@given(person=people, request=requests(), mode=modes, number=st.integers(0, 1_000_000))
def test_kernels_agree_with_numpy(person: dict[str, Any], request: DecideRequest, mode: int, number: int) -> None:
    here = desk()
    here.meet(Person(person, {}))
    batch, decisions = here.decisions([request], NOW_US, [key_of(str(number))], mode)
    catalog, models = here.catalog, here.models
    facts = batch.facts[0]
    passed = oracle.eligible(catalog, facts, NOW_US) & _asked_for(batch, request)
    assert np.flatnonzero(passed).tolist() == decisions.rows.tolist()
    assert (decisions.reasons[0] == 0).tolist() == passed.tolist()
    learned = oracle.encode(facts, catalog.learned)
    np.testing.assert_allclose(decisions.learned[0], learned, rtol=0, atol=1e-6)
    slot = 0
    is_free = np.ones(decisions.rows.size, bool)
    chosen: list[tuple[str, str]] = []
    others = decisions.other_propensities
    for ask, (row, count) in enumerate(batch.asked[0].asks):
        placement = catalog.placements[row]
        block = slice(decisions.ask_blocks[ask], decisions.ask_blocks[ask + 1])
        rows = decisions.rows
        expected, means, variances = np.zeros(rows.size), np.zeros(rows.size), np.zeros(rows.size)
        for goal, weight in sorted(_goals_of(catalog, placement.name).items()):
            prior = np.full(rows.size, catalog.goals[goal].base_log_odds, np.float32)
            propensity = oracle.propensities(prior, rows, learned, models, goal)
            recorded = decisions.propensities[block]
            if goal != placement.goal_row:
                recorded, others = others[: rows.size], others[rows.size :]
            np.testing.assert_allclose(recorded, propensity, rtol=0, atol=1e-6)
            mean, deviation = oracle.posterior(prior, rows, learned, models, goal)
            expected += weight * propensity
            means += weight * mean
            variances += (weight * deviation) ** 2
        worth = catalog.actions.worth[rows].prod(1) * catalog.actions.weights[rows, placement.channel_row]
        np.testing.assert_allclose(decisions.priorities[block], expected * worth, rtol=1e-5, atol=1e-9)
        policy = int(catalog.blends.codes[0, row, 2])
        parameter = float(catalog.blends.parameters[0, row, 0])
        stated = catalog.message.placements[row].exploration
        share_max = stated.share_max if stated.HasField("share_max") else 1.0
        floor = stated.probability_min
        if mode == RANDOM_CONTROL:
            policy, parameter, share_max, floor = EPSILON_GREEDY, 1.0, 1.0, 0.0
        elif mode == NO_EXPLORATION or (placement.name == "calm" and person.get("member", True)):
            policy, parameter, share_max, floor = GREEDY, 0.0, 1.0, 0.0
        if policy in POSTERIOR_POLICIES:
            np.testing.assert_allclose(decisions.means[block], means, rtol=0, atol=2e-6)
            np.testing.assert_allclose(decisions.deviations[block], np.sqrt(variances), rtol=0, atol=2e-6)
        for _ in range(count):
            goes = oracle.goes_with(catalog.message, chosen, placement.name)
            going = np.array([goes[catalog.actions.names[each]] for each in rows], bool)
            is_open = is_free & ~np.isnan(worth) & going
            got = decisions.distributions[decisions.slot_blocks[slot] : decisions.slot_blocks[slot + 1]]
            _, pick, chosen_row, _ = decisions.slot_codes[slot].tolist()
            if not is_open.any():
                assert pick == -1
                assert not got.any()
            else:
                if policy != THOMPSON:
                    priorities = ranked = decisions.priorities[block]
                    if policy == UPPER_CONFIDENCE:  # from what is recorded: a tie must not be told apart by rounding
                        above = parameter * decisions.deviations[block].astype(float)
                        ranked = (decisions.means[block].astype(float) + above) * worth
                    wanted = oracle.distribution(policy, parameter, ranked, is_open)
                    wanted = oracle.bounded(wanted, priorities, is_open, share_max, floor)
                    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
                assert abs(got.sum() - 1.0) < 1e-9
                assert got[is_open].min() >= min(floor, 1.0 / is_open.sum())
                assert not got[~is_open].any()
                assert got[pick] == decisions.slot_numbers[slot, 0] > 0.0
                assert chosen_row == rows[pick]
                is_free[pick] = False
                chosen.append((placement.name, catalog.actions.names[chosen_row]))
            slot += 1
    assert not others.size


def _goals_of(catalog: Catalog, placement: str) -> dict[int, float]:
    message = catalog.message.placements[catalog.placement_rows[placement]]
    if not message.goals:
        return {catalog.goal_rows[message.goal]: 1.0}
    return {catalog.goal_rows[each.goal]: each.weight if each.HasField("weight") else 1.0 for each in message.goals}


def _asked_for(batch: Batch, request: DecideRequest) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    catalog = batch.catalog
    names = np.array(catalog.actions.names)
    wanted = np.isin(names, list(request.candidate_actions)) if request.candidate_actions else np.ones(names.size, bool)
    channels = [catalog.placements[row].channel_row for row, _ in batch.asked[0].asks]
    treated = ~np.isnan(catalog.actions.weights[:, channels]).all(1)
    result: np.ndarray[tuple[int], np.dtype[np.bool_]] = (
        wanted & ~np.isin(names, list(request.excluded_actions)) & treated
    )
    return result


@given(asked=st.lists(st.tuples(requests(), st.integers(0, 10**6), modes), min_size=2, max_size=6), person=people)
@settings(max_examples=30)
def test_together_and_alone_are_the_same_bytes(
    asked: list[tuple[DecideRequest, int, int]], person: dict[str, Any]
) -> None:
    here = desk()
    here.meet(Person(person, {}))
    alone = [here.ask_all([request], NOW_US, [key_of(str(number))]) for request, number, _ in asked]
    together = here.ask_all(
        [request for request, _, _ in asked], NOW_US, [key_of(str(number)) for _, number, _ in asked]
    )
    for (single,), joint in zip(alone, together, strict=True):
        assert single.reply.SerializeToString(deterministic=True) == joint.reply.SerializeToString(deterministic=True)
        assert single.record.SerializeToString(deterministic=True) == joint.record.SerializeToString(deterministic=True)


@given(request=requests(), number=st.integers(0, 10**6), person=people)
def test_order_of_names_in_the_request_is_without_effect(
    request: DecideRequest, number: int, person: dict[str, Any]
) -> None:
    here = desk()
    here.meet(Person(person, {}))
    turned = DecideRequest()
    turned.CopyFrom(request)
    for names in (turned.candidate_actions, turned.excluded_actions):
        reversed_names = list(names)[::-1]
        del names[:]
        names.extend(reversed_names)
    first, second = (here.ask(each, NOW_US, str(number)) for each in (request, turned))
    assert first.reply == second.reply


@given(number=st.integers(0, 10**6), person=people, placement=st.sampled_from(PLACEMENTS))
def test_an_action_that_is_refused_is_as_if_not_there(number: int, person: dict[str, Any], placement: str) -> None:
    here = desk()
    here.meet(Person(person, {}))
    request = DecideRequest(profile_id="00" * 16)
    request.placements.add(placement=placement, count=4)
    everyone = here.ask(request, NOW_US, str(number))
    request.candidate_actions.extend(name for name in here.catalog.actions.names if name not in everyone.refused)
    if request.candidate_actions:
        assert here.ask(request, NOW_US, str(number)).reply == everyone.reply


@given(request=requests(), number=st.integers(0, 10**6), person=people, mode=modes)
def test_slots_hold_distinct_actions_that_passed_every_gate(
    request: DecideRequest, number: int, person: dict[str, Any], mode: int
) -> None:
    here = desk()
    here.meet(Person(person, {}))
    answer = here.ask(request, NOW_US, str(number), mode)
    chosen = [slot.action for slot in answer.reply.slots if slot.action]
    assert len(chosen) == len(set(chosen))
    assert not set(chosen) & set(answer.refused)
    assert len(answer.reply.slots) == sum(placement.count for placement in request.placements)
    assert [(s.placement, s.position) for s in answer.reply.slots] == [
        (placement.placement, position) for placement in request.placements for position in range(placement.count)
    ]


@given(request=requests(), number=st.integers(0, 10**6), person=people)
def test_the_spliced_reply_says_what_the_record_says(
    request: DecideRequest, number: int, person: dict[str, Any]
) -> None:
    here = desk()
    here.meet(Person(person, {}))
    answer = here.ask(request, NOW_US, str(number))
    assert answer.record.request == request.SerializeToString()
    assert answer.record.provenance.catalog_sha256 == here.catalog.sha256
    assert answer.reply.catalog_revision == here.catalog.revision
    assert answer.reply.model_revisions[0].learned_lsn == answer.record.provenance.learned_lsn == 99
    rows = np.frombuffer(answer.record.rows, np.uint16)
    columns = np.frombuffer(answer.record.propensities, np.float32).reshape(len(request.placements), rows.size)
    for slot, recorded in zip(answer.reply.slots, answer.record.slots, strict=True):
        assert slot.action == recorded.action
        assert slot.position == recorded.position
        assert slot.selection_probability == recorded.selection_probability
        assert list(slot.reasons) == [recorded.choice_reason]
        if not slot.action:
            continue
        row = here.catalog.actions.rows[slot.action]
        assert recorded.row == row
        place = int(np.flatnonzero(rows == row)[0])
        assert slot.propensity == columns[recorded.placement_index, place]
        distribution = np.frombuffer(recorded.distribution, np.float32)
        assert distribution[place] == np.float32(recorded.selection_probability)
        assert slot.value == here.catalog.actions.worth[row, 0]
        treatment = next(
            t
            for a in here.catalog.message.actions
            if a.name == slot.action
            for t in a.treatments
            if t.name == slot.treatment
        )
        assert slot.content == treatment.content


weights = st.lists(st.floats(0, 10), min_size=1, max_size=12)


@given(
    worths=weights, raw=weights, closed=st.sets(st.integers(0, 11)), share_max=st.floats(0, 1), floor=st.floats(0, 1)
)
def test_bounds_keep_the_order_and_the_whole(
    worths: list[float], raw: list[float], closed: set[int], share_max: float, floor: float
) -> None:
    m = min(len(worths), len(raw))
    priorities, is_open = np.array(worths[:m]), np.array([i not in closed for i in range(m)])
    if not is_open.any():
        return
    before = np.where(is_open, np.array(raw[:m]) + 0.01, 0.0)
    before /= before.sum()
    got = before.copy()
    exploration.cap_share(priorities, is_open, share_max, got)
    is_best = is_open & (priorities == priorities[is_open].max())
    assert got[~is_best].sum() <= max(share_max, 0.0) + 1e-12
    exploration.raise_floor(is_open, floor, got)
    np.testing.assert_allclose(got, oracle.bounded(before, priorities, is_open, share_max, floor), rtol=0, atol=1e-12)
    assert abs(got.sum() - 1.0) < 1e-9
    assert got[is_open].min() >= min(floor, 1.0 / is_open.sum())
    assert not got[~is_open].any()


def test_large_sets_keep_the_best_and_the_chosen_of_a_distribution() -> None:
    catalog = seeded(5, 2_000)
    here = Desk(catalog)
    here.meet(Person({"age": 40.0, "member": True, "tier": "gold"}, {}))
    request = DecideRequest(profile_id="00" * 16)
    request.placements.add(placement="square_cb", count=2)
    answer = here.ask(request, NOW_US, "large")
    n_survivors = len(answer.record.rows) // 2
    assert n_survivors > 500
    for slot in answer.record.slots:
        rows = np.frombuffer(slot.distribution_rows, np.uint16)
        assert slot.row in rows
        assert 256 <= rows.size <= 257
        assert len(slot.distribution) == 4 * rows.size


@pytest.mark.parametrize("n_actions", [0, 1])
def test_tiny_catalogs_decide(n_actions: int) -> None:
    here = Desk(seeded(6, n_actions))
    request = DecideRequest()
    request.placements.add(placement="thompson", count=4)
    answer = here.ask(request, NOW_US)
    assert sum(bool(slot.action) for slot in answer.reply.slots) <= n_actions


def test_models_without_arrays_leave_the_base_rate() -> None:
    catalog = seeded(3, N_ACTIONS)
    models: Models = align(catalog, no_champion(catalog), None)
    assert not models.correction_weights.any()
    assert models.learner_epoch == 0
