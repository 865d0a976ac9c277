"""What a branch changed about a decision, in the catalog's own words.

Handed a catalog's message and the assignments that a record keeps; for explanations, which quote the text that refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from server.catalog.contact_terms import Named
from tsugi.log.v1.record_pb2 import DecisionRecord
from tsugi.v1 import catalog_pb2


def branches_of(message: catalog_pb2.Catalog, record: DecisionRecord) -> Iterator[catalog_pb2.Branch]:
    """Yield the branches that a person was decided for with, in the order in which they apply."""
    assigned = {each.experiment: each.branch for each in record.assignments}
    for experiment in message.experiments:
        for branch in experiment.branches:
            if assigned.get(experiment.name) == branch.name:
                yield branch


def varied_rule(
    message: catalog_pb2.Catalog, record: DecisionRecord, action: catalog_pb2.Action, layer: str
) -> str | None:
    """Return what an action's own rule of a layer was changed to; None: it was not changed."""
    text: str | None = None
    for branch in branches_of(message, record):
        for varied in branch.actions:
            if layer in ("applicability", "suitability") and varied.HasField(layer) and Named.by(varied).has(action):
                text = getattr(varied, layer)
    return text


def varied_exploration(message: catalog_pb2.Catalog, record: DecisionRecord, placement: str) -> catalog_pb2.Exploration:
    """Return how a placement explored: as a branch says, or as it says itself."""
    exploration = next(each.exploration for each in message.placements if each.name == placement)
    for branch in branches_of(message, record):
        for placed in branch.placements:
            if placed.placement == placement:
                exploration = placed.exploration
    return exploration
