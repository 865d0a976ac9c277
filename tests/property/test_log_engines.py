"""Two engines, one history: whatever is done to both logs, they answer alike, step by step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.storage.lmdb_log import LmdbLog
from server.storage.log import Log
from server.storage.memory import MemoryLog
from server.storage.record import COUNTER_MAX, NO_KEY, Draft, Record, Spend
from tsugi.log.v1.record_pb2 import RecordKind

MAP_BYTES = 1 << 30
NOW_US = 1_760_000_000_000_000

# Few of each, so that they meet again: as duplicates, as moved heads, as subjects of several records.
KEYS = [NO_KEY, NO_KEY, *(bytes([i]) * 16 for i in range(1, 7))]
DIGESTS = [bytes([i]) * 16 for i in range(2)]
SUBJECTS = [bytes([100 + i]) * 16 for i in range(4)]
COUNTERS = [bytes([200 + i]) * 16 for i in range(3)]
HEADS = ["", "", "catalog", "role/champion"]
LARGE = [400_000, 700_000, 1_100_000]  # around the megabyte that ends a block


SPENDS = st.builds(
    Spend,
    counter=st.sampled_from(COUNTERS),
    amount=st.one_of(st.integers(0, 5), st.sampled_from([1 << 61, 1 << 62])),
    limit=st.one_of(st.none(), st.integers(0, 40), st.sampled_from([1 << 62, COUNTER_MAX])),
)


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    head = draw(st.sampled_from(HEADS))
    size = draw(st.one_of(st.integers(0, 300), st.integers(0, 300), st.sampled_from(LARGE)))
    return Draft(
        kind=draw(st.sampled_from(RecordKind.values())),
        payload=draw(st.binary(min_size=1, max_size=1)) * size,
        key=draw(st.sampled_from(KEYS)),
        payload_digest=draw(st.sampled_from(DIGESTS)),
        subjects=tuple(draw(st.lists(st.sampled_from(SUBJECTS), max_size=3))),
        head=head,
        expected_head=draw(st.one_of(st.none(), st.integers(0, 12))) if head else None,
        spends=tuple(draw(st.one_of(st.just([]), st.lists(SPENDS, max_size=3)))),
    )


class TwoLogs(RuleBasedStateMachine):
    """The memory engine is the reference; only salts, and with them chains, may differ."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tsugi-log-"))
        self.lmdb = LmdbLog(self.folder, MAP_BYTES)
        self.memory = MemoryLog(self.lmdb.log_id)
        self.wall_us = NOW_US

    def both(self) -> tuple[Log, Log]:
        return self.memory, self.lmdb

    @rule(group=st.lists(drafts(), min_size=1, max_size=6), later_us=st.integers(-2_000_000, 2_000_000))
    def append(self, group: list[Draft], later_us: int) -> None:
        self.wall_us += later_us
        wanted, got = (log.append(group, self.wall_us) for log in self.both())
        assert got == wanted

    @rule(small=drafts(), n_drafts=st.integers(200, 256))
    def append_large_group(self, small: Draft, n_drafts: int) -> None:
        plain = small._replace(payload=small.payload[:5_000], key=NO_KEY)
        wanted, got = (log.append([plain] * n_drafts, self.wall_us) for log in self.both())
        assert got == wanted

    @rule(idle_us=st.integers(0, 2_000_000), later_us=st.integers(0, 2_000_000))
    def tick(self, idle_us: int, later_us: int) -> None:
        self.wall_us += later_us
        wanted, got = (log.tick(self.wall_us, idle_us) for log in self.both())
        assert got == wanted

    @rule(back=st.integers(-3, 600), records_max=st.integers(0, 600))
    def read(self, back: int, records_max: int) -> None:
        from_lsn = self.memory.tail().lsn - back
        wanted, got = (log.read(from_lsn, records_max) for log in self.both())
        assert list(map(_without_chain, got)) == list(map(_without_chain, wanted))
        one, other = (log.get(from_lsn) for log in self.both())
        assert (one is None) == (other is None)

    @rule()
    def compact(self) -> None:
        self.lmdb.compact()

    @rule()
    def reopen(self) -> None:
        self.lmdb.close()
        self.lmdb = LmdbLog(self.folder, MAP_BYTES)
        assert self.lmdb.log_id == self.memory.log_id

    @invariant()
    def places_are_equal(self) -> None:
        one, other = (log.tail() for log in self.both())
        assert other[:2] == one[:2]
        for key in KEYS:
            assert self.lmdb.find(key) == self.memory.find(key)
        for subject in SUBJECTS:
            assert self.lmdb.about(subject) == self.memory.about(subject)
        for head in HEADS[2:]:
            assert self.lmdb.head(head) == self.memory.head(head)
        assert self.lmdb.spent(COUNTERS) == self.memory.spent(COUNTERS)

    def teardown(self) -> None:
        if hasattr(self, "lmdb"):
            assert self.lmdb.verify() == self.lmdb.tail()
            assert self.memory.verify() == self.memory.tail()
            self.lmdb.close()
            shutil.rmtree(self.folder)


def _without_chain(record: Record) -> Record:
    return record._replace(chain=b"")


TwoLogs.TestCase.settings = settings(max_examples=max(1, settings().max_examples // 4), stateful_step_count=25)
test_lmdb_answers_as_memory_does = pytest.mark.slow(TwoLogs.TestCase)
