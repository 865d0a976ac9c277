"""The world with every policy capability is as stated, is the plain one otherwise, and less of it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from server.catalog.compile import compile_catalog
from tests.benchmark import policies, policy_world, world
from tests.benchmark.policies import Pair, Sample, check_steps, growth
from tests.benchmark.report import Report
from tests.benchmark.stage import Plan
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_pb2 import CONSENT_DECISION_GRANTED

_PLAN = Plan(n_profiles=1, n_rounds=1, n_turns_max=1, round_s=1, open_loop_s=1, n_lags=1)


def _without_a_cap(catalog: catalog_pb2.Catalog) -> None:
    del catalog.contact_policies[0]


def _without_a_rule(catalog: catalog_pb2.Catalog) -> None:
    catalog.action_groups[0].eligibility = ""


def _with_a_rule_more(catalog: catalog_pb2.Catalog) -> None:
    catalog.actions[50].suitability = "profile.activity >= 0.5"


def _without_reading_the_context(catalog: catalog_pb2.Catalog) -> None:
    for action in catalog.actions:
        action.eligibility = action.eligibility.replace("context.hour >= 7.0", "profile.age >= 7.0")


def _with_one_goal(catalog: catalog_pb2.Catalog) -> None:
    del catalog.placements[0].goals[1]


def _without_consent(catalog: catalog_pb2.Catalog) -> None:
    catalog.placements[0].purpose = "order_state"


def _without_values(catalog: catalog_pb2.Catalog) -> None:
    for action in catalog.actions:
        action.value = ""


def _without_slack(catalog: catalog_pb2.Catalog) -> None:
    catalog.budgets[0].slack = 0


def _without_branches_that_explore(catalog: catalog_pb2.Catalog) -> None:
    for branch in catalog.experiments[0].branches:
        del branch.placements[:]


def _without_share_max(catalog: catalog_pb2.Catalog) -> None:
    catalog.placements[0].exploration.ClearField("share_max")


def test_the_world_is_as_stated() -> None:
    catalog = compile_catalog(policy_world.catalog_message())
    assert policy_world.lacking(catalog) == []
    found = policy_world.stated(catalog)
    assert found.keys() == policy_world.WANTED.keys()
    assert found["distinct rules of actions"] == 60
    assert found["rules of actions that read the context"] == 10


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without_a_cap, "frequency caps"),
        (_without_a_rule, "distinct rules of actions"),
        (_with_a_rule_more, "distinct rules of actions"),
        (_without_reading_the_context, "rules of actions that read the context"),
        (_with_one_goal, "goals of the placement"),
        (_without_consent, "placements that ask for consent"),
        (_without_values, "actions with a value expression"),
        (_without_slack, "unit budgets with slack"),
        (_without_branches_that_explore, "explorations that a branch changes"),
        (_without_share_max, "softmax with share_max and never_on"),
    ],
)
def test_what_is_not_in_use_any_more_is_named(change: Callable[[catalog_pb2.Catalog], None], named: str) -> None:
    message = policy_world.catalog_message()
    change(message)
    assert any(each.startswith(f"{named}: ") for each in policy_world.lacking(compile_catalog(message)))


def test_a_world_that_is_not_as_stated_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(policy_world, "catalog_message", world.catalog_message)
    with pytest.raises(RuntimeError, match="frequency caps: wanted 10, found 0"):
        policies.measure_policies(_PLAN, tmp_path, tmp_path / "log", Report(env={}))
    assert list(tmp_path.iterdir()) == []


def test_actions_people_and_what_is_learned_are_those_of_the_plain_world() -> None:
    plain, full = compile_catalog(world.catalog_message()), compile_catalog(policy_world.catalog_message())
    assert full.actions.names == plain.actions.names
    assert full.learned.names == plain.learned.names
    everybody = world.people(20)
    for ours, theirs in zip(policy_world.source_records(everybody), world.source_records(everybody), strict=True):
        (consent,) = ours.consents
        assert (consent.purpose, consent.state) == ("marketing", CONSENT_DECISION_GRANTED)
        del ours.consents[:]
        assert ours == theirs


def _steps(candidates_left: float, holds: float = 15.0, assigned: float = 0.75) -> policies.Figures:
    return {"together": {"candidates_left": [candidates_left], "holds": [holds], "assigned": [assigned]}}


def test_worlds_with_as_many_candidates_left_and_contacts_to_count_may_be_compared() -> None:
    check_steps(_steps(46.0, holds=0.0, assigned=0.0), _steps(45.0))


@pytest.mark.parametrize(
    ("full", "named"),
    [
        (_steps(40.0), "87% of the plain"),
        (_steps(50.0), "109% of the plain"),
        (_steps(46.0, holds=3.0), "3.00 holds"),
        (_steps(46.0, assigned=0.1), "0.10 assigned"),
    ],
)
def test_a_full_world_that_has_another_amount_to_do_is_refused(full: policies.Figures, named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        check_steps(_steps(46.0, holds=0.0, assigned=0.0), full)


def test_growth_is_the_median_of_pairs_with_both_sides_beside_it() -> None:
    assert growth([130.0, 150.0], [100.0, 100.0]) == pytest.approx([0.3, 0.5])
    pairs = [Pair(Sample(100.0, 400.0, 7.0), Sample(us, 600.0, 8.0)) for us in (110.0, 150.0, 130.0)]
    report = Report(env={})
    policies.report_pairs(pairs, "", [], report)
    told = report.results["policies.growth"]
    assert (told["value"], told["min"], told["max"], told["verdict"]) == (0.3, 0.1, 0.5, "met")
    assert told["baseline"]["policies.plain_us"] == 100.0
    assert told["baseline"]["policies.full_us"] == 130.0
    assert report.results["policies.cpu_growth"]["value"] == 0.5


def test_growth_beyond_the_goal_is_missed() -> None:
    report = Report(env={})
    policies.report_pairs([Pair(Sample(100.0, 400.0, 1.0), Sample(141.0, 600.0, 1.0))], "_lone", [], report)
    assert report.results["policies.growth_lone"]["verdict"] == "missed"
