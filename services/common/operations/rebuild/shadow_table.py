"""The shadow tables that a rebuild fills beside the originals, and how SQL compares the two.

All functions use the caller's connection and block. Each statement reads a bounded range of keys. It reads
what others have committed without locking it (READ COMMITTED).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from sqlalchemy import Connection, Enum, String, Table

from services.common.database import tables
from services.common.database.bulk import placeholders

__all__ = [
    "BODIES",
    "DELIVERIES",
    "EVENTS",
    "SHADOW_TABLES",
    "STEP",
    "TASKS",
    "ShadowTable",
    "TaskRange",
    "analyse",
    "create_tables",
    "drop_tables",
    "flatten",
    "ranges",
]

STEP = 5000
"""Tasks that one statement reads."""

BODIES = "task_bodies_rebuild"
"""The table of bodies that the topics hold and `task_bodies` lacks."""
DELIVERIES = "deliveries_rebuild"
"""The table of what the topics say about deliveries that `deliveries` lacks."""


class TaskRange(NamedTuple):
    """The tasks whose ids are above `low` and at most `high`. None is no bound."""

    low: bytes
    high: bytes | None

    def where(self, column: str) -> tuple[str, tuple[bytes, ...]]:
        """Return the SQL condition on a column, and its parameters."""
        if self.high is None:
            return f"{column} > %s", (self.low,)
        return f"{column} > %s AND {column} <= %s", (self.low, self.high)


class ShadowTable:
    """A table that a rebuild fills in place of an original. The first column of its key is the task's id.

    `name` is the shadow table and `original` the table that it replaces. `retired` is the original's name
    after the swap. `differences` is the table of keys whose rows differ.
    """

    def __init__(self, table: Table) -> None:
        self.original = table.name
        self.name = f"{table.name}_rebuild"
        self.retired = f"{table.name}_before_rebuild"
        self.differences = f"{table.name}_rebuild_found"
        self.key = tuple(column.name for column in table.primary_key.columns)
        self.task_id = self.key[0]
        self.columns = tuple(column.name for column in table.columns)
        self._texts = {
            column.name
            for column in table.columns
            if isinstance(column.type, String) and not isinstance(column.type, Enum)
        }

    @property
    def column_list(self) -> str:
        """All columns, quoted and separated by commas."""
        return ", ".join(f"`{column}`" for column in self.columns)

    def rows_equal(self, left: str, right: str) -> str:
        """Return the SQL condition that two tables' rows are equal in every column."""
        return " AND ".join(self.column_equal(column, left, right) for column in self.columns)

    def keys_equal(self, left: str, right: str) -> str:
        """Return the SQL condition that two tables' rows have the same key."""
        return " AND ".join(f"{left}.{column} = {right}.{column}" for column in self.key)

    def key_among(self, count: int) -> str:
        """Return the SQL condition that a row has one of `count` keys. `flatten` makes its parameters."""
        return f"({', '.join(self.key)}) IN ({','.join([f'({placeholders(len(self.key))})'] * count)})"

    def column_equal(self, column: str, left: str, right: str) -> str:
        """Return the SQL condition that two tables' rows are equal in a column."""
        if column in self._texts:
            # For the collation "text" and "text " are equal.
            return f"CAST({left}.`{column}` AS BINARY) <=> CAST({right}.`{column}` AS BINARY)"
        return f"{left}.`{column}` <=> {right}.`{column}`"


TASKS, EVENTS = ShadowTable(tables.tasks), ShadowTable(tables.task_events)
SHADOW_TABLES = (TASKS, EVENTS)

_DELIVERIES = f"""
CREATE TABLE {DELIVERIES} (
    task_id BINARY(16) NOT NULL PRIMARY KEY,
    version BIGINT UNSIGNED NOT NULL,
    state VARCHAR(16) NOT NULL,
    epoch BIGINT UNSIGNED NOT NULL,
    attempt INTEGER NOT NULL,
    doubts INTEGER NOT NULL,
    settled_at BIGINT NOT NULL,
    next_attempt_at BIGINT NOT NULL,
    reason VARCHAR(64) NOT NULL,
    reply VARCHAR(1024) NOT NULL,
    relay VARCHAR(255) NOT NULL,
    message_id VARCHAR(255) NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin
"""


def flatten(keys: Iterable[tuple[object, ...]]) -> tuple[object, ...]:
    """Return the columns of these keys, one after the other."""
    return tuple(chain.from_iterable(keys))


def create_tables(connection: Connection) -> None:
    """Create the empty tables of a rebuild. Tables that an interrupted rebuild left are dropped first."""
    drop_tables(connection)
    for table in SHADOW_TABLES:
        connection.exec_driver_sql(f"CREATE TABLE {table.name} LIKE {table.original}")
        keys = ", ".join(table.key)
        # It has its primary key from the start: a server may refuse a table without one (MySQL's error 3750).
        connection.exec_driver_sql(
            f"CREATE TABLE {table.differences} (PRIMARY KEY ({keys})) ENGINE=InnoDB"
            f" AS SELECT {keys} FROM {table.original} WHERE FALSE"
        )
    connection.exec_driver_sql(f"CREATE TABLE {BODIES} LIKE task_bodies")
    connection.exec_driver_sql(_DELIVERIES)


def analyse(connection: Connection, table: ShadowTable) -> None:
    """Have the server count what the shadow table holds, so that it plans queries well after the swap."""
    connection.exec_driver_sql(f"ANALYZE TABLE {table.name}").all()


def drop_tables(connection: Connection) -> None:
    """Drop every table that a rebuild creates, and the originals that a swap retired."""
    names = [name for table in SHADOW_TABLES for name in (table.name, table.retired, table.differences)]
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*names, BODIES, DELIVERIES])}")


def ranges(connection: Connection, table: str, column: str, step: int = STEP) -> Iterator[TaskRange]:
    """Yield ranges of about `step` rows each that cover a whole table. `column` is its task id.

    All rows of a task are in one range. The last range has no upper bound.
    """
    low = b""
    while True:
        found = connection.exec_driver_sql(
            f"SELECT {column} FROM {table} WHERE {column} > %s ORDER BY {column} LIMIT 1 OFFSET {step:d}",
            (low,),
        ).scalar()
        high = None if found is None else bytes(found)
        yield TaskRange(low, high)
        if high is None:
            return
        low = high
