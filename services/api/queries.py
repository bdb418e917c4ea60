"""What Get and List read. Every List is a walk down one index, from the newest id to older ones.

The index is named in the statement: asked for ORDER BY id and a small LIMIT, the optimisers here
would often rather walk the primary key and drop most of what they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import uuid7, views
from services.api.filters import Filter
from services.common.database import marks

__all__ = ["get", "page", "statement", "tasks_of"]

# A page ends early rather than pass this, so that it stays below the 4 MiB that clients take by default.
_MOST_PAGE_BYTES = 2 << 20

_TASK = f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s AND tenant = %s"
_TASKS = f"SELECT {views.COLUMNS} FROM tasks WHERE id IN "
_BODY = "SELECT body, html FROM task_bodies WHERE task_id = %s"
_EVENTS = f"SELECT {views.EVENT_COLUMNS} FROM task_events WHERE task_id = %s"


def get(connection: Connection, tenant: str, id_: bytes) -> task_pb2.Task | None:
    """Return one task with its body and its timeline, None where this tenant has no such task; blocks."""
    row = connection.exec_driver_sql(_TASK, (id_, tenant)).first()
    if row is None:
        return None
    view = views.task(row)
    bodies = connection.exec_driver_sql(_BODY, (id_,)).first()
    if bodies is not None:
        view.body, view.html = bodies[0] or "", bodies[1] or ""
    view.timeline.extend(views.timeline(connection.exec_driver_sql(_EVENTS, (id_,)).all()))
    return view


def tasks_of(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, task_pb2.Task]:
    """Return the tasks with these ids that there are; blocks."""
    if not ids:
        return {}
    rows = connection.exec_driver_sql(f"{_TASKS} ({marks(len(ids))})", tuple(ids)).all()
    return {bytes(row[0]): views.task(row) for row in rows}


def page(
    connection: Connection, tenant: str, asked: Filter, after: bytes | None, size: int
) -> tuple[list[task_pb2.Task], bytes | None]:
    """Return a page's tasks, newest first, and the last one's id where more follow; blocks.

    `after` is the id that the page before ended with. A page of large tasks may hold fewer than `size`.
    """
    sql, parameters = statement(tenant, asked, after, size + 1)
    rows = connection.exec_driver_sql(sql, parameters).all()
    tasks: list[task_pb2.Task] = []
    total = 0
    for row in rows[:size]:
        view = views.task(row)
        total += view.ByteSize()
        if tasks and total > _MOST_PAGE_BYTES:
            break
        tasks.append(view)
    return tasks, bytes(rows[len(tasks) - 1][0]) if len(tasks) < len(rows) else None


def statement(tenant: str, asked: Filter, after: bytes | None, limit: int) -> tuple[str, tuple[Any, ...]]:
    """Return a List's SQL and its parameters.

    A recipient or a domain picks its index, else a status, else the primary key; what is asked beyond
    that is compared row by row. Several statuses are one walk each, merged.
    """
    fixed: list[tuple[str, Any]] = [("tenant = %s", tenant)]
    index = "PRIMARY"
    if asked.domain is not None:
        fixed.append(("domain = %s", asked.domain))
        index = "tasks_by_domain"
    if asked.email is not None:
        fixed.append(("recipient = %s", asked.email))
        index = "tasks_by_recipient"
    if asked.reason is not None:
        fixed.append(("reason = %s", asked.reason))
    for key, value in asked.labels:
        fixed.append(("JSON_CONTAINS(labels, JSON_OBJECT(%s, %s))", (key, value)))
    # Ids are in the order of their creation times, so times are bounds of the same walk.
    upper = [bound for bound in (after, _id_at(asked.created_to)) if bound is not None]
    if upper:
        fixed.append(("id < %s", min(upper)))
    if asked.created_from is not None:
        fixed.append(("id >= %s", _id_at(asked.created_from)))
    if not asked.status:
        return _walk(index, fixed, limit)
    if index != "PRIMARY":
        return _walk(index, [*fixed, (f"status IN ({marks(len(asked.status))})", asked.status)], limit)
    walks = [_walk("tasks_by_status", [("status = %s", status), *fixed], limit) for status in asked.status]
    if len(walks) == 1:
        return walks[0]
    union = " UNION ALL ".join(f"({sql})" for sql, _ in walks)
    return f"{union} ORDER BY id DESC LIMIT {limit}", tuple(p for _, part in walks for p in part)


def _walk(index: str, conditions: Sequence[tuple[str, Any]], limit: int) -> tuple[str, tuple[Any, ...]]:
    where = " AND ".join(sql for sql, _ in conditions)
    parameters: list[Any] = []
    for _, value in conditions:
        parameters.extend(value if isinstance(value, tuple) else (value,))
    source = f"SELECT {views.COLUMNS} FROM tasks FORCE INDEX ({index})"
    return f"{source} WHERE {where} ORDER BY id DESC LIMIT {limit}", tuple(parameters)


def _id_at(us: int | None) -> bytes | None:
    return None if us is None else uuid7.lowest(us)
