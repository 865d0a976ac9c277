"""Real people, not a simulation: a randomised experiment played through a running server as a caller would play it.

Rejection replay (Li, Chu, Langford and Wang, "Unbiased offline evaluation of contextual-bandit-based news article
recommendation algorithms", WSDM 2011): for each customer of the experiment the server is told the profile and asked for
a decision; where it chooses what the customer was really sent, an impression and what followed are reported, everywhere
else nothing is. The rows that are kept are then a fair sample of what the server's policy would have earned, because
what was sent was drawn at random. The server sees no row twice and never an outcome before its decision.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import click
import numpy as np
from google.protobuf import json_format
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.running import running_server
from tsugi.client import CallError, Client, outcome, source_record
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest

HILLSTROM: Final = "hillstrom.csv.gz"
UNIFORM_VISIT_RATE: Final = 0.14678  # of all 64,000 rows
ROWS_PER_S_MAX: Final = 500.0  # so that learning keeps up
CHUNK_ROWS: Final = 50
CALL_S_MAX: Final = 20.0  # a busy machine is no reason to lose a pass
PLACEMENT: Final = "inbox"
ARMS: Final = {"No E-Mail": "no_email", "Mens E-Mail": "mens_email", "Womens E-Mail": "womens_email"}

_CATEGORIES: Final = {
    "history_segment": [
        "1) $0 - $100", "2) $100 - $200", "3) $200 - $350", "4) $350 - $500", "5) $500 - $750", "6) $750 - $1,000",
        "7) $1,000 +",
    ],
    "zip_code": ["Urban", "Surburban", "Rural"],  # spelt so in the data
    "channel": ["Phone", "Web", "Multichannel"],
}  # fmt: skip
_NUMBERS: Final = {"recency": (6.0, 3.5), "history": (240.0, 250.0)}
_BOOLS: Final = ("mens", "womens", "newbie")


class Row(NamedTuple):
    """One customer of the experiment."""

    number: int
    attributes: dict[str, str | float | bool]
    action: str  # what was really sent
    visited: bool


class Result(NamedTuple):
    """What one pass came to."""

    accepted: int
    visits: int
    expected: float  # visits among accepted rows, as the replies' propensities foretold

    @property
    def expected_rate(self) -> float:
        """Mean propensity that was stated of accepted rows."""
        return self.expected / self.accepted

    @property
    def visit_rate(self) -> float:
        """Visits among accepted rows."""
        return self.visits / self.accepted

    @property
    def standard_error(self) -> float:
        """Of the visit rate."""
        return math.sqrt(self.visit_rate * (1.0 - self.visit_rate) / self.accepted)


def hillstrom_rows(folder: Path) -> list[Row]:
    """Read the experiment from its folder, or from the folder above it.

    Raises:
        FileNotFoundError: it lies in neither.
    """
    path = next((path for path in (folder / HILLSTROM, folder / "hillstrom" / HILLSTROM) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"no {HILLSTROM} in {folder} or its folder hillstrom")
    with gzip.open(path, "rt", newline="") as file:
        return [
            Row(
                number,
                {name: float(row[name]) for name in _NUMBERS}
                | {name: row[name] == "1" for name in _BOOLS}
                | {name: row[name] for name in _CATEGORIES},
                ARMS[row["segment"]],
                row["visit"] == "1",
            )
            for number, row in enumerate(csv.DictReader(file))
        ]


def hillstrom_catalog() -> Catalog:
    """State the experiment as a catalog: three actions, one placement that counts from the impression on.

    No random control, because the replay compares with the experiment's own uniform draw. The window is a second of log
    time: two weeks of silence pass in one.
    """
    attributes: list[dict[str, object]] = [
        {
            "name": name,
            "type": "ATTRIBUTE_TYPE_CATEGORY",
            "allowedValues": values,
            "excludedFromLearning": name == "history_segment",  # history once more, coarser
        }
        for name, values in _CATEGORIES.items()
    ]
    attributes += [
        {"name": name, "type": "ATTRIBUTE_TYPE_NUMBER", "center": center, "spread": spread}
        for name, (center, spread) in _NUMBERS.items()
    ]
    attributes += [{"name": name, "type": "ATTRIBUTE_TYPE_BOOL"} for name in _BOOLS]
    return json_format.ParseDict(
        {
            "name": "hillstrom",
            "currencyCode": "USD",
            "identityNamespaces": [{"name": "customer"}],
            "sources": [{"name": "experiment", "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH"}],
            "profileAttributes": attributes,
            "outcomeTypes": [{"name": "impression", "kind": "OUTCOME_KIND_IMPRESSION"}, {"name": "visit"}],
            "goals": [
                {
                    "name": "visit",
                    "outcomes": [{"type": "visit", "reward": 1}],
                    "attributionWindow": "1s",
                    "baseRate": 0.15,
                }
            ],
            "channels": [{"name": "email"}],
            "placements": [
                {
                    "name": PLACEMENT,
                    "channel": "email",
                    "goal": "visit",
                    "activation": "ACTIVATION_ON_IMPRESSION",
                    "exploration": {"thompson": {"draws": 128, "floorShare": 0.01}},
                }
            ],
            "actions": [
                {"name": action, "treatments": [{"name": "only", "channel": "email"}]} for action in ARMS.values()
            ],
        },
        Catalog(),
    )


class Pass:
    """One pass over the rows against one server.

    Args:
        client: of a server that serves hillstrom_catalog and nothing else yet.
        rows_per_s_max: pace.
    """

    def __init__(self, client: Client, rows_per_s_max: float = ROWS_PER_S_MAX) -> None:
        self._client = client
        self._chunk_s = CHUNK_ROWS / rows_per_s_max
        self.accepted = 0
        self.visits = 0
        self.expected = 0.0

    def run(self, rows: Sequence[Row]) -> Iterator[int]:
        """Play the rows in this order, yielding how many were played after each chunk.

        Raises:
            CallError: a call was refused.
        """
        due = time.monotonic()
        for first in range(0, len(rows), CHUNK_ROWS):
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic() - self._chunk_s) + self._chunk_s
            chunk = rows[first : first + CHUNK_ROWS]
            self._play(chunk)
            yield len(chunk)

    def _play(self, rows: Sequence[Row]) -> None:
        lsn = self._client.ingest_records(
            source_record(f"row-{row.number}", "experiment", _identity(row), attributes=row.attributes) for row in rows
        ).lsn
        reports: list[ReportOutcomeRequest] = []
        for row, reply in zip(rows, self._decide(rows, lsn), strict=True):
            if reply.slots[0].action != row.action:
                continue
            self.accepted += 1
            self.visits += row.visited
            self.expected += reply.slots[0].propensity
            reports.append(outcome(reply.decision_id, row.action, "shown", "impression"))
            if row.visited:
                reports.append(outcome(reply.decision_id, row.action, "visited", "visit"))
        for result in self._client.batch_report_outcomes(reports).results:
            assert result.HasField("accepted"), result.error.message

    def _decide(self, rows: Sequence[Row], at_least_lsn: int) -> list[DecideResponse]:
        """Ask for all rows at once, as many callers would."""
        answers: list[DecideResponse | CallError | None] = [None] * len(rows)
        left = threading.Semaphore(0)
        for i, row in enumerate(rows):

            def keep(answer: DecideResponse | CallError, i: int = i) -> None:
                answers[i] = answer
                left.release()

            self._client.decide_then(keep, {PLACEMENT: 1}, identities=_identity(row), at_least_lsn=at_least_lsn)
        for _ in rows:
            left.acquire()
        replies = []
        for answer in answers:
            if isinstance(answer, CallError):
                raise answer
            assert answer is not None, "every call was answered"
            replies.append(answer)
        return replies


def replay_hillstrom(rows: Sequence[Row], seed: int, progress: Progress, rows_per_s_max: float) -> Result:
    """Replay rows in a seed's random order against a fresh server and return what was earned."""
    order = np.random.default_rng(seed).permutation(len(rows))
    task = progress.add_task(f"seed {seed}", total=len(rows), rate="")
    with tempfile.TemporaryDirectory(prefix="tsugi-hillstrom-") as folder:
        settings = {"SERVE_WORKERS": 1, "SERVE_CONNECTION_AGE_MS_MAX": 3_600_000, "SERVE_CONNECTION_AGE_GRACE_MS": 0}
        with (
            running_server(Path(folder) / "data", settings) as server,
            Client(server.address, channels=4, timeout_s=CALL_S_MAX) as client,
        ):
            client.push_catalog(hillstrom_catalog())
            playing = Pass(client, rows_per_s_max)
            for n_rows in playing.run([rows[i] for i in order]):
                rate = f"{playing.visits / playing.accepted:.2%} visits" if playing.accepted else ""
                progress.update(task, advance=n_rows, rate=rate)
    return Result(playing.accepted, playing.visits, playing.expected)


@click.group("replay")
def replay_command() -> None:
    """Replay real experiments through a running server."""


@replay_command.command("hillstrom")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder that holds the experiment.",
)
@click.option("--seeds", default=5, show_default=True, help="How many passes, each in an order of its own.")
@click.option("--rows", "n_rows", default=0, help="How many rows of each pass; 0: all 64,000.")
@click.option("--rows-per-s", default=ROWS_PER_S_MAX, show_default=True, help="Pace; learning must keep up.")
@click.option(
    "--out", default=Path("build"), show_default=True, type=click.Path(path_type=Path), help="Where the figures go."
)
def hillstrom_command(data: Path, seeds: int, n_rows: int, rows_per_s: float, out: Path) -> None:
    """Replay the 64,000 customers of the Hillstrom e-mail experiment."""
    console = Console()
    try:
        rows = hillstrom_rows(data)
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        for seed in range(seeds):
            order = np.random.default_rng(1_000_000 + seed).permutation(len(rows))[: n_rows or len(rows)]
            results.append(replay_hillstrom([rows[i] for i in order], seed, progress, min(rows_per_s, ROWS_PER_S_MAX)))
    rates = [result.visit_rate for result in results]
    mean = float(np.mean(rates))
    for seed, result in enumerate(results):
        console.print(
            f"seed {seed}: {result.visit_rate:.2%} ± {result.standard_error:.2%} visits on {result.accepted:,} rows, "
            f"{result.expected_rate:.2%} foretold"
        )
    standard_error = math.sqrt(sum(result.standard_error**2 for result in results)) / len(results)
    console.print(
        f"mean {mean:.2%} ± {standard_error:.2%} (standard error) against {UNIFORM_VISIT_RATE:.2%} of a uniform policy"
    )
    out.mkdir(parents=True, exist_ok=True)
    told = {
        "visit_rate_mean": mean,
        "visit_rate_standard_error": standard_error,
        "visit_rate_by_seed": rates,
        "foretold_rate_by_seed": [result.expected_rate for result in results],
        "accepted_by_seed": [result.accepted for result in results],
    }
    (out / "hillstrom.json").write_text(json.dumps(told, indent=2) + "\n")


def _identity(row: Row) -> dict[str, str]:
    return {"customer": f"customer-{row.number}"}
