"""No statement is longer than a real server takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError

from postroad.v1 import events_pb2 as pb
from postroad.v1.task_pb2 import Task
from postroad.v1.task_service_pb2 import CreateRequest, TaskData
from services.api.auth import Authenticator
from services.api.interceptor import RequestInterceptor
from services.api.outbox import OutboxEvent
from services.api.recorder import Recorder
from services.api.task_service import TaskServicer
from services.common.database import statement_size
from services.common.database.bulk import execute_rows
from services.common.database.engine import make_engine
from services.common.database.errors import is_database_fault, is_transient
from services.common.database.statement_size import (
    LONG_STATEMENT,
    StatementLimits,
    StatementTooLong,
    max_row_bytes,
    max_statement_bytes,
)
from services.common.database.transactions import transaction
from services.common.events import event_key, task_id
from services.common.fold import delta
from services.common.stage.types import Done, Record
from services.status.stage import StatusHandler
from tests.event_strategies import mail_task


class Aborted(Exception):
    """The error by which gRPC ends an RPC."""


class Call:
    """The context of an RPC."""

    invocation_metadata = staticmethod(tuple)

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.aborted: tuple[grpc.StatusCode, str] | None = None

    async def read(self) -> bytes:
        return self._request

    async def abort(self, code: grpc.StatusCode, message: str, trailers: object) -> NoReturn:
        self.aborted = code, message
        raise Aborted


INSERT = "INSERT INTO t (a, b) VALUES"


def widest(number: int) -> pb.MailTask:
    """A task with the labels that take the most bytes in a statement, 67 KB of them."""
    task = mail_task(number)
    task.labels.clear()
    task.labels.update({f"label {n}": '"' * 256 for n in range(64)})
    return task


def server_takes(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one())


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(f"SELECT COUNT(*) FROM {table}").scalar_one())


@pytest.fixture
def table(engine: Engine) -> str:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a INT PRIMARY KEY, b LONGBLOB) ENGINE=InnoDB")
    return "t"


@pytest.fixture
def limited_engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Engine]]:
    """Makes engines whose sessions believe that the server takes so many bytes."""
    engines = []
    guard = StatementLimits.guard

    def make(takes: int) -> Engine:
        monkeypatch.setattr(StatementLimits, "guard", lambda self, driver, _: guard(self, driver, takes))
        engines.append(make_engine(database_url))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


async def test_the_widest_events_are_folded(engine: Engine) -> None:
    events = [pb.TaskCreated(task=widest(n), at_us=1) for n in range(280)]
    assert sum(max_row_bytes(delta(event)) for event in events) > 17 << 20
    records = [Record(event_key(event).partition(":")[0], task_id(event), event) for event in events]
    status = StatusHandler(engine)
    assert await status.handle_batch(records) == [Done()] * 280
    await status.close()


async def test_a_batch_of_the_widest_tasks_is_recorded(limited_engine: Callable[[int], Engine]) -> None:
    engine = limited_engine(1 << 20)
    events = [pb.TaskCreated(task=widest(n), at_us=1) for n in range(40)]
    for event in events:
        event.task.body = "'" * (20 << 10)
    recorder = Recorder(engine, lambda recorded: None, 5000, 256 << 20)
    creations = [OutboxEvent(event, b"", event.ByteSize()) for event in events]
    assert await recorder.record_batch(creations) == [None] * 40
    await recorder.close()
    assert (count(engine, "tasks"), count(engine, "task_bodies"), count(engine, "outbox")) == (40,) * 3


def test_a_statement_as_long_as_the_server_takes_is_sent(engine: Engine) -> None:
    select = "SELECT LENGTH(%s)"
    size = max_statement_bytes(server_takes(engine)) - len("SELECT LENGTH('')")
    with engine.connect() as connection:
        assert connection.exec_driver_sql(select, (b"x" * size,)).scalar() == size
        with pytest.raises(DataError):
            connection.exec_driver_sql(select, (b"x" * (size + 1),))
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1  # the session is intact


def test_a_row_that_no_statement_can_hold_fails_alone(
    limited_engine: Callable[[int], Engine], table: str
) -> None:
    engine = limited_engine(64 << 10)
    rows = [(n, b"x" * (64 << 10 if n == 2 else 30 << 10)) for n in range(5)]
    with pytest.raises(DataError, match="max_allowed_packet") as caught:
        transaction(engine, lambda connection: execute_rows(connection, INSERT, rows))
    assert isinstance(caught.value.orig, StatementTooLong)
    assert (is_transient(caught.value), is_database_fault(caught.value)) == (False, False)
    assert not caught.value.connection_invalidated
    del rows[2]
    assert transaction(engine, lambda connection: execute_rows(connection, INSERT, rows)) == 4
    assert count(engine, table) == 4


async def test_a_task_that_no_statement_can_hold_is_refused(
    limited_engine: Callable[[int], Engine],
) -> None:
    recorder = Recorder(limited_engine(64 << 10), lambda recorded: None, 5000, 256 << 20)
    unused: Any = None
    service = TaskServicer(recorder, unused, unused, unused, max_body=1 << 20, keys=unused)
    handler = grpc.unary_unary_rpc_method_handler(
        service.Create, CreateRequest.FromString, Task.SerializeToString
    )
    create = RequestInterceptor(Authenticator(), unused, unused).wrap("Create", handler)
    data = TaskData(email="ada@shop.test", subject="s", body="x" * (64 << 10))
    call = Call(CreateRequest(data=data).SerializeToString())
    with pytest.raises(Aborted):
        await create.stream_unary(unused, call)
    assert call.aborted is not None
    code, message = call.aborted
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "max_allowed_packet" in message
    data.body = "short"
    assert await create.stream_unary(unused, Call(CreateRequest(data=data).SerializeToString()))
    await recorder.close()


def patiently(engine: Engine, work: Callable[[Connection], int]) -> int:
    """Call as the stages do: repeat while the error passes. It ends, since losses are counted."""
    for _ in range(12):
        try:
            return transaction(engine, work)
        except DBAPIError as error:
            if not is_transient(error):
                raise
    raise AssertionError("it would be tried for ever")


def test_a_statement_that_is_lost_for_its_length_is_halved(
    engine: Engine, limited_engine: Callable[[int], Engine], table: str
) -> None:
    """As behind a proxy that takes less than its server."""
    rows = [(n, b"x" * (server_takes(engine) // 20)) for n in range(24)]
    assert patiently(limited_engine(1 << 30), lambda connection: execute_rows(connection, INSERT, rows)) == 24
    assert count(engine, table) == 24


def test_a_row_that_is_lost_for_its_length_fails_after_a_while(
    engine: Engine, limited_engine: Callable[[int], Engine], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statement_size, "_SECONDS", 0.0)
    monkeypatch.setattr(statement_size, "_LOSSES", 2)
    row = (1, b"x" * (server_takes(engine) + LONG_STATEMENT))
    deceived = limited_engine(1 << 30)
    with pytest.raises(DataError):
        patiently(deceived, lambda connection: execute_rows(connection, INSERT, [row]))
    assert patiently(deceived, lambda connection: execute_rows(connection, INSERT, [(2, b"x")])) == 1
