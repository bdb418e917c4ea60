"""The status stage and its service, on real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Producer
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.database.engine import make_engine
from services.common.events import DECODERS, Event, encode, event_key, task_id
from services.common.fold import delta, fold
from services.common.kafka import admin as kafka_admin
from services.common.kafka.topics import EVENT_TOPICS
from services.common.stage.types import Dead, Done, Record
from services.common.stages import all_topics
from services.common.taskstore import body_of, insert_bodies, upsert
from services.status.purge import purge
from services.status.service import StatusService, build
from services.status.stage import StatusHandler, stage
from tests.event_strategies import mail_task
from tests.groups import Offsets
from tests.stack import Infra

AT = 1_763_976_543_123_456


def records(*events: Event) -> list[Record]:
    return [Record(event_key(event).partition(":")[0], task_id(event), event) for event in events]


def rows(engine: Engine, what: str = "status", table: str = "tasks") -> list[Any]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(f"SELECT {what} FROM {table} ORDER BY 1")]


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.05)


@pytest.fixture
async def status(engine: Engine) -> AsyncIterator[StatusHandler]:
    status = StatusHandler(engine)
    yield status
    await status.close()


def test_it_reads_all_event_topics(engine: Engine) -> None:
    made = stage(StatusHandler(engine))
    assert set(made.topics) == set(EVENT_TOPICS) == set(made.decoders) == set(DECODERS)


async def test_a_batch_is_folded_and_its_timeline_kept(engine: Engine, status: StatusHandler) -> None:
    task = mail_task(0)
    events: list[Event] = [
        pb.MailSent(id=task.id, attempt=2, message_id="<m@x>", at_us=AT + 3),
        pb.MailDeferred(id=task.id, stage="sender", attempt=1, at_us=AT + 2),
        pb.TaskCreated(task=task, at_us=AT),
        pb.MxOk(task=task, attempt=1, at_us=AT + 1),
        pb.MxOk(task=task, attempt=1, at_us=AT + 1),
    ]
    assert await status.handle_batch(records(*events)) == [Done()] * 5
    assert await status.handle_batch(records(*events)) == [Done()] * 5
    assert rows(engine, "status, attempts, message_id, recipient") == [("completed", 2, "<m@x>", task.email)]
    assert rows(engine, "kind", "task_events") == [("created",), ("deferred",), ("mx_ok",), ("sent",)]


async def test_unusual_content_is_stored(engine: Engine, status: StatusHandler) -> None:
    task = mail_task(0)
    odd: list[Event] = [
        pb.MailDeferred(id=task.id, stage="no such stage, and a long name too", attempt=0xFFFFFFFF),
        pb.MxFailed(id=task.id, reason="x" * 5000, detail="\0\U0001f4ee" * 3000, at_us=-(1 << 63)),
        pb.MailFailed(id=task.id, epoch=(1 << 64) - 1, reply="é" * 5000, at_us=(1 << 63) - 1),
        pb.MxOk(task=pb.MailTask(id=task.id)),
        pb.TaskCreated(task=pb.MailTask(id=bytes(16), email="@" * 999, subject="\U0001f4ee" * 2000)),
    ]
    unknown = pb.MailSent.FromString(pb.MailSent(id=b"u" * 16).SerializeToString() + b"\xba\x3e\x01x")
    assert await status.handle_batch(records(*odd, unknown)) == [Done()] * 6
    assert len(rows(engine)) == 3


async def test_a_record_that_the_database_refuses_is_dead_and_its_neighbours_are_stored(
    engine: Engine, status: StatusHandler
) -> None:
    first, second, third = mail_task(0), mail_task(2), mail_task(4)
    second.idempotency_key = first.idempotency_key
    # The second task exists already, without its mail; its key is the first one's.
    await status.handle_batch(
        records(pb.TaskCreated(task=first, at_us=AT), pb.TaskCancelled(id=second.id, at_us=AT))
    )
    outcomes = await status.handle_batch(
        records(
            pb.MxOk(task=first, attempt=1, at_us=AT),
            pb.TaskCreated(task=second, at_us=AT),
            pb.TaskCreated(task=third, at_us=AT),
        )
    )
    assert [type(outcome) for outcome in outcomes] == [Done, Dead, Done]
    assert isinstance(outcomes[1], Dead)
    assert outcomes[1].cause.startswith("IntegrityError: 1062")
    assert first.subject not in outcomes[1].cause
    assert sorted(rows(engine)) == [("cancelled",), ("pending",), ("processing",)]
    assert status.problems() == []


async def test_no_record_fails_because_the_database_is_not_migrated(server: Infra) -> None:
    engine = make_engine(server.new_database())
    status = StatusHandler(engine)
    with pytest.raises(DBAPIError, match="doesn't exist"):
        await status.handle_batch(records(pb.TaskCancelled(id=bytes(16))))
    await status.close()
    engine.dispose()


@pytest.mark.breaks_servers
async def test_a_batch_waits_while_the_database_is_away(
    server: Infra, engine: Engine, status: StatusHandler
) -> None:
    await status.handle_batch(records(pb.TaskCancelled(id=bytes(16))))
    await asyncio.to_thread(server.kill, "mysql")
    try:
        batch = asyncio.ensure_future(status.handle_batch(records(pb.TaskCancelled(id=b"x" * 16))))
        await until(lambda: bool(status.problems()))
        assert status.problems()[0].startswith("database: ")
        assert not batch.done()
    finally:
        await asyncio.to_thread(server.start, "mysql")
    assert await asyncio.wait_for(batch, 60) == [Done()]
    assert status.problems() == []
    assert len(rows(engine)) == 2


def test_the_purge_goes_on_until_nothing_is_left(engine: Engine) -> None:
    tasks = [mail_task(n) for n in range(450)]
    for number, task in enumerate(tasks):
        task.id = number.to_bytes(6) + task.id[6:]
    with engine.begin() as connection:
        insert_bodies(connection, [body_of(task) for task in tasks])
        upsert(connection, [delta(pb.MailSent(id=task.id, attempt=1, at_us=1_000_000)) for task in tasks])
    assert purge(engine, 10, now_us=11_000_000) == 0
    assert purge(engine, 10, now_us=11_000_001) == 450


# --- the service, on Kafka -------------------------------------------------------------------------


@pytest.fixture
def config(infra: Infra, server: Infra, database_url: str) -> Settings:
    settings = Settings(
        kafka_bootstrap=infra.bootstrap,
        database_url=server.as_user("status", database_url),
        topic_prefix=infra.topic_prefix(),
        partitions=2,
        validator_delays=(1,),
        sender_delays=(1,),
    )
    kafka_admin.apply(settings, all_topics(settings))
    return settings


@pytest.fixture
def produce(config: Settings) -> Iterator[Callable[..., None]]:
    producer = Producer({"bootstrap.servers": config.kafka_bootstrap, "enable.idempotence": True})

    def put(topic: str, key: bytes | None, value: bytes | None) -> None:
        producer.produce(config.topic_prefix + topic, key=key, value=value)

    yield put
    assert producer.flush(10) == 0


def put_events(produce: Callable[..., None], events: list[Event]) -> None:
    for event in events:
        outgoing = encode(event, "test")
        produce(outgoing.topic, outgoing.key, outgoing.value)


async def running(config: Settings) -> tuple[StatusService, asyncio.Task[None]]:
    service = await build(config)
    task = asyncio.create_task(service.run())
    await until(lambda: task.done() or not service.problems())
    assert not task.done(), task.result()
    return service, task


async def test_the_service_folds_the_records_of_the_topics(
    config: Settings, engine: Engine, produce: Callable[..., None]
) -> None:
    tasks = [mail_task(n) for n in range(60)]
    events: list[Event] = []
    for task in tasks:
        events += [
            pb.MailSent(id=task.id, attempt=1, at_us=AT + 2),
            pb.TaskCreated(task=task, at_us=AT),
            pb.MxOk(task=task, attempt=1, at_us=AT + 1),
        ]
    put_events(produce, events)
    for topic in EVENT_TOPICS:
        produce(topic, b"garbage", b"\xff\xff\xff")
        produce(topic, None, b"")
    service, running_task = await running(config)
    await until(lambda: rows(engine, "COUNT(*)", "task_events") == [(180,)])
    assert rows(engine, "DISTINCT status") == [("completed",)]
    row = None
    for event in events[:3]:
        row = fold(row, event)
    assert row is not None
    stored = {found[0]: found[1:] for found in rows(engine, "id, version, updated_at, subject")}
    assert stored[row.id] == (row.version, row.updated_at, row.subject)
    service.stop()
    await asyncio.wait_for(running_task, 60)
    assert await asyncio.to_thread(dead_letters, config) == 14


def dead_letters(config: Settings) -> int:
    with Offsets(config.kafka_bootstrap, "none") as group:
        topic = f"{config.topic_prefix}status.dead"
        return sum(high for _, high in group.bounds(group.partitions([topic])).values())


async def test_a_second_run_continues_where_the_first_one_stopped(
    config: Settings, engine: Engine, produce: Callable[..., None]
) -> None:
    for number in range(2):
        put_events(produce, [pb.TaskCreated(task=mail_task(number), at_us=AT)])
        service, task = await running(config)
        await until(lambda wanted=number + 1: len(rows(engine)) == wanted)  # type: ignore[misc]
        service.stop()
        await asyncio.wait_for(task, 60)
