"""Publisher on a real broker: failures by record, more records than its queue holds, and no broker."""

from __future__ import annotations

import asyncio
import time

from confluent_kafka import KafkaError

from services.common.kafka.publisher import Publisher, PublishFailure
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topics import TASK_CREATED
from tests.integration.stage_kit import Kit, created, until


async def test_failed_records_are_named_and_the_others_are_published(newest: Kit) -> None:
    publisher = Publisher(newest.settings, "test")
    publisher.start()
    good = [created(n) for n in range(3)]
    local = OutgoingRecord(TASK_CREATED, b"local", b"x" * (6 << 20), [])  # more than the client sends
    ((index, error),) = await publisher.publish([good[0], local, good[1], good[2]])
    assert index == 1
    assert error.code() == KafkaError.MSG_SIZE_TOO_LARGE
    assert await publisher.publish([]) == []
    assert await publisher.close(5)
    assert sorted(m.key() for m in newest.read(TASK_CREATED)) == sorted(item.key for item in good)


async def test_more_records_than_the_producers_queue_holds_are_sent_in_order(newest: Kit) -> None:
    publisher = Publisher(newest.settings, "test", **{"queue.buffering.max.messages": 100})
    publisher.start()
    same_key = created().key
    items = [OutgoingRecord(TASK_CREATED, same_key, b"%d" % n, []) for n in range(5000)]
    answers: list[list[PublishFailure]] = []
    for start in range(0, 5000, 1000):
        publisher.send(items[start : start + 1000], answers.append)
    await until(lambda: len(answers) == 5)
    assert answers == [[]] * 5
    assert await publisher.close(5)
    assert [m.value() for m in newest.read(TASK_CREATED)] == [item.value for item in items]


async def test_close_waits_for_batches_under_way(newest: Kit) -> None:
    publisher = Publisher(newest.settings, "test")
    publisher.start()
    answers: list[list[PublishFailure]] = []
    for _ in range(50):
        publisher.send([created() for _ in range(50)], answers.append)
    assert await publisher.close(10)
    assert len(newest.read(TASK_CREATED)) == 2500
    await until(lambda: answers == [[]] * 50)


async def test_without_a_broker_the_records_fail_in_time(newest: Kit) -> None:
    publisher = Publisher(
        newest.with_(kafka_bootstrap="127.0.0.1:1"), "test", **{"delivery.timeout.ms": 1500, "linger.ms": 0}
    )
    publisher.start()
    started = time.monotonic()
    failures = await publisher.publish([created(), created()])
    assert [index for index, _ in failures] == [0, 1]
    assert {error.code() for _, error in failures} == {KafkaError._MSG_TIMED_OUT}
    assert 1 < time.monotonic() - started < 10
    publisher.send([created()], lambda _: None)
    started = time.monotonic()
    assert not await publisher.close(0.5)
    assert time.monotonic() - started < 5
    await asyncio.sleep(0)
