"""What policies cost: Decide with every capability in use beside the plain Decide, in turns.

Two servers know the same actions and people; one has the plain catalog of ``world.py``, one that of
``policy_world.py``. They are asked the same in turns, each person once a run, and what is compared is the workers' own
count of the time they spent deciding. Beside it stands the CPU of all threads, which has the records in it; and, of
both, how long each step takes without transport, see ``steps.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from server.catalog.compile import compile_catalog
from tests.benchmark import machine, policy_world, world
from tests.benchmark.closed_loop import disturbances, undisturbed
from tests.benchmark.generator import Generator, Run, Target
from tests.benchmark.report import Report
from tests.benchmark.servers import DECIDE, Tsugi
from tests.benchmark.stage import Plan, await_true, preview
from tests.benchmark.steps import STEPS
from tsugi.client import Client, outcome
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest
from tsugi.v1.profile_service_pb2 import SourceRecord

N_PAIRS: Final = 12  # short ones: what disturbs a machine others use lasts longer, and so meets both of a pair
N_PAIRS_MAX: Final = 24
PAIRS_MIN: Final = 6  # undisturbed
IN_FLIGHT: Final = {"": 16, "_lone": 1}  # by the end of a figure's name; each on a connection of its own
BATCH: Final = 500
DISMISSED_EACH: Final = 10  # of so many people one dismisses what is said first
SURVIVORS_SHARES: Final = (0.95, 1.05)  # of the plain world's candidates left; they cost more than all policies
HOLDS_MIN: Final = 10.0  # that caps put on a person, on average
ASSIGNED_MIN: Final = 0.7
STEPS_S_MAX: Final = 300.0

_COUNTED: Final = ("tsugi_decide_compute_seconds_total", "tsugi_decide_flushes_total", "tsugi_decisions_total")
_ACCEPTED: Final = {Degradation.DEGRADATION_LEARNER_STALE}  # no learner runs; what it taught would cost the same

Figures = Mapping[str, Mapping[str, Sequence[float]]]


class Sample(NamedTuple):
    """One server in one round."""

    compute_us: float  # a decision, by the worker's own clock
    cpu_us: float  # a call, all threads of the worker
    batch_mean: float


class Pair(NamedTuple):
    """The two servers, one after the other."""

    plain: Sample
    full: Sample


def measure_policies(plan: Plan, folder: Path, log_path: Path, report: Report) -> None:
    """Report how much more a Decide costs with every policy capability in use.

    Raises:
        RuntimeError: the world is not the one that was to be measured.
    """
    cores, plain_data, full_data = machine.Cores.choose(), folder / "plain", folder / "full"
    message = policy_world.catalog_message()
    lacking = policy_world.lacking(compile_catalog(message))
    if lacking:
        raise RuntimeError(f"not every policy capability is in use: {'; '.join(lacking)}")
    pairs_plan = plan
    if report.is_judged:
        pairs_plan = plan._replace(n_rounds=N_PAIRS, n_turns_max=N_PAIRS_MAX, round_s=plan.round_s / 2)
    os.sched_setaffinity(0, {cores.generator})
    everybody = world.people(plan.n_profiles)
    with (
        log_path.open("ab") as log,
        Tsugi(plain_data, cores, log, with_learner=False) as plain,
        Tsugi(full_data, cores, log, with_learner=False) as full,
        Generator(cores.generator) as generator,
    ):
        _teach(plain, world.catalog_message(), world.source_records(everybody))
        _teach(full, message, policy_world.source_records(everybody))
        _tell_everybody(full, plan.n_profiles)
        messages = world.decide_messages(plan.n_profiles)
        _check_replies(full, messages)
        for suffix, in_flight in IN_FLIGHT.items():
            _measure_growth(pairs_plan, cores, (plain, full), generator, messages, (suffix, in_flight), report)
    _measure_steps(plan.n_profiles, pairs_plan.n_rounds, cores, (plain_data, full_data), report)


def growth(ours: Iterable[float], plain: Iterable[float]) -> list[float]:
    """Return by which share the one is above the other, pair by pair."""
    return [a / b - 1.0 for a, b in zip(ours, plain, strict=True)]


def report_pairs(pairs: Sequence[Pair], suffix: str, faults: Sequence[str], report: Report) -> None:
    """Report the growth of pairs: the time deciding, and the CPU of all threads."""
    plain, full = [pair.plain for pair in pairs], [pair.full for pair in pairs]
    beside = {
        f"policies.{name}{suffix}": statistics.median(values)
        for name, values in (
            ("plain_us", [each.compute_us for each in plain]),
            ("full_us", [each.compute_us for each in full]),
            ("plain_batch_mean", [each.batch_mean for each in plain]),
            ("full_batch_mean", [each.batch_mean for each in full]),
        )
    }
    grown = growth((each.compute_us for each in full), (each.compute_us for each in plain))
    report.add(f"policies.growth{suffix}", grown, faults, beside)
    beside = {
        f"policies.{name}_cpu_us{suffix}": statistics.median([each.cpu_us for each in samples])
        for name, samples in (("plain", plain), ("full", full))
    }
    grown = growth((each.cpu_us for each in full), (each.cpu_us for each in plain))
    report.add(f"policies.cpu_growth{suffix}", grown, faults, beside)


def check_steps(plain: Figures, full: Figures) -> None:
    """Raise RuntimeError unless the two worlds had the same to score and people had something for caps to count."""
    left = statistics.median(full["together"]["candidates_left"]) / statistics.median(
        plain["together"]["candidates_left"]
    )
    if not SURVIVORS_SHARES[0] <= left <= SURVIVORS_SHARES[1]:
        raise RuntimeError(f"policies left {left:.0%} of the plain world's candidates: another decision is measured")
    for name, least in (("holds", HOLDS_MIN), ("assigned", ASSIGNED_MIN)):
        found = statistics.median(full["together"][name])
        if found < least:
            raise RuntimeError(f"a decision had {found:.2f} {name} on average, at least {least} are wanted")


def _teach(tsugi: Tsugi, message: catalog_pb2.Catalog, records: Iterator[SourceRecord]) -> None:
    """Give a server catalog, champion and people, and wait until decisions know them."""
    with Client(f"127.0.0.1:{tsugi.port}", timeout_s=30.0) as client:
        client.push_catalog(message)
        bundle = world.make_bundle(compile_catalog(message)).SerializeToString(deterministic=True)
        lsn = client.assign_model_role(client.push_model(bundle, "benchmark").model_revision.revision).lsn
        while batch := list(itertools.islice(records, BATCH)):
            answer = client.ingest_records(batch)
            refused = [result.error.message for result in answer.results if result.HasField("error")]
            if refused:
                raise RuntimeError(f"{len(refused)} source records were refused, the first: {refused[0]}")
            lsn = answer.lsn
        _await_applied(client, lsn)


def _tell_everybody(tsugi: Tsugi, n_profiles: int) -> None:
    """Decide for everybody once and report that all of it was seen, and some of it dismissed."""
    with Client(f"127.0.0.1:{tsugi.port}", timeout_s=30.0) as client:
        lsn = 0
        for first in range(0, n_profiles, BATCH):
            asked = [
                DecideRequest.FromString(world.decide_message(i)) for i in range(first, min(first + BATCH, n_profiles))
            ]
            results = client.batch_decide(asked).results
            reports = itertools.chain.from_iterable(
                _reports(first + i, result.decision) for i, result in enumerate(results)
            )
            while batch := list(itertools.islice(reports, BATCH)):
                answers = client.batch_report_outcomes(batch).results
                refused = [each.error.message for each in answers if each.HasField("error")]
                if refused:
                    raise RuntimeError(f"{len(refused)} reports were refused, the first: {refused[0]}")
                lsn = answers[-1].accepted.lsn
        _await_applied(client, lsn)


def _reports(i: int, decision: DecideResponse) -> Iterator[ReportOutcomeRequest]:
    chosen = [slot.action for slot in decision.slots if slot.action]
    for position, action in enumerate(chosen):
        yield outcome(decision.decision_id, action, f"seen-{position}", policy_world.IMPRESSION)
    if i % DISMISSED_EACH == 0 and chosen:
        yield outcome(decision.decision_id, chosen[0], "dismissed", policy_world.DISMISSAL)


def _await_applied(client: Client, lsn: int) -> None:
    stale = Degradation.DEGRADATION_PROFILE_STALE
    await_true(lambda: stale not in preview(client, lsn).degradations, "the projector to take everything in")


def _check_replies(tsugi: Tsugi, messages: Sequence[bytes]) -> None:
    """Raise RuntimeError unless a sample of decisions is undisturbed, fills its slots, and compares people."""
    with Client(f"127.0.0.1:{tsugi.port}", timeout_s=30.0) as client:
        results = client.batch_decide(map(DecideRequest.FromString, messages[:BATCH])).results
    replies = [result.decision for result in results]
    troubles = {trouble for reply in replies for trouble in reply.degradations} - _ACCEPTED
    n_filled = sum(bool(slot.action) for reply in replies for slot in reply.slots)
    branches = {each.branch for reply in replies for each in reply.assignments}
    if troubles or n_filled < 0.9 * world.N_SLOTS * len(replies) or len(branches) < policy_world.N_BRANCHES:
        raise RuntimeError(f"not the decisions that were to be measured: {troubles=} {n_filled=} {branches=}")


def _measure_growth(
    plan: Plan,
    cores: machine.Cores,
    servers: tuple[Tsugi, Tsugi],
    generator: Generator,
    messages: Sequence[bytes],
    load: tuple[str, int],
    report: Report,
) -> None:
    """Ask both in turns with so many calls in flight, and report what the second one's decisions cost above."""
    suffix, in_flight = load
    ours = [each.process_id for each in servers]
    theirs = [os.getpid(), generator.process_id, *servers[0].background_ids, *servers[1].background_ids]
    faults: list[str] = []

    def turn() -> tuple[Pair, list[str]]:
        here, there = machine.Watch(cores.server, ours), machine.Watch(cores.generator, theirs)
        samples = [
            _sample(each, lambda target: generator.closed_loop(target, messages, 1, plan.round_s).result(), in_flight)
            for each in servers
        ]
        for _, run in samples:
            faults.extend(run.faults())
        return Pair(samples[0][0], samples[1][0]), disturbances(here, there)

    turn()  # to warm up
    faults.clear()
    pairs, from_outside = undisturbed(plan, turn)
    if len(pairs) < min(PAIRS_MIN, plan.n_rounds):
        faults.append(f"too few undisturbed pairs: {len(pairs)}")
    report_pairs(pairs, suffix, [*from_outside, *faults], report)


def _sample(tsugi: Tsugi, play: Callable[[Target], Run], in_flight: int) -> tuple[Sample, Run]:
    before, used_ns = tsugi.metrics(), machine.cpu_ns(tsugi.process_id)
    run = play(Target(tsugi.port, DECIDE, in_flight))
    used_ns = machine.cpu_ns(tsugi.process_id) - used_ns
    after = tsugi.metrics()
    compute_s, n_flushes, n_decisions = (after[name] - before.get(name, 0.0) for name in _COUNTED)
    return Sample(1e6 * compute_s / n_decisions, used_ns / 1000 / n_decisions, n_decisions / n_flushes), run


def _measure_steps(
    n_profiles: int, n_pairs: int, cores: machine.Cores, folders: tuple[Path, Path], report: Report
) -> None:
    """Report the growth without transport and keep every step's share of it; the servers have stopped."""
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.benchmark.steps",
            str(cores.server), str(n_profiles), str(n_pairs), *map(str, folders),
        ],
        capture_output=True, text=True, check=False, timeout=STEPS_S_MAX,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the loop over the steps failed:\n{done.stderr}")
    found: Mapping[str, Figures] = json.loads(done.stdout)
    plain, full = (found[folder.name] for folder in folders)
    check_steps(plain, full)
    report.env["policies_steps_us"] = {
        name: {
            way: {figure: round(statistics.median(numbers), 2) for figure, numbers in figures.items()}
            for way, figures in ways.items()
        }
        for name, ways in found.items()
    }
    for way, suffix in (("together", ""), ("alone", "_lone")):
        added = {
            f"policies.{step}_added_us{suffix}": statistics.median(full[way][step])
            - statistics.median(plain[way][step])
            for step in STEPS
        }
        report.add(f"policies.hot_growth{suffix}", growth(full[way]["loop"], plain[way]["loop"]), (), added)
