"""The learner process: reads the log in LSN order, teaches the fleet, publishes arrays, and never learns a row twice.

``Learner`` is the process without a process: handed a log, a folder and a clock for pacing, it is stepped by whoever
owns it. Everything it learns follows from the log alone, so that a restart (newest snapshot, then replay) comes to the
same state to the bit. Two files come out: the arrays that workers read, often and without waiting for the disk, and
snapshots, durable, every few seconds.

Cost sketch of one outcome at 24 features: 2 × 6 µs to read two records, 8 µs to join them, 30 µs to learn. Publishing
100 changed actions takes some 9 ms, at most a tenth of the time; a snapshot of 100,000 open decisions some 60 ms, at
most a twentieth.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
import lmdb
import structlog
from google.protobuf.message import DecodeError

from server import telemetry
from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.control import ControlPage, Heart, leave
from server.files import Files
from server.profiles.erased import ERASED_HEAD
from server.registry.blobs import Blobs
from server.storage.generations import is_made
from server.storage.lmdb_log import LmdbLog
from server.storage.log import Log
from server.storage.record import CHAIN_START, CorruptRecordError, Record
from training.export import Exporter, UnsafeArraysError
from training.fleet import ARITHMETIC, Fleet
from training.meanings import Meanings
from training.monitor import Monitor
from training.ownership import EpochFencedError, FolderOwnedError, Ownership
from training.personal import Personal
from training.rewards import Counts, Lesson, Rewards, Terms, terms_of
from training.snapshots import FORMAT_VERSION, AtStep, Snapshots
from training.warm import warm
from tsugi.log.v1.learner_pb2 import LearnerArrays, LearnerSnapshot
from tsugi.log.v1.record_pb2 import CatalogChange, LearnerReset, RecordKind
from tsugi.v1 import catalog_pb2

ARRAYS_FILE: Final = "arrays.binpb"
BATCH_RECORDS_MAX: Final = 512
IDLE_WAIT_S: Final = 0.005
PUBLISH_SHARE_MAX: Final = 0.1  # of the time
SNAPSHOT_SHARE_MAX: Final = 0.05

EXIT_DATA = 65
EXIT_OWNED = 75

_CATALOG_CHANGE: Final = RecordKind.RECORD_KIND_CATALOG_CHANGE  # looked up once: it is compared with every record's
_OUTCOME: Final = RecordKind.RECORD_KIND_OUTCOME
_LEARNER_RESET: Final = RecordKind.RECORD_KIND_LEARNER_RESET
_CATALOGS_KEPT = 8


class _Pace:
    """When something is due again: at an interval, and never more than a share of the time.

    Args:
        interval_s: from one beginning to the next, at least.
        share_max: of the time that may go to it.
        clock: seconds, when it is due.
        meter: seconds, how long it takes. Of work that never waits the time on the processor: where others take turns
            with us, it would otherwise come the more rarely the less we get.
    """

    def __init__(
        self, interval_s: float, share_max: float, clock: Callable[[], float], meter: Callable[[], float]
    ) -> None:
        self._interval_s = interval_s
        self._share_max = share_max
        self._clock = clock
        self._meter = meter
        self._due_s = self._begun_s = clock()
        self._metered_s = meter()

    def is_due(self) -> bool:
        return self._clock() >= self._due_s

    def begin(self) -> None:
        self._begun_s, self._metered_s = self._clock(), self._meter()

    def done(self) -> None:
        took_s = self._meter() - self._metered_s
        self._due_s = self._begun_s + max(self._interval_s, took_s / self._share_max)


class _Course:
    """What was learned from the beginning of a log up to some record, as goals were defined, and nothing else.

    Args:
        log: read only.
        find_terms: see Rewards.
        erased_lsn: the newest LogErased record in the log; what it made tombstones is not met on this course.
        meanings: what goals mean, as of the last change that altered one; it may stand ahead of what is learned.
    """

    def __init__(self, log: Log, find_terms: Callable[[bytes], Terms], erased_lsn: int, meanings: Meanings) -> None:
        self.fleet = Fleet()
        self.personal = Personal()
        self.erased_lsn = erased_lsn
        self.terms_lsn, self.terms, self._goals = meanings.lsn, meanings.messages, meanings.goals
        self.rewards = Rewards(log, find_terms, self._learn, goals=self._goals)
        self.learned_lsn, self.learned_time_us, self.learned_chain = 0, 0, CHAIN_START
        # What the arrays published so far include, and LSN and log time of the oldest outcome after it: for workers to
        # tell the learning lag by, never learned from.
        self.told_lsn, self.new_outcome = 0, (0, 0)
        self._log = log
        self._find_terms = find_terms

    def take(self, snapshot: LearnerSnapshot) -> None:
        """Go on from a snapshot."""
        self.learned_lsn = snapshot.learned_lsn
        self.learned_time_us = snapshot.learned_time_us
        self.learned_chain = snapshot.learned_chain
        self.erased_lsn = snapshot.erased_lsn
        self.fleet.load(snapshot)
        self.personal.load(snapshot.personal)
        self.rewards.load(snapshot.open_rewards, snapshot.parked_lsns, snapshot.counts, snapshot.flows)
        self.rewards.load_influences(snapshot.influences)

    def is_of(self, erased_lsn: int, terms_lsn: int) -> bool:
        """Say whether it left out who was erased, and learned as goals are defined."""
        return self.erased_lsn == erased_lsn and self.terms_lsn == terms_lsn

    def lower_what_is_in_excess(self, arrays: LearnerArrays) -> None:
        """Take out of what is published that silences of open windows are still to come, see Pending."""
        for block in arrays.goals:
            slope = block.calibration_slope if block.HasField("calibration_slope") else 1.0
            block.calibration_intercept -= slope * self._excess(block.goal)

    def _excess(self, name: str) -> float:
        goal, pending = self.fleet.goals.get(name), self.rewards.pending.get(name)
        return pending.excess(goal.base_rate, goal.n_failures) if pending is not None and goal is not None else 0.0

    def _learn(self, lesson: Lesson) -> int:
        if (goal := self.fleet.goals.get(lesson.goal.name)) is not None:
            goal.excess = self._excess(lesson.goal.name)
        self.personal.learn(lesson)
        return self.fleet.learn(lesson)

    def step(self) -> int:
        """Learn from the next records, at most BATCH_RECORDS_MAX, and return how many there were."""
        records = self._log.read(self.learned_lsn + 1, BATCH_RECORDS_MAX)
        for record in records:
            self._apply(record)
        return len(records)

    def _apply(self, record: Record) -> None:
        self.fleet.lsn, self.fleet.time_us = record.lsn, record.time_us
        self.rewards.apply(record)
        if record.kind == _CATALOG_CHANGE and not record.is_tombstone:
            # Met before the first row is learned, so that workers know at once how wide the prior of a goal is.
            terms = self._find_terms(CatalogChange.FromString(record.payload).catalog_sha256)
            goals = (self._goals.get(name, goal) for name, goal in terms.goals.items())
            self.fleet.meet(goals, terms.names, terms.actions)
        elif record.kind == _OUTCOME and not self.new_outcome[0] and record.lsn > self.told_lsn:
            self.new_outcome = (record.lsn, record.time_us)
        elif record.kind == _LEARNER_RESET and not record.is_tombstone:
            self._reset(record)
        self.learned_lsn, self.learned_time_us, self.learned_chain = record.lsn, record.time_us, record.chain

    def _reset(self, record: Record) -> None:
        try:
            reset = LearnerReset.FromString(record.payload)
        except DecodeError as error:
            self.rewards.set_aside(error)
        else:
            self.fleet.reset(reset.goals, reset.role)


class Learner:
    """The one consumer of a log that learns.

    When people were erased from the log, it learns everything anew beside what it serves, without them, and puts the
    new in the place of the old when it has caught up: what is published never stands still meanwhile. So it does when a
    catalog alters what a goal means: every decision ever made for it then counts as the goal says now.

    Args:
        log: read only.
        folder: where snapshots, epoch and arrays lie; made when absent, owned until close().
        load_catalog: gives the compiled catalog of a sha256.
        clock: monotonic seconds, for pacing only.
        load_message: gives the same catalog as a message, cheaper; absent: what it was compiled from.
        publish_interval_s: at most this often are arrays published.
        snapshot_interval_s: at most this often is the state made durable.
        at_step: see write_durably.

    Attributes:
        epoch: of this process.
        published_lsn: the last record that the published arrays include; -1 before this process published any.
        saved_lsn: the last record that a durable snapshot includes.
        n_faults: times that publishing or saving failed; what was there before stands.

    Raises:
        FolderOwnedError: another process learns there.
        CorruptRecordError: the log is damaged.

    Once step() has raised, the state may be half a record ahead: nothing but close() may be called.
    """

    def __init__(
        self,
        log: Log,
        folder: Path,
        load_catalog: Callable[[bytes], Catalog],
        clock: Callable[[], float],
        *,
        load_message: Callable[[bytes], catalog_pb2.Catalog] | None = None,
        publish_interval_s: float = 0.1,
        snapshot_interval_s: float = 2.0,
        at_step: AtStep = lambda _step: None,
    ) -> None:
        self._log = log
        self._folder = folder
        self._find_terms: Callable[[bytes], Terms] = functools.lru_cache(_CATALOGS_KEPT)(
            lambda sha256: terms_of(load_catalog(sha256))
        )
        self._meanings = Meanings(log, load_message or (lambda sha256: load_catalog(sha256).message))
        self._anew: _Course | None = None  # the course that will take its place
        self._rid_lsn = 0  # the last LogErased record that no file here was learned before
        self.published_lsn, self.n_faults = -1, 0
        self._publishing = _Pace(publish_interval_s, PUBLISH_SHARE_MAX, clock, time.thread_time)
        self._saving = _Pace(snapshot_interval_s, SNAPSHOT_SHARE_MAX, clock, clock)
        self._ownership = Ownership(folder)
        try:
            self._snapshots = Snapshots(folder, log, ARITHMETIC, at_step)
            self._course, snapshot_epoch = self._load_newest()
            self._course.told_lsn = self._learned_before()
            self._ownership.begin_epoch(above=snapshot_epoch)
        except BaseException:
            self._ownership.close()
            raise
        self.epoch = self._ownership.epoch
        self.saved_lsn = self.learned_lsn
        self._exporter = Exporter(self._course.fleet)

    @property
    def learned_lsn(self) -> int:
        """The last record learned from."""
        return self._course.learned_lsn

    @property
    def learned_time_us(self) -> int:
        """Its log time."""
        return self._course.learned_time_us

    @property
    def erased_lsn(self) -> int:
        """The last LogErased record that nothing was learned before."""
        return self._course.erased_lsn

    @property
    def behind(self) -> tuple[int, int]:
        """How many records of the log are not learned from yet, and their span in log time, microseconds."""
        tail = self._log.tail()
        return tail.lsn - self.learned_lsn, tail.time_us - self.learned_time_us if self.learned_lsn else 0

    @property
    def stopped(self) -> list[str]:
        """Goals whose outcomes are held to have stopped arriving: their silence is not learned."""
        return self._course.rewards.stopped

    @property
    def fleet(self) -> Fleet:
        """All learners, to be looked at; another one after an erasure."""
        return self._course.fleet

    @property
    def counts(self) -> Counts:
        """What became of everything, since the log began."""
        return self._course.rewards.counts

    @property
    def n_open(self) -> int:
        """Number of decisions that outcomes may still reach."""
        return self._course.rewards.n_open

    def step(self) -> int:
        """Learn from the next records, at most BATCH_RECORDS_MAX, and return how many there were.

        Raises:
            CorruptRecordError: the log is damaged; nothing after it can be learned from.
            TooManyQuarantinedError: too many records were set aside.
            BlobError: a catalog named in the log cannot be had.
        """
        n_records = self._course.step()
        erased_lsn = self._log.head(ERASED_HEAD)
        self._meanings.renew()
        if not self._course.is_of(erased_lsn, self._meanings.lsn):
            if self._anew is None or not self._anew.is_of(erased_lsn, self._meanings.lsn):
                self._anew = self._begin()
            n_records += self._learn_anew(self._anew)
        return n_records

    def publish_if_due(self) -> bool:
        """Publish arrays when something is new and the time has come; say whether it did.

        Raises:
            EpochFencedError: a newer learner process has taken over.
        """
        if not self._is_publishable() or not self._publishing.is_due():
            return False
        return self._guarded("publish", self._publish, self._publishing)

    def snapshot_if_due(self) -> bool:
        """Make the state durable when something is new and the time has come; say whether it did.

        Raises:
            EpochFencedError: a newer learner process has taken over.
        """
        if self.saved_lsn == self.learned_lsn or not self._saving.is_due():
            return False
        return self._guarded("snapshot", self._save, self._saving)

    def flush(self) -> None:
        """Publish and save what is new, due or not.

        Raises:
            EpochFencedError: a newer learner process has taken over.
        """
        if self._is_publishable():
            self._guarded("publish", self._publish, self._publishing)
        if self.saved_lsn != self.learned_lsn:
            self._guarded("snapshot", self._save, self._saving)

    def close(self) -> None:
        """Let another process in; what was not flushed is learned again by it."""
        self._ownership.close()

    def state(self) -> LearnerSnapshot:
        """Return the whole state. Cost: 10 µs an action and 0.3 µs an open decision."""
        course = self._course
        open_rewards, parked_lsns, counts, flows = course.rewards.save()
        snapshot = LearnerSnapshot(
            format_version=FORMAT_VERSION,
            epoch=self.epoch,
            log_id=self._log.log_id,
            learned_lsn=course.learned_lsn,
            learned_time_us=course.learned_time_us,
            learned_chain=course.learned_chain,
            arithmetic=ARITHMETIC,
            open_rewards=open_rewards,
            parked_lsns=parked_lsns,
            counts=counts,
            erased_lsn=course.erased_lsn,
            terms_lsn=course.terms_lsn,
            terms=[course.terms[name] for name in sorted(course.terms)],
            flows=flows,
            influences=course.rewards.save_influences(),
            personal=course.personal.save(),
        )
        course.fleet.save(snapshot)
        return snapshot

    def _begin(self) -> _Course:
        return _Course(self._log, self._find_terms, self._log.head(ERASED_HEAD), self._meanings)

    def _learn_anew(self, anew: _Course) -> int:
        """Go on with the course that is as it ought to be; once it has caught up it is the one."""
        n_records = anew.step()
        if anew.learned_lsn < self._course.learned_lsn:
            return n_records
        anew.told_lsn, anew.new_outcome = self._course.told_lsn, self._course.new_outcome
        self._course, self._anew = anew, None
        self._exporter = Exporter(anew.fleet)
        self.published_lsn = self.saved_lsn = -1
        self._guarded("snapshot", self._save, self._saving)
        return n_records

    def _load_newest(self) -> tuple[_Course, int]:
        """Return the course that goes on from the newest snapshot and its epoch, or a new one and 0."""
        snapshot = self._snapshots.newest()
        if snapshot is None:
            self._meanings.renew()
            return self._begin(), 0
        self._meanings.begin(snapshot.terms_lsn, snapshot.terms)
        course = self._begin()
        course.take(snapshot)
        self._rid_lsn = snapshot.erased_lsn
        return course, snapshot.epoch

    def _learned_before(self) -> int:
        """Return what the arrays of an earlier process include, which may be more than its snapshot does."""
        try:
            data = (self._folder / ARRAYS_FILE).read_bytes()
            digest, body = data[:32], data[32:]
            arrays = LearnerArrays.FromString(body if hashlib.sha256(body).digest() == digest else b"")
        except (OSError, DecodeError):
            return 0
        return arrays.learned_lsn if arrays.learned_lsn <= self._log.tail().lsn else 0  # more is of another log

    def _is_publishable(self) -> bool:
        """Say whether there is something new; a restart takes nothing back that workers have learned already."""
        return self.published_lsn != self.learned_lsn >= self._course.told_lsn

    def _guarded(self, what: str, action: Callable[[], None], pace: _Pace) -> bool:
        """Run a write that may fail without harm: the file before it stands, and the next is tried in time."""
        pace.begin()
        try:
            self._ownership.verify()
            self._exporter.renew()
            action()
        except (OSError, UnsafeArraysError) as error:
            self.n_faults += 1
            structlog.get_logger().error(
                "learner_write_failed", what=what, why=str(error), learned_lsn=self.learned_lsn
            )
            return False
        finally:
            pace.done()
        return True

    def _publish(self) -> None:
        arrays = self._exporter.message(self.epoch, self.learned_lsn, self.learned_time_us)
        self._course.personal.export(arrays)
        self._course.lower_what_is_in_excess(arrays)
        arrays.erased_lsn = self._rid_lsn  # a receipt is signed on its word
        arrays.new_outcome_lsn, arrays.new_outcome_time_us = self._course.new_outcome
        data = arrays.SerializeToString(deterministic=True)
        path = self._folder / ARRAYS_FILE
        unfinished = path.with_name(f"{ARRAYS_FILE}.unfinished")
        unfinished.write_bytes(hashlib.sha256(data).digest() + data)
        unfinished.replace(path)
        self.published_lsn = self.learned_lsn
        self._course.told_lsn, self._course.new_outcome = self.learned_lsn, (0, 0)

    def _save(self) -> None:
        self._snapshots.save(self.state())
        self.saved_lsn = self.learned_lsn
        if self._rid_lsn != self.erased_lsn:  # what was saved before rests on who was erased
            self._snapshots.forget_before(self.learned_lsn)
            self._rid_lsn, self.published_lsn = self.erased_lsn, -1


def run(learner: Learner, stop: threading.Event, turned: Callable[[], None]) -> None:
    """Learn until told to stop, then publish and save; wait briefly whenever there is nothing new.

    Args:
        learner: closed when this returns or raises.
        stop: set by somebody else.
        turned: called at each turn of the loop, which may wait for the disk.
    """
    monitor = Monitor()
    try:
        while not stop.is_set():
            turned()
            n_records = learner.step()
            if learner.publish_if_due():
                monitor.look(learner.fleet, learner.stopped, learner.counts.capped)
            _tell(learner)
            learner.snapshot_if_due()
            if n_records == 0:
                stop.wait(IDLE_WAIT_S)
        learner.flush()
    finally:
        learner.close()


def _tell(learner: Learner) -> None:
    n_records, span_us = learner.behind
    telemetry.LEARNED_LSN.set(learner.published_lsn)
    telemetry.LEARNER_BEHIND_RECORDS.set(n_records)
    telemetry.LEARNER_BEHIND_SECONDS.set(span_us / 1e6)


def open_log(folder: Path, map_bytes: int, stop: threading.Event) -> LmdbLog | None:
    """Wait until a worker has made the log, and open it for reading; None when told to stop before."""
    while not stop.is_set():
        if is_made(folder):
            try:
                return LmdbLog(folder, map_bytes, writable=False)
            except (lmdb.Error, TypeError):
                pass  # its maker is still between two transactions: tables without their content
        stop.wait(0.05)
    return None


def load_catalog(blobs: Blobs, sha256: bytes) -> Catalog:
    """Load and compile one stored catalog revision.

    Raises:
        BlobError: absent or altered.
    """
    data = blobs.get(sha256)
    return compile_catalog(catalog_pb2.Catalog.FromString(data), data)


def load_message(blobs: Blobs, sha256: bytes) -> catalog_pb2.Catalog:
    """Load one stored catalog revision.

    Raises:
        BlobError: absent or altered.
    """
    return catalog_pb2.Catalog.FromString(blobs.get(sha256))


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set; to be called from the main thread before others start."""
    stop = threading.Event()
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    # A handler would run in the main thread, perhaps inside the event's own lock, and wait for it for ever.
    def wait() -> None:
        signal.sigwait(signals)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    return stop


@click.command("learn")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The data directory.")
@click.option("--log-map-bytes", default=256 * 1024**3, show_default=True, help="The most the log may ever hold.")
@click.option("--publish-ms", default=100, show_default=True, help="At most this often are arrays published.")
@click.option("--snapshot-ms", default=2_000, show_default=True, help="At most this often is the state saved.")
@click.option("--slot", type=int, help="Where on the control page to beat; without it, alone, nowhere.")
def learn_command(data: Path, log_map_bytes: int, publish_ms: int, snapshot_ms: int, slot: int | None) -> None:
    """Learn from the log until SIGTERM or SIGINT; exit 0 then, 75 when another learner owns the folder."""
    # What piles up here is open decisions, and no garbage among them: the learner makes no reference cycles. Looking
    # through a million of them for some would stop learning for a second every now and then.
    gc.disable()
    stop = stop_on_signals()
    telemetry.configure_logs("learner")
    files = Files.below(data)
    log = open_log(files.log, log_map_bytes, stop)
    if log is None:
        return
    warm()
    try:
        learner = Learner(
            log,
            files.learner,
            functools.partial(load_catalog, Blobs(files.registry)),
            time.monotonic,
            load_message=functools.partial(load_message, Blobs(files.registry)),
            publish_interval_s=publish_ms / 1000,
            snapshot_interval_s=snapshot_ms / 1000,
        )
        with Heart(functools.partial(ControlPage(files.control).beat, slot) if slot is not None else _no_beat) as heart:
            click.echo("ready")  # the supervisor waits for a line from each role
            run(learner, stop, heart.turn)
    except (FolderOwnedError, EpochFencedError) as error:
        structlog.get_logger().error("learner_stopped", why=str(error))
        sys.exit(EXIT_OWNED)
    except CorruptRecordError as error:
        structlog.get_logger().error("learner_stopped", why=str(error))
        sys.exit(EXIT_DATA)
    finally:
        log.close()
    leave(0)


def _no_beat() -> None:
    """Beat nowhere."""
