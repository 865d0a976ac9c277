"""The store port: projected state by table and key, read by workers, written by the projector alone.

A read sees one committed state throughout; a write commits whole or not at all, together with the applied LSN that
the projector keeps in it. The contract is executable in ``tests/contract/test_store.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol


class Table(Enum):
    """The tables of the state store."""

    META = "meta"  # applied LSN, catalog in force, how far the last sweep came, what layouts of series consist of
    PROFILES = "profiles"  # profile key → flat profile record
    IDENTITIES = "identities"  # identity key → key of the profile it leads to
    NODES = "nodes"  # identity key → StoredNode
    PARTS = "parts"  # identity key → StoredPart
    OWNERS = "owners"  # profile key, also a former one → identity key of the node that begins it
    TIMELINE = "timeline"  # identity key + instant + LSN + serial → tsugi.v1.Touchpoint
    BLOCKS = "blocks"  # block key + identity key → empty: candidates for matching
    REVIEWS = "reviews"  # falling weight + two identity keys → empty: pairs that may be one person
    CONTACTS = "contacts"  # identity key + action → StoredContact
    IMPRESSIONS = "impressions"  # decision LSN + action → empty: this contact is counted
    PARKED = "parked"  # decision key + LSN → empty: an outcome that came before its decision
    SEGMENTS = "segments"  # segment + 0 + profile key → instant entered
    STAGES = "stages"  # profile key → stage of the journey
    COUNTS = "counts"  # what is counted → how many people: all, in a segment, at a stage
    TIMERS = "timers"  # instant + profile key → empty: then something changes by the passing of time
    DUE = "due"  # profile key → the instant of its timer
    SOURCES = "sources"  # source → StoredSource
    ERASURES = "erasures"  # erasure key → StoredErasure
    QUARANTINE = "quarantine"  # LSN → why a record was not applied


class Snapshot(Protocol):
    """One committed state. Values are views into the store and end with it: copy what must live longer."""

    def get(self, table: Table, key: bytes) -> memoryview | bytes | None:
        """Return the value under key. Cost: about 1 µs, page warm."""

    def scan(
        self, table: Table, prefix: bytes = b"", *, start: bytes = b"", reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield copies of all pairs whose key starts with prefix, by key ascending.

        Args:
            table: which.
            prefix: of the keys.
            start: where to begin, a key that starts with prefix, there or not; empty: at the first.
            reverse: by key descending, from start or from the last on.
        """


class Transaction(Snapshot, Protocol):
    """A write that sees itself."""

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Set the value under key; keys are 1 to 511 bytes."""

    def delete(self, table: Table, key: bytes) -> bool:
        """Remove key and say whether it was there."""


class Store(Protocol):
    """What every engine gives."""

    def read(self) -> AbstractContextManager[Snapshot]:
        """Open a short read: milliseconds, never across an await, because it pins old pages."""

    def write(self) -> AbstractContextManager[Transaction]:
        """Open the one write; leaving the block commits, leaving it by an exception discards."""

    def close(self) -> None:
        """Let go of files; nothing may be called afterwards."""
