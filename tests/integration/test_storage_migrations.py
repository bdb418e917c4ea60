"""The migrations create the tables of database/tables.py, however often they run, also several at once."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, make_url
from sqlalchemy.exc import DBAPIError

from services.cli.errors import UNAVAILABLE, explain
from services.common import migrations
from services.common.database.engine import make_engine
from services.common.database.tables import metadata
from services.common.migrations import migrate
from tests import forked
from tests.api_process import eventually
from tests.forms import by_form
from tests.stack import Infra


def differences(url: str) -> list[object]:
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            options = {"version_table": "postroad_version", "compare_type": True}
            context = MigrationContext.configure(connection, opts=options)
            return list(compare_metadata(context, metadata))
    finally:
        engine.dispose()


def execute(url: str, *statements: str) -> None:
    engine = make_engine(url)
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
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [url] * 4))
    assert differences(url) == []


def test_a_migration_that_was_killed_halfway_is_finished(database_url: str) -> None:
    execute(database_url, "DROP TABLE outbox, deliveries", "DELETE FROM postroad_version")
    migrate(database_url)
    assert differences(database_url) == []


def test_a_database_of_a_later_version_is_not_changed(database_url: str) -> None:
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


@pytest.mark.parametrize("revision", by_form(("0001", "0005"), ("0001", "0002", "0003", "0005")))
def test_an_older_database_becomes_the_same(server: Infra, revision: str) -> None:
    url = server.new_database()
    migrate(url, revision)
    assert differences(url)
    values = "status, version, epoch, attempts, reason, reply, message_id, updated_at) VALUES"
    execute(url, f"INSERT INTO tasks (id, {values} ('x', 'failed', 1, 0, 0, '', '', '', '2026-01-01')")
    migrate(url)
    assert differences(url) == []
    # As after a migration that was killed before its revision was stored.
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


def test_the_command_creates_dropped_tables(database_url: str) -> None:
    execute(database_url, "DROP TABLE task_events, topic_ids")
    done = postroad(database_url, "migrate")
    created = "created the missing table {}, empty; see Rebuilding in docs/operations.md\n"
    expected = created.format("task_events") + created.format("topic_ids") + "The database is up to date.\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert differences(database_url) == []


@pytest.mark.parametrize(("table", "services"), [("deliveries", "senders"), ("tasks", "apis")])
def test_the_command_asks_before_services_could_send_twice(
    database_url: str, table: str, services: str
) -> None:
    execute(database_url, f"DROP TABLE {table}")
    asking = postroad(database_url, "migrate")
    assert (asking.returncode, asking.stdout) == (2, "")
    assert f"Stop the {services}" in asking.stderr
    assert differences(database_url)
    assert postroad(database_url, "migrate", "--yes").returncode == 0
    assert differences(database_url) == []


def test_the_command_tells_an_absent_database_from_a_wrong_one(server: Infra) -> None:
    away = postroad("mysql://postroad@127.0.0.1:1/postroad", "migrate")
    assert (away.returncode, away.stdout) == (5, "")
    assert "Can't connect" in away.stderr
    wrong = postroad(str(make_url(server.database_url).set(database="nowhere")), "migrate")
    assert wrong.returncode == 4, "the user has no right to a database that is not there"
    assert "Traceback" not in wrong.stderr


@pytest.fixture
def reader(server: Infra, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """A transaction that has read a table of the next migration, and stays open."""
    monkeypatch.setattr(migrations, "_TABLE_WAIT", 1, raising=False)
    url = server.new_database()
    migrate(url, "0005")
    engine = make_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT COUNT(*) FROM outbox").all()
        yield connection
    engine.dispose()


def database_of(connection: Connection) -> str:
    return connection.engine.url.render_as_string(hide_password=False)


def test_a_table_in_use_ends_the_migration_with_the_transactions_name(
    reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_CONFLICT_TIMEOUT", 0.0, raising=False)
    [(session,)] = reader.exec_driver_sql("SELECT CONNECTION_ID()").all()
    with pytest.raises(
        TimeoutError, match=rf"ALTER TABLE outbox .* session {session}, .*KILL {session}\b"
    ) as caught:
        migrate(database_of(reader))
    failure = explain(caught.value)
    assert failure is not None
    assert failure.code == UNAVAILABLE
    # No session of the server still waits for the table or holds the migration's lock.
    database = reader.engine.url.database
    eventually(
        lambda: (
            [row[0] for row in reader.exec_driver_sql("SHOW PROCESSLIST") if row[3] == database] == [session]
        )
    )
    reader.rollback()
    assert migrate(database_of(reader)) is True


def test_others_use_the_table_between_the_tries_of_a_migration(
    reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        execute(database_of(reader), "DELETE FROM outbox")
        if len(waits) == 2:
            reader.rollback()

    monkeypatch.setattr(migrations, "sleep", pause, raising=False)
    assert migrate(database_of(reader)) is True
    assert len(waits) == 2
    assert differences(database_of(reader)) == []


def test_a_user_who_may_not_see_transactions_reads_where_they_are(
    reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_CONFLICT_TIMEOUT", 0.0, raising=False)
    database, user = reader.engine.url.database, f"u{secrets.token_hex(6)}"
    execute(
        database_of(reader),
        f"CREATE USER '{user}'@'%%' IDENTIFIED BY 'password of a test'",
        f"GRANT ALL ON {database}.* TO '{user}'@'%%'",
    )
    try:
        with pytest.raises(TimeoutError, match="innodb_trx, as a user with PROCESS"):
            migrate(reader.engine.url.set(username=user, password="password of a test"))
    finally:
        execute(database_of(reader), f"DROP USER '{user}'@'%%'")


def test_an_index_may_take_hours(server: Infra, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(
        migrations, "make_engine", lambda url, **options: given.update(options) or make_engine(url, **options)
    )
    assert migrate(server.migrated_database()) is True
    assert given["read_seconds"] >= 12 * 3600
