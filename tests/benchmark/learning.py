"""How good is what we learn, beside the strongest peer? ``python -m tests.benchmark.learning --data FOLDER``.

Handed a folder of public classification sets, it plays each as a bandit (``learning_sets.py``), once a seed: the first
10,000 rows of a shuffle, one decision a row. The way is that of production, in one process: the core decides under a
compiled catalog, lessons teach the fleet, its arrays are exported, checked, serialised, and aligned with the catalog
again. Arrays are renewed every 10 rows; the peer, Vowpal Wabbit, learns after every row. Loss is progressive: 1 less
the reward, of what was decided before anything was learned from it. Prints a table, writes build/learning.json and,
when all sets were played whole, the table in the README.

One configuration serves all sets, ours and the peer's, and numbers come as they are: no center, no spread, nothing
computed from a set in advance. The base rate is a uniform policy's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from server.catalog.catalog import Catalog
from server.decisioning.decide import EXPLORE, Questions, Scratch, decide
from server.decisioning.models import align, no_champion
from tests.benchmark import vowpal
from tests.benchmark.learning_sets import BanditSet, SetError, fact_rows, known_sets, make_catalog, order
from tests.benchmark.learning_speed import N_ACTIONS, N_FEATURES, outcomes_per_s
from tests.benchmark.report import merge_json, write_between
from training.export import Exporter
from training.fleet import Fleet
from training.rewards import Lesson
from tsugi.log.v1.learner_pb2 import LearnerArrays

ROOT: Final = Path(__file__).parents[2]
RESULT: Final = ROOT / "build" / "learning.json"
EXPLORATION: Final[dict[str, Any]] = {"squareCb": {"gamma": 1000}}
ROWS_MAX: Final = 10_000
RENEWAL_ROWS: Final = 10  # between two renewals of the arrays; 100 ms of 100 decisions a second
WORSE_THAN_EPSILON_MAX: Final = 0.05  # on any one set
BEGIN, END = "<!-- learning:begin -->", "<!-- learning:end -->"  # of the table in the README
NAMES: Final = ("tsugi", *vowpal.VARIANTS)


class Played(NamedTuple):
    """One run over one set."""

    loss: float  # mean of 1 - reward
    losses: list[float]  # of each row, in order
    lessons: list[Lesson]


def play(data: BanditSet, rows: Sequence[int], seed: int, exploration: Mapping[str, Any] = EXPLORATION) -> Played:
    """Decide these rows in this order, learning from each.

    Args:
        data: the set.
        rows: of it.
        seed: of the draws.
        exploration: of the placement, as in a catalog's JSON.
    """
    catalog = make_catalog(data, dict(exploration))
    facts, fleet = fact_rows(data, catalog)[list(rows)], Fleet()
    exporter, scratch, champion = Exporter(fleet), Scratch(), no_champion(catalog)
    seeds = np.random.default_rng([seed, 0]).integers(0, 1 << 64, len(rows), np.uint64)
    goal, names = catalog.goals[0], catalog.actions.names
    fleet.meet([goal])
    losses: list[float] = []
    lessons: list[Lesson] = []
    for first in range(0, len(rows), RENEWAL_ROWS):
        exporter.renew()
        published = exporter.message(1, first, first).SerializeToString()
        models = align(catalog, champion, LearnerArrays.FromString(published))
        some = slice(first, first + RENEWAL_ROWS)
        decisions = decide(_questions(facts[some], seeds[some], catalog), catalog, models, scratch)
        chosen = decisions.slot_codes[:, 2].tolist()
        chances, priors = decisions.slot_numbers[:, 0].tolist(), decisions.slot_numbers[:, 3].tolist()
        for i, row in enumerate(rows[some]):
            reward = float(chosen[i] == data.classes[row])
            learned = decisions.learned[i].tobytes()
            lesson = Lesson(goal, names[chosen[i]], catalog.learned.names, learned, priors[i], reward, chances[i])
            fleet.learn(lesson)
            lessons.append(lesson)
            losses.append(1.0 - reward)
    return Played(float(np.mean(losses)), losses, lessons)


def _questions(facts: np.ndarray[Any, np.dtype[np.float64]], seeds: Any, catalog: Catalog) -> Questions:
    """Ask for one slot for each of some rows, as callers who say nothing else would."""
    b = facts.shape[0]
    return Questions(
        facts=facts,
        now_us=0,
        heads=np.tile(np.array([1, EXPLORE, -1, 0], np.int32), (b, 1)),
        asks=np.tile(np.array([0, 1, 0], np.int32), (b, 1)),
        seeds=seeds,
        listings=np.empty((0, len(catalog.actions.names)), np.uint8),
        holds=np.empty((0, 3), np.int64),
    )


def measure(
    sets: Sequence[BanditSet], n_seeds: int, n_rows_max: int, told: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """Return all figures, as build/learning.json has them."""
    by_set: dict[str, dict[str, float]] = {}
    for data in sets:
        losses: dict[str, list[float]] = {name: [] for name in NAMES}
        for seed in range(n_seeds):
            rows = order(data, seed, n_rows_max)
            losses["tsugi"].append(play(data, rows, seed).loss)
            for name, settings in vowpal.VARIANTS.items():
                losses[name].append(vowpal.play(data, rows, seed, settings))
        by_set[data.name] = {name: float(np.mean(each)) for name, each in losses.items()}
        told(f"{data.name}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in by_set[data.name].items()))
    means = {name: float(np.mean([one[name] for one in by_set.values()])) for name in NAMES}
    return {
        "seeds": n_seeds,
        "rows_max": n_rows_max,
        "renewal_rows": RENEWAL_ROWS,
        "exploration": EXPLORATION,
        "sets": by_set,
        "mean": means,
        "goals": verdicts(by_set, means),
    }


def verdicts(by_set: Mapping[str, Mapping[str, float]], means: Mapping[str, float]) -> dict[str, bool]:
    """Say of each goal whether it is met."""
    return {
        "mean_at_most_vw_squarecb": means["tsugi"] <= means["vw_squarecb"],
        "no_set_far_above_vw_epsilon": all(
            one["tsugi"] <= one["vw_epsilon"] + WORSE_THAN_EPSILON_MAX for one in by_set.values()
        ),
    }


def table(figures: Mapping[str, Any]) -> Table:
    """Return the losses for people to read."""
    shown = Table("progressive loss", "tsugi", "VW epsilon 0.05", "VW squarecb")
    for name, one in (*figures["sets"].items(), ("mean", figures["mean"])):
        shown.add_row(name, *(f"{one[each]:.3f}" for each in NAMES))
    return shown


def markdown(figures: Mapping[str, Any]) -> str:
    """Return the losses, the pace and the lag as the README has them."""
    rows = [*figures["sets"].items(), ("mean", figures["mean"])]
    lines = ["| progressive loss | Tsugi | VW epsilon 0.05 | VW squarecb |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{one[each]:.3f}' for each in NAMES)} |" for name, one in rows]
    told = f"Mean of {figures['seeds']} seeds, at most {figures['rows_max']:,} rows each. "
    told += f"Learned from: {figures['outcomes_per_s']:,.0f} outcomes/s ({N_FEATURES} features, {N_ACTIONS} actions)."
    if "learning_lag_p99_ms" in figures:
        told += f" Learning lag p99 under load: {figures['learning_lag_p99_ms']:,.0f} ms"
        void = figures.get("learning_lag_void")
        told += f" (void: {'; '.join(void)})." if void else "."
    return "\n".join([*lines, "", told])


@click.command()
@click.option("--data", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False),
              envvar="TSUGI_DATASETS_DIR", help="Folder of the public sets; else TSUGI_DATASETS_DIR.")  # fmt: skip
@click.option("--set", "names", multiple=True, help="Only this one; may be said several times.")
@click.option("--seeds", "n_seeds", type=click.IntRange(1, 100), default=5, show_default=True, help="Runs a set.")
@click.option("--rows", "n_rows_max", type=click.IntRange(1), default=ROWS_MAX, show_default=True,
              help="Of each shuffle, the first.")  # fmt: skip
def main(folder: Path | None, names: Sequence[str], n_seeds: int, n_rows_max: int) -> None:
    """Measure how well we learn, beside Vowpal Wabbit."""
    if folder is None:
        raise click.UsageError(
            "nothing to measure: name the folder of the public sets with --data FOLDER or TSUGI_DATASETS_DIR"
        )
    try:
        sets = known_sets(folder, names)
    except SetError as error:
        raise click.UsageError(str(error)) from error
    figures = measure(sets, n_seeds, n_rows_max, lambda text: click.echo(text, err=True))
    merge_json(RESULT, figures | {"outcomes_per_s": outcomes_per_s()})
    figures = json.loads(RESULT.read_text(encoding="utf-8"))
    if not names and n_rows_max == ROWS_MAX:
        write_between(ROOT / "README.md", BEGIN, END, lambda: markdown(figures))
    console = Console(width=100)  # files and pipes have no width of their own
    console.print(table(figures))
    for goal, is_met in figures["goals"].items():
        console.print(f"{goal}: {'met' if is_met else 'missed'}")
    console.print(f"{figures['outcomes_per_s']:,.0f} outcomes/s learned from")


if __name__ == "__main__":
    main()
