"""Who serves, who is dropped, who begins: a fleet of learners that expect what the test puts into the row.

A learner with the setting column = c expects x[c] of a row, so that each does exactly as well as the test wants. Rates
of false alarms are over fixed seeds; over random ones a test here would fail once in ten thousand (FALSE_ALARM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from training import goal_fleet, standing
from training.drift import BLOCKS_MIN, HEARD_MAX, Drift
from training.families import CHALLENGERS_MAX, FAMILIES, FIRST, POSTERIORS
from training.goal_fleet import ALPHA, BYTES_MAX, CHANGES_KEPT, REVIEW_ROWS, ROUND_ROWS_MAX, ROUND_ROWS_MIN, GoalFleet
from training.learners.base import Doubles, Row, Settings
from training.learners.baseline import Baseline
from training.space import Space
from tsugi.log.v1.learner_pb2 import FleetChange, FleetChangeKind, GoalState

FALSE_ALARM = 1e-4
N_LEARNERS = 12  # columns 1..12; what column 0 of x holds, nobody expects
BEGUN, DROPPED, PROMOTED, DEMOTED, RESTARTED, RESET = (
    FleetChangeKind.Value(f"FLEET_CHANGE_KIND_{name}")
    for name in ("BEGUN", "DROPPED", "PROMOTED", "DEMOTED", "RESTARTED", "RESET")
)
FIRST_COLUMNS = (1, 2, 3, 4)


class Told(Baseline):
    """Expects what a column of the row says, and counts the rows it has learned from."""

    family: ClassVar[str] = "told"
    choices: ClassVar[tuple[Settings, ...]] = tuple({"column": float(1 + i)} for i in range(N_LEARNERS))
    size: ClassVar[int] = 1
    n_rows = 0

    def learn_one(self, row: Row, reward: float) -> float:
        self.n_rows += 1
        return float(row.x[int(self.settings["column"])])

    def heir(self, settings: Settings) -> Told:
        successor = type(self)(self._space, self._base_rate, settings)
        successor.n_rows = self.n_rows
        return successor

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        return cls.size * n_actions


class Large(Told):
    """Takes more room than there is."""

    family: ClassVar[str] = "large"

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        return BYTES_MAX // CHALLENGERS_MAX // 2 * n_actions


class Silent(Told):
    """In the place of the posterior."""

    family: ClassVar[str] = "silent"
    choices: ClassVar[tuple[Settings, ...]] = ({"column": 1.0},)
    is_posterior: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    families = {family.family: family for family in (Baseline, Told, Large, Silent)}
    monkeypatch.setattr(goal_fleet, "FAMILIES", families)
    monkeypatch.setattr(goal_fleet, "POSTERIORS", (Silent.family,))
    begin_with(monkeypatch, FIRST_COLUMNS)
    monkeypatch.setattr(goal_fleet, "LATER", tuple((Told.family, settings) for settings in Told.choices))


def begin_with(monkeypatch: pytest.MonkeyPatch, columns: Sequence[int]) -> None:
    monkeypatch.setattr(goal_fleet, "FIRST", tuple((Told.family, {"column": float(column)}) for column in columns))


class Play:
    """A fleet and everything it notes, played row by row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None, fleet: GoalFleet | None = None) -> None:
        space = Space()
        for action in ("book", "lamp"):
            space.admit_action(action)
        self.fleet = fleet or GoalFleet(space, "sale", 0.1)
        self.changes: list[tuple[int, FleetChange]] = []  # with the number of rows learned from

    def row(self, chances: Doubles, reward: float, prior: float = 0.1, weight: float = 1.0) -> None:
        x = np.concatenate([[1.0], chances])
        self.fleet.learn(Row(0, x, math.log(prior / (1.0 - prior)), weight), reward, self.fleet.n_rows + 1, 7)
        if self.fleet.n_rows % REVIEW_ROWS == 0:
            now = [change for change in self.fleet.changes if change.lsn == self.fleet.n_rows]
            self.changes += [(self.fleet.n_rows, change) for change in now]

    def rows(
        self, n: int, seed: int, chances_of: Callable[[float], Doubles], rate: float = 0.3, prior: float | None = None
    ) -> None:
        """Play rows of two kinds, half as likely and half again as likely to succeed as the rate.

        Args:
            n: how many.
            seed: of the rows.
            chances_of: what learners expect of a row with this rate.
            rate: of all.
            prior: what the baseline expects, the rate of all when not told.
        """
        rng = np.random.default_rng(seed)
        for rate_now, chance in zip(rng.choice([0.5, 1.5], n) * rate, rng.random(n), strict=True):
            self.row(chances_of(float(rate_now)), float(chance < rate_now), rate if prior is None else prior)

    def of(self, *kinds: int) -> list[tuple[int, FleetChange]]:
        return [(n_rows, change) for n_rows, change in self.changes if change.kind in kinds]

    @property
    def columns(self) -> list[int]:
        """Of all but baseline and posterior."""
        return [int(member.learner.settings["column"]) for member in self.fleet.members[2:]]


def all_expect(chance: float) -> Doubles:
    return np.full(N_LEARNERS, chance)


def better(*columns: int) -> Callable[[float], Doubles]:
    """Return chances where these learners know the rate of a row, and all others only the rate of all."""

    def chances_of(rate: float) -> Doubles:
        chances = all_expect(0.3)
        chances[[column - 1 for column in columns]] = rate
        return chances

    return chances_of


def test_a_goal_begins_with_baseline_posterior_and_the_first_of_the_list() -> None:
    fleet = Play().fleet
    assert [member.number for member in fleet.members] == list(range(6))
    assert isinstance(fleet.members[0].learner, Baseline) and fleet.posterior.learner.is_posterior
    assert fleet.serving is fleet.members[2]
    assert [member.is_challenger for member in fleet.members] == [False, False, True, True, True, True]
    assert sorted(fleet.sums[:, standing.TEST]) == list(range(1, 7)), "each test has its own share of alpha"


def test_the_real_list_begins_with_what_exists() -> None:
    assert all(FAMILIES[family].is_posterior for family in POSTERIORS)
    assert not any(FAMILIES[family].is_posterior for family, _ in FIRST)
    assert 1 <= len(FIRST) <= 1 + CHALLENGERS_MAX


def test_a_better_learner_is_promoted_once_it_is_proven_and_held_against_anew() -> None:
    play = Play()
    play.rows(ROUND_ROWS_MIN, 1, better(4))
    ((n_rows, change),) = play.of(PROMOTED)
    assert play.columns[play.fleet.members.index(play.fleet.serving) - 2] == 4
    assert (change.number, change.other, change.lsn, change.time_us) == (5, 2, n_rows, 7)
    assert change.lead > change.radius > 0.0
    assert n_rows % REVIEW_ROWS == 0 and n_rows >= 200
    assert (play.fleet.sums[:, standing.LEAD_ROWS] <= ROUND_ROWS_MIN - n_rows).all(), "leads begin anew"
    assert (play.fleet.sums[[0, 1, 2], standing.ROWS] == ROUND_ROWS_MIN).all(), "losses do not"
    assert play.fleet.sums[:, standing.TEST].min() > 6, "and so does their test"


def test_the_baseline_takes_over_from_one_that_is_worse_and_gives_way_again() -> None:
    play = Play()
    play.rows(ROUND_ROWS_MIN, 2, lambda rate: all_expect(0.45 - rate), rate=0.3)
    (first,) = play.of(DEMOTED, PROMOTED)
    assert (first[1].kind, first[1].number, first[1].other) == (DEMOTED, 2, 0)
    assert play.fleet.serving.number == 0
    play.rows(ROUND_ROWS_MIN, 3, all_expect)
    assert play.of(PROMOTED), "somebody else serves as soon as that is proven"
    assert play.fleet.serving.is_challenger


def test_one_that_expects_far_too_much_or_too_little_is_not_promoted_however_well_it_does() -> None:
    """It knows who is likelier but not how likely; the one that serves is worse still."""

    def chances_of(rate: float) -> Doubles:
        chances = all_expect(0.9)
        chances[3] = 0.65 if rate > 0.2 else 0.1  # over both kinds of rows: 0.375 of 0.15
        return chances

    play = Play()
    play.rows(512, 4, chances_of, rate=0.15, prior=0.9)
    assert standing.lead_of(play.fleet.sums[5], ALPHA).is_above_zero
    assert not standing.is_calibrated(play.fleet.sums[5])
    assert play.of(PROMOTED, DEMOTED) == []
    play.rows(512, 5, chances_of, rate=0.15, prior=0.5)
    assert not standing.is_calibrated(play.fleet.sums[0])
    assert play.fleet.serving.number == 0, "the baseline may always serve"


def test_of_several_proven_ones_the_furthest_ahead_is_promoted() -> None:
    play = Play()
    for i in range(256):
        reward, chances = float(i % 2), all_expect(0.5)
        chances[1], chances[3] = (0.6, 0.9) if reward else (0.4, 0.1)
        play.row(chances, reward, prior=0.5)
    ((n_rows, change),) = play.of(PROMOTED)
    assert (n_rows, change.number) == (224, 5), "the first review with enough rows"


def test_rounds_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.log2(ROUND_ROWS_MAX / ROUND_ROWS_MIN) % 1.0 == 0.0
    monkeypatch.setattr(goal_fleet, "ROUND_ROWS_MAX", 4 * ROUND_ROWS_MIN)
    play = Play()
    play.rows(16 * ROUND_ROWS_MIN, 6, lambda rate: all_expect(0.3))
    ends = sorted({n_rows for n_rows, _ in play.of(DROPPED)})
    assert [end // ROUND_ROWS_MIN for end in ends] == [1, 3, 7, 11, 15]
    state = play.fleet.save()
    assert (state.round_begin, state.round_end) == (15 * ROUND_ROWS_MIN, 19 * ROUND_ROWS_MIN)


def test_the_weaker_half_by_the_later_half_of_the_round_is_dropped_and_new_ones_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Learner 2 is far ahead early and behind later, 3 the other way round; 4 is behind throughout; 1 serves."""

    def early(rate: float) -> Doubles:
        chances = all_expect(0.3)
        chances[1:4] = 0.3 + 0.02 * (rate - 0.3) / 0.15, 0.3 - 0.01 * (rate - 0.3) / 0.15, 0.2
        return chances

    def late(rate: float) -> Doubles:
        chances = all_expect(0.3)
        chances[1:4] = 0.3 - 0.01 * (rate - 0.3) / 0.15, 0.3 + 0.005 * (rate - 0.3) / 0.15, 0.2
        return chances

    monkeypatch.setattr(goal_fleet, "ALPHA", 1e-30)  # nobody is promoted
    play = Play()
    play.rows(ROUND_ROWS_MIN // 2, 7, early)
    assert not play.fleet.sums[:, standing.LATE_ROWS].any()
    play.rows(ROUND_ROWS_MIN // 2 - 1, 8, late)
    np.testing.assert_array_equal(play.fleet.sums[:, standing.LATE_ROWS], ROUND_ROWS_MIN // 2 - 1)
    play.rows(1, 9, late)
    assert play.of(PROMOTED, DEMOTED) == []
    assert [change.number for _, change in play.of(DROPPED)] == [3, 5]
    assert [change.number for _, change in play.of(BEGUN)] == [6, 7], "newborns get new numbers"
    assert [member.number for member in play.fleet.members] == [0, 1, 2, 6, 4, 7]
    # The strongest has column 3; the next that nobody has is 5 (4 still took part); it goes on from what 3 has learned.
    # The other is the first in the list that does not take part by now, and begins from nothing.
    heir, from_list = play.fleet.members[3].learner, play.fleet.members[5].learner
    assert isinstance(heir, Told) and isinstance(from_list, Told)
    assert (heir.settings["column"], heir.n_rows) == (5.0, ROUND_ROWS_MIN)
    assert (from_list.settings["column"], from_list.n_rows) == (2.0, 0)
    assert {member.begun_lsn for member in play.fleet.members} == {0, ROUND_ROWS_MIN}
    assert not play.fleet.sums[[3, 5]][:, [standing.ROWS, standing.LEAD_ROWS]].any()
    assert not play.fleet.sums[:, standing.LATE_ROWS].any()


def test_where_nobody_leads_the_heir_is_of_the_one_that_serves() -> None:
    def chances_of(rate: float) -> Doubles:
        chances = all_expect(0.28)
        chances[0] = 0.3
        return chances

    play = Play()
    play.rows(ROUND_ROWS_MIN, 10, chances_of)
    heirs = [member.learner for member in play.fleet.members[2:] if member.number >= 6]
    assert isinstance(heirs[0], Told) and heirs[0].n_rows == ROUND_ROWS_MIN
    assert heirs[0].settings["column"] == 5.0, "next to 1 in the list, 2, 3 and 4 being taken"


def test_the_list_is_taken_in_turn_until_all_have_taken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_fleet, "ROUND_ROWS_MAX", ROUND_ROWS_MIN)
    play, seen = Play(), set(FIRST_COLUMNS)
    for end in range(16):
        play.rows(ROUND_ROWS_MIN, 20 + end, lambda rate: all_expect(0.3))
        seen.update(play.columns)
        assert len(set(play.columns)) == len(play.columns), "nobody takes part twice"
    assert seen == set(range(1, N_LEARNERS + 1))
    numbers = [change.number for _, change in play.of(BEGUN)]
    assert numbers == list(range(6, 6 + len(numbers)))


def test_baseline_posterior_and_the_one_that_serves_are_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where they are the worst of all; the posterior, always best here, never serves either."""
    monkeypatch.setattr(goal_fleet, "ROUND_ROWS_MAX", ROUND_ROWS_MIN)
    rng, play = np.random.default_rng(11), Play()
    for n in range(10):
        served_by = play.fleet.serving.number
        n_changes = len(play.changes)
        play.rows(ROUND_ROWS_MIN, 40 + n, lambda rate: rng.uniform(0.1, 0.5, N_LEARNERS))
        took_turns = {change.number for _, change in play.changes[n_changes:] if change.kind in {PROMOTED, DEMOTED}}
        dropped = {change.number for _, change in play.changes[n_changes:] if change.kind == DROPPED}
        assert not dropped & {0, 1, play.fleet.serving.number}
        assert took_turns or served_by not in dropped
        assert play.fleet.members[0].learner.family == "baseline" and play.fleet.posterior.number == 1


def test_what_there_is_no_room_for_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two actions the large ones would take just as much as there is, of three they would take more."""
    later = tuple((Large.family, settings) for settings in Large.choices)
    monkeypatch.setattr(goal_fleet, "LATER", later)
    for n_actions, families in ((2, {"told", "large"}), (3, {"told"})):
        play = Play()
        for i in range(n_actions):
            play.fleet._space.admit_action(f"action {i}") if i >= 2 else None
        play.rows(ROUND_ROWS_MIN, 12, lambda rate: all_expect(0.3))
        assert {member.learner.family for member in play.fleet.members[2:]} == families
        assert len(play.fleet.members) == 6, "who would be dropped stays when nobody can come"


def test_no_heir_of_a_family_there_is_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_fleet, "FIRST", tuple((Large.family, Large.choices[i]) for i in range(4)))
    play = Play()
    play.fleet._space.admit_action("tent")
    play.rows(ROUND_ROWS_MIN, 12, lambda rate: all_expect(0.3))
    begun = [member.learner.family for member in play.fleet.members if member.number >= 6]
    assert begun == ["told", "told"]


def test_a_challenger_whose_loss_has_risen_begins_anew_under_its_number() -> None:
    def chances_of(rate: float) -> Doubles:
        chances = all_expect(rate)
        chances[1] = 0.999
        return chances

    play = Play()
    play.rows(1_184, 13, all_expect)
    before = play.fleet.members[3]
    play.rows(64, 14, chances_of)
    assert play.fleet.members[3] is before and before.number == 3
    while not play.of(RESTARTED) and play.fleet.n_rows < 1_900:
        play.rows(REVIEW_ROWS, play.fleet.n_rows, chances_of)
    ((n_rows, change),) = play.of(RESTARTED)
    assert change.number == 3
    play.rows(REVIEW_ROWS, 15, all_expect)
    member = play.fleet.members[3]
    assert member is not before and (member.number, member.begun_lsn) == (3, n_rows)
    assert member.learner.settings == before.learner.settings
    assert member.learner.n_rows == play.fleet.sums[3, standing.ROWS] == REVIEW_ROWS  # type: ignore[attr-defined]
    assert len(member.drift.heard) == 1


def all_wrong(rate: float) -> Doubles:
    return all_expect(0.999)


def test_one_that_serves_goes_on_when_its_loss_has_risen_and_a_twin_begins_beside_it() -> None:
    play = Play()
    play.rows(960, 15, lambda rate: all_expect(0.3))
    serving = play.fleet.serving
    while not play.of(RESTARTED) and play.fleet.n_rows < 1_500:
        play.rows(REVIEW_ROWS, play.fleet.n_rows, all_wrong, prior=0.999)
    assert play.of(RESTARTED), "challengers do begin anew"
    assert play.fleet.serving is serving, "who serves goes on until somebody has proven to be better"
    assert serving.learner.n_rows == play.fleet.n_rows  # type: ignore[attr-defined]
    assert serving.number not in {change.number for _, change in play.of(RESTARTED, DROPPED)}
    twins = [m for m in play.fleet.members[2:] if m.learner.settings == serving.learner.settings and m is not serving]
    assert len(twins) == 1 and twins[0].begun_lsn > 960 and twins[0].number >= 6
    assert twins[0].learner.n_rows < REVIEW_ROWS  # type: ignore[attr-defined]


def test_a_twin_takes_the_place_of_the_weakest_in_the_earlier_half_of_a_round_too() -> None:
    def chances_of(rate: float) -> Doubles:
        chances = all_wrong(rate)
        chances[play.columns[1] - 1] = 0.9999
        return chances

    play = Play()
    play.rows(1_024, 15, lambda rate: all_expect(0.3))
    dropped_before = len(play.of(DROPPED))
    for member in play.fleet.members[3:]:
        member.drift = _Deaf()
    weak = play.fleet.members[3].number  # not in the last place
    while len(play.of(DROPPED)) == dropped_before and play.fleet.n_rows < 1_536:
        play.rows(REVIEW_ROWS, play.fleet.n_rows, chances_of, prior=0.999)
    assert [change.number for _, change in play.of(DROPPED)[dropped_before:]] == [weak]


class _Deaf(Drift):
    def has_risen(self, mean: float) -> bool:
        return False


class _Alarmed(Drift):
    """Raises an alarm whenever River's detector could: once it has heard more than BLOCKS_MIN blocks."""

    def has_risen(self, mean: float) -> bool:
        super().has_risen(mean)
        return len(self.heard) > BLOCKS_MIN


def test_an_alarm_storm_restarts_nobody_more_often_than_a_detector_takes_to_hear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And who serves stays until somebody has proven to be better (G18)."""
    monkeypatch.setattr(goal_fleet, "Drift", _Alarmed)
    play = Play()
    n_rows = 20 * REVIEW_ROWS * (BLOCKS_MIN + 1)
    play.rows(n_rows, 17, lambda rate: all_expect(0.3))
    assert play.fleet.serving.number == 2
    assert play.of(PROMOTED, DEMOTED) == []
    by_number: dict[int, list[int]] = {}
    for at, change in play.of(RESTARTED):
        by_number.setdefault(change.number, []).append(at)
    gaps = np.concatenate([np.diff(at) for at in by_number.values()])
    assert gaps.min() >= REVIEW_ROWS * (BLOCKS_MIN + 1)
    ends = {ROUND_ROWS_MIN * (2**k - 1) for k in range(1, 8)}
    twins = [at for at, change in play.of(DROPPED) if at not in ends]
    assert len(twins) > 5 and np.diff(twins).min() >= REVIEW_ROWS * (BLOCKS_MIN + 1)


def test_reset_lets_all_begin_anew_and_the_first_serve() -> None:
    play = Play()
    play.rows(ROUND_ROWS_MIN, 1, better(4))
    assert play.fleet.serving.number != 2
    before = [(member.number, member.learner.settings) for member in play.fleet.members]
    play.fleet.reset(lsn=5_000, time_us=9)
    assert [(member.number, member.learner.settings) for member in play.fleet.members] == before
    assert play.fleet.serving is play.fleet.members[2]
    assert all(member.begun_lsn == 5_000 and not member.drift.heard for member in play.fleet.members)
    assert all(getattr(member.learner, "n_rows", 0) == 0 for member in play.fleet.members)
    assert not play.fleet.sums[:, : standing.TEST].any()
    tests = play.fleet.sums[:, standing.TEST]
    assert len(set(tests)) == 6 and tests.min() > 6, "whoever resets often does not get more chances to be fooled"
    resets = [change for change in play.fleet.changes if change.kind == RESET]
    assert [(change.number, change.lsn, change.time_us) for change in resets] == [(n, 5_000, 9) for n, _ in before]


def test_the_newest_changes_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goal_fleet, "ROUND_ROWS_MAX", ROUND_ROWS_MIN)
    play = Play()
    for n in range(6):
        play.rows(ROUND_ROWS_MIN, 60 + n, lambda rate: all_expect(0.3))
        assert len(play.fleet.changes) <= CHANGES_KEPT
    assert len(play.changes) > CHANGES_KEPT
    assert play.fleet.changes == [change for _, change in play.changes][-CHANGES_KEPT:]


def noisy(rng: np.random.Generator, rate: float) -> Doubles:
    """What equally good learners expect."""
    return rate * np.exp(rng.normal(0.0, 0.4, N_LEARNERS))


def n_fooled(runs: int, n_rows: int, seed: int) -> int:
    """Play equal learners, and return in how many runs anybody was promoted or demoted."""
    fooled = 0
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        play = Play()
        rewards, weights = rng.random(n_rows) < 0.2, np.minimum(1.0 / rng.choice([0.9, 0.05, 0.02], n_rows), 20.0)
        for reward, weight in zip(rewards.tolist(), weights.tolist(), strict=True):
            play.row(
                noisy(rng, 0.2), float(reward), weight=weight, prior=min(0.2 * math.exp(rng.normal(0.0, 0.4)), 0.99)
            )
        fooled += bool(play.of(PROMOTED, DEMOTED))
    return fooled


@pytest.mark.slow
def test_a_lucky_learner_of_a_large_fleet_is_not_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are equally good (A/A): no more than alpha of the runs promote or demote anybody (G12, G19)."""
    begin_with(monkeypatch, range(1, N_LEARNERS + 1))
    assert n_fooled(30, 2_048, 1) <= stats.binom.isf(FALSE_ALARM, 30, ALPHA)


@pytest.mark.long
def test_a_lucky_learner_is_not_promoted_in_the_long_run_either(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_with(monkeypatch, range(1, N_LEARNERS + 1))
    assert n_fooled(100, 16_384, 2) <= stats.binom.isf(FALSE_ALARM, 100, ALPHA)


@pytest.mark.slow
def test_whoever_expects_nothing_of_rare_rewards_is_not_promoted_before_any_has_come() -> None:
    """The one that serves is right about a rate of 1 in 1,000; the others say 1 in 2,000, 4,000 and 10,000."""
    chances = all_expect(0.001)
    chances[1:4] = 0.0005, 0.00025, 0.0001
    for seed in range(10):
        play, rng = Play(), np.random.default_rng([3, seed])
        for reward in (rng.random(ROUND_ROWS_MIN) < 0.001).tolist():
            play.row(chances, float(reward), prior=0.001)
        assert play.of(PROMOTED, DEMOTED) == []


def restored(fleet: GoalFleet) -> GoalFleet:
    state = GoalState.FromString(fleet.save().SerializeToString(deterministic=True))
    return GoalFleet.restored(fleet._space, state)


@pytest.mark.slow
def test_a_restored_fleet_is_the_saved_one_at_any_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through promotions, rounds, restarts, and the block at which detectors begin anew."""
    monkeypatch.setattr(goal_fleet, "ROUND_ROWS_MAX", 4 * ROUND_ROWS_MIN)
    monkeypatch.setattr("training.drift.HEARD_MAX", 60)
    rng, play = np.random.default_rng(18), Play()
    copy = Play(fleet=restored(play.fleet))
    n_restored, is_wrong, best = 0, False, 3
    for i, rate in enumerate((rng.choice([0.2, 1.8], 3 * 60 * REVIEW_ROWS) * 0.3).tolist()):
        if i % REVIEW_ROWS in {0, 1, 31} and rng.random() < 0.2:
            copy, n_restored = Play(fleet=restored(copy.fleet)), n_restored + 1
        if i % 1_500 == 0:
            best = int(rng.integers(1, N_LEARNERS + 1))
        is_wrong = i % 1_500 > 1_000
        chances = noisy(rng, 0.97 if is_wrong else 0.3).clip(0.0, 1.0)
        chances[best - 1] = rate
        reward, weight = float(rng.random() < rate), float(rng.uniform(1.0, 20.0))
        for each in (play, copy):
            each.row(chances, reward, weight=weight)
        if i % 97 == 0:
            assert copy.fleet.save() == play.fleet.save(), f"at row {i}"
    assert n_restored > 50
    assert copy.fleet.save() == play.fleet.save()
    kinds = {change.kind for _, change in play.changes}
    assert kinds >= {PROMOTED, RESTARTED, DROPPED, BEGUN}, "otherwise little is shown"
    assert max(len(member.drift.heard) for member in play.fleet.members) <= 60 < HEARD_MAX


def test_a_restored_fleet_can_be_reset_and_corrected_like_the_saved_one() -> None:
    play = Play()
    play.rows(ROUND_ROWS_MIN + 40, 19, better(3))
    copy = restored(play.fleet)
    for fleet in (play.fleet, copy):
        fleet.correct(Row(1, np.full(1 + N_LEARNERS, 0.2), 0.0), 0.0, 0.5, 1)
        fleet.reset(77, 8)
    assert copy.save() == play.fleet.save()
    assert set(copy.stale) == {1}
