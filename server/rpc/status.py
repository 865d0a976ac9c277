"""How a refusal leaves: one total table from error reason to status code, and the details that go with it.

A test proves that every reason stands in the table. What is not a TsugiError is a defect of ours: it leaves as INTERNAL
with an opaque id, and the log has the rest.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Final

import grpc
import structlog
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from server import telemetry
from server.errors import TsugiError, Violation
from server.registry.blobs import BlobError
from server.storage.record import CorruptRecordError
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.item_error_pb2 import ItemError

DOMAIN: Final = "tsugi"
DETAILS_KEY: Final = "grpc-status-details-bin"
RETRY_S: Final = 1
# A caller's library takes 8 KiB of metadata. In them stand the message, each byte as up to three, and the details as
# base64: the message again, some five values of metadata, the fields.
MESSAGE_BYTES_MAX: Final = 400
METADATA_BYTES_MAX: Final = 150  # a value
FIELD_BYTES_MAX: Final = 500  # a path, and a description
VIOLATION_BYTES_MAX: Final = 3_500  # all fields

_BY_CODE: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: (
        ErrorReason.ERROR_REASON_REQUEST_MALFORMED,
        ErrorReason.ERROR_REASON_FIELD_INVALID,
        ErrorReason.ERROR_REASON_LIMIT_EXCEEDED,
        ErrorReason.ERROR_REASON_TIME_OUT_OF_RANGE,
        ErrorReason.ERROR_REASON_DECISION_ID_INVALID,
        ErrorReason.ERROR_REASON_ACTION_NOT_IN_DECISION,
        ErrorReason.ERROR_REASON_CATALOG_INVALID,
        ErrorReason.ERROR_REASON_BUNDLE_MALFORMED,
        ErrorReason.ERROR_REASON_BUNDLE_FORMAT_REFUSED,
        ErrorReason.ERROR_REASON_BUNDLE_EXTERNAL_DATA,
        ErrorReason.ERROR_REASON_BUNDLE_OPERATOR_REFUSED,
        ErrorReason.ERROR_REASON_BUNDLE_TOO_COMPLEX,
        ErrorReason.ERROR_REASON_IDENTITY_TOO_SHARED,
        ErrorReason.ERROR_REASON_SOURCE_NOT_ALLOWED,
    ),
    grpc.StatusCode.NOT_FOUND: (ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND,),
    grpc.StatusCode.ALREADY_EXISTS: (ErrorReason.ERROR_REASON_IDEMPOTENCY_KEY_REUSED,),
    grpc.StatusCode.FAILED_PRECONDITION: (
        ErrorReason.ERROR_REASON_CATALOG_MISSING,
        ErrorReason.ERROR_REASON_IDENTITIES_CONFLICT,
        ErrorReason.ERROR_REASON_BUNDLE_CONTRACT_MISMATCH,
        ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID,
        ErrorReason.ERROR_REASON_BUNDLE_TOO_SLOW,
        ErrorReason.ERROR_REASON_BUNDLE_CRASHED_VALIDATOR,
        ErrorReason.ERROR_REASON_NO_PREVIOUS_REVISION,
    ),
    grpc.StatusCode.ABORTED: (
        ErrorReason.ERROR_REASON_ETAG_MISMATCH,
        ErrorReason.ERROR_REASON_UPLOAD_INCOMPLETE,
        ErrorReason.ERROR_REASON_UPLOAD_DIGEST_MISMATCH,
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        ErrorReason.ERROR_REASON_OVERLOADED,
        ErrorReason.ERROR_REASON_LOG_VOLUME_FULL,
        ErrorReason.ERROR_REASON_LOG_MAP_FULL,
        ErrorReason.ERROR_REASON_UPLOAD_BUSY,
    ),
    grpc.StatusCode.UNAVAILABLE: (
        ErrorReason.ERROR_REASON_LOG_UNAVAILABLE,
        ErrorReason.ERROR_REASON_DRAINING,
        ErrorReason.ERROR_REASON_STATE_BEHIND,
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: (ErrorReason.ERROR_REASON_DEADLINE_TOO_SHORT,),
    grpc.StatusCode.DATA_LOSS: (ErrorReason.ERROR_REASON_RECORD_CHECKSUM,),
    grpc.StatusCode.INTERNAL: (ErrorReason.ERROR_REASON_INTERNAL_ERROR,),
}

CODES: Final = {reason: code for code, reasons in _BY_CODE.items() for reason in reasons}

_RETRYABLE = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE})


def told(error: BaseException) -> TsugiError:
    """Return what a caller is told of an error: itself when it is the caller's, an opaque id otherwise."""
    if isinstance(error, TsugiError):
        return error
    error_id = uuid.uuid4().hex[:16]
    structlog.get_logger().error("internal_error", error_id=error_id, exc_info=error)
    if isinstance(error, CorruptRecordError | BlobError):
        return TsugiError(
            ErrorReason.ERROR_REASON_RECORD_CHECKSUM,
            f"what is stored is not what was written; tell the operator, the server's log explains {error_id}",
            error_id=error_id,
        )
    return TsugiError(
        ErrorReason.ERROR_REASON_INTERNAL_ERROR, f"internal error {error_id}; the server's log explains it",
        error_id=error_id,
    )  # fmt: skip


def item_error(error: TsugiError) -> ItemError:
    """Build the error of one item of a batch."""
    telemetry.ERRORS.labels(_label(error)).inc()
    return ItemError(reason=error.reason, message=error.message, metadata=error.metadata)


def status(error: TsugiError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return code, message and trailing metadata of a refused call."""
    telemetry.ERRORS.labels(_label(error)).inc()
    code = CODES[error.reason]
    message = _cut(error.message, MESSAGE_BYTES_MAX)
    metadata = {name: _cut(value, METADATA_BYTES_MAX) for name, value in error.metadata.items()}
    packed = [_packed(ErrorInfo(reason=ErrorReason.Name(error.reason), domain=DOMAIN, metadata=metadata))]
    if violations := _violations(error):
        packed.append(_packed(_bad_request(violations)))
    if code in _RETRYABLE:
        packed.append(_packed(RetryInfo(retry_delay=Duration(seconds=RETRY_S))))
    rich = Status(code=code.value[0], message=message, details=packed)
    return code, message, ((DETAILS_KEY, rich.SerializeToString()),)


def _violations(error: TsugiError) -> Sequence[Violation]:
    """Return the fields at fault, also of an error that names one field in its metadata alone."""
    field = error.metadata.get("field", "")
    return error.violations or ([Violation(field, error.message)] if field else [])


def _bad_request(violations: Sequence[Violation]) -> BadRequest:
    """List the fields at fault, as many as trailing metadata carries; the metadata says how many there are in all."""
    bad_request = BadRequest()
    for violation in violations:
        bad_request.field_violations.add(
            field=_cut(violation.path, FIELD_BYTES_MAX), description=_cut(violation.description, FIELD_BYTES_MAX)
        )
        if bad_request.ByteSize() > VIOLATION_BYTES_MAX:
            del bad_request.field_violations[-1]
            break
    return bad_request


def _cut(text: str, bytes_max: int) -> str:
    return text.encode()[:bytes_max].decode(errors="ignore")


def _label(error: TsugiError) -> str:
    return ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")


def _packed(detail: ErrorInfo | BadRequest | RetryInfo) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
