"""The rows of `deliveries` in SQL. All functions run in the caller's transaction, and block."""

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

_COLUMN_OF = {"doubts_in_all": "takeovers", "doubts_in_epoch": "doubts"}
_NAMES = tuple(_COLUMN_OF.get(field, field) for field in Delivery._fields)
COLUMNS = ", ".join(_NAMES)
"""The columns of `deliveries` in the order of the fields of Delivery."""
INSERT = f"INSERT INTO deliveries ({COLUMNS}) VALUES"
INSERT_NEW = f"INSERT IGNORE INTO deliveries ({COLUMNS}) VALUES"
_REPLACE = "ON DUPLICATE KEY UPDATE " + ", ".join(
    f"{name} = VALUES({name})" for name in _NAMES if name != "task_id"
)

UNKNOWN = datetime.min
"""Stands for a time that only the server knows."""

_by_id = attrgetter("task_id")


def owner_tokens() -> Callable[[], bytes]:
    """Return a source of owner tokens: 8 random bytes of this process and 8 that count.

    Every claim has a token of its own. So a handler that lost its claim is fenced even if another handler
    of the same process holds the claim now.
    """
    process, numbers = os.urandom(8), count()
    return lambda: process + next(numbers).to_bytes(8, "big")


def lock_rows(connection: Connection, ids: Iterable[bytes]) -> tuple[dict[bytes, Delivery], datetime]:
    """Return the rows of `ids` under exclusive locks, and the database's time before it waited for them.

    Without any row the time is UNKNOWN.
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
    """Write whole rows over existing ones. The caller holds their locks, or they are new."""
    execute_rows(connection, INSERT, sorted(rows, key=_by_id), _REPLACE)


def insert_row(connection: Connection, row: Delivery) -> bool:
    """Insert a row unless its task has one; return whether it was inserted.

    An existing row gets a shared lock. A later `lock_rows` in the same transaction may deadlock, so the
    transaction must be repeatable (`database.transactions.transaction` repeats it).
    """
    return execute_rows(connection, INSERT_NEW, [row]) == 1
