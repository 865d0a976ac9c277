"""A committer that does as a test says: commits at once, when told, or not at all; on the caller's own thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from server.storage.committer import GroupCommitter, Receipts
from server.storage.log import Log
from server.storage.record import Draft

WAIT_S_MAX = 30.0


class ScriptedCommitter(GroupCommitter):
    """Appends to a log without a thread.

    Attributes:
        takes: what accepting says.
        is_held: whether drafts that are submitted or watched wait for commit().
        failure: what a commit fails with; None: it does not.
    """

    def __init__(self, log: Log, clock_us: Callable[[], int]) -> None:
        super().__init__(log, wall_us=clock_us, on_failure=lambda: None)
        self._clock_us = clock_us
        self._script_log = log
        self._submitted: list[tuple[list[Draft], Receipts]] = []
        self.takes = True
        self.is_held = False
        self.failure: Exception | None = None

    @property
    def accepting(self) -> bool:
        """See GroupCommitter."""
        return self.takes

    def offer(self, drafts: Sequence[Draft]) -> None:
        """See GroupCommitter."""
        self._script_log.append(drafts, self._clock_us())

    def watch(self, drafts: Sequence[Draft]) -> Receipts:
        """See GroupCommitter; it is held as what is submitted."""
        return self.submit(drafts)

    def submit(self, drafts: Sequence[Draft]) -> Receipts:
        """See GroupCommitter."""
        future: Receipts = asyncio.get_running_loop().create_future()
        self._submitted.append((list(drafts), future))
        if not self.is_held:
            self.commit()
        return future

    async def until_held(self, n_calls: int) -> None:
        """Wait until so many calls of submit wait for commit()."""
        async with asyncio.timeout(WAIT_S_MAX):
            while len(self._submitted) < n_calls:  # noqa: ASYNC110  # they come from other tasks, by way of threads
                await asyncio.sleep(0.001)

    def commit(self) -> None:
        """Commit what was submitted, or fail it."""
        for drafts, future in self._submitted:
            if self.failure is not None:
                future.set_exception(self.failure)
            else:
                future.set_result(self._script_log.append(drafts, self._clock_us()))
        self._submitted.clear()
