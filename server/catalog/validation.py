"""Whether a catalog is a good one: every fault, each with its path and a suggestion.

Handed the message alone. Rules are checked where they are compiled; sizes, names and references here. What passes can
be compiled without a further question.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from server.errors import Violation
from tsugi.v1 import catalog_pb2

CATALOG_BYTES_MAX: Final = 16 * 1024 * 1024
ACTIONS_MAX: Final = 10_000
LEARNED_COLUMNS_MAX: Final = 64
CONTENT_BYTES_MAX: Final = 4_096
WINDOW_US_MIN: Final = 100_000
WINDOW_US_MAX: Final = 90 * 86_400 * 1_000_000

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_CURRENCY = re.compile(r"[A-Z]{3}\Z")
_LISTS: Final = {
    "identity_namespaces": (1, 32),
    "profile_attributes": (0, 256),
    "context_attributes": (0, 64),
    "action_attributes": (0, 64),
    "event_types": (0, 256),
    "outcome_types": (1, 64),
    "goals": (1, 16),
    "channels": (1, 32),
    "placements": (1, 256),
    "actions": (0, ACTIONS_MAX),
}


def duration_us(duration: Duration) -> int:
    """Return a span in microseconds."""
    return duration.seconds * 1_000_000 + duration.nanos // 1_000


def instant_us(instant: Timestamp) -> int:
    """Return an instant in microseconds since the epoch."""
    return instant.seconds * 1_000_000 + instant.nanos // 1_000


def check(catalog: catalog_pb2.Catalog) -> list[Violation]:
    """Return every fault of a catalog except those of its rules; empty when there is none. Cost: O(size)."""
    return _Checker(catalog).run()


class _Checker:
    def __init__(self, catalog: catalog_pb2.Catalog) -> None:
        self._catalog = catalog
        self._violations: list[Violation] = []

    def run(self) -> list[Violation]:
        catalog = self._catalog
        if catalog.ByteSize() > CATALOG_BYTES_MAX:
            self._fault("", f"at most {CATALOG_BYTES_MAX} bytes serialised, got {catalog.ByteSize()}")
        if not _CURRENCY.match(catalog.currency_code):
            self._fault("currency_code", f"an ISO 4217 code such as EUR, got {catalog.currency_code[:16]!r}")
        for field, (least, most) in _LISTS.items():
            entries = getattr(catalog, field)
            if not least <= len(entries) <= most:
                self._fault(field, f"{least} to {most} entries, got {len(entries)}")
            self._names(field, [entry.name for entry in entries])
        self._attributes("profile_attributes", catalog.profile_attributes)
        self._attributes("context_attributes", catalog.context_attributes)
        self._attributes("action_attributes", catalog.action_attributes)
        for i, event_type in enumerate(catalog.event_types):
            path = f"event_types[{i}].properties"
            if len(event_type.properties) > 64:
                self._fault(path, f"at most 64 entries, got {len(event_type.properties)}")
            self._names(path, [attribute.name for attribute in event_type.properties])
            self._attributes(path, event_type.properties)
        self._outcome_types()
        self._goals()
        self._placements()
        self._actions()
        control = catalog.random_control
        if not 0.0 <= control.share <= 0.5:
            self._fault("random_control.share", f"0 to 0.5, got {control.share}")
        if len(control.salt.encode()) > 64:
            self._fault("random_control.salt", "at most 64 bytes")
        return self._violations

    def _attributes(self, path: str, attributes: Sequence[catalog_pb2.Attribute]) -> None:
        for i, attribute in enumerate(attributes):
            self._attribute(f"{path}[{i}]", attribute)

    def _attribute(self, path: str, attribute: catalog_pb2.Attribute) -> None:
        is_number = attribute.type == catalog_pb2.ATTRIBUTE_TYPE_NUMBER
        if attribute.type not in catalog_pb2.AttributeType.values() or not attribute.type:
            self._fault(f"{path}.type", "a type is required, such as ATTRIBUTE_TYPE_NUMBER")
        if attribute.type == catalog_pb2.ATTRIBUTE_TYPE_CATEGORY:
            values = attribute.allowed_values
            if not 1 <= len(values) <= 64:
                self._fault(f"{path}.allowed_values", f"a category has 1 to 64 values, got {len(values)}")
            if len(set(values)) != len(values):
                self._fault(f"{path}.allowed_values", "a value stands twice")
            if any(not 1 <= len(value.encode()) <= 64 for value in values):
                self._fault(f"{path}.allowed_values", "each value is 1 to 64 bytes")
        elif attribute.allowed_values:
            self._fault(f"{path}.allowed_values", "only a category has allowed values")
        for field in ("minimum", "maximum", "center", "spread"):
            if attribute.HasField(field):
                if not is_number:
                    self._fault(f"{path}.{field}", "only a number has it")
                elif not math.isfinite(getattr(attribute, field)):
                    self._fault(f"{path}.{field}", "a finite number is required")
        if attribute.HasField("spread") and not attribute.spread > 0.0:
            self._fault(f"{path}.spread", f"above 0, got {attribute.spread}")
        if attribute.HasField("minimum") and attribute.HasField("maximum") and attribute.minimum > attribute.maximum:
            self._fault(f"{path}.minimum", "not above the maximum")

    def _outcome_types(self) -> None:
        for i, outcome_type in enumerate(self._catalog.outcome_types):
            path = f"outcome_types[{i}]"
            self._enum(f"{path}.kind", outcome_type.kind, catalog_pb2.OutcomeKind.values())
            bounds = (outcome_type.value_minimum, outcome_type.value_maximum)
            if not all(map(math.isfinite, bounds)) or bounds[0] > bounds[1]:
                self._fault(f"{path}.value_minimum", "finite and not above value_maximum")

    def _goals(self) -> None:
        kinds = {outcome_type.name: outcome_type.kind for outcome_type in self._catalog.outcome_types}
        for i, goal in enumerate(self._catalog.goals):
            path = f"goals[{i}]"
            if not 1 <= len(goal.outcomes) <= 16:
                self._fault(f"{path}.outcomes", f"1 to 16 entries, got {len(goal.outcomes)}")
            for j, outcome in enumerate(goal.outcomes):
                self._refers(f"{path}.outcomes[{j}].type", outcome.type, kinds, "outcome type")
                if kinds.get(outcome.type) == catalog_pb2.OUTCOME_KIND_IMPRESSION:
                    self._fault(f"{path}.outcomes[{j}].type", "an impression settles no goal; name a response")
                self._share(f"{path}.outcomes[{j}].reward", outcome.reward)
            if len({outcome.type for outcome in goal.outcomes}) != len(goal.outcomes):
                self._fault(f"{path}.outcomes", "an outcome type stands twice")
            if not WINDOW_US_MIN <= duration_us(goal.attribution_window) <= WINDOW_US_MAX:
                self._fault(f"{path}.attribution_window", "0.1s to 7776000s (90 days)")
            self._share(f"{path}.default_reward", goal.default_reward)
            if not 0.0 < goal.base_rate < 1.0:
                self._fault(f"{path}.base_rate", f"above 0 and below 1, got {goal.base_rate}")

    def _placements(self) -> None:
        channels = {channel.name for channel in self._catalog.channels}
        goals = {goal.name for goal in self._catalog.goals}
        for i, placement in enumerate(self._catalog.placements):
            path = f"placements[{i}]"
            self._refers(f"{path}.channel", placement.channel, channels, "channel")
            self._refers(f"{path}.goal", placement.goal, goals, "goal")
            if placement.count_max > 16:
                self._fault(f"{path}.count_max", f"at most 16, got {placement.count_max}")
            self._enum(f"{path}.activation", placement.activation, catalog_pb2.Activation.values())
            self._exploration(f"{path}.exploration", placement.exploration)

    def _exploration(self, path: str, exploration: catalog_pb2.Exploration) -> None:
        policy = exploration.WhichOneof("policy")
        if policy == "epsilon_greedy":
            self._share(f"{path}.epsilon_greedy.epsilon", exploration.epsilon_greedy.epsilon)
        elif policy == "square_cb" and not 0.0 <= exploration.square_cb.gamma <= 1e6:
            self._fault(f"{path}.square_cb.gamma", f"0 to 1000000, got {exploration.square_cb.gamma}")
        elif policy == "thompson":
            thompson = exploration.thompson
            if thompson.draws and not 16 <= thompson.draws <= 1024:
                self._fault(f"{path}.thompson.draws", f"16 to 1024, got {thompson.draws}")
            if thompson.floor_share and not 0.001 <= thompson.floor_share <= 1.0:
                self._fault(f"{path}.thompson.floor_share", f"0.001 to 1, got {thompson.floor_share}")

    def _actions(self) -> None:
        channels = {channel.name for channel in self._catalog.channels}
        facts = {attribute.name: attribute for attribute in self._catalog.action_attributes}
        for i, action in enumerate(self._catalog.actions):
            path = f"actions[{i}]"
            if action.HasField("value_micros") and action.value_micros < 0:
                self._fault(f"{path}.value_micros", f"0 or more, got {action.value_micros}")
            if action.HasField("lever") and not 0.0 <= action.lever <= 1_000.0:
                self._fault(f"{path}.lever", f"0 to 1000, got {action.lever}")
            has_both = action.HasField("valid_from_time") and action.HasField("valid_until_time")
            if has_both and instant_us(action.valid_from_time) >= instant_us(action.valid_until_time):
                self._fault(f"{path}.valid_until_time", "later than valid_from_time")
            for name in action.attributes.fields:
                self._refers(f"{path}.attributes.{name}", name, facts, "action attribute")
            if not 1 <= len(action.treatments) <= 32:
                self._fault(f"{path}.treatments", f"1 to 32 entries, got {len(action.treatments)}")
            self._names(f"{path}.treatments", [treatment.name for treatment in action.treatments])
            if len({treatment.channel for treatment in action.treatments}) != len(action.treatments):
                self._fault(f"{path}.treatments", "at most one treatment a channel")
            for j, treatment in enumerate(action.treatments):
                self._refers(f"{path}.treatments[{j}].channel", treatment.channel, channels, "channel")
                if treatment.HasField("weight") and not 0.0 <= treatment.weight <= 1_000.0:
                    self._fault(f"{path}.treatments[{j}].weight", f"0 to 1000, got {treatment.weight}")
                if treatment.content.ByteSize() > CONTENT_BYTES_MAX:
                    self._fault(f"{path}.treatments[{j}].content", f"at most {CONTENT_BYTES_MAX} bytes serialised")

    def _names(self, path: str, names: list[str]) -> None:
        seen: dict[str, int] = {}
        for i, name in enumerate(names):
            if not _NAME.match(name):
                self._fault(f"{path}[{i}].name", f"[a-z][a-z0-9_]{{0,63}}, got {name[:80]!r}")
            elif seen.setdefault(name, i) != i:
                self._fault(f"{path}[{i}].name", f"{name!r} stands at {path}[{seen[name]}] already")

    def _refers(self, path: str, name: str, known: Collection[str], what: str) -> None:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            self._fault(path, f"no {what} is named {name[:64]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))

    def _enum(self, path: str, value: int, known: Iterable[int]) -> None:
        if value not in known:
            self._fault(path, f"{value} is no value of this enum")

    def _share(self, path: str, share: float) -> None:
        if not 0.0 <= share <= 1.0:
            self._fault(path, f"0 to 1, got {share}")

    def _fault(self, path: str, description: str) -> None:
        self._violations.append(Violation(path, description))
