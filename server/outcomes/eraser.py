"""Carries erasures out: from the wish in the log to files that hold nothing of the person any more.

Runs beside the projector, in its process, on a thread of its own. The projector has forgotten the person already and
noted which records are about them. From there: the records become tombstones; the log is copied without what they said;
a record says so, upon which the learner learns anew without them; the state is copied too; and when all of that is done
a signed receipt is recorded. Each step can be repeated, so after a kill all of them begin again, once the state has
come as far as the log was: what is fulfilled already is not fulfilled twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from server.outcomes.erasure import records_since
from server.profiles.erased import ERASED_HEAD, ERASURE_HEAD
from server.storage.applied import read_applied
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import LogUnavailableError
from server.storage.record import Draft
from server.storage.store import Table
from tsugi.log.v1.record_pb2 import ErasedFromLog, ErasureAccepted, ErasureFulfilled, LogErased, RecordKind
from tsugi.log.v1.state_pb2 import StoredErasure
from tsugi.v1.profile_service_pb2 import ErasureReceipt

POLL_S: Final = 0.1
TOGETHER_MAX: Final = 200  # erasures carried out with one copy of the files
_RETRY_S: Final = 1.0


class _Pending(NamedTuple):
    key: bytes
    stored: StoredErasure


class Eraser:
    """Carries out what the state says is to be erased.

    Args:
        log: writable; not shared with another thread that appends.
        store: the projector's.
        store_turn: held by whoever writes to the store.
        receipt_secret: 32 bytes, the private key that signs receipts.
        wall_us: the wall clock.
        learned_anew: says whether nothing that was learned rests on what was erased up to a LogErased record.
        on_log_failure: called once when the log has become unusable; nothing more is done then.
    """

    def __init__(
        self,
        *,
        log: LmdbLog,
        store: LmdbStore,
        store_turn: threading.Lock,
        receipt_secret: bytes,
        wall_us: Callable[[], int],
        learned_anew: Callable[[int], bool],
        on_log_failure: Callable[[], None],
    ) -> None:
        self._log = log
        self._store = store
        self._store_turn = store_turn
        self._key = Ed25519PrivateKey.from_private_bytes(receipt_secret)
        self._wall_us = wall_us
        self._learned_anew = learned_anew
        self._on_log_failure = on_log_failure
        self._told_lsn = log.tail().lsn  # what was recorded of erasures so far; a state before it may not know of it

    def run(self, stop: threading.Event) -> None:
        """Carry out erasures until told to stop."""
        while not stop.wait(POLL_S):
            try:
                self.step(stop)
            except LogUnavailableError:
                self._on_log_failure()
                return
            except Exception:  # a tailing loop: whatever it is, the wish stands, and is tried again
                structlog.get_logger().exception("erasure_delayed")
                stop.wait(_RETRY_S)

    def step(self, stop: threading.Event) -> int:
        """Carry out every erasure that is pending, and return how many; none when told to stop in between."""
        pending = self._pending()
        if not pending:
            return 0
        started = time.monotonic()
        lsns = {lsn for each in pending for lsn in each.stored.lsns}
        wishes = {each.stored.lsn for each in pending}
        self._free_head(wishes)
        # These first: the wish leads to them.
        self._log.erase([lsn for each in pending for lsn in records_since(self._log, each.stored)])
        self._log.erase(sorted(lsns | wishes))
        self._log.compact()
        erased_lsn = self._append(RecordKind.RECORD_KIND_LOG_ERASED, _told(pending, len(lsns)), ERASED_HEAD)
        with self._store_turn:
            self._store.compact()
        while not self._learned_anew(erased_lsn):
            if stop.wait(POLL_S):
                return 0
        for each in pending:
            fulfilled = ErasureFulfilled(
                erasure_key=each.key,
                erased_records=each.stored.erased_records,
                receipt=self._receipt(each).SerializeToString(deterministic=True),
            )
            self._told_lsn = self._append(RecordKind.RECORD_KIND_ERASURE_FULFILLED, fulfilled.SerializeToString())
        structlog.get_logger().info(
            "erased", n_erasures=len(pending), n_records=len(lsns), seconds=round(time.monotonic() - started, 3)
        )
        return len(pending)

    def _free_head(self, wishes: set[int]) -> None:
        """Let the chain of wishes go on without those that are carried out; they name keys of people too."""
        while (head := self._log.head(ERASURE_HEAD)) in wishes:
            following = Draft(
                kind=RecordKind.RECORD_KIND_ERASURE_ACCEPTED,
                payload=ErasureAccepted(previous_lsn=head).SerializeToString(),
                head=ERASURE_HEAD,
                expected_head=head,
            )
            self._log.append([following], self._wall_us())

    def _pending(self) -> list[_Pending]:
        with self._store.read() as snapshot:
            if read_applied(snapshot).lsn < self._told_lsn:
                return []
            found = [_Pending(key, StoredErasure.FromString(value)) for key, value in snapshot.scan(Table.ERASURES)]
        open_ones = [each for each in found if not each.stored.receipt]
        return sorted(open_ones, key=lambda each: each.stored.lsn)[:TOGETHER_MAX]

    def _receipt(self, pending: _Pending) -> ErasureReceipt:
        receipt = ErasureReceipt(
            erasure_id=pending.key.hex(), erased_records=pending.stored.erased_records, log_id=self._log.log_id.hex()
        )
        receipt.accept_time.FromMicroseconds(pending.stored.time_us)
        receipt.fulfil_time.FromMicroseconds(self._wall_us())
        receipt.signature = self._key.sign(receipt.SerializeToString(deterministic=True))
        receipt.public_key = self._key.public_key().public_bytes_raw()
        return receipt

    def _append(self, kind: int, payload: bytes, head: str = "") -> int:
        (receipt,) = self._log.append([Draft(kind=kind, payload=payload, head=head)], self._wall_us())
        return receipt.lsn


def _told(pending: list[_Pending], n_records: int) -> bytes:
    erasures = [
        ErasedFromLog(
            erasure_key=each.key,
            lsn=each.stored.lsn,
            time_us=each.stored.time_us,
            erased_records=each.stored.erased_records,
        )
        for each in pending
    ]
    return LogErased(erased_records=n_records, erasures=erasures).SerializeToString()


def verify_receipt(receipt: ErasureReceipt) -> None:
    """Check a receipt's signature with the public key it states.

    Raises:
        cryptography.exceptions.InvalidSignature: it was not signed with that key, or was altered.
    """
    signed = ErasureReceipt()
    signed.CopyFrom(receipt)
    signed.ClearField("signature")
    signed.ClearField("public_key")
    key = Ed25519PublicKey.from_public_bytes(receipt.public_key)
    key.verify(receipt.signature, signed.SerializeToString(deterministic=True))
