"""Builds a BatchCreate's response: one result an item. Pure."""

from __future__ import annotations

from google.protobuf.message import Message
from google.rpc import error_details_pb2

from postroad.v1 import events_pb2, task_pb2, task_service_pb2
from services.api.errors import StatusError, invalid_field
from services.api.views import fill_new_task

__all__ = ["MAX_ITEMS", "BatchResponse", "check_size"]

MAX_ITEMS = 1000
# Clients accept 4 MiB by default. Without labels and violations, 1,000 results stay below that.
_MAX_BYTES = 2 << 20


def check_size(count: int) -> None:
    """Raise InvalidArgument unless a batch may have `count` items."""
    if not 1 <= count <= MAX_ITEMS:
        raise invalid_field("requests", f"has 1 to {MAX_ITEMS} items, not {count}")


class BatchResponse:
    """A response that grows by one result after the other. `message` is the response so far."""

    def __init__(self) -> None:
        self.message = task_service_pb2.BatchCreateResponse()
        self._size = 0

    def add(self, outcome: events_pb2.TaskCreated | task_pb2.Task | StatusError) -> None:
        """Add the result of the request's next item. A task that was just recorded comes as its event.

        Once the results reach 2 MiB, further ones omit their labels and violations.
        """
        # The result is filled in its place: a message that is passed on is copied.
        result = self.message.results.add()
        if isinstance(outcome, StatusError):
            _fill_error(result.error, len(self.message.results) - 1, outcome)
        elif isinstance(outcome, task_pb2.Task):
            result.task.CopyFrom(outcome)
        else:
            fill_new_task(result.task, outcome)
        size = result.ByteSize()
        if self._size + size > _MAX_BYTES:
            if result.HasField("task"):
                result.task.ClearField("labels")
            else:
                result.error.ClearField("violations")
            size = result.ByteSize()
        self._size += size


def _fill_error(error: task_service_pb2.BatchCreateError, index: int, status: StatusError) -> None:
    error.index, error.code, error.message = index, status.code.value[0], status.message
    for detail in status.details:
        _add_detail(error, detail)


def _add_detail(error: task_service_pb2.BatchCreateError, detail: Message) -> None:
    match detail:
        case error_details_pb2.ErrorInfo():
            error.reason = detail.reason
            error.metadata.update(detail.metadata)
        case error_details_pb2.BadRequest():
            for violation in detail.field_violations:
                error.violations.add(field=violation.field, description=violation.description)
