"""Batch matching: weights that are true of the people they were trained on, and proposals nobody has settled yet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from server.catalog.compile import compile_catalog
from server.catalog.profile_terms import ProfileTerms
from server.decisioning.live import CATALOG_HEAD
from server.files import Files
from server.profiles import ladders, matching
from server.profiles.comparables import BIRTH, GIVEN, MEANINGS
from server.registry.blobs import Blobs
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.record import Draft
from tests.benchmark import people
from tests.benchmark.identity import quality
from tests.benchmark.people import Written
from tests.support import catalogs
from tests.support.histories import START_US
from tests.support.people import People
from training.link import Known, Proposal, catalog_fragment, link_command, proposals_of, read_known, weights_of
from training.linkage import BITS_BEYOND_MAX, Level, Linkage, bits_of
from tsugi.log.v1.record_pb2 import CatalogChange, RecordKind
from tsugi.requests import source_record
from tsugi.v1.catalog_pb2 import Catalog as CatalogMessage
from tsugi.v1.catalog_pb2 import Meaning
from tsugi.v1.identity_pb2 import Identity

pytestmark = pytest.mark.slow  # hundreds of people are projected

N_PEOPLE, SEED = 250, 3
PAIRS = 10_000  # of strangers, which is enough to tell a ladder's ends apart
MAP_BYTES = 1 << 24
LADDER = ladders.levels(MEANINGS[GIVEN])


class Trained(NamedTuple):
    """What came of training on some people."""

    known: Known
    weights: dict[str, list[float]]
    proposals: list[Proposal]


def message(weights: Mapping[str, Sequence[float]] | None = None, **parts: object) -> CatalogMessage:
    return catalogs.message(
        **{
            "identityNamespaces": [{"name": "record_number"}],
            "profileAttributes": [
                {"name": name, "type": "ATTRIBUTE_TYPE_TEXT", "meaning": Meaning.Name(meaning)}
                for name, meaning in people.MEANINGS
            ],
            **catalog_fragment(weights or {}),
            **parts,
        }
    )


@cache
def written() -> list[Written]:
    return people.write_down(N_PEOPLE, seed=SEED)


def world_of(rows: Sequence[int], weights: Mapping[str, Sequence[float]] | None = None) -> People:
    """Return a world in which the records came in an order, one identity each."""
    world = People(compile_catalog(message(weights)))
    for row in rows:
        world.say(source_record(f"r{row}", "crm", {"record_number": str(row)}, attributes=dict(written()[row].texts)))
    world.project()
    return world


@cache
def known_world() -> People:
    return world_of(range(len(written())))


def trained_on(known: Known, terms: ProfileTerms, seed: int = SEED) -> Trained:
    linkage = Linkage(known.parts, matching.fields_of(terms), seed)
    weights = weights_of(terms, linkage.train(strangers_pairs_max=PAIRS))
    fields = matching.match_fields([(each.name, each.meaning) for each in terms.attributes], weights)
    pairs = linkage.predict(fields, terms.matching.review_weight_min)
    linkage.close()
    return Trained(known, weights, proposals_of(known, pairs, fields, terms.matching.review_weight_min))


@cache
def trained() -> Trained:
    terms = known_world().catalog.profiles
    return trained_on(read_known(known_world().store, terms), terms)


def f1(world: People) -> float:
    found = [world.key_of("record_number", str(row)) for row in range(len(written()))]
    return quality(found, [one.person for one in written()]).f1


def parts_of(found: Trained) -> list[tuple[str, str, float]]:
    return [(each.one.identity.value, each.other.identity.value, each.weight) for each in found.proposals]


# Weights.


def test_every_attribute_is_trained_and_weighs_less_the_less_it_agrees() -> None:
    assert list(trained().weights) == [name for name, _ in people.MEANINGS]
    for (name, meaning), bits in zip(people.MEANINGS, trained().weights.values(), strict=True):
        ladder = ladders.levels(meaning)
        assert len(bits) == len(ladder), name
        assert bits == sorted(bits, reverse=True), name
        assert bits[0] > 0.0 > bits[-1], name
        assert round(ladder[-1].bits, 2) <= bits[-1], name
        assert bits[0] <= round(ladder[0].bits + BITS_BEYOND_MAX, 2), name


def test_shares_of_agreement_come_out_as_they_are_among_pairs_whose_truth_is_known() -> None:
    terms = known_world().catalog.profiles
    linkage = Linkage(trained().known.parts, matching.fields_of(terms), SEED)
    shares = linkage.train(strangers_pairs_max=PAIRS)
    linkage.close()
    for i, name in ((GIVEN, "given"), (BIRTH, "born")):
        same = [
            one.texts[name] == other.texts[name]
            for one, other in itertools.combinations(written(), 2)
            if one.person == other.person and name in one.texts and name in other.texts
        ]
        assert abs(shares[i][0].m - sum(same) / len(same)) < 0.08, name


def test_online_matcher_does_as_well_by_trained_weights_as_by_the_built_in_ones() -> None:
    assert f1(world_of(range(len(written())), trained().weights)) >= f1(known_world()) - 0.02


def test_same_people_and_seed_give_the_same_bytes_in_whatever_order_they_came() -> None:
    rows = list(range(len(written())))
    random.Random(1).shuffle(rows)
    world = world_of(rows)
    again = trained_on(read_known(world.store, world.catalog.profiles), world.catalog.profiles)
    texts = []
    for each in (trained(), again):
        text = StringIO()
        YAML().dump(catalog_fragment(each.weights), text)
        texts.append(text.getvalue())
    assert texts[0] == texts[1]
    assert parts_of(trained()) == parts_of(again)


def test_levels_in_the_wrong_order_weigh_the_same() -> None:
    shares = [Level(one.m, one.u) for one in LADDER]
    shares[1], shares[2] = Level(0.01, 0.01), Level(0.15, 0.001)
    bits = bits_of(LADDER, shares)
    assert bits[1] == bits[2]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("share", [1e-300, 1e-9, 1.0])
def test_weights_are_finite_and_within_bounds_whatever_was_seen(share: float) -> None:
    for m, u in ((share, 1.0), (1.0, share)):
        bits = bits_of(LADDER, [Level(m, u)] * len(LADDER))
        assert all(LADDER[-1].bits - 0.01 <= one <= LADDER[0].bits + BITS_BEYOND_MAX + 0.01 for one in bits)


def test_level_that_nobody_reaches_keeps_the_built_in_bits() -> None:
    row = [level.name for level in ladders.levels(Meaning.MEANING_CITY)].index("part")
    assert trained().weights["city"][row] == round(ladders.levels(Meaning.MEANING_CITY)[row].bits, 2)


def test_too_few_people_leave_the_weights_as_they_are() -> None:
    own = {"city": [3.0, 2.0, 1.0, -1.0]}
    world = world_of(range(20), own)
    terms = world.catalog.profiles
    assert trained_on(read_known(world.store, terms), terms).weights == own


# Proposals.


def test_proposals_are_of_two_profiles_heavy_enough_and_the_heaviest_come_first() -> None:
    weights = [each.weight for each in trained().proposals]
    assert weights
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] >= known_world().catalog.profiles.matching.review_weight_min
    people_met = [frozenset((each.one.profile_key, each.other.profile_key)) for each in trained().proposals]
    assert all(len(each) == 2 for each in people_met)
    assert len(set(people_met)) == len(people_met), "one for two people"


def test_who_was_said_to_be_two_people_is_not_proposed() -> None:
    world = world_of(range(len(written())))
    first = trained().proposals[0]
    world.history.link(_named(first.one.identity), _named(first.other.identity), "DIFFERENT")
    world.project()
    again = trained_on(read_known(world.store, world.catalog.profiles), world.catalog.profiles)
    assert parts_of(again) == parts_of(trained())[1:]


def test_what_waits_with_as_much_weight_is_not_proposed_again() -> None:
    known, terms = trained().known, known_world().catalog.profiles
    first = trained().proposals[0]
    waiting = {(first.one.key, first.other.key): first.weight}
    again = trained_on(known._replace(waiting=known.waiting | waiting), terms)
    assert parts_of(again) == parts_of(trained())[1:]


def test_request_id_is_that_of_the_pair_and_its_weight() -> None:
    first = trained().proposals[0]
    assert first.request_id == Proposal(*first).request_id
    assert first.request_id != first._replace(weight=first.weight + 0.001).request_id
    assert len(first.request_id) <= 128


def test_split_people_are_not_proposed_to_be_one_again() -> None:
    world = world_of(range(len(written())))
    first = trained().proposals[0]
    world.history.split([_named(first.one.identity)], [_named(first.other.identity)])
    world.project()
    known = read_known(world.store, world.catalog.profiles)
    assert tuple(sorted((first.one.profile_key, first.other.profile_key))) in known.judged


def test_identity_that_links_nobody_is_not_looked_at() -> None:
    world = People(compile_catalog(message(identityNamespaces=[{"name": "order", "linkRule": "LINK_RULE_NEVER"}])))
    for number in ("1", "2"):
        world.say(source_record(number, "crm", {"order": number}, attributes=dict(written()[0].texts)))
    world.project()
    assert read_known(world.store, world.catalog.profiles).parts == []


def _named(identity: Identity) -> tuple[str, str]:
    return identity.namespace, identity.value


# The command.


def data_of(folder: Path, catalog: CatalogMessage | None) -> Path:
    """Make a data directory in which nobody is known, and a catalog is in force or none."""
    files = Files.below(folder)
    files.create()
    log = LmdbLog(files.log, MAP_BYTES)
    LmdbStore(files.state, MAP_BYTES).close()
    if catalog is not None:
        sha256 = Blobs(files.registry).put(catalog.SerializeToString(deterministic=True))
        change = CatalogChange(catalog_sha256=sha256).SerializeToString()
        log.append([Draft(RecordKind.RECORD_KIND_CATALOG_CHANGE, change, head=CATALOG_HEAD)], START_US)
    log.close()
    return folder


def linked(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(link_command, ["--data", str(data), *arguments])


def refusal(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return result.output


def test_folder_that_is_none_of_a_server_is_refused(tmp_path: Path) -> None:
    assert linked(tmp_path / "absent", "--dry-run").exit_code == 2
    assert "is not the data directory of a server that has run" in refusal(linked(tmp_path, "--dry-run"))
    assert list(tmp_path.iterdir()) == [], "nothing is made there"


def test_without_a_catalog_there_is_nothing_to_go_by(tmp_path: Path) -> None:
    assert "no catalog is in force" in refusal(linked(data_of(tmp_path / "data", None), "--dry-run"))


@pytest.mark.parametrize("is_off", [True, False])
def test_catalog_that_does_not_match_is_refused_and_so_is_one_with_nobody_in_it(tmp_path: Path, is_off: bool) -> None:
    data = data_of(tmp_path / "data", message(matching={"off": is_off}))
    why = "matching is off" if is_off else "fewer than two identities"
    assert why in refusal(linked(data, "--dry-run"))


def test_unreachable_server_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.link.CALL_S_MAX", 0.2)
    assert "does not answer" in refusal(linked(tmp_path, "--address", "127.0.0.1:1"))
