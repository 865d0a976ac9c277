"""What is in force in this worker: one catalog, its models and one set of learner arrays, swapped as one reference.

A watcher thread looks at the log's heads and the learner's published file some fifty times a second, loads what is new
away from the event loop, and hands the loop a finished set. A decision takes the reference once, so it can never mix
two revisions; when something new cannot be loaded, the old set serves on and the log says why. Only a challenger is
done without: it is there for a trial.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import structlog
from google.protobuf.message import DecodeError

from server import telemetry
from server.catalog.allotting import with_allotments
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
CHALLENGER_HEAD = "role/challenger"
LEARNER_HEAD = "role/learner"
RESET_HEAD = "learner/reset"
BUNDLE_ROLE_HEADS: Final[dict[int, str]] = {
    ModelRole.MODEL_ROLE_CHAMPION: CHAMPION_HEAD,
    ModelRole.MODEL_ROLE_CHALLENGER: CHALLENGER_HEAD,
}
ROLE_HEADS: Final[dict[int, str]] = BUNDLE_ROLE_HEADS | {ModelRole.MODEL_ROLE_LEARNER: LEARNER_HEAD}
FLEET, BASELINE = "fleet", "baseline"  # who may have the role learner; the fleet does until told otherwise
POLL_S = 0.02

_ARRAYS_DIGEST_BYTES = 32


class Heads(NamedTuple):
    """The newest change of each history that says what serves; 0 before the first."""

    catalog_lsn: int
    champion_lsn: int
    challenger_lsn: int
    learner_lsn: int = 0


@dataclass(frozen=True, slots=True)
class Served:
    """What decisions are scored with, and the parts of replies and records that it determines, ready serialised."""

    models: Models  # models.champion is the prior, whichever role it has
    reply_bytes: bytes  # catalog_revision and model_revisions of a DecideResponse
    provenance_bytes: bytes  # provenance of a DecisionRecord, tag and length included


@dataclass(frozen=True, slots=True)
class Live:
    """One consistent set."""

    catalog: Catalog
    champion: Served
    challenger: Served | None  # the same learner arrays over another prior; None: there is none that can be used
    heads: Heads
    is_baseline: bool = False  # the learners' arrays are left out, and nothing is explored
    published: LearnerArrays | None = None  # what the learner told last, used or not

    @property
    def lsn(self) -> int:
        """The newest configuration record this set includes."""
        return max(self.heads)

    @property
    def models(self) -> Models:
        """The champion's."""
        return self.champion.models

    @property
    def reply_bytes(self) -> bytes:
        """The champion's."""
        return self.champion.reply_bytes

    @property
    def provenance_bytes(self) -> bytes:
        """The champion's."""
        return self.champion.provenance_bytes


def load_catalog(blobs: Blobs, sha256: bytes) -> Catalog:
    """Load and compile one stored catalog revision.

    Raises:
        BlobError: absent or altered.
    """
    data = blobs.get(sha256)
    return compile_catalog(CatalogMessage.FromString(data), data)


def load_champion(blobs: Blobs, sha256: bytes, catalog: Catalog) -> Champion:
    """Load one stored bundle, for whichever role, and resolve it against a catalog.

    Raises:
        BlobError: absent or altered.
        TsugiError: its features do not fit the catalog.
        ScoringError: onnxruntime refuses it.
    """
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
        self._failed: set[Heads] = set()
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
        heads = self._heads()
        is_known = heads in self._failed or (self._live is not None and heads == self._live.heads)
        # Twice the same: they stood so together, and a change older than the newest of them is not passed over.
        if heads.catalog_lsn and not is_known and heads == self._heads():
            self._swap_configuration(heads)
        if self._live is not None and (stamp := self._stamp()) not in {None, self._arrays_stamp}:
            self._arrays_stamp = stamp
            self._swap_arrays(self._live)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.poll()
            except Exception:  # a tailing loop: whatever it is, the old set must go on serving
                structlog.get_logger().exception("watcher_failed")

    def _heads(self) -> Heads:
        return Heads(*map(self._log.head, (CATALOG_HEAD, CHAMPION_HEAD, CHALLENGER_HEAD, LEARNER_HEAD)))

    def _swap_configuration(self, heads: Heads) -> None:
        is_baseline = self._is_baseline_at(heads.learner_lsn)
        try:
            catalog = self._catalog_at(heads.catalog_lsn)
            champion = self._champion_at(heads.champion_lsn, catalog)
        except (BlobError, TsugiError, ScoringError) as error:
            self._failed.add(heads)
            structlog.get_logger().error("swap_refused", **heads._asdict(), why=str(error))
            if self._live is not None and is_baseline != self._live.is_baseline:
                self._switch(self._live, is_baseline=is_baseline)
            return
        challenger = self._challenger_at(heads.challenger_lsn, catalog)
        self._take(catalog, self._models(catalog, champion, is_baseline=is_baseline), challenger, heads, is_baseline)
        telemetry.SWAPS.labels("configuration").inc()

    def _switch(self, live: Live, *, is_baseline: bool) -> None:
        """Turn learners off or on in the set that serves on: a kill switch must work when something else is broken.

        Its heads stay as they are, for it does not include every change up to the newest.
        """
        models = self._models(live.catalog, live.models.champion, is_baseline=is_baseline)
        self._take(live.catalog, models, _challenger_of(live), live.heads, is_baseline)

    def _models(self, catalog: Catalog, champion: Champion, *, is_baseline: bool) -> Models:
        if not is_baseline:
            try:
                return align(catalog, champion, self._arrays, self._arrays_sha256)
            except (ValueError, IndexError) as error:  # a catalog must not wait for arrays that do not fit it
                structlog.get_logger().error("arrays_refused", why=str(error))
        # What was kept of former arrays is dropped after an erasure, in use or not.
        erased_lsn = self._arrays.erased_lsn if self._arrays is not None else 0
        return replace(align(catalog, champion, None), erased_lsn=erased_lsn)

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
        if live.is_baseline:
            models = self._models(live.catalog, live.models.champion, is_baseline=True)
        self._take(live.catalog, models, _challenger_of(live), live.heads, live.is_baseline)
        telemetry.SWAPS.labels("arrays").inc()

    def _catalog_at(self, lsn: int) -> Catalog:
        if self._live is not None and self._live.heads.catalog_lsn == lsn:
            return self._live.catalog
        record = self._log.get(lsn)
        assert record is not None, "a head names a record"
        change = CatalogChange.FromString(record.payload)
        catalog = self._live.catalog if self._live is not None else None
        if catalog is None or catalog.sha256 != change.catalog_sha256:
            catalog = load_catalog(self._blobs, change.catalog_sha256)
        return with_allotments(catalog, change.allotments)

    def _champion_at(self, lsn: int, catalog: Catalog) -> Champion:
        sha256 = self._holder_at(lsn)
        if not sha256:
            return no_champion(catalog)
        try:
            return self._model(sha256, catalog)
        except TsugiError as error:
            # A push refuses this, but two writes may cross: base rates are safe, and every reply says what is missing.
            structlog.get_logger().error("champion_does_not_fit_catalog", why=error.message)
            return no_champion(catalog, is_unavailable=True)

    def _challenger_at(self, lsn: int, catalog: Catalog) -> Champion | None:
        sha256 = self._holder_at(lsn)
        if not sha256:
            return None
        try:
            return self._model(sha256, catalog)
        except (BlobError, TsugiError, ScoringError) as error:
            # What is only on trial must not hold up a catalog, a champion or the start of a worker.
            structlog.get_logger().error("challenger_unavailable", challenger_lsn=lsn, why=str(error))
            return None

    def _holder_at(self, lsn: int) -> bytes:
        """Return the sha256 of who has a role by its newest change; empty: nobody."""
        if not lsn:
            return b""
        record = self._log.get(lsn)
        assert record is not None, "a head names a record"
        return ModelRoleChange.FromString(record.payload).bundle_sha256

    def _is_baseline_at(self, lsn: int) -> bool:
        """Say whether the baseline has the role learner by its newest change."""
        record = self._log.get(lsn) if lsn else None
        return record is not None and ModelRoleChange.FromString(record.payload).baseline

    def _model(self, sha256: bytes, catalog: Catalog) -> Champion:
        """Load a bundle, unless it serves already, in this role or the other; raises as load_champion does."""
        live = self._live
        for served in (live.champion, live.challenger) if live is not None and live.catalog is catalog else ():
            if served is not None and served.models.champion.sha256 == sha256:
                return served.models.champion
        return load_champion(self._blobs, sha256, catalog)

    def _take(
        self, catalog: Catalog, models: Models, challenger: Champion | None, heads: Heads, is_baseline: bool
    ) -> None:
        self._live = make_live(
            catalog,
            models,
            heads.catalog_lsn,
            heads.champion_lsn,
            self._build,
            challenger=challenger,
            challenger_lsn=heads.challenger_lsn,
            learner_lsn=heads.learner_lsn,
            is_baseline=is_baseline,
            published=self._arrays,
        )
        self._on_swap(self._live)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self._arrays_path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino


def make_live(
    catalog: Catalog,
    models: Models,
    catalog_lsn: int,
    champion_lsn: int,
    build: str,
    *,
    challenger: Champion | None = None,
    challenger_lsn: int = 0,
    learner_lsn: int = 0,
    is_baseline: bool = False,
    published: LearnerArrays | None = None,
) -> Live:
    """Put one set together and serialise what replies and records say of it.

    Args:
        catalog: the revision in force.
        models: champion and learner arrays, aligned with it.
        catalog_lsn: the change that put the catalog in force.
        champion_lsn: the change that gave the champion its role; 0 for none.
        build: name and version of the program.
        challenger: made for the same catalog; it shares the arrays of models.
        challenger_lsn: the change that gave it its role; 0 for none.
        learner_lsn: the change that gave the fleet or the baseline the role learner; 0 for none.
        is_baseline: whether the baseline has it; models are then made without arrays.
        published: what the learner told last.
    """
    return Live(
        catalog=catalog,
        champion=_served(catalog, models, build, is_baseline=is_baseline),
        challenger=(
            _served(catalog, replace(models, champion=challenger), build, is_challenger=True, is_baseline=is_baseline)
            if challenger is not None
            else None
        ),
        heads=Heads(catalog_lsn, champion_lsn, challenger_lsn, learner_lsn),
        is_baseline=is_baseline,
        published=published,
    )


def _challenger_of(live: Live) -> Champion | None:
    return live.challenger.models.champion if live.challenger is not None else None


def _served(
    catalog: Catalog, models: Models, build: str, *, is_challenger: bool = False, is_baseline: bool = False
) -> Served:
    sha256 = models.champion.sha256
    provenance = Provenance(
        catalog_sha256=catalog.sha256,
        champion_sha256=b"" if is_challenger else sha256,
        challenger_sha256=sha256 if is_challenger else b"",
        learner_epoch=models.learner_epoch,
        learned_lsn=models.learned_lsn,
        arrays_sha256=models.arrays_sha256,
        build=build,
        baseline=is_baseline,
    )
    reply = DecideResponse(catalog_revision=catalog.revision, model_revisions=model_uses(provenance))
    # Concatenated messages merge, so a part serialised once can be appended to any record.
    return Served(
        models=models,
        reply_bytes=reply.SerializeToString(),
        provenance_bytes=DecisionRecord(provenance=provenance).SerializeToString(),
    )


def model_uses(provenance: Provenance) -> list[ModelRevisionUse]:
    """Return the models and learners that a decision was made with, as replies name them."""
    uses = [
        ModelRevisionUse(role=role, revision=sha256.hex())
        for role, sha256 in (
            (ModelRole.MODEL_ROLE_CHAMPION, provenance.champion_sha256),
            (ModelRole.MODEL_ROLE_CHALLENGER, provenance.challenger_sha256),
        )
        if sha256
    ]
    if provenance.baseline:
        uses.append(ModelRevisionUse(role=ModelRole.MODEL_ROLE_LEARNER, revision=BASELINE))
    elif provenance.learner_epoch:
        uses.append(
            ModelRevisionUse(
                role=ModelRole.MODEL_ROLE_LEARNER,
                revision=str(provenance.learner_epoch),
                learned_lsn=provenance.learned_lsn,
            )
        )
    return uses
