"""Feeding: records taken in, projected, seen by decisions and imported; over the sources of ``sources.py``.

The worker has one core alone; projector and learner are on the caller's, at even terms with it, as shipped. The
projector's own rate is measured without anybody else, over a log that was filled before; freshness while records come
in at half that rate.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import numpy as np

from tests.benchmark import machine, sources
from tests.benchmark.closed_loop import disturbances, undisturbed
from tests.benchmark.generator import Generator, Target, poisson_schedule
from tests.benchmark.inside import TOGETHER
from tests.benchmark.report import Report
from tests.benchmark.servers import INGEST, STREAM_INGEST, Tsugi
from tests.benchmark.stage import Plan, await_true
from tsugi.client import Client
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.profile_service_pb2 import IngestRecordsRequest, IngestRecordsResponse

MESSAGE_RECORDS: Final = 20  # of those that come in while freshness is probed
PROBE_PAUSE_S_MAX: Final = 0.1
POLL_S: Final = 0.001
VISIBLE_S_MAX: Final = 10.0
INSIDE_S_MAX: Final = 600.0
IMPORT_S_MAX: Final = 600.0

# Of a channel: each is a connection of its own.
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1),)
_WARM_UP_ROUNDS: Final = 1


class Taken(NamedTuple):
    """What one round of records met."""

    records_per_s: float
    cpu_us: float  # a record, all threads of the worker


def measure_feeding(plan: Plan, folder: Path, log_path: Path, report: Report) -> None:
    """Report everything about feeding, over data directories of its own below a folder."""
    cores, filled, fed = machine.Cores.choose(), folder / "filled", folder / "fed"
    os.sched_setaffinity(0, {cores.generator})
    with log_path.open("ab") as log:
        with Tsugi(filled, cores, log, with_learner=False, is_pinned=False) as tsugi, _caller(tsugi) as client:
            _fill(client, sources.messages(plan.n_projected, plan.n_projected // 4, seed=1))
            client.ingest_records([sources.probe(1)])
            await_true(lambda: _is_visible(client, 1), "the projector to take everything in")
        rate = _measure_projector(plan, cores, filled, report)
        _measure_read(plan, cores, filled, report)
        with (
            Tsugi(filled, cores, log, with_learner=plan.with_learner, is_pinned=False) as tsugi,
            _caller(tsugi) as client,
            Generator(cores.generator) as generator,
        ):
            _measure_freshness(plan, tsugi, client, generator, rate / 2, report)
        with Tsugi(fed, cores, log, with_learner=plan.with_learner, is_pinned=False) as tsugi, _caller(tsugi):
            _measure_ingest(plan, cores, tsugi, report)
            _measure_import(plan, cores, folder, tsugi, report)
        inside_us = inside("ingest", fed, cores, plan.n_rounds, str(plan.n_ingested))
        report.add("ingest.inside_cpu_us", inside_us["cpu_us"])


def inside(what: str, folder: Path, cores: machine.Cores, n_rounds: int, *arguments: str) -> dict[str, list[float]]:
    """Return figures of the loops of inside.py, on the server's core.

    Raises:
        RuntimeError: they failed.
    """
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.benchmark.inside",
            what, str(folder), str(cores.server), str(n_rounds), *arguments,
        ],
        capture_output=True, text=True, check=False, timeout=INSIDE_S_MAX,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr}")
    figures: dict[str, list[float]] = json.loads(done.stdout)
    return figures


@contextlib.contextmanager
def _caller(tsugi: Tsugi) -> Iterator[Client]:
    """Push the catalog, and yield a caller once decisions see what is ingested."""
    with Client(f"127.0.0.1:{tsugi.port}", timeout_s=30.0) as client:
        client.push_catalog(sources.catalog_message())
        client.ingest_records([sources.probe(0)])
        await_true(lambda: _is_visible(client, 0), "the first record to be seen")
        yield client


def _fill(client: Client, messages: Sequence[bytes]) -> None:
    """Send messages one by one."""
    for each in messages:
        _check(client.ingest_records(IngestRecordsRequest.FromString(each).records))


def _check(answer: IngestRecordsResponse) -> None:
    """Raise RuntimeError unless every record was accepted as a new one."""
    for result in answer.results:
        if not result.HasField("accepted") or result.accepted.duplicate:
            raise RuntimeError(f"a record was not taken in as new: {result}")


def _measure_projector(plan: Plan, cores: machine.Cores, folder: Path, report: Report) -> float:
    """Report how fast a filled log is projected; return it, in records a second."""
    figures = inside("project", folder, cores, plan.n_rounds)
    beside = {"log_records": plan.n_projected}
    report.add("projector.cpu_us", figures["cpu_us"])
    return report.add("projector.records_per_s", figures["records_per_s"], (), beside)


def _measure_read(plan: Plan, cores: machine.Cores, folder: Path, report: Report) -> None:
    values = folder / "browsers"
    said = sources.records(plan.n_projected, plan.n_projected // 4, seed=1)
    browsers = {each.value for one in said for each in one.identities if each.namespace == "browser_id"}
    values.write_text("\n".join(sorted(browsers)), encoding="utf-8")
    figures = inside("read", folder, cores, plan.n_rounds, "browser_id", str(values))
    beside = {"profiles": len(browsers)}
    report.add("profiles.read_windows_p50_us", figures["p50_us"], (), beside)
    report.add("profiles.read_windows_p99_us", figures["p99_us"], (), beside)


def _measure_freshness(
    plan: Plan, tsugi: Tsugi, client: Client, generator: Generator, records_per_s: float, report: Report
) -> None:
    """Report how long after its acknowledgement a record is seen by Decide, under load."""
    seconds = 1.0 + plan.n_probes * 2 * (PROBE_PAUSE_S_MAX / 2 + 0.03)
    n_records = int(records_per_s * (seconds + 1.0))
    messages = sources.messages(n_records, plan.n_projected // 4, seed=2, together=MESSAGE_RECORDS)
    schedule = poisson_schedule(records_per_s / MESSAGE_RECORDS, seconds, seed=7)[: len(messages)]
    load = generator.open_loop(Target(tsugi.port, INGEST, 4), messages, schedule)
    rng = random.Random(3)
    polled_ms, awaited_ms, exact = [], [], []
    for number in range(2, 2 + 2 * plan.n_probes):
        time.sleep(rng.random() * PROBE_PAUSE_S_MAX)
        lsn = client.ingest_records([sources.probe(number)]).lsn
        begun = time.perf_counter()
        if number % 2:
            while not _is_visible(client, number):
                if time.perf_counter() - begun > VISIBLE_S_MAX:
                    raise TimeoutError(f"record {lsn} was not seen within {VISIBLE_S_MAX:.0f} s")
                time.sleep(POLL_S)
            polled_ms.append(1000.0 * (time.perf_counter() - begun))
        else:
            exact.append(_is_visible(client, number, at_least_lsn=lsn))
            awaited_ms.append(1000.0 * (time.perf_counter() - begun))
    run = load.result()
    beside = {"rate_per_s": records_per_s, "probes": plan.n_probes}
    for name, figures in (("", polled_ms), ("at_least_lsn_", awaited_ms)):
        for percentile in (50, 99):
            value = float(np.percentile(figures, percentile))
            report.add(f"freshness.{name}p{percentile}_ms", [value], run.faults(), beside)
    report.add("freshness.at_least_lsn_exact_share", [sum(exact) / len(exact)], run.faults(), beside)


def _measure_ingest(plan: Plan, cores: machine.Cores, tsugi: Tsugi, report: Report) -> None:
    """Report how many records are accepted a second, in calls and in one stream, and the worker's CPU for each."""
    seeds = iter(range(100, 1_000))
    for name, send in (("unary", _send_unary), ("stream", _send_stream)):

        def turn(send: Callable[[int, Sequence[bytes]], list[bytes]] = send) -> tuple[Taken, list[str]]:
            messages = sources.messages(plan.n_ingested, plan.n_ingested, seed=next(seeds))
            return _take(cores, tsugi, plan.n_ingested, lambda: send(tsugi.port, messages))

        for _ in range(_WARM_UP_ROUNDS):
            turn()
        rounds, faults = undisturbed(plan, turn)
        cpu_us = report.add(f"ingest.{name}_cpu_us", [each.cpu_us for each in rounds], faults)
        report.add(
            f"ingest.{name}_records_per_s",
            [each.records_per_s for each in rounds],
            faults,
            {f"ingest.{name}_cpu_us": cpu_us, "records": plan.n_ingested},
        )


def _take(
    cores: machine.Cores, tsugi: Tsugi, n_records: int, send: Callable[[], list[bytes]]
) -> tuple[Taken, list[str]]:
    """Play one round; return what it met and what disturbed it."""
    here, there = machine.Watch(cores.server, [tsugi.process_id]), machine.Watch(cores.generator, _ours(tsugi))
    begun = time.perf_counter()
    answers = send()
    elapsed, used_ns, by_others = time.perf_counter() - begun, here.used_ns(), disturbances(here, there)
    for answer in answers:
        _check(IngestRecordsResponse.FromString(answer))
    return Taken(n_records / elapsed, used_ns / 1000 / n_records), by_others


def _ours(tsugi: Tsugi) -> tuple[int, ...]:
    """Return the processes on the caller's core."""
    return (os.getpid(), *tsugi.background_ids)


def _send_unary(port: int, messages: Sequence[bytes]) -> list[bytes]:
    """Call with every message, a few calls at once, each on a connection of its own; return the answers."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(TOGETHER) as threads:
        calls = []
        for _ in range(TOGETHER):
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", _OPTIONS))
            calls.append(channel.unary_unary(INGEST, _as_is, _as_is))
        answers = threads.map(lambda i: calls[i % TOGETHER](messages[i], timeout=30.0), range(len(messages)))
        return list(answers)


def _send_stream(port: int, messages: Sequence[bytes]) -> list[bytes]:
    """Send every message in one stream; return the answers."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", _OPTIONS) as channel:
        return list(channel.stream_stream(STREAM_INGEST, _as_is, _as_is)(iter(messages), timeout=120.0))


def _as_is(data: bytes) -> bytes:
    return data


def _measure_import(plan: Plan, cores: machine.Cores, folder: Path, tsugi: Tsugi, report: Report) -> None:
    """Report the rows a minute that ``tsugi import`` brings to the server's disk, its own start included."""
    mapping = folder / "mapping.yaml"
    sources.write_mapping(mapping)
    seeds = iter(range(10, 100))

    def turn() -> tuple[float, list[str]]:
        rows = folder / f"rows-{next(seeds)}.csv"
        sources.write_csv(rows, plan.n_imported, seed=int(rows.stem.partition("-")[2]))
        here, there = machine.Watch(cores.server, [tsugi.process_id]), machine.Watch(cores.generator, _ours(tsugi))
        begun = time.perf_counter()
        summary = _import(tsugi, mapping, rows)
        elapsed, by_others = time.perf_counter() - begun, disturbances(here, there)
        if summary["accepted"] != plan.n_imported:
            raise RuntimeError(f"rows were not accepted: {summary}")
        return 60.0 * plan.n_imported / elapsed, by_others

    rounds, faults = undisturbed(plan._replace(n_rounds=min(3, plan.n_rounds)), turn)
    report.add("import.rows_per_min", rounds, faults, {"rows": plan.n_imported})


def _import(tsugi: Tsugi, mapping: Path, rows: Path) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable, "-m", "server", "import", "--address", f"127.0.0.1:{tsugi.port}",
            "--source", sources.CUSTOMERS, "--map", str(mapping), "--json", str(rows),
        ],
        capture_output=True, text=True, check=False, timeout=IMPORT_S_MAX,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the import failed:\n{done.stdout}{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _is_visible(client: Client, number: int, at_least_lsn: int = 0) -> bool:
    """Say whether a decision sees that the probe's stamp is this number or a later one.

    Raises:
        RuntimeError: it was to see the record, did not, and does not say so.
    """
    reply = client.decide(
        [(sources.PLACEMENT, 1)],
        identities=[sources.PROBE],
        context={sources.WANTED: float(number)},
        preview=True,
        at_least_lsn=at_least_lsn,
    )
    is_visible = any(slot.action for slot in reply.slots)
    if at_least_lsn and not is_visible and Degradation.DEGRADATION_PROFILE_STALE not in reply.degradations:
        raise RuntimeError(f"a decision did not see record {at_least_lsn} and does not say so")
    return is_visible
