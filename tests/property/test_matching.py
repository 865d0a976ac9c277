"""Matching does not depend on what comes first, and made-up people in households are told apart."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.profiles import matching
from server.profiles.matching import blocking_keys, cluster, comparable, explain, match_fields, weight, weight_between
from tests.benchmark import people
from tests.benchmark.identity import measure, quality
from tests.benchmark.identity_sets import DataSet
from tests.benchmark.resolution import resolve
from tests.unit.profiles.test_matching import ATTRIBUTES, FIELDS

WORDS = st.sampled_from(
    ["anna", "ann", "hanna", "berger", "berger-huber", "huber", "anna berger", "j", "李小龙", "x y z"]
)
TEXTS = st.fixed_dictionaries(
    {},
    optional={
        "given": WORDS | st.text(max_size=12),
        "family": WORDS | st.text(max_size=12),
        "full": WORDS | st.text(max_size=20),
        "born": st.dates().map(str) | st.sampled_from(["1980-05-17", "1980-05-18", "1980-01-01", "not a date"]),
        "tax_number": st.sampled_from(["84112377", "84112737", "1"]) | st.text(max_size=9),
        "email": st.sampled_from(["a.b@mail.example", "anna@mail.example", "info@x.example"]) | st.text(max_size=9),
        "phone": st.sampled_from(["+61399990001", "+61299990001", "112"]),
        "mobile": st.sampled_from(["+61399990001", "+61400000007"]),
        "street": st.sampled_from(["12 Mill Lane", "Mill Lane 21", "12", "the street"]) | st.text(max_size=15),
        "postcode": st.sampled_from(["4011", "4101", "SW1A 1AA"]) | st.text(max_size=8),
        "city": st.sampled_from(["Westbrook", "West Brook", "Frankfurt am Main", "Frankfurt"]) | st.text(max_size=9),
        "region": st.sampled_from(["NSW", "NWS", "Q"]),
        "country": st.sampled_from(["AU", "NZ"]),
    },
)  # fmt: skip
PARTS = TEXTS.map(lambda texts: comparable(FIELDS, texts))
OWN = st.dictionaries(
    st.sampled_from([name for name, _ in ATTRIBUTES]), st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=8)
)


@given(PARTS, PARTS, OWN)
def test_weight_is_symmetric_and_explained_in_full(
    one: matching.Comparable, other: matching.Comparable, own: dict[str, list[float]]
) -> None:
    fields = match_fields(ATTRIBUTES, own)
    bits = weight(fields, one, other)
    assert bits == weight(fields, other, one) == weight_between(fields, [one], [other])
    assert sum(each.bits for each in explain(fields, one, other)) == pytest.approx(bits, abs=1e-9)


@given(PARTS)
def test_a_part_agrees_with_itself_and_shares_its_blocks(one: matching.Comparable) -> None:
    assert weight(FIELDS, one, one) >= 0.0
    keys = blocking_keys(FIELDS, one)
    assert len(set(keys)) == len(keys)
    assert all(len(key) == matching.BLOCK_KEY_BYTES for key in keys)


@given(st.lists(PARTS, min_size=2, max_size=6), st.integers(1, 5), st.randoms())
def test_weight_between_people_depends_on_no_order(
    parts: list[matching.Comparable], cut: int, rng: random.Random
) -> None:
    cut = min(cut, len(parts) - 1)
    ones, others = parts[:cut], parts[cut:]
    bits = weight_between(FIELDS, ones, others)
    rng.shuffle(ones)
    rng.shuffle(others)
    assert weight_between(FIELDS, others, ones) == bits
    assert weight_between(FIELDS, matching.together(ones), matching.together(others)) == bits
    assert matching.together([*matching.together(ones[:1]), *ones[1:]]) == matching.together(ones)


EDGES = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(12, 20).map(float)).filter(
        lambda edge: edge[0] != edge[1]
    ),
    max_size=20,
    unique_by=lambda edge: (min(edge[:2]), max(edge[:2])),
)
PAIR_BITS = st.dictionaries(st.tuples(st.integers(0, 7), st.integers(0, 7)), st.integers(-5, 20).map(float))


@given(EDGES, PAIR_BITS, st.randoms())
def test_order_and_direction_of_edges_change_no_cluster(
    edges: list[tuple[int, int, float]], pair_bits: dict[tuple[int, int], float], rng: random.Random
) -> None:
    def between(ones: object, others: object) -> float:
        assert isinstance(ones, list)
        assert isinstance(others, list)
        return min(pair_bits.get((min(i, j), max(i, j)), 12.0) for i in ones for j in others)

    labels = cluster(8, edges, between)
    turned = [(j, i, bits) if rng.random() < 0.5 else (i, j, bits) for i, j, bits in edges]
    rng.shuffle(turned)
    assert cluster(8, turned, between) == labels
    assert all(labels[label] == label <= i for i, label in enumerate(labels))
    for label in set(labels):  # nobody is in a cluster without an edge that leads there
        members = {i for i in range(8) if labels[i] == label}
        reached = {label}
        for _ in members:
            reached |= {end for i, j, _ in edges if {i, j} <= members and {i, j} & reached for end in (i, j)}
        assert reached == members


@given(EDGES)
def test_clusters_that_disagree_as_wholes_stay_apart(edges: list[tuple[int, int, float]]) -> None:
    assert cluster(8, edges, lambda _ones, _others: 9.9, between_min=10.0) == list(range(8))
    joined = cluster(8, edges, lambda _ones, _others: 10.0, between_min=10.0)
    assert all(joined[i] == joined[j] for i, j, _ in edges)


def _made_up(n_people: int, seed: int, *missing: str) -> DataSet:
    written = people.without(people.write_down(n_people, seed), *missing)
    return DataSet("made up", people.MEANINGS, [one.texts for one in written], [one.person for one in written], "AU")


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), ("email", "phone"), ("family",), ("street", "postcode", "city")])
def test_automatic_merges_of_people_in_households_are_right(missing: tuple[str, ...]) -> None:
    figures = measure(_made_up(700, 4, *missing), n_orders=2)
    assert figures["precision"] >= 0.98
    assert figures["f1"] >= 0.8
    assert figures["pair_completeness"] >= 0.93
    assert figures["order_f1_min"] >= 0.99


@pytest.mark.slow
@settings(max_examples=4)
@given(st.integers(0, 2**16))
def test_order_of_arrival_changes_nothing_while_blocks_are_small(seed: int) -> None:
    data = _made_up(60, seed)
    first, second = (resolve(data.attributes, data.records, order, data.country_code) for order in (1, 2))
    assert quality(first.profile_ids, second.profile_ids).f1 == 1.0


@given(st.integers(0, 2**16))
@settings(max_examples=10)
def test_blocks_are_those_of_the_texts_alone(seed: int) -> None:
    fields = match_fields(people.MEANINGS, {})
    for one, other in itertools.pairwise(people.write_down(5, seed)):
        shuffled = dict(sorted((one.texts | other.texts).items(), reverse=True))
        keys = blocking_keys(fields, comparable(fields, one.texts | other.texts))
        assert blocking_keys(fields, comparable(fields, shuffled)) == keys
