"""An outbound run from beginning to end: list the people of a segment, decide each once, write what to say.

People are taken in pages; a page is decided in batches, and when all of it is decided it becomes a part on disk. The
id of a decision request follows from the run and the person, and decisions are acknowledged when they are on the
server's disk: whoever is asked about again, after a kill or a broken call, is answered with the decision that stands.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import orjson
from google.protobuf import json_format

from server.importing.sending import PASSING, PAUSE_S_MAX, PAUSE_S_MIN
from server.outbound.journal import Journal, Page, RunFolder, Tally
from server.outbound.parts import Contact, Mark, Parquet
from server.outbound.plan import OutboundRefused, Plan
from tsugi.client import CallError, decide_request
from tsugi.v1.decision_pb2 import Degradation, Slot
from tsugi.v1.decision_service_pb2 import BatchDecideResponse, DecideRequest, DecideResponse, DecideResult
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.profile_service_pb2 import ListProfilesResponse

CALL_S_MAX: Final = 10.0
REPEATED_S_MAX: Final = 60.0  # for so long a call is repeated: a restart, a burst of other calls
BATCH_PEOPLE_MAX: Final = 500
PAGE_PEOPLE_MAX: Final = 500
PAGE_BATCHES: Final = 5  # so much is asked again after a kill

# Of one request in a batch, what a later attempt may get over.
_PASSING: Final = frozenset(
    {
        ErrorReason.ERROR_REASON_OVERLOADED,
        ErrorReason.ERROR_REASON_LOG_VOLUME_FULL,
        ErrorReason.ERROR_REASON_LOG_MAP_FULL,
        ErrorReason.ERROR_REASON_LOG_UNAVAILABLE,
        ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT,
    }
)

Told = Callable[[int, int], None]  # how many people there are about, and how many are done


class Decider(Protocol):
    """Who is asked; tsugi.client.Client is one. Each method raises CallError."""

    def list_profiles(
        self, segment: str, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> ListProfilesResponse:
        """See Client."""
        ...

    def batch_decide(self, requests: Iterable[DecideRequest], *, timeout_s: float | None = None) -> BatchDecideResponse:
        """See Client."""
        ...


class OutboundStopped(Exception):  # noqa: N818  # a state a run comes to, mended from outside
    """The run cannot go on now; the same command goes on where it stood.

    Attributes:
        is_unanswered: because no server answers.
    """

    def __init__(self, message: str, *, is_unanswered: bool = False) -> None:
        super().__init__(message)
        self.is_unanswered = is_unanswered


class Pace(NamedTuple):
    """How a run goes on."""

    batch_people: int = 100
    people_max: int = 0  # 0: everybody
    pause: Callable[[float], None] = time.sleep
    clock_s: Callable[[], float] = time.monotonic


@contextmanager
def opened(out: Path, plan: Plan, *, is_overwrite: bool) -> Iterator[Run]:
    """Begin a run, or take up the one that was begun for the same output; nobody else can meanwhile.

    Raises:
        OutboundRefused: the output is there, or another run's folder is; the text says what can be done.
        OSError: a file cannot be read or written.
    """
    parquet = Parquet()
    folder = RunFolder(out)
    if out.exists() and not is_overwrite and not folder.path.exists():
        raise _exists(out)
    with folder.locked():
        journal = folder.load()
        if journal is not None and journal.finished is not None and not out.exists():
            folder.clear()  # what it made was taken away since
            journal = None
        if journal is None:
            if out.exists() and not is_overwrite:
                raise _exists(out)
            journal = Journal(uuid.uuid4().hex, plan.segment, plan.channel, plan.asked, plan.placements)
            folder.save(journal)
        elif not journal.is_of(plan):
            raise OutboundRefused(
                f"{folder.path.name} holds a run of segment {journal.segment} on channel {journal.channel}, "
                f"{', '.join(journal.asked) or 'all placements'}; end it with its own command, or remove the folder to "
                "give it up"
            )
        yield Run(folder, journal, parquet)


def _exists(out: Path) -> OutboundRefused:
    return OutboundRefused(f"{out.name} is there already, and no run of it goes on; --overwrite replaces it")


class Run:
    """One run, as far as it has come.

    Args:
        folder: its files; locked.
        journal: read from it.
        parquet: writes parts.
    """

    def __init__(self, folder: RunFolder, journal: Journal, parquet: Parquet) -> None:
        self._folder = folder
        self._journal = journal
        self._parquet = parquet
        self._mark = Mark("", journal.finished or Tally())
        self._n_parts = 0
        if journal.finished is None:
            parts = folder.parts()
            self._n_parts = len(parts)
            if parts:
                self._mark = parquet.mark(parts[-1])

    @property
    def tally(self) -> Tally:
        """What the finished parts come to."""
        return self._mark.tally

    def go_on(self, decider: Decider, told: Told, pace: Pace) -> Tally:
        """Decide everybody who is left, and put the output in its place; the run's folder is gone on return.

        Raises:
            OutboundStopped: the server answers no more; finished parts stand.
            OutboundRefused: a part is missing or damaged.
            OSError: a file cannot be written.
        """
        while self._journal.finished is None:
            page = self._next_page(decider, told, pace)
            if page is None:
                self._parquet.join(self._folder.parts(), self._folder.out)
                self._journal.page, self._journal.finished = None, self.tally
                self._folder.save(self._journal)
            else:
                self._decide(page, decider, told, pace)
        self._folder.remove()
        return self.tally

    def _next_page(self, decider: Decider, told: Told, pace: Pace) -> Page | None:
        """Return the page that was under way, or the next one, which is then in the journal; None: nobody is left."""
        under_way = self._journal.page
        if under_way is not None and under_way.number == self._n_parts + 1:
            return under_way
        size = min(PAGE_PEOPLE_MAX, PAGE_BATCHES * pace.batch_people)
        if pace.people_max:
            size = min(size, pace.people_max - self.tally.people)
        if size <= 0 or (self._n_parts and not self._mark.page_token):
            return None
        page = Page(self._n_parts + 1, [], self._mark.page_token)
        while True:
            listed = self._list(decider, size - len(page.profile_ids), page.next_page_token, pace)
            page.profile_ids += listed.profile_ids
            page.next_page_token = listed.next_page_token
            page.total_size = listed.total_size
            told(page.total_size, self.tally.people)
            if not page.next_page_token or len(page.profile_ids) >= size:
                break
        if not page.profile_ids:
            return None
        self._journal.page = page
        self._folder.save(self._journal)
        return page

    def _list(self, decider: Decider, size: int, token: str, pace: Pace) -> ListProfilesResponse:
        patience = _Patience(pace)
        while True:
            try:
                return decider.list_profiles(
                    self._journal.segment, page_size=size, page_token=token, timeout_s=CALL_S_MAX
                )
            except CallError as error:
                patience.with_call(error)

    def _decide(self, page: Page, decider: Decider, told: Told, pace: Pace) -> None:
        """Decide the people of a page, and write its part."""
        start_s = pace.clock_s()
        tally = deepcopy(self.tally)
        rows: list[Contact] = []
        for first in range(0, len(page.profile_ids), pace.batch_people):
            profile_ids = page.profile_ids[first : first + pace.batch_people]
            requests = [
                decide_request(
                    self._journal.placements,
                    profile_id=profile_id,
                    request_id=f"outbound/{self._journal.run_id}/{profile_id}",
                    durable=True,
                )
                for profile_id in profile_ids
            ]
            for profile_id, result in zip(profile_ids, _decided(decider, requests, pace), strict=True):
                rows += _counted(profile_id, result, tally)
            told(page.total_size, tally.people)
        tally.seconds += pace.clock_s() - start_s
        mark = Mark(page.next_page_token, tally)
        self._parquet.write(self._folder.part(page.number), rows, mark)
        self._mark, self._n_parts = mark, page.number


class _Patience:
    """How long one call is repeated."""

    def __init__(self, pace: Pace) -> None:
        self._pause = pace.pause
        self._pause_s = PAUSE_S_MIN
        self._spent_s = 0.0

    def with_call(self, error: CallError) -> None:
        """Wait after a call that failed.

        Raises:
            OutboundStopped: it was repeated for long enough, or repeating it is of no use.
        """
        name = error.code.name
        spent_s = CALL_S_MAX if name == "DEADLINE_EXCEEDED" else 0.0
        if name not in PASSING or self._spent_s + spent_s >= REPEATED_S_MAX:
            raise OutboundStopped(f"the server refuses: {error}", is_unanswered=error.is_unanswered) from error
        self._wait(error.retry_delay_s, spent_s)

    def with_requests(self, message: str) -> None:
        """Wait after a batch of which some were refused for now.

        Raises:
            OutboundStopped: it was repeated for long enough.
        """
        if self._spent_s >= REPEATED_S_MAX:
            raise OutboundStopped(f"the server refuses: {message}")
        self._wait(0.0, 0.0)

    def _wait(self, at_least_s: float, spent_s: float) -> None:
        wait_s = min(max(at_least_s, self._pause_s), PAUSE_S_MAX)
        self._spent_s += wait_s + spent_s
        self._pause_s = min(2.0 * self._pause_s, PAUSE_S_MAX)
        self._pause(wait_s)


def _decided(decider: Decider, requests: Sequence[DecideRequest], pace: Pace) -> list[DecideResult]:
    """Decide a batch; what was refused for now is asked again, alone."""
    results = [DecideResult() for _ in requests]
    waiting = list(range(len(requests)))
    patience = _Patience(pace)
    while waiting:
        try:
            reply = decider.batch_decide([requests[i] for i in waiting], timeout_s=CALL_S_MAX)
        except CallError as error:
            patience.with_call(error)
            continue
        for i, result in zip(waiting, reply.results, strict=True):
            results[i] = result
        waiting = [i for i in waiting if results[i].HasField("error") and results[i].error.reason in _PASSING]
        if waiting:
            patience.with_requests(results[waiting[0]].error.message)
    return results


def _counted(profile_id: str, result: DecideResult, tally: Tally) -> list[Contact]:
    """Count what became of one person, and return the rows of it."""
    tally.people += 1
    if result.HasField("error"):
        reason = ErrorReason.Name(result.error.reason).removeprefix("ERROR_REASON_")
        tally.errors[reason] = tally.errors.get(reason, 0) + 1
        return [Contact(profile_id, error_reason=reason)]
    decision = result.decision
    tally.lsn = max(tally.lsn, decision.lsn)
    if Degradation.DEGRADATION_PROFILE_UNKNOWN in decision.degradations:  # who asked to be forgotten is not written to
        tally.gone += 1
        return []
    filled = [slot for slot in decision.slots if slot.action]
    if not filled:
        tally.nothing += 1
    for slot in filled:
        tally.contacts[slot.action] = tally.contacts.get(slot.action, 0) + 1
    return [_contact(profile_id, slot, decision) for slot in filled]


def _contact(profile_id: str, slot: Slot, decision: DecideResponse) -> Contact:
    content = json_format.MessageToDict(slot.content)
    return Contact(
        profile_id=profile_id,
        placement=slot.placement,
        position=slot.position,
        action=slot.action,
        treatment=slot.treatment,
        content=orjson.dumps(content, option=orjson.OPT_SORT_KEYS).decode(),
        propensity=slot.propensity,
        value=slot.value,
        priority=slot.priority,
        selection_probability=slot.selection_probability,
        decision_id=decision.decision_id,
        expire_time=decision.expire_time.ToDatetime(UTC),
    )
