"""Builds the Task of the protos from a row, or from the event of a new task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import events_pb2, task_pb2
from services.api.uuid7 import text

__all__ = [
    "COLUMNS",
    "EVENT_COLUMNS",
    "EVENT_ID",
    "fill_new_task",
    "new_task",
    "task",
    "timeline",
    "without_late_verdicts",
]

COLUMNS = (
    "id, recipient, subject, status, reason, reply, message_id, attempts, next_attempt_at, created_at,"
    " updated_at, labels"
)
"""The columns of `tasks` that `task` takes, in its order."""
EVENT_COLUMNS = "at, stage, kind, attempt, relay, reply, detail, next_attempt_at"
"""The columns of `task_events` that `timeline` takes, in its order."""
EVENT_ID = "event_id"
"""The column that `without_late_verdicts` takes after those."""

# Orders the events of one microsecond.
_ORDER = ("created", "retried", "mx_ok", "mx_failed", "in_doubt", "deferred", "sent", "failed", "cancelled")
_RANK = {kind: rank for rank, kind in enumerate(_ORDER)}


def task(row: Sequence[Any]) -> task_pb2.Task:
    """Return the task of a row of COLUMNS. Its body and its timeline are empty; only Get adds them."""
    id_, email, subject, status, reason, reply, message_id, attempts, next_at, created, updated, labels = row
    view = task_pb2.Task(
        id=text(id_),
        email=email,
        subject=subject,
        status=status,
        reason=reason,
        reply=reply,
        message_id=message_id,
        attempts=attempts,
        labels=json.loads(labels) if labels else None,
    )
    for field, moment in ((view.created_at, created), (view.updated_at, updated)):
        field.FromDatetime(moment)
    if next_at is not None:
        view.next_attempt_at.FromDatetime(next_at)
    return view


def new_task(event: events_pb2.TaskCreated) -> task_pb2.Task:
    """Return a task that was just recorded, equal to what `task` returns for its row."""
    view = task_pb2.Task()
    fill_new_task(view, event)
    return view


def fill_new_task(view: task_pb2.Task, event: events_pb2.TaskCreated) -> None:
    """Fill an empty task as `new_task` does, in its place within a larger message."""
    mail = event.task
    view.id, view.email, view.subject, view.status = text(mail.id), mail.email, mail.subject, "pending"
    if labels := mail.labels:
        view.labels.update(labels)
    _set(view.created_at, mail.created_at_us)
    _set(view.updated_at, event.at_us)
    if send_at_us := event.send_at_us:
        _set(view.next_attempt_at, send_at_us)


def _set(field: Timestamp, us: int) -> None:
    field.seconds, rest = divmod(us, 1_000_000)
    field.nanos = rest * 1000


def timeline(rows: Sequence[Sequence[Any]]) -> list[task_pb2.TimelineEntry]:
    """Return the timeline of rows of EVENT_COLUMNS, oldest first."""
    entries = []
    for at, stage, kind, attempt, relay, reply, detail, next_at, *_ in sorted(rows, key=_order):
        entry = task_pb2.TimelineEntry(
            stage=stage, kind=kind, attempt=attempt, relay=relay, reply=reply, detail=detail
        )
        entry.at.FromDatetime(at.replace(tzinfo=UTC))
        if next_at is not None:
            entry.next_attempt_at.FromDatetime(next_at)
        entries.append(entry)
    return entries


def without_late_verdicts(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return rows of EVENT_COLUMNS and EVENT_ID without the verdicts on epochs that had ended.

    The validator produces such a verdict when a task is cancelled or opened again while it looks up the
    domain. It also does so later, because the topics keep each task's first event. The verdict has no effect.
    """
    kept = []
    latest_epoch = 0
    for row in sorted(rows, key=_order):
        epoch = int(row[8].split(":")[1])
        if row[2] in ("cancelled", "retried"):
            latest_epoch = max(latest_epoch, epoch)
        if row[1] != "validator" or epoch >= latest_epoch:
            kept.append(row)
    return kept


def _order(row: Sequence[Any]) -> tuple[datetime, int, int]:
    return row[0], row[3], _RANK.get(row[2], len(_RANK))
