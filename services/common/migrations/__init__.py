"""The database's migrations (Alembic), run by `postroad migrate`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, make_url

from services.common.database import engine_of

__all__ = ["migrate"]

LOCK_SECONDS = 120


def migrate(url: str | URL, revision: str = "head") -> None:
    """Bring the database at `url`, which must exist, to `revision`; blocks. Done already: does nothing.

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
            command.upgrade(config, revision)
            connection.commit()
    finally:
        engine.dispose()  # ends the session, and the lock with it


def _lock(connection: Connection, database: str) -> None:
    # Locks are the whole server's, and their names 64 characters at most.
    name = "postroad.migrate." + hashlib.sha256(database.encode()).hexdigest()[:32]
    if connection.exec_driver_sql("SELECT GET_LOCK(%s, %s)", (name, LOCK_SECONDS)).scalar() != 1:
        raise TimeoutError(f"another migration has held the lock for {LOCK_SECONDS} s")
