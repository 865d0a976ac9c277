"""The README's first command, for a few seconds: it plays to its end and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from training.demo import demo_command


@pytest.mark.slow
def test_demonstration_plays_to_its_end_and_writes_figures_and_picture(tmp_path: Path) -> None:
    played = CliRunner().invoke(demo_command, ["--duration-s", "3", "--rate", "50", "--out", str(tmp_path)])
    assert played.exit_code == 0, (played.output, played.exception)
    assert json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
