"""Why this, and why not that: one recorded decision in words, facts and factors.

Handed a record and the catalog it was decided under, it gives every candidate's fate. It takes recorded propensities
and decides again what follows from them (recall.py), to tell which rule, consent, contact policy or choice stood in the
way; it changes nothing anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from server.catalog.catalog import (
    CHOOSE,
    FACT,
    RULE_LAYERS,
    RULE_STACK_MAX,
    Amounts,
    Bytes,
    Catalog,
    Doubles,
    Floats,
    Rows,
)
from server.catalog.evaluation import NO, YES, compare, evaluate
from server.decisioning import contact_policy, worth
from server.decisioning.contributions import Contributing, Contributions, mostly
from server.decisioning.decide import BUDGET_SPENT
from server.decisioning.recall import recall, row_type_of
from server.decisioning.variation import varied_exploration, varied_rule
from tsugi.log.v1.record_pb2 import DecisionRecord, SlotRecord
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_pb2 import RefusalReason
from tsugi.v1.decision_service_pb2 import (
    CandidateExplanation,
    DecideRequest,
    Explanation,
    FactReading,
    GoalStanding,
    PlacementExplanation,
    Standing,
)

EXPLAINED_MAX: Final = 256  # candidates with their factors, beside those chosen

_RULES: Final[frozenset[int]] = frozenset(
    {
        RefusalReason.REFUSAL_REASON_NOT_ELIGIBLE,
        RefusalReason.REFUSAL_REASON_NOT_APPLICABLE,
        RefusalReason.REFUSAL_REASON_NOT_SUITABLE,
        RefusalReason.REFUSAL_REASON_FACT_UNKNOWN,
    }
)
_CONSENT: Final[frozenset[int]] = frozenset(
    {RefusalReason.REFUSAL_REASON_CONSENT_ABSENT, RefusalReason.REFUSAL_REASON_CONSENT_WITHDRAWN}
)
_CONTACT: Final[frozenset[int]] = frozenset(
    {
        RefusalReason.REFUSAL_REASON_FREQUENCY_CAP,
        RefusalReason.REFUSAL_REASON_COOL_OFF,
        RefusalReason.REFUSAL_REASON_SUPPRESSED,
        RefusalReason.REFUSAL_REASON_BUDGET_SPENT,
    }
)
_FIELDS: Final[dict[int, str]] = {
    RefusalReason.REFUSAL_REASON_NOT_CANDIDATE: "candidate_actions",
    RefusalReason.REFUSAL_REASON_EXCLUDED: "excluded_actions",
    RefusalReason.REFUSAL_REASON_NOT_YET_VALID: "valid_from_time",
    RefusalReason.REFUSAL_REASON_NO_LONGER_VALID: "valid_until_time",
}
_IN_WORDS: Final[dict[int, str]] = {
    RefusalReason.REFUSAL_REASON_NOT_CANDIDATE: "they were not asked for",
    RefusalReason.REFUSAL_REASON_EXCLUDED: "they were excluded",
    RefusalReason.REFUSAL_REASON_NO_TREATMENT: "they cannot be said here",
    RefusalReason.REFUSAL_REASON_NOT_YET_VALID: "they have not begun",
    RefusalReason.REFUSAL_REASON_NO_LONGER_VALID: "they are over",
    RefusalReason.REFUSAL_REASON_NOT_ELIGIBLE: "this person may not have them",
    RefusalReason.REFUSAL_REASON_FACT_UNKNOWN: "something about this person is not known",
    RefusalReason.REFUSAL_REASON_NOT_APPLICABLE: "they make no sense now",
    RefusalReason.REFUSAL_REASON_NOT_SUITABLE: "they are not right for this person",
    RefusalReason.REFUSAL_REASON_CONSENT_ABSENT: "consent was never given",
    RefusalReason.REFUSAL_REASON_CONSENT_WITHDRAWN: "consent was withdrawn",
    RefusalReason.REFUSAL_REASON_FREQUENCY_CAP: "they were said often enough",
    RefusalReason.REFUSAL_REASON_COOL_OFF: "this person is left in peace about them",
    RefusalReason.REFUSAL_REASON_SUPPRESSED: "something suppresses them",
    RefusalReason.REFUSAL_REASON_VALUE_UNKNOWN: "what they are worth cannot be told",
    RefusalReason.REFUSAL_REASON_HELD_OUT: "this person is told nothing here, to compare",
    RefusalReason.REFUSAL_REASON_BUDGET_SPENT: "their budget is spent",
}


def explain(record: DecisionRecord, catalog: Catalog, contributing: Contributing | None = None) -> Explanation:
    """Explain one decision.

    Args:
        record: as the log keeps it.
        catalog: the revision it was decided under.
        contributing: gives what each fact did to the propensities of survivors, see contributions.contribute; None:
            nothing is told of that.

    Cost: some 50 µs a candidate, beside that of contributing.
    """
    seen = _Seen(record, catalog)
    chosen = [slot.row for slot in record.slots if slot.HasField("row")]
    best = seen.by_priority()
    explained = dict.fromkeys([*chosen, *best[:EXPLAINED_MAX]])
    if contributing is not None:
        seen.contributions = contributing([seen.index[row] for row in explained])
    candidates = [
        CandidateExplanation(
            action=catalog.actions.names[row], standings=seen.standings(row) if row in explained else ()
        )
        for row in best
    ]
    candidates += [seen.refused(row) for row in np.flatnonzero(seen.reasons).tolist()]
    return Explanation(
        sentence=_sentence(record, seen),
        candidates=candidates,
        placements=[seen.placement(ask) for ask in range(seen.channels.size)],
    )


class _Seen:
    """A record's columns, and what follows from them."""

    def __init__(self, record: DecisionRecord, catalog: Catalog) -> None:
        self._record = record
        self._catalog = catalog
        self.contributions: Contributions = {}
        self._request = DecideRequest.FromString(record.request)
        questions, self._again = recall(record, catalog)
        self._facts: Doubles = questions.facts[0]
        self._blend = int(questions.heads[0, 3])
        self._marks: list[int] = questions.asks[:, 2].tolist()
        self.reasons: Bytes = np.frombuffer(record.refusal_reasons, np.uint8)
        self.rows: Rows = self._again.rows
        self._row_type = row_type_of(catalog)
        shape = (len(self._request.placements), self.rows.size)
        self._prior: Floats = self._again.prior_log_odds.reshape(shape)
        self.propensities: Floats = self._again.propensities.reshape(shape)
        self.priorities: Doubles = self._again.priorities.reshape(shape)
        self._placements = [catalog.placement_rows[each.placement] for each in self._request.placements]
        self.channels = np.array([catalog.placements[row].channel_row for row in self._placements], np.int32)
        self._values = np.empty(len(catalog.values.columns()[-1]) - 1)
        worth.evaluate(self._facts, *catalog.rules.columns(), *catalog.values.columns(), self._values)
        self._goals = self._by_goal(self._again.other_propensities)
        self.index = {row: i for i, row in enumerate(self.rows.tolist())}
        self._messages = {action.name: action for action in catalog.message.actions}
        self._groups = {group.name: group for group in catalog.message.action_groups}
        self._atoms = compare(self._facts, *catalog.rules.columns()[:4])
        self._stack = np.empty(RULE_STACK_MAX, np.uint8)
        self._left = self._contacts_left(questions.holds)
        self._closed_by = self._closings()

    def _by_goal(self, others: Floats) -> list[list[tuple[str, float, Floats]]]:
        """Return of each placement asked for its goals, the first in front: name, weight and propensities."""
        columns, goals = self._catalog.placement_columns, self._catalog.goals
        m, taken, found = self.rows.size, 0, []
        for ask, row in enumerate(self._placements):
            weights, first = columns.goal_weights[row], self._catalog.placements[row].goal_row
            own = [(goals[first].name, float(weights[first]), self.propensities[ask])]
            for other in np.flatnonzero(weights).tolist():
                if other != first:
                    own.append((goals[other].name, float(weights[other]), others[taken : taken + m]))
                    taken += m
            found.append(own)
        return found

    def _closings(self) -> list[dict[int, str]]:
        """Return of each slot the survivors that what was chosen before had closed, by row, and what closed them."""
        contacts = self._catalog.profiles.contacts
        kinds, limits, _, starts, entries, amounts = contacts.targets.columns()
        left = self._left.copy()
        contact_policy.begin_request(kinds, left)
        closings, last_ask = [], -1
        for slot in self._record.slots:
            ask, channel = slot.placement_index, int(self.channels[slot.placement_index])
            if ask != last_ask:
                contact_policy.begin_placement(kinds, limits, left)
                last_ask = ask
            closed = {}
            for row in self.rows.tolist():
                target = contact_policy.refusing(row, channel, left, starts, entries, amounts)
                if target >= 0:
                    closed[row] = contacts.target_names[target]
            closings.append(closed)
            if slot.HasField("row"):
                contact_policy.take(slot.row, channel, left, starts, entries, amounts)
        return closings

    def placement(self, ask: int) -> PlacementExplanation:
        """Return what held for a placement asked for."""
        told = PlacementExplanation(placement=self._request.placements[ask].placement)
        never = int(self._catalog.blends.codes[self._blend, self._placements[ask], 4])
        if self._record.provenance.baseline and not self._record.random_control:
            told.not_explored_by = "baseline"
        elif self._marks[ask] & BUDGET_SPENT:
            told.not_explored_by = "budget"
        elif never >= 0 and self._verdict(never) != NO:
            told.not_explored_by = varied_exploration(self._catalog.message, self._record, told.placement).never_on
            told.facts.extend(self._read_by(never))
        return told

    def by_priority(self) -> list[int]:
        """Return the rows of the survivors, the highest priority of any placement first."""
        if not self.rows.size:
            return []
        highest = np.nan_to_num(self.priorities, nan=-1.0).max(axis=0)
        return [int(row) for row in self.rows[np.lexsort((self.rows, -highest))]]

    def standings(self, row: int) -> list[Standing]:
        """Return how a survivor stood in each placement it can be said in."""
        catalog, i = self._catalog, self.index[row]
        standings = []
        for ask, placement in enumerate(self._request.placements):
            weight = float(catalog.actions.weights[row, self.channels[ask]])
            if np.isnan(weight):
                continue
            prior = float(self._prior[ask, i])
            standings.append(
                Standing(
                    placement=placement.placement,
                    prior_propensity=1.0 / (1.0 + np.exp(-prior)),
                    propensity=float(self.propensities[ask, i]),
                    value=self._value(row),
                    weight=weight,
                    lever=float(catalog.blends.worth[self._blend, row, 1]),
                    priority=float(self.priorities[ask, i]),
                    selection_probabilities=[
                        self._share(slot, row, i) for slot in self._record.slots if slot.placement_index == ask
                    ],
                    goals=[
                        GoalStanding(goal=goal, propensity=float(propensities[i]), weight=goal_weight)
                        for goal, goal_weight, propensities in self._goals[ask]
                    ],
                    closed_by=self._closed(ask, row),
                    contributions=self.contributions.get((ask, i), ()),
                )
            )
        return standings

    def _closed(self, ask: int, row: int) -> list[str]:
        """Return what closed each slot of a placement to a survivor; nothing where none was closed to it."""
        slots = zip(self._record.slots, self._closed_by, strict=True)
        closed = [closings.get(row, "") for slot, closings in slots if slot.placement_index == ask]
        return closed if any(closed) else []

    def _value(self, row: int) -> float:
        program = int(self._catalog.actions.value_programs[row])
        return float(self._catalog.actions.worth[row, 0] if program < 0 else self._values[program])

    def _share(self, slot: SlotRecord, row: int, i: int) -> float:
        """Return the chance a survivor had in a slot; 0 too where a cut distribution does not hold it."""
        shares = np.frombuffer(slot.distribution, np.float32)
        if not slot.distribution_rows:
            return float(shares[i]) if shares.size else 0.0
        kept = np.frombuffer(slot.distribution_rows, self._row_type)
        place = np.flatnonzero(kept == row)
        return float(shares[place[0]]) if place.size else 0.0

    def refused(self, row: int) -> CandidateExplanation:
        """Return why a candidate was refused."""
        name, reason = self._catalog.actions.names[row], int(self.reasons[row])
        told = CandidateExplanation(action=name, refusal_reason=RefusalReason.Name(reason))
        if reason in _RULES:
            self._tell_rule(row, told)
        elif reason in _CONSENT:
            self._tell_consent(row, told)
        elif reason in _CONTACT:
            self._tell_contact(row, told)
        elif reason == RefusalReason.REFUSAL_REASON_HELD_OUT:
            told.refused_by = ", ".join(self._record.holdouts)
        elif reason == RefusalReason.REFUSAL_REASON_VALUE_UNKNOWN:
            told.refused_by = self._messages[name].value
            told.facts.extend(self._valued_by(int(self._catalog.actions.value_programs[row])))
        else:
            told.refused_by = _FIELDS.get(reason, "")
            if reason == RefusalReason.REFUSAL_REASON_EXCLUDED and name not in self._request.excluded_actions:
                told.refused_by = "outcomes"
        return told

    def _tell_rule(self, row: int, told: CandidateExplanation) -> None:
        action = self._messages[told.action]
        owners: tuple[catalog_pb2.ActionGroup | catalog_pb2.Action, ...] = (
            self._groups.get(action.group, catalog_pb2.ActionGroup()),
            action,
        )
        for column, rule in enumerate(self._catalog.blends.rules[self._blend, row].tolist()):
            if rule >= 0 and self._verdict(rule) != YES:
                layer = RULE_LAYERS[column // 2]
                varied = varied_rule(self._catalog.message, self._record, action, layer) if column % 2 else None
                told.refused_by = getattr(owners[column % 2], layer) if varied is None else varied
                told.facts.extend(self._read_by(rule))
                return

    def _tell_consent(self, row: int, told: CandidateExplanation) -> None:
        for placement_row, channel in zip(self._placements, self.channels, strict=True):
            position = int(self._catalog.placement_columns.consents[placement_row])
            if position >= 0 and self._facts[position] != 1.0 and self._can_be_said(row, int(channel)):
                reading = self._reading(position)
                told.refused_by = reading.fact
                told.facts.append(reading)
                return

    def _tell_contact(self, row: int, told: CandidateExplanation) -> None:
        contacts = self._catalog.profiles.contacts
        targets = contacts.targets
        for channel in self.channels:
            if not self._can_be_said(row, int(channel)):
                continue
            target = contact_policy.refusing(
                row, int(channel), self._left, targets.starts, targets.entries, targets.amounts
            )
            if target >= 0:
                told.refused_by = contacts.target_names[target]
                if targets.rules[target] >= 0:
                    told.facts.extend(self._read_by(int(targets.rules[target])))
                return

    def _can_be_said(self, row: int, channel: int) -> bool:
        return not np.isnan(self._catalog.actions.weights[row, channel])

    def _contacts_left(self, holds: Amounts) -> Amounts:
        """Return what could still be said of each contact target before the first slot."""
        targets = self._catalog.profiles.contacts.targets
        left = targets.limits.copy()
        contact_policy.hold(holds[:, 1:], targets.kinds, left)
        contact_policy.suppress(self._facts, targets.rules, *self._catalog.rules.columns(), left)
        return left

    def _verdict(self, rule: int) -> int:
        rules = self._catalog.rules
        return int(evaluate(self._atoms, rules.steps[rules.starts[rule] : rules.starts[rule + 1]], self._stack))

    def _read_by(self, rule: int) -> list[FactReading]:
        """Return the facts a rule compares, as they were."""
        rules = self._catalog.rules
        atoms = [step for step in rules.steps[rules.starts[rule] : rules.starts[rule + 1]].tolist() if step >= 0]
        positions = (int(side[atom]) for atom in atoms for side in (rules.left, rules.right))
        return [self._reading(position) for position in dict.fromkeys(positions) if position > 0]

    def _valued_by(self, program: int) -> list[FactReading]:
        """Return the facts that a value expression reads, as they were."""
        operators, operands, starts = self._catalog.values.columns()
        steps = range(starts[program], starts[program + 1])
        readings = [self._reading(int(operands[step])) for step in steps if operators[step] == FACT]
        for step in steps:
            if operators[step] == CHOOSE:
                readings += self._read_by(int(operands[step]))
        return list({reading.fact: reading for reading in readings}.values())

    def _reading(self, position: int) -> FactReading:
        fact = self._catalog.space.facts[position]
        return FactReading(fact=fact.name, value=fact.decode(float(self._facts[position])))


def _sentence(record: DecisionRecord, seen: _Seen) -> str:
    """Say the choice, and what was not chosen, in words for a person."""
    filled = [slot for slot in record.slots if slot.action]
    left_out = _left_out(seen.reasons.tolist())
    if not filled:
        return f"Nothing can be said here now: {left_out}." if left_out else "Nothing can be said here now."
    first = filled[0]
    i = int(np.flatnonzero(seen.rows == first.row)[0])
    propensity = float(seen.propensities[first.placement_index, i])
    rank = int(np.count_nonzero(seen.priorities[first.placement_index] > seen.priorities[first.placement_index, i]))
    how = "comes first" if rank == 0 else f"was tried although {rank} would have come before it"
    told = f"{first.action} {how} of {seen.rows.size}: a chance of {propensity:.1%} of {first.goal}"
    told += mostly(seen.contributions.get((first.placement_index, i), ()))
    others = [slot.action for slot in filled[1:]]
    if others:
        told += f"; then {', '.join(others)}"
    return f"{told}. {left_out[:1].upper()}{left_out[1:]}." if left_out else f"{told}."


def _left_out(reasons: Sequence[int]) -> str:
    """Say how many were left out, and the commonest reason."""
    counted = Counter(reason for reason in reasons if reason)
    n = sum(counted.values())
    if not n:
        return ""
    (reason, n_most), *_ = counted.most_common(1)
    words = _IN_WORDS[reason]
    return f"{n} others were left out, {n_most} because {words}" if n > 1 else f"1 other was left out because {words}"
