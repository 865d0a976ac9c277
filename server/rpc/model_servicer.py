"""ModelService: validate, call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from itertools import islice
from typing import Final

from server.decisioning.configuration import Configuration
from server.decisioning.history import THE_BASELINE, Entry
from server.decisioning.live import (
    BASELINE,
    CHALLENGER_HEAD,
    CHAMPION_HEAD,
    FLEET,
    LEARNER_HEAD,
    MODEL_HEAD,
    RESET_HEAD,
    ROLE_HEADS,
)
from server.errors import field_invalid, not_found
from server.profiles.repository import timestamp
from server.registry.bundle import BUNDLE_BYTES_MAX
from server.rpc import validate
from server.rpc.catalog_servicer import validate_wish
from server.rpc.methods import Context
from server.rpc.upload import Upload, Uploads
from tsugi.log.v1.record_pb2 import ModelPushed
from tsugi.v1.model_pb2 import LearnerRole, ModelRevision, ModelRole
from tsugi.v1.model_service_pb2 import (
    AssignModelRoleRequest,
    AssignModelRoleResponse,
    ListLearnersRequest,
    ListLearnersResponse,
    ListModelRevisionsRequest,
    ListModelRevisionsResponse,
    PushModelRequest,
    PushModelResponse,
    ResetLearnerRequest,
    ResetLearnerResponse,
    RollbackModelRequest,
    RollbackModelResponse,
)

RESET_GOALS_MAX: Final = 64

_RESETTABLE: Final = (
    LearnerRole.LEARNER_ROLE_SERVING,
    LearnerRole.LEARNER_ROLE_CHALLENGER,
    LearnerRole.LEARNER_ROLE_ALL,
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
            learner_etag=str(self._configuration.etag(LEARNER_HEAD)),
        )
        if entries and entries[-1].change.previous_lsn:
            response.next_page_token = str(entries[-1].change.previous_lsn)
        return response

    async def assign_model_role(
        self, request: AssignModelRoleRequest, _raw: bytes, _context: Context
    ) -> AssignModelRoleResponse:
        """See ModelService.AssignModelRole."""
        _assignable(request.role)
        sha256 = _held(request.role, request.revision)
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
            revision=_holder_name(request.role, changed.sha256),
            etag=str(changed.etag),
            lsn=changed.lsn,
            duplicate=changed.is_duplicate,
        )

    async def list_learners(self, request: ListLearnersRequest, _raw: bytes, _context: Context) -> ListLearnersResponse:
        """See ModelService.ListLearners."""
        size, first = validate.page(request.page_size, request.page_token)
        configuration = self._configuration
        told = configuration.told()
        goals = list(told.learners)
        if request.goal:
            goals = [each for each in goals if each.goal == request.goal]
            if not goals and request.goal not in configuration.goals():
                raise not_found("goal", request.goal, "goal")
        if first is not None and not 0 < first < len(goals):
            raise field_invalid("page_token", "pass it exactly as received")
        last = (first or 0) + size
        response = ListLearnersResponse(
            goals=goals[first or 0 : last],
            next_page_token=str(last) if last < len(goals) else "",
            learned_lsn=told.learned_lsn,
            epoch=told.epoch,
            in_force=_holder_name(ModelRole.MODEL_ROLE_LEARNER, configuration.holders()[ModelRole.MODEL_ROLE_LEARNER]),
            learner_etag=str(configuration.etag(LEARNER_HEAD)),
            reset_etag=str(configuration.etag(RESET_HEAD)),
        )
        if told.learned_lsn:
            response.learned_time.FromMicroseconds(told.learned_time_us)
        return response

    async def reset_learner(self, request: ResetLearnerRequest, _raw: bytes, _context: Context) -> ResetLearnerResponse:
        """See ModelService.ResetLearner."""
        if request.role not in _RESETTABLE:
            raise field_invalid("role", f"{', '.join(map(LearnerRole.Name, _RESETTABLE))} are what can be reset")
        validate.at_most("goals", len(request.goals), RESET_GOALS_MAX)
        for i, goal in enumerate(request.goals):
            if goal in request.goals[:i]:
                raise field_invalid(f"goals[{i}]", "a goal may be named once")
        wish = validate_wish(request.request_id, request.etag, validate_only=request.validate_only)
        changed = await self._configuration.reset_learners(request.role, request.goals, wish)
        return ResetLearnerResponse(etag=str(changed.etag), lsn=changed.lsn, duplicate=changed.is_duplicate)


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


def _held(role: int, revision: str) -> bytes:
    """Return who is to have a role, as a history names it."""
    if role == ModelRole.MODEL_ROLE_LEARNER:
        if revision not in {FLEET, BASELINE}:
            raise field_invalid("revision", f'"{FLEET}" or "{BASELINE}" has the role learner')
        return THE_BASELINE if revision == BASELINE else b""
    return validate.revision(revision) if revision else b""


def _holder_name(role: int, sha256: bytes) -> str:
    """Return who has a role, as a caller names it."""
    if role == ModelRole.MODEL_ROLE_LEARNER:
        return BASELINE if sha256 == THE_BASELINE else FLEET
    return sha256.hex()


def _assignable(role: int) -> None:
    if role not in ROLE_HEADS:
        raise field_invalid("role", f"{', '.join(map(ModelRole.Name, ROLE_HEADS))} are the roles that can be assigned")
