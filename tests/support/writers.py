"""Programs that append to a log from a process of their own and write what they were told to standard output.

``append``: several of them share one log. ``spend``: several of them share one budget. ``commit``: one committer
whose disk is made to fail from outside. Started as ``python -m tests.support.writers``.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb

from server.control import ControlPage
from server.storage.committer import GroupCommitter
from server.storage.lmdb_log import LmdbLog
from server.storage.log import LogUnavailableError
from server.storage.record import Draft, Spend
from tests.support.faults import HastyCommitter
from tsugi.log.v1.record_pb2 import RecordKind

LIMITED, UNLIMITED = b"a limited budget", b"an open one, too"  # what spend() spends from


def wall_us() -> int:
    """Return the wall clock in microseconds since the epoch."""
    return time.time_ns() // 1_000


def append(folder: Path, map_bytes: int, writer: int, n_groups: int, n_shared: int) -> None:
    """Append groups of own keys, among them every shared key once, and say what became of each draft."""
    log = LmdbLog(folder, map_bytes)
    rng = random.Random(writer)
    shared = rng.sample(range(n_shared), n_shared)
    _say("ready")
    sys.stdin.readline()
    n_own = 0
    for group in range(n_groups):
        keys = [bytes((1 + writer,)) + (n_own + i).to_bytes(15, "big") for i in range(rng.choice((1, 2, 30, 256)))]
        n_own += len(keys)
        keys += [b"\xff" + number.to_bytes(15, "big") for number in shared[group::n_groups]]
        keys = keys[-256:]
        drafts = [Draft(RecordKind.RECORD_KIND_OUTCOME, bytes(rng.randrange(2_000)), key) for key in keys]
        for key, receipt in zip(keys, log.append(drafts, wall_us()), strict=True):
            _say(f"{key.hex()} {receipt.fate.value} {receipt.lsn}")
    log.close()


def spend(folder: Path, map_bytes: int, writer: int, n_groups: int, limit: int) -> None:
    """Append groups of drafts that spend from a budget with a limit, and say each amount and what became of it."""
    log = LmdbLog(folder, map_bytes)
    rng = random.Random(writer)
    _say("ready")
    sys.stdin.readline()
    for _ in range(n_groups):
        amounts = [rng.randrange(1, 10) for _ in range(rng.choice((1, 2, 20)))]
        drafts = [
            Draft(
                RecordKind.RECORD_KIND_OUTCOME,
                amount.to_bytes(1, "big"),
                rng.randbytes(16),
                spends=(Spend(LIMITED, amount, limit), Spend(UNLIMITED, amount, None)),
            )
            for amount in amounts
        ]
        for amount, receipt in zip(amounts, log.append(drafts, wall_us()), strict=True):
            _say(f"{amount} {receipt.fate.value}")
        log.append([Draft(RecordKind.RECORD_KIND_OUTCOME, b"", spends=(Spend(UNLIMITED, 1, None),))], wall_us())
    log.close()


def commit(folder: Path, map_bytes: int, control: Path | None, control_case: str) -> None:
    """Commit one outcome for each line of standard input and say whether it was acknowledged, to the end of input.

    Args:
        folder: where the log lies.
        map_bytes: see LmdbLog.
        control: the control page that the processes share; None: this one does not look at it.
        control_case: "" for the real thing. Negative controls: "hasty" acknowledges before the commit, "unsynced"
            commits without waiting for the disk.
    """
    if control_case == "unsynced":
        vars(lmdb)["open"] = functools.partial(_open_unsynced, lmdb.open)
    log = LmdbLog(folder, map_bytes)
    page = ControlPage(control) if control is not None else None

    def fail() -> None:
        if page is not None:
            page.latch()
        _say("failed")

    make = HastyCommitter if control_case == "hasty" else GroupCommitter
    committer = make(log, wall_us=wall_us, on_failure=fail, is_latched=lambda: page is not None and page.is_latched)
    _say("ready")
    asyncio.run(_commit_each(committer))


def _open_unsynced(real_open: Callable[..., lmdb.Environment], *arguments: Any, **named: Any) -> lmdb.Environment:
    return real_open(*arguments, **(named | {"sync": False}))


async def _commit_each(committer: GroupCommitter) -> None:
    committer.start(asyncio.get_running_loop())
    number = 0
    while await asyncio.to_thread(sys.stdin.readline):
        number += 1
        key = os.getpid().to_bytes(8, "big") + number.to_bytes(8, "big")
        try:
            await committer.submit([Draft(RecordKind.RECORD_KIND_OUTCOME, bytes(100), key)])
            _say(f"acknowledged {key.hex()}")
        except LogUnavailableError:
            _say(f"refused {key.hex()}")
    committer.close()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    program, path, size, *rest = sys.argv[1:]
    if program in {"append", "spend"}:
        (append if program == "append" else spend)(Path(path), int(size), *map(int, rest))
    else:
        control_path, case = rest
        commit(Path(path), int(size), Path(control_path) if control_path else None, case)
