"""Engines, transactions and errors, on real servers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import mysql.connector
import pytest
from google.protobuf.internal import api_implementation
from mysql.connector.connection_cext import CMySQLConnection
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from services.common.database import transactions
from services.common.database.bulk import execute, execute_rows, placeholders, select_rows
from services.common.database.engine import make_engine
from services.common.database.errors import is_conflict, is_transient
from services.common.database.transactions import retry_until_available, transaction
from tests.stack import Infra

Send = Callable[[Connection, str], object]
both_ways = pytest.mark.parametrize("send", [Connection.exec_driver_sql, execute], ids=["sqlalchemy", "bulk"])


def number(error: BaseException) -> int:
    assert isinstance(error, DBAPIError)
    code: int = error.orig.errno  # type: ignore[union-attr]
    return code


@pytest.fixture
def table(engine: Engine) -> str:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a INT PRIMARY KEY, b VARBINARY(300)) ENGINE=InnoDB")
    return "t"


def test_the_c_extension_and_upb_are_in_use(engine: Engine) -> None:
    assert mysql.connector.HAVE_CEXT
    with engine.connect() as connection:
        assert isinstance(connection.connection.dbapi_connection, CMySQLConnection)
    assert api_implementation.Type() == "upb"


def test_a_session_is_read_committed_in_utc_strict_and_utf8mb4(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.get_isolation_level() == "READ COMMITTED"
        zone, mode, collation, wait, silent = connection.exec_driver_sql(
            "SELECT @@time_zone, @@sql_mode, @@collation_connection, @@innodb_lock_wait_timeout,"
            " @@wait_timeout"
        ).one()
    assert (zone, collation, wait, silent) == ("+00:00", "utf8mb4_general_ci", 5, 20)
    assert "STRICT_TRANS_TABLES" in mode


def test_the_plain_schemes_mean_the_driver_in_use(database_url: str) -> None:
    plain = "mysql" + database_url[database_url.index(":") :]
    engine = make_engine(plain)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    engine.dispose()


def test_rows_go_out_in_statements_of_bounded_size(engine: Engine, table: str) -> None:
    rows = [(n, bytes(range(256)) + b"%s\\'" + bytes([n % 256])) for n in range(1203)]

    def insert(connection: Connection) -> int:
        return execute_rows(
            connection, f"INSERT INTO {table} (a, b) VALUES", rows, "ON DUPLICATE KEY UPDATE b = VALUES(b)"
        )

    assert transaction(engine, insert) == 1203
    # FOUND_ROWS: unchanged rows count once, changed ones twice.
    assert transaction(engine, insert) == 1203
    rows[0] = (0, b"other")
    assert transaction(engine, insert) == 1204
    with engine.connect() as connection:
        stored = connection.exec_driver_sql(
            f"SELECT a, b FROM {table} WHERE a IN ({placeholders(3)}) ORDER BY a", (0, 1, 1202)
        )
        assert [(a, bytes(b)) for a, b in stored] == [rows[0], rows[1], rows[1202]]


def test_an_update_that_finds_its_row_counts_it_even_if_nothing_changes(engine: Engine, table: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO {table} VALUES (1, 'x')")
        assert connection.exec_driver_sql(f"UPDATE {table} SET b = 'x' WHERE a = 1").rowcount == 1


@both_ways
def test_a_failed_transaction_leaves_nothing_in_a_pooled_session(
    engine: Engine, table: str, send: Send
) -> None:
    def fail(connection: Connection) -> None:
        send(connection, f"INSERT INTO {table} VALUES (1, 'x')")
        raise KeyError("on the way")

    for _ in range(3):
        with pytest.raises(KeyError):
            transaction(engine, fail)
    with engine.connect() as connection:
        send(connection, f"INSERT INTO {table} VALUES (2, 'x')")  # never committed
    with engine.connect() as connection:
        assert connection.exec_driver_sql(f"SELECT COUNT(*) FROM {table}").scalar() == 0


def ask(connection: Connection, query: str) -> Any:
    return connection.exec_driver_sql(query).scalar()


def ask_in_bulk(connection: Connection, query: str) -> Any:
    return select_rows(connection, query)[0][0]


@pytest.mark.parametrize("answer", [ask, ask_in_bulk])
def test_a_lost_pooled_connection_is_replaced_silently(
    engine: Engine, database_url: str, answer: Callable[[Connection, str], Any]
) -> None:
    other = make_engine(database_url)

    def who(connection: Connection) -> int:
        return int(answer(connection, "SELECT CONNECTION_ID()"))

    first = transaction(engine, who)
    with other.connect() as connection:
        connection.exec_driver_sql(f"KILL {first}")
    assert transaction(engine, who) != first
    other.dispose()


def test_a_session_that_falls_silent_in_a_transaction_releases_its_locks(
    database_url: str, table: str
) -> None:
    frozen, other = make_engine(database_url, silent_seconds=2), make_engine(database_url)
    insert = f"INSERT INTO {table} VALUES (1, '')"
    with frozen.connect() as connection:
        connection.exec_driver_sql(insert)
        # The other session waits for the row, and gets it before its own wait ends.
        transaction(other, lambda c: c.exec_driver_sql(insert))
        with pytest.raises(DBAPIError) as lost:
            connection.exec_driver_sql("SELECT 1")
    assert is_transient(lost.value)
    frozen.dispose()
    other.dispose()


def test_a_session_that_was_idle_in_the_pool_still_works(database_url: str, table: str) -> None:
    engine = make_engine(database_url, silent_seconds=2)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
    time.sleep(3)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
    engine.dispose()


def test_a_deadlock_is_tried_again(engine: Engine, table: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO {table} VALUES (1, ''), (2, '')")
    met = threading.Barrier(2)
    tries: list[int] = []
    errors: list[BaseException] = []

    def work(first: int, second: int) -> None:
        def cross(connection: Connection) -> None:
            tries.append(first)
            connection.exec_driver_sql(f"UPDATE {table} SET b = CONCAT(b, 'x') WHERE a = %s", (first,))
            if len(tries) <= 2:
                met.wait(10)
            connection.exec_driver_sql(f"UPDATE {table} SET b = CONCAT(b, 'x') WHERE a = %s", (second,))

        try:
            transaction(engine, cross)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(tries) > 2
    with engine.connect() as connection:
        assert [bytes(b) for (b,) in connection.exec_driver_sql(f"SELECT b FROM {table}")] == [b"xx", b"xx"]


@pytest.mark.parametrize(
    "values",
    [
        ("it's a delimiter // and so; it's", ""),
        ("\"delimiter ' and '", "it's"),
        ("delimiter ", " , CURRENT_USER() -- '"),
        ("delimiter " * 100_000, ""),
    ],
    ids=["text", "backslash", "statement", "long"],
)
def test_no_value_is_read_as_a_command_of_the_mysql_client(engine: Engine, values: tuple[str, str]) -> None:
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT %s, %s", values).one() == values


@both_ways
def test_a_statement_has_a_time_limit(database_url: str, send: Send) -> None:
    engine = make_engine(database_url, read_seconds=1)
    tries = []

    def wait(connection: Connection) -> None:
        tries.append(1)
        send(connection, "DO SLEEP(20)")

    started = time.monotonic()
    with pytest.raises(DBAPIError) as caught:
        transaction(engine, wait)
    assert time.monotonic() - started < 15
    assert len(tries) == 1
    assert is_transient(caught.value)
    engine.dispose()


@both_ways
def test_errors_that_pass_and_errors_that_stay(engine: Engine, table: str, send: Send) -> None:
    def error_of(statement: str, times: int) -> DBAPIError:
        def work(connection: Connection) -> None:
            for _ in range(times):
                send(connection, statement)

        with pytest.raises(DBAPIError) as caught:
            transaction(engine, work)
        return caught.value

    for statement, code, kind, times in [
        ("SELECT * FROM nowhere", 1146, ProgrammingError, 1),
        (f"INSERT INTO {table} VALUES (7, '')", 1062, IntegrityError, 2),
        (f"INSERT INTO {table} VALUES (8, REPEAT('x', 301))", 1406, DataError, 1),
        ("SELEKT", 1064, ProgrammingError, 1),
    ]:
        error = error_of(statement, times)
        assert (type(error), error.connection_invalidated) == (kind, False)
        assert isinstance(error.orig, mysql.connector.Error)
        assert (number(error), is_transient(error), is_conflict(error)) == (code, False, False)
    refused = make_engine("mysql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(DBAPIError) as caught:
        transaction(refused, lambda connection: None)
    assert (number(caught.value), is_transient(caught.value)) == (2003, True)
    assert not is_transient(ValueError("2003"))


@both_ways
@pytest.mark.parametrize("code", [1969, 1047, 3101, 9001])
def test_an_error_that_passes_is_known_by_its_number(
    engine: Engine, code: int, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server raises each error itself: a timeout, an unusable node, a conflict, a proxy's error."""
    monkeypatch.setattr(transactions, "RETRY_TIMEOUT", 60.0)  # a new session may take more than a second
    tries = []

    def fail(connection: Connection) -> None:
        tries.append(connection.connection.dbapi_connection)
        if len(tries) == 1 or code in (1969, 9001):
            send(connection, f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {code}")

    if code in (1969, 9001):
        with pytest.raises(DBAPIError) as caught:
            transaction(engine, fail)
        assert (number(caught.value), is_transient(caught.value), len(tries)) == (code, True, 1)
        return
    # These are repeated at once, the latter on another session.
    transaction(engine, fail)
    assert len(tries) == 2
    assert (tries[0] is not tries[1]) == (code == 1047)


@pytest.mark.breaks_servers
async def test_retry_until_available_waits_out_a_server_that_is_down(
    server: Infra, database_url: str
) -> None:
    engine = make_engine(database_url)
    seen: list[BaseException] = []
    noticed = asyncio.Event()

    def notice(error: BaseException) -> None:
        seen.append(error)
        noticed.set()

    async def ask() -> int | None:
        return await asyncio.to_thread(
            transaction, engine, lambda connection: connection.exec_driver_sql("SELECT 41 + 1").scalar()
        )

    assert await ask() == 42
    await asyncio.to_thread(server.kill, "mysql")
    try:
        answer = asyncio.ensure_future(retry_until_available(notice)(ask))
        await asyncio.wait_for(noticed.wait(), 60)
        assert not answer.done()
    finally:
        await asyncio.to_thread(server.start, "mysql")
    assert await asyncio.wait_for(answer, 60) == 42
    assert all(is_transient(error) for error in seen)
    engine.dispose()


async def test_retry_until_available_raises_what_does_not_pass() -> None:
    async def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        await retry_until_available(lambda error: None)(fail)


def test_a_connection_lost_in_the_commit_is_a_database_error_and_retried(engine: Engine, table: str) -> None:
    tries = []

    def work(connection: Connection) -> None:
        tries.append(1)
        connection.exec_driver_sql(f"INSERT IGNORE INTO {table} VALUES (9, 'x')")
        if len(tries) == 1:
            session = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar()
            with engine.connect() as other:
                other.exec_driver_sql(f"KILL {session}")

    transaction(engine, work)
    assert len(tries) == 2
    with engine.connect() as connection:
        assert connection.exec_driver_sql(f"SELECT COUNT(*) FROM {table} WHERE a = 9").scalar() == 1
    # Without a retry it is an error like any other, and one that passes.
    tries.clear()
    with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
        work(connection)
    assert is_transient(caught.value)
    assert caught.value.connection_invalidated


def test_the_c_library_is_set_up_before_threads_use_it() -> None:
    """In a process of its own: mysql_thread_init fails until the whole library is initialised."""
    program = (
        "import ctypes, services.common.database.engine, _mysql_connector as m;"
        "raise SystemExit(ctypes.PyDLL(m.__file__).mysql_thread_init())"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
