"""What is left of the budgets as one worker knows it: what it may promise at once, and for what it asks the log."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, Final

import pytest

from server.catalog.catalog import Catalog
from server.decisioning.budgets import SLOTS_MAX, Budgets
from server.decisioning.claims import Chosen, Spent
from server.decisioning.decide import BUDGET_SPENT, EXPLORE, NO_EXPLORATION, RANDOM_CONTROL
from server.decisioning.gather import Asked
from server.storage.log import Fate, Receipt
from server.storage.memory import MemoryLog
from server.storage.record import AMOUNT_MAX, COUNTER_MAX, Draft, Spend
from tests.support.catalogs import compiled
from tsugi.log.v1.record_pb2 import RecordKind
from tsugi.v1.decision_service_pb2 import DecideRequest

MINUTE_US: Final = 60_000_000
START_US: Final = 29_000_000 * MINUTE_US  # a period of a minute begins here
DEAR, CHEAP, FREE = 0, 1, 2  # rows of the actions
EXPLORING: Final = 0  # row of the placement

ACTIONS: Final = [
    {"name": name, "costMicros": cost, "treatments": [{"name": "only", "channel": "web"}]}
    for name, cost in (("dear", 4_000_000), ("cheap", 1_000_000), ("free", 0))
]


def catalog_of(*budgets: dict[str, Any], exploring: int = 0) -> Catalog:
    exploration: dict[str, Any] = {"epsilonGreedy": {"epsilon": 0.5}}
    if exploring:
        exploration["budget"] = {"costMicrosMax": exploring, "period": "60s"}
    placement = {"name": "page", "channel": "web", "goal": "click", "countMax": 4, "exploration": exploration}
    return compiled(actions=ACTIONS, placements=[placement], budgets=budgets)


def units(limit: int, **more: Any) -> dict[str, Any]:
    return {"name": "pieces", "actions": ["dear", "cheap"], "unitsMax": limit} | more


def money(limit: int, **more: Any) -> dict[str, Any]:
    return {"name": "money", "costMicrosMax": limit} | more


class Worker:
    """One worker's budgets and what it asks of them, on a log that it may share."""

    def __init__(self, catalog: Catalog, log: MemoryLog | None = None, n_workers: int = 1) -> None:
        self.catalog = catalog
        self.log = log or MemoryLog()
        self.budgets = Budgets(self.log, n_workers)
        self.now_us = START_US

    def asked(self, n_slots: int = 1, mode: int = EXPLORE) -> Asked:
        """Look, and return a request as it is gathered."""
        self.budgets.look(self.catalog, self.now_us)
        loop = asyncio.new_event_loop()
        asked = Asked(DecideRequest(), b"", loop.create_future(), 0.0, 0.0)
        loop.close()
        asked.asks, asked.marks, asked.n_slots, asked.mode = [(EXPLORING, n_slots)], [0], n_slots, mode
        self.budgets.constrain(asked, self.catalog)
        return asked

    def left(self, n_slots: int = 1) -> list[int]:
        """Return what a request is told of budgets near their end."""
        return [left for _, left in self.asked(n_slots).budgets]

    def choose(self, *rows: int, forgone: float = 0.0, mode: int = EXPLORE) -> Spent | None:
        """Look and spend what saying some actions costs."""
        asked = self.asked(len(rows), mode)
        return self.budgets.spend(asked, [Chosen(EXPLORING, row, forgone) for row in rows], self.catalog)

    def commit(self, spent: Spent) -> Receipt:
        """Have the log decide, and settle."""
        receipt = self.record(spent.spends)
        self.budgets.settle(spent.spends)
        return receipt

    def record(self, spends: Sequence[Spend]) -> Receipt:
        """Have the log decide, before the worker hears of it."""
        (receipt,) = self.log.append([Draft(RecordKind.RECORD_KIND_TICK, b"", spends=tuple(spends))], self.now_us)
        return receipt


def test_without_budgets_nothing_is_read_refused_or_spent() -> None:
    worker = Worker(catalog_of())
    assert worker.left() == []
    assert worker.choose(DEAR, forgone=3.0) is None


def test_what_is_far_from_its_end_is_not_spoken_of() -> None:
    worker = Worker(catalog_of(units(5), money(100_000_000)))
    assert worker.left(5) == []
    assert worker.left(6) == [5], "six slots could take six of five"


def test_money_is_near_its_end_when_the_dearest_action_in_every_slot_would_pass_it() -> None:
    worker = Worker(catalog_of(money(8_000_000)))
    assert worker.left(2) == []
    assert worker.left(3) == [8_000_000]


def test_each_choice_spends_of_every_budget_that_means_it() -> None:
    worker = Worker(catalog_of(units(10), money(100_000_000)))
    spent = worker.choose(DEAR, CHEAP, FREE, -1)
    assert spent is not None
    assert [spend.amount for spend in spent.spends] == [2, 5_000_000]
    assert spent.keys == worker.catalog.budgets.keys
    assert worker.choose(FREE, -1) is None, "it costs nothing and is of no units budget"


def test_without_slack_every_choice_waits_for_the_log_and_states_the_limit() -> None:
    worker = Worker(catalog_of(units(2)))
    spent = worker.choose(CHEAP)
    assert spent is not None
    assert spent.waits
    assert spent.spends[0].limit == 2


def test_what_is_promised_counts_until_the_log_has_it_and_once_after() -> None:
    worker = Worker(catalog_of(units(3)))
    first, second = worker.choose(CHEAP), worker.choose(CHEAP)
    assert first is not None
    assert second is not None
    assert worker.left(4) == [1]
    worker.record(first.spends)
    assert worker.left(4) == [0], "until it is settled twice: too little is said rather than too much"
    worker.budgets.settle(first.spends)
    assert worker.left(4) == [1]
    worker.budgets.settle(second.spends)
    assert worker.left(4) == [2], "the second was never recorded"


def test_log_refuses_what_two_workers_promise_beyond_the_limit() -> None:
    catalog, log = catalog_of(units(3)), MemoryLog()
    workers = [Worker(catalog, log), Worker(catalog, log)]
    promised = [(worker, spent) for _ in range(2) for worker in workers if (spent := worker.choose(CHEAP))]
    fates = [worker.commit(spent).fate for worker, spent in promised]
    assert fates == [Fate.RECORDED] * 3 + [Fate.SPEND_REFUSED]
    assert [worker.left() for worker in workers] == [[0], [0]]


def test_slack_is_shared_by_the_workers_and_what_is_within_it_goes_ahead() -> None:
    worker = Worker(catalog_of(units(20, slack=7)), n_workers=2)
    promised = [spent for _ in range(5) if (spent := worker.choose(CHEAP))]
    assert [spent.waits for spent in promised] == [False, False, False, True, True], "3 is its half of 7"
    assert [spent.spends[0].limit for spent in promised] == [None, None, None, 20, 20]
    for spent in promised:
        worker.commit(spent)
    again = worker.choose(CHEAP)
    assert again is not None
    assert not again.waits, "what is on disk takes no slack"


def test_slack_is_not_for_what_is_known_to_pass_the_limit() -> None:
    worker = Worker(catalog_of(units(2, slack=2)))
    promised = [spent for _ in range(3) if (spent := worker.choose(CHEAP))]
    assert [spent.waits for spent in promised] == [False, False, True]
    assert [worker.commit(spent).fate for spent in promised] == [Fate.RECORDED, Fate.RECORDED, Fate.SPEND_REFUSED]


def test_however_workers_interleave_the_limit_is_passed_by_no_more_than_the_slack() -> None:
    limit, slack, n_workers = 10, 6, 3
    catalog, log = catalog_of(units(limit, slack=slack)), MemoryLog()
    workers = [Worker(catalog, log, n_workers) for _ in range(n_workers)]
    # All that can be recorded late: each worker looks and promises before any of them commits.
    while True:
        at_once = [(worker, spent) for worker in workers for _ in range(3) if (spent := worker.choose(CHEAP))]
        fates = [worker.commit(spent).fate for worker, spent in at_once]
        if Fate.RECORDED not in fates:
            break
    (counted,) = log.spent([catalog.budgets.limits[0].counter(START_US)])
    assert limit <= counted <= limit + slack


def test_one_that_waits_for_one_budget_is_checked_against_all() -> None:
    worker = Worker(catalog_of(units(100, slack=50), money(100_000_000)))
    spent = worker.choose(DEAR)
    assert spent is not None
    assert [spend.limit for spend in spent.spends] == [100, 100_000_000]


def test_each_period_begins_with_all_of_it_and_settles_what_was_promised_before() -> None:
    worker = Worker(catalog_of(units(1, period="60s")))
    spent = worker.choose(CHEAP)
    assert spent is not None
    assert worker.left() == [0]
    worker.now_us = START_US + MINUTE_US - 1
    assert worker.left() == [0]
    worker.now_us += 1
    assert worker.left() == [], "the promise is of the period before"
    assert worker.commit(spent).fate is Fate.RECORDED
    assert worker.left() == []


def test_paced_budget_is_released_with_time_and_keeps_what_is_left_over() -> None:
    worker = Worker(catalog_of(units(6, period="60s", paced=True)))
    assert worker.left() == [0], "nothing is released at the start"
    worker.now_us = START_US + 10_000_000
    assert worker.left(2) == [1]
    spent = worker.choose(CHEAP)
    assert spent is not None
    assert spent.spends[0].limit == 1, "the log is told what is released, not what there is in all"
    worker.commit(spent)
    assert worker.left() == [0]
    worker.now_us = START_US + 40_000_000
    assert worker.left(9) == [3]


@pytest.mark.parametrize("offset_us", [0, 1, MINUTE_US // 2, MINUTE_US - 1])
def test_never_more_is_released_than_the_share_of_the_period(offset_us: int) -> None:
    worker = Worker(catalog_of(units(7, period="60s", paced=True)))
    worker.now_us = START_US + offset_us
    assert worker.left(8) == [7 * offset_us // MINUTE_US]


def test_another_limit_goes_on_with_what_is_spent_and_another_kind_or_period_does_not() -> None:
    log = MemoryLog()
    before = Worker(catalog_of(units(5)), log)
    spent = before.choose(CHEAP, CHEAP, CHEAP)
    assert spent is not None
    before.commit(spent)
    assert Worker(catalog_of(units(4)), log).left(9) == [1]
    assert Worker(catalog_of(units(2)), log).left() == [0], "it may be below what is spent"
    assert Worker(catalog_of(units(4, period="60s")), log).left(9) == [4]
    assert Worker(catalog_of(money(4) | {"name": "pieces"}), log).left(9) == [4]


def test_exploring_stops_when_its_budget_is_spent_and_never_waits() -> None:
    worker = Worker(catalog_of(exploring=1_000_000))
    assert worker.asked().marks == [0]
    first = worker.choose(CHEAP, forgone=0.6)
    assert first is not None
    assert not first.waits
    assert first.spends[0].limit is None
    assert worker.asked().marks == [0], "0.4 is left"
    second = worker.choose(CHEAP, forgone=0.6)
    assert second is not None
    assert worker.asked().marks == [BUDGET_SPENT], "promised is spent"
    for spent in (first, second):
        assert worker.commit(spent).fate is Fate.RECORDED
    assert worker.asked().marks == [BUDGET_SPENT]
    worker.now_us += MINUTE_US
    assert worker.asked().marks == [0]


@pytest.mark.parametrize("mode", [RANDOM_CONTROL, NO_EXPLORATION])
def test_exploring_costs_where_it_is_explored_and_something_is_forgone(mode: int) -> None:
    worker = Worker(catalog_of(exploring=1_000_000))
    assert worker.choose(CHEAP, forgone=0.6, mode=mode) is None
    assert worker.choose(CHEAP, forgone=0.0) is None


def test_exploring_beside_a_budget_near_its_end_is_not_refused_itself() -> None:
    worker = Worker(catalog_of(units(1), exploring=1))
    spent = worker.choose(CHEAP, forgone=5.0)
    assert spent is not None
    assert spent.waits
    assert [spend.limit for spend in spent.spends] == [1, None]


@pytest.mark.parametrize("forgone", [math.inf, math.nan, 1e300])
def test_whatever_is_forgone_fits_the_counter(forgone: float) -> None:
    worker = Worker(catalog_of(exploring=1_000_000))
    spent = worker.choose(*[CHEAP] * 4, forgone=forgone)
    assert spent is not None
    assert spent.spends[0].amount == 4 * (AMOUNT_MAX // SLOTS_MAX)
    assert worker.commit(spent).fate is Fate.RECORDED
    (counted,) = worker.log.spent([spent.spends[0].counter])
    assert counted <= COUNTER_MAX
    assert worker.asked().marks == [BUDGET_SPENT]
