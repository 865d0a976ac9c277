"""Decisions of the past: read from the log by their id, and explained under the catalog they were made with."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from server.catalog.catalog import Catalog
from server.decisioning.explanation import explain
from server.decisioning.live import load_catalog, model_uses
from server.errors import TsugiError, not_found
from server.profiles.erased import Erased
from server.registry.blobs import Blobs
from server.storage.applied import read_applied
from server.storage.log import Log
from server.storage.store import Store
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_pb2 import ChoiceReason, Degradation, Slot
from tsugi.v1.decision_service_pb2 import DecideRequest, DecisionView, GetDecisionRequest, GetDecisionResponse

CATALOGS_KEPT: Final = 4  # former revisions, compiled


class DecisionReader:
    """Answers for one worker.

    Args:
        log: the records.
        store: for how far erasures are projected.
        token_key: verifies decision ids.
        blobs: former catalogs.
        catalog: gives the catalog in force.
    """

    def __init__(
        self, *, log: Log, store: Store, token_key: TokenKey, blobs: Blobs, catalog: Callable[[], Catalog | None]
    ) -> None:
        self._log = log
        self._store = store
        self._erased = Erased(log)
        self._token_key = token_key
        self._blobs = blobs
        self._catalog = catalog
        self._former: OrderedDict[bytes, Catalog] = OrderedDict()

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
            reply.explanation.CopyFrom(await asyncio.to_thread(explain, decision, catalog))
        return reply

    async def _catalog_of(self, sha256: bytes) -> Catalog:
        """Return the catalog of a revision, compiled. Cost: that of compiling, where it is not at hand."""
        in_force = self._catalog()
        if in_force is not None and in_force.sha256 == sha256:
            return in_force
        found = self._former.pop(sha256, None)
        if found is None:
            found = await asyncio.to_thread(load_catalog, self._blobs, sha256)
        self._former[sha256] = found
        if len(self._former) > CATALOGS_KEPT:
            self._former.popitem(last=False)
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
