"""How a refusal is said: one exception for the caller's faults, with a stable reason and the path of each field.

Raised wherever the fault is known; knows nothing of gRPC. ``rpc/status.py`` turns it into a status. Our own troubles
are degradations, not errors; the programmer's faults are assertions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tsugi.v1.error_reason_pb2 import ErrorReason


class Violation(NamedTuple):
    """One field that is wrong: where it stands and what would be right."""

    path: str
    description: str


class TsugiError(Exception):
    """The caller's fault, told so that it can be mended.

    Attributes:
        reason: the stable reason; maps to exactly one status code.
        message: for people: field, limit, next step. Holds no personal data and no internals.
        violations: every field at fault, not only the first.
        metadata: whatever varies in the message, as text.
    """

    def __init__(
        self,
        reason: ErrorReason,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = {name: str(value) for name, value in metadata.items()}


def field_invalid(path: str, description: str) -> TsugiError:
    """Build the refusal of a single wrong field."""
    return TsugiError(
        ErrorReason.ERROR_REASON_FIELD_INVALID,
        f"{path}: {description}",
        violations=[Violation(path, description)],
        field=path,
    )


def limit_exceeded(path: str, got: int, limit: int, unit: str = "entries") -> TsugiError:
    """Build the refusal of a field that holds more than its stated maximum."""
    return TsugiError(
        ErrorReason.ERROR_REASON_LIMIT_EXCEEDED,
        f"{path}: at most {limit} {unit}, got {got}",
        violations=[Violation(path, f"at most {limit} {unit}")],
        field=path,
        limit=limit,
        got=got,
    )


def within(path: str, error: TsugiError) -> TsugiError:
    """Build the refusal of the whole for what is wrong with the part at a path."""
    field = error.metadata.get("field")
    return TsugiError(
        error.reason,
        f"{path}: {error.message}",
        violations=[Violation(f"{path}.{violation.path}", violation.description) for violation in error.violations],
        **(error.metadata | {"field": f"{path}.{field}" if field else path}),
    )


def nobody_known(path: str) -> TsugiError:
    """Build the refusal of an identity that leads to nobody; it is not repeated, for it may be personal data."""
    return TsugiError(
        ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND,
        "nobody is known by this identity",
        violations=[Violation(path, "nobody is known by it")],
        resource="profile",
        field=path,
    )


def not_found(resource: str, name: str, path: str = "") -> TsugiError:
    """Build the refusal of a name that nothing answers to."""
    return TsugiError(
        ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND,
        f"no {resource} is named {name[:64]!r}",
        violations=[Violation(path, f"no such {resource}")] if path else (),
        resource=resource,
        name=name[:64],
        **({"field": path} if path else {}),
    )
