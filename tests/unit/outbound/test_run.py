"""An outbound run that is killed wherever it may be: everybody once in the output, and nobody asked twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest

from server.outbound import run
from server.outbound.journal import Journal, RunFolder, Tally
from server.outbound.parts import Contact, Mark, Parquet
from server.outbound.plan import OutboundRefused, Plan, plan_of
from server.outbound.run import OutboundStopped, Pace
from tests.support.catalogs import message
from tsugi.client import CallError
from tsugi.v1.decision_pb2 import Degradation, Slot
from tsugi.v1.decision_service_pb2 import BatchDecideResponse, DecideRequest, DecideResponse, DecideResult, DecisionAck
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.item_error_pb2 import ItemError
from tsugi.v1.profile_service_pb2 import ListProfilesResponse

files: Any = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: outbound runs are not tested")

PLAN = Plan("adults", "mail", (), (("letter", 1), ("leaflet", 2)))
CATALOG = message(
    channels=[{"name": "web"}, {"name": "mail"}, {"name": "pigeon"}],
    placements=[
        {"name": "page", "channel": "web", "goal": "click"},
        {"name": "letter", "channel": "mail", "goal": "click"},
        {"name": "leaflet", "channel": "mail", "goal": "click", "countMax": 2},
    ],
    segments=[{"name": "adults", "expression": "profile.age >= 18.0"}],
)


class Killed(BaseException):
    """In place of a kill: nothing catches it."""


class Segment:
    """In place of a server: people who are in a segment until they were asked, decided for ever by request id.

    Args:
        n_people: in it.
        before: called before each call with its number, from 0; may raise.
        after: the same, when what was asked is done and nobody has been answered.
        page: gives so many people a page at most.
    """

    def __init__(
        self,
        n_people: int,
        before: Callable[[int], None] = lambda _: None,
        after: Callable[[int], None] = lambda _: None,
        page: int = 7,
    ) -> None:
        self.ids = [f"{i:032x}" for i in range(n_people)]
        self.decided: dict[str, tuple[DecideRequest, DecideResult]] = {}
        self.refused: dict[str, ErrorReason] = {}
        self.silent: set[str] = set()
        self.unknown: set[str] = set()
        self._before, self._after, self._page = before, after, page
        self._n_calls = 0

    def list_profiles(
        self, segment: str, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> ListProfilesResponse:
        """See Decider. Whoever was asked has left the segment, as a decision's contact may have it."""
        assert (segment, bool(timeout_s)) == ("adults", True)
        self._call(self._before)
        asked = {request.profile_id for request, _ in self.decided.values()}
        following = [each for each in self.ids if each > page_token]
        seen = following[: min(page_size, self._page)]
        token = seen[-1] if len(following) > len(seen) else ""
        here = [each for each in seen if each not in asked]
        return ListProfilesResponse(profile_ids=here, next_page_token=token, total_size=len(self.ids))

    def batch_decide(self, requests: Iterable[DecideRequest], *, timeout_s: float | None = None) -> BatchDecideResponse:
        """See Decider."""
        assert timeout_s
        self._call(self._before)
        response = BatchDecideResponse(results=[self._decide(request) for request in requests])
        self._call(self._after, is_new=False)
        return response

    def _call(self, hook: Callable[[int], None], *, is_new: bool = True) -> None:
        self._n_calls += is_new
        hook(self._n_calls - 1)

    def _decide(self, request: DecideRequest) -> DecideResult:
        who = request.profile_id
        assert request.decision_ack == DecisionAck.DECISION_ACK_DURABLE
        assert request.request_id.startswith("outbound/") and request.request_id.endswith(f"/{who}")
        if who in self.refused:
            return DecideResult(error=ItemError(reason=self.refused[who], message="not this one"))
        before, result = self.decided.setdefault(request.request_id, (request, self._decision(request)))
        assert before == request, "the same id is the same request"
        return result

    def _decision(self, request: DecideRequest) -> DecideResult:
        decision = DecideResponse(decision_id=f"d-{request.profile_id}", lsn=len(self.decided) + 1)
        decision.expire_time.FromSeconds(1_800_000_000)
        if request.profile_id in self.unknown:
            decision.degradations.append(Degradation.DEGRADATION_PROFILE_UNKNOWN)
        for placement in request.placements:
            slot = Slot(placement=placement.placement)
            if request.profile_id not in self.silent and placement.placement == "letter":
                slot.action, slot.treatment, slot.priority, slot.selection_probability = "hello", "plain", 0.5, 0.25
                slot.content.update({"text": "höflich", "size": 3})
            decision.slots.append(slot)
        return DecideResult(decision=decision)


def go(
    out: Path, segment: Segment, *, plan: Plan = PLAN, is_overwrite: bool = False, **pace: Any
) -> tuple[Tally, list[float]]:
    """Run or go on to the end; return what became of it and the pauses."""
    pauses: list[float] = []
    with run.opened(out, plan, is_overwrite=is_overwrite) as opened:
        paced = Pace(2, pause=pauses.append, clock_s=lambda: 0.0)._replace(**pace)
        return opened.go_on(segment, lambda *_: None, paced), pauses


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = files.read_table(out).to_pylist()
    return found


def assert_everybody_once(out: Path, segment: Segment) -> None:
    assert [row["profile_id"] for row in rows(out)] == segment.ids
    assert Counter(request.profile_id for request, _ in segment.decided.values()) == dict.fromkeys(segment.ids, 1)
    assert not RunFolder(out).path.exists()
    assert list(out.parent.glob("*.unfinished")) == []


def test_output_says_what_was_decided_for_whom(tmp_path: Path) -> None:
    out, segment = tmp_path / "out.parquet", Segment(5)
    segment.silent, segment.unknown = {segment.ids[1]}, {segment.ids[2]}
    segment.refused = {segment.ids[3]: ErrorReason.ERROR_REASON_INTERNAL_ERROR}
    tally, _ = go(out, segment)
    assert (tally.people, tally.nothing, tally.gone, tally.lsn) == (5, 1, 1, 4)
    assert (tally.contacts, tally.errors) == ({"hello": 2}, {"INTERNAL_ERROR": 1})
    table = rows(out)
    assert [row["profile_id"] for row in table] == [segment.ids[i] for i in (0, 3, 4)]
    first = table[0]
    assert first.pop("expire_time").timestamp() == 1_800_000_000
    assert json.loads(first.pop("content")) == {"text": "höflich", "size": 3}
    assert first == {
        "profile_id": segment.ids[0], "placement": "letter", "position": 0, "action": "hello", "treatment": "plain",
        "propensity": 0.0, "value": 0.0, "priority": 0.5, "selection_probability": 0.25,
        "decision_id": f"d-{segment.ids[0]}", "error_reason": None,
    }  # fmt: skip
    assert {name for name, value in table[1].items() if value is not None} == {"profile_id", "error_reason"}
    assert out.stat().st_mode & 0o077 == 0, "it is about people"


@pytest.mark.slow
@pytest.mark.parametrize("is_after", [False, True])
def test_run_killed_at_any_call_is_ended_by_the_same_command(tmp_path: Path, is_after: bool) -> None:
    """Killed before the server has heard of a call, or when it has done it and nobody heard the answer."""

    def kill_at(wanted: int) -> Callable[[int], None]:
        def hook(number: int) -> None:
            if number == wanted:
                raise Killed

        return hook

    n_killed = 0
    for wanted in range(16):
        out = tmp_path / f"{wanted}.parquet"
        kill, idle = kill_at(wanted), kill_at(-1)
        segment = Segment(13, idle, kill) if is_after else Segment(13, kill, idle)
        try:
            go(out, segment)
        except Killed:
            n_killed += 1
            assert not out.exists()
            go(out, segment)
        assert_everybody_once(out, segment)
    assert n_killed >= 7


@pytest.mark.slow
@pytest.mark.parametrize("is_after", [False, True])
def test_run_killed_at_any_rename_is_ended_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_after: bool
) -> None:
    replace, left = Path.replace, 0

    def killing(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0 and not is_after:
            raise Killed
        renamed = replace(self, target)
        if left == 0:
            raise Killed
        return renamed

    monkeypatch.setattr(Path, "replace", killing)
    n_killed = 0
    for wanted in range(1, 14):
        out, segment, left = tmp_path / f"{wanted}.parquet", Segment(23), wanted
        try:
            go(out, segment)
        except Killed:
            n_killed += 1
            assert go(out, segment)[0].people == 23
        assert_everybody_once(out, segment)
    assert n_killed == 9, "the journal, page and part three times, the output, and that it is done"


def test_run_killed_while_it_tidies_up_is_told_again_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, n_left = Path.unlink, 0

    def killing(self: Path, missing_ok: bool = False) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise Killed
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killing)
    for wanted in range(1, 5):
        out, segment, n_left = tmp_path / f"{wanted}.parquet", Segment(23), wanted
        with pytest.raises(Killed):
            go(out, segment)
        assert go(out, segment)[0].people == 23
        assert_everybody_once(out, segment)


def test_output_taken_away_before_all_was_tidied_up_is_made_by_a_new_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(_: RunFolder) -> NoReturn:
        raise Killed

    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "remove", kill)
        with pytest.raises(Killed):
            go(out, Segment(5))
    out.unlink()
    segment = Segment(3)
    assert go(out, segment)[0].people == 3
    assert_everybody_once(out, segment)


def test_nobody_in_the_segment_makes_a_file_without_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert go(out, Segment(0))[0] == Tally()
    assert files.read_table(out).column_names == list(Contact._fields)
    assert rows(out) == []


@pytest.mark.parametrize("n", [1, 10, 11, 23, 99])
def test_run_stops_after_so_many_people(tmp_path: Path, n: int) -> None:
    out, segment = tmp_path / "out.parquet", Segment(23)
    assert go(out, segment, people_max=n)[0].people == min(n, 23)
    assert [row["profile_id"] for row in rows(out)] == segment.ids[:n] and len(segment.decided) == min(n, 23)


def test_output_that_is_there_is_replaced_only_when_that_is_said(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("somebody's")
    with pytest.raises(OutboundRefused, match="--overwrite"):
        go(out, Segment(3))
    assert out.read_text() == "somebody's" and not RunFolder(out).path.exists()
    segment = Segment(3)
    go(out, segment, is_overwrite=True)
    assert_everybody_once(out, segment)


@pytest.mark.parametrize("changed", [{"segment": "all"}, {"channel": "web"}, {"asked": ("letter",)}])
def test_run_of_another_plan_is_not_gone_on_with(tmp_path: Path, changed: dict[str, Any]) -> None:
    out, segment = tmp_path / "out.parquet", Segment(23)

    def killed(number: int) -> None:
        if number == 3:
            raise Killed

    with pytest.raises(Killed):
        go(out, Segment(23, killed))
    with pytest.raises(OutboundRefused, match="holds a run of segment adults on channel mail, all placements"):
        go(out, segment, plan=PLAN._replace(**changed))
    assert not segment.decided


def test_run_that_began_asks_for_the_placements_it_began_with(tmp_path: Path) -> None:
    """A catalog that came meanwhile may have others; the same request id must be the same request."""
    out = tmp_path / "out.parquet"
    left = 3

    def killed(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    segment = Segment(23, after=killed)
    with pytest.raises(Killed):
        go(out, segment)
    go(out, segment, plan=PLAN._replace(placements=(("letter", 1),)))
    assert {len(request.placements) for request, _ in segment.decided.values()} == {2}


def test_two_commands_do_not_make_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with run.opened(out, PLAN, is_overwrite=False), pytest.raises(OutboundRefused, match="another command"):
        go(out, Segment(3))


@pytest.mark.parametrize("damage", ["journal", "no journal", "newer journal", "missing part", "damaged part"])
def test_damaged_run_is_refused_and_not_begun_anew(tmp_path: Path, damage: str) -> None:
    out, segment = tmp_path / "out.parquet", Segment(23)
    folder = RunFolder(out)

    def killed(_: int) -> None:
        if folder.path.exists() and len(folder.parts()) == 2:
            raise Killed

    with pytest.raises(Killed):
        go(out, Segment(23, killed))
    journal = folder.path / "run.json"
    match damage:
        case "journal":
            journal.write_bytes(journal.read_bytes()[:-10])
        case "no journal":
            journal.unlink()
        case "newer journal":
            journal.write_bytes(journal.read_bytes().replace(b'"format": 1', b'"format": 2'))
        case "missing part":
            folder.part(1).unlink()
        case "damaged part":
            folder.part(2).write_bytes(b"PAR1")
    with pytest.raises(OutboundRefused, match=r"no whole run|no part of a run"):
        go(out, segment)
    assert not segment.decided and not out.exists()


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_calls_that_may_pass_are_repeated(tmp_path: Path, code: str) -> None:
    def failing(number: int) -> None:
        if number % 2 == 0:
            raise CallError(grpc.StatusCode[code], "not now", retry_delay_s=1.5)

    out, segment = tmp_path / "out.parquet", Segment(9, failing)
    _, pauses = go(out, segment)
    assert set(pauses) == {1.5}
    assert_everybody_once(out, segment)


def test_people_refused_for_now_are_asked_again_and_nobody_else(tmp_path: Path) -> None:
    n_asked: list[int] = []
    out = tmp_path / "out.parquet"

    class Busy(Segment):
        def batch_decide(
            self, requests: Iterable[DecideRequest], *, timeout_s: float | None = None
        ) -> BatchDecideResponse:
            given = list(requests)
            n_asked.append(len(given))
            late = given[1:]
            self.refused = {each.profile_id: ErrorReason.ERROR_REASON_OVERLOADED for each in late}
            return super().batch_decide(given, timeout_s=timeout_s)

    segment = Busy(4)
    tally, pauses = go(out, segment, batch_people=4)
    assert n_asked == [4, 3, 2, 1] and pauses == sorted(pauses) and len(pauses) == 3
    assert not tally.errors
    assert_everybody_once(out, segment)


def test_server_that_stays_away_ends_the_run_which_then_goes_on(tmp_path: Path) -> None:
    is_away = True

    def away(number: int) -> None:
        if is_away and number >= 4:
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "nobody there")

    out, segment = tmp_path / "out.parquet", Segment(23, away)
    with pytest.raises(OutboundStopped) as stopped:
        go(out, segment)
    assert stopped.value.is_unanswered
    is_away = False
    go(out, segment)
    assert_everybody_once(out, segment)


def test_refusal_for_good_ends_the_run_at_once(tmp_path: Path) -> None:
    def refusing(_: int) -> None:
        raise CallError(grpc.StatusCode.FAILED_PRECONDITION, "no catalog", reason="ERROR_REASON_CATALOG_MISSING")

    with pytest.raises(OutboundStopped, match="no catalog") as stopped:
        go(tmp_path / "out.parquet", Segment(3, refusing))
    assert not stopped.value.is_unanswered


def test_journal_and_mark_of_a_part_read_back(tmp_path: Path) -> None:
    folder, parquet = RunFolder(tmp_path / "out.parquet"), Parquet()
    journal = Journal("r", "adults", "mail", ("letter",), (("letter", 1),), finished=Tally(3, {"hello": 2}, 1))
    mark = Mark("0f", Tally(people=2, errors={"INTERNAL_ERROR": 1}))
    with folder.locked():
        folder.save(journal)
        parquet.write(folder.part(1), [Contact("0f", error_reason="INTERNAL_ERROR")], mark)
        assert folder.load() == journal
        assert [parquet.mark(path) for path in folder.parts()] == [mark]


@pytest.mark.parametrize(
    ("asked", "placements"),
    [((), (("letter", 1), ("leaflet", 1))), (("leaflet:2",), (("leaflet", 2),)), (("letter",), (("letter", 1),))],
)
def test_plan_fills_what_was_asked_for_or_all_of_the_channel(
    asked: tuple[str, ...], placements: tuple[tuple[str, int], ...]
) -> None:
    assert plan_of(CATALOG, "adults", "mail", asked) == Plan("adults", "mail", asked, placements)


@pytest.mark.parametrize(
    ("segment", "channel", "asked", "told"),
    [
        ("minors", "mail", (), "no segment named 'minors'; there are adults"),
        ("adults", "fax", (), "no channel named 'fax'; there are mail, pigeon, web"),
        ("adults", "mail", ("page",), "no placement of channel mail named 'page'; there are leaflet, letter"),
        ("adults", "mail", ("letter", "letter:1"), "placement letter is named twice"),
        ("adults", "mail", ("leaflet:3",), "placement leaflet has 2 slots at most, got '3'"),
        ("adults", "mail", ("leaflet:0",), "placement leaflet has 2 slots at most, got '0'"),
        ("adults", "mail", ("leaflet:٢",), "placement leaflet has 2 slots at most"),
        ("adults", "pigeon", (), "channel pigeon has no placement"),
    ],
)
def test_plan_that_names_what_is_not_there_is_told_what_is(
    segment: str, channel: str, asked: tuple[str, ...], told: str
) -> None:
    with pytest.raises(OutboundRefused, match=told):
        plan_of(CATALOG, segment, channel, asked)


def test_channel_of_more_placements_than_one_decision_fills_asks_for_names() -> None:
    placements = [{"name": f"p{i}", "channel": "web", "goal": "click"} for i in range(17)]
    catalog = message(placements=placements, segments=[{"name": "adults", "expression": "profile.age >= 18.0"}])
    with pytest.raises(OutboundRefused, match="16 placements at most, and there are 17"):
        plan_of(catalog, "adults", "web", ())
