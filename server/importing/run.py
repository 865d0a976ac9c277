"""The import of a file from beginning to end: read, convert, send, and write down what was answered.

Batches are answered for in the order of the file: the journal moves over a batch when every row of it is on the
server's disk or in the rejects file. The two files are brought to disk at most once a second.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Final, NamedTuple

from server.errors import Violation
from server.importing import journal as journals
from server.importing.building import Builder
from server.importing.checking import check_columns
from server.importing.csv_rows import CsvRows
from server.importing.faults import Fault, ImportRunning, ImportStopped, refused
from server.importing.journal import Journal, Tally
from server.importing.json_rows import JsonRows
from server.importing.mapping import Form, Mapping, meant
from server.importing.parquet_rows import ParquetRows
from server.importing.rejects import Rejects, rejects_path
from server.importing.rows import Place, Row, Rows
from server.importing.sending import Destination, Sender
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.profile_service_pb2 import IngestRecordsResponse, SourceRecord

BATCH_RECORDS_MAX: Final = 500
BATCH_BYTES_MAX: Final = 3 * 1024 * 1024
BATCHES_AT_ONCE: Final = 4
JOURNAL_S_MIN: Final = 1.0  # between two journals

_SUFFIXES: Final = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")


class Plan(NamedTuple):
    """What is imported as what."""

    mapping: Mapping  # checked against the catalog
    catalog: Catalog
    source: str


class Opened(NamedTuple):
    """A file whose header fits the mapping."""

    path: Path
    rows: Rows
    journal_path: Path


class Outcome(NamedTuple):
    """What came of one file."""

    tally: Tally
    rejects: Path | None  # where rejected rows stand; None: there are none, or nothing was written
    was_finished: bool  # an earlier import had finished it; nothing was sent now


class _Batch(NamedTuple):
    items: list[tuple[Row, SourceRecord | Fault]]
    answer: Future[IngestRecordsResponse] | None  # None: no record to send


Told = Callable[[int, int], None]  # how much of a file is read (see Rows.size), and how many rows are answered


def open_rows(path: Path, form: Form) -> Rows:
    """Open a file by its name's ending; .gz behind it is unpacked.

    Raises:
        TsugiError: FIELD_INVALID: another ending, or a file that is not what its ending says.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    try:
        match suffix:
            case ".csv" | ".tsv" | ".txt":
                return CsvRows(path, form.encoding, form.delimiter or ("\t" if suffix == ".tsv" else ","))
            case ".jsonl" | ".ndjson":
                return JsonRows(path, form.encoding)
            case ".parquet" if not path.name.endswith(".gz"):
                return ParquetRows(path, form.encoding)
    except (OSError, EOFError, zlib.error) as error:
        raise refused(path.name, [Violation(path.name, f"it cannot be read: {error}")]) from error
    hint = meant(suffix, _SUFFIXES) or f"; one of {', '.join(_SUFFIXES)} is expected, .gz may follow"
    raise refused(path.name, [Violation(path.name, f"the name's ending says nothing of its format{hint}")])


def open_all(paths: list[Path], mapping: Mapping, journal_folder: Path | None) -> list[Opened]:
    """Open every file and check its header, before the first row of the first is read.

    Raises:
        TsugiError: FIELD_INVALID with every fault of the first file that has some.
    """
    opened: list[Opened] = []
    try:
        for path in paths:
            journal_path = journals.journal_path(path, journal_folder)
            if any(journal_path == other.journal_path for other in opened):
                raise refused(path.name, [Violation(path.name, "two files of this name would share one journal")])
            rows = open_rows(path, mapping.form)
            opened.append(Opened(path, rows, journal_path))
            check_columns(mapping, rows.columns, path.name)
    except BaseException:
        for each in opened:
            each.rows.close()
        raise
    return opened


def import_file(
    opened: Opened,
    plan: Plan,
    destination: Destination | None,
    told: Told,
    clock_s: Callable[[], float],
    *,
    is_restart: bool = False,
    pause: Callable[[float], bool] | None = None,
) -> Outcome:
    """Import one file from where an earlier import of it stopped; every row is answered for on return.

    Args:
        opened: the file; closed on return.
        plan: what it is imported as.
        destination: where records go; None: a dry run, which reads and converts all rows, and sends and writes nothing.
        told: hears of progress, once a batch.
        clock_s: a monotonic clock.
        is_restart: begin with the first row whatever the journal says.
        pause: waits between attempts; see Sender.

    Raises:
        ImportStopped: the server takes no more, or the file cannot be read any further; the journal says how far it
            came.
        OSError: journal or rejects file cannot be written.
    """
    fresh = journals.new_journal(opened.path, plan.source, plan.mapping.sha256)
    columns = opened.rows.columns if opened.rows.delimiter else None
    builder = Builder(plan.mapping, plan.catalog, plan.source, columns, f"{fresh.file_sha256[:32]}:")
    try:
        if destination is None:
            return Outcome(_Run(opened, builder, fresh, None, None, told, clock_s).run(), None, False)
        with opened.path.open("rb") as locked:
            _lock(locked.fileno(), opened.path)
            return _import(opened, builder, fresh, destination, told, clock_s, is_restart, plan.mapping, pause)
    finally:
        opened.rows.close()


def _import(
    opened: Opened, builder: Builder, fresh: Journal, destination: Destination, told: Told,
    clock_s: Callable[[], float], is_restart: bool, mapping: Mapping, pause: Callable[[float], bool] | None,
) -> Outcome:  # fmt: skip
    path = rejects_path(opened.path, opened.rows)
    journal = journals.load(opened.journal_path)
    if journal is None or is_restart or not journal.is_of(fresh):
        _set_aside(path)
        journal = fresh
        journals.save(opened.journal_path, journal)
    if journal.is_finished:
        return Outcome(journal.tally, path if path.exists() else None, True)
    rejects = Rejects(path, opened.path, opened.rows, journal.rejects_bytes)
    # Whose value stands is settled by observation times, or where there are none by the order of arrival.
    sender = Sender(destination, BATCHES_AT_ONCE if mapping.observation_time else 1, pause)
    try:
        tally = _Run(opened, builder, journal, sender, rejects, told, clock_s).run()
    finally:
        sender.stop()
        rejects.close()
    return Outcome(tally, path if path.exists() else None, False)


class _UnreadableError(Exception):
    """The file cannot be read any further."""


class _Run:
    """One import that is under way."""

    def __init__(
        self, opened: Opened, builder: Builder, journal: Journal, sender: Sender | None, rejects: Rejects | None,
        told: Told, clock_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._rows = opened.rows
        self._journal_path = opened.journal_path
        self._builder = builder
        # In a dry run nobody answers; what the server would refuse is found here, as far as it can be.
        now_us = time.time_ns() // 1_000
        self._build = builder.build if sender is not None else lambda row: builder.try_out(row, now_us)
        self._journal = journal
        self._tally = journal.tally
        self._sender = sender
        self._rejects = rejects
        self._told = told
        self._clock_s = clock_s
        self._seconds_before = journal.tally.seconds
        self._start_s = self._saved_s = clock_s()

    def run(self) -> Tally:
        waiting: deque[_Batch] = deque()
        try:
            for items in self._batches():
                records = [made for _, made in items if isinstance(made, SourceRecord)]
                answer = self._sender.send(records) if self._sender is not None and records else None
                waiting.append(_Batch(items, answer))
                if len(waiting) > BATCHES_AT_ONCE:
                    self._settle(waiting.popleft())
        except _UnreadableError as error:
            self._settle_all(waiting)
            self._save()
            raise ImportStopped(f"what follows line {self._journal.line} cannot be read: {error}") from error
        except (ImportStopped, KeyboardInterrupt):
            self._save()
            raise
        self._settle_all(waiting)
        self._journal.is_finished = True
        self._save()
        return self._tally

    def _batches(self) -> Iterator[list[tuple[Row, SourceRecord | Fault]]]:
        items: list[tuple[Row, SourceRecord | Fault]] = []
        n_bytes = 0
        build = self._build
        unreadable: Exception | None = None
        try:
            for row in self._rows.read(Place(self._journal.at, self._journal.line)):
                made = build(row) if row.fault is None else row.fault
                items.append((row, made))
                n_bytes += made.ByteSize() if isinstance(made, SourceRecord) else len(row.raw)
                if len(items) >= BATCH_RECORDS_MAX or n_bytes >= BATCH_BYTES_MAX:
                    yield items
                    items, n_bytes = [], 0
        except (OSError, EOFError, zlib.error) as error:
            unreadable = error
        if items:
            yield items
        if unreadable is not None:
            raise _UnreadableError(str(unreadable)) from unreadable

    def _settle_all(self, waiting: deque[_Batch]) -> None:
        try:
            while waiting:
                self._settle(waiting.popleft())
        except (ImportStopped, KeyboardInterrupt):
            self._save()
            raise

    def _settle(self, batch: _Batch) -> None:
        """Wait for a batch's answer, and answer for each of its rows."""
        response = batch.answer.result() if batch.answer is not None else IngestRecordsResponse()
        results = iter(response.results)
        tally = self._tally
        for row, made in batch.items:
            fault = made if isinstance(made, Fault) else None
            if isinstance(made, SourceRecord) and self._sender is not None:
                result = next(results)
                if result.HasField("error"):
                    fault = self._builder.refusal(result.error, made)
                elif result.accepted.duplicate:
                    tally.duplicates += 1
                else:
                    tally.accepted += 1
            elif fault is None:
                tally.accepted += 1
            if fault is not None:
                tally.reject(row.line, fault)
                if self._rejects is not None:
                    self._rejects.add(row, fault, self._builder.record_id(row))
        tally.rows += len(batch.items)
        tally.lsn = max(tally.lsn, response.lsn)
        last = batch.items[-1][0]
        self._journal.at, self._journal.line = last.end, last.end_line
        self._told(self._rows.done(), tally.rows)
        if self._clock_s() - self._saved_s >= JOURNAL_S_MIN:
            self._save()

    def _save(self) -> None:
        """Write down how far it has come; the rejects first, or a journal could speak of rows that are not there."""
        self._saved_s = self._clock_s()
        self._tally.seconds = self._seconds_before + self._saved_s - self._start_s
        if self._rejects is not None:
            self._journal.rejects_bytes = self._rejects.sync()
            journals.save(self._journal_path, self._journal)


def _set_aside(path: Path) -> None:
    """Give the rejects of an earlier import another name, for somebody may be correcting them."""
    if not path.exists() or not path.stat().st_size:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    journals.sync_folder(path.parent)


def _lock(descriptor: int, path: Path) -> None:
    """Keep a second import of the same file away for as long as the file is open."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ImportRunning(f"{os.fspath(path.name)} is being imported already") from None
    except OSError:  # a file system without locks
        return
