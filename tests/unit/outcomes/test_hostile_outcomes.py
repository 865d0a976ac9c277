"""Outcomes that nobody should send, through the servicer into the log, the state and the learner's join.

Each is refused with its reason and path, or accepted and without effect; whatever was accepted, projector and learner
go on, and what is good beside it counts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.outcomes.ingest import CLOCK_SKEW_US, Ingest
from server.outcomes.projector import Projector, state_hash
from server.rpc.methods import Context
from server.rpc.outcome_servicer import OutcomeServicer
from server.rpc.status import CODES
from server.storage.committer import GroupCommitter
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Table
from tests.support.catalogs import compiled
from tests.support.deciding import TOKEN_KEY, key_of
from tests.support.histories import START_US, History, erase
from training.rewards import Lesson, Rewards, terms_of
from tsugi.log.v1.record_pb2 import DecisionRecord, Provenance, RecordKind, SlotRecord
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.outcome_service_pb2 import BatchReportOutcomesRequest, ReportOutcomeRequest, ReportOutcomeResult

CONTEXT = cast(Context, None)
ACTIONS: Final = ("action_1", "action_2")
ANNA: Final = {"customer_number": "1"}
WINDOW_US: Final = 2_000_000
LATE_US: Final = 5_000_000
YEAR_1_S: Final = -62_135_596_800
YEAR_9999_S: Final = 253_402_300_799
CATALOG = compiled(
    goals=[
        {
            "name": "click",
            "outcomes": [{"type": "click", "reward": 1}, {"type": "order", "reward": 0.5}, {"type": "dismiss"}],
            "attributionWindow": "2s",
            "lateLimit": "5s",
            "baseRate": 0.1,
        }
    ]
)
CALLERS_FAULTS: Final = {
    ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
    for reason, code in CODES.items()
    if code.name in {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS"}
}


class Place:
    """One worker's OutcomeService, its log, the state projected from it, and the learner's join of it."""

    def __init__(self) -> None:
        self.log = MemoryLog(b"log-id-16-bytes.")
        self.store = MemoryStore()
        self.history = History(self.log)
        self.lessons: list[Lesson] = []
        self.projector = Projector(self.log, self.store, lambda _sha256: CATALOG)
        self.rewards = Rewards(self.log, lambda _sha256: terms_of(CATALOG), self.lessons.append)
        self._n_learned = 0
        self._committer = GroupCommitter(self.log, wall_us=self._now_us, on_failure=lambda: None)
        ingest = Ingest(
            log=self.log, store=self.store, committer=self._committer, token_key=TOKEN_KEY, catalog=lambda: CATALOG,
            clock_us=self._now_us,
        )  # fmt: skip
        self._servicer = OutcomeServicer(ingest, self._now_us)
        self._committer.start(asyncio.get_running_loop())
        self.history.put_in_force(CATALOG)
        self.history.know(ANNA)

    def close(self) -> None:
        self._committer.close()

    def decide(self, name: str, *, on_impression: bool = False) -> int:
        """Record a decision for Anna that chose two actions, and return its LSN."""
        decision = DecisionRecord(
            decision_key=key_of(name),
            now_us=self.history.now_us,
            provenance=Provenance(catalog_sha256=CATALOG.sha256),
            request=DecideRequest(
                identities=[Identity(namespace=namespace, value=value) for namespace, value in ANNA.items()]
            ).SerializeToString(),
            learned_features=bytes(4 * len(CATALOG.learned.names)),
            slots=[
                SlotRecord(action=action, goal="click", on_impression=on_impression, general_propensity=0.25)
                for action in ACTIONS
            ],
        )
        return self.history.record(RecordKind.RECORD_KIND_DECISION, decision, key_of(name))

    async def report(self, *outcomes: ReportOutcomeRequest) -> list[str]:
        """Report outcomes together; of each return "", "duplicate", or reason and field of its refusal."""
        response = await self._servicer.batch_report_outcomes(
            BatchReportOutcomesRequest(outcomes=outcomes), b"", CONTEXT
        )
        return [_fate(result) for result in response.results]

    def taught(self) -> list[tuple[str, float | None, float]]:
        """Project and learn what was recorded since; return (action, taught before, reward) of each new lesson."""
        while self.projector.step():
            pass
        n_before = len(self.lessons)
        for record in self.log.read(self._n_learned + 1, 100_000):
            self.rewards.apply(record)
            self._n_learned = record.lsn
        return [(lesson.action, lesson.taught, lesson.reward) for lesson in self.lessons[n_before:]]

    def taught_after(self, elapsed_us: int) -> list[tuple[str, float | None, float]]:
        self.history.now_us += elapsed_us
        self.history.tick()
        return self.taught()

    def quarantined(self) -> set[str]:
        with self.store.read() as snapshot:
            return {bytes(value).decode() for _, value in snapshot.scan(Table.QUARANTINE)}

    def rebuilt_hash(self) -> bytes:
        store = MemoryStore()
        projector = Projector(self.log, store, lambda _sha256: CATALOG)
        while projector.step():
            pass
        return state_hash(store)

    def _now_us(self) -> int:
        return self.history.now_us


def _fate(result: ReportOutcomeResult) -> str:
    if result.WhichOneof("outcome") == "accepted":
        assert result.accepted.lsn
        return "duplicate" if result.accepted.duplicate else ""
    reason = ErrorReason.Name(result.error.reason).removeprefix("ERROR_REASON_")
    assert reason in CALLERS_FAULTS, result.error
    assert result.error.message
    return f"{reason} {result.error.metadata['field']}" if "field" in result.error.metadata else reason


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place()
    yield place
    place.close()


def token(name: str) -> str:
    return TOKEN_KEY.mint(key_of(name), b"").decode()


def said(outcome_id: str, decision: str = "known", at_s: int | None = None, **fields: Any) -> ReportOutcomeRequest:
    given = {"decision_id": token(decision), "action": "action_1", "type": "click"} | fields
    request = ReportOutcomeRequest(outcome_id=outcome_id, **given)
    if at_s is not None:
        request.occurrence_time.seconds = at_s
    return request


def taking_back(outcome_id: str, revokes: str, decision: str = "known", **fields: Any) -> ReportOutcomeRequest:
    return said(outcome_id, decision, **({"type": "", "revokes": revokes} | fields))


NOW_S: Final = START_US // 1_000_000
SKEW_S: Final = CLOCK_SKEW_US // 1_000_000

ODD: Final[dict[str, tuple[ReportOutcomeRequest, str]]] = {
    "takes back itself": (taking_back("x", "x"), "FIELD_INVALID revokes"),
    "takes back itself, with a type": (taking_back("x", "x", type="click"), "FIELD_INVALID revokes"),
    "takes back itself, of a decision nobody knows": (taking_back("x", "x", "unknown"), "FIELD_INVALID revokes"),
    "takes back what another decision has": (taking_back("x", "of the other"), ""),
    "takes back for another action": (taking_back("x", "o", action="action_2"), "FIELD_INVALID action"),
    "takes back for an action not chosen": (taking_back("x", "o", action="action_3"), "FIELD_INVALID action"),
    "takes back what is unknown, for an action not chosen": (
        taking_back("x", "u", action="action_3"), "ACTION_NOT_IN_DECISION action"
    ),
    "takes back what is unknown": (taking_back("x", "u"), ""),
    "takes back a revocation": (taking_back("x", "r"), "FIELD_INVALID revokes"),
    "takes back again": (taking_back("x", "o"), ""),
    "takes back an impression": (taking_back("x", "i"), ""),
    "takes back as an impression": (taking_back("x", "o", type="impression"), ""),
    "takes back nothing and says nothing": (taking_back("x", ""), "FIELD_INVALID type"),
    "takes back by 129 bytes": (taking_back("x", "é" * 64 + "e"), "FIELD_INVALID revokes"),
    "takes back by 128 bytes": (taking_back("x", "é" * 64), ""),
    "takes back by a control character": (taking_back("x", "o\0"), "FIELD_INVALID revokes"),
    "takes back with a type that is none": (taking_back("x", "o", type="applause"), "RESOURCE_NOT_FOUND type"),
    "takes back with a value and no type": (taking_back("x", "o", value=1.0), "FIELD_INVALID value"),
    "takes back with a value that is no number": (taking_back("x", "o", value=math.nan), "FIELD_INVALID value"),
    "takes back out of range": (taking_back("x", "o", type="order", value=1e308), "FIELD_INVALID value"),
    "takes back ahead of time": (taking_back("x", "o", at_s=NOW_S + SKEW_S + 1), "TIME_OUT_OF_RANGE occurrence_time"),
    "takes back before the decision": (
        taking_back("x", "o", at_s=NOW_S - SKEW_S - 1), "TIME_OUT_OF_RANGE occurrence_time"
    ),
    "takes back under the id of an outcome": (taking_back("o", "u"), "IDEMPOTENCY_KEY_REUSED"),
    "outcome under the id of a revocation": (said("r"), "IDEMPOTENCY_KEY_REUSED"),
    "takes back of an erased decision": (taking_back("x", "o", "erased"), ""),
    "outcome of an erased decision": (said("x", "erased", action="action_3"), ""),
    "outcome of a decision nobody knows": (said("x", "unknown", action="action_3"), ""),
    "outcome of a decision nobody knows, long ago": (said("x", "unknown", at_s=YEAR_1_S), ""),
    "outcome of no time": (said("x", "unknown", at_s=YEAR_1_S - 1), "FIELD_INVALID occurrence_time"),
    "outcome of the last time": (said("x", "unknown", at_s=YEAR_9999_S), "TIME_OUT_OF_RANGE occurrence_time"),
    "outcome beyond all time": (said("x", "unknown", at_s=(1 << 63) - 1), "FIELD_INVALID occurrence_time"),
    "outcome of a forged decision": (
        said("x", decision_id=token("known")[:-1] + "?"), "DECISION_ID_INVALID decision_id"
    ),
    "outcome of an endless decision id": (said("x", decision_id="A" * 100_000), "DECISION_ID_INVALID decision_id"),
    "outcome for an endless action": (said("x", "unknown", action="a" * 65), "FIELD_INVALID action"),
    "outcome of an endless type": (said("x", type="t" * 100_000), "RESOURCE_NOT_FOUND type"),
    "outcome worth 1e308": (said("x", type="order", value=1e308), "FIELD_INVALID value"),
    "outcome worth less than nothing": (said("x", type="order", value=-math.inf), "FIELD_INVALID value"),
    "outcome worth no number": (said("x", type="order", value=math.nan), "FIELD_INVALID value"),
    "outcome with another payload": (said("o", type="dismiss"), "IDEMPOTENCY_KEY_REUSED"),
    "outcome once more": (said("o"), "duplicate"),
    "revocation once more": (taking_back("r", "o"), "duplicate"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
async def test_odd_outcome_has_its_reply_and_nothing_stops(place: Place, name: str) -> None:
    request, fate = ODD[name]
    place.decide("known")
    place.decide("other")
    erase(place.log, place.decide("erased"))
    before = [said("o"), said("i", type="impression"), said("of the other", "other"), taking_back("r", "o")]
    assert await place.report(*before) == [""] * 4
    assert place.taught() == [("action_1", None, 1.0), ("action_1", None, 1.0)]
    good = said("good", action="action_2", type="order", value=1000.0)
    assert await place.report(request, good) == [fate, ""]
    assert place.taught() == [("action_2", None, 0.5)]
    # Of the one what was taken back before the window closed, of the other what nobody told anything of.
    assert sorted(place.taught_after(WINDOW_US), key=str) == [("action_1", 1.0, 0.0), ("action_2", None, 0.0)]
    place.decide("unknown")  # what waited for it is joined, or set aside
    place.taught()
    assert place.quarantined() <= {"the decision did not choose the outcome's action"}
    assert place.rebuilt_hash() == state_hash(place.store)
    assert await place.report(said("after", "unknown", action="action_2")) == [""]
    assert place.taught() == [("action_2", None, 1.0)]


async def test_a_thousand_at_once_are_one_record_and_one_lesson(place: Place) -> None:
    place.decide("known")
    before = place.log.tail().lsn
    same, other = [said("o")] * 500, [said("o", type="dismiss")] * 500
    fates = await asyncio.gather(*(place.report(*pair) for pair in zip(same, other, strict=True)))
    flat = [fate for pair in fates for fate in pair]
    assert [flat.count(fate) for fate in ("", "duplicate", "IDEMPOTENCY_KEY_REUSED")] == [1, 499, 500]
    assert place.log.tail().lsn == before + 1
    assert place.taught() == [("action_1", None, 1.0)]
    assert place.taught_after(WINDOW_US) == [("action_2", None, 0.0)]


async def test_revocations_in_one_batch_with_what_they_take_back_count_as_in_any_order(place: Place) -> None:
    place.decide("known")
    assert await place.report(
        taking_back("r1", "o1"), said("o1"),  # before
        said("o2", action="action_2"), taking_back("r2", "o2", action="action_2"),  # after
        taking_back("r3", "r2", action="action_2"),  # not known yet to take something back
        taking_back("r1", "o1"), taking_back("r1", "o2"),
    ) == ["", "", "", "", "", "duplicate", "IDEMPOTENCY_KEY_REUSED"]  # fmt: skip
    assert place.taught() == [("action_2", None, 1.0)]
    assert sorted(place.taught_after(WINDOW_US)) == [("action_1", None, 0.0), ("action_2", 1.0, 0.0)]
    assert (place.rewards.counts.revoked, place.rewards.counts.moot) == (2, 1)


async def test_revocation_after_the_late_limit_is_accepted_and_teaches_nothing(place: Place) -> None:
    place.decide("known")
    await place.report(said("o1"), said("o2", action="action_2"))
    place.taught()
    assert place.taught_after(WINDOW_US + LATE_US - 1) == []
    assert await place.report(taking_back("r1", "o1")) == [""]
    assert place.taught() == [("action_1", 1.0, 0.0)]
    assert place.taught_after(1) == []
    assert await place.report(taking_back("r2", "o2", action="action_2")) == [""]
    assert place.taught() == []
    assert place.rewards.counts.late == 1


async def test_revocation_shows_nobody_what_was_not_seen(place: Place) -> None:
    place.decide("known", on_impression=True)
    assert await place.report(taking_back("r", "o"), taking_back("s", "i", type="impression")) == ["", ""]
    assert place.taught() == []
    assert place.taught_after(WINDOW_US) == [], "no window has begun"
    assert await place.report(said("i", type="impression"), said("o")) == ["", ""]
    assert place.taught() == []
    assert place.taught_after(WINDOW_US) == [("action_1", None, 0.0)], "seen, and taken back before it came"


names = st.sampled_from(["known", "unseen", "early", "erased", "never"])
short = st.sampled_from(["a", "b", "c", "", "x" * 128, "x" * 129, "é" * 65, "\0", "a\u202e"])
requests = st.builds(
    said,
    short,
    names,
    st.sampled_from([None, NOW_S, NOW_S + SKEW_S, NOW_S + SKEW_S + 1, NOW_S - SKEW_S - 1, YEAR_1_S, YEAR_9999_S]),
    action=st.sampled_from([*ACTIONS, *ACTIONS, "action_3", "", "a" * 65]),
    type=st.sampled_from(["click", "order", "dismiss", "impression", "", "applause"]),
    value=st.sampled_from([0.0, 0.0, -0.0, 1.0, 1e308, -1.0, math.nan, math.inf, 5e-324]),
    revokes=st.one_of(st.just(""), st.sampled_from(["a", "b", "c"]), short),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(requests, max_size=8), max_size=5), st.booleans())
def test_whatever_is_reported_nobody_stops_and_what_is_good_counts_once(
    batches: list[list[ReportOutcomeRequest]], is_erased: bool
) -> None:
    async def play() -> None:
        place = Place()
        place.decide("known")
        place.decide("unseen", on_impression=True)
        erased_lsn = place.decide("erased")
        erase(place.log, erased_lsn)
        for batch in batches:
            fates = await place.report(*batch)
            again = await place.report(*batch)
            assert [fate == "duplicate" for fate in again] == [fate in {"", "duplicate"} for fate in fates]
            place.taught()
            place.history.now_us += WINDOW_US // 2
        place.decide("early")
        place.taught_after(100 * WINDOW_US + LATE_US)
        place.decide("good")
        assert await place.report(said("g", "good"), said("g", "good")) == ["", "duplicate"]
        assert place.taught() == [("action_1", None, 1.0)]
        place.taught_after(1_000_000 * WINDOW_US)
        assert (place.rewards.n_open, place.rewards.n_parked, place.rewards.counts.quarantined) == (0, 0, 0)
        assert place.rebuilt_hash() == state_hash(place.store)
        place.close()

    asyncio.run(play())
