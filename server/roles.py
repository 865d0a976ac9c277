"""The two roles this package has: the worker, which answers calls, and the projector, which keeps the state.

Each is put together here from its parts and runs until it is told to stop. A worker's heart beats from the loop that
does the work, so that one that hangs falls silent; the projector's looks at whether its loop turns.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from typing import Any, Final, NamedTuple

import structlog
import uvloop

from server import telemetry
from server.catalog.catalog import Catalog
from server.config import Settings
from server.control import BEAT_S, ControlPage, Heart
from server.decisioning import live, service
from server.decisioning.configuration import Configuration
from server.decisioning.contributions import Corrections
from server.decisioning.recorded import DecisionReader
from server.decisioning.service import DecisionService
from server.decisioning.triggers import Triggers
from server.decisioning.warm import warm, warm_profiles
from server.files import Files
from server.outcomes import projector
from server.outcomes.eraser import Eraser
from server.outcomes.ingest import Ingest, require_catalog
from server.outcomes.statements import Statements
from server.profiles.reader import ProfileReader
from server.registry.blobs import Blobs
from server.rpc.catalog_servicer import CatalogServicer
from server.rpc.decision_servicer import DecisionServicer
from server.rpc.methods import handlers
from server.rpc.model_servicer import ModelServicer
from server.rpc.outcome_servicer import OutcomeServicer
from server.rpc.profile_servicer import ProfileServicer
from server.rpc.server import Listening, Server
from server.storage.committer import GroupCommitter
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.tokens import TokenKey

EXIT_STORAGE: Final = 74
HOUSEKEEPING_S: Final = 5.0
READY_LINE: Final = "ready\n"

_PR_SET_PDEATHSIG: Final = 1


class Place(NamedTuple):
    """Where a role stands among the others."""

    slot: int  # of the control page
    port: int  # reserved by the supervisor
    build: str


def wall_us() -> int:
    """Return the wall clock in microseconds since the epoch."""
    return time.time_ns() // 1_000


def die_with_parent() -> None:
    """Have this process told to stop when the one that started it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def run_worker(settings: Settings, place: Place) -> int:
    """Answer calls until SIGTERM; returns the exit code."""
    warm()
    return uvloop.run(_Worker(settings, place).run())


def run_projector(settings: Settings, place: Place) -> int:
    """Keep the state until SIGTERM; returns the exit code."""
    warm_profiles()
    files = Files.below(settings.data.dir)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    control = ControlPage(files.control)
    log = LmdbLog(files.log, settings.data.log_map_bytes)
    store = LmdbStore(files.state, settings.data.state_map_bytes)
    load_catalog = functools.partial(live.load_catalog, Blobs(files.registry))
    keeper = projector.Projector(log, store, load_catalog)
    store_turn = threading.Lock()

    def on_log_failure() -> None:
        control.latch()  # before anything else: nobody may acknowledge anything now
        stop.set()

    eraser = Eraser(
        log=log,
        store=store,
        store_turn=store_turn,
        receipt_secret=files.receipt_key.read_bytes(),
        wall_us=wall_us,
        learned_anew=functools.partial(_learned_anew, files, is_learning=settings.learner.enabled),
        on_log_failure=on_log_failure,
    )
    erasing = threading.Thread(target=eraser.run, args=(stop,), name="eraser")
    with Heart(functools.partial(control.beat, place.slot)) as heart:
        erasing.start()
        tell_ready()
        projector.run(keeper, stop, heart.turn, store_turn)
        erasing.join()
    store.close()
    log.close()
    return EXIT_STORAGE if control.is_latched else 0


def _learned_anew(files: Files, erased_lsn: int, *, is_learning: bool) -> bool:
    """Say whether what was learned is free of what was erased; where nobody learns, it is thrown away."""
    if not is_learning:
        for path in (*files.learner.glob("*.snapshot*"), files.arrays):
            path.unlink(missing_ok=True)
        return True
    published = live.read_arrays(files.arrays)
    return published is not None and published[0].erased_lsn >= erased_lsn


def tell_ready() -> None:
    """Tell the supervisor, by a line on standard output, that this role does its work."""
    sys.stdout.write(READY_LINE)
    sys.stdout.flush()


class _Worker:
    """One worker's parts, in the order they start; they stop in the reverse order."""

    def __init__(self, settings: Settings, place: Place) -> None:
        files = Files.below(settings.data.dir)
        self._settings = settings
        self._place = place
        self._parent_pid = os.getppid()
        self._control = ControlPage(files.control)
        self._log = LmdbLog(files.log, settings.data.log_map_bytes)
        self._store = LmdbStore(files.state, settings.data.state_map_bytes)
        blobs = Blobs(files.registry)
        token_key = TokenKey(files.read_secret())
        self._failed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._committer = GroupCommitter(
            self._log,
            wall_us=wall_us,
            on_failure=self._on_log_failure,
            is_latched=lambda: self._control.is_latched,
            on_commit=_count_commit,
            wait_ms=settings.commit.wait_ms_max,
            queue_records_max=settings.commit.queue_records_max,
        )
        self._decisions = DecisionService(
            log=self._log,
            store=self._store,
            committer=self._committer,
            token_key=token_key,
            clock_us=wall_us,
            settings=service.Settings(
                settings.decide.queue_requests_max,
                settings.decide.deadline_ms_default,
                # Never fewer than there are: a worker is pinned, and does not see how many its supervisor started.
                n_workers=settings.serve.workers or os.cpu_count() or 1,
            ),
        )
        self._corrections = Corrections()
        self._decision_reader = DecisionReader(
            log=self._log,
            store=self._store,
            token_key=token_key,
            blobs=blobs,
            live=lambda: self._decisions.live,
            corrections=self._corrections,
        )
        self._triggers = Triggers(
            log=self._log, store=self._store, decisions=self._decisions, token_key=token_key, clock_us=wall_us
        )
        self._watcher = live.Watcher(self._log, blobs, files.arrays, place.build, self._on_swap)
        self._ingest = Ingest(
            log=self._log,
            store=self._store,
            committer=self._committer,
            token_key=token_key,
            catalog=self._catalog,
            clock_us=wall_us,
        )
        self._statements = Statements(
            log=self._log,
            store=self._store,
            committer=self._committer,
            token_key=token_key,
            catalog=self._catalog,
        )
        self._reader = ProfileReader(
            log=self._log,
            store=self._store,
            catalog=lambda: require_catalog(self._catalog()),
            clock_us=wall_us,
        )
        self._configuration = Configuration(
            log=self._log,
            blobs=blobs,
            committer=self._committer,
            token_key=token_key,
            current=lambda: self._decisions.live,
            is_served=self._control.is_served,
        )

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        self._committer.start(self._loop)
        self._control.serve(self._place.slot, 0)
        in_force = self._watcher.start()
        if in_force is not None:
            self._take(in_force)
        server = Server(self._handlers(), self._listening())
        await server.start()
        beating = asyncio.create_task(self._beat())
        keeping = asyncio.create_task(self._keep_house())
        tell_ready()
        await _first(self._stopping, self._failed)
        if self._failed.is_set():
            structlog.get_logger().error("log_failed")
            return EXIT_STORAGE
        self._triggers.end()
        await server.drain(lambda: os.getppid() != self._parent_pid)
        keeping.cancel()
        # In threads: the last commit may take as long as the disk does, and a worker that waits for it is not dead.
        await asyncio.to_thread(self._watcher.stop)
        await asyncio.to_thread(self._committer.close)
        await self._loop.shutdown_default_executor()  # somebody may still be reading for a caller that has gone
        beating.cancel()
        self._store.close()
        self._log.close()
        return EXIT_STORAGE if self._failed.is_set() else 0

    def _catalog(self) -> Catalog | None:
        in_force = self._decisions.live
        return in_force.catalog if in_force is not None else None

    def _on_swap(self, new: live.Live) -> None:
        """Hand a new set to the event loop; called on the watcher's thread, or before the loop takes calls."""
        self._loop.call_soon_threadsafe(self._take, new)

    def _take(self, new: live.Live) -> None:
        self._decisions.take(new)
        self._corrections.keep(new.catalog, new.models)
        self._control.serve(self._place.slot, new.lsn)

    def _on_log_failure(self) -> None:
        """Raise the latch before anything else can be acknowledged, here or elsewhere; on the committer's thread."""
        self._control.latch()
        self._loop.call_soon_threadsafe(self._failed.set)

    def _handlers(self) -> dict[str, dict[str, Any]]:
        decisions = DecisionServicer(self._decisions, self._decision_reader, self._triggers, self._ingest, wall_us)
        outcomes = OutcomeServicer(self._ingest, wall_us)
        profiles = ProfileServicer(self._ingest, self._statements, self._reader, wall_us)
        catalogs = CatalogServicer(self._configuration)
        models = ModelServicer(self._configuration)
        return handlers(
            unary={
                "Decide": decisions.decide,
                "BatchDecide": decisions.batch_decide,
                "GetDecision": decisions.get_decision,
                "ReportOutcome": outcomes.report_outcome,
                "BatchReportOutcomes": outcomes.batch_report_outcomes,
                "IngestRecords": profiles.ingest_records,
                "GetProfile": profiles.get_profile,
                "ResolveIdentity": profiles.resolve_identity,
                "LinkIdentities": profiles.link_identities,
                "SplitProfile": profiles.split_profile,
                "ListMatchReviews": profiles.list_match_reviews,
                "ExportProfile": profiles.export_profile,
                "EraseProfile": profiles.erase_profile,
                "GetErasure": profiles.get_erasure,
                "AuditSources": profiles.audit_sources,
                "CountPeople": profiles.count_people,
                "ListProfiles": profiles.list_profiles,
                "GetCatalog": catalogs.get_catalog,
                "ListCatalogRevisions": catalogs.list_catalog_revisions,
                "RollbackCatalog": catalogs.rollback_catalog,
                "ListModelRevisions": models.list_model_revisions,
                "AssignModelRole": models.assign_model_role,
                "RollbackModel": models.rollback_model,
                "ListLearners": models.list_learners,
                "ResetLearner": models.reset_learner,
            },
            uploads={"PushCatalog": catalogs.push_catalog, "PushModel": models.push_model},
            streams={
                "StreamDecide": decisions.stream_decide,
                "StreamReportOutcomes": outcomes.stream_report_outcomes,
                "StreamIngestRecords": profiles.stream_ingest_records,
            },
            subscriptions={"SubscribeTriggers": decisions.subscribe_triggers},
        )

    def _listening(self) -> Listening:
        serve = self._settings.serve
        return Listening(
            address=serve.address,
            port=self._place.port,
            listeners=serve.listeners,
            connection_age_ms_max=serve.connection_age_ms_max,
            connection_age_grace_ms=serve.connection_age_grace_ms,
            reflection=serve.reflection,
        )

    async def _beat(self) -> None:
        while True:
            self._control.beat(self._place.slot)
            telemetry.COMMIT_QUEUE.set(self._committer.queue_records)
            telemetry.DECIDE_QUEUE.set(self._decisions.queue_requests)
            await asyncio.sleep(BEAT_S)

    async def _keep_house(self) -> None:
        while True:
            self._log.check_readers()
            self._store.check_readers()
            telemetry.LOG_MAP_USED.set(self._log.used_share())
            self._decisions.choices.tell()
            await asyncio.sleep(HOUSEKEEPING_S)


def _count_commit(n_records: int, seconds: float) -> None:
    telemetry.COMMIT_RECORDS.inc(n_records)
    telemetry.COMMIT_SECONDS.observe(seconds)


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
