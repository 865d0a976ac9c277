"""Makes hatchling generate the stubs before it collects files, for wheels and editable installs alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateStubs(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's own generic, bound nowhere
    """Runs generate.py of this folder."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the stubs; called once a target, before its files are listed."""
        folder = Path(self.root) / "protos"
        sys.path.insert(0, str(folder))
        try:
            from generate import generate  # noqa: PLC0415  # of this very folder, whatever the build frontend imported
        finally:
            sys.path.remove(str(folder))
        generate(folder)
