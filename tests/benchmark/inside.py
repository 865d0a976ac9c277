"""What happens behind the calls, in loops without transport: ``python -m tests.benchmark.inside WHAT FOLDER CORE …``.

Handed the data directory of a stopped server, it takes records in as a worker does, projects the log into a state of
its own, or reads profiles as a decision does. Prints one JSON object: figures by name, one entry a round.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import numpy as np
import uvloop

from server.catalog.catalog import Catalog
from server.config import Settings
from server.decisioning.live import load_catalog
from server.errors import TsugiError
from server.files import Files
from server.outcomes.ingest import Ingest
from server.outcomes.projector import Projector
from server.profiles import repository
from server.profiles.identity import lookup_key
from server.registry.blobs import Blobs
from server.roles import wall_us
from server.rpc import validate
from server.storage.committer import GroupCommitter
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.store import Table
from server.tokens import TokenKey
from tests.benchmark import sources
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import IngestRecordsRequest

TOGETHER: Final = 4  # messages under way, as StreamIngestRecords works on

Figures = dict[str, list[float]]


def open_log(folder: Path) -> LmdbLog:
    """Open the log of a data directory."""
    return LmdbLog(Files.below(folder).log, Settings().data.log_map_bytes)


def open_store(folder: Path) -> LmdbStore:
    """Open the state of a data directory."""
    return LmdbStore(Files.below(folder).state, Settings().data.state_map_bytes)


def catalog_of(folder: Path, store: LmdbStore) -> Catalog:
    """Compile the catalog that a state is under."""
    with store.read() as snapshot:
        sha256 = snapshot.get(Table.META, b"catalog")
    assert sha256 is not None, "the server had a catalog"
    return load_catalog(Blobs(Files.below(folder).registry), bytes(sha256))


async def ingest(folder: Path, n_records: int, n_rounds: int) -> Figures:
    """Parse, check and record messages of records that are new, and wait until they are on disk.

    Returns:
        CPU microseconds a record of all threads, and records a second.
    """
    log, store = open_log(folder), open_store(folder)
    catalog = catalog_of(folder, store)
    committer = GroupCommitter(log, wall_us=wall_us, on_failure=_fail)
    committer.start(asyncio.get_running_loop())
    taker = Ingest(
        log=log,
        store=store,
        committer=committer,
        token_key=TokenKey(Files.below(folder).read_secret()),
        catalog=lambda: catalog,
        clock_us=wall_us,
    )

    async def take(message: bytes) -> None:
        check = functools.partial(validate.source_record, now_us=wall_us())
        given = IngestRecordsRequest.FromString(message).records
        for result in await taker.ingest([validate.checked(record, check) for record in given]):
            if isinstance(result, TsugiError):
                raise result

    figures: Figures = {"cpu_us": [], "records_per_s": []}
    for n_round in range(1 + n_rounds):  # the first to warm up
        messages = sources.messages(n_records, n_records, seed=1_000 + n_round)
        gc.collect()
        begun_cpu, begun = time.process_time(), time.perf_counter()
        for first in range(0, len(messages), TOGETHER):
            await asyncio.gather(*map(take, messages[first : first + TOGETHER]))
        elapsed, elapsed_cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
        if n_round > 0:
            figures["cpu_us"].append(1e6 * elapsed_cpu / n_records)
            figures["records_per_s"].append(n_records / elapsed)
    committer.close()
    return figures


def project(folder: Path, n_rounds: int) -> Figures:
    """Project the whole log into a new state, in as many rounds.

    Returns:
        CPU microseconds a log record, and log records a second; the first round is of a state that is nearly empty.
    """
    log = open_log(folder)
    figures: Figures = {"cpu_us": [], "records_per_s": []}
    with tempfile.TemporaryDirectory(dir=folder) as state:
        store = LmdbStore(Path(state), Settings().data.state_map_bytes)
        load = functools.partial(load_catalog, Blobs(Files.below(folder).registry))
        projector = Projector(log, store, load)
        last_lsn = log.tail().lsn
        for n_round in range(1, 1 + n_rounds):
            begun_cpu, begun, n_records = time.process_time(), time.perf_counter(), 0
            while projector.applied.lsn < last_lsn * n_round // n_rounds:
                n_records += projector.step()
            elapsed, elapsed_cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
            figures["cpu_us"].append(1e6 * elapsed_cpu / n_records)
            figures["records_per_s"].append(n_records / elapsed)
        store.close()
    return figures


def read(folder: Path, namespace: str, values: Sequence[str], n_rounds: int) -> Figures:
    """Read profiles by identity, each in a snapshot of its own, as a lone decision does, and write their facts.

    Args:
        folder: the data directory.
        namespace: of the identities.
        values: of the identities, each read once a round.
        n_rounds: after one to warm up.

    Returns:
        Median and 99th percentile in microseconds.
    """
    store = open_store(folder)
    catalog = catalog_of(folder, store)
    facts = np.full(len(catalog.space.facts), math.nan)
    identities = [Identity(namespace=namespace, value=value) for value in values]
    figures: Figures = {"p50_us": [], "p99_us": []}
    elapsed_ns = np.zeros(len(identities), np.int64)
    gc.disable()
    for n_round in range(1 + n_rounds):
        now_us = wall_us()
        for i, identity in enumerate(identities):
            begun = time.perf_counter_ns()
            with store.read() as snapshot:
                key = repository.find(snapshot, (lookup_key(identity, catalog.profiles),))
                stored = repository.load(snapshot, key) if key is not None else None
                assert stored is not None, "everybody asked about is known"
                assert stored.layout == catalog.space.profile_layout, "nothing is to be folded afresh"
                repository.write_facts(stored, catalog, snapshot, now_us, facts)
            elapsed_ns[i] = time.perf_counter_ns() - begun
        if n_round > 0:
            for name, percentile in (("p50_us", 50), ("p99_us", 99)):
                figures[name].append(float(np.percentile(elapsed_ns, percentile)) / 1000)
    store.close()
    return figures


def _fail() -> None:
    raise RuntimeError("the log failed")


@click.command()
@click.argument("what", type=click.Choice(["ingest", "project", "read"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("core", type=int)
@click.argument("rounds", type=int)
@click.argument("arguments", nargs=-1)
def main(what: str, folder: Path, core: int, rounds: int, arguments: Sequence[str]) -> None:
    """Measure and print. Arguments: for ingest, records a round; for read, a namespace and a file of values."""
    os.sched_setaffinity(0, {core})
    match what:
        case "ingest":
            figures = uvloop.run(ingest(folder, int(arguments[0]), rounds))
        case "project":
            figures = project(folder, rounds)
        case _:
            values = Path(arguments[1]).read_text(encoding="utf-8").split()
            figures = read(folder, arguments[0], values, rounds)
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main()
