"""The outbox publisher, without Kafka and MySQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from confluent_kafka import KafkaError
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from postroad.v1 import events_pb2
from services.api.outbox import ApiEvent, OutboxEvent, OutboxRow, created
from services.api.outbox_publisher import OutboxPublisher
from services.common.batching import Batcher
from services.common.database.errors import is_transient


class Kafka:
    """Stands for a Publisher, and acks what the test acks."""

    def __init__(self) -> None:
        self.unacked: list[tuple[int, Callable[[list[Any]], None]]] = []

    def send(self, batch: Sequence[object], on_done: Callable[[list[Any]], None]) -> None:
        """Publish a batch."""
        self.unacked.append((len(batch), on_done))

    def ack(self, *failed: int) -> None:
        """Ack the oldest batch but for these indices."""
        _, on_done = self.unacked.pop(0)
        on_done([(index, KafkaError(KafkaError._MSG_TIMED_OUT)) for index in failed])


class Setup:
    """An outbox publisher, and what it deleted."""

    def __init__(self, max_count: int = 5000) -> None:
        self.deleted: list[list[OutboxRow]] = []
        self.kafka: Any = Kafka()
        self.deleter: Batcher[OutboxRow, None] = Batcher(self._delete, 5000)
        self.publisher = OutboxPublisher(self.kafka, self.deleter, max_count, 1 << 20)

    def _delete(self, rows: Sequence[OutboxRow]) -> list[None]:
        self.deleted.append(list(rows))
        return [None] * len(rows)


def events(first: int, count: int) -> list[OutboxEvent[ApiEvent]]:
    made = [events_pb2.TaskCreated(at_us=1) for _ in range(count)]
    for number, event in enumerate(made, start=first):
        event.task.id = number.to_bytes(16)
    return [OutboxEvent(event, b"trace") for event in made]


def rows(first: int, count: int) -> list[OutboxRow]:
    return [created(number.to_bytes(16)) for number in range(first, first + count)]


async def test_what_is_left_in_the_outbox_is_logged_without_the_statement() -> None:
    def fail(rows: Sequence[OutboxRow]) -> list[None]:
        raise OperationalError("DELETE " * 7000, None, Exception("gone"))

    deleter: Batcher[OutboxRow, None] = Batcher(fail, shared=is_transient)
    publisher: Any = None
    outbox_publisher = OutboxPublisher(publisher, deleter, 100, 1 << 20)
    with capture_logs() as lines:
        await asyncio.wait_for(outbox_publisher._delete([created(bytes(16))]), 10)
    assert [(line["events"], line["error"]) for line in lines] == [(1, "gone")]
    await deleter.close()


async def test_acked_events_leave_the_outbox_together_and_are_held_until_then() -> None:
    setup = Setup()
    for first in (0, 10, 20):
        setup.publisher.publish(events(first, 10))
        setup.kafka.ack()
    assert all(map(setup.publisher.is_publishing, rows(0, 30)))
    assert setup.deleted == []
    await asyncio.wait_for(setup.publisher._idle.wait(), 10)
    assert setup.deleted == [rows(0, 30)]
    assert not any(map(setup.publisher.is_publishing, rows(0, 30)))


async def test_many_acked_events_leave_the_outbox_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.api.outbox_publisher._DELETE_INTERVAL", 1000.0)
    setup = Setup()
    setup.publisher.publish(events(0, 1200))
    setup.kafka.ack()
    assert setup.publisher._timer is None
    await asyncio.wait_for(setup.publisher._idle.wait(), 10)
    assert setup.deleted == [rows(0, 1200)]


async def test_a_drain_waits_for_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.api.outbox_publisher._DELETE_INTERVAL", 1000.0)
    setup = Setup()
    setup.publisher.publish(events(0, 3))
    setup.publisher.publish(events(3, 3))
    setup.kafka.ack()
    drain = asyncio.ensure_future(setup.publisher.drain(10))
    await asyncio.sleep(0)
    setup.kafka.ack()
    await asyncio.wait_for(drain, 10)
    assert sorted(row for part in setup.deleted for row in part) == rows(0, 6)


async def test_events_that_wait_only_for_their_deletion_take_no_capacity() -> None:
    setup = Setup(max_count=10)
    setup.publisher.publish(events(0, 10))
    setup.kafka.ack()
    setup.publisher.publish(events(10, 15))
    assert [count for count, _ in setup.kafka.unacked] == [10]
    setup.publisher.publish(events(30, 1))
    assert len(setup.kafka.unacked) == 1


async def test_what_kafka_does_not_ack_stays_in_the_outbox() -> None:
    setup = Setup()
    setup.publisher.publish(events(0, 4))
    with capture_logs() as lines:
        setup.kafka.ack(1, 3)
    assert lines[0]["events"] == 2
    assert [setup.publisher.is_publishing(row) for row in rows(0, 4)] == [True, False, True, False]
    await setup.publisher.drain(10)
    assert setup.deleted == [[*rows(0, 1), *rows(2, 1)]]
