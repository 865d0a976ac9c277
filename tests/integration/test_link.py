"""Batch matching against a running server: what it trains can be pushed, and what it proposes waits for a judgement."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from server.catalog.loading import load_catalog
from tests.benchmark import people
from tests.support import catalogs
from tests.support.running import Server, serving, until
from training.__main__ import main
from training.link import STATED_BY
from tsugi.client import Client, source_record
from tsugi.v1.catalog_pb2 import Catalog, Meaning

pytestmark = pytest.mark.slow

N_PEOPLE, SEED = 150, 3
BATCH = 500


def catalog() -> Catalog:
    return catalogs.message(
        identityNamespaces=[{"name": "record_number"}],
        profileAttributes=[
            {"name": name, "type": "ATTRIBUTE_TYPE_TEXT", "meaning": Meaning.Name(meaning)}
            for name, meaning in people.MEANINGS
        ],
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), serve_workers=1) as server:
        with server.client() as client:
            client.push_catalog(catalog())
            records = [
                source_record(f"r{row}", "crm", {"record_number": str(row)}, attributes=dict(one.texts))
                for row, one in enumerate(people.write_down(N_PEOPLE, SEED))
            ]
            for start in range(0, len(records), BATCH):
                lsn = client.ingest_records(records[start : start + BATCH]).lsn
            applied(client, lsn)
        yield server


def applied(client: Client, lsn: int) -> None:
    until(lambda: client.audit_sources(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")


def linked(server: Server, *arguments: str) -> str:
    """Run the command as it is typed; return what it says."""
    told = CliRunner().invoke(
        main, ["link", "--data", str(server.data), "--address", server.address, *arguments], catch_exceptions=False
    )
    assert told.exit_code == 0, told.output
    assert told.stderr == "", "nobody looks at the progress"
    return told.stdout


def standing(client: Client) -> tuple[dict[frozenset[str], float], int]:
    """Return what waits for a judgement, with its weight, and how many links we proposed hold people together."""
    reviews = client.list_match_reviews(page_size=500).reviews
    waiting = {frozenset((each.identity.value, each.other_identity.value)): each.weight for each in reviews}
    profiles = (client.get_profile(identity=("record_number", str(row))).profile for row in range(N_PEOPLE))
    return waiting, sum(link.source == STATED_BY for profile in profiles for link in profile.links)


def count(told: str, before: str) -> int:
    found = re.search(rf"([\d,]+) {before}", told)
    assert found, told
    return int(found[1].replace(",", ""))


def test_proposals_reach_the_server_once_and_trained_weights_are_a_catalog(running: Server, tmp_path: Path) -> None:
    weights = tmp_path / "weights.yaml"
    with running.client() as client:
        told = linked(running, "--dry-run", "--weights", str(weights))
        n_found = count(told, "pairs of people")
        assert n_found > 1
        assert "nothing was proposed" in told
        before = standing(client)

        assert count(linked(running, "--proposals-max", "1"), "of 1 proposed") == 1
        lsn = client.ingest_records([source_record("last", "crm", {"record_number": "last"})]).lsn
        applied(client, lsn)
        assert standing(client) != before, "it waits for a judgement, or is heavy enough to be a link"
        assert count(linked(running), "pairs of people") < n_found, "what was proposed is not proposed again"

        fragment = load_catalog(weights.read_text())
        assert fragment.matching.fields
        whole = catalog()
        whole.matching.CopyFrom(fragment.matching)
        client.push_catalog(whole)
        assert client.get_catalog().catalog.matching == fragment.matching
