"""The statements of the hot paths: text with literals, sent by the driver's connection itself.

SQLAlchemy's execution context and the driver's cursor cost more than the text (ADR 36 compares them). What
remains of SQLAlchemy are its pool, its transactions and its errors. A failed statement raises what
`Connection.exec_driver_sql` would raise, and a lost session leaves the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Final

from mysql.connector import Error
from sqlalchemy import Connection
from sqlalchemy.exc import DataError

from services.common.database.literals import literal, literal_rows
from services.common.database.statement_size import StatementLimits, StatementTooLong, split_by_bytes

__all__ = ["LIMITS_KEY", "execute", "execute_rows", "placeholders", "select_rows"]

LIMITS_KEY: Final = "postroad_statements"
"""The key of `Connection.info` under which the engine's `StatementLimits` are."""


def placeholders(count: int) -> str:
    """Return `count` placeholders, for `IN (...)`."""
    return ",".join(["%s"] * count)


def execute(connection: Connection, statement: str, parameters: Sequence[object] = ()) -> int:
    """Execute a statement without a result; return the number of affected rows. Blocks.

    With parameters, `%s` stands for each, and `%%` for a percent sign. literals.py lists their types. Raises
    `sqlalchemy.exc.DBAPIError`.
    """
    affected: int = _send(connection, _text(statement, parameters), statement)["affected_rows"]
    return affected


def select_rows(
    connection: Connection, query: str, parameters: Sequence[object] = ()
) -> list[tuple[Any, ...]]:
    """Return all rows of a query. Takes parameters, raises and blocks as `execute` does."""
    _send(connection, _text(query, parameters), query)
    driver: Any = connection.connection.dbapi_connection
    try:
        rows: list[tuple[Any, ...]] = driver.get_rows()[0]
    except Error as error:
        connection._handle_dbapi_exception(error, query, None, None, None)
    return rows


def execute_rows(
    connection: Connection,
    head: str,
    rows: Sequence[Sequence[object]],
    tail: str = "",
    *,
    limit: int = 500,
    row: str | None = None,
) -> int:
    """Execute `head`, the literals of `rows`, and `tail`; return the number of affected rows. Blocks.

    A statement has at most `limit` rows, and fewer if it would have more bytes than the database takes
    (statement_size.py). `head` ends with VALUES; all rows have the same length. `row` is the text of a row
    that has more than its values, with a `%s` for each of those. Raises `sqlalchemy.exc.DataError` for a row
    that is too long for any statement.
    """
    affected = 0
    limits: StatementLimits | None = connection.info.get(LIMITS_KEY)
    multi_row_bytes = None if limits is None else limits.multi_row_bytes()
    for start in range(0, len(rows), limit):
        part = rows[start : start + limit]
        if multi_row_bytes is None:
            affected += _execute_part(connection, head, part, tail, row)
        else:
            for_rows = multi_row_bytes - len(head) - len(tail) - len(part) * len(row or "")
            affected += sum(
                _execute_part(connection, head, few, tail, row) for few in split_by_bytes(part, for_rows)
            )
    return affected


def _execute_part(
    connection: Connection, head: str, rows: Sequence[Sequence[object]], tail: str, row: str | None
) -> int:
    statement = f"{head} {literal_rows(rows, row)} {tail}"
    limits: StatementLimits | None = connection.info.get(LIMITS_KEY)
    try:
        with limits.multi_row() if limits is not None and len(rows) > 1 else nullcontext():
            affected: int = _send(connection, statement, head)["affected_rows"]
            return affected
    except DataError as error:
        if len(rows) == 1 or not isinstance(error.orig, StatementTooLong):
            raise
    # The statement was not sent, so the transaction is intact.
    middle = len(rows) // 2
    return sum(_execute_part(connection, head, half, tail, row) for half in (rows[:middle], rows[middle:]))


def _text(statement: str, parameters: Sequence[object]) -> str:
    return statement % tuple(map(literal, parameters)) if parameters else statement


def _send(connection: Connection, statement: str, shown: str) -> Any:
    """Send a statement; return the driver's answer. `shown` is what an error shows of it."""
    text = statement.encode()
    # As SQLAlchemy does before a statement of its own: the Connection then ends the transaction.
    if not connection.in_transaction():
        connection.begin()
    driver: Any = connection.connection.dbapi_connection
    try:
        return driver.cmd_query(text)
    except Error as error:
        # SQLAlchemy has no public call that wraps an error, tells the pool, and asks the event handlers.
        connection._handle_dbapi_exception(error, shown, None, None, None)
