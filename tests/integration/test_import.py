"""tsugi import as a program: killed in the middle and started again, corrected rejects, three sources and one person.

Where the moment of a kill matters, the server is a scripted one on loopback; else it is the real one.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from server.__main__ import main
from server.importing import sending
from tests.support.running import WAIT_S_MAX, command, environment, serving, until
from tests.unit.importing.support import BY_LINE, EXAMPLE, MAPPING, Kept, catalog, shop_catalog
from tsugi.client import CallError
from tsugi.v1 import catalog_service_pb2, profile_service_pb2

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
N_ROWS = 6_000


class Scripted:
    """Answers as Kept does, and holds the n-th call back, after its records are on disk, until it is let go.

    Args:
        held_call: its number, from 0; -1: none.
        down_from: the first call that finds no server.
    """

    def __init__(self, held_call: int, down_from: int) -> None:
        self.kept = Kept()
        self.is_held = threading.Event()
        self.let_go = threading.Event()
        self._held_call = held_call
        self._down_from = down_from
        self._n_calls = 0
        self._lock = threading.Lock()

    def ingest_records(
        self, request: profile_service_pb2.IngestRecordsRequest, context: grpc.ServicerContext
    ) -> profile_service_pb2.IngestRecordsResponse:
        with self._lock:
            number, self._n_calls = self._n_calls, self._n_calls + 1
        if number >= self._down_from:
            context.abort(grpc.StatusCode.UNAVAILABLE, "nobody there")
        response = self.kept.ingest_records(request.records, timeout_s=0.0)
        if number == self._held_call:
            self.is_held.set()
            self.let_go.wait(WAIT_S_MAX)
        return response

    def get_catalog(
        self, request: catalog_service_pb2.GetCatalogRequest, context: grpc.ServicerContext
    ) -> catalog_service_pb2.GetCatalogResponse:
        return catalog_service_pb2.GetCatalogResponse(catalog=catalog())


@contextmanager
def scripted(held_call: int = -1, down_from: int = N_ROWS) -> Iterator[tuple[Scripted, str]]:
    server = grpc.server(ThreadPoolExecutor(8))
    servicer = Scripted(held_call, down_from)
    ingest_records = grpc.unary_unary_rpc_method_handler(
        servicer.ingest_records,
        request_deserializer=profile_service_pb2.IngestRecordsRequest.FromString,
        response_serializer=profile_service_pb2.IngestRecordsResponse.SerializeToString,
    )
    get_catalog = grpc.unary_unary_rpc_method_handler(
        servicer.get_catalog,
        request_deserializer=catalog_service_pb2.GetCatalogRequest.FromString,
        response_serializer=catalog_service_pb2.GetCatalogResponse.SerializeToString,
    )
    handlers = (
        grpc.method_handlers_generic_handler("tsugi.v1.ProfileService", {"IngestRecords": ingest_records}),
        grpc.method_handlers_generic_handler("tsugi.v1.CatalogService", {"GetCatalog": get_catalog}),
    )
    server.add_generic_rpc_handlers(handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        servicer.let_go.set()
        server.stop(None).wait()


def line_of(address: str, *arguments: str | Path) -> list[str]:
    return command("import", "--address", address, "--json", *(str(argument) for argument in arguments))


def run(address: str, *arguments: str | Path) -> tuple[int, Any, Any]:
    """Run the command and return its exit code, its summary and its refusal."""
    ended = subprocess.run(
        line_of(address, *arguments), capture_output=True, text=True, cwd=ROOT, env=environment(Path(), {}), check=False
    )
    return (
        ended.returncode,
        json.loads(ended.stdout) if ended.stdout else None,
        json.loads(ended.stderr) if ended.stderr else None,
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_import_killed_in_the_middle_is_finished_by_the_same_command(tmp_path: Path) -> None:
    data = write(
        tmp_path / "crm.csv",
        "cust_no,age\n" + "".join(f"c{i},{'old' if i % 100 == 7 else i % 90}\n" for i in range(N_ROWS)),
    )
    arguments = ("--source", "crm", "--map", write(tmp_path / "map.yaml", BY_LINE), data)
    with scripted(held_call=4) as (servicer, address):
        importer = subprocess.Popen(
            line_of(address, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        assert servicer.is_held.wait(WAIT_S_MAX)
        os.kill(importer.pid, signal.SIGKILL)
        importer.wait()
        servicer.let_go.set()
        n_before = len(servicer.kept.records)
        assert 0 < n_before < N_ROWS
        exit_code, told, _ = run(address, *arguments)
        assert exit_code == 3
        assert (told["rows"], told["rejected"]) == (N_ROWS, N_ROWS // 100)
        assert told["accepted"] + told["duplicates"] == N_ROWS - N_ROWS // 100
        wanted = [i for i in range(N_ROWS) if i % 100 != 7]
        assert [record.identities[0].value for record in servicer.kept.records.values()] == [f"c{i}" for i in wanted]
    with (tmp_path / "crm.csv.rejects.csv").open(newline="") as file:
        assert [int(row["_line"]) for row in csv.DictReader(file)] == [i + 2 for i in range(N_ROWS) if i % 100 == 7]


def test_mapping_with_faults_is_refused_before_a_row_is_sent(tmp_path: Path) -> None:
    data = write(tmp_path / "crm.csv", "cust_no,ages\nc1,3\n")
    with scripted() as (servicer, address):
        wrong = write(tmp_path / "wrong.yaml", BY_LINE.replace("age:", "aeg:"))
        exit_code, told, refusal = run(address, "--source", "crm", "--map", wrong, data)
        assert (exit_code, told) == (1, None)
        assert [fault["field"] for fault in refusal["violations"]] == ["attributes.aeg"]
        right = write(tmp_path / "right.yaml", BY_LINE)
        exit_code, _, refusal = run(address, "--source", "crm", "--map", right, data)
        assert "did you mean ages?" in refusal["violations"][0]["description"]
        exit_code, _, refusal = run(address, "--source", "cmr", "--map", right, data)
        assert (exit_code, refusal["violations"][0]["field"]) == (1, "--source")
        assert servicer.kept.batches == []


def test_exit_codes_tell_what_came_of_it(tmp_path: Path) -> None:
    data = write(tmp_path / "crm.csv", "cust_no,age\nc1,3\nc2,old\n")
    good = write(tmp_path / "good.jsonl", '{"cust_no": "c3", "age": 4}\n')
    arguments = ("--source", "crm", "--map", write(tmp_path / "map.yaml", BY_LINE))
    with scripted() as (servicer, address):
        exit_code, told, _ = run(address, "--dry-run", *arguments, data, good)
        assert (exit_code, told["accepted"], told["rejected"], servicer.kept.batches) == (3, 2, 1, [])
        assert run(address, *arguments, good)[0] == 0
        exit_code, told, _ = run(address, *arguments, data)
        assert exit_code == 3
        assert told["files"][0]["rejects_file"] == "crm.csv.rejects.csv"
        assert run(address, *arguments, data)[1]["files"][0]["was_finished"]
        shown = subprocess.run(
            command("import", "--address", address, *map(str, arguments), str(data)),
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert "2 rows, 1 accepted, 0 known before, 1 rejected" in shown.stdout
        assert "1 × VALUE_INVALID, column age: a number such as 1234.5 is expected" in shown.stdout
        assert shown.stderr == ""  # no bar where nobody looks
    exit_code, _, refusal = run("127.0.0.1:1", *arguments, good)
    assert (exit_code, refusal["code"]) == (1, "DEADLINE_EXCEEDED")
    assert refusal["message"].startswith("no server answers at 127.0.0.1:1; start it")


def test_server_that_is_lost_on_the_way_is_told_with_what_went_in_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "REPEATED_S_MAX", 0.0)
    data = write(tmp_path / "crm.csv", "cust_no,age\n" + "".join(f"c{i},3\n" for i in range(1_200)))
    arguments = ("--source", "crm", "--map", str(write(tmp_path / "map.yaml", BY_LINE)), str(data))
    with scripted(down_from=1) as (_, address):
        ended = CliRunner().invoke(main, ["import", "--address", address, *arguments])
    assert ended.exit_code == 1
    assert ended.stdout.startswith("crm.csv: 500 rows, 500 accepted, ")
    told = f"no server answers at {address}; start it, and the same command goes on where it stopped"
    assert json.loads(ended.stderr) == {"message": told}


def test_import_of_a_file_that_is_being_imported_says_that_and_nothing_of_the_other_one(tmp_path: Path) -> None:
    data = write(tmp_path / "crm.csv", "cust_no,age\nc1,3\n")
    arguments = ("--source", "crm", "--map", write(tmp_path / "map.yaml", BY_LINE), data)
    with scripted(held_call=0) as (servicer, address):
        importer = subprocess.Popen(line_of(address, *arguments), stdout=subprocess.DEVNULL, cwd=ROOT)
        try:
            assert servicer.is_held.wait(WAIT_S_MAX)
            assert run(address, *arguments) == (1, None, {"message": "crm.csv is being imported already"})
        finally:
            servicer.let_go.set()
            assert importer.wait(WAIT_S_MAX) == 0


def test_three_sources_come_together_into_one_person(tmp_path: Path) -> None:
    files = {}
    for path in EXAMPLE.iterdir():
        files[path.name] = write(tmp_path / path.name, path.read_text())
    with serving(tmp_path) as server, server.client() as client:
        client.push_catalog(shop_catalog())
        lsn = 0
        for source, name in (("shop", "shop_events.jsonl"), ("loyalty", "loyalty.csv"), ("crm", "crm.csv")):
            mapping = files[f"{name.partition('.')[0]}.yaml"]
            exit_code, told, refusal = run(server.address, "--source", source, "--map", mapping, files[name])
            assert (exit_code, refusal) == (0, None), told
            lsn = max(lsn, told["lsn"])
        until(lambda: client.audit_sources(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")
        profile = client.get_profile(identity=("browser_id", "b-7f3a"), timeline_page_size=10)
        person = profile.profile
        assert {identity.namespace for identity in person.identities} == {"browser_id", "customer_number", "email"}
        assert person.attributes["age"].value.number_value == 37.0
        assert person.attributes["spend_12m"].value.number_value == 1234.5
        assert person.attributes["favourite_sport"].value.text_value == "running"
        by_number = client.get_profile(identity=("customer_number", "40017")).profile
        assert by_number.profile_id == person.profile_id
        other = client.get_profile(identity=("customer_number", "40018")).profile
        assert other.profile_id != person.profile_id
        assert other.attributes["member"].value.bool_value is False


def test_rejects_of_the_real_server_go_in_when_they_are_corrected(tmp_path: Path) -> None:
    header = "order_no,cust_no,browser,age,club,kind,ordered_at,updated_at,total,optin\n"
    good = "o{0},c{0},b{0},31,y,order,2026-02-03T10:00:00Z,2026-02-03T10:00:00Z,9.5,yes\n"
    bad = good.replace("2026-02-03T10:00:00Z,9.5", "9999-01-01,9.5")  # an instant, and far ahead of the server's clock
    data = write(tmp_path / "orders.csv", header + good.format(1) + bad.format(2) + good.format(3))
    arguments = ("--source", "crm", "--map", write(tmp_path / "map.yaml", MAPPING))
    with serving(tmp_path) as server, server.client() as client:
        client.push_catalog(catalog())
        exit_code, told, _ = run(server.address, *arguments, data)
        assert (exit_code, told["accepted"], told["rejected"]) == (3, 2, 1)
        fault = told["files"][0]["faults"][0]
        assert (fault["reason"], fault["column"]) == ("TIME_OUT_OF_RANGE", "updated_at")
        rejects = tmp_path / "orders.csv.rejects.csv"
        write(rejects, rejects.read_text().replace("9999-01-01", "2026-01-01"))
        exit_code, told, _ = run(server.address, "--wait-s", str(WAIT_S_MAX), *arguments, rejects)
        assert (exit_code, told["accepted"]) == (0, 1)
        assert told["applied_lsn"] >= told["lsn"] > 0, "it waited until profiles show it"
        found = client.get_profile(identity=("customer_number", "c2"), at_least_lsn=told["lsn"])
        assert found.profile.attributes["age"].value.number_value == 31.0
        with pytest.raises(CallError):
            client.get_profile(identity=("customer_number", "c4"))
