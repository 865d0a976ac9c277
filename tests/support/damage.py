"""Change stored bytes behind the engine's back, as a failing disk or a forger would."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import lmdb

from server.storage.generations import newest, path_of
from server.storage.record import tombstone

MAP_BYTES = 1 << 28


class Tables(NamedTuple):
    """One open write transaction over the tables of a closed log."""

    environment: lmdb.Environment
    txn: lmdb.Transaction
    blocks: lmdb._Database
    heads: lmdb._Database
    meta: lmdb._Database


@contextmanager
def editing(folder: Path) -> Iterator[Tables]:
    """Open the environment of a closed log for writing, without the log's rules."""
    environment = lmdb.open(str(path_of(folder, newest(folder))), map_size=MAP_BYTES, max_dbs=8)
    tables = [environment.open_db(name) for name in (b"blocks", b"heads", b"meta")]
    with environment.begin(write=True) as txn:
        yield Tables(environment, txn, *tables)
    environment.close()


def with_crc(data: bytes) -> bytes:
    """Recompute a record's checksum, as a forger would."""
    crc = google_crc32c.extend(google_crc32c.value(data[:40]), data[44:])
    return data[:40] + struct.pack("<I", crc) + data[44:]


def tombstone_of(data: bytes) -> bytes:
    """Make a record's tombstone."""
    return tombstone(data)
