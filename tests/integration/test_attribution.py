"""``tsugi attribution`` in this process: over a log that is on disk, over files, and over a public set of paths."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from server.__main__ import main
from server.files import Files
from server.outcomes.attribution import Model
from server.outcomes.projector import Projector
from server.registry.blobs import Blobs
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from tests.support.attributing import CATALOG, Story
from tests.support.damage import MAP_BYTES

MODELS = [str(model) for model in Model]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["attribution", *map(str, arguments)], catch_exceptions=False)


def attributed(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    ended = run(*arguments, "--json", folder / "out.json")
    assert ended.exit_code == 0, ended.output
    told: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return told


def outcomes_of(told: dict[str, Any], model: Model) -> dict[str, float]:
    return {each["channel"]: each["models"][model]["outcomes"] for each in told["channels"]}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Write the directory of a server on which three people were told things, one of them first as a stranger."""
    files = Files.below(tmp_path / "data")
    files.create()
    Blobs(files.registry).put(CATALOG.message.SerializeToString(deterministic=True))
    with closing(LmdbLog(files.log, MAP_BYTES)) as log, closing(LmdbStore(files.state, MAP_BYTES)) as store:
        story = Story(log)
        projector = Projector(log, store, {CATALOG.sha256: CATALOG}.__getitem__)
        story.put_in_force(CATALOG)
        anna = story.profile_key(story.know({"customer_number": "1"}))
        berta = story.profile_key(story.know({"customer_number": "2"}))
        story.tell("letter", "lamp", hour=0, profile_key=anna)
        story.tell("home", "book", hour=1, identities={"browser_id": "b-1"})
        story.know({"browser_id": "b-1", "customer_number": "1"})
        call = story.tell("desk", "rope", hour=2, profile_key=anna)
        story.come_to(call, "rope", "order", hour=3, value=90.0)
        letter = story.tell("letter", "lamp", hour=4, profile_key=berta)
        story.come_to(letter, "lamp", "click", hour=5)
        story.tell("home", "book", hour=6, profile_key=berta)
        while projector.step():
            pass
    yield files


def test_log_is_shared_out_over_the_channels_of_its_people(files: Files, tmp_path: Path) -> None:
    told = attributed(tmp_path, "--data", files.root, "--goal", "click", "--half-life", "2")
    assert {name: told[name] for name in ("paths", "touchpoints", "outcomes", "value", "silences", "open_paths")} == {
        "paths": 3, "touchpoints": 5, "outcomes": 2, "value": 90.0, "silences": 1, "open_paths": 1,
    }  # fmt: skip
    assert (told["people"], told["people_by"], told["unled_outcomes"]) == (2, "state", 0)
    assert told["terms"] == {"half_life": 2.0, "first_share": 0.4, "last_share": 0.4, "order": 1}
    assert outcomes_of(told, Model.LAST) == {"call": 1.0, "mail": 1.0, "web": 0.0}
    assert outcomes_of(told, Model.FIRST) == {"call": 0.0, "mail": 2.0, "web": 0.0}
    assert outcomes_of(told, Model.LINEAR) == pytest.approx({"call": 1 / 3, "mail": 4 / 3, "web": 1 / 3})
    assert outcomes_of(told, Model.POSITION) == pytest.approx({"call": 0.4, "mail": 1.4, "web": 0.2})
    for model in MODELS:
        assert told["totals"][model] == pytest.approx({"outcomes": 2.0, "value": 90.0}, rel=1e-9)


def test_without_a_state_people_are_told_apart_by_what_was_recorded(files: Files, tmp_path: Path) -> None:
    for path in files.state.iterdir():
        path.unlink()
    files.state.rmdir()
    told = attributed(tmp_path, "--data", files.root, "--goal", "click")
    assert (told["people"], told["people_by"]) == (3, "recorded")
    assert outcomes_of(told, Model.LINEAR) == pytest.approx({"call": 0.5, "mail": 1.5, "web": 0.0})
    assert not files.state.exists(), "nothing is made that was not there"


def test_state_of_another_log_is_not_believed(files: Files, tmp_path: Path) -> None:
    with closing(LmdbStore(files.state, MAP_BYTES)) as store, closing(LmdbLog(tmp_path / "other", MAP_BYTES)) as log:
        Projector(log, store, {CATALOG.sha256: CATALOG}.__getitem__)
    assert attributed(tmp_path, "--data", files.root, "--goal", "click")["people_by"] == "recorded"


def test_window_and_since_bound_what_counts(files: Files, tmp_path: Path) -> None:
    half_an_hour = str(0.5 / 24)
    told = attributed(tmp_path, "--data", files.root, "--goal", "click", "--window", half_an_hour)
    assert (told["outcomes"], told["unled_outcomes"], told["unled_value"]) == (1, 1, 0.0)
    assert outcomes_of(told, Model.LINEAR) == {"call": 1.0, "mail": 0.0, "web": 0.0}, "seen when it was bought"
    ended = run("--data", files.root, "--goal", "click", "--since", "2100-01-01")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "no path to share" in ended.stderr


def test_tables_show_every_channel_every_model_and_the_sums(files: Files) -> None:
    ended = run("--data", files.root, "--goal", "click")
    assert ended.exit_code == 0
    lines = ended.stdout.splitlines()
    for title in ("last", "first", "linear", "time decay", "position", "Markov", "removal effect"):
        assert title in lines[2]
    sums = [line for line in lines if "all channels" in line]
    assert [line.count("2.00") for line in sums] == [6, 0]
    assert [line.count("90.00") for line in sums] == [0, 6]
    assert "3 paths, 5 touchpoints: 2 outcomes worth 90.00, 1 without one; Markov order 1" in lines
    assert "2 people, told apart by the profile they have now" in lines


def test_faults_are_told_and_nothing_is_shared_out(files: Files, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("path,total_conversions\na > b,many\n")
    for arguments, said in (
        (("--data", files.root, "--goal", "sale"), "no goal is named 'sale'"),
        (("--data", nowhere, "--goal", "click"), "is not the data directory of a server that has run"),
        (("--paths", wrong), "wrong.csv:2.total_conversions"),
    ):
        ended = run(*arguments)
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert said in ended.stderr
        json.loads(ended.stderr)
    for blob in files.registry.iterdir():
        if blob.is_file():
            blob.unlink()
    ended = run("--data", files.root, "--goal", "click")
    assert (ended.exit_code, "cannot be read" in ended.stderr) == (1, True)


def test_names_of_channels_are_shown_as_they_are(tmp_path: Path) -> None:
    """They come from a file: what they look like to a terminal is nobody's business."""
    path = tmp_path / "paths.csv"
    path.write_text("path,total_conversions\n[/bold] > [red]mail > web[/],2\n[link=https://x]y > :smile:,1\n")
    ended = run("--paths", path)
    assert ended.exit_code == 0
    for name in ("[/bold]", "[red]mail", "web[/]", "[link=https://x]y", ":smile:"):
        assert name in ended.stdout


def damaged(folder: Path) -> list[Path]:
    """Write files that are not what they seem."""
    rows = "path,total_conversions\n" + "".join(f"a{i} > b,{i}\n" for i in range(2_000))
    packed = bytearray(gzip.compress(rows.encode()))
    no_gzip, cut, altered = (folder / f"{name}.csv.gz" for name in ("no_gzip", "cut", "altered"))
    no_gzip.write_text(rows)
    cut.write_bytes(packed[: len(packed) // 2])
    packed[20:-8] = b"\xff" * (len(packed) - 28)
    altered.write_bytes(packed)
    no_parquet, empty, no_text = folder / "no.parquet", folder / "empty.csv", folder / "no_text.csv"
    no_parquet.write_text(rows)
    empty.write_bytes(b"")
    no_text.write_bytes(rows.encode("utf-16"))
    return [no_gzip, cut, altered, no_parquet, empty, no_text]


def test_damaged_files_are_refused_in_words(tmp_path: Path) -> None:
    for path in damaged(tmp_path):
        ended = run("--paths", path)
        assert (ended.exit_code, ended.stdout) == (1, ""), path.name
        assert json.loads(ended.stderr)["message"]


def test_parquet_whose_texts_are_none_is_refused_in_words(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="untested: that a Parquet file with damaged texts is refused")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "paths.parquet"
    texts = pyarrow.array([b"a > \xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"path": texts, "total_conversions": [1]}), path)
    ended = run("--paths", path)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "damaged" in json.loads(ended.stderr)["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--paths", "FILE", "--data", "FOLDER", "--goal", "click"],
        ["--data", "FOLDER"],
        ["--paths", "FILE", "--first-share", "0.7", "--last-share", "0.4"],
        ["--paths", "FILE", "--order", "4"],
        ["--paths", "FILE", "--half-life", "0"],
        ["--data", "FOLDER", "--goal", "click", "--window", "0"],
    ],
)
def test_wrong_calls_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "paths.csv").write_text("path,total_conversions\na,1\n")
    real = {"FILE": str(tmp_path / "paths.csv"), "FOLDER": str(tmp_path)}
    assert run(*(real.get(each, each) for each in arguments)).exit_code == 2


def set_of_paths() -> Path:
    path = Path(os.environ.get("TSUGI_DATASETS_DIR", "")) / "channel_paths" / "PathData.parquet"
    if not path.is_file():
        pytest.skip(
            "set channel_paths is absent: TSUGI_DATASETS_DIR must name the folder that holds "
            "channel_paths/PathData.parquet; untested: that totals of a real set of paths are conserved"
        )
    pytest.importorskip("pyarrow", reason="the set is a Parquet file")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 3])
def test_totals_of_a_public_set_are_conserved_by_every_model(tmp_path: Path, order: int) -> None:
    told = attributed(tmp_path, "--paths", set_of_paths(), "--order", str(order))
    assert (told["paths"], told["outcomes"], told["silences"], len(told["channels"])) == (10_000, 19_785, 68_602, 12)
    assert round(told["value"], 2) == 74_802.97
    for model in MODELS:
        assert told["totals"][model]["outcomes"] == pytest.approx(19_785, rel=1e-9, abs=0.0)
        assert told["totals"][model]["value"] == pytest.approx(told["value"], rel=1e-9, abs=0.0)
    first, last = outcomes_of(told, Model.FIRST), outcomes_of(told, Model.LAST)
    assert [first[name] for name in ("alpha", "iota", "eta")] == [6_308, 4_606, 3_164]
    assert [last[name] for name in ("alpha", "eta", "iota")] == [8_447, 4_167, 3_355]
