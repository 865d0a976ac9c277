"""The learners' contributions are exactly what stands between a recorded prior and a recorded propensity."""

from __future__ import annotations

import numpy as np
import pytest

from server.catalog.catalog import Doubles
from server.decisioning.contributions import Correction, contribute
from tests.property.test_recall import DESKS, desk, recorded
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1.decision_service_pb2 import DecideRequest

N_DECISIONS = 250  # of each desk: 2,000 in all


@pytest.mark.parametrize("seeds", DESKS)
def test_learned_contributions_add_up_to_what_was_added_to_the_prior(seeds: tuple[int, int]) -> None:
    here = desk(*seeds)
    correction = Correction(here.models.correction_weights, here.models.correction_intercepts, here.models.prior_slopes)
    n_told = 0
    for record, _ in recorded(here, sum(seeds), N_DECISIONS):
        record.provenance.arrays_sha256 = bytes(32)
        n = len(record.rows) // 2
        exact, summed = (contribute(record, here.catalog, None, known, range(n)) for known in (correction, None))
        added, close = added_by(record, n)
        for (ask, i), told in exact.items():
            assert all(each.learned for each in told)
            for contributions in (told, summed[ask, i]):
                assert abs(sum(each.log_odds for each in contributions) - added[ask, i]) < close[ask, i]
            n_told += 1
    assert n_told > 1_000


def added_by(record: DecisionRecord, n: int) -> tuple[Doubles, Doubles]:
    """Return logit(propensity) - prior of each placement and survivor, and how closely a record tells it."""
    shape = (len(DecideRequest.FromString(record.request).placements), n)
    priors = np.frombuffer(record.prior_log_odds, np.float32).astype(np.float64).reshape(shape)
    propensities = np.frombuffer(record.propensities, np.float32).astype(np.float64).reshape(shape)
    # A recorded propensity is a float32: half a step of it is so much in log-odds.
    return np.log(propensities / (1.0 - propensities)) - priors, 1e-6 + 2.0**-24 / (1.0 - propensities)
