"""The gate as it runs: every bundle gets its verdict from a process of its own, and the test's process outlives all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper

from server.errors import TsugiError
from server.registry.bundle import GateLimits, check_in_sandbox, parse
from server.registry.scorers import OnnxScorer, open_session
from tests.support import hostile_bundles
from tests.support.bundles import FEATURES, INPUT, OUTPUT, Floats, bundle, good_bundle, inputs, model, tree, value
from tests.support.hostile_bundles import HOSTILE, Hostile
from tsugi.log.v1.bundle_pb2 import Bundle
from tsugi.v1.error_reason_pb2 import ErrorReason

pytestmark = pytest.mark.slow

AT_ONCE = 2
WAIT_S = 30.0
CRASHED = ErrorReason.ERROR_REASON_BUNDLE_CRASHED_VALIDATOR


def verdict(data: bytes, limits: GateLimits | None = None) -> TsugiError | None:
    """Return the refusal, or None for a bundle that passed."""
    try:
        check_in_sandbox(data, limits=limits or GateLimits())
    except TsugiError as error:
        return error
    return None


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, not for ever."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    children = set(psutil.Process().children(recursive=True))
    yield
    assert list(folder.iterdir()) == []
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.parametrize(
    "good",
    [
        good_bundle(),
        good_bundle(is_probability=False),
        good_bundle(hidden=(64, 64, 64)),
        bundle(model([tree()]), outputs=np.where(inputs()[:, 0] <= 0.0, 0.1, 0.9)),
        hostile_bundles.marked_as_the_other_format(),
    ],
    ids=["probability", "log_odds", "mlp_64_64_64_1", "decision_tree", "marked_as_the_other_format"],
)
def test_good_bundle_passes_and_scores_its_golden_rows(good: Bundle) -> None:
    assert verdict(good.SerializeToString()) is None
    log_odds = OnnxScorer(good).score(inputs())
    stated = np.frombuffer(good.golden_rows.outputs, "<f4")
    if good.manifest.output_kind == good_bundle().manifest.output_kind:
        stated = np.log(stated) - np.log1p(-stated)
    np.testing.assert_allclose(log_odds, stated, atol=1e-3)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, TsugiError | None]:
    """Push the whole corpus, two at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = pool.map(lambda hostile: verdict(hostile.make()), HOSTILE)
        return dict(zip((hostile.name for hostile in HOSTILE), made, strict=True))


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_bundle_is_refused_for_its_reason(hostile: Hostile, verdicts: dict[str, TsugiError | None]) -> None:
    refusal = verdicts[hostile.name]
    assert refusal is not None, "it would have been served"
    assert ErrorReason.Name(refusal.reason) == ErrorReason.Name(hostile.reason), refusal.message
    if hostile.how:
        assert refusal.metadata["how"] == hostile.how
    assert "Traceback" not in refusal.message
    assert "/onnxruntime" not in refusal.message


def test_refusals_carry_what_varies_as_metadata(verdicts: dict[str, TsugiError | None]) -> None:
    def metadata(name: str) -> dict[str, str]:
        refusal = verdicts[name]
        assert refusal is not None
        return refusal.metadata

    assert metadata("weights_at_an_absolute_path") == {"tensor": "w"}
    assert metadata("operator_of_a_custom_domain") == {"operator": "com.microsoft::FusedMatMul"}
    assert metadata("one_node_too_many") == {"limit": "10000", "got": "10001"}
    assert metadata("correct_but_slow")["limit_us"] == "5000"


def test_violations_come_back_from_the_child(verdicts: dict[str, TsugiError | None]) -> None:
    refusal = verdicts["spread_of_zero_and_limit_that_is_not_a_number"]
    assert refusal is not None
    paths = [violation.path for violation in refusal.violations]
    assert paths == ["manifest.features[0].scaled.spread", "manifest.features[0].scaled.limit"]


def endless() -> bytes:
    return hostile_bundles.hours_of_folding_constants()


def how(refusal: TsugiError | None) -> str:
    assert refusal is not None
    assert refusal.reason == CRASHED
    return refusal.metadata["how"]


def test_bundle_that_computes_too_long_is_refused() -> None:
    assert how(verdict(endless(), GateLimits(cpu_s=1, wall_s=60.0))) == "processor time limit"


def test_bundle_that_takes_too_long_is_refused() -> None:
    assert how(verdict(endless(), GateLimits(cpu_s=60, wall_s=0.5))) == "wall-clock limit"


def test_bundle_that_kills_its_process_is_refused() -> None:
    refusals: list[TsugiError | None] = []
    before = set(psutil.Process().children())
    checking = threading.Thread(target=lambda: refusals.append(verdict(endless(), GateLimits(cpu_s=60, wall_s=60.0))))
    checking.start()
    until(lambda: bool(set(psutil.Process().children()) - before))
    (child,) = set(psutil.Process().children()) - before
    child.send_signal(signal.SIGSEGV)
    checking.join(WAIT_S)
    assert how(refusals[0]) == "signal"


def test_checking_process_dies_with_the_process_that_asked(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(endless())
    asking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from server.registry.bundle import GateLimits, check_in_sandbox;"
            "check_in_sandbox(Path(sys.argv[1]).read_bytes(), limits=GateLimits(cpu_s=600, wall_s=600.0))",
            str(tmp_path / "bundle"),
        ],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        until(lambda: bool(psutil.Process(asking.pid).children()))
        (child,) = psutil.Process(asking.pid).children()
        until(lambda: child.nice() == 10)  # it has confined itself
    finally:
        asking.kill()
        asking.wait(WAIT_S)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


TRY_EVERYTHING = """
import ctypes, json, os, socket, subprocess, sys, threading
from server.registry.sandbox import confine

attempts = {
    "read a file": lambda: open("/etc/passwd"),
    "write a file": lambda: open("/tmp/tsugi-sandbox", "w"),
    "list a folder": lambda: os.listdir("/"),
    "remove a file": lambda: os.unlink("/tmp/tsugi-sandbox"),
    "open a connection": lambda: socket.socket(),
    "open a local connection": lambda: socket.socketpair(),
    "fork": lambda: os.fork(),
    "start a program": lambda: subprocess.run(["true"]),
    "become a program": lambda: os.execv("/bin/true", ["true"]),
    "start a thread": lambda: threading.Thread(target=print).start(),
    "signal a process": lambda: os.kill(os.getppid(), 0),
    "raise its own limit": lambda: os.nice(-5),
    "take two gigabytes": lambda: bytearray(2 << 30),
}
confine(os.getppid(), 1 << 30, 5)
done = []
for name, attempt in attempts.items():
    try:
        attempt()
        done.append(name)
    except (OSError, RuntimeError, MemoryError):
        pass
os.write(1, json.dumps(done).encode())
"""


def test_confined_process_can_do_nothing_but_compute() -> None:
    made = subprocess.run([sys.executable, "-c", TRY_EVERYTHING], capture_output=True, check=True, timeout=WAIT_S)
    assert json.loads(made.stdout) == []


def test_process_whose_parent_is_gone_does_not_begin() -> None:
    script = "from server.registry.sandbox import confine; confine(1 << 22, 1 << 30, 5)"
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=WAIT_S)
    assert b"NoSandboxError" in made.stderr


def test_serving_loads_no_onnx_package_and_onnxruntime_leaves_nothing_at_home(tmp_path: Path) -> None:
    script = (
        "import sys; from server.registry import blobs, bundle, scorers;"
        "scorers.OnnxScorer(bundle.parse(sys.stdin.buffer.read())); assert 'onnx' not in sys.modules"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", script], input=good_bundle().SerializeToString(), env=home, check=True, timeout=WAIT_S
    )
    assert list(tmp_path.iterdir()) == []


def mutations(data: bytes, n: int) -> Iterator[bytes]:
    """Yield n copies of data, each with a few bits flipped or its end cut off."""
    random = np.random.default_rng(2)
    for _ in range(n):
        altered = bytearray(data)
        if random.random() < 0.2:
            del altered[random.integers(len(altered)) :]
        for _ in range(random.integers(1, 4) if altered else 0):
            altered[random.integers(len(altered))] ^= 1 << int(random.integers(8))
        yield bytes(altered)


def is_clean(refusal: TsugiError | None) -> bool:
    return refusal is None or ErrorReason.Name(refusal.reason).startswith("ERROR_REASON_BUNDLE_")


@pytest.mark.long
def test_flipped_and_cut_bundles_get_a_verdict() -> None:
    data = good_bundle().SerializeToString()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        refusals = list(pool.map(verdict, mutations(data, 400)))
    assert all(is_clean(refusal) for refusal in refusals)
    assert sum(refusal is not None for refusal in refusals) > 200


# Other people's graphs.


def other_peoples_models() -> Path:
    folder = Path(os.environ.get("TSUGI_DATASETS_DIR", "")) / "onnx_models"
    if "TSUGI_DATASETS_DIR" not in os.environ or not folder.is_dir():
        pytest.skip(
            "the data set onnx_models is absent: TSUGI_DATASETS_DIR must name the folder that holds it; "
            "untested: that other people's graphs are served right or refused with a reason"
        )
    return folder


def wrapped(data: bytes) -> Bundle:
    """Make a bundle of any graph: its first input and output, and its width where it states one."""
    graph = onnx.ModelProto.FromString(data).graph
    shape = graph.input[0].type.tensor_type.shape.dim if graph.input else []
    d = int(shape[-1].dim_value) if shape else 0
    made = bundle(data, features=[FEATURES[0]] * (d if 1 <= d <= 512 else 5))
    made.manifest.input_name = graph.input[0].name if graph.input else INPUT
    made.manifest.output_name = graph.output[0].name if graph.output else OUTPUT
    return made


def test_other_peoples_graphs_are_refused_with_a_reason() -> None:
    paths = sorted(other_peoples_models().rglob("*.onnx"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = pool.map(lambda path: verdict(wrapped(path.read_bytes()).SerializeToString()), paths)
        refusals = dict(zip(paths, made, strict=True))
    assert len(refusals) >= 24
    for path, refusal in refusals.items():
        assert refusal is not None, path  # none of them is of our shape
        assert is_clean(refusal), path
        assert refusal.reason != CRASHED, path


@pytest.mark.long
def test_other_peoples_graphs_flipped_and_cut_get_a_verdict() -> None:
    paths = sorted(other_peoples_models().rglob("*.onnx"))
    altered = [wrapped(path.read_bytes()) for path in paths for _ in range(8)]
    random = np.random.default_rng(3)
    for made in altered:
        made.onnx_model = next(mutations(made.onnx_model, 1)) if random.random() < 0.5 else made.onnx_model[:-7]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert all(is_clean(refusal) for refusal in pool.map(verdict, (made.SerializeToString() for made in altered)))


def test_other_peoples_tree_is_served_right_once_it_has_our_shape() -> None:
    """The classifier declares [?, ?] and gives three columns: state its width and pick one of them."""
    path = other_peoples_models() / "sklearn-onnx" / "treecl.onnx"
    classifier = onnx.ModelProto.FromString(path.read_bytes())
    graph = classifier.graph
    given, wanted = graph.input[0].name, graph.output[1].name
    rows: Floats = np.random.default_rng(5).uniform(-2.0, 2.0, (64, 20)).astype(np.float32)
    (expected,) = open_session(path.read_bytes()).run([wanted], {given: rows})

    graph.input[0].CopyFrom(value(given, "n", 20))
    graph.initializer.append(helper.make_tensor("column", onnx.TensorProto.INT64, [1], [1]))
    graph.node.append(helper.make_node("Gather", [wanted, "column"], [OUTPUT], axis=1))
    graph.output.append(value(OUTPUT, "n", 1))
    classifier.opset_import.append(helper.make_opsetid("", 15))
    made = bundle(classifier, features=[FEATURES[0]] * 20, rows=rows, outputs=expected[:, 1])
    made.manifest.input_name = given

    assert verdict(made.SerializeToString()) is None
    propensities = 1.0 / (1.0 + np.exp(-OnnxScorer(parse(made.SerializeToString())).score(rows)))
    np.testing.assert_allclose(propensities, np.clip(expected[:, 1], 1e-6, 1.0 - 1e-6), atol=1e-5)
