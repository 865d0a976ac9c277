"""Open logs that something has happened to, each in a fork, because the engine may die of what it finds.

Run as ``python -m tests.support.opener FOLDER MAP_BYTES MODE``; FOLDER holds a folder a log. Says a line for each, in
the order of names: ``read`` with a digest of all records and their keys; ``refused`` with what was raised; or ``died``.
Mode ``read`` reads and verifies, ``write`` appends a record too, ``trust`` is the negative control: it believes every
checksum.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from pathlib import Path

import lmdb

from server.storage import lmdb_log
from server.storage.lmdb_log import LmdbLog, SchemaTooNewError
from server.storage.log import follow
from server.storage.record import CorruptRecordError, Draft, Record, unseal
from tests.support.damage import with_crc
from tsugi.log.v1.record_pb2 import RecordKind


def digest_of(records: list[Record]) -> str:
    """Return what tells two readings of a log apart."""
    return hashlib.sha256(repr(records).encode()).hexdigest()


def look(folder: Path, map_bytes: int, mode: str) -> str:
    """Open one log and say what there is."""
    try:
        log = LmdbLog(folder, map_bytes, writable=mode == "write")
        records = list(follow(log, 1))
        log.verify()
        if mode == "write":
            log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], log.tail().time_us)
            log.verify()
    except (lmdb.Error, CorruptRecordError, SchemaTooNewError, struct.error) as error:
        return f"refused {type(error).__name__}"
    return " ".join(("read", digest_of(records), *(record.key.hex() for record in records)))


def trusting(data: memoryview | bytes, offset: int = 0, _previous_chain: bytes | None = None) -> Record:
    """Take a record apart whatever its checksum and chain say."""
    (length,) = struct.unpack_from("<I", data, offset)
    return unseal(with_crc(bytes(data[offset : offset + length])))


def main(folder: Path, map_bytes: int, mode: str) -> None:
    """Look at every log below a folder."""
    if mode == "trust":
        vars(lmdb_log)["unseal"] = trusting
    for path in sorted(folder.iterdir()):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the engine's last words
            sys.stdout.write(look(path, map_bytes, mode) + "\n")
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.stdout.write("died\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
