"""Spliced replies: the bytes put together by hand parse to the message built field by field."""

from __future__ import annotations

import math

import pytest
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from server.decisioning import reply
from server.wire import varint
from tests.support import catalogs
from tests.support.deciding import TOKEN_KEY
from tsugi.v1.decision_pb2 import ChoiceReason, Degradation, Slot
from tsugi.v1.decision_service_pb2 import DecideResponse
from tsugi.v1.model_pb2 import ModelRevisionUse, ModelRole

names = st.from_regex(r"[a-z][a-z0-9_]{0,63}", fullmatch=True)
numbers = st.floats(allow_nan=False)
reasons = st.sampled_from(
    [
        ChoiceReason.CHOICE_REASON_BEST,
        ChoiceReason.CHOICE_REASON_EXPLORED,
        ChoiceReason.CHOICE_REASON_RANDOM_CONTROL,
    ]
)
instants = st.integers(0, 253_402_300_799_999_999)  # to the end of year 9999
contents = st.dictionaries(
    st.text(max_size=8), st.one_of(st.text(max_size=200), st.booleans(), st.just(None)), max_size=3
)


@st.composite
def filled_slots(draw: st.DrawFn) -> Slot:
    content = struct_pb2.Struct()
    content.update(draw(contents))
    return Slot(
        placement=draw(names),
        position=draw(st.integers(0, 15)),
        action=draw(names),
        treatment=draw(names),
        content=content,
        propensity=draw(numbers),
        value=draw(numbers),
        priority=draw(numbers),
        selection_probability=draw(numbers),
        reasons=[draw(reasons)],
    )


@st.composite
def empty_slots(draw: st.DrawFn) -> Slot:
    return Slot(
        placement=draw(names), position=draw(st.integers(0, 15)), reasons=[ChoiceReason.CHOICE_REASON_NO_CANDIDATE]
    )


@pytest.mark.slow
@given(
    slots=st.lists(st.one_of(filled_slots(), empty_slots()), max_size=6),
    degradations=st.lists(st.sampled_from([each for each in Degradation.values() if each]), max_size=7),
    now_us=instants,
    lsn=st.integers(0, (1 << 64) - 1),
)
def test_spliced_reply_is_the_message_built_field_by_field(
    slots: list[Slot], degradations: list[Degradation], now_us: int, lsn: int
) -> None:
    token = TOKEN_KEY.mint(bytes(16), bytes(16))
    of_the_set = DecideResponse(
        catalog_revision="c" * 64,
        model_revisions=[ModelRevisionUse(role=ModelRole.MODEL_ROLE_LEARNER, revision="1", learned_lsn=lsn)],
    )
    parts = [reply.decision_id(token), *map(spliced, slots), reply.degradations(degradations)]
    parts += [of_the_set.SerializeToString(), reply.expire_time(now_us), reply.lsn(lsn)]

    built = DecideResponse(decision_id=token.decode(), slots=slots, degradations=degradations, lsn=lsn)
    built.MergeFrom(of_the_set)
    built.expire_time.CopyFrom(Timestamp(seconds=now_us // 1_000_000, nanos=now_us % 1_000_000 // 1_000 * 1_000_000))
    assert parsed(b"".join(parts)) == built


def spliced(slot: Slot) -> bytes:
    """Splice a slot from the same parts as a catalog keeps."""
    placement = Slot(placement=slot.placement, position=slot.position).SerializeToString()
    if not slot.action:
        return reply.empty_slot(placement, slot.reasons[0])
    action = Slot(action=slot.action, treatment=slot.treatment, content=slot.content).SerializeToString()
    four = (slot.propensity, slot.value, slot.priority, slot.selection_probability)
    return reply.slot(placement, action, *four, slot.reasons[0])


def parsed(data: bytes) -> Message:
    message = DecideResponse.FromString(data)
    known = DecideResponse()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    assert known == message, "nothing in it is unknown to the schema"
    return message


@pytest.mark.parametrize("number", [0.0, -0.0, math.inf, 5e-324, 1.7976931348623157e308])
def test_every_number_of_a_slot_arrives_to_the_last_bit(number: float) -> None:
    (slot,) = DecideResponse.FromString(reply.slot(b"", b"", number, number, number, number, 1)).slots
    for got in (slot.propensity, slot.value, slot.priority, slot.selection_probability):
        assert (got, math.copysign(1.0, got)) == (number, math.copysign(1.0, number))


@given(st.one_of(st.integers(0, 1 << 63), st.integers(0, 63).map(lambda bits: 1 << bits)))
def test_varint_is_what_protobuf_writes(number: int) -> None:
    assert b"\x38" + varint(number) == (DecideResponse(lsn=number).SerializeToString() or b"\x38\x00")


def test_what_a_catalog_keeps_serialised_is_the_beginning_of_its_slots() -> None:
    catalog = catalogs.compiled(
        actions=[
            {"name": "a", "treatments": [{"name": "t", "channel": "web", "content": {"title": "Ä" * 300}}]},
        ]
    )
    placement = catalog.placements[0]
    data = reply.slot(placement.slot_bytes[3], catalog.actions.slot_bytes[0][0], 0.1, 1.0, 0.1, 1.0, 1)
    (slot,) = DecideResponse.FromString(data).slots
    assert json_format.MessageToDict(slot) == {
        "placement": placement.name,
        "position": 3,
        "action": "a",
        "treatment": "t",
        "content": {"title": "Ä" * 300},
        "propensity": 0.1,
        "value": 1.0,
        "priority": 0.1,
        "selectionProbability": 1.0,
        "reasons": ["CHOICE_REASON_BEST"],
    }
