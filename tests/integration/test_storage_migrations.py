"""The migrations make what schema.py says, however often and by however many they are run."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from services.common.database import engine_of
from services.common.migrations import migrate
from services.common.schema import metadata
from tests import forked
from tests.stack import Infra


def differences(url: str) -> list[object]:
    engine = engine_of(url)
    try:
        with engine.connect() as connection:
            options = {"version_table": "postroad_version", "compare_type": True}
            context = MigrationContext.configure(connection, opts=options)
            return list(compare_metadata(context, metadata))
    finally:
        engine.dispose()


def execute(url: str, *statements: str) -> None:
    engine = engine_of(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def test_migrate_makes_the_tables_of_the_schema(server: Infra) -> None:
    url = server.new_database()
    assert differences(url)
    assert migrate(url) is True
    assert differences(url) == []
    assert migrate(url) is True
    assert differences(url) == []


def test_many_may_migrate_at_once(server: Infra) -> None:
    url = server.new_database()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(migrate, [url] * 6))
    assert differences(url) == []


def test_a_migration_that_died_halfway_is_finished(database_url: str) -> None:
    execute(database_url, "DROP TABLE outbox, deliveries", "DELETE FROM postroad_version")
    migrate(database_url)
    assert differences(database_url) == []


def test_a_database_that_a_later_version_has_migrated_is_left_alone(database_url: str) -> None:
    execute(
        database_url,
        "UPDATE postroad_version SET version_num = '9999'",
        "ALTER TABLE tasks ADD COLUMN later INT NULL",
    )
    before = str(differences(database_url))
    assert "later" in before
    assert migrate(database_url) is False
    assert str(differences(database_url)) == before
    done = postroad(database_url, "migrate")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The database is newer than this version")


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0005"])
def test_an_older_database_becomes_the_same(server: Infra, revision: str) -> None:
    url = server.new_database()
    migrate(url, revision)
    assert differences(url)
    values = "status, version, epoch, attempts, reason, reply, message_id, updated_at) VALUES"
    execute(url, f"INSERT INTO tasks (id, {values} ('x', 'failed', 1, 0, 0, '', '', '', '2026-01-01')")
    migrate(url)
    assert differences(url) == []
    # As after a migration that was killed before it was noted.
    execute(url, f"UPDATE postroad_version SET version_num = '{revision}'")
    migrate(url)
    assert differences(url) == []


def test_a_column_that_differs_would_be_noticed(database_url: str) -> None:
    execute(database_url, "ALTER TABLE tasks MODIFY reply VARCHAR(10) NOT NULL")
    assert differences(database_url)


def test_a_database_that_is_not_there_is_an_error(server: Infra) -> None:
    url = make_url(server.database_url).set(database="nowhere_at_all")
    with pytest.raises(DBAPIError, match="nowhere_at_all"):
        migrate(url)


def postroad(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POSTROAD_DATABASE_URL": url}
    return subprocess.CompletedProcess(arguments, *forked.run("services.cli", arguments, environment))


def test_the_command_migrates(server: Infra) -> None:
    url = server.new_database()
    done = postroad(url, "migrate")
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr
    assert differences(url) == []


def test_the_command_tells_apart_what_is_away_and_what_is_wrong(server: Infra) -> None:
    away = postroad("mysql://postroad@127.0.0.1:1/postroad", "migrate")
    assert (away.returncode, away.stdout) == (5, "")
    assert "Can't connect" in away.stderr
    wrong = postroad(str(make_url(server.database_url).set(database="nowhere")), "migrate")
    assert wrong.returncode == 4, "the user has no right to a database that is not there"
    assert "Traceback" not in wrong.stderr
