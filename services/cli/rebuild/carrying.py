"""What no topic holds, carried over from the originals into the rebuilt tables.

All functions work on the caller's connection and block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from services.cli.rebuild.pairs import EVENTS, STEP, TASKS, Pair, Range
from services.common.database.bulk import placeholders
from services.common.fold import TaskRow
from services.common.taskstore import insert_events, upsert
from services.common.timeline import TimelineEntry

__all__ = ["carry_found", "carry_older", "carry_recorded", "join"]

_PART = 500

# Of a table's rows, those that the rebuilt one has not.
_NEW = {
    pair: f"FROM {pair.name} LEFT JOIN {pair.shadow} ON {pair.joined(pair.shadow, pair.name)}"
    f" WHERE {pair.shadow}.{pair.id} IS NULL"
    for pair in (TASKS, EVENTS)
}
# Of tasks' rows, those that are ahead of the rebuilt one, or that alone know the mail or all attempts.
_AHEAD = (
    f"SELECT {', '.join(f'{TASKS.name}.{column}' for column in TaskRow._fields)} FROM {TASKS.name}"
    f" LEFT JOIN {TASKS.shadow} ON {TASKS.joined(TASKS.shadow, TASKS.name)}"
    f" WHERE ({TASKS.shadow}.id IS NULL OR {TASKS.shadow}.version < {TASKS.name}.version"
    f" OR ({TASKS.shadow}.created_at IS NULL AND {TASKS.name}.created_at IS NOT NULL)"
    f" OR ({TASKS.shadow}.version = {TASKS.name}.version"
    f" AND {TASKS.shadow}.attempts < {TASKS.name}.attempts))"
)


def carry_recorded(connection: Connection, pair: Pair) -> int:
    """Carry over what is of tasks that the outbox names: something is recorded and not published yet.

    Tasks have the join of both rows. Returns how many rows were carried over. Each table stands once in a
    statement and under its own name, so this works under LOCK TABLES.
    """
    carried, low = 0, b""
    while True:
        found = connection.exec_driver_sql(
            "SELECT DISTINCT task_id FROM outbox WHERE task_id > %s ORDER BY task_id LIMIT %s", (low, STEP)
        ).all()
        if not found:
            return carried
        ids = tuple(bytes(id_) for (id_,) in found)
        low = ids[-1]
        which = f"{pair.name}.{pair.id} IN ({placeholders(len(ids))})"
        carried += _join(connection, which, ids) if pair is TASKS else _add(connection, which, ids)


def carry_older(connection: Connection, range_: Range) -> tuple[int, int]:
    """Carry over tasks that are older than what the topics hold: their rows stay, joined with what is held.

    Returns how many rows of tasks and how many lines of timelines were carried over.
    """
    where, parameters = range_.where(f"{TASKS.name}.id")
    carried = _copy(connection, TASKS, where, parameters)
    carried += _join(connection, where, parameters)
    where, parameters = range_.where(f"{EVENTS.name}.task_id")
    return carried, _copy(connection, EVENTS, where, parameters)


def carry_found(connection: Connection, pair: Pair, range_: Range) -> None:
    """Carry over those rows of which the comparison found that no topic knows them."""
    where, parameters = range_.where(f"{pair.found}.{pair.id}")
    chosen = ", ".join(f"{pair.name}.`{column}`" for column in pair.columns)
    connection.exec_driver_sql(
        f"INSERT IGNORE INTO {pair.shadow} ({pair.all}) SELECT {chosen} FROM {pair.found}"
        f" JOIN {pair.name} ON {pair.joined(pair.found, pair.name)}"
        f" LEFT JOIN {pair.shadow} ON {pair.joined(pair.found, pair.shadow)}"
        f" WHERE {where} AND {pair.shadow}.{pair.id} IS NULL",
        parameters,
    )


def join(connection: Connection, ids: Sequence[bytes]) -> None:
    """Join the rebuilt rows of these tasks with the originals', so that they say what both know."""
    for start in range(0, len(ids), _PART):
        part = tuple(ids[start : start + _PART])
        _join(connection, f"{TASKS.name}.id IN ({placeholders(len(part))})", part)


def _copy(connection: Connection, pair: Pair, where: str, parameters: tuple[Any, ...]) -> int:
    chosen = ", ".join(f"{pair.name}.`{column}`" for column in pair.columns)
    return connection.exec_driver_sql(
        f"INSERT IGNORE INTO {pair.shadow} ({pair.all}) SELECT {chosen} {_NEW[pair]} AND {where}", parameters
    ).rowcount


def _join(connection: Connection, where: str, parameters: tuple[Any, ...]) -> int:
    found = connection.exec_driver_sql(f"{_AHEAD} AND {where}", parameters).all()
    rows = [TaskRow._make((bytes(id_), *columns)) for id_, *columns in found]
    upsert(connection, rows, TASKS.shadow)
    return len(rows)


def _add(connection: Connection, where: str, parameters: tuple[Any, ...]) -> int:
    chosen = ", ".join(f"{EVENTS.name}.`{column}`" for column in TimelineEntry._fields)
    found = connection.exec_driver_sql(f"SELECT {chosen} {_NEW[EVENTS]} AND {where}", parameters).all()
    lines = [TimelineEntry._make((bytes(id_), *columns)) for id_, *columns in found]
    insert_events(connection, lines, EVENTS.shadow)
    return len(lines)
