"""What is said about a run: verdicts, the JSON, and the table in the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmark.report import BEGIN, END, FIGURES, Report, table, write_readme

ENV = {
    "time": "2026-03-03T09:00:00+00:00",
    "cpus": 2,
    "cpu_model": "a processor",
    "kernel": "6.1",
    "python": "3.11",
    "git_revision": "0123456789abcdef",
    "git_is_clean": True,
    "load_average": [0.1, 0.1, 0.1],
    "on_the_path": ["rules"],
    "not_on_the_path": "consent",
}


def _report(tmp_path: Path, value: float, *faults: str, is_judged: bool = True) -> dict[str, object]:
    report = Report(env=dict(ENV), is_judged=is_judged)
    report.add("decide100.cpu_ratio", [value + 0.1, value, value - 0.1], faults, {"echo.cpu_us": 171.26})
    document = report.write(tmp_path / "build" / "bench.json")
    assert json.loads((tmp_path / "build" / "bench.json").read_text()) == document
    result = document["results"]["decide100.cpu_ratio"]
    assert isinstance(result, dict)
    return result


def test_a_figure_is_the_median_of_its_rounds_with_its_goal_and_what_stands_beside_it(tmp_path: Path) -> None:
    assert _report(tmp_path, 1.2) == {
        "value": 1.2,
        "unit": "ratio",
        "min": 1.1,
        "max": 1.3,
        "rounds": 3,
        "baseline": {"echo.cpu_us": 171.3},
        "goal": "<= 1.3",
        "verdict": "met",
    }


def test_a_missed_goal_is_reported_as_missed(tmp_path: Path) -> None:
    assert _report(tmp_path, 1.31)["verdict"] == "missed"


def test_a_run_with_a_fault_is_void_whatever_its_value(tmp_path: Path) -> None:
    assert _report(tmp_path, 1.0, "others used 40% of the server's core")["verdict"] == "void"


def test_what_makes_everything_worthless_makes_each_figure_void(tmp_path: Path) -> None:
    report = Report(env=dict(ENV), general_faults=["one core"])
    report.add("echo.cpu_us", [170.0])
    assert report.write(tmp_path / "bench.json")["env"]["void"] == {"echo.cpu_us": ["one core"]}


def test_a_quick_run_judges_nothing(tmp_path: Path) -> None:
    assert _report(tmp_path, 9.9, is_judged=False)["verdict"] == "measured"


def test_a_figure_nobody_declared_cannot_be_reported() -> None:
    with pytest.raises(KeyError):
        Report(env={}).add("decide100.best_ever", [1.0])


def test_every_goal_is_a_relation_and_a_bound() -> None:
    for key, figure in FIGURES.items():
        if figure.goal is not None:
            relation, bound = figure.goal.split()
            assert relation in ("<=", ">=") and float(bound) > 0, key


def test_the_table_stands_between_the_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    report = Report(env=dict(ENV))
    report.add("decide100.throughput_ratio", [0.5, 0.6, 0.7], ["the generator lagged: p99 2.0 ms"])
    document = report.write(tmp_path / "bench.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_readme(readme, document)
    written = readme.read_text()
    assert written == f"before\n{BEGIN}\n{table(document)}\n{END}\nafter\n"
    assert "| `decide100.throughput_ratio` | 0.6 (0.5–0.7) | ratio | ≥ 0.8 | void |" in written
    assert "Not yet on the path: consent." in written
    assert "Void, because in some round the generator lagged." in written
    write_readme(readme, document)
    assert readme.read_text() == written


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    with pytest.raises(ValueError, match="bench:begin"):
        write_readme(readme, {"env": ENV, "results": {}})
    assert readme.read_text() == "nothing\n"
