"""Learners that die by SIGKILL, many from one start: ``python -m tests.crash.killed_learner LOG FOLDER MAP_BYTES``.

Each line read, ``step N LSN`` or ``moment SECONDS LSN``, forks one learner, which learns up to an LSN of the log and
saves and publishes every few records. It kills itself before the N-th step of its snapshots, or is
killed after so many seconds. What it died of is written as a line. Ends when its standard input closes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path

from server.storage.lmdb_log import LmdbLog
from server.storage.record import Record
from tests.support.learning import load_catalog
from training.learn import Learner

RECORDS_A_FLUSH = 4


class GrowingLmdb(LmdbLog):
    """A log of which only the first records can be read on from, while keys of all are found: as when others append."""

    read_lsn_max = 0

    def read(self, from_lsn: int, records_max: int = 4_096) -> list[Record]:
        """See Log."""
        records_max = min(records_max, self.read_lsn_max + 1 - from_lsn)
        return super().read(from_lsn, records_max) if records_max > 0 else []

    def get(self, lsn: int) -> Record | None:
        """See Log."""
        return next((record for record in super().read(lsn, 1) if record.lsn == lsn), None)


def live(log_folder: Path, folder: Path, map_bytes: int, step_of_death: int, lsn_max: int) -> None:
    """Learn and save until killed; a death at step 0 is left to others."""
    n_left = step_of_death

    def at_step(_step: str) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    log = GrowingLmdb(log_folder, map_bytes, writable=False)
    log.read_lsn_max = lsn_max  # so that it finds the records its snapshot rests on
    learner = Learner(log, folder, load_catalog, lambda: 0.0, at_step=at_step)
    log.read_lsn_max = learner.learned_lsn
    while log.read_lsn_max < lsn_max:
        log.read_lsn_max = min(log.read_lsn_max + RECORDS_A_FLUSH, lsn_max)
        while learner.step():
            pass
        learner.flush()
    if not step_of_death:
        signal.pause()  # all is learned, and the moment still to come


def main() -> None:
    """See module."""
    log_folder, folder, map_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for line in sys.stdin:
        kind, where, lsn_max = line.split()
        child = os.fork()
        if child == 0:
            try:
                live(log_folder, folder, map_bytes, int(where) if kind == "step" else 0, int(lsn_max))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        if kind == "moment":
            time.sleep(float(where))  # the random moment itself
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
