"""The demonstration: a whole server, a simulated retailer's traffic against it, and a screen that shows it learn.

The world is simulated and says so everywhere. It knows the best policy and never tells the server; what the server
earns is measured between a random choice and that best one. Ends by itself, with a summary, a picture and a JSON file.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from training.fit import MODELS_FOLDER
from training.running import running_server
from training.simulate import World
from training.traffic import Observed, Traffic
from tsugi.client import Client

DURATION_S: Final = 120.0
RATE: Final = 250.0  # decisions a second: well below what two busy cores sustain
CALL_SHARE: Final = 0.12
N_PEOPLE: Final = 3_000
RECENT_S: Final = 5.0
SEED: Final = 1  # of the world the seed bundle was fitted on
Z_95: Final = 1.96


class Estimate(NamedTuple):
    """A mean and half the width of its 95% interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


class Tally:
    """Everything observed so far; fed from many threads, read by the screen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._observed: list[Observed] = []

    def add(self, observed: Observed) -> None:
        """Take in one decision."""
        with self._lock:
            self._observed.append(observed)

    def since(self, elapsed_s: float) -> list[Observed]:
        """Return the decisions scheduled from then on."""
        with self._lock:
            return [observed for observed in self._observed if observed.elapsed_s >= elapsed_s]


def reward(observed: Sequence[Observed]) -> Estimate:
    """Estimate the reward a slot; decisions are independent, the slots of one are not, so decisions are the unit."""
    means = [sum(each.rewards) / len(each.rewards) for each in observed]
    if len(means) < 2:
        return Estimate(math.nan, math.nan)
    return Estimate(float(np.mean(means)), Z_95 * float(np.std(means, ddof=1)) / math.sqrt(len(means)))


def gap_closed_share(observed: Sequence[Observed]) -> float:
    """Return where the policy stands between a random choice (0) and the best policy (1), in true expected reward."""
    policy = [each for each in observed if not each.is_control]
    expected, uniform, best = (
        float(np.mean([getattr(each, name) for each in policy])) if policy else math.nan
        for name in ("expected", "uniform", "best")
    )
    return (expected - uniform) / (best - uniform)


def milliseconds(seconds: Sequence[float], percent: float) -> float:
    """Return a percentile in milliseconds."""
    return float(np.percentile(seconds, percent) * 1_000) if seconds else math.nan


def screen(tally: Tally, traffic: Traffic, elapsed_s: float, duration_s: float) -> Group:
    """Draw what is going on right now."""
    recent = tally.since(elapsed_s - RECENT_S)
    everything = tally.since(0.0)
    numbers = Table.grid(padding=(0, 3))
    latencies = [each.latency_s for each in recent]
    lags = traffic.learning_lags_s[-50:]
    numbers.add_row(
        "decisions", f"{len(recent) / min(RECENT_S, max(elapsed_s, 0.1)):,.0f} /s", f"{len(everything):,} so far"
    )
    numbers.add_row("latency", f"p50 {milliseconds(latencies, 50):.1f} ms", f"p99 {milliseconds(latencies, 99):.1f} ms")
    numbers.add_row("outcomes", f"{traffic.n_outcomes:,}", "late, out of order, some twice, some never")
    numbers.add_row(
        "learning lag", f"p99 {milliseconds(lags, 99):.0f} ms", "from acknowledged outcome to the reply that uses it"
    )
    last = tally.since(elapsed_s - max(15.0, RECENT_S))
    rewards = Table(title="reward a slot, last 15 s (95% interval)", title_justify="left", expand=False)
    for column in ("", "reward", "expected"):
        rewards.add_column(column)
    policy, control = [o for o in last if not o.is_control], [o for o in last if o.is_control]
    rewards.add_row("random control", str(reward(control)), f"{_mean(control, 'expected'):.3f}")
    rewards.add_row(
        "[bold]learning policy[/bold]", f"[bold]{reward(policy)}[/bold]", f"{_mean(policy, 'expected'):.3f}"
    )
    rewards.add_row("best, known to the simulator only", "", f"{_mean(last, 'best'):.3f}")
    share = gap_closed_share(last) if last else math.nan
    known = 0.0 if math.isnan(share) else max(0.0, min(1.0, share))
    gap = Text(f"gap closed between random and best  {'█' * int(40 * known):<40} {known:.0%}")
    title = f"Tsugi learns · simulated sports retailer · {elapsed_s:3.0f} of {duration_s:.0f} s"
    return Group(Panel(Group(numbers, "", rewards, "", gap), title=title, width=100))


def curve(observed: Sequence[Observed], duration_s: float, path: Path) -> None:
    """Draw reward against time: learning policy, random control, and the two bounds only the simulator knows."""
    edges = np.linspace(0.0, duration_s, 25)
    middles = (edges[1:] + edges[:-1]) / 2
    figure = Figure(figsize=(9.6, 5.4), dpi=120)
    axes = figure.subplots()
    for label, color, of_control in (("learning policy", "#0b6e4f", False), ("random control", "#b0413e", True)):
        group = [each for each in observed if each.is_control == of_control]
        estimates = [reward([o for o in group if low <= o.elapsed_s < high]) for low, high in pairwise(edges)]
        means = np.array([estimate.mean for estimate in estimates])
        widths = np.array([estimate.half_width for estimate in estimates])
        axes.plot(middles, means, color=color, label=f"{label} (reward drawn)", linewidth=2)
        axes.fill_between(middles, means - widths, means + widths, color=color, alpha=0.18, linewidth=0)
    for name, label, style in (("best", "best policy", "--"), ("uniform", "random eligible action", ":")):
        level = float(np.mean([getattr(each, name) for each in observed]))
        axes.axhline(level, color="#444444", linestyle=style, linewidth=1.2, label=f"{label} (true expectation)")
    axes.set_title("Tsugi learns a simulated sports retailer's best next action", loc="left")
    axes.set_xlabel("seconds since an empty log")
    axes.set_ylabel("reward a slot (share with a positive outcome)")
    axes.set_xlim(0.0, duration_s)
    axes.set_ylim(bottom=0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False, fontsize=8)
    figure.text(0.995, 0.01, "simulated world; bands are 95% intervals", ha="right", fontsize=8, color="#666666")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def figures(tally: Tally, traffic: Traffic, duration_s: float) -> dict[str, float]:
    """Return what build/demo.json holds; rewards and the gap are of the last third."""
    everything, last = tally.since(0.0), tally.since(duration_s * 2 / 3)
    latencies = [each.latency_s for each in everything]
    policy, control = reward([o for o in last if not o.is_control]), reward([o for o in last if o.is_control])
    difference = policy.mean - control.mean
    half_width = math.hypot(policy.half_width, control.half_width)
    return {
        "decisions_per_s": len(everything) / duration_s,
        "decide_p50_ms": milliseconds(latencies, 50),
        "decide_p99_ms": milliseconds(latencies, 99),
        "reward_policy": policy.mean,
        "reward_random_control": control.mean,
        "reward_difference": difference,
        "reward_difference_low": difference - half_width,
        "reward_difference_high": difference + half_width,
        "gap_closed_share": gap_closed_share(last),
        "learning_lag_p50_ms": milliseconds(traffic.learning_lags_s, 50),
        "learning_lag_p99_ms": milliseconds(traffic.learning_lags_s, 99),
        "n_decisions": len(everything),
        "n_outcomes": traffic.n_outcomes,
        "n_errors": len(traffic.errors),
    }


@click.command("demo")
@click.option("--duration-s", default=DURATION_S, show_default=True, help="How long the traffic lasts.")
@click.option("--rate", default=RATE, show_default=True, help="Decisions a second.")
@click.option(
    "--out",
    default=Path("build"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the picture and the figures go.",
)
def demo_command(duration_s: float, rate: float, out: Path) -> None:
    """Watch a server learn a simulated sports retailer; ends by itself."""
    console = Console()
    message = load_catalog((MODELS_FOLDER / "catalog.yaml").read_text())
    world = World(compile_catalog(message), SEED)
    tally = Tally()
    console.print("A [bold]simulated[/bold] sports retailer; the server starts on an empty log …")
    with tempfile.TemporaryDirectory(prefix="tsugi-demo-") as folder:
        settings = {
            "SERVE_WORKERS": 1,
            "SERVE_CONNECTION_AGE_MS_MAX": 3_600_000,
            "SERVE_CONNECTION_AGE_GRACE_MS": 1_000,
        }
        with (
            running_server(Path(folder) / "data", settings) as server,
            Client(server.address, channels=8, timeout_s=10.0) as client,
        ):
            prepare(client, console)
            traffic = Traffic(world, client, rate=rate, call_share=CALL_SHARE, seed=SEED, on_decision=tally.add)
            people = world.people(N_PEOPLE)
            traffic.introduce(people)
            with Live(console=console, refresh_per_second=4, auto_refresh=False) as live:

                def show(elapsed_s: float) -> None:
                    live.update(screen(tally, traffic, elapsed_s, duration_s), refresh=console.is_terminal)

                traffic.play(people, duration_s, show)
                live.update(screen(tally, traffic, duration_s, duration_s), refresh=True)
    out.mkdir(parents=True, exist_ok=True)
    told = figures(tally, traffic, duration_s)
    (out / "demo.json").write_text(json.dumps(told, indent=2) + "\n")
    curve(tally.since(0.0), duration_s, out / "demo.png")
    summarise(console, told, traffic, out)


def prepare(client: Client, console: Console) -> None:
    """Push the example catalog and the seed bundle, and make the bundle champion."""
    started = time.monotonic()
    client.push_catalog(load_catalog((MODELS_FOLDER / "catalog.yaml").read_text()))
    pushed = client.push_model((MODELS_FOLDER / "bundle.binpb").read_bytes(), "seed")
    client.assign_model_role(pushed.model_revision.revision)
    console.print(f"catalog in force, seed bundle checked and champion ({time.monotonic() - started:.1f} s)")


def summarise(console: Console, told: dict[str, float], traffic: Traffic, out: Path) -> None:
    """Say how it went."""
    console.print(
        f"\n[bold]{told['n_decisions']:,} decisions[/bold] at {told['decisions_per_s']:.0f}/s, "
        f"p50 {told['decide_p50_ms']:.1f} ms, p99 {told['decide_p99_ms']:.1f} ms; "
        f"{told['n_outcomes']:,} outcomes, learned from within {told['learning_lag_p99_ms']:.0f} ms (p99)"
    )
    console.print(
        f"last third: reward {told['reward_policy']:.3f} against {told['reward_random_control']:.3f} of the random "
        f"control, difference {told['reward_difference']:.3f} "
        f"(95%: {told['reward_difference_low']:.3f} to {told['reward_difference_high']:.3f})"
    )
    console.print(f"gap closed between random and the best policy: [bold]{told['gap_closed_share']:.0%}[/bold]")
    for error in traffic.errors[:5]:
        console.print(f"[red]refused: {error}[/red]")
    console.print(f"picture: {out / 'demo.png'}   figures: {out / 'demo.json'}")


def _mean(observed: Sequence[Observed], name: str) -> float:
    return float(np.mean([getattr(each, name) for each in observed])) if observed else math.nan
