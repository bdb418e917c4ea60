"""Reads a consumer group's offsets and members, without the request that can abort the process.

services/common/kafka/describe_group.py says which requests can.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from services.common.kafka import group_request
from services.common.kafka.group_request import ConsumerGroup
from services.common.kafka.leaders import retry_while_leaderless
from services.common.kafka.topic_partition import first_error

__all__ = ["Offsets", "bounds", "describe", "leave"]

_NO_COORDINATOR = frozenset(
    {
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
    }
)


def _moves(error: BaseException) -> bool:
    return isinstance(error, KafkaException) and error.args[0].code() in _NO_COORDINATOR


_patiently = Retrying(
    retry=retry_if_exception(_moves), stop=stop_after_delay(20), wait=wait_fixed(0.1), reraise=True
)


def bounds(consumer: Consumer, partition: TopicPartition) -> tuple[int, int]:
    """Return the first and the next offset of a partition; waits for a leader. Raises KafkaException."""
    ask = retry_while_leaderless(20)
    found: tuple[int, int] = ask(consumer.get_watermark_offsets, partition, timeout=20)
    return found


class Offsets:
    """The committed offsets of one group. A context manager; may be used by one thread at a time."""

    def __init__(self, cluster: str | Mapping[str, Any], group: str) -> None:
        """`cluster` has the brokers' addresses, or all of librdkafka's settings that reach them."""
        # It never subscribes, so the broker does not count it as a member.
        self._consumer = Consumer(
            {
                **_config(cluster),
                "group.id": group,
                "group.protocol": "classic",
                "enable.auto.commit": False,
            }
        )

    def __enter__(self) -> Offsets:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close()

    def partitions(self, topics: Iterable[str] | None = None) -> list[TopicPartition]:
        """Return the partitions of these topics, where they exist; without topics, of all but Kafka's own."""
        if topics is None:
            everything = self._consumer.list_topics(timeout=20).topics
            found = {name: topic for name, topic in everything.items() if name[0] != "_"}
        else:
            # Ask for one topic at a time; otherwise the broker describes all its topics.
            found = {name: self._consumer.list_topics(name, timeout=20).topics[name] for name in topics}
        return [TopicPartition(name, n) for name, topic in found.items() for n in topic.partitions]

    def bounds(self, partitions: Iterable[TopicPartition]) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the first and the next offset of each of these partitions. Raises KafkaException."""
        return {(at.topic, at.partition): bounds(self._consumer, at) for at in partitions}

    def committed(self, partitions: Iterable[TopicPartition]) -> dict[tuple[str, int], int]:
        """Return the committed offset of each of these partitions that has one.

        Waits for the group's coordinator: a broker that has just started may not be ready for it. Raises
        KafkaException.
        """
        found = _patiently(self._committed, list(partitions))
        return {(at.topic, at.partition): at.offset for at in found if at.offset >= 0}

    def _committed(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        found: list[TopicPartition] = self._consumer.committed(partitions, timeout=20)
        if error := first_error(found):
            raise KafkaException(error)
        return found

    def reset(self, offsets: Iterable[TopicPartition]) -> None:
        """Commit these offsets for a group that has no members. Raises KafkaException."""
        if error := first_error(self._consumer.commit(offsets=list(offsets), asynchronous=False)):
            raise KafkaException(error)


def describe(cluster: str | Mapping[str, Any], group: str) -> ConsumerGroup:
    """Return the group as its coordinator describes it. Raises KafkaException."""
    return group_request.describe(_config(cluster), [group], 10)[group]


def _config(cluster: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"bootstrap.servers": cluster} if isinstance(cluster, str) else dict(cluster)


def leave(bootstrap: str, group: str, member: str) -> None:
    """Leave a group in a member's name: a ConsumerGroupHeartbeat with the epoch -1 (KIP-848)."""

    def text(value: str) -> bytes:
        # A compact string of less than 127 bytes.
        return bytes([len(value) + 1]) + value.encode()

    key, version, correlation, epoch, unchanged = 68, 0, 1, -1, -1
    header = struct.pack(">hhihx", key, version, correlation, -1)
    leave = text(group) + text(member) + struct.pack(">ixxixxxx", epoch, unchanged)
    host, _, port = bootstrap.rpartition(":")
    with socket.create_connection((host, int(port)), 20) as connection, connection.makefile("rb") as answers:
        connection.sendall(struct.pack(">i", len(header + leave)) + header + leave)
        answer = answers.read(*struct.unpack(">i", answers.read(4)))
    assert struct.unpack(">ixih", answer[:11])[::2] == (correlation, 0)
