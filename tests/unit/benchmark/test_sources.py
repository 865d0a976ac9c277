"""The invented sources say what their catalog lets them say."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from pathlib import Path

from server.catalog.compile import compile_catalog
from server.importing import checking, mapping
from tests.benchmark import sources
from tests.support.people import People
from tsugi.v1.profile_service_pb2 import IngestRecordsRequest


def test_a_server_can_apply_every_record_and_finds_the_same_people_in_different_sources() -> None:
    people = People(compile_catalog(sources.catalog_message()))
    said = list(sources.records(300, 40, seed=1))
    people.say(*said)
    people.project()
    identities = {(each.namespace, each.value) for one in said for each in one.identities}
    assert {pair for group in people.groups() for pair in group} == identities
    together = [{namespace for namespace, _ in group} for group in people.groups()]
    assert any({"customer_number", "loyalty_number"} <= namespaces for namespaces in together), "by attributes alone"
    assert any({"customer_number", "browser_id"} <= namespaces for namespaces in together), "by a shared record"


def test_sources_speak_in_the_stated_shares() -> None:
    counts = Counter(one.source for one in sources.records(4_000, 100, seed=2))
    assert 0.55 < counts[sources.SHOP] / 4_000 < 0.65
    assert 0.12 < counts[sources.LOYALTY] / 4_000 < 0.18


def test_every_record_of_every_seed_has_an_id_of_its_own() -> None:
    messages = itertools.chain(sources.messages(600, 50, seed=1), sources.messages(600, 50, seed=2))
    batches = [IngestRecordsRequest.FromString(message).records for message in messages]
    assert [len(batch) for batch in batches] == [500, 100, 500, 100]
    assert len({one.record_id for batch in batches for one in batch}) == 1_200


def test_the_file_fits_its_mapping_and_the_catalog(tmp_path: Path) -> None:
    sources.write_csv(tmp_path / "rows.csv", 50, seed=1)
    sources.write_mapping(tmp_path / "mapping.yaml")
    plan = mapping.load_mapping((tmp_path / "mapping.yaml").read_text())
    checking.check_mapping(plan, sources.catalog_message(), sources.CUSTOMERS)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["number"] for row in rows}) == 50
