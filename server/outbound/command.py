"""``tsugi outbound``: what to say next to everybody in a segment on one channel, as a Parquet file.

It exits 0 when everybody was decided, 3 when some decisions were refused, 1 when the run could not begin or not go on,
2 when it was called wrongly. After an exit with 1 the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from server.progress import Progress

if TYPE_CHECKING:
    from server.outbound.journal import Tally
    from server.outbound.run import Pace, Run
    from tsugi.client import Client

EXIT_REFUSED: Final = 3


@click.command()
@click.option(
    "--address", envvar="TSUGI_ADDRESS", default="127.0.0.1:7410", show_default=True, help="Where the server is."
)
@click.option("--segment", required=True, help="Whom it is for; a segment the catalog declares.")
@click.option("--channel", required=True, help="By which way; a channel the catalog declares.")
@click.option(
    "--placement", "placements", multiple=True, metavar="NAME[:COUNT]",
    help="What to fill; may be given several times. By default one slot of each placement of the channel.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The Parquet file to make.")
@click.option(
    "--batch", type=click.IntRange(1, 500), default=100, show_default=True, help="How many people to decide in a call."
)
@click.option("--max-people", type=click.IntRange(1), help="Stop after so many people.")
@click.option("--overwrite", is_flag=True, help="Replace the file, where it is there already.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as JSON.")
def outbound(address: str, is_json: bool, **options: Any) -> None:
    """Decide once for everybody in a segment, and go on where a killed run stopped.

    Exits 0 when everybody was decided, 3 when some decisions were refused, 1 when it could not begin or not go on.
    """
    # Heavy, and every other command would pay for it.
    from server.outbound.plan import OutboundRefused  # noqa: PLC0415
    from server.outbound.run import OutboundStopped  # noqa: PLC0415
    from tsugi.client import CallError, Client  # noqa: PLC0415

    try:
        with Client(address) as client:
            tally = _outbound(client, is_json=is_json, **options)
    except OutboundRefused as error:
        raise click.UsageError(str(error)) from None
    except UnicodeEncodeError:  # the shell gave bytes that are no text
        raise click.UsageError("arguments must be text in UTF-8") from None
    except CallError as error:
        _fail(_unanswered(address) if error.is_unanswered else error.message, error.reason)
    except OutboundStopped as error:
        _fail(_unanswered(address) if error.is_unanswered else f"{error}; the same command goes on where it stopped")
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped")
    except OSError as error:
        _fail(f"a file cannot be read or written: {error}")
    click.echo(json.dumps(_summary(tally), indent=2) if is_json else _told(tally, options["out"]))
    if tally.errors:
        sys.exit(EXIT_REFUSED)


def _outbound(
    client: Client, segment: str, channel: str, placements: tuple[str, ...], out: Path, batch: int,
    max_people: int | None, overwrite: bool, is_json: bool,
) -> Tally:  # fmt: skip
    from server.outbound import run  # noqa: PLC0415  # as above
    from server.outbound.plan import plan_of  # noqa: PLC0415

    plan = plan_of(client.get_catalog().catalog, segment, channel, placements)
    with run.opened(out, plan, is_overwrite=overwrite) as opened:
        if opened.tally.people and not is_json:
            click.echo(f"a run goes on: {opened.tally.people:,} people are done", err=True)
        return _watched(opened, client, segment, run.Pace(batch, max_people or 0))


def _watched(opened: Run, client: Client, segment: str, pace: Pace) -> Tally:
    bars: list[Any] = []
    with Progress() as progress:

        def told(total: int, done: int) -> None:
            if not bars:
                size = max(total, done)
                bars.append(progress.begin(segment, min(size, pace.people_max or size), "people"))
            bars[0](done, done)

        return opened.go_on(client, told, pace)


def _summary(tally: Tally) -> dict[str, Any]:
    return {
        "people": tally.people,
        "contacts": dict(sorted(tally.contacts.items())),
        "nothing_to_say": tally.nothing,
        "gone": tally.gone,
        "errors": dict(sorted(tally.errors.items())),
        "lsn": tally.lsn,
        "seconds": round(tally.seconds, 3),
        "people_per_s": round(tally.people / max(tally.seconds, 0.001), 1),
    }


def _told(tally: Tally, out: Path) -> str:
    """Return the summary for people."""
    lines = [
        f"{out.name}: {tally.people:,} people, {sum(tally.contacts.values()):,} contacts, nothing to say to "
        f"{tally.nothing:,}, {sum(tally.errors.values()):,} refused; {tally.seconds:,.1f} s, "
        f"{tally.people / max(tally.seconds, 0.001):,.0f} people a second"
    ]
    lines += [f"  {count:,} × {action}" for action, count in _most_first(tally.contacts)]
    lines += [f"  {count:,} × refused: {reason}" for reason, count in _most_first(tally.errors)]
    if tally.gone:
        lines.append(f"  {tally.gone:,} were forgotten meanwhile")
    return "\n".join(lines)


def _most_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))


def _unanswered(address: str) -> str:
    return f"no server answers at {address}; start it, and the same command goes on where it stopped"


def _fail(message: str, reason: str = "") -> NoReturn:
    told = {"reason": reason, "message": message}
    click.echo(json.dumps({name: value for name, value in told.items() if value}, indent=2), err=True)
    sys.exit(1)
