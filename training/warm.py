"""Compiles every kernel of the learners and fills their cache: run at install, and by the learner process at its start.

Has every family learn two rows with all argument types as in service. The first run on a machine compiles for some
seconds; later ones load from the cache in a fraction of one.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np

from server.catalog.catalog import Goal
from training.families import FAMILIES
from training.fleet import Fleet
from training.learners.base import Row
from training.rewards import Lesson


def warm() -> None:
    """Have every family learn, and be corrected and exported."""
    names, fleet = ("profile.sample", "profile.sample=one"), Fleet()
    goal = Goal("sample", {"click": 1.0}, 1_000_000, 0.0, math.log(0.1 / 0.9))
    fleet.meet([goal], names, {"one": ("group=some",), "two": ()})
    recorded = np.ones(len(names), "<f4").tobytes()
    fleet.learn(Lesson(goal, "one", names, recorded, -2.0, 1.0))
    fleet.learn(Lesson(goal, "one", names, recorded, -2.0, 0.0, taught=1.0, row=1))
    for family in FAMILIES.values():
        learner = family(fleet.space, 0.1, family.choices[0])
        row = Row(0, np.ones(1 + len(names)), -2.0)
        learner.learn_one(row, 1.0)
        learner.correct_one(row, -1.0)
        learner.export([0, 1])


if __name__ == "__main__":
    started = time.monotonic()
    warm()
    sys.stdout.write(f"learners' kernels ready in {time.monotonic() - started:.1f} s\n")
