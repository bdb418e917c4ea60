"""Statements for many rows.

Those on the hot paths go through `exec_driver_sql` with one text for many rows: SQLAlchemy's `text()` and
`insert().values()` spend more on such a statement than the server does.
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
"""Where `Connection.info` holds the `Statements` of the connection's engine."""


def placeholders(count: int) -> str:
    """Return `count` placeholders, for `IN (...)`."""
    return ",".join(["%s"] * count)


def execute_rows(
    connection: Connection, head: str, rows: Sequence[Sequence[object]], tail: str = "", limit: int = 500
) -> int:
    """Execute `head` + `(%s, ...)` a row + `tail`, at most `limit` rows a statement; blocks.

    A statement that would have more bytes than the database takes (statement_size.py) is made in two. `head`
    ends with VALUES; all rows are of the first one's length. Returns the affected rows. Raises
    `sqlalchemy.exc.DataError` for a row that no statement can hold.
    """
    affected = 0
    statements: StatementLimits | None = connection.info.get(LIMITS_KEY)
    share = None if statements is None else statements.share()
    for start in range(0, len(rows), limit):
        part = rows[start : start + limit]
        if share is None:
            affected += _execute_part(connection, head, part, tail)
        else:
            room = share - len(head) - len(tail)
            affected += sum(_execute_part(connection, head, few, tail) for few in split_by_bytes(part, room))
    return affected


def _execute_part(connection: Connection, head: str, rows: Sequence[Sequence[object]], tail: str) -> int:
    parameters = tuple(chain.from_iterable(rows))
    row = f"({placeholders(len(parameters) // len(rows))})"
    statement = f"{head} {','.join([row] * len(rows))} {tail}"
    bounds: StatementLimits | None = connection.info.get(LIMITS_KEY)
    try:
        with bounds.several() if bounds is not None and len(rows) > 1 else nullcontext():
            return connection.exec_driver_sql(statement, parameters).rowcount
    except DataError as error:
        if len(rows) == 1 or not isinstance(error.orig, StatementTooLong):
            raise
    # It was not sent, so the transaction goes on.
    middle = len(rows) // 2
    return sum(_execute_part(connection, head, half, tail) for half in (rows[:middle], rows[middle:]))
