"""What do goals mean now, and since when? Read from the catalog changes in a log.

Decisions outlive the goals they were made for: catalogs change what an outcome is worth, or how long to wait. Learning
follows the newest definition of each goal, and when one is altered, begins anew from the log. This page finds out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from server.catalog.catalog import Goal
from server.catalog.compile import compile_goal
from server.decisioning.live import CATALOG_HEAD
from server.storage.log import Log
from tsugi.log.v1.record_pb2 import CatalogChange
from tsugi.v1 import catalog_pb2


class Meanings:
    """The newest definition of every goal that a log's catalogs ever named.

    Args:
        log: its chain of catalog changes is read.
        load_message: gives the catalog of a sha256; never compiled, for this may be for every catalog there ever was.

    Attributes:
        lsn: the last change that altered a goal it had known; 0: none did. A goal named for the first time alters
            nothing: no decision before was for it.
        messages: what every goal named until then meant then, by name.
        goals: the same, ready to use.
    """

    def __init__(self, log: Log, load_message: Callable[[bytes], catalog_pb2.Catalog]) -> None:
        self.lsn = 0
        self.messages: dict[str, catalog_pb2.Goal] = {}
        self.goals: dict[str, Goal] = {}
        self._log = log
        self._load_message = load_message
        self._seen_lsn = 0
        self._newest: dict[str, catalog_pb2.Goal] = {}

    def begin(self, lsn: int, messages: Iterable[catalog_pb2.Goal]) -> None:
        """Go on from what goals meant at an alteration, as saved with a snapshot."""
        self._newest = {message.name: message for message in messages}
        self._seen_lsn = lsn
        self._settle(lsn)

    def renew(self) -> None:
        """Take in the changes that came since. Cost: 2 µs when there are none, otherwise each catalog parsed once.

        Raises:
            BlobError: a catalog cannot be had.
        """
        lsn = self._log.head(CATALOG_HEAD)
        changes: list[tuple[int, bytes]] = []
        while lsn > self._seen_lsn:
            record = self._log.get(lsn)
            assert record is not None, "a chain of changes stands in the log, and is never erased"
            change = CatalogChange.FromString(record.payload)
            changes.append((lsn, change.catalog_sha256))
            lsn = change.previous_lsn
        for lsn, sha256 in reversed(changes):
            # Copies, for a part of a message keeps the whole of it in memory.
            messages = [copy.deepcopy(message) for message in self._load_message(sha256).goals]
            is_altered = any(_is_altered(self._newest.get(message.name), message) for message in messages)
            self._newest.update((message.name, message) for message in messages)
            if is_altered:
                self._settle(lsn)
            self._seen_lsn = lsn

    def _settle(self, lsn: int) -> None:
        """Let the newest definitions be those in force from now on, for all of the log."""
        self.lsn = lsn
        self.messages = dict(self._newest)
        self.goals = {name: compile_goal(message) for name, message in self._newest.items()}


def _is_altered(before: catalog_pb2.Goal | None, after: catalog_pb2.Goal) -> bool:
    return before is not None and before != after and compile_goal(before) != compile_goal(after)
