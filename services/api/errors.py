"""The api's errors: a gRPC status code with google.rpc details (the richer error model).

The details are a google.rpc.Status in the trailing metadata key `grpc-status-details-bin`. Clients accept
8 KiB of metadata by default, so the api truncates a status that would be larger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = [
    "DATABASE_TIMEOUT",
    "InvalidArgument",
    "StatusError",
    "Violation",
    "being_sent",
    "body_purged",
    "collect",
    "database_unavailable",
    "draining",
    "error_info",
    "exceeds_max_allowed_packet",
    "idempotency_conflict",
    "internal_error",
    "invalid_field",
    "no_request",
    "not_found",
    "not_retryable",
    "not_uncertain",
    "overloaded",
    "permission_denied",
    "retry_info",
    "slow_request",
    "too_many_failed_attempts",
    "unauthenticated",
]

A = TypeVar("A")
R = TypeVar("R")

DATABASE_TIMEOUT = 4.5
"""Seconds that an RPC waits for the database before it answers UNAVAILABLE."""
DOMAIN = "postroad"
_MAX_VIOLATIONS = 50
# The names and the overhead of all entries take 300 of the 8192 bytes. The message appears percent-encoded
# and again in the details, which are base64: 900 + 4/3 * (900 + 3900 + 200 for the details' framing).
_MAX_DETAIL_BYTES = 3900
_MAX_MESSAGE, _MAX_MESSAGE_BYTES = 300, 900


@dataclass(frozen=True, slots=True)
class Violation:
    """One invalid field: its path in the request (`data.email`) and what is wrong with it."""

    field: str
    description: str


class StatusError(Exception):
    """An RPC's error: a status code, a message for people and details for programs."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = _truncate_message(message)
        self.details = tuple(details)

    @property
    def reason(self) -> str:
        """The reason of its ErrorInfo, empty where it has none."""
        infos = (detail for detail in self.details if isinstance(detail, error_details_pb2.ErrorInfo))
        return next((info.reason for info in infos), "")

    def status(self) -> status_pb2.Status:
        """Return the error as a google.rpc.Status."""
        packed = []
        for detail in self.details:
            holder = any_pb2.Any()
            holder.Pack(detail)
            packed.append(holder)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        """End the RPC with this error."""
        status = rpc_status.to_status(self.status())
        try:
            await context.abort(status.code, status.details, status.trailing_metadata)
        except grpc.aio.InternalError:
            # The call ended first, so there is nobody to tell.
            raise asyncio.CancelledError from None


class InvalidArgument(StatusError):
    """INVALID_ARGUMENT. Its details name the invalid fields: the first 50, or as many as fit."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        if not violations:
            raise ValueError("an InvalidArgument names at least one field")
        bad = error_details_pb2.BadRequest()
        size = 0
        for violation in violations[:_MAX_VIOLATIONS]:
            field, description = _truncate(violation.field, 120), _truncate(violation.description, 300)
            size += len(field.encode()) + len(description.encode()) + 8
            if size > _MAX_DETAIL_BYTES:
                break
            bad.field_violations.add(field=field, description=description)
        named = "; ".join(f"{v.field}: {v.description}" for v in violations[:3])
        more = f"; and {len(violations) - 3} more" if len(violations) > 3 else ""
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, named + more, (bad, error_info("INVALID_REQUEST")))
        self.violations = tuple(violations)


def collect(violations: list[Violation], check: Callable[[A], R], value: A) -> R | None:
    """Return `check(value)`. Where it raises InvalidArgument, add its violations and return None."""
    try:
        return check(value)
    except InvalidArgument as error:
        violations.extend(error.violations)
        return None


def invalid_field(field: str, description: str) -> InvalidArgument:
    """Return INVALID_ARGUMENT for one field."""
    return InvalidArgument((Violation(field, description),))


def not_found(id_: str) -> StatusError:
    """Return NOT_FOUND for a task id in its text form."""
    return StatusError(
        grpc.StatusCode.NOT_FOUND, f"no task {id_}", (error_info("TASK_NOT_FOUND", {"id": id_}),)
    )


def idempotency_conflict(original: str) -> StatusError:
    """Return ALREADY_EXISTS: another request used this idempotency key and created the task `original`."""
    return StatusError(
        grpc.StatusCode.ALREADY_EXISTS,
        f"the idempotency key was used for another request, task {original}",
        (error_info("IDEMPOTENCY_KEY_REUSED", {"id": original}),),
    )


def being_sent(id_: str, retry_seconds: float = 1.0) -> StatusError:
    """Return UNAVAILABLE: a sender is handing the mail over, and its outcome is not known yet."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE,
        f"task {id_} is being sent; nothing was cancelled",
        (error_info("BEING_SENT", {"id": id_}), retry_info(retry_seconds)),
    )


def not_retryable(id_: str, status: str) -> StatusError:
    """Return FAILED_PRECONDITION for the Retry of a task that is completed or in progress."""
    reason = "ALREADY_SENT" if status == "completed" else "NOT_OVER"
    why = "its mail went out" if status == "completed" else "it has not ended, and continues by itself"
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"task {id_} is {status}: {why}; only failed, uncertain and cancelled ones are opened again",
        (error_info(reason, {"id": id_, "status": status}),),
    )


def not_uncertain(id_: str, status: str) -> StatusError:
    """Return FAILED_PRECONDITION for the Resolve of a task that is not uncertain."""
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"task {id_} is {status}; only uncertain ones are resolved",
        (error_info("NOT_UNCERTAIN", {"id": id_, "status": status}),),
    )


def body_purged(id_: str, status: str) -> StatusError:
    """Return FAILED_PRECONDITION: the body was deleted after POSTROAD_BODY_RETENTION."""
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"task {id_} cannot be sent again: its body is no longer kept",
        (error_info("BODY_PURGED", {"id": id_, "status": status}),),
    )


def overloaded(retry_seconds: float = 1.0) -> StatusError:
    """Return RESOURCE_EXHAUSTED: as many calls wait as may. The client retries after `retry_seconds`."""
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too many requests are waiting",
        (error_info("OVERLOADED"), retry_info(retry_seconds)),
    )


def database_unavailable(retry_seconds: float = 2.0) -> StatusError:
    """Return UNAVAILABLE: the database does not answer. The client retries after `retry_seconds`."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE,
        "the database does not answer",
        (error_info("DATABASE_UNAVAILABLE"), retry_info(retry_seconds)),
    )


def exceeds_max_allowed_packet() -> StatusError:
    """Return FAILED_PRECONDITION: the task fits into no statement until an operator raises the limit."""
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "the task does not fit into the database's max_allowed_packet, which an operator must raise",
        (error_info("MAX_ALLOWED_PACKET"),),
    )


def draining() -> StatusError:
    """Return UNAVAILABLE: this replica is shutting down. The client retries at another one."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, "shutting down", (error_info("DRAINING"), retry_info(1.0))
    )


def slow_request() -> StatusError:
    """Return DEADLINE_EXCEEDED: the client did not finish its request in time."""
    return StatusError(
        grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time", (error_info("SLOW_REQUEST"),)
    )


def no_request() -> StatusError:
    """Return INVALID_ARGUMENT: the client ended its side of the call without a request."""
    return invalid_field("request", "is missing")


def unauthenticated(reason: str, message: str) -> StatusError:
    """Return UNAUTHENTICATED: no valid token or certificate says for which tenant the call is."""
    return StatusError(grpc.StatusCode.UNAUTHENTICATED, message, (error_info(reason),))


def permission_denied(scope: str, what: str) -> StatusError:
    """Return PERMISSION_DENIED: the call's token does not have this scope, which `what` needs."""
    return StatusError(
        grpc.StatusCode.PERMISSION_DENIED,
        f"{what} needs a token with the scope {scope}",
        (error_info("SCOPE_MISSING", {"scope": scope}),),
    )


def too_many_failed_attempts(retry_seconds: float) -> StatusError:
    """Return RESOURCE_EXHAUSTED: the client's address has made too many calls that no token allows."""
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too many calls from this address had no valid token",
        (error_info("TOO_MANY_FAILED_ATTEMPTS"), retry_info(retry_seconds)),
    )


def internal_error() -> StatusError:
    """Return INTERNAL for a bug. The log has the cause; the client does not get it."""
    return StatusError(grpc.StatusCode.INTERNAL, "internal error", (error_info("INTERNAL"),))


def error_info(reason: str, metadata: Mapping[str, str] | None = None) -> error_details_pb2.ErrorInfo:
    """Return the detail that names the reason for programs."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    """Return the detail that tells a client when to retry."""
    delay = Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _truncate_message(message: str) -> str:
    """Return a status message that fits into the trailers as gRPC encodes it."""
    message = _truncate(message, _MAX_MESSAGE)
    while _encoded_size(message) > _MAX_MESSAGE_BYTES:
        message = message[:-2] + "…"
    return message


def _encoded_size(message: str) -> int:
    """Return the bytes of a message in the trailers, where gRPC percent-encodes all but printable ASCII."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message.encode())


def _truncate(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
