"""What is in force and how it changes: catalogs, bundles and model roles.

Every change is checked as a whole, its blob made durable first, and then one log record says it; the record is the
change. Who writes with an etag is refused when somebody else wrote in between. Histories are chains of records: each
change names the one before it, so listing and rolling back need nothing but the log.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.decisioning.bundle_columns import bundle_columns
from server.decisioning.live import CATALOG_HEAD, CHAMPION_HEAD, MODEL_HEAD, POLL_S, Live
from server.errors import TsugiError, Violation, field_invalid, not_found
from server.registry.blobs import Blobs
from server.registry.bundle import check_in_sandbox, parse
from server.storage.committer import GroupCommitter
from server.storage.log import Fate, Log, LogFullError, LogUnavailableError, Receipt, refusal, settled
from server.storage.record import NO_KEY, Draft, Record
from server.tokens import TokenKey
from tsugi.log.v1.bundle_pb2 import Bundle
from tsugi.log.v1.record_pb2 import CatalogChange, ModelPushed, ModelRoleChange, RecordKind
from tsugi.v1.catalog_pb2 import Catalog as CatalogMessage
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.model_pb2 import ModelRole

Change = CatalogChange | ModelPushed | ModelRoleChange

_MESSAGES: Final[dict[int, type[Change]]] = {
    RecordKind.RECORD_KIND_CATALOG_CHANGE: CatalogChange,
    RecordKind.RECORD_KIND_MODEL_PUSHED: ModelPushed,
    RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE: ModelRoleChange,
}
_KINDS: Final = {
    CATALOG_HEAD: RecordKind.RECORD_KIND_CATALOG_CHANGE,
    MODEL_HEAD: RecordKind.RECORD_KIND_MODEL_PUSHED,
    CHAMPION_HEAD: RecordKind.RECORD_KIND_MODEL_ROLE_CHANGE,
}


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


class Entry(NamedTuple):
    """One link of a history."""

    record: Record
    change: Change

    @property
    def sha256(self) -> bytes:
        """What the change is about: a catalog or a bundle."""
        return self.change.catalog_sha256 if isinstance(self.change, CatalogChange) else self.change.bundle_sha256


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
        return await self._append(write, lambda head: CatalogChange(catalog_sha256=sha256, previous_lsn=head))

    async def rollback_catalog(self, revision: bytes | None, wish: Wish) -> Changed:
        """Put an earlier catalog in force again: the named one, or the one before the present.

        Raises:
            TsugiError: NO_PREVIOUS_REVISION, RESOURCE_NOT_FOUND, and those of every write.
        """
        write = _Write(b"rollback_catalog", CATALOG_HEAD, revision or b"", wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        if revision is None:
            restored = self._before(CATALOG_HEAD)
            if restored is None:
                raise _no_previous("catalog")
        else:
            restored = next((entry for entry in self.history(CATALOG_HEAD) if entry.sha256 == revision), None)
            if restored is None:
                raise not_found("catalog revision", revision.hex(), "revision")
        await asyncio.to_thread(self._blobs.get, restored.sha256)  # what cannot be loaded must not be put in force
        if wish.validate_only:
            return self._validated(write, restored.sha256)
        return await self._append(
            write,
            lambda head: CatalogChange(
                catalog_sha256=restored.sha256, previous_lsn=head, rollback=True, restored_lsn=restored.record.lsn
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
        return self._entry(changed.lsn), bundle, changed.is_duplicate

    async def assign_champion(self, sha256: bytes, wish: Wish) -> Changed:
        """Give the role champion to a stored bundle, or to none when sha256 is empty.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, BUNDLE_CONTRACT_MISMATCH, CATALOG_MISSING, and those of every write.
        """
        write = _Write(b"assign_model_role", CHAMPION_HEAD, sha256, wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        if sha256 and self._pushed(sha256) is None:
            raise not_found("model revision", sha256.hex(), "revision")
        await self._check_fit(sha256)
        if wish.validate_only:
            return self._validated(write, sha256)
        return await self._append(
            write,
            lambda head: ModelRoleChange(role=ModelRole.MODEL_ROLE_CHAMPION, bundle_sha256=sha256, previous_lsn=head),
        )

    async def rollback_champion(self, wish: Wish) -> Changed:
        """Give the role champion back to who had it before, or to none.

        Raises:
            TsugiError: NO_PREVIOUS_REVISION, BUNDLE_CONTRACT_MISMATCH, and those of every write.
        """
        write = _Write(b"rollback_model", CHAMPION_HEAD, b"", wish)
        if (earlier := self._earlier(write)) is not None:
            return earlier
        present = self._base(CHAMPION_HEAD)
        if present is None:
            raise _no_previous("model role")
        restored = self._before(CHAMPION_HEAD)
        sha256 = restored.sha256 if restored is not None else b""
        await self._check_fit(sha256)
        if wish.validate_only:
            return self._validated(write, sha256)
        restored_lsn = restored.record.lsn if restored is not None else 0
        return await self._append(
            write,
            lambda head: ModelRoleChange(
                role=ModelRole.MODEL_ROLE_CHAMPION,
                bundle_sha256=sha256,
                previous_lsn=head,
                rollback=True,
                restored_lsn=restored_lsn,
            ),
        )

    def history(self, head: str, from_lsn: int | None = None) -> Iterator[Entry]:
        """Yield a history, newest first, from a change on or from the head. Cost: one read a change.

        Raises:
            TsugiError: FIELD_INVALID: from_lsn is no change of this history.
        """
        lsn = self._log.head(head) if from_lsn is None else from_lsn
        first = self._log.get(lsn) if from_lsn else None
        if from_lsn is not None and (first is None or first.kind != _KINDS[head]):
            raise field_invalid("page_token", "pass it exactly as received")
        while lsn:
            entry = self._entry(lsn)
            yield entry
            lsn = entry.change.previous_lsn

    async def catalog_data(self, revision: bytes | None) -> tuple[bytes, bytes, int]:
        """Return a catalog revision's bytes and sha256, and the present etag; None: the one in force.

        Raises:
            TsugiError: CATALOG_MISSING, RESOURCE_NOT_FOUND.
        """
        head = self.etag(CATALOG_HEAD)
        if not head:
            raise _catalog_missing()
        sha256 = revision or self._entry(head).sha256
        if all(entry.sha256 != sha256 for entry in self.history(CATALOG_HEAD)):
            raise not_found("catalog revision", sha256.hex(), "revision")
        return await asyncio.to_thread(self._blobs.get, sha256), sha256, head

    def etag(self, head: str) -> int:
        """Return the LSN of the newest change of a history, 0 before the first."""
        return self._log.head(head)

    def _check_catalog(self, data: bytes) -> None:
        """Compile a catalog to see that it can be, and that the champion still finds all it reads."""
        try:
            message = CatalogMessage.FromString(data)
        except DecodeError as error:
            raise TsugiError(
                ErrorReason.ERROR_REASON_REQUEST_MALFORMED, "the bytes are not a serialised tsugi.v1.Catalog"
            ) from error
        catalog = compile_catalog(message, data)
        champion_lsn = self.etag(CHAMPION_HEAD)
        sha256 = self._entry(champion_lsn).sha256 if champion_lsn else b""
        if sha256:
            try:
                bundle_columns(parse(self._blobs.get(sha256)).manifest, catalog)
            except TsugiError as error:
                raise TsugiError(
                    ErrorReason.ERROR_REASON_CATALOG_INVALID,
                    f"the champion in force does not fit this catalog: {error.message}; assign another one first",
                    violations=[Violation(f"champion.{v.path}", v.description) for v in error.violations],
                ) from error

    async def _check_fit(self, sha256: bytes) -> None:
        catalog = await self._require_catalog()
        if sha256:
            bundle = parse(await asyncio.to_thread(self._blobs.get, sha256))
            bundle_columns(bundle.manifest, catalog)

    async def _require_catalog(self) -> Catalog:
        """Return the catalog in force, as soon as this worker serves the newest one."""
        head = self.etag(CATALOG_HEAD)
        until = time.monotonic() + SWAP_WAIT_S_MAX
        while head and ((live := self._current()) is None or live.catalog_lsn < head) and time.monotonic() < until:  # noqa: ASYNC110  # the watcher is a thread
            await asyncio.sleep(POLL_S / 4)
        live = self._current()
        if live is None:
            raise _catalog_missing()
        return live.catalog

    def _pushed(self, sha256: bytes) -> Entry | None:
        entry = self._log.find(_Write(b"push_model", MODEL_HEAD, sha256, Wish(sha256.hex())).key(self._token_key))
        return self._entry(entry.lsn) if entry is not None else None

    def _entry(self, lsn: int) -> Entry:
        record = self._log.get(lsn)
        assert record is not None, "a history names records"
        return Entry(record, _MESSAGES[record.kind].FromString(record.payload))

    def _base(self, head: str) -> Entry | None:
        """Return the change whose content is in force: the newest one, or the one that it restored; None for none."""
        lsn = self._log.head(head)
        if not lsn:
            return None
        newest = self._entry(lsn)
        assert isinstance(newest.change, CatalogChange | ModelRoleChange), "only these are rolled back"
        if not newest.change.rollback:
            return newest
        return self._entry(newest.change.restored_lsn) if newest.change.restored_lsn else None

    def _before(self, head: str) -> Entry | None:
        """Return the change before the one whose content is in force."""
        base = self._base(head)
        if base is None or not base.change.previous_lsn:
            return None
        before = self._entry(base.change.previous_lsn)
        assert isinstance(before.change, CatalogChange | ModelRoleChange), "only these are rolled back"
        restored_lsn = before.change.restored_lsn
        return self._entry(restored_lsn) if before.change.rollback and restored_lsn else before

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
            self._entry(receipt.lsn).sha256, receipt.lsn, receipt.lsn, is_duplicate=receipt.fate is Fate.DUPLICATE
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
            message = change(head)
            draft = Draft(
                kind=_KINDS[write.head],
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
                if write.head != MODEL_HEAD:
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
        return hashlib.blake2b(self.payload, digest_size=16).digest()


async def _sha256(data: bytes) -> bytes:
    """Hash away from the event loop: 64 MiB take a tenth of a second."""
    return (await asyncio.to_thread(hashlib.sha256, data)).digest()


def _check_etag(wish: Wish, head: int) -> None:
    if wish.etag is not None and wish.etag != head:
        settled(Receipt(Fate.HEAD_MOVED, head, 0))


def _no_previous(what: str) -> TsugiError:
    return TsugiError(ErrorReason.ERROR_REASON_NO_PREVIOUS_REVISION, f"there is no earlier {what} to go back to")


def _catalog_missing() -> TsugiError:
    return TsugiError(ErrorReason.ERROR_REASON_CATALOG_MISSING, "no catalog is in force yet; push one with PushCatalog")
