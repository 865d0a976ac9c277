"""The outside witness of a kill test: a caller in its own process that notes each acknowledgement before going on.

Run as ``python ledger.py ADDRESS FILE SEED``. Each thread decides durably, reports outcomes of what was chosen under
ids of its own, retries with the same id until it is answered, and sends some a second time on purpose. A line goes to
the file, flushed, after each acknowledgement: ``decision <id>`` or ``outcome <decision id> <outcome id> <LSN>``. Ends
when its standard input closes.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

from tsugi.client import CallError, Client
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.outcome_service_pb2 import ReportOutcomeResponse

N_THREADS = 6
RETRY_S = 0.05

_Reply = TypeVar("_Reply")


class Ledger:
    """What one file of acknowledgements is written by."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, *words: object) -> None:
        """Write one line down before anything else happens."""
        with self._lock:
            self._file.write(" ".join(map(str, words)) + "\n")
            self._file.flush()


def until_answered(call: Callable[[], _Reply], stop: threading.Event) -> _Reply | None:
    """Repeat a call until it is answered; None when told to stop first."""
    while not stop.is_set():
        try:
            return call()
        except CallError as error:
            if error.code.name not in {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}:
                raise
            stop.wait(RETRY_S)
    return None


def work(client: Client, ledger: Ledger, seed: int, stop: threading.Event) -> None:
    """Decide and report until told to stop."""
    chance = random.Random(seed)
    number = 0
    while not stop.is_set():
        number += 1
        request_id = f"{seed}-{number}"
        person = f"person-{chance.randrange(40)}"

        def decide(request_id: str = request_id, person: str = person) -> DecideResponse:
            return client.decide(
                {"square_cb": 2, "mail": 1}, identities={"customer_number": person}, request_id=request_id, durable=True
            )

        decision = until_answered(decide, stop)
        if decision is None:
            return
        ledger.write("decision", decision.decision_id)
        for slot in decision.slots:
            if chance.random() < 0.3:
                continue
            kind = chance.choice(["click", "dismiss", "impression"])
            outcome_id = f"{slot.action}-{kind}"

            def report(
                action: str = slot.action,
                outcome_id: str = outcome_id,
                kind: str = kind,
                decision_id: str = decision.decision_id,
            ) -> ReportOutcomeResponse:
                return client.report_outcome(decision_id, action, outcome_id, kind)

            for _ in range(2 if chance.random() < 0.2 else 1):
                reply = until_answered(report, stop)
                if reply is None:
                    return
                ledger.write("outcome", decision.decision_id, outcome_id, reply.lsn)


def main(address: str, path: Path, seed: int) -> None:
    """Work with several threads until standard input closes."""
    stop = threading.Event()
    with path.open("w") as file, Client(address, channels=N_THREADS, timeout_s=3.0) as client:
        ledger = Ledger(file)
        threads = [
            threading.Thread(target=work, args=(client, ledger, seed * 1_000 + number, stop))
            for number in range(N_THREADS)
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
