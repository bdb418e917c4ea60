"""The database's migrations (Alembic), run by `postroad migrate`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from time import monotonic, sleep

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, inspect, make_url
from sqlalchemy.exc import DBAPIError

from services.common.database.engine import make_engine
from services.common.database.errors import is_conflict
from services.common.database.tables import metadata

__all__ = ["VERSION_TABLE", "create_tables", "migrate", "missing_tables"]

LOCK_SECONDS = 120
VERSION_TABLE = "postroad_version"
# An ALTER that waits for a table blocks all later statements on it. So it waits briefly (seconds), with
# pauses.
_TABLE_WAIT, _PAUSE = 2, 1.0
# After its first refusal a migration repeats for this long (seconds): less than others wait for its lock.
_CONFLICT_TIMEOUT = 60.0
# An index of a large table takes hours. A shorter read timeout would end the client alone (seconds).
_READ_SECONDS = 24 * 3600
# The oldest open transaction. Without PROCESS the user sees only its own.
_OPEN = """
    SELECT p.id, p.user FROM information_schema.innodb_trx AS t
    JOIN information_schema.processlist AS p ON p.id = t.trx_mysql_thread_id
    WHERE p.id <> CONNECTION_ID() AND (p.db = DATABASE() OR p.db IS NULL)
    ORDER BY t.trx_started LIMIT 1
"""


def migrate(url: str | URL, revision: str = "head") -> bool:
    """Migrate the existing database at `url` to `revision`, unless it is there already. Blocks.

    Returns False, without a change, if a later version of Postroad has migrated the database. Its tables
    serve this version too, so going back to this version needs no migration.

    One process migrates at a time: others wait for a lock of the server, and raise TimeoutError after two
    minutes. A statement waits 2 s for a table that an open transaction uses, and is repeated for a minute.
    Then TimeoutError says how to end that transaction. MySQL commits each DDL statement by itself, so every
    step must be repeatable after a migration that was killed halfway. Raises `sqlalchemy.exc.DBAPIError` if
    the server refuses.
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


def missing_tables(url: str | URL) -> list[str]:
    """Return the tables that a migrated database lacks, because somebody dropped them. Blocks.

    Raises `sqlalchemy.exc.DBAPIError`.
    """
    engine = make_engine(url, pool_size=1)
    try:
        with engine.connect() as connection:
            there = set(inspect(connection).get_table_names())
    finally:
        engine.dispose()
    return [name for name in metadata.tables if name not in there]


def create_tables(url: str | URL, names: Collection[str]) -> None:
    """Create these tables of a migrated database, empty, unless they exist. Blocks.

    Raises TimeoutError if another migration runs, and `sqlalchemy.exc.DBAPIError`.
    """
    engine = make_engine(url, pool_size=1)
    try:
        with engine.connect() as connection:
            _lock(connection, make_url(url).database or "")
            metadata.create_all(connection, tables=[metadata.tables[name] for name in names])
            connection.commit()
    finally:
        engine.dispose()


def _lock(connection: Connection, database: str) -> None:
    # Locks belong to the whole server; a name has at most 64 characters.
    name = "postroad.migrate." + hashlib.sha256(database.encode()).hexdigest()[:32]
    if connection.exec_driver_sql("SELECT GET_LOCK(%s, %s)", (name, LOCK_SECONDS)).scalar() != 1:
        raise TimeoutError(f"another migration has held the lock for {LOCK_SECONDS} s")


def _upgraded(connection: Connection, config: Config, revision: str) -> bool:
    """Return False if the database is newer. Raise TimeoutError if a table stays in use."""
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
            # Counted from the first refusal: an index may take an hour before its last step gets no lock.
            deadline = deadline or monotonic() + _CONFLICT_TIMEOUT
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
    """Return whether the database had a migration that this version does not know."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    return not known.issuperset(context.get_current_heads())
