"""The compiled step is that of River's own Bayesian linear regression."""

from __future__ import annotations

import numpy as np
from river import linear_model

from training.learners.regression import Regression, absorb, expect
from training.space import Space


def test_the_compiled_step_is_rivers() -> None:
    rng, space, beta = np.random.default_rng(1), Space(), 4.0
    space.admit_features(["profile.a", "profile.b"])
    ours, rivers = Regression(space, beta), linear_model.BayesianLinearRegression(alpha=1, beta=beta)
    for step in range(200):
        if step == 100:
            space.admit_features(["context.c"])
            ours.widen()
        row = rng.normal(size=1 + len(space.columns))
        named = dict(zip(["1", *space.columns], row.tolist(), strict=True))
        spread, target = np.empty_like(row), float(rng.normal())
        expected, variance = expect(row, ours.arrays[1], ours.arrays[3], spread)
        theirs = rivers.predict_one(named, with_dist=True)  # type: ignore[no-untyped-call]  # untyped in River
        assert np.allclose((expected, variance), (theirs.mu, theirs.sigma**2 - 1.0 / beta), rtol=0.0, atol=1e-9)
        assert np.allclose((ours.mean_of(row), ours.variance_of(row)), (expected, variance), rtol=0.0, atol=1e-9)
        absorb(row, spread, variance, beta, target, *ours.arrays)
        rivers.learn_one(named, target)  # type: ignore[no-untyped-call]  # untyped in River


def test_precision_and_covariance_stay_each_others_inverse() -> None:
    rng, space = np.random.default_rng(2), Space()
    space.admit_features(f"profile.f{i}" for i in range(10))
    regression = Regression(space, 1.0)
    for step in range(5_000):
        row = rng.normal(size=11)
        spread = np.empty_like(row)
        _, variance = expect(row, regression.arrays[1], regression.arrays[3], spread)
        absorb(row, spread, variance, 0.2, 1.0, *regression.arrays)
        if step % 1_000 == 999:
            regression.renew_prior(0.5)
    np.testing.assert_allclose(regression.arrays[0] @ regression.arrays[1], np.eye(11), atol=1e-9)
