"""MySQL or MariaDB: engines, and what their sessions are like.

Affected rows count what *matched* (the FOUND_ROWS flag, set by SQLAlchemy): an UPDATE that finds its
row as it would leave it counts 1, and INSERT .. ON DUPLICATE KEY UPDATE counts 1 for a new row or one
left as it was, 2 for one changed.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import _mysql_connector
from mysql.connector._scripting import MySQLScriptSplitter
from mysql.connector.constants import DEFAULT_CONFIGURATION
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import ExceptionContext
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from services.common.database.bulk import LIMITS_KEY
from services.common.database.errors import ErrorKind, error_numbers
from services.common.database.statement_size import PACKET_TOO_LARGE, SESSION_LOST, StatementLimits

__all__ = ["make_engine", "url_of"]

# MySQL's C library sets itself up at its first use, and not safely when two threads meet there: the
# second one's connection has no methods and takes the process with it. So once, before there are
# threads (mysql_library_init() in the C API's manual, a macro for this function).
ctypes.PyDLL(_mysql_connector.__file__).mysql_server_init(0, None, None)

# The driver looks for the mysql client's command DELIMITER in each statement, with the values in it, and
# rewrites the statement where it finds one: a mail's text could change its own statement. The search also
# takes time by the square of the text, in which no other thread runs.
MySQLScriptSplitter.has_delimiter = staticmethod(lambda code: False)  # type: ignore[method-assign]

_DRIVERS = frozenset({"mysql", "mariadb", "mysql+mysqlconnector", "mariadb+mysqlconnector"})
CONNECT_SECONDS = 4
READ_SECONDS = 15
LOCK_SECONDS = 5
# The server ends a session that has been silent for so long, and with it a transaction in which a process
# froze or its network broke: the rows that it had locked would keep all others waiting for hours.
SILENT_SECONDS = 20

_SESSION_OVER = error_numbers(ErrorKind.SESSION)
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


def make_engine(
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
    event.listen(engine, "connect", partial(_begin_session, silent_seconds, StatementLimits()))
    event.listen(engine, "handle_error", _on_error)
    return engine


def _begin_session(
    silent_seconds: int, statements: StatementLimits, connection: Any, record: ConnectionPoolEntry
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
    record.info[LIMITS_KEY] = statements


def _on_error(context: ExceptionContext) -> Exception | None:
    error = context.original_exception
    number = getattr(error, "errno", None)
    if number in _SESSION_OVER or (number == PACKET_TOO_LARGE and getattr(error, "sent", True)):
        context.is_disconnect = True
    if context.sqlalchemy_exception is not None or number is None:
        return None
    # The C extension's commit and rollback raise an error of its own, which is none of DB-API's: SQLAlchemy
    # would neither wrap it nor drop the connection.
    context.is_disconnect = context.is_disconnect or number in SESSION_LOST
    return OperationalError(context.statement, None, error, connection_invalidated=context.is_disconnect)
