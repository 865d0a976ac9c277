"""What the README and the repository promise about themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from prometheus_client.metrics import MetricWrapperBase

from server import config, telemetry
from tsugi.v1.decision_pb2 import Degradation

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def section(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def settings_table() -> str:
    rows = []
    source = (ROOT / "server/config.py").read_text()
    for part in msgspec.structs.fields(config.Settings):
        for key in msgspec.structs.fields(part.type):
            meaning = re.search(rf"^    {key.name}: .*?  # (.*)$", source, re.MULTILINE)
            assert meaning, f"{part.name}.{key.name} has no comment in server/config.py"
            rows.append(f"| `{part.name}.{key.name}` | `{key.default}` | {meaning.group(1)} |\n")
    return "".join(rows)


def metrics_table() -> str:
    rows = []
    for name in vars(telemetry):
        metric = getattr(telemetry, name)
        if isinstance(metric, MetricWrapperBase):
            described = next(iter(metric.describe()))
            rows.append(f"| `{described.name}` | {described.type} | {described.documentation} |\n")
    return "".join(rows)


@pytest.mark.parametrize(("name", "table"), [("settings", settings_table()), ("metrics", metrics_table())])
def test_the_readme_lists_every_setting_and_metric(name: str, table: str) -> None:
    """Run ``python tests/architecture/test_documents.py`` to write the tables anew."""
    assert section(name) == table


def test_the_readme_explains_every_degradation() -> None:
    for name in Degradation.keys()[1:]:
        assert f"`{name.removeprefix('DEGRADATION_')}`" in README


def test_the_two_commands_stand_in_readme_and_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_lock_files_record_no_addresses() -> None:
    locks = list((ROOT / "requirements").glob("*.lock"))
    assert locks
    for lock in locks:
        assert "://" not in lock.read_text(), lock


def test_generated_code_and_address_locks_are_not_committed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if not tracked:
        pytest.skip("not a git checkout; untested: that no generated file is committed")
    assert not re.search(r"_pb2(_grpc)?\.pyi?$|(^|/)(uv\.lock|pylock\.toml)$", tracked, re.MULTILINE)


def rewrite() -> None:
    """Write both tables into the README."""
    text = README
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        text = (
            text.replace(section(name), table, 1)
            if section(name)
            else text.replace(f"<!-- {name} -->\n", f"<!-- {name} -->\n{table}", 1)
        )
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    rewrite()
    sys.stdout.write("README tables written\n")
