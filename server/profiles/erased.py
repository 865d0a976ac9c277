"""Who is forgotten already, though the state still knows them: erasures in the log that are not projected yet.

An erasure is in force when it is acknowledged. Whoever reads profiles looks here first, and takes those who are named
for strangers. While the projector keeps up there is nothing to look at but one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from server.storage.log import Log
from tsugi.log.v1.record_pb2 import ErasureAccepted

ERASURE_HEAD: Final = "erasure"  # of the wishes to be forgotten
ERASED_HEAD: Final = "erased"  # of the times when the log was rid of what they were about
NOBODY: Final[frozenset[bytes]] = frozenset()


class Erased:
    """The erasures of one log that a state does not include yet.

    Args:
        log: read only.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        # Newest erasure and applied LSN, and what they give: one tuple, because threads ask too.
        self._kept: tuple[tuple[int, int], frozenset[bytes]] = ((0, 0), NOBODY)
        self._named: dict[bytes, int] = {}  # key → the newest erasure that names it
        self._known_from = self._known_until = 1 << 63  # all erasures after the one LSN, up to the other, are in there

    def since(self, applied_lsn: int) -> frozenset[bytes]:
        """Return the keys of identities and profiles that were erased after an LSN.

        Cost: one read of the log's head, 2 µs; while some are not projected, also one read an erasure.
        """
        newest = self._log.head(ERASURE_HEAD)
        if newest <= applied_lsn:
            return NOBODY
        seen, kept = self._kept
        if seen == (newest, applied_lsn):
            return kept
        keys = frozenset(key for _, named in self._back(newest, applied_lsn) for key in named)
        self._kept = ((newest, applied_lsn), keys)
        return keys

    def names_any(self, keys: Iterable[bytes], lsn: int) -> bool:
        """Say whether an erasure after an LSN names one of some keys; for one thread, which asks of many LSNs.

        Cost: one read of the log's head, 2 µs; each erasure after the least LSN asked of is read once and kept; when an
        earlier LSN is asked of, once again.
        """
        newest = self._log.head(ERASURE_HEAD)
        if newest <= lsn:
            return False
        if lsn < self._known_from:  # further back than ever asked: all of it once more
            self._known_from, self._known_until, self._named = lsn, lsn, {}
        for place, named in self._back(newest, self._known_until):
            for key in named:
                self._named[key] = max(place, self._named.get(key, 0))
        self._known_until = newest
        return any(self._named.get(key, 0) > lsn for key in keys)

    def _back(self, newest: int, until_lsn: int) -> Iterator[tuple[int, tuple[bytes, ...]]]:
        """Yield the erasures from one back to the first after an LSN: place and the keys it names."""
        lsn = newest
        while lsn > until_lsn:
            record = self._log.get(lsn)
            assert record is not None, "the head and each erasure name a record"
            accepted = ErasureAccepted.FromString(record.payload)
            yield lsn, (*accepted.identity_keys, *accepted.profile_keys)
            lsn = accepted.previous_lsn
