"""Decide recorded decisions again, from the log alone: ``python -m training replay-decision ID``.

Handed the data directory of a server, it reads the record of each decision and the catalog it was decided under, takes
the recorded propensities as they are, and computes everything after them again. It writes nothing, asks no server, and
ends with an error where a bit is another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

from server.catalog.catalog import Catalog
from server.config import Settings
from server.decisioning.decide import Decisions, OtherSurvivorsError
from server.decisioning.live import load_catalog
from server.decisioning.recall import NotItsCatalogError, differences, recall
from server.errors import TsugiError
from server.files import Files
from server.registry.blobs import BlobError, Blobs
from server.storage.generations import is_made
from server.storage.lmdb_log import LmdbLog
from server.storage.log import Log
from server.storage.record import Record
from server.tokens import TokenKey
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_pb2 import ChoiceReason
from tsugi.v1.decision_service_pb2 import DecideRequest

CATALOGS_KEPT: Final = 16  # compiled

CatalogOf = Callable[[bytes], Catalog]


class Replayed(NamedTuple):
    """One decision, decided again."""

    lsn: int
    record: DecisionRecord
    catalog: Catalog
    differences: list[str]  # empty: the same to the last bit


def replay_record(record: Record, catalog_of: CatalogOf) -> Replayed:
    """Decide one recorded decision again.

    Args:
        record: a decision's, no tombstone.
        catalog_of: gives the compiled catalog of a sha256.

    Raises:
        NotItsCatalogError: it was not decided under the catalog it names.
        BlobError: that catalog is not there.

    Cost: some milliseconds, and compiling a catalog that was not at hand.
    """
    decision = DecisionRecord.FromString(record.payload)
    catalog = catalog_of(decision.provenance.catalog_sha256)
    return Replayed(record.lsn, decision, catalog, differences(decision, catalog))


def tell(replayed: Replayed) -> Iterator[str]:
    """Say what was decided again, a line a slot. Cost: it is decided once more."""
    record, catalog = replayed.record, replayed.catalog
    yield f"record {replayed.lsn}, catalog {catalog.revision[:12]}, build {record.provenance.build}"
    try:
        _, again = recall(record, catalog)
    except OtherSurvivorsError as error:
        yield f"  {error}"
    else:
        yield from _slots(record, catalog, again)
    differing = ", ".join(replayed.differences)
    yield f"  differs: {differing}" if differing else "  the same to the last bit"


def newest_decisions(log: Log, n_max: int) -> Iterator[Record]:
    """Yield the newest decisions, newest first, without those that are erased."""
    lsn = log.tail().lsn
    while lsn and n_max:
        record = log.get(lsn)
        lsn -= 1
        if record is not None and record.kind == RecordKind.RECORD_KIND_DECISION and not record.is_tombstone:
            n_max -= 1
            yield record


@click.command("replay-decision")
@click.argument("decision_ids", nargs=-1, metavar="ID...")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The server's data directory; read only.",
)
@click.option("--last", type=click.IntRange(min=1), help="The newest so many decisions, beside those named.")
def replay_decision_command(decision_ids: tuple[str, ...], data: Path, last: int | None) -> None:
    """Decide recorded decisions again and say whether every bit after the propensities is the same."""
    if not decision_ids and last is None:
        raise click.UsageError("name a decision id, or say --last N")
    files = Files.below(data)
    if not is_made(files.log):
        raise click.ClickException(f"{data} is not the data directory of a server that has run")
    log = LmdbLog(files.log, Settings().data.log_map_bytes, writable=False)
    try:
        records = [_named(decision_id, log, TokenKey(files.read_secret())) for decision_id in decision_ids]
        records += newest_decisions(log, last) if last is not None else ()
        catalog_of = functools.lru_cache(CATALOGS_KEPT)(functools.partial(load_catalog, Blobs(files.registry)))
        replayed = [replay_record(record, catalog_of) for record in records]
    except (TsugiError, NotItsCatalogError, BlobError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        log.close()
    for each in replayed if decision_ids else ():
        click.echo("\n".join(tell(each)))
    others = [each for each in replayed if each.differences]
    click.echo(f"{len(replayed):,} decided again, {len(replayed) - len(others):,} the same to the last bit")
    for each in others:
        click.echo(f"record {each.lsn}, build {each.record.provenance.build}: {', '.join(each.differences)}", err=True)
    if others:
        raise SystemExit(1)


def _named(decision_id: str, log: Log, token_key: TokenKey) -> Record:
    """Find the record of a decision id.

    Raises:
        click.ClickException: there is none.
        TsugiError: it is no decision id of this server.
    """
    entry = log.find(token_key.verify(decision_id).decision_key)
    record = log.get(entry.lsn) if entry is not None else None
    if record is None or record.kind != RecordKind.RECORD_KIND_DECISION or record.is_tombstone:
        raise click.ClickException(f"{decision_id}: it was not recorded, or is erased")
    return record


def _slots(record: DecisionRecord, catalog: Catalog, again: Decisions) -> Iterator[str]:
    request = DecideRequest.FromString(record.request)
    for (ask, _, row, reason), numbers in zip(again.slot_codes.tolist(), again.slot_numbers.tolist(), strict=True):
        placement = request.placements[ask].placement
        said = ChoiceReason.Name(reason).removeprefix("CHOICE_REASON_")
        if row < 0:
            yield f"  {placement}: nothing, {said}"
            continue
        chance, propensity, priority, *_ = numbers
        yield (
            f"  {placement}: {catalog.actions.names[row]}, {said}, propensity {propensity:.6f}, "
            f"priority {priority:.6f}, selection probability {chance:.6f}"
        )
    n_refused = int((again.reasons[0] != 0).sum())
    yield f"  {again.rows.size} passed the gates, {n_refused} were refused"
