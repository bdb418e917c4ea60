"""The database's errors: which ones pass by themselves, and which ones are caused by a value.

One table has the codes of errors that pass, each with its reason and source. For any other error the
statement, its data or the set-up is at fault, and a retry does not help.

Sources, as the rows name them:

- `MySQL server`, `MySQL client`, `MySQL global`: the chapters "Server Error Message Reference", "Client Error
  Message Reference" and "Global Error Message Reference" of the MySQL Error Reference
  (dev.mysql.com/doc/mysql-errors/).
- `MySQL manual 20.x`: the section of the MySQL 8.4 Reference Manual (Group Replication).
- `MariaDB`: the MariaDB Error Code Reference (mariadb.com/docs/server/reference/error-codes).
- `Galera`: the Galera Cluster documentation (galeracluster.com/library/).
- `ProxySQL`: ProxySQL Error Codes (proxysql.com/documentation/error-codes).

From 1900 on, MySQL and MariaDB sometimes use one number for different errors; each row names its server.
The other server's error of that number cannot happen to Postroad's statements.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, TimeoutError

from services.common.database.statement_size import StatementTooLong

__all__ = [
    "ERRORS",
    "TRANSIENT",
    "ErrorCode",
    "ErrorKind",
    "error_numbers",
    "error_text",
    "is_conflict",
    "is_database_fault",
    "is_session_lost",
    "is_too_long",
    "is_transient",
]


class ErrorKind(Enum):
    """What a retry of the statement needs."""

    CONFLICT = "conflict"
    """Nothing: another transaction came first, and the server rolled this one back."""
    SESSION = "session"
    """A new session: this one is over, or its server cannot be used for now."""
    SERVER = "server"
    """Time: the server, its cluster or its proxy is busy, full or in a failover."""
    CLIENT = "client"
    """A new session: the client did not reach the server, or lost it."""


class ErrorCode(NamedTuple):
    """An error that passes."""

    number: int
    name: str
    kind: ErrorKind
    why: str
    source: str


_CONFLICT, _SESSION, _SERVER, _CLIENT = ErrorKind

ERRORS = tuple(
    ErrorCode(*row)
    for row in (
        # --- a conflict with another transaction ---
        (1020, "ER_CHECKREAD", _CONFLICT, "the row has changed since it was read", "MariaDB"),
        (1205, "ER_LOCK_WAIT_TIMEOUT", _CONFLICT, "another transaction holds the lock", "MySQL server"),
        (1213, "ER_LOCK_DEADLOCK", _CONFLICT, "a deadlock, or Galera's certification failed", "MySQL server"),
        (1412, "ER_TABLE_DEF_CHANGED", _CONFLICT, "a migration has just changed the table", "MySQL server"),
        (1689, "ER_LOCK_ABORTED", _CONFLICT, "an exclusive lock came before this wait", "MySQL server"),
        (3058, "ER_USER_LOCK_DEADLOCK", _CONFLICT, "a deadlock of GET_LOCK", "MySQL server"),
        (3101, "ER_TRANSACTION_ROLLBACK_DURING_COMMIT", _CONFLICT,
         "another member of the group has committed the same row first", "MySQL manual 20.7.4.2"),
        (3572, "ER_LOCK_NOWAIT", _CONFLICT, "another transaction holds the lock", "MySQL server"),
        # --- the session is over, or cannot be used ---
        (1047, "ER_UNKNOWN_COM_ERROR", _SESSION, "the node is no part of the primary component", "Galera"),
        (1053, "ER_SERVER_SHUTDOWN", _SESSION, "the server shuts down", "MySQL server"),
        (1080, "ER_FORCING_CLOSE", _SESSION, "the server closes the session", "MySQL server"),
        (1152, "ER_ABORTING_CONNECTION", _SESSION, "the server gives the session up", "MySQL server"),
        (1154, "ER_NET_READ_ERROR_FROM_PIPE", _SESSION, "the network failed", "MySQL server"),
        (1155, "ER_NET_FCNTL_ERROR", _SESSION, "the network failed", "MySQL server"),
        (1156, "ER_NET_PACKETS_OUT_OF_ORDER", _SESSION, "the network failed", "MySQL server"),
        (1157, "ER_NET_UNCOMPRESS_ERROR", _SESSION, "the network failed", "MySQL server"),
        (1158, "ER_NET_READ_ERROR", _SESSION, "the network failed", "MySQL server"),
        (1159, "ER_NET_READ_INTERRUPTED", _SESSION, "the server waited too long to read", "MySQL server"),
        (1160, "ER_NET_ERROR_ON_WRITE", _SESSION, "the network failed", "MySQL server"),
        (1161, "ER_NET_WRITE_INTERRUPTED", _SESSION, "the server waited too long to write", "MySQL server"),
        (1184, "ER_NEW_ABORTING_CONNECTION", _SESSION, "the server gives the session up", "MySQL server"),
        (1290, "ER_OPTION_PREVENTS_STATEMENT", _SESSION, "read-only: no primary any more", "MySQL server"),
        (1792, "ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION", _SESSION,
         "transactions are read-only there: no primary any more", "MySQL server"),
        (1836, "ER_READ_ONLY_MODE", _SESSION, "read-only: no primary any more", "MySQL server"),
        (1874, "ER_INNODB_READ_ONLY", _SESSION, "the server is being recovered", "MySQL server"),
        (1927, "ER_CONNECTION_KILLED", _SESSION, "the session was killed", "MariaDB"),
        (3032, "ER_SERVER_OFFLINE_MODE", _SESSION, "the server is taken out of use", "MySQL server"),
        (3168, "ER_SERVER_ISNT_AVAILABLE", _SESSION, "the server starts or ends", "MySQL server"),
        (3169, "ER_SESSION_WAS_KILLED", _SESSION, "the session was killed", "MySQL server"),
        (4031, "ER_CLIENT_INTERACTION_TIMEOUT", _SESSION, "the session was idle too long", "MySQL server"),
        # --- no resources left ---
        (3, "EE_WRITE", _SERVER, "the disk for temporary files is full", "MySQL global"),
        (5, "EE_OUTOFMEMORY", _SERVER, "out of memory", "MySQL global"),
        (20, "EE_DISK_FULL", _SERVER, "the disk is full", "MySQL global"),
        (1021, "ER_DISK_FULL", _SERVER, "the disk is full", "MySQL server"),
        (1026, "ER_ERROR_ON_WRITE", _SERVER, "the disk is full", "MySQL server"),
        (1037, "ER_OUTOFMEMORY", _SERVER, "out of memory", "MySQL server"),
        (1041, "ER_OUT_OF_RESOURCES", _SERVER, "out of memory", "MySQL server"),
        (1114, "ER_RECORD_FILE_FULL", _SERVER, "the disk is full", "MySQL server"),
        (1135, "ER_CANT_CREATE_THREAD", _SERVER, "out of threads", "MySQL server"),
        (1206, "ER_LOCK_TABLE_FULL", _SERVER, "out of memory for locks", "MySQL server"),
        (1637, "ER_TOO_MANY_CONCURRENT_TRXS", _SERVER, "too many transactions at once", "MySQL server"),
        # --- too many sessions, or a failed handshake ---
        (1040, "ER_CON_COUNT_ERROR", _SERVER, "too many sessions, here or at a proxy", "MySQL server"),
        (1042, "ER_BAD_HOST_ERROR", _SERVER, "the server's name service does not answer", "MySQL server"),
        (1043, "ER_HANDSHAKE_ERROR", _SERVER, "the handshake was cut short", "MySQL server"),
        (1129, "ER_HOST_IS_BLOCKED", _SERVER, "blocked until an operator flushes the hosts", "MySQL server"),
        (1203, "ER_TOO_MANY_USER_CONNECTIONS", _SERVER, "too many sessions of this user", "MySQL server"),
        (1226, "ER_USER_LIMIT_REACHED", _SERVER, "the user's hourly allowance is used up", "MySQL server"),
        # --- an aborted statement or commit ---
        (1180, "ER_ERROR_DURING_COMMIT", _SERVER, "the commit failed and was undone", "MySQL server"),
        (1297, "ER_GET_TEMPORARY_ERRMSG", _SERVER, "a temporary error of the engine", "MySQL server"),
        (1317, "ER_QUERY_INTERRUPTED", _SERVER, "somebody interrupted the statement", "MySQL server"),
        (1964, "ER_PRIOR_COMMIT_FAILED", _SERVER, "a commit before this one failed", "MariaDB"),
        (1969, "ER_STATEMENT_TIMEOUT", _SERVER, "max_statement_time is over", "MariaDB"),
        (3024, "ER_QUERY_TIMEOUT", _SERVER, "max_execution_time is over", "MySQL server"),
        # --- a group in a failover ---
        (3100, "ER_RUN_HOOK_ERROR", _SERVER, "the member left its group, or is in error", "MySQL server"),
        (3781, "ER_GR_HOLD_WAIT_TIMEOUT", _SERVER, "a new primary is not ready", "MySQL manual 20.5.3.2"),
        (3782, "ER_GR_HOLD_KILLED", _SERVER, "the wait for a new primary was ended", "MySQL server"),
        (3783, "ER_GR_HOLD_MEMBER_STATUS_ERROR", _SERVER, "the member is in error", "MySQL server"),
        (3796, "ER_GRP_TRX_CONSISTENCY_NOT_ALLOWED", _SERVER, "the member recovers", "MySQL manual 20.5.3.2"),
        (3797, "ER_GRP_TRX_CONSISTENCY_BEFORE", _SERVER, "the member is behind its group", "MySQL server"),
        (3798, "ER_GRP_TRX_CONSISTENCY_AFTER_ON_TRX_BEGIN", _SERVER,
         "the member is behind its group", "MySQL server"),
        # --- a proxy without a server ---
        (9001, "Max connect timeout", _SERVER, "no server of the hostgroup was reached in time", "ProxySQL"),
        (9002, "Max connect failure", _SERVER, "no server of the hostgroup was reached", "ProxySQL"),
        (9004, "Backend Offline Detected", _SERVER, "the server was taken out of use", "ProxySQL"),
        # --- errors of the client ---
        (2001, "CR_SOCKET_CREATE_ERROR", _CLIENT, "no socket to be had", "MySQL client"),
        (2002, "CR_CONNECTION_ERROR", _CLIENT, "nobody listens on the socket", "MySQL client"),
        (2003, "CR_CONN_HOST_ERROR", _CLIENT, "nobody listens on the port", "MySQL client"),
        (2004, "CR_IPSOCK_ERROR", _CLIENT, "no socket to be had", "MySQL client"),
        (2005, "CR_UNKNOWN_HOST", _CLIENT, "the name service does not know the server", "MySQL client"),
        (2006, "CR_SERVER_GONE_ERROR", _CLIENT, "the session was closed", "MySQL client"),
        (2008, "CR_OUT_OF_MEMORY", _CLIENT, "out of memory", "MySQL client"),
        (2012, "CR_SERVER_HANDSHAKE_ERR", _CLIENT, "the handshake was cut short", "MySQL client"),
        (2013, "CR_SERVER_LOST", _CLIENT, "the session was lost, or no answer came in time", "MySQL client"),
        (2026, "CR_SSL_CONNECTION_ERROR", _CLIENT, "the TLS handshake was cut short", "MySQL client"),
        (2027, "CR_MALFORMED_PACKET", _CLIENT, "the answer was cut short", "MySQL client"),
        (2045, "CR_SHARED_MEMORY_CONNECT_ABANDONED_ERROR", _CLIENT, "the session was lost", "MySQL client"),
        (2048, "CR_INVALID_CONN_HANDLE", _CLIENT, "the session was closed", "MySQL client"),
        (2055, "CR_SERVER_LOST_EXTENDED", _CLIENT, "the session was lost", "MySQL client"),
    )
)  # fmt: skip

TRANSIENT = frozenset(code.number for code in ERRORS)
"""The numbers of all errors that pass."""


def error_numbers(kind: ErrorKind) -> frozenset[int]:
    """Return the numbers of one kind of errors."""
    return frozenset(code.number for code in ERRORS if code.kind is kind)


_CONFLICTS = error_numbers(ErrorKind.CONFLICT)


def _number(error: BaseException) -> int | None:
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "errno", None)


def is_conflict(error: BaseException) -> bool:
    """Return whether the transaction conflicted with another one, so that it may be repeated at once."""
    return _number(error) in _CONFLICTS


def error_text(error: BaseException) -> str:
    """Return the database's own text of an error, without the statement that SQLAlchemy adds."""
    return str(getattr(error, "orig", error))


def is_database_fault(error: BaseException) -> bool:
    """Return whether the database or its set-up is at fault, and no value.

    That includes a refused login, a missing table and the like. Until an operator has repaired those, no task
    may fail because of them.
    """
    if isinstance(error, DataError | IntegrityError):
        return False
    return isinstance(error, DBAPIError) or is_transient(error)


def is_too_long(error: BaseException) -> bool:
    """Return whether the statement has more bytes than the database takes, so that a retry does not help."""
    return isinstance(error, DBAPIError) and isinstance(error.orig, StatementTooLong)


def is_session_lost(error: BaseException) -> bool:
    """Return whether the session is over, and another one may well execute the statement."""
    return isinstance(error, DBAPIError) and error.connection_invalidated and not is_too_long(error)


def is_transient(error: BaseException) -> bool:
    """Return whether the statement may well succeed later: the database is away, full, busy or restarting."""
    return is_session_lost(error) or isinstance(error, TimeoutError) or _number(error) in TRANSIENT
