"""What the real program decided is decided again from its directory, to the last bit, whatever changed meanwhile."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from click.testing import CliRunner, Result

from server.files import Files
from server.storage.lmdb_log import LmdbLog
from server.tokens import TokenKey
from tests.property.test_recall import random_request
from tests.support import bundles
from tests.support.catalogs import eventful
from tests.support.damage import MAP_BYTES
from tests.support.running import Server, environment, serving, told, until
from training.replay_decision import newest_decisions, replay_decision_command
from tsugi.client import Client, outcome, source_record
from tsugi.log.v1.bundle_pb2 import Bundle
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1.catalog_pb2 import Catalog
from tsugi.v1.decision_pb2 import ChoiceReason
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse, DecisionAck
from tsugi.v1.model_pb2 import ModelRole

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]
N_ACTIONS: Final = 40
SEEDS: Final = (21, 22, 23)  # of catalogs
ROUNDS: Final = 9  # each over both workers
BATCH: Final = 120
N_DECISIONS: Final = 2 * ROUNDS * BATCH
N_KNOWN: Final = 300
CHAMPION, CHALLENGER, LEARNER = (
    ModelRole.MODEL_ROLE_CHAMPION,
    ModelRole.MODEL_ROLE_CHALLENGER,
    ModelRole.MODEL_ROLE_LEARNER,
)


def catalog(seed: int) -> Catalog:
    """Build a catalog that uses everything, with budgets of its own that last for some of its decisions."""
    message = eventful(seed, N_ACTIONS).message
    for budget in message.budgets:
        budget.name = f"{budget.name}_{seed}"
    message.budgets[0].units_max, message.budgets[0].slack = 3_000, 300
    message.budgets[1].cost_micros_max = 40_000_000
    return message


def bundle(size: int) -> bytes:
    """Build a bundle that reads what all of these catalogs declare."""
    features = [each for each in bundles.FEATURES if each.fact.startswith("profile.")]
    net = bundles.mlp(len(features), (size,))
    made = bundles.bundle(net.model(), features=features, outputs=net.score(bundles.inputs(d=len(features))))
    made.manifest.goal = "click"
    assert isinstance(made, Bundle)
    return made.SerializeToString()


class Traffic:
    """Random decisions and outcomes, while catalogs and roles change."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients
        self._rng = np.random.default_rng(5)
        self._names = tuple(f"action_{i:05d}" for i in range(N_ACTIONS))
        self._strangers = count()
        self._told: list[DecideResponse] = []

    def run(self) -> DecideResponse:
        """Decide for thousands, and return the last reply, which is on disk."""
        first, second = self._clients
        revisions = [first.push_catalog(catalog(SEEDS[0])).revision]
        models = [first.push_model(bundle(size), f"size_{size}").model_revision.revision for size in (8, 5)]
        self._meet(first)
        changes: list[Callable[[], object]] = [
            lambda: first.assign_model_role(models[0]),
            lambda: second.push_catalog(catalog(SEEDS[1])),
            lambda: second.assign_model_role(models[1], role=CHALLENGER),
            lambda: first.push_catalog(catalog(SEEDS[2])),
            lambda: second.assign_model_role(models[1]),
            lambda: first.rollback_catalog(revisions[0]),
            lambda: first.assign_model_role(models[0], role=CHALLENGER),
            lambda: second.push_catalog(catalog(SEEDS[1])),
        ]
        for round_ in range(ROUNDS):
            if round_:
                changes[round_ - 1]()
            for client in self._clients:
                self._decide(client, durable_share=1.0 if round_ == ROUNDS - 1 else 0.2)
            self._report(first, waits=round_ % 3 == 0)
        return self._told[-1]

    def _meet(self, client: Client) -> None:
        rng = self._rng
        records = [
            source_record(
                f"know {i}",
                "crm",
                {"customer_number": f"known {i}"},
                attributes={
                    "age": float(rng.uniform(16, 80)),
                    "member": bool(rng.random() < 0.5),
                    "tier": str(rng.choice(["bronze", "silver", "gold"])),
                },
            )
            for i in range(N_KNOWN)
        ]
        lsn = client.ingest_records(records).lsn
        until(lambda: client.count_people(at_least_lsn=lsn).applied_lsn >= lsn, "they are known")

    def _decide(self, client: Client, durable_share: float) -> None:
        """Decide a batch; what is durable comes after all that its worker was asked before."""
        results = client.batch_decide([self._request(durable_share) for _ in range(BATCH)]).results
        assert all(each.HasField("decision") for each in results), [each.error for each in results][:3]
        self._told = [each.decision for each in results]

    def _request(self, durable_share: float) -> DecideRequest:
        rng = self._rng
        request = random_request(rng, self._names)
        request.profile_id = ""
        if rng.random() < durable_share:
            request.decision_ack = DecisionAck.DECISION_ACK_DURABLE
        known = rng.random() < 0.6
        name = f"known {rng.integers(N_KNOWN)}" if known else f"stranger {next(self._strangers)}"
        request.identities.add(namespace="customer_number", value=name)
        if self._told and rng.random() < 0.05:
            before = self._told[rng.integers(len(self._told))]
            if before.slots[0].action:
                no = outcome(before.decision_id, before.slots[0].action, f"no {rng.integers(10**9)}", "dismiss")
                request.outcomes.append(no)
        return request

    def _report(self, client: Client, *, waits: bool) -> None:
        """Report clicks on what was told last, and maybe wait until they are learned from."""
        said = [(reply, slot.action) for reply in self._told for slot in reply.slots if slot.action]
        clicks = [outcome(reply.decision_id, action, "click", "click") for reply, action in said[:60]]
        results = client.batch_report_outcomes(clicks).results
        lsn = max(each.accepted.lsn for each in results)
        if waits:
            until(lambda: learned_lsn(client) >= lsn, "what was reported is learned from")


def learned_lsn(client: Client) -> int:
    """Return what the arrays in force have learned from."""
    reply = client.decide({"greedy": 1}, preview=True)
    return max((use.learned_lsn for use in reply.model_revisions if use.role == LEARNER), default=0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), learner_enabled=True) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture(scope="module")
def last(running: Server) -> DecideResponse:
    """Have everything decided; return the last reply."""
    with running.client_on("worker-0") as first, running.client_on("worker-1") as second:
        return Traffic([first, second]).run()


def replay(server: Server, *arguments: str) -> Result:
    return CliRunner().invoke(replay_decision_command, ["--data", str(server.data), *arguments])


def test_thousands_of_decisions_are_the_same_to_the_last_bit(server: Server, last: DecideResponse) -> None:
    assert last.lsn
    line = [sys.executable, "-m", "training", "replay-decision", "--data", str(server.data)]
    ended = subprocess.run(
        [*line, "--last", str(N_DECISIONS + 1)],
        capture_output=True, text=True, cwd=ROOT, env=environment(server.data, {}), check=False, timeout=90,
    )  # fmt: skip
    assert ended.stdout == f"{N_DECISIONS:,} decided again, {N_DECISIONS:,} the same to the last bit\n", ended.stderr
    assert ended.returncode == 0
    # They use every capability, or this would show nothing.
    with closing(LmdbLog(Files.below(server.data).log, MAP_BYTES, writable=False)) as log:
        records = [DecisionRecord.FromString(each.payload) for each in newest_decisions(log, N_DECISIONS)]
    assert len({record.provenance.catalog_sha256 for record in records}) == len(SEEDS)
    assert len({record.provenance.champion_sha256 for record in records}) == 3, "none, one and the other"
    assert len({record.provenance.challenger_sha256 for record in records}) == 3
    assert len({record.provenance.arrays_sha256 for record in records}) > 3
    for what in ("assignments", "holdouts", "random_control", "budgets", "exploration_spent", "held_targets",
                 "posterior_means", "other_propensities", "degradations"):  # fmt: skip
        assert sum(bool(getattr(record, what)) for record in records) > N_DECISIONS / 100, what
    filled = [slot for record in records for slot in record.slots if slot.action]
    assert len(filled) > N_DECISIONS
    assert len({slot.choice_reason for slot in filled}) == 3


def test_named_decision_is_told_slot_by_slot(server: Server, last: DecideResponse) -> None:
    ended = replay(server, last.decision_id)
    assert (ended.exit_code, ended.stderr) == (0, "")
    first, *slots, gates, verdict, summary = ended.stdout.splitlines()
    assert first.startswith(f"record {last.lsn}, catalog {last.catalog_revision[:12]}, build ")
    assert len(slots) == len(last.slots)
    for line, slot in zip(slots, last.slots, strict=True):
        reason = ChoiceReason.Name(slot.reasons[0])
        said = f"  {slot.placement}: {slot.action or 'nothing'}, {reason.removeprefix('CHOICE_REASON_')}"
        if slot.action:
            said += (
                f", propensity {slot.propensity:.6f}, priority {slot.priority:.6f},"
                f" selection probability {slot.selection_probability:.6f}"
            )
        assert line == said
    assert re.fullmatch(r"  \d+ passed the gates, \d+ were refused", gates)
    assert verdict == "  the same to the last bit"
    assert summary == "1 decided again, 1 the same to the last bit"


def test_what_was_never_recorded_is_refused_in_a_line(server: Server, last: DecideResponse) -> None:
    assert last.decision_id
    unknown = TokenKey(Files.below(server.data).read_secret()).mint(bytes(16), b"").decode()
    for decision_id, why in ((unknown, "it was not recorded, or is erased"), ("A" * 56, "not issued by")):
        ended = replay(server, decision_id)
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert why in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
    assert replay(server).exit_code == 2
