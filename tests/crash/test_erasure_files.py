"""After erasing and compacting no file holds a byte of it, and nobody who appends, reads or is killed loses anything.

The search looks at every byte of every file of the folder, free pages and the slack inside of pages included. Its
negative control is the same search without a compaction, which must find what was erased.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lmdb
import pytest

from server.storage import successor
from server.storage.generations import STEPS, CompactionRunningError, Generations, MarkError, NotCopiedError, newest
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import LogUnavailableError, follow
from server.storage.record import Draft
from server.storage.store import Table
from tests.support.compacting import APPENDED, COUNTER, GROUP_RECORDS, KILLED, NOW_US, Program, killer
from tests.support.faults import WAIT_S_MAX, KilledError
from tsugi.log.v1.record_pb2 import RecordKind

MAP_BYTES = 1 << 28
ROOT = Path(__file__).parents[2]
PERSON, OTHER = b"subject-canary-1", b"another-person-2"
CANARY = b"payload-canary-3"
N_GROUPS, N_IN_GROUP = 3, 25
N_RECORDS = N_GROUPS * N_IN_GROUP
SMALL_LSNS, LARGE_LSN = [4, 29, 54], 30


def key_of(number: int) -> bytes:
    return b"keyed-of" + number.to_bytes(8, "big")


def drafts(first: int) -> list[Draft]:
    """Return a group of 100 kB records, so that a copy takes several chunks; some are about the person."""
    group = []
    for number in range(first, first + N_IN_GROUP):
        is_person = number in {*SMALL_LSNS, LARGE_LSN}
        payload = (CANARY if is_person else b"somebody else's ") * (10 if number in SMALL_LSNS else 6_000)
        subjects = (PERSON, OTHER) if is_person else (OTHER,)
        group.append(Draft(RecordKind.RECORD_KIND_OUTCOME, payload, key_of(number), subjects=subjects))
    return group


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gives the folder of a closed log of a few megabytes, in which a person was erased."""
    log = LmdbLog(tmp_path / "log", MAP_BYTES)
    for group in range(N_GROUPS):
        log.append(drafts(1 + group * N_IN_GROUP), NOW_US)
    assert log.erase(log.about(PERSON)) == 4
    log.close()
    return tmp_path / "log"


def files_with(folder: Path, *needles: bytes) -> list[str]:
    """Return the files that hold any of some byte strings."""
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return sorted(path.name for path, data in contents.items() if any(needle in data for needle in needles))


def check_log(folder: Path, acknowledged: dict[str, int]) -> None:
    """Opened anew, the log verifies and holds what was acknowledged, once and where it was said to stand."""
    log = LmdbLog(folder, MAP_BYTES)
    records = list(follow(log, 1))
    assert log.verify().lsn == len(records) == N_RECORDS + len(acknowledged)
    assert [record.lsn for record in records if record.is_tombstone] == sorted([*SMALL_LSNS, LARGE_LSN])
    keys = {record.key.hex(): record.lsn for record in records if record.lsn > N_RECORDS}
    assert keys == acknowledged
    for key, lsn in acknowledged.items():
        entry = log.find(bytes.fromhex(key))
        assert entry is not None
        assert entry.lsn == lsn
    assert log.spent([COUNTER]) == [sum(record.payload == APPENDED for record in records)]
    assert log.about(PERSON) == []
    assert log.about(OTHER) == [lsn for lsn in range(1, N_RECORDS + 1) if lsn not in {*SMALL_LSNS, LARGE_LSN}]
    for lsn in SMALL_LSNS:  # a request is known for ever
        (receipt,) = log.append([Draft(RecordKind.RECORD_KIND_OUTCOME, b"", key_of(lsn))], NOW_US)
        assert receipt.lsn == lsn
    log.close()


def test_negative_control_what_was_erased_is_found_until_the_log_is_compacted(folder: Path) -> None:
    assert files_with(folder, CANARY) == ["data.mdb"]
    assert files_with(folder, PERSON) == ["data.mdb"]
    LmdbLog(folder, MAP_BYTES).close()
    assert files_with(folder, CANARY) == ["data.mdb"]  # opening it anew is no help


def test_after_a_compaction_no_file_holds_what_was_erased_but_the_keys_that_are_kept_for_ever(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    log.compact()
    assert files_with(folder, CANARY, PERSON) == []
    assert files_with(folder, OTHER) == ["data.mdb"]
    assert files_with(folder, key_of(SMALL_LSNS[0])) == ["data.mdb"]
    assert sorted(path.name for path in folder.iterdir()) == ["0000000001", "compact.lock"]
    log.close()
    check_log(folder, {})


def test_what_is_erased_while_the_log_is_copied_is_in_no_file_either(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    fresh = Draft(RecordKind.RECORD_KIND_OUTCOME, b"fresh-" + CANARY, key_of(1_000), subjects=(PERSON,))
    erased: list[int] = []

    def at_step(name: str) -> None:
        if name == "sync" and not erased:
            erased.extend(receipt.lsn for receipt in log.append([fresh], NOW_US))
            assert CANARY in b"".join(path.read_bytes() for path in folder.glob("data.mdb"))
            log.erase([*erased, 1])

    log.compact(at_step)
    assert erased == [N_RECORDS + 1]
    assert files_with(folder, CANARY, PERSON) == []
    assert [record.lsn for record in log.read(1) if record.is_tombstone] == [1, 4, 29, 30, 54, N_RECORDS + 1]
    log.verify()
    log.close()


class Others:
    """A worker and a reader in processes of their own, at work at every step of a compaction in this one."""

    def __init__(self, writer: Program, reader: Program) -> None:
        self.acknowledged: dict[str, int] = {}
        self.steps: list[str] = []
        self._writer = writer
        self._reader = reader

    def at_step(self, name: str) -> None:
        self.steps.append(name)
        if name == "mark":
            self._writer.tell("append")  # it waits for the writer lock, and meets the mark when it has it
        elif name == "rename":
            self._note(self._writer.answer())
        elif name != "sync" or self.steps.count("sync") == 1:  # at the second one others are kept out
            self._note(self._writer.ask("append"))
        assert self._reader.ask("read") == str(N_RECORDS + len(self.acknowledged))
        assert self._reader.ask("spent") == str(len(self.acknowledged))

    def _note(self, answer: str) -> None:
        pairs = [pair.split(":") for pair in answer.split()]
        assert len(pairs) == GROUP_RECORDS
        self.acknowledged.update((key, int(lsn)) for key, lsn in pairs)


@pytest.mark.slow
def test_others_append_and_read_on_at_every_step_and_nothing_is_lost_or_doubled(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    with Program("log", folder, MAP_BYTES) as writer, Program("reader", folder, MAP_BYTES) as reader:
        others = Others(writer, reader)
        for generation in (1, 2):
            others.steps.clear()
            log.compact(others.at_step)
            assert set(others.steps) == set(STEPS)
            assert others.steps.count("copy") > 3
            assert newest(folder) == generation
        last = str(N_RECORDS + len(others.acknowledged))
        assert [writer.ask("verify"), reader.ask("verify"), str(log.verify().lsn)] == [last] * 3
        assert files_with(folder, CANARY, PERSON) == []
    log.close()
    check_log(folder, others.acknowledged)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "nth"), [("copy", 3), ("sync", 1), ("sync", 2), *((name, 1) for name in STEPS[2:])])
def test_killed_at_any_step_the_log_is_whole_for_who_has_it_open_and_who_opens_it(
    folder: Path, step: str, nth: int
) -> None:
    acknowledged: dict[str, int] = {}

    def note(program: Program) -> None:
        acknowledged.update((key, int(lsn)) for key, lsn in (pair.split(":") for pair in program.ask("append").split()))

    with Program("log", folder, MAP_BYTES) as writer, Program("reader", folder, MAP_BYTES) as reader:
        note(writer)
        with Program("log", folder, MAP_BYTES) as killed:
            assert killed.ask(f"compact {step} {nth}") == ""
            assert killed.exit_code() == KILLED
        note(writer)  # who had it open appends where those who open it look
        with Program("log", folder, MAP_BYTES) as opener:
            note(opener)
            note(writer)
            assert opener.ask("read") == reader.ask("read") == str(N_RECORDS + len(acknowledged))
        is_switched = STEPS.index(step) > STEPS.index("mark")
        assert newest(folder) == int(is_switched)
        assert (files_with(folder, CANARY, PERSON) == []) == is_switched  # what was left over is swept by who opened it
        assert not [path for path in folder.iterdir() if path.name.endswith(".unfinished")]
        log = LmdbLog(folder, MAP_BYTES)
        log.compact()
        note(writer)
        assert reader.ask("read") == str(N_RECORDS + len(acknowledged)) == str(log.tail().lsn)
        log.close()
    assert files_with(folder, CANARY, PERSON) == []
    check_log(folder, acknowledged)


@pytest.mark.slow
def test_marked_successor_is_never_swept_by_who_opened_the_log_before_the_mark(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    with Program("log", folder, MAP_BYTES) as killed:
        assert killed.ask("compact rename 1") == ""
    assert (folder / "0000000001.unfinished").exists()
    with log._generations._owning():
        log._generations._sweep()  # as an opener does that was overtaken between opening and sweeping
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["0000000001"]
    log.close()
    check_log(folder, {})


def test_copy_that_the_disk_refuses_is_removed_and_the_log_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: successor.Successor) -> None:
        raise lmdb.DiskError("no space left on device")

    monkeypatch.setattr(successor.Successor, "sync", refuse)
    log = LmdbLog(folder, MAP_BYTES)
    with pytest.raises(NotCopiedError, match="no space left"):
        log.compact()
    assert sorted(path.name for path in folder.iterdir()) == ["compact.lock", "data.mdb", "lock.mdb"]
    log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], NOW_US)
    log.close()


def test_mark_that_the_disk_refuses_stops_the_log_as_any_failed_write_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> bool:
        raise MarkError("mdb_txn_commit: Input/output error")

    monkeypatch.setattr(Generations, "_switch", refuse)
    log = LmdbLog(folder, MAP_BYTES)
    for write in (log.compact, lambda: log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], NOW_US)):
        with pytest.raises(LogUnavailableError):
            write()
    log.close()
    check_log(folder, {})


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_compaction_that_fails_at_a_step_leaves_the_log_usable_and_is_made_up_for(folder: Path, step: str) -> None:
    log = LmdbLog(folder, MAP_BYTES)

    def fail() -> None:
        raise KilledError

    with pytest.raises(KilledError):
        log.compact(killer(step, 1, fail))
    (receipt,) = log.append([Draft(RecordKind.RECORD_KIND_TICK, b"", key_of(1_000))], NOW_US)
    assert receipt.lsn == log.verify().lsn == N_RECORDS + 1
    log.compact()
    assert files_with(folder, CANARY, PERSON) == []
    log.close()
    check_log(folder, {key_of(1_000).hex(): N_RECORDS + 1})


@pytest.mark.slow
def test_copy_of_the_files_taken_at_any_moment_is_a_whole_log(folder: Path, tmp_path: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    copies: list[Path] = []

    def at_step(name: str) -> None:
        copies.append(tmp_path / f"{len(copies)}-{name}")
        shutil.copytree(folder, copies[-1])

    log.compact(at_step)
    log.close()
    for copy in copies:
        check_log(copy, {})
        LmdbLog(copy, MAP_BYTES).close()
        assert not [path for path in copy.iterdir() if path.name.endswith(".unfinished")]


def test_two_do_not_compact_at_once(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    refused: list[str] = []

    def at_step(name: str) -> None:
        with suppress(CompactionRunningError):
            log.compact()
            return
        refused.append(name)

    log.compact(at_step)
    assert set(refused) == set(STEPS)
    log.close()
    check_log(folder, {})


def test_lost_generation_is_refused_and_never_begun_anew(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    log.compact()
    log.close()
    data = folder / "0000000001" / "data.mdb"
    data.write_bytes(b"")
    with pytest.raises(lmdb.Error, match="generation 1 is empty"):
        LmdbLog(folder, MAP_BYTES)
    data.unlink()
    with pytest.raises(lmdb.Error, match="generation 1 is gone"):
        LmdbLog(folder, MAP_BYTES)
    shutil.rmtree(data.parent)
    for writable in (True, False):
        with pytest.raises(lmdb.Error, match="generation 0 is gone"):
            LmdbLog(folder, MAP_BYTES, writable=writable)
    assert not (folder / "data.mdb").exists()


@pytest.mark.slow
def test_writers_at_full_speed_lose_nothing_to_compactions_one_after_the_other(tmp_path: Path) -> None:
    log = LmdbLog(tmp_path / "log", MAP_BYTES)
    command = [sys.executable, "-m", "tests.support.writers", "append", str(tmp_path / "log"), str(MAP_BYTES)]
    writers = [
        subprocess.Popen(
            [*command, str(writer), "60", "0"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for writer in range(2)
    ]
    ledgers: list[list[str]] = []
    collecting = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
        collecting.append(
            threading.Thread(target=lambda w=writer: ledgers.append(w.communicate(timeout=WAIT_S_MAX)[0].splitlines()))
        )
        collecting[-1].start()
    n_compactions = 0
    while n_compactions < 2 or any(writer.poll() is None for writer in writers):
        log.compact()
        n_compactions += 1
    for thread in collecting:
        thread.join(WAIT_S_MAX)
    assert [writer.returncode for writer in writers] == [0, 0]
    told = [line.split() for ledger in ledgers for line in ledger if line != "ready"]
    assert {fate for _, fate, _ in told} == {"recorded"}
    records = list(follow(log, 1))
    assert Counter((record.key.hex(), str(record.lsn)) for record in records) == Counter(
        (key, lsn) for key, _, lsn in told
    )
    assert log.verify().lsn == len(told)
    assert newest(tmp_path / "log") == n_compactions
    log.close()


@pytest.mark.slow
def test_threads_of_one_process_read_and_append_through_compactions(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    begun, stop = threading.Barrier(4), threading.Event()
    faults: list[BaseException] = []

    def work(turn: Callable[[int], None], n_turns: int | None) -> None:
        try:
            turn(0)
            begun.wait(WAIT_S_MAX)
            number = 1
            while number < (n_turns or 1_000_000) and not (n_turns is None and stop.is_set()):
                turn(number)
                number += 1
        except BaseException as error:  # whatever it is, the test has to hear of it
            faults.append(error)
            raise

    def append(number: int) -> None:
        key = key_of(1_000 + number)
        (receipt,) = log.append([Draft(RecordKind.RECORD_KIND_OUTCOME, bytes(1_000), key)], NOW_US)
        assert receipt.lsn == N_RECORDS + 1 + number

    def read(_number: int) -> None:
        tail = log.tail()
        lsns = [record.lsn for record in log.read(tail.lsn - 40)]
        assert lsns == list(range(tail.lsn - 40, tail.lsn - 40 + len(lsns)))
        assert lsns[-1] >= tail.lsn
        assert len(log.read(28, 5)) == 5

    def find(_number: int) -> None:
        entry = log.find(key_of(29))
        assert entry is not None
        assert (entry.lsn, len(log.about(OTHER)), log.head("catalog")) == (29, N_RECORDS - 4, 0)

    threads = [threading.Thread(target=work, args=(append, 200))]
    threads += [threading.Thread(target=work, args=(turn, None)) for turn in (read, find)]
    for thread in threads:
        thread.start()
    begun.wait(WAIT_S_MAX)
    n_compactions = 0
    while n_compactions < 5 or threads[0].is_alive():
        log.compact()
        n_compactions += 1
    stop.set()
    for thread in threads:
        thread.join(WAIT_S_MAX)
    assert faults == []
    assert log.verify().lsn == N_RECORDS + 200
    open_files = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert len(open_files) == len([line for line in open_files if f"{n_compactions:010d}" in line]) > 0
    log.close()


def test_copy_whose_like_is_erased_every_time_is_given_up_and_changes_nothing(folder: Path) -> None:
    log = LmdbLog(folder, MAP_BYTES)
    erased = iter(range(5, 10))

    def at_step(name: str) -> None:
        if name == "sync":
            log.erase([next(erased)])

    with pytest.raises(NotCopiedError, match="changed meanwhile"):
        log.compact(at_step)
    assert newest(folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["compact.lock", "data.mdb", "lock.mdb"]
    log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], NOW_US)
    log.compact()
    assert files_with(folder, CANARY, PERSON) == []
    log.verify()
    log.close()


def test_copy_that_lacks_a_row_is_never_put_in_force(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = successor.Successor.write

    def forgetful(self: successor.Successor, name: bytes, rows: Iterable[tuple[Any, Any]], **how: bool) -> None:
        honest(self, name, list(rows)[1:] if name == b"subjects" else rows, **how)

    monkeypatch.setattr(successor.Successor, "write", forgetful)
    log = LmdbLog(folder, MAP_BYTES)
    with pytest.raises(NotCopiedError, match="subjects was not copied whole"):
        log.compact()
    log.close()
    check_log(folder, {})
    assert newest(folder) == 0


def test_memory_of_the_process_does_not_reach_the_file(tmp_path: Path) -> None:
    assert not carries_memory(tmp_path)


def test_negative_control_pages_that_do_not_begin_zeroed_carry_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *how, **more: honest(*how, **(more | {"meminit": False})))
    assert carries_memory(tmp_path)


def carries_memory(folder: Path) -> bool:
    """Append while the free memory of this process is full of a canary, and look for it in the files."""
    log = LmdbLog(folder / "log", MAP_BYTES)
    held = [bytearray(b"heap-canary-4444" * 255) for _ in range(400)]  # as large as a page of LMDB is
    del held[::2]
    del held
    log.append([Draft(RecordKind.RECORD_KIND_OUTCOME, b"short", key_of(1), subjects=(OTHER,))], NOW_US)
    log.close()
    return files_with(folder, b"heap-canary-4444") != []


@pytest.fixture
def state(tmp_path: Path) -> Iterator[LmdbStore]:
    """Gives an open state of a few megabytes, from which a person was deleted."""
    store = LmdbStore(tmp_path / "state", MAP_BYTES)
    with store.write() as txn:
        for number in range(60):
            txn.put(Table.PROFILES, b"key-%03d" % number, CANARY * 6_000 if number in {20, 40} else bytes(100_000))
        txn.put(Table.CONTACTS, PERSON, b"3")
    with store.write() as txn:
        for number in (20, 40):
            txn.delete(Table.PROFILES, b"key-%03d" % number)
        txn.delete(Table.CONTACTS, PERSON)
    yield store
    store.close()


def test_after_a_compaction_no_file_of_the_state_holds_what_was_deleted(state: LmdbStore, tmp_path: Path) -> None:
    assert files_with(tmp_path, CANARY) == files_with(tmp_path, PERSON) == ["data.mdb"]  # the negative control
    state.compact()
    assert files_with(tmp_path, CANARY, PERSON) == []
    with state.read() as snapshot:
        assert len(list(snapshot.scan(Table.PROFILES))) == 58


@pytest.mark.slow
def test_reader_that_was_stopped_keeps_its_snapshot_and_then_reads_the_new_file(
    state: LmdbStore, tmp_path: Path
) -> None:
    with Program("state", tmp_path / "state", MAP_BYTES) as reader:
        assert reader.ask("hold") == "held"
        for generation in (1, 2):
            state.compact()
            with state.write() as txn:
                txn.put(Table.PROFILES, b"new %d" % generation, b"new")
        assert len(reader.ask("held").split()) == 58
        assert len(reader.ask("rows").split()) == 60


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_state_whose_compaction_is_killed_is_whole(state: LmdbStore, tmp_path: Path, step: str) -> None:
    with (
        Program("state", tmp_path / "state", MAP_BYTES) as reader,
        Program("state", tmp_path / "state", MAP_BYTES) as writer,
    ):
        before = reader.ask("rows")
        assert writer.ask(f"compact {step} 1") == ""
        with state.write() as txn:
            txn.put(Table.PROFILES, b"new", b"new")
        assert reader.ask("rows") == f"{before} {b'new'.hex()}=3"
        state.compact()
        assert reader.ask("rows") == f"{before} {b'new'.hex()}=3"
    assert files_with(tmp_path, CANARY, PERSON) == []


def test_state_that_is_written_meanwhile_is_copied_anew(state: LmdbStore) -> None:
    n_writes = 0

    def at_step(name: str) -> None:
        nonlocal n_writes
        if name == "sync" and n_writes < 2:
            n_writes += 1
            with state.write() as txn:
                txn.put(Table.PROFILES, b"key-000", b"%d" % n_writes)

    state.compact(at_step)
    with state.read() as snapshot:
        assert bytes(snapshot.get(Table.PROFILES, b"key-000") or b"") == b"2"
