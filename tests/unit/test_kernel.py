"""What a start must not load: every process of a server pays for it again."""

from __future__ import annotations

import subprocess
import sys

import pytest

STARTED = """
import sys

import server.app

assert "numba" not in sys.modules, "the supervisor compiles nothing"
from server.decisioning.warm import warm_profiles

warm_profiles()
assert "scipy" not in sys.modules, "no kernel needs it, installed or not"
import scipy

assert scipy.__name__ in sys.modules, "and who does need it has it"
"""


@pytest.mark.slow
def test_supervisor_loads_no_compiler_and_a_role_no_linear_algebra() -> None:
    started = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
