"""ProfileService: validate, call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Final

from server.errors import TsugiError
from server.outcomes.ingest import Ingest
from server.outcomes.statements import Statements
from server.profiles.reader import ProfileReader
from server.rpc import validate
from server.rpc.methods import Context
from server.rpc.status import item_error
from server.rpc.streams import in_order
from tsugi.v1.profile_service_pb2 import (
    AcceptedRecord,
    AuditSourcesRequest,
    AuditSourcesResponse,
    CountPeopleRequest,
    CountPeopleResponse,
    EraseProfileRequest,
    EraseProfileResponse,
    ExportProfileRequest,
    ExportProfileResponse,
    GetErasureRequest,
    GetErasureResponse,
    GetProfileRequest,
    GetProfileResponse,
    IngestRecordResult,
    IngestRecordsRequest,
    IngestRecordsResponse,
    LinkIdentitiesRequest,
    LinkIdentitiesResponse,
    ListMatchReviewsRequest,
    ListMatchReviewsResponse,
    ListProfilesRequest,
    ListProfilesResponse,
    ResolveIdentityRequest,
    ResolveIdentityResponse,
    SourceRecord,
    SplitProfileRequest,
    SplitProfileResponse,
    StreamIngestRecordsRequest,
    StreamIngestRecordsResponse,
)

STREAM_REQUESTS_MAX: Final = 4  # of one stream, worked on at once


class ProfileServicer:
    """Answers ProfileService."""

    def __init__(
        self, ingest: Ingest, statements: Statements, reader: ProfileReader, clock_us: Callable[[], int]
    ) -> None:
        self._ingest = ingest
        self._statements = statements
        self._reader = reader
        self._clock_us = clock_us

    async def ingest_records(
        self, request: IngestRecordsRequest, _raw: bytes, _context: Context
    ) -> IngestRecordsResponse:
        """See ProfileService.IngestRecords."""
        results, lsn = await self._take(request.records)
        return IngestRecordsResponse(results=results, lsn=lsn)

    def stream_ingest_records(
        self, requests: AsyncIterator[StreamIngestRecordsRequest], _context: Context
    ) -> AsyncIterator[StreamIngestRecordsResponse]:
        """See ProfileService.StreamIngestRecords."""

        async def answer(request: StreamIngestRecordsRequest) -> StreamIngestRecordsResponse:
            results, lsn = await self._take(request.records)
            return StreamIngestRecordsResponse(results=results, lsn=lsn)

        return in_order(requests, answer, STREAM_REQUESTS_MAX)

    async def get_profile(self, request: GetProfileRequest, _raw: bytes, _context: Context) -> GetProfileResponse:
        """See ProfileService.GetProfile."""
        validate.person(request.profile_id, request.identity)
        validate.at_most("timeline_page_size", request.timeline_page_size, validate.PAGE_SIZE_MAX)
        return await self._reader.get(request)

    async def resolve_identity(
        self, request: ResolveIdentityRequest, _raw: bytes, _context: Context
    ) -> ResolveIdentityResponse:
        """See ProfileService.ResolveIdentity."""
        validate.identities("identities", request.identities, at_least=1)
        return await self._reader.resolve(request)

    async def link_identities(
        self, request: LinkIdentitiesRequest, _raw: bytes, _context: Context
    ) -> LinkIdentitiesResponse:
        """See ProfileService.LinkIdentities."""
        validate.link_identities(request)
        accepted = await self._statements.link(request)
        if accepted is None:
            return LinkIdentitiesResponse()
        return LinkIdentitiesResponse(lsn=accepted.lsn, duplicate=accepted.is_duplicate)

    async def split_profile(self, request: SplitProfileRequest, _raw: bytes, _context: Context) -> SplitProfileResponse:
        """See ProfileService.SplitProfile."""
        validate.split_profile(request)
        accepted = await self._statements.split(request)
        if accepted is None:
            return SplitProfileResponse()
        return SplitProfileResponse(lsn=accepted.lsn, duplicate=accepted.is_duplicate)

    async def list_match_reviews(
        self, request: ListMatchReviewsRequest, _raw: bytes, _context: Context
    ) -> ListMatchReviewsResponse:
        """See ProfileService.ListMatchReviews."""
        validate.at_most("page_size", request.page_size, validate.PAGE_SIZE_MAX)
        return self._reader.reviews(request.page_size or validate.PAGE_SIZE_DEFAULT, request.page_token)

    async def export_profile(
        self, request: ExportProfileRequest, _raw: bytes, _context: Context
    ) -> ExportProfileResponse:
        """See ProfileService.ExportProfile."""
        validate.person(request.profile_id, request.identity)
        return await self._reader.export(request)

    async def erase_profile(self, request: EraseProfileRequest, _raw: bytes, _context: Context) -> EraseProfileResponse:
        """See ProfileService.EraseProfile."""
        validate.person(request.profile_id, request.identity)
        validate.caller_id("request_id", request.request_id)
        erasure_key, accepted = await self._statements.erase(request)
        return EraseProfileResponse(erasure_id=erasure_key.hex(), lsn=accepted.lsn, duplicate=accepted.is_duplicate)

    async def get_erasure(self, request: GetErasureRequest, _raw: bytes, _context: Context) -> GetErasureResponse:
        """See ProfileService.GetErasure."""
        return await self._reader.erasure(validate.profile_id(request.erasure_id, "erasure_id"))

    async def audit_sources(self, request: AuditSourcesRequest, _raw: bytes, _context: Context) -> AuditSourcesResponse:
        """See ProfileService.AuditSources."""
        return await self._reader.audit(request.at_least_lsn)

    async def count_people(self, request: CountPeopleRequest, _raw: bytes, _context: Context) -> CountPeopleResponse:
        """See ProfileService.CountPeople."""
        return await self._reader.count(request.at_least_lsn)

    async def list_profiles(self, request: ListProfilesRequest, _raw: bytes, _context: Context) -> ListProfilesResponse:
        """See ProfileService.ListProfiles."""
        validate.segment(request.segment)
        size = min(request.page_size or validate.PAGE_SIZE_MAX, validate.PAGE_SIZE_MAX)
        return await self._reader.listing(request.segment, size, request.page_token)

    async def _take(self, records: Iterable[SourceRecord]) -> tuple[list[IngestRecordResult], int]:
        """Record one batch; return the fate of each record and the highest LSN."""
        given = list(records)
        validate.at_most("records", len(given), validate.BATCH_MAX)
        check = partial(validate.source_record, now_us=self._clock_us())
        results: list[IngestRecordResult] = []
        highest_lsn = 0
        for result in await self._ingest.ingest(validate.checked(record, check) for record in given):
            if isinstance(result, TsugiError):
                results.append(IngestRecordResult(error=item_error(result)))
            else:
                accepted = AcceptedRecord(lsn=result.lsn, duplicate=result.is_duplicate)
                results.append(IngestRecordResult(accepted=accepted))
                highest_lsn = max(highest_lsn, result.lsn)
        return results, highest_lsn
