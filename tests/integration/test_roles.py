"""Process roles that die, hang or lose their supervisor; and what a running server shows of itself."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Final

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from server import telemetry
from server.__main__ import main
from server.control import ControlPage
from server.files import Files
from server.rpc.methods import SERVICES
from tests.support import catalogs
from tests.support.running import Server, serving, told, until
from tsugi.client import CallError, Client, source_record
from tsugi.log.v1.learner_pb2 import LearnerArrays
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.learner_pb2 import GoalLearners, Learner, LearnerChange, LearnerChangeKind
from tsugi.v1.model_pb2 import LearnerRole, ModelRole

pytestmark = pytest.mark.slow

REPLACED_S_MAX: Final = 60.0  # promised within 5 s; machines that run tests are busy with others
ORPHANS_S_MAX: Final = 20.0  # promised within 2 s
GREEDY: Final = {"greedy": 1}
# Of goals that a learner process has met, of placements after some seconds, and of alarms.
TOLD_WHEN_THERE_IS_SOMETHING: Final = {
    "tsugi_learner_loss", "tsugi_learner_serving", "tsugi_learner_family", "tsugi_learner_changes",
    "tsugi_learner_calibration", "tsugi_choice_entropy", "tsugi_alarms",
}  # fmt: skip


@pytest.fixture(scope="module")
def metrics_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), serve_metrics_port=metrics_port) as server:
        with server.client() as client:
            client.push_catalog(catalogs.message())
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


def is_replaced(server: Server, role: str, pid: int) -> bool:
    return server.roles().get(role, pid) != pid


def replace(server: Server, role: str, number: signal.Signals) -> None:
    """Signal a role and wait until another process has taken its place, while the other worker answers every call."""
    other = "worker-1" if role == "worker-0" else "worker-0"
    pid = server.roles()[role]
    with server.client_on(other) as client:
        os.kill(pid, number)

        def is_done() -> bool:
            assert client.decide(GREEDY).slots
            return is_replaced(server, role, pid)

        until(is_done, f"{role} is replaced", REPLACED_S_MAX)


@pytest.mark.parametrize("role", ["worker-0", "worker-1"])
def test_killed_worker_is_replaced_while_the_other_answers(server: Server, role: str) -> None:
    replace(server, role, signal.SIGKILL)
    until(lambda: server.has_listening(role), f"{role} takes calls again", REPLACED_S_MAX)
    with server.client_on(role) as client:
        assert client.decide(GREEDY, durable=True).lsn


def test_killed_projector_is_replaced_and_catches_up(server: Server) -> None:
    replace(server, "projector", signal.SIGKILL)
    with server.client() as client:
        assert sees_what_it_wrote(client, "after a kill")


def test_worker_that_hangs_is_killed_and_replaced(server: Server) -> None:
    replace(server, "worker-0", signal.SIGSTOP)
    assert any(entry["name"] == "worker-0" for entry in server.events("role_silent"))
    until(lambda: server.has_listening("worker-0"), "it takes calls again", REPLACED_S_MAX)


def test_projector_that_hangs_is_told_of_killed_and_replaced(server: Server) -> None:
    pid = server.roles()["projector"]
    os.kill(pid, signal.SIGSTOP)
    with server.client() as client:
        lsn = client.ingest_records([source_record("hang", "crm", {"customer_number": "hang"})]).lsn
        reply = client.decide(GREEDY, identities={"customer_number": "hang"}, at_least_lsn=lsn)
        assert Degradation.DEGRADATION_PROFILE_STALE in reply.degradations
        until(lambda: is_replaced(server, "projector", pid), "it is replaced", REPLACED_S_MAX)
        assert any(entry["name"] == "projector" for entry in server.events("role_silent"))
        assert sees_what_it_wrote(client, "after a hang")


def sees_what_it_wrote(client: Client, person: str) -> bool:
    """Say whether what is ingested now is projected, sooner or later."""
    lsn = client.ingest_records([source_record(person, "crm", {"customer_number": person})]).lsn

    def is_there() -> bool:
        return client.get_profile(identity=("customer_number", person), at_least_lsn=lsn).applied_lsn >= lsn

    def is_there_or_unknown() -> bool:
        try:
            return is_there()
        except CallError as error:
            assert error.reason in {"ERROR_REASON_STATE_BEHIND", "ERROR_REASON_RESOURCE_NOT_FOUND"}
            return False

    until(is_there_or_unknown, "the profile is projected", REPLACED_S_MAX)
    return True


def test_every_role_beats(server: Server) -> None:
    page = ControlPage(Files.below(server.data).control)
    for slot in range(3):  # two workers and the projector
        beaten = last_beat(page, slot)
        until(lambda slot=slot, beaten=beaten: last_beat(page, slot) > beaten + 0.1, f"slot {slot} beats again")  # type: ignore[misc]  # bound now


def last_beat(page: ControlPage, slot: int) -> float:
    """Return when a role beat last, in seconds of the monotonic clock."""
    assert page.silent_s(slot) > 0.0, "it beats before it says that it is ready"
    return time.monotonic() - page.silent_s(slot)


def test_health_knows_every_service_and_no_other(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", *(service.full_name for service in SERVICES)):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            health.Check(health_pb2.HealthCheckRequest(service="tsugi.v1.Nothing"), timeout=30)
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_and_describes_them(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {service.full_name for service in SERVICES} | {
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        } == set(database.get_services())
        described = database.FindFileContainingSymbol("tsugi.v1.DecisionService")
        assert described.service[0].method[0].name == "Decide"


def test_kill_switch_reaches_every_worker_and_is_undone(server: Server) -> None:
    def told(client: Client) -> str:
        reply = client.decide(GREEDY, preview=True)
        names = [use.revision for use in reply.model_revisions if use.role == ModelRole.MODEL_ROLE_LEARNER]
        is_missed = Degradation.DEGRADATION_LEARNER_STALE in reply.degradations
        assert is_missed == (names != ["baseline"]), "nobody misses a learner that is switched off"
        return names[0] if names else ""

    with server.client_on("worker-0") as one, server.client_on("worker-1") as other:
        assert told(one) == told(other) == ""
        run(server, "kill-switch", "on", "--request-id", "kill")
        assert told(one) == told(other) == "baseline", "both serve it when the call returns"
        assert {client.list_learners().in_force for client in (one, other)} == {"baseline"}
        decision_id = one.decide({"thompson": 1}, durable=True).decision_id
        (use,) = other.get_decision(decision_id).model_revisions
        assert use.revision == "baseline"
        assert other.rollback_model(role=ModelRole.MODEL_ROLE_LEARNER).revision == "fleet"
        assert told(one) == told(other) == ""
        assert '"duplicate": true' in run(server, "kill-switch", "on", "--request-id", "kill")
        assert told(one) == told(other) == ""


def test_workers_tell_of_the_learners_what_was_published_last(server: Server) -> None:
    assert "No learner has told anything yet." in run(server, "learners")
    told = GoalLearners(
        goal="click", rows=1_234, promotions=1,
        learners=[
            Learner(roles=[LearnerRole.LEARNER_ROLE_BASELINE], family="baseline", rows=1_234, mean_loss=0.5),
            Learner(number=2, roles=[LearnerRole.LEARNER_ROLE_SERVING], family="logistic", settings="rate=0.5"),
        ],
        changes=[LearnerChange(kind=LearnerChangeKind.LEARNER_CHANGE_KIND_PROMOTED, number=2, lead=0.25)],
    )  # fmt: skip
    arrays = LearnerArrays(format_version=1, learned_lsn=9, learned_time_us=1, learners=[told])  # of no epoch
    body = arrays.SerializeToString()
    path = Files.below(server.data).arrays
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_bytes(hashlib.sha256(body).digest() + body)
    path.with_suffix(".new").replace(path)
    for worker in ("worker-0", "worker-1"):
        with server.client_on(worker) as client:
            until(lambda client=client: client.list_learners().learned_lsn == 9, "the worker holds it")  # type: ignore[misc]  # bound now
            assert list(client.list_learners("click").goals) == [told]
    shown = run(server, "learners")
    for part in ("click: 1,234 rows", "logistic", "rate=0.5", "serving", "promoted", "0.2500 ± ?"):
        assert part in shown, part
    assert run(server, "learners", "--field", "goals.0.learners.1.settings") == "rate=0.5\n"


def test_reset_is_recorded_once_and_projected_over(server: Server) -> None:
    first, again = (
        json.loads(run(server, "reset-learner", "all", "--goal", "click", "--request-id", "r")) for _ in "12"
    )
    assert first["lsn"] == again["lsn"]
    assert again["duplicate"]
    with server.client() as client:
        assert client.list_learners().reset_etag == first["etag"]
        assert sees_what_it_wrote(client, "after a reset")


def run(server: Server, *arguments: str) -> str:
    """Run a caller's command that succeeds, and return what it prints."""
    ended = CliRunner(env={"TSUGI_ADDRESS": server.address}).invoke(main, list(arguments))
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_metrics_endpoint_tells_every_metric(server: Server, metrics_port: int) -> None:
    with server.client() as client:
        # What has labels is not there before the first of it happened.
        client.decide(GREEDY, durable=True)
        client.ingest_records([source_record("counted", "crm", {"customer_number": "counted"})])
        with pytest.raises(CallError):
            client.decide({"nowhere": 1})
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as page:
        families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
    listed = [each for each in vars(telemetry).values() if isinstance(each, MetricWrapperBase)]
    texts = {metric.name: metric.documentation for each in listed for metric in each.describe()}
    assert set(texts) >= TOLD_WHEN_THERE_IS_SOMETHING
    texts = {name: text for name, text in texts.items() if name not in TOLD_WHEN_THERE_IS_SOMETHING}
    assert {"tsugi_decisions", "tsugi_applied_lsn", "tsugi_log_map_used_share"} <= set(texts)
    for name, text in texts.items():
        assert families[name].samples, name
        assert families[name].documentation == text
    starts = {sample.labels["role"] for sample in families["tsugi_role_starts"].samples}
    assert {"worker-0", "worker-1", "projector"} <= starts
    lags = [each.value for each in families["tsugi_learning_lag_seconds"].samples if each.name.endswith("_count")]
    assert lags == [0.0], "there is no learner whose lag could be measured"


def test_roles_end_soon_after_their_supervisor_was_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("orphaned"), serve_reflection=False) as server:
        with server.client() as client, grpc.insecure_channel(server.address) as channel:
            client.push_catalog(catalogs.message())
            replies = {str(i): client.decide({"epsilon_greedy": 2}, request_id=str(i)) for i in range(20)}
            with pytest.raises(grpc.RpcError) as refusal:
                ProtoReflectionDescriptorDatabase(channel).get_services()
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
            # Both connections stay open, and their age is far away.
            server.kill()
            until(lambda: not server.processes(), "no role is left", ORPHANS_S_MAX)
        server.start()
        with server.client() as client:
            for request_id, reply in replies.items():
                assert client.decide({"epsilon_greedy": 2}, request_id=request_id) == reply
