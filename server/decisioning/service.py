"""The shell of a decision: gather, decide, remember.

Requests that arrive within one turn of the event loop are gathered and decided together; a lone request is decided at
the end of its own turn and never waits for company. Gathering reads clock, profiles and live set once; the core
decides; replies are sent, and after them the records are made and queued for the next group commit. A request that is
wrong fails alone.

Cost sketch of one Decide over 100 candidates, 16 decided together: gather 31 µs, core 38, reply 16, record 20. Alone it
is 59, 106, 37 and 39: what runs once in a long while runs out of cold caches.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import structlog

from server import telemetry
from server.catalog.catalog import Catalog
from server.decisioning import claims, reply
from server.decisioning.budgets import Budgets
from server.decisioning.choices import Choices
from server.decisioning.claims import Chosen
from server.decisioning.decide import EXPLORE, NO_EXPLORATION, Scratch, decide
from server.decisioning.gather import Asked, Batch, gather_profile, gather_request
from server.decisioning.live import Live, Served
from server.decisioning.remember import Views
from server.decisioning.unlearned import Unlearned
from server.errors import TsugiError, limit_exceeded
from server.profiles.erased import Erased
from server.storage.applied import Applied, read_applied
from server.storage.committer import GroupCommitter, Receipts
from server.storage.log import Fate, Log, LogFullError, LogUnavailableError, Receipt, refusal, settled
from server.storage.record import Draft
from server.storage.store import Store
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest, DecisionAck
from tsugi.v1.error_reason_pb2 import ErrorReason

FLUSH_ROWS_MAX: Final = 16_384  # candidates decided in one go: two megabytes of model input
STALE_WAIT_S_MAX: Final = 0.1
STALE_POLL_S: Final = 0.002
LEARNING_WAIT_S_MAX: Final = 1.0
LEARNING_QUEUE_SHARE: Final = 0.25  # of the queue, for those that wait for the learner: the others must have room
LEARNER_STALE_US: Final = 10_000_000
REQUEST_S_WEIGHT: Final = 0.05  # of the newest flush in the running mean: it follows a change within some 20 flushes

_NO_REPLY: Final = b""  # in place of the reply to who was refused: there is nothing to remember
_DEGRADATION_LABELS = {number: Degradation.Name(number).removeprefix("DEGRADATION_") for number in Degradation.values()}


class Settings(NamedTuple):
    """What an operator may choose."""

    queue_requests_max: int = 4_096
    deadline_ms_default: int = 250
    n_workers: int = 1


class DecisionService:
    """Decides for one worker. All methods are called on the event loop.

    Attributes:
        choices: how evenly its choices lie over actions.

    Args:
        log: read for repeated request ids and for erasures that are not projected yet.
        store: profiles.
        committer: where records go.
        token_key: signs decision ids.
        clock_us: the wall clock, microseconds since the epoch.
        settings: see Settings.
    """

    def __init__(
        self,
        *,
        log: Log,
        store: Store,
        committer: GroupCommitter,
        token_key: TokenKey,
        clock_us: Callable[[], int],
        settings: Settings = Settings(),  # noqa: B008  # immutable
    ) -> None:
        self._log = log
        self._store = store
        self._committer = committer
        self._token_key = token_key
        self._clock_us = clock_us
        self._settings = settings
        self._live: Live | None = None
        self._queue: list[Asked] = []
        self._waiting: list[Asked] = []
        self._unlearned = Unlearned(int(LEARNING_QUEUE_SHARE * settings.queue_requests_max), self._queue_again)
        self._learned_lsn = 0  # the last that arrays in force here have included so far
        self._scratch = Scratch()
        self._erased = Erased(log)
        self._budgets = Budgets(log, settings.n_workers)
        self._request_s = 0.0  # what deciding one request took lately
        self.choices = Choices()

    @property
    def live(self) -> Live | None:
        """The set in force; None before the first catalog."""
        return self._live

    def take(self, live: Live) -> None:
        """Put a new set in force, from the next flush on."""
        self._live, models = live, live.models
        # Not those of arrays from before this process, nor those learned again after a restart of the learner.
        if self._learned_lsn and models.new_outcome_lsn > self._learned_lsn:
            lag_us = self._clock_us() - models.new_outcome_time_us
            telemetry.LEARNING_LAG_SECONDS.observe(max(0.0, lag_us / 1e6))
        self._learned_lsn = max(self._learned_lsn, models.learned_lsn)
        self._unlearned.learned(models.learned_lsn)

    @property
    def queue_requests(self) -> int:
        """Return how many requests wait: for this turn's flush, or for state or learner to catch up."""
        return len(self._queue) + len(self._waiting) + len(self._unlearned)

    def admit(self, n_requests: int, timeout_s: float | None) -> float:
        """Refuse at once what cannot be decided in time; return how many seconds there are.

        Args:
            n_requests: how many are to be decided within the deadline.
            timeout_s: what is left of the caller's deadline; None: the default applies, for each request.

        Raises:
            TsugiError: DEADLINE_TOO_SHORT.
        """
        left = n_requests * self._settings.deadline_ms_default / 1000 if timeout_s is None else timeout_s
        needed_s = (len(self._queue) + n_requests) * self._request_s
        if left < needed_s:
            raise TsugiError(
                ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT,
                f"{left * 1000:.3f} ms are left and deciding takes about {needed_s * 1000:.3f}; nothing was decided",
                left_us=int(left * 1e6),
                needed_us=int(needed_s * 1e6),
            )
        return left

    def decide(
        self, request: DecideRequest, raw: bytes, timeout_s: float | None, reported_lsn: int = 0
    ) -> asyncio.Future[bytes]:
        """Queue one validated request for this turn's flush and return the future of its serialised reply.

        Args:
            request: validated by rpc.validate.
            raw: the bytes it was parsed from, for the record.
            timeout_s: what is left of the caller's deadline; None: the default applies.
            reported_lsn: of the last outcome reported with the request; waited for as for at_least_lsn.

        Raises:
            TsugiError: OVERLOADED or DEADLINE_TOO_SHORT, at once. Every other refusal comes through the future.
        """
        if self.queue_requests >= self._settings.queue_requests_max:
            raise TsugiError(
                ErrorReason.ERROR_REASON_OVERLOADED,
                f"{self._settings.queue_requests_max} requests wait already; retry with the same request_id",
                limit=self._settings.queue_requests_max,
            )
        left = self.admit(1, timeout_s)
        loop = asyncio.get_running_loop()
        arrived = time.monotonic()
        if not self._queue:
            loop.call_soon(self._flush)
        waiter: asyncio.Future[bytes] = loop.create_future()
        asked = Asked(request, raw, waiter, arrived, arrived + min(STALE_WAIT_S_MAX, left / 2), arrived + left)
        asked.at_least_lsn = max(request.at_least_lsn, reported_lsn)
        if request.wait_for_learning:
            asked.learning_until = arrived + min(LEARNING_WAIT_S_MAX, left / 2)
        self._queue.append(asked)
        return waiter

    def _flush(self) -> None:
        """Decide everything that came in during this turn of the loop."""
        queue, self._queue = self._queue, []
        started = time.perf_counter()
        live = self._live
        if live is None:
            for asked in queue:
                if not asked.at_least_lsn or not self._set_aside(asked):
                    asked.refuse(_catalog_missing())
            return
        together = max(1, FLUSH_ROWS_MAX // max(1, len(live.catalog.actions.names)))
        for first in range(0, len(queue), together):
            self._decide_together(queue[first : first + together], live)
        elapsed_s = time.perf_counter() - started
        self._request_s += REQUEST_S_WEIGHT * (elapsed_s / len(queue) - self._request_s)
        waited_s = time.monotonic() - queue[0].arrived
        asyncio.get_running_loop().call_soon(_count_flush, elapsed_s, waited_s)

    def _decide_together(self, queue: list[Asked], live: Live) -> None:
        try:
            batch = self._gather(queue, live)
        except Exception as error:  # ours to survive: one poisoned request must not sink its neighbours
            self._decide_alone(queue, live, error)
            return
        for part, served in _by_model(batch, live):
            try:
                self._answer(part, live, served)
            except Exception as error:  # as above
                self._decide_alone(part.asked, live, error)

    def _decide_alone(self, queue: list[Asked], live: Live, error: Exception) -> None:
        """Decide each of several requests, one of which failed, by itself; refuse one that is alone already."""
        if len(queue) == 1:
            queue[0].refuse(error)
            return
        for asked in list(queue):
            if not asked.waiter.done() and asked not in self._waiting and asked not in self._unlearned:
                self._decide_together([asked], live)

    def _gather(self, queue: list[Asked], live: Live) -> Batch:
        """Read what the requests are about; those that are wrong, repeated or too early leave here."""
        now_us = self._clock_us()
        batch = Batch(live.catalog, now_us, len(queue))
        is_recording = self._committer.accepting
        now = time.monotonic()
        self._budgets.look(live.catalog, now_us)
        is_learner_stale = not live.is_baseline and self._is_learner_stale(live, now_us)
        with self._store.read() as snapshot:
            state = read_applied(snapshot)
            erased = self._erased.since(state.lsn)
            for asked in queue:
                if asked.waiter.done():  # the caller went away
                    continue
                if asked.expires <= now:
                    asked.refuse(_too_late(now - asked.expires))
                    continue
                asked.degradations.clear()
                if is_learner_stale:
                    asked.degradations.append(Degradation.DEGRADATION_LEARNER_STALE)
                try:
                    if self._is_too_early(asked, state, live) or self._is_repeated(asked):
                        continue
                    gather_request(asked, batch)
                    gather_profile(asked, batch, snapshot, erased)
                    if live.is_baseline and asked.mode == EXPLORE:  # the random control is no exploring: it measures
                        asked.mode = NO_EXPLORATION
                    self._budgets.constrain(asked, live.catalog)
                except TsugiError as error:
                    asked.refuse(error)
                    batch.discard()
                    continue
                if not is_recording and not asked.request.preview:
                    if asked.request.decision_ack == DecisionAck.DECISION_ACK_DURABLE:
                        asked.refuse(refusal(LogUnavailableError()))
                        continue
                    asked.mode = NO_EXPLORATION
                    asked.holds += live.catalog.profiles.contacts.all_claimed()  # what cannot be claimed is not said
                    asked.degradations.append(Degradation.DEGRADATION_EXPLORATION_OFF)
                    asked.degradations.append(Degradation.DEGRADATION_DECISION_NOT_RECORDED)
                batch.add(asked, self._token_key.seed(asked.decision_key), state.lsn)
        return batch

    def _is_too_early(self, asked: Asked, state: Applied, live: Live) -> bool:
        """Set a request aside while what this worker would decide with is behind what its caller has seen."""
        at_least = asked.at_least_lsn
        if not at_least:
            return False
        # Under the kill switch nothing that was learned is used, so there is nothing to wait for.
        is_waiting = asked.request.wait_for_learning and not live.is_baseline
        is_unlearned = is_waiting and live.models.learned_lsn < at_least
        if is_unlearned and self._unlearned.add(asked):
            return True
        if state.lsn < at_least or live.lsn < min(at_least, state.configuration_lsn):
            if self._set_aside(asked):
                return True
            asked.degradations.append(Degradation.DEGRADATION_PROFILE_STALE)
        if is_unlearned and Degradation.DEGRADATION_LEARNER_STALE not in asked.degradations:
            asked.degradations.append(Degradation.DEGRADATION_LEARNER_STALE)
        return False

    def _is_learner_stale(self, live: Live, now_us: int) -> bool:
        """Say whether the arrays in force are old, and not because the log has stood still since."""
        newest_us = live.models.learned_time_us + LEARNER_STALE_US
        return now_us > newest_us and (not live.models.learner_epoch or self._log.tail().time_us > newest_us)

    def _set_aside(self, asked: Asked) -> bool:
        """Ask again a little later, unless the request has waited as long as it may."""
        if time.monotonic() >= asked.stale_until:
            return False
        if not self._waiting:
            asyncio.get_running_loop().call_later(STALE_POLL_S, self._ask_again)
        self._waiting.append(asked)
        return True

    def _ask_again(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._queue_again(waiting)

    def _queue_again(self, some: Sequence[Asked]) -> None:
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._flush)
        self._queue.extend(some)

    def _is_repeated(self, asked: Asked) -> bool:
        """Name the decision; where the caller's request id was decided before, answer that and say so."""
        request = asked.request
        if not request.request_id or request.preview:
            asked.decision_key = os.urandom(16)
            return False
        asked.decision_key = self._token_key.decision_key(request.request_id)
        asked.payload_digest = hashlib.blake2b(request.SerializeToString(deterministic=True), digest_size=16).digest()
        entry = self._log.find(asked.decision_key)
        if entry is None:
            return False
        fate = Fate.DUPLICATE if entry.payload_digest == asked.payload_digest else Fate.KEY_REUSED
        settled(Receipt(fate, entry.lsn, 0))
        asked.answer(self._recorded_reply(entry.lsn, request))
        return True

    def _recorded_reply(self, lsn: int, request: DecideRequest) -> bytes:
        record = self._log.get(lsn)
        assert record is not None, "the key index names a record"
        return _with_lsn(DecisionRecord.FromString(record.payload).reply, lsn, request)

    def _answer(self, batch: Batch, live: Live, served: Served) -> None:
        """Decide and answer; the records follow when the replies are on their way."""
        decisions = decide(batch.questions(), live.catalog, served.models, self._scratch)
        if decisions.is_model_unavailable:
            for asked in batch.asked:
                asked.degradations.append(Degradation.DEGRADATION_MODEL_UNAVAILABLE)
        views = Views(batch, decisions, live.catalog, served)
        # All of them before the first is answered: where one fails, all are decided again alone, and none twice.
        replies = [views.reply(q, self._token_key) for q in range(len(batch.asked))]
        is_taking = live.catalog.profiles.contacts.strict or self._budgets.are_any
        for q, (asked, reply_bytes) in enumerate(zip(batch.asked, replies, strict=True)):
            if is_taking and not asked.request.preview and not self._take(asked, views.chosen(q), live.catalog):
                replies[q] = _NO_REPLY
                continue
            if asked.request.preview or not _waits_for_disk(asked):
                asked.answer(reply_bytes)
        asyncio.get_running_loop().call_soon(self._remember, batch, views, replies)
        asyncio.get_running_loop().call_soon(self.choices.note, batch, decisions)

    def _take(self, asked: Asked, chosen: Sequence[Chosen], catalog: Catalog) -> bool:
        """Note what a decision claims and spends, and say whether it can; where it cannot it is refused."""
        asked.claimed = claims.claim(chosen, asked.parts, asked.leader, catalog)
        if asked.claimed is not None and not claims.fits(asked.claimed, len(asked.subjects)):
            asked.refuse(limit_exceeded("placements", len(asked.claimed.subjects), claims.MAX, "strict contacts"))
            asked.claimed = None
            return False
        if Degradation.DEGRADATION_DECISION_NOT_RECORDED not in asked.degradations:
            asked.spent = self._budgets.spend(asked, chosen, catalog)
        return True

    def _remember(self, batch: Batch, views: Views, replies: list[bytes]) -> None:
        """Queue the records; a durable decision answers when its record is on disk."""
        drafts: list[Draft] = []
        spending: list[Draft] = []
        awaited: list[tuple[Asked, Draft, bytes]] = []
        for q, (asked, reply_bytes) in enumerate(zip(batch.asked, replies, strict=True)):
            for number in asked.degradations:
                telemetry.DEGRADATIONS.labels(_DEGRADATION_LABELS[number]).inc()
            is_recorded = Degradation.DEGRADATION_DECISION_NOT_RECORDED not in asked.degradations
            if asked.request.preview or reply_bytes is _NO_REPLY or not is_recorded:
                continue
            try:
                draft = _draft(asked, views.record(q, reply_bytes))
            except Exception as error:  # a defect of ours; the other decisions of the batch are recorded all the same
                structlog.get_logger().error("record_lost", exc_info=error)
                asked.refuse(error)
                if asked.spent is not None and _waits_for_disk(asked):  # otherwise its caller was told already
                    self._budgets.settle(asked.spent.spends)
                continue
            if _waits_for_disk(asked):
                awaited.append((asked, draft, reply_bytes))
            else:
                (spending if draft.spends else drafts).append(draft)
        if spending:  # first, so that those which wait for the log are held to what was promised before them
            self._settle_when_durable(spending)
        for each in awaited:
            self._answer_when_durable(*each)
        if drafts:
            self._committer.offer(drafts)
        telemetry.DECISIONS.inc(len(batch.asked))

    def _decide_without(self, asked: Asked, target: int) -> None:
        """Decide again without a target that others took meanwhile; each time there is one less to claim."""
        asked.full.add(target)
        asked.claimed = asked.spent = None
        self._queue_again([asked])

    def _settle_when_durable(self, drafts: list[Draft]) -> None:
        """Queue records that nobody waits for, and forget what they promised of budgets when all are on disk."""

        def settle(commit: Receipts) -> None:
            if commit.exception() is not None:
                return  # said and not recorded: what no counter will ever know stays promised here
            for draft in drafts:
                self._budgets.settle(draft.spends)

        self._committer.watch(drafts).add_done_callback(settle)

    def _answer_when_durable(self, asked: Asked, draft: Draft, reply_bytes: bytes) -> None:
        def answer(commit: Receipts) -> None:
            self._budgets.settle(draft.spends)
            try:
                receipt = settled(commit.result()[0])
                if receipt.fate is Fate.CLAIM_REFUSED:
                    assert asked.claimed is not None, "only what was claimed is refused"
                    self._decide_without(asked, asked.claimed.targets[receipt.lsn])
                elif receipt.fate is Fate.SPEND_REFUSED:
                    assert asked.spent is not None, "only what is spent is refused"
                    self._decide_without(asked, asked.spent.keys[receipt.lsn])
                elif receipt.fate is Fate.DUPLICATE:  # a twin was faster: its decision is the one
                    asked.answer(self._recorded_reply(receipt.lsn, asked.request))
                else:
                    asked.answer(_with_lsn(reply_bytes, receipt.lsn, asked.request))
            except (LogFullError, LogUnavailableError) as error:
                asked.refuse(refusal(error))
            except TsugiError as error:
                asked.refuse(error)

        self._committer.submit([draft]).add_done_callback(answer)


def _by_model(batch: Batch, live: Live) -> list[tuple[Batch, Served]]:
    """Part the requests by whose output is their prior; those for a challenger that cannot be had get the champion."""
    challenged = live.catalog.blends.challenged
    theirs = [q for q, asked in enumerate(batch.asked) if challenged[asked.blend]]
    if not theirs:
        return [(batch, live.champion)] if batch.asked else []
    if live.challenger is None:
        for q in theirs:
            batch.asked[q].degradations.append(Degradation.DEGRADATION_MODEL_UNAVAILABLE)
        return [(batch, live.champion)]
    others = [q for q in range(len(batch.asked)) if q not in theirs]
    parts = [(batch.part(theirs), live.challenger)]
    return [*parts, (batch.part(others), live.champion)] if others else parts


def _draft(asked: Asked, payload: bytes) -> Draft:
    """Return the log's draft of a decision."""
    return Draft(
        kind=RecordKind.RECORD_KIND_DECISION,
        payload=payload,
        key=asked.decision_key,
        payload_digest=asked.payload_digest,
        subjects=asked.subjects + (asked.claimed.subjects if asked.claimed is not None else ()),
        claims=asked.claimed.claims if asked.claimed is not None else (),
        spends=asked.spent.spends if asked.spent is not None else (),
    )


def _waits_for_disk(asked: Asked) -> bool:
    """Say whether a decision is answered when its record is on disk: caller, strict cap or budget asks for it."""
    is_bound = asked.claimed is not None or (asked.spent is not None and asked.spent.waits)
    return is_bound or asked.request.decision_ack == DecisionAck.DECISION_ACK_DURABLE


def _count_flush(elapsed_s: float, waited_s: float) -> None:
    telemetry.DECIDE_SECONDS.observe(waited_s)
    telemetry.DECIDE_COMPUTE_SECONDS.inc(elapsed_s)
    telemetry.DECIDE_FLUSHES.inc()


def _with_lsn(reply_bytes: bytes, lsn: int, request: DecideRequest) -> bytes:
    is_durable = request.decision_ack == DecisionAck.DECISION_ACK_DURABLE
    return reply_bytes + reply.lsn(lsn) if is_durable else reply_bytes


def _too_late(late_s: float) -> TsugiError:
    return TsugiError(
        ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT,
        f"the deadline ran out {late_s * 1000:.3f} ms before its turn came; nothing was decided",
        left_us=0,
        late_us=int(late_s * 1e6),
    )


def _catalog_missing() -> TsugiError:
    return TsugiError(ErrorReason.ERROR_REASON_CATALOG_MISSING, "no catalog is in force yet; push one with PushCatalog")
