"""The swap: a rebuilt table takes the original's name in one moment, in which nothing else moves.

Whoever writes the original waits while it is locked. Under the lock the caller brings the rebuilt table up to
what the original says; then both are renamed in one atomic RENAME TABLE, and all who waited go on with the
new table. A reader or writer finds the old one whole or the new one whole, whatever dies when.

MariaDB renames no table that its own session has locked, so a second session asks for it, and waits for the
lock. A waiting RENAME comes before all others that wait for a table; but it waits for one table at a time, in
the order of their names, and those of a pair begin with the original's. Two originals in one RENAME would let
through who waits for the second one, so each pair has its own.

Were the first session to die, the second would rename too early. It cannot, because a table stands in the way
under the name that it would give to the original. The first session drops that one when all is done, and only
then lets go.

MySQL ends a transaction that waits for such a lock in a circle with a deadlock (1213), which is done again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from services.cli.rebuild.pairs import Pair
from services.common.database.errors import is_conflict

__all__ = ["Busy", "swap"]

# A wait for the lock holds up all who come after it (seconds), so it is short, and there is a pause after it.
_LOCK_WAIT, _PAUSE, _TRIES = 2, 1.0, 30
# How long the second session may take to stand in the queue (seconds).
_QUEUED = 5.0


class Busy(TimeoutError):
    """A table could not be locked: something reads or writes them without a pause."""


def swap(engine: Engine, pair: Pair, bring_up: Callable[[Connection], None]) -> None:
    """Put a rebuilt table in the original's place. Blocks.

    `bring_up` is called while nobody else can write the original and `outbox`, with the only connection that
    can; all wait for it, so it must be quick. Where it raises, nothing is swapped. The original is left under
    its other name. Raises Busy and `sqlalchemy.exc.DBAPIError`.
    """
    with engine.connect() as connection:
        session = connection.execution_options(isolation_level="AUTOCOMMIT")
        session.exec_driver_sql(f"DROP TABLE IF EXISTS {pair.before}")
        session.exec_driver_sql(f"CREATE TABLE {pair.before} LIKE {pair.name}")
        try:
            _lock(session, pair)
            renaming = _Renaming(engine, pair)
            try:
                renaming.start()
                bring_up(session)
                _await_queued(session, renaming)
                session.exec_driver_sql(f"DROP TABLE {pair.before}")
            finally:
                session.exec_driver_sql("UNLOCK TABLES")
                renaming.join()
            if renaming.error is not None:
                raise renaming.error
        finally:
            # The session goes back to its pool with another patience than the others'.
            connection.invalidate()


def _lock(session: Connection, pair: Pair) -> None:
    tables = ", ".join(f"{name} WRITE" for name in (pair.name, pair.shadow, pair.before))
    session.exec_driver_sql(f"SET lock_wait_timeout = {_LOCK_WAIT}")
    for _ in range(_TRIES):
        try:
            session.exec_driver_sql(f"LOCK TABLES {tables}, outbox READ")
            return
        except DBAPIError as error:
            if not is_conflict(error):
                raise
        time.sleep(_PAUSE)
    raise Busy(f"{pair.name} could not be locked: something reads or writes it without a pause")


class _Renaming(threading.Thread):
    """The second session's RENAME. `error` is what came of it."""

    def __init__(self, engine: Engine, pair: Pair) -> None:
        super().__init__(name="rename")
        self._rename = f"RENAME TABLE {pair.name} TO {pair.before}, {pair.shadow} TO {pair.name}"
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


def _await_queued(session: Connection, renaming: _Renaming) -> None:
    deadline = time.monotonic() + _QUEUED
    while renaming.error is None:
        states = {row[0]: row[6] for row in session.exec_driver_sql("SHOW PROCESSLIST")}
        if "metadata lock" in (states.get(renaming.session) or ""):
            return
        if time.monotonic() > deadline:
            raise Busy("the renaming does not come to wait for its lock")
        time.sleep(0.005)
    raise renaming.error
