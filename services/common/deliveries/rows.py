"""The rows of `deliveries` in SQL, for whoever decides about them.

All functions work on the caller's connection, inside its transaction, and block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import count
from operator import attrgetter

from sqlalchemy import Connection

from services.common.database.bulk import execute_rows, placeholders
from services.common.deliveries.decide import Delivery

__all__ = [
    "COLUMNS",
    "INSERT",
    "INSERT_NEW",
    "UNKNOWN",
    "insert_row",
    "lock_rows",
    "owner_tokens",
    "store_rows",
]

COLUMNS = ", ".join(Delivery._fields)
INSERT = f"INSERT INTO deliveries ({COLUMNS}) VALUES"
INSERT_NEW = f"INSERT IGNORE INTO deliveries ({COLUMNS}) VALUES"
_REPLACE = "ON DUPLICATE KEY UPDATE " + ", ".join(
    f"{name} = VALUES({name})" for name in Delivery._fields if name != "task_id"
)

UNKNOWN = datetime.min
"""A time that only the server knows."""

_by_id = attrgetter("task_id")


def owner_tokens() -> Callable[[], bytes]:
    """Return a source of owner tokens: 8 random bytes of this process, 8 that count.

    One for every claim, not one for every process: a claim that was lost and taken again by another
    handler of the same process is fenced off like anybody else's.
    """
    process, numbers = os.urandom(8), count()
    return lambda: process + next(numbers).to_bytes(8, "big")


def lock_rows(connection: Connection, ids: Iterable[bytes]) -> tuple[dict[bytes, Delivery], datetime]:
    """Return the rows of `ids` under exclusive locks, and the database's time before it waited for them.

    The time is UNKNOWN where there is no row.
    """
    wanted = tuple(sorted(ids))
    query = (
        f"SELECT {COLUMNS}, UTC_TIMESTAMP(6) FROM deliveries"
        f" WHERE task_id IN ({placeholders(len(wanted))}) ORDER BY task_id FOR UPDATE"
    )
    found = connection.exec_driver_sql(query, wanted).all()
    rows = (Delivery(*columns) for *columns, _ in found)
    return {row.task_id: row for row in rows}, found[0][-1] if found else UNKNOWN


def store_rows(connection: Connection, rows: Iterable[Delivery]) -> None:
    """Write rows whole, over those that are there. Their locks are to be held, or they are to be new."""
    execute_rows(connection, INSERT, sorted(rows, key=_by_id), _REPLACE)


def insert_row(connection: Connection, row: Delivery) -> bool:
    """Insert a row unless its task has one; return whether it was inserted.

    One that is there is locked for reading only: do not go on to `lock_rows` in the same transaction unless
    a deadlock may be answered by doing it all again (`database.transaction` does).
    """
    return execute_rows(connection, INSERT_NEW, [row]) == 1
