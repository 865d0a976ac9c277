"""Messages made from descriptors: valid, broken and absurd, in one strategy, for any message type.

Texts are drawn from a vocabulary that the server under test knows as well as from everything else, so that requests get
past the first check often enough to reach the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

DEPTH_MAX: Final = 6
REPEATED_MAX: Final = 3

_WHOLE: Final = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_SINT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.TYPE_FIXED64: (0, (1 << 64) - 1),
}
_ODD_TEXTS: Final = (
    "", " ", "\0", "a\nb", "\x1b[31m", "\u202eabc", "\ufeff", "漢字", "👩\u200d🔬", "../../etc/passwd", "%s%n", "'; --",
    "NaN", "x" * 129, "x" * 1_025, "x" * 5_000, "0" * 32, "0" * 64, "9" * 20, "A" * 56,
)  # fmt: skip


def messages(message_class: type[Message], vocabulary: Sequence[str], depth: int = 0) -> st.SearchStrategy[Any]:
    """Return a strategy for messages of one class."""

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = message_class()
        for field in message_class.DESCRIPTOR.fields:
            if draw(st.integers(0, 3)):  # three fields in four are set
                _fill(draw, message, field, vocabulary, depth)
        return message

    return build()


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for bytes that were altered, cut or stuffed in a few places."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        altered = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(altered)))
            match draw(st.sampled_from(("set", "cut", "stuff"))):
                case "set":
                    altered[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
                case "cut":
                    del altered[at : at + draw(st.integers(1, 64))]
                case "stuff":
                    altered[at:at] = draw(st.binary(max_size=16))
        return bytes(altered)

    return build()


def _fill(draw: st.DrawFn, message: Any, field: Any, vocabulary: Sequence[str], depth: int) -> None:
    if field.message_type is not None and depth >= DEPTH_MAX:
        return
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entries = getattr(message, field.name)
        value = field.message_type.fields_by_name["value"]
        for key in draw(st.lists(texts(vocabulary), max_size=REPEATED_MAX)):
            if value.message_type is None:
                entries[key] = draw(scalars(value, vocabulary))
            else:
                entries[key].CopyFrom(draw(messages(GetMessageClass(value.message_type), vocabulary, depth + 1)))
    elif field.is_repeated:
        strategy = _values(field, vocabulary, depth)
        getattr(message, field.name).extend(draw(st.lists(strategy, max_size=REPEATED_MAX)))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(draw(_values(field, vocabulary, depth)))
    else:
        setattr(message, field.name, draw(_values(field, vocabulary, depth)))


def _values(field: FieldDescriptor, vocabulary: Sequence[str], depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(GetMessageClass(field.message_type), vocabulary, depth + 1)
    return scalars(field, vocabulary)


def scalars(field: FieldDescriptor, vocabulary: Sequence[str]) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of a field that holds no message."""
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return texts(vocabulary)
        case FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=200)
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_ENUM:
            assert field.enum_type is not None, "its type says so"
            known = [value.number for value in field.enum_type.values]
            return st.one_of(st.sampled_from(known), st.sampled_from((-1, 99, (1 << 31) - 1)))
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return st.one_of(st.sampled_from((0.0, 1.0, 5.0)), st.floats())
    least, most = _WHOLE[field.type]
    return st.one_of(st.integers(0, 4), st.sampled_from((least, most)), st.integers(least, most))


def texts(vocabulary: Sequence[str]) -> st.SearchStrategy[str]:
    """Return a strategy for texts, half of them known ones."""
    known = st.sampled_from(list(vocabulary))
    # Twice, so that half of the texts are known ones; surrogates alone are no text in a message.
    return st.one_of(known, known, st.sampled_from(_ODD_TEXTS), st.text(st.characters(exclude_categories=["Cs"])))
