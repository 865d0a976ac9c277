"""ModelService: validate, call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from itertools import islice

from server.decisioning.configuration import Configuration
from server.decisioning.history import Entry
from server.decisioning.live import CHALLENGER_HEAD, CHAMPION_HEAD, MODEL_HEAD, ROLE_HEADS
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
            _revision(entry, self._configuration.holders())
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
        holders = self._configuration.holders()
        response = ListModelRevisionsResponse(
            model_revisions=(_revision(entry, holders) for entry in entries),
            champion_etag=str(self._configuration.etag(CHAMPION_HEAD)),
            challenger_etag=str(self._configuration.etag(CHALLENGER_HEAD)),
        )
        if entries and entries[-1].change.previous_lsn:
            response.next_page_token = str(entries[-1].change.previous_lsn)
        return response

    async def assign_model_role(
        self, request: AssignModelRoleRequest, _raw: bytes, _context: Context
    ) -> AssignModelRoleResponse:
        """See ModelService.AssignModelRole."""
        _assignable(request.role)
        sha256 = validate.revision(request.revision) if request.revision else b""
        wish = validate_wish(request.request_id, request.etag, validate_only=request.validate_only)
        changed = await self._configuration.assign_role(request.role, sha256, wish)
        return AssignModelRoleResponse(etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate)

    async def rollback_model(
        self, request: RollbackModelRequest, _raw: bytes, _context: Context
    ) -> RollbackModelResponse:
        """See ModelService.RollbackModel."""
        _assignable(request.role)
        wish = validate_wish(request.request_id, request.etag, validate_only=request.validate_only)
        changed = await self._configuration.rollback_role(request.role, wish)
        return RollbackModelResponse(
            revision=changed.sha256.hex(), etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate
        )


def _revision(entry: Entry, holders: Mapping[int, bytes]) -> ModelRevision:
    pushed = entry.change
    assert isinstance(pushed, ModelPushed), "this history holds nothing else"
    return ModelRevision(
        revision=pushed.bundle_sha256.hex(),
        label=pushed.label,
        goal=pushed.goal,
        push_time=timestamp(entry.record.time_us),
        lsn=entry.record.lsn,
        size_bytes=pushed.size_bytes,
        roles=[ModelRole.Name(role) for role, sha256 in holders.items() if sha256 == pushed.bundle_sha256],
    )


def _assignable(role: int) -> None:
    if role not in ROLE_HEADS:
        raise field_invalid(
            "role", f"{' and '.join(map(ModelRole.Name, ROLE_HEADS))} are the roles that can be assigned"
        )
