"""A recorded decision decided again: everything after the recorded propensities, to the last bit.

Handed a record and the catalog it was decided under, it makes the core's columns again and says where they are not what
was recorded. It reads no model: propensities are inputs, because a larger matrix product may round differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from server.catalog.catalog import Catalog
from server.catalog.contact_terms import CAPS, UNLIMITED
from server.decisioning import holdout
from server.decisioning.decide import (
    BUDGET_SPENT,
    EXPLORE,
    NO_EXPLORATION,
    RANDOM_CONTROL,
    Decisions,
    OtherSurvivorsError,
    Questions,
    Scored,
    fill_again,
)
from server.decisioning.gather import asks_of, listing_of
from server.errors import TsugiError
from tsugi.log.v1.record_pb2 import DecisionRecord, SlotRecord
from tsugi.v1.decision_pb2 import Assignment, Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest

WIDE_ROWS: Final = 65_536  # rows of larger catalogs are recorded in four bytes


_Number = TypeVar("_Number", np.float32, np.float64)


class NotItsCatalogError(Exception):
    """The record speaks of what this catalog does not declare."""


def recall(record: DecisionRecord, catalog: Catalog) -> tuple[Questions, Decisions]:
    """Decide a recorded decision again.

    Args:
        record: as the log keeps it.
        catalog: the revision it was decided under.

    Returns:
        What was asked and what was decided, as columns of one request.

    Raises:
        NotItsCatalogError: it was not decided under this catalog.
        OtherSurvivorsError: other candidates pass the gates now than were recorded.

    Cost: that of a decision without its model.
    """
    try:
        questions = _questions(record, catalog)
    except (TsugiError, KeyError, ValueError) as error:
        raise NotItsCatalogError(f"the record does not fit catalog {catalog.revision}: {error}") from error
    scored = Scored(
        prior_log_odds=_column(record.prior_log_odds, np.float32),
        propensities=_column(record.propensities, np.float32),
        other_propensities=_column(record.other_propensities, np.float32),
        means=_column(record.posterior_means, np.float32),
        deviations=_column(record.posterior_deviations, np.float32),
    )
    return questions, fill_again(questions, catalog, scored)


def differences(record: DecisionRecord, catalog: Catalog) -> list[str]:
    """Say in which of its parts a record is not what deciding it again gives; nothing where it is, to the last bit.

    Raises:
        NotItsCatalogError: it was not decided under this catalog.
    """
    row_type = row_type_of(catalog)
    try:
        _, again = recall(record, catalog)
    except OtherSurvivorsError as error:
        return [*_gate_differences(record, error, row_type), "slots"]
    found = _gate_differences(record, again, row_type)
    if len(record.slots) != len(again.slot_codes):
        return [*found, "slots"]
    for place, slot in enumerate(record.slots):
        found += [f"slots[{place}].{name}" for name in _slot_differences(slot, place, again, row_type)]
    return found


def row_type_of(catalog: Catalog) -> type[np.uint16] | type[np.uint32]:
    """Return how rows are recorded."""
    return np.uint16 if len(catalog.actions.names) <= WIDE_ROWS else np.uint32


def blend_named(assignments: Iterable[Assignment], catalog: Catalog) -> int:
    """Return the blend that recorded assignments amount to.

    Raises:
        KeyError, ValueError: the catalog has no such experiment or branch.
    """
    experiments = {each.name: each for each in catalog.experiments}
    blend = 0
    for each in assignments:
        experiment = experiments[each.experiment]
        blend += (1 + experiment.branches.index(each.branch)) * experiment.stride
    return blend


def _questions(record: DecisionRecord, catalog: Catalog) -> Questions:
    request = DecideRequest.FromString(record.request)
    asks = asks_of(request, catalog)
    marks = [0] * len(asks)
    held_out = {row for each in catalog.holdouts if each.name in record.holdouts for row in each.placements}
    for i, (row, _) in enumerate(asks):
        marks[i] |= holdout.MARK if row in held_out else 0
        marks[i] |= BUDGET_SPENT if i in record.exploration_spent else 0
    named = request.candidate_actions or request.excluded_actions or request.outcomes
    listings = [listing_of(request, catalog)] if named else []
    mode = RANDOM_CONTROL if record.random_control else EXPLORE
    is_baseline = record.provenance.baseline and not record.random_control
    if is_baseline or Degradation.DEGRADATION_EXPLORATION_OFF in record.degradations:
        mode = NO_EXPLORATION
    holds = _holds(record, catalog)
    facts = _column(record.facts, np.float64)
    if facts.size != len(catalog.space.facts):
        raise ValueError(f"{facts.size} facts are recorded, {len(catalog.space.facts)} declared")
    return Questions(
        facts=facts.reshape(1, facts.size),
        now_us=record.now_us,
        heads=np.array([[len(asks), mode, len(listings) - 1, blend_named(record.assignments, catalog)]], np.int32),
        asks=np.array([(*ask, mark) for ask, mark in zip(asks, marks, strict=True)], np.int32),
        seeds=np.array([record.seed], np.uint64),
        listings=np.stack(listings) if listings else np.empty((0, len(catalog.actions.names)), np.uint8),
        holds=np.array(holds, np.int64).reshape(len(holds), 3),
    )


def _holds(record: DecisionRecord, catalog: Catalog) -> list[tuple[int, int, int]]:
    contacts = catalog.profiles.contacts
    rows, kinds = contacts.target_rows, contacts.targets.kinds
    held = [rows[key] for key in record.held_targets]
    holds = [(0, target, 1 if kinds[target] in CAPS else UNLIMITED) for target in held]
    return holds + [(0, rows[each.target], UNLIMITED - each.left) for each in record.budgets]


def _column(data: bytes, kind: type[_Number]) -> NDArray[_Number]:
    """Return a recorded column as an array of its own, as the kernels are compiled for."""
    return np.frombuffer(data, kind).copy()


def _gate_differences(
    record: DecisionRecord, again: Decisions | OtherSurvivorsError, row_type: type[np.uint16] | type[np.uint32]
) -> list[str]:
    parts = (
        ("refusal_reasons", record.refusal_reasons, again.reasons.tobytes()),
        ("learned_features", record.learned_features, again.learned.tobytes()),
        ("rows", record.rows, again.rows.astype(row_type).tobytes()),
    )
    return [name for name, recorded, made in parts if recorded != made]


def _slot_differences(
    slot: SlotRecord, place: int, again: Decisions, row_type: type[np.uint16] | type[np.uint32]
) -> list[str]:
    ask, pick, row, choice_reason = again.slot_codes[place].tolist()
    first, last = again.slot_blocks[place], again.slot_blocks[place + 1]
    if (slot.placement_index, slot.row if slot.HasField("row") else -1) != (ask, row):
        return ["row"]
    found = [] if slot.choice_reason == choice_reason else ["choice_reason"]
    if pick < 0:
        return found
    chance, _, _, prior, _, _ = again.slot_numbers[place].tolist()
    shares = again.distributions[first:last].astype(np.float32)
    if slot.distribution_rows:
        kept = np.frombuffer(slot.distribution_rows, row_type)
        shares = shares[np.searchsorted(again.rows, kept).clip(max=again.rows.size - 1)]
    found += [] if slot.selection_probability == chance else ["selection_probability"]
    found += [] if slot.distribution == shares.tobytes() else ["distribution"]
    found += [] if slot.prior_log_odds == prior else ["prior_log_odds"]
    return found
