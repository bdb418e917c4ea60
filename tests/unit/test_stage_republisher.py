"""Republisher: a record that Kafka always refuses holds up no commit; one that it refuses for now waits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import KafkaError

from postroad.v1 import events_pb2 as pb
from services.common.events import DECODERS
from services.common.kafka.headers import parse_attempt, parse_origin
from services.common.kafka.publisher import PublishFailure
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topic_partition import RecordLocation, TopicPartition
from services.common.stage import republisher
from services.common.stage.handler_runner import HandlerRunner
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.outcome_encoder import OutcomeEncoder
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.types import Dead, Done, Outcome, Retry, Stage

Event = pb.TaskCreated(task=pb.MailTask(id=bytes(16)))


class FakePublisher:
    """Acks records of up to `most` bytes, after the first `timeouts` tries timed out."""

    def __init__(self, most: int, timeouts: int = 0) -> None:
        self.most, self.timeouts = most, timeouts
        self.acked: list[OutgoingRecord] = []

    def send(self, batch: Sequence[OutgoingRecord], done: Any) -> None:
        asyncio.get_running_loop().call_soon(done, self._publish(batch))

    async def publish(self, batch: Sequence[OutgoingRecord]) -> list[PublishFailure]:
        return self._publish(batch)

    def _publish(self, batch: Sequence[OutgoingRecord]) -> list[PublishFailure]:
        if self.timeouts:
            self.timeouts -= 1
            return [(n, KafkaError(KafkaError._MSG_TIMED_OUT)) for n in range(len(batch))]
        failures = []
        for n, item in enumerate(batch):
            size = len(item.key or b"") + len(item.value or b"")
            size += sum(len(name) + len(value or b"") for name, value in item.headers)
            if size > self.most:
                failures.append((n, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)))
            else:
                self.acked.append(item)
        return failures


async def dead_letter(
    publisher: FakePublisher, outcome: Outcome, value: bytes, key: bytes, header: bytes
) -> OutgoingRecord:
    """Let a handler return this outcome for a record, and return the one record that is published for it."""
    stage = Stage("sender", ["task.created"], DECODERS, handle=lambda _: outcome, delays=(5,))
    released: list[InFlightRecord] = []
    runner = HandlerRunner(stage, OutcomeEncoder(stage, "sender"), publisher, released.extend)  # type: ignore[arg-type]
    tracker = PartitionTracker(InFlightLimit(10, 1 << 30))
    tracker.assign([TopicPartition("task.created", 3)])
    assignment = tracker.find("task.created", 3)
    assert assignment is not None
    record = InFlightRecord(
        assignment=assignment,
        offset=17,
        topic="task.created",
        key=key,
        value=value,
        headers=[("x", header)],
        event=Event,
        origin=RecordLocation("task.created", 1, 2),
        attempt=4,
    )
    runner.start([record])
    async with asyncio.timeout(30):
        while not released:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert record.finished
    (item,) = publisher.acked
    assert item.topic == "sender.dead"
    assert str(parse_origin(item.headers)) == "task.created/1/2"
    assert parse_attempt(item.headers) == 4
    return item


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(republisher, "_FIRST_PAUSE", 0.001)


@pytest.mark.parametrize(
    "outcome",
    [Dead("no"), Retry(5, 0, "later"), Done([pb.TaskCreated(task=pb.MailTask(body="b" * 3000))])],
    ids=["dead", "retry", "done"],
)
async def test_a_dead_letter_that_is_too_large_goes_without_its_value(outcome: Outcome) -> None:
    value = b"v" * 3000
    item = await dead_letter(FakePublisher(1000), outcome, value, b"k", b"h")
    headers = dict(item.headers)
    assert (item.key, item.value, headers["x"]) == (b"k", None, b"h")
    assert headers["value-size"] == b"3000"
    assert headers["value-sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert headers["cause"]
    assert "key-size" not in headers


@pytest.mark.parametrize(("key", "header"), [(b"k" * 3000, b"h"), (b"k", b"h" * 3000)])
async def test_a_dead_letter_with_a_large_key_or_headers_goes_without_them(key: bytes, header: bytes) -> None:
    item = await dead_letter(FakePublisher(1000), Dead("no"), b"v" * 10, key, header)
    headers = dict(item.headers)
    assert (item.key, item.value) == (None, None)
    assert "x" not in headers
    assert (headers["value-size"], headers["key-size"]) == (b"10", b"%d" % len(key))
    assert headers["key-sha256"] == hashlib.sha256(key).hexdigest().encode()


async def test_i9_a_dead_letter_that_times_out_is_published_again_with_its_value() -> None:
    item = await dead_letter(FakePublisher(1000, timeouts=4), Dead("no"), b"v" * 10, b"k", b"h")
    assert (item.key, item.value) == (b"k", b"v" * 10)
