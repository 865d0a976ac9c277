"""How soon is learned what is reported? Outcomes at a fixed rate beside Decide at half of its peak; probes in between.

Everything is as shipped: the worker has one core, learner, projector and all callers are on the other at even terms.
A probe reports an outcome at a random time, notes its acknowledgement, and asks for decisions until one was made with
arrays that include it; every fourth one asks once, with ``wait_for_learning``. Each outcome is for a slot that none was
reported for before, so that each teaches. Beside the probes stands what the worker itself says of its lag, which is
that of the outcome that waited longest for each publication.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import psutil

from tests.benchmark import machine, world
from tests.benchmark.closed_loop import HEADLINE, disturbances
from tests.benchmark.generator import OK, Generator, Run, Target, poisson_schedule
from tests.benchmark.report import Report
from tests.benchmark.servers import DECIDE, REPORT_OUTCOME, Tsugi
from tests.benchmark.stage import Plan, await_true, covers, preview, teach
from tsugi.client import Client
from tsugi.requests import decide_request, outcome
from tsugi.v1.decision_pb2 import Degradation

OUTCOMES_PER_S: Final = 1_000.0
RATE_SHARE_MIN: Final = 0.95  # of the rates asked for; with less the load was another
PROBE_PAUSE_S_MAX: Final = 0.1
PROBE_S: Final = 0.25  # what a probe takes, its pause included, on a machine that is busy
POLL_S: Final = 0.002
LAG_S_MAX: Final = 60.0
BATCH: Final = 250
WAITING_EACH: Final = 4
N_ROUNDS_MAX: Final = 3
HISTOGRAM: Final = "tsugi_learning_lag_seconds_bucket"

Slots = Iterator[tuple[str, str]]  # decision id and action


class Probed(NamedTuple):
    """What the probes of one load met."""

    polled_ms: list[float]
    waited_ms: list[float]
    exact: list[bool]  # of those that waited: whether they were decided with what they waited for

    def lag_ms(self, percentile: float) -> float:
        """Return a percentile of the lags that were polled for."""
        return float(np.percentile(self.polled_ms, percentile))


def measure_learning_lag(plan: Plan, folder: Path, log_path: Path, report: Report) -> float:
    """Report the learning lag without and with load; return the p99 with load, in milliseconds."""
    cores = machine.Cores.choose()
    os.sched_setaffinity(0, {cores.generator})
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_path.open("ab"))
        tsugi = stack.enter_context(Tsugi(folder / "data", cores, log, with_learner=True, is_pinned=False))
        client = stack.enter_context(Client(f"127.0.0.1:{tsugi.port}", timeout_s=10.0))
        askers, reporters = (stack.enter_context(Generator(cores.generator)) for _ in range(2))
        teach(client, world.people(plan.n_profiles), with_learner=True)
        idle = _probe(client, _decided(client, plan.n_lags, plan.n_profiles), plan.n_lags)
        seconds = 1.0 + plan.n_lags * PROBE_S
        n_outcomes = int(1.1 * OUTCOMES_PER_S * seconds)
        slots = _decided(client, n_outcomes + plan.n_lags, plan.n_profiles)
        outcomes = [outcome(*next(slots), f"o-{i}", world.OUTCOME).SerializeToString() for i in range(n_outcomes)]
        messages, target = world.decide_messages(plan.n_profiles), Target(tsugi.port, DECIDE, HEADLINE[0])
        peak = statistics.median(
            askers.closed_loop(target, messages, HEADLINE[1], plan.round_s).result().calls_per_s
            for _ in range(min(N_ROUNDS_MAX, plan.n_rounds))
        )
        lsn = _newest_lsn(client)
        await_true(lambda: covers(preview(client), lsn), "the learner to have read all that")
        before = tsugi.metrics()
        learner = next(each for each in tsugi.background_ids if "learn" in psutil.Process(each).cmdline())
        used_ns, begun = machine.cpu_ns(learner), time.perf_counter()
        callers = (os.getpid(), askers.process_id, reporters.process_id)
        here = machine.Watch(cores.server, [tsugi.process_id])
        there = machine.Watch(cores.generator, (*callers, *tsugi.background_ids))
        loads = [
            askers.open_loop(target, messages, poisson_schedule(peak / 2, seconds, seed=5)),
            reporters.open_loop(
                Target(tsugi.port, REPORT_OUTCOME, 4),
                outcomes,
                poisson_schedule(OUTCOMES_PER_S, seconds, seed=6)[:n_outcomes],
            ),
        ]
        loaded = _probe(client, slots, plan.n_lags)
        after = tsugi.metrics()
        learner_share = (machine.cpu_ns(learner) - used_ns) / 1e9 / (time.perf_counter() - begun)
        faults = disturbances(here, there)
        runs = [load.result() for load in loads]
    faults += [*_faults(runs[0], peak / 2), *_faults(runs[1], OUTCOMES_PER_S)]
    beside = {
        "probes": plan.n_lags,
        "decide_per_s": runs[0].calls_per_s,
        "outcomes_per_s": runs[1].calls_per_s,
        "learner_cpu_share": learner_share,
        "learner_behind_records": after["tsugi_learner_behind_records"],
        "worker_lag_p50_ms_at_most": 1000.0 * bucket_of(0.5, before, after),
        "worker_lag_p99_ms_at_most": 1000.0 * bucket_of(0.99, before, after),
    }
    report.add("learning_lag.idle_p50_ms", [idle.lag_ms(50)], (), {"probes": plan.n_lags})
    report.add("learning_lag.idle_p99_ms", [idle.lag_ms(99)], (), {"probes": plan.n_lags})
    report.add("learning_lag.p50_ms", [loaded.lag_ms(50)], faults, beside)
    report.add("learning_lag.waited_p50_ms", [float(np.percentile(loaded.waited_ms, 50))], faults, beside)
    report.add("learning_lag.waited_p99_ms", [float(np.percentile(loaded.waited_ms, 99))], faults, beside)
    report.add("learning_lag.waited_exact_share", [statistics.mean(loaded.exact)], faults, beside)
    return report.add("learning_lag.p99_ms", [loaded.lag_ms(99)], faults, beside)


def bucket_of(share: float, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the upper bound of the bucket in which a share of the learning lags between two readings ends, seconds.

    Args:
        share: 0..1.
        before: the server's metrics, by name and labels; see Tsugi.metrics.
        after: the same, later. Without any lag between them the answer is 0.
    """
    buckets = sorted(
        (float(name.partition('le="')[2].partition('"')[0]), count - before.get(name, 0.0))
        for name, count in after.items()
        if name.startswith(f"{HISTOGRAM}{{")
    )
    total = buckets[-1][1] if buckets else 0.0
    return next((bound for bound, count in buckets if total and count >= share * total), 0.0)


def _decided(client: Client, n_slots: int, n_profiles: int) -> Slots:
    """Decide until so many slots are filled, and return them."""
    people = itertools.cycle(range(n_profiles))
    slots: list[tuple[str, str]] = []
    while len(slots) < n_slots:
        requests = [
            decide_request([(world.PLACEMENT, world.N_SLOTS)], identities=[(world.NAMESPACE, world.account(i))])
            for i in itertools.islice(people, BATCH)
        ]
        for result in client.batch_decide(requests).results:
            if not result.HasField("decision"):
                raise RuntimeError(f"a decision was refused: {result.error.message}")
            decision = result.decision
            slots += [(decision.decision_id, action) for action in {slot.action for slot in decision.slots} - {""}]
    return iter(slots)


def _newest_lsn(client: Client) -> int:
    """Return the LSN of a new record."""
    person = [(world.NAMESPACE, world.account(0))]
    return client.decide([(world.PLACEMENT, 1)], identities=person, durable=True).lsn


def _probe(client: Client, slots: Slots, n_probes: int) -> Probed:
    rng = random.Random(4)
    probed = Probed([], [], [])
    for number in range(n_probes):
        time.sleep(rng.random() * PROBE_PAUSE_S_MAX)
        lsn = client.report_outcome(*next(slots), f"probe-{number}", world.OUTCOME).lsn
        begun = time.perf_counter()
        if number % WAITING_EACH == WAITING_EACH - 1:
            reply = preview(client, lsn, wait_for_learning=True)
            probed.waited_ms.append(1000.0 * (time.perf_counter() - begun))
            probed.exact.append(covers(reply, lsn))
            if not probed.exact[-1] and Degradation.DEGRADATION_LEARNER_STALE not in reply.degradations:
                raise RuntimeError(f"a decision has not learned from record {lsn} and does not say so")
            continue
        while not covers(preview(client), lsn):
            if time.perf_counter() - begun > LAG_S_MAX:
                raise TimeoutError(f"no reply has learned from record {lsn} within {LAG_S_MAX:.0f} s")
            time.sleep(POLL_S)
        probed.polled_ms.append(1000.0 * (time.perf_counter() - begun))
    return probed


def _faults(run: Run, calls_per_s: float) -> list[str]:
    """Say why a load was not the one asked for. How late single calls were sent is no matter here."""
    faults = []
    if run.calls_per_s < RATE_SHARE_MIN * calls_per_s:
        faults.append(f"less load than asked for: {run.calls_per_s:.0f} of {calls_per_s:.0f} calls/s")
    failed = {status: n for status, n in run.statuses.items() if status != OK}
    if failed:
        faults.append(f"calls failed: by grpc-status {failed}")
    return faults
