"""What the api answers when it cannot do what was asked: gRPC status codes with google.rpc details.

The details ride in the trailing metadata `grpc-status-details-bin`, as google.rpc.Status does for
every client that knows the richer error model. All of a status, as it is encoded, stays below the 8 KiB
that clients take as metadata by default, so a refusal with many long names is cut, never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "DETAILS_KEY",
    "PATIENCE",
    "Problem",
    "Refused",
    "Violation",
    "being_sent",
    "body_purged",
    "collect",
    "conflict",
    "draining",
    "error_info",
    "internal",
    "invalid",
    "not_found",
    "not_open_to_retry",
    "overloaded",
    "retry_info",
    "too_long_for_database",
    "unauthenticated",
    "unavailable",
]

A = TypeVar("A")
R = TypeVar("R")

DETAILS_KEY = "grpc-status-details-bin"
PATIENCE = 4.5
"""Seconds that an RPC waits for the database before it answers UNAVAILABLE."""
DOMAIN = "postroad"
_MOST_VIOLATIONS = 50
# Of 8192 bytes 300 are for the entries' names and heads. The message stands there percent-encoded, and again
# in the details, which are in base64: 900 + 4/3 * (900 + 3900 + 200 for what frames the details).
_MOST_DETAIL_BYTES = 3900
_MOST_MESSAGE, _MOST_MESSAGE_BYTES = 300, 900


@dataclass(frozen=True, slots=True)
class Violation:
    """One refused field: its path in the request (`data.email`) and what is wrong with it."""

    field: str
    description: str


class Problem(Exception):
    """An answer other than OK: a status code, a line for people and details for programs."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = _fitting(message)
        self.details = tuple(details)

    def status(self) -> status_pb2.Status:
        """Return the google.rpc.Status of this problem."""
        packed = []
        for detail in self.details:
            holder = any_pb2.Any()
            holder.Pack(detail)
            packed.append(holder)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        """End the RPC with this problem."""
        trailers = ((DETAILS_KEY, self.status().SerializeToString()),)
        await context.abort(self.code, self.message, trailers)


class Refused(Problem):
    """INVALID_ARGUMENT, naming every refused field; the first 50 of them, or as many as fit."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        if not violations:
            raise ValueError("a refusal names at least one field")
        bad = error_details_pb2.BadRequest()
        size = 0
        for violation in violations[:_MOST_VIOLATIONS]:
            field, description = _cut(violation.field, 120), _cut(violation.description, 300)
            size += len(field.encode()) + len(description.encode()) + 8
            if size > _MOST_DETAIL_BYTES:
                break
            bad.field_violations.add(field=field, description=description)
        named = "; ".join(f"{v.field}: {v.description}" for v in violations[:3])
        more = f"; and {len(violations) - 3} more" if len(violations) > 3 else ""
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, named + more, (bad, error_info("INVALID_REQUEST")))
        self.violations = tuple(violations)


def collect(refused: list[Violation], check: Callable[[A], R], value: A) -> R | None:
    """Return what the check says of the value; where it refuses, add its violations and return None."""
    try:
        return check(value)
    except Refused as refusal:
        refused.extend(refusal.violations)
        return None


def invalid(field: str, description: str) -> Refused:
    """Return the refusal of one field."""
    return Refused((Violation(field, description),))


def not_found(id_: str) -> Problem:
    """Return NOT_FOUND for a task id in its text form."""
    return Problem(grpc.StatusCode.NOT_FOUND, f"no task {id_}", (error_info("TASK_NOT_FOUND", {"id": id_}),))


def conflict(original: str) -> Problem:
    """Return ALREADY_EXISTS: the idempotency key stands for another request, whose task is `original`."""
    return Problem(
        grpc.StatusCode.ALREADY_EXISTS,
        f"the idempotency key was used for another request, task {original}",
        (error_info("IDEMPOTENCY_KEY_REUSED", {"id": original}),),
    )


def being_sent(id_: str, retry_seconds: float = 1.0) -> Problem:
    """Return UNAVAILABLE: the mail is being handed over, and nobody knows yet whether it goes out."""
    return Problem(
        grpc.StatusCode.UNAVAILABLE,
        f"task {id_} is being sent; nothing was cancelled",
        (error_info("BEING_SENT", {"id": id_}), retry_info(retry_seconds)),
    )


def not_open_to_retry(id_: str, status: str) -> Problem:
    """Return FAILED_PRECONDITION: the task is completed or still under way."""
    reason = "ALREADY_SENT" if status == "completed" else "NOT_OVER"
    why = "its mail went out" if status == "completed" else "it has not ended, and goes on by itself"
    return Problem(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"task {id_} is {status}: {why}; only failed, uncertain and cancelled ones are opened again",
        (error_info(reason, {"id": id_, "status": status}),),
    )


def not_uncertain(id_: str, status: str) -> Problem:
    """Return FAILED_PRECONDITION: nobody has to find out what became of the task's mail."""
    return Problem(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"task {id_} is {status}; only uncertain ones are resolved",
        (error_info("NOT_UNCERTAIN", {"id": id_, "status": status}),),
    )


def body_purged(id_: str, status: str) -> Problem:
    """Return FAILED_PRECONDITION: the task's text is gone by POSTROAD_BODY_RETENTION."""
    return Problem(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"task {id_} cannot be sent again: its body is no longer kept",
        (error_info("BODY_PURGED", {"id": id_, "status": status}),),
    )


def overloaded(retry_seconds: float = 1.0) -> Problem:
    """Return RESOURCE_EXHAUSTED: more waits than the settings allow; come back after `retry_seconds`."""
    return Problem(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too many requests are waiting",
        (error_info("OVERLOADED"), retry_info(retry_seconds)),
    )


def unavailable(retry_seconds: float = 2.0) -> Problem:
    """Return UNAVAILABLE: the database does not answer; come back after `retry_seconds`."""
    return Problem(
        grpc.StatusCode.UNAVAILABLE,
        "the database does not answer",
        (error_info("DATABASE_UNAVAILABLE"), retry_info(retry_seconds)),
    )


def too_long_for_database() -> Problem:
    """Return FAILED_PRECONDITION: no statement holds the task until the database takes more."""
    return Problem(
        grpc.StatusCode.FAILED_PRECONDITION,
        "the task does not fit into the database's max_allowed_packet, which an operator must raise",
        (error_info("MAX_ALLOWED_PACKET"),),
    )


def draining() -> Problem:
    """Return UNAVAILABLE: this replica is about to end; another one, or its successor, will answer."""
    return Problem(grpc.StatusCode.UNAVAILABLE, "shutting down", (error_info("DRAINING"), retry_info(1.0)))


def unauthenticated() -> Problem:
    """Return UNAUTHENTICATED: no bearer token, or none that is known."""
    return Problem(
        grpc.StatusCode.UNAUTHENTICATED,
        "the metadata key authorization must be 'Bearer TOKEN', with a token that the api knows",
        (error_info("TOKEN_UNKNOWN"),),
    )


def internal() -> Problem:
    """Return INTERNAL for what should not happen; the log has the cause, the client does not."""
    return Problem(grpc.StatusCode.INTERNAL, "internal error", (error_info("INTERNAL"),))


def _fitting(message: str) -> str:
    """Return a status message, cut where it is too long as gRPC encodes it."""
    message = _cut(message, _MOST_MESSAGE)
    while _encoded(message) > _MOST_MESSAGE_BYTES:
        message = message[:-2] + "…"
    return message


def _encoded(message: str) -> int:
    """Return the bytes of a message in the trailers: percent-encoded but for printable ASCII."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message.encode())


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def error_info(reason: str, metadata: Mapping[str, str] | None = None) -> error_details_pb2.ErrorInfo:
    """Return the detail that tells programs why."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    """Return the detail that tells programs when to come back."""
    delay = Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)
