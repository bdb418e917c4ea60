"""What the database knows of tasks whose first events were not read, and of one that is watched. Blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import views
from services.api.watch.book import Mail
from services.api.watch.changes import Change
from services.common.database.bulk import placeholders
from services.common.events import CREATED_KEY

__all__ = ["Known", "known", "snapshot"]

_MAILS = (
    "SELECT id, tenant, NULL, NULL, recipient, domain, subject, labels, created_at FROM tasks"
    " WHERE created_at IS NOT NULL AND id IN "
)
# One statement, so that the row and its lines are of one moment.
_SNAPSHOT = (
    f"SELECT event_id, {', '.join(f'tasks.{name}' for name in views.COLUMNS.split(', '))} FROM tasks"
    " LEFT JOIN task_events ON task_id = id WHERE id = %s AND tenant = %s"
)
_LINES = "SELECT task_id, event_id, at FROM task_events WHERE task_id IN "
_PART = 200


class Known(NamedTuple):
    """The mails of tasks by id, and which changes (task id, event key) have surely been told before."""

    mails: dict[bytes, Mail]
    repeats: set[tuple[bytes, str]]


def known(connection: Connection, strangers: Sequence[Change]) -> Known:
    """Return what there is to know of these changes' tasks."""
    found = Known({}, set())
    for start in range(0, len(strangers), _PART):
        part = strangers[start : start + _PART]
        ids = sorted({change.row.id for change in part})
        rows = connection.exec_driver_sql(f"{_MAILS}({placeholders(len(ids))})", tuple(ids))
        found.mails.update((bytes(row[0]), cast(Mail, tuple(row[1:]))) for row in rows)
        keys = sorted({change.entry.event_id for change in part})
        sql = f"{_LINES}({placeholders(len(ids))}) AND event_id IN ({placeholders(len(keys))})"
        lines = connection.exec_driver_sql(sql, (*ids, *keys))
        times = {(bytes(id_), key): at for id_, key, at in lines}
        for change in part:
            at = times.get((change.row.id, change.entry.event_id))
            # The first of an event's copies stays in the timeline.
            if at is not None and (change.replayed or at != change.entry.at):
                found.repeats.add((change.row.id, change.entry.event_id))
    return found


def snapshot(connection: Connection, tenant: str, id_: bytes) -> tuple[task_pb2.Task, set[str]] | None:
    """Return a task and the keys of what that tells of it; None where this tenant has no such task."""
    rows = connection.exec_driver_sql(_SNAPSHOT, (id_, tenant)).all()
    if not rows:
        return None
    # The api records a task before its first event is folded.
    return views.task(rows[0][1:]), {CREATED_KEY, *(row[0] for row in rows if row[0])}
