"""The page on the bundle format says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.registry import bundle, operators
from server.registry.bundle import check_in_sandbox, parse

PAGE = (Path(__file__).parents[2] / "models" / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no block of {language}"
    return found[1]


def test_operators_on_the_page_are_the_allowed_ones() -> None:
    common, _, of_trees = block("operators").partition("ai.onnx.ml:")
    assert set(common.split()) == operators.OPERATORS[""]
    assert set(of_trees.split()) == operators.OPERATORS["ai.onnx.ml"]


def test_bounds_on_the_page_are_the_ones_in_force() -> None:
    assert f"at most {operators.NODES_MAX:,} nodes and {operators.INITIALIZERS_MAX:,} initializers" in PAGE.lower()
    assert f"at most {bundle.BUNDLE_BYTES_MAX >> 20} MiB" in PAGE
    assert f"Opset at most {operators.OPSETS_MAX['']} (`ai.onnx.ml`: {operators.OPSETS_MAX['ai.onnx.ml']})" in PAGE
    assert f"IR version at most {operators.IR_VERSION_MAX}" in PAGE
    limits = bundle.GATE_LIMITS
    memory = f"{limits.memory_bytes >> 30} GiB of memory, {limits.cpu_s} s of processor time and {limits.wall_s:.0f} s"
    assert memory in " ".join(PAGE.split())
    assert f"at most {limits.score_us_max // 1000} ms of processor time" in PAGE


@pytest.mark.slow
def test_bundle_made_as_on_the_page_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "models/README.md", "exec"), {})
    data = Path("purchase.bundle").read_bytes()
    assert parse(data).manifest.goal == "purchase"
    check_in_sandbox(data)
