"""The client library in trouble: it gives up, or takes for delivered what no broker has."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer

from services.common.config import Settings
from services.common.kafka.publisher import Publisher, is_permanent
from services.common.kafka.records import OutgoingRecord
from tests.librdkafka import handle, library

INCONSISTENT = -149
PRODUCE, NO_ERROR, NOT_ENOUGH_REPLICAS = 0, 0, 19


def item(number: int) -> OutgoingRecord:
    return OutgoingRecord("task.created", b"k" * 16, b"%d" % number, [])


def break_down(producer: Producer) -> None:
    """Make the client library report a fatal error, as it does where it has lost count of its batches."""
    assert library().rd_kafka_test_fatal_error(handle(producer), INCONSISTENT, b"for the test") == 0


def answer_next(producer: Producer, *errors: int) -> None:
    """Have the library's own broker answer the next Produce requests with these errors."""
    api = library()
    api.rd_kafka_handle_mock_cluster.restype = ctypes.c_void_p
    cluster = ctypes.c_void_p(api.rd_kafka_handle_mock_cluster(handle(producer)))
    assert api.rd_kafka_mock_topic_create(cluster, b"task.created", 1, 1) == 0
    # Slow enough for the second request to be under way before the first one is answered.
    assert api.rd_kafka_mock_broker_set_rtt(cluster, ctypes.c_int32(1), 300) == 0
    codes = [ctypes.c_int(error) for error in errors]
    api.rd_kafka_mock_push_request_errors(
        cluster, ctypes.c_int16(PRODUCE), ctypes.c_size_t(len(codes)), *codes
    )


def silence(producer: Producer) -> None:
    """Have the library's own broker answer nothing for a long time."""
    api = library()
    api.rd_kafka_handle_mock_cluster.restype = ctypes.c_void_p
    cluster = ctypes.c_void_p(api.rd_kafka_handle_mock_cluster(handle(producer)))
    assert api.rd_kafka_mock_broker_set_rtt(cluster, ctypes.c_int32(1), 100_000) == 0


@asynccontextmanager
async def running(**overrides: Any) -> AsyncIterator[Publisher]:
    publisher = Publisher(Settings(kafka_bootstrap="127.0.0.1:1"), "test", **overrides)
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close(1)


async def test_what_the_client_cannot_write_is_refused_and_holds_up_nothing() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock) as publisher:
        bad = OutgoingRecord("task.created", b"k", 5, [])  # type: ignore[arg-type]
        [(index, error)] = await asyncio.wait_for(publisher.publish([bad, item(1)]), 20)
        assert index == 0
        assert is_permanent(error)


async def test_a_producer_that_failed_is_replaced() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock) as publisher:
        assert await asyncio.wait_for(publisher.publish([item(0)]), 20) == []
        for turn in range(3):
            spent = publisher._producer
            break_down(spent)
            failures, deadline = [()], asyncio.get_running_loop().time() + 20
            # What meets the spent one fails at once; the new one delivers.
            while failures:
                assert asyncio.get_running_loop().time() < deadline, turn
                failures = await asyncio.wait_for(publisher.publish([item(1), item(2)]), 20)
            assert publisher._producer is not spent


async def test_what_a_spent_producer_held_has_failed() -> None:
    async with running() as publisher:
        before = publisher.publish([item(1), item(2)])
        break_down(publisher._producer)
        assert [index for index, _ in await asyncio.wait_for(before, 10)] == [0, 1]


async def test_what_is_acked_only_because_a_later_batch_was_is_not_delivered() -> None:
    # A broker that does not know a producer takes any first batch of it; the one before, refused a moment
    # ago, is then never sent again: the library takes it for delivered.
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "linger.ms": 0, "batch.num.messages": 1}
    async with running(**mock) as publisher:
        answer_next(publisher._producer, NOT_ENOUGH_REPLICAS, NO_ERROR)
        failures = await asyncio.wait_for(publisher.publish([item(1), item(2)]), 20)
        assert [index for index, _ in failures] == [0]
        assert await asyncio.wait_for(publisher.publish([item(1)]), 20) == []


async def test_a_producer_that_delivers_nothing_is_replaced() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock, **{"delivery.timeout.ms": 4000, "linger.ms": 0}) as publisher:
        assert await asyncio.wait_for(publisher.publish([item(0)]), 20) == []
        deaf = publisher._producer
        silence(deaf)
        deadline = asyncio.get_running_loop().time() + 20
        while await asyncio.wait_for(publisher.publish([item(1)]), 20):
            assert asyncio.get_running_loop().time() < deadline
        assert publisher._producer is not deaf


class _GivesUpAmidst:
    """A producer that gives up while a batch is being handed to it, and leaves time to replace it."""

    def __init__(self, publisher: Publisher, amidst: int) -> None:
        self._publisher, self._producer, self._left = publisher, publisher._producer, amidst

    def produce(self, *arguments: Any, **named: Any) -> None:
        self._producer.produce(*arguments, **named)
        self._left -= 1
        if not self._left:
            self._publisher._failed = KafkaError(KafkaError._MSG_TIMED_OUT)
            time.sleep(1)

    def __len__(self) -> int:
        return len(self._producer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


async def test_what_is_being_produced_while_the_producer_is_replaced_is_answered_for() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock, **{"delivery.timeout.ms": 3000}) as publisher:
        silence(publisher._producer)
        publisher._producer = _GivesUpAmidst(publisher, 20)  # type: ignore[assignment]
        failures = await asyncio.wait_for(publisher.publish([item(n) for n in range(40)]), 20)
        assert len(failures) == 40
        assert await asyncio.wait_for(publisher.publish([item(0)]), 20) == []


async def test_a_producer_that_cannot_be_replaced_yet_is_replaced_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock) as publisher:
        assert await asyncio.wait_for(publisher.publish([item(0)]), 20) == []
        refused: list[None] = []

        def make(config: dict[str, Any]) -> Producer:
            if len(refused) < 3:
                refused.append(None)
                raise KafkaException(KafkaError(KafkaError._CRIT_SYS_RESOURCE))
            return Producer(config)

        monkeypatch.setattr("services.common.kafka.publisher.Producer", make)
        break_down(publisher._producer)
        deadline = time.monotonic() + 20
        while await asyncio.wait_for(publisher.publish([item(0)]), 20):
            assert time.monotonic() < deadline
        assert len(refused) == 3
