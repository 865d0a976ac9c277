"""The outside witness of the kill tests about people: a caller that notes each acknowledgement before going on.

Run as ``python -m tests.crash.telling ADDRESS FILE SEED``. Its threads tell of people who turn out to be one: records
that share identities, statements that two are the same or are not, proposals, splits. Each is repeated under the same
id until it is answered; some are sent a second time on purpose. A line goes to the file, flushed, after each
acknowledgement: what was said, the message in hexadecimal, its LSN. Ends when its standard input closes, with nothing
left unanswered.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from tests.crash.ledger import Ledger
from tsugi.client import CallError, Client, consent, event, source_record
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import LinkIdentitiesRequest, LinkVerdict, SourceRecord, SplitProfileRequest

N_THREADS: Final = 4
RETRY_S: Final = 0.05
ANSWER_S_MAX: Final = 120.0
PACE_S: Final = 0.02  # so that what is said can be held against a second telling in little time
STATEMENTS_A_CIRCLE: Final = 12  # of each thread, before it goes on to people not met before

_PASSING: Final = {"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
_REFUSALS: Final = {  # of what depends on who is known by now, and as whom
    "ERROR_REASON_RESOURCE_NOT_FOUND",
    "ERROR_REASON_IDENTITIES_CONFLICT",
    "ERROR_REASON_FIELD_INVALID",
}

Pair = tuple[str, str]
_Reply = TypeVar("_Reply")


def answered(call: Callable[[], _Reply]) -> _Reply | None:
    """Repeat a call until it is answered; None when it was refused because of who is known."""
    deadline = time.monotonic() + ANSWER_S_MAX
    while True:
        try:
            return call()
        except CallError as error:
            if error.reason in _REFUSALS:
                return None
            if error.code.name not in _PASSING or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


class Teller:
    """One thread that tells.

    Args:
        client: shared.
        ledger: shared.
        seed: its own.
    """

    def __init__(self, client: Client, ledger: Ledger, seed: int) -> None:
        self._client = client
        self._ledger = ledger
        self._seed = seed
        self._chance = random.Random(seed)
        self._number = 0

    def tell(self, stop: threading.Event) -> None:
        """Say one thing after another until told to stop."""
        while not stop.wait(PACE_S):
            self._number += 1
            (self._say, self._say, self._say, self._link, self._split)[self._chance.randrange(5)]()

    def _pairs(self, n_max: int) -> list[Pair]:
        """Draw identities of a circle of people that all threads talk about at about the same time."""
        circle = self._number // STATEMENTS_A_CIRCLE
        pool: list[Pair] = [
            *(("customer_number", f"{circle}-{i}") for i in range(4)),
            *(("email", f"P{circle}-{i}@Shop.Example") for i in range(4)),
            *(("browser_id", f"b{circle}-{i}") for i in range(3)),
            ("family_account", f"f{circle}"),
        ]
        return self._chance.sample(pool, self._chance.randint(1, n_max))

    def _say(self) -> None:
        records = [self._record(f"{self._seed}-{self._number}-{i}") for i in range(self._chance.randint(1, 3))]
        for _ in range(2 if self._chance.random() < 0.2 else 1):
            reply = answered(lambda: self._client.ingest_records(records))
            assert reply is not None
            for record, result in zip(records, reply.results, strict=True):
                if result.HasField("accepted"):
                    self._note("record", record, result.accepted.lsn)
                else:
                    assert "SHARED" in result.error.message or "beside more than" in result.error.message, result

    def _record(self, record_id: str) -> SourceRecord:
        chance = self._chance
        then = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=chance.randrange(1_000_000))
        return source_record(
            record_id,
            chance.choice(["crm", "shop"]),
            self._pairs(3),
            attributes={"age": float(chance.randrange(18, 80)), "nickname": "abcdefgh"[: chance.randint(1, 8)]},
            event=event("purchase", {"total": 5.0, "item": f"i{chance.randrange(9)}"}, occurrence_time=then),
            consents=[consent("marketing", granted=chance.random() < 0.5, effective_time=then)],
            observation_time=then,
        )

    def _link(self) -> None:
        one, other = self._pairs(1)[0], self._pairs(1)[0]
        verdict = self._chance.choice(
            [LinkVerdict.LINK_VERDICT_SAME, LinkVerdict.LINK_VERDICT_DIFFERENT, LinkVerdict.LINK_VERDICT_PROPOSED]
        )
        request = LinkIdentitiesRequest(
            identity=_identity(one), other_identity=_identity(other), verdict=verdict, weight=15.0,
            stated_by="test", request_id=f"{self._seed}-{self._number}",
        )  # fmt: skip
        reply = answered(
            lambda: self._client.link_identities(
                one, other, verdict, weight=request.weight, stated_by=request.stated_by, request_id=request.request_id
            )
        )
        if reply is not None:
            self._note("link", request, reply.lsn)

    def _split(self) -> None:
        one = self._pairs(1)[0]
        found = answered(lambda: self._client.get_profile(identity=one))
        if found is None or len(found.profile.identities) < 2:
            return
        leaving = [(each.namespace, each.value) for each in found.profile.identities][
            : self._chance.randint(1, len(found.profile.identities) - 1)
        ]
        request = SplitProfileRequest(
            profile_id=found.profile.profile_id, identities=map(_identity, leaving),
            stated_by="test", request_id=f"{self._seed}-{self._number}",
        )  # fmt: skip
        reply = answered(
            lambda: self._client.split_profile(
                request.profile_id, leaving, stated_by=request.stated_by, request_id=request.request_id
            )
        )
        if reply is not None:
            self._note("split", request, reply.lsn)

    def _note(self, what: str, said: SourceRecord | LinkIdentitiesRequest | SplitProfileRequest, lsn: int) -> None:
        self._ledger.write(what, said.SerializeToString(deterministic=True).hex(), lsn)


def _identity(pair: Pair) -> Identity:
    return Identity(namespace=pair[0], value=pair[1])


def main(address: str, path: Path, seed: int) -> None:
    """Tell with several threads until standard input closes."""
    stop = threading.Event()
    with path.open("w") as file, Client(address, channels=N_THREADS, timeout_s=3.0) as client:
        ledger = Ledger(file)
        tellers = [Teller(client, ledger, seed * 1_000 + number) for number in range(N_THREADS)]
        threads = [threading.Thread(target=teller.tell, args=(stop,)) for teller in tellers]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
