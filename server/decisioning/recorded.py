"""Decisions of the past: read from the log by their id, and explained by the catalog and models they were made with."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import structlog

from server.catalog.catalog import Catalog
from server.decisioning.contributions import Corrections, contribute
from server.decisioning.decide import OtherSurvivorsError
from server.decisioning.explanation import explain
from server.decisioning.live import Live, load_catalog, load_champion, model_uses
from server.decisioning.models import Champion
from server.decisioning.recall import NotItsCatalogError
from server.errors import TsugiError, not_found
from server.profiles.erased import Erased
from server.registry.blobs import BlobError, Blobs
from server.registry.scorers import ScoringError
from server.storage.applied import read_applied
from server.storage.log import Log
from server.storage.store import Store
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import DecisionRecord, Provenance, RecordKind
from tsugi.v1.decision_pb2 import ChoiceReason, Degradation, Slot
from tsugi.v1.decision_service_pb2 import DecideRequest, DecisionView, GetDecisionRequest, GetDecisionResponse

CATALOGS_KEPT: Final = 4  # former revisions, compiled
CHAMPIONS_KEPT: Final = 4  # former models, loaded

_Key = TypeVar("_Key")
_Kept = TypeVar("_Kept")


class DecisionReader:
    """Answers for one worker.

    Args:
        log: the records.
        store: for how far erasures are projected.
        token_key: verifies decision ids.
        blobs: former catalogs and models.
        live: gives what is in force.
        corrections: what the learners added lately.
    """

    def __init__(
        self,
        *,
        log: Log,
        store: Store,
        token_key: TokenKey,
        blobs: Blobs,
        live: Callable[[], Live | None],
        corrections: Corrections,
    ) -> None:
        self._log = log
        self._store = store
        self._erased = Erased(log)
        self._token_key = token_key
        self._blobs = blobs
        self._live = live
        self._corrections = corrections
        self._catalogs: OrderedDict[bytes, Catalog] = OrderedDict()
        self._champions: OrderedDict[tuple[bytes, bytes], Champion] = OrderedDict()

    async def get(self, request: GetDecisionRequest) -> GetDecisionResponse:
        """Return one recorded decision.

        Raises:
            TsugiError: DECISION_ID_INVALID; RESOURCE_NOT_FOUND: it was not recorded (yet), or is erased.
        """
        key = self._token_key.verify(request.decision_id).decision_key
        entry = self._log.find(key)
        record = self._log.get(entry.lsn) if entry is not None else None
        if record is None or record.is_tombstone or record.kind != RecordKind.RECORD_KIND_DECISION:
            raise _unknown()
        decision = DecisionRecord.FromString(record.payload)
        with self._store.read() as snapshot:
            erased = self._erased.since(read_applied(snapshot).lsn)
        if not erased.isdisjoint({decision.profile_key, *record.subjects}):
            raise _unknown()
        reply = _told(decision, record.lsn)
        if request.view == DecisionView.DECISION_VIEW_EXPLAINED:
            catalog = await self._catalog_of(decision.provenance.catalog_sha256)
            champion = await self._champion_of(decision.provenance, catalog)
            correction = self._corrections.of(decision.provenance)
            contributing = partial(contribute, decision, catalog, champion, correction)
            try:
                reply.explanation.CopyFrom(await asyncio.to_thread(explain, decision, catalog, contributing))
            except (NotItsCatalogError, OtherSurvivorsError) as error:  # of another build, whose gates let others pass
                structlog.get_logger().warning("not_explained", lsn=record.lsn, why=str(error))
                reply.explanation.sentence = f"It cannot be told again why {reply.build} decided so: {error}."
        return reply

    async def _catalog_of(self, sha256: bytes) -> Catalog:
        """Return the catalog of a revision, compiled. Cost: that of compiling, where it is not at hand."""
        live = self._live()
        if live is not None and live.catalog.sha256 == sha256:
            return live.catalog
        return await _kept(self._catalogs, sha256, CATALOGS_KEPT, partial(load_catalog, self._blobs, sha256))

    async def _champion_of(self, made_with: Provenance, catalog: Catalog) -> Champion | None:
        """Return what a decision's prior came from, in whichever role; None: from nothing that can be had.

        Cost: tens of milliseconds on another thread, where it is not at hand.
        """
        sha256 = made_with.champion_sha256 or made_with.challenger_sha256
        if not sha256:
            return None
        live = self._live()
        for served in (live.champion, live.challenger) if live is not None and live.catalog is catalog else ():
            if served is not None and served.models.champion.sha256 == sha256:
                return served.models.champion
        load = partial(load_champion, self._blobs, sha256, catalog)
        try:
            return await _kept(self._champions, (sha256, catalog.sha256), CHAMPIONS_KEPT, load)
        except (BlobError, TsugiError, ScoringError) as error:
            structlog.get_logger().warning("explained_without_its_model", revision=sha256.hex(), why=str(error))
            return None


async def _kept(cache: OrderedDict[_Key, _Kept], key: _Key, n_max: int, load: Callable[[], _Kept]) -> _Kept:
    """Return what is kept under a key, loaded on another thread where it is not; the longest unused goes."""
    found = cache.pop(key, None)
    if found is None:
        found = await asyncio.to_thread(load)
    cache[key] = found
    if len(cache) > n_max:
        cache.popitem(last=False)
    return found


def _unknown() -> TsugiError:
    return not_found("decision", "by this id", "decision_id")


def _told(decision: DecisionRecord, lsn: int) -> GetDecisionResponse:
    """Tell what was recorded."""
    asked = DecideRequest.FromString(decision.request)
    made_with = decision.provenance
    reply = GetDecisionResponse(
        request=asked,
        profile_id=decision.profile_key.hex(),
        lsn=lsn,
        degradations=[Degradation.Name(number) for number in decision.degradations],
        catalog_revision=made_with.catalog_sha256.hex(),
        model_revisions=model_uses(made_with),
        build=made_with.build,
        random_control=decision.random_control,
        assignments=decision.assignments,
        holdouts=decision.holdouts,
        slots=[
            Slot(
                placement=asked.placements[slot.placement_index].placement,
                position=slot.position,
                action=slot.action,
                selection_probability=slot.selection_probability,
                reasons=[ChoiceReason.Name(slot.choice_reason)],
            )
            for slot in decision.slots
        ],
    )
    reply.decide_time.FromMicroseconds(decision.now_us)
    return reply
