"""Where a decision's time goes, by world: ``python -m tests.benchmark.steps CORE PROFILES PAIRS FOLDER …``.

Handed the data directories of two stopped servers, it asks each in turn what callers asked, as ``hot.py`` does, and
tells apart how long each step took: gathering, gates and features, the champion, scoring and filling, replies (with
what budgets promise), and records. Beside them it counts what the steps had to do. Prints one JSON object: for each
folder and each way to ask its figures by name, one entry a turn, microseconds and counts a decision.

Cost of the clocks: some 1 µs a step and flush, in both worlds alike.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import uvloop

from server.decisioning import decide as core
from server.decisioning import service
from server.decisioning.gather import Asked, Batch
from server.decisioning.live import Live, Served
from server.decisioning.remember import Views
from server.decisioning.service import DecisionService
from tests.benchmark.hot import N_DECISIONS, TOGETHER, Hot

STEPS: Final = ("gather", "gates", "champion", "filling", "reply", "record")
COUNTS: Final = ("candidates_left", "holds", "slots_filled", "assigned")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class _Clock:
    """CPU time of this thread by step, of whatever was decided since the last look."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()

    def timed(self, name: str, function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        """Return a function that does the same and counts its time."""

        @functools.wraps(function)
        def call(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
            begun = time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                self.used[name] += time.thread_time_ns() - begun

        return call

    def look(self) -> Counter[str]:
        """Return what was counted, and begin anew."""
        used, self.used = self.used, Counter()
        return used


_CLOCK: Final = _Clock()


class _TimedService(DecisionService):
    """Decides as ever, and says how long each step took."""

    def _gather(self, queue: list[Asked], live: Live) -> Batch:
        batch = _CLOCK.timed("gather", super()._gather)(queue, live)
        _CLOCK.used["decided"] += len(batch.asked)
        _CLOCK.used["holds"] += sum(len(asked.holds) for asked in batch.asked)
        _CLOCK.used["assigned"] += sum(asked.blend > 0 for asked in batch.asked)
        return batch

    def _answer(self, batch: Batch, live: Live, served: Served) -> None:
        _CLOCK.timed("answer", super()._answer)(batch, live, served)

    def _remember(self, batch: Batch, views: Views, replies: list[bytes]) -> None:
        _CLOCK.timed("record", super()._remember)(batch, views, replies)


async def measure(folders: list[Path], n_profiles: int, n_pairs: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Ask in turns, one by one and sixteen together; see the module."""
    worlds = {folder.name: Hot(folder, n_profiles, _TimedService) for folder in folders}
    for hot in worlds.values():
        hot.start()
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in worlds}
    for way, together in (("alone", 1), ("together", TOGETHER)):
        for n_turn in range(1 + n_pairs):
            for name, hot in worlds.items():
                _CLOCK.look()
                rounds = await hot.measure(hot.live, N_DECISIONS, together, 1)
                if n_turn > 0:  # the first to warm up
                    figures = found[name].setdefault(way, {})
                    for figure, number in (_each(_CLOCK.look()) | {key: rounds[key][0] for key in rounds}).items():
                        figures.setdefault(figure, []).append(number)
    for hot in worlds.values():
        hot.close()
    return found


def _each(used: Counter[str]) -> dict[str, float]:
    """Return microseconds and counts a decision."""
    n = used["decided"]
    inside = used["gates"] + used["champion"] + used["filling"]
    used["reply"] = used["answer"] - inside
    return {step: used[step] / 1000 / n for step in STEPS} | {count: used[count] / n for count in COUNTS}


def _watch_core() -> None:
    """Have the core's own steps timed; they are functions of a module, and there is no seam for this in it."""
    module: Any = core
    for name, function in (("gates", "_gate_and_encode"), ("filling", "_score_and_fill")):
        setattr(module, function, _CLOCK.timed(name, getattr(module, function)))
    champion: Any = module.Champion
    champion.score = _CLOCK.timed("champion", champion.score)
    decide: Callable[..., core.Decisions] = core.decide

    def counted(*arguments: Any) -> core.Decisions:
        decisions = decide(*arguments)
        _CLOCK.used["candidates_left"] += decisions.rows.size
        _CLOCK.used["slots_filled"] += int((decisions.slot_codes[:, 2] >= 0).sum())
        return decisions

    vars(service)["decide"] = counted


def main() -> None:
    """Measure and print."""
    cpu, n_profiles, n_pairs, *folders = sys.argv[1:]
    os.sched_setaffinity(0, {int(cpu)})
    _watch_core()
    sys.stdout.write(json.dumps(uvloop.run(measure([*map(Path, folders)], int(n_profiles), int(n_pairs)))))


if __name__ == "__main__":
    main()
