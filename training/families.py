"""Which families of learners there are, and which take part in a goal's fleet."""

from __future__ import annotations

from typing import Final

from training.learners.base import Learner, Settings
from training.learners.baseline import Baseline
from training.learners.bayesian import BayesianRegression
from training.learners.diagonal import DiagonalRegression
from training.learners.logistic import LogisticCorrection

FAMILIES: Final[dict[str, type[Learner]]] = {
    family.family: family for family in (Baseline, BayesianRegression, DiagonalRegression, LogisticCorrection)
}
# Who says how much is not yet known, for Thompson sampling: the first that there is room for.
POSTERIORS: Final = (BayesianRegression.family, DiagonalRegression.family)
CHALLENGERS_MAX: Final = 3

_LOGISTIC = LogisticCorrection.choices
# With whom a goal begins: the first serves at once, since it starts from the prior and leaves it only as rows say so.
FIRST: Final[tuple[tuple[str, Settings], ...]] = (
    (LogisticCorrection.family, _LOGISTIC[0]),
    (LogisticCorrection.family, _LOGISTIC[1]),
    (LogisticCorrection.family, _LOGISTIC[2]),
    (LogisticCorrection.family, _LOGISTIC[5]),
)
# What may begin later, in turn.
LATER: Final[tuple[tuple[str, Settings], ...]] = tuple(
    (family.family, settings) for family in (LogisticCorrection,) for settings in family.choices
)
