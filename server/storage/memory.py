"""Log and store in memory: the reference both port contracts are read against, and the engine of unit tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from server.storage.log import GROUP_RECORDS_MAX, READ_RECORDS_MAX, Fate, KeyEntry, Receipt, Tail
from server.storage.record import (
    CHAIN_START,
    COUNTER_MAX,
    NO_KEY,
    Claim,
    Draft,
    Record,
    body_of,
    seal,
    tombstone,
    unseal,
)
from server.storage.store import Table
from tsugi.log.v1.record_pb2 import RecordKind


class MemoryLog:
    """A log that lasts as long as its process."""

    def __init__(self, log_id: bytes = bytes(16)) -> None:
        self._log_id = log_id
        self._records: list[bytes] = []
        self._keys: dict[bytes, KeyEntry] = {}
        self._heads: dict[str, int] = {}
        self._subjects: dict[bytes, list[int]] = {}
        self._counters: dict[bytes, int] = {}
        self._tail = Tail(0, 0, CHAIN_START)

    @property
    def log_id(self) -> bytes:
        """See Log."""
        return self._log_id

    def append(self, drafts: Sequence[Draft], wall_us: int) -> list[Receipt]:
        """See Log."""
        assert 1 <= len(drafts) <= GROUP_RECORDS_MAX, "the committer bounds a group"
        salts = range(len(self._records), len(self._records) + len(drafts))
        bodies = [body_of(draft, salt.to_bytes(16, "little")) for draft, salt in zip(drafts, salts, strict=True)]
        return [self._append_one(draft, *body, wall_us) for draft, body in zip(drafts, bodies, strict=True)]

    def tick(self, wall_us: int, idle_us_min: int) -> bool:
        """See Log."""
        if wall_us - self._tail.time_us < idle_us_min:
            return False
        self.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], wall_us)
        return True

    def read(self, from_lsn: int, records_max: int = READ_RECORDS_MAX) -> list[Record]:
        """See Log."""
        first = max(from_lsn, 1) - 1
        return [unseal(data) for data in self._records[first : first + records_max]]

    def get(self, lsn: int) -> Record | None:
        """See Log."""
        return unseal(self._records[lsn - 1]) if 1 <= lsn <= len(self._records) else None

    def find(self, key: bytes) -> KeyEntry | None:
        """See Log."""
        return self._keys.get(key)

    def about(self, subject: bytes) -> list[int]:
        """See Log."""
        return list(self._subjects.get(subject, ()))

    def head(self, name: str) -> int:
        """See Log."""
        return self._heads.get(name, 0)

    def spent(self, counters: Sequence[bytes]) -> list[int]:
        """See Log."""
        return [self._counters.get(counter, 0) for counter in counters]

    def tail(self) -> Tail:
        """See Log."""
        return self._tail

    def erase(self, lsns: Sequence[int]) -> int:
        """See Log."""
        wanted = sorted(set(lsns))
        assert not wanted or (wanted[0] >= 1 and wanted[-1] <= len(self._records)), (
            "only what was recorded can be erased"
        )
        assert not set(wanted) & set(self._heads.values()), "a record in force is not erased"
        n_erased = 0
        for lsn in wanted:
            record = unseal(self._records[lsn - 1])
            for subject in dict.fromkeys(record.subjects):
                self._subjects[subject].remove(lsn)
            self._records[lsn - 1] = tombstone(self._records[lsn - 1])
            n_erased += not record.is_tombstone
        return n_erased

    def verify(self) -> Tail:
        """See Log."""
        chain = CHAIN_START
        for data in self._records:
            chain = unseal(data, 0, chain).chain
        return self._tail

    def close(self) -> None:
        """See Log."""

    def _append_one(self, draft: Draft, body: bytes, digest: bytes, wall_us: int) -> Receipt:
        time_us = max(self._tail.time_us, wall_us)
        if draft.key != NO_KEY and (entry := self._keys.get(draft.key)):
            same = entry.payload_digest == draft.payload_digest
            return Receipt(Fate.DUPLICATE if same else Fate.KEY_REUSED, entry.lsn, time_us)
        if draft.expected_head is not None and (head := self.head(draft.head)) != draft.expected_head:
            return Receipt(Fate.HEAD_MOVED, head, time_us)
        for number, claim in enumerate(draft.claims):
            if self._n_counted(claim, time_us) >= claim.count_max:
                return Receipt(Fate.CLAIM_REFUSED, number, time_us)
        totals: dict[bytes, int] = {}
        for number, spend in enumerate(draft.spends):
            total = totals.get(spend.counter, self._counters.get(spend.counter, 0)) + spend.amount
            if spend.limit is not None and total > spend.limit:
                return Receipt(Fate.SPEND_REFUSED, number, time_us)
            totals[spend.counter] = min(total, COUNTER_MAX)
        lsn = self._tail.lsn + 1
        data, chain = seal(
            draft, body, digest, log_id=self._log_id, lsn=lsn, time_us=time_us, previous_chain=self._tail.chain
        )
        self._records.append(data)
        self._counters.update(totals)
        self._tail = Tail(lsn, time_us, chain)
        if draft.key != NO_KEY:
            self._keys[draft.key] = KeyEntry(lsn, draft.payload_digest)
        if draft.head:
            self._heads[draft.head] = lsn
        for subject in dict.fromkeys(draft.subjects):
            self._subjects.setdefault(subject, []).append(lsn)
        return Receipt(Fate.RECORDED, lsn, time_us)

    def _n_counted(self, claim: Claim, time_us: int) -> int:
        return sum(
            unseal(self._records[lsn - 1]).time_us > time_us - span_us
            for subject, span_us in claim.counted
            for lsn in self._subjects.get(subject, ())
        )


class MemoryStore:
    """A store that lasts as long as its process."""

    def __init__(self) -> None:
        self._tables: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}

    @contextmanager
    def read(self) -> Iterator[_MemoryTransaction]:
        """See Store."""
        yield _MemoryTransaction({table: dict(rows) for table, rows in self._tables.items()})

    @contextmanager
    def write(self) -> Iterator[_MemoryTransaction]:
        """See Store."""
        tables = {table: dict(rows) for table, rows in self._tables.items()}
        yield _MemoryTransaction(tables)
        self._tables = tables

    def close(self) -> None:
        """See Store."""


class _MemoryTransaction:
    def __init__(self, tables: dict[Table, dict[bytes, bytes]]) -> None:
        self._tables = tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        return self._tables[table].get(key)

    def scan(
        self, table: Table, prefix: bytes = b"", *, start: bytes = b"", reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        rows = self._tables[table]
        for key in sorted((key for key in rows if key.startswith(prefix)), reverse=reverse):
            if not start or (key <= start if reverse else key >= start):
                yield key, rows[key]

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        assert 1 <= len(key) <= 511, "keys are 1 to 511 bytes on every engine"
        self._tables[table][key] = value

    def delete(self, table: Table, key: bytes) -> bool:
        return self._tables[table].pop(key, None) is not None
