"""The caller's command: replies as JSON on standard output, refusals as JSON on standard error with exit code 1."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from server.__main__ import main
from tests.support.running import Server, command, serving, told, until
from training.fit import MODELS_FOLDER

pytestmark = pytest.mark.slow

CATALOG = str(MODELS_FOLDER / "catalog.yaml")
BUNDLE = str(MODELS_FOLDER / "bundle.binpb")
ANNA = ("--identity", "customer_number=anna")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield from told(running)


@pytest.fixture(scope="module")
def catalog(running: Server) -> Any:
    return asked(running, "push-catalog", CATALOG)


def asked(server: Server, *arguments: str, text: bool = False) -> Any:
    """Run a command that is answered, and return its answer, as JSON or as the text it is."""
    ended = CliRunner(env={"TSUGI_ADDRESS": server.address}).invoke(main, list(arguments))
    assert ended.exit_code == 0, ended.output
    assert ended.stderr == ""
    return ended.stdout if text else json.loads(ended.stdout)


def refused(server: Server, *arguments: str) -> Any:
    """Run a command that is refused, and return what it is told."""
    ended = CliRunner(env={"TSUGI_ADDRESS": server.address}).invoke(main, list(arguments))
    assert ended.exit_code == 1, ended.output
    assert ended.stdout == ""
    return json.loads(ended.stderr)


def test_walk_by_commands(server: Server, catalog: Any) -> None:
    lsn = asked(
        server, "ingest", *ANNA, "--identity", "browser_id=b1", "--attribute", "age=31", "--attribute", "member=true",
        "--attribute", "favourite_sport=running", "--event", "purchase", "--property", "total=12.5",
    )["lsn"]  # fmt: skip
    reply = asked(
        server, "decide", *ANNA, "--placement", "home_banner:2", "--placement", "agent_upsell", "--context",
        "device=phone", "--at-least-lsn", lsn, "--durable", "--request-id", "walk",
    )  # fmt: skip
    assert [slot["placement"] for slot in reply["slots"]] == ["home_banner", "home_banner", "agent_upsell"]
    assert reply["catalogRevision"] == catalog["revision"]
    action = reply["slots"][0]["action"]
    outcome = ("outcome", reply["decisionId"], action, "click", "--outcome-id", "o1")
    assert not asked(server, *outcome).get("duplicate")
    last = asked(server, *outcome)
    assert last["duplicate"] is True
    known = asked(server, "profile", "--identity", "browser_id=b1", "--at-least-lsn", last["lsn"], "--timeline", "10")
    profile = known["profile"]
    assert profile["attributes"]["age"]["value"] == {"numberValue": 31.0}
    latest = asked(server, "profile", "--identity", "browser_id=b1", "--timeline", "9")["touchpoints"]
    assert [kind for each in latest for kind in ("event", "decision", "outcome") if kind in each] == [
        "outcome", "decision", "event",
    ]  # fmt: skip
    assert latest[-1]["event"]["event"]["properties"]["total"] == {"numberValue": 12.5}
    assert {contact["action"] for contact in profile["contacts"]} == {slot["action"] for slot in reply["slots"]}
    by_id = asked(server, "profile", "--profile-id", profile["profileId"])["profile"]
    assert by_id | {"windows": {}} == profile | {"windows": {}}, "but for what the passing of time changes"
    assert by_id["windows"].keys() == profile["windows"].keys()


def test_rejection_is_told_with_the_next_request_and_once(server: Server, catalog: Any) -> None:
    first = asked(server, "decide", "--identity", "customer_number=no", "--placement", "home_banner", "--durable")
    rejected = ("--outcome", first["decisionId"], first["slots"][0]["action"], "click")
    following = ("decide", "--identity", "customer_number=no", "--placement", "home_banner", "--durable", *rejected)
    assert asked(server, *following)["decisionId"] != first["decisionId"]
    last = asked(server, *following)["lsn"]
    until(lambda: int(asked(server, "audit-sources", "--json")["appliedLsn"]) >= int(last), "the projector gets there")
    told_of = asked(server, "profile", "--identity", "customer_number=no", "--timeline", "9")["touchpoints"]
    assert ["outcome" in each for each in told_of].count(True) == 1
    bad = refused(server, *following[:-1], "applause")
    assert bad["metadata"]["field"] == "outcomes[0].type"


def test_configuration_by_commands(server: Server, catalog: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        Path(CATALOG).read_text(encoding="utf-8").replace("name: sports_retail", "name: größer", 1), encoding="utf-8"
    )
    checked = asked(server, "push-catalog", str(other), "--validate-only")
    assert checked["etag"] == catalog["etag"]
    second = asked(server, "push-catalog", str(other), "--etag", catalog["etag"])
    assert asked(server, "get-catalog")["catalog"]["name"] == "größer"
    back = asked(server, "rollback-catalog", "--etag", second["etag"])
    assert back["revision"] == catalog["revision"]
    revisions = asked(server, "list-catalogs")["catalogRevisions"]
    assert [each["revision"] for each in revisions[:2]] == [back["revision"], second["revision"]]
    assert asked(server, "get-catalog", "--revision", second["revision"])["catalog"]["name"] == "größer"

    model = asked(server, "push-model", BUNDLE, "--label", "seed")["modelRevision"]
    assigned = asked(server, "assign-champion", model["revision"])
    reply = asked(server, "decide", "--placement", "home_banner", "--at-least-lsn", assigned["lsn"], "--preview")
    assert {use["revision"] for use in reply["modelRevisions"]} == {model["revision"]}
    models = asked(server, "list-models")
    assert (models["modelRevisions"][0]["label"], models["championEtag"]) == ("seed", assigned["etag"])
    assert "revision" not in asked(server, "rollback-champion", "--etag", assigned["etag"])
    assigned = asked(server, "assign-champion", model["revision"], "--role", "challenger")
    models = asked(server, "list-models")
    assert models["modelRevisions"][0]["roles"] == ["MODEL_ROLE_CHALLENGER"]
    assert models["challengerEtag"] == assigned["etag"] != models["championEtag"]
    assert "revision" not in asked(server, "rollback-champion", "--role", "challenger", "--etag", assigned["etag"])


def test_facts_are_typed_as_json_types_them(server: Server, catalog: Any) -> None:
    # What is quoted is text, however much it looks like a number; what no JSON number is, is text as well.
    for text in ('"5"', "nan", "Infinity", "1_000", "0x5", "null", "five"):
        answer = refused(server, "decide", "--placement", "home_banner", "--context", f"hour={text}")
        assert answer["violations"][0]["field"] == "context.hour"
    for text in ("5", "5.0", "0.5e1"):
        asked(server, "decide", "--placement", "home_banner", "--context", f"hour={text}", "--preview")
    asked(server, "decide", "--placement", "home_banner", "--context", "device=phone", "--preview")


def test_refusal_tells_code_reason_and_fields(server: Server, catalog: Any) -> None:
    answer = refused(server, "decide", "--placement", "nowhere")
    assert answer["code"] == "NOT_FOUND"
    assert answer["reason"] == "ERROR_REASON_RESOURCE_NOT_FOUND"
    assert answer["metadata"]["name"] == "nowhere"
    assert answer["violations"] == [{"field": "placements[0].placement", "description": "no such placement"}]
    assert refused(server, "outcome", "x", "y", "click")["reason"] == "ERROR_REASON_DECISION_ID_INVALID"
    assert refused(server, "profile")["reason"] == "ERROR_REASON_FIELD_INVALID"
    assert refused(server, "ingest", *ANNA, "--attribute", "height=2")["metadata"]["field"] == "attributes.height"
    assert refused(server, "push-model", CATALOG, "--label", "yaml")["reason"] == "ERROR_REASON_BUNDLE_MALFORMED"
    assert refused(server, "assign-champion", "0" * 64)["reason"] == "ERROR_REASON_RESOURCE_NOT_FOUND"


def test_faulty_catalog_file_is_told_with_the_paths_of_its_faults(server: Server, tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text("name: small\nchanels: []\ncurrencyCode: 5\n")
    answer = refused(server, "push-catalog", str(faulty))
    assert answer["reason"] == "ERROR_REASON_CATALOG_INVALID"
    assert any("chanels" in violation["field"] for violation in answer["violations"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("decide", "--placement", "home_banner:many"),
        ("decide", "--placement", "home_banner:-1"),
        ("decide", "--placement", f"home_banner:{1 << 32}"),
        ("decide", "--placement", "home_banner", "--at-least-lsn", "-1"),
        ("decide", "--placement", "home_banner", "--at-least-lsn", str(1 << 64)),
        ("decide", "--placement", "home_banner", "--context", "hour"),
        ("decide",),
        ("ingest", "--identity", "anna"),
        ("push-catalog", "no such file"),
        ("push-catalog", BUNDLE),
        ("decide", "--placement", "home_banner", "--context", f"note={'[' * 100_000}", "--identity", "x"),
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_wrong_use_is_told_before_anybody_is_called(arguments: tuple[str, ...]) -> None:
    ended = CliRunner(env={"TSUGI_ADDRESS": "127.0.0.1:1"}).invoke(main, list(arguments))
    assert ended.exit_code == 2, ended.output
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.output


def test_program_itself_answers_refuses_and_survives_odd_bytes(server: Server, catalog: Any) -> None:
    def run(*arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
        environment = os.environ | {"TSUGI_ADDRESS": server.address}
        return subprocess.run([*command(), *arguments], capture_output=True, env=environment, timeout=60, check=False)

    answered = run("decide", "--placement", "home_banner", "--preview", "--field", "slots.0.placement")
    assert (answered.returncode, answered.stdout, answered.stderr) == (0, b"home_banner\n", b"")
    no_text = run("decide", "--placement", "home_banner", "--identity", b"customer_number=\xff\xfe")
    assert no_text.returncode == 2
    assert b"UTF-8" in no_text.stderr
    assert b"Traceback" not in no_text.stderr


def test_server_that_is_not_there_is_told() -> None:
    ended = CliRunner(env={"TSUGI_ADDRESS": "127.0.0.1:1"}).invoke(main, ["list-models"])
    assert ended.exit_code == 1
    answer = json.loads(ended.stderr)
    assert answer["code"] in {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert answer["message"].startswith("no server answers at 127.0.0.1:1")


def test_field_that_is_empty_is_printed_and_one_that_is_none_is_not(server: Server, catalog: Any) -> None:
    assert asked(server, "list-models", "--field", "nextPageToken", text=True) == "\n"
    decided = ("decide", "--placement", "home_banner:2", "--preview", "--field")
    assert asked(server, "reviews", "--field", "reviews") == []
    assert asked(server, *decided, "slots.0.position") == 0
    ended = CliRunner(env={"TSUGI_ADDRESS": server.address}).invoke(main, [*decided, "degradation"])
    assert (ended.exit_code, "has no field" in ended.stderr) == (1, True)
    people = asked(server, "count-people")
    assert all("people" in each for each in (people, *people["segments"], *people["stages"]))


def test_blanks_around_an_identity_are_no_part_of_it(server: Server, catalog: Any) -> None:
    lsn = asked(server, "ingest", "--identity", "customer_number= blank-1 ", "--source", "shop")["lsn"]
    resolve = ("resolve", "--identity", "customer_number=blank-1", "--at-least-lsn", lsn)
    assert asked(server, *resolve)["resolved"][0]["state"] == "IDENTITY_STATE_LEADS"


def test_export_is_its_owners_alone_and_a_folder_that_is_missing_is_told(
    server: Server, catalog: Any, tmp_path: Path
) -> None:
    identity = ("--identity", "customer_number=export-1")
    lsn = asked(server, "ingest", *identity, "--source", "shop")["lsn"]
    asked(server, "profile", *identity, "--at-least-lsn", lsn)
    assert asked(server, "export", *identity, "--out", str(tmp_path / "one.json"), text=True) == ""
    assert (tmp_path / "one.json").stat().st_mode & 0o777 == 0o600
    assert "cannot be written" in refused(server, "export", *identity, "--out", str(tmp_path / "none" / "x"))["message"]


def test_receipt_is_had_later_and_verified_by_its_key(server: Server, catalog: Any, tmp_path: Path) -> None:
    runner = CliRunner(env={"TSUGI_ADDRESS": server.address})
    begun = runner.invoke(main, ["erase", "--identity", "customer_number=unheard-of", "--wait-s", "0"])
    told = begun.stderr.rpartition("tsugi get-erasure ")[2].strip()
    if not told:  # it was faster than the first look
        told = json.loads(begun.stdout)["receipt"]["erasureId"]
    until(lambda: "FULFILLED" in asked(server, "get-erasure", told)["state"], "the receipt")
    ended = runner.invoke(main, ["erase", "--identity", "customer_number=unheard-of"])
    assert (ended.exit_code, "nobody was known by this identity" in ended.stderr) == (0, True)
    reply = json.loads(ended.stdout)
    assert reply["receipt"]["erasedRecords"] == "0"
    key = base64.b64decode(reply["receipt"]["publicKey"]).hex()
    receipt = tmp_path / "receipt.json"
    receipt.write_text(ended.stdout)
    assert "unaltered" in asked(server, "verify-receipt", str(receipt), "--public-key", key, text=True)
    assert "another key" in refused(server, "verify-receipt", str(receipt), "--public-key", "00" * 32)["message"]
    receipt.write_text(json.dumps(reply["receipt"] | {"erasedRecords": "7"}))
    assert "altered" in refused(server, "verify-receipt", str(receipt), "--public-key", key)["message"]
