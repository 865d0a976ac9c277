"""What is in force in this worker: one catalog, one champion, one set of learner arrays, swapped as one reference.

A watcher thread looks at the log's heads and the learner's published file some fifty times a second, loads what is new
away from the event loop, and hands the loop a finished set. A decision takes the reference once, so it can never mix
two revisions; when something new cannot be loaded, the old set serves on and the log says why.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from server import telemetry
from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.decisioning.bundle_columns import bundle_columns
from server.decisioning.models import Champion, Models, align, make_champion, no_champion
from server.errors import TsugiError
from server.registry.blobs import BlobError, Blobs
from server.registry.bundle import parse
from server.registry.scorers import OnnxScorer, ScoringError
from server.storage.log import Log
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import CatalogChange, DecisionRecord, ModelRoleChange, Provenance
from tsugi.v1.catalog_pb2 import Catalog as CatalogMessage
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRevisionUse, ModelRole

CATALOG_HEAD = "catalog"
MODEL_HEAD = "model"
CHAMPION_HEAD = "role/champion"
POLL_S = 0.02

_ARRAYS_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Live:
    """One consistent set, with the parts of replies and records that it determines, ready serialised."""

    catalog: Catalog
    models: Models
    catalog_lsn: int
    champion_lsn: int
    reply_bytes: bytes  # catalog_revision and model_revisions of a DecideResponse
    provenance_bytes: bytes  # provenance of a DecisionRecord, tag and length included

    @property
    def lsn(self) -> int:
        """The newest configuration record this set includes."""
        return max(self.catalog_lsn, self.champion_lsn)


def load_catalog(blobs: Blobs, sha256: bytes) -> Catalog:
    """Load and compile one stored catalog revision.

    Raises:
        BlobError: absent or altered.
    """
    data = blobs.get(sha256)
    return compile_catalog(CatalogMessage.FromString(data), data)


def load_champion(blobs: Blobs, sha256: bytes, catalog: Catalog) -> Champion:
    """Load one stored bundle and resolve it against a catalog; empty sha256: no champion.

    Raises:
        BlobError: absent or altered.
        TsugiError: its features do not fit the catalog.
        ScoringError: onnxruntime refuses it.
    """
    if not sha256:
        return no_champion(catalog)
    bundle = parse(blobs.get(sha256))
    return make_champion(
        catalog, sha256, bundle.manifest.goal, bundle_columns(bundle.manifest, catalog), OnnxScorer(bundle)
    )


def read_arrays(path: Path) -> tuple[LearnerArrays, bytes] | None:
    """Read the learner's published arrays with their sha256; None when there are none or they are damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, body = data[:_ARRAYS_DIGEST_BYTES], data[_ARRAYS_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        return LearnerArrays.FromString(body), digest
    except DecodeError:
        return None


class Watcher:
    """Keeps one worker's live set current.

    Args:
        log: read only here.
        blobs: catalogs and bundles by sha256.
        arrays_path: where the learner publishes.
        build: name and version of the program, for the record.
        on_swap: called on the watcher's thread with each new set; hands it to the event loop.
    """

    def __init__(self, log: Log, blobs: Blobs, arrays_path: Path, build: str, on_swap: Callable[[Live], None]) -> None:
        self._log = log
        self._blobs = blobs
        self._arrays_path = arrays_path
        self._build = build
        self._on_swap = on_swap
        self._live: Live | None = None
        self._arrays: LearnerArrays | None = None  # the last published ones that could be used
        self._arrays_sha256 = b""
        self._arrays_stamp: tuple[int, int] | None = None
        self._failed: set[tuple[int, int]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> Live | None:
        """Load what is in force now, start watching, and return the set; None before the first catalog."""
        self.poll()
        self._thread.start()
        return self._live

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def poll(self) -> None:
        """Look once, and take into use whatever is new."""
        # The champion first: what is pushed after it was read fits it, for PushCatalog sees to that.
        champion_lsn = self._log.head(CHAMPION_HEAD)
        heads = (self._log.head(CATALOG_HEAD), champion_lsn)
        known = (self._live.catalog_lsn, self._live.champion_lsn) if self._live is not None else (0, 0)
        if heads != known and heads[0] and heads not in self._failed:
            self._swap_configuration(*heads)
        if self._live is not None and (stamp := self._stamp()) not in {None, self._arrays_stamp}:
            self._arrays_stamp = stamp
            self._swap_arrays(self._live)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.poll()
            except Exception:  # a tailing loop: whatever it is, the old set must go on serving
                structlog.get_logger().exception("watcher_failed")

    def _swap_configuration(self, catalog_lsn: int, champion_lsn: int) -> None:
        try:
            catalog = self._catalog_at(catalog_lsn)
            champion = self._champion_at(champion_lsn, catalog)
        except (BlobError, TsugiError, ScoringError) as error:
            self._failed.add((catalog_lsn, champion_lsn))
            structlog.get_logger().error(
                "swap_refused", catalog_lsn=catalog_lsn, champion_lsn=champion_lsn, why=str(error)
            )
            return
        models = align(catalog, champion, self._arrays, self._arrays_sha256)
        self._take(catalog, models, catalog_lsn, champion_lsn)
        telemetry.SWAPS.labels("configuration").inc()

    def _swap_arrays(self, live: Live) -> None:
        published = read_arrays(self._arrays_path)
        if published is None:
            structlog.get_logger().error("arrays_refused", why="they do not have the sha256 they state")
            return
        try:
            models = align(live.catalog, live.models.champion, *published)
        except (ValueError, IndexError) as error:  # blocks of another size than their names say
            structlog.get_logger().error("arrays_refused", why=str(error))
            return
        self._arrays, self._arrays_sha256 = published
        self._take(live.catalog, models, live.catalog_lsn, live.champion_lsn)
        telemetry.SWAPS.labels("arrays").inc()

    def _catalog_at(self, lsn: int) -> Catalog:
        if self._live is not None and self._live.catalog_lsn == lsn:
            return self._live.catalog
        record = self._log.get(lsn)
        assert record is not None, "a head names a record"
        sha256 = CatalogChange.FromString(record.payload).catalog_sha256
        if self._live is not None and self._live.catalog.sha256 == sha256:
            return self._live.catalog
        return load_catalog(self._blobs, sha256)

    def _champion_at(self, lsn: int, catalog: Catalog) -> Champion:
        if not lsn:
            return no_champion(catalog)
        record = self._log.get(lsn)
        assert record is not None, "a head names a record"
        sha256 = ModelRoleChange.FromString(record.payload).bundle_sha256
        live = self._live
        if live is not None and live.catalog is catalog and live.models.champion.sha256 == sha256:
            return live.models.champion
        try:
            return load_champion(self._blobs, sha256, catalog)
        except TsugiError as error:
            # A push refuses this, but two writes may cross: base rates are safe, and every reply says what is missing.
            structlog.get_logger().error("champion_does_not_fit_catalog", why=error.message)
            return no_champion(catalog, is_unavailable=True)

    def _take(self, catalog: Catalog, models: Models, catalog_lsn: int, champion_lsn: int) -> None:
        self._live = make_live(catalog, models, catalog_lsn, champion_lsn, self._build)
        self._on_swap(self._live)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self._arrays_path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino


def make_live(catalog: Catalog, models: Models, catalog_lsn: int, champion_lsn: int, build: str) -> Live:
    """Put one set together and serialise what replies and records say of it."""
    provenance = Provenance(
        catalog_sha256=catalog.sha256,
        champion_sha256=models.champion.sha256,
        learner_epoch=models.learner_epoch,
        learned_lsn=models.learned_lsn,
        arrays_sha256=models.arrays_sha256,
        build=build,
    )
    reply = DecideResponse(catalog_revision=catalog.revision, model_revisions=model_uses(provenance))
    # Concatenated messages merge, so a part serialised once can be appended to any record.
    return Live(
        catalog=catalog,
        models=models,
        catalog_lsn=catalog_lsn,
        champion_lsn=champion_lsn,
        reply_bytes=reply.SerializeToString(),
        provenance_bytes=DecisionRecord(provenance=provenance).SerializeToString(),
    )


def model_uses(provenance: Provenance) -> list[ModelRevisionUse]:
    """Return the models and learners that a decision was made with, as replies name them."""
    uses = []
    if provenance.champion_sha256:
        uses.append(ModelRevisionUse(role=ModelRole.MODEL_ROLE_CHAMPION, revision=provenance.champion_sha256.hex()))
    if provenance.learner_epoch:
        uses.append(
            ModelRevisionUse(
                role=ModelRole.MODEL_ROLE_LEARNER,
                revision=str(provenance.learner_epoch),
                learned_lsn=provenance.learned_lsn,
            )
        )
    return uses
