"""What callers may ask about people, answered for one worker from state and log; nothing here changes anything.

Each question takes one snapshot of the state, waits a little for it where the caller has seen a later record, and is
answered from it. Whoever is forgotten is a stranger at once, projected or not. What may take long, a whole person with
a long history, is read and written on a thread, so that decisions go on meanwhile.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import orjson
from google.protobuf import json_format

from server.catalog.catalog import Catalog
from server.errors import TsugiError, field_invalid, nobody_known, not_found
from server.profiles import describe, golden, repository, standing
from server.profiles.audit import describe_sources
from server.profiles.erased import Erased
from server.profiles.identity import KEY_BYTES, are_split, is_device, leads, lookup_key, named, review_key
from server.profiles.membership import Members
from server.storage.applied import read_applied
from server.storage.log import Log
from server.storage.store import Snapshot, Store, Table
from tsugi.log.v1.record_pb2 import RecordKind, SourceRecordAccepted
from tsugi.log.v1.state_pb2 import StoredErasure, StoredNode
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import LinkReason, Touchpoint
from tsugi.v1.profile_service_pb2 import (
    AuditSourcesResponse,
    CountPeopleResponse,
    ErasureReceipt,
    ErasureState,
    ExportProfileRequest,
    ExportProfileResponse,
    GetErasureResponse,
    GetProfileRequest,
    GetProfileResponse,
    IdentityState,
    LinkVerdict,
    ListMatchReviewsResponse,
    ListProfilesResponse,
    MatchReview,
    PeopleCount,
    ResolvedIdentity,
    ResolveIdentityRequest,
    ResolveIdentityResponse,
)

STALE_WAIT_S_MAX: Final = 0.1
STALE_POLL_S: Final = 0.002
EXPORT_PAGE: Final = 500
SHARING_MAX: Final = 64
TOUCHPOINT_BYTES: Final = 8 + 8 + 2 + KEY_BYTES  # of a place on a timeline: instant, log record, serial number, part
REVIEWS_SEEN_MAX: Final = 2_000  # a page, with those that need no review: some 10 µs each, while others wait
REVIEW_BYTES: Final = 4 + 2 * KEY_BYTES  # of a place in the list of reviews


class ProfileReader:
    """Answers for one worker.

    Args:
        log: read for exports, and for erasures that are not projected yet.
        store: the state.
        catalog: gives the catalog in force.
        clock_us: the wall clock, microseconds since the epoch.
    """

    def __init__(self, *, log: Log, store: Store, catalog: Callable[[], Catalog], clock_us: Callable[[], int]) -> None:
        self._log = log
        self._store = store
        self._catalog = catalog
        self._clock_us = clock_us
        self._erased = Erased(log)

    async def get(self, request: GetProfileRequest) -> GetProfileResponse:
        """Return one golden record with a page of its timeline.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, STATE_BEHIND, RECORD_CHECKSUM, CATALOG_MISSING, FIELD_INVALID.
        """
        token = _token("timeline_page_token", request.timeline_page_token, TOUCHPOINT_BYTES)
        await self._wait_for(request.at_least_lsn)
        return await asyncio.to_thread(self._get, request, token, self._catalog())

    def _get(self, request: GetProfileRequest, token: bytes, catalog: Catalog) -> GetProfileResponse:
        with self._store.read() as snapshot:
            key, stored = self._require(snapshot, request, catalog)
            profile = describe.describe(snapshot, key, stored, catalog, self._clock_us())
            size = request.timeline_page_size
            page = describe.timeline(snapshot, stored.parts, size, token) if size else describe.Page([], "")
            return GetProfileResponse(
                profile=profile,
                applied_lsn=read_applied(snapshot).lsn,
                touchpoints=page.touchpoints,
                next_timeline_page_token=page.next_token,
            )

    async def resolve(self, request: ResolveIdentityRequest) -> ResolveIdentityResponse:
        """Say where each identity leads.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND (an undeclared namespace), CATALOG_MISSING.
        """
        await self._wait_for(request.at_least_lsn)
        catalog = self._catalog()
        for i, identity in enumerate(request.identities):
            if identity.namespace not in catalog.profiles.namespaces:
                raise not_found("identity namespace", identity.namespace, f"identities[{i}].namespace")
        with self._store.read() as snapshot:
            applied_lsn = read_applied(snapshot).lsn
            erased = self._erased.since(applied_lsn)
            return ResolveIdentityResponse(
                resolved=[self._resolved(snapshot, identity, catalog, erased) for identity in request.identities],
                applied_lsn=applied_lsn,
            )

    def reviews(self, size: int, token: str) -> ListMatchReviewsResponse:
        """Return a page of pairs to review, the most certain first: those of two people that nobody judged yet.

        A page may be short and yet not be the last.

        Raises:
            TsugiError: FIELD_INVALID: the token is none of ours.
        """
        last = _token("page_token", token, REVIEW_BYTES)
        response = ListMatchReviewsResponse()
        with self._store.read() as snapshot:
            erased = self._erased.since(read_applied(snapshot).lsn)
            after = (place for place, _ in snapshot.scan(Table.REVIEWS, start=last) if place != last)
            for n_seen, place in enumerate(after):
                if len(response.reviews) == size or n_seen == REVIEWS_SEEN_MAX:
                    response.next_page_token = last.hex()
                    break
                review = _review(snapshot, place, erased)
                if review is not None:
                    response.reviews.append(review)
                last = place
        return response

    async def export(self, request: ExportProfileRequest) -> ExportProfileResponse:
        """Return all that is known of one person as JSON.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, STATE_BEHIND, RECORD_CHECKSUM, CATALOG_MISSING.
        """
        await self._wait_for(request.at_least_lsn)
        return await asyncio.to_thread(self._export, request, self._catalog())

    def _export(self, request: ExportProfileRequest, catalog: Catalog) -> ExportProfileResponse:
        with self._store.read() as snapshot:
            key, stored = self._require(snapshot, request, catalog)
            profile = describe.describe(snapshot, key, stored, catalog, self._clock_us())
            content = golden.read_parts(snapshot, stored.parts)
            touchpoints: list[Touchpoint] = []
            page = describe.timeline(snapshot, stored.parts, EXPORT_PAGE)
            touchpoints += page.touchpoints
            while page.next_token:
                page = describe.timeline(snapshot, stored.parts, EXPORT_PAGE, bytes.fromhex(page.next_token))
                touchpoints += page.touchpoints
            applied_lsn = read_applied(snapshot).lsn
        personal = [each.name for each in catalog.message.profile_attributes if each.personal_data]
        ledger = map(describe.consent_state, describe.ledger(content))
        members = {
            "format": _written("tsugi.profile.v1"),
            "appliedLsn": _written(applied_lsn),
            "profile": _written(json_format.MessageToDict(profile)),
            "consentLedger": _each_written(map(json_format.MessageToDict, ledger)),
            "timeline": _each_written(map(json_format.MessageToDict, touchpoints)),
            "sourceRecords": _each_written(self._source_records(stored.parts)),
            "personalDataAttributes": _written(personal),
        }
        lines = [b'"%s": %s' % (name.encode(), text) for name, text in sorted(members.items())]
        return ExportProfileResponse(json=b"{\n" + b",\n".join(lines) + b"\n}\n", applied_lsn=applied_lsn)

    async def erasure(self, erasure_id: bytes) -> GetErasureResponse:
        """Say how far an erasure has come.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND.
        """
        with self._store.read() as snapshot:
            stored = snapshot.get(Table.ERASURES, erasure_id)
            found = StoredErasure.FromString(bytes(stored)) if stored is not None else None
        if found is not None and found.receipt:
            receipt = ErasureReceipt.FromString(found.receipt)
            return GetErasureResponse(state=ErasureState.ERASURE_STATE_FULFILLED, receipt=receipt)
        if found is None and not self._is_wished(erasure_id):
            raise not_found("erasure", erasure_id.hex(), "erasure_id")
        return GetErasureResponse(state=ErasureState.ERASURE_STATE_ACCEPTED)

    async def audit(self, at_least_lsn: int) -> AuditSourcesResponse:
        """Say how the sources do.

        Raises:
            TsugiError: CATALOG_MISSING.
        """
        await self._wait_for(at_least_lsn)
        catalog = self._catalog()
        with self._store.read() as snapshot:
            sources, missing = describe_sources(snapshot, catalog, self._clock_us())
            return AuditSourcesResponse(
                sources=sources, missing_attributes=missing, applied_lsn=read_applied(snapshot).lsn
            )

    async def count(self, at_least_lsn: int) -> CountPeopleResponse:
        """Say how many people there are, in each segment and at each stage.

        Raises:
            TsugiError: CATALOG_MISSING.
        """
        await self._wait_for(at_least_lsn)
        terms = self._catalog().profiles
        stages = terms.journey.stages if terms.journey is not None else ()
        with self._store.read() as snapshot:
            return CountPeopleResponse(
                people=standing.count(snapshot, standing.PEOPLE_COUNT),
                segments=[
                    PeopleCount(name=name, people=standing.count(snapshot, standing.segment_count(name)))
                    for name in terms.segments.names
                ],
                stages=[
                    PeopleCount(name=name, people=standing.count(snapshot, standing.stage_count(name)))
                    for name in stages
                ],
                applied_lsn=read_applied(snapshot).lsn,
            )

    async def listing(self, segment: str, size: int, token: str) -> ListProfilesResponse:
        """Return a page of the people in a segment.

        A page may be short, or empty, and yet not be the last.

        Raises:
            TsugiError: CATALOG_MISSING, RESOURCE_NOT_FOUND; FIELD_INVALID: the token is none of ours.
        """
        last = _token("page_token", token, repository.PROFILE_KEY_BYTES)
        members = Members(self._store, self._erased, self._catalog(), segment, self._clock_us())
        return await members.page(size, last)

    async def _wait_for(self, at_least_lsn: int) -> None:
        """Wait until the state includes an LSN, as long as that may take."""
        until = time.monotonic() + STALE_WAIT_S_MAX
        while at_least_lsn and time.monotonic() < until:
            with self._store.read() as snapshot:
                if read_applied(snapshot).lsn >= at_least_lsn:
                    return
            await asyncio.sleep(STALE_POLL_S)

    def _require(
        self, snapshot: Snapshot, request: GetProfileRequest | ExportProfileRequest, catalog: Catalog
    ) -> tuple[bytes, repository.StoredRecord]:
        """Find one profile by its id, also a former one, or by an identity."""
        profile_id, identity = request.profile_id, request.identity
        key: bytes | None
        if profile_id:
            key = repository.present_key(snapshot, bytes.fromhex(profile_id))
        else:
            key = repository.find(snapshot, [lookup_key(identity, catalog.profiles)])
        try:
            stored = repository.load(snapshot, key) if key is not None else None
        except repository.CorruptProfileError as error:
            raise TsugiError(
                ErrorReason.ERROR_REASON_RECORD_CHECKSUM,
                "the stored profile fails its checksum; tell the operator, it is rebuilt from the log",
            ) from error
        applied_lsn = read_applied(snapshot).lsn
        erased = self._erased.since(applied_lsn)
        if stored is None and applied_lsn < request.at_least_lsn:
            raise _behind(applied_lsn, request.at_least_lsn)
        if key is None or stored is None or key in erased or not erased.isdisjoint(stored.parts):
            raise not_found("profile", profile_id, "profile_id") if profile_id else nobody_known("identity")
        return key, stored

    def _resolved(
        self, snapshot: Snapshot, identity: Identity, catalog: Catalog, erased: frozenset[bytes]
    ) -> ResolvedIdentity:
        terms = catalog.profiles
        one = named(identity, terms)
        node = golden.node_of(snapshot, one.key)
        resolved = ResolvedIdentity(identity=one.identity, state=IdentityState.IDENTITY_STATE_UNKNOWN)
        if node is None or one.key in erased:
            return resolved
        profile_keys = {node.profile_key}
        if node.too_shared:
            resolved.state = IdentityState.IDENTITY_STATE_TOO_SHARED
        elif not leads(node, terms) or is_device(node, terms):
            beside = [golden.node_of(snapshot, edge.other_key) for edge in node.edges if _is_named_with(edge.reason)]
            profile_keys |= {other.profile_key for other in beside if other is not None}
            is_shared = not leads(node, terms) or len(profile_keys) > 1
            resolved.state = IdentityState.IDENTITY_STATE_SHARED if is_shared else IdentityState.IDENTITY_STATE_LEADS
            if not leads(node, terms):
                profile_keys.discard(node.profile_key)
        else:
            resolved.state = IdentityState.IDENTITY_STATE_LEADS
        if resolved.state != IdentityState.IDENTITY_STATE_TOO_SHARED:
            resolved.profile_ids.extend(sorted(key.hex() for key in profile_keys - erased)[:SHARING_MAX])
        return resolved

    def _is_wished(self, erasure_id: bytes) -> bool:
        """Say whether an erasure was accepted that the state may not know yet."""
        entry = self._log.find(erasure_id)
        record = self._log.get(entry.lsn) if entry is not None else None
        return record is not None and record.kind == RecordKind.RECORD_KIND_ERASURE_ACCEPTED

    def _source_records(self, keys: list[bytes]) -> Iterator[dict[str, object]]:
        """Read every source record about a person from the log, as it came."""
        for lsn in sorted({lsn for key in keys for lsn in self._log.about(key)}):
            record = self._log.get(lsn)
            if record is None or record.is_tombstone or record.kind != RecordKind.RECORD_KIND_SOURCE_RECORD:
                continue
            said = SourceRecordAccepted.FromString(record.payload).record
            yield {"lsn": lsn, "record": json_format.MessageToDict(said)}


def _each_written(entries: Iterable[object]) -> bytes:
    """Write a list as JSON, each entry at once and on a line: many together would hold up everybody, and be garbage."""
    return b"[\n" + b",\n".join(map(_written, entries)) + b"\n]"


def _written(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _behind(applied_lsn: int, at_least_lsn: int) -> TsugiError:
    return TsugiError(
        ErrorReason.ERROR_REASON_STATE_BEHIND,
        f"at_least_lsn: the state has come to {applied_lsn}, and nobody is known in it; ask again",
        applied_lsn=applied_lsn,
        at_least_lsn=at_least_lsn,
    )


def _is_named_with(reason: int) -> bool:
    return reason == LinkReason.LINK_REASON_SHARED_RECORD


def _review(snapshot: Snapshot, place: bytes, erased: frozenset[bytes]) -> MatchReview | None:
    """Return the pair that stands in the list of reviews.

    None: it is of one person, of somebody forgotten, judged, or stands further up.
    """
    one, other = place[4 : 4 + KEY_BYTES], place[4 + KEY_BYTES :]
    nodes: list[StoredNode] = [node for key in (one, other) if (node := golden.node_of(snapshot, key)) is not None]
    if len(nodes) < 2 or nodes[0].profile_key == nodes[1].profile_key:
        return None
    if not erased.isdisjoint((one, other, nodes[0].profile_key, nodes[1].profile_key)):
        return None
    between = [edge for edge in nodes[0].edges if edge.other_key == other]
    if any(edge.verdict in _JUDGED for edge in between) or are_split(*nodes):
        return None
    weight = max((edge.weight for edge in between), default=0.0)
    if review_key(weight, one, other) != place:
        return None
    return MatchReview(
        identity=nodes[0].identity,
        other_identity=nodes[1].identity,
        profile_id=nodes[0].profile_key.hex(),
        other_profile_id=nodes[1].profile_key.hex(),
        weight=round(weight, describe.WEIGHT_DECIMALS),
    )


_JUDGED: Final = frozenset({LinkVerdict.LINK_VERDICT_SAME, LinkVerdict.LINK_VERDICT_DIFFERENT})


def _token(path: str, text: str, n_bytes: int) -> bytes:
    """Return where a page ended; empty for the first one."""
    if text and not (len(text) == 2 * n_bytes and _HEXADECIMAL.match(text)):
        raise field_invalid(path, "pass it exactly as received")
    return bytes.fromhex(text)


_HEXADECIMAL: Final = re.compile(r"[0-9a-f]+\Z")
