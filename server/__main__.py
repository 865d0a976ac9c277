"""The command line: ``tsugi serve``, the roles it starts, and a small caller's command over tsugi.client.

Heavy modules are imported inside the commands that need them: a caller's command starts fast, and a role sets its
scheduling before gRPC is there to start threads.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from server import commands, config, learner_commands
from server.attributing.command import attribution
from server.files import Files, OwnedError
from server.importing.command import import_command
from server.outbound.command import outbound

EXIT_OWNED = 75

_CONFIG = click.option(
    "--config", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), envvar="TSUGI_CONFIG",
    help="TOML file of settings; TSUGI_SECTION_KEY overrides each.",
)  # fmt: skip


@click.group()
@click.version_option(package_name="tsugi")
def main() -> None:
    """Tsugi: what is the best next action for this person, here, now?"""


@main.command()
@_CONFIG
def serve(path: Path | None) -> None:
    """Start the server and keep it up until SIGTERM."""
    settings = _settings(path)
    files = Files.below(settings.data.dir)
    try:
        files.create()
        lock = files.own()
        files.create_volatile()
    except OwnedError as error:
        click.echo(f"tsugi cannot start: data.dir: {files.root} is served by process {error.owner} already", err=True)
        sys.exit(EXIT_OWNED)
    except OSError as error:
        _refuse(config.ConfigError([f"data.dir: {error}"]))
    from server import app, telemetry

    telemetry.configure_logs("supervisor")
    try:
        asyncio.run(app.Supervisor(settings).run())
    except app.RefusedStartError as error:
        click.echo(f"tsugi cannot start: {error}", err=True)
        sys.exit(error.exit_code)
    finally:
        files.remove_volatile()
        lock.close()


@main.command(hidden=True)
@click.option("--slot", type=int, required=True)
@click.option("--port", type=int, required=True)
def worker(slot: int, port: int) -> None:
    """Run one worker; started by serve."""
    # Under SCHED_BATCH a wake-up does not interrupt the loop, so that events pile up while it works and are then
    # handled together; a lone request is still handled at once.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # gRPC writes a line for each socket we shut while draining; what matters we log ourselves.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    settings = _settings(None)
    from server import app, control, roles, telemetry

    roles.die_with_parent()
    telemetry.configure_logs(f"worker-{slot}")
    control.leave(roles.run_worker(settings, roles.Place(slot, port, app.build_name())))


@main.command(hidden=True)
@click.option("--slot", type=int, required=True)
def projector(slot: int) -> None:
    """Run the projector; started by serve."""
    settings = _settings(None)
    from server import app, control, roles, telemetry

    roles.die_with_parent()
    telemetry.configure_logs("projector")
    control.leave(roles.run_projector(settings, roles.Place(slot, 0, app.build_name())))


@main.command("check-config")
@_CONFIG
def check_config(path: Path | None) -> None:
    """Print every setting and where it comes from."""
    try:
        settings, origins = config.load(path)
    except config.ConfigError as error:
        _refuse(error)
    for name, origin in origins.items():
        section, key = name.split(".")
        click.echo(f"{name} = {getattr(getattr(settings, section), key)!r}  ({origin})")


def _settings(path: Path | None) -> config.Settings:
    try:
        return config.load(path)[0]
    except config.ConfigError as error:
        _refuse(error)


def _refuse(error: config.ConfigError) -> NoReturn:
    for fault in error.faults:
        click.echo(f"tsugi cannot start: {fault}", err=True)
    sys.exit(78)


for command in (*commands.ALL, *learner_commands.ALL, import_command, outbound, attribution):
    main.add_command(command)

if __name__ == "__main__":
    main()
