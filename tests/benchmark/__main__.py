"""The benchmark: ``python -m tests.benchmark``, or ``make bench``; see closed_loop.py and measure.py for what it does.

Writes build/bench.json and the table between the markers of README.md. With ``--quick`` everything is played for a
moment, on fewer people, judged by nobody and written to build/bench-quick.json alone. Loopback only; every process it
starts and every file it makes outside build/ is gone when it ends.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import click

from tests.benchmark import (
    closed_loop,
    crowd,
    feeding,
    h2load,
    learning_lag,
    machine,
    measure,
    policies,
    servers,
    world,
)
from tests.benchmark.report import NOT_ON_THE_PATH, Report, merge_json, table, write_readme
from tests.benchmark.stage import Plan, Stage, stage

ROOT: Final = Path(__file__).parents[2]
BUILD: Final = ROOT / "build"
RESULT: Final = BUILD / "bench.json"
LEARNING: Final = BUILD / "learning.json"  # where all that is said of learning comes together; see learning.py
README: Final = ROOT / "README.md"

NAMES: Final = (
    "decide",
    "policies",
    "learning_lag",
    "feeding",
    "crowd",
)  # of the parts, in the order in which they are played
SERVER_LOG: Final = "bench-server.log"
FULL: Final = Plan(n_profiles=world.N_PROFILES, n_rounds=5, n_turns_max=9, round_s=2.0, open_loop_s=6.0, n_lags=100)
QUICK: Final = Plan(
    n_profiles=1_000, n_rounds=1, n_turns_max=1, round_s=0.5, open_loop_s=1.0, n_lags=5,
    n_ingested=2_000, n_projected=1_000, n_probes=5, n_imported=1_000, n_crowd=20_000,
)  # fmt: skip


@click.command()
@click.option("--quick", is_flag=True, help="Play everything for a moment and judge nothing.")
@click.option("--table", "is_table", is_flag=True, help="Only write the table of the last full run into README.md.")
@click.option("--no-learner", is_flag=True, help="Leave the learner process out; the report says so.")
@click.option("--part", "parts", multiple=True, type=click.Choice(NAMES), help="Only this; writes a JSON of its own.")
@click.option("--crowd", "n_crowd", type=int, help="Profiles of the crowd; 10,000,000, or 20,000 with --quick.")
def main(quick: bool, is_table: bool, no_learner: bool, parts: tuple[str, ...], n_crowd: int | None) -> None:
    """Measure Decide against a bare echo, with every policy, and over very many people; and how records come in."""
    if is_table:
        write_readme(README, json.loads(RESULT.read_text(encoding="utf-8")))
        return
    if "decide" in (parts or NAMES) and not h2load.is_there():
        click.echo("h2load is missing; it comes with Debian's package nghttp2-client.", err=True)
        sys.exit(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every block ends what it began
    plan = (QUICK if quick else FULL)._replace(with_learner=not no_learner)
    plan = plan._replace(n_crowd=n_crowd or plan.n_crowd)
    report = Report(env=machine.describe(), is_judged=not quick)
    _describe(plan, report)
    BUILD.mkdir(exist_ok=True)
    for part in parts or NAMES:
        with tempfile.TemporaryDirectory(prefix="tsugi-bench-") as folder, machine.everywhere(machine.Cores.choose()):
            _PLAYS[part](plan, Path(folder), report)
    is_whole = not parts and not quick
    name = "-".join(("bench", *parts, *(["quick"] if quick else [])))
    document = report.write(RESULT if is_whole else BUILD / f"{name}.json")
    click.echo(table(document))
    if is_whole:
        write_readme(README, document)


def _play_decide(plan: Plan, folder: Path, report: Report) -> None:
    click.echo(f"teaching a server about {plan.n_profiles:,} people …", err=True)
    with stage(plan, folder, BUILD / SERVER_LOG) as on_stage:
        _describe_world(on_stage, report)
        click.echo("closed loops, echo and Decide in turns …", err=True)
        closed_loop.measure_saturated(on_stage, report)
        closed_loop.measure_lone(on_stage, report)
        saturation = measure.measure_varied(on_stage, report)
        click.echo(f"open loops, below {saturation:,.0f} calls/s …", err=True)
        measure.measure_open_loop(on_stage, report, 0.5 * saturation, "half")
        measure.measure_open_loop(on_stage, report, 0.9 * saturation, "ninety")
        if plan.with_learner:
            click.echo("outcomes and learning …", err=True)
            measure.measure_learning_lag(on_stage, report, 0.5 * saturation)
        measure.measure_outcomes(on_stage, report)
        measure.measure_memory(on_stage, report)
    click.echo("the decision without its transport …", err=True)
    measure.measure_hot(on_stage, report)


def _play_policies(plan: Plan, folder: Path, report: Report) -> None:
    click.echo("the plain Decide and one with every policy capability, in turns …", err=True)
    policies.measure_policies(plan, folder, BUILD / SERVER_LOG, report)


def _play_learning_lag(plan: Plan, folder: Path, report: Report) -> None:
    click.echo("outcomes reported, and learned from …", err=True)
    lag_p99_ms = learning_lag.measure_learning_lag(plan, folder, BUILD / SERVER_LOG, report)
    if report.is_judged:
        void = report.voids.get("learning_lag.p99_ms", [])
        merge_json(LEARNING, {"learning_lag_p99_ms": round(lag_p99_ms, 1), "learning_lag_void": void})


def _play_feeding(plan: Plan, folder: Path, report: Report) -> None:
    click.echo("records taken in, projected, seen by decisions and imported …", err=True)
    feeding.measure_feeding(plan, folder, BUILD / SERVER_LOG, report)


def _play_crowd(plan: Plan, folder: Path, report: Report) -> None:
    click.echo(f"putting {plan.n_crowd:,} people into a state, and asking about them …", err=True)
    crowd.measure_crowd(plan, folder, BUILD / SERVER_LOG, report)


_PLAYS: Final[Mapping[str, Callable[[Plan, Path, Report], None]]] = {
    "decide": _play_decide,
    "policies": _play_policies,
    "learning_lag": _play_learning_lag,
    "feeding": _play_feeding,
    "crowd": _play_crowd,
}


def _describe(plan: Plan, report: Report) -> None:
    cores = machine.Cores.choose()
    scorers = ["ONNX champion (MLP 64-64-64-1, 40 columns) by onnxruntime"]
    if plan.with_learner:
        scorers.append("learner's correction")
    if cores.are_shared:
        report.general_faults.append("server and load generator share one core")
    report.env |= {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": cores._asdict(),
        "plan": plan._asdict(),
        "settings": servers.SETTINGS,
        "projector_and_learner": "off the server's core, SCHED_IDLE; as shipped in ingest, import, freshness and lag",
        "decision_ack": "accepted",
        "on_the_path": [
            "validation", "profile from LMDB by identity", "eligibility rules", *scorers, "SquareCB over three slots",
            "signed decision id", "record queued for the group commit (accepted)",
        ],
        "not_on_the_path": NOT_ON_THE_PATH if plan.with_learner else f"learner, {NOT_ON_THE_PATH}",
    }  # fmt: skip


def _describe_world(on_stage: Stage, report: Report) -> None:
    least, usual, most = on_stage.eligible
    report.env |= {
        "world": {
            "actions": world.N_ACTIONS,
            "profiles": on_stage.plan.n_profiles,
            "slots": world.N_SLOTS,
            "eligible_min": least,
            "eligible_median": usual,
            "eligible_max": most,
        },
        "request_bytes": len(on_stage.messages[0]),
        "reply_bytes": round(on_stage.reply_bytes),
    }


if __name__ == "__main__":
    main()
