"""How a wish to be forgotten is carried out, step by step, on a log and a state of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.outcomes.eraser import TOGETHER_MAX, Eraser, verify_receipt
from server.outcomes.projector import Projector
from server.profiles.identity import identity_key
from server.storage.generations import newest
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import LogUnavailableError, Receipt, follow
from server.storage.record import Draft
from server.storage.store import Table
from tests.support.compacting import Program
from tests.support.erasing import files_with, held
from tests.support.faults import WAIT_S_MAX, KilledError
from tests.support.histories import SECOND_US, START_US, History, decision_key
from tests.support.projecting import CATALOG, load_catalog
from tsugi.log.v1.record_pb2 import (
    DecisionRecord,
    ErasureAccepted,
    ErasureFulfilled,
    LogErased,
    OutcomeRecord,
    RecordKind,
)
from tsugi.log.v1.state_pb2 import StoredErasure
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import ErasureReceipt

MAP_BYTES = 1 << 26
SECRET = b"s" * 32
KEY, OTHER_KEY = b"e" * 16, b"f" * 16
ANNA, BERTA = {"customer_number": "canary-anna"}, {"customer_number": "berta"}
WISH = RecordKind.RECORD_KIND_ERASURE_ACCEPTED
LOG_ERASED = RecordKind.RECORD_KIND_LOG_ERASED
FULFILLED = RecordKind.RECORD_KIND_ERASURE_FULFILLED
STEPS = [
    "go on with the chain of wishes", "erase since", "erase", "compact the log", "say so", "compact the state",
    "ask the learner", "fulfil",
]  # fmt: skip

At = Callable[[str], None]


class _Log(LmdbLog):
    """A log that tells before each change what it is asked to do."""

    def __init__(self, folder: Path, at: At) -> None:
        super().__init__(folder, MAP_BYTES)
        self.at = at
        self._n_erased = 0

    def append(self, drafts: Any, wall_us: int) -> list[Receipt]:
        names = {WISH: STEPS[0], LOG_ERASED: "say so", FULFILLED: "fulfil"}
        self.at(names.get(drafts[0].kind, "record"))
        return super().append(drafts, wall_us)

    def erase(self, lsns: Any) -> int:
        self._n_erased += 1
        self.at("erase since" if self._n_erased % 2 else "erase")
        return super().erase(lsns)

    def compact(self, *more: Any) -> None:
        self.at("compact the log")
        super().compact(*more)


class _Store(LmdbStore):
    def __init__(self, folder: Path, at: At) -> None:
        super().__init__(folder, MAP_BYTES)
        self.at = at

    def compact(self, *more: Any) -> None:
        self.at("compact the state")
        super().compact(*more)


class Desk:
    """A log, a state, who projects and who erases; as after a start of the process.

    Attributes:
        steps: what was done, in order.
        is_learned: what the learner says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[str] = []
        self.is_learned = True
        self.before: At = lambda _step: None  # called before a step
        self.log_failures = 0
        self._start()

    def _start(self) -> None:
        self.log, self.store = _Log(self.folder / "log", self._at), _Store(self.folder / "state", self._at)
        self.projector = Projector(self.log, self.store, load_catalog)
        self.history = History(self.log)
        self.store_turn = threading.Lock()
        self.eraser = Eraser(
            log=self.log,
            store=self.store,
            store_turn=self.store_turn,
            receipt_secret=SECRET,
            wall_us=lambda: START_US + 60 * SECOND_US,
            learned_anew=self._learned_anew,
            on_log_failure=self._failed,
        )

    def start_again(self) -> None:
        """As a new process would after a kill."""
        self.close()
        self.before = lambda _step: None
        self._start()

    def close(self) -> None:
        self.log.close()
        self.store.close()

    def project(self) -> None:
        while self.projector.step():
            pass

    def step(self) -> int:
        return self.eraser.step(threading.Event())

    def erasures(self) -> dict[bytes, StoredErasure]:
        with self.store.read() as snapshot:
            return {key: StoredErasure.FromString(value) for key, value in snapshot.scan(Table.ERASURES)}

    def receipts(self) -> dict[bytes, ErasureReceipt]:
        return {key: ErasureReceipt.FromString(each.receipt) for key, each in self.erasures().items() if each.receipt}

    def recorded(self, kind: int) -> list[bytes]:
        return [record.payload for record in follow(self.log, 1) if record.kind == kind and not record.is_tombstone]

    def known(self, who: dict[str, str]) -> bool:
        ((namespace, value),) = who.items()
        with self.store.read() as snapshot:
            return snapshot.get(Table.NODES, identity_key(Identity(namespace=namespace, value=value))) is not None

    def forget(self, erasure_key: bytes, who: dict[str, str], *profile_keys: bytes) -> int:
        """Record a wish as a worker would, at the head of the chain."""
        keys = [identity_key(Identity(namespace=namespace, value=value)) for namespace, value in who.items()]
        accepted = ErasureAccepted(
            erasure_key=erasure_key,
            identity_keys=keys,
            profile_keys=profile_keys,
            previous_lsn=self.log.head("erasure"),
        )
        draft = Draft(WISH, accepted.SerializeToString(), erasure_key, head="erasure")
        (receipt,) = self.log.append([draft], self.history.now_us)
        return receipt.lsn

    def _at(self, step: str) -> None:
        self.before(step)
        self.steps.append(step)

    def _learned_anew(self, erased_lsn: int) -> bool:
        self._at("ask the learner")
        record = self.log.get(erased_lsn)
        assert record is not None
        assert record.kind == LOG_ERASED
        return self.is_learned

    def _failed(self) -> None:
        self.log_failures += 1


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Gives a desk where two people are known and one of them wishes to be forgotten."""
    desk = Desk(tmp_path)
    desk.history.put_in_force(CATALOG)
    anna = desk.history.profile_key(desk.history.know(ANNA, {"age": 31.0}))
    desk.history.know(BERTA, {"age": 32.0})
    desk.history.decide(decision_key(1), ["canary-action"], profile_key=anna)
    desk.forget(KEY, ANNA, anna)
    desk.project()
    desk.steps.clear()
    yield desk
    desk.close()


def assert_gone(desk: Desk) -> None:
    desk.project()
    assert held(files_with(desk.folder, ["canary"])) == {}
    assert desk.receipts().keys() == {KEY}
    assert desk.known(BERTA)
    desk.log.verify()
    assert desk.step() == 0


def test_erasure_is_carried_out_step_by_step(desk: Desk) -> None:
    assert held(files_with(desk.folder, ["canary"])), "the search can fail"
    assert desk.step() == 1
    assert desk.steps == STEPS
    assert_gone(desk)
    assert [LogErased.FromString(each).erased_records for each in desk.recorded(LOG_ERASED)] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_before_any_step_the_next_process_begins_again_and_ends_well(desk: Desk, step: str) -> None:
    def kill(at: str) -> None:
        if at == step:
            raise KilledError

    desk.before = kill
    with pytest.raises(KilledError):
        desk.step()
    desk.start_again()
    desk.project()
    assert desk.step() == 1
    assert_gone(desk)
    assert len(desk.recorded(FULFILLED)) == 1


def test_receipt_is_signed_and_names_nobody(desk: Desk) -> None:
    desk.step()
    desk.project()
    receipt = desk.receipts()[KEY]
    verify_receipt(receipt)
    assert receipt.public_key == Ed25519PrivateKey.from_private_bytes(SECRET).public_key().public_bytes_raw()
    assert (receipt.erasure_id, receipt.erased_records) == (KEY.hex(), 2)
    assert receipt.log_id == desk.log.log_id.hex()
    assert receipt.accept_time.ToMicroseconds() == START_US
    assert receipt.fulfil_time.ToMicroseconds() == START_US + 60 * SECOND_US
    receipt.erased_records = 1
    with pytest.raises(InvalidSignature):
        verify_receipt(receipt)


def test_wishes_that_are_there_together_share_one_copy_and_are_fulfilled_in_order(desk: Desk) -> None:
    desk.forget(OTHER_KEY, BERTA)
    desk.project()
    assert desk.step() == 2
    desk.project()
    assert desk.steps.count("compact the log") == desk.steps.count("compact the state") == 1
    fulfilled = [ErasureFulfilled.FromString(each) for each in desk.recorded(FULFILLED)]
    assert [each.erasure_key for each in fulfilled] == [KEY, OTHER_KEY]
    assert not desk.known(BERTA)


@pytest.mark.slow
def test_more_wishes_than_are_taken_together_are_carried_out_at_the_next_turn(desk: Desk) -> None:
    for number in range(TOGETHER_MAX):
        desk.forget(number.to_bytes(16, "big"), {"customer_number": f"stranger {number}"})
    desk.project()
    n_done = []
    for _ in range(3):
        n_done.append(desk.step())
        desk.project()
    assert n_done == [TOGETHER_MAX, 1, 0]
    assert len(desk.receipts()) == TOGETHER_MAX + 1


def test_wish_that_comes_meanwhile_waits_for_the_next_turn(desk: Desk) -> None:
    def wish(at: str) -> None:
        if at == "compact the log":
            desk.before = lambda _step: None
            desk.forget(OTHER_KEY, BERTA)
            desk.project()

    desk.before = wish
    assert desk.step() == 1
    desk.project()
    assert desk.receipts().keys() == {KEY}
    assert desk.step() == 1
    desk.project()
    assert desk.receipts().keys() == {KEY, OTHER_KEY}


def test_what_is_fulfilled_is_not_fulfilled_again_by_one_who_starts_before_the_state_knows(desk: Desk) -> None:
    desk.step()
    desk.start_again()
    desk.steps.clear()
    assert desk.step() == 0, "the state has not come as far as the log"
    desk.project()
    assert desk.step() == 0
    assert desk.steps == []
    assert_gone(desk)


def test_state_made_anew_from_the_tombstones_asks_for_nothing_more(desk: Desk) -> None:
    desk.step()
    desk.project()
    before = desk.erasures()
    desk.close()
    desk.folder.joinpath("state").rename(desk.folder / "old state")
    desk._start()
    desk.steps.clear()
    while desk.projector.step():
        assert desk.step() == 0
    assert desk.erasures() == before
    assert desk.steps == []


def test_outcome_and_decision_that_were_under_way_go_with_the_person(desk: Desk) -> None:
    (wish,) = desk.erasures().values()
    decided = desk.log.get(wish.lsns[-1])
    assert decided is not None
    anna = DecisionRecord.FromString(decided.payload).profile_key
    late = desk.history.decide(decision_key(2), ["canary-late"], profile_key=anna)
    outcomes = [
        desk.history.record(
            RecordKind.RECORD_KIND_OUTCOME,
            OutcomeRecord(decision_key=decision_key(number), action=action, type="click"),
            subjects=(anna,),
        )
        for number, action in ((1, "canary-action"), (2, "canary-late"))
    ]
    news = desk.history.know(ANNA, {"age": 33.0})  # by now they are somebody new
    theirs = desk.history.decide(decision_key(3), ["action_1"], profile_key=desk.history.profile_key(news))
    desk.project()
    assert desk.step() == 1
    kept = {lsn: (record := desk.log.get(lsn)) is not None and not record.is_tombstone for lsn in (news, theirs)}
    gone = {lsn: (record := desk.log.get(lsn)) is not None and record.is_tombstone for lsn in (late, *outcomes)}
    assert kept == {news: True, theirs: True}
    assert gone == {late: True, outcomes[0]: True, outcomes[1]: True}
    assert held(files_with(desk.folder, ["canary-late", "canary-action"], [anna])) == {}
    desk.log.verify()


def test_nothing_is_fulfilled_before_the_learner_has_learned_anew(desk: Desk) -> None:
    desk.is_learned = False
    stop = threading.Event()
    desk.before = lambda step: stop.set() if step == "ask the learner" else None
    assert desk.eraser.step(stop) == 0
    desk.project()
    assert desk.receipts() == {}
    desk.is_learned = True
    assert desk.step() == 1
    assert_gone(desk)


@pytest.mark.slow
def test_another_process_appends_before_every_step(desk: Desk) -> None:
    told: list[str] = []
    with Program("log", desk.folder / "log", MAP_BYTES) as other:
        desk.before = lambda _step: told.append(other.ask("append"))
        assert desk.step() == 1
    desk.before = lambda _step: None
    assert len(told) == len(STEPS)
    acknowledged = dict(pair.split(":") for line in told for pair in line.split())
    standing = {record.key.hex(): str(record.lsn) for record in follow(desk.log, 1) if record.key.hex() in acknowledged}
    assert standing == acknowledged
    desk.project()
    assert held(files_with(desk.folder, ["canary"])) == {}


def test_state_is_copied_only_while_nobody_writes_to_it(desk: Desk) -> None:
    held_by_eraser: list[bool] = []
    desk.before = lambda step: held_by_eraser.append(desk.store_turn.locked())
    desk.step()
    assert held_by_eraser == [step == "compact the state" for step in STEPS]


class _Hasty(threading.Event):
    """Nobody waits for it; told to stop after some turns."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self._turns = turns

    def wait(self, timeout: float | None = None) -> bool:
        self._turns -= 1
        if self._turns < 0:
            self.set()
        return self.is_set()


def test_step_that_fails_is_tried_again(desk: Desk) -> None:
    def fail(step: str) -> None:
        if step == "compact the log":
            desk.before = lambda _step: None
            raise OSError("no space left on device")

    desk.before = fail
    desk.eraser.run(_Hasty(4))
    assert desk.steps.count("compact the log") == 1
    assert_gone(desk)
    assert desk.log_failures == 0


def test_log_that_became_unusable_ends_the_work_and_is_told_of(desk: Desk) -> None:
    def fail(step: str) -> None:
        if step == "say so":
            raise LogUnavailableError("disk")

    desk.before = fail
    thread = threading.Thread(target=desk.eraser.run, args=(threading.Event(),))
    thread.start()
    thread.join(WAIT_S_MAX)
    assert not thread.is_alive()
    assert desk.log_failures == 1
    assert newest(desk.folder / "log") == 1
    desk.before = lambda _step: None
