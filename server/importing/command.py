"""``tsugi import``: files of people's records into a running server, by a mapping.

It exits 0 when every row went in, 3 when some were rejected, 1 when the import could not run or not go on. A refusal
goes to standard error as JSON, with every fault.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    from server.importing.run import Outcome

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
@click.option("--dry-run", is_flag=True, help="Read and convert every row, send nothing, write nothing.")
@click.option("--restart", is_flag=True, help="Begin with the first row, also of a file that was imported before.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as JSON.")
@click.argument("files", nargs=-1, required=True, type=_FILE, metavar="FILE...")
def import_command(files: tuple[Path, ...], **options: Any) -> None:
    """Import CSV, JSON lines or Parquet files, and go on where a killed import stopped."""
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
        _fail({"code": error.code.name, "reason": error.reason, "message": error.message})
    except OSError as error:
        _fail({"message": f"a file cannot be read or written: {error}"})


def _import(
    files: tuple[Path, ...], address: str, source: str, mapping_file: Path, journal: Path | None, dry_run: bool,
    restart: bool, is_json: bool,
) -> None:  # fmt: skip
    import time  # noqa: PLC0415

    from server.importing import checking, mapping, run  # noqa: PLC0415  # as above
    from server.importing import journal as journals  # noqa: PLC0415
    from server.importing.faults import ImportStopped  # noqa: PLC0415
    from tsugi.client import Client  # noqa: PLC0415

    try:
        plan_mapping = mapping.load_mapping(mapping_file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        _fail({"message": f"{mapping_file.name} is not text in UTF-8"})
    outcomes: dict[Path, Outcome] = {}
    stopped = ""
    with Client(address, channels=2) as client:
        catalog = client.get_catalog().catalog
        checking.check_mapping(plan_mapping, catalog, source)
        opened = run.open_all(list(files), plan_mapping, journal)
        plan = run.Plan(plan_mapping, catalog, source)
        try:
            with _Progress() as progress:
                for each in opened:
                    told = progress.begin(each.path.name, each.rows.size)
                    destination = None if dry_run else client
                    outcomes[each.path] = run.import_file(
                        each, plan, destination, told, time.monotonic, is_restart=restart
                    )
        except (ImportStopped, KeyboardInterrupt) as error:
            stopped = f"{str(error) or 'interrupted'}; the same command goes on where it stopped"
            left = opened[len(outcomes)]
            if (so_far := journals.load(left.journal_path)) is not None:
                outcomes[left.path] = run.Outcome(so_far.tally, None, False)
    click.echo(json.dumps(_summary(outcomes, dry_run), indent=2) if is_json else _told(outcomes, dry_run))
    if stopped:
        _fail({"message": stopped})
    if any(outcome.tally.rejected for outcome in outcomes.values()):
        sys.exit(EXIT_REJECTED)


class _Progress:
    """Bars on a terminal, one a file; nothing anywhere else."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415  # as above
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, name: str, size: int) -> Any:
        """Show another bar, and return what moves it."""
        task = self._bars.add_task(name, total=size or 1, told="")
        shown = self._bars.tasks[-1]
        rows_before: list[int] = []

        def told(done: int, rows: int) -> None:
            rows_before[:] = rows_before or [rows]
            rate = (rows - rows_before[0]) / max(shown.elapsed or 0.0, 0.001)
            self._bars.update(task, completed=done, told=f"{rows:,} rows, {rate:,.0f} a second")

        return told


def _summary(outcomes: dict[Path, Outcome], is_dry_run: bool) -> dict[str, Any]:
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
    return {"dry_run": is_dry_run, **totals, "files": files}


def _told(outcomes: dict[Path, Outcome], is_dry_run: bool) -> str:
    """Return the summary for people."""
    lines = []
    for path, outcome in outcomes.items():
        tally = outcome.tally
        before = "imported before, --restart sends it again: " if outcome.was_finished else ""
        lines.append(
            f"{path.name}: {before}{tally.rows:,} rows, {tally.accepted:,} {'fit' if is_dry_run else 'accepted'}, "
            f"{tally.duplicates:,} known before, {tally.rejected:,} rejected; "
            f"{tally.seconds:,.1f} s, {tally.rows / max(tally.seconds, 0.001):,.0f} rows a second; last LSN {tally.lsn}"
        )
        faults = sorted(tally.faults, key=lambda fault: -fault.count)
        lines += [
            f"  {fault.count:,} × {fault.reason}{', column ' + fault.column if fault.column else ''}: {fault.message} "
            f"(line {fault.example_line}{' and others' if fault.count > 1 else ''})"
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
