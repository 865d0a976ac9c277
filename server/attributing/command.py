"""``tsugi attribution``: which channels earned the outcomes, by six models side by side.

From a file of paths, or from the log of a data directory, which is only read; its server may run or not.
It exits 0 when all was shared out, 1 when something cannot be read, 2 when it was called wrongly.
"""

from __future__ import annotations

import json
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import click

from server.progress import Progress

if TYPE_CHECKING:
    from server.outcomes.attribution import Paths
    from server.outcomes.journeys import Collector, Meetings
    from server.storage.log import Tail

DAY_US: Final = 86_400_000_000
WINDOW_DAYS_MAX: Final = 3_650.0
PROGRESS_RECORDS: Final = 4_096


class Given(NamedTuple):
    """Paths, and what was found beside them."""

    channels: tuple[str, ...]
    paths: Paths
    age_unit: float  # ages in one unit of --half-life
    found: dict[str, Any]


@click.command("attribution")
@click.option(
    "--paths", "paths_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A CSV or Parquet file of paths: path, total_conversions, total_conversion_value, total_null.",
)  # fmt: skip
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A server's data directory, whose log is read; the server may run meanwhile.",
)  # fmt: skip
@click.option("--goal", default="", help="Whose outcomes are shared out; with --data.")
@click.option(
    "--window", "window_days", type=click.FloatRange(0.0, WINDOW_DAYS_MAX, min_open=True), default=30.0,
    show_default=True, metavar="DAYS", help="How long before an outcome a touchpoint counts; with --data.",
)  # fmt: skip
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    help="Pass over decisions before this instant, UTC; with --data.",
)  # fmt: skip
@click.option(
    "--half-life", type=click.FloatRange(1e-6, 1e6), default=7.0, show_default=True,
    help="Of time decay: after how long a touchpoint counts half. Days; with --paths, which has no times, touchpoints.",
)  # fmt: skip
@click.option("--first-share", type=click.FloatRange(0.0, 1.0), default=0.4, show_default=True, help="Of position.")
@click.option("--last-share", type=click.FloatRange(0.0, 1.0), default=0.4, show_default=True, help="Of position.")
@click.option(
    "--order", type=click.IntRange(1, 3), default=1, show_default=True,
    help="Of the Markov chain: how many touchpoints a state remembers.",
)  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all of it there too.")
def attribution(
    paths_file: Path | None, data: Path | None, goal: str, window_days: float, since: datetime | None,
    half_life: float, first_share: float, last_share: float, order: int, json_file: Path | None,
) -> None:  # fmt: skip
    """Share the outcomes and their value over the channels that led to them.

    By the last and the first touchpoint, evenly, by time decay, by position, and by the removal effects of a Markov
    chain. The parts of all channels sum to what happened.
    """
    # Heavy, and every other command would pay for it.
    import lmdb  # noqa: PLC0415

    from server.errors import TsugiError  # noqa: PLC0415
    from server.outcomes.attribution import Terms  # noqa: PLC0415
    from server.registry.blobs import BlobError  # noqa: PLC0415
    from server.storage.lmdb_log import SchemaTooNewError  # noqa: PLC0415
    from server.storage.record import CorruptRecordError  # noqa: PLC0415
    from tsugi.v1.error_reason_pb2 import ErrorReason  # noqa: PLC0415

    if (paths_file is None) == (data is None):
        raise click.UsageError("name one of --paths FILE and --data DIR")
    if data is not None and not goal:
        raise click.UsageError("with --data name the goal whose outcomes are shared out: --goal NAME")
    if first_share + last_share > 1.0:
        raise click.UsageError("--first-share and --last-share are at most 1 together")
    try:
        if data is not None:
            given = _from_log(data, goal, round(window_days * DAY_US), since)
        else:
            assert paths_file is not None, "one of both is named"
            given = _from_file(paths_file)
        _share_out(given, Terms(half_life * given.age_unit, first_share, last_share, order), json_file)
    except TsugiError as error:
        violations = [{"field": path, "description": text} for path, text in error.violations]
        _fail({"reason": ErrorReason.Name(error.reason), "message": error.message, "violations": violations})
    except (BlobError, CorruptRecordError, SchemaTooNewError, lmdb.Error) as error:
        _fail({"message": f"the data directory cannot be read: {error}"})
    except (OSError, EOFError, zlib.error) as error:
        _fail({"message": f"a file cannot be read or written: {error}"})


def _share_out(given: Given, terms: Any, json_file: Path | None) -> None:
    from server.attributing.tables import as_json, print_attribution  # noqa: PLC0415  # as above
    from server.outcomes.attribution import Model, attribute, attribute_by  # noqa: PLC0415
    from server.outcomes.removal import removal_effects  # noqa: PLC0415

    paths, channels = given.paths, given.channels
    if not channels:
        _fail({"message": "there is no path to share anything over"})
    effects = removal_effects(paths, len(channels), terms.order)
    attributed = {
        model: attribute_by(effects, paths) if model is Model.MARKOV else attribute(paths, len(channels), model, terms)
        for model in Model
    }
    found = {
        "paths": int(paths.starts.size - 1),
        "touchpoints": int(paths.codes.size),
        "outcomes": int(paths.outcomes.sum()),
        "value": float(paths.values.sum()),
        "silences": int(paths.silences.sum()),
        **given.found,
    }
    if json_file is not None:
        settings = terms._replace(half_life=terms.half_life / given.age_unit)._asdict()
        told = {**found, "terms": settings, **as_json(channels, attributed, effects)}
        json_file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_attribution(channels, attributed, effects)
    click.echo("\n".join(_told(found, terms.order)))


def _told(found: dict[str, Any], order: int) -> list[str]:
    """Say in words what was shared out, and what was not."""
    lines = [
        f"{found['paths']:,} paths, {found['touchpoints']:,} touchpoints: {found['outcomes']:,} outcomes worth "
        f"{found['value']:,.2f}, {found['silences']:,} without one; Markov order {order}"
    ]
    if found["cut_paths"]:
        lines.append(f"{found['cut_paths']:,} paths were too long; of them the newest touchpoints count")
    if "people" in found:
        by = "the profile they have now" if found["people_by"] == "state" else "the profile recorded with each decision"
        lines.append(f"{found['people']:,} people, told apart by {by}")
        lines.append(f"{found['open_paths']:,} of those without an outcome may still come to one")
        if found["unled_outcomes"]:
            lines.append(
                f"{found['unled_outcomes']:,} outcomes worth {found['unled_value']:,.2f} are not shared out: no "
                "touchpoint lies within the window before them"
            )
        if found["taken_back_outcomes"]:
            lines.append(f"{found['taken_back_outcomes']:,} outcomes were taken back and do not count")
        if found["unreadable_records"]:
            lines.append(f"{found['unreadable_records']:,} records could not be read and are passed over")
    return lines


def _from_file(path: Path) -> Given:
    from server.attributing.path_rows import read_paths  # noqa: PLC0415  # as above

    read = read_paths(path)
    return Given(read.channels, read.paths, 1.0, {"cut_paths": read.n_cut})


def _from_log(data: Path, goal: str, window_us: int, since: datetime | None) -> Given:
    from server.config import Settings  # noqa: PLC0415  # as above
    from server.files import Files  # noqa: PLC0415
    from server.outcomes.journeys import Collector, lay_out  # noqa: PLC0415
    from server.registry.blobs import Blobs  # noqa: PLC0415
    from server.storage.generations import is_made  # noqa: PLC0415
    from server.storage.lmdb_log import LmdbLog  # noqa: PLC0415
    from tsugi.v1.catalog_pb2 import Catalog  # noqa: PLC0415

    files = Files.below(data)
    if not is_made(files.log):
        _fail({"message": f"{data} is not the data directory of a server that has run"})
    blobs = Blobs(files.registry)
    since_us = int(since.replace(tzinfo=UTC).timestamp()) * 1_000_000 if since is not None else 0
    collector = Collector(lambda sha256: Catalog.FromString(blobs.get(sha256)), goal, since_us)
    log = LmdbLog(files.log, Settings().data.log_map_bytes, writable=False)
    try:
        tail = _collect(log, collector)
        meetings, people_by = _of_people(files, log.log_id, collector)
    finally:
        log.close()
    journeys = lay_out(meetings, max(window_us, 1), tail.time_us)
    found = {
        "goal": goal,
        "window_days": window_us / DAY_US,
        "people": journeys.n_people,
        "people_by": people_by,
        "open_paths": journeys.n_open,
        "cut_paths": journeys.n_cut,
        "unled_outcomes": journeys.n_unled,
        "unled_value": journeys.unled_value,
        "taken_back_outcomes": collector.n_taken_back,
        "unreadable_records": collector.n_unreadable,
        "last_lsn": tail.lsn,
    }
    return Given(meetings.channels, journeys.paths, float(DAY_US), found)


def _collect(log: Any, collector: Collector) -> Tail:
    """Read the log up to where it ends now."""
    tail: Tail = log.tail()
    next_lsn = 1
    with Progress() as progress:
        told = progress.begin("log", tail.lsn, "records")
        while next_lsn <= tail.lsn:
            for record in log.read(next_lsn, min(PROGRESS_RECORDS, tail.lsn + 1 - next_lsn)):
                collector.apply(record)
                next_lsn = record.lsn + 1
            told(next_lsn - 1, next_lsn - 1)
    return tail


def _of_people(files: Any, log_id: bytes, collector: Collector) -> tuple[Meetings, str]:
    """Tell people apart by the state, where there is one of this log; otherwise by what was recorded."""
    from server.config import Settings  # noqa: PLC0415  # as above
    from server.outcomes.journeys import with_present_profiles, with_recorded_keys  # noqa: PLC0415
    from server.outcomes.projector import is_of  # noqa: PLC0415
    from server.storage.generations import is_made  # noqa: PLC0415
    from server.storage.lmdb_store import LmdbStore  # noqa: PLC0415

    meetings = collector.meetings()
    if is_made(files.state):
        store = LmdbStore(files.state, Settings().data.state_map_bytes)
        try:
            if is_of(store, log_id):
                return with_present_profiles(meetings, collector.keys, store), "state"
        finally:
            store.close()
    return with_recorded_keys(meetings, collector.keys), "recorded"


def _fail(told: dict[str, object]) -> NoReturn:
    click.echo(json.dumps({name: value for name, value in told.items() if value}, indent=2), err=True)
    sys.exit(1)
