"""How loops over columns are compiled: the leaves of a decision, and what follows from a profile, by Numba.

Why loops and not numpy: a decision over 100 candidates is some forty small steps. As numpy calls each pays its own
entry, and after a wake-up of the transport each pays it with cold caches; fused they cost a fifth
(``decide100.hot_compute`` of ``make bench``). The numpy form of every leaf stands in ``tests/support`` as its oracle.

The compiled code is cached on disk, see ``kernel_cache``, in Numba's own format, which is pickle: ``app.py`` refuses to
start when others may write to the folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from server.kernel_cache import cache_folder

os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # read at Numba's import

# Numba looks for SciPy's linear algebra, which no kernel uses. Where SciPy is installed, that import would cost every
# process 0.1 s of its start; None says that there is none, for as long as Numba looks.
_IS_ABSENT = "scipy" not in sys.modules
if _IS_ABSENT:
    sys.modules["scipy"] = None  # type: ignore[assignment]  # as the import system documents
import numba  # noqa: E402 - once the two settings above stand
import numba.np.arraymath  # noqa: E402 - it looks; otherwise it would at the first kernel

if _IS_ABSENT:
    del sys.modules["scipy"]

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def kernel(function: _Kernel) -> _Kernel:
    """Compile a function over arrays and numbers; the types it is first called with are the ones it is for."""
    folder = cache_folder(function.__module__.split(".")[0])
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]  # set from the environment at import
    return cast(_Kernel, numba.njit(cache=True, error_model="numpy")(function))
