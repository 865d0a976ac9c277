"""Who is in a segment at an instant: one page of the profiles, in the order of their keys.

The state remembers memberships as of the last record applied; a page is asked of the profiles themselves, evaluated at
the request's own instant as a decision evaluates them. Whoever is forgotten, projected or not, is not listed.

Cost sketch: a profile 5 µs while its stored facts hold, 100 and more where it is folded afresh. A page looks at
SEEN_MAX profiles at most and for PAGE_S_MAX at most, in pieces on a thread: between two of them whoever waits for the
event loop has a turn, and no snapshot of the state is held for longer than one piece.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final, NamedTuple

import numpy as np
import structlog

from server import telemetry
from server.catalog.catalog import Catalog
from server.errors import not_found
from server.profiles import repository, standing
from server.profiles.erased import Erased
from server.storage.applied import read_applied
from server.storage.store import Store, Table
from tsugi.v1.profile_service_pb2 import ListProfilesResponse

SEEN_MAX: Final = 5_000  # profiles of one call
PIECE_PROFILES: Final = 250  # some 1 ms
PAGE_S_MAX: Final = 0.25


class _Piece(NamedTuple):
    keys: list[bytes]  # of those who are in the segment
    last: bytes  # the last profile looked at
    n_seen: int
    n_corrupt: int
    is_end: bool


class Members:
    """The people in one segment at one instant.

    Args:
        store: the state.
        erased: who is forgotten already.
        catalog: in force.
        segment: its name.
        now_us: the instant.

    Raises:
        TsugiError: RESOURCE_NOT_FOUND: the catalog declares no such segment.
    """

    def __init__(self, store: Store, erased: Erased, catalog: Catalog, segment: str, now_us: int) -> None:
        names = catalog.profiles.segments.names
        if segment not in names:
            raise not_found("segment", segment, "segment")
        self._store = store
        self._erased = erased
        self._catalog = catalog
        self._segment = segment
        self._position = catalog.space.profile_slice.stop - len(names) + list(names).index(segment)
        self._now_us = now_us
        self._facts = np.full(len(catalog.space.facts), math.nan)

    async def page(self, size: int, last: bytes) -> ListProfilesResponse:
        """Return at most so many of them whose keys follow a key; empty: from the first on."""
        response = ListProfilesResponse()
        n_seen, n_corrupt, until = 0, 0, time.monotonic() + PAGE_S_MAX
        while True:
            piece = await asyncio.to_thread(self._piece, last, size - len(response.profile_ids))
            response.profile_ids.extend([key.hex() for key in piece.keys])
            last = piece.last
            n_seen += piece.n_seen
            n_corrupt += piece.n_corrupt
            if piece.is_end:
                break
            if len(response.profile_ids) == size or n_seen >= SEEN_MAX or time.monotonic() >= until:
                response.next_page_token = last.hex()
                break
        if n_corrupt:
            telemetry.DEGRADATIONS.labels("PROFILE_UNAVAILABLE").inc(n_corrupt)
            structlog.get_logger().warning("corrupt_profiles_not_listed", n_profiles=n_corrupt)
        with self._store.read() as snapshot:
            response.total_size = standing.count(snapshot, standing.segment_count(self._segment))
        return response

    def _piece(self, after: bytes, n_wanted: int) -> _Piece:
        """Look at the next few profiles behind a key, until so many are found."""
        keys: list[bytes] = []
        n_seen, n_corrupt, last = 0, 0, after
        with self._store.read() as snapshot:
            erased = self._erased.since(read_applied(snapshot).lsn)
            for key, data in snapshot.scan(Table.PROFILES, start=after):
                if key == after:
                    continue
                if n_seen == PIECE_PROFILES or len(keys) == n_wanted:
                    return _Piece(keys, last, n_seen, n_corrupt, is_end=False)
                n_seen += 1
                last = key
                try:
                    stored = repository.StoredRecord(data)
                except repository.CorruptProfileError:
                    n_corrupt += 1
                    continue
                if erased and (key in erased or not erased.isdisjoint(stored.parts)):
                    continue
                repository.write_facts(stored, self._catalog, snapshot, self._now_us, self._facts)
                if self._facts[self._position] == 1.0:
                    keys.append(key)
        return _Piece(keys, last, n_seen, n_corrupt, is_end=True)
