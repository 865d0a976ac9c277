"""Every method of the API in one table: what it takes, how large it may be, who answers.

Built from the descriptors, so a method without an answer stops the start. Requests and replies pass gRPC as bytes: what
cannot be parsed is refused by us, with a reason, and replies that were spliced are not serialised again.
"""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from server.errors import TsugiError, limit_exceeded
from server.rpc.status import status, told
from tsugi.v1 import (
    catalog_service_pb2,
    decision_service_pb2,
    model_service_pb2,
    outcome_service_pb2,
    profile_service_pb2,
)
from tsugi.v1.error_reason_pb2 import ErrorReason

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
SMALL_BYTES_MAX: Final = 256 * 1024

if TYPE_CHECKING:  # gRPC's own classes take no type arguments at run time
    Context = grpc.aio.ServicerContext[bytes, bytes]
    Build = Callable[[MethodDescriptor, Any], grpc.RpcMethodHandler[Any, Any]]
else:
    Context = grpc.aio.ServicerContext
UnaryAnswer = Callable[[Any, bytes, Context], Awaitable[Message | bytes]]
UploadAnswer = Callable[[AsyncIterator[Any], Context], Awaitable[Message]]
StreamAnswer = Callable[[AsyncIterator[Any], Context], AsyncIterator[Message | bytes]]
SubscriptionAnswer = Callable[[Any, Context], AsyncGenerator[Message, None]]

SERVICES: Final[tuple[ServiceDescriptor, ...]] = (
    decision_service_pb2.DESCRIPTOR.services_by_name["DecisionService"],
    outcome_service_pb2.DESCRIPTOR.services_by_name["OutcomeService"],
    profile_service_pb2.DESCRIPTOR.services_by_name["ProfileService"],
    catalog_service_pb2.DESCRIPTOR.services_by_name["CatalogService"],
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
)

# All others are held to less than the transport takes.
_LARGE: Final = frozenset({"BatchDecide", "BatchReportOutcomes", "IngestRecords", "StreamIngestRecords"})


def handlers(
    unary: Mapping[str, UnaryAnswer],
    uploads: Mapping[str, UploadAnswer],
    streams: Mapping[str, StreamAnswer],
    subscriptions: Mapping[str, SubscriptionAnswer],
) -> dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]:
    """Return the handlers of every service, by service and method name.

    Args:
        unary: who answers each method that takes one message.
        uploads: who answers each method that takes a stream and gives one message.
        streams: who answers each method that takes a stream and gives one.
        subscriptions: who answers each method that takes one message and gives a stream.

    Raises:
        LookupError: a method has no answer, or an answer no method.
    """
    kinds: dict[tuple[bool, bool], tuple[Mapping[str, Any], Build]] = {
        (False, False): (unary, _unary),
        (True, False): (uploads, _upload),
        (True, True): (streams, _stream),
        (False, True): (subscriptions, _subscription),
    }
    declared = {
        method.name: kinds[method.client_streaming, method.server_streaming]
        for service in SERVICES
        for method in service.methods
    }
    unanswered = {name for name, (answers, _) in declared.items() if name not in answers}
    unknown = {*unary, *uploads, *streams, *subscriptions} - declared.keys()
    if unanswered or unknown:
        raise LookupError(
            f"methods without an answer: {sorted(unanswered)}; answers without a method: {sorted(unknown)}"
        )
    return {
        service.full_name: {method.name: _built(method, *declared[method.name]) for method in service.methods}
        for service in SERVICES
    }


def _built(method: MethodDescriptor, answers: Mapping[str, Any], build: Build) -> grpc.RpcMethodHandler[Any, Any]:
    return build(method, answers[method.name])


def _unary(method: MethodDescriptor, answer: UnaryAnswer) -> grpc.RpcMethodHandler[Any, Any]:
    request_class = GetMessageClass(method.input_type)
    bytes_max = MESSAGE_BYTES_MAX if method.name in _LARGE else SMALL_BYTES_MAX

    async def handle(raw: bytes, context: Context) -> bytes:
        try:
            reply = await answer(_parse(request_class, raw, bytes_max), raw, context)
            return reply if isinstance(reply, bytes) else reply.SerializeToString()
        except Exception as error:  # the one place where errors become statuses
            await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(handle)


def _upload(method: MethodDescriptor, answer: UploadAnswer) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(requests: AsyncIterator[bytes], context: Context) -> bytes:
        try:
            reply = await answer(_parsed(method, requests), context)
            return reply.SerializeToString()
        except Exception as error:  # the one place where errors become statuses
            await _abort(context, error)

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream(method: MethodDescriptor, answer: StreamAnswer) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        try:
            async for reply in answer(_parsed(method, requests), context):
                yield reply if isinstance(reply, bytes) else reply.SerializeToString()
        except Exception as error:  # the one place where errors become statuses
            await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)


def _subscription(method: MethodDescriptor, answer: SubscriptionAnswer) -> grpc.RpcMethodHandler[Any, Any]:
    request_class = GetMessageClass(method.input_type)

    async def handle(raw: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            async with aclosing(answer(_parse(request_class, raw, SMALL_BYTES_MAX), context)) as replies:
                async for reply in replies:
                    yield reply.SerializeToString()
        except Exception as error:  # the one place where errors become statuses
            await _abort(context, error)

    return grpc.unary_stream_rpc_method_handler(handle)


async def _parsed(method: MethodDescriptor, requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    request_class = GetMessageClass(method.input_type)
    bytes_max = MESSAGE_BYTES_MAX if method.name in _LARGE else SMALL_BYTES_MAX
    async for raw in requests:
        yield _parse(request_class, raw, bytes_max)


def _parse(request_class: type[Message], raw: bytes, bytes_max: int) -> Message:
    if len(raw) > bytes_max:
        raise limit_exceeded("request", len(raw), bytes_max, "bytes")
    try:
        return request_class.FromString(raw)
    except DecodeError as error:
        raise TsugiError(
            ErrorReason.ERROR_REASON_REQUEST_MALFORMED,
            f"the bytes are not a {request_class.DESCRIPTOR.full_name}",
        ) from error


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames of a refused call hold: until the next collection they would keep an old state file open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


async def _abort(context: Context, error: Exception) -> NoReturn:
    code, message, trailing = status(told(error))
    _let_go(error)
    await context.abort(code, message, trailing)
