"""The benchmark of learning reads sets as they are, repeats by its seed, and counts losses right."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("vowpalwabbit", reason="the peer is not installed: run make setup")

from tests.benchmark import learning, vowpal
from tests.benchmark.learning_sets import (
    BanditSet,
    Column,
    SetError,
    fact_rows,
    known_sets,
    make_catalog,
    order,
    read_set,
)
from tests.benchmark.learning_speed import outcomes_per_s

TEXT = "4.5, red:ish, no\n-1, blue, yes\n\n2e3, red:ish, no\n"
UNIFORM = {"epsilonGreedy": {"epsilon": 1.0}}


def write(folder: Path, text: str, name: str = "set.dat.gz") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def simple_world(n: int = 600) -> BanditSet:
    """Make a world whose best action is known: the class is told by one number in hundreds, blurred by others."""
    rng = np.random.default_rng(11)
    classes = rng.integers(0, 3, n)
    cells = [[f"{300 * c + noise:.3f}", f"{other:.3f}", "left" if c else "right"] for c, noise, other in zip(
        classes.tolist(), rng.normal(500.0, 30.0, n), rng.normal(0.0, 0.01, n), strict=True)]  # fmt: skip
    return BanditSet("made", (Column("n0", ()), Column("n1", ()), Column("c2", ("left", "right"))), cells, classes, 3)


def test_a_column_of_numbers_is_a_number_and_any_other_a_category(tmp_path: Path) -> None:
    data = read_set(write(tmp_path, TEXT), "made")
    assert data.columns == (Column("n0", ()), Column("c1", ("blue", "red:ish")))
    assert data.classes.tolist() == [0, 1, 0]
    assert data.cells == [["4.5", "red:ish"], ["-1", "blue"], ["2e3", "red:ish"]]


def test_the_class_may_come_first(tmp_path: Path) -> None:
    data = read_set(write(tmp_path, "e,x,1\np,y,2\n"), "made", is_class_first=True)
    assert (data.classes.tolist(), data.cells) == ([0, 1], [["x", "1"], ["y", "2"]])


@pytest.mark.parametrize("text", ["", "1,a\n2\n", "1\n2\n", "1,a\n2,a\n"])
def test_what_is_no_set_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(SetError, match=r"set\.dat\.gz"):
        read_set(write(tmp_path, text), "made")


def test_what_is_not_gzip_although_it_begins_so_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.dat.gz"
    path.write_bytes(gzip.compress(TEXT.encode())[:20])
    with pytest.raises(SetError, match=r"cut\.dat\.gz"):
        read_set(path, "made")


def test_known_sets_are_those_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, TEXT, "keel/vowel.dat.gz")
    assert [data.name for data in known_sets(tmp_path)] == ["vowel"]
    with pytest.raises(SetError, match=r"does not hold keel/splice\.dat\.gz"):
        known_sets(tmp_path, ["vowel", "splice"])
    with pytest.raises(SetError, match="no set is called 'iris'"):
        known_sets(tmp_path, ["iris"])


def test_learners_read_numbers_as_the_file_has_them_and_categories_by_value(tmp_path: Path) -> None:
    data = read_set(write(tmp_path, TEXT), "made")
    catalog = make_catalog(data, UNIFORM)
    facts = fact_rows(data, catalog)
    assert catalog.learned.names == ("profile.n0", "profile.c1=blue", "profile.c1=red:ish")
    assert facts[:, catalog.space.index["profile.n0"]].tolist() == [4.5, -1.0, 2000.0]
    assert facts[:, catalog.space.index["profile.c1"]].tolist() == [1.0, 0.0, 1.0]
    assert catalog.goals[0].base_log_odds == pytest.approx(0.0)  # of two classes


def test_the_peer_is_told_the_same(tmp_path: Path) -> None:
    data = read_set(write(tmp_path, TEXT), "made")
    assert vowpal.shared_lines(data) == [
        "shared |U n0:4.5 c1=1", "shared |U n0:-1 c1=0", "shared |U n0:2e3 c1=1",
    ]  # fmt: skip
    assert vowpal.examples("shared |U n0:1", 2) == ["shared |U n0:1", "|A class_000", "|A class_001"]
    assert vowpal.examples("shared |U n0:1", 2, 1, 1.0, 0.25)[2] == "0:1:0.25 |A class_001"


def test_an_order_is_a_shuffle_of_its_seed() -> None:
    data = simple_world(50)
    assert sorted(order(data, 1, 10_000)) == list(range(50))
    assert order(data, 1, 20) == order(data, 1, 10_000)[:20] != order(data, 2, 20)


def test_the_same_seed_plays_the_same_run() -> None:
    data = simple_world(120)
    rows = order(data, 0, 120)
    assert learning.play(data, rows, 0) == learning.play(data, rows, 0)
    assert learning.play(data, rows, 0).losses != learning.play(data, rows, 1).losses
    settings = vowpal.VARIANTS["vw_squarecb"]
    assert vowpal.play(data, rows, 0, settings) == vowpal.play(data, rows, 0, settings)


def test_loss_is_what_was_decided_before_it_was_learned_from() -> None:
    data = simple_world(90)
    rows = order(data, 0, 90)
    played = learning.play(data, rows, 0)
    right = [f"class_{data.classes[row]:03}" for row in rows]
    assert [lesson.reward for lesson in played.lessons] == [
        float(lesson.action == name) for lesson, name in zip(played.lessons, right, strict=True)
    ]
    assert played.losses == [1.0 - lesson.reward for lesson in played.lessons]
    assert played.loss == pytest.approx(sum(played.losses) / 90)


def test_a_world_with_a_known_best_action_is_learned() -> None:
    """Uniform loses two thirds; five standard errors of 600 rows are 0.1, and those of the last 200 are 0.17."""
    data = simple_world()
    rows = order(data, 0, 600)
    assert learning.play(data, rows, 0, UNIFORM).loss == pytest.approx(2 / 3, abs=0.1)
    losses = learning.play(data, rows, 0).losses
    assert np.mean(losses) < 0.35
    assert np.mean(losses[-200:]) < 0.15


def test_figures_are_means_over_seeds_and_sets() -> None:
    data = simple_world(60)
    figures = learning.measure([data, data._replace(name="again")], n_seeds=2, n_rows_max=40)
    losses = [learning.play(data, order(data, seed, 40), seed).loss for seed in range(2)]
    assert figures["sets"]["made"]["tsugi"] == pytest.approx(np.mean(losses))
    assert set(figures["sets"]["made"]) == set(figures["mean"]) == {"tsugi", "vw_epsilon", "vw_squarecb"}
    assert figures["mean"] == pytest.approx(figures["sets"]["again"])
    pace = {"outcomes_per_s": 12_345.6, "learning_lag_p99_ms": 250.0}
    lines = learning.markdown(figures | pace).splitlines()
    assert lines[-1].endswith("12,346 outcomes/s (40 features, 100 actions). Learning lag p99 under load: 250 ms.")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| made", "| again", "| mean"]


def test_the_pace_is_that_of_outcomes_learned_from() -> None:
    assert math.isfinite(pace := outcomes_per_s(n_outcomes=200, n_passes=1))
    assert pace > 0


def test_goals_are_judged_by_the_mean_and_by_the_worst_set() -> None:
    one = {"tsugi": 0.3, "vw_epsilon": 0.26, "vw_squarecb": 0.2}
    assert learning.verdicts({"a": one}, one) == {
        "mean_at_most_vw_squarecb": False, "no_set_far_above_vw_epsilon": True,
    }  # fmt: skip
    worse = one | {"tsugi": 0.32}
    assert learning.verdicts({"a": one, "b": worse}, one | {"tsugi": 0.1}) == {
        "mean_at_most_vw_squarecb": True, "no_set_far_above_vw_epsilon": False,
    }  # fmt: skip


def test_without_data_it_says_what_is_missing(tmp_path: Path) -> None:
    result = CliRunner().invoke(learning.main, [], env={"TSUGI_DATASETS_DIR": None})
    assert result.exit_code == 2
    assert "TSUGI_DATASETS_DIR" in result.output
    result = CliRunner().invoke(learning.main, ["--data", str(tmp_path)])
    assert result.exit_code == 2
    assert "keel/chess.dat.gz" in result.output
