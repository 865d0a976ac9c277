"""What each fact did to a propensity, asked of the real program: with a pushed model, as it learns, and afterwards."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Final

import pytest
from google.protobuf.duration_pb2 import Duration

from server.catalog.loading import load_catalog
from tests.support import bundles
from tests.support.running import command, environment, serving, until
from tsugi.client import Client, source_record
from tsugi.v1.catalog_pb2 import DELIVERY_STREAM, PARTY_FIRST, Catalog
from tsugi.v1.decision_service_pb2 import Standing

pytestmark = pytest.mark.slow

WHO: Final = {"email": "a@b.example"}
READ: Final = {"profile.age", "profile.member", "context.device", "action.price"}


def catalog() -> Catalog:
    message = load_catalog(bundles.CATALOG)
    message.goals[0].attribution_window.CopyFrom(Duration(seconds=2))
    message.sources.add(name="crm", party=PARTY_FIRST, delivery=DELIVERY_STREAM)
    return message


def decide(client: Client, lsn: int) -> str:
    reply = client.decide({"home": 1}, identities=WHO, context={"device": "phone"}, at_least_lsn=lsn, durable=True)
    return reply.decision_id


def standing(client: Client, decision_id: str) -> Standing:
    """Return how the only action stood."""
    (candidate,) = client.get_decision(decision_id, explained=True).explanation.candidates
    return candidate.standings[0]


def told(stood: Standing, *, learned: bool) -> dict[str, float]:
    return {each.feature: each.log_odds for each in stood.contributions if each.learned == learned}


def log_odds(propensity: float) -> float:
    return math.log(propensity / (1.0 - propensity))


def test_contributions_of_champion_and_learners_last_as_long_as_what_they_come_from(tmp_path: Path) -> None:
    with serving(tmp_path, serve_workers=1, learner_enabled=True) as server:
        with server.client() as client:
            client.push_catalog(catalog())
            revision = client.push_model(bundles.good_bundle().SerializeToString(), "good").model_revision.revision
            lsn = client.assign_model_role(revision).lsn
            record = source_record("r1", "crm", WHO, attributes={"age": 70.0, "member": True})
            lsn = max(lsn, client.ingest_records([record]).lsn)
            until(lambda: client.audit_sources(at_least_lsn=lsn).applied_lsn >= lsn, "the person is known")
            first = decide(client, lsn)
            assert set(told(standing(client, first), learned=False)) == READ

            def learned() -> str:
                """Decide, have it succeed, and return the next decision once something was learned."""
                nonlocal lsn
                lsn = client.report_outcome(decide(client, lsn), "tea", "order", "order").lsn
                decision_id = decide(client, lsn)
                return decision_id if told(standing(client, decision_id), learned=True) else ""

            until(learned, "what was learned adds to the prior")
            second = learned()
            stood = standing(client, second)
            added = log_odds(stood.propensity) - log_odds(stood.prior_propensity)
            exactly = told(stood, learned=True)
            assert set(exactly) <= READ | {"learned for the action"}
            assert "learned for the action" in exactly
            assert sum(exactly.values()) == pytest.approx(added, abs=1e-5)
            of_champion = told(stood, learned=False)
            assert of_champion == told(standing(client, first), learned=False), "the same person, the same model"
            client.assign_model_role("")
            third = decide(client, lsn)
            assert told(standing(client, third), learned=False) == {}, "base rates have no facts"
            assert told(standing(client, second), learned=False) == of_champion, "loaded once more"
            shown = subprocess.run(
                command("get-decision", second, "--explain", "--address", server.address),
                capture_output=True, text=True, check=True, env=environment(server.data, {}),
            )  # fmt: skip
            assert {"feature": "profile.age", "logOdds": of_champion["profile.age"]} in (
                json.loads(shown.stdout)["explanation"]["candidates"][0]["standings"][0]["contributions"]
            )
        server.stop()
        server.start()
        with server.client() as client:
            stood = standing(client, second)
            assert told(stood, learned=False) == of_champion
            assert told(stood, learned=True) in (exactly, {"learned": pytest.approx(added, abs=1e-5)})
