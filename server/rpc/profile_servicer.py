"""ProfileService: validate, call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from server.errors import TsugiError, field_invalid, not_found
from server.outcomes.ingest import Ingest
from server.profiles import repository
from server.rpc import validate
from server.rpc.methods import Context
from server.rpc.status import item_error
from server.storage.applied import read_applied
from server.storage.store import Store
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.profile_service_pb2 import (
    AcceptedRecord,
    GetProfileRequest,
    GetProfileResponse,
    IngestRecordResult,
    IngestRecordsRequest,
    IngestRecordsResponse,
)

STALE_WAIT_S_MAX: Final = 0.1
STALE_POLL_S: Final = 0.002


class ProfileServicer:
    """Answers ProfileService."""

    def __init__(self, ingest: Ingest, store: Store, clock_us: Callable[[], int]) -> None:
        self._ingest = ingest
        self._store = store
        self._clock_us = clock_us

    async def ingest_records(
        self, request: IngestRecordsRequest, _raw: bytes, _context: Context
    ) -> IngestRecordsResponse:
        """See ProfileService.IngestRecords."""
        validate.at_most("records", len(request.records), validate.BATCH_MAX)
        now_us = self._clock_us()
        items = [validate.checked(record, partial(validate.source_record, now_us=now_us)) for record in request.records]
        response = IngestRecordsResponse()
        for result in await self._ingest.ingest(items):
            if isinstance(result, TsugiError):
                response.results.append(IngestRecordResult(error=item_error(result)))
            else:
                accepted = AcceptedRecord(lsn=result.lsn, duplicate=result.is_duplicate)
                response.results.append(IngestRecordResult(accepted=accepted))
                response.lsn = max(response.lsn, result.lsn)
        return response

    async def get_profile(self, request: GetProfileRequest, _raw: bytes, _context: Context) -> GetProfileResponse:
        """See ProfileService.GetProfile."""
        if not request.profile_id and not request.HasField("identity"):
            raise field_invalid("profile_id", "a profile_id or an identity is required")
        if request.profile_id:
            validate.profile_id(request.profile_id)
        else:
            validate.identity("identity", request.identity)
        stale_until = time.monotonic() + STALE_WAIT_S_MAX
        while True:
            with self._store.read() as snapshot:
                applied = read_applied(snapshot)
                if applied.lsn >= request.at_least_lsn or time.monotonic() >= stale_until:
                    key = (
                        bytes.fromhex(request.profile_id)
                        if request.profile_id
                        else repository.find(snapshot, [request.identity])
                    )
                    try:
                        stored = repository.load(snapshot, key) if key is not None else None
                    except repository.CorruptProfileError as error:
                        raise TsugiError(
                            ErrorReason.ERROR_REASON_RECORD_CHECKSUM,
                            "the stored profile fails its checksum; tell the operator, it is rebuilt from the log",
                        ) from error
                    if key is None or stored is None:
                        raise not_found("profile", request.profile_id or "(by identity)")
                    profile = repository.describe(snapshot, key, stored)
                    return GetProfileResponse(profile=profile, applied_lsn=applied.lsn)
            await asyncio.sleep(STALE_POLL_S)
