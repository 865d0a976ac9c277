"""What every test runs under: the same examples each time, and more of them with TSUGI_HYPOTHESIS_EXAMPLES."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tsugi",
    deadline=None,  # the first example of a kernel loads or compiles it; time is not what these tests are about
    derandomize=True,
    max_examples=int(os.environ.get("TSUGI_HYPOTHESIS_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tsugi")
