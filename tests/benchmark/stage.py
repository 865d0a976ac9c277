"""Everything that stands while the benchmark plays: the servers, the world they know, and one caller.

Built once, torn down whole. The server has been taught before anything is measured: catalog and champion pushed over
the API, everybody ingested over the API, and outcomes reported until replies name the learner beside the champion, so
that both scorers are on the path.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from server.catalog.compile import compile_catalog
from tests.benchmark import h2load, machine, world
from tests.benchmark.generator import Generator
from tests.benchmark.servers import Echo, Tsugi
from tsugi.client import Client, outcome
from tsugi.requests import PyValue
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse
from tsugi.v1.model_pb2 import ModelRole

BATCH_RECORDS: Final = 500
TAUGHT_DECISIONS: Final = 500
REPLAYED: Final = 200
WAIT_S_MAX: Final = 60.0
POLL_S: Final = 0.002


class Plan(NamedTuple):
    """How much is done."""

    n_profiles: int
    n_rounds: int
    n_turns_max: int  # rounds that others disturbed are played again, until so many were played
    round_s: float
    open_loop_s: float
    n_lags: int
    with_learner: bool = True
    n_ingested: int = 20_000  # records a round
    n_projected: int = 20_000
    n_probes: int = 200
    n_imported: int = 30_000
    n_crowd: int = 10_000_000


class Stage(NamedTuple):
    """The servers, and what they are asked."""

    plan: Plan
    cores: machine.Cores
    folder: Path  # Tsugi's data directory
    tsugi: Tsugi
    echo: Echo
    same_transport: Echo
    generator: Generator
    client: Client
    messages: list[bytes]  # one Decide for each person
    body: Path  # the one h2load sends: a person with as many eligible actions as most
    reply_bytes: float  # mean, of replies that the real client has read and checked
    eligible: tuple[int, float, int]  # least, median and most actions eligible for a person

    @property
    def server_side(self) -> tuple[int, ...]:
        """Return the processes of ours on the server's core."""
        return self.tsugi.process_id, self.echo.process_id, self.same_transport.process_id

    @property
    def generator_side(self) -> tuple[int, ...]:
        """Return the processes of ours on the generator's core."""
        return os.getpid(), self.generator.process_id, *self.tsugi.background_ids


@contextlib.contextmanager
def stage(plan: Plan, folder: Path, log_path: Path) -> Iterator[Stage]:
    """Start everything, teach the server, and end everything with the block."""
    cores = machine.Cores.choose()
    data = folder / "data"
    with contextlib.ExitStack() as stack:
        tsugi = stack.enter_context(
            Tsugi(data, cores, stack.enter_context(log_path.open("wb")), with_learner=plan.with_learner)
        )
        client = stack.enter_context(Client(f"127.0.0.1:{tsugi.port}", timeout_s=10.0, channels=4))
        os.sched_setaffinity(0, {cores.generator})  # and so for everything that is started from here on
        everybody = world.people(plan.n_profiles)
        teach(client, everybody, with_learner=plan.with_learner)
        messages = world.decide_messages(plan.n_profiles)
        replies = _replay(client, messages, with_learner=plan.with_learner)
        counts = world.eligible_counts(everybody)
        body, reply = folder / "request", folder / "reply"
        usual = min(range(len(counts)), key=lambda i: abs(counts[i] - statistics.median(counts)))
        h2load.write_body(body, world.decide_message(usual))
        reply.write_bytes(replies[0].SerializeToString())
        yield Stage(
            plan=plan,
            cores=cores,
            folder=data,
            tsugi=tsugi,
            echo=stack.enter_context(Echo(reply, cores, same_transport=False)),
            same_transport=stack.enter_context(Echo(reply, cores, same_transport=True)),
            generator=stack.enter_context(Generator(cores.generator)),
            client=client,
            messages=messages,
            body=body,
            reply_bytes=statistics.mean(each.ByteSize() for each in replies),
            eligible=(min(counts), statistics.median(counts), max(counts)),
        )


def covers(reply: DecideResponse, lsn: int) -> bool:
    """Say whether a decision was made with a learner that had learned from this log record."""
    return any(use.role == ModelRole.MODEL_ROLE_LEARNER and use.learned_lsn >= lsn for use in reply.model_revisions)


def await_true(is_true: Callable[[], bool], what: str) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: it did not become true in time.
    """
    give_up = time.monotonic() + WAIT_S_MAX
    while not is_true():
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {WAIT_S_MAX:.0f} s for {what}")
        time.sleep(POLL_S)


def preview(client: Client, at_least_lsn: int = 0, *, wait_for_learning: bool = False) -> DecideResponse:
    """Ask for a decision that leaves no trace, to see with what decisions are made now."""
    return client.decide(
        [(world.PLACEMENT, 1)],
        identities=[(world.NAMESPACE, world.account(0))],
        preview=True,
        at_least_lsn=at_least_lsn,
        wait_for_learning=wait_for_learning,
    )


def teach(client: Client, everybody: list[dict[str, PyValue]], *, with_learner: bool) -> None:
    """Tell a server catalog, champion and people, and let its learner learn something, where there is one."""
    message = world.catalog_message()
    client.push_catalog(message)
    bundle = world.make_bundle(compile_catalog(message)).SerializeToString(deterministic=True)
    pushed = client.push_model(bundle, "benchmark")
    lsn = client.assign_model_role(pushed.model_revision.revision).lsn
    records = world.source_records(everybody)
    while batch := list(itertools.islice(records, BATCH_RECORDS)):
        answer = client.ingest_records(batch)
        refused = [result.error.message for result in answer.results if result.HasField("error")]
        if refused:
            raise RuntimeError(f"{len(refused)} source records were refused, the first: {refused[0]}")
        lsn = answer.lsn
    stale = Degradation.DEGRADATION_PROFILE_STALE
    await_true(lambda: stale not in preview(client, lsn).degradations, "the projector to take everybody in")
    if not with_learner:
        return
    decisions = [
        client.decide([(world.PLACEMENT, 1)], identities=[(world.NAMESPACE, world.account(i % len(everybody)))])
        for i in range(TAUGHT_DECISIONS)
    ]
    reports = [
        outcome(decision.decision_id, decision.slots[0].action, "taught", world.OUTCOME) for decision in decisions
    ]
    lsn = client.batch_report_outcomes(reports).results[-1].accepted.lsn
    await_true(lambda: covers(preview(client), lsn), "the learner to publish what it learned")


def _replay(client: Client, messages: list[bytes], *, with_learner: bool) -> list[DecideResponse]:
    """Send a sample with the real client and look at every reply: what h2load cannot do."""
    replies = []
    for message in messages[:REPLAYED]:
        request = DecideRequest.FromString(message)
        reply = client.decide(
            [(each.placement, each.count) for each in request.placements],
            identities=[(each.namespace, each.value) for each in request.identities],
            context={name: getattr(value, str(value.WhichOneof("kind"))) for name, value in request.context.items()},
        )
        roles = {use.role for use in reply.model_revisions}
        wanted = {ModelRole.MODEL_ROLE_CHAMPION} | ({ModelRole.MODEL_ROLE_LEARNER} if with_learner else set())
        troubles = set(reply.degradations) - (set() if with_learner else {Degradation.DEGRADATION_LEARNER_STALE})
        n_filled = sum(bool(slot.action) for slot in reply.slots)
        if roles != wanted or troubles or len(reply.slots) != world.N_SLOTS or n_filled < 2 or not reply.decision_id:
            raise RuntimeError(f"this is not the decision that was to be measured:\n{reply}")
        replies.append(reply)
    return replies
