"""Reads several topics from their start to their present end, and on from there. Blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from services.common.config import Settings
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import MAX_RECORD_BYTES
from services.common.operations.clients import TIMEOUT, list_offsets, missing_topic, ungrouped_consumer

__all__ = ["TopicReader"]


class TopicReader:
    """Reads `topics` (full names) without a consumer group. Close it.

    `start` is where each partition began when the reader was made. `next` is the offset that the reader reads
    next; a caller may set it. `first_ms` is the time of the first record that was read (Unix milliseconds).
    After `silence` seconds without a record the reader takes the cluster for unreachable. Raises
    `confluent_kafka.KafkaException`, and NotFound for a topic that does not exist.
    """

    def __init__(self, settings: Settings, topics: Sequence[str]) -> None:
        self._settings = settings
        self._consumer: Consumer = ungrouped_consumer(
            settings,
            enable_partition_eof=True,
            queued_max_messages_kbytes=16 << 10,
            fetch_wait_max_ms=20,
            # With small portions, topics of large records progress about as fast as topics of small ones.
            max_partition_fetch_bytes=64 << 10,
            receive_message_max_bytes=MAX_RECORD_BYTES + (64 << 20),
        )
        self._partitions = [
            TopicPartition(topic, number) for topic in topics for number in self._partition_numbers(topic)
        ]
        self.start = self._offsets(OffsetSpec.earliest())  # type: ignore[no-untyped-call]
        self.next = dict(self.start)
        self.first_ms: dict[TopicPartition, int] = {}
        self.silence = 30.0

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close()

    def ends(self) -> dict[TopicPartition, int]:
        """Return where each partition ends now: the offset that its next record will have."""
        return self._offsets(OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def since(self, time_ms: int) -> dict[TopicPartition, int]:
        """Return each partition's first offset of that time (Unix milliseconds) or later, or else its end."""
        found = self._offsets(OffsetSpec.for_timestamp(time_ms))
        ends = self.ends()
        return {partition: offset if offset >= 0 else ends[partition] for partition, offset in found.items()}

    def left(self, ends: Mapping[TopicPartition, int]) -> int:
        """Return how many offsets there are between `next` and `ends`."""
        return sum(max(0, end - self.next[partition]) for partition, end in ends.items())

    def read(self, ends: Mapping[TopicPartition, int], limit: int) -> Iterator[list[Message]]:
        """Yield the records from `next` to `ends` in each partition's order, at most `limit` at a time."""
        open_ = {partition for partition, end in ends.items() if end > self.next[partition]}
        self._consumer.assign(
            [confluent_kafka.TopicPartition(*partition, self.next[partition]) for partition in open_]
        )
        heard = time.monotonic()
        while open_:
            batch: list[Message] = []
            for message in self._consumer.consume(limit, 0.02):
                partition = TopicPartition(message.topic() or "", message.partition() or 0)
                offset = message.offset() or 0
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                # Any offset may be missing, also the last one before the end.
                if error is None and offset < ends[partition]:
                    if partition not in self.first_ms:
                        self.first_ms[partition] = message.timestamp()[1]
                    batch.append(message)
                    self.next[partition] = offset + 1
                if offset + (error is None) >= ends[partition]:
                    self.next[partition] = max(self.next[partition], ends[partition])
                    open_.discard(partition)
                heard = time.monotonic()
            if batch:
                yield batch
                # The caller's own time does not count as silence.
                heard = time.monotonic()
            if time.monotonic() - heard > self.silence:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "nothing came of the topics"))
        self._consumer.unassign()

    def _partition_numbers(self, topic: str) -> list[int]:
        found = self._consumer.list_topics(topic, timeout=TIMEOUT).topics[topic]
        if found.error is not None:
            if found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise missing_topic(topic)
            raise KafkaException(found.error)
        return sorted(found.partitions)

    def _offsets(self, which: OffsetSpec) -> dict[TopicPartition, int]:
        asked = {confluent_kafka.TopicPartition(*partition): which for partition in self._partitions}
        return {
            TopicPartition(found.topic, found.partition): offset
            for found, offset in list_offsets(self._settings, asked)
        }
