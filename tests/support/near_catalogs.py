"""Catalogs near good ones: a few places of a rich catalog changed, most of them to what is right there as well.

What is drawn at a place comes from what good catalogs hold at that field, from the edges of what is allowed, or from
everything else, so that most changed catalogs still compile and can be decided under, and the others have few faults.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import strategies as st

from tests.support.fuzzing import messages, scalars
from tsugi.v1 import catalog_pb2

# What decisions are made from is changed most; most names stay, because so much refers to them.
_OFTEN: Final = (
    "placements", "actions", "random_control", "action_groups", "contact_policies", "compositions", "experiments",
    "holdouts", "budgets", "goals",
)  # fmt: skip
_REFERRING: Final = {
    "actions": (
        "Budget.actions", "ActionVariation.actions", "ContactPolicy.actions", "Composition.actions", "Requires.actions",
    ),
    "action_groups": (
        "Action.group", "Budget.groups", "ActionVariation.groups", "ContactPolicy.groups", "Composition.groups",
        "Requires.groups",
    ),
    "channels": ("ContactPolicy.channels", "EventType.channel", "Source.channel"),
    "goals": ("Placement.goal", "GoalWeight.goal", "Holdout.goals"),
    "placements": ("PlacementVariation.placement",),
    "outcome_types": ("GoalOutcome.type", "CoolOff.outcome_types"),
}  # fmt: skip
_OPERATIONS: Final = st.sampled_from(("change",) * 8 + ("repeat", "repeat", "drop", "add"))
_LUCK: Final = st.sampled_from(("right",) * 8 + ("edge",) * 3 + ("anything",))
_DOUBLE: Final = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT)
_REASONABLE: Final = {"double": (0.0, 0.05, 0.1, 0.5, 1.0, 2.0, 1_000.0), "whole": (0, 1, 2, 3, 16, 64, 1_000_000)}
_EDGES: Final = {
    "double": (-1.0, 5e-324, 1e-310, 1e-9, 1_000.5, 1e12, 1e300, float("inf"), float("nan")),
    "whole": (-1, 65, 1_001, (1 << 32) - 1, 10**12, 10**15, 10**18, 1 << 62, (1 << 63) - 1, -(1 << 63)),
}
_RULES: Final = (
    "true", "profile.age > 30.0", "profile.age >= 1e300", "has(profile.age) && profile.age < 1e-310",
    "!(profile.age == 40.0) || now > timestamp('2026-01-01T00:00:00Z')", "profile.age", "profile.gone > 1.0", "((",
    "action.price > 50.0", "context.hour < 12.0",
)  # fmt: skip
_WORTHS: Final = (
    "profile.age * 1e306", "profile.age * 1e9", "profile.age * 1e-322", "profile.age / (profile.age - 40.0)", "1e300",
    "1e-310", "0.0", "profile.age > 30.0 ? 5.0 : profile.age", "action.price * 2.0", "-1.0", "profile.age - 50.0",
    "profile.age * 0.1", "1.0 / 0.0", "profile.gone", "1", "1e308 * 1e308",
)  # fmt: skip
_EXPRESSIONS: Final = {
    "eligibility": _RULES, "applicability": _RULES, "suitability": _RULES, "never_on": _RULES, "expression": _RULES,
    "value": _WORTHS, "filter": ("event.total > 1.5", "event.pages > 0.0", "true", "profile.age > 1.0"),
}  # fmt: skip
_WHOLES: Final[dict[type[Message], list[Any]]] = {
    Duration: [
        Duration(seconds=seconds, nanos=nanos)
        for seconds, nanos in ((60, 0), (3_600, 0), (86_400, 0), (604_800, 0), (31_622_400, 0), (1, 1_000), (0, 0))
    ] + [Duration(seconds=-60), Duration(seconds=1 << 62), Duration(seconds=60, nanos=-(1 << 31))],
    Timestamp: [
        Timestamp(seconds=seconds, nanos=nanos)
        for seconds, nanos in ((1_700_000_000, 0), (1_900_000_000, 5), (0, 0), (1 << 62, 0), (-(1 << 62), 0), (1, -7))
    ],
    Struct: [
        ParseDict(content, Struct())
        for content in (
            {}, {"price": 50.0}, {"price": 1e300}, {"price": "dear"}, {"gone": 1.0}, {"deep": [1, {"a": None}]},
        )
    ],
}  # fmt: skip


def near(seeds: Sequence[catalog_pb2.Catalog], vocabulary: Sequence[str]) -> st.SearchStrategy[catalog_pb2.Catalog]:
    """Return a strategy for catalogs that are one of the seeds with a few places changed.

    Args:
        seeds: good catalogs.
        vocabulary: texts for fields that none of them fills.
    """
    sources = [(seed, _known(seed)) for seed in seeds]

    @st.composite
    def build(draw: st.DrawFn) -> catalog_pb2.Catalog:
        catalog = catalog_pb2.Catalog()
        seed, known = draw(st.sampled_from(sources))
        catalog.CopyFrom(seed)
        for _ in range(draw(st.sampled_from((0, 1, 1, 1, 1, 2, 2, 4)))):
            _change_somewhere(draw, catalog, known, vocabulary)
        return catalog

    return build()


def is_path(path: str, message: Message) -> bool:
    """Say whether a path such as goals[0].outcomes[1].type leads to something that a message has, or could have."""
    here: Any = message
    for part in path.split("."):
        match = re.fullmatch(r"([a-z_0-9]+)((?:\[\d+\])?)", part)
        if isinstance(here, Struct):
            return part in here.fields
        if match is None or not isinstance(here, Message) or match[1] not in here.DESCRIPTOR.fields_by_name:
            return False
        here = getattr(here, match[1])
        if match[2]:
            place = int(match[2][1:-1])
            if place >= len(here):
                return False
            here = here[place]
    return True


def _known(seed: catalog_pb2.Catalog) -> dict[str, list[Any]]:
    """Return what stands at each field of a catalog; names too at the fields that refer to them, or could."""
    seen: dict[str, set[Any]] = defaultdict(set)
    _collect(seed, seen)
    for field in catalog_pb2.Catalog.DESCRIPTOR.fields:
        names = seen.get(f"{field.message_type.full_name}.name", ()) if field.message_type is not None else ()
        for referring in _REFERRING.get(field.name, ()):
            seen[f"tsugi.v1.{referring}"].update(names)
    return {field: sorted(values) for field, values in seen.items()}


def _collect(message: Message, seen: dict[str, set[Any]]) -> None:
    for field, value in message.ListFields():
        for each in value if field.is_repeated else [value]:
            if field.message_type is None:
                seen[field.full_name].add(each)
            elif field.message_type.full_name.startswith("tsugi."):
                _collect(each, seen)


def _change_somewhere(
    draw: st.DrawFn, message: Any, known: Mapping[str, Sequence[Any]], vocabulary: Sequence[str]
) -> None:
    """Walk down a random path and change what stands at its end."""
    field = draw(_fields(message.DESCRIPTOR))
    if field.is_repeated:
        _change_list(draw, getattr(message, field.name), field, known, vocabulary)
    elif field.message_type is None:
        if field.has_presence and draw(st.integers(0, 5)) == 0:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _value(draw, field, known, vocabulary))
    elif (whole := _WHOLES.get(GetMessageClass(field.message_type))) is not None:
        chosen: Message = draw(st.sampled_from(whole))
        getattr(message, field.name).CopyFrom(chosen)
    elif draw(st.integers(0, 7)) == 0:
        message.ClearField(field.name)
    elif len(field.message_type.fields):
        _change_somewhere(draw, getattr(message, field.name), known, vocabulary)
    else:
        getattr(message, field.name).SetInParent()


@cache
def _fields(descriptor: Descriptor) -> st.SearchStrategy[FieldDescriptor]:
    often = [
        field for field in descriptor.fields if field.name in _OFTEN and descriptor.full_name == "tsugi.v1.Catalog"
    ]
    others = [field for field in descriptor.fields if field.name != "name" or len(descriptor.fields) == 1]
    return st.one_of(
        *map(st.sampled_from, filter(None, (list(descriptor.fields), others, others, others, often, often)))
    )


def _change_list(
    draw: st.DrawFn, entries: Any, field: FieldDescriptor, known: Mapping[str, Sequence[Any]], vocabulary: Sequence[str]
) -> None:
    place = draw(st.integers(0, len(entries) - 1)) if entries else -1
    what = draw(_OPERATIONS)
    if field.message_type is not None:
        if what == "drop" and place >= 0:
            del entries[place]
        elif what == "change" and place >= 0:
            _change_somewhere(draw, entries[place], known, vocabulary)
        else:
            message_class = GetMessageClass(field.message_type)
            entries.append(
                draw(messages(message_class, vocabulary, depth=4))
                if what == "add"
                else entries[place] if place >= 0 else message_class()
            )  # fmt: skip
            if "name" in field.message_type.fields_by_name and draw(st.integers(0, 7)):
                entries[-1].name = f"new_{len(entries)}"
            _change_somewhere(draw, entries[-1], known, vocabulary)
    elif what == "drop" and place >= 0:
        del entries[place]
    elif place < 0 or what == "add":
        entries.append(_value(draw, field, known, vocabulary))
    else:
        entries[place] = _value(draw, field, known, vocabulary)


def _value(
    draw: st.DrawFn, field: FieldDescriptor, known: Mapping[str, Sequence[Any]], vocabulary: Sequence[str]
) -> Any:
    """Draw a value for one field: mostly what is right there, else what nearly is, now and then anything."""
    luck = draw(_LUCK)
    if luck == "anything":
        return draw(scalars(field, vocabulary))
    right = ["other_name"] if field.name == "name" else list(known.get(field.full_name, ()))
    edges: Sequence[Any] = _EXPRESSIONS.get(field.name, ())
    if field.type == FieldDescriptor.TYPE_BOOL:
        right = [False, True]
    elif field.type == FieldDescriptor.TYPE_ENUM:
        assert field.enum_type is not None, "its type says so"
        right = [value.number for value in field.enum_type.values if value.number]
    elif field.type != FieldDescriptor.TYPE_STRING:
        kind = "double" if field.type in _DOUBLE else "whole"
        least, most = (0, 1 << 32) if field.type == FieldDescriptor.TYPE_UINT32 else (-(1 << 63), 1 << 63)
        right += _REASONABLE[kind]
        edges = [number for number in _EDGES[kind] if kind == "double" or least <= number < most]
    pool: Sequence[Any] = edges if edges and (luck == "edge" or not right) else right or vocabulary
    return draw(st.sampled_from(pool))
