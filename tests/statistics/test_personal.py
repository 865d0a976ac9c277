"""People whose own rates differ are foretold better from their history than from what holds for all, or from it alone.

Everything but the people is real: decisions of the core over the projected state, their records, the projector, the
join of decisions and outcomes, and the strengths learned from it and handed back. The seeds are fixed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

from server.decisioning.models import align
from server.storage.memory import MemoryStore
from tests.support.catalogs import compiled
from tests.support.deciding import Desk, given_champion
from tests.support.histories import SECOND_US
from tests.support.people import People
from training.personal import Personal
from training.rewards import Rewards, terms_of
from tsugi.log.v1.learner_pb2 import GoalArrays, LearnerArrays
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.requests import decide_request

CATALOG = compiled()
GIVEN = {"action_0": 0.05, "action_1": 0.1, "action_2": 0.15, "action_3": 0.08}
N_PEOPLE, N_ROUNDS, RENEWED_EVERY = 120, 60, 5


class Lived(NamedTuple):
    """What came of a while: mean log loss over its second half, and what was learned."""

    shrunk: float
    general: float
    own_rate: float  # of a person's successes by times shown, as it stood; the general one before the first
    strengths: tuple[float, float]


def live(strength: float, seed: int) -> Lived:
    rng = np.random.default_rng(seed)
    factors = rng.gamma(strength, 1.0 / strength, N_PEOPLE) if strength < math.inf else np.ones(N_PEOPLE)
    people = People(CATALOG)
    everybody = [("customer_number", str(i)) for i in range(N_PEOPLE)]
    for who in everybody:
        people.history.know(dict([who]))
    people.project()
    champion = given_champion(CATALOG, GIVEN, "click")
    desk, personal = Desk(CATALOG, champion=champion), Personal()
    assert isinstance(people.store, MemoryStore)
    desk.store = people.store
    rewards = Rewards(people.log, lambda _sha256: terms_of(CATALOG), personal.learn)
    n_shown, n_successes = np.zeros(N_PEOPLE), np.zeros(N_PEOPLE)
    losses: list[list[float]] = []
    read_lsn = 0
    for turn in range(N_ROUNDS):
        people.history.now_us += 3 * SECOND_US
        action = f"action_{turn % 4}"
        keys = [turn.to_bytes(8, "big") + i.to_bytes(8, "big") for i in range(N_PEOPLE)]
        requests = [decide_request({"greedy": 1}, identities=[who], candidate_actions=[action]) for who in everybody]
        answers = desk.ask_all(requests, people.history.now_us, keys)
        for i, (key, answer) in enumerate(zip(keys, answers, strict=True)):
            (slot,) = answer.record.slots
            people.history.record(RecordKind.RECORD_KIND_DECISION, answer.record, key)
            success = bool(rng.random() < slot.general_propensity * factors[i])
            if success:
                people.history.report(key, action)
            rate = n_successes[i] / n_shown[i] if n_shown[i] else slot.general_propensity
            if 2 * turn >= N_ROUNDS:
                stated = (answer.reply.slots[0].propensity, slot.general_propensity, rate)
                losses.append([_log_loss(p, success) for p in stated])
            n_shown[i] += 1
            n_successes[i] += success
        people.project()
        for record in people.log.read(read_lsn + 1, 1 << 20):
            rewards.apply(record)
            read_lsn = record.lsn
        if turn % RENEWED_EVERY == RENEWED_EVERY - 1:
            desk.models = align(CATALOG, champion, _published(personal))
    shrunk, general, own_rate = np.mean(losses, axis=0).tolist()
    return Lived(shrunk, general, own_rate, personal.strengths("click"))


def _log_loss(p: float, success: bool) -> float:
    p = min(max(p, 1e-3), 1.0 - 1e-3)
    return -math.log(p if success else 1.0 - p)


def _published(personal: Personal) -> LearnerArrays:
    d = len(CATALOG.learned.names)
    nothing = GoalArrays(
        goal="click",
        actions=CATALOG.actions.names,
        correction_weights=np.zeros((4, d)).tobytes(),
        correction_intercepts=np.zeros(4).tobytes(),
        posterior_means=np.zeros((4, d + 1)).tobytes(),
        posterior_covariances=np.tile(np.eye(d + 1), (4, 1, 1)).tobytes(),
        posterior_scale=1.0,
    )
    arrays = LearnerArrays(format_version=1, epoch=1, features=CATALOG.learned.names, goals=[nothing])
    personal.export(arrays)
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.7, 2.0])
def test_shrunk_is_better_than_what_holds_for_all_and_than_each_persons_own_rate(strength: float) -> None:
    lived = live(strength, seed=5)
    assert lived.shrunk < lived.general - 0.005
    assert lived.shrunk < lived.own_rate - 0.01
    group, action = lived.strengths
    assert strength / 2 <= group <= 2 * strength, "what people really differ by"
    assert action >= 32.0, "the actions of a person do not differ"


@pytest.mark.slow
def test_where_people_do_not_differ_nothing_is_lost() -> None:
    lived = live(math.inf, seed=6)
    assert lived.strengths == (math.inf, math.inf)
    assert lived.shrunk == lived.general < lived.own_rate
