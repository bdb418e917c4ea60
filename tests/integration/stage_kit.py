"""The kit of the stage runtime's tests: each gets an installation of its own on the real broker."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.events import DECODERS, encode
from services.common.kafka.publisher import Publisher
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topics import MX_OK, TASK_CREATED, Names
from services.common.stage.runtime import StageRuntime
from services.common.stage.types import Done, Record, Stage
from services.common.stages import all_topics
from tests.groups import Offsets
from tests.stack import Infra

__all__ = ["Kit", "Watched", "created", "passed_on", "until"]

PARTITIONS = 4


def created(number: int = 0, body: str = "text") -> OutgoingRecord:
    """Return a task.created record. Its epoch is `number`, by which handlers tell tasks apart."""
    task = pb.MailTask(id=uuid.uuid4().bytes, email="a@good.test", subject="s", body=body)
    return encode(pb.TaskCreated(task=task, epoch=number, at_us=1), "api", b"00-1-2-01")


def passed_on(record: Record) -> Done:
    """Return the outcome of a handler that publishes mx.ok for every task."""
    event = record.event
    assert isinstance(event, pb.TaskCreated)
    return Done([pb.MxOk(task=event.task, epoch=event.epoch, attempt=record.attempt, at_us=event.at_us)])


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Return once `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, 0.1)


class Watched(Consumer):
    """A real Consumer that notes which of its methods are called, and from which threads."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.threads: set[str] = {threading.current_thread().name}
        self.calls: set[str] = set()

    def _note(self, name: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.add(name)


def _noting(name: str) -> Callable[..., Any]:
    original = getattr(Consumer, name)

    def call(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self._note(name)
        return original(self, *args, **kwargs)

    return call


for _name in dir(Consumer):
    if not _name.startswith("_"):
        setattr(Watched, _name, _noting(_name))


class Kit:
    """One installation: its topics, a stage like the validator's to run, and what topics and group hold."""

    def __init__(self, infra: Infra, protocol: str) -> None:
        self.infra, self.protocol = infra, protocol
        self.prefix = infra.topic_prefix()
        self.names = Names(self.prefix)
        self.group = self.names.group("validator")
        self.settings = self.with_()
        self.admin = AdminClient({"bootstrap.servers": infra.bootstrap})
        self._offsets = Offsets(infra.bootstrap, self.group)
        self.topics = [
            self.names.topic(TASK_CREATED),
            self.names.topic(MX_OK),
            self.names.delay("validator", 1),
            self.names.delay("validator", 2),
            self.names.dead("validator"),
        ]
        new = [
            NewTopic(topic.name, topic.partitions, topic.replication, config=dict(topic.config))
            for topic in all_topics(self.settings)
            if topic.name in self.topics
        ]
        for done in self.admin.create_topics(new).values():
            done.result()

    def close(self) -> None:
        """Delete the installation's topics."""
        self._offsets.close()
        for done in self.admin.delete_topics(self.topics).values():
            done.result()

    def with_(self, **changes: Any) -> Settings:
        """Return the installation's settings with these changes."""
        base: dict[str, Any] = {
            "kafka_bootstrap": self.infra.bootstrap,
            "topic_prefix": self.prefix,
            "partitions": PARTITIONS,
            "group_protocol": self.protocol,
            "validator_delays": (1, 2),
            "sender_delays": (1,),
            "drain_seconds": 5,
        }
        return Settings(**(base | changes))

    def runtime(self, settings: Settings | None = None, **stage: Any) -> StageRuntime:
        """Return a runtime of the stage `validator` with this handler (`handle` or `handle_batch`)."""
        consumer = stage.pop("consumer", Consumer)
        delays = stage.pop("delays", (1, 2))
        return StageRuntime(
            Stage("validator", [TASK_CREATED], DECODERS, delays=delays, **stage),
            settings or self.settings,
            source="validator",
            consumer=consumer,
        )

    @contextlib.asynccontextmanager
    async def running(self, settings: Settings | None = None, **stage: Any) -> AsyncIterator[StageRuntime]:
        """Run such a runtime: it has joined its group when the block begins, and drains at its end."""
        runtime = self.runtime(settings, **stage)
        run = asyncio.create_task(runtime.run())
        try:
            await until(lambda: run.done() or not runtime.problems(), 40)
            yield runtime
        finally:
            runtime.stop()
            await run

    async def publish(self, outgoing: Iterable[OutgoingRecord]) -> None:
        """Publish these records, and return once they are acked."""
        publisher = Publisher(self.settings, client_id="test")
        publisher.start()
        assert await publisher.publish(list(outgoing)) == []
        await publisher.close(5)

    def read(self, bare: str) -> list[Message]:
        """Return all records that a topic (bare name) has now."""
        consumer = Consumer(
            {"bootstrap.servers": self.infra.bootstrap, "group.id": "none", "enable.auto.commit": False}
        )
        messages, deadline = [], time.monotonic() + 20
        topic, ends = self.prefix + bare, self.end(bare)
        try:
            consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
            while len(messages) < sum(ends.values()):
                assert time.monotonic() < deadline, f"{topic} could not be read"
                messages += consumer.consume(1000, 0.05)
            assert all(message.error() is None for message in messages)
        finally:
            consumer.close()
        return messages

    def count(self, bare: str) -> int:
        """Return how many records were published to a topic: much cheaper than to read them."""
        return sum(self.end(bare).values())

    def committed(self, bare: str = TASK_CREATED) -> dict[int, int]:
        """Return the group's committed offset of each partition of a topic, 0 where there is none."""
        topic = self.prefix + bare
        found = self._offsets.committed(TopicPartition(topic, n) for n in range(PARTITIONS))
        return {n: found.get((topic, n), 0) for n in range(PARTITIONS)}

    def end(self, bare: str = TASK_CREATED) -> dict[int, int]:
        """Return the end offset of each partition of a topic."""
        partitions = [TopicPartition(self.prefix + bare, n) for n in range(PARTITIONS)]
        return {number: end for (_, number), (_, end) in self._offsets.bounds(partitions).items()}
