"""The recorder and the outbox on both databases, without Kafka and gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from postroad.v1 import events_pb2, task_pb2
from postroad.v1.task_service_pb2 import CreateRequest, TaskData
from services.api import metrics, outbox, outbox_backlog, outbox_sweeper, queries, uuid7, views
from services.api.errors import StatusError
from services.api.outbox import NewTask, OutboxEvent
from services.api.recorder import Recorder
from services.api.validation import task_created
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.events import encode
from services.common.fold import delta
from services.common.health import Degraded
from services.common.timeline import timeline_row
from services.common.unpublished import Unpublished, unpublished
from tests.forms import by_form
from tests.integration.stage_kit import until
from tests.stack import Infra

ID_GENERATOR = uuid7.IdGenerator()


@pytest.fixture(scope="module", params=["mysql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Iterator[Engine]:
    server: Infra = request.getfixturevalue("infra" if request.param == "mysql" else "mariadb")
    engine = make_engine(server.migrated_database())
    yield engine
    engine.dispose()


@pytest.fixture
def engine(database: Engine) -> Iterator[Engine]:
    """An engine on empty tables. Emptying them is much cheaper than another database."""
    yield database
    with database.begin() as connection:
        for table in ("outbox", "tasks", "task_bodies", "task_events"):
            connection.exec_driver_sql(f"DELETE FROM {table}")


def make_new_task(key: str = "", send_at_us: int = 0, **data: object) -> NewTask:
    mail = {"email": "a@shop.test", "subject": "Hello", "body": "text"} | data
    request = CreateRequest(data=TaskData(**mail))  # type: ignore[arg-type]
    if send_at_us:
        request.send_at.FromMicroseconds(send_at_us)
    event = task_created(request, "default", key, 1000, time.time_ns() // 1000)
    event.task.id, event.task.created_at_us = ID_GENERATOR.new()
    event.at_us = event.task.created_at_us
    return OutboxEvent(event, b"trace", 100)


def ids_in(engine: Engine, table: str, column: str = "task_id") -> list[bytes]:
    rows = transaction(engine, lambda c: c.exec_driver_sql(f"SELECT {column} FROM {table}").all())
    return sorted(bytes(row[0]) for row in rows)


async def record(
    engine: Engine, *new_tasks: NewTask
) -> tuple[list[task_pb2.Task | BaseException | None], list[NewTask]]:
    """Record new tasks concurrently; return their results, and those to be published at once."""
    committed: list[NewTask] = []
    recorder = Recorder(engine, committed.extend, 1000, 1 << 20)
    answers = await asyncio.gather(*map(recorder.record, new_tasks), return_exceptions=True)
    await recorder.close()
    return answers, committed


async def test_a_recorded_task_is_in_three_tables_and_its_event_can_be_loaded(engine: Engine) -> None:
    rich = make_new_task(
        "key",
        subject="é\u2028",
        body="\0 \r\n👍",
        html="",
        headers={"X-A": "é"},
        labels={"b": '"', "a": "\\"},
    )
    batch = [rich, make_new_task(body="", html="<p>"), *(make_new_task() for _ in range(700))]
    answers, committed = await record(engine, *batch)
    assert answers == [None] * len(batch)
    assert committed == batch
    events = {outbox.created(r.event.task.id): r.event for r in batch}
    ids = sorted(row_.task_id for row_ in events)
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == ids
    assert transaction(engine, lambda c: outbox_sweeper.events_of_rows(c, list(events))) == events
    # Create answers without reading, and Get must answer the same.
    row = transaction(
        engine,
        lambda c: c.exec_driver_sql(
            f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s", (rich.event.task.id,)
        ).one(),
    )
    assert views.task(row) == views.new_task(rich.event)


async def test_loaded_events_equal_the_published_ones_byte_for_byte(engine: Engine) -> None:
    """The outbox publisher and a sweeper may both publish an event, under one CloudEvents id."""
    maps = {f"{n}-key": f"{n}" for n in range(40)}
    batch = [
        make_new_task(headers=maps, labels=maps),
        make_new_task(),
        make_new_task("k", body=None, html="<p>é"),
    ]
    await record(engine, *batch)
    events: list[events_pb2.TaskCreated | events_pb2.TaskCancelled] = [r.event for r in batch]
    for epoch in (0, 1_763_976_543_123, 1_763_976_543_124):
        for task in (r.event.task for r in batch):
            if epoch:
                events.append(events_pb2.TaskCreated(task=task, epoch=epoch, at_us=epoch * 1000))
            cancelled = events_pb2.TaskCancelled(
                id=task.id, epoch=epoch, at_us=task.created_at_us + epoch + 7, attempts=epoch % 5
            )
            events.append(cancelled)

    def write(connection: Connection) -> None:
        taskstore.upsert(connection, map(delta, events))
        taskstore.insert_events(connection, map(timeline_row, events))
        outbox.put(connection, [outbox.row_of(event) for event in events])

    transaction(engine, write)
    rows = [outbox.row_of(event) for event in events]
    assert len(set(rows)) == len(rows) == 18
    found = transaction(engine, lambda c: outbox_sweeper.events_of_rows(c, rows))
    assert [encode(found[row_], "api") for row_ in rows] == [encode(event, "api") for event in events]
    # A missing event is not invented.
    unknown = [
        outbox.created(bytes(16)),
        outbox.cancelled(bytes(16), 0),
        outbox.cancelled(rows[0].task_id, 5),
    ]
    assert transaction(engine, lambda c: outbox_sweeper.events_of_rows(c, unknown)) == {}


async def test_a_scheduled_task_is_left_to_the_sweeper_and_keeps_its_time(engine: Engine) -> None:
    send_at_us = time.time_ns() // 1000 + 3600 * 1_000_000 + 7
    later, now = make_new_task(send_at_us=send_at_us, labels={"b": "1", "a": "2"}), make_new_task()
    answers, committed = await record(engine, later, now)
    assert answers == [None, None]
    assert committed == [now]
    row_ = outbox.row_of(later.event)
    due = "SELECT available_at FROM outbox WHERE task_id = %s"
    [row] = transaction(engine, lambda c: c.exec_driver_sql(due, (row_.task_id,)).all())
    assert row.available_at == from_micros(send_at_us)
    assert transaction(engine, lambda c: outbox_sweeper.events_of_rows(c, [row_])) == {row_: later.event}
    view = transaction(engine, lambda c: queries.get(c, "default", later.event.task.id))
    assert view is not None
    assert (view.status, view.next_attempt_at.ToMicroseconds()) == ("pending", send_at_us)
    [line] = view.timeline
    assert (line.kind, line.next_attempt_at.ToMicroseconds()) == ("created", send_at_us)
    view.ClearField("timeline")
    view.body = ""
    assert view == views.new_task(later.event)
    # After a cancellation its first event is due at once, and unchanged.
    cancelled = events_pb2.TaskCancelled(id=later.event.task.id, epoch=5, at_us=send_at_us)
    transaction(engine, lambda c: taskstore.upsert(c, [delta(cancelled)]))
    assert transaction(engine, lambda c: outbox_sweeper.events_of_rows(c, [row_])) == {row_: later.event}
    transaction(engine, lambda c: outbox.make_due(c, later.event.task.id))
    transaction(engine, lambda c: outbox.make_due(c, now.event.task.id))
    assert taken(engine, 9) == [row_]


async def batch_of(engine: Engine, *new_tasks: NewTask) -> list[object]:
    recorder = Recorder(engine, lambda _: None, 1000, 1 << 20)
    try:
        return list(await recorder.record_batch(new_tasks))
    finally:
        await recorder.close()


async def test_a_batch_is_one_transaction_with_one_result_a_task(engine: Engine) -> None:
    known = make_new_task("known")
    await record(engine, known)
    first, twice, other, free = (
        make_new_task("k"),
        make_new_task("k"),
        make_new_task("k", subject="x"),
        make_new_task(),
    )
    again, clash = make_new_task("known"), make_new_task("known", body="x")
    answers = await batch_of(engine, first, clash, twice, again, other, free)
    assert answers[0] is answers[5] is None
    assert answers[2] == views.new_task(first.event)
    assert answers[3] == views.new_task(known.event)
    for place, original in ((1, known), (4, first)):
        problem = answers[place]
        assert isinstance(problem, StatusError)
        assert uuid7.text(original.event.task.id) in problem.message
    kept = sorted(r.event.task.id for r in (known, first, free))
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == kept


@contextmanager
def ascii_tenants(engine: Engine) -> Iterator[None]:
    """Within the block, the database refuses a tenant's name that is not ASCII."""
    change = "ALTER TABLE tasks MODIFY tenant VARCHAR(64)"
    transaction(engine, lambda c: c.exec_driver_sql(f"{change} CHARACTER SET ascii"))
    try:
        yield
    finally:
        transaction(engine, lambda c: c.exec_driver_sql(change))


async def test_a_failed_batch_leaves_nothing_behind(engine: Engine) -> None:
    poison = make_new_task()
    poison.event.task.tenant = "é" * 3
    with ascii_tenants(engine), pytest.raises(DBAPIError):
        await batch_of(engine, *(make_new_task() for _ in range(600)), poison)
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == []


async def test_a_key_used_twice_in_one_transaction_is_one_task(engine: Engine) -> None:
    first, same, other, free = (
        make_new_task("k"),
        make_new_task("k"),
        make_new_task("k", subject="x"),
        make_new_task(),
    )
    answers, committed = await record(engine, first, same, other, free)
    assert committed == [first, free]
    assert answers[0] is None
    assert answers[1] == views.new_task(first.event)
    assert isinstance(answers[2], StatusError)
    assert answers[3] is None
    kept = sorted(r.event.task.id for r in (first, free))
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == kept


async def test_recorders_that_race_for_keys_record_one_task_a_key(engine: Engine) -> None:
    # Each uses the keys in another order, so that their transactions also deadlock.
    keys = [f"key {n}" for n in range(12)]
    recorded: list[bytes] = []

    async def record_all(order: list[str]) -> None:
        left = list(map(make_new_task, order))
        while left:
            answers, committed = await record(engine, *left)
            recorded.extend(r.event.task.id for r in committed)
            assert all(isinstance(a, StatusError | task_pb2.Task | None) for a in answers), answers
            # After many deadlocks a Create is UNAVAILABLE, and its client calls again.
            left = [r for r, answer in zip(left, answers, strict=True) if isinstance(answer, StatusError)]

    async with asyncio.timeout(60):
        await asyncio.gather(*map(record_all, [keys, keys[::-1], keys[6:] + keys[:6]]))
    assert len(recorded) == len(keys)
    assert sorted(recorded) == ids_in(engine, "tasks", "id") == ids_in(engine, "outbox")


async def test_repeating_a_commit_of_unknown_outcome_changes_nothing(
    engine: Engine,
) -> None:
    batch = [make_new_task("k"), make_new_task()]
    await record(engine, *batch)
    # Meanwhile the task was published, sent and folded.
    sent = events_pb2.MailSent(id=batch[0].event.task.id, attempt=1, at_us=batch[0].event.at_us + 5)
    transaction(engine, lambda c: taskstore.upsert(c, [delta(sent)]))
    before = transaction(engine, lambda c: c.exec_driver_sql("SELECT * FROM tasks ORDER BY id").all())
    answers, committed = await record(engine, *batch)
    assert answers == [None, None]
    assert committed == batch
    assert transaction(engine, lambda c: c.exec_driver_sql("SELECT * FROM tasks ORDER BY id").all()) == before
    assert len(ids_in(engine, "outbox")) == 2


async def test_a_task_that_the_database_refuses_fails_alone(engine: Engine) -> None:
    poison = make_new_task()
    poison.event.task.tenant = "é" * 3
    batch = [make_new_task(), poison, *(make_new_task() for _ in range(20))]
    with ascii_tenants(engine):
        answers, committed = await record(engine, *batch)
    assert isinstance(answers[1], DBAPIError)
    assert "shop.test" not in str(answers[1])
    assert committed == [batch[0], *batch[2:]]
    assert poison.event.task.id not in ids_in(engine, "task_bodies")


def test_two_sweepers_never_take_the_same_row(engine: Engine) -> None:
    rows = [outbox.created(ID_GENERATOR.new()[0]) for _ in range(100)]

    def put(connection: Connection) -> None:
        outbox.put(connection, rows)
        outbox.put(connection, rows[:10])

    transaction(engine, put)
    # A new row belongs to the outbox publisher first.
    assert taken(engine, 60) == []
    transaction(engine, lambda c: outbox.defer(c, rows, -1))
    with engine.begin() as one, engine.begin() as two:
        first = outbox.take(one, 60)
        second = outbox.take(two, 60)
    assert len(first) == 60
    assert sorted(first + second) == sorted(rows)
    # A taken row is not due until its lease ends.
    assert taken(engine, 60) == []
    transaction(engine, lambda c: outbox.defer(c, first[:1], -1))
    assert taken(engine, 60) == first[:1]
    transaction(engine, lambda c: outbox.delete(c, rows[:99]))
    transaction(engine, lambda c: outbox.delete(c, rows[:99]))
    assert ids_in(engine, "outbox") == [rows[99].task_id]


def taken(engine: Engine, limit: int) -> Sequence[outbox.OutboxRow]:
    return transaction(engine, lambda c: outbox.take(c, limit))


def test_a_sweep_keeps_the_due_time_of_an_event(engine: Engine) -> None:
    def found() -> Unpublished:
        return transaction(engine, unpublished)

    def age(seconds: int) -> None:
        shift = f"due_at = due_at - INTERVAL {seconds} SECOND"
        transaction(engine, lambda c: c.exec_driver_sql(f"UPDATE outbox SET {shift}"))

    assert found() == (0, 0)
    now, later, older = (outbox.created(ID_GENERATOR.new()[0]) for _ in range(3))
    [at] = transaction(engine, lambda c: c.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").one())
    transaction(engine, lambda c: outbox.put(c, [now]))
    transaction(engine, lambda c: outbox.insert_scheduled(c, [(later, at + timedelta(seconds=3600))]))
    # The outbox publisher has it. It became due when it was recorded.
    assert found().due == 1
    assert 0 <= found().oldest_seconds < 60
    age(300)
    for _ in range(3):
        transaction(engine, lambda c: outbox.defer(c, [now], -1))
        assert taken(engine, 9) == [now]
        transaction(engine, lambda c: outbox.put(c, [now]))
        assert found().due == 1
        assert 300 <= found().oldest_seconds < 360
    # The first event of a cancelled task became due with the cancellation.
    transaction(engine, lambda c: outbox.make_due(c, later.task_id))
    transaction(engine, lambda c: outbox.delete(c, [now]))
    assert found().due == 1
    assert 0 <= found().oldest_seconds < 60
    # A version before migration 0006 does not set the column.
    transaction(engine, lambda c: outbox.delete(c, [later]))
    due = "UTC_TIMESTAMP(6) - INTERVAL 100 SECOND"
    insert = f"INSERT INTO outbox (task_id, kind, epoch, available_at) VALUES (%s, %s, %s, {due})"
    transaction(engine, lambda c: c.exec_driver_sql(insert, tuple(older)))
    assert found().due == 1
    assert 100 <= found().oldest_seconds < 160


async def test_overdue_events_make_the_api_degraded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_backlog, "_INTERVAL", 0.02)
    watched = outbox_backlog.OutboxBacklog(engine)
    transaction(engine, lambda c: outbox.put(c, [outbox.created(ID_GENERATOR.new()[0])]))
    run = asyncio.create_task(watched.run())
    try:
        await until(lambda: metrics.OUTBOX_DUE._value.get() == 1)
        assert watched.problems() == []
        older = "UPDATE outbox SET due_at = due_at - INTERVAL 90 SECOND"
        transaction(engine, lambda c: c.exec_driver_sql(older))
        await until(watched.problems)
        [problem] = watched.problems()
        assert isinstance(problem, Degraded)
        assert problem.startswith("1 events in the outbox are due and not published, since 9")
        assert metrics.OUTBOX_OLDEST_SECONDS._value.get() >= 90
        transaction(engine, lambda c: c.exec_driver_sql("DELETE FROM outbox"))
        await until(lambda: not watched.problems())
    finally:
        run.cancel()


def test_sweeping_does_not_block_recording(engine: Engine) -> None:
    """Under REPEATABLE READ, SELECT ... SKIP LOCKED would lock the gaps that inserts need."""
    rows = [outbox.created(ID_GENERATOR.new()[0]) for _ in range(100)]
    transaction(engine, lambda c: outbox.put(c, rows[:50]))
    transaction(engine, lambda c: outbox.defer(c, rows[:50], -1))
    with engine.begin() as sweeping:
        assert len(outbox.take(sweeping, 20)) == 20
        transaction(engine, lambda c: outbox.put(c, rows[50:]))
    assert len(ids_in(engine, "outbox")) == 100


@pytest.mark.parametrize("size", [1, 500, 501, 1200])
def test_any_number_of_rows_can_be_put(engine: Engine, size: int) -> None:
    rows = [outbox.created(ID_GENERATOR.new()[0]) for _ in range(size)]
    transaction(engine, lambda c: outbox.put(c, rows))
    assert len(ids_in(engine, "outbox")) == size
    transaction(engine, lambda c: outbox.delete(c, rows))
    assert ids_in(engine, "outbox") == []


def test_a_sweep_reads_only_due_rows(engine: Engine) -> None:
    rows = [outbox.created(ID_GENERATOR.new()[0]) for _ in range(by_form(5_000, 50_000))]
    [now] = transaction(engine, lambda c: c.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").one())
    times = [now + timedelta(seconds=3600 + n / 10) for n in range(len(rows))]
    transaction(engine, lambda c: outbox.insert_scheduled(c, list(zip(rows, times, strict=True))))
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE TABLE outbox").all()
        assert outbox.next_due(connection, 0.5) == 0.5
        connection.exec_driver_sql("FLUSH STATUS")
        assert outbox.take(connection, 500) == []
        outbox.next_due(connection, 0.5)
        assert unpublished(connection) == (0, 0)
        status = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").all()
        assert sum(int(count) for _, count in status) < 20, status
    # `next_due` is exact, and no sweep takes the row earlier.
    soon = outbox.created(ID_GENERATOR.new()[0])
    with engine.begin() as connection:
        [due] = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6) + INTERVAL 0.3 SECOND").one()
        outbox.insert_scheduled(connection, [(soon, due)])
        assert 0 < outbox.next_due(connection, 0.5) <= 0.3
    taken_at = None
    while not taken_at:
        with engine.begin() as connection:
            if found := outbox.take(connection, 500):
                assert found == [soon]
                [taken_at] = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").one()
    assert taken_at >= due


async def test_a_sweep_loads_a_few_mebibytes_of_bodies_at_a_time(engine: Engine) -> None:
    batch = [make_new_task(body="x" * 900) for _ in range(40)]
    await record(engine, *batch)
    rows = [outbox.row_of(r.event) for r in batch]
    transaction(
        engine, lambda c: c.exec_driver_sql("UPDATE task_bodies SET body = REPEAT('x', 1000000), html = 'é'")
    )
    parts = transaction(
        engine, lambda c: outbox_sweeper.split_by_size(c, [*rows, outbox.cancelled(bytes(16), 0)])
    )
    assert [row_ for part in parts for row_ in part] == [*rows, outbox.cancelled(bytes(16), 0)]
    assert [len(part) for part in parts] == [4] * 9 + [5]
