"""What every log engine promises; read beside the docstrings of server/storage/log.py, which this makes executable."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.storage import lmdb_log
from server.storage.generations import is_made
from server.storage.lmdb_log import SCHEMA_MAX, LmdbLog, SchemaTooNewError
from server.storage.log import GROUP_RECORDS_MAX, Fate, Log, LogFullError, LogUnavailableError, follow
from server.storage.memory import MemoryLog
from server.storage.record import AMOUNT_MAX, COUNTER_MAX, SPENDS_MAX, Claim, CorruptRecordError, Draft, Record, Spend
from tests.support.damage import editing
from tests.support.faults import WAIT_S_MAX
from tests.support.writers import LIMITED, UNLIMITED
from tsugi.log.v1.record_pb2 import RecordKind

MAP_BYTES = 1 << 28
NOW_US = 1_760_000_000_000_000
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["memory", "lmdb"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    engine: Log = MemoryLog() if request.param == "memory" else LmdbLog(tmp_path / "log", MAP_BYTES)
    yield engine
    engine.close()


@pytest.fixture
def open_lmdb(tmp_path: Path) -> Iterator[Callable[[], LmdbLog]]:
    """Gives a function that opens the same LMDB log again, closing it where it is open."""
    opened: list[LmdbLog] = []

    def reopen() -> LmdbLog:
        for log in opened:
            log.close()
        opened[:] = [LmdbLog(tmp_path / "log", MAP_BYTES)]
        return opened[0]

    yield reopen
    for log in opened:
        log.close()


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def draft(number: int, payload: bytes = b"", **more: object) -> Draft:
    fields = {
        "kind": RecordKind.RECORD_KIND_OUTCOME,
        "payload": payload or b"payload %d" % number,
        "key": key_of(number),
    }
    return Draft(**(fields | more))  # type: ignore[arg-type]  # each test states its fields by name


def fates(log: Log, *drafts: Draft, wall_us: int = NOW_US) -> list[tuple[Fate, int]]:
    return [(receipt.fate, receipt.lsn) for receipt in log.append(drafts, wall_us)]


def test_empty_log_has_nothing(log: Log) -> None:
    assert log.tail().lsn == log.tail().time_us == 0
    assert log.read(1) == []
    assert log.get(1) is None
    assert log.find(key_of(1)) is None
    assert log.about(key_of(1)) == []
    assert log.head("catalog") == 0
    assert log.verify() == log.tail()
    assert len(log.log_id) == 16


def test_lsns_are_consecutive_in_the_order_given_and_records_come_back_as_drafted(log: Log) -> None:
    drafts = [draft(i, payload_digest=key_of(100 + i), subjects=(key_of(200 + i), key_of(300))) for i in range(1, 8)]
    receipts = [*log.append(drafts[:3], NOW_US), *log.append(drafts[3:], NOW_US + 5)]
    assert [receipt.lsn for receipt in receipts] == [1, 2, 3, 4, 5, 6, 7]
    assert [receipt.time_us for receipt in receipts] == [NOW_US] * 3 + [NOW_US + 5] * 4
    for lsn, (written, record) in enumerate(zip(drafts, log.read(1), strict=True), start=1):
        assert record.lsn == lsn
        assert (record.kind, record.payload, record.key) == (written.kind, written.payload, written.key)
        assert (record.payload_digest, record.subjects) == (written.payload_digest, written.subjects)
        assert record.time_us == receipts[lsn - 1].time_us
        assert not record.is_tombstone
        assert log.get(lsn) == record
    assert log.tail() == (7, NOW_US + 5, log.read(7)[0].chain)


def test_same_key_and_payload_is_a_duplicate_of_the_first_in_any_later_group(log: Log) -> None:
    assert fates(log, draft(1), draft(2)) == [(Fate.RECORDED, 1), (Fate.RECORDED, 2)]
    assert fates(log, draft(2), draft(3), draft(1)) == [(Fate.DUPLICATE, 2), (Fate.RECORDED, 3), (Fate.DUPLICATE, 1)]
    assert log.tail().lsn == 3


def test_same_key_twice_in_one_group_is_recorded_once(log: Log) -> None:
    assert fates(log, draft(1), draft(1), draft(2)) == [(Fate.RECORDED, 1), (Fate.DUPLICATE, 1), (Fate.RECORDED, 2)]
    assert [record.key for record in log.read(1)] == [key_of(1), key_of(2)]


def test_same_key_with_another_payload_is_refused_and_the_first_stands(log: Log) -> None:
    first = draft(1, b"first", payload_digest=key_of(10))
    second = draft(1, b"second", payload_digest=key_of(11))
    assert fates(log, first, second) == [(Fate.RECORDED, 1), (Fate.KEY_REUSED, 1)]
    assert fates(log, second, first) == [(Fate.KEY_REUSED, 1), (Fate.DUPLICATE, 1)]
    assert [record.payload for record in log.read(1)] == [b"first"]
    assert log.find(key_of(1)) == (1, key_of(10))


def test_drafts_without_a_key_are_never_duplicates(log: Log) -> None:
    anonymous = Draft(RecordKind.RECORD_KIND_TICK, b"")
    assert fates(log, anonymous, anonymous) == [(Fate.RECORDED, 1), (Fate.RECORDED, 2)]
    assert log.find(anonymous.key) is None


def test_refused_draft_takes_no_lsn_and_leaves_no_trace(log: Log) -> None:
    log.append([draft(1, head="catalog")], NOW_US)
    refused = [
        draft(2, subjects=(key_of(9),), head="catalog", expected_head=7),
        draft(1, b"other", payload_digest=key_of(5), subjects=(key_of(9),), head="catalog"),
    ]
    assert fates(log, *refused, draft(3)) == [(Fate.HEAD_MOVED, 1), (Fate.KEY_REUSED, 1), (Fate.RECORDED, 2)]
    assert log.about(key_of(9)) == []
    assert log.find(key_of(2)) is None
    assert log.head("catalog") == 1


def test_group_of_refused_drafts_alone_changes_nothing_but_says_the_time(log: Log) -> None:
    log.append([draft(1)], NOW_US)
    before = log.tail()
    (receipt,) = log.append([draft(1)], NOW_US + 7)
    assert receipt == (Fate.DUPLICATE, 1, NOW_US + 7)
    assert log.tail() == before


def test_head_is_compared_and_set_also_within_the_group(log: Log) -> None:
    first = draft(1, head="role/champion", expected_head=0)
    stale = draft(2, head="role/champion", expected_head=0)
    next_one = draft(3, head="role/champion", expected_head=1)
    whoever = draft(4, head="role/champion")
    other = draft(5, head="catalog", expected_head=0)
    assert fates(log, first, stale, next_one, whoever, other) == [
        (Fate.RECORDED, 1),
        (Fate.HEAD_MOVED, 1),
        (Fate.RECORDED, 2),
        (Fate.RECORDED, 3),
        (Fate.RECORDED, 4),
    ]
    assert (log.head("role/champion"), log.head("catalog"), log.head("never")) == (3, 4, 0)
    assert fates(log, stale) == [(Fate.HEAD_MOVED, 3)]


def test_repeated_change_is_a_duplicate_even_where_its_head_has_moved(log: Log) -> None:
    change = draft(1, head="catalog", expected_head=0)
    log.append([change, draft(2, head="catalog")], NOW_US)
    assert fates(log, change) == [(Fate.DUPLICATE, 1)]


def test_log_time_never_goes_back_with_the_clock(log: Log) -> None:
    log.append([draft(1)], NOW_US)
    log.append([draft(2)], NOW_US - 3_600_000_000)
    (receipt,) = log.append([draft(3)], NOW_US + 1)
    assert receipt.time_us == NOW_US + 1
    assert [record.time_us for record in log.read(1)] == [NOW_US, NOW_US, NOW_US + 1]


def test_tick_is_recorded_when_idle_and_only_then(log: Log) -> None:
    log.append([draft(1)], NOW_US)
    assert not log.tick(NOW_US + 999, 1_000)
    assert not log.tick(NOW_US - 1_000_000, 1_000)
    assert log.tick(NOW_US + 1_000, 1_000)
    assert not log.tick(NOW_US + 1_999, 1_000)
    (tick,) = log.read(2)
    assert (tick.kind, tick.payload, tick.time_us) == (RecordKind.RECORD_KIND_TICK, b"", NOW_US + 1_000)


def test_record_is_found_by_each_subject_once(log: Log) -> None:
    anna, berta = key_of(1000), key_of(1001)
    log.append([draft(1, subjects=(anna,)), draft(2), draft(3, subjects=(berta, anna, anna))], NOW_US)
    log.append([draft(4, subjects=(berta,))], NOW_US)
    assert log.about(anna) == [1, 3]
    assert log.about(berta) == [3, 4]
    assert log.about(key_of(1002)) == []


def test_claim_is_granted_so_often_within_its_span_and_no_oftener(log: Log) -> None:
    one, other = b"s" * 16, b"t" * 16
    twice = Claim(counted=((one, 100), (other, 10)), count_max=2)

    def taking(number: int, subject: bytes = one) -> Draft:
        return draft(number)._replace(subjects=(subject,), claims=(twice,))

    first = log.append([taking(0), taking(1), taking(2)], NOW_US)
    assert [receipt.fate for receipt in first] == [Fate.RECORDED, Fate.RECORDED, Fate.CLAIM_REFUSED], "within a group"
    assert log.append([taking(2)], NOW_US + 99)[0].fate is Fate.CLAIM_REFUSED, "each counts until its span is over"
    assert log.append([taking(2, other)], NOW_US + 100)[0].fate is Fate.RECORDED
    assert log.append([taking(3)], NOW_US + 109)[0].fate is Fate.RECORDED, "one counted, the other counts no more"
    assert log.append([taking(4)], NOW_US + 109)[0].fate is Fate.CLAIM_REFUSED
    assert log.append([draft(5)._replace(subjects=(one,))], NOW_US + 109)[0].fate is Fate.RECORDED, "who claims nothing"
    assert log.tail().lsn == 5


def test_refused_claim_is_named_and_leaves_no_trace(log: Log) -> None:
    free, full = Claim(((b"f" * 16, 100),), 1), Claim(((b"s" * 16, 100),), 1)
    log.append([draft(0)._replace(subjects=(b"s" * 16,), claims=(full,))], NOW_US)
    asked = draft(1)._replace(subjects=(b"f" * 16, b"s" * 16), claims=(free, full))
    (receipt,) = log.append([asked], NOW_US)
    assert (receipt.fate, receipt.lsn) == (Fate.CLAIM_REFUSED, 1)
    assert log.find(asked.key) is None
    assert log.about(b"f" * 16) == []
    assert log.append([asked._replace(claims=(free,))], NOW_US)[0].fate is Fate.RECORDED


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 60), st.integers(0, 30)), max_size=30))
def test_claims_are_those_of_a_recount(asked: list[tuple[int, int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        logs: list[Log] = [MemoryLog(), LmdbLog(Path(folder) / "log", MAP_BYTES)]
        taken: list[tuple[bytes, int]] = []
        now_us = NOW_US
        for number, (who, count_max, span_us, later_us) in enumerate(asked):
            now_us += later_us
            subject = bytes([who]) * 16
            claim = Claim(((subject, span_us),), count_max)
            is_free = sum(each == subject and now_us - at_us < span_us for each, at_us in taken) < count_max
            for each in logs:
                (receipt,) = each.append([draft(number)._replace(subjects=(subject,), claims=(claim,))], now_us)
                assert receipt.fate is (Fate.RECORDED if is_free else Fate.CLAIM_REFUSED)
            if is_free:
                taken.append((subject, now_us))
        logs[1].close()


BUDGET, OTHER_BUDGET = b"one budget today", b"another one's 16"


def spending(number: int, *spends: Spend, **more: object) -> Draft:
    return draft(number, b"", spends=spends, **more)


def test_budget_is_spent_to_its_limit_and_no_further(log: Log) -> None:
    assert log.spent([BUDGET]) == [0]
    group = [spending(i, Spend(BUDGET, amount, 10)) for i, amount in enumerate((4, 5, 2, 1, 1), 1)]
    assert [receipt.fate for receipt in log.append(group, NOW_US)] == [
        Fate.RECORDED,
        Fate.RECORDED,
        Fate.SPEND_REFUSED,  # drafts see what the earlier ones of their group spent
        Fate.RECORDED,
        Fate.SPEND_REFUSED,
    ]
    assert log.spent([OTHER_BUDGET, BUDGET, BUDGET]) == [0, 10, 10]
    assert log.spent([]) == []
    assert fates(log, spending(6, Spend(BUDGET, 1, 10))) == [(Fate.SPEND_REFUSED, 0)]
    assert fates(log, spending(7, Spend(BUDGET, 0, 10))) == [(Fate.RECORDED, 4)]
    assert fates(log, spending(8, Spend(BUDGET, 1, 11))) == [(Fate.RECORDED, 5)], "a limit that was raised"
    assert fates(log, spending(9, Spend(BUDGET, 0, 10))) == [(Fate.SPEND_REFUSED, 0)], "a limit that was lowered"
    assert log.spent([BUDGET]) == [11]


def test_what_has_no_limit_is_counted_whatever_it_comes_to(log: Log) -> None:
    told = [spending(i, Spend(BUDGET, i, None), Spend(OTHER_BUDGET, 1, None)) for i in range(1, 101)]
    log.append(told[:60], NOW_US)
    assert log.spent([BUDGET, OTHER_BUDGET]) == [1_830, 60]
    log.append([*told[60:], draft(200)], NOW_US)
    assert log.spent([BUDGET, OTHER_BUDGET]) == [5_050, 100]
    assert fates(log, spending(201, Spend(BUDGET, 1, 5_050))) == [(Fate.SPEND_REFUSED, 0)]


def test_spends_of_one_draft_from_one_counter_add_up(log: Log) -> None:
    twice = (Spend(BUDGET, 3, 6), Spend(BUDGET, 3, 6))
    assert fates(log, spending(1, *twice, Spend(BUDGET, 1, 6))) == [(Fate.SPEND_REFUSED, 2)]
    assert log.spent([BUDGET]) == [0]
    assert fates(log, spending(2, *twice), spending(3, Spend(BUDGET, 1, 6))) == [
        (Fate.RECORDED, 1),
        (Fate.SPEND_REFUSED, 0),
    ]
    assert fates(log, spending(4, Spend(BUDGET, 5, None), Spend(BUDGET, 5, None))) == [(Fate.RECORDED, 2)]
    assert log.spent([BUDGET]) == [16]


def test_refused_spend_is_named_and_leaves_no_trace(log: Log) -> None:
    fits, over = Spend(BUDGET, 1, 1), Spend(OTHER_BUDGET, 2, 1)
    asked = spending(1, fits, over, subjects=(key_of(9),), head="catalog")
    assert fates(log, asked) == [(Fate.SPEND_REFUSED, 1)]
    assert log.spent([BUDGET, OTHER_BUDGET]) == [0, 0]
    assert log.find(asked.key) is None
    assert (log.about(key_of(9)), log.head("catalog"), log.tail().lsn) == ([], 0, 0)
    assert fates(log, asked._replace(spends=(fits,))) == [(Fate.RECORDED, 1)]
    assert log.spent([BUDGET]) == [1]


@pytest.mark.parametrize("limit", [None, 100])
def test_only_what_is_recorded_spends(log: Log, limit: int | None) -> None:
    spend = Spend(BUDGET, 1, limit)
    once = spending(1, spend, payload_digest=key_of(10))
    log.append([once], NOW_US)
    refused = [
        once,
        once._replace(payload_digest=key_of(11)),
        spending(2, spend, head="catalog", expected_head=7),
        spending(3, spend, claims=(Claim(((key_of(9), 100),), 1),)),
        spending(4, spend),
        spending(4, spend),
    ]
    log.append([draft(5, subjects=(key_of(9),))], NOW_US)
    assert [receipt.fate for receipt in log.append(refused, NOW_US)] == [
        Fate.DUPLICATE,
        Fate.KEY_REUSED,
        Fate.HEAD_MOVED,
        Fate.CLAIM_REFUSED,
        Fate.RECORDED,
        Fate.DUPLICATE,
    ]
    assert log.spent([BUDGET]) == [2]


def test_duplicate_is_one_even_where_its_budget_is_spent(log: Log) -> None:
    last = spending(1, Spend(BUDGET, 1, 1))
    assert fates(log, last, last) == [(Fate.RECORDED, 1), (Fate.DUPLICATE, 1)]
    assert fates(log, last) == [(Fate.DUPLICATE, 1)]


def test_counter_stays_at_its_largest_value(log: Log) -> None:
    most = Spend(BUDGET, AMOUNT_MAX, None)
    log.append([spending(1, most), spending(2, most)], NOW_US)
    assert log.spent([BUDGET]) == [COUNTER_MAX]
    log.append([spending(3, most, most, most), spending(4, Spend(BUDGET, 0, COUNTER_MAX))], NOW_US)
    assert fates(log, spending(5, Spend(BUDGET, 1, COUNTER_MAX))) == [(Fate.SPEND_REFUSED, 0)]
    assert log.spent([BUDGET]) == [COUNTER_MAX]


def test_erasing_gives_nothing_back(log: Log) -> None:
    log.append([spending(1, Spend(BUDGET, 3, 5), subjects=(key_of(9),))], NOW_US)
    log.erase([1])
    assert log.spent([BUDGET]) == [3]
    assert fates(log, spending(2, Spend(BUDGET, 3, 5))) == [(Fate.SPEND_REFUSED, 0)]


def test_spends_out_of_bounds_are_the_programmers_fault(log: Log) -> None:
    unsound = [
        (Spend(BUDGET[1:], 1, None),),
        (Spend(BUDGET, -1, None),),
        (Spend(BUDGET, AMOUNT_MAX + 1, None),),
        (Spend(BUDGET, 1, -1),),
        (Spend(BUDGET, 1, COUNTER_MAX + 1),),
        (Spend(BUDGET, 1, None),) * (SPENDS_MAX + 1),
    ]
    for spends in unsound:
        with pytest.raises(AssertionError, match="bounds budgets"):
            log.append([spending(1, Spend(BUDGET, 1, None)), spending(2, *spends)], NOW_US)
    assert (log.spent([BUDGET]), log.tail().lsn) == ([0], 0)


def test_groups_of_one_to_256_drafts_are_taken_and_no_others(log: Log) -> None:
    assert len(log.append([draft(i) for i in range(1, GROUP_RECORDS_MAX + 1)], NOW_US)) == 256
    for group in ([], [draft(1000 + i) for i in range(GROUP_RECORDS_MAX + 1)]):
        with pytest.raises(AssertionError, match="bounds a group"):
            log.append(group, NOW_US)
    assert log.tail().lsn == 256


def test_group_is_recorded_whole_or_not_at_all(log: Log) -> None:
    before = log.tail()
    too_many_subjects = draft(2, subjects=tuple(map(key_of, range(1, 34))))
    with pytest.raises(AssertionError, match="bounds identities"):
        log.append([draft(1), too_many_subjects], NOW_US)
    assert log.tail() == before
    assert log.find(key_of(1)) is None


def test_reads_cross_blocks_of_any_size_without_a_gap(log: Log) -> None:
    # Blocks end at 1 MiB: within a group, at its end, and around records that are larger than a block.
    sizes = [10, 600_000, 600_000, 10, 2_000_000, 10, 300_000, 300_000, 400_000, 70_000]
    payloads = [bytes([i]) * size for i, size in enumerate(sizes)]
    log.append([draft(i, payload) for i, payload in enumerate(payloads, 1)], NOW_US)
    log.append([draft(100 + i) for i in range(GROUP_RECORDS_MAX)], NOW_US)
    log.append([draft(1000)], NOW_US)
    last = len(sizes) + 257
    assert [record.payload for record in log.read(1, len(sizes))] == payloads
    for from_lsn in (-1, 0, 1, 2, 5, 6, len(sizes) + 1, last - 1, last, last + 1, last + 1000, 1 << 80):
        for records_max in (0, 1, 3, 4_096):
            want = range(max(from_lsn, 1), min(max(from_lsn, 1) + records_max, last + 1))
            assert [record.lsn for record in log.read(from_lsn, records_max)] == list(want)
    for lsn in range(-1, last + 3):
        record = log.get(lsn)
        assert (record.lsn if record else None) == (lsn if 1 <= lsn <= last else None)
    assert log.get(1 << 80) is None
    assert log.verify() == log.tail()


def test_follow_yields_everything_to_the_present_end(log: Log) -> None:
    for first in range(1, 5_000, 250):
        log.append([draft(i) for i in range(first, first + 250)], NOW_US)
    assert [record.lsn for record in follow(log, 700)] == list(range(700, 5_001))


def test_erased_record_is_a_tombstone_and_all_others_stand(log: Log) -> None:
    anna, berta = key_of(1000), key_of(1001)
    log.append([draft(1, subjects=(anna,)), draft(2, subjects=(berta, anna)), draft(3, subjects=(berta,))], NOW_US)
    log.append([draft(4, subjects=(anna, anna), payload_digest=key_of(9)), draft(5)], NOW_US + 1)
    before, tail = log.read(1), log.tail()
    assert log.erase([4, 2]) == 2
    for record, old in zip(log.read(1), before, strict=True):
        if record.lsn in {2, 4}:
            assert record == old._replace(
                payload=b"", key=bytes(16), payload_digest=bytes(16), subjects=(), is_tombstone=True
            )
        else:
            assert record == old
        assert log.get(record.lsn) == record
    assert log.verify() == log.tail() == tail
    assert (log.about(anna), log.about(berta)) == ([1], [3])


def test_request_whose_record_was_erased_is_known_for_ever(log: Log) -> None:
    log.append([draft(1, payload_digest=key_of(9)), draft(2)], NOW_US)
    log.erase([1])
    assert log.find(key_of(1)) == (1, key_of(9))
    assert fates(log, draft(1, payload_digest=key_of(9))) == [(Fate.DUPLICATE, 1)]
    assert fates(log, draft(1, b"other", payload_digest=key_of(8)), draft(3)) == [
        (Fate.KEY_REUSED, 1),
        (Fate.RECORDED, 3),
    ]
    assert log.verify().lsn == 3


def test_erasing_again_erases_only_what_is_new(log: Log) -> None:
    log.append([draft(i) for i in range(1, 9)], NOW_US)
    assert log.erase([]) == 0
    assert log.erase([7, 3, 3]) == 2
    assert log.erase([3, 7]) == 0
    assert log.erase(range(1, 9)) == 6
    assert log.erase(range(1, 9)) == 0
    assert all(record.is_tombstone for record in log.read(1))
    assert log.verify() == log.tail()


def test_any_number_of_records_in_blocks_of_any_size_is_erased(log: Log) -> None:
    sizes = [10, 600_000, 600_000, 10, 2_000_000, 10, 300_000, 900_000]
    log.append([draft(i, bytes(size), subjects=(key_of(9),)) for i, size in enumerate(sizes, 1)], NOW_US)
    for first in range(1_000, 1_600, 200):
        log.append([draft(first + i, subjects=(key_of(9),)) for i in range(200)], NOW_US)
    log.append([draft(2_000)], NOW_US)
    kept = {1, 4, 300}
    assert log.erase([lsn for lsn in reversed(log.about(key_of(9))) if lsn not in kept]) == 605
    assert log.about(key_of(9)) == sorted(kept)
    assert {record.lsn for record in log.read(1) if not record.is_tombstone} == {*kept, 609}
    assert log.verify().lsn == 609


def test_what_is_not_recorded_or_in_force_is_never_erased(log: Log) -> None:
    log.append([draft(1), draft(2, head="catalog"), draft(3, head="catalog")], NOW_US)
    for lsns in ([0], [1, 4], [-1, 2]):
        with pytest.raises(AssertionError, match="only what was recorded"):
            log.erase(lsns)
    with pytest.raises(AssertionError, match="in force"):
        log.erase([1, 3])
    assert not any(record.is_tombstone for record in log.read(1))


def test_no_transaction_erases_more_than_64_records(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    log.append([draft(i) for i in range(1, 201)], NOW_US)
    n_transactions = log._env.info()["last_txnid"]
    assert log.erase(range(1, 131)) == 130
    assert log._env.info()["last_txnid"] - n_transactions == 3


def test_erasing_a_damaged_record_is_refused_and_says_which(open_lmdb: Callable[[], LmdbLog], tmp_path: Path) -> None:
    log = open_lmdb()
    for first in (1, 5, 9):
        log.append([draft(first + i, subjects=(key_of(900),)) for i in range(4)], NOW_US)
    log.close()
    with editing(tmp_path / "log") as tables:
        tables.txn.delete((5).to_bytes(8, "big"), db=tables.blocks)
        last = bytearray(tables.txn.get((9).to_bytes(8, "big"), db=tables.blocks) or b"")
        last[-1] ^= 1
        tables.txn.put((9).to_bytes(8, "big"), bytes(last), db=tables.blocks)
    log = open_lmdb()
    for lsns, fault in (([2, 5, 7], "record 5 is missing"), ([12], "CRC32C")):
        with pytest.raises(CorruptRecordError, match=fault):
            log.erase(lsns)
    assert log.about(key_of(900)) == list(range(1, 13))
    assert log.erase([1, 4, 9, 10]) == 4  # the neighbours of a damaged one are not harmed


def test_compacted_log_is_the_same_log(open_lmdb: Callable[[], LmdbLog], tmp_path: Path) -> None:
    log = open_lmdb()
    log.append([draft(i, bytes(100_000), subjects=(key_of(900),)) for i in range(1, 101)], NOW_US)
    log.append([draft(101, head="catalog"), draft(102, head="role/champion", subjects=(key_of(901),))], NOW_US + 3)
    log.erase([5, 50])
    n_before = (tmp_path / "log" / "data.mdb").stat().st_size

    def seen() -> object:
        log.verify()
        about = log.about(key_of(900)), log.about(key_of(901))
        heads = log.head("catalog"), log.head("role/champion"), log.head("never")
        return log.log_id, log.tail(), log.read(1), about, heads, [log.find(key_of(i)) for i in range(104)]

    before = seen()
    for generation in (1, 2, 3):
        log.compact()
        assert seen() == before
        assert [path.name for path in (tmp_path / "log").glob("0*")] == [f"{generation:010d}"]
        assert not (tmp_path / "log" / "data.mdb").exists()
    assert (tmp_path / "log" / "0000000003" / "data.mdb").stat().st_size < n_before
    log = open_lmdb()
    assert seen() == before
    assert fates(log, draft(5), draft(103)) == [(Fate.DUPLICATE, 5), (Fate.RECORDED, 103)]
    assert open_lmdb().verify().lsn == 103


def test_log_is_said_to_be_there_once_it_is_made_in_whatever_generation(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    assert not is_made(folder)
    folder.mkdir()
    assert not is_made(folder)
    log = LmdbLog(folder, MAP_BYTES)
    assert is_made(folder)
    log.compact()
    assert is_made(folder)
    log.close()


def test_empty_log_is_compacted_and_begun(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    log_id = log.log_id
    log.compact()
    assert fates(log, draft(1)) == [(Fate.RECORDED, 1)]
    assert open_lmdb().log_id == log_id


def test_files_of_a_compaction_are_let_go_by_who_only_keeps_house(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    idle = log._generations.now
    log.compact()
    log._generations.now = idle  # as in a process that has made no call since
    log.check_readers()
    assert log._generations.now.number == 1


def test_log_of_a_later_build_is_refused_in_any_generation(open_lmdb: Callable[[], LmdbLog], tmp_path: Path) -> None:
    log = open_lmdb()
    log.compact()
    log.close()
    with editing(tmp_path / "log") as tables:
        tables.txn.put(b"schema", (SCHEMA_MAX + 1).to_bytes(8, "big"), db=tables.meta)
    for writable in (True, False):
        with pytest.raises(SchemaTooNewError, match=f"schema {SCHEMA_MAX + 1}"):
            LmdbLog(tmp_path / "log", MAP_BYTES, writable=writable)


HISTORIES = st.lists(
    st.one_of(
        st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 30, 3_000, 1_100_000])), min_size=1, max_size=5),
        st.sets(st.integers(1, 30), max_size=8),
        st.just("compact"),
    ),
    max_size=10,
)


@pytest.mark.slow
@given(HISTORIES)
@settings(max_examples=max(1, settings().max_examples // 2))
def test_lmdb_erases_and_compacts_as_memory_forgets(history: list[list[tuple[int, int]] | set[int] | str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tsugi-log-"))
    memory, lmdb_log = MemoryLog(), LmdbLog(folder, MAP_BYTES)
    for step in history:
        if isinstance(step, str):
            lmdb_log.compact()
        elif isinstance(step, set):
            lsns = [lsn for lsn in step if lsn <= memory.tail().lsn]
            assert lmdb_log.erase(lsns) == memory.erase(lsns)
        else:
            group = [draft(number, bytes(size), subjects=(key_of(number % 3),)) for number, size in step]
            assert lmdb_log.append(group, NOW_US) == memory.append(group, NOW_US)
        chainless = [[record._replace(chain=b"") for record in log.read(1)] for log in (memory, lmdb_log)]
        assert chainless[0] == chainless[1]
        for number in range(13):
            assert lmdb_log.find(key_of(number)) == memory.find(key_of(number))
            assert lmdb_log.about(key_of(number)) == memory.about(key_of(number))
    assert lmdb_log.verify()[:2] == memory.verify()[:2]
    lmdb_log.close()
    shutil.rmtree(folder)


def test_reopened_log_is_the_same_log(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    log.append([draft(1, subjects=(key_of(7),), head="catalog"), draft(2)], NOW_US)
    before = (log.log_id, log.tail(), log.read(1))
    log = open_lmdb()
    assert (log.log_id, log.tail(), log.read(1)) == before
    assert fates(log, draft(1), draft(3, head="catalog", expected_head=1)) == [(Fate.DUPLICATE, 1), (Fate.RECORDED, 3)]
    assert log.about(key_of(7)) == [1]
    assert open_lmdb().verify().lsn == 3


def test_two_logs_have_two_ids(tmp_path: Path) -> None:
    first, second = (LmdbLog(tmp_path / name, MAP_BYTES) for name in ("a", "b"))
    assert first.log_id != second.log_id
    first.close()
    second.close()


def test_reader_follows_a_log_that_another_handle_writes(tmp_path: Path) -> None:
    writer = LmdbLog(tmp_path / "log", MAP_BYTES)
    writer.append([draft(1)], NOW_US)
    writer.close()
    reader = LmdbLog(tmp_path / "log", MAP_BYTES, writable=False)
    assert [record.key for record in reader.read(1)] == [key_of(1)]
    with pytest.raises(LogUnavailableError):
        reader.append([draft(2)], NOW_US)
    reader.close()


def test_full_map_refuses_the_group_whole_and_the_log_stays_usable(tmp_path: Path) -> None:
    log = LmdbLog(tmp_path / "log", 1 << 20)
    n_recorded = 0
    with pytest.raises(LogFullError) as caught:
        for i in range(1, 1_000):
            log.append([draft(2 * i, bytes(5_000)), draft(2 * i + 1, bytes(5_000))], NOW_US)
            n_recorded += 2
    assert caught.value.is_map
    assert log.verify().lsn == n_recorded > 0
    assert log.used_share() > 0.7
    assert log.find(key_of(n_recorded + 2)) is None
    log.close()
    larger = LmdbLog(tmp_path / "log", 1 << 22)
    assert fates(larger, draft(n_recorded + 2)) == [(Fate.RECORDED, n_recorded + 1)]
    larger.close()


def test_log_of_a_later_build_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    LmdbLog(tmp_path / "log", MAP_BYTES).close()
    with editing(tmp_path / "log") as tables:
        tables.txn.put(b"schema", (SCHEMA_MAX + 1).to_bytes(8, "big"), db=tables.meta)
        tables.txn.drop(tables.heads)  # a later build may have no such table
    data = (tmp_path / "log" / "data.mdb").read_bytes()
    for writable in (True, False):
        with pytest.raises(SchemaTooNewError, match=f"schema {SCHEMA_MAX + 1}"):
            LmdbLog(tmp_path / "log", MAP_BYTES, writable=writable)
    assert (tmp_path / "log" / "data.mdb").read_bytes() == data


def test_counters_are_those_of_before_when_the_log_is_opened_again(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    log.append([spending(1, Spend(BUDGET, 3, 5)), spending(2, Spend(OTHER_BUDGET, 7, None))], NOW_US)
    log = open_lmdb()
    assert log.spent([BUDGET, OTHER_BUDGET]) == [3, 7]
    assert fates(log, spending(3, Spend(BUDGET, 3, 5)), spending(4, Spend(BUDGET, 2, 5))) == [
        (Fate.SPEND_REFUSED, 0),
        (Fate.RECORDED, 3),
    ]
    assert open_lmdb().spent([BUDGET]) == [5]


def test_counters_survive_compactions_and_what_is_spent_meanwhile(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    n_spent = 0

    def spend() -> None:
        nonlocal n_spent
        n_spent += 1
        log.append([spending(n_spent, Spend(BUDGET, 1, 1_000), Spend(key_of(n_spent), n_spent, None))], NOW_US)

    def at_step(name: str) -> None:
        steps.append(name)
        if name != "mark" and not (name == "sync" and steps.count("sync") == 2):  # there others are kept out
            spend()

    for is_reopened in (False, True, False):  # the first time nothing was spent before
        steps: list[str] = []
        log.compact(at_step)
        spend()
        if is_reopened:
            log = open_lmdb()
        assert log.spent([BUDGET, *map(key_of, range(1, n_spent + 1))]) == [n_spent, *range(1, n_spent + 1)]
    assert n_spent > 20
    assert log.verify().lsn == n_spent


def test_compacted_log_that_nothing_was_spent_in_begins_to_count(open_lmdb: Callable[[], LmdbLog]) -> None:
    log = open_lmdb()
    log.append([draft(1)], NOW_US)
    log.compact()
    assert log.spent([BUDGET]) == [0]
    log.append([spending(2, Spend(BUDGET, 3, None))], NOW_US)
    assert open_lmdb().spent([BUDGET]) == [3]


def test_log_of_an_older_build_is_read_and_begins_to_count(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log = LmdbLog(folder, MAP_BYTES)
    log.append([draft(1)], NOW_US)
    log.close()
    with editing(folder) as tables:  # what lies there is no other than an older build made
        assert tables.txn.get(b"schema", db=tables.meta) == (1).to_bytes(8, "big")
        names = [bytes(name) for name, _ in tables.txn.cursor()]
        assert names == [b"blocks", b"heads", b"keys", b"meta", b"subjects"]
    reader = LmdbLog(folder, MAP_BYTES, writable=False)
    assert reader.spent([BUDGET, OTHER_BUDGET]) == [0, 0]
    with pytest.raises(LogUnavailableError):
        reader.append([spending(2, Spend(BUDGET, 1, None))], NOW_US)
    reader.close()
    log = LmdbLog(folder, MAP_BYTES)
    assert log.spent([BUDGET]) == [0]
    assert fates(log, spending(2, Spend(BUDGET, 3, 5))) == [(Fate.RECORDED, 2)]
    assert log.spent([BUDGET]) == [3]
    log.close()
    reader = LmdbLog(folder, MAP_BYTES, writable=False)
    assert reader.spent([BUDGET]) == [3]
    reader.close()


def test_build_that_knows_no_counters_refuses_a_log_that_has_some(
    open_lmdb: Callable[[], LmdbLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_lmdb().append([draft(1)], NOW_US)
    monkeypatch.setattr(lmdb_log, "SCHEMA_MAX", 1)
    log = open_lmdb()  # as long as nothing was spent there is a way back to it
    log.append([spending(2, Spend(BUDGET, 1, None))], NOW_US)
    log.close()
    with pytest.raises(SchemaTooNewError, match="schema 2"):  # it would compact them away
        LmdbLog(tmp_path / "log", MAP_BYTES)


def test_full_map_refuses_a_spend_with_its_record(tmp_path: Path) -> None:
    log = LmdbLog(tmp_path / "log", 1 << 20)
    n_recorded = 0
    with pytest.raises(LogFullError):
        for i in range(1, 1_000):
            log.append([draft(i, bytes(5_000), spends=(Spend(BUDGET, 1, 1_000 if i % 2 else None),))], NOW_US)
            n_recorded += 1
    assert log.spent([BUDGET]) == [n_recorded] == [log.verify().lsn]
    log.close()


@pytest.mark.slow
def test_threads_that_spend_from_one_budget_while_it_is_compacted_spend_it_exactly(tmp_path: Path) -> None:
    log = LmdbLog(tmp_path / "log", MAP_BYTES)
    n_threads, n_each, limit = 4, 60, 4 * 60 * 2 - 37
    accepted: list[int] = []

    def spend(thread: int) -> None:
        for i in range(n_each):
            amount = 1 + i % 3
            asked = [spending(thread * 1_000 + i, Spend(LIMITED, amount, limit), Spend(UNLIMITED, 1, None))]
            if log.append(asked, NOW_US)[0].fate is Fate.RECORDED:
                accepted.append(amount)
            assert log.spent([LIMITED])[0] <= limit

    with ThreadPoolExecutor(n_threads) as pool:
        running = [pool.submit(spend, thread) for thread in range(n_threads)]
        for _ in range(8):
            log.compact()
        for each in running:
            each.result()
    assert log.spent([LIMITED, UNLIMITED]) == [sum(accepted), len(accepted)]
    assert limit - 3 < sum(accepted) <= limit
    log.close()


@pytest.mark.slow
def test_processes_that_spend_from_one_budget_at_once_never_pass_its_limit(tmp_path: Path) -> None:
    n_writers, n_groups, limit = 3, 30, 900
    LmdbLog(tmp_path / "log", MAP_BYTES).close()
    ledgers = written_by(tmp_path, "spend", n_writers, n_groups, limit)
    told = [(int(amount), fate) for ledger in ledgers for amount, fate in map(str.split, ledger)]
    accepted = [amount for amount, fate in told if fate == "recorded"]
    refused = [amount for amount, fate in told if fate == "spend_refused"]
    assert len(told) == len(accepted) + len(refused)
    assert refused

    log = LmdbLog(tmp_path / "log", MAP_BYTES)
    total, total_unlimited = log.spent([LIMITED, UNLIMITED])
    assert total == sum(accepted) <= limit
    assert total + min(refused) > limit, "nothing was refused that had room"
    assert total_unlimited == total + n_writers * n_groups
    assert sum(int.from_bytes(record.payload, "big") for record in follow(log, 1)) == total
    assert log.verify().lsn == len(accepted) + n_writers * n_groups
    log.close()


@pytest.mark.slow
def test_writers_in_several_processes_share_one_total_order(tmp_path: Path) -> None:
    n_writers, n_groups, n_shared = 3, 40, 20
    LmdbLog(tmp_path / "log", MAP_BYTES).close()
    ledgers = written_by(tmp_path, "append", n_writers, n_groups, n_shared)

    log = LmdbLog(tmp_path / "log", MAP_BYTES)
    records = list(follow(log, 1))
    check_ledgers(log, records, ledgers)
    assert log.verify().lsn == len(records)
    log.close()


def written_by(tmp_path: Path, program: str, n_writers: int, *arguments: int) -> list[list[str]]:
    """Have so many processes write to one log at once; return the lines that each was told."""
    command = [sys.executable, "-m", "tests.support.writers", program, str(tmp_path / "log"), str(MAP_BYTES)]
    writers = [
        subprocess.Popen(
            [*command, str(writer), *map(str, arguments)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for writer in range(n_writers)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    ledgers = [writer.communicate(timeout=WAIT_S_MAX)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * n_writers
    return ledgers


def check_ledgers(log: LmdbLog, records: list[Record], ledgers: list[list[str]]) -> None:
    """Everything acknowledged is there once, where its writer was told, in the order each writer appended."""
    assert [record.lsn for record in records] == list(range(1, len(records) + 1))
    times = [record.time_us for record in records]
    assert times == sorted(times)
    recorded: Counter[str] = Counter()
    for ledger in ledgers:
        own_lsns = []
        for line in ledger:
            key, fate, lsn = line.split()
            entry = log.find(bytes.fromhex(key))
            assert entry is not None
            assert entry.lsn == int(lsn)
            if fate == "recorded":
                recorded[key] += 1
                own_lsns.append(int(lsn))
        assert own_lsns == sorted(own_lsns)
    assert recorded == Counter(record.key.hex() for record in records)
    assert set(recorded.values()) == {1}
    shared = [key for key in recorded if key.startswith("ff")]
    assert len(shared) == 20
    assert sum(line.startswith("ff") for ledger in ledgers for line in ledger) == 60
