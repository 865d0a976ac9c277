"""What a failing disk or a forger does to the log's bytes is found: nobody ever reads a record that was not written."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from server.storage.lmdb_log import LmdbLog
from server.storage.log import follow
from server.storage.record import CHAIN_START, CorruptRecordError, Draft, Record, offsets
from tests.support.damage import MAP_BYTES, Tables, editing, tombstone_of, with_crc
from tests.support.faults import WAIT_S_MAX
from tests.support.opener import digest_of
from tsugi.log.v1.record_pb2 import RecordKind

NOW_US = 1_760_000_000_000_000
ROOT = Path(__file__).parents[2]
N_BLOCKS, N_RECORDS = 5, 20


def lsn_key(lsn: int) -> bytes:
    return lsn.to_bytes(8, "big")


def draft(number: int) -> Draft:
    key = number.to_bytes(16, "big")
    return Draft(RecordKind.RECORD_KIND_OUTCOME, b"what happened %d" % number, key, subjects=(b"s" * 16,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gives a closed log of five blocks of four records."""
    log = LmdbLog(tmp_path / "log", MAP_BYTES)
    for first in range(1, N_RECORDS, N_RECORDS // N_BLOCKS):
        log.append([draft(i) for i in range(first, first + 4)], NOW_US + first)
    log.close()
    return tmp_path / "log"


def block(tables: Tables, lsn: int) -> bytearray:
    """Return the bytes of the block that begins with a record."""
    value = tables.txn.get(lsn_key(lsn), db=tables.blocks)
    assert value is not None
    return bytearray(value)


def put(tables: Tables, lsn: int, data: bytes | bytearray) -> None:
    tables.txn.put(lsn_key(lsn), bytes(data), db=tables.blocks)


def flip(tables: Tables) -> None:
    data = block(tables, 9)
    data[len(data) // 2] ^= 1
    put(tables, 9, data)


def cut(tables: Tables) -> None:
    put(tables, 9, block(tables, 9)[:-10])


def drop(lsn: int) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        tables.txn.delete(lsn_key(lsn), db=tables.blocks)

    return change


def drop_record(position: int) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        data = bytes(block(tables, 9))
        starts = [*offsets(data), len(data)]
        put(tables, 9, data[: starts[position]] + data[starts[position + 1] :])

    return change


def swap(tables: Tables) -> None:
    one, other = block(tables, 5), block(tables, 9)
    put(tables, 5, other)
    put(tables, 9, one)


def repeat(tables: Tables) -> None:
    put(tables, 9, block(tables, 9) + block(tables, 9))


def move(tables: Tables) -> None:
    data = block(tables, 9)
    tables.txn.delete(lsn_key(9), db=tables.blocks)
    put(tables, 10, data)


def forge(tables: Tables) -> None:
    data = bytes(block(tables, 9))
    first, second, *_ = offsets(data)
    record = with_crc(data[first : second - 1] + b"?")
    put(tables, 9, record + data[second:])


def set_tail(lsn: int) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        tail = bytearray(tables.txn.get(b"tail", db=tables.meta) or b"")
        struct.pack_into("<Q", tail, 0, lsn)
        tables.txn.put(b"tail", bytes(tail), db=tables.meta)

    return change


# Each with the LSN that reading must stop at; None: only verify can tell.
EDITS: dict[str, tuple[Callable[[Tables], None], int | None]] = {
    "a flipped bit": (flip, 11),
    "a block cut short": (cut, 12),
    "the first block gone": (drop(1), 1),
    "a block gone": (drop(9), 9),
    "the last block gone": (drop(17), 17),
    "the first record of a block gone": (drop_record(0), 9),
    "a record gone": (drop_record(1), 10),
    "the last record of a block gone": (drop_record(3), 12),
    "two blocks swapped": (swap, 5),
    "a block repeated": (repeat, None),
    "a block under another LSN": (move, None),
    "a payload forged with its checksum": (forge, None),
    "a tail set back": (set_tail(16), None),
    "a tail set forward": (set_tail(24), 21),
}


@pytest.mark.parametrize(("edit", "stops_at"), EDITS.values(), ids=EDITS)
def test_damage_is_found_and_what_was_not_written_is_not_read(
    folder: Path, edit: Callable[[Tables], None], stops_at: int | None
) -> None:
    before = records_of(folder)
    with editing(folder) as tables:
        edit(tables)
    log = LmdbLog(folder, MAP_BYTES)
    with pytest.raises(CorruptRecordError):
        log.verify()
    if stops_at is not None:
        assert log.read(1, stops_at - 1) == before[: stops_at - 1]
        for read in (lambda: log.read(1), lambda: log.read(stops_at), lambda: log.get(stops_at)):
            with pytest.raises(CorruptRecordError):
                read()
    log.close()


def records_of(folder: Path) -> list[Record]:
    log = LmdbLog(folder, MAP_BYTES)
    records = list(follow(log, 1))
    assert len(records) == N_RECORDS
    assert log.verify().chain == records[-1].chain != CHAIN_START
    log.close()
    return records


def test_lost_key_or_subject_is_found(folder: Path) -> None:
    for table, key in ((b"keys", (7).to_bytes(16, "big")), (b"subjects", b"s" * 16 + lsn_key(7))):
        damaged = folder.with_name(table.decode())
        shutil.copytree(folder, damaged)
        with editing(damaged) as tables:
            tables.txn.delete(key, db=tables.environment.open_db(table, tables.txn))
        log = LmdbLog(damaged, MAP_BYTES)
        with pytest.raises(CorruptRecordError, match="record 7 is not found by its"):
            log.verify()
        log.close()


def test_tombstones_read_as_such_and_the_log_still_verifies(folder: Path) -> None:
    before = records_of(folder)
    with editing(folder) as tables:
        data = bytes(block(tables, 9))
        first, second, third, _ = offsets(data)
        put(
            tables, 9, data[:first] + tombstone_of(data[first:second]) + tombstone_of(data[second:third]) + data[third:]
        )
    log = LmdbLog(folder, MAP_BYTES)
    records = log.read(1)
    assert [record.lsn for record in records if record.is_tombstone] == [9, 10]
    assert [record.chain for record in records] == [record.chain for record in before]
    assert [r for r in records if not r.is_tombstone] == [r for r in before if r.lsn not in {9, 10}]
    assert log.verify() == log.tail()
    assert [receipt.lsn for receipt in log.append([draft(9), draft(21)], NOW_US)] == [9, 21]  # its key is kept for ever
    assert log.verify().lsn == 21
    log.close()


def verdicts(folder: Path, work: Path, n_copies: int, seed: int, mode: str = "read") -> Counter[str]:
    """Damage copies of a log's file by seed, with flips, zeroed pages and truncations, and count what comes of it."""
    rng = random.Random(seed)
    whole = (folder / "data.mdb").read_bytes()
    for i in range(n_copies):
        data = bytearray(whole)
        kind = rng.choice(("flip", "flip", "flip", "zero", "cut"))
        at = rng.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            data[at & ~4095 : (at & ~4095) + 4096] = bytes(4096)
        else:
            del data[at:]
        copy = work / f"{i:05d}-{kind}-{at}"
        copy.mkdir(parents=True)
        (copy / "data.mdb").write_bytes(data)
    same = f"read {digest_of(records_of(folder))}"
    command = [sys.executable, "-m", "tests.support.opener", str(work), str(MAP_BYTES), mode]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=10 * WAIT_S_MAX, check=True)
    shutil.rmtree(work)
    said = Counter("same" if line.startswith(same) else line.split()[0] for line in done.stdout.splitlines())
    assert said.total() == n_copies
    return said


@pytest.mark.slow
def test_damaged_file_is_never_read_as_something_else(folder: Path, tmp_path: Path) -> None:
    said = verdicts(folder, tmp_path / "copies", n_copies=150, seed=1)
    assert said["read"] == 0
    assert said["refused"] > 10


@pytest.mark.slow
def test_negative_control_a_reader_that_trusts_is_caught(folder: Path, tmp_path: Path) -> None:
    assert verdicts(folder, tmp_path / "copies", n_copies=150, seed=1, mode="trust")["read"] > 0


@pytest.mark.long
def test_file_damaged_ten_thousand_times_is_never_read_as_something_else(folder: Path, tmp_path: Path) -> None:
    for seed in range(10):
        assert verdicts(folder, tmp_path / "copies", n_copies=1_000, seed=100 + seed)["read"] == 0
