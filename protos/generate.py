"""Writes the Python code and types of every .proto beside it.

Run by the package build (wheel and editable) and by ``make protos``. Handed nothing but this folder; never reads the
network. Import root = proto root, so no import is rewritten.
"""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(root: Path = ROOT) -> list[Path]:
    """Write the stubs of every .proto below root and return the .proto files, sorted.

    Raises:
        SystemExit: the compiler refused a file; it has printed why.
    """
    # mypy-protobuf is a program that protoc looks up on PATH, and every environment has its own bin folder.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    sources = sorted(root.rglob("*.proto"))
    services = [source for source in sources if "_service" in source.name]
    well_known = str(resources.files("grpc_tools") / "_proto")
    common = ["protoc", f"--proto_path={root}", f"--proto_path={well_known}"]
    runs = [
        [*common, f"--python_out={root}", f"--pyi_out={root}", *map(str, sources)],
        [*common, f"--grpc_python_out={root}", f"--mypy_grpc_out={root}", *map(str, services)],
    ]
    for arguments in runs:
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc refused a file; see above")
    return sources


if __name__ == "__main__":
    sys.stdout.write(f"generated stubs of {len(generate())} files\n")
