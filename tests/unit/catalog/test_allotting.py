"""Who is in which branch: shares are kept to the bucket, and only those move who must."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalog.allotting import allot, allot_all, blend_of, bucket_of, with_allotments
from server.catalog.catalog import BUCKETS
from tests.support import catalogs
from tsugi.v1 import catalog_pb2

PEOPLE = [i.to_bytes(16, "big") for i in range(20_000)]

steps = st.lists(st.integers(0, 3_000), min_size=3, max_size=3)


def experiment(shares: dict[str, float], salt: str = "") -> catalog_pb2.Experiment:
    branches = [catalog_pb2.Branch(name=name, share=share) for name, share in shares.items()]
    return catalog_pb2.Experiment(name="trial", salt=salt, branches=branches)


@given(before=steps, after=steps)
def test_as_few_buckets_move_as_can_be(before: list[int], after: list[int]) -> None:
    names = ("one", "two", "three")
    first = allot(experiment({name: n / BUCKETS for name, n in zip(names, before, strict=True)}))
    second = allot(experiment({name: n / BUCKETS for name, n in zip(names, after, strict=True)}), first)
    for allotment, shares in ((first, before), (second, after)):
        counts = Counter(allotment.buckets)
        assert [counts[i] for i in (1, 2, 3)] == shares
    moved = sum(a != b for a, b in zip(first.buckets, second.buckets, strict=True))
    all_before, all_after = [BUCKETS - sum(before), *before], [BUCKETS - sum(after), *after]
    assert moved == sum(max(b - a, 0) for a, b in zip(all_before, all_after, strict=True))


def test_branches_keep_their_people_by_name() -> None:
    first = allot(experiment({"one": 0.2, "two": 0.3}))
    second = allot(experiment({"new": 0.1, "two": 0.3, "one": 0.2}), first)
    of = {name: {b for b, owner in enumerate(a.buckets) if owner and a.branches[owner - 1] == name}
          for a in (first, second) for name in a.branches}  # fmt: skip
    assert {b for b, owner in enumerate(first.buckets) if owner == 1} == of["one"]
    assert {b for b, owner in enumerate(first.buckets) if owner == 2} == of["two"]
    assert len(of["new"]) == BUCKETS / 10


def test_another_salt_draws_other_people() -> None:
    first, second = allot(experiment({"one": 0.5})), allot(experiment({"one": 0.5}, salt="other"))
    assert allot(experiment({"one": 0.5}, salt="other"), first) == second
    both = sum(bool(a) == bool(b) for a, b in zip(first.buckets, second.buckets, strict=True))
    assert 0.47 < both / BUCKETS < 0.53


def test_people_are_spread_by_share_and_stay() -> None:
    catalog = catalogs.compiled(
        experiments=[
            {"name": "one", "branches": [{"name": "a", "share": 0.25}, {"name": "b", "share": 0.25}]},
            {"name": "two", "branches": [{"name": "c", "share": 0.5}]},
        ]
    )
    blends = [blend_of(catalog.experiments, person) for person in PEOPLE]
    assert blends == [blend_of(catalog.experiments, person) for person in PEOPLE]
    counts = Counter(blends)
    # Blends count the first experiment fastest; assignments of the two are independent of each other.
    expected = {0: 0.25, 1: 0.125, 2: 0.125, 3: 0.25, 4: 0.125, 5: 0.125}
    for blend, share in expected.items():
        assert counts[blend] / len(PEOPLE) == pytest.approx(share, abs=0.015)
    assert blend_of(catalog.experiments, b"") == 0, "nobody is in no experiment"
    assert [bool(message) for message in catalog.blends.record_bytes] == [False, *[True] * 5]


def test_recorded_allotments_stand_in_place_of_fresh_ones() -> None:
    message = catalogs.message(experiments=[{"name": "trial", "branches": [{"name": "one", "share": 0.1}]}])
    before = allot_all(message, [])
    message.experiments[0].branches[0].share = 0.3
    grown = allot_all(message, before)
    message.experiments[0].branches[0].share = 0.1
    back = allot_all(message, grown)
    catalog = catalogs.compiled(experiments=[{"name": "trial", "branches": [{"name": "one", "share": 0.1}]}])
    assert catalog.experiments[0].buckets == before[0].buckets
    assert with_allotments(catalog, back).experiments[0].buckets == back[0].buckets
    assert with_allotments(catalog, []) is catalog
    # Whoever was in it all the time is still, whatever the way there and back.
    stayed = sum(a == b == 1 for a, b in zip(grown[0].buckets, back[0].buckets, strict=True))
    assert stayed == BUCKETS / 10


def test_buckets_are_used_evenly() -> None:
    counts = Counter(bucket_of("salt", person) for person in PEOPLE)
    assert max(counts) < BUCKETS
    assert len(counts) > 8_000  # of 20,000 people in 10,000 buckets about 8,650 are met


def test_last_role_stated_is_the_one() -> None:
    roles = ["MODEL_ROLE_CHALLENGER", "MODEL_ROLE_CHAMPION", "MODEL_ROLE_UNSPECIFIED"]
    experiments = [
        {"name": f"e{i}", "branches": [{"name": "all", "share": 1.0, "modelRole": role}]}
        for i, role in enumerate(roles)
    ]
    # Of each blend the bits say which experiments it is in.
    assert catalogs.compiled(experiments=experiments).blends.challenged == (
        False, True, False, False, False, True, False, False,
    )  # fmt: skip
