"""What a rule may speak of: the roots of a rule, a segment, a filter of events and a value, and their facts' types.

Handed declared facts, it gives those that a kind of rule may read, as the messages that CEL checks names and types
against. What a rule may not read is known by name too, so that its author is told why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, timestamp_pb2

from server.catalog.catalog import Fact
from tsugi.v1 import catalog_pb2

PACKAGE: Final = "tsugi.facts"
NOW: Final = "now"

_FIELD_TYPES: Final = {
    catalog_pb2.ATTRIBUTE_TYPE_NUMBER: descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    catalog_pb2.ATTRIBUTE_TYPE_BOOL: descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    catalog_pb2.ATTRIBUTE_TYPE_CATEGORY: descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    catalog_pb2.ATTRIBUTE_TYPE_TEXT: descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    catalog_pb2.ATTRIBUTE_TYPE_TIME: descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
    catalog_pb2.ATTRIBUTE_TYPE_SET: descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    catalog_pb2.ATTRIBUTE_TYPE_MONEY: descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    catalog_pb2.ATTRIBUTE_TYPE_VECTOR: descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
}
_LISTS: Final = (catalog_pb2.ATTRIBUTE_TYPE_SET, catalog_pb2.ATTRIBUTE_TYPE_VECTOR)


@dataclass(frozen=True, slots=True)
class Scope:
    """What one kind of rule reads."""

    roots: tuple[str, ...]  # "now", and the messages whose facts it may read
    hidden: Mapping[str, str] = field(default_factory=dict)  # facts and roots it may not read, and what to say of them

    def readable(self, facts: Iterable[Fact]) -> list[Fact]:
        """Return the facts that a rule may read, in their order."""
        return [fact for fact in facts if fact.name.partition(".")[0] in self.roots and fact.name not in self.hidden]

    def why_hidden(self, name: str) -> str:
        """Say why a rule may not read a name; nothing where it is simply not declared."""
        return self.hidden.get(name) or self.hidden.get(name.partition(".")[0], "")


_ONLY_SEGMENTS: Final = "cannot be read here; a segment reads profile and now"
_ONLY_FILTERS: Final = "cannot be read here; a filter reads the event's own properties"
_ONLY_TRIGGERS: Final = "cannot be read here; the filter of a subscription reads event, profile and now"

ELIGIBILITY: Final = Scope(
    (NOW, "profile", "context", "action"),
    {"event": "cannot be read here; a rule reads profile, context, action and now"},
)
VALUES: Final = Scope(
    ELIGIBILITY.roots, {"event": "cannot be read here; a value reads profile, context, action and now"}
)
FILTER: Final = Scope(("event",), dict.fromkeys((NOW, "profile", "context", "action"), _ONLY_FILTERS))
TRIGGER: Final = Scope((NOW, "profile", "event"), dict.fromkeys(("context", "action"), _ONLY_TRIGGERS))


def segment_scope(segments: Iterable[str]) -> Scope:
    """Return what a segment reads: of the profile all but the segments, which are named."""
    hidden = dict.fromkeys(("context", "action", "event"), _ONLY_SEGMENTS)
    for name in segments:
        hidden[f"profile.{name}"] = "is a segment; a segment reads no other segment"
    return Scope((NOW, "profile"), hidden)


def messages(facts: Iterable[Fact], roots: Iterable[str]) -> descriptor_pool.DescriptorPool:
    """Declare the facts as one message a root."""
    # proto2: all fields have presence, and names that differ by an underscore alone may stand side by side.
    file = descriptor_pb2.FileDescriptorProto(name="tsugi/facts.proto", package=PACKAGE, syntax="proto2")
    file.dependency.append(timestamp_pb2.DESCRIPTOR.name)
    declared = {root: file.message_type.add(name=root) for root in roots if root != NOW}
    for number, fact in enumerate(facts, start=1):
        root, _, name = fact.name.partition(".")
        if not name:
            continue  # now
        is_list = fact.type in _LISTS
        added = declared[root].field.add(
            name=name,
            json_name=f"f{number}",
            number=number,
            label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            if is_list
            else descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
            type=_FIELD_TYPES[fact.type],
        )
        if fact.type == catalog_pb2.ATTRIBUTE_TYPE_TIME:
            added.type_name = f".{timestamp_pb2.Timestamp.DESCRIPTOR.full_name}"
    pool = descriptor_pool.DescriptorPool()
    for needed in (timestamp_pb2.DESCRIPTOR, duration_pb2.DESCRIPTOR):
        pool.AddSerializedFile(needed.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool
