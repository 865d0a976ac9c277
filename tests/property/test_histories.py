"""However people were joined, split and forgotten: a history is the sum over the records of their identities."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.history_terms import UNITS, name_key
from server.outcomes.projector import Projector, state_hash
from server.profiles import repository
from server.profiles.identity import identity_key
from server.storage.memory import MemoryStore
from tests.support.catalogs import compiled
from tests.support.histories import SECOND_US, decision_key
from tests.support.people import People
from tsugi.v1.identity_pb2 import Identity

CATALOG = compiled()
WINDOW_US = 2 * SECOND_US
WHO = [("customer_number", str(i)) for i in range(4)]
Key = tuple[tuple[str, str], str]  # identity, action

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["show", "show", "report", "report", "link", "split", "forget", "wait"]),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, SECOND_US),
    ),
    max_size=40,
)


class Kept:
    """What the records say, by identity and action, from the formulas alone."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[Key, int, int]] = {}  # by decision: key, close time, expected
        self.expected: Counter[Key] = Counter()
        self.observed: Counter[Key] = Counter()

    def close(self, now_us: int) -> None:
        for number, (key, close_us, expected) in list(self.open.items()):
            if close_us <= now_us:
                self.expected[key] += expected
                del self.open[number]

    def settle(self, number: int, reward: int, now_us: int) -> None:
        self.close(now_us)
        if number in self.open:
            key, _, expected = self.open.pop(number)
            self.expected[key] += expected
            self.observed[key] += reward * UNITS

    def forget(self, who: set[tuple[str, str]]) -> None:
        self.open = {number: each for number, each in self.open.items() if each[0][0] not in who}
        for sums in (self.expected, self.observed):
            for key in [key for key in sums if key[0] in who]:
                del sums[key]


@settings(max_examples=60)
@given(STEPS)
def test_history_is_the_sum_over_the_records_of_a_persons_identities(steps: list[tuple[str, int, int, int]]) -> None:
    here, kept = People(CATALOG), Kept()
    for who in WHO:
        here.history.know(dict([who]))
    n_shown = 0
    for kind, one, other, later_us in steps:
        here.history.now_us += later_us
        now_us = here.history.now_us
        if kind == "show":
            n_shown += 1
            propensity = (1 + one + 4 * other) / 32.0
            here.history.decide(
                decision_key(n_shown), [f"action_{other}"], identities=dict([WHO[one]]), propensity=propensity
            )
            kept.open[n_shown] = ((WHO[one], f"action_{other}"), now_us + WINDOW_US, round(propensity * UNITS))
        elif kind == "report" and n_shown:
            number = max(1, n_shown - one)
            action = next((key[1] for n, (key, _, _) in kept.open.items() if n == number), "action_0")
            here.history.report(decision_key(number), action, "click" if other else "dismiss")
            kept.settle(number, int(other > 0), now_us)
        elif kind == "link" and one != other:
            here.history.link(WHO[one], WHO[other])
        elif kind == "split" and one != other:
            here.history.split([WHO[one]], [WHO[other]])
        elif kind == "forget":
            here.project()
            whole = next((group for group in here.groups() if WHO[one] in group), frozenset())
            here.history.forget(bytes([n_shown]) * 16, [WHO[one]])
            kept.forget(set(whole))
            for who in sorted(whole):
                here.history.know(dict([who]))
        elif kind == "wait":
            here.history.now_us += WINDOW_US
        here.project()
    here.project()
    _check(here, kept)


def _check(here: People, kept: Kept) -> None:
    for later_us in (0, WINDOW_US):
        now_us = here.history.now_us + later_us
        kept.close(now_us)
        with here.store.read() as snapshot:
            for group in here.groups():
                key = repository.find(
                    snapshot, [identity_key(Identity(namespace=n, value=v)) for n, v in sorted(group)]
                )
                stored = repository.load(snapshot, key) if key is not None else None
                assert stored is not None
                wanted: Counter[tuple[int, str]] = Counter()
                for column, sums in enumerate((kept.expected, kept.observed)):
                    for (who, action), amount in sums.items():
                        wanted[column, action] += amount if who in group else 0
                names = {name_key(name): name for name in CATALOG.actions.names}
                found: Counter[tuple[int, str]] = Counter()
                for _, key_of_action, from_us, *sums_of_row in (
                    np.frombuffer(stored.history, np.int64).reshape(-1, 5).tolist()
                ):
                    for column, amount in enumerate(sums_of_row):
                        found[column, names[key_of_action]] += amount if from_us <= now_us else 0
                assert +found == +wanted
    store = MemoryStore()
    rebuilt = Projector(here.log, store, lambda _sha256: CATALOG)
    while rebuilt.step():
        pass
    assert state_hash(store) == state_hash(here.store)
