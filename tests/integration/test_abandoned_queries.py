"""A query whose caller has left ends in the database, and its session serves nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine

from services.api import database_threads
from services.api.database_threads import DatabaseThreads
from services.api.errors import StatusError
from services.common.database.engine import make_engine
from tests.api_process import eventually

# More than a read timeout, so that only a KILL ends it in time.
ENDLESS = (
    "SELECT COUNT(*) FROM information_schema.collations a, information_schema.collations b WHERE SLEEP(0.01)"
)


def running(engine: Engine) -> int:
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SHOW FULL PROCESSLIST").all()
    # Other tests run the same query on the same server.
    return sum(row[3] == engine.url.database and "SLEEP(0.01)" in (row[7] or "") for row in rows)


def open_sessions(engine: Engine) -> set[int]:
    with engine.connect() as connection:
        return {int(row[0]) for row in connection.exec_driver_sql("SHOW PROCESSLIST")}


def session(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())


@pytest.fixture
def killing(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=1)
    yield engine
    engine.dispose()


async def test_a_query_whose_caller_leaves_is_ended(engine: Engine, killing: Engine) -> None:
    threads = DatabaseThreads(engine, killing)
    sessions: list[int] = []

    def endless(connection: Connection) -> None:
        sessions.append(session(connection))
        connection.exec_driver_sql(ENDLESS).all()

    call = asyncio.ensure_future(threads.read(endless))
    await asyncio.to_thread(eventually, lambda: running(engine) == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(eventually, lambda: not running(engine), 5)
    # The pool dropped the session: a late KILL would have hit its next user.
    await asyncio.to_thread(eventually, lambda: sessions[0] not in open_sessions(engine), 5)
    threads.close()


async def test_a_query_that_takes_too_long_is_ended(
    engine: Engine, killing: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_threads, "DATABASE_TIMEOUT", 0.5)
    threads = DatabaseThreads(engine, killing)
    with pytest.raises(StatusError, match="does not answer"):
        await threads.read(lambda connection: connection.exec_driver_sql(ENDLESS).all())
    await asyncio.to_thread(eventually, lambda: not running(engine), 5)
    threads.close()


async def test_a_query_that_has_not_begun_never_begins(engine: Engine) -> None:
    threads = DatabaseThreads(engine)
    begun: list[int] = []
    busy = [
        asyncio.ensure_future(
            threads.read(lambda connection: connection.exec_driver_sql("SELECT SLEEP(1)").all())
        )
        for _ in range(database_threads.THREADS)
    ]
    await asyncio.sleep(0.2)
    waiting = asyncio.ensure_future(threads.read(lambda connection: begun.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(*busy)
    assert await threads.read(session)
    assert not begun
    threads.close()


def test_the_server_ends_a_long_query_by_itself(database_url: str) -> None:
    engine = make_engine(database_url, query_seconds=0.3)
    started = time.monotonic()
    with engine.connect() as connection, pytest.raises(Exception, match=r"3024|1969"):
        connection.exec_driver_sql(ENDLESS).all()
    assert time.monotonic() - started < 5
    engine.dispose()
