"""Closed loops by h2load: throughput, CPU and latency of Decide and of the echoes, in turns.

Only ratios of neighbours in time are worth comparing on a machine that others use, hence the turns. A round is void
when calls failed, when h2load was the bottleneck, when the server counted other successes than h2load, when replies had
another size than the real client's, or when a decision was degraded (not recorded, for one). A turn during which
somebody else used one of the cores is played again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

from tests.benchmark import h2load, machine
from tests.benchmark.report import Report
from tests.benchmark.servers import DECIDE, Server
from tests.benchmark.stage import Plan, Stage

HEADLINE: Final = (16, 4)  # connections, calls in flight on each
# Of the server's core, of the generator's: there the kernel's own work for the disk is among it, and a caller that is
# held up lets calls pile up, which makes a server look better than it is.
FOREIGN_SHARES_MAX: Final = (0.1, 0.2)
REPLY_BYTES_TOLERANCE: Final = 0.1
WARM_UP_S: Final = 0.5
ROUNDS_MIN: Final = 3

_COMPUTE, _DECISIONS = "tsugi_decide_compute_seconds_total", "tsugi_decisions_total"
_FLUSHES, _ERRORS = "tsugi_decide_flushes_total", "tsugi_errors_total"
_Result = TypeVar("_Result")


class Sample(NamedTuple):
    """One server in one round."""

    calls_per_s: float
    cpu_us: float  # a call, all threads of the serving process
    p50_us: float
    p99_us: float
    compute_us: float  # of Tsugi only, by its own count, as the next
    batch_mean: float
    faults: tuple[str, ...]
    disturbances: tuple[str, ...]


class Samples(NamedTuple):
    """All rounds of one load."""

    echo: list[Sample]
    tsugi: list[Sample]
    same_transport: list[Sample]
    disturbances: list[str]

    def faults(self) -> list[str]:
        """Return whatever was wrong in any round."""
        rounds = (*self.echo, *self.tsugi, *self.same_transport)
        return [*self.disturbances, *(fault for sample in rounds for fault in sample.faults)]


class Watched(NamedTuple, Generic[_Result]):
    """What came of something that was played."""

    result: _Result
    used_ns: int  # CPU of the serving process
    disturbances: list[str]  # by others on this machine
    faults: list[str]  # of the server


def measure_saturated(stage: Stage, report: Report) -> None:
    """Report the headline: throughput and CPU at 16 connections with 4 calls in flight, and at two other loads."""
    samples = play_rounds(stage, *HEADLINE)
    faults = samples.faults()
    beside = {
        "echo.calls_per_s": report.add("echo.calls_per_s", each(samples.echo, "calls_per_s"), faults),
        "echo.saturated_p99_ms": report.add(
            "echo.saturated_p99_ms", [sample.p99_us / 1000 for sample in samples.echo], faults
        ),
    }
    report.add("decide100.calls_per_s", each(samples.tsugi, "calls_per_s"), faults)
    p99_ms = report.add("decide100.saturated_p99_ms", [sample.p99_us / 1000 for sample in samples.tsugi], faults)
    report.add(
        "decide100.throughput_ratio",
        ratios(samples.tsugi, samples.echo, "calls_per_s"),
        faults,
        beside | {"decide100.saturated_p99_ms": p99_ms},
    )
    cpu_us = report.add("echo.cpu_us", each(samples.echo, "cpu_us"), faults)
    report.add("decide100.cpu_us", each(samples.tsugi, "cpu_us"), faults)
    report.add("decide100.cpu_ratio", ratios(samples.tsugi, samples.echo, "cpu_us"), faults, {"echo.cpu_us": cpu_us})
    report.add("echo.same_transport_calls_per_s", each(samples.same_transport, "calls_per_s"), faults)
    same_us = report.add("echo.same_transport_cpu_us", each(samples.same_transport, "cpu_us"), faults)
    report.add(
        "decide100.cpu_ratio_same_transport",
        ratios(samples.tsugi, samples.same_transport, "cpu_us"),
        faults,
        {"echo.same_transport_cpu_us": same_us},
    )
    report.add("decide100.server_compute_us_saturated", each(samples.tsugi, "compute_us"), faults)
    report.add("decide100.batch_mean", each(samples.tsugi, "batch_mean"), faults)
    for connections, in_flight in ((4, 8), (1, 32)):
        samples, name = play_rounds(stage, connections, in_flight), f"c{connections}m{in_flight}"
        for figure, field in (("throughput", "calls_per_s"), ("cpu", "cpu_us")):
            report.add(
                f"decide100.{figure}_ratio_{name}",
                ratios(samples.tsugi, samples.echo, field),
                samples.faults(),
                {f"echo.{field}": statistics.median(each(samples.echo, field))},
            )


def measure_lone(stage: Stage, report: Report) -> None:
    """Report what one call in flight at a time meets."""
    samples = play_rounds(stage, 1, 1)
    faults = samples.faults()
    echo_us = report.add("echo.lone_p50_us", each(samples.echo, "p50_us"), faults)
    report.add("decide100.lone_p50_us", each(samples.tsugi, "p50_us"), faults)
    report.add("decide100.lone_p99_us", each(samples.tsugi, "p99_us"), faults)
    report.add(
        "decide100.lone_p50_ratio",
        ratios(samples.tsugi, samples.echo, "p50_us"),
        faults,
        {"echo.lone_p50_us": echo_us},
    )
    report.add("decide100.server_compute_us_lone", each(samples.tsugi, "compute_us"), faults)


def play_rounds(stage: Stage, connections: int, in_flight: int) -> Samples:
    """Play echo, Decide and the echo with our transport in turns, after a short round of each to warm up."""
    servers: tuple[Server, ...] = (stage.echo, stage.tsugi, stage.same_transport)
    for server in servers:
        _sample(stage, server, connections, in_flight, WARM_UP_S)

    def turn() -> tuple[list[Sample], list[str]]:
        samples = [_sample(stage, server, connections, in_flight, stage.plan.round_s) for server in servers]
        return samples, [disturbance for sample in samples for disturbance in sample.disturbances]

    turns, disturbances = undisturbed(stage.plan, turn)
    echo, tsugi, same_transport = (list(rounds) for rounds in zip(*turns, strict=True))
    return Samples(echo, tsugi, same_transport, disturbances)


def undisturbed(plan: Plan, turn: Callable[[], tuple[_Result, list[str]]]) -> tuple[list[_Result], list[str]]:
    """Play turns until enough of them were not disturbed by others on this machine, whatever they measured.

    Args:
        plan: how many are wanted, and how many are played at most.
        turn: plays one; returns what it measured and the disturbances.

    Returns:
        The undisturbed turns where there are at least three, or as many as were wanted, and nothing to object to;
        otherwise all turns and their disturbances, which make them void.
    """
    turns: list[tuple[_Result, list[str]]] = []
    good: list[_Result] = []
    while len(turns) < plan.n_turns_max and len(good) < plan.n_rounds:
        turns.append(turn())
        good = [result for result, disturbances in turns if not disturbances]
    if len(good) >= min(ROUNDS_MIN, plan.n_rounds):
        return good, []
    return [result for result, _ in turns], [each for _, disturbances in turns for each in disturbances]


def watched(stage: Stage, server: Server, play: Callable[[], _Result]) -> Watched[_Result]:
    """Play something against a server, and watch who uses the cores meanwhile."""
    others = [process_id for process_id in stage.server_side if process_id != server.process_id]
    n_degraded = _degraded(stage)
    here = machine.Watch(stage.cores.server, (server.process_id, *others))
    there = machine.Watch(stage.cores.generator, stage.generator_side)
    result = play()
    used_ns, by_others = here.used_ns(), disturbances(here, there)
    n_degraded = _degraded(stage) - n_degraded if server is stage.tsugi else 0.0
    return Watched(
        result=result,
        used_ns=used_ns,
        disturbances=by_others,
        faults=[f"decisions were degraded: {n_degraded:.0f}"] if n_degraded else [],
    )


def disturbances(here: machine.Watch, there: machine.Watch) -> list[str]:
    """Say whether others used more of the server's or of the generator's core than a measurement bears."""
    shares = (here.foreign_share(), there.foreign_share())
    return [
        f"others used the {name}'s core: {share:.0%}"
        for name, share, share_max in zip(("server", "generator"), shares, FOREIGN_SHARES_MAX, strict=True)
        if share > share_max
    ]


def each(samples: list[Sample], field: str) -> list[float]:
    """Return one field of every round."""
    return [float(getattr(sample, field)) for sample in samples]


def ratios(ours: list[Sample], echo: list[Sample], field: str) -> list[float]:
    """Return our field divided by the echo's, round by round."""
    return [a / b for a, b in zip(each(ours, field), each(echo, field), strict=True)]


def _degraded(stage: Stage) -> float:
    """Count the troubles replies have named so far, such as a decision that was not recorded."""
    metrics = stage.tsugi.metrics()
    expected = (
        0.0 if stage.plan.with_learner else metrics.get('tsugi_degradations_total{degradation="LEARNER_STALE"}', 0.0)
    )
    return metrics.get("tsugi_degradations_total", 0.0) - expected


def _sample(stage: Stage, server: Server, connections: int, in_flight: int, seconds: float) -> Sample:
    before = stage.tsugi.metrics()
    seen = watched(
        stage,
        server,
        lambda: h2load.run(
            f"http://127.0.0.1:{server.port}{DECIDE}",
            stage.body,
            connections=connections,
            in_flight=in_flight,
            seconds=seconds,
        ),
    )
    counted = {name: value - before.get(name, 0.0) for name, value in stage.tsugi.metrics().items()}
    run, faults = seen.result, [*seen.faults, *seen.result.faults]
    if abs(run.reply_bytes / stage.reply_bytes - 1.0) > REPLY_BYTES_TOLERANCE:
        faults.append(f"replies had another size: {run.reply_bytes:.0f} bytes, expected {stage.reply_bytes:.0f}")
    compute_us = batch_mean = 0.0
    if server is stage.tsugi:
        compute_us = counted[_COMPUTE] / counted[_DECISIONS] * 1e6
        batch_mean = counted[_DECISIONS] / counted[_FLUSHES]
        n_decided = counted[_DECISIONS] - counted.get(_ERRORS, 0.0)
        # What was in flight when h2load stopped is decided, but no longer answered.
        if not run.n_answered <= n_decided <= run.n_answered + connections * in_flight:
            faults.append(f"the server counted otherwise: {n_decided:.0f} decisions, h2load {run.n_answered} replies")
    return Sample(
        calls_per_s=run.calls_per_s,
        cpu_us=seen.used_ns / 1000 / run.n_answered,
        p50_us=run.p50_us,
        p99_us=run.p99_us,
        compute_us=compute_us,
        batch_mean=batch_mean,
        faults=tuple(faults),
        disturbances=tuple(seen.disturbances),
    )
