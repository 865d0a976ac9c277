"""Bundles taken apart and their features found in a catalog."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from server.catalog.catalog import EQUALS, SCALED, UNKNOWN, Catalog
from server.catalog.compile import compile_catalog
from server.catalog.loading import load_catalog
from server.decisioning.bundle_columns import bundle_columns as columns
from server.errors import TsugiError, Violation
from server.registry.bundle import VIOLATIONS_MAX, golden_rows, parse, read_verdict
from tests.support.bundles import CATALOG, FEATURES, good_bundle, inputs, mlp
from tests.support.hostile_bundles import HOSTILE
from tsugi.log.v1.bundle_pb2 import Bundle, Feature, Scaled
from tsugi.v1.error_reason_pb2 import ErrorReason

MISMATCH = ErrorReason.ERROR_REASON_BUNDLE_CONTRACT_MISMATCH


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return compile_catalog(load_catalog(CATALOG))


def refusal(call: Callable[[], object]) -> TsugiError:
    with pytest.raises(TsugiError) as caught:
        call()
    return caught.value


def test_good_bundle_comes_back_as_it_was() -> None:
    bundle = good_bundle()
    assert parse(bundle.SerializeToString()) == bundle


def test_golden_rows_are_rows_of_the_width_of_the_features() -> None:
    rows, outputs = golden_rows(good_bundle())
    np.testing.assert_array_equal(rows, inputs())
    np.testing.assert_array_equal(outputs, mlp().score(inputs()))


CHEAP = (
    ErrorReason.ERROR_REASON_BUNDLE_FORMAT_REFUSED,
    ErrorReason.ERROR_REASON_BUNDLE_MALFORMED,
    ErrorReason.ERROR_REASON_BUNDLE_TOO_COMPLEX,
    MISMATCH,
)


def test_parsing_alone_refuses_only_for_the_reason_the_gate_would() -> None:
    refused = 0
    for hostile in HOSTILE:
        try:
            parse(hostile.make())
        except TsugiError as error:
            refused += 1
            assert error.reason == hostile.reason, hostile.name
            assert error.reason in CHEAP
    assert refused >= 15


def test_archive_is_named_for_what_it_is() -> None:
    assert refusal(lambda: parse(b"PK\x03\x04")).metadata == {"format": "a zip archive (or npz)"}


@pytest.mark.parametrize("name", ["goal", "input_name", "output_name"])
@pytest.mark.parametrize("text", ["", "x" * 129])
def test_name_without_text_or_too_long_is_a_violation(name: str, text: str) -> None:
    bundle = good_bundle()
    setattr(bundle.manifest, name, text)
    error = refusal(lambda: parse(bundle.SerializeToString()))
    assert error.reason == MISMATCH
    assert [violation.path for violation in error.violations] == [f"manifest.{name}"]


def test_output_that_is_neither_probability_nor_log_odds_is_a_violation() -> None:
    bundle = good_bundle()
    bundle.manifest.ClearField("output_kind")
    assert [fault.path for fault in violations(bundle)] == ["manifest.output_kind"]


@pytest.mark.parametrize(
    ("feature", "path"),
    [
        (Feature(fact="", is_unknown=True), "fact"),
        (Feature(fact="profile.age"), ""),
        (Feature(fact="profile.age", equals=""), "equals"),
        (Feature(fact="profile.age", is_unknown=False), "is_unknown"),
        (Feature(fact="profile.age", scaled=Scaled(spread=-1.0, limit=1.0)), "scaled.spread"),
        (Feature(fact="profile.age", scaled=Scaled(spread=1.0)), "scaled.limit"),
        (Feature(fact="profile.age", scaled=Scaled(spread=1.0, limit=1e39)), "scaled.limit"),
        (Feature(fact="profile.age", scaled=Scaled(spread=1.0, limit=1.0, center=float("inf"))), "scaled.center"),
        (
            Feature(fact="profile.age", scaled=Scaled(spread=1.0, limit=1.0, when_unknown=float("nan"))),
            "scaled.when_unknown",
        ),
    ],
)
def test_incomplete_feature_is_a_violation_with_its_path(feature: Feature, path: str) -> None:
    bundle = good_bundle()
    bundle.manifest.features[3].CopyFrom(feature)
    assert [fault.path for fault in violations(bundle)] == [f"manifest.features[3].{path}".removesuffix(".")]


def test_all_faults_are_told_at_once_but_not_without_end() -> None:
    bundle = good_bundle()
    bundle.manifest.goal = ""
    del bundle.manifest.features[:]
    bundle.manifest.features.extend([Feature()] * 512)
    error = refusal(lambda: parse(bundle.SerializeToString()))
    assert len(error.violations) == VIOLATIONS_MAX
    assert error.metadata["faults"] == "1026"  # the goal, two a feature, and the width of the golden rows


def test_more_features_than_allowed_are_a_violation() -> None:
    bundle = good_bundle()
    bundle.manifest.features.extend([FEATURES[0]] * 512)
    assert "manifest.features" in [fault.path for fault in violations(bundle)]


@pytest.mark.parametrize("n", [0, 257])
def test_golden_rows_are_one_to_256(n: int) -> None:
    bundle = good_bundle()
    bundle.golden_rows.inputs = bytes(4 * 5 * n)
    bundle.golden_rows.outputs = bytes(4 * n)
    assert [fault.path for fault in violations(bundle)] == ["golden_rows.outputs"]


def test_golden_rows_that_are_not_finite_are_a_violation() -> None:
    bundle = good_bundle()
    bundle.golden_rows.inputs = np.full((12, 5), np.inf, "<f4").tobytes()
    assert [fault.path for fault in violations(bundle)] == ["golden_rows.inputs"]


def violations(bundle: Bundle) -> tuple[Violation, ...]:
    error = refusal(lambda: parse(bundle.SerializeToString()))
    assert error.reason == MISMATCH
    return error.violations


def test_columns_name_their_facts_and_keep_their_places(catalog: Catalog) -> None:
    made = columns(good_bundle().manifest, catalog)
    assert made.shared.names == ("profile.age", "profile.age?", "context.device=phone", "profile.member=true")
    assert made.shared_positions.tolist() == [0, 1, 2, 4]
    assert made.action.names == ("action.price",)
    assert made.action_positions.tolist() == [3]
    space = catalog.space.index
    assert made.shared.sources.tolist() == [
        space[fact] for fact in ("profile.age", "profile.age", "context.device", "profile.member")
    ]
    assert catalog.action_facts[made.action.sources[0]].name == "action.price"
    assert made.shared.kinds.tolist() == [SCALED, UNKNOWN, EQUALS, EQUALS]
    phone = catalog.space.facts[space["context.device"]].codes["phone"]
    assert made.shared.parameters.tolist() == [
        [40.0, 15.0, 4.0, -0.5],
        [0.0] * 4,
        [phone, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
    ]


def test_columns_are_frozen_and_typed_for_kernels_even_when_there_are_none(catalog: Catalog) -> None:
    manifest = good_bundle().manifest
    del manifest.features[3]
    made = columns(manifest, catalog)
    assert made.action.parameters.shape == (0, 4)
    for part, positions in ((made.shared, made.shared_positions), (made.action, made.action_positions)):
        arrays = (part.sources, part.kinds, part.parameters, positions)
        assert [array.dtype.name for array in arrays] == ["int32", "uint8", "float64", "int32"]
        assert not any(array.flags.writeable for array in arrays)


def test_boolean_false_is_the_code_zero(catalog: Catalog) -> None:
    manifest = good_bundle().manifest
    manifest.features[4].equals = "false"
    assert columns(manifest, catalog).shared.parameters[3, 0] == 0.0


@pytest.mark.parametrize(
    ("feature", "path", "hint"),
    [
        (Feature(fact="profile.agee", is_unknown=True), "fact", "did you mean profile.age?"),
        (Feature(fact="now", is_unknown=True), "fact", ""),
        (Feature(fact="context.device", scaled=Scaled(spread=1.0, limit=1.0)), "scaled", "context.device is no number"),
        (Feature(fact="profile.member", scaled=Scaled(spread=1.0, limit=1.0)), "scaled", "profile.member is no number"),
        (Feature(fact="context.device", equals="phon"), "equals", "did you mean phone?"),
        (Feature(fact="profile.member", equals="yes"), "equals", "no such value"),
        (Feature(fact="profile.age", equals="40"), "equals", "neither a category nor a boolean"),
        (Feature(fact="profile.note", equals="x"), "equals", "neither a category nor a boolean"),
    ],
)
def test_feature_the_catalog_cannot_give_is_refused_with_path_and_hint(
    catalog: Catalog, feature: Feature, path: str, hint: str
) -> None:
    manifest = good_bundle().manifest
    manifest.features[2].CopyFrom(feature)
    error = refusal(lambda: columns(manifest, catalog))
    assert error.reason == MISMATCH
    ((where, what),) = error.violations
    assert where == f"manifest.features[2].{path}"
    assert hint in what


def test_unknown_goal_is_refused_beside_every_other_fault(catalog: Catalog) -> None:
    manifest = good_bundle().manifest
    manifest.goal = "purchases"
    manifest.features[1].fact = "profile.height"
    error = refusal(lambda: columns(manifest, catalog))
    assert [violation.path for violation in error.violations] == ["manifest.goal", "manifest.features[1].fact"]
    assert error.violations[0].description == "no such goal; did you mean purchase?"


@pytest.mark.parametrize(
    "verdict",
    [
        b"",
        b"[]",
        b"null",
        b'{"reason": "ERROR_REASON_INTERNAL_ERROR", "message": "", "violations": [], "metadata": {}}',
        b'{"reason": "ERROR_REASON_BUNDLE_MALFORMED", "message": "", "violations": [], "metadata": {"message": ""}}',
        b'{"reason": "ERROR_REASON_BUNDLE_MALFORMED", "message": "", "violations": [1], "metadata": {}}',
        b'{"reason": ["ERROR_REASON_BUNDLE_MALFORMED"], "message": "", "violations": [], "metadata": {}}',
        b"[" * 60_000,
        b"\xff\xfe",
    ],
)
def test_verdict_that_the_gate_does_not_write_refuses_the_bundle(verdict: bytes) -> None:
    error = read_verdict(verdict)
    assert error is not None
    assert error.reason == ErrorReason.ERROR_REASON_BUNDLE_CRASHED_VALIDATOR
