"""Batches of records on their way to a server: several at once where their order does not matter, repeated until taken.

A record is idempotent by its id for ever, so whatever may not have arrived is sent again. What the server refuses for
good, or does not take for minutes, stops the import.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

from server.importing.faults import ImportStopped
from tsugi.client import CallError
from tsugi.v1.profile_service_pb2 import IngestRecordsResponse, SourceRecord

CALL_S_MAX: Final = 30.0
PAUSE_S_MIN: Final = 0.1  # before the first repeat; each further pause is twice as long
PAUSE_S_MAX: Final = 5.0
REPEATED_S_MAX: Final = 300.0  # for so long a batch is repeated: a restart, a full disk that somebody clears

# What a later attempt may get over. ABORTED is not among them: nothing here is conditional.
PASSING: Final = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"})


class Destination(Protocol):
    """Where records go; tsugi.client.Client is one."""

    def ingest_records(
        self, records: Iterable[SourceRecord], *, timeout_s: float | None = None
    ) -> IngestRecordsResponse:
        """Record at most 500 source records.

        Raises:
            CallError: none of them is known to be recorded.
        """
        ...


class Sender:
    """Sends batches from a few threads of its own.

    Args:
        destination: safe to use from many threads.
        n_at_once: batches under way; 1 keeps the order in which they were handed over.
        pause: waits that many seconds, and returns True at once when sending is to stop.
    """

    def __init__(self, destination: Destination, n_at_once: int, pause: Callable[[float], bool] | None = None) -> None:
        self._destination = destination
        self._stopping = threading.Event()
        self._pause = pause or self._stopping.wait
        self._threads = ThreadPoolExecutor(n_at_once, thread_name_prefix="import")

    def send(self, records: Sequence[SourceRecord]) -> Future[IngestRecordsResponse]:
        """Start sending a batch; the future gives the answer or raises ImportStopped."""
        return self._threads.submit(self._send, records)

    def stop(self) -> None:
        """End at once; calls under way end when their client is closed."""
        self._stopping.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _send(self, records: Sequence[SourceRecord]) -> IngestRecordsResponse:
        pause_s, spent_s = PAUSE_S_MIN, 0.0
        while True:
            try:
                response = self._destination.ingest_records(records, timeout_s=CALL_S_MAX)
            except CallError as error:
                if error.code.name not in PASSING or spent_s >= REPEATED_S_MAX:
                    told = f"the server does not take records: {error}"
                    raise ImportStopped(told, is_unanswered=error.is_unanswered) from error
                wait_s = min(max(error.retry_delay_s, pause_s), REPEATED_S_MAX)
                spent_s += wait_s + (CALL_S_MAX if error.code.name == "DEADLINE_EXCEEDED" else 0.0)
                if self._pause(wait_s):
                    raise ImportStopped("sending was ended") from error
                pause_s = min(2.0 * pause_s, PAUSE_S_MAX)
                continue
            assert len(response.results) == len(records), "the server answers each record of a batch"
            return response
