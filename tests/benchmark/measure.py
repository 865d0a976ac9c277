"""Measurements by our own generator and of the server's inside: other people each call, fixed rates, learning, memory.

Each plays on the stage and reports figures; echo and Decide take turns where they are compared. See closed_loop.py for
what makes a round void.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, NamedTuple

from server.config import Settings
from server.files import Files
from server.storage.lmdb_log import LmdbLog
from tests.benchmark import machine, world
from tests.benchmark.closed_loop import HEADLINE, undisturbed, watched
from tests.benchmark.generator import Run, Target, poisson_schedule
from tests.benchmark.report import Report
from tests.benchmark.servers import DECIDE, REPORT_OUTCOME, Server
from tests.benchmark.stage import Stage, covers, preview
from tsugi.requests import outcome

ACKNOWLEDGED_TOGETHER: Final = (16, 16)  # connections, calls in flight on each
OUTCOMES_PER_S_MAX: Final = 20_000  # how many are prepared
DECISIONS_REPORTED: Final = 200
LAG_S_MAX: Final = 10.0
LAG_POLL_S: Final = 0.002
HOT_S_MAX: Final = 300.0


def measure_varied(stage: Stage, report: Report) -> float:
    """Report throughput when each call is about another person, and what it adds to the log; return calls a second."""
    log = LmdbLog(Files.below(stage.folder).log, Settings().data.log_map_bytes, writable=False)
    used, decisions = _log_bytes(stage, log), _decisions(stage)
    _, in_flight = HEADLINE
    turns = _take_turns(
        stage, lambda target, _: stage.generator.closed_loop(target, stage.messages, in_flight, stage.plan.round_s)
    )
    log_bytes = (_log_bytes(stage, log) - used) / (_decisions(stage) - decisions)
    log.close()
    report.add(
        "decide100.varied_throughput_ratio",
        [ours.calls_per_s / echo.calls_per_s for ours, echo in zip(turns.tsugi, turns.echo, strict=True)],
        turns.faults,
        {
            "echo.varied_calls_per_s": statistics.median(run.calls_per_s for run in turns.echo),
            "decide100.varied_calls_per_s": statistics.median(run.calls_per_s for run in turns.tsugi),
        },
    )
    report.add("decide100.record_bytes", [log_bytes])
    return statistics.median(run.calls_per_s for run in turns.tsugi)


def measure_open_loop(stage: Stage, report: Report, calls_per_s: float, name: str) -> None:
    """Report latencies from the intended send time at a fixed rate, the echo's beside them."""
    turns = _take_turns(
        stage,
        lambda target, n_turn: stage.generator.open_loop(
            target, stage.messages, poisson_schedule(calls_per_s, stage.plan.open_loop_s, seed=n_turn)
        ),
    )
    beside = {
        "rate_per_s": calls_per_s,
        "generator_lag_p99_ms": max(run.lag_ms(99) for run in turns.tsugi),
        "generator_cpu_share": max(run.cpu_share for run in turns.tsugi),
    }
    for label, percentile in (("p50", 50.0), ("p99", 99.0), ("p999", 99.9)):
        latencies_ms = [run.latency_ms(percentile) for run in turns.tsugi]
        report.add(f"decide100.open_loop_{label}_ms_{name}", latencies_ms, turns.faults, beside)
    report.add(f"echo.open_loop_p99_ms_{name}", [run.latency_ms(99) for run in turns.echo], turns.faults)
    histograms = report.env.setdefault("open_loop_histograms", {})
    histograms[name] = [run.latencies.decode("ascii") for run in turns.tsugi]


def measure_learning_lag(stage: Stage, report: Report, calls_per_s: float) -> None:
    """Report the time from an outcome's acknowledgement to the first reply that has learned from it, under load."""
    seconds = 1.0 + 0.3 * stage.plan.n_lags
    load = stage.generator.open_loop(
        Target(stage.tsugi.port, DECIDE), stage.messages, poisson_schedule(calls_per_s, seconds, seed=99)
    )
    lags_ms = [_learning_lag_ms(stage, i) for i in range(stage.plan.n_lags)]
    run = load.result()
    lags_ms.sort()
    report.add(
        "learning.lag_p99_ms",
        [lags_ms[int(0.99 * (len(lags_ms) - 1))]],
        run.faults(),
        {"outcomes": len(lags_ms), "learning.lag_p50_ms": statistics.median(lags_ms), "rate_per_s": calls_per_s},
    )


def measure_outcomes(stage: Stage, report: Report) -> None:
    """Report what group commit gives: acknowledged outcomes a second with many in flight, divided by one in flight."""
    decisions = [
        stage.client.decide([(world.PLACEMENT, 1)], identities=[(world.NAMESPACE, world.account(i))], durable=True)
        for i in range(min(DECISIONS_REPORTED, stage.plan.n_profiles))
    ]
    chosen = itertools.cycle([(decision.decision_id, decision.slots[0].action) for decision in decisions])
    numbers = itertools.count()

    def rate(connections: int, in_flight: int, n_prepared: int) -> float:
        messages = [
            outcome(*next(chosen), f"o-{next(numbers)}", world.OUTCOME).SerializeToString() for _ in range(n_prepared)
        ]
        target = Target(stage.tsugi.port, REPORT_OUTCOME, connections)
        run = stage.generator.closed_loop(target, messages, in_flight, stage.plan.round_s, is_once=True).result()
        faults.extend(run.faults())
        return run.calls_per_s

    faults: list[str] = []
    n_prepared = int(OUTCOMES_PER_S_MAX * stage.plan.round_s)
    alone, together = [], []
    for _ in range(stage.plan.n_rounds):
        alone.append(rate(1, 1, n_prepared // 4))
        together.append(rate(*ACKNOWLEDGED_TOGETHER, n_prepared))
    report.add(
        "outcomes.group_commit_gain",
        [many / one for many, one in zip(together, alone, strict=True)],
        faults,
        {
            "outcomes_per_s_alone": statistics.median(alone),
            "outcomes_per_s_together": statistics.median(together),
        },
    )


def measure_memory(stage: Stage, report: Report) -> None:
    """Report what the worker holds after all this load."""
    report.add("worker.rss_anonymous_mb", [machine.anonymous_bytes(stage.tsugi.process_id) / 1e6])


def measure_hot(stage: Stage, report: Report) -> None:
    """Report the decision without its transport, over the data of the server, which has stopped; see hot.py."""
    plan = stage.plan
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.benchmark.hot",
            str(stage.folder), str(stage.cores.server), str(plan.n_profiles), str(plan.n_rounds),
        ],
        capture_output=True, text=True, check=False, timeout=HOT_S_MAX,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the hot loop failed:\n{done.stderr}")
    results = json.loads(done.stdout)
    commit_us = report.add("decide100.hot_commit_us", results["together"]["commit"])
    beside = {"decide100.hot_commit_us": commit_us}
    report.add("decide100.hot_compute_us", results["alone"]["loop"], (), beside)
    report.add("decide100.hot_compute_us_together", results["together"]["loop"], (), beside)
    report.add("growth.1k_us", results["1k"]["loop"])
    report.add("growth.10k_us", results["10k"]["loop"])


class _Turns(NamedTuple):
    """The generator's runs against echo and Decide, and whatever makes them void."""

    echo: list[Run]
    tsugi: list[Run]
    faults: list[str]


def _take_turns(stage: Stage, start: Callable[[Target, int], Future[Run]]) -> _Turns:
    """Let the generator play against echo and Decide in turns; start is handed whom to call and the turn's number."""
    numbers = itertools.count()
    faults: list[str] = []

    def turn() -> tuple[list[Run], list[str]]:
        n_turn = next(numbers)
        echo = watched(stage, stage.echo, lambda: start(_target(stage.echo), n_turn).result())
        tsugi = watched(stage, stage.tsugi, lambda: start(_target(stage.tsugi), n_turn).result())
        faults.extend((*echo.faults, *tsugi.faults))
        return [echo.result, tsugi.result], [*echo.disturbances, *tsugi.disturbances]

    turns, disturbances = undisturbed(stage.plan, turn)
    faults += [fault for runs in turns for run in runs for fault in run.faults()]
    return _Turns([echo for echo, _ in turns], [tsugi for _, tsugi in turns], disturbances + faults)


def _target(server: Server) -> Target:
    return Target(server.port, DECIDE, HEADLINE[0])


def _learning_lag_ms(stage: Stage, i: int) -> float:
    decision = stage.client.decide(
        [(world.PLACEMENT, 1)],
        identities=[(world.NAMESPACE, world.account(i % stage.plan.n_profiles))],
        durable=True,
    )
    acknowledged = stage.client.report_outcome(decision.decision_id, decision.slots[0].action, "lag", world.OUTCOME)
    begun = time.perf_counter()
    while not covers(preview(stage.client), acknowledged.lsn):
        if time.perf_counter() - begun > LAG_S_MAX:
            raise TimeoutError(f"no reply has learned from record {acknowledged.lsn} within {LAG_S_MAX:.0f} s")
        time.sleep(LAG_POLL_S)
    return 1000.0 * (time.perf_counter() - begun)


def _log_bytes(stage: Stage, log: LmdbLog) -> float:
    """Return the size of the log once everything decided so far is on disk; a durable decision waits for that."""
    stage.client.decide([(world.PLACEMENT, 1)], identities=[(world.NAMESPACE, world.account(0))], durable=True)
    return log.used_share() * Settings().data.log_map_bytes


def _decisions(stage: Stage) -> float:
    return stage.tsugi.metrics()["tsugi_decisions_total"]
