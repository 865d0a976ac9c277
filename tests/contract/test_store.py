"""What every store engine promises; the memory engine is the reference."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.storage.applied import Applied, read_applied, write_applied
from server.storage.lmdb_store import LmdbStore
from server.storage.memory import MemoryStore
from server.storage.store import Snapshot, Store, Table
from tests.support.faults import WAIT_S_MAX

MAP_BYTES = 1 << 26


@pytest.fixture(params=["memory", "lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    engine: Store = MemoryStore() if request.param == "memory" else LmdbStore(tmp_path / "state", MAP_BYTES)
    yield engine
    engine.close()


def rows(snapshot: Snapshot, table: Table = Table.PROFILES, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
    return list(snapshot.scan(table, prefix))


def fill(store: Store, *pairs: tuple[bytes, bytes], table: Table = Table.PROFILES) -> None:
    with store.write() as txn:
        for key, value in pairs:
            txn.put(table, key, value)


def test_empty_store_has_nothing(store: Store) -> None:
    with store.read() as snapshot:
        for table in Table:
            assert snapshot.get(table, b"key") is None
            assert rows(snapshot, table) == []


def test_what_was_written_is_read_in_its_own_table(store: Store) -> None:
    fill(store, (b"key", b"value"))
    with store.read() as snapshot:
        for table in Table:
            found = snapshot.get(table, b"key")
            assert (bytes(found) if found is not None else None) == (b"value" if table is Table.PROFILES else None)


def test_later_value_stands_and_an_empty_one_is_a_value(store: Store) -> None:
    fill(store, (b"key", b"one"), (b"key", b"two"), (b"empty", b""))
    fill(store, (b"key", b"three"))
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"empty", b""), (b"key", b"three")]
        found = snapshot.get(Table.PROFILES, b"empty")
        assert found is not None
        assert bytes(found) == b""


def test_delete_says_whether_there_was_anything(store: Store) -> None:
    fill(store, (b"key", b"value"))
    with store.write() as txn:
        assert txn.delete(Table.PROFILES, b"key")
        assert not txn.delete(Table.PROFILES, b"key")
        assert not txn.delete(Table.CONTACTS, b"key")
    with store.read() as snapshot:
        assert rows(snapshot) == []


def test_write_sees_itself(store: Store) -> None:
    fill(store, (b"a", b"1"), (b"b", b"2"))
    with store.write() as txn:
        txn.put(Table.PROFILES, b"c", b"3")
        txn.put(Table.PROFILES, b"a", b"4")
        txn.delete(Table.PROFILES, b"b")
        found = txn.get(Table.PROFILES, b"a")
        assert found is not None
        assert bytes(found) == b"4"
        assert txn.get(Table.PROFILES, b"b") is None
        assert rows(txn) == [(b"a", b"4"), (b"c", b"3")]


def test_snapshot_sees_one_committed_state_throughout(store: Store) -> None:
    fill(store, (b"a", b"1"))
    begun, committed = threading.Event(), threading.Event()

    def write() -> None:
        with store.write() as txn:
            txn.put(Table.PROFILES, b"a", b"2")
            txn.put(Table.PROFILES, b"b", b"2")
            begun.set()
            assert committed.wait(WAIT_S_MAX)

    writer = threading.Thread(target=write)
    writer.start()
    assert begun.wait(WAIT_S_MAX)
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"a", b"1")]  # what is not committed is not seen
        committed.set()
        writer.join(WAIT_S_MAX)
        assert rows(snapshot) == [(b"a", b"1")]  # nor what was committed since
        found = snapshot.get(Table.PROFILES, b"a")
        assert found is not None
        assert bytes(found) == b"1"
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"a", b"2"), (b"b", b"2")]


def test_exception_discards_the_whole_write(store: Store) -> None:
    fill(store, (b"a", b"1"), (b"b", b"2"))
    with pytest.raises(LookupError), store.write() as txn:
        txn.put(Table.PROFILES, b"a", b"9")
        txn.put(Table.CONTACTS, b"a", b"9")
        txn.delete(Table.PROFILES, b"b")
        raise LookupError
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"a", b"1"), (b"b", b"2")]
        assert rows(snapshot, Table.CONTACTS) == []
    fill(store, (b"c", b"3"))  # and the next write is as if that one had never been
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")]


def test_scan_yields_what_begins_with_the_prefix_by_key(store: Store) -> None:
    keys = [b"b", b"a\xff\xff", b"ab", b"a", b"\xff", b"\xff\xff", b"ab\x00", b"b\x00", b"aa"]
    fill(store, *((key, key[::-1]) for key in keys))
    with store.read() as snapshot:
        for prefix in (b"", b"a", b"ab", b"a\xff", b"b", b"\xff", b"\xff\xff", b"\xff\xff\xff", b"c", b"\x00"):
            want = sorted(key for key in keys if key.startswith(prefix))
            assert rows(snapshot, prefix=prefix) == [(key, key[::-1]) for key in want]


def test_scanned_pairs_outlive_the_snapshot(store: Store) -> None:
    fill(store, (b"a", b"1"), (b"b", b"2"))
    with store.read() as snapshot:
        kept = rows(snapshot)
    fill(store, (b"a", b"9"), (b"b", b"9"))
    assert kept == [(b"a", b"1"), (b"b", b"2")]


@pytest.mark.parametrize("size", [0, 512, 100_000])
def test_keys_out_of_bounds_are_the_programmers_fault(store: Store, size: int) -> None:
    with pytest.raises(AssertionError, match="1 to 511 bytes"), store.write() as txn:
        txn.put(Table.PROFILES, b"fine", b"1")
        txn.put(Table.PROFILES, bytes(size), b"1")
    with store.read() as snapshot:
        assert rows(snapshot) == []


@pytest.mark.parametrize("size", [1, 511])
def test_keys_up_to_the_bounds_and_values_of_megabytes_are_kept(store: Store, size: int) -> None:
    value = bytes(range(256)) * 8_192
    fill(store, (b"k" * size, value))
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"k" * size, value)]


def test_applied_lsn_is_committed_and_discarded_with_the_state(store: Store) -> None:
    with store.read() as snapshot:
        assert read_applied(snapshot) == (0, 0, 0)
    with store.write() as txn:
        write_applied(txn, Applied(2**64 - 1, -5, 7))
    with pytest.raises(LookupError), store.write() as txn:
        write_applied(txn, Applied(1, 1, 1))
        raise LookupError
    with store.read() as snapshot:
        assert read_applied(snapshot) == Applied(2**64 - 1, -5, 7)


def test_reopened_store_is_the_same_state(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "state", MAP_BYTES)
    fill(store, (b"a", b"1"))
    store.close()
    store = LmdbStore(tmp_path / "state", MAP_BYTES)
    with store.read() as snapshot:
        assert rows(snapshot) == [(b"a", b"1")]
    store.close()


def test_compacted_store_is_the_same_state_and_older_snapshots_last(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "state", MAP_BYTES)
    fill(store, *((b"%03d" % number, bytes(100_000)) for number in range(100)))
    fill(store, (b"a", b"1"), (b"a\xff", b""), table=Table.CONTACTS)
    with store.write() as txn:
        write_applied(txn, Applied(7, 8, 9))
    before = _dump(store, b"a")
    old = store.read()
    for generation in (1, 2):
        store.compact()
        assert _dump(store, b"a") == before
        assert [path.name for path in (tmp_path / "state").glob("0*")] == [f"{generation:010d}"]
        assert not (tmp_path / "state" / "data.mdb").exists()
    fill(store, (b"000", b"new"))
    with old as snapshot:
        assert read_applied(snapshot) == Applied(7, 8, 9)
        assert len(rows(snapshot)) == 100
        assert rows(snapshot)[0] == (b"000", bytes(100_000))
    with store.read() as snapshot:
        assert rows(snapshot)[0] == (b"000", b"new")
    store.close()
    store = LmdbStore(tmp_path / "state", MAP_BYTES)
    with store.read() as snapshot:
        assert rows(snapshot)[0] == (b"000", b"new")
        assert read_applied(snapshot) == Applied(7, 8, 9)
    store.close()


def test_files_of_a_compaction_are_let_go_by_who_only_keeps_house(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "state", MAP_BYTES)
    idle = store._generations.now
    store.compact()
    store._generations.now = idle  # as in a process that has read nothing since
    store.check_readers()
    assert store._generations.now.number == 1
    store.close()


KEYS = st.binary(min_size=1, max_size=3)
CHANGES = st.lists(
    st.tuples(st.sampled_from(list(Table)), KEYS, st.one_of(st.none(), st.binary(max_size=40))), max_size=12
)


@pytest.mark.slow
@given(st.lists(st.tuples(CHANGES, st.booleans()), max_size=6), KEYS)
@settings(max_examples=max(1, settings().max_examples // 2))
def test_lmdb_answers_as_memory_does(
    writes: list[tuple[list[tuple[Table, bytes, bytes | None]], bool]], prefix: bytes
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tsugi-state-"))
    stores: list[Store] = [MemoryStore(), LmdbStore(folder, MAP_BYTES)]
    for changes, is_kept in writes:
        wanted, got = (_apply(store, changes, is_kept=is_kept) for store in stores)
        assert got == wanted
        wanted_rows, got_rows = (_dump(store, prefix) for store in stores)
        assert got_rows == wanted_rows
    for store in stores:
        store.close()
    shutil.rmtree(folder)


def _apply(store: Store, changes: list[tuple[Table, bytes, bytes | None]], *, is_kept: bool) -> list[bool]:
    answers: list[bool] = []
    with contextlib.suppress(LookupError), store.write() as txn:
        for table, key, value in changes:
            answers.append(txn.get(table, key) is not None)
            if value is None:
                answers.append(txn.delete(table, key))
            else:
                txn.put(table, key, value)
        if not is_kept:
            raise LookupError
    return answers


def _dump(store: Store, prefix: bytes) -> list[list[tuple[bytes, bytes]]]:
    with store.read() as snapshot:
        return [rows(snapshot, table, part) for table in Table for part in (b"", prefix)]


def test_scan_begins_where_it_is_told_and_goes_either_way(store: Store) -> None:
    keys = [b"a", b"a\x00", b"a\xff", b"a\xff\xff", b"b", b"b1", b"\xff", b"\xff\xff"]
    with store.write() as txn:
        for key in keys:
            txn.put(Table.META, key, key)
    ordered = sorted(keys)
    starts = [*ordered, b"a\x00\x00", b"a\xfe", b"b0", b"b2"]
    with store.read() as snapshot:
        for prefix in (b"", b"a", b"a\xff", b"b", b"\xff", b"c"):
            within = [key for key in ordered if key.startswith(prefix)]
            assert [key for key, _ in snapshot.scan(Table.META, prefix)] == within
            assert [key for key, _ in snapshot.scan(Table.META, prefix, reverse=True)] == within[::-1]
            for start in (start for start in starts if start.startswith(prefix)):
                forth = [key for key, _ in snapshot.scan(Table.META, prefix, start=start)]
                back = [key for key, _ in snapshot.scan(Table.META, prefix, start=start, reverse=True)]
                assert forth == [key for key in within if key >= start]
                assert back == [key for key in reversed(within) if key <= start]
