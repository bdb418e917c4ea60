"""The recorder and the outbox on both databases, without Kafka or gRPC around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from postroad.v1 import events_pb2, task_pb2
from postroad.v1.task_service_pb2 import CreateRequest, TaskData
from services.api import metrics, outbox, outbox_backlog, outbox_sweeper, queries, uuid7, views
from services.api.errors import StatusError
from services.api.outbox_publisher import NewTask, OutboxEvent
from services.api.recorder import Recorder
from services.api.validation import task_created
from services.common import taskstore
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.events import encode
from services.common.fold import delta
from services.common.health import Degraded
from services.common.timeline import timeline_entry
from services.common.unpublished import Unpublished, unpublished
from tests.integration.stage_kit import until

CLOCK = uuid7.Clock()


def recording(key: str = "", send_at_us: int = 0, **data: object) -> NewTask:
    mail = {"email": "a@shop.test", "subject": "Hello", "body": "text"} | data
    asked = CreateRequest(data=TaskData(**mail))  # type: ignore[arg-type]
    if send_at_us:
        asked.send_at.FromMicroseconds(send_at_us)
    event = task_created(asked, "default", key, 1000, time.time_ns() // 1000)
    event.task.id, event.task.created_at_us = CLOCK.draw()
    event.at_us = event.task.created_at_us
    return OutboxEvent(event, b"trace", 100)


def ids_in(engine: Engine, table: str, column: str = "task_id") -> list[bytes]:
    rows = transaction(engine, lambda c: c.exec_driver_sql(f"SELECT {column} FROM {table}").all())
    return sorted(bytes(row[0]) for row in rows)


async def record(
    engine: Engine, *recordings: NewTask
) -> tuple[list[task_pb2.Task | BaseException | None], list[NewTask]]:
    """Record all at once; return what each was answered and what was handed on to be published."""
    committed: list[NewTask] = []
    recorder = Recorder(engine, committed.extend, 1000, 1 << 20)
    answers = await asyncio.gather(*map(recorder.record, recordings), return_exceptions=True)
    await recorder.close()
    return answers, committed


async def test_a_recorded_task_stands_in_three_tables_and_is_rebuilt_as_it_was(engine: Engine) -> None:
    rich = recording(
        "key",
        subject="é\u2028",
        body="\0 \r\n👍",
        html="",
        headers={"X-A": "é"},
        labels={"b": '"', "a": "\\"},
    )
    batch = [rich, recording(body="", html="<p>"), *(recording() for _ in range(700))]
    answers, committed = await record(engine, *batch)
    assert answers == [None] * len(batch)
    assert committed == batch
    events = {outbox.created(r.event.task.id): r.event for r in batch}
    ids = sorted(item.task_id for item in events)
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == ids
    assert transaction(engine, lambda c: outbox_sweeper.load_events(c, list(events))) == events
    # What Create answers without reading is what Get reads.
    row = transaction(
        engine,
        lambda c: c.exec_driver_sql(
            f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s", (rich.event.task.id,)
        ).one(),
    )
    assert views.task(row) == views.new_task(rich.event)


async def test_a_task_reopened_or_cancelled_is_rebuilt_byte_for_byte(engine: Engine) -> None:
    """A CloudEvents id names one event: whoever publishes it, the relay or a sweeper, it is the same."""
    maps = {f"{n}-key": f"{n}" for n in range(40)}
    batch = [recording(headers=maps, labels=maps), recording(), recording("k", body=None, html="<p>é")]
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
        taskstore.insert_events(connection, map(timeline_entry, events))
        outbox.put(connection, [outbox.row_of(event) for event in events])

    transaction(engine, write)
    items = [outbox.row_of(event) for event in events]
    assert len(set(items)) == len(items) == 18
    found = transaction(engine, lambda c: outbox_sweeper.load_events(c, items))
    assert [encode(found[item], "api") for item in items] == [encode(event, "api") for event in events]
    # What is not there is not made up.
    unknown = [
        outbox.created(bytes(16)),
        outbox.cancelled(bytes(16), 0),
        outbox.cancelled(items[0].task_id, 5),
    ]
    assert transaction(engine, lambda c: outbox_sweeper.load_events(c, unknown)) == {}


async def test_a_scheduled_task_is_left_to_the_sweeper_and_rebuilt_with_its_time(engine: Engine) -> None:
    send_at_us = time.time_ns() // 1000 + 3600 * 1_000_000 + 7
    later, now = recording(send_at_us=send_at_us, labels={"b": "1", "a": "2"}), recording()
    answers, committed = await record(engine, later, now)
    assert answers == [None, None]
    assert committed == [now]
    item = outbox.row_of(later.event)
    due = "SELECT available_at FROM outbox WHERE task_id = %s"
    [row] = transaction(engine, lambda c: c.exec_driver_sql(due, (item.task_id,)).all())
    assert row.available_at == from_micros(send_at_us)
    assert transaction(engine, lambda c: outbox_sweeper.load_events(c, [item])) == {item: later.event}
    view = transaction(engine, lambda c: queries.get(c, "default", later.event.task.id))
    assert view is not None
    assert (view.status, view.next_attempt_at.ToMicroseconds()) == ("pending", send_at_us)
    [line] = view.timeline
    assert (line.kind, line.next_attempt_at.ToMicroseconds()) == ("created", send_at_us)
    view.ClearField("timeline")
    view.body = ""
    assert view == views.new_task(later.event)
    # Cancelled, its first event waits no longer, and says what it would have said.
    cancelled = events_pb2.TaskCancelled(id=later.event.task.id, epoch=5, at_us=send_at_us)
    transaction(engine, lambda c: taskstore.upsert(c, [delta(cancelled)]))
    assert transaction(engine, lambda c: outbox_sweeper.load_events(c, [item])) == {item: later.event}
    transaction(engine, lambda c: outbox.hasten(c, later.event.task.id))
    transaction(engine, lambda c: outbox.hasten(c, now.event.task.id))
    assert taken(engine, 9) == [item]


async def batch_of(engine: Engine, *recordings: NewTask) -> list[object]:
    recorder = Recorder(engine, lambda _: None, 1000, 1 << 20)
    try:
        return list(await recorder.record_batch(recordings))
    finally:
        await recorder.close()


async def test_a_batch_is_one_transaction_in_which_each_has_its_own_answer(engine: Engine) -> None:
    known = recording("known")
    await record(engine, known)
    first, twice, other, free = (
        recording("k"),
        recording("k"),
        recording("k", subject="x"),
        recording(),
    )
    again, clash = recording("known"), recording("known", body="x")
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


async def test_of_a_batch_that_fails_nothing_is_left(engine: Engine) -> None:
    poison = recording()
    poison.event.task.tenant = "é" * 3
    transaction(
        engine, lambda c: c.exec_driver_sql("ALTER TABLE tasks MODIFY tenant VARCHAR(64) CHARACTER SET ascii")
    )
    with pytest.raises(DBAPIError):
        await batch_of(engine, *(recording() for _ in range(600)), poison)
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == []


async def test_a_key_asked_for_twice_in_one_transaction_is_one_task(engine: Engine) -> None:
    first, same, other, free = recording("k"), recording("k"), recording("k", subject="x"), recording()
    answers, committed = await record(engine, first, same, other, free)
    assert committed == [first, free]
    assert answers[0] is None
    assert answers[1] == views.new_task(first.event)
    assert isinstance(answers[2], StatusError)
    assert answers[3] is None
    kept = sorted(r.event.task.id for r in (first, free))
    assert ids_in(engine, "tasks", "id") == ids_in(engine, "task_bodies") == ids_in(engine, "outbox") == kept


async def test_recorders_that_race_for_keys_agree_on_one_task_each(engine: Engine) -> None:
    # Each takes the keys in another order, so that their transactions meet in deadlocks too.
    keys = [f"key {n}" for n in range(30)]
    rounds = [keys, keys[::-1], keys[15:] + keys[:15], keys[::2] + keys[1::2]]
    results = await asyncio.gather(*(record(engine, *map(recording, order)) for order in rounds))
    recorded = [r.event.task.id for _, committed in results for r in committed]
    assert len(recorded) == len(keys)
    assert sorted(recorded) == ids_in(engine, "tasks", "id") == ids_in(engine, "outbox")
    for answers, _ in results:
        assert all(answer is None or isinstance(answer, task_pb2.Task) for answer in answers), answers


async def test_recording_the_same_again_after_a_commit_of_unknown_outcome_changes_nothing(
    engine: Engine,
) -> None:
    batch = [recording("k"), recording()]
    await record(engine, *batch)
    # Meanwhile it was published, sent and folded.
    sent = events_pb2.MailSent(id=batch[0].event.task.id, attempt=1, at_us=batch[0].event.at_us + 5)
    transaction(engine, lambda c: taskstore.upsert(c, [delta(sent)]))
    before = transaction(engine, lambda c: c.exec_driver_sql("SELECT * FROM tasks ORDER BY id").all())
    answers, committed = await record(engine, *batch)
    assert answers == [None, None]
    assert committed == batch
    assert transaction(engine, lambda c: c.exec_driver_sql("SELECT * FROM tasks ORDER BY id").all()) == before
    assert len(ids_in(engine, "outbox")) == 2


async def test_a_poisonous_task_fails_alone_and_leaves_nothing_behind(engine: Engine) -> None:
    poison = recording()
    poison.event.task.tenant = "é" * 3
    transaction(
        engine, lambda c: c.exec_driver_sql("ALTER TABLE tasks MODIFY tenant VARCHAR(64) CHARACTER SET ascii")
    )
    batch = [recording(), poison, *(recording() for _ in range(20))]
    answers, committed = await record(engine, *batch)
    assert isinstance(answers[1], DBAPIError)
    assert "shop.test" not in str(answers[1])
    assert committed == [batch[0], *batch[2:]]
    assert poison.event.task.id not in ids_in(engine, "task_bodies")


def test_two_sweepers_never_take_the_same(engine: Engine) -> None:
    items = [outbox.created(CLOCK.draw()[0]) for _ in range(100)]

    def put(connection: Connection) -> None:
        outbox.put(connection, items)
        outbox.put(connection, items[:10])

    transaction(engine, put)
    # What was just recorded is the relay's.
    assert taken(engine, 60) == []
    transaction(engine, lambda c: outbox.defer(c, items, -1))
    with engine.begin() as one, engine.begin() as two:
        first = outbox.take(one, 60)
        second = outbox.take(two, 60)
    assert len(first) == 60
    assert sorted(first + second) == sorted(items)
    # What is taken is not due until its lease is over.
    assert taken(engine, 60) == []
    transaction(engine, lambda c: outbox.defer(c, first[:1], -1))
    assert taken(engine, 60) == first[:1]
    transaction(engine, lambda c: outbox.delete(c, items[:99]))
    transaction(engine, lambda c: outbox.delete(c, items[:99]))
    assert ids_in(engine, "outbox") == [items[99].task_id]


def taken(engine: Engine, limit: int) -> Sequence[outbox.OutboxRow]:
    return transaction(engine, lambda c: outbox.take(c, limit))


def test_sweeps_leave_the_time_at_which_an_event_became_due(engine: Engine) -> None:
    def found() -> Unpublished:
        return transaction(engine, unpublished)

    def age(seconds: int) -> None:
        shift = f"due_at = due_at - INTERVAL {seconds} SECOND"
        transaction(engine, lambda c: c.exec_driver_sql(f"UPDATE outbox SET {shift}"))

    assert found() == (0, 0)
    now, later, older = (outbox.created(CLOCK.draw()[0]) for _ in range(3))
    [at] = transaction(engine, lambda c: c.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").one())
    transaction(engine, lambda c: outbox.put(c, [now]))
    transaction(engine, lambda c: outbox.schedule(c, [(later, at + timedelta(seconds=3600))]))
    # The relay has it in hand: it is due from the moment at which it was recorded.
    assert found().due == 1
    assert 0 <= found().oldest_seconds < 60
    age(300)
    for _ in range(3):
        transaction(engine, lambda c: outbox.defer(c, [now], -1))
        assert taken(engine, 9) == [now]
        transaction(engine, lambda c: outbox.put(c, [now]))
        assert found().due == 1
        assert 300 <= found().oldest_seconds < 360
    # A cancelled task's first event waits no longer, and is due from then on.
    transaction(engine, lambda c: outbox.hasten(c, later.task_id))
    transaction(engine, lambda c: outbox.delete(c, [now]))
    assert found().due == 1
    assert 0 <= found().oldest_seconds < 60
    # A version before the column leaves it out.
    transaction(engine, lambda c: outbox.delete(c, [later]))
    due = "UTC_TIMESTAMP(6) - INTERVAL 100 SECOND"
    insert = f"INSERT INTO outbox (task_id, kind, epoch, available_at) VALUES (%s, %s, %s, {due})"
    transaction(engine, lambda c: c.exec_driver_sql(insert, tuple(older)))
    assert found().due == 1
    assert 100 <= found().oldest_seconds < 160


async def test_events_that_wait_for_long_are_a_problem_with_which_the_api_is_ready(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_backlog, "_INTERVAL", 0.02)
    watched = outbox_backlog.OutboxBacklog(engine)
    transaction(engine, lambda c: outbox.put(c, [outbox.created(CLOCK.draw()[0])]))
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


def test_sweeping_does_not_hold_up_recording(engine: Engine) -> None:
    """Under REPEATABLE READ a poller that skips locked rows locks the gaps that inserts need."""
    items = [outbox.created(CLOCK.draw()[0]) for _ in range(100)]
    transaction(engine, lambda c: outbox.put(c, items[:50]))
    transaction(engine, lambda c: outbox.defer(c, items[:50], -1))
    with engine.begin() as sweeping:
        assert len(outbox.take(sweeping, 20)) == 20
        transaction(engine, lambda c: outbox.put(c, items[50:]))
    assert len(ids_in(engine, "outbox")) == 100


@pytest.mark.parametrize("size", [1, 499, 500, 501, 1200])
def test_any_number_of_items_fits(engine: Engine, size: int) -> None:
    items = [outbox.created(CLOCK.draw()[0]) for _ in range(size)]
    transaction(engine, lambda c: outbox.put(c, items))
    assert len(ids_in(engine, "outbox")) == size
    transaction(engine, lambda c: outbox.delete(c, items))
    assert ids_in(engine, "outbox") == []


def test_a_sweep_among_many_scheduled_looks_at_what_is_due_only(engine: Engine) -> None:
    items = [outbox.created(CLOCK.draw()[0]) for _ in range(50_000)]
    [now] = transaction(engine, lambda c: c.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").one())
    times = [now + timedelta(seconds=3600 + n / 10) for n in range(len(items))]
    transaction(engine, lambda c: outbox.schedule(c, list(zip(items, times, strict=True))))
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE TABLE outbox").all()
        assert outbox.next_due(connection, 0.5) == 0.5
        connection.exec_driver_sql("FLUSH STATUS")
        assert outbox.take(connection, 500) == []
        outbox.next_due(connection, 0.5)
        assert unpublished(connection) == (0, 0)
        status = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").all()
        assert sum(int(count) for _, count in status) < 20, status
    # The next one due is told to the moment, and is not taken before.
    soon = outbox.created(CLOCK.draw()[0])
    with engine.begin() as connection:
        [due] = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6) + INTERVAL 0.3 SECOND").one()
        outbox.schedule(connection, [(soon, due)])
        assert 0 < outbox.next_due(connection, 0.5) <= 0.3
    taken_at = None
    while not taken_at:
        with engine.begin() as connection:
            if found := outbox.take(connection, 500):
                assert found == [soon]
                [taken_at] = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").one()
    assert taken_at >= due


async def test_bodies_are_in_hand_a_few_mebibytes_at_a_time(engine: Engine) -> None:
    batch = [recording(body="x" * 900) for _ in range(40)]
    await record(engine, *batch)
    items = [outbox.row_of(r.event) for r in batch]
    transaction(
        engine, lambda c: c.exec_driver_sql("UPDATE task_bodies SET body = REPEAT('x', 1000000), html = 'é'")
    )
    chunks = transaction(
        engine, lambda c: outbox_sweeper.split_by_size(c, [*items, outbox.cancelled(bytes(16), 0)])
    )
    assert [item for chunk in chunks for item in chunk] == [*items, outbox.cancelled(bytes(16), 0)]
    assert [len(chunk) for chunk in chunks] == [4] * 9 + [5]
