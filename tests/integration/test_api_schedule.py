"""Scheduled tasks are published when they are due, while many others wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import islice

import grpc
import pytest
from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2, task_pb2
from postroad.v1.task_service_pb2 import CreateRequest, GetRequest, TaskData
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import outbox, uuid7
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.fold import delta
from services.common.timeline import timeline_row
from tests.api_process import ApiProcess, Installation, eventually
from tests.forms import by_form
from tests.stack import Infra

SECOND = 1_000_000
SCHEDULED = by_form(1_000, 50_000)


@pytest.fixture
def installation(servers: Infra) -> Installation:
    return Installation(servers)


@pytest.fixture
def engine(installation: Installation) -> Iterator[Engine]:
    engine = make_engine(installation.database_url)
    yield engine
    engine.dispose()


def now_us() -> int:
    return time.time_ns() // 1000


def create(api: ApiProcess, send_at_us: int, key: str = "") -> task_pb2.Task:
    asked = CreateRequest(data=TaskData(email="a@shop.test", subject="s", body="text"), idempotency_key=key)
    asked.send_at.FromMicroseconds(send_at_us)
    with grpc.insecure_channel(api.target) as channel:
        task: task_pb2.Task = TaskServiceStub(channel).Create(asked, timeout=20)
    return task


def insert_scheduled(engine: Engine, count: int) -> None:
    """Insert tasks that are due in an hour or later, as Creates leave them."""
    generator = uuid7.IdGenerator()

    def events() -> Iterator[events_pb2.TaskCreated]:
        for number in range(count):
            id_, us = generator.new()
            mail = events_pb2.MailTask(
                id=id_, tenant="default", email=f"u{number}@shop.test", domain="shop.test", subject="s"
            )
            mail.body, mail.created_at_us = "text", us
            send_at_us = us + (3600 + number % 3600) * SECOND
            yield events_pb2.TaskCreated(task=mail, at_us=us, send_at_us=send_at_us)

    def write(part: list[events_pb2.TaskCreated], connection: Connection) -> None:
        taskstore.upsert(connection, map(delta, part))
        taskstore.insert_events(connection, map(timeline_row, part))
        taskstore.insert_bodies(connection, [taskstore.body_of(event.task) for event in part])
        due = [(outbox.row_of(event), from_micros(event.send_at_us)) for event in part]
        outbox.insert_scheduled(connection, due)

    source = events()
    while part := list(islice(source, 2000)):
        transaction(engine, partial(write, part))


def published_at(installation: Installation) -> list[tuple[str, float]]:
    """Return the id of each published task, and when it was published."""
    return [
        (
            uuid7.text(events_pb2.TaskCreated.FromString(message.value() or b"").task.id),
            message.timestamp()[1] / 1000,
        )
        for message in installation.records()
    ]


@pytest.mark.breaks_servers
def test_scheduled_tasks_are_published_when_due_although_api_and_database_die(
    servers: Infra, installation: Installation, engine: Engine
) -> None:
    insert_scheduled(engine, SCHEDULED)
    with ApiProcess(installation) as first, ApiProcess(installation) as second:
        start = now_us() + 2 * SECOND
        times = {create(first, start + n * 150_000).id: start + n * 150_000 for n in range(10)}
        late = now_us() + 8 * SECOND
        times |= {create(second, late + n * 150_000).id: late + n * 150_000 for n in range(10)}
        eventually(lambda: len(published_at(installation)) >= 10)
        # There are two replicas, but one record a task.
        assert sorted(id_ for id_, _ in published_at(installation)) == sorted(list(times)[:10])
        first.kill()
        second.kill()
    servers.stop("mysql")
    servers.start("mysql")
    with ApiProcess(installation):
        ready = now_us()
        eventually(lambda: len(published_at(installation)) >= 20, 40)
        lateness = {id_: at - max(times[id_], ready) / SECOND for id_, at in published_at(installation)}
        early = [id_ for id_, at in published_at(installation) if at < times[id_] / SECOND - 0.001]
    assert len(published_at(installation)) == 20
    assert lateness.keys() == times.keys()
    assert not early
    assert max(lateness.values()) < 10, sorted(lateness.values())


def test_a_scheduled_task_shows_its_time_and_its_key_returns_it(installation: Installation) -> None:
    with ApiProcess(installation) as api:
        send_at_us = now_us() + 3600 * SECOND
        task = create(api, send_at_us, "k")
        assert (task.status, task.next_attempt_at.ToMicroseconds()) == ("pending", send_at_us)
        assert create(api, send_at_us, "k") == task
        with pytest.raises(grpc.RpcError) as caught:
            create(api, send_at_us + 1, "k")
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        with grpc.insecure_channel(api.target) as channel:
            found = TaskServiceStub(channel).Get(GetRequest(id=task.id))
        assert [(line.kind, line.next_attempt_at) for line in found.timeline] == [
            ("created", task.next_attempt_at)
        ]
        with pytest.raises(grpc.RpcError) as caught:
            create(api, send_at_us + timedelta(days=366) // timedelta(microseconds=1))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "send_at" in (caught.value.details() or "")
        past = create(api, 1)
        assert not past.HasField("next_attempt_at")
        eventually(lambda: [id_ for id_, _ in published_at(installation)] == [past.id])
        eventually(lambda: api.metric('postroad_api_published_total{way="relay"}') == 1)
