"""A goal that asks for trees: they are promoted where they are better, published, and served as River says."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from server.catalog.catalog import Catalog, Goal
from server.catalog.compile import compile_catalog
from server.decisioning import forests
from server.decisioning.contributions import Corrections, contribute
from server.decisioning.live import read_arrays
from server.decisioning.models import align, no_champion
from server.decisioning.recall import differences
from server.registry.scorers import ScoringError
from server.storage.memory import MemoryLog
from tests.support import oracle
from tests.support.deciding import Desk, key_of
from tests.support.learning import SECOND_US, Writer
from tests.support.populating import Person
from training.export import Exporter, UnsafeArraysError
from training.families import FAMILIES
from training.fleet import Fleet
from training.learn import ARRAYS_FILE, Learner
from training.learners.base import FEATURE_MAX, Row, log_odds_of, sigmoid
from training.learners.forest import Forest
from training.rewards import Lesson, terms_of
from tsugi.log.v1.learner_pb2 import LearnerArrays, LearnerSnapshot
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_service_pb2 import DecideRequest

ACTIONS = ("book", "lamp", "rope")
NUMBERS = ("age", "spend", "visits")
N_ROWS = 1_500


@lru_cache
def catalog_with(learners: tuple[str, ...] = ("LEARNER_FAMILY_FOREST",), n_actions: int = 3) -> Catalog:
    message = {
        "name": "small",
        "currencyCode": "EUR",
        "identityNamespaces": [{"name": "number"}],
        "profileAttributes": [{"name": name, "type": "ATTRIBUTE_TYPE_NUMBER"} for name in NUMBERS],
        "outcomeTypes": [{"name": "click"}, {"name": "buy"}],
        "goals": [
            {
                "name": "visit",
                "outcomes": [{"type": "click", "reward": 1}],
                "attributionWindow": "2s",
                "baseRate": 0.3,
                "learners": learners,
            },
            {
                "name": "sale",
                "outcomes": [{"type": "buy", "reward": 1}],
                "attributionWindow": "2s",
                "baseRate": 0.1,
            },
        ],
        "channels": [{"name": "web"}],
        "placements": [
            {"name": "page", "channel": "web", "goal": "visit", "countMax": 2},
            {"name": "both", "channel": "web", "goals": [{"goal": "sale", "weight": 5}, {"goal": "visit"}]},
        ],
        "actions": [
            {"name": name, "group": "paper" if name == "book" else "house",
             "treatments": [{"name": "plain", "channel": "web"}]}
            for name in (*ACTIONS, "tent")[:n_actions]
        ],
        "actionGroups": [{"name": "paper"}, {"name": "house"}],
    }  # fmt: skip
    return compile_catalog(json_format.ParseDict(message, catalog_pb2.Catalog()))


def lessons(n: int, goal: Goal, names: tuple[str, ...], seed: int = 1) -> list[Lesson]:
    """Two numbers that mean something together, and hardly anything alone."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        age, spend, visits = rng.gauss(40.0, 12.0), rng.gauss(2_000.0, 500.0), rng.gauss(5.0, 2.0)
        by_name = {"profile.age": age, "profile.spend": spend, "profile.visits": visits}
        x = np.array([by_name.get(name, 0.0) for name in names], "<f4")
        chance = 0.75 if (age > 43.0) != (spend > 2_100.0) else 0.08
        reward = float(rng.random() < chance)
        made.append(Lesson(goal, rng.choice(ACTIONS), names, x.tobytes(), goal.base_log_odds, reward))
    return made


def saved(fleet: Fleet) -> bytes:
    snapshot = LearnerSnapshot()
    fleet.save(snapshot)
    return bytes(snapshot.SerializeToString(deterministic=True))


def restored(fleet: Fleet) -> Fleet:
    successor = Fleet()
    successor.load(LearnerSnapshot.FromString(saved(fleet)))
    return successor


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """Return the state after many rows, and a restart among them."""
    catalog, taught = catalog_with(), Fleet()
    terms = terms_of(catalog)
    taught.meet(terms.goals.values(), terms.names, terms.actions)
    for i, lesson in enumerate(lessons(N_ROWS, catalog.goals[0], catalog.learned.names)):
        taught.learn(lesson)
        if i == N_ROWS // 2:
            taught = restored(taught)
    return taught


def published(fleet: Fleet) -> LearnerArrays:
    exporter = Exporter(fleet)
    exporter.renew()
    return exporter.message(1, 2, 3)


def decided(desk: Desk, n: int, seed: int = 9) -> list[DecisionRecord]:
    rng = random.Random(seed)
    records = []
    for i in range(n):
        facts = {"age": rng.gauss(40.0, 12.0), "spend": rng.gauss(2_000.0, 500.0), "visits": rng.gauss(5.0, 2.0)}
        desk.meet(Person(facts, {}))
        request = DecideRequest(profile_id="00" * 16)
        for placement in ("page", "both"):
            request.placements.add(placement=placement, count=1)
        records.append(desk.ask(request, decision_id=f"d{i}").record)
    return records


def rivers(fleet: Fleet, catalog: Catalog, record: DecisionRecord, goal: str = "visit") -> list[float]:
    """Return what River expects of each survivor, from what was recorded."""
    learned = dict(zip(catalog.learned.names, np.frombuffer(record.learned_features, "<f4").tolist(), strict=True))
    scaling = fleet.scaling
    x = np.ones(1 + len(fleet.space.columns))
    for name, j in fleet.space.columns.items():
        x[1 + j] = min(max((learned[name] - scaling.centers[j]) / scaling.spreads[j], -8.0), 8.0)
    names = [catalog.actions.names[row] for row in np.frombuffer(record.rows, np.uint16).tolist()]
    learner = fleet.goals[goal].serving.learner
    prior = catalog.goals[catalog.goal_rows[goal]].base_log_odds
    plain = [
        learner.predict_one(Row(fleet.space.rows[name], x, prior)).mean if name in fleet.space.rows else sigmoid(prior)
        for name in names
    ]
    slope, intercept = fleet.goals[goal].calibration.scaling
    return [sigmoid(slope * log_odds_of(chance) + intercept) for chance in plain]


def test_every_family_a_catalog_may_name_is_there() -> None:
    names = [
        name.removeprefix("LEARNER_FAMILY_").lower() for name in catalog_pb2.LearnerFamily.DESCRIPTOR.values_by_name
    ]
    assert set(names) - {"unspecified"} <= set(FAMILIES)


def test_workers_cut_features_as_learners_do() -> None:
    assert forests.FEATURE_MAX == FEATURE_MAX


def test_a_family_that_a_catalog_names_is_not_dropped_with_the_weak() -> None:
    """Where nothing is to be found, rounds go by and others come and go."""
    catalog, fleet, rng = catalog_with(), Fleet(), random.Random(6)
    for i in range(3_200):
        x = np.array([rng.gauss(0.0, 1.0) for _ in catalog.learned.names], "<f4")
        goal = catalog.goals[0]
        lesson = Lesson(goal, "book", catalog.learned.names, x.tobytes(), goal.base_log_odds, float(rng.random() < 0.3))
        fleet.learn(lesson)
        if i % 256 == 0:
            assert any(member.learner.family == "forest" for member in fleet.goals["visit"].members)
    assert len(fleet.goals["visit"].changes) > 2


def test_trees_come_to_serve_a_goal_that_asks_for_them_and_no_other(fleet: Fleet) -> None:
    assert fleet.goals["visit"].serving.learner.family == "forest"
    assert all(member.learner.family != "forest" for member in fleet.goals["sale"].members)


def test_who_takes_part_follows_the_catalog_in_force() -> None:
    fleet, with_trees, without = Fleet(), catalog_with(), catalog_with(())
    for catalog, n_forests in ((without, 0), (with_trees, 1), (without, 1), (with_trees, 1)):
        fleet.meet(catalog.goals)
        families = [member.learner.family for member in fleet.goals["visit"].members]
        assert families.count("forest") == n_forests
        assert saved(restored(fleet)) == saved(fleet)


def test_a_restart_goes_on_to_the_bit(fleet: Fleet) -> None:
    catalog = catalog_with()
    uninterrupted, restarted = restored(fleet), restored(fleet)
    for lesson in lessons(200, catalog.goals[0], catalog.learned.names, seed=2):
        uninterrupted.learn(lesson)
        restarted.learn(lesson)
    restarted = restored(restarted)
    for lesson in lessons(100, catalog.goals[0], catalog.learned.names, seed=3):
        uninterrupted.learn(lesson)
        restarted.learn(lesson)
    assert saved(restarted) == saved(uninterrupted)
    assert published(restarted) == published(uninterrupted)


@pytest.mark.parametrize(("n_actions", "choice"), [(3, 0), (4, 0), (3, 1)])
def test_workers_expect_what_river_does_from_what_they_record(fleet: Fleet, n_actions: int, choice: int) -> None:
    """Also of an action that nothing is said of yet, and of trees on top of a weighted sum."""
    catalog = catalog_with(n_actions=n_actions)
    if choice:
        fleet = restored(fleet)
        fleet.goals["visit"].serving.learner = Forest(fleet.space, 0.3, Forest.choices[choice])
        for lesson in lessons(800, catalog.goals[0], catalog.learned.names):
            fleet.learn(lesson)
    desk = Desk(catalog, arrays=published(fleet))
    spread = []
    for record in decided(desk, 60):
        first, second = np.frombuffer(record.propensities, np.float32).reshape(2, -1)
        expected = rivers(fleet, catalog, record)
        np.testing.assert_allclose(first, expected, rtol=0.0, atol=1e-6)
        np.testing.assert_allclose(np.frombuffer(record.other_propensities, np.float32), expected, rtol=0.0, atol=1e-6)
        np.testing.assert_allclose(second, rivers(fleet, catalog, record, "sale"), rtol=0.0, atol=1e-6)
        priors = np.frombuffer(record.prior_log_odds, np.float32).reshape(2, -1)[0]
        assert (priors == np.float32(catalog.goals[0].base_log_odds)).all()
        assert differences(record, catalog) == []
        spread.append(expected[0])
    assert max(spread) - min(spread) > 0.3


def test_what_trees_add_is_told_as_one_sum(fleet: Fleet) -> None:
    catalog = catalog_with()
    desk = Desk(catalog, arrays=published(fleet))
    corrections = Corrections()
    corrections.keep(catalog, replace(desk.models, arrays_sha256=bytes(32)))
    (record,) = decided(desk, 1)
    record.provenance.arrays_sha256, record.provenance.catalog_sha256 = bytes(32), catalog.sha256
    told = contribute(record, catalog, None, corrections.of(record.provenance), range(3))
    prior, expected = catalog.goals[0].base_log_odds, rivers(fleet, catalog, record)
    for i in range(3):
        (only,) = told[0, i]
        assert sigmoid(prior + only.log_odds) == pytest.approx(expected[i], abs=1e-5)
        assert len(told[1, i]) != 1 or told[1, i][0].feature != only.feature


def test_trees_that_fail_add_nothing_and_say_so(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = catalog_with()
    desk = Desk(catalog, arrays=published(fleet))
    (forest,) = desk.models.forests

    def fail(*_: object) -> None:
        raise ScoringError("as the test wants it")

    monkeypatch.setattr(type(forest), "score", fail)
    request = DecideRequest(profile_id="00" * 16)
    request.placements.add(placement="page", count=1)
    _, decisions = desk.decisions([request], 0, [key_of("d")])
    assert decisions.is_model_unavailable
    prior = np.full(decisions.rows.size, catalog.goals[0].base_log_odds, np.float32)
    without = oracle.propensities(prior, decisions.rows, decisions.learned[0], desk.models, 0)
    np.testing.assert_allclose(decisions.propensities, without, atol=1e-6)


@pytest.mark.parametrize("fault", ["graph", "width", "height"])
def test_arrays_with_trees_that_cannot_be_run_are_refused(fleet: Fleet, fault: str) -> None:
    catalog, arrays = catalog_with(), published(fleet)
    block = arrays.goals[0]
    if fault == "graph":
        block.correction_forest = b"no graph"
    elif fault == "width":
        block.correction_forest_inputs = np.zeros(len(block.actions) * 3).tobytes()
    else:
        block.correction_forest_inputs = block.correction_forest_inputs[:-8]
    with pytest.raises(ValueError):
        align(catalog, no_champion(catalog), arrays)


def test_a_graph_that_says_something_else_is_not_published(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    lying = restored(fleet)
    catalog = catalog_with()
    for lesson in lessons(3, catalog.goals[0], catalog.learned.names, seed=4):
        lying.learn(lesson)
    forest = lying.goals["visit"].serving.learner
    new = type(forest)(lying.space, 0.3, forest.settings)
    monkeypatch.setattr(forest, "model", new.model)  # type: ignore[attr-defined]  # a forest has one
    with pytest.raises(UnsafeArraysError):
        Exporter(lying).renew()


def test_from_the_log_to_the_worker_and_through_a_restart(tmp_path: Path) -> None:
    """The learner process without a process: half of the log, a flush, another process for the rest."""
    catalog, log = catalog_with(), MemoryLog(b"log-id-16-bytes.")
    writer = Writer(log)
    writer.put_in_force(catalog)
    for lesson in lessons(1_200, catalog.goals[0], catalog.learned.names):
        features = np.frombuffer(lesson.features, "<f4").tolist()
        key = writer.decide([(lesson.action, "visit")], catalog=catalog, features=features)
        if lesson.reward:
            writer.report(key, lesson.action, "click")
        writer.now_us += SECOND_US
        writer.tick()
    folders = tmp_path / "one", tmp_path / "two"
    whole, parted = (Learner(log, folder, {catalog.sha256: catalog}.__getitem__, lambda: 0.0) for folder in folders)
    while whole.step():
        pass
    for _ in range(3):
        parted.step()
    parted.flush()
    parted.close()
    parted = Learner(log, folders[1], {catalog.sha256: catalog}.__getitem__, lambda: 0.0)
    while parted.step():
        pass
    assert parted.state().goals == whole.state().goals
    assert whole.publish_if_due()
    read = read_arrays(folders[0] / ARRAYS_FILE)
    assert read is not None
    (forest,) = align(catalog, no_champion(catalog), *read).forests
    assert forest.goal_row == catalog.goal_rows["visit"]
    for learner in (whole, parted):
        learner.close()
