"""``tsugi import``: files of people's records into a running server, by a mapping.

It exits 0 when every row went in, 3 when some were rejected, 1 when the import could not run or not go on, 2 when it
was called wrongly. A refusal goes to standard error as JSON, with every fault.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from server.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.importing.run import Outcome
    from tsugi.client import Client
    from tsugi.v1.profile_service_pb2 import IngestRecordsResponse, SourceRecord

EXIT_REJECTED: Final = 3
FAULTS_SHOWN: Final = 10

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("import")
@click.option(
    "--address", envvar="TSUGI_ADDRESS", default="127.0.0.1:7410", show_default=True, help="Where the server is."
)
@click.option("--source", required=True, help="Whose records they are; a source the catalog declares.")
@click.option("--map", "mapping_file", required=True, type=_FILE, help="What columns become; YAML.")
@click.option(
    "--journal", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder of journals; by default each lies beside its file.",
)  # fmt: skip
@click.option(
    "--dry-run", is_flag=True,
    help="Read, convert and check every row, send nothing, write nothing. What only the server's state tells is not "
    "found: ids known with other content, and identities that too many share.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Begin with the first row, also of a file that was imported before.")
@click.option(
    "--wait-s", type=click.FloatRange(0.0), default=0.0, show_default=True,
    help="How long to wait until profiles show all that went in.",
)  # fmt: skip
@click.option("--json", "is_json", is_flag=True, help="Print the summary as JSON.")
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
def import_command(files: tuple[Path, ...], **options: Any) -> None:
    """Import CSV, JSON lines or Parquet files, and go on where a killed import stopped.

    Exits 0 when every row went in, 3 when some were rejected, 1 when it could not run or not go on.
    """
    # Heavy, and every other command would pay for it.
    from server.errors import TsugiError  # noqa: PLC0415
    from tsugi.client import CallError  # noqa: PLC0415
    from tsugi.v1.error_reason_pb2 import ErrorReason  # noqa: PLC0415

    try:
        _import(files, **options)
    except TsugiError as error:
        violations = [{"field": path, "description": text} for path, text in error.violations]
        _fail({"reason": ErrorReason.Name(error.reason), "message": error.message, "violations": violations})
    except CallError as error:
        message = _unanswered(options["address"]) if error.is_unanswered else error.message
        _fail({"code": error.code.name, "reason": error.reason, "message": message})
    except OSError as error:
        _fail({"message": f"a file cannot be read or written: {error}"})


def _unanswered(address: str) -> str:
    return f"no server answers at {address}; start it, and the same command goes on where it stopped"


def _import(
    files: tuple[Path, ...], address: str, source: str, mapping_file: Path, journal: Path | None, dry_run: bool,
    restart: bool, wait_s: float, is_json: bool,
) -> None:  # fmt: skip
    import time  # noqa: PLC0415

    from server.importing import checking, mapping, run  # noqa: PLC0415  # as above
    from server.importing import journal as journals  # noqa: PLC0415
    from server.importing.faults import ImportRunning, ImportStopped  # noqa: PLC0415
    from tsugi.client import Client  # noqa: PLC0415

    try:
        plan_mapping = mapping.load_mapping(mapping_file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        _fail({"message": f"{mapping_file.name} is not text in UTF-8"})
    outcomes: dict[Path, Outcome] = {}
    stopped, applied_lsn = "", None
    with Client(address, channels=2) as client:
        catalog = client.get_catalog().catalog
        checking.check_mapping(plan_mapping, catalog, source)
        opened = run.open_all(list(files), plan_mapping, journal)
        plan = run.Plan(plan_mapping, catalog, source)
        with Progress() as progress:
            try:
                for each in opened:
                    told = progress.begin(each.path.name, each.rows.size, "rows")
                    destination = None if dry_run else _Watched(client, address, progress)
                    outcomes[each.path] = run.import_file(
                        each, plan, destination, told, time.monotonic, is_restart=restart
                    )
            except ImportRunning as error:  # what its journal says is the other one's
                stopped = str(error)
            except (ImportStopped, KeyboardInterrupt) as error:
                stopped = f"{str(error) or 'interrupted'}; the same command goes on where it stopped"
                if isinstance(error, ImportStopped) and error.is_unanswered:
                    stopped = _unanswered(address)
                left = opened[len(outcomes)]
                if (so_far := journals.load(left.journal_path)) is not None:
                    outcomes[left.path] = run.Outcome(so_far.tally, None, False)
            lsn = max((outcome.tally.lsn for outcome in outcomes.values()), default=0)
            if lsn and not stopped:
                applied_lsn = _applied(client, lsn, wait_s, progress)
    if outcomes or not stopped:
        summary = _summary(outcomes, dry_run, applied_lsn)
        click.echo(json.dumps(summary, indent=2) if is_json else _told(outcomes, dry_run))
        if applied_lsn is not None and not is_json:
            click.echo(_told_applied(applied_lsn, lsn))
    if stopped:
        _fail({"message": stopped})
    if any(outcome.tally.rejected for outcome in outcomes.values()):
        sys.exit(EXIT_REJECTED)


def _applied(client: Client, lsn: int, wait_s: float, progress: Progress) -> int | None:
    """Return how far the server's state is, having waited for it to come to an LSN; None when it does not say."""
    import time  # noqa: PLC0415  # as above

    from tsugi.client import CallError  # noqa: PLC0415

    until = time.monotonic() + wait_s
    told, first_lsn = None, 0
    try:
        while True:
            applied_lsn = client.count_people(at_least_lsn=lsn).applied_lsn  # it waits a little
            if applied_lsn >= lsn or time.monotonic() >= until:
                return applied_lsn
            if told is None:
                first_lsn = applied_lsn
                told = progress.begin("applying", lsn - first_lsn, "rows")
            told(applied_lsn - first_lsn, applied_lsn - first_lsn)
    except (CallError, KeyboardInterrupt):  # all of it is on the server's disk, which is what counts
        return None


def _told_applied(applied_lsn: int, lsn: int) -> str:
    if applied_lsn >= lsn:
        return f"profiles show all of it: applied LSN {applied_lsn}"
    return (
        f"all of it is on disk, and profiles show it up to LSN {applied_lsn} of {lsn}: the rest follows by itself; "
        "--wait-s waits for it"
    )


class _Watched:
    """A client that tells whoever looks on when its server is lost: the sender goes on trying for minutes."""

    def __init__(self, client: Client, address: str, progress: Progress) -> None:
        self._client = client
        self._address = address
        self._progress = progress
        self._is_lost = False

    def ingest_records(
        self, records: Iterable[SourceRecord], *, timeout_s: float | None = None
    ) -> IngestRecordsResponse:
        """See Destination."""
        from tsugi.client import CallError  # noqa: PLC0415  # as above

        try:
            response = self._client.ingest_records(records, timeout_s=timeout_s)
        except CallError as error:
            if error.is_unanswered and not self._is_lost:
                self._is_lost = True
                self._progress.say(f"no server answers at {self._address}; start it, it is tried again for minutes")
            raise
        self._is_lost = False
        return response


def _summary(outcomes: dict[Path, Outcome], is_dry_run: bool, applied_lsn: int | None) -> dict[str, Any]:
    files = [
        {
            "file": path.name,
            "rows": outcome.tally.rows,
            "accepted": outcome.tally.accepted,
            "duplicates": outcome.tally.duplicates,
            "rejected": outcome.tally.rejected,
            "faults": [
                {
                    "reason": fault.reason,
                    "column": fault.column,
                    "message": fault.message,
                    "count": fault.count,
                    "example_line": fault.example_line,
                }
                for fault in sorted(outcome.tally.faults, key=lambda fault: -fault.count)
            ],
            "rejects_file": outcome.rejects.name if outcome.rejects is not None and outcome.tally.rejected else "",
            "was_finished": outcome.was_finished,
            "seconds": round(outcome.tally.seconds, 3),
            "rows_per_s": round(outcome.tally.rows / max(outcome.tally.seconds, 0.001), 1),
            "lsn": outcome.tally.lsn,
        }
        for path, outcome in outcomes.items()
    ]
    totals = {
        name: sum(outcome.tally.__getattribute__(name) for outcome in outcomes.values())
        for name in ("rows", "accepted", "duplicates", "rejected", "seconds")
    }
    totals["seconds"] = round(totals["seconds"], 3)
    totals["rows_per_s"] = round(totals["rows"] / max(totals["seconds"], 0.001), 1)
    totals["lsn"] = max((outcome.tally.lsn for outcome in outcomes.values()), default=0)
    return {"dry_run": is_dry_run, **totals, "applied_lsn": applied_lsn, "files": files}


def _told(outcomes: dict[Path, Outcome], is_dry_run: bool) -> str:
    """Return the summary for people."""
    lines = []
    for path, outcome in outcomes.items():
        tally = outcome.tally
        before = "imported before, --restart sends it again: " if outcome.was_finished else ""
        lines.append(
            f"{path.name}: {before}{tally.rows:,} rows, {tally.accepted:,} {'fit' if is_dry_run else 'accepted'}, "
            f"{tally.duplicates:,} known before, {tally.rejected:,} rejected; "
            f"{tally.seconds:,.1f} s, {tally.rows / max(tally.seconds, 0.001):,.0f} rows a second"
            f"{f'; last LSN {tally.lsn}' if tally.lsn else ''}"
        )
        place = "row" if path.suffix == ".parquet" else "line"
        faults = sorted(tally.faults, key=lambda fault: -fault.count)
        lines += [
            f"  {fault.count:,} × {fault.reason}{', column ' + fault.column if fault.column else ''}: {fault.message} "
            f"({place} {fault.example_line}{' and others' if fault.count > 1 else ''})"
            for fault in faults[:FAULTS_SHOWN]
        ]
        if len(faults) > FAULTS_SHOWN:
            lines.append(f"  and {len(faults) - FAULTS_SHOWN} other kinds of faults")
        if tally.rejected and outcome.rejects is not None:
            lines.append(f"  correct {outcome.rejects.name} and import it with the same mapping")
    return "\n".join(lines)


def _fail(told: dict[str, object]) -> NoReturn:
    click.echo(json.dumps({name: value for name, value in told.items() if value}, indent=2), err=True)
    sys.exit(1)
