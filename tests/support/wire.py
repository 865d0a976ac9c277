"""Calls below the generated stubs: any bytes to any method, and the whole of what comes back.

The methods come from the descriptors, so a new one is met by every test that walks over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tsugi.v1 import (
    catalog_service_pb2,
    decision_service_pb2,
    model_service_pb2,
    outcome_service_pb2,
    profile_service_pb2,
)

TIMEOUT_S: Final = 60.0
METHODS: Final[dict[str, MethodDescriptor]] = {
    method.name: method
    for module in (
        decision_service_pb2,
        outcome_service_pb2,
        profile_service_pb2,
        catalog_service_pb2,
        model_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Streams whose messages are one item each, told by their own paths; those of other methods hold items, or are none.
ITEM_STREAMS: Final = frozenset({"StreamDecide", "StreamReportOutcomes"})


@dataclass(frozen=True)
class Refusal:
    """One refused call, as the wire has it."""

    code: grpc.StatusCode
    message: str
    domain: str  # empty: the status came from the library
    reason: str
    metadata: dict[str, str]
    fields: list[tuple[str, str]]  # path and description
    retry_delay_s: float

    @property
    def paths(self) -> list[str]:
        """The paths of the fields at fault."""
        return [path for path, _ in self.fields]


def refusal_of(error: grpc.RpcError) -> Refusal:
    """Take a status apart."""
    info, fields, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        assert any(detail.Unpack(known) for known in (info, fields, retry)), f"unknown detail {detail.type_url}"
    return Refusal(
        code=error.code(),
        message=error.details() or "",
        domain=info.domain,
        reason=info.reason,
        metadata=dict(info.metadata),
        fields=[(violation.field, violation.description) for violation in fields.field_violations],
        retry_delay_s=retry.retry_delay.ToTimedelta().total_seconds(),
    )


def request_class(method: str) -> type[Message]:
    """Return the class of a method's requests."""
    return GetMessageClass(METHODS[method].input_type)


def response_class(method: str) -> type[Message]:
    """Return the class of a method's responses."""
    return GetMessageClass(METHODS[method].output_type)


class Wire:
    """One connection that sends bytes as they are; without retries."""

    def __init__(self, address: str, *options: tuple[str, int]) -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0), *options])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()

    def exchange(
        self,
        method: str,
        parts: Sequence[bytes],
        *,
        metadata: Iterable[tuple[str, str]] = (),
        compression: grpc.Compression | None = None,
    ) -> tuple[list[bytes], Refusal | None]:
        """Call a method with one message, or the messages of its stream; return every reply, and how it was refused.

        Of what is endless, a subscription, the first reply is taken and no other.
        """
        descriptor = METHODS[method]
        path = f"/{descriptor.containing_service.full_name}/{method}"
        options: dict[str, Any] = {
            "timeout": TIMEOUT_S,
            "metadata": tuple(metadata),
            "compression": compression,
            "wait_for_ready": True,
        }
        replies: list[bytes] = []
        try:
            if descriptor.server_streaming and not descriptor.client_streaming:
                endless: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(path)
                (part,) = parts
                call = endless(part, **options)
                replies.append(next(call))
                call.cancel()
            elif descriptor.server_streaming:
                both: grpc.StreamStreamMultiCallable[bytes, bytes] = self.channel.stream_stream(path)
                replies.extend(both(iter(parts), **options))  # what came before a refusal stays in the list
            elif descriptor.client_streaming:
                stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = self.channel.stream_unary(path)
                replies.append(stream(iter(parts), **options))
            else:
                unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(path)
                (part,) = parts
                replies.append(unary(part, **options))
        except grpc.RpcError as error:
            return replies, refusal_of(error)
        return replies, None

    def send(
        self,
        method: str,
        parts: Sequence[bytes],
        *,
        metadata: Iterable[tuple[str, str]] = (),
        compression: grpc.Compression | None = None,
    ) -> bytes | Refusal:
        """Call a method and return its one reply, or how it was refused, whatever was answered before."""
        replies, refusal = self.exchange(method, parts, metadata=metadata, compression=compression)
        if refusal is not None:
            return refusal
        (reply,) = replies
        return reply

    def ask(self, method: str, *messages: Message) -> Message | Refusal:
        """Call a method with messages and parse the reply."""
        answer = self.send(method, [message.SerializeToString() for message in messages])
        return answer if isinstance(answer, Refusal) else response_class(method).FromString(answer)
