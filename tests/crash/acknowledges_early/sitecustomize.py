"""The negative control of the kill test: a server that acknowledges first and commits a little later.

Python imports this module by its name when the folder stands on PYTHONPATH. It makes the committer lie; a kill between
the lie and the commit then loses what was acknowledged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

LATE_S = 0.3

if "worker" in sys.argv or any("worker" in argument for argument in sys.orig_argv):
    from server.storage import committer
    from server.storage.log import Fate, Receipt
    from server.storage.record import Draft
    from tsugi.log.v1.record_pb2 import RECORD_KIND_DECISION, RECORD_KIND_OUTCOME, RECORD_KIND_SOURCE_RECORD

    _PROMISED = {RECORD_KIND_DECISION, RECORD_KIND_OUTCOME, RECORD_KIND_SOURCE_RECORD}

    class LyingCommitter(committer.GroupCommitter):
        """Promises decisions, outcomes and source records at once."""

        def submit(self, drafts: Sequence[Draft]) -> committer.Receipts:
            if not {draft.kind for draft in drafts} <= _PROMISED:
                return super().submit(drafts)
            assert self._loop is not None
            future: committer.Receipts = self._loop.create_future()
            future.set_result([Receipt(Fate.RECORDED, 1, 0) for _ in drafts])
            self._loop.call_later(LATE_S, self.offer, list(drafts))
            return future

    committer.GroupCommitter = LyingCommitter  # type: ignore[misc]  # the control replaces the class it lies about
