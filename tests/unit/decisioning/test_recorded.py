"""A decision of the past is explained by the models it was made with, as far as they can still be had."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from server.catalog.catalog import Catalog
from server.catalog.compile import compile_catalog, serialise
from server.catalog.loading import load_catalog
from server.decisioning import recorded
from server.decisioning.contributions import Corrections
from server.decisioning.live import Live, load_champion, make_live
from server.decisioning.models import Champion, align, no_champion
from server.decisioning.recorded import DecisionReader
from server.registry.blobs import Blobs
from server.storage.memory import MemoryLog
from server.storage.record import Draft
from tests.support import bundles
from tests.support.deciding import TOKEN_KEY, Desk
from tests.support.populating import Person
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.requests import decide_request
from tsugi.v1.decision_service_pb2 import DecisionView, GetDecisionRequest, Standing

PHONE: Final = {"device": "phone"}
FACTS: Final = {"profile.age", "profile.member", "context.device", "action.price"}


class Bench:
    """A reader over a log in memory and blobs in a folder, with one pushed model in force."""

    def __init__(self, folder: Path) -> None:
        message = load_catalog(bundles.CATALOG)
        self.folder = folder
        self.blobs = Blobs(folder)
        self.blobs.put(serialise(message))
        self.catalog: Catalog = compile_catalog(message)
        self.bundle_sha256 = self.blobs.put(bundles.good_bundle().SerializeToString())
        self.champion = load_champion(self.blobs, self.bundle_sha256, self.catalog)
        self.live: Live | None = self.live_with(self.champion)
        self.log = MemoryLog()
        self.desk = Desk(self.catalog, champion=self.champion)
        self.desk.meet(Person({"age": 70.0, "member": True}, {"email": "a@b.example"}))
        self.reader = DecisionReader(
            log=self.log,
            store=self.desk.store,
            token_key=TOKEN_KEY,
            blobs=self.blobs,
            live=lambda: self.live,
            corrections=Corrections(),
        )

    def live_with(self, champion: Champion, challenger: Champion | None = None) -> Live:
        models = align(self.catalog, champion, None)
        return make_live(self.catalog, models, 1, 1, "tests", challenger=challenger)

    def decide(self, decision_id: str = "d", *, is_challenged: bool = False) -> str:
        """Record a decision about somebody, and return its id."""
        request = decide_request({"home": 1}, identities=[("email", "a@b.example")], context=PHONE)
        answer = self.desk.ask(request, decision_id=decision_id)
        record = DecisionRecord.FromString(answer.record.SerializeToString())
        if is_challenged:
            record.provenance.challenger_sha256 = record.provenance.champion_sha256
            record.provenance.champion_sha256 = b""
        draft = Draft(RecordKind.RECORD_KIND_DECISION, record.SerializeToString(), record.decision_key)
        self.log.append([draft], 0)
        return answer.reply.decision_id

    def standing(self, decision_id: str) -> Standing:
        """Explain a decision, and return how its only action stood."""
        request = GetDecisionRequest(decision_id=decision_id, view=DecisionView.DECISION_VIEW_EXPLAINED)
        explanation = asyncio.run(self.reader.get(request)).explanation
        return explanation.candidates[0].standings[0]

    def facts(self, decision_id: str) -> set[str]:
        return {each.feature for each in self.standing(decision_id).contributions}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "registry")


@pytest.mark.parametrize("is_challenged", [False, True])
def test_model_in_force_tells_of_the_prior_without_being_loaded(bench: Bench, is_challenged: bool) -> None:
    decision_id = bench.decide(is_challenged=is_challenged)
    if is_challenged:
        bench.live = bench.live_with(no_champion(bench.catalog), bench.champion)
    for path in bench.folder.iterdir():
        path.unlink()
    assert bench.facts(decision_id) == FACTS


@pytest.mark.parametrize("is_challenged", [False, True])
def test_former_model_is_loaded_once_and_tells_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_challenged: bool
) -> None:
    decision_id = bench.decide(is_challenged=is_challenged)
    wanted = bench.standing(decision_id)
    bench.live = bench.live_with(no_champion(bench.catalog))
    loaded: list[bytes] = []

    def load(blobs: Blobs, sha256: bytes, catalog: Catalog) -> Champion:
        loaded.append(sha256)
        return load_champion(blobs, sha256, catalog)

    monkeypatch.setattr(recorded, "load_champion", load)
    for _ in range(2):
        assert bench.standing(decision_id) == wanted
    assert loaded == [bench.bundle_sha256]
    bench.live = None
    assert bench.standing(decision_id) == wanted, "the catalog is a former one too"


def test_explanation_comes_without_a_model_that_is_gone(bench: Bench) -> None:
    decision_id = bench.decide()
    bench.live = bench.live_with(no_champion(bench.catalog))
    (bench.folder / bench.bundle_sha256.hex()).unlink()
    standing = bench.standing(decision_id)
    assert standing.priority > 0.0
    assert not standing.contributions


def test_few_former_models_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []

    def load(_blobs: Blobs, sha256: bytes, _catalog: Catalog) -> Champion:
        loaded.append(sha256)
        return replace(bench.champion, sha256=sha256)

    monkeypatch.setattr(recorded, "load_champion", load)
    bench.live = bench.live_with(no_champion(bench.catalog))
    ids = []
    for number in range(recorded.CHAMPIONS_KEPT + 1):
        champion = replace(bench.champion, sha256=bytes([number]) * 32)
        bench.desk.live = bench.live_with(champion)
        ids.append(bench.decide(str(number)))
    for decision_id in (*ids, *ids[1:], ids[0]):
        bench.standing(decision_id)
    assert [sha256[0] for sha256 in loaded] == [0, 1, 2, 3, 4, 0]
