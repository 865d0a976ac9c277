"""How the input of a pushed model is made from the facts of one catalog.

Handed a parsed manifest and a compiled catalog; every feature is found or said to be missing, all of them at once.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

import numpy as np

from server.catalog.catalog import EQUALS, NOW_FACT, SCALED, UNKNOWN, Catalog, Fact, FeatureColumns, Rows
from server.errors import Violation
from server.registry.bundle import contract_mismatch
from tsugi.log.v1.bundle_pb2 import Feature, Manifest
from tsugi.v1 import catalog_pb2

_SUGGESTIONS_MAX: Final = 16  # comparing names costs milliseconds, and a hostile manifest has 512 wrong ones


@dataclass(frozen=True, slots=True)
class ModelColumns:
    """How the input of one model is made from the facts of one catalog. The positions together are 0..d-1.

    Attributes:
        shared: the columns that are the same for all candidates; their sources index the fact space.
        shared_positions: int32[shared], where each stands in the model's input.
        action: the columns that differ by action; their sources index the columns of the catalog's action facts.
        action_positions: int32[action], where each stands in the model's input.
    """

    shared: FeatureColumns
    shared_positions: Rows
    action: FeatureColumns
    action_positions: Rows


def bundle_columns(manifest: Manifest, catalog: Catalog) -> ModelColumns:
    """Find each feature of a parsed manifest in a catalog and return how the model's input is made.

    Raises:
        TsugiError: BUNDLE_CONTRACT_MISMATCH: the goal or a fact is not declared, or is not of a type that the feature
            can be made from; a violation for each, with the nearest declared name.
    """
    faults = []
    if manifest.goal not in catalog.goal_rows:
        faults.append(Violation("manifest.goal", f"no such goal{_suggest(manifest.goal, catalog.goal_rows)}"))
    shared, action = _Columns(), _Columns()
    shared_rows = {fact.name: row for row, fact in enumerate(catalog.space.facts) if row != NOW_FACT}
    action_rows = {fact.name: row for row, fact in enumerate(catalog.action_facts)}
    for position, feature in enumerate(manifest.features):
        path = f"manifest.features[{position}]"
        if (row := shared_rows.get(feature.fact)) is not None:
            fault = shared.add(position, feature, row, catalog.space.facts[row])
        elif (row := action_rows.get(feature.fact)) is not None:
            fault = action.add(position, feature, row, catalog.action_facts[row])
        else:
            hint = _suggest(feature.fact, shared_rows | action_rows) if len(faults) < _SUGGESTIONS_MAX else ""
            fault = Violation("fact", f"the catalog declares no such fact{hint}")
        if fault:
            faults.append(Violation(f"{path}.{fault.path}", fault.description))
    if faults:
        raise contract_mismatch(faults)
    return ModelColumns(*shared.frozen(), *action.frozen())


class _Columns:
    """Feature columns in the making, beside their positions in the model's input."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sources: list[int] = []
        self._kinds: list[int] = []
        self._parameters: list[tuple[float, float, float, float]] = []
        self._positions: list[int] = []

    def add(self, position: int, feature: Feature, source: int, fact: Fact) -> Violation | None:
        """Add the column, or say what hinders."""
        encoding = feature.WhichOneof("encoding")
        name, kind, parameters = fact.name, SCALED, (0.0, 0.0, 0.0, 0.0)
        if encoding == "scaled":
            if fact.type != catalog_pb2.ATTRIBUTE_TYPE_NUMBER:
                return Violation("scaled", f"{fact.name} is no number; use equals or is_unknown")
            scaled = feature.scaled
            parameters = (scaled.center, scaled.spread, scaled.limit, scaled.when_unknown)
        elif encoding == "equals":
            codes = {"false": 0, "true": 1} if fact.type == catalog_pb2.ATTRIBUTE_TYPE_BOOL else fact.codes
            if fact.type not in (catalog_pb2.ATTRIBUTE_TYPE_BOOL, catalog_pb2.ATTRIBUTE_TYPE_CATEGORY):
                return Violation("equals", f"{fact.name} is neither a category nor a boolean")
            if feature.equals not in codes:
                return Violation("equals", f"{fact.name} has no such value{_suggest(feature.equals, codes)}")
            name, kind = f"{fact.name}={feature.equals}", EQUALS
            parameters = (float(codes[feature.equals]), 0.0, 0.0, 0.0)
        else:
            name, kind = f"{fact.name}?", UNKNOWN
        self._names.append(name)
        self._sources.append(source)
        self._kinds.append(kind)
        self._parameters.append(parameters)
        self._positions.append(position)
        return None

    def frozen(self) -> tuple[FeatureColumns, Rows]:
        """Return the columns and their positions, read-only."""
        parameters = np.array(self._parameters, np.float64).reshape(-1, 4)
        sources, positions = np.array(self._sources, np.int32), np.array(self._positions, np.int32)
        kinds = np.array(self._kinds, np.uint8)
        for array in (parameters, sources, positions, kinds):
            array.setflags(write=False)
        return FeatureColumns(tuple(self._names), sources, kinds, parameters), positions


def _suggest(name: str, known: dict[str, int]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
