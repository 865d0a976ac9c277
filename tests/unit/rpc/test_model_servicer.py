"""ListLearners tells what the worker holds, page by page; ResetLearner and the kill switch are one record each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from server.decisioning.configuration import Configuration
from server.decisioning.live import Live, make_live
from server.decisioning.models import align, no_champion
from server.errors import TsugiError
from server.registry.blobs import Blobs
from server.rpc.methods import Context
from server.rpc.model_servicer import RESET_GOALS_MAX, ModelServicer
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tests.support import catalogs
from tests.support.committing import ScriptedCommitter
from tests.support.deciding import TOKEN_KEY
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import CatalogChange, RecordKind
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.learner_pb2 import GoalLearners, Learner
from tsugi.v1.model_pb2 import LearnerRole, ModelRole
from tsugi.v1.model_service_pb2 import (
    AssignModelRoleRequest,
    AssignModelRoleResponse,
    ListLearnersRequest,
    ListLearnersResponse,
    ListModelRevisionsRequest,
    ResetLearnerRequest,
    ResetLearnerResponse,
    RollbackModelRequest,
    RollbackModelResponse,
)

CONTEXT = cast(Context, None)
LEARNER = ModelRole.MODEL_ROLE_LEARNER
GOALS = [GoalLearners(goal=name, rows=i, learners=[Learner(family="baseline")]) for i, name in enumerate("abcde")]
PUBLISHED = LearnerArrays(epoch=3, learned_lsn=77, learned_time_us=5_000_000, learners=GOALS)


class Desk:
    """A servicer whose worker serves a catalog with the goal click, and holds what a learner told."""

    def __init__(self, folder: Path, published: LearnerArrays | None = PUBLISHED) -> None:
        catalog = catalogs.compiled()
        self.log = MemoryLog()
        change = CatalogChange(catalog_sha256=catalog.sha256).SerializeToString()
        self.log.append([Draft(RecordKind.RECORD_KIND_CATALOG_CHANGE, change, head="catalog")], 0)
        self.live: Live | None = make_live(
            catalog, align(catalog, no_champion(catalog), None), 1, 0, "tests", published=published
        )
        self.servicer = ModelServicer(
            Configuration(
                log=self.log,
                blobs=Blobs(folder / "registry"),
                committer=ScriptedCommitter(self.log, lambda: 0),
                token_key=TOKEN_KEY,
                current=lambda: self.live,
                is_served=lambda _lsn: True,
            )
        )

    async def list(self, **request: Any) -> ListLearnersResponse:
        return await self.servicer.list_learners(ListLearnersRequest(**request), b"", CONTEXT)

    async def reset(self, **request: Any) -> ResetLearnerResponse:
        return await self.servicer.reset_learner(ResetLearnerRequest(**request), b"", CONTEXT)

    async def assign(self, **request: Any) -> AssignModelRoleResponse:
        return await self.servicer.assign_model_role(AssignModelRoleRequest(role=LEARNER, **request), b"", CONTEXT)

    async def roll_back(self) -> RollbackModelResponse:
        return await self.servicer.rollback_model(RollbackModelRequest(role=LEARNER), b"", CONTEXT)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def refused(call: Any) -> tuple[str, str]:
    """Return reason and field of a refusal."""
    with pytest.raises(TsugiError) as refusal:
        await call
    return ErrorReason.Name(refusal.value.reason).removeprefix("ERROR_REASON_"), refusal.value.metadata.get("field", "")


async def test_list_tells_what_the_learner_told_last_and_how_old_it_is(desk: Desk) -> None:
    told = await desk.list()
    assert list(told.goals) == GOALS
    assert (told.learned_lsn, told.epoch, told.learned_time.ToSeconds()) == (77, 3, 5)
    assert (told.in_force, told.learner_etag, told.reset_etag, told.next_page_token) == ("fleet", "0", "0", "")


async def test_pages_are_whole_together_and_each_goal_stands_in_one(desk: Desk) -> None:
    token, goals, sizes = "", [], []
    while True:
        page = await desk.list(page_size=2, page_token=token)
        goals += [goal.goal for goal in page.goals]
        sizes.append(len(page.goals))
        if not (token := page.next_page_token):
            break
    assert (goals, sizes) == (list("abcde"), [2, 2, 1])
    for token in ("0", "00", "5", "99", "18446744073709551615", "x", "-1"):
        assert await refused(desk.list(page_token=token)) == ("FIELD_INVALID", "page_token")


async def test_one_goal_is_told_alone(desk: Desk) -> None:
    assert [goal.rows for goal in (await desk.list(goal="c")).goals] == [2]
    assert not (await desk.list(goal="click")).goals, "it is in the catalog, and nothing was learned of it yet"
    assert await refused(desk.list(goal="wealth")) == ("RESOURCE_NOT_FOUND", "goal")


@pytest.mark.parametrize("has_catalog", [True, False])
async def test_before_anything_was_told_the_list_is_empty(tmp_path: Path, has_catalog: bool) -> None:
    desk = Desk(tmp_path, published=None)
    desk.live = desk.live if has_catalog else None
    told = await desk.list()
    assert not told.goals
    assert (told.learned_lsn, told.epoch, told.HasField("learned_time")) == (0, 0, False)


async def test_reset_takes_goals_of_the_catalog_and_of_those_before_it(desk: Desk) -> None:
    reset = await desk.reset(role=LearnerRole.LEARNER_ROLE_SERVING, goals=["click", "c"], request_id="r")
    assert (reset.lsn, reset.duplicate) == (2, False)
    assert (await desk.list()).reset_etag == reset.etag
    again = await desk.reset(role=LearnerRole.LEARNER_ROLE_SERVING, goals=["c", "click"], request_id="r")
    assert (again.lsn, again.etag, again.duplicate) == (2, reset.etag, True)
    checked = await desk.reset(role=LearnerRole.LEARNER_ROLE_ALL, validate_only=True)
    assert (checked.lsn, checked.etag) == (0, reset.etag)


async def test_reset_that_is_wrong_is_refused_with_its_field(desk: Desk) -> None:
    every = LearnerRole.LEARNER_ROLE_ALL
    for role in (0, LearnerRole.LEARNER_ROLE_BASELINE, LearnerRole.LEARNER_ROLE_POSTERIOR, 99):
        assert await refused(desk.reset(role=role)) == ("FIELD_INVALID", "role")
    assert await refused(desk.reset(role=every, goals=["a", "click", "a"])) == ("FIELD_INVALID", "goals[2]")
    assert await refused(desk.reset(role=every, goals=["a", "wealth"])) == ("RESOURCE_NOT_FOUND", "goals[1]")
    many = [str(i) for i in range(RESET_GOALS_MAX + 1)]
    assert await refused(desk.reset(role=every, goals=many)) == ("LIMIT_EXCEEDED", "goals")
    assert await refused(desk.reset(role=every, request_id="x" * 129)) == ("FIELD_INVALID", "request_id")
    assert desk.log.tail().lsn == 1


async def test_reset_is_checked_as_it_would_be_done_and_its_id_stands_for_one(desk: Desk) -> None:
    serving, every = LearnerRole.LEARNER_ROLE_SERVING, LearnerRole.LEARNER_ROLE_ALL
    await desk.reset(role=serving, request_id="r")
    for changes in ({"role": every}, {"goals": ["a"]}, {"role": every, "validate_only": True}):
        given = {"role": serving, "request_id": "r"} | changes
        assert await refused(desk.reset(**given)) == ("IDEMPOTENCY_KEY_REUSED", "")
    for only in (False, True):
        assert await refused(desk.reset(role=every, etag="1", validate_only=only)) == ("ETAG_MISMATCH", "")
        assert await refused(desk.reset(role=every, goals=["\0"], validate_only=only)) == (
            "RESOURCE_NOT_FOUND", "goals[0]",
        )  # fmt: skip
        assert await refused(desk.reset(role=every, goals=["x" * 100_000], validate_only=only)) == (
            "RESOURCE_NOT_FOUND", "goals[0]",
        )  # fmt: skip
    assert desk.log.tail().lsn == 2


async def test_learner_role_is_given_to_the_baseline_or_the_fleet_by_name(desk: Desk) -> None:
    for revision in ("", "none", "0" * 64):
        assert await refused(desk.assign(revision=revision)) == ("FIELD_INVALID", "revision")
    changed = await desk.assign(revision="baseline")
    told = await desk.list()
    assert (told.in_force, told.learner_etag) == ("baseline", changed.etag)
    revisions = await desk.servicer.list_model_revisions(ListModelRevisionsRequest(), b"", CONTEXT)
    assert revisions.learner_etag == changed.etag
    assert (await desk.roll_back()).revision == "fleet"
    assert (await desk.list()).in_force == "fleet"
    await desk.assign(revision="baseline")
    await desk.assign(revision="fleet")
    assert (await desk.roll_back()).revision == "baseline"
