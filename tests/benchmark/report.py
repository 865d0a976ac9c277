"""What a run says: every figure with its goal and verdict, as JSON and as the table in the README.

One list names every figure; a key that is not in it cannot be reported. The README is written from the JSON alone.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOT_ON_THE_PATH: Final = "consent and contact policy (but see policies.growth), TLS, authentication and authorisation"


class Figure(NamedTuple):
    """What one key stands for."""

    unit: str
    goal: str | None  # ">= 0.8" or "<= 60"; None: printed for information
    meaning: str


FIGURES: Final = {
    "decide100.throughput_ratio": Figure("ratio", ">= 0.8", "calls/s of Decide ÷ of the echo, 16 connections × 4"),
    "decide100.cpu_ratio": Figure("ratio", "<= 1.3", "CPU of a Decide ÷ of an echo, all threads, same load"),
    "decide100.lone_p50_ratio": Figure("ratio", "<= 2.8", "median latency ÷ the echo's, one call in flight"),
    "decide100.cpu_ratio_same_transport": Figure("ratio", None, "CPU ÷ that of an echo with our transport recipe"),
    "decide100.varied_throughput_ratio": Figure("ratio", None, "as the first, another person each call, our generator"),
    "decide100.throughput_ratio_c4m8": Figure("ratio", None, "calls/s ÷ the echo's, 4 connections × 8"),
    "decide100.cpu_ratio_c4m8": Figure("ratio", None, "CPU ÷ the echo's, 4 connections × 8"),
    "decide100.throughput_ratio_c1m32": Figure("ratio", None, "calls/s ÷ the echo's, 1 connection × 32"),
    "decide100.cpu_ratio_c1m32": Figure("ratio", None, "CPU ÷ the echo's, 1 connection × 32"),
    "decide100.calls_per_s": Figure("1/s", None, "16 connections × 4"),
    "decide100.saturated_p99_ms": Figure("ms", None, "99 % of calls are faster, 16 × 4"),
    "decide100.cpu_us": Figure("µs", None, "CPU of a Decide, all threads, 16 × 4"),
    "decide100.batch_mean": Figure("calls", None, "decided together, 16 × 4"),
    "decide100.lone_p50_us": Figure("µs", None, "median latency, one call in flight"),
    "decide100.lone_p99_us": Figure("µs", None, "99 % of calls are faster, one in flight"),
    "decide100.server_compute_us_saturated": Figure("µs", "<= 60", "deciding, by the worker's clock, 16 × 4"),
    "decide100.server_compute_us_lone": Figure("µs", "<= 120", "deciding, by the worker's clock, one in flight"),
    "decide100.hot_compute_us": Figure("µs", "<= 40", "CPU of a decision in a loop without transport, one by one"),
    "decide100.hot_compute_us_together": Figure("µs", None, "the same, 16 requests a turn of the loop"),
    "decide100.hot_commit_us": Figure("µs", None, "CPU of the commit thread a decision, 16 a turn"),
    "decide100.open_loop_p50_ms_half": Figure("ms", None, "median from the intended send time, half of saturation"),
    "decide100.open_loop_p99_ms_half": Figure("ms", None, "99 % of those calls are faster"),
    "decide100.open_loop_p999_ms_half": Figure("ms", None, "99.9 % of those calls are faster"),
    "decide100.open_loop_p50_ms_ninety": Figure("ms", None, "median from the intended send time, 90 % of saturation"),
    "decide100.open_loop_p99_ms_ninety": Figure("ms", None, "99 % of those calls are faster"),
    "decide100.open_loop_p999_ms_ninety": Figure("ms", None, "99.9 % of those calls are faster"),
    "decide100.record_bytes": Figure("B", None, "growth of the log by a decision, indexes included"),
    "growth.1k_us": Figure("µs", "<= 150", "CPU of one decision over 1,000 candidates, without transport"),
    "growth.10k_us": Figure("µs", "<= 1500", "CPU of one decision over 10,000 candidates, without transport"),
    "policies.growth": Figure(
        "share", "<= 0.4", "time deciding with every policy capability above plain, 16 in flight"
    ),
    "policies.growth_lone": Figure("share", "<= 0.4", "the same, one call in flight"),
    "policies.cpu_growth": Figure("share", None, "CPU of such a Decide above plain, all threads, 16 in flight"),
    "policies.cpu_growth_lone": Figure("share", None, "the same, one call in flight"),
    "policies.hot_growth": Figure(
        "share", None, "the same without transport, records too; by step, 16 requests a turn"
    ),
    "policies.hot_growth_lone": Figure("share", None, "the same, one by one"),
    "outcomes.group_commit_gain": Figure("ratio", None, "acknowledged outcomes/s, 256 in flight ÷ one in flight"),
    "learning.lag_p99_ms": Figure("ms", None, "outcome acknowledged → a reply that has learned from it, under load"),
    "learning_lag.idle_p50_ms": Figure("ms", None, "outcome acknowledged → a reply that has learned from it, no load"),
    "learning_lag.idle_p99_ms": Figure("ms", None, "99 % of those outcomes are learned from sooner"),
    "learning_lag.p50_ms": Figure("ms", None, "the same, 1,000 outcomes/s beside half of Decide's peak, as shipped"),
    "learning_lag.p99_ms": Figure("ms", "<= 1000", "99 % of those outcomes are learned from sooner"),
    "learning_lag.waited_p50_ms": Figure("ms", None, "the same load, asked once with wait_for_learning"),
    "learning_lag.waited_p99_ms": Figure("ms", None, "99 % of those decisions come sooner"),
    "learning_lag.waited_exact_share": Figure("share", ">= 1", "of those decisions that had learned from the outcome"),
    "ingest.unary_records_per_s": Figure("1/s", ">= 20000", "records on disk, 500 a call, four calls at once"),
    "ingest.unary_cpu_us": Figure("µs", None, "CPU of such a record, all threads of the worker"),
    "ingest.stream_records_per_s": Figure("1/s", ">= 20000", "records on disk, 500 a message, one stream"),
    "ingest.stream_cpu_us": Figure("µs", None, "CPU of such a record, all threads of the worker"),
    "ingest.inside_cpu_us": Figure("µs", None, "CPU of a record without transport: parsed, checked, on disk"),
    "import.rows_per_min": Figure("1/min", ">= 200000", "rows of a CSV file by tsugi import, its start included"),
    "projector.records_per_s": Figure("1/s", None, "a filled log projected: cleansed, matched, merged, folded"),
    "projector.cpu_us": Figure("µs", None, "CPU of such a record"),
    "freshness.p50_ms": Figure("ms", None, "record acknowledged → seen by Decide, at half the projector's rate"),
    "freshness.p99_ms": Figure("ms", "<= 50", "99 % of those records are seen sooner"),
    "freshness.at_least_lsn_p50_ms": Figure("ms", None, "the same, asked once with at_least_lsn"),
    "freshness.at_least_lsn_p99_ms": Figure("ms", None, "99 % of those decisions come sooner"),
    "freshness.at_least_lsn_exact_share": Figure("share", ">= 1", "of those decisions that saw the record"),
    "profiles.read_p50_us": Figure("µs", "<= 5", "a profile found, read and written as facts, by identity, warm"),
    "profiles.read_p99_us": Figure("µs", None, "99 % of those reads are faster"),
    "profiles.read_windows_p50_us": Figure("µs", "<= 5", "the same with windows, segments and a journey, exact now"),
    "profiles.read_windows_p99_us": Figure("µs", None, "99 % of those reads are faster"),
    "profiles.read_10m_p50_us": Figure("µs", None, "as the first, of very many profiles, drawn uniformly"),
    "profiles.read_10m_p99_us": Figure("µs", None, "99 % of those reads are faster"),
    "profiles.10m_p50_ratio": Figure("ratio", "<= 1.2", "median Decide ÷ that over 10,000 profiles, drawn uniformly"),
    "profiles.state_bytes": Figure("B", None, "state on disk for each of so many profiles, as after a compaction"),
    "profiles.build_s": Figure("s", None, "to put them there, for the benchmark alone"),
    "worker.rss_anonymous_mb": Figure("MB", None, "memory of the worker that no file stands behind"),
    "echo.calls_per_s": Figure("1/s", None, "stock grpc.aio + uvloop echo of the same messages, 16 × 4"),
    "echo.saturated_p99_ms": Figure("ms", None, "99 % of calls are faster, 16 × 4"),
    "echo.cpu_us": Figure("µs", None, "CPU of an echo, all threads, 16 × 4"),
    "echo.lone_p50_us": Figure("µs", None, "median latency, one call in flight"),
    "echo.same_transport_calls_per_s": Figure("1/s", None, "echo with 16 listeners and SCHED_BATCH, 16 × 4"),
    "echo.same_transport_cpu_us": Figure("µs", None, "CPU of that echo, 16 × 4"),
    "echo.open_loop_p99_ms_half": Figure("ms", None, "99 % of echoes are faster at the rate of decide100's half"),
    "echo.open_loop_p99_ms_ninety": Figure("ms", None, "99 % of echoes are faster at the rate of its 90 %"),
}


@dataclass
class Report:
    """Figures as they are measured, and what makes some of them worthless.

    Attributes:
        env: the machine, the program and the load.
        is_judged: false where nothing is held against its goal.
        general_faults: what makes every figure void.
    """

    env: dict[str, Any]
    is_judged: bool = True
    general_faults: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    voids: dict[str, list[str]] = field(default_factory=dict)

    def add(
        self,
        key: str,
        rounds: Sequence[float],
        faults: Sequence[str] = (),
        baseline: Mapping[str, float] | None = None,
    ) -> float:
        """Report one figure: the median of its rounds; return it.

        Args:
            key: see FIGURES.
            rounds: one value each.
            faults: why it is void; empty when it is not.
            baseline: what it must be read beside, by key.
        """
        figure = FIGURES[key]
        value = statistics.median(rounds)
        verdict = "measured" if figure.goal is None or not self.is_judged else _verdict(value, figure.goal)
        faults = list(dict.fromkeys((*self.general_faults, *faults)))
        if faults:
            verdict = "void"
            self.voids[key] = faults
        self.results[key] = {
            "value": _rounded(value),
            "unit": figure.unit,
            "min": _rounded(min(rounds)),
            "max": _rounded(max(rounds)),
            "rounds": len(rounds),
            "baseline": {name: _rounded(number) for name, number in (baseline or {}).items()},
            "goal": figure.goal,
            "verdict": verdict,
        }
        return value

    def write(self, path: Path) -> dict[str, Any]:
        """Write everything as JSON, in the order of FIGURES, and return it."""
        ordered = {key: self.results[key] for key in FIGURES if key in self.results}
        document = {"env": self.env | {"void": self.voids}, "results": ordered}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        return document


def merge_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures into a file of figures; what others wrote there under other keys stays."""
    others = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(others | dict(figures), indent=2) + "\n", encoding="utf-8")


def table(document: Mapping[str, Any]) -> str:
    """Return a run's figures as a Markdown table, under the sentence that says what they are worth."""
    env = document["env"]
    lines = [
        f"Measured {env['time']} on {env['cpus']} cores of {env['cpu_model']}, Linux {env['kernel']}, Python "
        f"{env['python']}, revision {env['git_revision'][:12]}{'' if env['git_is_clean'] else ' with changes'}; load "
        f"average before the run {env['load_average'][0]:.2f}. Server and load generator on one core each. Median of "
        "the rounds, least and greatest in brackets.",
        "",
        f"On the path: {', '.join(env['on_the_path'])}. Not yet on the path: {env['not_on_the_path']}.",
        "",
        "| figure | value | unit | goal | verdict | what it is |",
        "|---|---|---|---|---|---|",
    ]
    shown: Mapping[str, float] = {}
    for key, result in document["results"].items():
        spread = f" ({_short(result['min'])}–{_short(result['max'])})" if result["rounds"] > 1 else ""
        goal = (result["goal"] or "").replace(">=", "≥").replace("<=", "≤")
        baseline = result["baseline"] if result["baseline"] != shown else {}
        shown = result["baseline"]
        beside = "; ".join(f"{name} {_short(number)}" for name, number in baseline.items())
        meaning = f"{FIGURES[key].meaning}{f'; beside it {beside}' if beside else ''}"
        cells = (f"`{key}`", f"{_short(result['value'])}{spread}", result["unit"], goal, result["verdict"], meaning)
        lines.append(f"| {' | '.join(cells)} |")
    reasons = dict.fromkeys(fault.partition(":")[0] for faults in env["void"].values() for fault in faults)
    if reasons:
        lines += ["", f"Void, because in some round {'; '.join(reasons)}. The JSON has the numbers."]
    return "\n".join(lines)


def write_readme(path: Path, document: Mapping[str, Any]) -> None:
    """Replace what stands between the markers of a README by the table of a run.

    Raises:
        ValueError: a marker is missing.
    """
    write_between(path, BEGIN, END, functools.partial(table, document))


def write_between(path: Path, begin: str, end: str, make: Callable[[], str]) -> None:
    """Replace what stands between two markers of a file by what is made then.

    Raises:
        ValueError: a marker is missing.
    """
    before, found_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} has no {begin} … {end}")
    path.write_text(f"{before}{begin}\n{make()}\n{end}{after}", encoding="utf-8")


def _verdict(value: float, goal: str) -> str:
    relation, bound = goal.split()
    is_met = value >= float(bound) if relation == ">=" else value <= float(bound)
    return "met" if is_met else "missed"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 10_000 else float(round(value))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
