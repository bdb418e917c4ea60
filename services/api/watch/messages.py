"""WatchResponses, serialized. A message's fields may come in several parts, so what all hear is made once."""

from __future__ import annotations

from typing import Any

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from services.api import views
from services.common.fold import TaskRow
from services.common.timeline import TimelineEntry

__all__ = ["body", "found", "token"]


def body(row: TaskRow, entry: TimelineEntry) -> bytes:
    """Return a message of a task after a change, without its token."""
    columns: tuple[Any, ...] = (
        row.id,
        row.recipient,
        row.subject,
        row.status,
        row.reason,
        row.reply,
        row.message_id,
        row.attempts,
        row.next_attempt_at,
        row.created_at,
        row.updated_at,
        row.labels,
    )
    [line] = views.timeline([entry[2:]])
    return pb.WatchResponse(task=views.task(columns), change=line).SerializeToString()


def found(task: task_pb2.Task) -> bytes:
    """Return a message of a task as it was found, without its token."""
    return pb.WatchResponse(task=task).SerializeToString()


def token(text: str) -> bytes:
    """Return the part of a message that is its token; alone it is a whole one too."""
    return pb.WatchResponse(resume_token=text).SerializeToString()
