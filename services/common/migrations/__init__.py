"""The database's migrations (Alembic), run by `postroad migrate`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, make_url

from services.common.database import engine_of

__all__ = ["VERSION_TABLE", "migrate"]

LOCK_SECONDS = 120
VERSION_TABLE = "postroad_version"


def migrate(url: str | URL, revision: str = "head") -> bool:
    """Bring the database at `url`, which must exist, to `revision`; blocks. Done already: does nothing.

    Returns False, and changes nothing, where a later version of Postroad has migrated it: its tables serve
    this version too, so that going back to it needs no migration.

    One migrates at a time: others wait on a lock of the server's, and raise TimeoutError after two
    minutes. MySQL commits each DDL statement by itself, so every step must bear being done again after
    a migration that was killed halfway. Raises `sqlalchemy.exc.DBAPIError` where the server refuses.
    """
    engine = engine_of(url, pool_size=1, read_seconds=LOCK_SECONDS + 480)
    try:
        with engine.connect() as connection:
            _lock(connection, make_url(url).database or "")
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent))
            config.attributes["connection"] = connection
            if _newer(connection, config):
                return False
            command.upgrade(config, revision)
            connection.commit()
            return True
    finally:
        engine.dispose()  # ends the session, and the lock with it


def _lock(connection: Connection, database: str) -> None:
    # Locks are the whole server's, and their names 64 characters at most.
    name = "postroad.migrate." + hashlib.sha256(database.encode()).hexdigest()[:32]
    if connection.exec_driver_sql("SELECT GET_LOCK(%s, %s)", (name, LOCK_SECONDS)).scalar() != 1:
        raise TimeoutError(f"another migration has held the lock for {LOCK_SECONDS} s")


def _newer(connection: Connection, config: Config) -> bool:
    """Whether the database has had a migration that this version does not know."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    return not known.issuperset(context.get_current_heads())
