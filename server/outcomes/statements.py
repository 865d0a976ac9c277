"""What people state about people: that two are one, that one is two, that somebody is to be forgotten.

Handed validated requests, checks them against the catalog and the state, and appends them with their idempotency keys.
It answers after the commit. What follows from a statement is the projector's to find out, as for all records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Final, TypeAlias

from google.protobuf.message import Message

from server.catalog.catalog import Catalog
from server.errors import TsugiError, field_invalid, not_found
from server.outcomes.ingest import Accepted, require_catalog
from server.profiles import golden, repository
from server.profiles.erased import ERASURE_HEAD, Erased
from server.profiles.identity import Named, link_rule, named
from server.storage.applied import read_applied
from server.storage.committer import GroupCommitter
from server.storage.log import Fate, Log, LogFullError, LogUnavailableError, Receipt, refusal, settled
from server.storage.record import Draft
from server.storage.store import Snapshot, Store
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import ErasureAccepted, LinkStated, ProfileSplit, RecordKind
from tsugi.log.v1.state_pb2 import StoredNode
from tsugi.v1 import catalog_pb2
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import (
    EraseProfileRequest,
    LinkIdentitiesRequest,
    LinkVerdict,
    SplitProfileRequest,
)

_Request: TypeAlias = LinkIdentitiesRequest | SplitProfileRequest | EraseProfileRequest

_LINKING: Final = frozenset({catalog_pb2.LINK_RULE_UNIQUE, catalog_pb2.LINK_RULE_SHARED_DEVICE})


class Statements:
    """Takes in what people state, for one worker.

    Args:
        log: read for repeated requests, and for erasures that are not projected yet.
        store: read for the people that identities name.
        committer: where records go.
        token_key: names request ids.
        catalog: gives the catalog in force, or None before the first.
    """

    def __init__(
        self,
        *,
        log: Log,
        store: Store,
        committer: GroupCommitter,
        token_key: TokenKey,
        catalog: Callable[[], Catalog | None],
    ) -> None:
        self._log = log
        self._store = store
        self._committer = committer
        self._token_key = token_key
        self._catalog = catalog
        self._erased = Erased(log)

    async def link(self, request: LinkIdentitiesRequest) -> Accepted | None:
        """Record what is stated about two identities; None when it was only validated.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, FIELD_INVALID, IDENTITIES_CONFLICT, IDEMPOTENCY_KEY_REUSED, LOG_*.
        """
        catalog = require_catalog(self._catalog())
        earlier = self._earlier(b"link_identities", request.request_id, request)
        if earlier is not None:
            return earlier
        with self._store.read() as snapshot:
            erased = self._erased.since(read_applied(snapshot).lsn)
            ends = [
                (path, *_require_node(snapshot, identity, path, catalog, erased))
                for path, identity in (("identity", request.identity), ("other_identity", request.other_identity))
            ]
            (_, one, _), (_, other, _) = ends
            if one.key == other.key:
                raise field_invalid("other_identity", "the same as identity; name another one")
            if request.verdict != LinkVerdict.LINK_VERDICT_DIFFERENT:
                for path, end, node in ends:
                    _require_linking(path, end, node, catalog)
                if request.verdict == LinkVerdict.LINK_VERDICT_SAME:
                    _require_room(snapshot, [node for *_, node in ends], catalog)
        if request.validate_only:
            return None
        said = LinkStated(
            identity=one.identity,
            other_identity=other.identity,
            verdict=request.verdict,
            weight=request.weight,
            stated_by=request.stated_by,
        )
        return await self._record(
            RecordKind.RECORD_KIND_LINK_STATED, said, b"link_identities", request.request_id, request,
            (one.key, other.key),
        )  # fmt: skip

    async def split(self, request: SplitProfileRequest) -> Accepted | None:
        """Record that identities leave a profile; None when it was only validated.

        Raises:
            TsugiError: RESOURCE_NOT_FOUND, FIELD_INVALID, IDEMPOTENCY_KEY_REUSED, LOG_*.
        """
        catalog = require_catalog(self._catalog())
        earlier = self._earlier(b"split_profile", request.request_id, request)
        if earlier is not None:
            return earlier
        with self._store.read() as snapshot:
            profile_key = repository.present_key(snapshot, bytes.fromhex(request.profile_id))
            keys = repository.members(snapshot, profile_key) if profile_key is not None else ()
            erased = self._erased.since(read_applied(snapshot).lsn)
            if not keys or profile_key in erased or not erased.isdisjoint(keys):
                raise not_found("profile", request.profile_id, "profile_id")
            members = {key: node for key in keys if (node := golden.node_of(snapshot, key)) is not None}
        leaving = [named(identity, catalog.profiles).key for identity in request.identities]
        for i, key in enumerate(leaving):
            if key not in members:
                raise not_found("identity of this profile", request.identities[i].namespace, f"identities[{i}]")
        staying = [key for key in members if key not in leaving]
        if not staying:
            raise field_invalid("identities", "at least one identity must stay")
        if request.validate_only:
            return None
        said = ProfileSplit(
            leaving=[members[key].identity for key in dict.fromkeys(leaving)],
            staying=[members[key].identity for key in staying],
            stated_by=request.stated_by,
        )
        return await self._record(
            RecordKind.RECORD_KIND_PROFILE_SPLIT, said, b"split_profile", request.request_id, request, tuple(members)
        )

    async def erase(self, request: EraseProfileRequest) -> tuple[bytes, Accepted]:
        """Record that a person is to be forgotten; return the erasure's key with it. Strangers are answered alike.

        Raises:
            TsugiError: IDEMPOTENCY_KEY_REUSED, LOG_*.
        """
        catalog = require_catalog(self._catalog())
        erasure_key = self._token_key.record_key(b"erase_profile", b"", request.request_id)
        accepted = ErasureAccepted(erasure_key=erasure_key)
        with self._store.read() as snapshot:
            profile_key: bytes | None
            if request.profile_id:
                profile_key = repository.present_key(snapshot, bytes.fromhex(request.profile_id))
                accepted.profile_keys.append(bytes.fromhex(request.profile_id))
            else:
                one = named(request.identity, catalog.profiles)
                accepted.identity_keys.append(one.key)
                node = golden.node_of(snapshot, one.key)
                profile_key = node.profile_key if node is not None else None
            for key in repository.members(snapshot, profile_key) if profile_key is not None else ():
                node = golden.node_of(snapshot, key)
                accepted.identity_keys.append(key)
                if node is not None:
                    accepted.profile_keys.append(node.own_profile_key)
        while True:
            accepted.previous_lsn = self._log.head(ERASURE_HEAD)
            draft = Draft(
                kind=RecordKind.RECORD_KIND_ERASURE_ACCEPTED,
                payload=accepted.SerializeToString(),
                key=erasure_key,
                payload_digest=_digest(request),
                head=ERASURE_HEAD,
                expected_head=accepted.previous_lsn,
            )
            try:
                return erasure_key, await self._commit(draft)
            except TsugiError as error:
                if error.reason != ErrorReason.ERROR_REASON_ETAG_MISMATCH:  # another erasure came in between
                    raise

    def _earlier(self, method: bytes, request_id: str, request: _Request) -> Accepted | None:
        """Return what the same request was answered before: what it names may be gone by now."""
        key = self._token_key.record_key(method, b"", request_id)
        entry = self._log.find(key)
        if entry is None:
            return None
        fate = Fate.DUPLICATE if entry.payload_digest == _digest(request) else Fate.KEY_REUSED
        receipt = settled(Receipt(fate, entry.lsn, 0))
        return Accepted(receipt.lsn, is_duplicate=True)

    async def _record(
        self, kind: int, said: Message, method: bytes, request_id: str, request: _Request, subjects: Sequence[bytes]
    ) -> Accepted:
        return await self._commit(
            Draft(
                kind=kind,
                payload=said.SerializeToString(),
                key=self._token_key.record_key(method, b"", request_id),
                payload_digest=_digest(request),
                subjects=tuple(subjects),
            )
        )

    async def _commit(self, draft: Draft) -> Accepted:
        try:
            receipt = settled((await self._committer.submit([draft]))[0])
        except (LogFullError, LogUnavailableError) as error:
            raise refusal(error) from error
        return Accepted(receipt.lsn, receipt.fate is Fate.DUPLICATE)


def _require_node(
    snapshot: Snapshot, identity: Identity, path: str, catalog: Catalog, erased: frozenset[bytes]
) -> tuple[Named, StoredNode]:
    if identity.namespace not in catalog.profiles.namespaces:
        raise not_found("identity namespace", identity.namespace, f"{path}.namespace")
    one = named(identity, catalog.profiles)
    node = golden.node_of(snapshot, one.key)
    if node is None or one.key in erased or node.profile_key in erased:
        raise not_found("identity", identity.namespace, path)
    return one, node


def _require_linking(path: str, one: Named, node: StoredNode, catalog: Catalog) -> None:
    """Refuse to link by a value that says nothing about who one person is."""
    namespace = one.identity.namespace
    if node.too_shared or node.uncleansed or link_rule(namespace, catalog.profiles) not in _LINKING:
        raise TsugiError(
            ErrorReason.ERROR_REASON_IDENTITIES_CONFLICT,
            f"{path}: by the rules of the catalog such a value of {namespace} links nobody",
            field=path,
            namespace=namespace,
        )


def _require_room(snapshot: Snapshot, nodes: Sequence[StoredNode], catalog: Catalog) -> None:
    """Refuse to make one person of two who have more values of a namespace than one person may."""
    keys = dict.fromkeys(key for node in nodes for key in repository.members(snapshot, node.profile_key))
    counts: dict[str, int] = {}
    for key in keys:
        member = golden.node_of(snapshot, key)
        if member is not None:
            counts[member.identity.namespace] = counts.get(member.identity.namespace, 0) + 1
    for name, namespace in catalog.profiles.namespaces.items():
        if 0 < namespace.values_per_profile_max < counts.get(name, 0):
            raise TsugiError(
                ErrorReason.ERROR_REASON_IDENTITIES_CONFLICT,
                f"identity: together they have {counts[name]} values of {name}, one person has at most "
                f"{namespace.values_per_profile_max}; correct one of them",
                field="identity",
                namespace=name,
            )


def _digest(request: _Request) -> bytes:
    """Tell two requests under one id apart; a check of a request is no other request."""
    said = deepcopy(request)
    if not isinstance(said, EraseProfileRequest):
        said.validate_only = False
    return hashlib.blake2b(said.SerializeToString(deterministic=True), digest_size=16).digest()
