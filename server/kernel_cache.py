"""Where the compiled kernels are kept on disk: known without importing the compiler, as the supervisor needs.

A folder named by a hash of every module that holds kernels or the constants they are compiled with, because Numba looks
at the caller's file alone and would keep using an old leaf inside it. Each root package has its own, so that learners'
kernels come and go without those of decisions.
"""

from __future__ import annotations

import functools
import hashlib
import os
from importlib import metadata
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parents[1]
_OF_CONSTANTS: Final = (
    "server/catalog/catalog.py",
    "server/catalog/contact_terms.py",
    "server/catalog/profile_terms.py",
    "training/learners/base.py",
)


@functools.cache
def cache_folder(package: str) -> Path:
    """Return where the kernels of a root package are cached."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return Path(os.environ["NUMBA_CACHE_DIR"])
    digest = hashlib.sha256(metadata.version("numba").encode())
    for source in sorted((_ROOT / package).rglob("*.py")):
        code = source.read_bytes()
        if b"\n@kernel\n" in code or source.relative_to(_ROOT).as_posix() in _OF_CONSTANTS:
            digest.update(code)
    return _ROOT / package / "__pycache__" / f"kernels-{digest.hexdigest()[:16]}"


CACHE_FOLDER: Final = cache_folder("server")
