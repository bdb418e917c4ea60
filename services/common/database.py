"""MySQL or MariaDB: engines, multi-row statements, and which errors pass.

Statements on the hot paths go through `exec_driver_sql` with one text for many rows: SQLAlchemy's
`text()` and `insert().values()` spend more on such a statement than the server does.

Affected rows count what *matched* (the FOUND_ROWS flag, set by SQLAlchemy): an UPDATE that finds its
row as it would leave it counts 1, and INSERT .. ON DUPLICATE KEY UPDATE counts 1 for a new row or one
left as it was, 2 for one changed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import _mysql_connector
from mysql.connector.constants import DEFAULT_CONFIGURATION
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    TimeoutError,
)
from sqlalchemy.pool import ConnectionPoolEntry
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
    wait_random_exponential,
)

from services.common.database_errors import TRANSIENT, Kind, numbers
from services.common.statement_size import LOST, TOO_LARGE, Statements, StatementTooLong, portions

__all__ = [
    "at_fault",
    "deadlock",
    "engine_of",
    "execute_rows",
    "marks",
    "said",
    "transaction",
    "transient",
    "until_back",
    "url_of",
]

R = TypeVar("R")

# MySQL's C library sets itself up at its first use, and not safely when two threads meet there: the
# second one's connection has no methods and takes the process with it. So once, before there are
# threads (mysql_library_init() in the C API's manual, a macro for this function).
ctypes.PyDLL(_mysql_connector.__file__).mysql_server_init(0, None, None)

_DRIVERS = frozenset({"mysql", "mariadb", "mysql+mysqlconnector", "mariadb+mysqlconnector"})
CONNECT_SECONDS = 4
READ_SECONDS = 15
LOCK_SECONDS = 5
# The server ends a session that has been silent for so long, and with it a transaction in which a process
# froze or its network broke: the rows that it had locked would keep all others waiting for hours.
SILENT_SECONDS = 20
# An error that took longer (a lock wait, a read timeout) is not tried again at once, but raised.
PATIENCE = 1.0

_CONFLICT = numbers(Kind.CONFLICT)
_SESSION_OVER = numbers(Kind.SESSION)

_STATEMENTS = "postroad_statements"
_SESSION = (
    "SET time_zone = '+00:00', innodb_lock_wait_timeout = %s, wait_timeout = %s,"
    " sql_mode = 'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'"
)


def url_of(value: str) -> URL:
    """Return the URL of a database of ours; raises ValueError, without the password, where it is none."""
    try:
        url = make_url(value)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    except ValueError:
        raise ValueError("its port is no number") from None
    if url.drivername not in _DRIVERS:
        raise ValueError(f"{url.drivername}:// is neither mysql:// nor mariadb://")
    if not url.database or not 0 < (url.port or 3306) < 65536:
        raise ValueError("must be mysql://user:password@host:port/database")
    if unknown := sorted(set(url.query) - set(DEFAULT_CONFIGURATION)):
        raise ValueError(f"the driver does not know {', '.join(unknown)}")
    return url


def engine_of(
    url: str | URL,
    pool_size: int = 4,
    read_seconds: int = READ_SECONDS,
    silent_seconds: int = SILENT_SECONDS,
) -> Engine:
    """Return an engine whose sessions are READ COMMITTED, in UTC and strict. Connects on first use.

    `mysql://` and `mariadb://` mean the driver that Postroad uses. No statement may take longer than
    `read_seconds`, and between two of a transaction there may be no more than `silent_seconds`. Options of
    the driver may stand in the URL's query (`unix_socket`, `ssl_ca`).
    """
    url = make_url(url)
    if url.drivername in ("mysql", "mariadb"):
        url = url.set(drivername="mysql+mysqlconnector")
    engine = create_engine(
        url,
        isolation_level="READ COMMITTED",
        # An error's text goes to the logs; a mail's does not.
        hide_parameters=True,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=READ_SECONDS,
        # Before the server ends those that idle in the pool.
        pool_recycle=max(1, silent_seconds * 3 // 4),
        # A Connection ends its own transaction; the pool's second ROLLBACK would be a round trip a call.
        pool_reset_on_return=None,
        connect_args={
            "use_pure": False,
            "charset": "utf8mb4",
            "collation": "utf8mb4_general_ci",
            "connection_timeout": CONNECT_SECONDS,
            "read_timeout": read_seconds,
            "write_timeout": read_seconds,
        },
    )
    event.listen(engine, "connect", partial(_begin_session, silent_seconds, Statements()))
    event.listen(engine, "handle_error", _on_error)
    return engine


def _begin_session(
    silent_seconds: int, statements: Statements, connection: Any, record: ConnectionPoolEntry
) -> None:
    # The driver pings the server before every statement, a round trip each; a connection that is lost
    # shows in the statement itself.
    connection.is_connected = lambda: True
    cursor = connection.cursor()
    cursor.execute(_SESSION, (LOCK_SECONDS, silent_seconds))
    cursor.execute("SELECT @@max_allowed_packet")
    [(most,)] = cursor.fetchall()
    cursor.close()
    statements.guard(connection, int(most))
    record.info[_STATEMENTS] = statements


def _on_error(context: ExceptionContext) -> Exception | None:
    error = context.original_exception
    number = getattr(error, "errno", None)
    if number in _SESSION_OVER or (number == TOO_LARGE and not isinstance(error, StatementTooLong)):
        context.is_disconnect = True
    if context.sqlalchemy_exception is not None or number is None:
        return None
    # The C extension's commit and rollback raise an error of its own, which is none of DB-API's: SQLAlchemy
    # would neither wrap it nor drop the connection.
    context.is_disconnect = context.is_disconnect or number in LOST
    return OperationalError(context.statement, None, error, connection_invalidated=context.is_disconnect)


def marks(count: int) -> str:
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
    statements: Statements | None = connection.info.get(_STATEMENTS)
    share = None if statements is None else statements.share()
    for start in range(0, len(rows), limit):
        part = rows[start : start + limit]
        if share is None:
            affected += _execute_part(connection, head, part, tail)
        else:
            room = share - len(head) - len(tail)
            affected += sum(_execute_part(connection, head, few, tail) for few in portions(part, room))
    return affected


def _execute_part(connection: Connection, head: str, rows: Sequence[Sequence[object]], tail: str) -> int:
    parameters = tuple(chain.from_iterable(rows))
    row = f"({marks(len(parameters) // len(rows))})"
    statement = f"{head} {','.join([row] * len(rows))} {tail}"
    try:
        return connection.exec_driver_sql(statement, parameters).rowcount
    except DataError as error:
        if len(rows) == 1 or not isinstance(error.orig, StatementTooLong):
            raise
    # It was not sent, so the transaction goes on.
    middle = len(rows) // 2
    return sum(_execute_part(connection, head, half, tail) for half in (rows[:middle], rows[middle:]))


def _number(error: BaseException) -> int | None:
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "errno", None)


def deadlock(error: BaseException) -> bool:
    """Whether another transaction stood in the way, so that this one may be done again at once."""
    return _number(error) in _CONFLICT


def said(error: BaseException) -> str:
    """Return what the database said, without what SQLAlchemy adds: its text has the whole statement in it."""
    return str(getattr(error, "orig", error))


def at_fault(error: BaseException) -> bool:
    """Whether the database or its set-up is to blame, and no value that it was given.

    That is also a refused login, a missing table and the like: an operator mends those, and until then no
    task may fail for them.
    """
    if isinstance(error, DataError | IntegrityError):
        return False
    return isinstance(error, DBAPIError) or transient(error)


def transient(error: BaseException) -> bool:
    """Whether the same statement may well succeed later: the database is away, full, busy or restarting."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or isinstance(error, TimeoutError) or _number(error) in TRANSIENT


def _at_once(error: BaseException) -> bool:
    return deadlock(error) or (isinstance(error, DBAPIError) and error.connection_invalidated)


_again = Retrying(
    retry=retry_if_exception(_at_once),
    wait=wait_random_exponential(multiplier=0.005, max=0.2),
    stop=stop_after_attempt(8) | stop_after_delay(PATIENCE),
    reraise=True,
)


def transaction(engine: Engine, work: Callable[[Connection], R]) -> R:
    """Return `work(connection)`, committed; blocks.

    It is done again after a deadlock, and where a pooled connection turns out to be dead. As the
    connection may die while it commits, `work` must bear being done twice. Raises
    `sqlalchemy.exc.DBAPIError`; `transient` tells what it means.
    """

    def once() -> R:
        with engine.begin() as connection:
            return work(connection)

    started = time.monotonic()
    try:
        return once()
    except DBAPIError as error:
        if not _at_once(error) or time.monotonic() - started > PATIENCE:
            raise
    return _again(once)


def until_back(
    noticed: Callable[[BaseException], None], passes: Callable[[BaseException], bool] = transient
) -> AsyncRetrying:
    """Return a policy that waits as long as the database is away: `await until_back(f)(function, ...)`.

    `noticed` is told each error that `passes`; all others are raised. Waits 0.1 s at first, 3 s at most.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None:
            noticed(error)

    return AsyncRetrying(
        retry=retry_if_exception(passes),
        wait=wait_exponential_jitter(multiplier=0.1, max=3, jitter=0.1),
        before_sleep=tell,
        reraise=True,
    )
