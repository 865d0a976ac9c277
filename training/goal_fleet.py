"""Which learner serves a goal? Several families with several settings learn the same rows side by side.

Each is judged by what it expected of a row before it learned from it (``standing.py``). The best is promoted once an
always-valid test says that it does better than the one that serves, and the baseline takes over from one that does
worse than it. Rounds double in length; after each the weaker half of the challengers is dropped, and new ones begin:
an heir of the strongest under other settings, and the next in the list of what may take part. A challenger whose loss
has risen for good begins anew. All of it follows from the rows alone, in their order: a replay comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np

from training import calibration, standing
from training.calibration import Calibration
from training.drift import Drift
from training.families import CHALLENGERS_MAX, FAMILIES, FIRST, LATER, POSTERIORS
from training.learners.base import Learner, Row, Settings, log_odds_of, settings_text
from training.learners.baseline import Baseline
from training.space import Space
from tsugi.log.v1.learner_pb2 import FleetChange, FleetChangeKind, GoalState, MemberState
from tsugi.v1.model_pb2 import LearnerRole

ALPHA: Final = 0.05  # the chance that a goal ever promotes or demotes without cause, over all of its tests
REVIEW_ROWS: Final = 32
ROUND_ROWS_MIN: Final = 1_024  # of the first round; each next one is twice as long
ROUND_ROWS_MAX: Final = 65_536
CHANGES_KEPT: Final = 16
BYTES_MAX: Final = 512 * 1024**2  # of a goal's challengers: beyond, families that take much space do not begin
ARITHMETIC: Final = (
    f"alpha={ALPHA} rounds={REVIEW_ROWS},{ROUND_ROWS_MIN},{ROUND_ROWS_MAX} weight={standing.WEIGHT_MAX} "
    f"first={FIRST} later={LATER} bytes_max={BYTES_MAX} sums={standing.COLUMNS} corrected=seen,judged "
    f"{Drift.arithmetic} {calibration.ARITHMETIC}"
)

_Kind = FleetChangeKind
_FIRST_PLACE = 2  # after the baseline and the posterior: the first of the list that there is room for


class Member:
    """One learner and how it does.

    Attributes:
        number: unique within the goal, ascending; 0 is the baseline.
        learner: the learner.
        begun_lsn: the log record it began after.
        begun_time_us: its log time.
        begun_row: the last row of the goal that nothing it knows rests on.
        drift: its detector.
    """

    __slots__ = ("begun_lsn", "begun_row", "begun_time_us", "drift", "learner", "number")

    def __init__(self, number: int, learner: Learner, begun_lsn: int, begun_time_us: int, begun_row: int) -> None:
        self.number = number
        self.learner = learner
        self.begun_lsn = begun_lsn
        self.begun_time_us = begun_time_us
        self.begun_row = begun_row
        self.drift = Drift()

    @property
    def is_challenger(self) -> bool:
        """Whether it may come to serve and may be dropped."""
        return self.number != 0 and not self.learner.is_posterior


class GoalFleet:
    """All learners of one goal.

    Args:
        space: of all goals.
        goal: its name.
        base_rate: above 0, below 1; scales the posteriors for good.
        lsn: of the record at which the goal was met.
        time_us: its log time.

    Attributes:
        members: the baseline, the posterior, then the others by age.
        serving: the one whose estimates are published.
        sums: float64[members, standing.COLUMNS].
        n_rows: rows learned from.
        changes: the newest changes, oldest first.
        calibration: whether what the one that serves states comes true.
        excess: by how much its log-odds are too high now, as silences are still to come; see Pending. Whoever owns the
            fleet sets it before each row.
        serving_since: the change by which the one that serves came to serve; None: it serves since the goal was met.
        promotions: how often there was one since then.
        demotions: likewise.
        stale: what was learned last of each action, since somebody emptied it.
        families: those that take part because the catalog names them.
    """

    def __init__(self, space: Space, goal: str, base_rate: float, lsn: int = 0, time_us: int = 0) -> None:
        self.goal = goal
        self.base_rate = base_rate
        self.n_rows = 0
        self.members: list[Member] = []
        self.sums = np.zeros((0, standing.COLUMNS))
        self.changes: list[FleetChange] = []
        self.serving_since: FleetChange | None = None
        self.promotions, self.demotions = 0, 0
        self.stale: dict[int, Row] = {}
        self.families: tuple[str, ...] = ()
        self._space = space
        self._lsn, self._time_us = lsn, time_us
        self.calibration = Calibration(base_rate)
        self.excess = 0.0
        self._next_number, self._n_tested, self._next_choice = 0, 0, 0
        self._round_begin, self._round_end = 0, ROUND_ROWS_MIN
        posterior = next((family for family in POSTERIORS if self._has_room(family)), POSTERIORS[-1])
        self._begin(self._new(Baseline.family, Baseline.choices[0]))
        self._begin(self._new(posterior, FAMILIES[posterior].choices[0]))
        for family, settings in self._first():
            self._begin(self._new(family, settings))
        self._serving = _FIRST_PLACE

    @property
    def serving(self) -> Member:
        """See Attributes."""
        return self.members[self._serving]

    @property
    def n_failures(self) -> float:
        """Rows that the one that serves has learned from, less their rewards."""
        sums = self.sums[self._serving]
        return float(sums[standing.ROWS] - sums[standing.OBSERVED])

    @property
    def posterior(self) -> Member:
        """The one whose posterior is published."""
        return self.members[1]

    def have(self, families: tuple[str, ...], lsn: int = 0, time_us: int = 0) -> None:
        """Have these families take part beside those that always do.

        Those newly named begin at once; those no longer named go as others do, but do not begin again.
        """
        self._lsn, self._time_us = lsn, time_us
        new = [family for family in families if family not in self.families]
        self.families = families
        for family in new:
            if all(member.learner.family != family for member in self.members) and self._has_room(family):
                self._begin(self._new(family, FAMILIES[family].choices[0]))
                began = standing.Estimate(0.0, 0.0)
                self._note(_Kind.FLEET_CHANGE_KIND_BEGUN, self.members[-1].number, began, self.serving.number)

    def learn(self, row: Row, reward: float, lsn: int = 0, time_us: int = 0) -> None:
        """Teach one row to all. Cost: the learners', and 3 µs.

        Args:
            row: see Row.
            reward: 0..1.
            lsn: the record that settled it.
            time_us: its log time.
        """
        chances = np.empty(len(self.members))
        for place, member in enumerate(self.members):
            chances[place] = member.learner.learn_one(row, reward)
        is_late = 2 * self.n_rows >= self._round_begin + self._round_end
        standing.tally(chances, reward, row.weight, self._serving, is_late, self.sums)
        self.calibration.learn(log_odds_of(float(chances[self._serving])) - self.excess, reward)
        self.stale[row.action] = row
        self.n_rows += 1
        if self.n_rows % REVIEW_ROWS == 0:
            self._lsn, self._time_us = lsn, time_us
            self._review()

    def correct(self, row: Row, before: float, reward: float, number: int) -> None:
        """Tell all that learned from an earlier row that its reward is another, and judge them by that one.

        Whoever began since has nothing to correct: a change without the row would be learned as if it were all of it.

        Args:
            row: see Row.
            before: the reward they learned, 0..1.
            reward: the one in its place.
            number: n_rows when it was learned.
        """
        chances = np.full(len(self.members), np.nan)
        for place, member in enumerate(self.members):
            if member.begun_row < number:
                chances[place] = member.learner.correct_one(row, reward - before)
        age = float(self.n_rows - number)
        standing.amend(chances, before, reward, row.weight, self._serving, age, self.sums)
        if not math.isnan(chances[self._serving]):
            stated = log_odds_of(float(chances[self._serving])) - self.excess
            self.calibration.correct(stated, before, reward, age)
        self.stale[row.action] = row

    def serve(self, place: int) -> None:
        """Have the member at a place serve from now on; all are held against it anew."""
        self._serving = place
        self.calibration.restart()
        for sums in self.sums:
            standing.begin_test(sums, self._next_test())

    def reset(self, lsn: int, time_us: int, role: int = LearnerRole.LEARNER_ROLE_ALL) -> None:
        """Let learners begin anew under their numbers; who takes part stays.

        All: the first of the list serves, as when the goal was met. The one that serves: it begins anew among the
        challengers, and the baseline serves until one is proven to do better than it. Whoever resets it does not trust
        what serves; a learner that nothing is known of must not serve in its place, and those that learned on beside it
        are proven soon. The challengers: who serves stays.

        Args:
            lsn: the record that said so.
            time_us: its log time.
            role: a LearnerRole; of others than these three nothing is done.
        """
        self._lsn, self._time_us = lsn, time_us
        places: dict[int, Iterable[int]] = {
            LearnerRole.LEARNER_ROLE_ALL: range(len(self.members)),
            LearnerRole.LEARNER_ROLE_SERVING: [self._serving],
            LearnerRole.LEARNER_ROLE_CHALLENGER: sorted(self._challengers()),
        }
        changes = {
            place: self._restart(place, self.members[place].learner, _Kind.FLEET_CHANGE_KIND_RESET)
            for place in places.get(role, ())
        }
        if role == LearnerRole.LEARNER_ROLE_ALL:
            # Whoever stood there may be somebody that must not serve before it is proven.
            family, settings = self._first()[0]
            self.members[_FIRST_PLACE].learner = self._new(family, settings)
            self.serving_since = changes[_FIRST_PLACE]
            self.serve(_FIRST_PLACE)
        elif role == LearnerRole.LEARNER_ROLE_SERVING and self._serving != 0:
            self.serving_since = changes[self._serving]
            self.serve(0)

    def save(self) -> GoalState:
        """Return the whole state."""
        state = GoalState(
            goal=self.goal,
            base_rate=self.base_rate,
            serving=self._serving,
            next_number=self._next_number,
            n_rows=self.n_rows,
            round_begin=self._round_begin,
            round_end=self._round_end,
            n_tested=self._n_tested,
            changes=self.changes,
            next_choice=self._next_choice,
            calibration=self.calibration.save(),
            families=self.families,
            serving_since=self.serving_since,
            promotions=self.promotions,
            demotions=self.demotions,
        )
        for place, member in enumerate(self.members):
            saved = state.members.add(
                number=member.number,
                family=member.learner.family,
                settings=settings_text(member.learner.settings),
                begun_lsn=member.begun_lsn,
                sums=self.sums[place].tobytes(),
                heard=np.array(member.drift.heard).tobytes(),
                begun_time_us=member.begun_time_us,
                begun_row=member.begun_row,
            )
            member.learner.save(saved)
        return state

    @classmethod
    def restored(cls, space: Space, state: GoalState) -> GoalFleet:
        """Return the fleet that a saved state is of; nothing tells it from the saved one, to the bit."""
        fleet = cls(space, state.goal, state.base_rate)
        fleet.n_rows, fleet._serving, fleet._next_number = state.n_rows, state.serving, state.next_number
        fleet._round_begin, fleet._round_end = state.round_begin, state.round_end
        fleet._n_tested, fleet._next_choice = state.n_tested, state.next_choice
        fleet.changes = list(state.changes)
        fleet.calibration.load(state.calibration)
        fleet.families = tuple(state.families)
        fleet.serving_since = state.serving_since if state.HasField("serving_since") else None
        fleet.promotions, fleet.demotions = state.promotions, state.demotions
        fleet.members = [fleet._restored_member(saved) for saved in state.members]
        fleet.sums = np.array([np.frombuffer(saved.sums) for saved in state.members])
        return fleet

    def _restored_member(self, saved: MemberState) -> Member:
        family = FAMILIES[saved.family]
        settings = next(choice for choice in family.choices if settings_text(choice) == saved.settings)
        learner = family(self._space, self.base_rate, settings)
        learner.load(saved)
        member = Member(saved.number, learner, saved.begun_lsn, saved.begun_time_us, saved.begun_row)
        member.drift = Drift(np.frombuffer(saved.heard).tolist())
        return member

    def _review(self) -> None:
        """Look at how all do: drift, who serves, and at its end the round."""
        self.calibration.review()
        self._hear_drift()
        self._decide_who_serves()
        if self.n_rows >= self._round_end:
            self._end_round()

    def _hear_drift(self) -> None:
        """Restart a challenger whose loss has risen; one that serves goes on, and a twin begins beside it.

        All of them are heard anew from there on, so that no learner begins again more often than every BLOCKS_MIN
        reviews, whatever comes.
        """
        # ADWIN expects numbers around 1. Where rewards are rare, losses are far below, and no rise would be one to it.
        means = self.sums[:, standing.BLOCK_LOSS] / (REVIEW_ROWS * standing.usual_loss(self.base_rate))
        self.sums[:, standing.BLOCK_LOSS] = 0.0
        risen = [
            place for place, member in enumerate(self.members)
            if member.drift.has_risen(float(means[place])) and member.is_challenger
        ]  # fmt: skip
        for place in risen:
            if place != self._serving:
                self._restart(place, self.members[place].learner, _Kind.FLEET_CHANGE_KIND_RESTARTED)
            elif weakest := self._droppable(self._challengers())[-1:]:
                twin = self._new(self.serving.learner.family, self.serving.learner.settings)
                self._replace(weakest[0], twin, self.n_rows)
                self.serving.drift = Drift()

    def _decide_who_serves(self) -> None:
        leads = {
            place: standing.lead_of(self.sums[place], ALPHA)
            for place, member in enumerate(self.members)
            if place != self._serving and not member.learner.is_posterior
        }
        proven = [place for place, lead in leads.items() if lead.is_above_zero and self._may_serve(place)]
        if not proven:
            return
        best = max(proven, key=lambda place: leads[place].mean)
        kind = _Kind.FLEET_CHANGE_KIND_PROMOTED if best else _Kind.FLEET_CHANGE_KIND_DEMOTED
        number = self.members[best].number if best else self.serving.number
        self.serving_since = self._note(kind, number, leads[best], self.serving.number if best else 0)
        self.promotions += bool(best)
        self.demotions += not best
        self.serve(best)

    def _may_serve(self, place: int) -> bool:
        return place == 0 or standing.is_calibrated(self.sums[place])

    def _end_round(self) -> None:
        """Drop the weaker half of the challengers, and let new ones begin in their places."""
        ranked = self._challengers()
        is_led = bool(ranked) and self._leads(ranked[0])  # then the strongest stays, though it be the only one
        weak = self._droppable(ranked[max(len(ranked) // 2, is_led) :])
        strongest = self.members[ranked[0] if is_led else self._serving]
        for i, place in enumerate(weak):
            heir = self._heir(strongest.learner) if i == 0 else None
            successor = heir or self._next_in_list()
            if successor is not None:
                self._replace(place, successor, strongest.begun_row if heir is not None else self.n_rows)
        length = min(2 * (self._round_end - self._round_begin), ROUND_ROWS_MAX)
        self._round_begin, self._round_end = self._round_end, self._round_end + length
        standing.begin_round(self.sums)

    def _challengers(self) -> list[int]:
        """Return the places of those that may come to serve, the strongest of the round first."""

        def rank(place: int) -> tuple[float, float, int]:
            sums = self.sums[place]
            # In the earlier half of a round nobody has a late lead.
            return -standing.late_lead_of(sums), -standing.lead_of(sums, ALPHA).mean, place

        return sorted((p for p, each in enumerate(self.members) if each.is_challenger and p != self._serving), key=rank)

    def _droppable(self, places: list[int]) -> list[int]:
        """Leave out the strongest of each family that the catalog names: it may need longer than a round."""
        ranked = [self._serving, *self._challengers()]
        kept = {next((p for p in ranked if self.members[p].learner.family == family), None) for family in self.families}
        return [place for place in places if place not in kept]

    def _leads(self, place: int) -> bool:
        return standing.late_lead_of(self.sums[place]) > 0.0

    def _heir(self, learner: Learner) -> Learner | None:
        """Return an heir with settings of its family that nobody has, the nearest in the list first.

        None without room for one, or without such settings.
        """
        choices = learner.choices
        own = next((i for i, choice in enumerate(choices) if choice == learner.settings), 0)
        for step in range(1, len(choices) if self._has_room(learner.family) else 1):
            settings = choices[(own + step) % len(choices)]
            if not self._takes_part(learner.family, settings):
                return learner.heir(settings)
        return None

    def _next_in_list(self) -> Learner | None:
        """Return the next of what may take part that does not yet, and that there is room for."""
        later = (*LATER, *((family, settings) for family in self.families for settings in FAMILIES[family].choices))
        for _ in range(len(later)):
            family, settings = later[self._next_choice % len(later)]
            self._next_choice = (self._next_choice + 1) % len(later)
            if not self._takes_part(family, settings) and self._has_room(family):
                return self._new(family, settings)
        return None

    def _first(self) -> list[tuple[str, Settings]]:
        """Return with whom a goal begins; never nobody, because some families always have room."""
        return [choice for choice in FIRST if self._has_room(choice[0])]

    def _takes_part(self, family: str, settings: Settings) -> bool:
        return any(member.learner.family == family and member.learner.settings == settings for member in self.members)

    def _has_room(self, family: str) -> bool:
        n_actions, width = len(self._space.rows), len(self._space.columns)
        return FAMILIES[family].size_bytes(n_actions, width) * CHALLENGERS_MAX <= BYTES_MAX

    def _new(self, family: str, settings: Settings) -> Learner:
        return FAMILIES[family](self._space, self.base_rate, settings)

    def _begin(self, learner: Learner) -> None:
        self.members.append(Member(self._next_number, learner, self._lsn, self._time_us, self.n_rows))
        self._next_number += 1
        self.sums = np.vstack([self.sums, np.zeros((1, standing.COLUMNS))])
        standing.begin(self.sums[-1], self._next_test())

    def _replace(self, place: int, learner: Learner, begun_row: int) -> None:
        """Put a new learner in the place of another."""
        lead = standing.lead_of(self.sums[place], ALPHA)
        self._note(_Kind.FLEET_CHANGE_KIND_DROPPED, self.members[place].number, lead, self.serving.number)
        self.members[place] = member = Member(self._next_number, learner, self._lsn, self._time_us, begun_row)
        self._next_number += 1
        standing.begin(self.sums[place], self._next_test())
        self._note(_Kind.FLEET_CHANGE_KIND_BEGUN, member.number, standing.Estimate(0.0, 0.0), self.serving.number)

    def _restart(self, place: int, like: Learner, kind: FleetChangeKind) -> FleetChange:
        """Let a learner begin anew, under its number."""
        before = self.members[place]
        change = self._note(kind, before.number, standing.lead_of(self.sums[place], ALPHA), self.serving.number)
        learner = self._new(like.family, like.settings)
        self.members[place] = Member(before.number, learner, self._lsn, self._time_us, self.n_rows)
        standing.begin(self.sums[place], self._next_test())
        return change

    def _next_test(self) -> int:
        self._n_tested += 1
        return self._n_tested

    def _note(self, kind: FleetChangeKind, number: int, lead: standing.Estimate, other: int) -> FleetChange:
        change = FleetChange(
            kind=kind, number=number, lsn=self._lsn, time_us=self._time_us, lead=lead.mean, radius=lead.radius,
            other=other,
        )  # fmt: skip
        self.changes = [*self.changes, change][-CHANGES_KEPT:]
        return change


def known(space: Space, states: Iterable[GoalState]) -> dict[str, GoalFleet]:
    """Return the fleets that saved states are of, by goal."""
    return {state.goal: GoalFleet.restored(space, state) for state in states}
