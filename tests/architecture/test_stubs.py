"""The stubs beside the protos are those the protos would give now."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

PROTOS = Path(__file__).parents[2] / "protos"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stubs_are_not_stale(tmp_path: Path, capfd: object) -> None:
    for source in PROTOS.rglob("*.proto"):
        target = tmp_path / source.relative_to(PROTOS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    assert generator().generate(tmp_path)
    fresh = sorted(tmp_path.rglob("*_pb2*.py*"))
    assert len(fresh) > 30
    for stub in fresh:
        present = PROTOS / stub.relative_to(tmp_path)
        assert present.exists(), f"{present.name} is missing, run make protos"
        assert present.read_bytes() == stub.read_bytes(), f"{present.name} is stale, run make protos"
