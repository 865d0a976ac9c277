"""CatalogService: validate, call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import islice

from server.catalog.validation import CATALOG_BYTES_MAX
from server.decisioning.configuration import Changed, Configuration, Wish
from server.decisioning.live import CATALOG_HEAD
from server.errors import field_invalid
from server.profiles.repository import timestamp
from server.rpc import validate
from server.rpc.methods import Context
from server.rpc.upload import Upload, Uploads
from tsugi.log.v1.record_pb2 import CatalogChange
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.catalog_service_pb2 import (
    CatalogRevision,
    GetCatalogRequest,
    GetCatalogResponse,
    ListCatalogRevisionsRequest,
    ListCatalogRevisionsResponse,
    PushCatalogRequest,
    PushCatalogResponse,
    RollbackCatalogRequest,
    RollbackCatalogResponse,
)


class CatalogServicer:
    """Answers CatalogService."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._uploads = Uploads()

    async def push_catalog(self, requests: AsyncIterator[PushCatalogRequest], _context: Context) -> PushCatalogResponse:
        """See CatalogService.PushCatalog."""
        with self._uploads.one():
            return await self._push(requests)

    async def _push(self, requests: AsyncIterator[PushCatalogRequest]) -> PushCatalogResponse:
        header, upload = None, None
        async for request in requests:
            if upload is None:
                if request.WhichOneof("part") != "header":
                    raise field_invalid("header", "the first message is the header")
                header = request.header
                upload = Upload(header.sha256, header.size_bytes, CATALOG_BYTES_MAX)
            else:
                upload.add(request.chunk)
        if upload is None or header is None:
            raise field_invalid("header", "the first message is the header")
        wish = validate_wish(header.request_id, header.etag, validate_only=header.validate_only)
        changed = await self._configuration.push_catalog(upload.finish(), wish)
        return PushCatalogResponse(
            revision=changed.sha256.hex(), etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate
        )

    async def get_catalog(self, request: GetCatalogRequest, _raw: bytes, _context: Context) -> GetCatalogResponse:
        """See CatalogService.GetCatalog."""
        revision = validate.revision(request.revision) if request.revision else None
        data, sha256, head = await self._configuration.catalog_data(revision)
        return GetCatalogResponse(catalog=Catalog.FromString(data), revision=sha256.hex(), etag=str(head))

    async def list_catalog_revisions(
        self, request: ListCatalogRevisionsRequest, _raw: bytes, _context: Context
    ) -> ListCatalogRevisionsResponse:
        """See CatalogService.ListCatalogRevisions."""
        size, from_lsn = validate.page(request.page_size, request.page_token)
        entries = list(islice(self._configuration.history(CATALOG_HEAD, from_lsn), size))
        active_lsn = self._configuration.etag(CATALOG_HEAD)
        response = ListCatalogRevisionsResponse()
        for entry in entries:
            assert isinstance(entry.change, CatalogChange), "this history holds nothing else"
            response.catalog_revisions.append(
                CatalogRevision(
                    revision=entry.sha256.hex(),
                    activation_time=timestamp(entry.record.time_us),
                    lsn=entry.record.lsn,
                    rollback=entry.change.rollback,
                    active=entry.record.lsn == active_lsn,
                )
            )
        if entries and entries[-1].change.previous_lsn:
            response.next_page_token = str(entries[-1].change.previous_lsn)
        return response

    async def rollback_catalog(
        self, request: RollbackCatalogRequest, _raw: bytes, _context: Context
    ) -> RollbackCatalogResponse:
        """See CatalogService.RollbackCatalog."""
        revision = validate.revision(request.revision) if request.revision else None
        wish = validate_wish(request.request_id, request.etag, validate_only=request.validate_only)
        changed: Changed = await self._configuration.rollback_catalog(revision, wish)
        return RollbackCatalogResponse(
            revision=changed.sha256.hex(), etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate
        )


def validate_wish(request_id: str, etag: str, *, validate_only: bool) -> Wish:
    """Check what every configuration write carries."""
    if request_id:
        validate.caller_id("request_id", request_id)
    return Wish(request_id, validate.etag(etag), validate_only)
