"""What a compiled catalog is: columns that decisions read, frozen when made.

Everything here is immutable and belongs to one catalog revision. ``compile.py`` makes it; decisioning, profiles,
outcomes and the learner read it. Rows are actions ordered by name, so that the order in a YAML file is without effect.

The **fact space** is one float64 vector a request: ``now`` first, then the profile's part (attributes, windows, the
stage of the journey, segments), then the context attributes, each in declared order; NaN where a fact is not known. A
number is itself; a boolean 0 or 1; a category the index of its value in allowed_values; a text its code in the rule
literals, -1 for any other text; an instant microseconds since the epoch; a set a bit mask over allowed_values; an
amount its currency units; a vector 1, because rules ask no more of it than whether it is known.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tsugi.v1 import catalog_pb2
from tsugi.v1.value_pb2 import TextSet, Value

if TYPE_CHECKING:
    from server.catalog.budget_terms import BudgetTerms
    from server.catalog.history_terms import HistoryTerms
    from server.catalog.profile_terms import ProfileTerms  # built from the types below

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Amounts = NDArray[np.int64]  # counts, or millionths of a currency unit

BUCKETS: Final = 10_000  # people of one experiment are spread over so many
NOW_FACT: Final = 0
UNBOUNDED: Final = sys.float_info.max  # what is greater is no finite number

# Comparison of an atom: facts[left] (minus facts[right], where right >= 0) compared with a constant. CONTAINS asks
# whether the bit of that number is set in facts[left]; a negative number is that of no bit.
LESS, LESS_EQUAL, EQUAL, NOT_EQUAL, GREATER_EQUAL, GREATER, KNOWN, CONTAINS = range(8)
# Steps of a rule program in postfix order: an atom's index, or one of these.
AND, OR, NOT, TRUE, FALSE = -1, -2, -3, -4, -5
RULE_LAYERS: Final = ("eligibility", "applicability", "suitability")  # in each the group's rule, then the action's
RULE_STACK_MAX: Final = 32

# Operators of a value's program, in postfix order.
CONSTANT, FACT, ADD, SUBTRACT, MULTIPLY, DIVIDE, NEGATE, CHOOSE = range(8)
VALUE_MAX: Final = 1e12  # currency units; all that a priority is made of at its most then fits float32
VALUE_STACK_MAX: Final = 32  # all that 64 steps can need: 32 numbers, and 31 steps that each make one of two

# How a feature column is made from a fact.
SCALED, EQUALS, UNKNOWN = range(3)

# How selection probability is spread.
GREEDY, EPSILON_GREEDY, SQUARE_CB, THOMPSON, SOFTMAX, UPPER_CONFIDENCE = range(6)
POSTERIOR_POLICIES: Final = (THOMPSON, UPPER_CONFIDENCE)  # that ask how much is not yet known


_NUMBER: Final = catalog_pb2.ATTRIBUTE_TYPE_NUMBER
_BOOL: Final = catalog_pb2.ATTRIBUTE_TYPE_BOOL
_CATEGORY: Final = catalog_pb2.ATTRIBUTE_TYPE_CATEGORY
_TEXT: Final = catalog_pb2.ATTRIBUTE_TYPE_TEXT
_TIME: Final = catalog_pb2.ATTRIBUTE_TYPE_TIME
_SET: Final = catalog_pb2.ATTRIBUTE_TYPE_SET
_MONEY: Final = catalog_pb2.ATTRIBUTE_TYPE_MONEY
_VECTOR: Final = catalog_pb2.ATTRIBUTE_TYPE_VECTOR
_TYPES: Final = {  # that take a value of this kind
    "number_value": (_NUMBER,),
    "text_value": (_CATEGORY, _TEXT),
    "bool_value": (_BOOL,),
    "time_value": (_TIME,),
    "set_value": (_SET,),
    "money_value": (_MONEY,),
    "vector_value": (_VECTOR,),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One entry of the fact space, one action attribute, or one property of an event type."""

    name: str  # "profile.age", "context.device", "action.price", "event.total", "now"
    type: catalog_pb2.AttributeType
    codes: dict[str, int]  # of a category or set: its values; of a text: the literals that rules compare it with
    minimum: float  # -UNBOUNDED where none is stated
    maximum: float
    currency_code: str = ""  # of an amount: the catalog's
    dimensions: int = 0  # of a vector

    def encode(self, value: Value) -> float:
        """Return the fact's number for a value of the right type; NaN when the value is of another type.

        A category value that is not allowed, a number that is not finite or outside its bounds, an amount in another
        currency, a set with a value that is not allowed or stands twice, and a vector of another length or with a
        number that is not finite are NaN too: unknown, never let through.
        """
        kind = value.WhichOneof("kind")
        if kind is None or self.type not in _TYPES[kind]:
            return math.nan
        if kind == "number_value":
            return self._within_bounds(value.number_value)
        if kind == "text_value":
            return float(self.codes.get(value.text_value, -1 if self.type == _TEXT else math.nan))
        if kind == "bool_value":
            return float(value.bool_value)
        if kind == "time_value":
            return float(value.time_value.seconds * 1_000_000 + value.time_value.nanos // 1_000)
        return self._encode_many(value)

    def decode(self, number: float) -> Value | None:
        """Return the value that a number of this fact stands for; None for unknown, and for a text no rule names."""
        if math.isnan(number):
            return None
        if self.type == catalog_pb2.ATTRIBUTE_TYPE_BOOL:
            return Value(bool_value=bool(number))
        if self.type == catalog_pb2.ATTRIBUTE_TYPE_TIME:
            value = Value()
            value.time_value.FromMicroseconds(round(number))
            return value
        if self.type in (catalog_pb2.ATTRIBUTE_TYPE_CATEGORY, _TEXT):
            return next((Value(text_value=text) for text, code in self.codes.items() if code == number), None)
        if self.type == catalog_pb2.ATTRIBUTE_TYPE_SET:
            held = [text for text, code in self.codes.items() if int(number) >> code & 1]
            return Value(set_value=TextSet(values=held))
        return Value(number_value=number)

    def wanted(self) -> str:
        """Say in words what values encode takes."""
        kind = catalog_pb2.AttributeType.Name(self.type).removeprefix("ATTRIBUTE_TYPE_").lower()
        is_bounded = self.minimum > -UNBOUNDED or self.maximum < UNBOUNDED
        bounds = f" within [{self.minimum:g}, {self.maximum:g}]" if is_bounded else ""
        match self.type:
            case catalog_pb2.ATTRIBUTE_TYPE_CATEGORY:
                return f"a category value is required, one of {', '.join(self.codes)}"
            case catalog_pb2.ATTRIBUTE_TYPE_NUMBER:
                return f"a finite number{bounds} is required"
            case catalog_pb2.ATTRIBUTE_TYPE_SET:
                return f"a set value is required, any of {', '.join(self.codes)}, none twice"
            case catalog_pb2.ATTRIBUTE_TYPE_MONEY:
                return f"a money value{bounds} in {self.currency_code} is required"
            case catalog_pb2.ATTRIBUTE_TYPE_VECTOR:
                return f"a vector value of exactly {self.dimensions} finite numbers is required"
        return f"a {kind} value is required"

    def _encode_many(self, value: Value) -> float:
        """Encode what consists of several things."""
        if self.type == _SET:
            return self._mask(value.set_value)
        if self.type == _MONEY:
            is_ours = value.money_value.currency_code == self.currency_code
            return self._within_bounds(value.money_value.amount_micros / 1e6) if is_ours else math.nan
        numbers = value.vector_value.numbers
        return 1.0 if len(numbers) == self.dimensions and all(map(math.isfinite, numbers)) else math.nan

    def _within_bounds(self, number: float) -> float:
        return number if self.minimum <= number <= self.maximum else math.nan

    def _mask(self, texts: TextSet) -> float:
        mask = 0
        for text in texts.values:
            code = self.codes.get(text)
            if code is None or mask >> code & 1:
                return math.nan
            mask |= 1 << code
        return float(mask)  # exact: a set has at most 52 values


@dataclass(frozen=True, slots=True)
class FactSpace:
    """Where each fact stands in the vector."""

    facts: tuple[Fact, ...]  # now, the profile's part, context attributes
    index: dict[str, int]  # by name
    context: dict[str, tuple[int, Fact]]  # the context attributes by bare name, with their positions
    n_profile: int
    profile_layout: bytes  # 8 bytes that change whenever the profile part would be encoded or evaluated differently

    @property
    def profile_slice(self) -> slice:
        """Where the profile's part stands."""
        return slice(1, 1 + self.n_profile)


@dataclass(frozen=True, slots=True)
class FeatureColumns:
    """How d feature columns are made from facts. Column j reads facts[sources[j]].

    value = (fact - center) / spread cut to ±limit, or when_unknown, for SCALED; 1 or 0 for EQUALS (fact == code) and
    UNKNOWN (fact is NaN).
    """

    names: tuple[str, ...]  # "profile.age", "profile.gender=female", "profile.age?"
    sources: Rows  # int32[d]
    kinds: Bytes  # uint8[d]
    parameters: Doubles  # float64[d, 4]: center, spread, limit, when_unknown; for EQUALS the code in column 0

    def columns(self) -> tuple[Rows, Bytes, Doubles]:
        """Return the arrays in the order kernels take them."""
        return self.sources, self.kinds, self.parameters


@dataclass(frozen=True, slots=True)
class Rules:
    """Distinct rules, lowered to comparisons of facts.

    Atom a is ``facts[left[a]] (- facts[right[a]]) <operator> constant[a]``. Rule r is the postfix program
    ``steps[starts[r]:starts[r + 1]]`` over atoms; three-valued: an unknown fact makes unknown, and only true passes. An
    atom whose constant is NaN is always unknown: it stood for a fact that the action does not state.
    """

    left: Rows  # int32[atoms]
    right: Rows  # int32[atoms]; -1: none
    operators: Bytes  # uint8[atoms]
    constants: Doubles  # float64[atoms]
    steps: Rows  # int32[steps]
    starts: Rows  # int32[rules + 1]

    def columns(self) -> tuple[Rows, Rows, Bytes, Doubles, Rows, Rows]:
        """Return the arrays in the order kernels take them."""
        return self.left, self.right, self.operators, self.constants, self.steps, self.starts


@dataclass(frozen=True, slots=True)
class Values:
    """Distinct value expressions, in currency units, lowered to arithmetic on facts.

    Value v is the postfix program ``starts[v]:starts[v + 1]`` over float64. CONSTANT pushes its operand, FACT the fact
    that stands there. CHOOSE takes two branches off and puts back the first where the rule in its operand is met, the
    second where it is not, and NaN where that cannot be told. The others have no operand (0). An unknown fact is NaN
    and makes all that is computed from it NaN.
    """

    operators: Bytes  # uint8[steps]
    operands: Doubles  # float64[steps]: a constant, where a fact stands, or the row of a rule
    starts: Rows  # int32[values + 1]

    def columns(self) -> tuple[Bytes, Doubles, Rows]:
        """Return the arrays in the order kernels take them."""
        return self.operators, self.operands, self.starts


@dataclass(frozen=True, slots=True)
class ActionColumns:
    """One row an action, ordered by name."""

    names: tuple[str, ...]
    rows: dict[str, int]  # by name
    hashes: NDArray[np.uint64]  # uint64[n]: of the name; seeds an action's noise wherever it stands
    valid_from_us: NDArray[np.int64]  # int64[n]
    valid_until_us: NDArray[np.int64]  # int64[n], exclusive
    rules: Rows  # int32[n, 6]: index of each rule it has to meet, see RULE_LAYERS; -1: none
    worth: Doubles  # float64[n, 2]: value in currency units where no program gives it, lever
    weights: Doubles  # float64[n, channels]; NaN where it has no treatment for the channel
    facts: Doubles  # float64[n, action attributes]
    slot_bytes: tuple[tuple[bytes, ...], ...]  # [n][channels]: action, treatment, content of a Slot, serialised
    record_bytes: tuple[bytes, ...]  # [n]: row and action of a SlotRecord, serialised
    costs: tuple[int, ...]  # [n]: of saying it once, micros
    value_programs: Rows  # int32[n]: program that gives the value; -1: it is the constant in worth


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment, ready to assign people by."""

    name: str
    salt: str
    branches: tuple[str, ...]
    shares: tuple[float, ...]  # of all people, one a branch
    buckets: bytes  # [BUCKETS]: 1 + the branch's place; 0: none of them
    stride: int  # what a step in the branch's place adds to the blend


@dataclass(frozen=True, slots=True)
class Blends:
    """How each *blend* decides: a way to combine branches, one or none of every experiment; blend 0 is none of any."""

    rules: Rows  # int32[blends, n, 6], see ActionColumns.rules
    worth: Doubles  # float64[blends, n, 2], see ActionColumns.worth
    codes: Rows  # int32[blends, p, 5], see PlacementColumns.codes
    parameters: Doubles  # float64[blends, p, 3], see PlacementColumns.parameters
    challenged: tuple[bool, ...]  # [blends]: the challenger's output is the prior
    reply_bytes: tuple[bytes, ...]  # [blends]: assignments of a DecideResponse, serialised
    record_bytes: tuple[bytes, ...]  # [blends]: assignments of a DecisionRecord, serialised


@dataclass(frozen=True, slots=True)
class Holdout:
    """People who are told nothing in some placements."""

    name: str
    salt: bytes
    share: float
    placements: frozenset[int]  # rows


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal, ready to use."""

    name: str
    rewards: dict[str, float]  # by outcome type
    window_us: int
    default_reward: float
    base_log_odds: float
    settling: catalog_pb2.Settling = catalog_pb2.SETTLING_FIRST  # never unspecified
    late_limit_us: int = 0
    keeps_history: bool = True  # of what came of what each person was shown
    learners: tuple[str, ...] = ()  # families that take part beside those that always do
    influence_max: float = 1.0  # of one reporter, of what an action is learned from; 1: no bound


@dataclass(frozen=True, slots=True)
class Placement:
    """One placement, ready to use."""

    name: str
    channel_row: int
    goal_row: int  # the first of its goals
    count_max: int
    on_impression: bool
    slot_bytes: tuple[bytes, ...]  # [count_max]: placement and position of a Slot, serialised
    record_bytes: bytes  # goal and on_impression of a SlotRecord, serialised
    other_goals: tuple[tuple[int, bytes], ...]  # after the first: row, other_goals of a SlotRecord at its base rate
    window_us: int  # the longest of its goals


@dataclass(frozen=True, slots=True)
class PlacementColumns:
    """What the core reads of placements, one row each."""

    codes: Rows  # int32[p, 5]: channel row, row of the first goal, policy, Thompson's draws, rule of never_on or -1
    parameters: Doubles  # float64[p, 3]: epsilon, gamma, floor share, temperature or width; share_max; probability_min
    goal_weights: Doubles  # float64[p, goals]: what a success counts; 0: no goal of this placement
    consents: Rows  # int32[p]: where the fact stands that has to be true before it is filled; -1: none has to


@dataclass(frozen=True, slots=True)
class Catalog:
    """One compiled catalog revision."""

    sha256: bytes  # of the serialised message
    revision: str  # the same in hex
    message: catalog_pb2.Catalog
    space: FactSpace
    profiles: ProfileTerms
    action_facts: tuple[Fact, ...]
    learned: FeatureColumns  # what the online learners read of person and context
    rules: Rules
    actions: ActionColumns
    goals: tuple[Goal, ...]
    goal_base_log_odds: Floats  # float32[goals]
    placements: tuple[Placement, ...]
    placement_columns: PlacementColumns
    placement_rows: dict[str, int]
    goal_rows: dict[str, int]
    channel_rows: dict[str, int]
    namespaces: frozenset[str]
    event_properties: dict[str, dict[str, Fact]]  # by event type, then property
    outcome_types: dict[str, catalog_pb2.OutcomeType]
    reserving_us: int  # how long a contact is reserved that an impression confirms; 0: no placement waits for one
    random_control_share: float
    random_control_salt: bytes
    values: Values
    experiments: tuple[Experiment, ...]
    blends: Blends
    holdouts: tuple[Holdout, ...]
    budgets: BudgetTerms
    history: HistoryTerms
