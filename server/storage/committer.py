"""Group commit: many callers, one thread a worker that writes.

Handed drafts from the event loop, it appends them to the log in groups. A draft whose caller waits is committed at
once with whatever is queued; drafts nobody waits for ride along, or wait a few milliseconds for company, except after
a quiet time, when the first is committed at once. When the queue is full a draft is refused, never dropped: the caller
of a decision is then told DECISION_NOT_RECORDED, everybody else is refused.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from server.storage.log import GROUP_RECORDS_MAX, Log, LogFullError, LogUnavailableError, Receipt
from server.storage.record import Draft

TICK_IDLE_US = 1_000_000
FULL_PAUSE_S = 1.0
DOZE_AFTER_S = 0.5
BACKLOG_RECORDS = 256
BACKLOG_WAIT_S = 0.005

Receipts = asyncio.Future[list[Receipt]]


class _Waiting:
    """Somebody who waits for the receipts of several drafts; they may come from several groups.

    Attributes:
        is_caller: a caller waits for it, who is told when a draft is lost.
    """

    __slots__ = ("future", "is_caller", "left", "receipts")

    def __init__(self, future: Receipts, n_drafts: int, *, is_caller: bool = True) -> None:
        self.future = future
        self.is_caller = is_caller
        self.receipts: list[Receipt | None] = [None] * n_drafts
        self.left = n_drafts


class _Queued(NamedTuple):
    draft: Draft
    waiting: _Waiting | None
    position: int  # among the drafts of the one who waits


class GroupCommitter:
    """Owns the only thread of this process that writes to the log.

    Attributes:
        accepting: false while the queue or the log is full, and for good once the log has failed or close() was called.
    """

    def __init__(
        self,
        log: Log,
        *,
        wall_us: Callable[[], int],
        on_failure: Callable[[], None],
        is_latched: Callable[[], bool] = lambda: False,
        on_commit: Callable[[int, float], None] = lambda _records, _seconds: None,
        wait_ms: float = 5.0,
        queue_records_max: int = 8_192,
    ) -> None:
        """Prepare; nothing runs until start().

        Args:
            log: where to append.
            wall_us: the clock that stamps groups.
            on_failure: called once, on the thread, when the log becomes unusable, before anybody is told.
            is_latched: says whether another process met a failed write; then nothing is acknowledged here either.
            on_commit: told of each committed group's size and seconds, on the thread.
            wait_ms: how long a draft nobody waits for may wait for company.
            queue_records_max: drafts that may be queued.
        """
        self._log = log
        self._wall_us = wall_us
        self._on_failure = on_failure
        self._is_latched = is_latched
        self._on_commit = on_commit
        self._wait_s = wait_ms / 1000
        self._queue_records_max = queue_records_max
        self._queue: deque[_Queued] = deque()
        self._wake = threading.Event()
        self._moved = threading.Event()  # a group was committed
        self._is_dozing = True  # the thread has had nothing to do lately and waits to be woken
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._full_until = 0.0
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; receipts are delivered on this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def accepting(self) -> bool:
        """Say whether a draft offered now would be taken."""
        return (
            not self._failed
            and not self._closing
            and len(self._queue) < self._queue_records_max
            and (self._full_until == 0.0 or time.monotonic() >= self._full_until)
        )

    @property
    def queue_records(self) -> int:
        """Return how many drafts wait."""
        return len(self._queue)

    def offer(self, drafts: Sequence[Draft]) -> None:
        """Queue drafts nobody waits for; the caller has asked accepting before.

        Cost: under 1 µs each; where the thread lags by BACKLOG_RECORDS, up to BACKLOG_WAIT_S of waiting for it.
        """
        self._queue.extend([_Queued(draft, None, 0) for draft in drafts])
        # A thread that committed lately looks by itself within wait_ms; waking it for each draft would cost the
        # caller more than the draft.
        if self._is_dozing:
            self._wake.set()
        if len(self._queue) > BACKLOG_RECORDS:
            # A busy loop on the same core hardly ever lets the thread have the interpreter lock; here it must.
            self._moved.clear()
            self._wake.set()
            self._moved.wait(BACKLOG_WAIT_S)

    def watch(self, drafts: Sequence[Draft]) -> Receipts:
        """Queue drafts as offer does, and return the future of their receipts; the commit begins when it would.

        For drafts whose callers have been told: what is lost is logged, as of drafts that were offered.
        """
        assert self._loop is not None, "start() comes first"
        future: Receipts = self._loop.create_future()
        waiting = _Waiting(future, len(drafts), is_caller=False)
        self._queue.extend([_Queued(draft, waiting, index) for index, draft in enumerate(drafts)])
        self.offer([])
        if self._failed:  # asked after queueing, see submit
            _resolve([waiting], LogUnavailableError("the log has failed"))
        return future

    def submit(self, drafts: Sequence[Draft]) -> Receipts:
        """Queue drafts and return the future of their receipts, in order; the commit begins at once.

        The future fails with LogFullError or LogUnavailableError; then some of the drafts may be recorded and others
        not, and their caller retries all of them under the same keys.
        """
        assert self._loop is not None, "start() comes first"
        future: Receipts = self._loop.create_future()
        if not drafts:
            future.set_result([])
            return future
        waiting = _Waiting(future, len(drafts))
        is_taken = not (self._failed or self._closing) and len(self._queue) < self._queue_records_max
        if is_taken:
            self._queue.extend([_Queued(draft, waiting, index) for index, draft in enumerate(drafts)])
            self._wake.set()
        # Asked again: what was queued after a failing thread's last look at the queue is refused here.
        if self._failed or not is_taken:
            _resolve([waiting], LogUnavailableError("the log has failed, is being closed, or has a full queue"))
        return future

    def close(self) -> None:
        """Commit what is queued and end the thread."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # A worker runs under SCHED_BATCH, where a wake-up interrupts nobody. This thread would then work in the pauses
        # of the loop alone and hold up the request that ends them: a lone call's median is a quarter longer.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        last_commit = -DOZE_AFTER_S
        while not self._failed and (self._queue or not self._closing):
            # The flag first and the queue after it: a draft that was queued before the flag is seen here.
            self._is_dozing = time.monotonic() - last_commit >= DOZE_AFTER_S
            if not (self._is_dozing and self._queue):
                self._wake.wait(TICK_IDLE_US / 1e6 if self._is_dozing else self._wait_s)
            self._wake.clear()
            if self._queue:
                last_commit = time.monotonic()
            elif self._is_dozing:
                self._append_tick()
            while self._queue and not self._failed:
                self._commit([self._queue.popleft() for _ in range(min(GROUP_RECORDS_MAX, len(self._queue)))])
                self._moved.set()
        # Nothing is left unless the log has failed; then nothing more may be acknowledged.
        left = [self._queue.popleft() for _ in range(len(self._queue))]
        self._deliver(left, LogUnavailableError("the log has failed"))

    def _commit(self, group: list[_Queued]) -> None:
        started = time.monotonic()
        try:
            receipts: list[Receipt] | Exception = self._log.append([queued.draft for queued in group], self._wall_us())
            if self._is_latched():
                raise LogUnavailableError("another process met a failed write")
        except LogFullError as error:
            self._full_until = time.monotonic() + FULL_PAUSE_S
            receipts = error
        except Exception as error:  # whatever it is, nobody may wait for a thread that has died of it
            receipts = self._fail(error)
        else:
            self._full_until = 0.0
            self._on_commit(len(group), time.monotonic() - started)
        self._deliver(group, receipts)

    def _append_tick(self) -> None:
        try:
            self._log.tick(self._wall_us(), TICK_IDLE_US)
        except LogFullError:
            self._full_until = time.monotonic() + FULL_PAUSE_S
        except Exception as error:  # as above
            self._fail(error)

    def _fail(self, error: Exception) -> LogUnavailableError:
        """Raise the alarm before anything else, and return what callers are told."""
        self._failed = True
        self._on_failure()
        if isinstance(error, LogUnavailableError):
            return error
        structlog.get_logger().error("committer_failed", exc_info=error)
        return LogUnavailableError("the log cannot record")

    def _deliver(self, group: list[_Queued], receipts: list[Receipt] | Exception) -> None:
        """Wake those whose last draft was in this group; on the event loop, in one call."""
        done: list[_Waiting] = []
        n_lost = 0
        for i, queued in enumerate(group):
            waiting = queued.waiting
            if waiting is None or not waiting.is_caller:
                n_lost += isinstance(receipts, Exception)
            if waiting is None:
                continue
            if isinstance(receipts, Exception):
                waiting.left = 0
                done.append(waiting)
                continue
            waiting.receipts[queued.position] = receipts[i]
            waiting.left -= 1
            if waiting.left == 0:
                done.append(waiting)
        error = receipts if isinstance(receipts, Exception) else None
        if n_lost:
            structlog.get_logger().error("records_lost", n_records=n_lost, why=str(error))
        if done and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, done, error)


def _resolve(done: list[_Waiting], error: Exception | None) -> None:
    for waiting in done:
        if waiting.future.done():  # the caller went away, or failed already; what is recorded stands all the same
            continue
        if error is not None:
            waiting.future.set_exception(error)
        else:
            waiting.future.set_result([receipt for receipt in waiting.receipts if receipt is not None])
