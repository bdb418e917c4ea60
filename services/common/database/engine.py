"""Engines for MySQL or MariaDB, and the settings of their sessions.

The number of affected rows counts rows that *matched* (SQLAlchemy sets the FOUND_ROWS flag). An UPDATE that
changes nothing in its row counts 1. INSERT .. ON DUPLICATE KEY UPDATE counts 1 for a new or unchanged row,
and 2 for a changed one.
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

# MySQL's C library initialises itself at its first use, but not safely in two threads at once: the second
# one's connection has no methods and crashes the process. So this module initialises it before there are
# threads (mysql_library_init() in the C API's manual, a macro for this function).
ctypes.PyDLL(_mysql_connector.__file__).mysql_server_init(0, None, None)

# The driver searches each statement, with its values, for the mysql client's command DELIMITER, and
# rewrites the statement if it finds one: a mail's text could change its own statement. The search also
# takes quadratic time, during which no other thread runs.
MySQLScriptSplitter.has_delimiter = staticmethod(lambda code: False)  # type: ignore[method-assign]

# SQLAlchemy passes most options of a URL to the driver as texts. The driver accepts no text for a boolean or
# a list.
_TRUTH = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
_LISTS = frozenset({"tls_versions", "tls_ciphersuites"})
_DRIVERS = frozenset({"mysql", "mariadb", "mysql+mysqlconnector", "mariadb+mysqlconnector"})
CONNECT_SECONDS = 4
READ_SECONDS = 15
LOCK_SECONDS = 5
# The server ends a session that is silent for this long, and its transaction. Otherwise the row locks of a
# frozen process, or of one without a network, would block all others for hours.
SILENT_SECONDS = 20

_SESSION_OVER = error_numbers(ErrorKind.SESSION)
_SESSION = (
    "SET time_zone = '+00:00', innodb_lock_wait_timeout = %s, wait_timeout = %s,"
    " sql_mode = 'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'"
)


def url_of(value: str) -> URL:
    """Return the URL of a database. Raises ValueError, without the password, for an unusable one."""
    if value.count("@") > 1:
        # The parser takes what follows the first one for the host, which logs and the name service get.
        raise ValueError("has more than one @; in a user's name, a password or an option it is written %40")
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
    _typed_options(url)
    return url


def _typed_options(url: URL) -> dict[str, object]:
    """Return the options of the URL's query whose types the driver checks. Raises ValueError."""
    options: dict[str, object] = {}
    for name, value in url.query.items():
        if isinstance(DEFAULT_CONFIGURATION.get(name), bool):
            if str(value).lower() not in _TRUTH:
                raise ValueError(f"{name} must be true or false")
            options[name] = _TRUTH[str(value).lower()]
        elif name in _LISTS:
            options[name] = str(value).split(",")
    return options


def make_engine(
    url: str | URL,
    pool_size: int = 4,
    read_seconds: int = READ_SECONDS,
    silent_seconds: int = SILENT_SECONDS,
    query_seconds: float = 0,
) -> Engine:
    """Return an engine whose sessions are READ COMMITTED, in UTC and strict. It connects on first use.

    `mysql://` and `mariadb://` select Postroad's driver. The client waits at most `read_seconds` for a
    statement, and a transaction may be silent for at most `silent_seconds`. The server itself ends a query
    after `query_seconds` (0: never); on MariaDB any statement. The URL's query may hold options of the driver
    (`unix_socket`, `ssl_ca`, `ssl_verify_identity`).
    """
    url = make_url(url)
    if url.drivername in ("mysql", "mariadb"):
        url = url.set(drivername="mysql+mysqlconnector")
    options = _typed_options(url)
    engine = create_engine(
        url.difference_update_query(options),
        isolation_level="READ COMMITTED",
        # Error texts are logged; the text of a mail must not be.
        hide_parameters=True,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=READ_SECONDS,
        # The pool replaces idle sessions before the server ends them.
        pool_recycle=max(1, silent_seconds * 3 // 4),
        # A Connection ends its own transaction; the pool's ROLLBACK would cost another round trip a call.
        pool_reset_on_return=None,
        connect_args=options
        | {
            "use_pure": False,
            "charset": "utf8mb4",
            "collation": "utf8mb4_general_ci",
            "connection_timeout": CONNECT_SECONDS,
            "read_timeout": read_seconds,
            "write_timeout": read_seconds,
        },
    )
    event.listen(engine, "connect", partial(_begin_session, silent_seconds, query_seconds, StatementLimits()))
    event.listen(engine, "handle_error", _on_error)
    return engine


def _begin_session(
    silent_seconds: int,
    query_seconds: float,
    statements: StatementLimits,
    connection: Any,
    record: ConnectionPoolEntry,
) -> None:
    # The driver pings the server before every statement, at a round trip each. The statement itself shows
    # whether the connection is lost.
    connection.is_connected = lambda: True
    cursor = connection.cursor()
    cursor.execute(_SESSION, (LOCK_SECONDS, silent_seconds))
    cursor.execute("SELECT @@max_allowed_packet, @@version")
    [(max_packet, version)] = cursor.fetchall()
    if query_seconds and "MariaDB" in version:
        cursor.execute("SET max_statement_time = %s", (query_seconds,))
    elif query_seconds:
        cursor.execute("SET max_execution_time = %s", (round(query_seconds * 1000),))
    cursor.close()
    statements.guard(connection, int(max_packet))
    record.info[LIMITS_KEY] = statements


def _on_error(context: ExceptionContext) -> Exception | None:
    error = context.original_exception
    number = getattr(error, "errno", None)
    if number in _SESSION_OVER or (number == PACKET_TOO_LARGE and getattr(error, "sent", True)):
        context.is_disconnect = True
    if context.sqlalchemy_exception is not None or number is None:
        return None
    # The C extension's commit and rollback raise errors that are not DB-API's. SQLAlchemy would neither
    # wrap them nor drop the connection.
    context.is_disconnect = context.is_disconnect or number in SESSION_LOST
    return OperationalError(context.statement, None, error, connection_invalidated=context.is_disconnect)
