"""Compares the originals with the shadow tables, every row and column, while both still change.

A row may differ only for a moment: one table has folded an event and the other has not yet. So a rebuild
first records the keys of differing rows, and removes a key as soon as its rows were equal once.

All functions use the caller's connection and block.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection

from services.common.operations.rebuild.shadow_table import (
    SHADOW_TABLES,
    ShadowTable,
    TaskRange,
    flatten,
    ranges,
)

__all__ = [
    "DifferenceKind",
    "RowDifference",
    "count_differences",
    "record_differences",
    "remove_equal",
    "sample_differences",
]

_PART = 500

DifferenceKind = Literal["missing", "differs", "extra"]


@dataclass(frozen=True, slots=True)
class RowDifference:
    """A row that differs. `missing`: only the topics know it. `extra`: they know nothing of it.

    `line` is the event id of a timeline entry. `columns` are the columns that differ.
    """

    table: str
    task: UUID
    line: str
    kind: DifferenceKind
    columns: tuple[str, ...]


_KIND = {
    table: f"IF({table.original}.{table.task_id} IS NULL, 'missing',"
    f" IF({table.name}.{table.task_id} IS NULL, 'extra', 'differs'))"
    for table in SHADOW_TABLES
}
_BOTH = {
    table: f"FROM {table.differences}"
    f" LEFT JOIN {table.original} ON {table.keys_equal(table.differences, table.original)}"
    f" LEFT JOIN {table.name} ON {table.keys_equal(table.differences, table.name)}"
    for table in SHADOW_TABLES
}


def record_differences(connection: Connection, table: ShadowTable, range_: TaskRange) -> None:
    """Record the keys of this range's rows that differ or that only one of the tables has."""
    keys = ", ".join(table.key)
    for one, other, condition in (
        (table.name, table.original, f"NOT ({table.rows_equal(table.original, table.name)})"),
        (table.original, table.name, "FALSE"),
    ):
        chosen = ", ".join(f"{one}.{column}" for column in table.key)
        where, parameters = range_.where(f"{one}.{table.task_id}")
        connection.exec_driver_sql(
            f"INSERT IGNORE INTO {table.differences} ({keys}) SELECT {chosen} FROM {one}"
            f" LEFT JOIN {other} ON {table.keys_equal(one, other)}"
            f" WHERE {where} AND ({other}.{table.task_id} IS NULL OR {condition})",
            parameters,
        )


def remove_equal(connection: Connection, table: ShadowTable) -> int:
    """Remove the keys of rows that are equal now. Returns how many keys are left."""
    chosen = ", ".join(f"{table.differences}.{column}" for column in table.key)
    left = 0
    for range_ in ranges(connection, table.differences, table.task_id):
        where, parameters = range_.where(f"{table.differences}.{table.task_id}")
        equal = connection.exec_driver_sql(
            f"SELECT {chosen} FROM {table.differences}"
            f" JOIN {table.original} ON {table.keys_equal(table.differences, table.original)}"
            f" JOIN {table.name} ON {table.keys_equal(table.differences, table.name)}"
            f" WHERE {where} AND {table.rows_equal(table.original, table.name)}",
            parameters,
        ).all()
        for start in range(0, len(equal), _PART):
            keys = [tuple(key) for key in equal[start : start + _PART]]
            connection.exec_driver_sql(
                f"DELETE FROM {table.differences} WHERE {table.key_among(len(keys))}", flatten(keys)
            )
        query = f"SELECT COUNT(*) FROM {table.differences} WHERE {where}"
        left += int(connection.exec_driver_sql(query, parameters).scalar_one())
    return left


def count_differences(connection: Connection, table: ShadowTable) -> Counter[DifferenceKind]:
    """Return how many differing rows there are of each kind."""
    counted: Counter[DifferenceKind] = Counter()
    for range_ in ranges(connection, table.differences, table.task_id):
        where, parameters = range_.where(f"{table.differences}.{table.task_id}")
        query = f"SELECT {_KIND[table]}, COUNT(*) {_BOTH[table]} WHERE {where} GROUP BY 1"
        for kind, rows in connection.exec_driver_sql(query, parameters):
            counted[kind] += rows
    return counted


def sample_differences(connection: Connection, table: ShadowTable, most: int) -> list[RowDifference]:
    """Return the first `most` differing rows."""
    keys = ", ".join(f"{table.differences}.{column}" for column in table.key)
    equal = ", ".join(table.column_equal(column, table.original, table.name) for column in table.columns)
    found = connection.exec_driver_sql(
        f"SELECT {_KIND[table]}, {keys}, {equal} {_BOTH[table]} ORDER BY {keys} LIMIT {most:d}"
    )
    differences = []
    for kind, id_, *rest in found:
        line = str(rest[0]) if len(table.key) > 1 else ""
        flags = zip(table.columns, rest[len(table.key) - 1 :], strict=True)
        columns = tuple(column for column, same in flags if not same) if kind == "differs" else ()
        differences.append(RowDifference(table.original, UUID(bytes=bytes(id_)), line, kind, columns))
    return differences
