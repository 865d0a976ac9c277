"""Decide over very many people: a state of ten million profiles beside one of ten thousand, asked in turns.

The people are those of ``world.py``, put straight into the state in the form the projector leaves them in: a thousand
of them made by the product's own code, all others copies of these under names of their own. Rows go in by ascending
key, so the files are as compact as after a compaction. Who is asked about is drawn uniformly, the worst case for any
cache, and every call of a run is about somebody else.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog
from server.files import Files
from server.profiles.identity import identity_key, own_profile_key
from server.storage.memory import MemoryStore
from server.storage.store import Store, Table
from tests.benchmark import machine, world
from tests.benchmark.closed_loop import disturbances, undisturbed
from tests.benchmark.feeding import inside
from tests.benchmark.generator import Generator, Run, Target
from tests.benchmark.inside import catalog_of, open_log, open_store
from tests.benchmark.report import Report
from tests.benchmark.servers import DECIDE, Tsugi
from tests.benchmark.stage import Plan, await_true, preview
from tests.support.populating import Person, put
from tsugi.client import Client
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.identity_pb2 import Identity

N_FEW: Final = 10_000
N_TEMPLATES: Final = 1_000
N_READ: Final = 20_000
TURN_CALLS_MAX: Final = 10_000  # of one turn: the next one asks about others
TRANSACTION_ROWS: Final = 50_000
STATE_BYTES: Final = 2_000  # more than a profile takes
_CRC_BYTES: Final = 4
_MIB: Final = 1 << 20


class Keys(NamedTuple):
    """The keys of everybody, and the people in the order of either."""

    identities: bytes  # 16 bytes each
    profiles: bytes  # the same
    by_identity: list[int]
    by_profile: list[int]


class _Template(NamedTuple):
    """One made person, taken apart where others' keys and names belong."""

    record: list[bytes]  # the flat record without its checksum, around the key of the node
    part: bytes
    node: list[bytes]  # around name, profile key and profile key


def measure_crowd(plan: Plan, folder: Path, log_path: Path, report: Report) -> None:
    """Report what a Decide costs over many people, divided by what it costs over few, and how large the state is.

    Raises:
        RuntimeError: there is no space for so many.
    """
    if shutil.disk_usage(folder).free < STATE_BYTES * plan.n_crowd:
        raise RuntimeError(f"{plan.n_crowd:,} profiles need {STATE_BYTES * plan.n_crowd / 1e9:.0f} GB of disk")
    cores, few, many = machine.Cores.choose(), folder / "few", folder / "many"
    os.sched_setaffinity(0, {cores.generator})
    for data, n_people in ((few, N_FEW), (many, plan.n_crowd)):
        with log_path.open("ab") as log, Tsugi(data, cores, log, with_learner=False) as tsugi:
            _configure(tsugi)
        begun = time.perf_counter()
        _fill_stopped(data, n_people)
        build_s = time.perf_counter() - begun
    report.add("profiles.build_s", [build_s], (), {"profiles": plan.n_crowd})
    report.add("profiles.state_bytes", [_file_bytes(many) / plan.n_crowd], (), {"profiles": plan.n_crowd})
    for name, data, n_people in (("", few, N_FEW), ("10m_", many, plan.n_crowd)):
        _warm(data)
        names = folder / "names"
        names.write_text("\n".join(map(world.account, _drawn(n_people, N_READ, seed=11))), encoding="utf-8")
        figures = inside("read", data, cores, plan.n_rounds, world.NAMESPACE, str(names))
        report.add(f"profiles.read_{name}p50_us", figures["p50_us"], (), {"profiles": n_people})
        report.add(f"profiles.read_{name}p99_us", figures["p99_us"], (), {"profiles": n_people})
    with (
        log_path.open("ab") as log,
        Tsugi(few, cores, log, with_learner=False) as one,
        Tsugi(many, cores, log, with_learner=False) as other,
        Generator(cores.generator) as generator,
    ):
        _measure_ratio(plan, cores, one, other, generator, report)


def fill(store: Store, catalog: Catalog, log_id: bytes, n_people: int) -> None:
    """Put people into a state. Cost: some 30 µs each."""
    templates, keys = _templates(catalog), _keys(log_id, n_people)
    for table, rows in (
        (Table.PROFILES, _records(keys, templates)),
        (Table.OWNERS, _owners(keys)),
        (Table.IDENTITIES, _leading(keys)),
        (Table.PARTS, _parts(keys, templates)),
        (Table.NODES, _nodes(keys, templates)),
    ):
        _write(store, table, rows)


def _fill_stopped(folder: Path, n_people: int) -> None:
    """Put people into the state of a stopped server."""
    log, store = open_log(folder), open_store(folder)
    fill(store, catalog_of(folder, store), log.log_id, n_people)
    log.close()
    store.close()


def _templates(catalog: Catalog) -> list[_Template]:
    """Make the first people by the product's code, in memory, and take them apart."""
    templates, memory = [], MemoryStore()
    for i, attributes in enumerate(world.people(N_TEMPLATES)):
        identity = Identity(namespace=world.NAMESPACE, value=world.account(i))
        key, profile_key = identity_key(identity), own_profile_key(bytes(16), i, 0)
        with memory.write() as txn:
            put(txn, profile_key, Person(attributes, {world.NAMESPACE: identity.value}), catalog)
            record, part, node = (
                bytes(txn.get(table, place) or b"")
                for table, place in ((Table.PROFILES, profile_key), (Table.PARTS, key), (Table.NODES, key))
            )
        name = identity.value.encode()
        head, _, rest = node.partition(name)
        templates.append(_Template(record[_CRC_BYTES:].split(key), part, [head, *rest.split(profile_key)]))
        assert (len(templates[-1].record), len(templates[-1].node)) == (3, 4), "each key stands where it is expected"
    return templates


def _keys(log_id: bytes, n_people: int) -> Keys:
    identities = b"".join(
        [identity_key(Identity(namespace=world.NAMESPACE, value=world.account(i))) for i in range(n_people)]
    )
    profiles = b"".join([own_profile_key(log_id, 1_000 + i, 0) for i in range(n_people)])
    return Keys(identities, profiles, _ascending(identities), _ascending(profiles))


def _ascending(keys: bytes) -> list[int]:
    """Return the rows of 16-byte keys in ascending order."""
    halves: NDArray[np.uint64] = np.frombuffer(keys, ">u8").astype(np.uint64).reshape(-1, 2)
    order: list[int] = np.lexsort((halves[:, 1], halves[:, 0])).tolist()
    return order


def _of(keys: bytes, i: int) -> bytes:
    return keys[16 * i : 16 * i + 16]


def _records(keys: Keys, templates: list[_Template]) -> Iterator[tuple[bytes, bytes]]:
    for i in keys.by_profile:
        rest = _of(keys.identities, i).join(templates[i % N_TEMPLATES].record)
        yield _of(keys.profiles, i), google_crc32c.value(rest).to_bytes(_CRC_BYTES, "little") + rest


def _owners(keys: Keys) -> Iterator[tuple[bytes, bytes]]:
    for i in keys.by_profile:
        yield _of(keys.profiles, i), _of(keys.identities, i)


def _leading(keys: Keys) -> Iterator[tuple[bytes, bytes]]:
    for i in keys.by_identity:
        yield _of(keys.identities, i), _of(keys.profiles, i)


def _parts(keys: Keys, templates: list[_Template]) -> Iterator[tuple[bytes, bytes]]:
    for i in keys.by_identity:
        yield _of(keys.identities, i), templates[i % N_TEMPLATES].part


def _nodes(keys: Keys, templates: list[_Template]) -> Iterator[tuple[bytes, bytes]]:
    for i in keys.by_identity:
        head, *between = templates[i % N_TEMPLATES].node
        yield (
            _of(keys.identities, i),
            b"".join((head, world.account(i).encode(), _of(keys.profiles, i).join(between))),
        )


def _write(store: Store, table: Table, rows: Iterator[tuple[bytes, bytes]]) -> None:
    is_over = False
    while not is_over:
        with store.write() as txn:
            for _ in range(TRANSACTION_ROWS):
                row = next(rows, None)
                if row is None:
                    is_over = True
                    break
                txn.put(table, *row)


def _configure(tsugi: Tsugi) -> None:
    """Give a server catalog and champion, and wait until both are in use."""
    message = world.catalog_message()
    with Client(f"127.0.0.1:{tsugi.port}", timeout_s=30.0) as client:
        client.push_catalog(message)
        bundle = world.make_bundle(compile_catalog(message)).SerializeToString(deterministic=True)
        lsn = client.assign_model_role(client.push_model(bundle, "benchmark").model_revision.revision).lsn
        stale = Degradation.DEGRADATION_PROFILE_STALE
        await_true(lambda: stale not in preview(client, lsn).degradations, "the champion to be in use")


def _check_known(tsugi: Tsugi) -> None:
    """Raise RuntimeError unless decisions find the people as stored."""
    with Client(f"127.0.0.1:{tsugi.port}", timeout_s=30.0) as client:
        troubles = set(preview(client).degradations) - {Degradation.DEGRADATION_LEARNER_STALE}
        if troubles:
            raise RuntimeError(f"decisions about the crowd are degraded: {sorted(troubles)}")


def _measure_ratio(
    plan: Plan, cores: machine.Cores, few: Tsugi, many: Tsugi, generator: Generator, report: Report
) -> None:
    """Ask few and many in turns, one call in flight, about people drawn uniformly."""
    n_turns = 1 + plan.n_turns_max
    asked = [
        [
            world.decide_message(i, context)
            for i, context in zip(
                _drawn(n_people, n_turns * TURN_CALLS_MAX, seed=5),
                world.contexts(n_turns * TURN_CALLS_MAX),
                strict=True,
            )
        ]
        for n_people in (N_FEW, plan.n_crowd)
    ]
    for each in (few, many):
        _check_known(each)
    numbers = iter(range(n_turns))
    ours = [each.process_id for each in (few, many)]
    theirs = [os.getpid(), generator.process_id, *few.background_ids, *many.background_ids]
    faults: list[str] = []

    def turn() -> tuple[tuple[Run, Run], list[str]]:
        first = next(numbers) * TURN_CALLS_MAX
        here, there = machine.Watch(cores.server, ours), machine.Watch(cores.generator, theirs)
        n_from_disk = machine.disk_faults(many.process_id)
        runs = [
            generator.closed_loop(
                Target(tsugi.port, DECIDE, 1), messages[first : first + TURN_CALLS_MAX], 1, plan.round_s
            ).result()
            for tsugi, messages in zip((few, many), asked, strict=True)
        ]
        by_others = disturbances(here, there)
        n_from_disk = machine.disk_faults(many.process_id) - n_from_disk
        faults.extend(fault for run in runs for fault in run.faults())
        if n_from_disk > runs[1].n_answered // 100:
            by_others.append(f"the page cache was not warm: {n_from_disk} pages from the disk")
        return (runs[0], runs[1]), by_others

    turn()  # to warm up
    rounds, from_outside = undisturbed(plan, turn)
    few_us, many_us = ([1000.0 * run.latency_ms(50) for run in runs] for runs in zip(*rounds, strict=True))
    beside = {
        "profiles": plan.n_crowd,
        "p50_us": float(np.median(many_us)),
        "p50_us_of_10k": float(np.median(few_us)),
        "p99_us": float(np.median([1000.0 * run.latency_ms(99) for _, run in rounds])),
        "p99_us_of_10k": float(np.median([1000.0 * run.latency_ms(99) for run, _ in rounds])),
    }
    ratios = [ours / others for ours, others in zip(many_us, few_us, strict=True)]
    report.add("profiles.10m_p50_ratio", ratios, [*from_outside, *faults], beside)


def _drawn(n_people: int, n: int, seed: int) -> list[int]:
    """Draw people uniformly."""
    drawn: list[int] = np.random.default_rng(seed).integers(n_people, size=n).tolist()
    return drawn


def _file_bytes(folder: Path) -> int:
    """Return the disk space of a state."""
    return sum(512 * each.stat().st_blocks for each in Files.below(folder).state.rglob("*") if each.is_file())


def _warm(folder: Path) -> None:
    """Bring the files of a state into the page cache, as far as it has room."""
    for path in Files.below(folder).state.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(_MIB):
                    pass
