"""What every test runs under: the same examples each time, and more of them with TSUGI_HYPOTHESIS_EXAMPLES.

Where tests run side by side, the folders with the longest files come first: a long file that began last would leave
the other processes idle to its end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

LONGEST_FIRST: Final = ("crash", "integration", "statistics", "property")
HERE: Final = Path(__file__).parent

settings.register_profile(
    "tsugi",
    deadline=None,  # the first example of a kernel loads or compiles it; time is not what these tests are about
    derandomize=True,
    max_examples=int(os.environ.get("TSUGI_HYPOTHESIS_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tsugi")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests of a process that shares them with others; each sorts alike."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _turn(item.path))


def _turn(path: Path) -> int:
    folder = path.relative_to(HERE).parts[0]
    return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)
