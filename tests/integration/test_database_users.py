"""The users of deploy/mysql/users.sql: each may do what its program does, and is denied the rest.

Other tests run the api, the sender's claims, status, replays and rebuilds as these users.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, make_url
from sqlalchemy.exc import DBAPIError

from deploy.local.database_users import USERS, user_statements
from services.common.database.engine import make_engine
from services.common.database.tables import metadata
from services.common.migrations import VERSION_TABLE, migrate
from tests.stack import Infra

# What each user may do on the tables: select, insert, update, delete. `b` is to select a body's key alone.
MAY = {
    "api": {"tasks": "siu", "task_bodies": "si", "task_events": "si", "outbox": "siud", "deliveries": "siu"},
    "sender": {"deliveries": "siu"},
    "status": {
        "tasks": "siu", "task_bodies": "d", "task_events": "i", "deliveries": "siu", "topic_ids": "i",
    },
    "operator": {
        "tasks": "si", "task_bodies": "si", "task_events": "si", "deliveries": "siu", "outbox": "s",
        "replays": "siu", "topic_ids": "si",
    },
    "migrate": dict.fromkeys([*metadata.tables, VERSION_TABLE], "siud"),
}  # fmt: skip
# Their own table, a database, a table, a column.
DENIED = {1044, 1142, 1143, 1227}


@pytest.fixture(scope="module")
def url(infra: Infra) -> str:
    return infra.migrated_database()


@pytest.fixture(params=USERS)
def user(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def connection(infra: Infra, url: str, user: str) -> Iterator[Connection]:
    engine = make_engine(infra.as_user(user, url), pool_size=1)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def _is_denied(connection: Connection, statement: str) -> bool:
    try:
        result = connection.exec_driver_sql(statement)
        if result.returns_rows:
            result.all()
        denied = False
    except DBAPIError as error:
        denied = getattr(error.orig, "errno", 0) in DENIED
    connection.rollback()
    return denied


def _column(table: str) -> str:
    return "version_num" if table == VERSION_TABLE else next(iter(metadata.tables[table].columns)).name


def test_each_user_may_do_what_it_needs_and_no_more(connection: Connection, user: str) -> None:
    statements = {
        "s": "SELECT * FROM {table} LIMIT 0",
        "i": "INSERT INTO {table} () VALUES ()",
        "u": "UPDATE {table} SET {column} = 'x' LIMIT 0",
        "d": "DELETE FROM {table} LIMIT 0",
    }
    found = {}
    for table in (*metadata.tables, VERSION_TABLE):
        may = [
            initial
            for initial, statement in statements.items()
            if not _is_denied(connection, statement.format(table=table, column=_column(table)))
        ]
        if may:
            found[table] = "".join(may)
    assert found == MAY[user]


def test_no_user_reaches_other_databases_or_changes_tables(connection: Connection, user: str) -> None:
    statements = [
        "SELECT * FROM mysql.user",
        "CREATE DATABASE postroad_denied",
        "CREATE USER 'postroad_denied'@'%'",
        "SHUTDOWN",
        "SET GLOBAL max_connections = 10",
    ]
    if user != "migrate":
        statements += [
            "CREATE TABLE other (id INT PRIMARY KEY)",
            "TRUNCATE TABLE outbox",
            "DROP TABLE deliveries",
        ]
        statements += ["ALTER TABLE deliveries COMMENT 'x'", "CREATE INDEX x ON deliveries (state)"]
    assert [statement for statement in statements if not _is_denied(connection, statement)] == []


@pytest.mark.parametrize("user", ["status"], indirect=True)
def test_status_reads_no_body(connection: Connection) -> None:
    assert not _is_denied(connection, "SELECT task_id FROM task_bodies LIMIT 0")
    for column in ("body", "html", "headers"):
        assert _is_denied(connection, f"SELECT {column} FROM task_bodies LIMIT 0")


def test_every_table_has_a_user() -> None:
    assert {table for tables in MAY.values() for table in tables} == {*metadata.tables, VERSION_TABLE}
    names = " ".join(user_statements("postroad", dict.fromkeys(USERS, "x")))
    assert all(f"'postroad_{user}'@'%' IDENTIFIED" in names for user in USERS)


def test_the_user_of_migrations_migrates(infra: Infra) -> None:
    url = infra.as_user("migrate", infra.new_database())
    assert migrate(url)
    assert migrate(url)


def test_a_user_needs_tls(infra: Infra, url: str) -> None:
    clear = make_url(infra.as_user("sender", url)).update_query_dict({"ssl_disabled": "true"})
    engine = make_engine(clear)
    with pytest.raises(DBAPIError) as caught, engine.connect():
        pass
    assert caught.value.orig is not None
    assert caught.value.orig.errno in (1045, 2061)  # type: ignore[attr-defined]
    engine.dispose()
