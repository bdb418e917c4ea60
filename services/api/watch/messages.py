"""The messages of a Watch stream, serialized.

Protobuf lets a message consist of several parts, so the api serializes the part that all watchers share once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from services.api import views
from services.common.fold import TaskRow
from services.common.timeline import TimelineRow

__all__ = ["WatchMessage", "change_body", "task_body", "token_part"]


class WatchMessage(NamedTuple):
    """A message for watchers.

    `body` is serialized and has no token. `positions_text` is the second part of the token: where a client
    resumes after this message. `event_id` names the change, and is empty for a message without one.
    """

    body: bytes
    positions_text: str
    event_id: str


def change_body(row: TaskRow, entry: TimelineRow) -> bytes:
    """Return the body of a message with a change and the task after it."""
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
    [change] = views.timeline([entry[2:]])
    return pb.WatchResponse(task=views.task(columns), change=change).SerializeToString()


def task_body(task: task_pb2.Task) -> bytes:
    """Return the body of a message with a task from the database."""
    return pb.WatchResponse(task=task).SerializeToString()


def token_part(token: str) -> bytes:
    """Return the part of a message that is its token. Alone it is a valid message too."""
    return pb.WatchResponse(resume_token=token).SerializeToString()
