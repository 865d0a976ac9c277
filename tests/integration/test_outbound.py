"""tsugi outbound as a program: a segment's people once each, caps kept, and kill -9 wherever it may come.

One server serves the whole file; each test asks people of its own.
The killed program is the real one with a hook that kills the process itself, at the n-th time that a call was answered
or a file was about to get its name: what is tested does not depend on how fast a machine is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from server.files import Files
from server.storage.lmdb_log import LmdbLog
from server.storage.log import follow
from tests.support.catalogs import message
from tests.support.running import Server, command, environment, serving, told, until
from tsugi.client import CallError, Client, source_record
from tsugi.log.v1.record_pb2 import DecisionRecord, RecordKind
from tsugi.v1.decision_service_pb2 import DecideRequest

pytestmark = pytest.mark.slow
files: Any = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: outbound runs are not tested")

ROOT: Final = Path(__file__).parents[2]
N_PEOPLE: Final = 300
N_EACH: Final = 100  # in each of three segments
MAP_BYTES: Final = 1 << 30
SIGKILLED: Final = -9

KILLING: Final = """
import os, signal, sys
from pathlib import Path
from server.__main__ import main
from tsugi.client import Client

what, left = sys.argv.pop(1), int(sys.argv.pop(1))

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if what == "rename":
    replace = Path.replace
    Path.replace = lambda self, target: (count(), replace(self, target))[1]
else:
    decide = Client.batch_decide
    def batch_decide(self, *arguments, **options):
        reply = decide(self, *arguments, **options)
        count()
        return reply
    Client.batch_decide = batch_decide
main()
"""

CATALOG = message(
    channels=[{"name": "web"}, {"name": "mail"}],
    profileAttributes=[{"name": name, "type": "ATTRIBUTE_TYPE_NUMBER"} for name in ("age", "group")],
    consentPurposes=[{"name": "service", "consentExempt": True}],
    segments=[
        *({"name": f"group_{i}", "expression": f"profile.group == {i}.0"} for i in range(3)),
        {"name": "nobody", "expression": "profile.group > 3.0"},
    ],
    placements=[
        {"name": "page", "channel": "web", "goal": "click", "purpose": "service"},
        {"name": "letter", "channel": "mail", "goal": "click", "countMax": 2, "purpose": "service"},
        {"name": "leaflet", "channel": "mail", "goal": "click", "purpose": "service"},
    ],
    actions=[
        {"name": name, "valueMicros": value, "eligibility": rule,
         "treatments": [{"name": f"{name}_by_mail", "channel": "mail", "content": {"headline": name, "pages": 2}}]}
        for name, value, rule in (("loan", 3_000_000, ""), ("card", 2_000_000, "profile.age >= 60.0"))
    ]
    + [{"name": "banner", "treatments": [{"name": "wide", "channel": "web"}]}],
    contactPolicies=[
        {"name": "once", "scope": "CONTACT_SCOPE_EACH_ACTION", "actions": ["loan", "card"],
         "cap": {"countMax": 1, "span": "3600s"}},
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def serving_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        with server.client() as client:
            client.push_catalog(CATALOG)
            know(client)
        yield server


@pytest.fixture
def running(serving_all: Server) -> Iterator[Server]:
    yield from told(serving_all)


def know(client: Client) -> None:
    records = [
        source_record(
            f"r{i}", "crm", [("customer_number", f"c{i}")], attributes={"age": 20.0 + i % 70, "group": float(i % 3)}
        )
        for i in range(N_PEOPLE)
    ]
    applied(client, client.ingest_records(records).lsn)


def applied(client: Client, lsn: int) -> None:
    until(lambda: client.count_people(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")


def people_of(client: Client, group: int) -> list[str]:
    who = [("customer_number", f"c{i}") for i in range(group, N_PEOPLE, 3)]
    return sorted(client.get_profile(identity=each).profile.profile_id for each in who)


def options_of(server: Server, out: Path, *more: str, segment: str = "group_0", channel: str = "mail") -> list[str]:
    where = ["--address", server.address, "--out", str(out), "--json"]
    return ["outbound", *where, "--segment", segment, "--channel", channel, *more]


def run(line: list[str]) -> tuple[int, Any, str]:
    """Run a command line and return its exit code, its summary and what else it said."""
    ended = subprocess.run(
        line, capture_output=True, text=True, cwd=ROOT, env=environment(Path(), {}), check=False, timeout=60
    )
    return ended.returncode, json.loads(ended.stdout) if ended.stdout else None, ended.stderr


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = files.read_table(out).to_pylist()
    return found


def decisions(server: Server, profile_ids: list[str]) -> Counter[tuple[str, str]]:
    """Count the decisions about some people in the server's log, by run and person."""
    log = LmdbLog(Files.below(server.data).log, MAP_BYTES, writable=False)
    found: Counter[tuple[str, str]] = Counter()
    for record in follow(log, 1):
        if record.kind == RecordKind.RECORD_KIND_DECISION:
            decision = DecisionRecord.FromString(record.payload)
            if (profile_id := decision.profile_key.hex()) in profile_ids:
                run_id = DecideRequest.FromString(decision.request).request_id.split("/")[1]
                found[run_id, profile_id] += 1
    log.close()
    return found


def test_everybody_in_the_segment_is_in_the_file_and_caps_hold_in_the_next_run(running: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with running.client() as client:
        wanted = people_of(client, 0)
        exit_code, first, said = run(command(*options_of(running, out)))
        assert (exit_code, first["people"], first["nothing_to_say"], first["errors"]) == (0, N_EACH, 0, {}), said
        table = rows(out)
        assert sorted({row["profile_id"] for row in table}) == wanted
        assert dict(Counter(row["action"] for row in table)) == first["contacts"]
        assert first["contacts"]["loan"] == N_EACH and 0 < first["contacts"]["card"] < N_EACH
        assert {row["placement"] for row in table} == {"letter", "leaflet"}
        loan = next(row for row in table if row["action"] == "loan")
        assert json.loads(loan["content"]) == {"headline": "loan", "pages": 2}
        assert (loan["treatment"], loan["value"], loan["selection_probability"]) == ("loan_by_mail", 3.0, 1.0)
        shown = client.get_decision(loan["decision_id"])
        assert shown.profile_id == loan["profile_id"]

        applied(client, first["lsn"])
        exit_code, _, said = run(command(*options_of(running, out)))
        assert exit_code == 2 and "--overwrite" in said
        exit_code, second, said = run(command(*options_of(running, out, "--overwrite")))
        assert (exit_code, second["people"], second["nothing_to_say"]) == (0, N_EACH, N_EACH), said
        assert (second["contacts"], rows(out)) == ({}, [])
    found = decisions(running, wanted)
    assert set(found.values()) == {1} and len(found) == 2 * N_EACH


@pytest.mark.parametrize(
    ("group", "kills"),
    [  # each time counted anew: the journal, then of each of four pages its journal, five calls, its part; the output
        (1, [("rename", 1), ("rename", 2), ("call", 3), ("rename", 3), ("rename", 2)]),
        (2, [("call", 7), ("call", 1), ("rename", 3), ("call", 2), ("rename", 4)]),
    ],
)
def test_killed_run_is_ended_by_the_same_command_and_nobody_is_asked_twice(
    running: Server, tmp_path: Path, group: int, kills: list[tuple[str, int]]
) -> None:
    out = tmp_path / "out.parquet"
    segment = f"group_{group}"
    options = options_of(running, out, "--batch", "5", segment=segment)
    with running.client() as client:
        wanted = people_of(client, group)
        n_parts = [0]
        for what, n in kills:
            exit_code, summary, said = run([sys.executable, "-c", KILLING, what, str(n), *options])
            assert (exit_code, summary, out.exists()) == (SIGKILLED, None, False), said
            n_parts.append(len(list(tmp_path.glob("out.parquet.run/*.parquet"))))
        assert n_parts == sorted(n_parts) and n_parts[-1] > 0
        exit_code, _, said = run(command(*options_of(running, out, segment="nobody")))
        assert exit_code == 2 and f"holds a run of segment {segment} on channel mail" in said
        shown = subprocess.run(
            command(*options[:5], *options[6:]), capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
        )
        assert f"a run goes on: {n_parts[-1] * 25} people are done" in shown.stderr
        assert f"out.parquet: {N_EACH} people, " in shown.stdout
        loans = sorted(row["profile_id"] for row in rows(out) if row["action"] == "loan")
        assert loans == wanted
        assert list(tmp_path.glob("out.parquet?*")) == []
    found = decisions(running, wanted)
    assert set(found.values()) == {1} and len({run_id for run_id, _ in found}) == 1
    assert sorted(profile_id for _, profile_id in found) == wanted


def test_run_that_is_called_wrongly_says_what_there_is(running: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    for options, wanted in (
        (options_of(running, out, segment="minors"), "there are group_0, group_1, group_2, nobody"),
        (options_of(running, out, channel="fax"), "there are mail, web"),
        (options_of(running, out, "--placement", "page"), "there are leaflet, letter"),
    ):
        exit_code, _, said = run(command(*options))
        assert exit_code == 2 and wanted in said
    exit_code, summary, said = run(
        command(*options_of(running, out, "--placement", "page", "--max-people", "7", channel="web"))
    )
    assert (exit_code, summary["people"], len({row["profile_id"] for row in rows(out)})) == (0, 7, 7), said
    exit_code, _, said = run(command("outbound", "--address", "127.0.0.1:1", "--out", str(out), "--overwrite",
                                     "--segment", "group_0", "--channel", "mail"))  # fmt: skip
    assert exit_code == 1 and "no server answers at 127.0.0.1:1; start it" in said


def test_pages_of_a_segment_come_over_the_wire_until_there_are_no_more(running: Server) -> None:
    with running.client() as client:
        listed: list[str] = []
        page = client.list_profiles("group_0", page_size=30)
        while True:
            assert page.total_size == N_EACH and len(page.profile_ids) <= 30
            listed += page.profile_ids
            if not page.next_page_token:
                break
            page = client.list_profiles("group_0", page_size=30, page_token=page.next_page_token)
        assert listed == people_of(client, 0)
        assert len(client.list_profiles("group_0").profile_ids) == N_EACH
        assert len(client.list_profiles("group_0", page_size=2**32 - 1).profile_ids) == N_EACH
        assert client.list_profiles("nobody").SerializeToString() == b""
        gone = listed[0]
        client.erase_profile("forget", profile_id=gone)
        assert gone not in client.list_profiles("group_0").profile_ids
        with pytest.raises(CallError) as refusal:
            client.list_profiles("minors")
        assert refusal.value.reason == "ERROR_REASON_RESOURCE_NOT_FOUND"
