"""What BatchCreate asks and answers: each item by itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message
from google.rpc import error_details_pb2

from postroad.v1 import task_pb2, task_service_pb2
from services.api.errors import Problem, invalid

__all__ = ["MAX_ITEMS", "check_size", "response"]

MAX_ITEMS = 1000
# Without what may be left out, 1,000 results stay below the 4 MiB that clients take by default.
_MOST_BYTES = 2 << 20


def check_size(count: int) -> None:
    """Raise Refused unless a batch may have so many items."""
    if not 1 <= count <= MAX_ITEMS:
        raise invalid("requests", f"has 1 to {MAX_ITEMS} items, not {count}")


def response(outcomes: Iterable[task_pb2.Task | Problem]) -> task_service_pb2.BatchCreateResponse:
    """Return a batch's answer; labels and violations that would take it past 2 MiB are left out."""
    answer = task_service_pb2.BatchCreateResponse()
    size = 0
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, Problem):
            result = task_service_pb2.BatchCreateResult(error=_error(index, outcome))
        else:
            result = task_service_pb2.BatchCreateResult(task=outcome)
        size += result.ByteSize()
        if size > _MOST_BYTES:
            size -= result.ByteSize()
            if result.HasField("task"):
                result.task.ClearField("labels")
            else:
                result.error.ClearField("violations")
            size += result.ByteSize()
        answer.results.append(result)
    return answer


def _error(index: int, problem: Problem) -> task_service_pb2.BatchCreateError:
    error = task_service_pb2.BatchCreateError(
        index=index, code=problem.code.value[0], message=problem.message
    )
    for detail in problem.details:
        _tell(error, detail)
    return error


def _tell(error: task_service_pb2.BatchCreateError, detail: Message) -> None:
    match detail:
        case error_details_pb2.ErrorInfo():
            error.reason = detail.reason
            error.metadata.update(detail.metadata)
        case error_details_pb2.BadRequest():
            for violation in detail.field_violations:
                error.violations.add(field=violation.field, description=violation.description)
