"""The statements on the task tables, to record, fold, publish and rebuild tasks.

All functions run in the caller's transaction, and block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import NamedTuple, cast

from sqlalchemy import Connection, delete, select

from postroad.v1 import events_pb2 as pb
from services.common.database import tables
from services.common.database.bulk import execute_rows, placeholders
from services.common.database.times import FROM_MICROS, to_micros
from services.common.events import CREATED_KEY, Event
from services.common.fold import EPOCH_SHIFT, TaskRow, merge
from services.common.statuses import FINAL_STATUSES
from services.common.timeline import TimelineRow, timeline_values

__all__ = [
    "Body",
    "body_of",
    "insert_bodies",
    "insert_events",
    "insert_timeline",
    "load_epoch",
    "load_events",
    "load_tasks",
    "owners_of_keys",
    "purge_bodies",
    "send_times",
    "sizes_of_bodies",
    "upsert",
]

_MAIL = TaskRow._fields[1:8]
_INSERT_ENTRIES = f"INSERT IGNORE INTO {{}} ({', '.join(TimelineRow._fields)}) VALUES"
_ENTRY = f"(%s,%s,{FROM_MICROS},%s,%s,%s,%s,%s,%s,{FROM_MICROS})"
_PLAIN = ("status", "epoch", "next_attempt_at", "reason", "reply", "message_id", "updated_at")


class Body(NamedTuple):
    """A row of `task_bodies`, in the order of its columns."""

    task_id: bytes
    body: str | None
    html: str | None
    headers: str | None


def _upsert_tail() -> str:
    # Assignments take effect from left to right, so the columns of the conditions come last: created_at,
    # which says that the mail is known, and version. If the existing row is another task's with the same
    # idempotency key, VALUES(id) differs from id, and the row stays as it is.
    newer = "VALUES(version) > version AND VALUES(id) = id"
    same = f"VALUES(version) >> {EPOCH_SHIFT} = version >> {EPOCH_SHIFT} AND VALUES(id) = id"
    attempts = "IF({0}, GREATEST(VALUES(attempts), attempts), IF({1}, VALUES(attempts), attempts))"
    return "ON DUPLICATE KEY UPDATE " + ", ".join(
        [
            *(f"{name} = IF(created_at IS NULL, VALUES({name}), {name})" for name in _MAIL),
            "created_at = IF(created_at IS NULL, VALUES(created_at), created_at)",
            f"attempts = {attempts.format(same, newer)}",
            *(f"{name} = IF({newer}, VALUES({name}), {name})" for name in _PLAIN),
            f"version = IF({newer}, VALUES(version), version)",
        ]
    )


_UPSERT_TAIL = _upsert_tail()


def upsert(connection: Connection, rows: Iterable[TaskRow], table: str = "tasks") -> None:
    """Merge `rows` into the table, as `fold.merge` does; a task may have several rows.

    A row is not stored if another task has its idempotency key. The rows are locked in the order of their
    ids, so that two upserts of the same rows seldom deadlock.
    """
    merged: dict[bytes, TaskRow] = {}
    for row in rows:
        known = merged.get(row.id)
        merged[row.id] = row if known is None else merge(known, row)
    head = f"INSERT INTO {table} ({', '.join(TaskRow._fields)}) VALUES"
    execute_rows(connection, head, [merged[id_] for id_ in sorted(merged)], _UPSERT_TAIL)


def body_of(task: pb.MailTask) -> Body:
    """Return the task's row of `task_bodies`."""
    return Body(
        task.id,
        task.body if task.HasField("body") else None,
        task.html if task.HasField("html") else None,
        json.dumps(dict(task.headers)) if task.headers else None,
    )


def insert_bodies(connection: Connection, bodies: Iterable[Body], table: str = "task_bodies") -> None:
    """Insert bodies; an existing one stays."""
    head = f"INSERT IGNORE INTO {table} ({', '.join(Body._fields)}) VALUES"
    for part in _parts(bodies):
        execute_rows(connection, head, part)


def _parts(bodies: Iterable[Body]) -> Iterator[list[Body]]:
    # Few bodies a statement, so that none is too long: a million characters have at most 4 MB.
    part: list[Body] = []
    characters = 0
    for body in bodies:
        size = len(body.body or "") + len(body.html or "") + len(body.headers or "")
        if part and characters + size > 1_000_000:
            yield part
            part, characters = [], 0
        part.append(body)
        characters += size
    if part:
        yield part


def insert_events(connection: Connection, entries: Iterable[TimelineRow], table: str = "task_events") -> None:
    """Insert entries of timelines; existing ones stay."""
    head = _INSERT_ENTRIES.format(table)
    ordered = sorted(entries, key=itemgetter(0, 1))
    execute_rows(connection, head, ordered)


def insert_timeline(connection: Connection, events: Iterable[Event]) -> None:
    """Insert the events' entries of their timelines; existing ones stay."""
    ordered = sorted(map(timeline_values, events), key=itemgetter(0, 1))
    execute_rows(connection, _INSERT_ENTRIES.format("task_events"), ordered, row=_ENTRY)


def owners_of_keys(
    connection: Connection, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], tuple[bytes, bytes]]:
    """Return the id and the request hash of the task with each (tenant, idempotency key), if any.

    Under READ COMMITTED it sees what others have committed by now, so it may follow an upsert.
    """
    by_tenant: dict[str, list[bytes]] = {}
    for tenant, key in keys:
        by_tenant.setdefault(tenant, []).append(key.encode())
    owners = {}
    for tenant, of_tenant in by_tenant.items():
        for start in range(0, len(of_tenant), 500):
            part = of_tenant[start : start + 500]
            # Without the hint, or with many pairs, an optimiser would read the whole table.
            found = connection.exec_driver_sql(
                "SELECT idempotency_key, id, request_hash FROM tasks FORCE INDEX (tasks_by_key)"
                f" WHERE tenant = %s AND idempotency_key IN ({placeholders(len(part))})",
                (tenant, *part),
            )
            for key, id_, hash_ in found:
                owners[tenant, bytes(key).decode()] = bytes(id_), bytes(hash_ or b"")
    return owners


def load_tasks(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, pb.MailTask]:
    """Return the mail tasks as they were recorded, by id; without text and HTML if those are purged.

    Unknown tasks, and those known from later events only, are left out. Ask for few at a time: a task may
    have megabytes.
    """
    if not ids:
        return {}
    found = connection.exec_driver_sql(
        "SELECT id, tenant, idempotency_key, request_hash, recipient, domain, subject, labels, created_at,"
        " body, html, headers FROM tasks LEFT JOIN task_bodies ON task_id = id"
        f" WHERE id IN ({placeholders(len(ids))}) AND created_at IS NOT NULL",
        tuple(ids),
    )
    tasks = {}
    for id_, tenant, key, hash_, recipient, domain, subject, labels, created_at, body, html, headers in found:
        tasks[bytes(id_)] = pb.MailTask(
            id=bytes(id_),
            tenant=tenant,
            idempotency_key=bytes(key).decode() if key is not None else "",
            request_hash=bytes(hash_) if hash_ is not None else b"",
            email=recipient,
            domain=domain,
            subject=subject,
            body=body,
            html=html,
            headers=_object(headers),
            labels=_object(labels),
            created_at_us=to_micros(created_at),
        )
    return tasks


def send_times(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, int]:
    """Return the time of each scheduled task (`TaskCreated.send_at_us`), by id. The timeline keeps it."""
    if not ids:
        return {}
    found = connection.exec_driver_sql(
        f"SELECT task_id, next_attempt_at FROM task_events WHERE task_id IN ({placeholders(len(ids))})"
        " AND event_id = %s AND next_attempt_at IS NOT NULL",
        (*ids, CREATED_KEY),
    )
    return {bytes(id_): to_micros(at) for id_, at in found}


def sizes_of_bodies(connection: Connection, ids: Sequence[bytes]) -> dict[bytes, int]:
    """Return the bytes of text, HTML and headers of each task with a body, by id."""
    if not ids:
        return {}
    parts = [f"COALESCE(OCTET_LENGTH({column}), 0)" for column in ("body", "html", "headers")]
    found = connection.exec_driver_sql(
        f"SELECT task_id, {' + '.join(parts)} FROM task_bodies WHERE task_id IN ({placeholders(len(ids))})",
        tuple(ids),
    )
    return {bytes(id_): int(size) for id_, size in found}


def load_events(
    connection: Connection, keys: Sequence[tuple[bytes, str]]
) -> dict[tuple[bytes, str], TimelineRow]:
    """Return the timeline entries with these (task id, event id), as far as they exist."""
    by_event: dict[str, list[bytes]] = {}
    for id_, event_id in sorted(keys):
        by_event.setdefault(event_id, []).append(id_)
    entries = {}
    for event_id, ids in by_event.items():
        found = connection.exec_driver_sql(
            f"SELECT {', '.join(TimelineRow._fields)} FROM task_events"
            f" WHERE task_id IN ({placeholders(len(ids))}) AND event_id = %s",
            (*ids, event_id),
        )
        entries.update({(bytes(id_), event_id): TimelineRow(bytes(id_), *columns) for id_, *columns in found})
    return entries


def load_epoch(
    connection: Connection, task_id: bytes, topics: Sequence[str], epoch: int
) -> list[TimelineRow]:
    """Return the entries of a task's timeline for events of these topics in this epoch."""
    like = " OR ".join(["event_id LIKE %s"] * len(topics))
    found = connection.exec_driver_sql(
        f"SELECT {', '.join(TimelineRow._fields)} FROM task_events"
        f" WHERE task_id = %s AND ({like}) ORDER BY event_id",
        (task_id, *(f"{topic}:{epoch}:%" for topic in topics)),
    )
    return [TimelineRow(bytes(id_), *columns) for id_, *columns in found]


def _object(column: str | bytes | None) -> Mapping[str, str]:
    return cast(Mapping[str, str], json.loads(column)) if column else {}


def purge_bodies(connection: Connection, before: datetime, limit: int = 500) -> int:
    """Delete up to `limit` bodies of tasks that ended before that time (naive UTC); return their number.

    Retry refuses an ended task without a body, also an uncertain one. The transaction locks the tasks'
    rows, so that none is reopened meanwhile, and skips rows that others have locked.
    """
    first_since = to_micros(before) // 1000 << 80  # a UUIDv7 begins with 48 bits of milliseconds
    body_id = tables.task_bodies.c.task_id
    query = (
        select(body_id)
        # The bodies come first: they are in the order of their tasks' age, and most tasks have none any more.
        .prefix_with("STRAIGHT_JOIN")
        .join(tables.tasks, tables.tasks.c.id == body_id)
        .where(body_id < first_since.to_bytes(16), tables.tasks.c.updated_at < before)
        .where(tables.tasks.c.status.in_(FINAL_STATUSES))
        .order_by(body_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = connection.execute(query).scalars().all()
    if ids:
        connection.execute(delete(tables.task_bodies).where(body_id.in_(ids)))
    return len(ids)
