"""Sends records to Tsugi one at a time and asks who each of them is: in this process, or over the network.

Handed records and what their columns mean, it makes a catalog of just these attributes and no other setting, sends the
records in an order drawn from a seed, from three sources by turns, and reads the golden-record id of each. A record
has one identity, its own number, so that nothing but matching can join two. The truth is not among what it is handed.

In this process everything but the network is the product's: requests are checked, accepted into a log and projected
into a store of files. Over the network a server is started as anybody starts one, and the product's caller sends each
record in a request of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from server.catalog.compile import compile_catalog
from server.errors import TsugiError
from server.outcomes.ingest import Ingest
from server.outcomes.projector import Projector
from server.profiles import matching, repository
from server.profiles.identity import identity_key
from server.rpc import validate
from server.storage.lmdb_store import LmdbStore
from server.storage.memory import MemoryLog
from server.storage.store import Snapshot, Table
from tests.support import catalogs
from tests.support.committing import ScriptedCommitter
from tests.support.deciding import TOKEN_KEY
from tests.support.histories import START_US, History
from training.running import running_server
from tsugi.client import Client
from tsugi.requests import source_record
from tsugi.v1.catalog_pb2 import Catalog, Meaning
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import SourceRecord

SOURCES: Final = ("crm", "shop", "call_centre")
NAMESPACE: Final = "record_number"
STEP_RECORDS: Final = 64  # accepted between two steps of the projector, as at a lively pace
TIMEOUT_S: Final = 600.0
MAP_BYTES: Final = 1 << 32

Texts = Mapping[str, str]  # attribute → what its source wrote
Pair = tuple[int, int]  # rows, the lesser first


class Resolution(NamedTuple):
    """Who each record is, as the state says when all were sent."""

    profile_ids: list[str]  # by row
    n_refused: int  # records that were not accepted; each counts as somebody else
    record_us: float  # in this process: of projecting; over the network: from sending to the acknowledgement
    candidates: frozenset[Pair] = frozenset()  # that some block brings together; in this process only
    reviews: frozenset[Pair] = frozenset()  # of two profiles, likely enough to be looked at; in this process only


def catalog_of(attributes: Sequence[tuple[str, Meaning]], country_code: str) -> Catalog:
    """Return a catalog of text attributes with these meanings, and with default settings otherwise."""
    return catalogs.message(
        identityNamespaces=[{"name": NAMESPACE}],
        sources=[
            {"name": name, "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM", "defaultCountryCode": country_code}
            for name in SOURCES
        ],
        profileAttributes=[
            {"name": name, "type": "ATTRIBUTE_TYPE_TEXT", "meaning": Meaning.Name(meaning), "personalData": True}
            for name, meaning in attributes
        ],
    )


def resolve(
    attributes: Sequence[tuple[str, Meaning]], records: Sequence[Texts], seed: int, country_code: str = ""
) -> Resolution:
    """Send records in an order of its own for each seed; return who they are. Everything stays in this process."""
    with tempfile.TemporaryDirectory(prefix="tsugi-identity-") as folder:
        store = LmdbStore(Path(folder), MAP_BYTES)
        try:
            return asyncio.run(_resolve(catalog_of(attributes, country_code), records, seed, store))
        finally:
            store.close()


async def _resolve(message: Catalog, records: Sequence[Texts], seed: int, store: LmdbStore) -> Resolution:
    catalog, log = compile_catalog(message), MemoryLog()
    history = History(log)
    history.put_in_force(catalog)
    ingest = Ingest(
        log=log,
        store=store,
        committer=ScriptedCommitter(log, lambda: START_US),
        token_key=TOKEN_KEY,
        catalog=lambda: catalog,
        clock_us=lambda: START_US,
    )
    projector = Projector(log, store, lambda _sha256: catalog)
    refused: set[int] = set()
    projecting_s = 0.0
    for n_sent, (row, record) in enumerate(_sent(records, seed), start=1):
        checked = validate.checked(record, lambda one: validate.source_record(one, START_US))
        (result,) = await ingest.ingest([checked])
        if isinstance(result, TsugiError):
            refused.add(row)
        if n_sent % STEP_RECORDS == 0 or n_sent == len(records):
            started = time.perf_counter()
            while projector.step():
                pass
            projecting_s += time.perf_counter() - started
    with store.read() as snapshot:
        keys = {identity_key(_identity(row)): row for row in range(len(records))}
        profile_ids = [_profile_id(snapshot, key, row) for key, row in keys.items()]
        return Resolution(
            profile_ids,
            len(refused),
            1e6 * projecting_s / max(1, len(records)),
            frozenset(_candidates(snapshot, keys)),
            frozenset(pair for pair in _reviews(snapshot, keys) if len({profile_ids[row] for row in pair}) == 2),
        )


def resolve_served(
    attributes: Sequence[tuple[str, Meaning]], records: Sequence[Texts], seed: int, country_code: str = ""
) -> Resolution:
    """Do the same over the network: a server is started, each record is a request, each golden record is read."""
    with (
        tempfile.TemporaryDirectory(prefix="tsugi-identity-") as folder,
        running_server(Path(folder) / "data", {"SERVE_WORKERS": 1, "LEARNER_ENABLED": False}) as server,
        Client(server.address, timeout_s=TIMEOUT_S) as client,
    ):
        client.push_catalog(catalog_of(attributes, country_code))
        refused: set[int] = set()
        lsn = 0
        started = time.perf_counter()
        for row, record in _sent(records, seed):
            reply = client.ingest_records([record])
            if reply.results[0].HasField("accepted"):
                lsn = reply.results[0].accepted.lsn
            else:
                refused.add(row)
        elapsed_s = time.perf_counter() - started
        _await_applied(client, lsn)
        profile_ids = [
            _stranger(row)
            if row in refused
            else client.get_profile(identity=(NAMESPACE, str(row)), at_least_lsn=lsn).profile.profile_id
            for row in range(len(records))
        ]
    return Resolution(profile_ids, len(refused), 1e6 * elapsed_s / max(1, len(records)))


def _await_applied(client: Client, lsn: int) -> None:
    """Wait until everything that was sent is projected: a question alone waits for a tenth of a second."""
    deadline = time.monotonic() + TIMEOUT_S
    while client.resolve_identity([(NAMESPACE, "0")], at_least_lsn=lsn).applied_lsn < lsn:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the state has not come to log record {lsn} within {TIMEOUT_S:.0f} s")


def _sent(records: Sequence[Texts], seed: int) -> Iterator[tuple[int, SourceRecord]]:
    """Yield each record with its row, in the order of the seed."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    for turn, row in enumerate(order):
        source = SOURCES[turn % len(SOURCES)]
        yield row, source_record(str(row), source, {NAMESPACE: str(row)}, attributes=dict(records[row]))


def _identity(row: int) -> Identity:
    return Identity(namespace=NAMESPACE, value=str(row))


def _stranger(row: int) -> str:
    return f"refused {row}"


def _profile_id(snapshot: Snapshot, key: bytes, row: int) -> str:
    found = repository.find(snapshot, [key])
    return found.hex() if found is not None else _stranger(row)


def _candidates(snapshot: Snapshot, rows: Mapping[bytes, int]) -> Iterator[Pair]:
    size = matching.BLOCK_KEY_BYTES
    places = (bytes(place) for place, _ in snapshot.scan(Table.BLOCKS))
    for _, block in itertools.groupby(places, lambda place: place[:size]):
        members = sorted(rows[place[size:]] for place in block)
        if len(members) <= matching.BLOCK_PARTS_MAX:
            yield from itertools.combinations(members, 2)


def _reviews(snapshot: Snapshot, rows: Mapping[bytes, int]) -> Iterator[Pair]:
    for place, _ in snapshot.scan(Table.REVIEWS):
        one, other = rows[bytes(place[-32:-16])], rows[bytes(place[-16:])]
        yield min(one, other), max(one, other)
