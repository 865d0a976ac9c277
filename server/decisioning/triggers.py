"""The shell of subscriptions: events that cause decisions, in the order of the log, at least once.

Handed the log, the state and the service that decides, it follows the log behind the projector: it looks at events that
the state has taken in, when they are due, and asks for a decision like any caller, under a request id that the event
gives. It holds no message that nobody takes, and no content of an event that is not due; it knows nothing of gRPC.

Cost sketch: reading the log 4 µs a record, for all subscriptions together; an event of the type some 100 µs with a
filter; a decision that of a durable Decide. Every 20 ms each subscription looks at how far the state is: 5 µs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Final, NamedTuple

from google.protobuf.duration_pb2 import Duration

from server.catalog.catalog import Catalog
from server.catalog.compile_trigger import TriggerFilter, compile_filter
from server.decisioning.happened import Happened, Place, said_in
from server.decisioning.service import DecisionService
from server.errors import TsugiError, field_invalid
from server.profiles import golden, repository
from server.profiles.erased import Erased
from server.profiles.identity import Named, anchor_of, named_all
from server.storage.applied import read_applied
from server.storage.log import Log
from server.storage.record import Record
from server.storage.store import Snapshot, Store, Table
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import (
    DecideRequest,
    DecideResponse,
    DecisionAck,
    SubscribeTriggersRequest,
    Trigger,
)
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.profile_service_pb2 import SourceRecord

SUBSCRIPTIONS_MAX: Final = 16  # of one worker
SILENT_S_MAX: Final = 10.0  # after it the caller is told how far the log was looked at,
SILENT_RECORDS_MAX: Final = 10_000  # and after so many records
POLL_S: Final = 0.02
DECIDE_S_MAX: Final = 2.0
AGAIN_S: Final = 0.2  # before what could not be decided now is tried again
REQUEST_PREFIX: Final = "trigger/"  # of the request ids that are ours

_NOT_NOW: Final = frozenset(
    {
        ErrorReason.ERROR_REASON_OVERLOADED,
        ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT,
        ErrorReason.ERROR_REASON_LOG_UNAVAILABLE,
        ErrorReason.ERROR_REASON_LOG_VOLUME_FULL,
        ErrorReason.ERROR_REASON_LOG_MAP_FULL,
    }
)


class Told(NamedTuple):
    """One message of a subscription."""

    lsn: int  # everything up to it is dealt with
    trigger: Trigger | None = None
    error: BaseException | None = None  # in place of the trigger's decision


class Triggers:
    """Serves the subscriptions of one worker. All methods are called on the event loop.

    Args:
        log: read for events and for decisions made before.
        store: profiles.
        decisions: decides.
        token_key: names decisions by their request ids.
        clock_us: the wall clock, microseconds since the epoch.
    """

    def __init__(
        self,
        *,
        log: Log,
        store: Store,
        decisions: DecisionService,
        token_key: TokenKey,
        clock_us: Callable[[], int],
    ) -> None:
        self.log = log
        self.store = store
        self.decisions = decisions
        self.token_key = token_key
        self.clock_us = clock_us
        self.happened = Happened(log)
        self.erased = Erased(log)
        self._n_subscriptions = 0
        self._is_ending = False

    def end(self) -> None:
        """End every subscription, and refuse new ones: the worker shuts down."""
        self._is_ending = True

    async def subscribe(self, request: SubscribeTriggersRequest) -> AsyncGenerator[Told, None]:
        """Yield what a subscription has to tell, at once how far it is, and then for ever.

        Args:
            request: validated by rpc.validate.

        Raises:
            TsugiError: OVERLOADED, DRAINING; FIELD_INVALID, RESOURCE_NOT_FOUND, LIMIT_EXCEEDED, CATALOG_MISSING: what
                is asked for does not fit the catalog, at the start or since another one is in force.
            CorruptRecordError: a record of the log cannot be read.
        """
        if self._n_subscriptions >= SUBSCRIPTIONS_MAX:
            raise TsugiError(
                ErrorReason.ERROR_REASON_OVERLOADED,
                f"{SUBSCRIPTIONS_MAX} subscriptions are served by this worker already; try another connection",
                limit=SUBSCRIPTIONS_MAX,
            )
        self._n_subscriptions += 1
        try:
            subscription = _Subscription(request, self)
            self._go_on()
            await subscription.plan()
            told, told_at = Told(subscription.lsn), time.monotonic()
            yield told
            while True:
                self._go_on()
                news = await subscription.advance()
                is_silent = time.monotonic() - told_at >= SILENT_S_MAX
                if news is None and (is_silent or subscription.lsn - told.lsn >= SILENT_RECORDS_MAX):
                    news = Told(subscription.lsn)
                if news is not None:
                    told, told_at = news, time.monotonic()
                    yield told
        finally:
            self._n_subscriptions -= 1

    def _go_on(self) -> None:
        if self._is_ending:
            raise TsugiError(
                ErrorReason.ERROR_REASON_DRAINING,
                "this worker is shutting down; go on from the last lsn over a new connection",
            )


class _Plan(NamedTuple):
    """What a request means under one catalog."""

    catalog: Catalog
    filter: TriggerFilter | None


class _Ask(NamedTuple):
    """One event that fits, and the decision to ask for."""

    trigger: Trigger
    request: DecideRequest | TsugiError  # or why there is none
    is_recorded: bool  # it was decided before


class _NotNowError(Exception):
    """Nothing can be said of the event yet."""


class _Subscription:
    """One subscription on its way along the log.

    Attributes:
        lsn: all events up to it are dealt with.
    """

    def __init__(self, request: SubscribeTriggersRequest, triggers: Triggers) -> None:
        self._request = request
        self._triggers = triggers
        tail_lsn = triggers.log.tail().lsn
        if request.after_lsn > tail_lsn:
            raise field_invalid("after_lsn", f"the log ends at {tail_lsn}; pass an lsn as received from this log")
        self._seen_lsn = request.after_lsn or tail_lsn
        self._waiting: deque[Place] = deque()  # events of the type up to there, not dealt with
        self._delay_us = _microseconds(request.delay)
        self._plan: _Plan | None = None

    @property
    def lsn(self) -> int:
        return self._waiting[0].lsn - 1 if self._waiting else self._seen_lsn

    async def plan(self) -> _Plan:
        """Return what the request means under the catalog in force; worked out anew when that is another.

        Raises:
            TsugiError: it does not fit the catalog, or there is none, or it cannot be found out now.
        """
        live = self._triggers.decisions.live
        if self._plan is None or live is None or live.catalog is not self._plan.catalog:
            asked = self._request
            # What a decision for nobody accepts is accepted for everybody.
            trial = DecideRequest(placements=asked.placements, context=asked.context, preview=True)
            await self._triggers.decisions.decide(trial, trial.SerializeToString(), DECIDE_S_MAX)
            live = self._triggers.decisions.live
            assert live is not None, "a decision was made"
            compiled = await asyncio.to_thread(compile_filter, asked.filter, asked.event_type, live.catalog)
            self._plan = _Plan(live.catalog, compiled)
        return self._plan

    async def advance(self) -> Told | None:
        """Take one step along the log, or wait a little where there is none to take; return what there is to tell.

        Raises:
            TsugiError: another catalog is in force, and the request does not fit it.
        """
        wait_s = 0.0  # others have their turn in any case
        news = None
        try:
            plan = await self._plan_now()
            if not self._waiting:
                wait_s = await self._look_further()
            elif (due_us := self._waiting[0].time_us + self._delay_us) > (now_us := self._triggers.clock_us()):
                wait_s = min(POLL_S, (due_us - now_us) / 1e6)
            else:
                news = await self._deal_with(self._waiting[0], plan)
                self._waiting.popleft()
        except _NotNowError:
            wait_s = AGAIN_S
        if news is None:
            await asyncio.sleep(wait_s)
        return news

    async def _plan_now(self) -> _Plan:
        try:
            return await self.plan()
        except TsugiError as error:
            if error.reason in _NOT_NOW:
                raise _NotNowError from error
            raise

    async def _look_further(self) -> float:
        """Look for events among the next records that the state has applied; return how long to wait for more."""
        with self._triggers.store.read() as snapshot:
            applied_lsn = read_applied(snapshot).lsn
        if applied_lsn <= self._seen_lsn:
            return POLL_S
        places, self._seen_lsn = await self._triggers.happened.after(self._seen_lsn, applied_lsn)
        self._waiting.extend(place for place in places if place.event_type == self._request.event_type)
        return 0.0

    async def _deal_with(self, place: Place, plan: _Plan) -> Told | None:
        """Decide on an event that is due; None where there is nothing to tell of it.

        Raises:
            _NotNowError: it is to be tried again.
        """
        ask = self._ask(place, plan)
        if ask is None:
            return None
        result = await self._decide(ask.request)
        if isinstance(result, BaseException):
            if self._is_to_be_tried_again(result, ask, plan):
                raise _NotNowError
            return Told(place.lsn, ask.trigger, result)
        # A stranger by now: who is erased was, between the look at the state and the decision.
        if Degradation.DEGRADATION_PROFILE_UNKNOWN in result.degradations:
            return None
        if not any(slot.action for slot in result.slots):
            return None
        ask.trigger.decision.CopyFrom(result)
        return Told(place.lsn, ask.trigger)

    def _ask(self, place: Place, plan: _Plan) -> _Ask | None:
        """Return what to ask for an event; None where it is to be passed over.

        Raises:
            _NotNowError: the state does not include it.
        """
        triggers = self._triggers
        record = triggers.log.get(place.lsn)
        accepted = said_in(record) if record is not None else None
        if record is None or accepted is None:
            return None
        said = accepted.record
        anchor = _anchor(said, plan.catalog)
        request_id = f"{REQUEST_PREFIX}{self._request.name}/{place.lsn}"
        recorded = self._recorded(request_id)
        with triggers.store.read() as snapshot:
            if read_applied(snapshot).lsn < place.lsn:
                raise _NotNowError
            profile_key = self._person(record, anchor, snapshot)
            if profile_key is None or (recorded is not None and recorded.is_tombstone):
                return None
            if recorded is not None:  # what was decided before was let through then
                asked = DecideRequest.FromString(DecisionRecord.FromString(recorded.payload).request)
                return _Ask(_trigger(record, said, profile_key), asked, is_recorded=True)
            try:
                if not self._passes(said, profile_key, plan, snapshot):
                    return None
            except repository.CorruptProfileError as error:
                return _Ask(_trigger(record, said, profile_key), _damaged(error), is_recorded=False)
        # By the profile, which is the event's; the identity is the one that the contact is kept under.
        is_declared = anchor.identity.namespace in plan.catalog.profiles.namespaces
        request = DecideRequest(
            profile_id=profile_key.hex(),
            identities=[anchor.identity] if is_declared else (),
            placements=self._request.placements,
            context=self._request.context,
            at_least_lsn=place.lsn,
            request_id=request_id,
            decision_ack=DecisionAck.DECISION_ACK_DURABLE,
        )
        return _Ask(_trigger(record, said, profile_key), request, is_recorded=False)

    def _recorded(self, request_id: str) -> Record | None:
        """Return the record of the decision that was made under a request id."""
        entry = self._triggers.log.find(self._triggers.token_key.decision_key(request_id))
        return self._triggers.log.get(entry.lsn) if entry is not None else None

    def _person(self, record: Record, anchor: Named, snapshot: Snapshot) -> bytes | None:
        """Return the key of the profile that an event belongs to; None: of nobody, or who is being forgotten."""
        if snapshot.get(Table.QUARANTINE, record.lsn.to_bytes(8, "big")) is not None:
            return None
        node = golden.node_of(snapshot, anchor.key)
        if node is None or snapshot.get(Table.PROFILES, node.profile_key) is None:
            return None
        # Since the event, and not since the state: until the record is a tombstone, who is erased may be known anew.
        keys = (*record.subjects, anchor.key, node.profile_key)
        return None if self._triggers.erased.names_any(keys, record.lsn) else node.profile_key

    def _passes(self, said: SourceRecord, profile_key: bytes, plan: _Plan, snapshot: Snapshot) -> bool:
        """Say whether an event and its person, as they are now, pass the filter.

        Raises:
            CorruptProfileError: the person's profile is damaged.
        """
        stored = repository.load(snapshot, profile_key) if plan.filter is not None else None
        if plan.filter is None or stored is None:
            return plan.filter is None
        facts = plan.filter.facts()
        now_us = self._triggers.clock_us()
        facts[0] = now_us
        repository.write_facts(stored, plan.catalog, snapshot, now_us, facts[: plan.filter.n_space])
        return plan.filter.passes(facts, said.event.properties)

    async def _decide(self, request: DecideRequest | TsugiError) -> DecideResponse | BaseException:
        """Return the decision, or what refused it."""
        if isinstance(request, TsugiError):
            return request
        try:
            reply = self._triggers.decisions.decide(request, request.SerializeToString(), DECIDE_S_MAX)
        except TsugiError as error:
            return error
        (result,) = await asyncio.gather(reply, return_exceptions=True)
        return result if isinstance(result, BaseException) else DecideResponse.FromString(result)

    def _is_to_be_tried_again(self, error: BaseException, ask: _Ask, plan: _Plan) -> bool:
        """Say whether an error may be another one, or none, at the next attempt."""
        live = self._triggers.decisions.live
        if live is not None and live.catalog is not plan.catalog:
            return True  # where the request does not fit the new catalog, that ends the subscription
        if not isinstance(error, TsugiError):
            return False
        # The same event was decided meanwhile, for another subscription of the name: that decision is the answer.
        is_twin = error.reason == ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED and not ask.is_recorded
        return is_twin or error.reason in _NOT_NOW


def _anchor(said: SourceRecord, catalog: Catalog) -> Named:
    """Return the identity that a record is kept under."""
    source = catalog.profiles.sources.get(said.source)
    ids = named_all(said.identities, catalog.profiles, source.default_country_code if source is not None else "")
    return ids[anchor_of(ids, catalog.profiles)]


def _trigger(record: Record, said: SourceRecord, profile_key: bytes) -> Trigger:
    trigger = Trigger(event=said.event, profile_id=profile_key.hex(), identities=said.identities)
    if not trigger.event.HasField("occurrence_time"):
        trigger.event.occurrence_time.FromMicroseconds(record.time_us)
    return trigger


def _microseconds(span: Duration) -> int:
    return int(span.seconds * 1_000_000 + span.nanos // 1_000)


def _damaged(error: repository.CorruptProfileError) -> TsugiError:
    refusal = TsugiError(
        ErrorReason.ERROR_REASON_RECORD_CHECKSUM,
        "the stored profile fails its checksum; tell the operator, it is rebuilt from the log",
    )
    refusal.__cause__ = error
    return refusal
