"""Who is forgotten already, though the state still knows them: erasures in the log that are not projected yet.

An erasure is in force when it is acknowledged. Whoever reads profiles looks here first, and takes those who are named
for strangers. While the projector keeps up there is nothing to look at but one number.
"""

from __future__ import annotations

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
        keys: set[bytes] = set()
        lsn = newest
        while lsn > applied_lsn:
            record = self._log.get(lsn)
            assert record is not None, "the head and each erasure name a record"
            accepted = ErasureAccepted.FromString(record.payload)
            keys.update(accepted.identity_keys, accepted.profile_keys)
            lsn = accepted.previous_lsn
        self._kept = ((newest, applied_lsn), frozenset(keys))
        return self._kept[1]
