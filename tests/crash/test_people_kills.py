"""Kill workers, projector and importer at random moments while people turn out to be one; who is who comes out right.

The witness is a caller in a process of its own (``telling.py``). Afterwards the log is held against its file, the
projected state against a rebuild, and every person against a second telling: the acknowledged statements, in their
order, to a log and a projector that nobody ever killed. The negative controls are a server that acknowledges before it
commits, and a state of which one row is altered by hand.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from server.decisioning.live import load_catalog
from server.files import Files
from server.outcomes.projector import Projector, state_hash
from server.profiles.identity import named_all
from server.registry.blobs import Blobs
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.log import Log, follow
from server.storage.memory import MemoryStore
from server.storage.record import Record
from server.storage.store import Store, Table
from server.tokens import TokenKey
from tests.crash.test_kills import MAP_BYTES, kill_roles, opened, running_roles, until
from tests.support.people import CATALOG, People
from tests.support.running import command, environment
from training.running import Running, running_server
from tsugi.client import Client
from tsugi.log.v1.record_pb2 import LinkStated, ProfileSplit, RecordKind, SourceRecordAccepted
from tsugi.log.v1.state_pb2 import StoredNode
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import LinkIdentitiesRequest, LinkVerdict, SourceRecord, SplitProfileRequest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROLES = ("server worker", "server projector")
SETTINGS = {"SERVE_WORKERS": 2, "SERVE_CONNECTION_AGE_MS_MAX": 500, "SERVE_CONNECTION_AGE_GRACE_MS": 500}
WAIT_S = 60.0
N_ROWS = 6_000
N_IMPORTER_KILLS = 4

SOURCE_RECORD = RecordKind.RECORD_KIND_SOURCE_RECORD
LINK_STATED = RecordKind.RECORD_KIND_LINK_STATED
PROFILE_SPLIT = RecordKind.RECORD_KIND_PROFILE_SPLIT


class Acknowledged(NamedTuple):
    """What the witness wrote down; what was sent twice stands twice."""

    records: list[tuple[int, SourceRecord]]  # LSN, record
    links: dict[int, LinkIdentitiesRequest]  # by LSN
    splits: dict[int, SplitProfileRequest]  # by LSN


@pytest.mark.long  # test_kills has twenty, over decisions and outcomes
def test_twelve_kills_while_people_are_joined_and_parted_change_nobody(tmp_path: Path) -> None:
    assert_survives(tmp_path, n_kills=12, seed=1)


@pytest.mark.long
def test_forty_kills_while_people_are_joined_and_parted_change_nobody(tmp_path: Path) -> None:
    assert_survives(tmp_path, n_kills=40, seed=2)


@pytest.mark.slow
def test_acknowledging_before_the_commit_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE / "acknowledges_early"), prepend=os.pathsep)
    killed_while_told(tmp_path, n_kills=4, seed=3, roles=("server worker",))
    files = Files.below(tmp_path / "data")
    with opened(files) as log, pytest.raises(AssertionError, match="was lost"):
        check_records(log, files, ledger(tmp_path))


@pytest.mark.long
def test_import_killed_with_worker_and_projector_ends_with_everybody_once(tmp_path: Path) -> None:
    data = rows(tmp_path / "crm.csv", N_ROWS)
    mapping = tmp_path / "map.yaml"
    mapping.write_text(
        'recordId: "{id}"\n'
        "observationTime: {column: seen}\n"
        "identities:\n"
        "  - {namespace: customer_number, column: number}\n"
        "  - {namespace: email, column: email}\n"
        "attributes: {age: {column: age}}\n"
    )
    with running_server(tmp_path / "data", SETTINGS) as server:
        with Client(server.address) as client:
            client.push_catalog(CATALOG.message)
        arguments = command("import", "--address", server.address, "--source", "crm", "--map", str(mapping), str(data))
        files = Files.below(tmp_path / "data")
        assert imported(server, files, arguments, random.Random(4)) > 0, "it was never killed in the middle"
    with opened(files) as log:
        log.verify()
        said = {
            record.lsn: SourceRecordAccepted.FromString(record.payload).record
            for record in follow(log, 1)
            if record.kind == SOURCE_RECORD
        }
        assert sorted(int(each.record_id) for each in said.values()) == list(range(N_ROWS))
        check_people(log, caught_up(log, files), Acknowledged(list(said.items()), {}, {}))


def assert_survives(folder: Path, n_kills: int, seed: int) -> None:
    killed_while_told(folder, n_kills, seed, ROLES)
    acknowledged = ledger(folder)
    files = Files.below(folder / "data")
    with opened(files) as log:
        log.verify()
        check_records(log, files, acknowledged)
        check_statements(log, acknowledged)
        rebuilt = caught_up(log, files)
        check_people(log, rebuilt, acknowledged)
        part_somebody(rebuilt)
        with pytest.raises(AssertionError, match="somebody else"):
            check_people(log, rebuilt, acknowledged)
    check_sent_again(folder, acknowledged)


def killed_while_told(folder: Path, n_kills: int, seed: int, roles: tuple[str, ...]) -> None:
    """Run a server that is told of people, kill its roles at random moments, and let it end in order."""
    with running_server(folder / "data", SETTINGS) as server:
        with Client(server.address) as client:
            client.push_catalog(CATALOG.message)
        with witness(server, folder / "ledger.txt", seed):
            kill_roles(server, folder / "ledger.txt", n_kills, random.Random(seed), roles)


@contextmanager
def witness(server: Running, path: Path, seed: int) -> Iterator[None]:
    arguments = [sys.executable, "-m", "tests.crash.telling", server.address, str(path), str(seed)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, env=inherited, cwd=ROOT) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(2 * WAIT_S) == 0, "the witness met an answer it did not expect"


def ledger(folder: Path) -> Acknowledged:
    acknowledged = Acknowledged([], {}, {})
    for line in (folder / "ledger.txt").read_text().splitlines():
        what, said, lsn = line.split()
        match what:
            case "record":
                acknowledged.records.append((int(lsn), SourceRecord.FromString(bytes.fromhex(said))))
            case "link":
                acknowledged.links[int(lsn)] = LinkIdentitiesRequest.FromString(bytes.fromhex(said))
            case "split":
                acknowledged.splits[int(lsn)] = SplitProfileRequest.FromString(bytes.fromhex(said))
    assert acknowledged.records, "the witness saw no work; the test would prove nothing"
    return acknowledged


def check_records(log: Log, files: Files, acknowledged: Acknowledged) -> None:
    """Every acknowledged record stands in the log exactly once, where it was acknowledged."""
    token_key = TokenKey(files.read_secret())
    found = {}
    for _, said in acknowledged.records:
        entry = log.find(token_key.record_key(b"source_record", said.source.encode(), said.record_id))
        assert entry is not None, f"record {said.record_id} was lost"
        found[said.record_id] = entry.lsn
    for lsn, said in acknowledged.records:
        assert found[said.record_id] == lsn, f"record {said.record_id} was acknowledged at {lsn} and stands elsewhere"


def check_statements(log: Log, acknowledged: Acknowledged) -> None:
    """The log holds what was acknowledged, word for word, and nothing else that was said."""
    keys: Counter[bytes] = Counter()
    found: dict[int, Record] = {}
    for record in follow(log, 1):
        if record.kind in {SOURCE_RECORD, LINK_STATED, PROFILE_SPLIT}:
            keys[record.key] += 1
            found[record.lsn] = record
    assert set(keys.values()) == {1}, "a statement stands in the log twice"
    assert acknowledged.links and acknowledged.splits, "nobody was joined and parted; the test would prove nothing"
    records = dict(acknowledged.records)
    assert found.keys() == records.keys() | acknowledged.links.keys() | acknowledged.splits.keys()
    for lsn, said in records.items():
        assert SourceRecordAccepted.FromString(found[lsn].payload).record == said
    for lsn, link in acknowledged.links.items():
        stated = LinkStated.FromString(found[lsn].payload)
        assert [stated.identity, stated.other_identity] == compared(link.identity, link.other_identity)
        assert stated.verdict == link.verdict
    for lsn, split in acknowledged.splits.items():
        assert list(ProfileSplit.FromString(found[lsn].payload).leaving) == compared(*split.identities)


def caught_up(log: LmdbLog, files: Files) -> MemoryStore:
    """Let the state that was left catch up, see that a rebuild gives the same, and return the rebuild."""
    loader = partial(load_catalog, Blobs(files.registry))
    survived, rebuilt = LmdbStore(files.state, MAP_BYTES), MemoryStore()
    for store in (survived, rebuilt):
        projector = Projector(log, store, loader)
        while projector.step():
            pass
    assert state_hash(survived) == state_hash(rebuilt)
    survived.close()
    return rebuilt


def check_people(log: Log, store: Store, acknowledged: Acknowledged) -> None:
    """Every person is who a second telling of what was acknowledged, without kills, makes of them."""
    people = People()
    history, records = people.history, dict(acknowledged.records)
    for lsn in sorted(records.keys() | acknowledged.links.keys() | acknowledged.splits.keys()):
        record = log.get(lsn)
        assert record is not None
        history.now_us = record.time_us
        if lsn in records:
            history.say(records[lsn])
        elif lsn in acknowledged.links:
            link = acknowledged.links[lsn]
            one, other = map(pair, compared(link.identity, link.other_identity))
            verdict = LinkVerdict.Name(link.verdict).removeprefix("LINK_VERDICT_")
            history.link(one, other, verdict, link.weight)
        else:  # who stays is what the server knew; check_statements has seen that who leaves is as was asked
            split = ProfileSplit.FromString(record.payload)
            history.split([*map(pair, split.leaving)], [*map(pair, split.staying)])
    people.project(log.tail().time_us)
    told, views = people.groups(), people.views()
    assert max(map(len, told)) > 2, "nobody was joined; the test would prove nothing"
    people.store = store
    assert people.groups() == told, "somebody is somebody else"
    assert people.views() == views, "somebody is known otherwise"


def part_somebody(store: MemoryStore) -> None:
    """Take one identity out of one person, behind everybody's back."""
    with store.write() as txn:
        for key, value in txn.scan(Table.NODES):
            node = StoredNode.FromString(value)
            if node.profile_key != node.own_profile_key:
                node.profile_key = node.own_profile_key
                txn.put(Table.NODES, key, node.SerializeToString(deterministic=True))
                return


def check_sent_again(folder: Path, acknowledged: Acknowledged) -> None:
    """Every record sent again is a duplicate, at the place it has."""
    with running_server(folder / "data", SETTINGS) as server, Client(server.address, timeout_s=30.0) as client:
        records = acknowledged.records
        for part in (records[i : i + 500] for i in range(0, len(records), 500)):
            reply = client.ingest_records([said for _, said in part])
            for (lsn, _), result in zip(part, reply.results, strict=True):
                assert result.accepted.duplicate
                assert result.accepted.lsn == lsn


def compared(*ids: Identity) -> list[Identity]:
    """Bring identities into the form they are compared in."""
    return [one.identity for each in ids for one in named_all([each], CATALOG.profiles)]


def pair(identity: Identity) -> tuple[str, str]:
    return identity.namespace, identity.value


def rows(path: Path, n_rows: int) -> Path:
    """Write rows of which each names a number or an e-mail address that others have too."""
    chance = random.Random(5)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "number", "email", "age", "seen"])
        for number in range(n_rows):
            person = chance.randrange(n_rows // 4)
            names = (f"c{person}", f"p{person + chance.randrange(2)}@shop.example")
            kept = chance.choice([names, (names[0], ""), ("", names[1])])
            writer.writerow([number, *kept, chance.randrange(18, 80), f"2026-01-0{1 + number % 9}T00:00:00Z"])
    return path


def imported(server: Running, files: Files, arguments: list[str], chance: random.Random) -> int:
    """Import while importer, worker and projector are killed, until a run ends well; return how often it was killed."""
    supervisor = psutil.Process(server.pid)
    log = LmdbLog(files.log, MAP_BYTES, writable=False)
    n_killed = 0
    for n_runs in range(20):
        importer = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment(Path(), {})
        )
        if n_runs < N_IMPORTER_KILLS:
            until(partial(has_come_on, log, log.tail().lsn, importer), "the import comes on")
            time.sleep(chance.random() * 0.1)  # the random moment itself
            os.kill(chance.choice(running_roles(supervisor, ROLES[n_runs % 2])).pid, signal.SIGKILL)
            importer.kill()
        exit_code = importer.wait(WAIT_S)
        n_killed += exit_code == -signal.SIGKILL
        for wanted in ROLES:
            until(partial(running_roles, supervisor, wanted), wanted)
        if exit_code == 0:
            log.close()
            return n_killed
    raise AssertionError("the import never ended")


def has_come_on(log: Log, lsn: int, importer: subprocess.Popen[bytes]) -> bool:
    """Say whether rows were recorded after an LSN, or all are."""
    return log.tail().lsn > lsn + 100 or importer.poll() is not None
