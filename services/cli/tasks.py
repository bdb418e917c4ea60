"""Tasks as the commands show them: what a row holds, and the columns of their tables. Pure."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import task_pb2
from services.cli.output import Column
from services.cli.times import format_time, format_time_ms

__all__ = ["TASKS", "TIMELINE", "change_row", "full_row", "task_row"]

TASKS: Final = (
    Column("id"),
    Column("status", usual_width=10),
    Column("email", min_width=20, rank=1, usual_width=30),
    Column("reason", min_width=8, rank=2, usual_width=14),
    Column("attempts", "tries", rank=3, align_right=True),
    Column("created_at", "created", rank=4, format=format_time),
    Column("subject", min_width=10, rank=5),
)
TIMELINE: Final = (
    Column("at", format=format_time_ms),
    Column("stage"),
    Column("kind"),
    Column("attempt", "try", align_right=True),
    Column("reply", min_width=12, rank=1),
    Column("detail", min_width=12, rank=2),
    Column("relay", min_width=12, rank=3),
)


def task_row(task: task_pb2.Task) -> dict[str, Any]:
    """Return what every task has, by the names of the proto; times in ISO 8601, None where there is none."""
    return {
        "id": task.id,
        "email": task.email,
        "subject": task.subject,
        "status": task.status,
        "reason": task.reason,
        "reply": task.reply,
        "message_id": task.message_id,
        "attempts": task.attempts,
        "next_attempt_at": _time(task, "next_attempt_at"),
        "created_at": _time(task, "created_at"),
        "updated_at": _time(task, "updated_at"),
        "labels": dict(sorted(task.labels.items())),
    }


def full_row(task: task_pb2.Task) -> dict[str, Any]:
    """Return what Get tells of a task: its body and its timeline too."""
    more = {"body": task.body, "html": task.html, "timeline": [change_row(entry) for entry in task.timeline]}
    return task_row(task) | more


def change_row(entry: task_pb2.TimelineEntry) -> dict[str, Any]:
    """Return one entry of a timeline."""
    row: dict[str, Any] = {
        field.name: getattr(entry, field.name)
        for field in entry.DESCRIPTOR.fields
        if field.message_type is None
    }
    return {"at": _time(entry, "at")} | row | _further_times(entry)


def _further_times(entry: task_pb2.TimelineEntry) -> dict[str, Any]:
    names = (field.name for field in entry.DESCRIPTOR.fields if field.message_type is not None)
    return {name: _time(entry, name) for name in names if name != "at"}


def _time(message: Any, name: str) -> str | None:
    value: Timestamp = getattr(message, name)
    return value.ToJsonString() if message.HasField(name) else None
