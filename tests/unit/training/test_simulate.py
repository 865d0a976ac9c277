"""The simulated world: reproducible, said in declared facts only, and worth learning in."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from cel_expr_python import cel

from tests.support.sports_retail import catalog
from training.simulate import (
    DELAY_MAX_S,
    DELAY_MIN_S,
    LOST_SHARE,
    UNKNOWN_SHARE,
    Era,
    Person,
    Visit,
    World,
    best_value,
    uniform_value,
)
from tsugi.requests import to_value

SEED = 1


def visits(world: World, n: int, seed: int = 5) -> list[tuple[Person, Visit]]:
    rng = np.random.default_rng(seed)
    return [(person, world.page_view(rng)) for person in world.people(n)]


def test_same_seed_gives_the_same_people_visits_and_truth() -> None:
    first, second = World(catalog(), SEED), World(catalog(), SEED)
    for (a, at), (b, bt) in zip(visits(first, 50), visits(second, 50), strict=True):
        assert (a.identities, a.attributes, at.placement, at.context) == (
            b.identities,
            b.attributes,
            bt.placement,
            bt.context,
        )
        assert first.truth(a, at) == second.truth(b, bt)


def test_people_are_the_same_in_either_era_and_others_with_another_seed() -> None:
    today, past, other = World(catalog(), SEED), World(catalog(), SEED, era=Era.PAST), World(catalog(), SEED + 1)
    attributes = [[person.attributes for person in world.people(20)] for world in (today, past, other)]
    assert attributes[0] == attributes[1]
    assert attributes[0] != attributes[2]


def test_what_is_said_of_people_and_visits_is_what_the_catalog_declares() -> None:
    world, space = World(catalog(), SEED), catalog().space
    for person, visit in visits(world, 200):
        said = {f"profile.{name}": value for name, value in person.attributes.items()}
        said |= {f"context.{name}": value for name, value in visit.context.items()}
        known = np.where(np.isnan(visit.facts), person.facts, visit.facts)
        for fact, number in zip(space.facts[1:], known[1:], strict=True):
            if fact.name in said:
                assert fact.encode(to_value(said.pop(fact.name))) == number
            else:
                assert np.isnan(number)
        assert not said
        assert set(person.identities) <= catalog().namespaces


def test_visits_fill_declared_placements_of_their_channel() -> None:
    world, rng = World(catalog(), SEED), np.random.default_rng(5)
    seen = {}
    for visit in (*(world.page_view(rng) for _ in range(100)), world.call(rng)):
        placement = catalog().placements[catalog().placement_rows[visit.placement]]
        assert 1 <= visit.n_slots <= placement.count_max
        seen[visit.placement] = catalog().message.channels[placement.channel_row].name
    assert seen == {"home_banner": "web", "product_sidebar": "web", "basket_footer": "web", "agent_upsell": "call"}


def test_a_stated_share_of_profile_facts_is_unknown() -> None:
    people = World(catalog(), SEED).people(2_000)
    known = sum(len(person.attributes) for person in people)
    assert 1.0 - known / (2_000 * len(catalog().profiles.attributes)) == pytest.approx(UNKNOWN_SHARE, abs=0.01)


def test_eligible_actions_are_those_whose_rule_cel_itself_finds_true() -> None:
    facts_type = cel.Type.Map(cel.Type.STRING, cel.Type.DYN)
    environment = cel.NewEnv(variables={"profile": facts_type, "context": facts_type})
    actions = [a for a in catalog().message.actions if any(t.channel == "web" for t in a.treatments)]
    ended = [a.name for a in actions if a.HasField("valid_until_time")]
    rules = {a.name: environment.compile(a.eligibility or "true") for a in actions if a.name not in ended}
    world = World(catalog(), SEED)
    assert ended
    for person, visit in visits(world, 300):
        known = environment.Activation({"profile": person.attributes, "context": visit.context})
        verdicts = {name: rule.eval(known) for name, rule in rules.items()}
        expected = {name for name, verdict in verdicts.items() if verdict.type() == cel.Type.BOOL and verdict.value()}
        assert set(world.truth(person, visit)) == expected


def test_what_is_best_depends_on_the_person() -> None:
    world = World(catalog(), SEED)
    truths = [(world.truth(person, visit), visit.n_slots) for person, visit in visits(world, 1_000)]
    bests = [max(truth, key=truth.__getitem__) for truth, _ in truths]
    assert max(bests.count(name) for name in set(bests)) < 0.25 * len(bests)

    total = {name: sum(truth.get(name, 0.0) for truth, _ in truths) for name in catalog().actions.names}
    ranking = sorted(total, key=total.__getitem__, reverse=True)

    def filled_alike(truth: dict[str, float], n_slots: int) -> float:
        return float(np.mean([truth[name] for name in islice((r for r in ranking if r in truth), n_slots)]))

    uniform = np.mean([uniform_value(truth) for truth, _ in truths])
    best = np.mean([best_value(truth, n_slots) for truth, n_slots in truths])
    alike = np.mean([filled_alike(truth, n_slots) for truth, n_slots in truths])
    assert best > 3.0 * uniform  # room to learn
    assert (alike - uniform) / (best - uniform) < 0.5  # that one answer for everybody does not fill


def test_past_differs_from_today_for_the_same_person() -> None:
    today, past = World(catalog(), SEED), World(catalog(), SEED, era=Era.PAST)
    moved = sum(
        max(now, key=now.__getitem__) != max(then, key=then.__getitem__)
        for now, then in ((today.truth(p, v), past.truth(p, v)) for p, v in visits(today, 300))
    )
    assert 100 <= moved <= 270


def test_rewards_follow_the_true_propensity_and_a_stated_share_is_lost() -> None:
    world, rng = World(catalog(), SEED), np.random.default_rng(6)
    visit = world.page_view(rng)
    happenings = [world.happening(visit, 0.3, rng) for _ in range(20_000)]
    successes = [happening for happening in happenings if happening.reward == 1.0]
    # Both bounds are five standard deviations wide: a false alarm in two million seeds.
    assert len(successes) / 20_000 == pytest.approx(0.3, abs=0.017)
    lost = sum(happening.outcome_type == "" for happening in successes)
    assert lost / len(successes) == pytest.approx(LOST_SHARE, abs=0.015)
    assert {happening.outcome_type for happening in happenings} == {"", "click", "dismiss"}
    assert all(DELAY_MIN_S <= happening.delay_s <= DELAY_MAX_S for happening in happenings)


def test_reported_outcomes_settle_the_goal_of_their_placement_as_they_happened() -> None:
    world, rng = World(catalog(), SEED), np.random.default_rng(6)
    for visit in (world.page_view(rng), world.call(rng)):
        goal = catalog().goals[catalog().placements[catalog().placement_rows[visit.placement]].goal_row]
        for happening in (world.happening(visit, 0.5, rng) for _ in range(200)):
            if happening.outcome_type:
                assert goal.rewards[happening.outcome_type] == happening.reward


def test_outcomes_arrive_well_inside_the_attribution_window() -> None:
    assert all(goal.window_us >= (DELAY_MAX_S + 1.0) * 1e6 for goal in catalog().goals)


def test_online_learners_read_no_more_columns_than_they_can_learn_in_minutes() -> None:
    assert len(catalog().learned.names) <= 24
