"""What the .proto files say in words: the stated maximum of every repeated field, read out of its comment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc  # type: ignore[import-untyped]  # ships no types

_ROOT: Final = Path(__file__).parents[2] / "protos"
_MAXIMUM: Final = re.compile(r"(?:[Aa]t most|\b1 to) ([\d,]+)")
# Field numbers of descriptor.proto, which locate a comment.
_MESSAGE_TYPE: Final = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
_NESTED_TYPE: Final = DescriptorProto.NESTED_TYPE_FIELD_NUMBER
_FIELD: Final = DescriptorProto.FIELD_FIELD_NUMBER


@cache
def stated_maxima() -> dict[str, int | None]:
    """Return the maximum that the comment of each repeated field states, by full name; None where it states none."""
    maxima: dict[str, int | None] = {}
    for file in _files():
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for i, message in enumerate(file.message_type):
            for name, path in _repeated(message, f"{file.package}.{message.name}", (_MESSAGE_TYPE, i)):
                found = _MAXIMUM.search(" ".join(comments.get(path, "").split()))
                maxima[name] = int(found[1].replace(",", "")) if found else None
    return maxima


def _files() -> list[FileDescriptorProto]:
    """Compile the public API with its comments."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "api.binpb"
        sources = sorted(str(path) for path in (_ROOT / "tsugi" / "v1").glob("*.proto"))
        well_known = str(resources.files("grpc_tools") / "_proto")
        arguments = ["protoc", f"--proto_path={_ROOT}", f"--proto_path={well_known}", "--include_source_info"]
        assert protoc.main([*arguments, f"--descriptor_set_out={output}", *sources]) == 0, "the protos compile"
        return list(FileDescriptorSet.FromString(output.read_bytes()).file)


def _repeated(message: DescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i, field in enumerate(message.field):
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            yield f"{name}.{field.name}", (*path, _FIELD, i)
    for i, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _repeated(nested, f"{name}.{nested.name}", (*path, _NESTED_TYPE, i))
