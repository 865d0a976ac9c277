"""Which families of learners there are, and which take part in a goal's fleet."""

from __future__ import annotations

from typing import Final

from training.learners.base import Learner, Settings
from training.learners.baseline import Baseline
from training.learners.bayesian import BayesianRegression
from training.learners.diagonal import DiagonalRegression
from training.learners.factorised import FactorisedCorrection
from training.learners.forest import Forest
from training.learners.hashed import HashedCorrection
from training.learners.logistic import LogisticCorrection
from training.learners.softmax import SoftmaxPolicy
from training.learners.weighted import WeightedCorrection

FAMILIES: Final[dict[str, type[Learner]]] = {
    family.family: family
    for family in (
        Baseline,
        BayesianRegression,
        DiagonalRegression,
        FactorisedCorrection,
        Forest,
        HashedCorrection,
        LogisticCorrection,
        SoftmaxPolicy,
        WeightedCorrection,
    )
}
# Who says how much is not yet known, for Thompson sampling: the first that there is room for.
POSTERIORS: Final = (BayesianRegression.family, DiagonalRegression.family)
CHALLENGERS_MAX: Final = 3

_CHALLENGERS: Final[tuple[type[Learner], ...]] = (HashedCorrection, FactorisedCorrection, LogisticCorrection)
# With whom a goal begins: the first serves at once, since it starts from the prior and leaves it only as rows say so.
FIRST: Final[tuple[tuple[str, Settings], ...]] = (
    (LogisticCorrection.family, LogisticCorrection.choices[0]),
    (HashedCorrection.family, HashedCorrection.choices[1]),
    (LogisticCorrection.family, LogisticCorrection.choices[2]),
    (FactorisedCorrection.family, FactorisedCorrection.choices[1]),
)
# What may begin later, in turn. Those that weigh rows by 1 / chance in front: they win where no line tells how likely
# success is and are dropped again where one does. Then a choice of each other family, then the next of each.
LATER: Final[tuple[tuple[str, Settings], ...]] = (
    (WeightedCorrection.family, WeightedCorrection.choices[0]),
    (SoftmaxPolicy.family, SoftmaxPolicy.choices[0]),
    *(
        (family.family, family.choices[i])
        for i in range(max(len(family.choices) for family in _CHALLENGERS))
        for family in _CHALLENGERS
        if i < len(family.choices)
    ),
    (WeightedCorrection.family, WeightedCorrection.choices[1]),
)
