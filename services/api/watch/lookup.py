"""Queries for tasks whose first events were not read, and for one task that is watched. They block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import views
from services.api.watch.changes import Change
from services.api.watch.reorder_buffer import MailColumns
from services.common.database.bulk import placeholders
from services.common.events import CREATED_KEY

__all__ = ["KnownTasks", "look_up", "snapshot"]

_MAILS = (
    "SELECT id, tenant, NULL, NULL, recipient, domain, subject, labels, created_at FROM tasks"
    " WHERE created_at IS NOT NULL AND id IN "
)
# One statement, so that the row and its events are consistent.
_SNAPSHOT = (
    f"SELECT event_id, {', '.join(f'tasks.{name}' for name in views.COLUMNS.split(', '))} FROM tasks"
    " LEFT JOIN task_events ON task_id = id WHERE id = %s AND tenant = %s"
)
_EVENT_TIMES = "SELECT task_id, event_id, at FROM task_events WHERE task_id IN "
_CHUNK = 200


class KnownTasks(NamedTuple):
    """What the database knows of some changes' tasks.

    `mails` has the mail of each task by its id. `duplicates` are the changes (task id, event id) that
    watchers have certainly received before.
    """

    mails: dict[bytes, MailColumns]
    duplicates: set[tuple[bytes, str]]


def look_up(connection: Connection, changes: Sequence[Change]) -> KnownTasks:
    """Return what the database knows of the tasks of these changes."""
    found = KnownTasks({}, set())
    for start in range(0, len(changes), _CHUNK):
        chunk = changes[start : start + _CHUNK]
        ids = sorted({change.row.id for change in chunk})
        rows = connection.exec_driver_sql(f"{_MAILS}({placeholders(len(ids))})", tuple(ids))
        found.mails.update((bytes(row[0]), cast(MailColumns, tuple(row[1:]))) for row in rows)
        event_ids = sorted({change.entry.event_id for change in chunk})
        sql = f"{_EVENT_TIMES}({placeholders(len(ids))}) AND event_id IN ({placeholders(len(event_ids))})"
        entries = connection.exec_driver_sql(sql, (*ids, *event_ids))
        times = {(bytes(id_), event_id): at for id_, event_id, at in entries}
        for change in chunk:
            at = times.get((change.row.id, change.entry.event_id))
            # The timeline keeps the first copy of an event.
            if at is not None and (change.replayed or at != change.entry.at):
                found.duplicates.add((change.row.id, change.entry.event_id))
    return found


def snapshot(connection: Connection, tenant: str, id_: bytes) -> tuple[task_pb2.Task, set[str]] | None:
    """Return a task and the ids of the events that it contains; None where this tenant has no such task."""
    rows = connection.exec_driver_sql(_SNAPSHOT, (id_, tenant)).all()
    if not rows:
        return None
    # The api records a task before the status service folds its first event.
    return views.task(rows[0][1:]), {CREATED_KEY, *(row[0] for row in rows if row[0])}
