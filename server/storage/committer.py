"""Group commit: many callers, one thread a worker that writes.

Handed drafts from the event loop, it appends them to the log in groups. A draft whose caller waits is committed at
once with whatever is queued; drafts nobody waits for ride along, or wait a few milliseconds for company. When the queue
is full a draft is refused, never dropped: the caller of a decision is then told DECISION_NOT_RECORDED, everybody else
is refused.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from server.storage.lmdb_log import GROUP_RECORDS_MAX
from server.storage.log import Log, LogFullError, LogUnavailableError, Receipt
from server.storage.record import Draft

TICK_IDLE_US = 1_000_000
FULL_PAUSE_S = 1.0

Waiter = asyncio.Future[Receipt]


class _Queued(NamedTuple):
    draft: Draft
    waiter: Waiter | None


class GroupCommitter:
    """Owns the only thread of this process that writes to the log.

    Attributes:
        accepting: false while the log is full or has failed; what is offered meanwhile is refused.
    """

    def __init__(
        self,
        log: Log,
        *,
        wall_us: Callable[[], int],
        on_failure: Callable[[], None],
        on_commit: Callable[[int, float], None] = lambda _records, _seconds: None,
        wait_ms: float = 5.0,
        queue_records_max: int = 8_192,
    ) -> None:
        """Prepare; nothing runs until start().

        Args:
            log: where to append.
            wall_us: the clock that stamps groups.
            on_failure: called once, on the thread, when the log becomes unusable.
            on_commit: told of each group's size and seconds, on the thread.
            wait_ms: how long a draft nobody waits for may wait for company.
            queue_records_max: drafts that may be queued.
        """
        self._log = log
        self._wall_us = wall_us
        self._on_failure = on_failure
        self._on_commit = on_commit
        self._wait_s = wait_ms / 1000
        self._queue_records_max = queue_records_max
        self._queue: deque[_Queued] = deque()
        self._some = threading.Event()
        self._urgent = threading.Event()
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
            and len(self._queue) < self._queue_records_max
            and (self._full_until == 0.0 or time.monotonic() >= self._full_until)
        )

    @property
    def queue_records(self) -> int:
        """Return how many drafts wait."""
        return len(self._queue)

    def offer(self, drafts: Sequence[Draft]) -> None:
        """Queue drafts nobody waits for; the caller has asked accepting before. Cost: under 1 µs each."""
        self._queue.extend([_Queued(draft, None) for draft in drafts])
        if not self._some.is_set():
            self._some.set()

    def submit(self, draft: Draft) -> Waiter:
        """Queue a draft and return the future of its receipt; the commit begins at once.

        The future fails with LogFullError or LogUnavailableError; then nothing was recorded, or it is not known to be.
        """
        assert self._loop is not None, "start() comes first"
        waiter: Waiter = self._loop.create_future()
        if self._failed:
            waiter.set_exception(LogUnavailableError("the log has failed"))
        else:
            self._queue.append(_Queued(draft, waiter))
            self._urgent.set()
            self._some.set()
        return waiter

    def close(self) -> None:
        """Commit what is queued and end the thread."""
        self._closing = True
        self._urgent.set()
        self._some.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing or self._queue:
            if not self._queue:
                self._some.wait(TICK_IDLE_US / 1e6)
            self._some.clear()
            if not self._queue:
                self._append_tick()
                continue
            if not self._closing:
                self._urgent.wait(self._wait_s)
            self._urgent.clear()
            while self._queue and not self._failed:
                self._commit([self._queue.popleft() for _ in range(min(GROUP_RECORDS_MAX, len(self._queue)))])
            if self._failed:
                return

    def _commit(self, group: list[_Queued]) -> None:
        started = time.monotonic()
        try:
            receipts: list[Receipt] | Exception = self._log.append([queued.draft for queued in group], self._wall_us())
            self._full_until = 0.0
        except LogFullError as error:
            self._full_until = time.monotonic() + FULL_PAUSE_S
            receipts = error
        except LogUnavailableError as error:
            receipts = error
            self._fail()
        self._on_commit(len(group), time.monotonic() - started)
        waiting = [
            (queued.waiter, receipts if isinstance(receipts, Exception) else receipts[i])
            for i, queued in enumerate(group)
            if queued.waiter is not None
        ]
        self._deliver(waiting)

    def _fail(self) -> None:
        """Refuse everything queued: after a failed commit nothing may be acknowledged."""
        self._failed = True
        left = [self._queue.popleft() for _ in range(len(self._queue))]
        error = LogUnavailableError("the log has failed")
        self._deliver([(queued.waiter, error) for queued in left if queued.waiter is not None])
        self._on_failure()

    def _append_tick(self) -> None:
        try:
            self._log.tick(self._wall_us(), TICK_IDLE_US)
        except LogFullError:
            self._full_until = time.monotonic() + FULL_PAUSE_S
        except LogUnavailableError:
            self._fail()

    def _deliver(self, waiting: list[tuple[Waiter, Receipt | Exception]]) -> None:
        if waiting and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, waiting)


def _resolve(waiting: list[tuple[Waiter, Receipt | Exception]]) -> None:
    for waiter, receipt in waiting:
        if waiter.done():  # the caller went away; the record stands all the same
            continue
        if isinstance(receipt, Exception):
            waiter.set_exception(receipt)
        else:
            waiter.set_result(receipt)
