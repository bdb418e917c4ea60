"""The queries of Get, List and Count.

Each List walks down an index that begins with the tenant, from the newest id to older ones. It walks once, or
once for each status.

Every statement names its index. For ORDER BY id with a small LIMIT the optimisers would often walk the
primary key instead, and discard most of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import uuid7, views
from services.api.filters import Filter
from services.common.database.bulk import placeholders
from services.common.statuses import STATUSES

__all__ = ["count", "count_statement", "get", "list_statement", "page", "tasks_of", "tenant_of"]

# Clients accept 4 MiB by default, so a page ends before it exceeds half of that.
_MAX_PAGE_BYTES = 2 << 20

_BY_STATUS = "tasks_by_status"
_COLUMNS = ", ".join(f"t.{name}" for name in views.COLUMNS.split(", "))

_TASK = f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s AND tenant = %s"
_TENANT = "SELECT tenant FROM tasks WHERE id = %s"
_TASKS = f"SELECT {views.COLUMNS} FROM tasks WHERE id IN "
_BODY = "SELECT body, html FROM task_bodies WHERE task_id = %s"
_EVENTS = f"SELECT {views.EVENT_COLUMNS}, {views.EVENT_ID} FROM task_events WHERE task_id = %s"

Statement: TypeAlias = tuple[str, tuple[Any, ...]]
"""SQL and its parameters."""
Condition: TypeAlias = tuple[str, Any]
"""A part of a WHERE clause and its parameter, a tuple where it takes several."""


def get(connection: Connection, tenant: str, id_: bytes) -> task_pb2.Task | None:
    """Return a task with its body and its timeline; None where this tenant has no such task. Blocks."""
    row = connection.exec_driver_sql(_TASK, (id_, tenant)).first()
    if row is None:
        return None
    task = views.task(row)
    bodies = connection.exec_driver_sql(_BODY, (id_,)).first()
    if bodies is not None:
        task.body, task.html = bodies[0] or "", bodies[1] or ""
    events = connection.exec_driver_sql(_EVENTS, (id_,)).all()
    task.timeline.extend(views.timeline(views.without_late_verdicts(events)))
    return task


def tenant_of(connection: Connection, id_: bytes) -> str | None:
    """Return the tenant of a task; None where there is no such task. Blocks."""
    row = connection.exec_driver_sql(_TENANT, (id_,)).first()
    return None if row is None else row[0]


def tasks_of(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, task_pb2.Task]:
    """Return the existing tasks among these ids. Blocks."""
    if not ids:
        return {}
    rows = connection.exec_driver_sql(f"{_TASKS} ({placeholders(len(ids))})", tuple(ids)).all()
    return {bytes(row[0]): views.task(row) for row in rows}


def page(
    connection: Connection, tenant: str, filter_: Filter, after: bytes | None, size: int
) -> tuple[list[task_pb2.Task], bytes | None]:
    """Return a page's tasks, newest first, and the last one's id where more tasks follow. Blocks.

    `after` is the last id of the previous page. A page of large tasks may hold fewer than `size`.
    """
    sql, parameters = list_statement(tenant, filter_, after, size + 1)
    rows = connection.exec_driver_sql(sql, parameters).all()
    tasks: list[task_pb2.Task] = []
    total = 0
    for row in rows[:size]:
        task = views.task(row)
        total += task.ByteSize()
        if tasks and total > _MAX_PAGE_BYTES:
            break
        tasks.append(task)
    return tasks, bytes(rows[len(tasks) - 1][0]) if len(tasks) < len(rows) else None


def list_statement(tenant: str, filter_: Filter, after: bytes | None, limit: int) -> Statement:
    """Return the statement of a List.

    A recipient or a domain selects its index. Otherwise the statement walks the tenant's tasks of each
    requested status, or of all, and merges these walks. It compares all other conditions row by row.
    """
    index, conditions = _conditions(tenant, filter_)
    if after is not None:
        conditions.append(("id < %s", after))
    if index is not None:
        return _walk(index, [*conditions, _any_of(filter_.status)] if filter_.status else conditions, limit)
    statuses = filter_.status or STATUSES
    if len(statuses) == 1:
        return _walk(_BY_STATUS, [("status = %s", statuses[0]), *conditions], limit)
    walks = [_walk(_BY_STATUS, [("status = %s", status), *conditions], limit, "id") for status in statuses]
    union = " UNION ALL ".join(f"({sql})" for sql, _ in walks)
    # Merging ids first and reading a page's rows afterwards is four times faster than merging whole rows.
    ids = f"({union} ORDER BY id DESC LIMIT {limit}) AS walked"
    sql = f"SELECT {_COLUMNS} FROM {ids} STRAIGHT_JOIN tasks AS t ON t.id = walked.id ORDER BY walked.id DESC"
    return sql, tuple(p for _, part in walks for p in part)


def count(connection: Connection, tenant: str, filter_: Filter) -> dict[str, int]:
    """Return the number of tasks of each requested status, or of each status without a request. Blocks."""
    sql, parameters = count_statement(tenant, filter_)
    counts = dict.fromkeys(filter_.status or STATUSES, 0)
    counts.update((status, number) for status, number in connection.exec_driver_sql(sql, parameters))
    return counts


def count_statement(tenant: str, filter_: Filter) -> Statement:
    """Return the statement of a Count.

    It counts statuses and times within an index. It compares a reason or labels row by row, among the tasks
    of the recipient, the domain, the requested statuses, or else the whole tenant.
    """
    index, conditions = _conditions(tenant, filter_)
    if index is None or filter_.status:
        conditions.append(_any_of(filter_.status or STATUSES))
    source = f"SELECT status, COUNT(*) FROM tasks FORCE INDEX ({index or _BY_STATUS})"
    where, parameters = _where(conditions)
    return f"{source} WHERE {where} GROUP BY status", parameters


def _conditions(tenant: str, filter_: Filter) -> tuple[str | None, list[Condition]]:
    """Return the index that a recipient or a domain selects, and all conditions except the status."""
    index = None
    conditions: list[Condition] = [("tenant = %s", tenant)]
    if filter_.domain is not None:
        conditions.append(("domain = %s", filter_.domain))
        index = "tasks_by_domain"
    if filter_.email is not None:
        conditions.append(("recipient = %s", filter_.email))
        index = "tasks_by_recipient"
    if filter_.reason is not None:
        conditions.append(("reason = %s", filter_.reason))
    for key, value in filter_.labels:
        # Encoded as fold.py encodes the column: to MariaDB an escape differs from its character.
        conditions.append(("JSON_CONTAINS(labels, %s)", json.dumps({key: value})))
    # Ids sort by creation time, so a range of times is a range of ids.
    if filter_.created_to is not None:
        conditions.append(("id < %s", uuid7.lowest(filter_.created_to)))
    if filter_.created_from is not None:
        conditions.append(("id >= %s", uuid7.lowest(filter_.created_from)))
    return index, conditions


def _any_of(statuses: Sequence[str]) -> Condition:
    return f"status IN ({placeholders(len(statuses))})", tuple(statuses)


def _walk(index: str, conditions: Sequence[Condition], limit: int, columns: str = views.COLUMNS) -> Statement:
    where, parameters = _where(conditions)
    source = f"SELECT {columns} FROM tasks FORCE INDEX ({index})"
    return f"{source} WHERE {where} ORDER BY id DESC LIMIT {limit}", parameters


def _where(conditions: Sequence[Condition]) -> Statement:
    parameters: list[Any] = []
    for _, value in conditions:
        parameters.extend(value if isinstance(value, tuple) else (value,))
    return " AND ".join(sql for sql, _ in conditions), tuple(parameters)
