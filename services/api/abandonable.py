"""Queries that end when nobody waits for their answer any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.common.database.errors import error_text

__all__ = ["Abandonable", "Abandoned"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

# A KILL QUERY that comes between two statements has no effect, so it is repeated (seconds, times).
_PAUSE, _TRIES = 0.1, 50


class Abandoned(Exception):
    """The query was ended, since nobody waits for it."""


class Abandonable(Generic[R]):
    """`work` on a worker thread, as a query that another thread may abandon."""

    def __init__(self, work: Callable[[Connection], R]) -> None:
        self._work = work
        # Held while a KILL is under way, so that it cannot hit the session's next user.
        self._lock = threading.Lock()
        self._session: int | None = None
        self._abandoned = False
        self._over = threading.Event()

    def __call__(self, connection: Connection) -> R:
        """Return what the work returns. Raises Abandoned, and then drops the session."""
        with self._lock:
            if self._abandoned:
                raise Abandoned
            self._session = getattr(connection.connection.dbapi_connection, "connection_id", None)
        try:
            return self._work(connection)
        finally:
            with self._lock:
                self._session = None
            if self._abandoned:
                # A KILL that came too late could end the session's next statement.
                connection.invalidate()
                raise Abandoned

    def abandon(self) -> None:
        """Have a query that has not begun never begin. `kill` ends one that runs."""
        with self._lock:
            self._abandoned = True

    def note_over(self) -> None:
        """Note that the query is over, so that `kill` ends. Does not block."""
        self._over.set()

    def kill(self, engine: Engine) -> None:
        """End the query's statements until it is over, for some 5 s. Blocks. Logs the database's errors."""
        try:
            for _ in range(_TRIES):
                with self._lock:
                    if self._session is not None:
                        with engine.connect() as connection:
                            connection.exec_driver_sql(f"KILL QUERY {self._session:d}")
                if self._over.wait(_PAUSE):
                    return
        except SQLAlchemyError as error:
            log.warning("an abandoned query may still run", error=error_text(error))
