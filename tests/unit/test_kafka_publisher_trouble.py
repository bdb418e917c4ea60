"""Publisher when librdkafka is in trouble: it fails for good, or reports as delivered what no broker has."""

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
from tests.librdkafka import handle, library, mock_cluster

INCONSISTENT = -149
PRODUCE, NO_ERROR, NOT_ENOUGH_REPLICAS = 0, 0, 19


def record(number: int) -> OutgoingRecord:
    return OutgoingRecord("task.created", b"k" * 16, b"%d" % number, [])


def break_down(producer: Producer) -> None:
    """Make librdkafka report a fatal error, as it does when it has lost count of its batches."""
    assert library().rd_kafka_test_fatal_error(handle(producer), INCONSISTENT, b"for the test") == 0


def answer_next(producer: Producer, *errors: int) -> None:
    """Have librdkafka's mock broker answer the next Produce requests with these errors."""
    api = library()
    cluster = mock_cluster(producer)
    assert api.rd_kafka_mock_topic_create(cluster, b"task.created", 1, 1) == 0
    # So slow that the second request is under way before the first one is answered.
    assert api.rd_kafka_mock_broker_set_rtt(cluster, ctypes.c_int32(1), 300) == 0
    codes = [ctypes.c_int(error) for error in errors]
    api.rd_kafka_mock_push_request_errors(
        cluster, ctypes.c_int16(PRODUCE), ctypes.c_size_t(len(codes)), *codes
    )


def silence(producer: Producer) -> None:
    """Have librdkafka's mock broker answer nothing for a long time."""
    api = library()
    cluster = mock_cluster(producer)
    assert api.rd_kafka_mock_broker_set_rtt(cluster, ctypes.c_int32(1), 100_000) == 0


@asynccontextmanager
async def running(**overrides: Any) -> AsyncIterator[Publisher]:
    publisher = Publisher(Settings(kafka_bootstrap="127.0.0.1:1"), "test", **overrides)
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close(1)


async def test_a_record_that_the_client_refuses_holds_up_no_other() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock) as publisher:
        bad = OutgoingRecord("task.created", b"k", 5, [])  # type: ignore[arg-type]
        [(index, error)] = await asyncio.wait_for(publisher.publish([bad, record(1)]), 20)
        assert index == 0
        assert is_permanent(error)


async def test_a_producer_that_failed_is_replaced() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock) as publisher:
        assert await asyncio.wait_for(publisher.publish([record(0)]), 20) == []
        for turn in range(3):
            old = publisher._producer
            break_down(old)
            failures, deadline = [()], asyncio.get_running_loop().time() + 20
            # The old producer fails every record at once; the new one delivers.
            while failures:
                assert asyncio.get_running_loop().time() < deadline, turn
                failures = await asyncio.wait_for(publisher.publish([record(1), record(2)]), 20)
            assert publisher._producer is not old


async def test_the_records_of_a_replaced_producer_have_failed() -> None:
    async with running() as publisher:
        before = publisher.publish([record(1), record(2)])
        break_down(publisher._producer)
        assert [index for index, _ in await asyncio.wait_for(before, 10)] == [0, 1]


async def test_a_batch_that_counts_as_acked_through_a_later_one_has_failed() -> None:
    # A broker that does not know a producer takes any first batch of it. The one before, refused a moment
    # ago, is then never sent again: librdkafka reports it as delivered.
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "linger.ms": 0, "batch.num.messages": 1}
    async with running(**mock) as publisher:
        answer_next(publisher._producer, NOT_ENOUGH_REPLICAS, NO_ERROR)
        failures = await asyncio.wait_for(publisher.publish([record(1), record(2)]), 20)
        assert [index for index, _ in failures] == [0]
        assert await asyncio.wait_for(publisher.publish([record(1)]), 20) == []


async def test_a_producer_that_delivers_nothing_is_replaced() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock, **{"delivery.timeout.ms": 4000, "linger.ms": 0}) as publisher:
        assert await asyncio.wait_for(publisher.publish([record(0)]), 20) == []
        silent = publisher._producer
        silence(silent)
        deadline = asyncio.get_running_loop().time() + 20
        while await asyncio.wait_for(publisher.publish([record(1)]), 20):
            assert asyncio.get_running_loop().time() < deadline
        assert publisher._producer is not silent


class _FailsMidway:
    """A producer that fails in the middle of a batch, and leaves time to replace it."""

    def __init__(self, publisher: Publisher, after: int) -> None:
        self._publisher, self._producer, self._left = publisher, publisher._producer, after

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


async def test_a_batch_that_is_produced_during_the_replacement_gets_its_result() -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock, **{"delivery.timeout.ms": 3000}) as publisher:
        silence(publisher._producer)
        publisher._producer = _FailsMidway(publisher, 20)  # type: ignore[assignment]
        failures = await asyncio.wait_for(publisher.publish([record(n) for n in range(40)]), 20)
        assert len(failures) == 40
        assert await asyncio.wait_for(publisher.publish([record(0)]), 20) == []


async def test_a_producer_is_replaced_later_where_none_can_be_made_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mock: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}
    async with running(**mock) as publisher:
        assert await asyncio.wait_for(publisher.publish([record(0)]), 20) == []
        refused: list[None] = []

        def make(config: dict[str, Any]) -> Producer:
            if len(refused) < 3:
                refused.append(None)
                raise KafkaException(KafkaError(KafkaError._CRIT_SYS_RESOURCE))
            return Producer(config)

        monkeypatch.setattr("services.common.kafka.publisher.Producer", make)
        break_down(publisher._producer)
        deadline = time.monotonic() + 20
        while await asyncio.wait_for(publisher.publish([record(0)]), 20):
            assert time.monotonic() < deadline
        assert len(refused) == 3
