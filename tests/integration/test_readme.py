"""The README's first five minutes, run as they stand against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.running import running_server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {"SERVE_WORKERS": 1, "SERVE_CONNECTION_AGE_MS_MAX": 1_000, "SERVE_CONNECTION_AGE_GRACE_MS": 500}
    with running_server(tmp_path_factory.mktemp("readme") / "data", settings) as server:
        yield server.address


def fed(told: str) -> None:
    """Check what the chapter on feeding says of its own commands."""
    assert "4 rows, 3 accepted, 0 known before, 1 rejected" in told
    assert "  1 × VALUE_INVALID, column age: a number such as 1234.5 is expected (line 4)" in told
    assert "exit code 3" in told
    assert "corrected.csv: 1 rows, 1 accepted" in told
    bits = [round(float(each), 1) for each in re.findall(r'"weight": ([\d.]+)', told)]
    assert bits == [17.2, 7.5], "Anna and Ana are one, Clara and Marta wait"
    shown = json.loads(told[told.index('{\n  "value": {\n    "textValue": "city"') :].partition("\n}\n")[0] + "}")
    assert (shown["source"], [each["source"] for each in shown["otherClaims"]]) == ("crm", ["loyalty"])
    assert '{\n  "numberValue": 1.0\n}' in told, "one look into the basket in this visit"
    assert "ERASURE_STATE_FULFILLED" in told
    assert told.count("IDENTITY_STATE_LEADS") == 3
    assert told.count("IDENTITY_STATE_UNKNOWN") == 2


@pytest.mark.slow
def test_every_command_and_snippet_works_in_the_order_shown(address: str) -> None:
    environment = os.environ | {
        "TSUGI_ADDRESS": address,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    shell, python = blocks("bash"), blocks("python")
    assert len(shell) >= 3
    assert python
    script = "set -euo pipefail\n" + "\n".join(shell)
    ran = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '"decisionId"' in ran.stdout
    assert '"contacts"' in ran.stdout
    fed(ran.stdout)
    for snippet in python:
        text = snippet.replace("127.0.0.1:7410", address)
        assert text != snippet, "a snippet names the default address"
        ran = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert ran.returncode == 0, ran.stderr
