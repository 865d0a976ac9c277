"""Random documents: the answer is a catalog or a list of faults, and what is JSON means what JSON means."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.loading import load_catalog
from server.errors import TsugiError
from tsugi.v1 import catalog_pb2

CATALOG: Final[dict[str, Any]] = {
    "name": "Winter",
    "profileAttributes": [{"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0, "excludedFromLearning": True}],
    "sources": [{"name": "crm", "party": "PARTY_FIRST", "trust": 0, "attributes": ["age"], "silenceMax": "60s"}],
    "windows": [
        {"kind": "WINDOW_KIND_SUM", "filter": "event.total > 1.0", "span": "86400s", "center": 0},
        {"kind": "WINDOW_KIND_COUNT", "session": True},
    ],
    "recencyFrequencyMonetary": [{"name": "spend", "span": "3600s"}],
    "segments": [{"name": "loyal", "expression": "profile.age > 3.0", "excludedFromLearning": True}],
    "journey": {
        "stages": [{"name": "awareness"}],
        "transitions": [{"fromStages": ["awareness"], "outcomeType": "click", "toStage": "awareness"}],
    },
    "matching": {"off": True, "fields": [{"attribute": "age", "weights": [1, -0.5]}], "linkWeightMin": 12.5},
    "goals": [{"attributionWindow": "3600s", "outcomes": [{"type": "click", "reward": 1}]}],
    "placements": [{"countMax": 2, "exploration": {"squareCb": {"gamma": 10}}}],
    "actions": [
        {
            "validFromTime": "2026-01-01T00:00:00Z",
            "valueMicros": "1000000",
            "attributes": {"price": 9.5, "sport": "ski"},
            "treatments": [{"content": {"title": "Warm", "sizes": [38, 39], "more": {"on": None}}}],
        }
    ],
}

words = st.sampled_from(
    ["name", "actions", "attributes", ": ", "- ", "\n", "\n  ", "[", "]", "{", "}", ", ", "&a ", "*a", "!x ", "!!int ",
     "'", '"', "\\", "#", "|\n", "%YAML 1.1\n", "---\n", "<<: ", "1", "0x", "1e5", "~", "true", "é", "\t", "2026-01-01"]
)  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=60), st.lists(words, max_size=24).map("".join)))
def test_any_text_is_a_catalog_or_a_list_of_faults(text: str) -> None:
    try:
        load_catalog(text)
    except TsugiError as error:
        assert error.violations
        assert all("\n" not in violation.path + violation.description for violation in error.violations)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_in_any_place_means_what_it_means_in_json_or_is_a_fault(data: st.DataObject) -> None:
    tree = json.loads(json.dumps(CATALOG))
    place = tree
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    try:
        catalog = load_catalog(json.dumps(tree))
    except TsugiError as error:
        assert error.violations
    else:
        assert catalog == json_format.ParseDict(tree, catalog_pb2.Catalog())


def test_the_document_that_is_varied_is_a_catalog() -> None:
    assert load_catalog(json.dumps(CATALOG)) == json_format.ParseDict(CATALOG, catalog_pb2.Catalog())
