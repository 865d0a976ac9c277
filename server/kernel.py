"""How loops over columns are compiled: the leaves of a decision, and what follows from a profile, by Numba.

Why loops and not numpy: a decision over 100 candidates is some forty small steps. As numpy calls each pays its own
entry, and after a wake-up of the transport each pays it with cold caches; fused they cost a fifth
(``decide100.hot_compute`` of ``make bench``). The numpy form of every leaf stands in ``tests/support`` as its oracle.

The compiled code is cached on disk in a folder named by a hash of every module that holds kernels or the constants
they are compiled with, because Numba looks at the caller's file alone and would keep using an old leaf inside it. Each
root package has its own, so that learners' kernels come and go without those of decisions. The cache is Numba's own
format, which is pickle: ``app.py`` refuses to start when others may write to the folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numba  # the setting above is read at import

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

_OF_CONSTANTS: Final = ("catalog/catalog.py", "catalog/contact_terms.py", "catalog/profile_terms.py")


@functools.cache
def cache_folder(folder: Path) -> Path:
    """Return where the kernels of a root package, given by its folder, are cached."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return Path(os.environ["NUMBA_CACHE_DIR"])
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(folder.rglob("*.py")):
        code = source.read_bytes()
        if b"\n@kernel\n" in code or source.relative_to(folder).as_posix() in _OF_CONSTANTS:
            digest.update(code)
    return folder / "__pycache__" / f"kernels-{digest.hexdigest()[:16]}"


_ROOT: Final = Path(__file__).resolve().parents[1]
CACHE_FOLDER: Final = cache_folder(_ROOT / "server")


def kernel(function: _Kernel) -> _Kernel:
    """Compile a function over arrays and numbers; the types it is first called with are the ones it is for."""
    folder = cache_folder(_ROOT / function.__module__.split(".")[0])
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]  # set from the environment at import
    return cast(_Kernel, numba.njit(cache=True, error_model="numpy")(function))
