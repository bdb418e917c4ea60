"""Where records are: `TopicPartition` names a partition, `RecordLocation` one record in it.

They are plain tuples, so that pure code needs no Kafka client. The TopicPartition of confluent_kafka also
carries an offset and an error. The topic is a full name or a bare one; each use says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import confluent_kafka

__all__ = ["RecordLocation", "TopicPartition", "first_error"]


class TopicPartition(NamedTuple):
    """One partition of a topic."""

    topic: str
    partition: int


class RecordLocation(NamedTuple):
    """One record: its topic, its partition and its offset there. Its text is `topic/partition/offset`."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


def first_error(partitions: Iterable[confluent_kafka.TopicPartition]) -> confluent_kafka.KafkaError | None:
    """Return the first error that Kafka's answer names for one of its partitions, None if there is none."""
    return next((partition.error for partition in partitions if partition.error is not None), None)
