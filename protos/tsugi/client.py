"""Call a Tsugi server: typed values in, the generated response messages out, refusals as one exception.

Handed an address and plain Python values, it builds the exact request, spreads calls over connections and repeats what
may be repeated. It knows the generated code and gRPC, and nothing of the server's inside.

A call is repeated by gRPC itself, on a lost connection or a draining worker, within the call's deadline and under a
retry budget, when repeating it cannot count twice: everything that is keyed by the caller's ids or only reads. Decide
and the configuration writes are so keyed only when they carry a ``request_id``. Without one they are repeated solely
where gRPC knows that the server never saw them: a second decision would leave a second contact and a second silence.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from tsugi.requests import (
    DecideOptions,
    Placements,
    TriggerOptions,
    catalog_upload,
    consent,
    decide_request,
    event,
    model_upload,
    outcome,
    source_record,
    subscribe_triggers_request,
    to_value,
)
from tsugi.unanswered import Unanswered
from tsugi.v1 import (
    catalog_pb2,
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    decision_service_pb2,
    decision_service_pb2_grpc,
    identity_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    outcome_service_pb2,
    outcome_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

__all__ = ["CallError", "Client", "consent", "decide_request", "event", "outcome", "source_record", "to_value"]

RECEIVE_BYTES_MAX = 32 * 1024 * 1024
UPLOAD_TIMEOUT_S = 60.0
RESUME_S_MIN, RESUME_S_MAX = 0.1, 2.0  # before a subscription goes on over another connection

_Request_contra = TypeVar("_Request_contra", contravariant=True)
_Response_co = TypeVar("_Response_co", covariant=True)

_CONFIG_ONCE = {"methodConfig": [{"name": [{}], "waitForReady": True}]}
_CONFIG_REPEATED = {
    "methodConfig": [
        {
            "name": [{}],
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 3,
                # CANCELLED comes from a server that stops; a cancel of our own ends the call whatever this says.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # The budget: repeating stops while more than about one call in ten fails.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    # The server takes a ping every 10 s and none without calls; more often would end the connection.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A restarted worker is back within a second; gRPC's own first pause is as long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Decisions are asked for within one network; a proxy meant for web pages is not on that way.
    ("grpc.enable_http_proxy", 0),
)
_connection_numbers = itertools.count()
_ENDED_BY_SERVER = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


class CallError(Exception):
    """A call that the server refused or that did not get through.

    Attributes:
        code: the gRPC status code.
        reason: the full name of the tsugi.v1.ErrorReason; empty when the status came from the library.
        message: for people; never parse it.
        metadata: what varies in the message.
        violations: (path, description) of each wrong field.
        retry_delay_s: how long the server asks to wait before the same call; 0.0 when it does not say.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_delay_s: float = 0.0,
    ) -> None:
        super().__init__(f"{code.name} {reason}: {message}" if reason else f"{code.name}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = list(violations)
        self.retry_delay_s = retry_delay_s

    @property
    def is_unanswered(self) -> bool:
        """Whether no server was heard of, or none in time; it may have done what it was asked."""
        return not self.reason and self.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

    @classmethod
    def of(cls, error: grpc.RpcError) -> Self:
        """Read what gRPC raised."""
        info, fields, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            for known in (info, fields, retry):
                detail.Unpack(known)  # leaves a message of another type as it is
        return cls(
            error.code(),
            error.details() or "",
            reason=info.reason,
            metadata=info.metadata,
            violations=[(violation.field, violation.description) for violation in fields.field_violations],
            retry_delay_s=retry.retry_delay.ToTimedelta().total_seconds(),
        )


class Client:
    """A caller with connections of its own; safe to use from many threads. Close it, or use it in a ``with`` block.

    Args:
        address: host and port of the server.
        timeout_s: deadline of a call that states none; waiting for a connection counts.
        channels: connections to spread calls over in turn. One connection leads to one worker.
    """

    def __init__(self, address: str, *, timeout_s: float = 2.0, channels: int = 1) -> None:
        assert channels >= 1, "a caller without a connection cannot call"
        self._address = address
        self._timeout_s = timeout_s
        self._lines = [_Line(address, next(_connection_numbers)) for _ in range(channels)]
        self._turns = itertools.count()
        self._subscribed: set[_Line] = set()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every connection; calls under way are cancelled."""
        self._closed.set()
        for line in (*self._lines, *self._subscribed):
            line.close()

    def decide(
        self, placements: Placements, *, timeout_s: float | None = None, **options: Unpack[DecideOptions]
    ) -> decision_service_pb2.DecideResponse:
        """Ask for the best next actions of one person; see decide_request for the arguments.

        With a request_id the call is repeated when it fails on the way. Without one it is not: whether the first
        attempt was decided is then unknown, and a decision too many counts as a contact and as silence.
        """
        request = decide_request(placements, **options)
        return self._call(self._stubs(request.request_id).decisions.Decide, request, timeout_s)

    def decide_then(
        self,
        then: Callable[[decision_service_pb2.DecideResponse | CallError], None],
        placements: Placements,
        *,
        timeout_s: float | None = None,
        **options: Unpack[DecideOptions],
    ) -> None:
        """Start a decide and return at once; then is called with its reply or refusal, on one of gRPC's threads."""
        request = decide_request(placements, **options)
        call = self._stubs(request.request_id).decisions.Decide.future(
            request, timeout=self._timeout_s if timeout_s is None else timeout_s
        )

        def answered(done: grpc.Future[decision_service_pb2.DecideResponse]) -> None:
            error = done.exception()
            if error is None:
                then(done.result())
            else:
                assert isinstance(error, grpc.RpcError), "a call ends in a reply or in a status"
                then(CallError.of(error))

        call.add_done_callback(answered)

    def batch_decide(
        self, requests: Iterable[decision_service_pb2.DecideRequest], *, timeout_s: float | None = None
    ) -> decision_service_pb2.BatchDecideResponse:
        """Decide at most 500 requests (see decide_request); a refused one stands as an error among the results.

        Repeated when it fails on the way only if every request has a request_id; see decide.
        """
        batch = decision_service_pb2.BatchDecideRequest(requests=requests)
        key = None if all(request.request_id for request in batch.requests) else ""
        return self._call(self._stubs(key).decisions.BatchDecide, batch, timeout_s)

    def stream_decide(
        self, requests: Iterable[decision_service_pb2.DecideRequest], *, timeout_s: float | None = None
    ) -> Iterator[decision_service_pb2.StreamDecideResponse]:
        """Decide requests as they come, and yield the decision or error of each, in order.

        The server reads on as replies are taken. When the stream breaks (CallError) it is not repeated; requests that
        were not answered may be sent again when they have a request_id.
        """
        parts = (decision_service_pb2.StreamDecideRequest(request=request) for request in requests)
        call = self._stubs("").decisions.StreamDecide(parts, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise CallError.of(error) from error
        finally:
            call.cancel()

    def subscribe_triggers(
        self,
        name: str,
        event_type: str,
        placements: Placements,
        *,
        timeout_s: float | None = None,
        **options: Unpack[TriggerOptions],
    ) -> Iterator[decision_service_pb2.SubscribeTriggersResponse]:
        """Yield the decisions that events of one type cause, each at least once, and how far the log is looked at.

        Asking for the next message says that the one before is dealt with. When the server ends the stream, as it does
        whenever a connection reaches its age, it is gone on with after that message, over another connection; a refusal
        is raised. To go on in another process, pass the lsn of the last message dealt with as after_lsn.

        Args:
            name: names the subscription for ever; one event is decided once under one name.
            event_type: declared in the catalog.
            placements: as for decide_request.
            timeout_s: for how long, then CallError with DEADLINE_EXCEEDED; None: for ever.
            options: filter, delay, context, after_lsn; see SubscribeTriggersRequest.
        """
        request = subscribe_triggers_request(name, event_type, placements, **options)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = RESUME_S_MIN
        while True:
            line = _Line(self._address, next(_connection_numbers))
            self._subscribed.add(line)
            if self._closed.is_set():  # meanwhile: nobody else closes this one
                line.close()
                return
            left_s = None if until is None else max(0.0, until - time.monotonic())
            call = line.once.decisions.SubscribeTriggers(request, timeout=left_s)
            try:
                for response in call:
                    pause_s = RESUME_S_MIN
                    yield response
                    request.after_lsn = response.lsn
            except grpc.RpcError as error:
                ended = CallError.of(error)
                if ended.code not in _ENDED_BY_SERVER or self._closed.is_set():
                    raise ended from error
            finally:
                call.cancel()
                self._subscribed.discard(line)
                line.close()
            if self._closed.wait(pause_s):
                return
            pause_s = min(2 * pause_s, RESUME_S_MAX)

    def get_decision(
        self, decision_id: str, *, explained: bool = False, timeout_s: float | None = None
    ) -> decision_service_pb2.GetDecisionResponse:
        """Read one recorded decision; explained: with every candidate's fate."""
        view = decision_service_pb2.DECISION_VIEW_EXPLAINED if explained else decision_service_pb2.DECISION_VIEW_BASIC
        request = decision_service_pb2.GetDecisionRequest(decision_id=decision_id, view=view)
        return self._call(self._stubs().decisions.GetDecision, request, timeout_s)

    def report_outcome(
        self,
        decision_id: str,
        action: str,
        outcome_id: str,
        type: str = "",  # noqa: A002  # the field's name in the API
        *,
        value: float = 0.0,
        occurrence_time: datetime | None = None,
        revokes: str = "",
        reporter: str = "",
        timeout_s: float | None = None,
    ) -> outcome_service_pb2.ReportOutcomeResponse:
        """Report one outcome; it is on disk when this returns. Safe to repeat with the same outcome_id.

        With revokes it takes back the outcome reported under that outcome_id, and needs no type.
        """
        request = outcome(
            decision_id, action, outcome_id, type,
            value=value, occurrence_time=occurrence_time, revokes=revokes, reporter=reporter,
        )  # fmt: skip
        return self._call(self._stubs().outcomes.ReportOutcome, request, timeout_s)

    def batch_report_outcomes(
        self, outcomes: Iterable[outcome_service_pb2.ReportOutcomeRequest], *, timeout_s: float | None = None
    ) -> outcome_service_pb2.BatchReportOutcomesResponse:
        """Report at most 500 outcomes; a refused one stands as an error among the results and is not raised."""
        request = outcome_service_pb2.BatchReportOutcomesRequest(outcomes=outcomes)
        return self._call(self._stubs().outcomes.BatchReportOutcomes, request, timeout_s)

    def stream_report_outcomes(
        self, outcomes: Iterable[outcome_service_pb2.ReportOutcomeRequest], *, timeout_s: float | None = None
    ) -> Iterator[outcome_service_pb2.StreamReportOutcomesResponse]:
        """Report outcomes as they come, and yield the fate of each, in order; what was accepted is on disk.

        The server reads on as results are taken. When it ends the stream, as it does whenever a connection reaches its
        age, what was not answered is sent again in another call: it counts once by its ids. A refusal of the whole is
        raised (CallError); what was not answered until then may be on disk, or not.

        Args:
            outcomes: see outcome; asked for on another thread, up to 1,024 ahead of the results taken.
            timeout_s: for how long, then CallError with DEADLINE_EXCEEDED; None: for ever.
        """
        unanswered = Unanswered(outcomes)
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        pause_s = RESUME_S_MIN
        try:
            while (left_s := until - time.monotonic()) > 0.0:
                # Once: what gRPC would keep for repeating it is kept here.
                method = self._stubs("").outcomes.StreamReportOutcomes
                call = method(unanswered.requests(), timeout=left_s if timeout_s is not None else None)
                try:
                    for response in call:
                        pause_s = RESUME_S_MIN
                        unanswered.answered()
                        yield response
                    return
                except grpc.RpcError as error:
                    ended = CallError.of(error)
                    is_refusal = ended.reason or ended.code not in _ENDED_BY_SERVER
                    if is_refusal or self._closed.wait(max(0.0, min(pause_s, until - time.monotonic()))):
                        raise ended from error
                finally:
                    call.cancel()
                pause_s = min(2 * pause_s, RESUME_S_MAX)
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "the outcomes were not all answered in time")
        finally:
            unanswered.close()

    def ingest_records(
        self, records: Iterable[profile_service_pb2.SourceRecord], *, timeout_s: float | None = None
    ) -> profile_service_pb2.IngestRecordsResponse:
        """Record at most 500 source records; a refused one stands as an error among the results."""
        request = profile_service_pb2.IngestRecordsRequest(records=records)
        return self._call(self._stubs().profiles.IngestRecords, request, timeout_s)

    def stream_ingest_records(
        self, batches: Iterable[Iterable[profile_service_pb2.SourceRecord]], *, timeout_s: float | None = None
    ) -> Iterator[profile_service_pb2.StreamIngestRecordsResponse]:
        """Record batches of at most 500 source records each, and yield the reply to each, in order.

        The server reads on as replies are taken. When the stream breaks (CallError), what was answered is on disk; send
        the rest again under the same record ids.
        """
        requests = (profile_service_pb2.StreamIngestRecordsRequest(records=batch) for batch in batches)
        call = self._stubs().profiles.StreamIngestRecords(requests, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise CallError.of(error) from error
        finally:
            call.cancel()

    def get_profile(
        self,
        *,
        profile_id: str = "",
        identity: tuple[str, str] | None = None,
        at_least_lsn: int = 0,
        timeline_page_size: int = 0,
        timeline_page_token: str = "",
        timeout_s: float | None = None,
    ) -> profile_service_pb2.GetProfileResponse:
        """Read the golden record of one person, by profile id or by one (namespace, value) pair."""
        request = profile_service_pb2.GetProfileRequest(
            profile_id=profile_id,
            identity=_identity(identity),
            at_least_lsn=at_least_lsn,
            timeline_page_size=timeline_page_size,
            timeline_page_token=timeline_page_token,
        )
        return self._call(self._stubs().profiles.GetProfile, request, timeout_s)

    def resolve_identity(
        self, identities: Iterable[tuple[str, str]], *, at_least_lsn: int = 0, timeout_s: float | None = None
    ) -> profile_service_pb2.ResolveIdentityResponse:
        """Ask where each of at most 16 (namespace, value) pairs leads."""
        request = profile_service_pb2.ResolveIdentityRequest(
            identities=[identity_pb2.Identity(namespace=namespace, value=value) for namespace, value in identities],
            at_least_lsn=at_least_lsn,
        )
        return self._call(self._stubs().profiles.ResolveIdentity, request, timeout_s)

    def link_identities(
        self,
        identity: tuple[str, str],
        other_identity: tuple[str, str],
        verdict: profile_service_pb2.LinkVerdict,
        *,
        stated_by: str,
        request_id: str,
        weight: float = 0.0,
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> profile_service_pb2.LinkIdentitiesResponse:
        """State that two identities are of one person, of two, or may be. Safe to repeat with the same request_id."""
        request = profile_service_pb2.LinkIdentitiesRequest(
            identity=_identity(identity),
            other_identity=_identity(other_identity),
            verdict=verdict,
            weight=weight,
            stated_by=stated_by,
            request_id=request_id,
            validate_only=validate_only,
        )
        return self._call(self._stubs().profiles.LinkIdentities, request, timeout_s)

    def split_profile(
        self,
        profile_id: str,
        identities: Iterable[tuple[str, str]],
        *,
        stated_by: str,
        request_id: str,
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> profile_service_pb2.SplitProfileResponse:
        """Take identities out of a profile, with all that was recorded under them."""
        request = profile_service_pb2.SplitProfileRequest(
            profile_id=profile_id,
            identities=[identity_pb2.Identity(namespace=namespace, value=value) for namespace, value in identities],
            stated_by=stated_by,
            request_id=request_id,
            validate_only=validate_only,
        )
        return self._call(self._stubs().profiles.SplitProfile, request, timeout_s)

    def list_match_reviews(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> profile_service_pb2.ListMatchReviewsResponse:
        """Read one page of the pairs that may be one person, the most certain first."""
        request = profile_service_pb2.ListMatchReviewsRequest(page_size=page_size, page_token=page_token)
        return self._call(self._stubs().profiles.ListMatchReviews, request, timeout_s)

    def export_profile(
        self,
        *,
        profile_id: str = "",
        identity: tuple[str, str] | None = None,
        at_least_lsn: int = 0,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return all that is known of one person, as JSON."""
        request = profile_service_pb2.ExportProfileRequest(
            profile_id=profile_id, identity=_identity(identity), at_least_lsn=at_least_lsn
        )
        return self._call(self._stubs().profiles.ExportProfile, request, timeout_s).json

    def erase_profile(
        self,
        request_id: str,
        *,
        profile_id: str = "",
        identity: tuple[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> profile_service_pb2.EraseProfileResponse:
        """Have one person forgotten; get_erasure tells when it is done. Safe to repeat with the same request_id."""
        request = profile_service_pb2.EraseProfileRequest(
            profile_id=profile_id, identity=_identity(identity), request_id=request_id
        )
        return self._call(self._stubs().profiles.EraseProfile, request, timeout_s)

    def get_erasure(self, erasure_id: str, *, timeout_s: float | None = None) -> profile_service_pb2.GetErasureResponse:
        """Ask how far an erasure has come; with the signed receipt once it is fulfilled."""
        request = profile_service_pb2.GetErasureRequest(erasure_id=erasure_id)
        return self._call(self._stubs().profiles.GetErasure, request, timeout_s)

    def audit_sources(
        self, *, at_least_lsn: int = 0, timeout_s: float | None = None
    ) -> profile_service_pb2.AuditSourcesResponse:
        """Ask how complete, fresh and consistent each source is."""
        request = profile_service_pb2.AuditSourcesRequest(at_least_lsn=at_least_lsn)
        return self._call(self._stubs().profiles.AuditSources, request, timeout_s)

    def count_people(
        self, *, at_least_lsn: int = 0, timeout_s: float | None = None
    ) -> profile_service_pb2.CountPeopleResponse:
        """Ask how many people there are, in each segment and at each stage of the journey."""
        request = profile_service_pb2.CountPeopleRequest(at_least_lsn=at_least_lsn)
        return self._call(self._stubs().profiles.CountPeople, request, timeout_s)

    def list_profiles(
        self, segment: str, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> profile_service_pb2.ListProfilesResponse:
        """Read one page of the people in a segment; also an empty one may have a next_page_token."""
        request = profile_service_pb2.ListProfilesRequest(segment=segment, page_size=page_size, page_token=page_token)
        return self._call(self._stubs().profiles.ListProfiles, request, timeout_s)

    def push_catalog(
        self,
        catalog: catalog_pb2.Catalog,
        *,
        etag: str = "",
        request_id: str = "",
        validate_only: bool = False,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> catalog_service_pb2.PushCatalogResponse:
        """Put a catalog in force; the same catalog always makes the same bytes, hence the same revision."""
        parts = catalog_upload(catalog, etag=etag, request_id=request_id, validate_only=validate_only)
        return self._call(self._stubs(request_id).catalogs.PushCatalog, iter(parts), timeout_s)

    def get_catalog(
        self, revision: str = "", *, timeout_s: float | None = None
    ) -> catalog_service_pb2.GetCatalogResponse:
        """Read one catalog revision, by default the one in force."""
        request = catalog_service_pb2.GetCatalogRequest(revision=revision)
        return self._call(self._stubs().catalogs.GetCatalog, request, timeout_s)

    def list_catalog_revisions(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> catalog_service_pb2.ListCatalogRevisionsResponse:
        """Read one page of the revisions that were put in force, newest first."""
        request = catalog_service_pb2.ListCatalogRevisionsRequest(page_size=page_size, page_token=page_token)
        return self._call(self._stubs().catalogs.ListCatalogRevisions, request, timeout_s)

    def rollback_catalog(
        self,
        revision: str = "",
        *,
        etag: str = "",
        request_id: str = "",
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> catalog_service_pb2.RollbackCatalogResponse:
        """Put an earlier revision in force again, by default the one before."""
        request = catalog_service_pb2.RollbackCatalogRequest(
            revision=revision, etag=etag, request_id=request_id, validate_only=validate_only
        )
        return self._call(self._stubs(request_id).catalogs.RollbackCatalog, request, timeout_s)

    def push_model(
        self, bundle: bytes, label: str, *, validate_only: bool = False, timeout_s: float = UPLOAD_TIMEOUT_S
    ) -> model_service_pb2.PushModelResponse:
        """Store a serialised bundle as a revision; no model role changes."""
        parts = model_upload(bundle, label, validate_only=validate_only)
        return self._call(self._stubs().models.PushModel, iter(parts), timeout_s)

    def list_model_revisions(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> model_service_pb2.ListModelRevisionsResponse:
        """Read one page of the pushed revisions, newest first, and the etags of the roles."""
        request = model_service_pb2.ListModelRevisionsRequest(page_size=page_size, page_token=page_token)
        return self._call(self._stubs().models.ListModelRevisions, request, timeout_s)

    def assign_model_role(
        self,
        revision: str,
        *,
        role: model_pb2.ModelRole = model_pb2.MODEL_ROLE_CHAMPION,
        etag: str = "",
        request_id: str = "",
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> model_service_pb2.AssignModelRoleResponse:
        """Give a role to a revision; an empty revision leaves the role to nobody.

        The role learner is given to "baseline", which turns all that was learned and all exploring off, or to "fleet".
        """
        request = model_service_pb2.AssignModelRoleRequest(
            role=role, revision=revision, etag=etag, request_id=request_id, validate_only=validate_only
        )
        return self._call(self._stubs(request_id).models.AssignModelRole, request, timeout_s)

    def rollback_model(
        self,
        *,
        role: model_pb2.ModelRole = model_pb2.MODEL_ROLE_CHAMPION,
        etag: str = "",
        request_id: str = "",
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> model_service_pb2.RollbackModelResponse:
        """Give a role back to the revision that had it before."""
        request = model_service_pb2.RollbackModelRequest(
            role=role, etag=etag, request_id=request_id, validate_only=validate_only
        )
        return self._call(self._stubs(request_id).models.RollbackModel, request, timeout_s)

    def list_learners(
        self, goal: str = "", *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> model_service_pb2.ListLearnersResponse:
        """Read one page of the goals' learners and how they do; of one goal alone when it is named."""
        request = model_service_pb2.ListLearnersRequest(goal=goal, page_size=page_size, page_token=page_token)
        return self._call(self._stubs().models.ListLearners, request, timeout_s)

    def reset_learner(
        self,
        role: model_pb2.LearnerRole,
        goals: Iterable[str] = (),
        *,
        etag: str = "",
        request_id: str = "",
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> model_service_pb2.ResetLearnerResponse:
        """Have the learners of a role begin anew: of these goals, by default of all."""
        request = model_service_pb2.ResetLearnerRequest(
            role=role, goals=goals, etag=etag, request_id=request_id, validate_only=validate_only
        )
        return self._call(self._stubs(request_id).models.ResetLearner, request, timeout_s)

    def is_serving(self, service: str = "", *, timeout_s: float | None = None) -> bool:
        """Say whether the server takes calls, of all services or of one by its full name."""
        request = health_pb2.HealthCheckRequest(service=service)
        state = self._call(self._stubs().health.Check, request, timeout_s).status
        return bool(state == health_pb2.HealthCheckResponse.SERVING)

    def _stubs(self, key: str | None = None) -> _Stubs:
        """Take the next connection's turn; an empty key (not None) means that the call must not be repeated."""
        line = self._lines[next(self._turns) % len(self._lines)]
        return line.once if key == "" else line.repeated

    def _call(
        self, method: _Method[_Request_contra, _Response_co], request: _Request_contra, timeout_s: float | None
    ) -> _Response_co:
        try:
            return method(request, timeout=self._timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise CallError.of(error) from error


def _identity(pair: tuple[str, str] | None) -> identity_pb2.Identity | None:
    return None if pair is None else identity_pb2.Identity(namespace=pair[0], value=pair[1])


class _Method(Protocol[_Request_contra, _Response_co]):
    def __call__(self, request: _Request_contra, /, timeout: float | None = None) -> _Response_co: ...


class _Stubs:
    """The methods of every service on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.decisions = decision_service_pb2_grpc.DecisionServiceStub(channel)
        self.outcomes = outcome_service_pb2_grpc.OutcomeServiceStub(channel)
        self.profiles = profile_service_pb2_grpc.ProfileServiceStub(channel)
        self.catalogs = catalog_service_pb2_grpc.CatalogServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)


class _Line:
    """One connection and two ways to call over it: once, or repeated by gRPC's retry policy.

    A retry policy belongs to a channel and a method, not to a call, hence two channels. gRPC lets channels share a
    connection when their arguments agree in all but the policy; the number in the arguments keeps lines apart.
    """

    def __init__(self, address: str, number: int) -> None:
        options = (*_OPTIONS, ("tsugi.connection", number))
        self.once, self.repeated = (
            _Stubs(grpc.insecure_channel(address, options=(*options, ("grpc.service_config", json.dumps(config)))))
            for config in (_CONFIG_ONCE, _CONFIG_REPEATED)
        )

    def close(self) -> None:
        self.once.channel.close()
        self.repeated.channel.close()
