"""Copies rows that no topic holds from the originals into the shadow tables.

The topics lack the rows of unpublished tasks and of tasks older than their retention. They also lack rows
whose records were lost before their time: somebody recreated a topic or deleted records of it. A timeline
entry that no topic holds says that its record once existed.

All functions use the caller's connection and block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from services.common.database.bulk import placeholders
from services.common.fold import TaskRow
from services.common.operations.rebuild.shadow_table import EVENTS, STEP, TASKS, ShadowTable, TaskRange
from services.common.taskstore import insert_events, upsert
from services.common.timeline import TimelineRow

__all__ = [
    "copy_older",
    "copy_unknown",
    "copy_unpublished",
    "count_gap_entries",
    "keep_key_owners",
    "merge_incomplete_rows",
]

_PART = 500

# The original's rows that the shadow table lacks.
_ABSENT = {
    table: f"FROM {table.original} LEFT JOIN {table.name} ON {table.keys_equal(table.name, table.original)}"
    f" WHERE {table.name}.{table.task_id} IS NULL"
    for table in (TASKS, EVENTS)
}
# The rows of `tasks` that are ahead of the shadow table's, or that alone know the mail or all attempts.
_AHEAD = (
    f"SELECT {', '.join(f'{TASKS.original}.{column}' for column in TaskRow._fields)} FROM {TASKS.original}"
    f" LEFT JOIN {TASKS.name} ON {TASKS.keys_equal(TASKS.name, TASKS.original)}"
    f" WHERE ({TASKS.name}.id IS NULL OR {TASKS.name}.version < {TASKS.original}.version"
    f" OR ({TASKS.name}.created_at IS NULL AND {TASKS.original}.created_at IS NOT NULL)"
    f" OR ({TASKS.name}.version = {TASKS.original}.version"
    f" AND {TASKS.name}.attempts < {TASKS.original}.attempts))"
)
# The differing timeline entries that no topic holds.
_IN_GAPS = (
    f"FROM {EVENTS.differences}"
    f" JOIN {EVENTS.original} ON {EVENTS.keys_equal(EVENTS.differences, EVENTS.original)}"
    f" LEFT JOIN {EVENTS.name} ON {EVENTS.keys_equal(EVENTS.differences, EVENTS.name)}"
    f" WHERE {EVENTS.name}.{EVENTS.task_id} IS NULL"
)
_DIFFERING = (
    f"FROM {TASKS.differences} JOIN {TASKS.original} ON {TASKS.keys_equal(TASKS.differences, TASKS.original)}"
    f" JOIN {TASKS.name} ON {TASKS.keys_equal(TASKS.differences, TASKS.name)}"
)
# The rows of tasks whose records are not all on the topics. A row has the time of the event that made it.
_INCOMPLETE = (
    f"(({TASKS.name}.created_at IS NULL AND {TASKS.original}.created_at IS NOT NULL)"
    f" OR EXISTS (SELECT 1 {_IN_GAPS} AND {EVENTS.differences}.task_id = {TASKS.differences}.id)"
    f" OR ({TASKS.original}.version > {TASKS.name}.version AND NOT EXISTS (SELECT 1 FROM {EVENTS.name}"
    f" WHERE {EVENTS.name}.task_id = {TASKS.original}.id"
    f" AND {EVENTS.name}.at = {TASKS.original}.updated_at)))"
)


def copy_unpublished(connection: Connection, table: ShadowTable) -> int:
    """Copy the rows of tasks in the outbox: they have an event that is recorded and not published yet.

    A row of `tasks` is merged with the shadow table's. Returns how many rows were copied. Each statement
    names every table once and under its own name, so that this works under LOCK TABLES.
    """
    copied, low = 0, b""
    while True:
        found = connection.exec_driver_sql(
            "SELECT DISTINCT task_id FROM outbox WHERE task_id > %s ORDER BY task_id LIMIT %s", (low, STEP)
        ).all()
        if not found:
            return copied
        ids = tuple(bytes(id_) for (id_,) in found)
        low = ids[-1]
        which = f"{table.original}.{table.task_id} IN ({placeholders(len(ids))})"
        copied += _merge(connection, which, ids) if table is TASKS else _add_entries(connection, which, ids)


def copy_older(connection: Connection, range_: TaskRange) -> tuple[int, int]:
    """Copy the rows of tasks older than the topics' oldest records, merged with what the topics hold of them.

    Returns how many rows of `tasks` and how many timeline entries were copied.
    """
    where, parameters = range_.where(f"{TASKS.original}.id")
    copied = _copy(connection, TASKS, where, parameters)
    copied += _merge(connection, where, parameters)
    where, parameters = range_.where(f"{EVENTS.original}.task_id")
    return copied, _copy(connection, EVENTS, where, parameters)


def copy_unknown(connection: Connection, table: ShadowTable, range_: TaskRange) -> None:
    """Copy the differing rows that no topic knows."""
    where, parameters = range_.where(f"{table.differences}.{table.task_id}")
    chosen = ", ".join(f"{table.original}.`{column}`" for column in table.columns)
    connection.exec_driver_sql(
        f"INSERT IGNORE INTO {table.name} ({table.column_list}) SELECT {chosen} FROM {table.differences}"
        f" JOIN {table.original} ON {table.keys_equal(table.differences, table.original)}"
        f" LEFT JOIN {table.name} ON {table.keys_equal(table.differences, table.name)}"
        f" WHERE {where} AND {table.name}.{table.task_id} IS NULL",
        parameters,
    )


def count_gap_entries(connection: Connection, range_: TaskRange) -> Counter[str]:
    """Return how many differing timeline entries each topic (bare name) once held and holds no more."""
    where, parameters = range_.where(f"{EVENTS.differences}.task_id")
    found = connection.exec_driver_sql(
        f"SELECT SUBSTRING_INDEX({EVENTS.differences}.event_id, ':', 1), COUNT(*) {_IN_GAPS} AND {where}"
        " GROUP BY 1",
        parameters,
    )
    return Counter(dict(map(tuple, found)))


def merge_incomplete_rows(connection: Connection, range_: TaskRange) -> None:
    """Merge the originals' rows into the differing rows of tasks whose records are not all on the topics."""
    where, parameters = range_.where(f"{TASKS.differences}.id")
    found = connection.exec_driver_sql(
        f"SELECT {TASKS.differences}.id {_DIFFERING} WHERE {where} AND {_INCOMPLETE}", parameters
    )
    ids = [bytes(id_) for (id_,) in found]
    for start in range(0, len(ids), _PART):
        part = tuple(ids[start : start + _PART])
        _merge(connection, f"{TASKS.original}.id IN ({placeholders(len(part))})", part)


def keep_key_owners(connection: Connection, range_: TaskRange) -> None:
    """Give an idempotency key back to the task that owns it in the original table.

    A repeated Create answers with that task. The shadow table may have given the key to another one.
    """
    where, parameters = range_.where(f"{TASKS.differences}.id")
    found = connection.exec_driver_sql(
        f"SELECT {TASKS.differences}.id, {TASKS.original}.idempotency_key, other.id {_DIFFERING}"
        f" JOIN {TASKS.name} AS other ON other.tenant = {TASKS.original}.tenant"
        f" AND other.idempotency_key = {TASKS.original}.idempotency_key"
        f" WHERE {where} AND {TASKS.name}.idempotency_key IS NULL",
        parameters,
    ).all()
    for owner, key, other in found:
        for id_, value in ((other, None), (owner, key)):
            connection.exec_driver_sql(
                f"UPDATE {TASKS.name} SET idempotency_key = %s WHERE id = %s", (value, id_)
            )


def _copy(connection: Connection, table: ShadowTable, where: str, parameters: tuple[Any, ...]) -> int:
    chosen = ", ".join(f"{table.original}.`{column}`" for column in table.columns)
    return connection.exec_driver_sql(
        f"INSERT IGNORE INTO {table.name} ({table.column_list}) SELECT {chosen} {_ABSENT[table]} AND {where}",
        parameters,
    ).rowcount


def _merge(connection: Connection, where: str, parameters: Sequence[Any]) -> int:
    found = connection.exec_driver_sql(f"{_AHEAD} AND {where}", tuple(parameters)).all()
    rows = [TaskRow._make((bytes(id_), *columns)) for id_, *columns in found]
    upsert(connection, rows, TASKS.name)
    return len(rows)


def _add_entries(connection: Connection, where: str, parameters: tuple[Any, ...]) -> int:
    chosen = ", ".join(f"{EVENTS.original}.`{column}`" for column in TimelineRow._fields)
    found = connection.exec_driver_sql(f"SELECT {chosen} {_ABSENT[EVENTS]} AND {where}", parameters).all()
    entries = [TimelineRow._make((bytes(id_), *columns)) for id_, *columns in found]
    insert_events(connection, entries, EVENTS.name)
    return len(entries)
