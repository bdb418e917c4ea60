"""The rebuilt tables beside the originals: their names, and how two rows are told apart in SQL.

All functions work on the caller's connection and block. Each statement looks at a bounded range of keys, and
reads what others have committed without locking it (READ COMMITTED).
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
    "PAIRS",
    "STEP",
    "TASKS",
    "Pair",
    "Range",
    "analyse",
    "create",
    "drop",
    "flat",
    "ranges",
]

STEP = 5000
"""Tasks a statement looks at."""

BODIES = "task_bodies_rebuild"
"""Bodies that were missing, from the topics."""
DELIVERIES = "deliveries_rebuild"
"""What the topics tell of deliveries that were missing."""


class Range(NamedTuple):
    """Tasks with an id above `low` up to `high`; None: no bound."""

    low: bytes
    high: bytes | None

    def where(self, column: str) -> tuple[str, tuple[bytes, ...]]:
        """Return the condition on a column, and its parameters."""
        if self.high is None:
            return f"{column} > %s", (self.low,)
        return f"{column} > %s AND {column} <= %s", (self.low, self.high)


class Pair:
    """A table and its rebuilt twin. The first column of the key is the task's id."""

    def __init__(self, table: Table) -> None:
        self.name = table.name
        self.shadow = f"{table.name}_rebuild"
        self.before = f"{table.name}_before_rebuild"
        self.found = f"{table.name}_rebuild_found"
        self.key = tuple(column.name for column in table.primary_key.columns)
        self.id = self.key[0]
        self.columns = tuple(column.name for column in table.columns)
        self._texts = {
            column.name
            for column in table.columns
            if isinstance(column.type, String) and not isinstance(column.type, Enum)
        }

    @property
    def all(self) -> str:
        """Every column, for a list of them."""
        return ", ".join(f"`{column}`" for column in self.columns)

    def same(self, left: str, right: str) -> str:
        """Return the condition that two rows are equal in every column."""
        return " AND ".join(self.equal(column, left, right) for column in self.columns)

    def joined(self, left: str, right: str) -> str:
        """Return the condition that two rows have the same key."""
        return " AND ".join(f"{left}.{column} = {right}.{column}" for column in self.key)

    def matching(self, count: int) -> str:
        """Return the condition that a row has one of `count` keys; `flat` makes its parameters."""
        return f"({', '.join(self.key)}) IN ({','.join([f'({placeholders(len(self.key))})'] * count)})"

    def equal(self, column: str, left: str, right: str) -> str:
        """Return the condition that two rows are equal in a column."""
        if column in self._texts:
            # The collation would take "text" and "text " for one.
            return f"CAST({left}.`{column}` AS BINARY) <=> CAST({right}.`{column}` AS BINARY)"
        return f"{left}.`{column}` <=> {right}.`{column}`"


TASKS, EVENTS = Pair(tables.tasks), Pair(tables.task_events)
PAIRS = (TASKS, EVENTS)

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


def flat(keys: Iterable[tuple[object, ...]]) -> tuple[object, ...]:
    """Return the parameters of some keys, one after the other."""
    return tuple(chain.from_iterable(keys))


def create(connection: Connection) -> None:
    """Create the tables of a rebuild, empty. What an interrupted one left is dropped first."""
    drop(connection)
    for pair in PAIRS:
        connection.exec_driver_sql(f"CREATE TABLE {pair.shadow} LIKE {pair.name}")
        # Keys of rows that are not equal, or not in both.
        keys = ", ".join(pair.key)
        # With its primary key from the start: a server may refuse a table without one (MySQL's 3750).
        connection.exec_driver_sql(
            f"CREATE TABLE {pair.found} (PRIMARY KEY ({keys})) ENGINE=InnoDB"
            f" AS SELECT {keys} FROM {pair.name} WHERE FALSE"
        )
    connection.exec_driver_sql(f"CREATE TABLE {BODIES} LIKE task_bodies")
    connection.exec_driver_sql(_DELIVERIES)


def analyse(connection: Connection, pair: Pair) -> None:
    """Have the server look at what is in the rebuilt table, so that it plans well from the start."""
    connection.exec_driver_sql(f"ANALYZE TABLE {pair.shadow}").all()


def drop(connection: Connection) -> None:
    """Drop all that a rebuild creates. The originals as they were before a swap are no more needed then."""
    names = [name for pair in PAIRS for name in (pair.shadow, pair.before, pair.found)]
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*names, BODIES, DELIVERIES])}")


def ranges(connection: Connection, table: str, column: str, step: int = STEP) -> Iterator[Range]:
    """Yield ranges of a table's first key column that together are all of it, of about `step` rows each.

    A task's rows are in one range. The last one has no upper bound.
    """
    low = b""
    while True:
        found = connection.exec_driver_sql(
            f"SELECT {column} FROM {table} WHERE {column} > %s ORDER BY {column} LIMIT 1 OFFSET {step:d}",
            (low,),
        ).scalar()
        high = None if found is None else bytes(found)
        yield Range(low, high)
        if high is None:
            return
        low = high
