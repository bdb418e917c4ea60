"""Statements with many rows.

The hot paths use `exec_driver_sql` with one text for many rows. ADR 28 compares that with SQLAlchemy's
expression language.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import DataError

from services.common.database.statement_size import StatementLimits, StatementTooLong, split_by_bytes

__all__ = ["LIMITS_KEY", "execute_rows", "placeholders"]

LIMITS_KEY: Final = "postroad_statements"
"""The key of `Connection.info` under which the engine's `StatementLimits` are."""


def placeholders(count: int) -> str:
    """Return `count` placeholders, for `IN (...)`."""
    return ",".join(["%s"] * count)


def execute_rows(
    connection: Connection, head: str, rows: Sequence[Sequence[object]], tail: str = "", limit: int = 500
) -> int:
    """Execute `head`, a `(%s, ...)` for each row, and `tail`; return the number of affected rows. Blocks.

    A statement has at most `limit` rows, and fewer if it would have more bytes than the database takes
    (statement_size.py). `head` ends with VALUES; all rows have the same length. Raises
    `sqlalchemy.exc.DataError` for a row that is too long for any statement.
    """
    affected = 0
    limits: StatementLimits | None = connection.info.get(LIMITS_KEY)
    multi_row_bytes = None if limits is None else limits.multi_row_bytes()
    for start in range(0, len(rows), limit):
        part = rows[start : start + limit]
        if multi_row_bytes is None:
            affected += _execute_part(connection, head, part, tail)
        else:
            for_rows = multi_row_bytes - len(head) - len(tail)
            affected += sum(
                _execute_part(connection, head, few, tail) for few in split_by_bytes(part, for_rows)
            )
    return affected


def _execute_part(connection: Connection, head: str, rows: Sequence[Sequence[object]], tail: str) -> int:
    parameters = tuple(chain.from_iterable(rows))
    row = f"({placeholders(len(parameters) // len(rows))})"
    statement = f"{head} {','.join([row] * len(rows))} {tail}"
    limits: StatementLimits | None = connection.info.get(LIMITS_KEY)
    try:
        with limits.multi_row() if limits is not None and len(rows) > 1 else nullcontext():
            return connection.exec_driver_sql(statement, parameters).rowcount
    except DataError as error:
        if len(rows) == 1 or not isinstance(error.orig, StatementTooLong):
            raise
    # The statement was not sent, so the transaction is intact.
    middle = len(rows) // 2
    return sum(_execute_part(connection, head, half, tail) for half in (rows[:middle], rows[middle:]))
