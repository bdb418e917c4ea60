"""Builds a BatchCreate's response: one result an item. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message
from google.rpc import error_details_pb2

from postroad.v1 import task_pb2, task_service_pb2
from services.api.errors import StatusError, invalid_field

__all__ = ["MAX_ITEMS", "check_size", "response"]

MAX_ITEMS = 1000
# Clients accept 4 MiB by default. Without labels and violations, 1,000 results stay below that.
_MAX_BYTES = 2 << 20


def check_size(count: int) -> None:
    """Raise InvalidArgument unless a batch may have `count` items."""
    if not 1 <= count <= MAX_ITEMS:
        raise invalid_field("requests", f"has 1 to {MAX_ITEMS} items, not {count}")


def response(outcomes: Iterable[task_pb2.Task | StatusError]) -> task_service_pb2.BatchCreateResponse:
    """Return the response for these outcomes, in the order of the request's items.

    Once the results reach 2 MiB, further ones omit their labels and violations.
    """
    answer = task_service_pb2.BatchCreateResponse()
    size = 0
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, StatusError):
            result = task_service_pb2.BatchCreateResult(error=_item_error(index, outcome))
        else:
            result = task_service_pb2.BatchCreateResult(task=outcome)
        size += result.ByteSize()
        if size > _MAX_BYTES:
            size -= result.ByteSize()
            if result.HasField("task"):
                result.task.ClearField("labels")
            else:
                result.error.ClearField("violations")
            size += result.ByteSize()
        answer.results.append(result)
    return answer


def _item_error(index: int, status: StatusError) -> task_service_pb2.BatchCreateError:
    error = task_service_pb2.BatchCreateError(index=index, code=status.code.value[0], message=status.message)
    for detail in status.details:
        _add_detail(error, detail)
    return error


def _add_detail(error: task_service_pb2.BatchCreateError, detail: Message) -> None:
    match detail:
        case error_details_pb2.ErrorInfo():
            error.reason = detail.reason
            error.metadata.update(detail.metadata)
        case error_details_pb2.BadRequest():
            for violation in detail.field_violations:
                error.violations.add(field=violation.field, description=violation.description)
