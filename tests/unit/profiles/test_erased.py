"""Who is forgotten already: asked of many LSNs, the same as reading all erasures each time."""

from __future__ import annotations

import random

from server.profiles.erased import ERASURE_HEAD, Erased
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tsugi.log.v1.record_pb2 import ErasureAccepted, RecordKind


def erase(log: MemoryLog, *keys: bytes) -> None:
    accepted = ErasureAccepted(erasure_key=bytes(16), identity_keys=keys, previous_lsn=log.head(ERASURE_HEAD))
    log.append([Draft(RecordKind.RECORD_KIND_ERASURE_ACCEPTED, accepted.SerializeToString(), head=ERASURE_HEAD)], 0)


def test_names_any_agrees_with_since_whatever_the_order_of_questions() -> None:
    rng, log = random.Random(3), MemoryLog()
    keys = [bytes([i]) * 16 for i in range(12)]
    asked = Erased(log)
    n_found = 0
    for _ in range(300):
        if rng.random() < 0.3:
            erase(log, *rng.sample(keys, 2))
        elif rng.random() < 0.3:
            log.append([Draft(RecordKind.RECORD_KIND_TICK, b"")], 0)
        lsn = rng.randint(0, log.tail().lsn + 1)
        some = rng.sample(keys, 2)
        found = not Erased(log).since(lsn).isdisjoint(some)
        assert asked.names_any(some, lsn) == found
        n_found += found
    assert 30 < n_found < 270
