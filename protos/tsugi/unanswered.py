"""What of a stream of outcomes was sent and not answered yet, so that a broken stream is gone on with.

Handed the caller's outcomes, it gives each call its requests: first again what is not answered, then what comes. It
calls nobody and knows nothing of why a call ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest, StreamReportOutcomesRequest

UNANSWERED_MAX = 1_024  # outcomes; the server works on fewer at once


class Unanswered:
    """The outcomes of one stream over the calls that it takes, one after the other.

    gRPC asks for requests on a thread of each call. That of a broken call may still stand in the caller's iterator when
    the next call begins: what it is given there is kept for the call of that time, and it gets nothing more itself.

    Args:
        outcomes: in the order in which they are sent; one thread at a time asks for the next.
    """

    def __init__(self, outcomes: Iterable[ReportOutcomeRequest]) -> None:
        self._outcomes = iter(outcomes)
        self._asking = threading.Lock()  # held while the caller is asked for an outcome, for as long as that takes
        self._changed = threading.Condition()  # guards what follows
        self._kept: deque[ReportOutcomeRequest] = deque()
        self._n_answered = 0
        self._n_taken = 0
        self._n_calls = 0
        self._failure: Exception | None = None

    def requests(self) -> Iterator[StreamReportOutcomesRequest]:
        """Return the requests of a new call; those of earlier calls end.

        They raise what the caller's iterator raises, and wait while UNANSWERED_MAX are sent and not answered.
        """
        with self._changed:
            self._n_calls += 1
            self._changed.notify_all()
            return self._from(self._n_answered, self._n_calls)

    def answered(self) -> None:
        """Forget the first of those sent: its result has come."""
        with self._changed:
            self._kept.popleft()
            self._n_answered += 1
            self._changed.notify_all()

    def close(self) -> None:
        """End the requests of every call."""
        with self._changed:
            self._n_calls += 1
            self._changed.notify_all()

    def _from(self, number: int, call: int) -> Iterator[StreamReportOutcomesRequest]:
        while (outcome := self._outcome(number, call)) is not None:
            yield StreamReportOutcomesRequest(outcome=outcome)
            number += 1

    def _outcome(self, number: int, call: int) -> ReportOutcomeRequest | None:
        """Return the n-th outcome of all; None after the last, or when another call goes on with them."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: call != self._n_calls or number - self._n_answered < UNANSWERED_MAX)
                if call != self._n_calls:
                    return None
                if number < self._n_taken:
                    return self._kept[number - self._n_answered]
            with self._asking:
                if call == self._n_calls and number == self._n_taken and not self._take():
                    return None

    def _take(self) -> bool:
        """Keep the caller's next outcome; say whether there was one."""
        if self._failure is not None:  # met by a call that had ended: the present one is to fail of it, not to end well
            raise self._failure
        try:
            outcome = next(self._outcomes, None)
        except Exception as error:
            self._failure = error
            raise
        if outcome is None:
            return False
        with self._changed:
            self._kept.append(outcome)
            self._n_taken += 1
        return True
