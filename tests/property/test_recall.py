"""Deciding recorded decisions again: to the last bit, whatever catalog and models they were made with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from server.catalog.contact_terms import CAP
from server.decisioning.claims import Chosen
from server.decisioning.decide import BUDGET_SPENT, Scratch, decide
from server.decisioning.explanation import explain
from server.decisioning.gather import Batch
from server.decisioning.live import make_live
from server.decisioning.models import align
from server.decisioning.recall import NotItsCatalogError, differences
from server.decisioning.remember import Views
from server.storage.record import Record
from tests.property.test_core import NOW_US, PLACEMENTS, arrays
from tests.support.catalogs import eventful
from tests.support.deciding import TOKEN_KEY, Desk, given_champion, key_of
from tests.support.populating import Person
from training.replay_decision import replay_record
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse

N_DECISIONS = 400  # of each desk: 3,200 in all
DESKS = [(catalog_seed, models_seed) for catalog_seed in (11, 12, 13, 14) for models_seed in (1, 2)]


@lru_cache(2)
def desk(catalog_seed: int, models_seed: int) -> Desk:
    catalog = eventful(catalog_seed, 40)
    rng = np.random.default_rng(models_seed)
    propensities = dict(zip(catalog.actions.names, rng.uniform(0.01, 0.6, 40).tolist(), strict=True))
    goal = ("click", "sale")[models_seed % 2]
    return Desk(catalog, champion=given_champion(catalog, propensities, goal), arrays=arrays(catalog, models_seed))


def random_request(rng: np.random.Generator, names: tuple[str, ...]) -> DecideRequest:
    request = DecideRequest(profile_id="00" * 16)
    for placement in rng.choice(PLACEMENTS, int(rng.integers(1, 5)), replace=False):
        request.placements.add(placement=str(placement), count=int(rng.integers(1, 5)))
    if rng.random() < 0.8:
        request.context["hour"].number_value = float(rng.uniform(0, 24))
    if rng.random() < 0.2:
        request.excluded_actions.extend(str(name) for name in rng.choice(names, 5, replace=False))
    if rng.random() < 0.1:
        request.candidate_actions.extend(str(name) for name in rng.choice(names, 12, replace=False))
    return request


def random_person(rng: np.random.Generator) -> Person:
    facts: dict[str, Any] = {"age": float(rng.uniform(16, 80)), "member": bool(rng.random() < 0.5)}
    facts["tier"] = str(rng.choice(["bronze", "silver", "gold"]))
    known = {name: value for name, value in facts.items() if rng.random() < 0.85}
    return Person(known, {"customer_number": f"c-{rng.integers(1000)}"})


def recorded(here: Desk, seed: int, n: int) -> list[tuple[DecisionRecord, DecideResponse]]:
    """Decide for n people as a worker does, near the ends of budgets now and then."""
    rng = np.random.default_rng(seed)
    catalog, found = here.catalog, []
    caps = np.flatnonzero(catalog.profiles.contacts.targets.kinds == CAP)
    budgets = [target for target in catalog.budgets.targets if target >= 0]
    for number in range(n):
        here.meet(random_person(rng))
        request = random_request(rng, catalog.actions.names)
        batch, _ = here.decisions([request], NOW_US, [key_of(f"{seed}/{number}")])
        (asked,) = batch.asked
        if rng.random() < 0.3:
            asked.budgets = [(target, int(rng.integers(0, 5))) for target in budgets]
        if rng.random() < 0.3:
            asked.holds.append((int(rng.choice(caps)), 1))
        if rng.random() < 0.2:
            asked.marks[0] |= BUDGET_SPENT
        decisions = decide(batch.questions(), catalog, here.models, Scratch())
        views = Views(batch, decisions, catalog, here.live.champion)
        reply = views.reply(0, TOKEN_KEY)
        found.append((DecisionRecord.FromString(views.record(0, reply)), DecideResponse.FromString(reply)))
    return found


@pytest.mark.parametrize(("catalog_seed", "models_seed"), DESKS)
def test_every_decision_is_the_same_to_the_last_bit(catalog_seed: int, models_seed: int) -> None:
    here = desk(catalog_seed, models_seed)
    records = [record for record, _ in recorded(here, 100 * catalog_seed + models_seed, N_DECISIONS)]
    assert [found for record in records if (found := differences(record, here.catalog))] == []
    # What was drawn uses every capability, or the test would show nothing.
    assert sum(bool(record.assignments) for record in records) > N_DECISIONS / 4
    assert any(record.holdouts for record in records)
    assert any(record.random_control for record in records)
    assert any(record.budgets for record in records)
    assert any(record.posterior_means for record in records)
    assert any(record.other_propensities for record in records)
    filled = [slot for record in records for slot in record.slots if slot.action]
    assert len(filled) > N_DECISIONS
    assert len({slot.choice_reason for slot in filled}) == 3


@pytest.mark.parametrize("models_seed", [1, 2])
def test_goals_after_the_first_are_recorded_with_the_priors_they_were_scored_with(models_seed: int) -> None:
    here = desk(11, models_seed)
    champion_goal = ("click", "sale")[models_seed % 2]
    rng = np.random.default_rng(models_seed)
    stated = dict(zip(here.catalog.actions.names, rng.uniform(0.01, 0.6, 40).tolist(), strict=True))
    base = {goal.name: goal.base_log_odds for goal in here.catalog.goals}
    placements = {placement.name: placement for placement in here.catalog.message.placements}
    n_stated = n_base = 0
    for record, _ in recorded(here, models_seed, 60):
        asked = DecideRequest.FromString(record.request).placements
        for slot in record.slots:
            goals = placements[asked[slot.placement_index].placement].goals
            others = {other.goal: other.prior_log_odds for other in slot.other_goals}
            assert set(others) == ({each.goal for each in goals[1:]} if slot.action else set())
            for goal, prior_log_odds in others.items():
                if goal == champion_goal:
                    chance = stated[slot.action]
                    assert prior_log_odds == pytest.approx(np.log(chance / (1 - chance)), abs=1e-5)
                    n_stated += 1
                else:
                    assert prior_log_odds == np.float32(base[goal])
                    n_base += 1
    assert n_stated > 0
    assert n_base > 0 or models_seed == 1


def test_another_bit_anywhere_is_noticed() -> None:
    here = desk(11, 1)
    records = [record for record, _ in recorded(here, 5, 40)]
    record = next(each for each in records if len(each.slots) > 2 and all(slot.action for slot in each.slots))
    assert differences(record, here.catalog) == []
    changes: list[tuple[Callable[[DecisionRecord], None], str | None]] = [
        (lambda other: setattr(other, "seed", other.seed ^ 1), None),
        (lambda other: setattr(other, "now_us", NOW_US - 10**14), "refusal_reasons"),
        (lambda other: setattr(other, "refusal_reasons", bytes([9]) + other.refusal_reasons[1:]), "refusal_reasons"),
        (lambda other: setattr(other, "learned_features", bytes(len(other.learned_features))), "learned_features"),
        (lambda other: setattr(other.slots[0], "selection_probability", 0.123), "slots[0].selection_probability"),
        (lambda other: setattr(other.slots[0], "choice_reason", 4), "slots[0].choice_reason"),
        (lambda other: setattr(other.slots[1], "prior_log_odds", 9.0), "slots[1].prior_log_odds"),
        (lambda other: setattr(other.slots[1], "row", (other.slots[1].row + 1) % 40), "slots[1].row"),
    ]
    for change, named in changes:
        other = copy.deepcopy(record)
        change(other)
        found = differences(other, here.catalog)
        assert found if named is None and found else named is None or named in found


def test_propensities_are_inputs() -> None:
    """With other propensities other priorities follow; so what is recorded is what was used."""
    here = desk(12, 2)
    changed = 0
    for record, _ in recorded(here, 6, 60):
        propensities = np.frombuffer(record.propensities, np.float32)[::-1]
        other = copy.deepcopy(record)
        other.propensities = propensities.tobytes()
        changed += bool(differences(other, here.catalog))
    assert changed > 20


def test_another_catalog_is_refused_or_differs() -> None:
    here, there = desk(11, 1), eventful(12, 39)
    for record, _ in recorded(here, 7, 20):
        try:
            assert differences(record, there)
        except NotItsCatalogError as error:
            assert there.revision in str(error)


def test_explanations_say_what_replies_said() -> None:
    here = desk(13, 1)
    n_closed = 0
    for record, reply in recorded(here, 8, 60):
        told = explain(record, here.catalog)
        standings = {
            (candidate.action, standing.placement): standing
            for candidate in told.candidates
            for standing in candidate.standings
        }
        for slot in reply.slots:
            if slot.action:
                standing = standings[slot.action, slot.placement]
                assert (standing.propensity, standing.value, standing.priority) == (
                    slot.propensity, slot.value, slot.priority,
                )  # fmt: skip
                chances = standing.selection_probabilities
                assert chances[slot.position] == np.float32(slot.selection_probability)
                assert not any(standing.closed_by[slot.position : slot.position + 1])
        for (action, _), standing in standings.items():
            for chance, closed in zip(standing.selection_probabilities, standing.closed_by or (), strict=False):
                assert not (chance and closed), action
        n_closed += sum(bool(standing.closed_by) for standing in standings.values())
    assert n_closed > 60, "compositions close slots, and that is told"


def test_desk_and_challenger_share_the_core() -> None:
    """A batch parted by model decides as whole batches do."""
    here = desk(11, 1)
    served = make_live(here.catalog, align(here.catalog, here.models.champion, None), 1, 0, "tests").champion
    requests = [random_request(np.random.default_rng(i), here.catalog.actions.names) for i in range(6)]
    batch, whole = here.decisions(requests, NOW_US, [key_of(str(i)) for i in range(6)])
    part: Batch = batch.part([1, 4])
    decisions = decide(part.questions(), here.catalog, here.models, Scratch())
    views, all_views = Views(part, decisions, here.catalog, served), Views(batch, whole, here.catalog, served)
    assert [views.reply(q, TOKEN_KEY) for q in (0, 1)] == [all_views.reply(q, TOKEN_KEY) for q in (1, 4)]
    assert isinstance(views.chosen(0)[0], Chosen)


def test_other_survivors_are_told_and_end_no_replay() -> None:
    here = desk(11, 1)
    (changed, _), *_ = recorded(here, 5, 1)
    changed.now_us = NOW_US - 10**14  # before anything begins
    payload = changed.SerializeToString()
    record = Record(7, RecordKind.RECORD_KIND_DECISION, NOW_US, payload, bytes(16), bytes(16), (), False, bytes(32))
    replayed = replay_record(record, lambda _sha256: here.catalog)
    assert "refusal_reasons" in replayed.differences
