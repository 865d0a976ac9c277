"""Budgets of all people together: kept to over workers, at once and after a kill; and nobody waits in vain."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from typing import Any, Final

import pytest

from server.catalog.compile import compile_catalog
from server.files import Files
from server.storage.lmdb_log import LmdbLog
from tests.support.catalogs import message
from tests.support.damage import MAP_BYTES, editing
from tests.support.running import Server, serving, told, until
from tsugi.client import CallError, Client, decide_request
from tsugi.requests import DecideOptions
from tsugi.v1.decision_pb2 import ChoiceReason, RefusalReason
from tsugi.v1.decision_service_pb2 import DecideResponse

pytestmark = pytest.mark.slow

ANSWER_S_MAX: Final = 30.0
PERIOD_S: Final = 60
# Each placement has a channel of its own, where one action comes first and has a budget of the placement's name.
PLACEMENTS: Final = ("pieces", "slack", "paced", "killed", "looked_at", "twins")
SPENT: Final = RefusalReason.REFUSAL_REASON_BUDGET_SPENT
_serial = count()


def said_on(name: str, channel: str, value: int, cost: int = 0) -> dict[str, Any]:
    treatments = [{"name": channel, "channel": channel}]
    return {"name": name, "valueMicros": value, "costMicros": cost, "treatments": treatments}


CATALOG = message(
    channels=[{"name": name} for name in (*PLACEMENTS, "money", "exploring")],
    placements=[{"name": name, "channel": name, "goal": "click"} for name in (*PLACEMENTS, "money")]
    + [
        {
            "name": "exploring", "channel": "exploring", "goal": "click",
            "exploration": {"epsilonGreedy": {"epsilon": 1.0},
                            "budget": {"costMicrosMax": 3_000_000, "period": "31622400s"}},
        },
    ],
    actions=[said_on(f"prize_{name}", name, 9_000_000) for name in PLACEMENTS]
    + [said_on(f"other_{name}", name, 1_000_000) for name in (*PLACEMENTS, "money")]
    + [said_on("gold", "money", 9_000_000, cost=4_000_000), said_on("silver", "money", 8_000_000, cost=1_500_000)]
    # Base rates of 0.1 make these priorities of 1.0, 0.75 and 0.5.
    + [said_on(f"try_{value}", "exploring", 100_000 * value) for value in (100, 75, 50)],
    budgets=[
        {"name": "pieces", "actions": ["prize_pieces"], "unitsMax": 20},
        {"name": "slack", "actions": ["prize_slack"], "unitsMax": 20, "slack": 8},
        {"name": "paced", "actions": ["prize_paced"], "unitsMax": 100, "period": f"{PERIOD_S}s", "paced": True},
        {"name": "killed", "actions": ["prize_killed"], "unitsMax": 12},
        {"name": "looked_at", "actions": ["prize_looked_at"], "unitsMax": 3},
        {"name": "twins", "actions": ["prize_twins"], "unitsMax": 3},
        {"name": "money", "actions": ["gold", "silver"], "costMicrosMax": 30_000_000},
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        with server.client() as client:
            client.push_catalog(CATALOG)
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture
def both(server: Server) -> Iterator[list[Client]]:
    """Connections to each worker in turn."""
    with of_each_worker(server) as clients:
        yield clients


@contextmanager
def of_each_worker(server: Server) -> Iterator[list[Client]]:
    """Give connections to each worker in turn: enough for a rush, since a connection takes so many calls at once."""
    with ExitStack() as stack:
        yield [stack.enter_context(server.client_on(role)) for role in ("worker-0", "worker-1") * 2]


def somebody() -> DecideOptions:
    """Name a person whom nobody has asked about before."""
    return {"identities": {"customer_number": f"somebody {next(_serial)}"}}


def on_disk() -> DecideOptions:
    """Name such a person, and wait for the record."""
    return {**somebody(), "durable": True}


class Rush:
    """Many decisions asked for at the same moment, over all workers."""

    def __init__(self, clients: list[Client], placement: str, asked: Sequence[DecideOptions]) -> None:
        self.replies: list[DecideResponse] = []
        self._refusals: list[CallError] = []
        self._n = len(asked)
        self._guard = threading.Lock()
        for i, options in enumerate(asked):
            clients[i % len(clients)].decide_then(self._take, {placement: 1}, timeout_s=ANSWER_S_MAX, **options)

    def all(self) -> list[DecideResponse]:
        """Wait for every reply."""
        until(lambda: len(self.replies) + len(self._refusals) == self._n, "every call is answered", ANSWER_S_MAX)
        assert self._refusals == []
        return self.replies

    def chosen(self) -> Counter[str]:
        """Count what those answered so far were told."""
        return Counter(reply.slots[0].action for reply in list(self.replies))

    def _take(self, reply: DecideResponse | CallError) -> None:
        with self._guard:
            if isinstance(reply, DecideResponse):
                self.replies.append(reply)
            else:
                self._refusals.append(reply)


def rush(clients: list[Client], placement: str, n: int) -> Counter[str]:
    """Ask for n different people at once, and count what they were told."""
    asking = Rush(clients, placement, [somebody() for _ in range(n)])
    asking.all()
    return asking.chosen()


def drain(clients: list[Client], placement: str) -> int:
    """Ask for many at once, again and again until none of them gets the prize, and return how many did.

    Once does not always give all: what is on disk counts twice until its worker has heard of it.
    """
    n = 0
    while got := rush(clients, placement, 40)[f"prize_{placement}"]:
        n += got
    return n


def counted(server: Server, budget: str) -> int:
    """Return what the log counts of a budget without periods."""
    limit = next(each for each in compile_catalog(CATALOG).budgets.limits if each.name.endswith(f" {budget}"))
    with closing(LmdbLog(Files.below(server.data).log, MAP_BYTES, writable=False)) as log:
        (spent,) = log.spent([limit.counter(time.time_ns() // 1000)])
    return spent


def test_within_the_slack_nobody_waits_for_the_disk_and_beyond_it_all_do(server: Server, both: list[Client]) -> None:
    # First of all: nothing was ever spent, and looking at what is left waits for nobody either.
    with editing(Files.below(server.data).log):  # no worker can write to the log meanwhile
        asking = Rush(both, "slack", [somebody() for _ in range(60)])
        until(lambda: asking.chosen()["prize_slack"] == 8, "each worker gives its four of eight")
        for client in both:  # behind all of them
            client.decide({"slack": 1}, preview=True)
        assert asking.chosen()["prize_slack"] == 8, "the others wait"
    asking.all()
    n = asking.chosen()["prize_slack"] + drain(both, "slack")
    assert 20 <= n <= 28
    assert counted(server, "slack") == n


def test_of_hundreds_at_once_exactly_so_many_get_it(server: Server, both: list[Client]) -> None:
    asking = Rush(both, "pieces", [somebody() for _ in range(300)])
    replies = asking.all()
    assert asking.chosen()["prize_pieces"] + drain(both, "pieces") == 20
    assert counted(server, "pieces") == 20
    # Whether it was known to be spent, or the log refused it: it is told.
    without = [reply for reply in replies if reply.slots[0].action == "other_pieces"]
    for reply in without[::10]:
        until(lambda reply=reply: is_recorded(both[0], reply), "it is on record")  # type: ignore[misc]  # bound now
        told_of = both[0].get_decision(reply.decision_id, explained=True).explanation.candidates
        refused = [each for each in told_of if each.action == "prize_pieces"]
        assert [(each.refusal_reason, each.refused_by) for each in refused] == [(SPENT, "pieces")]


def is_recorded(client: Client, reply: DecideResponse) -> bool:
    """Say whether a decision that nobody waited for is on disk by now."""
    try:
        return bool(client.get_decision(reply.decision_id).lsn)
    except CallError as error:
        assert error.reason == "ERROR_REASON_RESOURCE_NOT_FOUND"
        return False


def test_who_is_told_of_nothing_that_is_left_waits_for_no_disk(server: Server, both: list[Client]) -> None:
    drain(both, "pieces")
    with editing(Files.below(server.data).log):  # no worker can write to the log meanwhile
        assert rush(both, "pieces", 50) == {"other_pieces": 50}


def test_money_is_never_passed_and_is_spent_to_the_last_that_fits(server: Server, both: list[Client]) -> None:
    chosen = rush(both, "money", 200)
    while more := rush(both, "money", 20) - Counter({"other_money": 20}):  # who was refused made place for cheaper ones
        chosen += more
    spent = 4_000_000 * chosen["gold"] + 1_500_000 * chosen["silver"]
    assert 30_000_000 - 1_500_000 < spent <= 30_000_000
    assert counted(server, "money") == spent
    reply = both[0].decide({"money": 1}, **on_disk())
    told_of = both[1].get_decision(reply.decision_id, explained=True).explanation.candidates
    refused = {each.action: (each.refusal_reason, each.refused_by) for each in told_of if each.refused_by}
    assert refused == {"gold": (SPENT, "money"), "silver": (SPENT, "money")}


def test_paced_budget_is_never_ahead_of_the_clock(both: list[Client]) -> None:
    period_us = PERIOD_S * 1_000_000
    began_us = time.time_ns() // 1000
    period_began_us = began_us // period_us * period_us
    n = 0
    for _ in range(30):
        n += rush(both, "paced", 120)["prize_paced"]
        ended_us = time.time_ns() // 1000
        # From the beginning of the period; where it has ended meanwhile, all of it and what is released of the next.
        assert n <= 100 * (ended_us - period_began_us) // period_us
        if n >= max(1, 100 * (began_us - period_began_us) // period_us):
            break  # what was released when it began is given to whoever asks
    else:
        raise AssertionError(f"only {n} got what was released")


def test_preview_spends_nothing(both: list[Client]) -> None:
    previews = Rush(both, "looked_at", [somebody() | {"preview": True} for _ in range(20)])
    previews.all()
    assert previews.chosen() == {"prize_looked_at": 20}
    assert drain(both, "looked_at") == 3


def test_request_sent_many_times_spends_once(server: Server, both: list[Client]) -> None:
    one: DecideOptions = {**somebody(), "request_id": "sent often", "durable": True}
    twins = Rush(both, "twins", [one] * 24).all()
    assert all(reply == twins[0] for reply in twins)
    assert twins[0].slots[0].action == "prize_twins"
    assert counted(server, "twins") == 1
    assert drain(both, "twins") == 2


def test_exploring_stops_when_it_has_cost_enough(both: list[Client]) -> None:
    forgone, replies = 0.0, []
    for i in range(60):
        reply = both[i % 2].decide({"exploring": 1}, **on_disk())
        (slot,) = reply.slots
        is_best = slot.action == "try_100"
        assert slot.reasons[0] == (ChoiceReason.CHOICE_REASON_BEST if is_best else ChoiceReason.CHOICE_REASON_EXPLORED)
        if forgone >= 3.0 - 1e-6:
            assert (slot.action, slot.selection_probability) == ("try_100", 1.0)
        else:
            assert slot.selection_probability == pytest.approx(1 / 3)
        forgone += 1.0 - slot.priority
        replies.append(reply)
    assert 3.0 - 1e-6 <= forgone < 3.5 + 1e-6
    stopped_by = [
        both[0].get_decision(reply.decision_id, explained=True).explanation.placements[0].not_explored_by
        for reply in (replies[0], replies[-1])
    ]
    assert stopped_by == ["", "budget"]


def test_budgets_are_kept_to_in_batches(server: Server, both: list[Client]) -> None:
    batch = [decide_request({"pieces": 1, "money": 1}, **somebody()) for _ in range(100)]
    for client in both:
        results = client.batch_decide(batch, timeout_s=ANSWER_S_MAX).results
        assert all(each.HasField("decision") for each in results)
    drain(both, "pieces")
    assert counted(server, "pieces") == 20
    assert counted(server, "money") <= 30_000_000


def test_budget_outlasts_a_kill_and_a_restart(server: Server) -> None:
    with of_each_worker(server) as clients:
        for i in range(9):
            assert clients[i % 2].decide({"killed": 1}, **somebody()).slots[0].action == "prize_killed"
    for pid in server.roles().values():
        os.kill(pid, signal.SIGKILL)
    server.kill()
    until(lambda: not server.processes(), "no role is left")
    server.start()
    with of_each_worker(server) as clients:
        assert drain(clients, "killed") == 3
    assert counted(server, "killed") == 12
