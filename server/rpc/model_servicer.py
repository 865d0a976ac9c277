"""ModelService: validate, call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import islice

from server.decisioning.configuration import Configuration, Entry
from server.decisioning.live import CHAMPION_HEAD, MODEL_HEAD
from server.errors import field_invalid
from server.profiles.repository import timestamp
from server.registry.bundle import BUNDLE_BYTES_MAX
from server.rpc import validate
from server.rpc.catalog_servicer import validate_wish
from server.rpc.methods import Context
from server.rpc.upload import Upload, Uploads
from tsugi.log.v1.record_pb2 import ModelPushed
from tsugi.v1.model_pb2 import ModelRevision, ModelRole
from tsugi.v1.model_service_pb2 import (
    AssignModelRoleRequest,
    AssignModelRoleResponse,
    ListModelRevisionsRequest,
    ListModelRevisionsResponse,
    PushModelRequest,
    PushModelResponse,
    RollbackModelRequest,
    RollbackModelResponse,
)


class ModelServicer:
    """Answers ModelService."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._uploads = Uploads()

    async def push_model(self, requests: AsyncIterator[PushModelRequest], _context: Context) -> PushModelResponse:
        """See ModelService.PushModel."""
        with self._uploads.one():
            return await self._push(requests)

    async def _push(self, requests: AsyncIterator[PushModelRequest]) -> PushModelResponse:
        header, upload = None, None
        async for request in requests:
            if upload is None:
                if request.WhichOneof("part") != "header":
                    raise field_invalid("header", "the first message is the header")
                header = request.header
                validate.label(header.label)
                upload = Upload(header.sha256, header.size_bytes, BUNDLE_BYTES_MAX)
            else:
                upload.add(request.chunk)
        if upload is None or header is None:
            raise field_invalid("header", "the first message is the header")
        data = upload.finish()
        entry, bundle, is_duplicate = await self._configuration.push_model(
            data, header.label, validate_only=header.validate_only
        )
        revision = (
            self._revision(entry)
            if entry is not None
            else ModelRevision(
                revision=header.sha256, label=header.label, goal=bundle.manifest.goal, size_bytes=len(data)
            )
        )
        return PushModelResponse(model_revision=revision, duplicate=is_duplicate)

    async def list_model_revisions(
        self, request: ListModelRevisionsRequest, _raw: bytes, _context: Context
    ) -> ListModelRevisionsResponse:
        """See ModelService.ListModelRevisions."""
        size, from_lsn = validate.page(request.page_size, request.page_token)
        entries = list(islice(self._configuration.history(MODEL_HEAD, from_lsn), size))
        response = ListModelRevisionsResponse(
            model_revisions=map(self._revision, entries),
            champion_etag=str(self._configuration.etag(CHAMPION_HEAD)),
        )
        if entries and entries[-1].change.previous_lsn:
            response.next_page_token = str(entries[-1].change.previous_lsn)
        return response

    async def assign_model_role(
        self, request: AssignModelRoleRequest, _raw: bytes, _context: Context
    ) -> AssignModelRoleResponse:
        """See ModelService.AssignModelRole."""
        _champion_only(request.role)
        sha256 = validate.revision(request.revision) if request.revision else b""
        wish = validate_wish(request.request_id, request.etag, validate_only=request.validate_only)
        changed = await self._configuration.assign_champion(sha256, wish)
        return AssignModelRoleResponse(etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate)

    async def rollback_model(
        self, request: RollbackModelRequest, _raw: bytes, _context: Context
    ) -> RollbackModelResponse:
        """See ModelService.RollbackModel."""
        _champion_only(request.role)
        wish = validate_wish(request.request_id, request.etag, validate_only=request.validate_only)
        changed = await self._configuration.rollback_champion(wish)
        return RollbackModelResponse(
            revision=changed.sha256.hex(), etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate
        )

    def _revision(self, entry: Entry) -> ModelRevision:
        pushed = entry.change
        assert isinstance(pushed, ModelPushed), "this history holds nothing else"
        champion = next(self._configuration.history(CHAMPION_HEAD), None)
        is_champion = champion is not None and champion.sha256 == pushed.bundle_sha256
        return ModelRevision(
            revision=pushed.bundle_sha256.hex(),
            label=pushed.label,
            goal=pushed.goal,
            push_time=timestamp(entry.record.time_us),
            lsn=entry.record.lsn,
            size_bytes=pushed.size_bytes,
            roles=[ModelRole.MODEL_ROLE_CHAMPION] if is_champion else [],
        )


def _champion_only(role: int) -> None:
    if role != ModelRole.MODEL_ROLE_CHAMPION:
        raise field_invalid("role", "MODEL_ROLE_CHAMPION is the role that can be assigned")
