"""The statements on the task tables, on real servers."""

from __future__ import annotations

import random
import threading

import pytest
from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2 as pb
from services.common import taskstore
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.events import Event
from services.common.fold import delta, fold
from services.common.timeline import timeline_row
from tests.event_strategies import mail_task

AT = 1_763_976_543_123_456


def record(engine: Engine, *tasks: pb.MailTask) -> None:
    def write(connection: Connection) -> None:
        events = [pb.TaskCreated(task=task, at_us=task.created_at_us) for task in tasks]
        taskstore.upsert(connection, map(delta, events))
        taskstore.insert_bodies(connection, [taskstore.body_of(task) for task in tasks])
        taskstore.insert_events(connection, map(timeline_row, events))

    transaction(engine, write)


def apply(engine: Engine, *events: Event) -> None:
    transaction(engine, lambda connection: taskstore.upsert(connection, map(delta, events)))


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(f"SELECT COUNT(*) FROM {table}").scalar() or 0)


def test_a_task_comes_back_as_it_was_recorded(engine: Engine) -> None:
    tasks = {task.id: task for task in (mail_task(n, full=n % 2 == 0) for n in range(4))}
    bare = pb.MailTask(id=bytes(16), email="a@b.test", html="", created_at_us=1)
    tasks[bare.id] = bare
    record(engine, *tasks.values())
    record(engine, *tasks.values())  # a repetition changes nothing
    with engine.connect() as connection:
        assert taskstore.load_tasks(connection, [*tasks, b"unknown".ljust(16)]) == tasks
        assert taskstore.load_tasks(connection, []) == {}
    assert (count(engine, "tasks"), count(engine, "task_bodies"), count(engine, "task_events")) == (5, 5, 5)


def test_a_task_known_from_later_events_only_is_not_loaded(engine: Engine) -> None:
    task = mail_task(0)
    apply(engine, pb.MailSent(id=task.id, attempt=1, at_us=AT))
    with engine.connect() as connection:
        assert taskstore.load_tasks(connection, [task.id]) == {}
    record(engine, task)
    with engine.connect() as connection:
        assert taskstore.load_tasks(connection, [task.id]) == {task.id: task}


def test_more_rows_than_a_statement_takes(engine: Engine) -> None:
    tasks = [mail_task(n) for n in range(1201)]
    record(engine, *tasks)
    with engine.connect() as connection:
        loaded = taskstore.load_tasks(connection, [task.id for task in tasks])
    assert loaded == {task.id: task for task in tasks}


def test_bodies_that_no_single_statement_could_hold(engine: Engine) -> None:
    tasks = [mail_task(n) for n in range(18)]
    for number, task in enumerate(tasks):
        task.body = "'" * (2 << 20 if number == 5 else 1 << 20)  # each is escaped to two bytes
    record(engine, *tasks)
    with engine.connect() as connection:
        for task in tasks:
            assert taskstore.load_tasks(connection, [task.id]) == {task.id: task}


def test_a_key_belongs_to_its_first_task_and_is_compared_byte_by_byte(engine: Engine) -> None:
    first, second = mail_task(0), mail_task(2)
    keys = ["k", "k ", "K", "k\0", "é", "e\u0301", "\U0001f4ee", "x" * 255]
    tasks = []
    for number, key in enumerate(keys):
        task = mail_task(number + 10)
        task.idempotency_key = key
        tasks.append(task)
    other = mail_task(30)
    other.tenant, other.idempotency_key = "other", "k"
    record(engine, first, second, *tasks, other)
    with engine.connect() as connection:
        owners = taskstore.owners_of_keys(
            connection, [*(("tenant", key) for key in keys), ("other", "k"), ("other", "k ")]
        )
        assert taskstore.owners_of_keys(connection, []) == {}
    wanted = {
        ("tenant", key): (task.id, bytes(task.request_hash)) for key, task in zip(keys, tasks, strict=True)
    }
    assert owners == wanted | {("other", "k"): (other.id, other.request_hash)}


def test_the_owners_of_a_batchs_keys_are_found_by_their_index(engine: Engine) -> None:
    tasks = [mail_task(number) for number in range(6000)]
    record(engine, *tasks)
    asked = sorted((task.tenant, task.idempotency_key) for task in tasks[:1000])
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE TABLE tasks").all()
        connection.exec_driver_sql("FLUSH STATUS")
        assert len(taskstore.owners_of_keys(connection, asked)) == 1000
        status = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").all()
    assert sum(int(count) for _, count in status) <= 3000, status


def test_a_second_task_of_one_key_leaves_the_first_as_it_is(engine: Engine) -> None:
    first = mail_task(1, full=False)
    first.idempotency_key = "k"
    record(engine, first)
    second = mail_task(2)
    second.idempotency_key = "k"
    before = whole(engine)
    apply(
        engine,
        pb.TaskCreated(task=second, epoch=AT, at_us=AT),
        pb.MxOk(task=second, epoch=AT, attempt=9, at_us=AT),
    )
    assert whole(engine) == before
    with engine.connect() as connection:
        owners = taskstore.owners_of_keys(connection, [("tenant", "k")])
    assert owners["tenant", "k"][0] == first.id


def whole(engine: Engine) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql("SELECT * FROM tasks ORDER BY id")]


def test_tasks_without_a_key_do_not_conflict(engine: Engine) -> None:
    record(engine, *(mail_task(n, full=False) for n in range(1, 6, 2)))
    assert count(engine, "tasks") == 3


def test_two_who_fold_the_same_tasks_at_once_come_to_one_result(engine: Engine) -> None:
    tasks = [mail_task(n) for n in range(60)]
    rng = random.Random(7)
    events: list[Event] = []
    for task in tasks:
        events += [
            pb.TaskCreated(task=task, at_us=AT),
            pb.MxOk(task=task, attempt=1, at_us=AT + 1),
            pb.MailDeferred(id=task.id, stage="sender", attempt=1, at_us=AT + 2),
            pb.MailSent(id=task.id, attempt=2, at_us=AT + 3),
        ]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        mine = events[:]
        random.Random(seed).shuffle(mine)
        try:
            for start in range(0, len(mine), 30):
                part = mine[start : start + 30]

                def write(connection: Connection, part: list[Event] = part) -> None:
                    taskstore.upsert(connection, map(delta, part))
                    taskstore.insert_events(connection, map(timeline_row, part))

                transaction(engine, write)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rng.random(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    row = None
    for event in events[:4]:
        row = fold(row, event)
    assert row is not None
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT status, version, attempts FROM tasks").all()
    assert [tuple(one) for one in found] == [(row.status, row.version, row.attempts)] * 60
    assert count(engine, "task_events") == 240


@pytest.fixture
def settled(engine: Engine) -> dict[str, pb.MailTask]:
    """One task of each status, all of them old."""
    tasks = {}
    for number, status in enumerate(
        ("pending", "processing", "completed", "failed", "uncertain", "cancelled")
    ):
        task = mail_task(number)
        task.id = (1_000 + number).to_bytes(6) + task.id[6:]
        tasks[status] = task
    record(engine, *tasks.values())
    apply(
        engine,
        pb.MxOk(task=tasks["processing"], attempt=1, at_us=2_000_000),
        pb.MailSent(id=tasks["completed"].id, attempt=1, at_us=2_000_000),
        pb.MxFailed(id=tasks["failed"].id, attempt=1, at_us=2_000_000),
        pb.MailFailed(id=tasks["uncertain"].id, attempt=1, uncertain=True, at_us=2_000_000),
        pb.TaskCancelled(id=tasks["cancelled"].id, at_us=2_000_000),
    )
    return tasks


def purge(engine: Engine, before_us: int, limit: int = 500) -> int:
    return transaction(
        engine, lambda connection: taskstore.purge_bodies(connection, from_micros(before_us), limit)
    )


def test_only_bodies_of_tasks_settled_before_are_purged(
    engine: Engine, settled: dict[str, pb.MailTask]
) -> None:
    assert purge(engine, 2_000_000) == 0  # it ended at that time, not before
    assert purge(engine, 2_000_001, limit=2) == 2
    assert purge(engine, 2_000_001, limit=2) == 2
    assert purge(engine, 2_000_001) == 0
    with engine.connect() as connection:
        loaded = taskstore.load_tasks(connection, [task.id for task in settled.values()])
    kept = {status for status, task in settled.items() if loaded[task.id].HasField("body")}
    assert kept == {"pending", "processing"}
    purged = pb.MailTask()
    purged.CopyFrom(settled["failed"])
    purged.ClearField("body")
    purged.ClearField("html")
    purged.ClearField("headers")
    assert loaded[purged.id] == purged


def test_the_purge_skips_rows_that_another_transaction_has_locked(
    engine: Engine, settled: dict[str, pb.MailTask]
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "SELECT 1 FROM tasks WHERE id = %s FOR UPDATE", (settled["failed"].id,)
        ).all()
        assert purge(engine, 2_000_001) == 3
    assert purge(engine, 2_000_001) == 1


def test_a_task_reopened_while_it_is_purged_waits_and_finds_no_body(
    engine: Engine, settled: dict[str, pb.MailTask]
) -> None:
    failed = settled["failed"]
    started, found = threading.Event(), []

    def reopen() -> None:
        def write(connection: Connection) -> None:
            started.set()
            connection.exec_driver_sql("SELECT 1 FROM tasks WHERE id = %s FOR UPDATE", (failed.id,)).all()
            found.append(taskstore.load_tasks(connection, [failed.id])[failed.id].HasField("body"))

        transaction(engine, write)

    thread = threading.Thread(target=reopen)
    with engine.begin() as connection:
        assert taskstore.purge_bodies(connection, from_micros(2_000_001)) == 4
        thread.start()
        assert started.wait(10)
        thread.join(0.3)
        assert found == []
    thread.join(10)
    assert found == [False]
