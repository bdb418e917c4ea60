"""What Get, List and Count read. Every List walks down an index that begins with the tenant, from the newest
id to older ones; down one walk, or one a status.

The index is named in the statement: asked for ORDER BY id and a small LIMIT, the optimisers here
would often rather walk the primary key and drop most of what they see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import uuid7, views
from services.api.filters import Filter
from services.common.database.bulk import placeholders
from services.common.database.tables import STATUSES

__all__ = ["count", "count_statement", "get", "page", "statement", "tasks_of"]

# A page ends early rather than pass this, so that it stays below the 4 MiB that clients take by default.
_MOST_PAGE_BYTES = 2 << 20

_BY_STATUS = "tasks_by_status"
_COLUMNS = ", ".join(f"t.{name}" for name in views.COLUMNS.split(", "))

_TASK = f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s AND tenant = %s"
_TASKS = f"SELECT {views.COLUMNS} FROM tasks WHERE id IN "
_BODY = "SELECT body, html FROM task_bodies WHERE task_id = %s"
_EVENTS = f"SELECT {views.EVENT_COLUMNS}, {views.EVENT_ID} FROM task_events WHERE task_id = %s"


def get(connection: Connection, tenant: str, id_: bytes) -> task_pb2.Task | None:
    """Return one task with its body and its timeline, None where this tenant has no such task; blocks."""
    row = connection.exec_driver_sql(_TASK, (id_, tenant)).first()
    if row is None:
        return None
    view = views.task(row)
    bodies = connection.exec_driver_sql(_BODY, (id_,)).first()
    if bodies is not None:
        view.body, view.html = bodies[0] or "", bodies[1] or ""
    rows = connection.exec_driver_sql(_EVENTS, (id_,)).all()
    view.timeline.extend(views.timeline(views.without_late_verdicts(rows)))
    return view


def tasks_of(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, task_pb2.Task]:
    """Return the tasks with these ids that there are; blocks."""
    if not ids:
        return {}
    rows = connection.exec_driver_sql(f"{_TASKS} ({placeholders(len(ids))})", tuple(ids)).all()
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

    A recipient or a domain picks its index, else the tenant's statuses are walked: those asked for, or all;
    what is asked beyond that is compared row by row. Several statuses are one walk each, merged.
    """
    index, fixed = _conditions(tenant, asked)
    if after is not None:
        fixed.append(("id < %s", after))
    if index is not None:
        return _walk(index, [*fixed, _any_of(asked.status)] if asked.status else fixed, limit)
    statuses = asked.status or STATUSES
    if len(statuses) == 1:
        return _walk(_BY_STATUS, [("status = %s", statuses[0]), *fixed], limit)
    walks = [_walk(_BY_STATUS, [("status = %s", status), *fixed], limit, "id") for status in statuses]
    union = " UNION ALL ".join(f"({sql})" for sql, _ in walks)
    # The ids alone are merged, and a page's rows read then: whole, they took four times as long.
    ids = f"({union} ORDER BY id DESC LIMIT {limit}) AS walked"
    sql = f"SELECT {_COLUMNS} FROM {ids} STRAIGHT_JOIN tasks AS t ON t.id = walked.id ORDER BY walked.id DESC"
    return sql, tuple(p for _, part in walks for p in part)


def count(connection: Connection, tenant: str, asked: Filter) -> dict[str, int]:
    """Return how many tasks there are of each status asked for, of every one where none is; blocks."""
    sql, parameters = count_statement(tenant, asked)
    counts = dict.fromkeys(asked.status or STATUSES, 0)
    counts.update((status, number) for status, number in connection.exec_driver_sql(sql, parameters))
    return counts


def count_statement(tenant: str, asked: Filter) -> tuple[str, tuple[Any, ...]]:
    """Return a Count's SQL and its parameters.

    Statuses and times are counted within their index. A reason or labels are compared row by row: those of
    a recipient, of a domain or of the statuses asked for, else all of the tenant's.
    """
    index, conditions = _conditions(tenant, asked)
    if index is None or asked.status:
        conditions.append(_any_of(asked.status or STATUSES))
    source = f"SELECT status, COUNT(*) FROM tasks FORCE INDEX ({index or _BY_STATUS})"
    where, parameters = _where(conditions)
    return f"{source} WHERE {where} GROUP BY status", parameters


def _conditions(tenant: str, asked: Filter) -> tuple[str | None, list[tuple[str, Any]]]:
    """Return what is asked for but the status, and the index that a recipient or a domain picks."""
    index = None
    fixed: list[tuple[str, Any]] = [("tenant = %s", tenant)]
    if asked.domain is not None:
        fixed.append(("domain = %s", asked.domain))
        index = "tasks_by_domain"
    if asked.email is not None:
        fixed.append(("recipient = %s", asked.email))
        index = "tasks_by_recipient"
    if asked.reason is not None:
        fixed.append(("reason = %s", asked.reason))
    for key, value in asked.labels:
        # Written as the column is (fold.py): MariaDB compares an escape and its character as different.
        fixed.append(("JSON_CONTAINS(labels, %s)", json.dumps({key: value})))
    # Ids are in the order of their creation times, so times are bounds of the same walk.
    if asked.created_to is not None:
        fixed.append(("id < %s", uuid7.lowest(asked.created_to)))
    if asked.created_from is not None:
        fixed.append(("id >= %s", uuid7.lowest(asked.created_from)))
    return index, fixed


def _any_of(statuses: Sequence[str]) -> tuple[str, Any]:
    return f"status IN ({placeholders(len(statuses))})", tuple(statuses)


def _walk(
    index: str, conditions: Sequence[tuple[str, Any]], limit: int, columns: str = views.COLUMNS
) -> tuple[str, tuple[Any, ...]]:
    where, parameters = _where(conditions)
    source = f"SELECT {columns} FROM tasks FORCE INDEX ({index})"
    return f"{source} WHERE {where} ORDER BY id DESC LIMIT {limit}", parameters


def _where(conditions: Sequence[tuple[str, Any]]) -> tuple[str, tuple[Any, ...]]:
    parameters: list[Any] = []
    for _, value in conditions:
        parameters.extend(value if isinstance(value, tuple) else (value,))
    return " AND ".join(sql for sql, _ in conditions), tuple(parameters)
