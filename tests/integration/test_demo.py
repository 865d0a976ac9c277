"""The README's first command, for a few seconds: it plays to its end and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from training.demo import demo_command, prepare
from training.fit import MODELS_FOLDER
from training.running import running_server
from training.simulate import World
from training.traffic import Traffic
from tsugi.client import Client


@pytest.mark.slow
def test_demonstration_plays_to_its_end_and_writes_figures_and_picture(tmp_path: Path) -> None:
    played = CliRunner().invoke(demo_command, ["--duration-s", "3", "--rate", "250", "--out", str(tmp_path)])
    assert played.exit_code == 0, (played.output, played.exception)
    assert json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_traffic_begins_when_the_server_knows_its_people(tmp_path: Path) -> None:
    world = World(compile_catalog(load_catalog((MODELS_FOLDER / "catalog.yaml").read_text())), 1)
    settings = {"SERVE_WORKERS": 1, "LEARNER_ENABLED": False}
    with running_server(tmp_path, settings) as server, Client(server.address, timeout_s=10.0) as client:
        prepare(client, Console(quiet=True))
        traffic = Traffic(world, client, rate=1.0, call_share=0.0, seed=1, on_decision=lambda _: None)
        traffic.introduce(world.people(1_000))
        assert client.count_people().people == 1_000
