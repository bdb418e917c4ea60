"""Consumes the event topics for Watch: by assignment, without a group and without commits. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import confluent_kafka
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
)

from services.api.watch.changes import Change, change_of
from services.common.config import Settings
from services.common.events import Undecodable
from services.common.kafka.clients import consumer_config
from services.common.kafka.headers import REPLAY_ID, readable_headers
from services.common.kafka.leaders import retry_while_leaderless
from services.common.kafka.topic_partition import TopicPartition, first_error
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["TIMEOUT", "EventConsumer"]

TIMEOUT = 5.0
"""Seconds that the cluster has to answer a request."""


class EventConsumer:
    """A consumer of the event topics, for one thread at a time. Partitions have bare topic names.

    `fetch_kbytes` limits what the client fetches ahead. With `report_ends`, `fetch` also returns the error
    _PARTITION_EOF at the end of each partition.

    Every method raises KafkaException where the cluster does not answer within 5 s.
    """

    def __init__(
        self,
        settings: Settings,
        on_error: Callable[[KafkaError], None],
        fetch_kbytes: int,
        *,
        report_ends: bool,
    ) -> None:
        self._prefix = settings.topic_prefix
        self._bare_names = {Names(self._prefix).topic(name): name for name in EVENT_TOPICS}
        config = consumer_config(settings, "watch", f"watch-{settings.replica_name}", gather=False)
        config |= {
            "auto.offset.reset": "error",
            "enable.partition.eof": report_ends,
            "error_cb": on_error,
            "queued.max.messages.kbytes": fetch_kbytes,
            "fetch.wait.max.ms": 50,
        }
        self.consumer = Consumer(config)

    def close(self) -> None:
        """Close the connections. May take a moment."""
        self.consumer.close()

    def partitions(self) -> list[TopicPartition]:
        """Return all partitions of the event topics."""
        topics = self.consumer.list_topics(timeout=TIMEOUT).topics
        found = ((name, topics[full]) for full, name in self._bare_names.items() if full in topics)
        return [TopicPartition(name, number) for name, topic in found for number in topic.partitions]

    def begin_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the first offset that each partition still has."""
        return self._offsets(partitions, OFFSET_BEGINNING)

    def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the offset of each partition's next record."""
        return self._offsets(partitions, OFFSET_END)

    def native(
        self, partition: TopicPartition, offset: int = OFFSET_INVALID
    ) -> confluent_kafka.TopicPartition:
        """Return the partition as the client's own class, with the full topic name."""
        return confluent_kafka.TopicPartition(self._prefix + partition.topic, partition.partition, offset)

    def reassign(self, partition: TopicPartition, offset: int) -> None:
        """Continue an assigned partition at this offset, after an error stopped it."""
        self.consumer.incremental_unassign([self.native(partition)])
        self.consumer.incremental_assign([self.native(partition, offset)])

    def fetch(self, max_records: int, timeout: float) -> list[Message]:
        """Return the next records and errors; an empty list after `timeout` seconds without any."""
        # `consume` alone would wait for the whole timeout unless so many records came.
        first = self.consumer.poll(timeout)
        return [] if first is None else [first, *self.consumer.consume(max_records - 1, 0)]

    def partition_of(self, message: Message) -> TopicPartition:
        """Return the partition of a record."""
        return TopicPartition(self._bare_names[message.topic() or ""], message.partition() or 0)

    def change_of(self, message: Message) -> Change | None:
        """Return the change of a record; None for an undecodable one, which its stage dead-letters."""
        from_replay = any(header[0] == REPLAY_ID for header in readable_headers(message))
        partition, offset = self.partition_of(message), message.offset() or 0
        try:
            return change_of(message.value(), from_replay, partition, offset, message.timestamp()[1])
        except Undecodable:
            return None

    def _offsets(self, partitions: Iterable[TopicPartition], which: int) -> dict[TopicPartition, int]:
        asked = [self.native(partition, which) for partition in partitions]
        if not asked:
            return {}
        return retry_while_leaderless(TIMEOUT)(self._offsets_for_times, asked)

    def _offsets_for_times(self, asked: list[confluent_kafka.TopicPartition]) -> dict[TopicPartition, int]:
        # Kafka answers for the first and the last offset as for a time. A new AdminClient needs up to three
        # seconds for the same.
        answers = self.consumer.offsets_for_times(asked, timeout=TIMEOUT)
        if error := first_error(answers):
            raise KafkaException(error)
        return {
            TopicPartition(self._bare_names[answer.topic], answer.partition): answer.offset
            for answer in answers
        }
