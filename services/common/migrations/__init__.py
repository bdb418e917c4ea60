"""The database's migrations (Alembic), run by `postroad migrate`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from time import monotonic, sleep

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, make_url
from sqlalchemy.exc import DBAPIError

from services.common.database.engine import make_engine
from services.common.database.errors import is_conflict

__all__ = ["VERSION_TABLE", "migrate"]

LOCK_SECONDS = 120
VERSION_TABLE = "postroad_version"
# An ALTER that waits for a table holds up all who come after it (seconds), so it waits briefly, with pauses.
_TABLE_WAIT, _PAUSE = 2, 1.0
# How long it is tried again after it first got no lock (seconds): less than others wait for the migration.
_PATIENCE = 60.0
# An index of a large table takes hours. The driver would give up alone: the server goes on (seconds).
_READ_SECONDS = 24 * 3600
# The oldest transaction first. The user needs PROCESS to see those of others.
_OPEN = """
    SELECT p.id, p.user FROM information_schema.innodb_trx AS t
    JOIN information_schema.processlist AS p ON p.id = t.trx_mysql_thread_id
    WHERE p.id <> CONNECTION_ID() AND (p.db = DATABASE() OR p.db IS NULL)
    ORDER BY t.trx_started LIMIT 1
"""


def migrate(url: str | URL, revision: str = "head") -> bool:
    """Bring the database at `url`, which must exist, to `revision`; blocks. Done already: does nothing.

    Returns False, and changes nothing, where a later version of Postroad has migrated it: its tables serve
    this version too, so that going back to it needs no migration.

    One migrates at a time: others wait on a lock of the server's, and raise TimeoutError after two
    minutes. A statement waits 2 s for a table that an open transaction uses, and is tried again for a minute;
    then TimeoutError says how to end that transaction. MySQL commits each DDL statement by itself, so every
    step must bear being done again after a migration that was killed halfway. Raises
    `sqlalchemy.exc.DBAPIError` where the server refuses.
    """
    engine = make_engine(url, pool_size=1, read_seconds=_READ_SECONDS)
    try:
        with engine.connect() as connection:
            _lock(connection, make_url(url).database or "")
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent))
            config.attributes["connection"] = connection
            connection.exec_driver_sql(f"SET lock_wait_timeout = {_TABLE_WAIT}")
            return _upgraded(connection, config, revision)
    finally:
        engine.dispose()  # ends the session, and the lock with it


def _lock(connection: Connection, database: str) -> None:
    # Locks are the whole server's, and their names 64 characters at most.
    name = "postroad.migrate." + hashlib.sha256(database.encode()).hexdigest()[:32]
    if connection.exec_driver_sql("SELECT GET_LOCK(%s, %s)", (name, LOCK_SECONDS)).scalar() != 1:
        raise TimeoutError(f"another migration has held the lock for {LOCK_SECONDS} s")


def _upgraded(connection: Connection, config: Config, revision: str) -> bool:
    """Return False where the database is newer; raise TimeoutError where a table stays in use."""
    deadline = 0.0
    while True:
        try:
            if _newer(connection, config):
                return False
            command.upgrade(config, revision)
            connection.commit()
            return True
        except DBAPIError as error:
            if not is_conflict(error):
                raise
            connection.rollback()
            # From the first refusal on: an index may have taken an hour before its last step got no lock.
            deadline = deadline or monotonic() + _PATIENCE
            if monotonic() >= deadline:
                raise TimeoutError(_in_use(connection, error)) from error
        sleep(_PAUSE)


def _in_use(connection: Connection, error: DBAPIError) -> str:
    try:
        found = connection.exec_driver_sql(_OPEN).first()
    except DBAPIError:
        found = None
    if found is None:
        which = "find it in information_schema.innodb_trx, as a user with PROCESS, and end it with KILL"
    else:
        which = f"the oldest is that of session {found[0]}, user {found[1]}; end it (KILL {found[0]})"
    statement = " ".join((error.statement or "").split())[:80]
    return f"a transaction keeps a table from being changed ({statement}): {which}, then migrate again"


def _newer(connection: Connection, config: Config) -> bool:
    """Whether the database has had a migration that this version does not know."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    return not known.issuperset(context.get_current_heads())
