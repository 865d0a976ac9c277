"""What a running server says about who is who is what the projector says in this process."""

from __future__ import annotations

import pytest

from tests.benchmark import people
from tests.benchmark.identity import quality
from tests.benchmark.resolution import resolve, resolve_served


@pytest.mark.slow
def test_records_sent_one_at_a_time_fall_into_the_same_people_over_the_network() -> None:
    written = people.write_down(60, seed=1)
    records, truths = [one.texts for one in written], [one.person for one in written]
    served = resolve_served(people.MEANINGS, records, 1, "AU")
    assert served.n_refused == 0
    assert quality(served.profile_ids, resolve(people.MEANINGS, records, 2, "AU").profile_ids).f1 == 1.0
    assert quality(served.profile_ids, truths).precision >= 0.98
