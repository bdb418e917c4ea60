"""What Kafka refuses for ever holds no commit up; what it refuses for now waits."""

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
from services.common.kafka.topic_partition import RecordLocation
from services.common.stage import republisher
from services.common.stage.handler_runner import HandlerRunner
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.outcome_encoder import OutcomeEncoder
from services.common.stage.partition_tracker import InFlightRecord, PartitionTracker
from services.common.stage.types import Dead, Done, Outcome, Retry, Stage

Event = pb.TaskCreated(task=pb.MailTask(id=bytes(16)))


class Broker:
    """Takes what is not larger than `most`; refuses the first `passing` tries for a reason that passes."""

    def __init__(self, most: int, passing: int = 0) -> None:
        self.most, self.passing = most, passing
        self.taken: list[OutgoingRecord] = []

    def send(self, batch: Sequence[OutgoingRecord], done: Any) -> None:
        asyncio.get_running_loop().call_soon(done, self._take(batch))

    async def publish(self, batch: Sequence[OutgoingRecord]) -> list[PublishFailure]:
        return self._take(batch)

    def _take(self, batch: Sequence[OutgoingRecord]) -> list[PublishFailure]:
        if self.passing:
            self.passing -= 1
            return [(n, KafkaError(KafkaError._MSG_TIMED_OUT)) for n in range(len(batch))]
        failures = []
        for n, item in enumerate(batch):
            size = len(item.key or b"") + len(item.value or b"")
            size += sum(len(name) + len(value or b"") for name, value in item.headers)
            if size > self.most:
                failures.append((n, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)))
            else:
                self.taken.append(item)
        return failures


async def settled(
    broker: Broker, outcome: Outcome, value: bytes, key: bytes, header: bytes
) -> OutgoingRecord:
    """Have a stage answer this outcome for a record, and return what was written once it is finished."""
    stage = Stage("sender", ["task.created"], DECODERS, handle=lambda _: outcome, delays=(5,))
    released: list[InFlightRecord] = []
    publisher: Any = broker
    runner = HandlerRunner(stage, OutcomeEncoder(stage, "sender"), publisher, released.extend)
    tracker = PartitionTracker(InFlightLimit(10, 1 << 30))
    tracker.assign([("task.created", 3)])
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
    async with asyncio.timeout(5):
        while not released:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert record.finished
    (item,) = broker.taken
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
async def test_a_record_that_fits_into_no_letter_goes_without_its_value(outcome: Outcome) -> None:
    value = b"v" * 3000
    item = await settled(Broker(1000), outcome, value, b"k", b"h")
    headers = dict(item.headers)
    assert (item.key, item.value, headers["x"]) == (b"k", None, b"h")
    assert headers["value-size"] == b"3000"
    assert headers["value-sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert headers["cause"]
    assert "key-size" not in headers


@pytest.mark.parametrize(("key", "header"), [(b"k" * 3000, b"h"), (b"k", b"h" * 3000)])
async def test_one_whose_key_or_headers_do_not_fit_goes_without_them_too(key: bytes, header: bytes) -> None:
    item = await settled(Broker(1000), Dead("no"), b"v" * 10, key, header)
    headers = dict(item.headers)
    assert (item.key, item.value) == (None, None)
    assert "x" not in headers
    assert (headers["value-size"], headers["key-size"]) == (b"10", b"%d" % len(key))
    assert headers["key-sha256"] == hashlib.sha256(key).hexdigest().encode()


async def test_i9_a_letter_that_is_refused_for_now_waits_and_keeps_its_value() -> None:
    item = await settled(Broker(1000, passing=4), Dead("no"), b"v" * 10, b"k", b"h")
    assert (item.key, item.value) == (b"k", b"v" * 10)
