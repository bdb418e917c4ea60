"""The swap: a shadow table takes the original's name in one step.

A lock keeps all writers from the original. Under the lock the caller brings the shadow table up to date. Then
one atomic RENAME TABLE renames both, and the writers that waited continue with the new table. Readers and
writers find the old table whole or the new one whole, whichever process dies at any time.

MariaDB does not rename a table that the same session has locked. So a second session sends the RENAME and
waits for the lock. A waiting RENAME goes before all other sessions that wait for a table. It waits for one
table at a time, though, in the order of their names, beginning with the original's. With two originals in one
RENAME, a session that waits for the second original would go first. So each shadow table has a RENAME of its
own.

If the first session died, the second would rename too early. A placeholder table prevents that: it has the
name that the RENAME gives to the original. The first session drops it when all is done, and only then
unlocks.

Where a transaction waits for such a lock in a circle, MySQL ends it with a deadlock (1213). `transaction`
repeats it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy import Connection, Engine
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
)

from services.common.database.errors import is_conflict
from services.common.operations.rebuild.shadow_table import ShadowTable

__all__ = ["TableBusy", "swap"]

# While a session waits for the lock (seconds), all later ones wait behind it. So it waits a short time and
# pauses.
_LOCK_WAIT, _PAUSE, _TRIES = 2, 1.0, 30
# How long the second session may take until it waits for the lock (seconds).
_RENAME_WAITS = 5.0


class TableBusy(TimeoutError):
    """A table could not be locked: other sessions read or write it without a pause."""


def swap(engine: Engine, table: ShadowTable, bring_up_to_date: Callable[[Connection], None]) -> None:
    """Put a shadow table in its original's place. Blocks.

    `bring_up_to_date` gets the only connection that can write the original and `outbox` meanwhile. All other
    sessions wait for it, so it must be quick. If it raises, nothing is swapped. The original keeps its rows
    under the name `table.retired`. Raises TableBusy and `sqlalchemy.exc.DBAPIError`.
    """
    with engine.connect() as connection:
        session = connection.execution_options(isolation_level="AUTOCOMMIT")
        session.exec_driver_sql(f"DROP TABLE IF EXISTS {table.retired}")
        session.exec_driver_sql(f"CREATE TABLE {table.retired} LIKE {table.original}")
        try:
            _lock(session, table)
            renaming = _Renaming(engine, table)
            try:
                renaming.start()
                bring_up_to_date(session)
                _await_rename(session, renaming)
                session.exec_driver_sql(f"DROP TABLE {table.retired}")
            finally:
                session.exec_driver_sql("UNLOCK TABLES")
                renaming.join()
            if renaming.error is not None:
                raise renaming.error
        finally:
            # The session's lock_wait_timeout is no longer the pool's.
            connection.invalidate()


def _lock(session: Connection, table: ShadowTable) -> None:
    tables = ", ".join(f"{name} WRITE" for name in (table.original, table.name, table.retired))
    session.exec_driver_sql(f"SET lock_wait_timeout = {_LOCK_WAIT}")
    lock = Retrying(
        retry=retry_if_exception(is_conflict), stop=stop_after_attempt(_TRIES), wait=wait_fixed(_PAUSE)
    )
    try:
        lock(session.exec_driver_sql, f"LOCK TABLES {tables}, outbox READ")
    except RetryError:
        raise TableBusy(
            f"{table.original} could not be locked: something reads or writes it without a pause"
        ) from None


class _Renaming(threading.Thread):
    """The second session's RENAME. `error` is what it raised, if anything."""

    def __init__(self, engine: Engine, table: ShadowTable) -> None:
        super().__init__(name="rename")
        self._rename = f"RENAME TABLE {table.original} TO {table.retired}, {table.name} TO {table.original}"
        self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.session = int(self._connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._connection.exec_driver_sql(self._rename)
        except BaseException as error:
            self.error = error
        finally:
            self._connection.close()


def _await_rename(session: Connection, renaming: _Renaming) -> None:
    """Return once the second session waits for the lock. Raises its error, and TableBusy after a while."""

    def waits() -> bool:
        if renaming.error is not None:
            raise renaming.error
        states = {row[0]: row[6] for row in session.exec_driver_sql("SHOW PROCESSLIST")}
        return "metadata lock" in (states.get(renaming.session) or "")

    poll = Retrying(
        retry=retry_if_result(lambda waiting: not waiting),
        stop=stop_after_delay(_RENAME_WAITS),
        wait=wait_fixed(0.005),
    )
    try:
        poll(waits)
    except RetryError:
        raise TableBusy("the session that renames the tables does not wait for its lock") from None
