"""What is in force and how it changes: catalogs, bundles and model roles.

Every change is checked as a whole, its blob made durable first, and then one log record says it; the record is the
change. Who writes with an etag is refused when somebody else wrote in between. Listing and rolling back need nothing
but the log: see ``history.py``.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypedDict

from google.protobuf.message import DecodeError

from server.catalog.allotting import allot_all
from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.decisioning.bundle_columns import bundle_columns
from server.decisioning.history import KINDS, THE_BASELINE, Change, Entry, base, before, entries, entry_at, holder
from server.decisioning.live import (
    BUNDLE_ROLE_HEADS,
    CATALOG_HEAD,
    CHALLENGER_HEAD,
    LEARNER_HEAD,
    MODEL_HEAD,
    POLL_S,
    RESET_HEAD,
    ROLE_HEADS,
    Live,
)
from server.errors import TsugiError, Violation, not_found
from server.registry.blobs import Blobs
from server.registry.bundle import check_in_sandbox, parse
from server.storage.committer import GroupCommitter
from server.storage.log import Fate, Log, LogFullError, LogUnavailableError, Receipt, refusal, settled
from server.storage.record import NO_KEY, Draft
from server.tokens import TokenKey
from tsugi.log.v1.bundle_pb2 import Bundle
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.log.v1.record_pb2 import Allotment, CatalogChange, LearnerReset, ModelPushed, ModelRoleChange
from tsugi.v1.catalog_pb2 import Catalog as CatalogMessage
from tsugi.v1.error_reason_pb2 import ErrorReason

SWAP_WAIT_S_MAX: Final = 2.0  # a worker takes what is new into use within a second, unless it cannot


class Wish(NamedTuple):
    """What a caller says of any configuration write."""

    request_id: str = ""
    etag: int | None = None  # the head it must have; None: whatever it is
    validate_only: bool = False


class Changed(NamedTuple):
    """One change that stands in the log; or, with lsn 0, one that would be accepted."""

    sha256: bytes  # of what is in force by it; empty: nothing
    etag: int
    lsn: int
    is_duplicate: bool


class _Held(TypedDict, total=False):
    bundle_sha256: bytes
    baseline: bool


class Configuration:
    """Changes and reads what is in force, for one worker.

    Args:
        log: histories and heads.
        blobs: catalogs and bundles.
        committer: where changes go.
        token_key: names request ids.
        current: gives the set this worker serves, or None before the first catalog.
        is_served: says whether every worker serves the configuration of an LSN.
    """

    def __init__(
        self,
        *,
        log: Log,
        blobs: Blobs,
        committer: GroupCommitter,
        token_key: TokenKey,
        current: Callable[[], Live | None],
        is_served: Callable[[int], bool],
    ) -> None:
        self._log = log
        self._blobs = blobs
        self._committer = committer
        self._token_key = token_key
        self._current = current
        self._is_served = is_served
        self._checking = asyncio.Lock()

    async def push_catalog(self, data: bytes, wish: Wish) -> Changed:
        """Put a serialised catalog in force.

        Raises:
            TsugiError: REQUEST_MALFORMED, CATALOG_INVALID, and those of every write.
        """
        write = _Write(b"push_catalog", CATALOG_HEAD, await _sha256(data), wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        await asyncio.to_thread(self._check_catalog, data)
        if wish.validate_only:
            return self._validated(write, write.payload)
        sha256 = await self._put(data)
        message = CatalogMessage.FromString(data)
        return await self._append(
            write,
            lambda head: CatalogChange(
                catalog_sha256=sha256, previous_lsn=head, allotments=allot_all(message, self._allotments(head))
            ),
        )

    async def rollback_catalog(self, revision: bytes | None, wish: Wish) -> Changed:
        """Put an earlier catalog in force again: the named one, or the one before the present.

        Raises:
            TsugiError: NO_PREVIOUS_REVISION, RESOURCE_NOT_FOUND, and those of every write.
        """
        write = _Write(b"rollback_catalog", CATALOG_HEAD, revision or b"", wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        if revision is None:
            restored = before(self._log, CATALOG_HEAD)
            if restored is None:
                raise _no_previous("catalog")
        else:
            restored = next((entry for entry in self.history(CATALOG_HEAD) if entry.sha256 == revision), None)
            if restored is None:
                raise not_found("catalog revision", revision.hex(), "revision")
        # What cannot be loaded must not be put in force.
        message = CatalogMessage.FromString(await asyncio.to_thread(self._blobs.get, restored.sha256))
        if wish.validate_only:
            return self._validated(write, restored.sha256)
        return await self._append(
            write,
            lambda head: CatalogChange(
                catalog_sha256=restored.sha256,
                previous_lsn=head,
                rollback=True,
                restored_lsn=restored.record.lsn,
                # Only those move who must; and of them as many as can be go back to where they were.
                allotments=allot_all(message, self._allotments(head), self._allotments(restored.record.lsn)),
            ),
        )

    async def push_model(self, data: bytes, label: str, *, validate_only: bool) -> tuple[Entry | None, Bundle, bool]:
        """Check a bundle and store it as a revision; its role does not change.

        Returns:
            Its entry in the history (None when only validated), the bundle, and whether it was there before.

        Raises:
            TsugiError: BUNDLE_*, CATALOG_MISSING, UPLOAD_BUSY, LOG_*.
        """
        sha256 = await _sha256(data)
        bundle = parse(data)
        if (earlier := self._pushed(sha256)) is not None:
            return earlier, bundle, True
        bundle_columns(bundle.manifest, await self._require_catalog())
        if self._checking.locked():
            raise TsugiError(
                ErrorReason.ERROR_REASON_UPLOAD_BUSY, "another bundle is being checked here; push again in some seconds"
            )
        async with self._checking:
            await asyncio.to_thread(check_in_sandbox, data)
        if validate_only:
            return None, bundle, False
        await self._put(data)
        write = _Write(b"push_model", MODEL_HEAD, sha256, Wish(request_id=sha256.hex()))
        changed = await self._append(
            write,
            lambda head: ModelPushed(
                bundle_sha256=sha256,
                previous_lsn=head,
                label=label,
                goal=bundle.manifest.goal,
                size_bytes=len(data),
            ),
        )
        return entry_at(self._log, changed.lsn), bundle, changed.is_duplicate

    async def assign_role(self, role: int, sha256: bytes, wish: Wish) -> Changed:
        """Give a role to a stored bundle, or to none when sha256 is empty; other roles stay as they are.

        Args:
            role: one of ROLE_HEADS.
            sha256: of the bundle; for the role learner THE_BASELINE, or empty: the fleet.
            wish: as of every write; a request id stands for one change of one role.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, BUNDLE_CONTRACT_MISMATCH, CATALOG_MISSING, and those of every write.
        """
        write = _Write(b"assign_model_role", ROLE_HEADS[role], sha256, wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        if sha256 and write.head != LEARNER_HEAD and self._pushed(sha256) is None:
            raise not_found("model revision", sha256.hex(), "revision")
        await self._check_fit(sha256)
        if wish.validate_only:
            return self._validated(write, sha256)
        return await self._append(write, lambda head: ModelRoleChange(role=role, previous_lsn=head, **_held(sha256)))

    async def rollback_role(self, role: int, wish: Wish) -> Changed:
        """Give a role back to who had it before, or to none; arguments as for assign_role.

        Raises:
            TsugiError: NO_PREVIOUS_REVISION, BUNDLE_CONTRACT_MISMATCH, and those of every write.
        """
        write = _Write(b"rollback_model", ROLE_HEADS[role], b"", wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        if base(self._log, write.head) is None:
            raise _no_previous("model role")
        restored = before(self._log, write.head)
        sha256 = restored.sha256 if restored is not None else b""
        await self._check_fit(sha256)
        if wish.validate_only:
            return self._validated(write, sha256)
        restored_lsn = restored.record.lsn if restored is not None else 0
        return await self._append(
            write,
            lambda head: ModelRoleChange(
                role=role, previous_lsn=head, rollback=True, restored_lsn=restored_lsn, **_held(sha256)
            ),
        )

    async def reset_learners(self, role: int, goals: Sequence[str], wish: Wish) -> Changed:
        """Have the learners of a role begin anew when the learner process comes to the record of it.

        Args:
            role: a LearnerRole that can be reset.
            goals: whose; empty: of all.
            wish: as of every write.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, CATALOG_MISSING, and those of every write.
        """
        reset = LearnerReset(role=role, goals=sorted(goals))
        write = _Write(b"reset_learner", RESET_HEAD, reset.SerializeToString(), wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        await self._require_catalog()
        known = self.goals()
        for i, goal in enumerate(goals):
            if goal not in known:
                raise not_found("goal", goal, f"goals[{i}]")
        if wish.validate_only:
            return self._validated(write, b"")
        return await self._append(write, lambda head: LearnerReset(role=role, goals=reset.goals, previous_lsn=head))

    def told(self) -> LearnerArrays:
        """Return what the learner process told last, its learners in order of first sight; empty before the first."""
        live = self._current()
        return live.published if live is not None and live.published is not None else LearnerArrays()

    def goals(self) -> set[str]:
        """Return the goals that learners can be of: those of the catalog in force, and those that were met before."""
        live = self._current()
        return {each.goal for each in self.told().learners} | (live.catalog.goal_rows.keys() if live else set())

    def history(self, head: str, from_lsn: int | None = None) -> Iterator[Entry]:
        """Yield a history, newest first, from a change on or from the head. Cost: one read a change.

        Raises:
            TsugiError: FIELD_INVALID: from_lsn is no change of this history.
        """
        return entries(self._log, head, from_lsn)

    def holders(self) -> dict[int, bytes]:
        """Return of each role the sha256 of the bundle that has it; empty: nobody."""
        return {role: holder(self._log, head) for role, head in ROLE_HEADS.items()}

    async def catalog_data(self, revision: bytes | None) -> tuple[bytes, bytes, int]:
        """Return a catalog revision's bytes and sha256, and the present etag; None: the one in force.

        Raises:
            TsugiError: CATALOG_MISSING, RESOURCE_NOT_FOUND.
        """
        head = self.etag(CATALOG_HEAD)
        if not head:
            raise _catalog_missing()
        sha256 = revision or entry_at(self._log, head).sha256
        if all(entry.sha256 != sha256 for entry in self.history(CATALOG_HEAD)):
            raise not_found("catalog revision", sha256.hex(), "revision")
        return await asyncio.to_thread(self._blobs.get, sha256), sha256, head

    def etag(self, head: str) -> int:
        """Return the LSN of the newest change of a history, 0 before the first."""
        return self._log.head(head)

    def _allotments(self, lsn: int) -> Iterable[Allotment]:
        """Return who is in which branch of which experiment by a catalog change; nobody before the first."""
        record = self._log.get(lsn) if lsn else None
        return CatalogChange.FromString(record.payload).allotments if record is not None else ()

    def _check_catalog(self, data: bytes) -> None:
        """Compile a catalog to see that it can be, and that whoever has a model role still finds all it reads."""
        try:
            message = CatalogMessage.FromString(data)
        except DecodeError as error:
            raise TsugiError(
                ErrorReason.ERROR_REASON_REQUEST_MALFORMED, "the bytes are not a serialised tsugi.v1.Catalog"
            ) from error
        catalog = compile_catalog(message, data)
        misfits: dict[str, TsugiError] = {}
        for head in BUNDLE_ROLE_HEADS.values():
            if sha256 := holder(self._log, head):
                try:
                    bundle_columns(parse(self._blobs.get(sha256)).manifest, catalog)
                except TsugiError as error:
                    misfits[head.removeprefix("role/")] = error
        if misfits:
            told = (
                f"the {role} in force does not fit this catalog: {error.message}" for role, error in misfits.items()
            )
            raise TsugiError(
                ErrorReason.ERROR_REASON_CATALOG_INVALID,
                f"{'; '.join(told)}; assign another one first",
                violations=[
                    Violation(f"{role}.{v.path}", v.description)
                    for role, error in misfits.items()
                    for v in error.violations
                ],
            )

    async def _check_fit(self, sha256: bytes) -> None:
        if sha256 == THE_BASELINE:  # a kill switch waits for nothing
            if not self.etag(CATALOG_HEAD):
                raise _catalog_missing()
            return
        catalog = await self._require_catalog()
        if sha256:
            bundle = parse(await asyncio.to_thread(self._blobs.get, sha256))
            bundle_columns(bundle.manifest, catalog)

    async def _require_catalog(self) -> Catalog:
        """Return the catalog in force, as soon as this worker serves the newest one."""
        head = self.etag(CATALOG_HEAD)
        until = time.monotonic() + SWAP_WAIT_S_MAX
        while head and _catalog_lsn(self._current()) < head and time.monotonic() < until:  # noqa: ASYNC110  # the watcher is a thread
            await asyncio.sleep(POLL_S / 4)
        live = self._current()
        if live is None:
            raise _catalog_missing()
        return live.catalog

    def _pushed(self, sha256: bytes) -> Entry | None:
        entry = self._log.find(_Write(b"push_model", MODEL_HEAD, sha256, Wish(sha256.hex())).key(self._token_key))
        return entry_at(self._log, entry.lsn) if entry is not None else None

    def _earlier(self, write: _Write) -> Changed | None:
        """Return the change that the same request made before, if it did."""
        key = write.key(self._token_key)
        entry = self._log.find(key) if key != NO_KEY else None
        if entry is None:
            return None
        fate = Fate.DUPLICATE if entry.payload_digest == write.digest() else Fate.KEY_REUSED
        return self._stands(settled(Receipt(fate, entry.lsn, 0)))

    def _stands(self, receipt: Receipt) -> Changed:
        return Changed(
            entry_at(self._log, receipt.lsn).sha256,
            receipt.lsn,
            receipt.lsn,
            is_duplicate=receipt.fate is Fate.DUPLICATE,
        )

    def _validated(self, write: _Write, sha256: bytes) -> Changed:
        head = self.etag(write.head)
        _check_etag(write.wish, head)
        return Changed(sha256, head, 0, is_duplicate=False)

    async def _put(self, data: bytes) -> bytes:
        """Make a blob durable and return its sha256."""
        try:
            return await asyncio.to_thread(self._blobs.put, data)
        except OSError as error:
            is_full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            raise refusal(LogFullError(is_map=False) if is_full else LogUnavailableError()) from error

    async def _append(self, write: _Write, change: Callable[[int], Change]) -> Changed:
        """Append a change to its history; without an etag, after whatever came in between."""
        while True:
            head = self.etag(write.head)
            _check_etag(write.wish, head)
            message = await asyncio.to_thread(change, head)
            draft = Draft(
                kind=KINDS[type(message)],
                payload=message.SerializeToString(),
                key=write.key(self._token_key),
                payload_digest=write.digest(),
                head=write.head,
                expected_head=head,
            )
            try:
                (receipt,) = await self._committer.submit([draft])
            except (LogFullError, LogUnavailableError) as error:
                raise refusal(error) from error
            if receipt.fate is not Fate.HEAD_MOVED or write.wish.etag is not None:
                changed = self._stands(settled(receipt))
                if write.head not in {MODEL_HEAD, RESET_HEAD}:  # of which workers see nothing
                    await self._wait_until_served(changed.lsn)
                return changed

    async def _wait_until_served(self, lsn: int) -> None:
        """Wait until every worker serves a change, so that its caller may rely on it; it stands in any case."""
        until = time.monotonic() + SWAP_WAIT_S_MAX
        while not self._is_served(lsn) and time.monotonic() < until:  # noqa: ASYNC110  # other processes tell by a page
            await asyncio.sleep(POLL_S / 4)


class _Write(NamedTuple):
    """One configuration write: by which method, of which history, with which payload."""

    method: bytes
    head: str
    payload: bytes
    wish: Wish

    def key(self, token_key: TokenKey) -> bytes:
        request_id = self.wish.request_id
        return token_key.record_key(self.method, b"", request_id) if request_id else NO_KEY

    def digest(self) -> bytes:
        # Roles share a method, and so its request ids. The champion's digests are as they were when no other role could
        # be assigned, for they stand in logs; those of other roles never equal one of them.
        apart = self.head.encode() if self.head in {CHALLENGER_HEAD, LEARNER_HEAD} else b""
        return hashlib.blake2b(self.payload, digest_size=16, person=apart).digest()


async def _sha256(data: bytes) -> bytes:
    """Hash away from the event loop: 64 MiB take a tenth of a second."""
    return (await asyncio.to_thread(hashlib.sha256, data)).digest()


def _held(sha256: bytes) -> _Held:
    """Return who has a role, as a ModelRoleChange says it."""
    return {"baseline": True} if sha256 == THE_BASELINE else {"bundle_sha256": sha256}


def _catalog_lsn(live: Live | None) -> int:
    return live.heads.catalog_lsn if live is not None else 0


def _check_etag(wish: Wish, head: int) -> None:
    if wish.etag is not None and wish.etag != head:
        settled(Receipt(Fate.HEAD_MOVED, head, 0))


def _no_previous(what: str) -> TsugiError:
    return TsugiError(ErrorReason.ERROR_REASON_NO_PREVIOUS_REVISION, f"there is no earlier {what} to go back to")


def _catalog_missing() -> TsugiError:
    return TsugiError(ErrorReason.ERROR_REASON_CATALOG_MISSING, "no catalog is in force yet; push one with PushCatalog")
