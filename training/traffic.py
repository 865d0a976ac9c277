"""Plays a simulated retailer's traffic against a real server: page views, calls to the call centre, late outcomes.

Calls go out on a fixed schedule, whatever the server does, and latency counts from the scheduled instant. Outcomes come
back delayed, out of order, some twice and some never. What the traffic knows and the server does not is the truth: the
propensity of every eligible action, kept here to measure by and never sent.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from training.simulate import Person, Visit, World, best_value, uniform_value
from tsugi.client import CallError, Client, outcome, source_record
from tsugi.v1.decision_pb2 import ChoiceReason
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRole
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest

TWICE_SHARE: Final = 0.03  # of the outcomes are reported twice, as after a retry
OUTCOMES_MAX: Final = 500  # a batch
OUTCOME_PERIOD_S: Final = 0.1
INGEST_RECORDS: Final = 200
KNOWN_S_MAX: Final = 120.0  # from telling who people are until the server knows them
OPEN_CALLS_MAX: Final = 256  # more than that under way means the server does not keep up; then the schedule waits


class Observed(NamedTuple):
    """What one decision came to, as only the simulator can know."""

    elapsed_s: float  # since the traffic began, at the scheduled instant
    latency_s: float
    is_control: bool  # an eligible action at random
    expected: float  # true expected reward a slot of what was chosen
    uniform: float  # of a random eligible action
    best: float  # of the best policy
    rewards: tuple[float, ...]  # drawn, one a slot


class Traffic:
    """The traffic of one retailer.

    Args:
        world: people, visits and the truth.
        client: how the shop's backends call.
        rate: decisions a second.
        call_share: of them from the call centre.
        seed: of everything drawn.
        on_decision: told of each decision, on gRPC's threads.
    """

    def __init__(
        self, world: World, client: Client, *, rate: float, call_share: float, seed: int,
        on_decision: Callable[[Observed], None],
    ) -> None:  # fmt: skip
        self._world = world
        self._client = client
        self._rate = rate
        self._call_share = call_share
        self._rng = np.random.default_rng(seed)
        self._on_decision = on_decision
        self._lock = threading.Lock()
        self._due: list[tuple[float, int, ReportOutcomeRequest]] = []
        self._n_due = 0
        self._open = threading.Semaphore(OPEN_CALLS_MAX)
        self._unlearned: deque[tuple[int, float]] = deque()  # (LSN, acknowledged at) of outcomes not yet learned from
        self._stop = threading.Event()
        self.learning_lags_s: list[float] = []
        self.n_outcomes = 0
        self.errors: list[str] = []  # every call or outcome that was refused

    def introduce(self, people: list[Person]) -> None:
        """Tell the server who the people are, and wait until it knows them.

        Raises:
            CallError: the server refused.
            TimeoutError: it took longer than KNOWN_S_MAX.
        """
        lsn = 0
        for first in range(0, len(people), INGEST_RECORDS):
            records = [
                source_record(f"person-{first + i}", "shop", person.identities, attributes=person.attributes)
                for i, person in enumerate(people[first : first + INGEST_RECORDS])
            ]
            lsn = max(lsn, self._client.ingest_records(records).lsn)
        until = time.monotonic() + KNOWN_S_MAX
        while self._client.count_people(at_least_lsn=lsn).applied_lsn < lsn:  # each call waits a little
            if time.monotonic() > until:
                raise TimeoutError(f"the server did not know everybody within {KNOWN_S_MAX:.0f} s")

    def play(self, people: list[Person], duration_s: float, while_playing: Callable[[float], None]) -> None:
        """Send decisions on schedule for a while, and their outcomes as they come due; then send what is left.

        Args:
            people: introduced before.
            duration_s: seconds.
            while_playing: called some ten times a second with the seconds elapsed.
        """
        reporting = threading.Thread(target=self._report_until_stopped, name="outcomes")
        reporting.start()
        started = time.monotonic()
        try:
            next_screen = 0.0
            for number in range(int(duration_s * self._rate)):
                at_s = number / self._rate
                while (wait_s := started + at_s - time.monotonic()) > 0:
                    if time.monotonic() - started >= next_screen:
                        while_playing(time.monotonic() - started)
                        next_screen += 0.1
                    self._stop.wait(min(wait_s, 0.02))
                self._send(people[self._rng.integers(len(people))], started, at_s)
            for _ in range(OPEN_CALLS_MAX):
                self._open.acquire(timeout=2.0)
        finally:
            self._stop.set()
            reporting.join()

    def _send(self, person: Person, started: float, at_s: float) -> None:
        is_call = self._rng.random() < self._call_share
        visit = self._world.call(self._rng) if is_call else self._world.page_view(self._rng)
        luck = np.random.default_rng(self._rng.integers(1 << 62))

        def answered(answer: DecideResponse | CallError) -> None:
            now = time.monotonic()
            self._open.release()
            if isinstance(answer, CallError):
                self.errors.append(str(answer))
                return
            self._note_learning(answer, now)
            self._observe(answer, person, visit, luck, now, started, at_s)

        self._open.acquire()
        self._client.decide_then(
            answered, {visit.placement: visit.n_slots}, identities=person.identities, context=visit.context
        )

    def _observe(
        self, reply: DecideResponse, person: Person, visit: Visit, luck: np.random.Generator,
        now: float, started: float, at_s: float,
    ) -> None:  # fmt: skip
        """Let happen what follows the chosen actions, and tell what the decision came to."""
        truth = self._world.truth(person, visit)
        chosen = [slot for slot in reply.slots if slot.action]
        rewards = []
        for slot in chosen:
            happening = self._world.happening(visit, truth[slot.action], luck)
            rewards.append(happening.reward)
            if happening.outcome_type:
                report = outcome(reply.decision_id, slot.action, f"{slot.action}-1", happening.outcome_type)
                self._schedule(now + happening.delay_s, report)
                if luck.random() < TWICE_SHARE:
                    self._schedule(now + happening.delay_s + luck.random(), report)
        if not chosen:
            return
        self._on_decision(
            Observed(
                elapsed_s=at_s,
                latency_s=now - started - at_s,
                is_control=any(ChoiceReason.CHOICE_REASON_RANDOM_CONTROL in slot.reasons for slot in chosen),
                expected=sum(truth[slot.action] for slot in chosen) / len(chosen),
                uniform=uniform_value(truth),
                best=best_value(truth, visit.n_slots),
                rewards=tuple(rewards),
            )
        )

    def _schedule(self, due: float, report: ReportOutcomeRequest) -> None:
        with self._lock:
            self._n_due += 1
            heapq.heappush(self._due, (due, self._n_due, report))

    def _report_until_stopped(self) -> None:
        """Report outcomes as they come due; when the traffic stops, those that are due by then."""
        while not self._stop.wait(OUTCOME_PERIOD_S):
            self._report_due()
        self._report_due()

    def _report_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            due: list[ReportOutcomeRequest] = []
            while self._due and self._due[0][0] <= now and len(due) < OUTCOMES_MAX:
                due.append(heapq.heappop(self._due)[2])
        if not due:
            return
        try:
            results = self._client.batch_report_outcomes(due).results
        except CallError as error:
            self.errors.append(str(error))
            return
        acknowledged = time.monotonic()
        self.errors.extend(result.error.message for result in results if result.HasField("error"))
        newest = max((result.accepted.lsn for result in results if not result.accepted.duplicate), default=0)
        with self._lock:
            self.n_outcomes += len(due)
            if newest:
                self._unlearned.append((newest, acknowledged))

    def _note_learning(self, reply: DecideResponse, now: float) -> None:
        """Measure from the acknowledgement of an outcome to the first reply whose learner had learned from it."""
        learned = max(
            (use.learned_lsn for use in reply.model_revisions if use.role == ModelRole.MODEL_ROLE_LEARNER), default=0
        )
        with self._lock:
            while self._unlearned and self._unlearned[0][0] <= learned:
                self.learning_lags_s.append(max(0.0, now - self._unlearned.popleft()[1]))
